"""Log in, from the StartupMessage to ReadyForQuery, and then hand the connection over.

This module knows the messages of a login and their order. It must not know TCP, TLS or how keys are derived.
"""

from __future__ import annotations

import asyncio
import functools
import re
import struct
from typing import TYPE_CHECKING, TypeAlias, cast

from .._errors import AuthenticationError, ConnectError, ProtocolError, ServerError, server_error
from . import threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._config.literals import SASLMechanism
    from .scram import Exchange, KeyCache
    from .transport import Stream

# A function that returns the password. No variable of ours holds the text, so no error tracker can record it.
Secret: TypeAlias = "Callable[[], str]"  # noqa: S105


class LoginCache:
    """What earlier logins to one server have established.

    Attributes:
        mechanism: The SASL mechanism that the server chose last, or None.
        keys: The derived keys of its passwords, or None before the first login.
    """

    def __init__(self) -> None:
        self.mechanism: SASLMechanism | None = None
        self.keys: KeyCache | None = None


class EarlyLoginRefusedError(Exception):
    """The server does not accept an exchange that began before its request. Connect again, and wait for the request."""


async def log_in(
    protocol: LoginProtocol,
    *,
    startup: bytes = b"",
    certificate: bytes,
    binding_required: bool,
    secret: Secret,
    cache: LoginCache,
    early: SASLMechanism | None,
) -> SASLMechanism:
    """Run one SCRAM exchange, up to the point where AuthenticationOk must follow, and return its mechanism.

    Args:
        protocol: The protocol of the channel, on which nothing has been sent.
        startup: The StartupMessage; empty where it has been sent.
        certificate: The server's leaf certificate in DER.
        binding_required: Whether a login without channel binding is refused.
        secret: Returns the password.
        cache: What earlier logins to this server have established.
        early: A mechanism to begin with at once, which saves one round trip, or None to wait for the server's request.

    Raises:
        EarlyLoginRefusedError: The server refused the exchange that began early.
        AuthenticationError: The server requested something else, did not prove its identity, or cannot bind the login.
        ProtocolError: The server sent what no PostgreSQL server sends.
        ConnectError: The server closed the connection.
    """
    # scramp takes 50 ms to import; see prepare()
    from .scram import PLUS, Exchange, KeyCache, binding_data, choose_mechanism

    keys = cache.keys = cache.keys or KeyCache()
    binding = binding_data(certificate)
    if early == PLUS and binding is None:  # the server has a new certificate
        early = None
    exchange = None
    if early:
        exchange = _begin(protocol, Exchange(early, binding=binding, host=protocol.host), startup)
    elif startup:
        protocol.transport.write(startup)
    offer: bytes | None = None
    try:
        offer = await protocol.request(_SASL)
        mechanism = choose_mechanism(
            offer.decode("ascii", "replace").split("\0"),
            can_bind=binding is not None,
            required=binding_required,
            host=protocol.host,
        )
        if exchange is None:
            exchange = _begin(protocol, Exchange(mechanism, binding=binding, host=protocol.host))
        elif exchange.mechanism != mechanism:
            raise EarlyLoginRefusedError
        challenge = await protocol.request(_SASL_CONTINUE)
    except (AuthenticationError, ServerError) as error:
        # An error of the server in place of an offer concerns the endpoint or the user: a second attempt would get the
        # same one.
        if early and (offer is not None or isinstance(error, AuthenticationError)):
            raise EarlyLoginRefusedError from None
        raise
    await _prove(protocol, exchange, challenge, secret, keys)
    return exchange.mechanism


def _begin(protocol: LoginProtocol, exchange: Exchange, startup: bytes = b"") -> Exchange:
    first = exchange.first()
    protocol.send(exchange.mechanism.encode() + struct.pack("!xi", len(first)) + first, startup)
    return exchange


async def _prove(
    protocol: LoginProtocol, exchange: Exchange, challenge: bytes, secret: Secret, cached: KeyCache
) -> None:
    """Prove that the client knows the password, and require the same proof of the server."""
    salt, iterations = exchange.challenge(challenge)
    known = keys = cached.get(secret, salt, iterations)
    if keys is None:  # PBKDF2 takes milliseconds, or a second where the server requests it: not on the event loop
        from .scram import Keys

        keys = await threads.run(Keys, secret, salt, iterations)
    protocol.require_silence()
    protocol.send(exchange.final(keys))
    protocol.expect_session()
    try:
        exchange.finish(await protocol.request(_SASL_FINAL))
    except (AuthenticationError, ServerError):
        cached.evict(secret)
        raise
    if known is None:
        cached.put(secret, salt, iterations, keys)


# Messages before AuthenticationOk are short: libpq accepts 2,000 bytes, and 30,000 for errors (fe-connect.c). Servers
# stay far below both.
_MAX_MESSAGE = 8192
_MAX_BUFFERED = 8 * _MAX_MESSAGE
# An authenticated server may have more to say: a login trigger (PostgreSQL 17), or PgBouncer's login_notify_message.
_MAX_SESSION_START = 4 << 20


class LoginProtocol(asyncio.Protocol):
    """The protocol of a channel during the login: buffers what the server sends, and returns it message by message."""

    transport: asyncio.Transport

    def __init__(self, host: str) -> None:
        self.host = host
        self._received = bytearray()
        self._limit = _MAX_BUFFERED
        self._waiter: asyncio.Future[None] | None = None
        self._end: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, but another base class

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > self._limit:
            self._end = ProtocolError(
                f"{self.host} sent more than {self._limit} bytes during authentication, more than any PostgreSQL "
                "server does. Check the server."
            )
            self.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        closed = f"{self.host} closed the connection during authentication. Try again; check the server."
        self._end = self._end or exc or ConnectError(closed)
        self._wake()

    async def closed(self) -> None:
        while self._end is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def require_silence(self) -> None:
        """Raise an error where the server has sent data out of turn, or has closed the connection."""
        if self._received:
            raise ProtocolError(
                f"{self.host} sent data before the client's message, as no PostgreSQL server does. Check the server."
            )
        if self._end:
            raise self._end

    def expect_session(self) -> None:
        """Accept as much as the start of a session may contain, which comes together with the end of the exchange."""
        self._limit = _MAX_SESSION_START

    def send(self, payload: bytes, startup: bytes = b"") -> None:
        """Send a SASLInitialResponse or SASLResponse, in one packet with the StartupMessage where that is before it."""
        self.transport.write(startup + struct.pack("!ci", b"p", 4 + len(payload)) + payload)

    async def request(self, code: int) -> bytes:
        """Wait for the authentication request with `code`, remove it from the buffer, and return its data.

        Raises:
            AuthenticationError: The server sent another authentication request.
            ServerError: The server sent an ErrorResponse.
            ProtocolError: The server sent something else.
        """
        data = await self._peek(code)
        del self._received[: 9 + len(data)]
        return data

    async def hand_over(self, protocol: asyncio.Protocol | Stream) -> None:
        """Wait for AuthenticationOk and ReadyForQuery, and pass these and everything that follows to `protocol`.

        The messages between the two are checked: an authentication request there crashes the process with asyncpg 0.32.
        """
        position, is_ready = 9 + len(await self._peek(_OK)), False
        while not is_ready:
            position, is_ready = self._check_session_start(position)
            if not is_ready:
                await self._receive_more()
        if self._end:  # the transport reports the end only once, and has reported it to this protocol
            raise self._end
        self.transport.set_protocol(protocol)
        try:
            protocol.data_received(bytes(self._received))
        except Exception:  # noqa: BLE001  raised by asyncpg's parser
            raise ProtocolError(f"{self.host} sent a malformed message after the login. Check the server.") from None
        self._received.clear()

    async def _peek(self, code: int) -> bytes:
        """Wait for the authentication request with `code`, and return its data without removing it."""
        kind, body = await self._message()
        for _ in range(_MAX_NOTICES):
            if kind != b"N":  # NoticeResponse: there is no listener yet
                break
            del self._received[: 5 + len(body)]
            kind, body = await self._message()
        if kind == b"E":
            raise server_error(body)
        if kind != b"R" or len(body) < 4:
            raise ProtocolError(
                f"{self.host} sent message {kind!r} during authentication, where it is not allowed. Check the server."
            )
        requested = int.from_bytes(body[:4], "big")
        if requested != code:
            raise AuthenticationError(
                f"{self.host} {_REQUESTS.get(requested, f'requested the unknown authentication method {requested}')}. "
                "Only SCRAM-SHA-256, complete and in order, is answered. No password was sent. Check the server."
            )
        return body[4:]

    def _check_session_start(self, position: int) -> tuple[int, bool]:
        """Check the messages after the login that have come completely, from `position` on.

        Returns:
            Where they end, and whether the last one is ReadyForQuery.
        """
        received, size = self._received, len(self._received)
        while (begin := position + _HEADER_SIZE) <= size:
            kind, length = _HEADER.unpack_from(received, position)
            if not 4 <= length <= _MAX_SESSION_START:
                raise self._bad_length(length, _MAX_SESSION_START)
            end = position + 1 + length
            if end > size:
                break
            form = _form_of(kind)
            if form is None or not form.fullmatch(received, begin, end):
                if kind == b"E":
                    raise server_error(bytes(received[begin:end]))
                raise ProtocolError(
                    f"{self.host} sent message {kind!r} after the login, where it is not allowed. Check the server."
                )
            position = end
            if kind == b"Z":
                return position, True
        return position, False

    async def _message(self) -> tuple[bytes, bytes]:
        """Wait until the first message in the buffer is complete, and return its type and body."""
        received = self._received
        while True:
            if len(received) >= _HEADER_SIZE:
                kind, length = _HEADER.unpack_from(received)
                if not 4 <= length <= _MAX_MESSAGE:
                    raise self._bad_length(length, _MAX_MESSAGE)
                if len(received) > length:
                    return kind, bytes(received[_HEADER_SIZE : 1 + length])
            await self._receive_more()

    def _bad_length(self, length: int, limit: int) -> ProtocolError:
        return ProtocolError(
            f"{self.host} announced a message of {length} bytes during authentication; 4 to {limit} are accepted. "
            "Check the server."
        )

    async def _receive_more(self) -> None:
        """Wait until the server has sent something.

        Raises:
            Exception: The connection has ended.
        """
        if self._end:
            raise self._end
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


_HEADER = struct.Struct("!ci")  # the type of a message, and its length without the type
_HEADER_SIZE = 5
_MAX_NOTICES = 16  # PostgreSQL sends none here

# PostgreSQL documentation, section 54.7, Authentication*.
_OK, _SASL, _SASL_CONTINUE, _SASL_FINAL = 0, 10, 11, 12
_REQUESTS = {
    _OK: "accepted the login without authentication, or before its end",
    2: "requested Kerberos V5",
    3: "requested the password in cleartext",
    5: "requested the password as an MD5 hash",
    7: "requested GSSAPI",
    8: "continued GSSAPI",
    9: "requested SSPI",
    _SASL: "requested SASL again",
    _SASL_CONTINUE: "continued a SASL exchange that is not at this point",
    _SASL_FINAL: "finished a SASL exchange that is not at this point",
}

# What may follow between AuthenticationOk and the first ReadyForQuery, and its form (PostgreSQL documentation, sections
# 54.2.1 and 54.7; protocol 3.0).
_AFTER_LOGIN = {
    b"S": rb"[^\0]+\0[^\0]*\0",  # ParameterStatus: name and value
    b"K": rb"(?s:.{8})",  # BackendKeyData: process ID and secret key
    b"N": rb"(?:[^\0]+\0)*\0",  # NoticeResponse: fields
    b"Z": rb"I",  # ReadyForQuery, outside of a transaction
}


@functools.cache  # compiled for the first login, and not when this module is imported
def _form_of(kind: bytes) -> re.Pattern[bytes] | None:
    return re.compile(_AFTER_LOGIN[kind]) if kind in _AFTER_LOGIN else None
