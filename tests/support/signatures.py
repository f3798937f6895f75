"""Server certificates with a signature of every kind, and a real server that changes its certificate."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import psycopg
from anyio.from_thread import start_blocking_portal
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import SERVER_NAME
from support.certificates import Entity, issue
from support.probes import HANG

__all__ = (
    "Authority",
    "PresentingServer",
    "Signed",
    "context_without_checks",
    "presenting_server",
    "rsa_key",
    "signed",
)

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey


@dataclass(frozen=True)
class Authority:
    """A root that signs with a given key and hash. `digest` is None for EdDSA; `pss` selects RSA-PSS."""

    root: Entity
    signer: SigningKey
    digest: hashes.HashAlgorithm | None
    pss: bool

    @cached_property
    def anchor(self) -> bytes:
        """The root's own certificate in PEM."""
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
    """Return a server certificate that a new root signs with `signer` and `digest`."""
    return Authority(issue(subject="root", ca=True), signer, digest, pss).issue(leaf_key)


class PresentingServer:
    """A real server that presents any certificate."""

    def __init__(self, postgres: LocalPostgres, admin: psycopg.Connection[Any]) -> None:
        self.port = postgres.port
        self.dsn = postgres.dsn
        self._postgres = postgres
        self._admin = admin
        self._presented: bytes | None = None

    def present(self, certificate: Signed) -> None:
        """Present `certificate` to every client from now on."""
        self.present_chain(certificate.leaf)

    def present_chain(self, leaf: Entity, *issuers: Entity) -> None:
        """Present `leaf`, and the issuers that are sent along, to every client from now on."""
        if leaf.der != self._presented:
            _present(self._postgres, self._admin, leaf, issuers)
            self._presented = leaf.der


@contextlib.contextmanager
def presenting_server(folder: Path, bin_dir: str | None) -> Iterator[PresentingServer]:
    """Start a `PresentingServer`. `folder`: for the trust anchor of its administrator; `bin_dir`: PostgreSQL's."""
    path = folder / "root.pem"
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(LocalPostgres(bin_dir)) as postgres:
        path.write_bytes(postgres.trust_anchor)
        dsn = f"{postgres.dsn}&sslmode=verify-full&sslrootcert={path}"
        with psycopg.connect(dsn, autocommit=True) as admin:
            yield PresentingServer(postgres, admin)


def _present(server: LocalPostgres, admin: psycopg.Connection[Any], leaf: Entity, issuers: Sequence[Entity]) -> None:
    """Make a running `server` present a chain to every client. `admin`: a superuser's connection."""
    row = admin.execute("SHOW data_directory").fetchone()
    assert row is not None
    folder = Path(row[0]).parent
    (folder / "server.crt").write_bytes(b"".join(each.pem for each in (leaf, *issuers)))
    (folder / "server.key").write_bytes(leaf.key_pem)
    admin.execute("SELECT pg_reload_conf()")
    deadline = time.monotonic() + HANG
    while _leaf_at(server.port) != leaf.der:
        assert time.monotonic() < deadline, "the server never presented its new certificate"


def _leaf_at(port: int) -> bytes | None:
    """Return the leaf that a server presents, or None while it is switching certificates."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), HANG) as sock,
        context_without_checks().wrap_socket(sock, server_hostname=SERVER_NAME) as tls,
    ):
        return tls.getpeercert(binary_form=True)
    return None


def context_without_checks() -> ssl.SSLContext:
    """Return a client's context that accepts every certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["postgresql"])
    return context
