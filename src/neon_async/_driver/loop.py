"""What asyncpg is given as `loop=`: the running event loop, with another way to connect.

`LoopAdapter.create_connection()` returns a transport over finished, verified and authenticated TLS. So asyncpg never
sees plaintext or the password, and never answers an authentication request. This module knows only the shape of
asyncpg's protocol, and must not know its classes, pools or deadlines.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._timing import Timer
from .._wire.dial import Channel, Dialer, ignore_step, send_cancel_request
from .._wire.login import EarlyLoginRefusedError, LoginCache, LoginProtocol, Secret, log_in
from .._wire.transport import SessionTransport

if TYPE_CHECKING:
    from .._config.literals import SASLMechanism
    from .._wire.revocation.check import ChainCheck
    from .._wire.tls import Handshake


class LoopAdapter:
    """The event loop that asyncpg is given for one dial: the running loop, except for `create_connection()`.

    A finished connection must hold the running loop itself, because `asyncio.current_task(loop)` compares loops by
    identity from Python 3.14 on. The adapter stays for the connection's cancel requests.

    Attributes:
        handshake: The facts about the TLS handshake, or None before it.
        handshake_time: The seconds that it took.
        revocation: The check of the chain's revocation, or None where it was not asked for.
    """

    def __init__(self, dialer: Dialer, *, secret: Secret, cache: LoginCache) -> None:
        self.handshake: Handshake | None = None
        self.handshake_time = 0.0
        self.revocation: ChainCheck | None = None
        self._loop = asyncio.get_running_loop()
        self.call_later = StatementTimer().start  # asyncpg calls it for the timeout of a statement only
        self._dialer = dialer
        self._secret: Secret | None = secret
        self._cache = cache
        self._channel: Channel[LoginProtocol] | None = None
        self._transport: SessionTransport | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def __repr__(self) -> str:
        return f"<LoopAdapter for {self._dialer.parameters.host}>"

    async def create_connection(
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str, port: int, *, ssl: object = None
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect and log in, and return the session's transport and asyncpg's protocol. Serves asyncpg once.

        Raises:
            EndpointError, AuthenticationError, TLSError, ConnectError, OSError: See `Dialer.open()` and `log_in()`.
        """
        secret, self._secret = self._secret, None
        if secret is None or ssl is None:
            raise RuntimeError("asyncpg requested a second connection, or one without TLS.")
        try:
            try:
                protocol = await self._open_session(protocol_factory, secret, early=self._cache.mechanism)
            except EarlyLoginRefusedError:
                self.abort()
                self._cache.mechanism = None
                protocol = await self._open_session(protocol_factory, secret, early=None)
        except (OSError, asyncio.CancelledError):  # cancelled: the deadline has expired, most likely
            if self._channel is not None:
                self._dialer.postpone_address()
            raise
        finally:
            self._dialer.on_step = ignore_step  # a cancel request is no step of a dial
        assert self._transport is not None
        return self._transport, protocol

    def hand_over(self) -> Handshake:
        """Return the facts about the handshake of the finished session, and keep only what a cancel request needs."""
        self._channel = self._transport = None
        assert self.handshake is not None
        return self.handshake

    def abort(self) -> None:
        """Close the connection at once, if there is one."""
        if self._channel is not None:
            self._channel.transport.abort()

    async def cancel(self, process_id: int, secret_key: int) -> None:
        """Send a cancel request for the session; see `send_cancel_request()`."""
        await send_cancel_request(self._dialer, process_id=process_id, secret_key=secret_key)

    async def _open_session(
        self, protocol_factory: Callable[[], asyncio.Protocol], secret: Secret, *, early: SASLMechanism | None
    ) -> asyncio.Protocol:
        """Open a channel, log in, and return asyncpg's protocol, which owns the transport from then on."""
        parameters = self._dialer.parameters
        channel = self._channel = await self._dialer.open(lambda: LoginProtocol(parameters.host))
        self.handshake, self.handshake_time = channel.handshake, channel.handshake_time
        self.revocation = channel.revocation
        self._dialer.on_step("authentication")
        channel.protocol.require_silence()
        protocol = protocol_factory()
        self._transport = SessionTransport(channel.transport)
        startup = self._transport.startup_of(protocol)
        mechanism = await log_in(
            channel.protocol,
            startup=startup,
            certificate=channel.handshake.certificate,
            binding_required=parameters.channel_binding == "require",
            secret=secret,
            cache=self._cache,
            early=early,
        )
        await channel.protocol.hand_over(self._transport.in_front_of(protocol))
        channel.lift_limit()
        self._cache.mechanism = channel.handshake.mechanism = mechanism
        return protocol


class StatementTimer:
    """The timer of the statement that is under way on a connection, of which there is one at most.

    Nearly all statements end in time. So the timer of the event loop stays set when one has ended: it fires once in a
    `command_timeout`, and is set again where a later statement has time left.
    """

    __slots__ = ("_call", "_due", "_timer")

    def __init__(self) -> None:
        self._timer = Timer(self._fire)
        self._due = math.inf
        self._call: tuple[Callable[..., object], tuple[object, ...]] | None = None

    def __repr__(self) -> str:
        return f"<StatementTimer {'off' if self._call is None else 'on'}>"

    def start(self, delay: float, callback: Callable[..., object], *args: object) -> StatementTimer:
        """Call `callback` after `delay` seconds, unless it is cancelled before; as `loop.call_later()`."""
        self._due = time.monotonic() + delay
        self._call = callback, args
        self._timer.set(self._due)
        return self

    def cancel(self) -> None:
        """Call nothing: the statement has ended."""
        self._call = None

    def _fire(self) -> None:
        if self._call is None:
            return
        if time.monotonic() < self._due:
            self._timer.set(self._due)
            return
        (callback, args), self._call = self._call, None
        callback(*args)
