"""Find the one certificate that everything is verified against: ISRG Root X1, or the anchor the caller's code names.

A root is recognised by the SHA-256 of its DER bytes, never by its name or place. This module reads files; it knows
nothing of pools, DSNs or connections.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .._errors import ConfigurationError, InsecureConfigurationError

# https://letsencrypt.org/certs/isrgrootx1.der; programme trust to 2030-06-04, notAfter 2035-06-04.
ISRG_ROOT_X1_SHA256 = "96bcec06264976f37460779acf28c5a7cfe8a3c0aae11a8ffcee05c0bddf08c6"

AnchorSource: TypeAlias = str | bytes | os.PathLike[str]

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")

# Where the systems keep their roots; Go's crypto/x509 (root_linux.go, root_bsd.go) lists the same files.
_SYSTEM_STORES = (
    ("Debian, Ubuntu, Gentoo", "/etc/ssl/certs/ca-certificates.crt"),
    ("CentOS, Fedora, RedHat", "/etc/pki/tls/certs/ca-bundle.crt"),
    ("openSUSE", "/etc/ssl/ca-bundle.pem"),
    ("Alpine, macOS", "/etc/ssl/cert.pem"),
    ("Android", "/system/etc/security/cacerts"),
)
_WINDOWS_STORE = ("Windows", "ROOT")


@dataclass(frozen=True, slots=True)
class TrustAnchor:
    """The certificate at the top of every chain that is accepted, and where it was found."""

    subject: str
    source: str
    sha256: str
    der: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"{self.subject}, from {self.source}"


@dataclass(frozen=True, slots=True)
class Place:
    """A place that may hold ISRG Root X1; `certificates` is None where the place does not exist on this system."""

    name: str
    location: str
    certificates: int | None
    found: bool


@functools.cache  # known by its hash, so what was found once is right for ever; a refusal is not kept
def find_isrg_root_x1(sslrootcert: str | None = None) -> TrustAnchor:
    """Return ISRG Root X1 from certifi or, failing that, from the system's root stores.

    `sslrootcert`: look in this file or folder only; `system` leaves certifi out (libpq's meaning of the word). Raises
    `InsecureConfigurationError` when the named place has other certificates instead, else `ConfigurationError`.
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
    looked = ", ".join(location for _, location in places)
    raise ConfigurationError(
        f"ISRG Root X1 was found nowhere; looked in {looked}. Upgrade certifi or install the system's ca-certificates; "
        "`neon-async roots` shows every place."
    )


def _find_in_file(path: str) -> TrustAnchor:
    count = 0
    for der in _certificates("sslrootcert", path):
        count += 1
        if _fingerprint(der) == ISRG_ROOT_X1_SHA256:
            return _anchor(der, f"sslrootcert ({path})")
    if count:
        raise InsecureConfigurationError(
            f"sslrootcert {path!r} does not hold ISRG Root X1, but {count} other. Leave sslrootcert out; "
            "to trust a private CA, pass trust_anchor= in code."
        )
    raise ConfigurationError(f"sslrootcert {path!r} cannot be read or holds no certificate. Leave it out.")


def load_trust_anchor(source: AnchorSource) -> TrustAnchor:
    """Return the one root certificate that `source` holds: PEM bytes, PEM text, or the path of a PEM file.

    Raises `ConfigurationError` when it cannot be read, or does not hold exactly one self-signed CA certificate: OpenSSL
    ends a chain only at such a one, and two anchors would be one more party to trust.
    """
    pem, name = _read_pem(source)
    blocks = _pem_to_der(pem)
    if len(blocks) != 1:
        found = f"{len(blocks)} certificates" if blocks else "no certificate"
        raise ConfigurationError(f"{name} holds {found}; give exactly one: the root of your CA, in PEM.")
    try:
        return _anchor(blocks[0], name)
    except (ssl.SSLError, ValueError):
        pass
    raise ConfigurationError(f"{name} is not a CA certificate signed by itself; give the root of your CA, in PEM.")


def _read_pem(source: AnchorSource) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "trust_anchor"
    if isinstance(source, str) and "-----BEGIN" in source:
        return source.encode("utf-8", "replace"), "trust_anchor"
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigurationError(f"trust_anchor is of type {type(source).__name__}; pass PEM bytes, text, or a path.")
    try:
        require_regular_file(source)
        return Path(source).read_bytes(), f"trust_anchor {os.fspath(source)!r}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
    raise ConfigurationError(f"trust_anchor {os.fspath(source)!r} cannot be read: {reason}.")


def survey() -> list[Place]:
    """Tell of certifi and every system store whether it exists here, and whether it holds ISRG Root X1."""
    return [_look(name, location) for name, location in (_certifi(), *_SYSTEM_STORES, _WINDOWS_STORE)]


def _look(name: str, location: str) -> Place:
    exists = sys.platform == "win32" if (name, location) == _WINDOWS_STORE else Path(location).exists()
    found = [_fingerprint(der) for der in _certificates(name, location)] if exists else []
    return Place(name, location, len(found) if exists else None, ISRG_ROOT_X1_SHA256 in found)


def _certifi() -> tuple[str, str]:
    import certifi  # 6 ms, and with trust_anchor= nobody needs it

    return "certifi", certifi.where()


def _system_places() -> list[tuple[str, str]]:
    return [_WINDOWS_STORE] if sys.platform == "win32" else list(_SYSTEM_STORES)


def _certificates(name: str, location: str) -> Iterator[bytes]:
    """Yield the DER of every certificate in a file, a folder or the Windows store; nothing where none can be read."""
    if (name, location) == _WINDOWS_STORE:
        yield from _windows_certificates()
        return
    path = Path(location)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:
        return
    for file in files:
        try:
            require_regular_file(file)
            yield from _pem_to_der(file.read_bytes())
        except (OSError, ValueError):
            continue


def require_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise `OSError` for what is no plain file: a pipe or a device could be read for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def _windows_certificates() -> Iterator[bytes]:
    if sys.platform == "win32":
        yield from (der for der, encoding, _ in ssl.enum_certificates("ROOT") if encoding == "x509_asn")
    yield from ()


def _pem_to_der(pem: bytes) -> list[bytes]:
    ders = []
    for block in _CERTIFICATE.findall(pem):
        try:
            ders.append(ssl.PEM_cert_to_DER_cert(block.decode("ascii")))
        except ValueError:  # broken base64, or not ASCII: nothing that anybody could trust
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


# RFC 4514, section 3, and what OpenSSL prints: short names for the attributes that CAs use.
_SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
}


def distinguished_name(name: object) -> str:
    """Return a name as `getpeercert()` and `get_ca_certs()` give it as text, most specific attribute first."""
    pairs = [pair for rdn in name for pair in rdn] if isinstance(name, tuple) else []
    return ", ".join(f"{_SHORT_NAMES.get(key, key)}={value}" for key, value in reversed(pairs))
