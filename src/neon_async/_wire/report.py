"""What is reported about a TLS channel, imported when a report is requested: the classes take long to define."""

# No `from __future__ import annotations`: see `_publish()` of the facade.

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from .._config.literals import SASLMechanism, SSLNegotiation
from .revocation.report import OFF, RevocationReport

__all__ = ("ChainCertificate", "RevocationReport", "TLSReport")


@dataclass(frozen=True, slots=True)
class ChainCertificate:
    """One certificate of a chain.

    Attributes:
        subject: The distinguished name of its holder.
        issuer: The distinguished name of the CA that signed it.
        not_after: When it expires, in UTC. None where it cannot be read.
        sha256: The fingerprint, in hexadecimal digits.
    """

    __module__ = "neon_async"

    subject: str
    issuer: str
    not_after: datetime | None
    sha256: str


@dataclass(frozen=True, slots=True)
class TLSReport:
    """The result of the TLS handshake of one connection, and of the login inside it.

    Attributes:
        version: The TLS version: `TLSv1.3`.
        cipher: The cipher suite.
        alpn: The protocol that the server selected, or None; PostgreSQL before 17 does not know ALPN.
        negotiation: How TLS began, as in libpq's `sslnegotiation`: `direct`, or `postgres` for TLS after an SSLRequest.
        server_name: The host name that was verified.
        subject: The subject of the server's leaf certificate.
        issuer: The issuer of the leaf certificate.
        not_after: When the leaf certificate expires, in UTC.
        sha256: The fingerprint of the leaf certificate, in hexadecimal digits.
        anchor: The trust anchor, and where it was found.
        anchor_sha256: The fingerprint of the trust anchor, in hexadecimal digits.
        mechanism: The SASL mechanism of the login; `SCRAM-SHA-256-PLUS` is bound to this TLS channel. None before the
            login has succeeded.
        served: The certificates that the server sent, the leaf first.
        chain: The certificates that were verified, from the leaf to the trust anchor.
        path_ends: When the trust anchor or a cross-sign that leads to it stops being trusted, in UTC. Root programs
            trust ISRG Root X1 until 2030-06-04, and the cross-signs below it end on 2032-09-02.
        revocation: Whether the certificate has been revoked; as far as is known when the report is requested.
        warnings: What will go wrong, or goes wrong for other clients: a path that ends within a year, and a served
            chain without the cross-sign that leads to ISRG Root X1.
    """

    __module__ = "neon_async"

    version: Literal["TLSv1.3"]
    cipher: str
    alpn: str | None
    negotiation: SSLNegotiation
    server_name: str
    subject: str
    issuer: str
    not_after: datetime
    sha256: str
    anchor: str
    anchor_sha256: str
    mechanism: SASLMechanism | None = None
    served: tuple[ChainCertificate, ...] = ()
    chain: tuple[ChainCertificate, ...] = ()
    path_ends: datetime | None = None
    warnings: tuple[str, ...] = ()
    revocation: RevocationReport = OFF
