"""Open one transport: TCP, TLS, the checks after the handshake, the login; then give it to asyncpg.

`Door` is what asyncpg is given as its `loop`: its `create_connection` is ours, so asyncpg never sees a plaintext
transport. This module knows neither pools nor retries nor asyncpg itself, only the shape of its protocol. What the
system or OpenSSL raises passes through; `_connect` gives it its public name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import math
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from .._config.connection import ConnectionParameters
from .._errors import ConnectError, TLSError
from .login import Logins, Mailbox, Secret, ServerAsksOtherwiseError, log_in
from .tls import (
    ALPN,
    NOT_TLS_REASONS,
    ClientCertificate,
    TLSReport,
    build_context,
    check_handshake,
    openssl_reason,
)
from .transport import SessionTransport as Wire
from .trust import TrustAnchor

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)  # PostgreSQL documentation, section 54.7, SSLRequest

# RFC 8305, section 5: the recommended delay before the next address is tried beside the ones under way.
_ATTEMPT_DELAY = 0.25
# A peer that does not answer our close_notify within a round trip or two is cut off; asyncio would wait for 30 s.
_SHUTDOWN_TIMEOUT = 2.0

_Address: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]
_ProtocolFactory: TypeAlias = Callable[[], asyncio.Protocol]

# When a server turned out not to speak direct TLS, by (host, hostaddr, port). Both modes verify the same. Forgotten
# after a while, for what looked like it may have been a server on its way down.
_without_direct_tls: dict[tuple[str, str | None, int], float] = {}
_MEMORY = 600.0


class Door:
    """The `loop` of one asyncpg connection: the running loop, but for how connections are made.

    Its first connection is the session's own; later ones carry cancel requests, to the same address, inside TLS.
    """

    def __init__(
        self,
        parameters: ConnectionParameters,
        anchor: TrustAnchor,
        *,
        secret: Secret,
        logins: Logins,
        on_step: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._parameters = parameters
        self._anchor = anchor
        self._secret: Secret | None = secret
        self._logins = logins
        self._on_step = on_step
        self._addresses: list[_Address] = []
        self._mailbox: Mailbox | None = None
        self.wire: Wire | None = None
        self.report: TLSReport | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    # asyncio.current_task(loop) looks the loop up in a dict, and asyncpg asks it with the loop it was given.
    def __eq__(self, other: object) -> bool:
        return other is self or other is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)

    def __repr__(self) -> str:
        return f"<Door to {self._parameters.host}>"

    def abort(self) -> None:
        """Drop the session's connection at once, if there is one."""
        if self._mailbox:
            self._mailbox.abort()

    async def create_connection(
        self, protocol_factory: _ProtocolFactory, host: str, port: int, *, ssl: object = None
    ) -> tuple[Any, asyncio.Protocol]:
        """Serve asyncpg's two calls: with `ssl` for a session under direct TLS, without it for a cancel request."""
        if ssl is None:
            return await self._open_for_cancel(protocol_factory)
        try:
            protocol = await self._open_session(protocol_factory, early=self._logins.mechanism)
        except ServerAsksOtherwiseError:
            self.abort()
            self._logins.mechanism = None
            protocol = await self._open_session(protocol_factory, early=None)
        finally:
            # What follows are cancel requests: they need no password, and are no steps of a dial.
            self._secret, self._on_step = None, _say_nothing
        return self.wire, protocol

    async def _open_session(self, protocol_factory: _ProtocolFactory, *, early: str | None) -> asyncio.Protocol:
        """Return asyncpg's protocol, authenticated, with the transport its own from here on."""
        self._mailbox, address, self.report = await self._open_tls()
        self._addresses = [address]  # a cancel request must reach the same server
        self._on_step("authentication")
        assert self._secret is not None
        self._mailbox.require_silence()
        protocol = protocol_factory()
        self.wire = Wire(self._mailbox.transport)
        protocol.connection_made(cast(asyncio.Transport, self.wire))  # asyncpg sends its StartupMessage
        mechanism = await log_in(
            self._mailbox,
            host=self._parameters.host,
            certificate=self._mailbox.transport.get_extra_info("ssl_object").getpeercert(binary_form=True),
            channel_binding=self._parameters.channel_binding,
            secret=self._secret,
            logins=self._logins,
            early=early,
        )
        await self._mailbox.hand_over(protocol)
        self._logins.mechanism = mechanism
        self.report = dataclasses.replace(self.report, mechanism=mechanism)
        return protocol

    async def cancel(self, process_id: int, secret_key: int) -> None:
        """Send a cancel request to the server of the session."""
        async with asyncio.timeout(self._parameters.connect_timeout):
            mailbox, _, _ = await self._open_tls()
            try:
                mailbox.transport.write(struct.pack("!iiii", 16, 80877102, process_id, secret_key))
                await mailbox.closed()
            finally:
                mailbox.abort()

    async def start_tls(self, transport: _FinishedTLS, *_: object, **__: object) -> asyncio.Transport:
        """Serve asyncpg's cancel request, for which TLS is up already."""
        if transport.finished.is_closing():  # the mailbox was told of the end, and nobody will tell asyncpg
            raise ConnectError(f"{self._parameters.host} dropped the connection of a cancel request.")
        return transport.finished

    async def _open_for_cancel(self, protocol_factory: _ProtocolFactory) -> tuple[_FinishedTLS, asyncio.Protocol]:
        async with asyncio.timeout(self._parameters.connect_timeout):
            mailbox, _, _ = await self._open_tls()
        # asyncpg waits for the server to close. A server that never does must not hold up the caller.
        self._loop.call_later(self._parameters.connect_timeout, mailbox.abort)
        protocol = protocol_factory()
        return _FinishedTLS(self._loop, mailbox.transport, protocol), protocol

    async def _open_tls(self) -> tuple[Mailbox, _Address, TLSReport]:
        """Open TLS in the mode that the parameters name or the server is known to speak; by default direct first."""
        parameters = self._parameters
        server = (parameters.host, parameters.hostaddr, parameters.port)
        learned = _without_direct_tls.get(server, -math.inf)
        known = parameters.sslnegotiation is None and self._loop.time() - learned < _MEMORY
        if known or parameters.sslnegotiation == "postgres":
            return await self._open_tls_as("postgres")
        try:
            return await self._open_tls_as("direct")
        except _NoDirectTLSError:
            if parameters.sslnegotiation == "direct":
                raise TLSError(f"{parameters.host} does not speak direct TLS. Leave sslnegotiation out.") from None
        opened = await self._open_tls_as("postgres")
        _without_direct_tls[server] = self._loop.time()
        return opened

    async def _open_tls_as(self, negotiation: str) -> tuple[Mailbox, _Address, TLSReport]:
        if not self._addresses:
            self._addresses = await self._resolve()
        self._on_step("tcp")
        sock, address = await _connect_tcp(self._loop, self._addresses, self._parameters)
        try:
            self._on_step("tls")
            if negotiation == "postgres":
                await self._request_tls(sock)
            context = await self._build_context()
        except BaseException:
            sock.close()
            raise
        mailbox = await self._handshake(sock, context, negotiation)
        try:
            report = self._check(mailbox, context, negotiation)
        except BaseException:
            mailbox.abort()
            raise
        return mailbox, address, report

    async def _resolve(self) -> list[_Address]:
        parameters = self._parameters
        if parameters.hostaddr is not None:
            # Numeric: parsed on the spot, nothing is looked up.
            found = socket.getaddrinfo(
                parameters.hostaddr, parameters.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        else:
            self._on_step("dns")
            found = await self._loop.getaddrinfo(parameters.host, parameters.port, type=socket.SOCK_STREAM)
        return _interleave([(family, address) for family, _, _, _, address in found])

    async def _request_tls(self, sock: socket.socket) -> None:
        """Ask as PostgreSQL does before direct TLS; anything but exactly `S` ends the attempt.

        The answer is not authenticated. Its text is never shown (CVE-2024-10977), and bytes behind the `S` are never
        carried into the session (CVE-2021-23222).
        """
        await self._loop.sock_sendall(sock, _SSL_REQUEST)
        answer = await self._loop.sock_recv(sock, 2)
        if answer == b"S":
            return
        host = self._parameters.host
        if answer == b"N":
            raise TLSError(f"{host} offers no TLS. Neon always does: check host, hostaddr and port.")
        if answer.startswith(b"S"):
            raise TLSError(
                f"{host} sent plaintext behind its consent to TLS, as an attacker in between would; refused."
            )
        if not answer:
            raise ConnectError(f"{host} closed the connection when asked for TLS. Check host, hostaddr and port.")
        raise TLSError(f"{host} answered the request for TLS with something else. Is this a PostgreSQL server's port?")

    async def _build_context(self) -> ssl.SSLContext:
        parameters = self._parameters
        if parameters.sslcrl is None and parameters.sslcert is None:
            return build_context(self._anchor)
        # Files, read anew so that they can be renewed under a running service; and a key takes long to decrypt.
        certificate = client_certificate(parameters)
        build = functools.partial(build_context, self._anchor, crl=parameters.sslcrl, client_certificate=certificate)
        return await self._loop.run_in_executor(None, build)

    async def _handshake(self, sock: socket.socket, context: ssl.SSLContext, negotiation: str) -> Mailbox:
        parameters = self._parameters
        inode = _inode(sock)
        try:
            _, mailbox = await self._loop.create_connection(
                lambda: Mailbox(parameters.host),
                sock=sock,
                ssl=context,
                server_hostname=parameters.host,
                # The deadline over the whole dial is the one that counts; asyncio's own has to come later.
                ssl_handshake_timeout=2 * parameters.connect_timeout,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT,
            )
        except BaseException as error:
            _disown(sock, inode)
            if negotiation == "direct" and _says_no_tls(error):
                raise _NoDirectTLSError from None
            raise
        return mailbox

    def _check(self, mailbox: Mailbox, context: ssl.SSLContext, negotiation: str) -> TLSReport:
        report = check_handshake(
            mailbox.transport.get_extra_info("ssl_object"),
            context,
            server_name=self._parameters.host,
            negotiation=negotiation,
            anchor=self._anchor,
        )
        if report.alpn is None and negotiation == "direct":
            raise _NoDirectTLSError
        if report.alpn not in (None, ALPN):
            raise TLSError(f"{self._parameters.host} chose the protocol {report.alpn!r}, which was not offered.")
        return report


def _say_nothing(step: str) -> None:
    pass


def client_certificate(parameters: ConnectionParameters) -> ClientCertificate | None:
    """Return the client certificate that the parameters name, if they do."""
    if parameters.sslcert is None:
        return None
    return ClientCertificate(parameters.sslcert, parameters.sslkey, parameters.sslpassword or "")


class _NoDirectTLSError(Exception):
    """The server closed, or answered without TLS or without its ALPN: it may still know SSLRequest."""


def _says_no_tls(error: BaseException) -> bool:
    """Whether a failed handshake tells that the server knows no direct TLS, and not that TLS itself was refused."""
    if isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return True
    return isinstance(error, ssl.SSLError) and openssl_reason(error) in NOT_TLS_REASONS


# ---------------------------------------------------------------------------------------------------------------------
# TCP


def _interleave(addresses: Sequence[_Address]) -> list[_Address]:
    """Alternate the families, the preferred one first (RFC 8305, section 4)."""
    preferred = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    pairs = itertools.zip_longest(preferred, others)
    return [address for pair in pairs for address in pair if address is not None]


async def _connect_tcp(
    loop: asyncio.AbstractEventLoop, addresses: Sequence[_Address], parameters: ConnectionParameters
) -> tuple[socket.socket, _Address]:
    """Race the addresses, each started a little after the last or once one has failed; the first to connect wins."""
    waiting = list(addresses)
    running: dict[asyncio.Task[socket.socket], _Address] = {}
    failures: dict[str, OSError] = {}
    try:
        while waiting or running:
            if waiting:
                address = waiting.pop(0)
                running[loop.create_task(_connect_to(loop, address, parameters))] = address
            done, _ = await asyncio.wait(
                running, timeout=_ATTEMPT_DELAY if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                address = running.pop(attempt)
                error = attempt.exception()
                if error is None:
                    return attempt.result(), address
                if not isinstance(error, OSError):
                    raise error
                failures[str(address[1][0])] = error
    finally:
        for attempt in running:
            attempt.cancel()
            attempt.add_done_callback(_close_late_winner)
    reasons = "; ".join(f"{address}: {os.strerror(error.errno or 0)}" for address, error in failures.items())
    raise ConnectError(
        f"Nothing at {parameters.host}, port {parameters.port}, takes connections ({reasons}). Check host and network."
    ) from next(iter(failures.values()), None)


def _close_late_winner(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _connect_to(
    loop: asyncio.AbstractEventLoop, address: _Address, parameters: ConnectionParameters
) -> socket.socket:
    family, sockaddr = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_options(sock, parameters)
        await loop.sock_connect(sock, sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def _inode(sock: socket.socket) -> int | None:
    try:
        return os.fstat(sock.fileno()).st_ino
    except OSError:  # closed, or a socket of Windows, which has no uvloop
        return None


def _disown(sock: socket.socket, inode: int | None) -> None:
    """Leave `sock` to the loop that has failed to make a transport of it, and will close it.

    uvloop ties the two together late: a transport that was reset before has closed the descriptor, which the socket
    still holds, and would close once more when it may be somebody else's.
    """
    if inode is not None and _inode(sock) != inode:
        sock.detach()


def _set_options(sock: socket.socket, parameters: ConnectionParameters) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parameters.keepalives:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
        for option, value in (
            (idle, parameters.keepalives_idle),
            ("TCP_KEEPINTVL", parameters.keepalives_interval),
            ("TCP_KEEPCNT", parameters.keepalives_count),
        ):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if parameters.tcp_user_timeout and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, parameters.tcp_user_timeout)


# ---------------------------------------------------------------------------------------------------------------------
# Cancel requests


class _FinishedTLS:
    """What asyncpg's cancel takes for a new plaintext transport. TLS is up behind it, and nothing passes through it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, finished: asyncio.Transport, protocol: asyncio.Protocol
    ) -> None:
        self._loop = loop
        self._protocol = protocol
        self.finished = finished

    def write(self, data: bytes) -> None:
        """Take asyncpg's SSLRequest, and consent in the server's place."""
        self._loop.call_soon(self._protocol.data_received, b"S")

    def close(self) -> None:
        self.finished.abort()
