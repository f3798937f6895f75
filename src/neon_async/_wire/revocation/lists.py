"""Read one revocation list (CRL, RFC 5280, section 5) and decide whether it may be used.

Lists can be long: one of 100,000 entries has 4 MB. cryptography parses everything but the entries. These are walked
here, because its objects for them would take a hundred times the memory; what is kept is 8 bytes for each. All of it
runs in a thread and releases the interpreter every millisecond, so that the event loop does not wait. This module must
not know where a list comes from.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa, utils

from ..._config.roots import LETS_ENCRYPT_ROOTS
from ..._text import escape


class ListRefusedError(Exception):
    """A list cannot be obtained or must not be used. The text says why, and continues "the list ..."."""

    def __init__(self, why: str) -> None:
        # It quotes names and URLs of a list that was not verified, and that can be of any length.
        super().__init__(escape(why[:_MAX_REASON]))


class Source(NamedTuple):
    """Where a list comes from, and what it must be.

    Attributes:
        url: The URL in the certificate that names the list.
        issuer: The certificate of the CA that must have signed it, in DER.
        for_cas: Whether it must cover certificates of CAs, and not of servers.
        must_name_url: Whether its issuing distribution point must be present. A list without one covers everything
            that its issuer has issued; Let's Encrypt's lists for servers are shards and always have one.
    """

    url: str
    issuer: bytes
    for_cas: bool
    must_name_url: bool


class RevocationList:
    """A list that may be used until it expires.

    Attributes:
        number: Its number, which grows with each list of the same issuer and scope, or None.
        this_update: When it was issued.
        next_update: When it expires.
        expires_at: The same, in seconds since the epoch.
        entries: How many certificates are on it.
    """

    __slots__ = ("_digests", "entries", "expires_at", "next_update", "number", "this_update")

    def __init__(
        self, number: int | None, this_update: datetime, next_update: datetime, digests: Sequence[bytes]
    ) -> None:
        self.number = number
        self.this_update = this_update
        self.next_update = next_update
        self.expires_at = next_update.timestamp()
        self.entries = sum(map(len, digests)) // _DIGEST_SIZE
        # In 256 parts, by their first byte: the event loop looks serial numbers up, and that takes microseconds.
        self._digests = digests

    def __repr__(self) -> str:
        return f"<RevocationList {self.number}: {self.entries} entries, until {self.next_update:%Y-%m-%d %H:%M}>"

    def __contains__(self, serial_number: int) -> bool:
        digest = _digest(serial_number.to_bytes(serial_number.bit_length() // 8 + 1))
        digests = self._digests[digest[0]]
        at = digests.find(digest)
        while at >= 0 and at % _DIGEST_SIZE:
            at = digests.find(digest, at + 1)
        return at >= 0


class Named(NamedTuple):
    """What a certificate says about its own revocation.

    Attributes:
        subject: Its subject.
        serial_number: Its serial number.
        is_ca: Whether it is that of a CA.
        urls: The lists that it names and that cover every reason, by `http://` URL.
        lifetime: For how long it is valid.
    """

    subject: str
    serial_number: int
    is_ca: bool
    urls: tuple[str, ...]
    lifetime: timedelta


def read_certificate(der: bytes) -> Named:
    """Return what a certificate says about its own revocation."""
    certificate = x509.load_der_x509_certificate(der)
    is_ca, urls = False, []
    for extension in certificate.extensions:
        match extension.value:
            case x509.BasicConstraints() as value:
                is_ca = value.ca
            case x509.CRLDistributionPoints() as points:
                whole = [point for point in points if point.reasons is None and point.crl_issuer is None]
                names = [name for point in whole for name in point.full_name or ()]
                urls += [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    http = tuple(url for url in urls if url.lower().startswith("http://"))
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    # In the form of every other name in messages: the most specific attribute first.
    subject = certificate.subject.rfc4514_string().replace(",", ", ")
    return Named(subject, certificate.serial_number, is_ca, http, lifetime)


def is_of_lets_encrypt(root: str) -> bool:
    """Return whether a fingerprint is that of a root of Let's Encrypt."""
    return any(each.sha256 == root for each in LETS_ENCRYPT_ROOTS)


def objection_to(url: str, root: str) -> str:
    """Return why nothing is fetched from `url`, or "".

    Args:
        url: A URL from a certificate.
        root: The fingerprint of the root that the chain of the certificate ends at. Below a root of Let's Encrypt only
            its own servers are asked. A root of one's own vouches for whatever its certificates name.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL"
    if not host or not url.isascii() or not url.isprintable() or " " in url or len(url) > _MAX_URL:
        return "is not a URL"
    if is_of_lets_encrypt(root):
        # Nothing that urllib decodes, such as %2f, or that is no name.
        is_name = re.fullmatch(r"([a-z0-9-]+\.)*[a-z0-9-]+", host) is not None
        inside = host == _LETS_ENCRYPT or host.endswith(f".{_LETS_ENCRYPT}")
        if not (is_name and inside) or port not in (None, 80) or parts.username is not None:
            return f"is not below {_LETS_ENCRYPT}, the only place for lists of Let's Encrypt"
    return ""


def read_list(der: bytes, source: Source, now: datetime) -> RevocationList:
    """Return the list in `der` if it is the one that `source` names and is valid now.

    Raises:
        ListRefusedError: It is not.
    """
    try:
        parts = _split(der)
        crl = x509.load_der_x509_crl(parts.without_entries)
        issuer = x509.load_der_x509_certificate(source.issuer)
        number = _check_scope(crl, source)
        _check_issuer(crl, issuer)
        _check_signature(der, parts, crl, issuer)
        this_update, next_update = _check_times(crl, now)
        return RevocationList(number, this_update, next_update, _read_entries(der, parts.entries))
    except ListRefusedError:
        raise
    except Exception as error:
        raise ListRefusedError("is truncated or is not a revocation list in DER") from error


# The part of Let's Encrypt's domain where its lists are.
_LETS_ENCRYPT = "c.lencr.org"
_MAX_URL = 2000
_MAX_REASON = 300
# 8 bytes: among 100,000 serial numbers one that is not revoked has the digest of a revoked one in 1 of 10**14 cases.
_DIGEST_SIZE = 8


# ---------------------------------------------------------------------------------------------------------------------
# What a list must be


def _check_issuer(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> None:
    if crl.issuer != issuer.subject:
        raise ListRefusedError(f"is of another issuer ({crl.issuer.rfc4514_string()})")
    try:
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.crl_sign:
        raise ListRefusedError("is signed by a CA that may not sign lists")


def _check_signature(der: bytes, parts: _Parts, crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> None:
    key, algorithm, signature = issuer.public_key(), crl.signature_hash_algorithm, crl.signature
    signed = memoryview(der)[parts.signed]
    if parts.inner_algorithm != parts.outer_algorithm:
        raise ListRefusedError("names two different signature algorithms")
    try:
        if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
            key.verify(signature, bytes(signed))
            return
        if algorithm is None or algorithm.digest_size < _MIN_DIGEST:
            raise ListRefusedError("has a signature that is too weak")
        digest, hashed = _hash(algorithm.name, signed), utils.Prehashed(algorithm)
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, digest, ec.ECDSA(hashed))
        elif isinstance(key, rsa.RSAPublicKey):
            scheme = crl.signature_algorithm_parameters
            assert isinstance(scheme, (padding.PSS, padding.PKCS1v15))
            key.verify(signature, digest, scheme, hashed)
        else:
            raise ListRefusedError("is signed with a key of an unknown kind")
    except (InvalidSignature, AssertionError):
        raise ListRefusedError("has a forged signature, or that of another key") from None


def _check_times(crl: x509.CertificateRevocationList, now: datetime) -> tuple[datetime, datetime]:
    this_update, next_update = crl.last_update_utc, crl.next_update_utc
    if this_update > now:
        raise ListRefusedError(f"is from the future ({this_update:%Y-%m-%d %H:%M} UTC); check this machine's clock")
    if next_update is None:
        raise ListRefusedError("does not say until when it is valid")
    if next_update <= now:
        raise ListRefusedError(f"expired at {next_update:%Y-%m-%d %H:%M} UTC")
    return this_update, next_update


def _check_scope(crl: x509.CertificateRevocationList, source: Source) -> int | None:
    """Check that the list covers the certificates that name it, and return its number."""
    number, names_url = None, not source.must_name_url
    for extension in crl.extensions:
        match extension.value:
            case x509.DeltaCRLIndicator():
                raise ListRefusedError("is a delta, which lists only what has changed")
            case x509.CRLNumber() as value:
                number = value.crl_number
            case x509.IssuingDistributionPoint() as value:
                names_url = _check_distribution_point(value, source) or names_url
            case x509.AuthorityKeyIdentifier():
                pass
            case _ if extension.critical:
                raise ListRefusedError(f"has the critical extension {extension.oid.dotted_string}, which is unknown")
    if not names_url:
        raise ListRefusedError("does not say which shard it is")
    return number


def _check_distribution_point(point: x509.IssuingDistributionPoint, source: Source) -> bool:
    """Check the scope of the list, and return whether it names the URL. Without a name it covers all shards."""
    partial = point.only_some_reasons is not None or point.only_contains_attribute_certs or point.indirect_crl
    others = point.only_contains_user_certs if source.for_cas else point.only_contains_ca_certs
    if partial or others:
        raise ListRefusedError("does not cover the certificate that names it")
    if point.full_name is None and point.relative_name is None:
        return False
    named = [name.value for name in point.full_name or () if isinstance(name, x509.UniformResourceIdentifier)]
    if source.url not in named:
        raise ListRefusedError(f"is another shard ({', '.join(named) or 'without a URL'})")
    return True


# SHA-224; SHA-1 and MD5 are below OpenSSL's security level 2, at which the chain itself was verified.
_MIN_DIGEST = 28


# ---------------------------------------------------------------------------------------------------------------------
# DER

_SEQUENCE, _INTEGER, _UTC_TIME, _GENERALIZED_TIME, _BOOLEAN = 0x30, 0x02, 0x17, 0x18, 0x01
# The certificate issuer (RFC 5280, section 5.3.3): the entry is about a certificate of another CA.
_CERTIFICATE_ISSUER = b"\x06\x03\x55\x1d\x1d"


class _Parts(NamedTuple):
    """The parts of a list in DER.

    Attributes:
        signed: What the signature covers.
        entries: The content of the sequence of entries; empty where there is none.
        inner_algorithm: The signature algorithm as the signed part names it.
        outer_algorithm: The same as it stands beside the signature.
        without_entries: The list without its entries, in DER. Its signature does not fit.
    """

    signed: slice
    entries: slice
    inner_algorithm: bytes
    outer_algorithm: bytes
    without_entries: bytes


def _split(der: bytes) -> _Parts:
    start, end = _content(der, 0, _SEQUENCE)
    if end != len(der):
        raise ListRefusedError("is truncated, or something follows it")
    to_be_signed, algorithm, signature = _children(der, start, end)
    fields = list(_children(der, *_content(der, to_be_signed.start, _SEQUENCE)))
    times = [each for each, field in enumerate(fields) if der[field.start] in (_UTC_TIME, _GENERALIZED_TIME)]
    after_times = times[-1] + 1
    entries, rest = slice(0, 0), list(fields)
    if after_times < len(fields) and der[fields[after_times].start] == _SEQUENCE:
        entries = slice(*_content(der, rest.pop(after_times).start, _SEQUENCE))
    body = b"".join(der[field] for field in rest)
    inner = fields[1] if der[fields[0].start] == _INTEGER else fields[0]
    return _Parts(
        signed=to_be_signed,
        entries=entries,
        inner_algorithm=der[inner],
        outer_algorithm=der[algorithm],
        without_entries=_sequence(_sequence(body) + der[algorithm] + der[signature]),
    )


def _read_entries(der: bytes, entries: slice) -> Sequence[bytes]:
    """Return the digests of the serial numbers of all entries, by their first byte."""
    digests = [bytearray() for _ in range(256)]
    count = 0
    known: set[bytes] = set()  # what follows the dates, such as the reason: a few byte strings, again and again
    at, end = entries.start, entries.stop
    while at < end:
        if count % _ENTRIES_AT_ONCE == 0:
            time.sleep(_PAUSE)
        count += 1
        start, following = _content(der, at, _SEQUENCE)
        serial, after_serial = _content(der, start, _INTEGER)
        _, after_date = _content(der, after_serial)
        if der[after_serial] not in (_UTC_TIME, _GENERALIZED_TIME) or not after_date <= following <= end:
            raise ListRefusedError("has an entry that is not one")
        further = der[after_date:following]
        if further not in known:
            _require_known_extensions(further)
            if len(known) < _MAX_KNOWN:
                known.add(further)
        digest = _digest(der[serial:after_serial])
        digests[digest[0]] += digest
        at = following
    return [*map(bytes, digests)]


def _require_known_extensions(further: bytes) -> None:
    """Refuse an entry whose extensions change what it means (RFC 5280, section 5.3)."""
    if not further:
        return
    start, end = _content(further, 0, _SEQUENCE)
    for extension in _children(further, start, end):
        parts = list(_children(further, *_content(further, extension.start, _SEQUENCE)))
        critical = any(further[part.start] == _BOOLEAN for part in parts)
        if critical or further[parts[0]] == _CERTIFICATE_ISSUER:
            raise ListRefusedError("has an entry with a critical extension")


def _digest(serial: bytes) -> bytes:
    return hashlib.blake2b(serial.lstrip(b"\0"), digest_size=_DIGEST_SIZE).digest()


def _hash(name: str, signed: memoryview) -> bytes:
    digest = hashlib.new(name)
    for at in range(0, len(signed), _HASHED_AT_ONCE):
        digest.update(signed[at : at + _HASHED_AT_ONCE])  # releases the interpreter meanwhile
    return digest.digest()


def _content(der: bytes, at: int, tag: int | None = None) -> tuple[int, int]:
    """Return where the content of the element at `at` begins and ends.

    Raises:
        ListRefusedError: It has another tag, or ends behind the end of `der`.
    """
    start, size = at + 2, der[at + 1]
    if size >= 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[at + 2 : start])
    end = start + size
    if end > len(der):
        raise ListRefusedError("is truncated")
    if tag is not None and der[at] != tag:
        raise ListRefusedError("is not a revocation list in DER")
    return start, end


def _children(der: bytes, start: int, end: int) -> Iterator[slice]:
    """Yield where each element between `start` and `end` stands."""
    while start < end:
        _, following = _content(der, start)
        yield slice(start, following)
        start = following


def _sequence(content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([_SEQUENCE, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([_SEQUENCE, 0x80 | len(length)]) + length + content


# A fraction of a millisecond of work, and a pause in which the event loop can run. Without the pause the interpreter
# would let it wait for its switch interval of 5 ms, again and again.
_ENTRIES_AT_ONCE = 100
_PAUSE = 0.000_05
_HASHED_AT_ONCE = 1 << 16
_MAX_KNOWN = 1000
