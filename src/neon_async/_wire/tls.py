"""Build the only `SSLContext`, and tell what a handshake under it came to.

This module decides *how* a server is verified. It knows neither hosts nor pools nor sockets.
"""

from __future__ import annotations

import functools
import hashlib
import re
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .._errors import CertificateError, ConfigurationError, InsecureConfigurationError
from .trust import (
    AnchorSource,
    TrustAnchor,
    distinguished_name,
    find_isrg_root_x1,
    load_trust_anchor,
    require_regular_file,
)

# PostgreSQL 17 refuses direct TLS without this protocol name (libpq, ALPN; IANA registry).
ALPN = "postgresql"


# RFC 8446's suites with 128-bit tags. OPENSSL_CONF could add weaker ones, and OpenSSL 3.4 some without encryption.
_CIPHERS = {"TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"}
# SSL_OP_LEGACY_SERVER_CONNECT and SSL_OP_ALLOW_UNSAFE_LEGACY_RENEGOTIATION: nothing to TLS 1.3, but from OPENSSL_CONF.
_LEGACY_OPTIONS = 0x4 | 0x40000


@dataclass(frozen=True, slots=True)
class TLSReport:
    """What the handshake of one connection settled on.

    `negotiation` is libpq's `sslnegotiation`: `direct`, or `postgres` for TLS after an SSLRequest. `subject`, `issuer`,
    `not_after` and `sha256` are those of the server's leaf certificate; `anchor` tells which root was trusted and where
    it was found. `mechanism` is the SASL mechanism of the login inside: `SCRAM-SHA-256-PLUS` is bound to this channel.
    """

    version: str
    cipher: str
    alpn: str | None
    negotiation: str
    server_name: str
    subject: str
    issuer: str
    not_after: datetime
    sha256: str
    anchor: str
    anchor_sha256: str
    mechanism: str | None = None


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate the server may ask for, by the paths of its PEM files (libpq's sslcert and sslkey)."""

    certfile: str
    keyfile: str | None
    password: str = field(repr=False)


def create_ssl_context(*, trust_anchor: AnchorSource | None = None, crl: str | None = None) -> ssl.SSLContext:
    """Return a new context that accepts TLS 1.3 with a certificate for the right name that chains to one root, only.

    `trust_anchor`: the root to trust in place of ISRG Root X1, as PEM bytes, PEM text, or the path of a PEM file;
    exactly one certificate. `crl`: the path of a PEM file of certificate revocation lists; with it the server's
    certificate must be covered by a current one. Raises `ConfigurationError` when either cannot be read.

    The policy is measured against x509-limbo, BetterTLS and libpq. `ssl.create_default_context()` is not used: it obeys
    SSL_CERT_FILE and SSLKEYLOGFILE.
    """
    anchor = find_isrg_root_x1() if trust_anchor is None else load_trust_anchor(trust_anchor)
    return build_context(anchor, crl=crl)


def build_context(
    anchor: TrustAnchor, *, crl: str | None = None, client_certificate: ClientCertificate | None = None
) -> ssl.SSLContext:
    """Return a new context for one dial; a shared one could be weakened through `get_extra_info("sslcontext")`.

    Raises `ConfigurationError` when the CRL or the client certificate cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    context.check_hostname = True
    context.verify_mode = ssl.CERT_REQUIRED
    context.hostname_checks_common_name = False
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    # OpenSSL's level 2: 112 bits, no SHA-1. OPENSSL_CONF could have lowered it, down to ciphers that encrypt nothing.
    # The ciphers named are those of TLS 1.2, which is not spoken; a short list is quick to check.
    context.set_ciphers("ECDHE+AESGCM:@SECLEVEL=2")
    context.options &= ~_LEGACY_OPTIONS
    context.set_alpn_protocols([ALPN])
    context.load_verify_locations(cadata=anchor.der)
    if crl is not None:
        _load_crl(context, crl)
    if client_certificate is not None:
        _load_client_certificate(context, client_certificate)
    _require_policy(context)
    return context


def _load_crl(context: ssl.SSLContext, path: str) -> None:
    reason = "holds no certificate revocation list"
    try:
        require_regular_file(path)
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        pass
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or 'not a path'}"
    stored = context.cert_store_stats()
    if stored["x509"] > 1:
        # OpenSSL trusts every certificate it finds in the file.
        raise InsecureConfigurationError(
            f"sslcrl {path!r} holds certificates besides revocation lists, which would become trusted. Take them out."
        )
    if not stored["crl"]:
        raise ConfigurationError(f"sslcrl {path!r} {reason}. Name a PEM file of 'X509 CRL' blocks.")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_client_certificate(context: ssl.SSLContext, certificate: ClientCertificate) -> None:
    try:
        for path in filter(None, (certificate.certfile, certificate.keyfile)):
            require_regular_file(path)
        # A password function, even for no password: without one OpenSSL asks on the terminal, and waits.
        context.load_cert_chain(certificate.certfile, certificate.keyfile, password=lambda: certificate.password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "not usable"
    else:
        return
    raise ConfigurationError(
        f"sslcert {certificate.certfile!r} cannot be loaded with its key: {reason}. Check sslkey and sslpassword."
    )


def _require_policy(context: ssl.SSLContext) -> None:
    """Refuse a context that checks less than it must; OPENSSL_CONF, a patch or a later Python may have seen to that."""
    flags = ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    if not (
        context.verify_mode is ssl.CERT_REQUIRED
        and context.check_hostname
        and not context.hostname_checks_common_name
        and context.minimum_version is ssl.TLSVersion.TLSv1_3
        and context.verify_flags & flags == ssl.VERIFY_X509_STRICT
        and context.security_level >= 2
        and {cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.3"} <= _CIPHERS
        and context.cert_store_stats()["x509"] == 1
        and context.keylog_filename is None
    ):
        raise InsecureConfigurationError(
            "The TLS context checks less than it must; something in this process changed it."
        )


@functools.lru_cache(maxsize=8)  # strptime, for the same text at every dial
def _parse_time(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC)


def check_handshake(
    tls: ssl.SSLObject, context: ssl.SSLContext, *, server_name: str, negotiation: str, anchor: TrustAnchor
) -> TLSReport:
    """Confirm, before the first byte of ours, that the finished handshake is the one asked for, and report on it.

    Raises `CertificateError` when it is not: another context, version or name, or a certificate without facts.
    """
    _require_policy(context)
    der, facts, cipher = tls.getpeercert(binary_form=True), tls.getpeercert(), tls.cipher()
    if tls.context is not context or tls.version() != "TLSv1.3" or tls.server_hostname != server_name:
        raise CertificateError(f"The TLS session with {server_name} is not the one asked for, and is not used.")
    if not der or not facts or not cipher or cipher[2] < 128:
        raise CertificateError(f"The TLS session with {server_name} has no verified certificate or no encryption.")
    return TLSReport(
        version="TLSv1.3",
        cipher=cipher[0],
        alpn=tls.selected_alpn_protocol(),
        negotiation=negotiation,
        server_name=server_name,
        subject=distinguished_name(facts["subject"]),
        issuer=distinguished_name(facts["issuer"]),
        not_after=_parse_time(str(facts["notAfter"])),
        sha256=hashlib.sha256(der).hexdigest(),
        anchor=str(anchor),
        anchor_sha256=anchor.sha256,
    )


_OTHER_ROOT = "Connect to the real server; for a private CA pass trust_anchor= in code."
# OpenSSL's verify codes (x509_vfy.h): what is wrong, and what to do about it.
_VERIFY_CODES = {
    3: ("no revocation list of its issuer is in the sslcrl file", "Fetch the current CRL of that issuer."),
    9: ("it is not valid yet", "Check this machine's clock."),
    10: ("it has expired", "Check this machine's clock; else the server must renew its certificate."),
    11: ("the revocation list is not valid yet", "Check this machine's clock."),
    12: ("the revocation list has expired", "Fetch the current CRL."),
    18: ("it is signed by itself", _OTHER_ROOT),
    19: ("its chain ends at another root", _OTHER_ROOT),
    20: ("its chain does not lead to the trust anchor", _OTHER_ROOT),
    21: ("the server sent no chain to the trust anchor", "The server must send its intermediate certificates."),
    23: ("it has been revoked", "Do not connect; tell the operator of the server."),
    25: ("its chain is longer than a CA in it allows", "Do not connect; tell the operator of the server."),
    26: ("it is not meant for servers", "The server must use a certificate with serverAuth."),
    62: ("it is for another name", "Check the host; the name is verified, wherever hostaddr leads."),
    79: ("one of its issuers is not a CA", "Do not connect; tell the operator of the server."),
}
_ODD_CERTIFICATE = "The server must use a certificate that conforms to RFC 5280."


# OpenSSL's reasons for a handshake in which the other side answered with something that is not TLS.
NOT_TLS_REASONS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


def openssl_reason(error: ssl.SSLError) -> str | None:
    """Return OpenSSL's name for the reason. Python's table of them may be older than OpenSSL; the text has them all."""
    text = re.search(r"\] (.+?) \(_ssl", str(error))
    return error.reason or (text[1].upper().replace(" ", "_") if text else None)


def explain(error: ssl.SSLCertVerificationError, *, server_name: str, anchor: TrustAnchor) -> CertificateError:
    """Return the `CertificateError` for a failed verification: which check, which name, which anchor, what to do."""
    code = getattr(error, "verify_code", 0)
    detail = getattr(error, "verify_message", "") or "verification failed"
    what, advice = _VERIFY_CODES.get(code, (detail, _ODD_CERTIFICATE))
    failure = CertificateError(
        f"The certificate of {server_name} was refused: {what} (OpenSSL: {detail}). Trust anchor: {anchor}. {advice}"
    )
    failure.verify_code, failure.verify_message = code, detail
    return failure
