"""Open a verified TLS channel: resolve, connect, TLS, checks.

The main path is `Dialer.open()`. Errors of the system and of OpenSSL pass unchanged; `_driver.failures` translates
them. This module must not know logins, asyncpg, pools or retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from .._config.connection import ConnectionParameters
from .._config.literals import SSLNegotiation
from .._errors import ConnectError, NeonAsyncError, TLSError
from . import tcp, threads
from .overhead import LimitedTLS, LimitingContext
from .race import Attempt, Race, StepCallback, UnverifiedError
from .tls import (
    ALPN,
    NOT_TLS_REASONS,
    ClientCertificate,
    Handshake,
    build_context,
    check_handshake,
    openssl_reason,
)
from .trust import TrustAnchor

if TYPE_CHECKING:
    from .revocation.check import ChainCheck, Checker

_P = TypeVar("_P", bound=asyncio.Protocol)


class Channel(Generic[_P]):
    """A verified TLS channel to a server, on which nothing has been sent.

    Attributes:
        transport: The TLS transport.
        protocol: The transport's protocol.
        handshake: The facts about the handshake.
        handshake_time: The seconds that the handshake took: a round trip at least, and two with an SSLRequest.
        revocation: The check of the chain's revocation, or None where it was not asked for.
    """

    __slots__ = ("handshake", "handshake_time", "protocol", "revocation", "transport")

    def __init__(
        self,
        transport: asyncio.Transport,
        protocol: _P,
        handshake: Handshake,
        handshake_time: float,
    ) -> None:
        self.transport: Final = transport
        self.protocol: Final = protocol
        self.handshake: Final = handshake
        self.handshake_time: Final = handshake_time
        self.revocation: ChainCheck | None = None

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def lift_limit(self) -> None:
        """Accept any number of TLS records without data: the session is ready."""
        tls = self.transport.get_extra_info("ssl_object")
        if isinstance(tls, LimitedTLS):  # None when the connection has ended
            tls.lift_limit()


def ignore_step(step: str) -> None:
    """Ignore the start of a step."""


class Dialer:
    """Opens verified TLS channels to one server. Every channel after the first goes to the same address.

    Attributes:
        parameters: The server, and how to connect.
        on_step: Called with the name of each step as it begins: `dns`, `tcp`, `tls`, and `revocation` where the
            connect waits for a list.
    """

    def __init__(
        self,
        parameters: ConnectionParameters,
        anchor: TrustAnchor,
        revocation: Checker | None = None,
        *,
        on_step: StepCallback = ignore_step,
    ) -> None:
        self.parameters = parameters
        self.on_step = on_step
        self._anchor = anchor
        self._revocation = revocation
        self._addresses: list[tcp.Address] = []

    async def open(self, protocol_factory: Callable[[], _P]) -> Channel[_P]:
        """Return a new channel; by default with direct TLS, or else with TLS after an SSLRequest.

        Both ways verify the same. An address that fails or stays silent before anything was verified is not the end:
        the other way and the other addresses are tried. A failed verification is final.

        Raises:
            TLSError: The server refuses TLS, or does not meet the TLS policy.
            CertificateError: Its certificate has been revoked, or `revocation=require` and that is unknown.
            ConnectError: No address accepts connections, or the server closed the connection.
            OSError: Another failure of the network, of name resolution or of the handshake.
        """
        if not self._addresses:
            self._addresses = await self._resolve()
        ways = _negotiations(self.parameters)
        race = Race(
            self.parameters,
            self._addresses,
            ways,
            run=lambda race, attempt: self._open_at(race, attempt, protocol_factory),
            discard=Channel.abort,
            on_step=self.on_step,
        )
        attempt, channel = await race.winner()
        if attempt.negotiation != ways[0]:
            _remember_no_direct_tls(self.parameters)
        tcp.restore(attempt.address)
        self._addresses = [attempt.address]
        await self._check_revocation(channel)
        return channel

    def postpone_address(self) -> None:
        """Let later dials try the address of the channel last: the server did not finish the login."""
        for address in self._addresses:
            tcp.postpone(address)

    async def _open_at(
        self, race: Race[Channel[_P]], attempt: Attempt, protocol_factory: Callable[[], _P]
    ) -> Channel[_P]:
        """Make one attempt."""
        try:
            sock = await tcp.connect(attempt.address, self.parameters)
        except OSError as error:
            raise UnverifiedError(error) from None
        began = asyncio.get_running_loop().time()
        try:
            race.note_connect(attempt)
            context = await self._build_context()
            race.note_wait(attempt)
            if attempt.negotiation == "postgres":
                await _request_tls(sock, self.parameters.host)
        except BaseException:
            sock.close()
            raise
        transport, protocol = await self._handshake(attempt, sock, context, protocol_factory)
        handshake_time = asyncio.get_running_loop().time() - began
        try:
            handshake = self._check(transport, context, attempt.negotiation)
        except BaseException:
            transport.abort()
            raise
        return Channel(transport, protocol, handshake, handshake_time)

    async def _resolve(self) -> list[tcp.Address]:
        if self.parameters.hostaddr is None:
            self.on_step("dns")
        return await tcp.resolve(self.parameters)

    async def _build_context(self) -> ssl.SSLContext:
        if self.parameters.sslcrl is None and self.parameters.sslcert is None:
            return context_for(self.parameters, self._anchor)
        # Off the event loop: files are read for every dial, so that they can be renewed while the service runs, and
        # decrypting a key takes long.
        return await threads.run(context_for, self.parameters, self._anchor)

    async def _handshake(
        self, attempt: Attempt, sock: socket.socket, context: ssl.SSLContext, protocol_factory: Callable[[], _P]
    ) -> tuple[asyncio.Transport, _P]:
        inode = _inode(sock)
        attempt.end = functools.partial(_end_handshake, sock, inode)
        try:
            transport, protocol = await asyncio.get_running_loop().create_connection(
                protocol_factory,
                sock=sock,
                ssl=context,
                server_hostname=self.parameters.host,
                # The deadline of the whole dial decides; asyncio's own timeout has to come later.
                ssl_handshake_timeout=2 * self.parameters.connect_timeout,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT,
            )
        except BaseException as error:
            _disown(sock, inode)
            if attempt.negotiation == "direct" and _means_no_direct_tls(error):
                raise _no_direct_tls(self.parameters.host) from None
            if isinstance(error, OSError) and _is_unverified(error):
                raise UnverifiedError(error) from None
            raise
        finally:
            attempt.end = None
        return transport, protocol

    def _check(self, transport: asyncio.Transport, context: ssl.SSLContext, negotiation: SSLNegotiation) -> Handshake:
        """Check the handshake, and return the facts."""
        host = self.parameters.host
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        handshake = check_handshake(tls, context, server_name=host, negotiation=negotiation, anchor=self._anchor)
        if handshake.alpn is None and negotiation == "direct":
            raise _no_direct_tls(host)
        if handshake.alpn not in (None, ALPN):
            raise TLSError(f"{host} selected the protocol {handshake.alpn!r}, which was not offered. Check the server.")
        return handshake

    async def _check_revocation(self, channel: Channel[Any]) -> None:
        """Check whether the chain that was verified has been revoked, where that was asked for.

        After the race: an attempt that waits for a list would look like a server that is silent.
        """
        if self._revocation is None:
            return
        try:
            waits = functools.partial(self.on_step, "revocation")
            channel.revocation = await self._revocation.judge(channel.handshake.chain, waits)
        except BaseException:
            channel.abort()
            raise


def context_for(parameters: ConnectionParameters, anchor: TrustAnchor) -> ssl.SSLContext:
    """Return a new context as `parameters` specify it. Reads the files that they name.

    Raises:
        ConfigurationError: A file cannot be used.
    """
    certificate = None
    if parameters.sslcert is not None:
        certificate = ClientCertificate(parameters.sslcert, parameters.sslkey, parameters.sslpassword or "")
    context = build_context(
        anchor, crl=parameters.sslcrl, client_certificate=certificate, context_class=LimitingContext
    )
    context.sslobject_class = LimitedTLS
    return context


async def send_cancel_request(dialer: Dialer, *, process_id: int, secret_key: int) -> None:
    """Ask the server to cancel what a session is executing, over a verified TLS channel of its own.

    The channel must be open within `connect_timeout`. The server confirms nothing and closes the channel, which this
    function waits for, but no longer than `connect_timeout`.

    Args:
        dialer: The dialer that opened the session's channel: the request must reach the same address.
        process_id: The session's process ID, from its BackendKeyData.
        secret_key: The session's secret key, from the same message.

    Raises:
        TimeoutError: There was no channel within `connect_timeout`.
        TLSError: The server refuses TLS, or does not meet the TLS policy.
        ConnectError: The server closed the channel before the request was sent.
        OSError: Another failure of the network or of the handshake.
    """
    limit = dialer.parameters.connect_timeout
    async with asyncio.timeout(limit):
        channel = await dialer.open(_CancelProtocol)
    try:
        if channel.transport.is_closing():
            raise ConnectError(f"{dialer.parameters.host} closed the channel of a cancel request. Check the server.")
        channel.transport.write(struct.pack("!iiii", 16, _CANCEL_REQUEST_CODE, process_id, secret_key))
        await asyncio.wait([channel.protocol.closed], timeout=limit)
    finally:
        channel.transport.abort()


class _CancelProtocol(asyncio.Protocol):
    """Waits for the end of a cancel request's channel."""

    def __init__(self) -> None:
        self.closed = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


# PostgreSQL documentation, section 54.7.
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_CANCEL_REQUEST_CODE = 80877102

# A peer that does not answer our close_notify within a round trip or two is cut off; asyncio would wait for 30 s.
_SHUTDOWN_TIMEOUT = 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Direct TLS or SSLRequest

# When a server turned out not to speak direct TLS, by host, hostaddr and port. The entry expires, because a server that
# is shutting down may look the same.
_without_direct_tls: dict[tuple[str, str | None, int], float] = {}
_MEMORY = 600.0


def _negotiations(parameters: ConnectionParameters) -> tuple[SSLNegotiation, ...]:
    """Return the ways to TLS in the order in which to try them: the one requested, the one known to work, or both."""
    if parameters.sslnegotiation is not None:
        return (parameters.sslnegotiation,)
    learned = _without_direct_tls.get(_server(parameters), -math.inf)
    known = asyncio.get_running_loop().time() - learned < _MEMORY
    return ("postgres",) if known else ("direct", "postgres")


def _remember_no_direct_tls(parameters: ConnectionParameters) -> None:
    _without_direct_tls[_server(parameters)] = asyncio.get_running_loop().time()


def _server(parameters: ConnectionParameters) -> tuple[str, str | None, int]:
    return parameters.host, parameters.hostaddr, parameters.port


def _no_direct_tls(host: str) -> UnverifiedError:
    """The server closed the connection, or answered without TLS or without ALPN: it may still know SSLRequest."""
    return UnverifiedError(TLSError(f"{host} does not speak direct TLS. Remove sslnegotiation."), other_way=True)


def _means_no_direct_tls(error: BaseException) -> bool:
    """Whether a failed handshake means that the server does not know direct TLS, not that it refused TLS itself."""
    if isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return True
    return isinstance(error, ssl.SSLError) and openssl_reason(error) in NOT_TLS_REASONS


def _is_unverified(error: OSError) -> bool:
    """Whether a failed handshake has nothing to do with verification: the connection ended, or the server refused."""
    if isinstance(error, NeonAsyncError):
        return False
    if not isinstance(error, ssl.SSLError) or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return True
    reason = openssl_reason(error) or ""
    return reason in NOT_TLS_REASONS or reason in _OLD_TLS_REASONS or "ALERT" in reason or "UNRECOGNIZED_NAME" in reason


# OpenSSL's reasons for a server that speaks only older versions of TLS.
_OLD_TLS_REASONS = ("UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION")


async def _request_tls(sock: socket.socket, host: str) -> None:
    """Send an SSLRequest, and require exactly the answer `S`.

    The answer is not authenticated. Its text is never shown (CVE-2024-10977), and bytes after the `S` are never carried
    into the session (CVE-2021-23222).

    Raises:
        UnverifiedError: The server refuses TLS, answers something else, or closed the connection.
        TLSError: The server sent plaintext after it agreed.
    """
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(sock, _SSL_REQUEST)
        answer = await loop.sock_recv(sock, 2)
    except OSError as error:
        raise UnverifiedError(error) from None
    if answer == b"S":
        return
    if answer.startswith(b"S"):
        raise TLSError(
            f"{host} sent plaintext after it agreed to TLS, as an attacker in between would. Do not continue; check "
            "host and network."
        )
    if not answer:
        closed = f"{host} closed the connection when asked for TLS. Check host, hostaddr and port."
        raise UnverifiedError(ConnectError(closed))
    if answer == b"N":
        refused = f"{host} does not offer TLS. Neon always does: check host, hostaddr and port."
    else:
        refused = (
            f"{host} answered the request for TLS with something else. Check that this is the port of a PostgreSQL "
            "server."
        )
    raise UnverifiedError(TLSError(refused))


# ---------------------------------------------------------------------------------------------------------------------
# The socket of a failed handshake


def _end_handshake(sock: socket.socket, inode: int | None) -> None:
    """End a handshake whose result is not wanted any more, by shutting its socket down.

    Not by a cancellation: uvloop then leaves the timer of the handshake running, which holds 76 kB until it fires, or
    writes to the transport that it has closed.
    """
    if inode is not None and _inode(sock) == inode:
        with contextlib.suppress(OSError):  # the server has closed the connection
            sock.shutdown(socket.SHUT_RDWR)


def _inode(sock: socket.socket) -> int | None:
    try:
        return os.fstat(sock.fileno()).st_ino
    except OSError:  # closed; or a socket on Windows, where there is no uvloop
        return None


def _disown(sock: socket.socket, inode: int | None) -> None:
    """Leave the descriptor of `sock` to the event loop, which failed to make a transport of it and closes it.

    uvloop connects the two late: when the connection was reset before, its transport has closed the descriptor, and
    `sock` would close it again, when another socket may have the number.
    """
    if inode is not None and _inode(sock) != inode:
        sock.detach()
