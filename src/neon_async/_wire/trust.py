"""Find the trust anchor: ISRG Root X1, or the root certificates that the caller's code names.

A root is recognised by the SHA-256 of its DER bytes, never by its name or location. This module reads files, and must
not know DSNs, connections or pools.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import ssl
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .._config.arguments import AnchorSource
from .._config.roots import ISRG_ROOT_X1_SHA256, KnownRoots
from .._errors import ConfigurationError, InsecureConfigurationError
from .._text import escape, log
from .files import MAX_CERTIFICATES, read_file
from .strict import fault_of_root


class TrustAnchor(NamedTuple):
    """The root certificate that every accepted chain ends at, or one of several.

    Attributes:
        subject: The distinguished name.
        source: Where the certificate was found.
        sha256: The fingerprint of the DER bytes, in hexadecimal digits.
        der: The DER bytes.
        others: The further roots at which a chain may end, each without others.
    """

    subject: str
    source: str
    sha256: str
    der: bytes
    others: tuple[TrustAnchor, ...] = ()

    def __repr__(self) -> str:
        return f"<TrustAnchor {self}>"

    def __str__(self) -> str:
        return "; ".join(f"{root.subject}, from {root.source}" for root in self.roots)

    @property
    def roots(self) -> tuple[TrustAnchor, ...]:
        """All roots, each without others."""
        return (self._replace(others=()), *self.others) if self.others else (self,)

    def root(self, sha256: str) -> TrustAnchor | None:
        """Return the root with this fingerprint, or None where it is not one of them."""
        return next((root for root in self.roots if root.sha256 == sha256), None)


class Place(NamedTuple):
    """A store that may contain ISRG Root X1.

    Attributes:
        name: The software or systems that the store belongs to.
        location: The file or folder, or the name of the Windows store.
        certificates: How many certificates it contains, or None where it does not exist on this system.
        found: Whether ISRG Root X1 is among them.
    """

    name: str
    location: str
    certificates: int | None
    found: bool


@functools.cache  # the hash identifies the certificate, so a result stays right; exceptions are not cached
def find_isrg_root_x1(sslrootcert: str | None = None) -> TrustAnchor:
    """Return ISRG Root X1 from certifi or, failing that, from the system's root stores.

    Args:
        sslrootcert: The only file or folder to search. `system`, as in libpq, searches the system's stores without
            certifi. Default: certifi, then the system's stores.

    Raises:
        InsecureConfigurationError: `sslrootcert` contains other certificates instead.
        ConfigurationError: ISRG Root X1 was not found.
    """
    if sslrootcert is None:
        places = [_certifi(), *_system_places()]
    elif sslrootcert == "system":
        places = _system_places()
    else:
        return _find_in_file(sslrootcert)
    for name, location in places:
        for der in _certificates(name, location):
            if fingerprint(der) == ISRG_ROOT_X1_SHA256:
                return _anchor(der, f"{name} ({location})")
    searched = ", ".join(location for _, location in places)
    raise ConfigurationError(
        f"ISRG Root X1 was not found; searched {searched}. Upgrade certifi or install the system's ca-certificates "
        "package; `neon-async roots` lists every place."
    )


def load_trust_anchor(source: AnchorSource, sslrootcert: str | None = None) -> TrustAnchor:
    """Return the root certificates in `source`.

    Args:
        source: PEM bytes, PEM text, the path of a PEM file, or a set of known roots.
        sslrootcert: Where to look for known roots, besides certifi and the system's stores.

    Raises:
        ConfigurationError: `source` cannot be read, or contains anything but one or a few self-signed CA certificates
            that strict verification can accept. OpenSSL ends a chain at a self-signed certificate only, and every
            further one is another party to trust.
    """
    if isinstance(source, KnownRoots):
        return _find_known_roots(source, sslrootcert)
    pem, name = _read_pem(source)
    blocks = list(dict.fromkeys(_pem_to_der(pem)))
    if not 1 <= len(blocks) <= _MAX_ROOTS:
        found = f"{len(blocks)} certificates" if blocks else f"no certificate{_other_format(pem)}"
        advice = f"pass the root of your CA, in PEM format, or at most {_MAX_ROOTS} roots."
        raise ConfigurationError(f"{name} contains {found}; {advice}")
    try:
        roots = [_anchor(block, name) for block in blocks]
    except (ssl.SSLError, ValueError):
        pass
    else:
        _require_acceptable(roots)
        return _join(roots)
    what = "is not a self-signed CA certificate" if len(blocks) == 1 else "contains more than self-signed CA roots"
    raise ConfigurationError(f"{name} {what}; pass the root of your CA, in PEM format.")


def survey() -> list[Place]:
    """Return certifi and every system store: whether it exists here, and whether it contains ISRG Root X1."""
    return [_look(name, location) for name, location in (_certifi(), *_SYSTEM_STORES, _WINDOWS_STORE)]


def fingerprint(der: bytes) -> str:
    """Return the SHA-256 of a certificate, in hexadecimal digits."""
    return hashlib.sha256(der).hexdigest()


@functools.lru_cache(maxsize=64)  # the certificates of a few servers; their connections share the text
def distinguished_name(name: object) -> str:
    """Return a name in the form of `getpeercert()` and `get_ca_certs()` as text, most specific attribute first."""
    pairs = [pair for rdn in name for pair in rdn] if isinstance(name, tuple) else []
    return escape(", ".join(f"{_SHORT_NAMES.get(key, key)}={value}" for key, value in reversed(pairs)))


# Short names of the attributes that CAs use (RFC 4514, section 3, and OpenSSL).
_SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
}


# ---------------------------------------------------------------------------------------------------------------------
# Several roots

# A private PKI has one or two roots, and two more while it replaces them. A bundle of public roots would let any CA in
# the world vouch for the server.
_MAX_ROOTS = 10


# Complete sets only: a root that is missing can be in the same file by the time of the next search.
_complete: dict[tuple[KnownRoots, str | None], TrustAnchor] = {}


def _find_known_roots(known: KnownRoots, sslrootcert: str | None) -> TrustAnchor:
    """Return those of the `known` roots that are found, in the order of the set.

    A store may lack the younger ones. A chain that needs a missing one is refused, and the error says so.
    """
    if (known, sslrootcert) in _complete:
        return _complete[known, sslrootcert]
    places = _system_places() if sslrootcert == "system" else [_certifi(), *_system_places()]
    found = _search(known, places)
    if sslrootcert not in (None, "system"):
        given = _search(known, [("sslrootcert", sslrootcert)])
        if not given:
            raise ConfigurationError(
                f"sslrootcert {sslrootcert!r} cannot be read or contains none of {known}. Remove it, or name a PEM "
                "file that contains one of them."
            )
        found |= given
    if not found:
        raise ConfigurationError(f"None of {known} was found. Upgrade certifi, or name a PEM file with sslrootcert=.")
    missing = KnownRoots(root for root in known if root.sha256 not in found)
    if missing:
        text = "not found on this system, and so not trusted: %(roots)s. Name a PEM file with sslrootcert="
        log(logging.WARNING, text, event="roots_missing", roots=str(missing))
    anchor = _join([found[root.sha256] for root in known if root.sha256 in found])
    if not missing:
        _complete[known, sslrootcert] = anchor
    return anchor


def _search(known: KnownRoots, places: Iterable[tuple[str, str]]) -> dict[str, TrustAnchor]:
    """Return the `known` roots that one of the places contains, by fingerprint; the first place wins."""
    found: dict[str, TrustAnchor] = {}
    for name, location in places:
        for der in _certificates(name, location):
            sha256 = fingerprint(der)
            if sha256 not in found and any(root.sha256 == sha256 for root in known):
                found[sha256] = _anchor(der, f"{name} ({location})")
        if len(found) == len(known):
            break
    return found


def _require_acceptable(roots: Iterable[TrustAnchor]) -> None:
    """Refuse a root for which every handshake would fail, with a message about the server's certificate."""
    for root in roots:
        if fault := fault_of_root(root.der):
            raise ConfigurationError(
                f"{root.source} contains the root {root.subject}, which {fault}. Strict verification (RFC 5280) "
                "refuses every chain that ends at it. Have your CA issue a root that conforms, and pass that."
            )


def _join(roots: list[TrustAnchor]) -> TrustAnchor:
    first, *others = roots
    return first._replace(others=tuple(others))


# ---------------------------------------------------------------------------------------------------------------------
# ISRG Root X1

# The root stores of the systems; Go's crypto/x509 (root_linux.go, root_bsd.go) lists the same files.
_SYSTEM_STORES = (
    ("Debian, Ubuntu, Gentoo", "/etc/ssl/certs/ca-certificates.crt"),
    ("CentOS, Fedora, RedHat", "/etc/pki/tls/certs/ca-bundle.crt"),
    ("openSUSE", "/etc/ssl/ca-bundle.pem"),
    ("Alpine, macOS", "/etc/ssl/cert.pem"),
    ("Android", "/system/etc/security/cacerts"),
)
_WINDOWS_STORE = ("Windows", "ROOT")


def _find_in_file(path: str) -> TrustAnchor:
    count = 0
    for der in _certificates("sslrootcert", path):
        count += 1
        if fingerprint(der) == ISRG_ROOT_X1_SHA256:
            return _anchor(der, f"sslrootcert ({path})")
    if count:
        found = "1 certificate, which is not" if count == 1 else f"{count} certificates, none of them"
        raise InsecureConfigurationError(
            f"sslrootcert {path!r} contains {found} ISRG Root X1. Remove sslrootcert; to trust a private CA, pass "
            "trust_anchor= in code."
        )
    raise ConfigurationError(
        f"sslrootcert {path!r} cannot be read or contains no certificate{_reason(path)}. Remove it, or name a PEM "
        "file that contains ISRG Root X1."
    )


def _reason(path: str) -> str:
    """Return why the file at `path` cannot be read, for a message; nothing if it can be read or is a folder."""
    try:
        if not Path(path).is_dir():
            read_file(path, MAX_CERTIFICATES)
    except (OSError, ValueError) as error:
        return f" ({getattr(error, 'strerror', None) or 'not a path'})"
    return ""


def _look(name: str, location: str) -> Place:
    exists = sys.platform == "win32" if (name, location) == _WINDOWS_STORE else Path(location).exists()
    found = [fingerprint(der) for der in _certificates(name, location)] if exists else []
    return Place(name, location, len(found) if exists else None, ISRG_ROOT_X1_SHA256 in found)


def _certifi() -> tuple[str, str]:
    import certifi  # takes 6 ms, and is not needed with trust_anchor=

    return "certifi", certifi.where()


def _system_places() -> list[tuple[str, str]]:
    return [_WINDOWS_STORE] if sys.platform == "win32" else list(_SYSTEM_STORES)


def _certificates(name: str, location: str) -> Iterator[bytes]:
    """Yield the DER bytes of every readable certificate in a file, a folder or the Windows store."""
    if (name, location) == _WINDOWS_STORE:
        yield from _windows_certificates()
        return
    path = Path(location)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except (OSError, ValueError):
        return
    left = MAX_CERTIFICATES
    for file in files:
        try:
            content = read_file(file, left)
        except (OSError, ValueError):
            continue
        left -= len(content)
        yield from _pem_to_der(content)


def _windows_certificates() -> Iterator[bytes]:
    if sys.platform == "win32":
        yield from (der for der, encoding, _ in ssl.enum_certificates("ROOT") if encoding == "x509_asn")
    yield from ()


# ---------------------------------------------------------------------------------------------------------------------
# PEM

_CERTIFICATE = rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----"


def _read_pem(source: AnchorSource) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "trust_anchor"
    if isinstance(source, str) and "-----BEGIN" in source:
        return source.encode("utf-8", "replace"), "trust_anchor"
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigurationError(
            f"trust_anchor must be PEM bytes, PEM text or a path, not a value of type {type(source).__name__}."
        )
    try:
        return read_file(source, MAX_CERTIFICATES), f"trust_anchor {os.fspath(source)!r}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
    raise ConfigurationError(f"trust_anchor {os.fspath(source)!r} cannot be read: {reason}.")


def _other_format(data: bytes) -> str:
    """Return what a file without a certificate in PEM contains instead, for a message."""
    if data.startswith(b"\x30\x82"):  # an ASN.1 sequence of more than 255 bytes
        return " in PEM format (it seems to be DER: convert it with `openssl x509 -inform der`)"
    return " but a key" if b"PRIVATE KEY-----" in data else ""


def _pem_to_der(pem: bytes) -> list[bytes]:
    ders = []
    for block in re.findall(_CERTIFICATE, pem):
        try:
            ders.append(ssl.PEM_cert_to_DER_cert(block.decode("ascii")))
        except ValueError:  # broken base64, or not ASCII: not a certificate
            continue
    return ders


def _anchor(der: bytes, source: str) -> TrustAnchor:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=der)
    roots = context.get_ca_certs()  # CA certificates only
    if len(roots) != 1 or roots[0]["subject"] != roots[0]["issuer"]:
        raise ValueError("not a root certificate")
    return TrustAnchor(distinguished_name(roots[0]["subject"]), source, fingerprint(der), der)
