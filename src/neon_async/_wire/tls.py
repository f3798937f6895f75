"""Build the only `SSLContext`, check finished handshakes, and explain failed ones.

This module decides how a server is verified. It must not know sockets, DSNs or pools.
"""

from __future__ import annotations

import base64
import functools
import re
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from .._config.arguments import AnchorSource
from .._config.roots import KnownRoot
from .._errors import CertificateError, ConfigurationError, InsecureConfigurationError
from .chain import (
    Chain,
    ChainRefusedError,
    RecordingSSLObject,
    chain_of,
    kept,
    path_warning,
    read_chain,
    root_without_cross_sign,
)
from .files import MAX_CERTIFICATES, MAX_REVOCATION_LISTS, read_file, require_file
from .trust import (
    TrustAnchor,
    distinguished_name,
    find_isrg_root_x1,
    fingerprint,
    load_trust_anchor,
)

if TYPE_CHECKING:
    from .._config.literals import SASLMechanism, SSLNegotiation
    from .report import TLSReport
    from .revocation.check import ChainCheck

# PostgreSQL 17 refuses direct TLS without this protocol name (libpq, ALPN; IANA registry).
ALPN = "postgresql"


class ClientCertificate:
    """A client certificate for servers that request one, by the paths of its PEM files (libpq's sslcert and sslkey)."""

    __slots__ = ("certfile", "keyfile", "password")

    def __init__(self, certfile: str, keyfile: str | None, password: str) -> None:
        self.certfile = certfile
        self.keyfile = keyfile
        self.password = password


def create_ssl_context(*, trust_anchor: AnchorSource | None = None, crl: str | None = None) -> ssl.SSLContext:
    """Return a new `SSLContext` with the TLS policy of neon-async.

    The context accepts TLS 1.3 only, and only a certificate that covers the host name and chains to the trust anchor.
    The policy is tested against x509-limbo, BetterTLS and libpq. `ssl.create_default_context()` is not used, because it
    obeys the environment variables SSL_CERT_FILE and SSLKEYLOGFILE.

    Args:
        trust_anchor: The root to trust instead of ISRG Root X1: PEM bytes, PEM text, or the path of a PEM file, with
            at most ten self-signed roots; or `LETS_ENCRYPT_ROOTS`. Default: ISRG Root X1.
        crl: The path of a PEM file of certificate revocation lists. With it, a current list must cover the server's
            certificate. Default: no check of revocation.

    Raises:
        ConfigurationError: `trust_anchor` or `crl` cannot be used.
    """
    anchor = find_isrg_root_x1() if trust_anchor is None else load_trust_anchor(trust_anchor)
    return build_context(anchor, crl=crl)


def build_context(
    anchor: TrustAnchor,
    *,
    crl: str | None = None,
    client_certificate: ClientCertificate | None = None,
    context_class: type[ssl.SSLContext] = ssl.SSLContext,
) -> ssl.SSLContext:
    """Return a new context for one dial; a shared one could be weakened through `get_extra_info("sslcontext")`.

    Raises:
        ConfigurationError: The CRL or the client certificate cannot be used.
    """
    context = context_class(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    context.check_hostname = True
    context.verify_mode = ssl.CERT_REQUIRED
    context.hostname_checks_common_name = False
    context.verify_flags = _VERIFY_FLAGS
    # OpenSSL's security level 2: 112 bits, no SHA-1. OPENSSL_CONF may have lowered it, down to ciphers without
    # encryption. The cipher named here is one of TLS 1.2, which is disabled; a short list is quick to check.
    context.set_ciphers("ECDHE-RSA-AES256-GCM-SHA384:@SECLEVEL=2")
    context.options &= ~_LEGACY_OPTIONS
    context.set_alpn_protocols([ALPN])
    context.load_verify_locations(cadata=b"".join(root.der for root in anchor.roots))
    context.sslobject_class = RecordingSSLObject
    if crl is not None:
        _load_crl(context, crl)
    if client_certificate is not None:
        _load_client_certificate(context, client_certificate)
    _require_policy(context, anchor, {one["name"] for one in context.get_ciphers() if one["protocol"] == "TLSv1.3"})
    return context


def check_handshake(
    tls: ssl.SSLObject, context: ssl.SSLContext, *, server_name: str, negotiation: SSLNegotiation, anchor: TrustAnchor
) -> Handshake:
    """Check a finished handshake before any of our bytes is sent.

    Raises:
        CertificateError: The session has another context, version or name, or no verified certificate.
        InsecureConfigurationError: The context was weakened meanwhile.
    """
    der, facts, cipher = tls.getpeercert(binary_form=True), tls.getpeercert(), tls.cipher()
    if tls.context is not context or tls.version() != "TLSv1.3" or tls.server_hostname != server_name:
        raise CertificateError(f"The TLS session with {server_name} is not the requested one and is not used.")
    _require_policy(context, anchor, {cipher[0]} if cipher else set())
    if not der or not facts or not cipher or cipher[2] < 128:
        raise CertificateError(
            f"The TLS session with {server_name} lacks a verified certificate or encryption and is not used."
        )
    chain = chain_of(tls)
    is_of_leaf = bool(chain.verified) and chain.verified[0] == der
    root = next((root for root in anchor.roots if is_of_leaf and root.der == chain.verified[-1]), None)
    if root is None:
        raise CertificateError(f"The chain of {server_name} does not end at the trust anchor and is not used.")
    return Handshake(
        cipher=cipher[0],
        alpn=tls.selected_alpn_protocol(),
        negotiation=negotiation,
        server_name=server_name,
        certificate=facts,
        chain=kept(chain),
        root=root,
    )


class Handshake:
    """A handshake that has passed the checks. Its report is made on request: most connections are never asked for one.

    Attributes:
        alpn: The protocol that the server selected, or None.
        chain: What the server sent, and what of it was verified.
        mechanism: The SASL mechanism of the login that followed, or None before it has succeeded.
    """

    __slots__ = (
        "_cipher",
        "_names",
        "_negotiation",
        "_not_after",
        "_root",
        "_server_name",
        "alpn",
        "chain",
        "mechanism",
    )

    def __init__(
        self,
        *,
        cipher: str,
        alpn: str | None,
        negotiation: SSLNegotiation,
        server_name: str,
        certificate: Mapping[str, Any],
        chain: Chain,
        root: TrustAnchor,
    ) -> None:
        self.alpn: Final = alpn
        self.chain: Final = chain
        self.mechanism: SASLMechanism | None = None
        self._cipher = cipher
        self._negotiation = negotiation
        self._server_name = server_name
        self._names = distinguished_name(certificate["subject"]), distinguished_name(certificate["issuer"])
        self._not_after = str(certificate["notAfter"])
        self._root = root

    @property
    def certificate(self) -> bytes:
        """The server's leaf certificate in DER."""
        return self.chain.verified[0]

    def report(self, check: ChainCheck | None = None) -> TLSReport:
        """Return the report, with what `check` knows now about the revocation of the chain."""
        from .report import TLSReport
        from .revocation.report import OFF

        read, root = read_chain(self.chain), self._root
        subject, issuer = self._names
        warnings = (path_warning(read.path_ends, root.sha256, datetime.now(UTC)), read.advice)
        return TLSReport(
            version="TLSv1.3",
            cipher=self._cipher,
            alpn=self.alpn,
            negotiation=self._negotiation,
            server_name=self._server_name,
            subject=subject,
            issuer=issuer,
            not_after=_parse_time(self._not_after),
            sha256=fingerprint(self.certificate),
            anchor=str(root),
            anchor_sha256=root.sha256,
            mechanism=self.mechanism,
            served=read.served,
            chain=read.verified,
            path_ends=read.path_ends,
            warnings=tuple(filter(None, warnings)),
            revocation=OFF if check is None else check.report(),
        )


def certificate_error(
    error: ssl.SSLCertVerificationError, *, server_name: str, anchor: TrustAnchor
) -> CertificateError:
    """Return the `CertificateError` for a failed verification: the check, the name, the anchor, and the next step."""
    from .culprits import find_culprit  # only a failure needs it

    code = getattr(error, "verify_code", 0)
    detail = getattr(error, "verify_message", "") or "verification failed"
    reason, advice = _VERIFY_CODES.get(code, (detail, _ODD_CERTIFICATE))
    served = error.served if isinstance(error, ChainRefusedError) else ()
    if code in _NO_ISSUER and (root := root_without_cross_sign(served)):
        reason, advice = _explain_missing_cross_sign(root, anchor)
    elif culprit := find_culprit(code, served, anchor, datetime.now(UTC)):
        reason, advice = culprit.reason, culprit.advice or advice
    failure = CertificateError(
        f"The certificate of {server_name} was refused: {reason} (OpenSSL: {detail}). Trust anchor: {anchor}. {advice}"
    )
    failure.verify_code, failure.verify_message = code, detail
    return failure


def openssl_reason(error: ssl.SSLError) -> str | None:
    """Return OpenSSL's name for the reason of `error`.

    Python's table of reasons may be older than OpenSSL; then the name is taken from the text. Errors that Python code
    raises have no reason.
    """
    text = re.search(r"\] (.+?) \(_ssl", str(error))
    return getattr(error, "reason", None) or (text[1].upper().replace(" ", "_") if text else None)


# OpenSSL's reasons for a handshake in which the peer answered with something other than TLS.
NOT_TLS_REASONS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


# ---------------------------------------------------------------------------------------------------------------------
# The policy

# The suites of RFC 8446 with 128-bit tags; the system policy of RHEL, CentOS and Fedora adds the last one. OPENSSL_CONF
# could add weaker ones; OpenSSL 3.4, some without encryption.
_CIPHERS = {
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_128_CCM_SHA256",
}
# SSL_OP_LEGACY_SERVER_CONNECT and SSL_OP_ALLOW_UNSAFE_LEGACY_RENEGOTIATION: without effect on TLS 1.3, but OPENSSL_CONF
# can set them.
_LEGACY_OPTIONS = 0x4 | 0x40000
# These flags and no others, whatever OPENSSL_CONF or a later Python would add.
_VERIFY_FLAGS = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_STRICT
_STRICT, _PARTIAL_CHAIN = int(ssl.VERIFY_X509_STRICT), int(ssl.VERIFY_X509_PARTIAL_CHAIN)


def _require_policy(context: ssl.SSLContext, anchor: TrustAnchor, suites: set[str]) -> None:
    """Refuse a context that verifies less than it must, because of OPENSSL_CONF, a patch or a later Python.

    Args:
        context: The context.
        anchor: The trust anchor.
        suites: The cipher suites of TLS 1.3 that may be used, or the one that is in use.
    """
    flags = int(context.verify_flags)  # of an enumeration, each `&` would take a microsecond
    roots, expected = context.cert_store_stats()["x509"], len(anchor.roots)
    kept = {
        "verify_mode is not CERT_REQUIRED": context.verify_mode is ssl.CERT_REQUIRED,
        "check_hostname is off": context.check_hostname,
        "hostname_checks_common_name is on": not context.hostname_checks_common_name,
        "minimum_version is below TLS 1.3": context.minimum_version is ssl.TLSVersion.TLSv1_3,
        "VERIFY_X509_STRICT is off": flags & _STRICT,
        "VERIFY_X509_PARTIAL_CHAIN is on": not flags & _PARTIAL_CHAIN,
        f"the security level is {context.security_level}, below 2": context.security_level >= 2,
        f"the weak cipher suite {', '.join(sorted(suites - _CIPHERS))} is on": suites <= _CIPHERS,
        "no cipher suite of TLS 1.3 is on": suites,
        f"{roots} root certificates are trusted, not {expected}": roots == expected,
        "the session keys are written to a file": context.keylog_filename is None,
    }
    if all(kept.values()):
        return
    differences = [difference for difference, is_kept in kept.items() if not is_kept]
    raise InsecureConfigurationError(
        f"The TLS context verifies less than it must, because something in this process changed it: "
        f"{'; '.join(differences)}. Check OPENSSL_CONF, the OpenSSL configuration of this system, and code that "
        "patches ssl."
    )


def _load_crl(context: ssl.SSLContext, path: str) -> None:
    reason, complete, deltas = "contains no certificate revocation list", 0, 0
    trusted = context.cert_store_stats()["x509"]
    try:
        content = read_file(path, MAX_REVOCATION_LISTS)
        if content:
            complete, deltas = _count_lists(content)
            context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        pass
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or 'not a path'}"
    stored = context.cert_store_stats()
    if stored["x509"] > trusted:
        # OpenSSL trusts every certificate that it finds in the file.
        raise InsecureConfigurationError(
            f"sslcrl {path!r} contains certificates as well as revocation lists; they would become trusted. Remove "
            "them from the file."
        )
    if deltas and complete:
        # One that is newer than the complete list would hide what that one revokes.
        reason = "contains a delta revocation list, which OpenSSL would take for a complete one"
    elif deltas:
        reason += ", only a delta"
    if deltas or not stored["crl"] or stored["crl"] > complete:
        raise ConfigurationError(f"sslcrl {path!r} {reason}. Name a PEM file of complete 'X509 CRL' blocks.")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _count_lists(pem: bytes) -> tuple[int, int]:
    """Return how many complete revocation lists `pem` contains, and how many deltas (RFC 5280, section 5.2.4)."""
    from asn1crypto.crl import CertificateList  # not needed without revocation lists

    complete = deltas = 0
    for block in re.findall(rb"-----BEGIN X509 CRL-----([^-]+)-----END X509 CRL-----", pem):
        try:
            extensions = CertificateList.load(base64.b64decode(block))["tbs_cert_list"]["crl_extensions"]
            is_delta = any(extension["extn_id"].native == "delta_crl_indicator" for extension in extensions)
        except (ValueError, TypeError):
            continue
        complete, deltas = complete + (not is_delta), deltas + is_delta
    return complete, deltas


def _load_client_certificate(context: ssl.SSLContext, certificate: ClientCertificate) -> None:
    try:
        for path in filter(None, (certificate.certfile, certificate.keyfile)):
            require_file(path, MAX_CERTIFICATES)
        # A password function, even without a password: otherwise OpenSSL prompts on the terminal and waits.
        context.load_cert_chain(certificate.certfile, certificate.keyfile, password=lambda: certificate.password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "not usable"
    else:
        return
    raise ConfigurationError(
        f"sslcert {certificate.certfile!r} cannot be loaded with its key: {reason}. Check sslkey and sslpassword."
    )


@functools.lru_cache(maxsize=8)  # strptime is slow, and every dial to one server parses the same text
def _parse_time(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC)


# ---------------------------------------------------------------------------------------------------------------------
# Failed verifications

_OTHER_ROOT = "Connect to the real server; for a private CA, pass trust_anchor= in code."
_ASK_OPERATOR = "Do not connect; report this to the operator of the server."
_ODD_CERTIFICATE = "The server must use a certificate that conforms to RFC 5280."

# OpenSSL's verify codes (x509_vfy.h): the reason, and what to do about it.
_VERIFY_CODES = {
    3: ("the sslcrl file contains no revocation list of its issuer", "Fetch the current CRL of that issuer."),
    9: ("it is not valid yet", "Check this machine's clock."),
    10: ("it has expired", "Check this machine's clock; if it is right, the server must renew its certificate."),
    11: ("the revocation list is not valid yet", "Check this machine's clock."),
    12: ("the revocation list has expired", "Fetch the current CRL."),
    18: ("it is self-signed", _OTHER_ROOT),
    19: ("its chain ends at another root", _OTHER_ROOT),
    20: ("its chain does not lead to the trust anchor", _OTHER_ROOT),
    21: ("the server sent no chain to the trust anchor", "The server must send its intermediate certificates."),
    23: ("it has been revoked", _ASK_OPERATOR),
    25: ("its chain is longer than one of its CAs allows", _ASK_OPERATOR),
    26: ("it is not meant for servers", "The server must use a certificate with serverAuth."),
    62: ("it is for another name", "Check the host; this name is verified, wherever hostaddr leads."),
    79: ("one of its issuers is not a CA", _ASK_OPERATOR),
}
# What OpenSSL reports where the chain that a server sent does not lead to the trust anchor.
_NO_ISSUER = (2, 18, 19, 20, 21)


def _explain_missing_cross_sign(root: KnownRoot, anchor: TrustAnchor) -> tuple[str, str]:
    """Return the reason and the advice for a chain that ends below a root of Let's Encrypt that is not trusted."""
    reason = f"its chain ends at {root.name}, and the server sent no cross-sign that leads from there to ISRG Root X1"
    store = f"a PEM file that contains {root.name} ({root.url})"
    if len(anchor.roots) > 1:
        return reason, f"{root.name} was not found on this system: name {store} with sslrootcert=."
    return reason, (
        "To connect nevertheless, pass trust_anchor=neon_async.LETS_ENCRYPT_ROOTS in code, which trusts the further "
        f"roots of Let's Encrypt, too; where certifi lacks {root.name}, name {store} with sslrootcert=. Report this to "
        "the operator of the server, who must send the cross-sign."
    )
