"""Open one transport: TCP, TLS, the checks after the handshake, a guarded login; then give it to asyncpg.

`Door` is what asyncpg is given as its `loop`: its `create_connection` is ours, so asyncpg never sees a plaintext
transport. This module knows neither pools nor retries nor asyncpg itself, only the shape of its protocol. What the
system or OpenSSL raises passes through; `_connect` gives it its public name.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from ._errors import AuthenticationError, ConnectError, ProtocolError, TLSError, server_error
from ._params import ConnectionParameters
from ._tls import ALPN, ClientCertificate, TLSReport, build_context, check_handshake
from ._trust import TrustAnchor

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)  # PostgreSQL documentation, section 54.7, SSLRequest

# RFC 8305, section 5: the recommended delay before the next address is tried beside the ones under way.
_ATTEMPT_DELAY = 0.25
# A peer that does not answer our close_notify is cut off after this; asyncio would wait for 30 s.
_SHUTDOWN_TIMEOUT = 2.0

_Address: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]
_StepObserver: TypeAlias = Callable[[str], None]
_ProtocolFactory: TypeAlias = Callable[[], asyncio.Protocol]

# The servers that turned out not to speak direct TLS, by (host, hostaddr, port). Both modes verify the same.
_without_direct_tls: set[tuple[str, str | None, int]] = set()


class Door:
    """The `loop` of one asyncpg connection: the running loop, but for how connections are made.

    Its first connection is the session's own; later ones carry cancel requests, to the same address, inside TLS.
    """

    def __init__(self, parameters: ConnectionParameters, anchor: TrustAnchor, on_step: _StepObserver) -> None:
        self._loop = asyncio.get_running_loop()
        self._parameters = parameters
        self._anchor = anchor
        self._on_step = on_step
        self._address: _Address | None = None
        self._gate: _LoginGate | None = None
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

    @property
    def failure(self) -> Exception | None:
        """Why the login was broken off, where it was the gate or the transport that did so."""
        return self._gate.failure if self._gate else None

    def abort(self) -> None:
        """Drop the session's connection at once, if there is one."""
        if self._gate:
            self._gate.abort()

    async def create_connection(
        self, protocol_factory: _ProtocolFactory, host: str, port: int, *, ssl: object = None
    ) -> tuple[Any, asyncio.Protocol]:
        """Serve asyncpg's two calls: with `ssl` for a session under direct TLS, without it for a cancel request."""
        if ssl is None:
            return await self._open_for_cancel(protocol_factory)
        self._gate, self._address, self.report = await self._open_tls()
        self._on_step("authentication")
        protocol = protocol_factory()
        self._gate.admit(protocol)
        self._on_step = _say_nothing  # of the cancel requests
        return self._gate.transport, protocol

    async def start_tls(self, transport: _FinishedTLS, *_: object, **__: object) -> asyncio.Transport:
        """Serve asyncpg's cancel request, for which TLS is up already."""
        return transport.finished

    async def _open_for_cancel(self, protocol_factory: _ProtocolFactory) -> tuple[_FinishedTLS, asyncio.Protocol]:
        async with asyncio.timeout(self._parameters.connect_timeout):
            gate, _, _ = await self._open_tls()
        # asyncpg waits for the server to close. A server that never does must not hold up the caller.
        self._loop.call_later(self._parameters.connect_timeout, gate.abort)
        protocol = protocol_factory()
        return _FinishedTLS(self._loop, gate.transport, protocol), protocol

    async def _open_tls(self) -> tuple[_LoginGate, _Address, TLSReport]:
        """Open TLS in the mode that the parameters name or the server is known to speak; by default direct first."""
        parameters = self._parameters
        server = (parameters.host, parameters.hostaddr, parameters.port)
        if parameters.sslnegotiation == "postgres" or (
            parameters.sslnegotiation is None and server in _without_direct_tls
        ):
            return await self._open_tls_as("postgres")
        try:
            return await self._open_tls_as("direct")
        except _NoDirectTLSError:
            if parameters.sslnegotiation == "direct":
                raise TLSError(f"{parameters.host} does not speak direct TLS. Leave sslnegotiation out.") from None
        opened = await self._open_tls_as("postgres")
        _without_direct_tls.add(server)
        return opened

    async def _open_tls_as(self, negotiation: str) -> tuple[_LoginGate, _Address, TLSReport]:
        addresses = [self._address] if self._address else await self._resolve()
        self._on_step("tcp")
        sock, address = await _connect_tcp(self._loop, addresses, self._parameters)
        try:
            self._on_step("tls")
            if negotiation == "postgres":
                await self._request_tls(sock)
            context = await self._build_context()
        except BaseException:
            sock.close()
            raise
        gate = await self._handshake(sock, context, negotiation)
        try:
            report = self._check(gate, context, negotiation)
        except BaseException:
            gate.abort()
            raise
        return gate, address, report

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
        if answer[:1] == b"S":
            raise TLSError(
                f"{host} sent plaintext behind its consent to TLS, as an attacker in between would; refused."
            )
        if not answer:
            raise ConnectError(f"{host} closed the connection when asked for TLS. Check host, hostaddr and port.")
        raise TLSError(f"{host} answered the request for TLS with something else. Is this a PostgreSQL server's port?")

    async def _build_context(self) -> ssl.SSLContext:
        parameters = self._parameters
        if parameters.sslcrl is None:
            return build_context(self._anchor, client_certificate=client_certificate(parameters))
        # A CRL is a file of any size, read anew so that it can be renewed under a running service.
        return await self._loop.run_in_executor(
            None,
            lambda: build_context(
                self._anchor, crl=parameters.sslcrl, client_certificate=client_certificate(parameters)
            ),
        )

    async def _handshake(self, sock: socket.socket, context: ssl.SSLContext, negotiation: str) -> _LoginGate:
        parameters = self._parameters
        inode = os.fstat(sock.fileno()).st_ino
        try:
            _, gate = await self._loop.create_connection(
                lambda: _LoginGate(parameters.host),
                sock=sock,
                ssl=context,
                server_hostname=parameters.host,
                # The deadline over the whole dial comes first; this one only has to come later.
                ssl_handshake_timeout=parameters.connect_timeout + 60.0,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT,
            )
        except BaseException as error:
            _disown(sock, inode)
            if negotiation == "direct" and _says_no_tls(error):
                raise _NoDirectTLSError from None
            raise
        return gate

    def _check(self, gate: _LoginGate, context: ssl.SSLContext, negotiation: str) -> TLSReport:
        report = check_handshake(
            gate.transport.get_extra_info("ssl_object"),
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
    return getattr(error, "reason", None) in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


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


def _disown(sock: socket.socket, inode: int) -> None:
    """Leave `sock` to the loop that has failed to make a transport of it, and will close it.

    uvloop ties the two together late: a transport that was reset before has closed the descriptor, which the socket
    still holds, and would close once more when it may be somebody else's.
    """
    try:
        still_ours = sock.fileno() == -1 or os.fstat(sock.fileno()).st_ino == inode
    except OSError:
        still_ours = False
    if not still_ours:
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
# Login

# Messages before AuthenticationOk are short: PostgreSQL's own bound is 2,000 bytes, for errors 30,000 (libpq,
# fe-connect.c); its servers stay far below both. A server that talks on and on is none.
_MAX_MESSAGE = 8192
_MAX_MESSAGES = 32

# PostgreSQL documentation, section 54.7, Authentication*. SCRAM is the codes 10, 11, 12, 0, in this order and no other.
_SASL, _SASL_CONTINUE, _SASL_FINAL, _OK = 10, 11, 12, 0
_SCRAM_ORDER = (_SASL, _SASL_CONTINUE, _SASL_FINAL, _OK)
_METHODS = {
    0: "let us in without authentication",
    2: "asked for Kerberos V5",
    3: "asked for the password in cleartext",
    5: "asked for the password as an MD5 hash",
    7: "asked for GSSAPI",
    8: "went on with GSSAPI",
    9: "asked for SSPI",
    10: "asked for SASL once more",
    11: "went on with a SASL exchange that is not at this point",
    12: "ended a SASL exchange that is not at this point",
}


class _LoginGate(asyncio.Protocol):
    """Stands before asyncpg until the server has said AuthenticationOk at the end of a SCRAM exchange.

    It passes on whole messages of that exchange in their order, and nothing else: what asyncpg makes of the rest ranges
    from sending the password to crashing the process.
    """

    transport: asyncio.Transport

    def __init__(self, host: str) -> None:
        self._host = host
        self._inner: asyncio.Protocol | None = None
        self._received = bytearray()
        self._messages = 0
        self._step = 0
        self._lost = False
        self.failure: Exception | None = None

    def admit(self, inner: asyncio.Protocol) -> None:
        """Let asyncpg's protocol send its StartupMessage. Raises where the server spoke first, or is gone."""
        if self._received:
            raise self._fail(ProtocolError(f"{self._host} spoke before it was asked; that is no PostgreSQL server."))
        if self._lost:
            raise self.failure or ConnectError(f"{self._host} closed the connection after the TLS handshake.")
        self._inner = inner
        inner.connection_made(self.transport)

    def abort(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # by its methods; uvloop's has another base

    def data_received(self, data: bytes) -> None:
        if self.failure:
            return
        self._received += data
        if self._inner is None:
            if len(self._received) > _MAX_MESSAGE:
                self.abort()
            return
        try:
            self._pass_messages(self._inner)
        except Exception as error:  # noqa: BLE001  the loop would log it; the caller must see it
            self._fail(error)

    def pause_writing(self) -> None:
        if self._inner:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self.failure = self.failure or exc
        if self._inner:
            self._inner.connection_lost(exc)

    def _fail(self, error: Exception) -> Exception:
        self.failure = error
        self.abort()
        return error

    def _pass_messages(self, inner: asyncio.Protocol) -> None:
        while len(self._received) >= 5:
            kind, length = struct.unpack_from("!ci", self._received)
            if not 4 <= length <= _MAX_MESSAGE:
                raise ProtocolError(
                    f"{self._host} announced a message of {length} bytes during authentication; refused."
                )
            if len(self._received) < 1 + length:
                return
            message = bytes(self._received[: 1 + length])
            if self._judge(kind, message[5:]):
                self.transport.set_protocol(inner)
                inner.data_received(bytes(self._received))
                return
            del self._received[: 1 + length]
            if kind == b"R":
                inner.data_received(message)

    def _judge(self, kind: bytes, body: bytes) -> bool:
        """Return whether this message ends the login. Raises for whatever has no place in it."""
        self._messages += 1
        if kind == b"E":
            raise server_error(body)
        if kind not in (b"R", b"N") or (kind == b"R" and len(body) < 4) or self._messages > _MAX_MESSAGES:
            raise ProtocolError(f"{self._host} sent message {kind!r} during authentication, where it has no place.")
        if kind == b"N":  # NoticeResponse: nobody is there to read it yet
            return False
        code = int.from_bytes(body[:4], "big")
        if code != _SCRAM_ORDER[self._step]:
            raise AuthenticationError(
                f"{self._host} {_METHODS.get(code, f'asked for the unknown authentication method {code}')}; only "
                "SCRAM-SHA-256, complete and in its order, is answered. No password was sent. Check the server."
            )
        if code == _SASL and b"SCRAM-SHA-256" not in body[4:].split(b"\0"):
            raise AuthenticationError(f"{self._host} offers SASL without SCRAM-SHA-256, the only mechanism used.")
        self._step += 1
        return code == _OK


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
