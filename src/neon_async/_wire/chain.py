"""Read certificate chains: what a server sent, what was verified, and how long the path to its root lasts.

This module describes certificates that OpenSSL has parsed, and verifies nothing. It must not know sockets or pools.
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

import functools
import re
import ssl
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .._config.roots import ISRG_ROOT_X1, LETS_ENCRYPT_ROOTS, KnownRoot
from .trust import distinguished_name, fingerprint

if TYPE_CHECKING:
    from .report import ChainCertificate


class Chain(NamedTuple):
    """What one server sent, and what of it was verified, the leaf first.

    Attributes:
        served: What the server sent, in DER.
        verified: From the leaf to the root at which the verification ended, in DER.
    """

    served: tuple[bytes, ...]
    verified: tuple[bytes, ...]


class ChainFacts(NamedTuple):
    """What is reported about a chain.

    Attributes:
        served: What the server sent.
        verified: From the leaf to the trust anchor.
        path_ends: When the part of the chain that only a CA can renew stops being trusted, in UTC.
        advice: Why other clients refuse what the server sent, or "".
    """

    served: "tuple[ChainCertificate, ...]"
    verified: "tuple[ChainCertificate, ...]"
    path_ends: datetime
    advice: str


class RecordingSSLObject(ssl.SSLObject):
    """An SSLObject whose failed verification says what the server sent."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as error:
            refusal = error
        else:
            return
        try:
            raise ChainRefusedError(refusal, served_chain(self)) from None
        finally:
            del refusal


class ChainRefusedError(ssl.SSLCertVerificationError):
    """OpenSSL's error for a chain that failed verification, together with that chain.

    Attributes:
        served: What the server sent, in DER, the leaf first.
    """

    def __init__(self, error: ssl.SSLCertVerificationError, served: tuple[bytes, ...]) -> None:
        super().__init__(*error.args)
        self.reason, self.library = error.reason, error.library
        self.verify_code, self.verify_message = error.verify_code, error.verify_message
        self.served = served


def served_chain(tls: ssl.SSLObject) -> tuple[bytes, ...]:
    """Return what the server sent, in DER."""
    if sys.version_info >= (3, 13):
        return tuple(tls.get_unverified_chain())
    return _to_der(tls, "get_unverified_chain")


def chain_of(tls: ssl.SSLObject) -> Chain:
    """Return the chain of a session whose handshake has succeeded."""
    if sys.version_info >= (3, 13):
        return Chain(served_chain(tls), tuple(tls.get_verified_chain()))
    return Chain(served_chain(tls), _to_der(tls, "get_verified_chain"))


@functools.lru_cache(maxsize=16)  # the chains of a few servers
def kept(chain: Chain) -> Chain:
    """Return the chain that all sessions with a server keep, so that each does not keep a copy."""
    return chain


@functools.lru_cache(maxsize=16)  # the chains of a few servers; parsing one takes a millisecond
def read_chain(chain: Chain) -> ChainFacts:
    """Return the facts about a chain that was verified."""
    served, verified = ([describe(der) for der in ders] for ders in (chain.served, chain.verified))
    end = _end_of(served)
    return ChainFacts(
        tuple(each.shown for each in served),
        tuple(each.shown for each in verified),
        _path_ends(verified),
        _missing_cross_sign(end) if end is not None else "",
    )


def describe_refused(error: BaseException) -> "tuple[ChainCertificate, ...]":
    """Return what a server sent whose chain failed verification with `error`; nothing for any other error."""
    refused = error if isinstance(error, ChainRefusedError) else error.__cause__
    return tuple(describe(der).shown for der in refused.served) if isinstance(refused, ChainRefusedError) else ()


def root_without_cross_sign(served: Sequence[bytes]) -> KnownRoot | None:
    """Return the root of Let's Encrypt below which a served chain ends without leading to ISRG Root X1, or None."""
    return _end_of([describe(der) for der in served])


def path_warning(path_ends: datetime, root: str, now: datetime) -> str:
    """Return the warning that the path to a root of Let's Encrypt ends within a year, or "".

    Args:
        path_ends: When it ends.
        root: The fingerprint of the root.
        now: The time, in UTC.
    """
    known = next((each for each in LETS_ENCRYPT_ROOTS if each.sha256 == root), None)
    if known is None or path_ends - now > _NOTICE:
        return ""
    return (
        f"The path to {known.name} ends on {path_ends:%Y-%m-%d}: from then on the server may be refused. Upgrade "
        "neon-async before that day, or see trust_anchor=neon_async.LETS_ENCRYPT_ROOTS."
    )


_NOTICE = timedelta(days=365)


# ---------------------------------------------------------------------------------------------------------------------
# Certificates


class Described(NamedTuple):
    """A certificate as this module reads it.

    Attributes:
        shown: What is reported.
        subject: The subject in DER.
        issuer: The issuer in DER.
        issuer_key: The identifier of the issuer's key, in hexadecimal digits, or "".
        not_before: When it becomes valid, in UTC. None where it cannot be read.
        key: The identifier of its own key, in hexadecimal digits, or "".
        der: The certificate.
    """

    shown: "ChainCertificate"
    subject: bytes
    issuer: bytes
    issuer_key: str
    not_before: datetime | None = None
    key: str = ""
    der: bytes = b""

    @property
    def is_self_issued(self) -> bool:
        return self.subject == self.issuer


def _to_der(tls: ssl.SSLObject, method: str) -> tuple[bytes, ...]:
    """Return a chain before Python 3.13, whose `get_verified_chain()` and `get_unverified_chain()` these become."""
    encoding_der = 2  # `_ssl.ENCODING_DER`, which is OpenSSL's X509_FILETYPE_ASN1
    certificates = getattr(cast(Any, tls)._sslobj, method)() or ()
    return tuple(certificate.public_bytes(encoding_der) for certificate in certificates)


@functools.lru_cache(maxsize=64)
def describe(der: bytes) -> Described:
    """Return a certificate as this module reads it."""
    from asn1crypto.x509 import Certificate  # takes long to import; scramp has imported it before the first dial

    from .report import ChainCertificate

    sha256 = fingerprint(der)
    try:
        certificate = Certificate.load(der)
        shown = ChainCertificate(
            distinguished_name(_pairs(certificate.subject)),
            distinguished_name(_pairs(certificate.issuer)),
            certificate.not_valid_after.astimezone(UTC),
            sha256,
        )
        issuer_key = (certificate.authority_key_identifier or b"").hex()
        key = (certificate.key_identifier or b"").hex()
        not_before = certificate.not_valid_before.astimezone(UTC)
        return Described(shown, certificate.subject.dump(), certificate.issuer.dump(), issuer_key, not_before, key, der)
    except Exception:  # noqa: BLE001  asn1crypto raises what it likes; a server may send anything besides its chain
        return Described(ChainCertificate("unreadable", "unreadable", None, sha256), b"", b"", "")


def _pairs(name: Any) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Return a name of asn1crypto in the form of `getpeercert()`."""
    pairs = [[(pair["type"].native, pair["value"].native) for pair in rdn] for rdn in name.chosen]
    return tuple(tuple((_camel_case(kind), value) for kind, value in rdn) for rdn in pairs)


def _camel_case(kind: str) -> str:
    return re.sub("_(.)", lambda found: found[1].upper(), kind)


# ---------------------------------------------------------------------------------------------------------------------
# The path to a root of Let's Encrypt


def _end_of(served: Sequence[Described]) -> KnownRoot | None:
    """Return the root other than ISRG Root X1 below which the served chain ends, or None.

    Cross-signs, which lead on, are preferred to the root itself, which does not.
    """
    if not served:
        return None
    current, *rest = served
    while rest:
        issuers = [each for each in rest if each.subject == current.issuer and not each.is_self_issued]
        if not issuers:
            break
        current = issuers[0]
        rest.remove(current)
    for root in LETS_ENCRYPT_ROOTS:
        named = f"CN={root.name}" in current.shown.issuer.split(", ")
        if root is not ISRG_ROOT_X1 and named and current.issuer_key in ("", root.key_identifier):
            return root
    return None


def _missing_cross_sign(root: KnownRoot) -> str:
    return (
        f"The server sends no cross-sign that leads from {root.name} to {ISRG_ROOT_X1.name}. Clients that trust "
        f"{ISRG_ROOT_X1.name} only refuse it. Report this to the operator of the server."
    )


def _path_ends(verified: Sequence[Described]) -> datetime:
    """Return when the path ends: the root, and the cross-signs by which one root of Let's Encrypt leads to another.

    The leaf and its issuer are renewed all the time, and tell nothing about the path.
    """
    known = {root.name: root for root in LETS_ENCRYPT_ROOTS}
    root = verified[-1]
    ends = [root.shown.not_after]
    ends += [each.ends for each in LETS_ENCRYPT_ROOTS if each.sha256 == root.shown.sha256]
    for each in verified[1:-1]:
        if any(f"CN={name}" in each.shown.subject.split(", ") for name in known):
            ends.append(each.shown.not_after)
    return min(end for end in ends if end is not None)
