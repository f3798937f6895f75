"""Open a verified TLS channel: resolve, connect, TLS, checks.

The main path is `Dialer.open()`. Errors of the system and of OpenSSL pass unchanged; `_driver.failures` translates
them. This module must not know logins, asyncpg, pools or retries.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

from .._config.connection import ConnectionParameters
from .._errors import ConnectError, TLSError
from . import tcp
from .tls import (
    ALPN,
    NOT_TLS_REASONS,
    ClientCertificate,
    TLSReport,
    build_context,
    check_handshake,
    openssl_reason,
)
from .trust import TrustAnchor

_P = TypeVar("_P", bound=asyncio.Protocol)

StepCallback: TypeAlias = Callable[[str], None]


class Channel(Generic[_P]):
    """A verified TLS channel to a server, on which nothing has been sent.

    Attributes:
        transport: The TLS transport.
        protocol: The transport's protocol.
        certificate: The server's leaf certificate in DER.
        report: The facts about the handshake.
    """

    __slots__ = ("certificate", "protocol", "report", "transport")

    def __init__(self, transport: asyncio.Transport, protocol: _P, certificate: bytes, report: TLSReport) -> None:
        self.transport: Final = transport
        self.protocol: Final = protocol
        self.certificate: Final = certificate
        self.report: Final = report


def ignore_step(step: str) -> None:
    """Ignore the start of a step."""


class Dialer:
    """Opens verified TLS channels to one server. Every channel after the first goes to the same address.

    Attributes:
        parameters: The server, and how to connect.
        on_step: Called with the name of each step as it begins: `dns`, `tcp`, `tls`.
    """

    def __init__(
        self, parameters: ConnectionParameters, anchor: TrustAnchor, *, on_step: StepCallback = ignore_step
    ) -> None:
        self.parameters = parameters
        self.on_step = on_step
        self._anchor = anchor
        self._addresses: list[tcp.Address] = []

    async def open(self, protocol_factory: Callable[[], _P]) -> Channel[_P]:
        """Return a new channel; by default with direct TLS, or else with TLS after an SSLRequest.

        Both ways verify the same. A failed verification is final: neither the other way nor another address is tried.

        Raises:
            TLSError: The server refuses TLS, or does not meet the TLS policy.
            ConnectError: No address accepts connections, or the server closed the connection.
            OSError: Another failure of the network, of name resolution or of the handshake.
        """
        first, *fallback = _negotiations(self.parameters)
        try:
            return await self._open_with(first, protocol_factory)
        except _NoDirectTLSError:
            if not fallback:
                raise TLSError(f"{self.parameters.host} does not speak direct TLS. Remove sslnegotiation.") from None
        channel = await self._open_with("postgres", protocol_factory)
        _remember_no_direct_tls(self.parameters)
        return channel

    async def _open_with(self, negotiation: str, protocol_factory: Callable[[], _P]) -> Channel[_P]:
        if not self._addresses:
            self._addresses = await self._resolve()
        self.on_step("tcp")
        sock, address = await tcp.connect(self._addresses, self.parameters)
        try:
            self.on_step("tls")
            if negotiation == "postgres":
                await _request_tls(sock, self.parameters.host)
            context = await self._build_context()
        except BaseException:
            sock.close()
            raise
        transport, protocol = await self._handshake(sock, context, negotiation, protocol_factory)
        try:
            certificate, report = self._check(transport, context, negotiation)
        except BaseException:
            transport.abort()
            raise
        self._addresses = [address]
        return Channel(transport, protocol, certificate, report)

    async def _resolve(self) -> list[tcp.Address]:
        if self.parameters.hostaddr is None:
            self.on_step("dns")
        return await tcp.resolve(self.parameters)

    async def _build_context(self) -> ssl.SSLContext:
        if self.parameters.sslcrl is None and self.parameters.sslcert is None:
            return context_for(self.parameters, self._anchor)
        # Off the event loop: files are read for every dial, so that they can be renewed while the service runs, and
        # decrypting a key takes long.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, context_for, self.parameters, self._anchor)

    async def _handshake(
        self, sock: socket.socket, context: ssl.SSLContext, negotiation: str, protocol_factory: Callable[[], _P]
    ) -> tuple[asyncio.Transport, _P]:
        inode = _inode(sock)
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
            if negotiation == "direct" and _means_no_direct_tls(error):
                raise _NoDirectTLSError from None
            raise
        return transport, protocol

    def _check(
        self, transport: asyncio.Transport, context: ssl.SSLContext, negotiation: str
    ) -> tuple[bytes, TLSReport]:
        """Check the handshake, and return the server's certificate and the facts."""
        host = self.parameters.host
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        report = check_handshake(tls, context, server_name=host, negotiation=negotiation, anchor=self._anchor)
        if report.alpn is None and negotiation == "direct":
            raise _NoDirectTLSError
        if report.alpn not in (None, ALPN):
            raise TLSError(f"{host} selected the protocol {report.alpn!r}, which was not offered. Check the server.")
        certificate = tls.getpeercert(binary_form=True)
        assert certificate is not None  # checked above
        return certificate, report


def context_for(parameters: ConnectionParameters, anchor: TrustAnchor) -> ssl.SSLContext:
    """Return a new context as `parameters` specify it. Reads the files that they name.

    Raises:
        ConfigurationError: A file cannot be used.
    """
    certificate = None
    if parameters.sslcert is not None:
        certificate = ClientCertificate(parameters.sslcert, parameters.sslkey, parameters.sslpassword or "")
    return build_context(anchor, crl=parameters.sslcrl, client_certificate=certificate)


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


def _negotiations(parameters: ConnectionParameters) -> tuple[str, ...]:
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


class _NoDirectTLSError(Exception):
    """The server closed the connection, or answered without TLS or without ALPN: it may still know SSLRequest."""


def _means_no_direct_tls(error: BaseException) -> bool:
    """Whether a failed handshake means that the server does not know direct TLS, not that it refused TLS itself."""
    if isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return True
    return isinstance(error, ssl.SSLError) and openssl_reason(error) in NOT_TLS_REASONS


async def _request_tls(sock: socket.socket, host: str) -> None:
    """Send an SSLRequest, and require exactly the answer `S`.

    The answer is not authenticated. Its text is never shown (CVE-2024-10977), and bytes after the `S` are never carried
    into the session (CVE-2021-23222).
    """
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, _SSL_REQUEST)
    answer = await loop.sock_recv(sock, 2)
    if answer == b"S":
        return
    if answer == b"N":
        raise TLSError(f"{host} does not offer TLS. Neon always does: check host, hostaddr and port.")
    if answer.startswith(b"S"):
        raise TLSError(
            f"{host} sent plaintext after it agreed to TLS, as an attacker in between would. Do not continue; check "
            "host and network."
        )
    if not answer:
        raise ConnectError(f"{host} closed the connection when asked for TLS. Check host, hostaddr and port.")
    raise TLSError(
        f"{host} answered the request for TLS with something else. Check that this is the port of a PostgreSQL server."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The socket of a failed handshake


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
