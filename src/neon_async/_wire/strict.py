"""Say why a root can never be accepted, whatever chain ends at it.

OpenSSL decides in the handshake, and this module tells beforehand. It must not know files or connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# OpenSSL's security level 2 (SSL_CTX_set_security_level): the smallest keys, in bits.
_SMALLEST_KEYS = {"rsa": 2048, "dsa": 2048, "ec": 224}


def fault_of_root(der: bytes) -> str:
    """Return why strict verification refuses every chain that ends at this root, or "".

    OpenSSL's check_extensions() and check_auth_level(), crypto/x509/x509_vfy.c; RFC 5280, section 4.2.
    """
    from asn1crypto.x509 import Certificate  # takes long to import, and is not needed for ISRG Root X1

    try:
        certificate = Certificate.load(der)
        return next((fault for is_faulty, fault in _FAULTS if is_faulty(certificate)), "")
    except Exception:  # noqa: BLE001  asn1crypto raises what it likes; then OpenSSL decides in the handshake
        return ""


def _is_critical(certificate: Any, name: str) -> bool:
    return name in certificate.critical_extensions


def _allows(certificate: Any) -> set[str]:
    return set(certificate.key_usage_value.native)


def _excludes_servers(certificate: Any) -> bool:
    usage = certificate.extended_key_usage_value
    return usage is not None and "server_auth" not in usage.native


def _has_small_key(certificate: Any) -> bool:
    key = certificate.public_key
    return bool(key.bit_size < _SMALLEST_KEYS.get(key.algorithm, 0))


# The first row that applies is reported.
_FAULTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda root: root["tbs_certificate"]["version"].native != "v3", "is not of X.509 version 3"),
    (
        lambda root: root.basic_constraints_value is None or not root.basic_constraints_value["ca"].native,
        "does not say that it is a CA (basicConstraints)",
    ),
    (lambda root: not _is_critical(root, "basic_constraints"), "does not mark its basicConstraints as critical"),
    (lambda root: root.key_usage_value is None, "has no keyUsage"),
    (lambda root: "key_cert_sign" not in _allows(root), "may not sign certificates (keyUsage)"),
    (lambda root: root.key_identifier_value is None, "has no subjectKeyIdentifier"),
    (lambda root: _is_critical(root, "key_identifier"), "marks its subjectKeyIdentifier as critical"),
    (lambda root: _is_critical(root, "authority_key_identifier"), "marks its authorityKeyIdentifier as critical"),
    (_excludes_servers, "is not meant for servers (extendedKeyUsage)"),
    (lambda root: any(name[0].isdigit() for name in root.critical_extensions), "has an unknown critical extension"),
    (lambda root: not root.subject.native, "has no subject"),
    (_has_small_key, "has a key that is too small"),
)
