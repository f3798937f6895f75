"""Find the trust anchor: ISRG Root X1, or the root certificate that the caller's code names.

A root is recognised by the SHA-256 of its DER bytes, never by its name or location. This module reads files, and must
not know DSNs, connections or pools.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from .._errors import ConfigurationError, InsecureConfigurationError
from .files import MAX_CERTIFICATES, read_file

# https://letsencrypt.org/certs/isrgrootx1.der; trusted by root programmes until 2030-06-04, notAfter 2035-06-04.
ISRG_ROOT_X1_SHA256 = "96bcec06264976f37460779acf28c5a7cfe8a3c0aae11a8ffcee05c0bddf08c6"

AnchorSource: TypeAlias = str | bytes | os.PathLike[str]


class TrustAnchor(NamedTuple):
    """The root certificate that every accepted chain ends at.

    Attributes:
        subject: The distinguished name.
        source: Where the certificate was found.
        sha256: The fingerprint of the DER bytes, in hexadecimal digits.
        der: The DER bytes.
    """

    subject: str
    source: str
    sha256: str
    der: bytes

    def __repr__(self) -> str:
        return f"<TrustAnchor {self}>"

    def __str__(self) -> str:
        return f"{self.subject}, from {self.source}"


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
            if _fingerprint(der) == ISRG_ROOT_X1_SHA256:
                return _anchor(der, f"{name} ({location})")
    searched = ", ".join(location for _, location in places)
    raise ConfigurationError(
        f"ISRG Root X1 was not found; searched {searched}. Upgrade certifi or install the system's ca-certificates "
        "package; `neon-async roots` lists every place."
    )


def load_trust_anchor(source: AnchorSource) -> TrustAnchor:
    """Return the one root certificate in `source`.

    Args:
        source: PEM bytes, PEM text, or the path of a PEM file.

    Raises:
        ConfigurationError: `source` cannot be read, or does not contain exactly one self-signed CA certificate.
            OpenSSL ends a chain at a self-signed certificate only, and a second anchor would be another party to trust.
    """
    pem, name = _read_pem(source)
    blocks = _pem_to_der(pem)
    if len(blocks) != 1:
        found = f"{len(blocks)} certificates" if blocks else "no certificate"
        raise ConfigurationError(f"{name} contains {found}; pass exactly one: the root of your CA, in PEM format.")
    try:
        return _anchor(blocks[0], name)
    except (ssl.SSLError, ValueError):
        pass
    raise ConfigurationError(f"{name} is not a self-signed CA certificate; pass the root of your CA, in PEM format.")


def survey() -> list[Place]:
    """Return certifi and every system store: whether it exists here, and whether it contains ISRG Root X1."""
    return [_look(name, location) for name, location in (_certifi(), *_SYSTEM_STORES, _WINDOWS_STORE)]


def distinguished_name(name: object) -> str:
    """Return a name in the form of `getpeercert()` and `get_ca_certs()` as text, most specific attribute first."""
    pairs = [pair for rdn in name for pair in rdn] if isinstance(name, tuple) else []
    return ", ".join(f"{_SHORT_NAMES.get(key, key)}={value}" for key, value in reversed(pairs))


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
        if _fingerprint(der) == ISRG_ROOT_X1_SHA256:
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
    found = [_fingerprint(der) for der in _certificates(name, location)] if exists else []
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
    return TrustAnchor(distinguished_name(roots[0]["subject"]), source, _fingerprint(der), der)


def _fingerprint(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest()
