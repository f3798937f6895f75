"""Impostor servers: a listener that plays one scripted misbehaviour, before or during login, on every connection.

Impostors do what no honest server does; the honest server is `LocalPostgres`. They keep every byte that the client
sends, so that a test can show what the client did not send. Scripts are blocking code and run in threads of their own,
so that they work the same against asyncio, uvloop and libpq. This module must not know the client: it imports nothing
of neon_async.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import socket
import socketserver
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

import trustme

__all__ = (
    "IMPOSTORS",
    "Conversation",
    "Impostor",
    "Script",
    "authentication_request",
    "error_response",
    "login",
    "message",
    "play",
    "server_context",
)

_T = TypeVar("_T")

SERVER_NAME = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
SSL_REQUEST = struct.pack("!II", 8, 80877103)
_TLS_HANDSHAKE = b"\x16"  # the first byte of a ClientHello's record, RFC 8446 section 5.1
_PATIENCE = 10.0  # seconds that a script waits for the client, so that threads end soon after a broken test


class Conversation:
    """The connection of one client as the impostor sees it. Every method blocks.

    Attributes:
        wire: Every byte that was read from the socket, as it was sent.
        decrypted: Every byte that TLS decrypted.
        over: Set when the test does not need the script any more.
        failure: The network or TLS error that ended the script, or None.
        closed_by_client: Whether the client closed its end.
    """

    def __init__(self, connection: socket.socket, over: threading.Event) -> None:
        self.wire = bytearray()
        self.decrypted = bytearray()
        self.over = over
        self.failure: Exception | None = None
        self.closed_by_client = False
        self._socket = connection
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._unread = bytearray()

    def __repr__(self) -> str:
        return (
            f"<Conversation wire={len(self.wire)} B decrypted={len(self.decrypted)} B"
            f" closed_by_client={self.closed_by_client} failure={self.failure!r}>"
        )

    def receive(self, size: int) -> bytes:
        """Return the next `size` bytes of the client, decrypted once TLS is established.

        Raises:
            EOFError: The client closed the connection.
        """
        self._fill(size)
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        return taken

    def send(self, data: bytes) -> None:
        """Send `data`, encrypted once TLS is established."""
        if self._tls is None:
            self._socket.sendall(data)
        else:
            self._tls.write(data)
            self._flush()

    def send_raw(self, data: bytes) -> None:
        """Send `data` in plaintext, whatever the state of TLS."""
        self._socket.sendall(data)

    def opens_with_tls(self) -> bool:
        """Return whether the client opens with a ClientHello and not with an SSLRequest.

        The ClientHello stays unread. The SSLRequest is consumed.

        Raises:
            ValueError: The client opens with neither.
        """
        self._fill(1)
        if self._unread[:1] == _TLS_HANDSHAKE:
            return True
        if (opening := self.receive(8)) != SSL_REQUEST:
            raise ValueError(f"the client opened with neither a ClientHello nor an SSLRequest: {opening!r}")
        return False

    def consent_to_tls(self) -> None:
        """Answer S to an SSLRequest, so that a ClientHello is the next message in either case."""
        if not self.opens_with_tls():
            self.send(b"S")
            self.opens_with_tls()

    def accept_tls(self, context: ssl.SSLContext) -> None:
        """Do the TLS handshake: directly or after an SSLRequest, as the client chooses."""
        self.consent_to_tls()
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(bytes(self._unread))
        self._unread.clear()
        self._drive(tls.do_handshake)
        self._tls = tls

    def read_startup(self) -> bytes:
        """Return the body of the StartupMessage."""
        (length,) = struct.unpack("!I", self.receive(4))
        return self.receive(length - 4)

    def read_message(self) -> tuple[bytes, bytes]:
        """Return the type and the body of the client's next message."""
        kind, length = struct.unpack("!cI", self.receive(5))
        return kind, self.receive(length - 4)

    def hang_up(self) -> None:
        """Send FIN. The other direction stays open, so that the client's own close is seen."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Send RST. What the client does afterwards is not seen."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()
        self.closed_by_client = True

    def drain(self) -> None:
        """Read and keep everything that the client still sends, until it closes."""
        with contextlib.suppress(EOFError, ssl.SSLError):
            while True:
                self._fill(len(self._unread) + 1)
        if self._tls is not None and not self.closed_by_client:  # a client that closes TLS waits for an answer
            with contextlib.suppress(EOFError, OSError):
                self._drive(self._tls.unwrap)
        while not self.closed_by_client:  # TLS has ended or is broken; later bytes are kept as they are
            with contextlib.suppress(EOFError):
                self._read_wire()

    def _fill(self, size: int) -> None:
        while len(self._unread) < size:
            self._unread += self._read_wire() if self._tls is None else self._read_tls(self._tls)

    def _read_tls(self, tls: ssl.SSLObject) -> bytes:
        data = self._drive(lambda: tls.read(65536))
        self.decrypted += data
        if not data:
            raise EOFError("the client ended TLS")
        return data

    def _read_wire(self) -> bytes:
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            data = b""
        self.wire += data
        if not data:
            self.closed_by_client = True
            raise EOFError("the client closed the connection")
        return data

    def _drive(self, step: Callable[[], _T]) -> _T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
                self._incoming.write(self._read_wire())
            finally:
                self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())


Script: TypeAlias = Callable[[Conversation], object]
"""What an impostor does on each connection. When it returns, the impostor sends nothing more and keeps reading."""


class Impostor:
    """An async context manager: a listener on a free loopback port that plays `script` on every connection.

    If a script fails with anything but a network or TLS error, `finish()` raises that error.

    Args:
        script: What the impostor does on each connection.
        trust_anchor: Kept for the caller: the PEM that a client of this impostor should trust. None (the default): the
            client's own trust anchor.
        host: The host name in the DSN. It is never resolved, because the DSN contains `hostaddr`, too.
        password: The password in the DSN. Random by default, so that finding it among the received bytes proves a leak.
    """

    def __init__(
        self,
        script: Script,
        *,
        trust_anchor: bytes | None = None,
        host: str = SERVER_NAME,
        password: str | None = None,
    ) -> None:
        self.trust_anchor = trust_anchor
        self.host = host
        self.port = 0
        self.user = "alex"
        self.password = password or secrets.token_hex(12)
        self.conversations: list[Conversation] = []
        self._script = script
        self._over = threading.Event()
        self._listener: _Listener | None = None

    def __repr__(self) -> str:
        state = "closed" if self._listener is None else f"127.0.0.1:{self.port}"
        return f"<Impostor {state} connections={self.connections}>"

    @property
    def dsn(self) -> str:
        """The DSN of this impostor. It contains no `sslmode`, no `sslnegotiation` and no trust anchor."""
        return f"postgresql://{self.user}:{self.password}@{self.host}:{self.port}/neondb?hostaddr=127.0.0.1"

    @property
    def connections(self) -> int:
        """How many connections clients have made."""
        return len(self.conversations)

    async def finish(self) -> list[Conversation]:
        """End the scripts, wait until the clients have closed, and return all conversations.

        A client that does not close within 10 seconds is given up; its `closed_by_client` is then False.
        """
        if self._listener is not None:
            listener, self._listener = self._listener, None
            self._over.set()
            await asyncio.to_thread(listener.stop)
            if listener.broken_scripts:
                raise listener.broken_scripts[0]
        return self.conversations

    async def __aenter__(self) -> Self:
        self._listener = _Listener(self._converse)
        self.port = self._listener.server_address[1]
        self._listener.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.finish()

    def _converse(self, connection: socket.socket) -> None:
        conversation = Conversation(connection, self._over)
        self.conversations.append(conversation)
        try:
            self._script(conversation)
        except (OSError, EOFError) as error:
            conversation.failure = error
        with contextlib.suppress(OSError):  # the socket's own timeout, if the client never closes
            conversation.drain()


class _Listener(socketserver.ThreadingTCPServer):
    server_address: tuple[str, int]

    def __init__(self, converse: Callable[[socket.socket], None]) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.broken_scripts: list[Exception] = []
        self._converse = converse
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.005,), name="impostor")

    def start(self) -> None:
        self._acceptor.start()

    def stop(self) -> None:
        self.shutdown()
        self._acceptor.join()
        self.server_close()  # joins the threads of the conversations

    def finish_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        request.settimeout(_PATIENCE)
        try:
            self._converse(request)
        except Exception as error:  # noqa: BLE001  # finish() raises it
            self.broken_scripts.append(error)


def message(kind: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a message of the PostgreSQL protocol.

    Args:
        kind: The type of the message, one byte.
        body: The body of the message.
        length: The value of the length field. None (the default): the correct value, four plus the body's length.
    """
    if length is None:
        length = len(body) + 4
    return kind + struct.pack("!I", length & 0xFFFFFFFF) + body


def authentication_request(code: int, body: bytes = b"") -> bytes:
    """Return an authentication request.

    Args:
        code: 0 AuthenticationOk, 3 cleartext, 5 MD5, 10 SASL, 11 SASLContinue and so on; see "Message Formats" in the
            documentation of PostgreSQL.
        body: The part of the message after the code.
    """
    return message(b"R", struct.pack("!I", code) + body)


def error_response(text: str, *, code: str = "XX000", severity: str = "FATAL") -> bytes:
    """Return an ErrorResponse.

    Args:
        text: The message.
        code: The SQLSTATE. Neon's proxy sends XX000 for every error before login.
        severity: The severity.
    """
    fields = {"S": severity, "V": severity, "C": code, "M": text}
    return message(b"E", b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0")


def server_context(
    chain: bytes, *, alpn: Sequence[str] = ("postgresql",), maximum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    """Return the TLS context of a server.

    Args:
        chain: The private key of the leaf, the leaf and its issuers, as PEM.
        alpn: The protocols that the server supports. Empty: it does not use ALPN.
        maximum_version: The newest TLS version that the server supports.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = maximum_version
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # an impostor may present a certificate that is too weak
    if alpn:
        context.set_alpn_protocols(list(alpn))
    with tempfile.TemporaryDirectory() as folder:  # the ssl module loads a chain from files only
        path = Path(folder) / "chain.pem"
        path.write_bytes(chain)
        context.load_cert_chain(path)
    return context


def play(*steps: bytes | Script) -> Script:
    """Return a script of `steps`, one after the other: bytes are sent, anything else is called.

    Methods of `Conversation` that take nothing are such steps too.
    """

    def script(conversation: Conversation) -> None:
        for step in steps:
            if isinstance(step, bytes):
                conversation.send(step)
            else:
                step(conversation)

    return script


def login(context: ssl.SSLContext, *steps: bytes | Script) -> Script:
    """Return a script that does TLS correctly, reads the StartupMessage, and continues with `steps`."""
    return play(lambda conversation: conversation.accept_tls(context), Conversation.read_startup, *steps)


def _refuse_tls(conversation: Conversation) -> None:
    if conversation.opens_with_tls():
        conversation.hang_up()
    else:
        conversation.send(b"N")


def _presenting(issuer: trustme.CA, anchor: trustme.CA, name: str = SERVER_NAME, *, days_left: int = 90) -> Impostor:
    not_after = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days_left)
    leaf = issuer.issue_cert(name, not_before=not_after - datetime.timedelta(days=90), not_after=not_after)
    context = server_context(leaf.private_key_and_cert_chain_pem.bytes())
    return Impostor(login(context, authentication_request(3)), trust_anchor=anchor.cert_pem.bytes())


def _unknown_ca() -> Impostor:
    return _presenting(trustme.CA(), anchor=trustme.CA())


def _wrong_name() -> Impostor:
    return _presenting(ca := trustme.CA(), ca, "ep-other-endpoint-654321.us-east-2.aws.neon.tech")


def _expired() -> Impostor:
    return _presenting(ca := trustme.CA(), ca, days_left=-1)


def _plaintext() -> Impostor:
    return Impostor(_refuse_tls, trust_anchor=trustme.CA().cert_pem.bytes())


def _cleartext_password() -> Impostor:
    return _presenting(ca := trustme.CA(), ca)


IMPOSTORS: tuple[tuple[str, Callable[[], Impostor]], ...] = (
    ("a certificate from an unknown CA", _unknown_ca),
    ("a certificate for another name", _wrong_name),
    ("an expired certificate", _expired),
    ("no TLS at all", _plaintext),
    ("a valid certificate, then a request for the password in clear text", _cleartext_password),
)
"""The impostors of `neon-async demo`: the title, and a function that returns the impostor with its `trust_anchor`."""
