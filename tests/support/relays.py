"""What the tests of the login need between a client and a real server, or in place of one.

Certificates signed in every way; a man in the middle who owns a certificate; a real server that changes its own; and an
honest server's half of SCRAM, for impostors that are honest up to a point. It knows nothing of the package's insides.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import re
import secrets
import socket
import ssl
import struct
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from scramp import ScramMechanism

from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import (
    SERVER_NAME,
    Conversation,
    Script,
    authentication_request,
    message,
    server_context,
)
from support.certificates import Entity, issue

__all__ = (
    "OK",
    "PLAIN",
    "PLUS",
    "READY",
    "WELCOME",
    "Authority",
    "Honest",
    "Interceptor",
    "Message",
    "Signed",
    "client_messages",
    "honest",
    "in_turn",
    "present_to_clients",
    "rsa_key",
    "sasl",
    "signed",
    "verifier",
)

PLAIN, PLUS = "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"
PATIENCE = 20.0  # seconds after which something that should have happened counts as never happening

OK = authentication_request(0)
READY = message(b"Z", b"I")
WELCOME = (
    message(b"S", b"server_version\x0017.10\0")
    + message(b"S", b"application_name\0from the honest half\0")
    + message(b"K", struct.pack("!ii", 4711, 42))
    + READY
)

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey


# ---------------------------------------------------------------------------------------------------------------------
# Certificates


@dataclass(frozen=True)
class Authority:
    """A root that signs as it is told. `digest` is None for EdDSA; `pss` is RSA-PSS in place of PKCS #1 v1.5."""

    root: Entity
    signer: SigningKey
    digest: hashes.HashAlgorithm | None
    pss: bool

    @cached_property
    def anchor(self) -> bytes:
        """The root's own certificate as PEM."""
        return self.sign_anew(self.root.certificate, self.signer.public_key()).public_bytes(Encoding.PEM)

    def issue(self, leaf_key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> Signed:
        """Return a new certificate for the name of `LocalPostgres` and for localhost."""
        leaf = issue(self.root, names=[x509.DNSName(SERVER_NAME), x509.DNSName("localhost")], key=leaf_key)
        certificate = self.sign_anew(leaf.certificate, leaf.certificate.public_key())
        return Signed(Entity(certificate, leaf.key), self)

    def sign_anew(self, certificate: x509.Certificate, public_key: Any) -> x509.Certificate:
        """Return `certificate` with another public key and a signature of this authority."""
        builder = x509.CertificateBuilder(
            issuer_name=certificate.issuer,
            subject_name=certificate.subject,
            public_key=public_key,
            serial_number=certificate.serial_number,
            not_valid_before=certificate.not_valid_before_utc,
            not_valid_after=certificate.not_valid_after_utc,
        )
        for extension in certificate.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        scheme = padding.PSS(padding.MGF1(self.digest), self.digest.digest_size) if self.pss and self.digest else None
        return builder.sign(self.signer, self.digest, rsa_padding=scheme)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Signed:
    """A server certificate with its key, and the root that signed it."""

    leaf: Entity
    authority: Authority

    @property
    def anchor(self) -> bytes:
        return self.authority.anchor

    @property
    def chain(self) -> bytes:
        return self.leaf.key_pem + self.leaf.pem

    @property
    def der(self) -> bytes:
        return self.leaf.der

    def another(self) -> Signed:
        """Return a certificate for the same name by the same root, with another key."""
        return self.authority.issue()


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def signed(
    signer: SigningKey,
    digest: hashes.HashAlgorithm | None,
    *,
    pss: bool = False,
    leaf_key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> Signed:
    """Return a server certificate that is signed as is said by a new root."""
    return Authority(issue(subject="root", ca=True), signer, digest, pss).issue(leaf_key)


def present_to_clients(server: LocalPostgres, admin: psycopg.Connection[Any], certificate: Signed) -> None:
    """Let a running `server` present `certificate` to every client from now on. `admin`: a superuser's connection."""
    row = admin.execute("SHOW data_directory").fetchone()
    assert row is not None
    folder = Path(row[0]).parent
    (folder / "server.crt").write_bytes(certificate.leaf.pem)
    (folder / "server.key").write_bytes(certificate.leaf.key_pem)
    admin.execute("SELECT pg_reload_conf()")
    deadline = time.monotonic() + PATIENCE
    while _presented(server.port) != certificate.der:
        assert time.monotonic() < deadline, "the server never presented its new certificate"


def _presented(port: int) -> bytes | None:
    """Return the leaf that a server presents, or None where it is between two certificates."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), PATIENCE) as sock,
        _trusting().wrap_socket(sock, server_hostname=SERVER_NAME) as tls,
    ):
        return tls.getpeercert(binary_form=True)
    return None


def _trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["postgresql"])
    return context


# ---------------------------------------------------------------------------------------------------------------------
# Between


@dataclass(frozen=True)
class Message:
    """One message as it came by: who sent it, its type (empty for the StartupMessage), and its body."""

    sender: str
    kind: bytes
    body: bytes


def _until_ready(messages: list[Message]) -> list[Message]:
    kinds = [one.kind if one.sender == "server" else b"" for one in messages]
    return messages[: kinds.index(b"Z") + 1] if b"Z" in kinds else messages


Rewrite = Callable[[Message], bytes]


def _as_it_is(it: Message) -> bytes:
    return it.body


class Interceptor:
    """A man in the middle: ends TLS with a certificate of his own, speaks TLS to the real server, and reads along.

    Parameters:
        port: the real server's.
        certificate: what clients are shown. With the real server's own he is what no attacker can be: a witness.
        direct: whether clients come with direct TLS or with an SSLRequest.
        rewrite: returns the body to pass on for each message of the server.
    """

    def __init__(self, port: int, certificate: Signed, *, direct: bool = True, rewrite: Rewrite = _as_it_is) -> None:
        self.port = 0
        self.connections: list[list[Message]] = []
        self._target = port
        self._context = server_context(certificate.chain)
        self.direct = direct
        self._rewrite = rewrite
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def dsn(self, dsn: str) -> str:
        """Return `dsn` with the interceptor's port in place of the server's."""
        return dsn.replace(f":{self._target}/", f":{self.port}/")

    @property
    def round_trips(self) -> list[int]:
        """How often, on each connection and until it was ready, the server spoke after the client had."""
        return [
            sum((one.sender, two.sender) == ("client", "server") for one, two in itertools.pairwise(login))
            for login in map(_until_ready, self.connections)
        ]

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._start(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._listener is not None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._start(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        messages: list[Message] = []
        self.connections.append(messages)
        if not self.direct:
            assert await loop.sock_recv(sock, 8) == struct.pack("!II", 8, 80877103)
            await loop.sock_sendall(sock, b"S")
        reader = asyncio.StreamReader()
        try:
            transport, protocol = await loop.connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(reader), sock, ssl=self._context
            )
        except OSError:
            sock.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        from_server, to_server = await asyncio.open_connection(
            "127.0.0.1", self._target, ssl=_trusting(), server_hostname=SERVER_NAME
        )
        try:
            await self._pass_on(reader, writer, from_server, to_server, messages)
        finally:
            transport.abort()
            to_server.transport.abort()

    async def _pass_on(
        self,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        messages: list[Message],
    ) -> None:
        async def pump(sender: str, source: asyncio.StreamReader, target: asyncio.StreamWriter, kind_size: int) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    kind = await source.readexactly(kind_size)
                    (length,) = struct.unpack("!I", await source.readexactly(4))
                    it = Message(sender, kind, await source.readexactly(length - 4))
                    messages.append(it)
                    body = self._rewrite(it) if sender == "server" else it.body
                    target.write(kind + struct.pack("!I", len(body) + 4) + body)
                    kind_size = 1
            target.close()

        pumps = [
            asyncio.ensure_future(pump("client", from_client, to_server, 0)),
            asyncio.ensure_future(pump("server", from_server, to_client, 1)),
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for one in pumps:
                one.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# In place of the server


def sasl(*mechanisms: str) -> bytes:
    """Return the request that offers `mechanisms`."""
    return authentication_request(10, b"".join(name.encode() + b"\0" for name in mechanisms) + b"\0")


class Honest:
    """A server's half of one exchange, by scramp, as bytes that come and go; it knows the password.

    `binding` is the `tls-server-end-point` of its certificate, for PLUS. `server_signature` is known in the end.
    """

    salt = b"sixteen bytes of"

    def __init__(self, password: str, *, binding: bytes | None = None, iterations: int = 4096) -> None:
        self._binding = binding
        self._account = _account(password, iterations)
        self._server: Any = None

    def challenge(self, initial_response: bytes) -> bytes:
        """Take the body of a SASLInitialResponse and return SASLContinue."""
        mechanism, _, rest = initial_response.partition(b"\0")
        bound = mechanism.decode() == PLUS
        self._server = ScramMechanism(mechanism.decode()).make_server(
            lambda _: self._account,
            channel_binding=("tls-server-end-point", self._binding) if bound else None,
        )
        self._server.set_client_first(rest[4:].decode())
        return authentication_request(11, self._server.get_server_first().encode())

    def verdict(self, response: bytes) -> bytes:
        """Take the body of a SASLResponse and return SASLFinal."""
        self._server.set_client_final(response.decode())
        return authentication_request(12, self._server.get_server_final().encode())

    @property
    def server_signature(self) -> bytes | None:
        signature: bytes | None = self._server and self._server.server_signature
        return signature


@cache
def _account(password: str, iterations: int) -> tuple[bytes, bytes, bytes, int]:
    account: tuple[bytes, bytes, bytes, int] = ScramMechanism(PLAIN).make_auth_info(password, iterations, Honest.salt)
    return account


def honest(
    password: str,
    *,
    offer: Sequence[str] = (PLUS, PLAIN),
    binding: bytes | None = None,
    last: bytes = OK + WELCOME,
) -> Script:
    """Return a step that lets a client in who knows the password. `last` comes in one piece with SASLFinal."""

    def step(conversation: Conversation) -> None:
        server = Honest(password, binding=binding)
        conversation.send(sasl(*offer))
        conversation.send(server.challenge(conversation.read_message()[1]))
        conversation.send(server.verdict(conversation.read_message()[1]) + last)

    return step


def in_turn(*scripts: Script) -> Script:
    """Return a script that plays `scripts`, one for each connection, and the last one from then on."""
    waiting = list(scripts)

    def script(conversation: Conversation) -> None:
        (waiting.pop(0) if len(waiting) > 1 else waiting[0])(conversation)

    return script


_PATTERNS = {
    "SASLInitialResponse": rb"SCRAM-SHA-256(-PLUS)?\0....(n|y|p=tls-server-end-point),,n=\*,r=[!-+\--~]{18,}",
    "SASLResponse": rb"c=[A-Za-z0-9+/]+={0,2},r=[!-+\--~]+,p=[A-Za-z0-9+/]{43}=",
    "Query": rb"[^\0]*\0",
    "Terminate": rb"",
}


def client_messages(sent: bytes | bytearray) -> list[str]:
    """Return the names of the messages that a client has sent inside TLS; one that nobody knows fails."""
    names: list[str] = []
    rest = bytes(sent)
    while rest:
        if not names:
            (size,) = struct.unpack_from("!I", rest)
            assert b"user\0" in rest[:size]
            names.append("StartupMessage")
        else:
            kinds = {b"p": ("SASLInitialResponse", "SASLResponse"), b"Q": ("Query",), b"X": ("Terminate",)}
            size = 1 + int(struct.unpack_from("!I", rest, 1)[0])
            body = rest[5:size]
            names += [name for name in kinds[rest[:1]] if re.fullmatch(_PATTERNS[name], body, re.DOTALL)] or [
                repr(body)
            ]
        rest = rest[size:]
    return names


def verifier(password: bytes, *, iterations: int = 4096) -> str:
    """Return what PostgreSQL stores for the bytes of a password (its documentation, section 51.8, pg_authid)."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password, salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    keys = (stored, hmac.digest(salted, b"Server Key", "sha256"))
    return f"SCRAM-SHA-256${iterations}:{b64encode(salt).decode()}$" + ":".join(b64encode(key).decode() for key in keys)
