"""One revocation list: what must be true of it, what its entries say, and what it costs."""

from __future__ import annotations

import datetime
import random
import tracemalloc
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from support.certificates import DAY, NOW, Entity, issue
from support.crls import crl, long_crl, point, scope

from neon_async import ISRG_ROOT_X1_SHA256
from neon_async._wire.revocation.lists import (
    ListRefusedError,
    RevocationList,
    Source,
    objection_to,
    read_certificate,
    read_list,
)

URL = "http://c.example.com/1.crl"
CA = issue(subject="CA", ca=True)
OTHER = issue(subject="other", ca=True)
LEAF, OTHER_LEAF = issue(CA), issue(CA)
SOURCE = Source(URL, CA.der, for_cas=False, must_name_url=False)
HERE = [(scope(URL, users=True), True)]
KEY_IDENTIFIER = x509.AuthorityKeyIdentifier.from_issuer_public_key(CA.key.public_key())
INVALID_SINCE = x509.InvalidityDate(NOW.replace(tzinfo=None))
SERIALS = [1, 127, 128, 255, 256, 2**64 - 1, 2**127, 2**128 - 1, 2**159 - 1]


def read(der: bytes, source: Source = SOURCE) -> Any:
    return read_list(der, source, datetime.datetime.now(datetime.UTC))


def number_of(entity: Entity) -> int:
    return entity.certificate.serial_number


# ---------------------------------------------------------------------------------------------------------------------
# Good lists


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="a shard"),
        pytest.param({"number": None}, id="without a number"),
        pytest.param({"also": []}, id="of everything that the issuer has issued"),
        pytest.param({"also": [(scope(users=True), True)]}, id="of all leaves"),
        pytest.param({"also": [*HERE, (KEY_IDENTIFIER, False)]}, id="with a key identifier"),
        pytest.param({"digest": hashes.SHA384()}, id="SHA-384"),
        pytest.param({"digest": hashes.SHA512()}, id="SHA-512"),
        pytest.param({"reason": None}, id="without reasons"),
        pytest.param({"reason": x509.ReasonFlags.certificate_hold}, id="on hold"),
        pytest.param({"entry": [(INVALID_SINCE, False)]}, id="with dates of invalidity"),
    ],
)
def test_a_good_list_contains_what_is_on_it_and_nothing_else(changes: dict[str, Any]) -> None:
    found = read(crl(CA, LEAF, *SERIALS, **{"also": HERE} | changes))
    assert found.entries == 1 + len(SERIALS)
    assert (found.this_update, found.next_update) == (NOW - DAY, NOW + 9 * DAY)
    assert found.number == changes.get("number", 1)
    assert all(serial in found for serial in (number_of(LEAF), *SERIALS))
    assert not any(serial in found for serial in (number_of(OTHER_LEAF), 2, 129, 2**64, 2**159 - 2))


def test_an_empty_list_is_good() -> None:
    found = read(crl(CA, also=HERE))
    assert found.entries == 0
    assert number_of(LEAF) not in found


@pytest.mark.parametrize("kind", ["rsa", "pss", "p384", "ed25519"])
def test_a_list_signed_with_a_key_of_any_kind_is_good_and_a_forged_one_is_not(kind: str) -> None:
    made: dict[str, Callable[[], Any]] = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "pss": lambda: rsa.generate_private_key(65537, 2048),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }
    key, forger = made[kind](), made[kind]()
    builder = x509.CertificateRevocationListBuilder(CA.certificate.subject, NOW - DAY, NOW + DAY)
    options: dict[str, Any] = {"rsa_padding": padding.PSS(padding.MGF1(hashes.SHA256()), 32)} if kind == "pss" else {}
    digest = None if kind == "ed25519" else hashes.SHA256()
    certificate = x509.CertificateBuilder(
        CA.certificate.subject, CA.certificate.subject, key.public_key(), 1, NOW - DAY, NOW + DAY
    ).sign(key, digest)
    source = SOURCE._replace(issuer=certificate.public_bytes(Encoding.DER))
    assert read(builder.sign(key, digest, **options).public_bytes(Encoding.DER), source).entries == 0
    with pytest.raises(ListRefusedError, match="forged signature"):
        read(builder.sign(forger, digest, **options).public_bytes(Encoding.DER), source)


# ---------------------------------------------------------------------------------------------------------------------
# Lists that must not be used


def tampered(der: bytes) -> bytes:
    """Return a list in which the serial number of a revoked certificate was changed."""
    serial = number_of(LEAF).to_bytes(20)
    return der.replace(serial[1:], bytes([serial[1] ^ 1]) + serial[2:])


DELTA = (x509.DeltaCRLIndicator(1), True)
UNKNOWN = (x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\x05\x00"), True)
ELSEWHERE = [(scope(URL + "2", users=True), True)]
SIGNS_NO_LISTS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
NO_CRL_SIGN = issue(subject="CA", ca=True, key=CA.key, also=[(SIGNS_NO_LISTS, True)])


@pytest.mark.parametrize(
    ("der", "reason"),
    [
        pytest.param(crl(CA, LEAF, also=HERE, next_update=NOW), "expired at", id="expired"),
        pytest.param(crl(CA, also=HERE, last_update=NOW + DAY), "is from the future", id="from the future"),
        pytest.param(crl(OTHER, also=HERE), "is of another issuer .CN=other", id="by the wrong issuer"),
        pytest.param(crl(OTHER, also=HERE, key=CA.key), "is of another issuer", id="the wrong issuer with our key"),
        pytest.param(crl(CA, also=HERE, key=OTHER.key), "forged signature", id="forged"),
        pytest.param(tampered(crl(CA, LEAF, also=HERE)), "forged signature", id="tampered with"),
        pytest.param(crl(CA, also=ELSEWHERE), r"is another shard .*1\.crl2", id="another shard"),
        pytest.param(crl(CA, also=[*HERE, DELTA]), "is a delta", id="delta"),
        pytest.param(crl(CA, also=[(scope(URL, cas=True), True)]), "does not cover", id="for CAs only"),
        pytest.param(crl(CA, also=[(scope(URL, attributes=True), True)]), "does not cover", id="for attributes only"),
        pytest.param(crl(CA, also=[(scope(URL, indirect=True), True)]), "does not cover", id="indirect"),
        pytest.param(
            crl(CA, also=[(scope(URL, reasons=frozenset([x509.ReasonFlags.key_compromise])), True)]),
            "does not cover",
            id="for some reasons only",
        ),
        pytest.param(crl(CA, also=[*HERE, UNKNOWN]), "critical extension 2.25.1", id="unknown critical extension"),
        pytest.param(crl(CA, LEAF, also=HERE, entry=[UNKNOWN]), "critical extension", id="critical in an entry"),
        pytest.param(
            crl(CA, LEAF, also=HERE, entry=[(x509.CertificateIssuer([x509.DNSName("x")]), False)]),
            "critical extension",
            id="an entry for another issuer",
        ),
        pytest.param(crl(CA, also=HERE)[:-1], "truncated", id="truncated by a byte"),
        pytest.param(crl(CA, LEAF, also=HERE)[:100], "truncated", id="truncated to 100 bytes"),
        pytest.param(crl(CA, also=HERE) + b"\0", "something follows", id="with something behind it"),
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(b"<html>not found</html>", "truncated|not a revocation list", id="HTML"),
        pytest.param(LEAF.der, "not a revocation list", id="a certificate"),
        pytest.param(b"-----BEGIN X509 CRL-----", "truncated|not a revocation list", id="PEM"),
        pytest.param(b"\x30\x00", "not a revocation list", id="an empty sequence"),
    ],
)
def test_a_list_that_must_not_be_used_is_refused_with_the_reason(der: bytes, reason: str) -> None:
    with pytest.raises(ListRefusedError, match=reason):
        read(der)


def test_the_reason_quotes_what_was_not_verified_only_escaped_and_in_part() -> None:
    name = f"{URL}\n{'x' * 1000}"
    with pytest.raises(ListRefusedError) as caught:
        read(crl(CA, also=[(scope(name), True)], key=OTHER.key))
    assert r"1.crl\nxxx" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_list_is_refused_for_what_the_certificates_are() -> None:
    with pytest.raises(ListRefusedError, match="may not sign lists"):
        read(crl(CA, also=HERE), SOURCE._replace(issuer=NO_CRL_SIGN.der))
    with pytest.raises(ListRefusedError, match="does not cover"):
        read(crl(CA, also=HERE), SOURCE._replace(for_cas=True))
    assert read(crl(CA, also=[(scope(cas=True), True)]), SOURCE._replace(for_cas=True)).entries == 0
    for also in ([], [(scope(users=True), True)]):
        with pytest.raises(ListRefusedError, match="does not say which shard"):
            read(crl(CA, also=also), SOURCE._replace(must_name_url=True))
    assert read(crl(CA, also=HERE), SOURCE._replace(must_name_url=True)).entries == 0


GOOD = crl(CA, LEAF, *SERIALS, also=HERE)


@given(st.data())
def test_no_change_of_any_byte_is_accepted_or_raises_another_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != GOOD[at]))
    with pytest.raises(ListRefusedError):
        read(GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])


@given(st.binary(max_size=200))
def test_garbage_raises_no_other_error(garbage: bytes) -> None:
    for der in (garbage, b"\x30" + bytes([min(len(garbage), 127)]) + garbage[:127]):
        with pytest.raises(ListRefusedError):
            read(der)


@given(st.sets(st.integers(1, 2**159 - 1), max_size=20), st.integers(1, 2**159 - 1))
def test_a_list_answers_as_a_set_does(serials: set[int], other: int) -> None:
    found = read(crl(CA, *serials, also=HERE))
    assert all(serial in found for serial in serials)
    assert (other in found) == (other in serials)


def test_a_digest_that_stands_across_two_entries_is_on_no_list() -> None:
    digest = blake2b(bytes([5]), digest_size=8).digest()
    parts = [b""] * 256
    parts[digest[0]] = bytes(3) + digest + bytes(5)
    across = RevocationList(1, NOW, NOW + DAY, parts)
    assert (across.entries, 5 in across) == (2, False)
    parts[digest[0]] += digest
    behind = RevocationList(1, NOW, NOW + DAY, parts)
    assert (behind.entries, 5 in behind) == (3, True)


def test_a_list_of_20000_entries_keeps_8_bytes_for_each() -> None:
    numbers = random.Random(1)
    serials = [numbers.getrandbits(140) | 1 << 140 for _ in range(20_000)]
    der = long_crl(CA, serials, also=HERE)
    tracemalloc.start()
    try:
        found = read(der)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.entries == 20_000
    assert kept < 250_000
    assert peak < 2_000_000
    assert all(serial in found for serial in serials[::1000])
    assert not any(serial + 1 in found for serial in serials[::1000])


# ---------------------------------------------------------------------------------------------------------------------
# Certificates and URLs


def test_a_certificate_names_its_lists_by_http_only() -> None:
    other = x509.DistributionPoint(
        [x509.UniformResourceIdentifier("http://partial.example.com")],
        None,
        frozenset([x509.ReasonFlags.key_compromise]),
        None,
    )
    by_http = point("ldap://c.example.com/1", "https://c.example.com/1.crl", URL, "HTTP://c.example.com/2.crl")
    named = read_certificate(issue(CA, also=[(x509.CRLDistributionPoints([*by_http, other]), False)]).der)
    assert named.urls == (URL, "HTTP://c.example.com/2.crl")
    assert (named.subject, named.is_ca, named.lifetime) == ("CN=leaf", False, 31 * DAY)
    assert read_certificate(CA.der).is_ca
    assert read_certificate(CA.der).urls == ()


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        pytest.param("http://ye1.c.lencr.org/119.crl", True, id="of an intermediate"),
        pytest.param("http://x1.c.lencr.org/", True, id="of a root"),
        pytest.param("http://c.lencr.org/1.crl", True, id="of the domain itself"),
        pytest.param("http://YE1.C.LENCR.ORG:80/1.crl", True, id="in upper case, with the port"),
        pytest.param("http://c.lencr.org.example.com/1.crl", False, id="of a longer domain"),
        pytest.param("http://notc.lencr.org/1.crl", False, id="of a sibling"),
        pytest.param("http://lencr.org/1.crl", False, id="of the parent"),
        pytest.param("http://ye1.c.lencr.org:8080/1.crl", False, id="another port"),
        pytest.param("http://ye1.c.lencr.org@example.com/1.crl", False, id="a user that looks like the host"),
        pytest.param("http://user@ye1.c.lencr.org/1.crl", False, id="a user"),
        pytest.param("http://127.0.0.1/1.crl", False, id="an address"),
        pytest.param("http://example.com%2f.c.lencr.org/1.crl", False, id="a host that ends with an escaped slash"),
        pytest.param("http://example.com%00.c.lencr.org/1.crl", False, id="an escaped NUL"),
        pytest.param("http://[::1%25.c.lencr.org]/1.crl", False, id="an address with a zone"),
        pytest.param("http://.c.lencr.org/1.crl", False, id="an empty label"),
        pytest.param("http://ye1.c.lencr.org:port/1.crl", False, id="no port"),
    ],
)
def test_below_a_root_of_lets_encrypt_only_its_own_lists_are_fetched(url: str, allowed: bool) -> None:
    assert bool(objection_to(url, ISRG_ROOT_X1_SHA256)) is not allowed
    assert "c.lencr.org" in objection_to("http://example.com/1.crl", ISRG_ROOT_X1_SHA256)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        pytest.param("http://127.0.0.1:8080/1.crl", True, id="an address and a port"),
        pytest.param("http://crl.internal/1.crl?x=1", True, id="a name"),
        pytest.param("http://[::1/1.crl", False, id="a broken address"),
        pytest.param("http:///1.crl", False, id="no host"),
        pytest.param("http://crl.internal/1 .crl", False, id="a space"),
        pytest.param("http://crl.internal/\r\nHost: x", False, id="a line break"),
        pytest.param("http://crl.internal/" + "x" * 2000, False, id="too long"),
    ],
)
def test_below_a_root_of_ones_own_any_url_is_fetched(url: str, allowed: bool) -> None:
    assert bool(objection_to(url, "00")) is not allowed
