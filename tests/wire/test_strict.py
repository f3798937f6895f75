"""A root that no chain can be verified with is refused beforehand, with the reason; OpenSSL agrees on each."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st
from support.certificates import Entity, issue, present
from support.handshakes import handshake

import neon_async
from neon_async._wire.strict import fault_of_root
from neon_async._wire.tls import build_context
from neon_async._wire.trust import TrustAnchor, find_isrg_root_x1, load_trust_anchor
from neon_async.testing._impostor import server_context

BASIC, USAGE, EKU = x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage
SKI, AKI = x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier
CLIENTS, SERVERS = EKU([ExtendedKeyUsageOID.CLIENT_AUTH]), EKU([ExtendedKeyUsageOID.SERVER_AUTH])
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\x05\x00")


def made(*also: tuple[x509.ExtensionType, bool], **changes: object) -> Callable[[], Entity]:
    return lambda: issue(subject="own root", ca=True, also=also, **changes)  # type: ignore[arg-type]


def with_key_identifier_critical() -> Entity:
    key = ec.generate_private_key(ec.SECP256R1())
    return issue(subject="own root", ca=True, key=key, also=[(SKI.from_public_key(key.public_key()), True)])


FAULTY = [
    pytest.param(made((BASIC(True, None), False)), "does not mark its basicConstraints", id="basicConstraints"),
    pytest.param(made(without=[USAGE]), "has no keyUsage", id="no keyUsage"),
    pytest.param(made(without=[SKI]), "has no subjectKeyIdentifier", id="no key identifier"),
    pytest.param(with_key_identifier_critical, "marks its subjectKeyIdentifier", id="a critical key identifier"),
    pytest.param(made((CLIENTS, False)), "is not meant for servers", id="for clients only"),
    pytest.param(made((UNKNOWN, True)), "unknown critical extension", id="an unknown critical extension"),
    pytest.param(
        made(key=rsa.generate_private_key(public_exponent=65537, key_size=1024)), "too small", id="RSA of 1024 bits"
    ),
    pytest.param(made(key=ec.generate_private_key(ec.SECP192R1())), "too small", id="a curve of 192 bits"),
]
GOOD = [
    pytest.param(made(), id="the usual one"),
    pytest.param(made(key=rsa.generate_private_key(public_exponent=65537, key_size=2048)), id="RSA of 2048 bits"),
    pytest.param(made(key=ec.generate_private_key(ec.SECP384R1())), id="P-384"),
    pytest.param(made((SERVERS, False)), id="for servers"),
    pytest.param(made((UNKNOWN, False)), id="an unknown extension"),
    pytest.param(made(path_length=0), id="a path length"),
    pytest.param(made(without=[AKI]), id="no authority key identifier"),
]


def verdict(root: Entity) -> str:
    """Return why OpenSSL refuses a good leaf that the root has issued, or ""."""
    anchor = TrustAnchor("own root", "a test", hashlib.sha256(root.der).hexdigest(), root.der)
    try:
        handshake(build_context(anchor), server_context(present(issue(root)).chain))
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return ""


@pytest.mark.parametrize(("make", "fault"), FAULTY)
def test_a_root_that_strict_verification_can_never_accept_is_refused_with_the_reason(
    make: Callable[[], Entity], fault: str
) -> None:
    root = make()
    assert verdict(root)  # so the refusal is right
    assert fault in fault_of_root(root.der)
    with pytest.raises(neon_async.ConfigurationError) as caught:
        neon_async.create_pool("postgresql://alex:x@db.example.com/d", trust_anchor=root.pem)
    assert str(caught.value).startswith(f"trust_anchor contains the root CN=own root, which {fault_of_root(root.der)}.")


@pytest.mark.parametrize("make", GOOD)
def test_any_other_root_is_accepted(make: Callable[[], Entity]) -> None:
    root = make()
    assert verdict(root) == ""
    assert fault_of_root(root.der) == ""
    assert load_trust_anchor(root.pem).der == root.der


def test_one_faulty_root_among_several_is_named() -> None:
    good, faulty = made()(), issue(subject="old root", ca=True, without=[USAGE])
    with pytest.raises(neon_async.ConfigurationError, match="the root CN=old root, which has no keyUsage"):
        load_trust_anchor(good.pem + faulty.pem)


def test_the_roots_of_lets_encrypt_are_accepted() -> None:
    for root in (find_isrg_root_x1(), *load_trust_anchor(neon_async.LETS_ENCRYPT_ROOTS).roots):
        assert fault_of_root(root.der) == ""


def test_a_root_in_another_format_gets_an_answer() -> None:
    with pytest.raises(neon_async.ConfigurationError, match="openssl x509 -inform der"):
        load_trust_anchor(made()().der)
    with pytest.raises(neon_async.ConfigurationError, match="no certificate but a key;"):
        load_trust_anchor(made()().key_pem)


@given(st.binary(max_size=300) | st.binary(max_size=40).map(lambda end: find_isrg_root_x1().der[:-40] + end))
def test_any_bytes_are_judged_without_an_exception(der: bytes) -> None:
    assert isinstance(fault_of_root(der), str)
