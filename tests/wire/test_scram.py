"""SCRAM without I/O: binding data, the choice of the mechanism, the exchange, prepared passwords, and cached keys."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from scramp.core import ClientStage
from support.certificates import REFUSED
from support.logins import BOTH, PASSWORDS, PLAIN, PLUS, HonestServer
from support.signatures import rsa_key, signed

from neon_async._config.literals import SASLMechanism
from neon_async._errors import AuthenticationError, ChannelBindingError
from neon_async._wire import scram
from neon_async._wire.login import LoginCache
from neon_async._wire.scram import Exchange, KeyCache, Keys, binding_data, choose_mechanism, normalize

HOST = "db.example.com"
PASSWORD = "correct horse battery staple"
OTHER_PASSWORD = "Tr0ub4dor&3"


# ---------------------------------------------------------------------------------------------------------------------
# The binding


def der_of(case_id: str) -> bytes:
    """Return the leaf of a case of `REFUSED`; no library issues certificates with these signatures."""
    case = next(case for case in REFUSED if case.id == case_id)
    return x509.load_pem_x509_certificate(case.make().chain).public_bytes(Encoding.DER)


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("make", "digest"),
    [
        pytest.param(lambda: signed(rsa_key(), hashes.SHA256()).der, "sha256", id="rsa-sha256"),
        pytest.param(lambda: signed(rsa_key(), hashes.SHA384()).der, "sha384", id="rsa-sha384"),
        pytest.param(lambda: signed(rsa_key(), hashes.SHA512()).der, "sha512", id="rsa-sha512"),
        pytest.param(lambda: signed(p256(), hashes.SHA224()).der, "sha224", id="ecdsa-sha224"),
        pytest.param(lambda: signed(p256(), hashes.SHA256()).der, "sha256", id="ecdsa-sha256"),
        pytest.param(lambda: signed(p256(), hashes.SHA384()).der, "sha384", id="ecdsa-sha384"),
        pytest.param(lambda: signed(p256(), hashes.SHA512()).der, "sha512", id="ecdsa-sha512"),
        pytest.param(lambda: signed(rsa_key(), hashes.SHA256(), pss=True).der, "sha256", id="rsa-pss-sha256"),
        pytest.param(lambda: signed(rsa_key(), hashes.SHA384(), pss=True).der, "sha384", id="rsa-pss-sha384"),
        pytest.param(lambda: signed(rsa_key(), hashes.SHA512(), pss=True).der, "sha512", id="rsa-pss-sha512"),
        pytest.param(lambda: der_of("sha1-signature"), "sha256", id="sha1-counts-as-sha256"),
        pytest.param(lambda: der_of("md5-signature"), "sha256", id="md5-counts-as-sha256"),
    ],
)
def test_the_binding_uses_the_hash_of_the_certificates_signature(make: Callable[[], bytes], digest: str) -> None:
    der = make()
    assert binding_data(der) == hashlib.new(digest, der).digest()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: signed(ed25519.Ed25519PrivateKey.generate(), None).der, id="ed25519"),
        pytest.param(lambda: signed(ed448.Ed448PrivateKey.generate(), None).der, id="ed448"),
    ],
)
def test_a_signature_without_a_hash_has_no_binding(make: Callable[[], bytes]) -> None:
    assert binding_data(make()) is None


@pytest.mark.parametrize(
    "der", [b"", b"0", b"0\x00", b"0\x80", b"0\x030\x01\0", b"\xff" * 99, b"not DER at all"], ids=repr
)
def test_bytes_that_are_not_a_certificate_have_no_binding(der: bytes) -> None:
    assert binding_data(der) is None


GENUINE = [signed(rsa_key(), hashes.SHA384(), pss=True).der, signed(p256(), hashes.SHA256()).der]


@given(
    der=st.sampled_from(GENUINE),
    changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=5),
    end=st.none() | st.integers(0, 1500),
)
def test_a_damaged_certificate_has_a_binding_or_none(
    der: bytes, changes: list[tuple[int, int]], end: int | None
) -> None:
    damaged = bytearray(der)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    found = binding_data(bytes(damaged[:end]))
    assert found is None or len(found) in (16, 28, 32, 48, 64)


# ---------------------------------------------------------------------------------------------------------------------
# The mechanism


@pytest.mark.parametrize("required", [False, True], ids=["prefer", "require"])
@pytest.mark.parametrize(
    ("offered", "can_bind", "under_prefer", "under_require"),
    [
        pytest.param(BOTH, True, PLUS, PLUS, id="both"),
        pytest.param([PLAIN, PLUS], True, PLUS, PLUS, id="both-the-other-way-round"),
        pytest.param([PLUS], True, PLUS, PLUS, id="plus-alone"),
        pytest.param(["SCRAM-SHA-512-PLUS", PLUS, "OAUTHBEARER", ""], True, PLUS, PLUS, id="plus-among-others"),
        pytest.param([PLAIN], True, PLAIN, ChannelBindingError, id="plain-alone"),
        pytest.param([PLAIN], False, PLAIN, ChannelBindingError, id="plain-alone-and-no-hash"),
        pytest.param(BOTH, False, ChannelBindingError, ChannelBindingError, id="both-and-no-hash"),
        pytest.param([PLUS], False, ChannelBindingError, ChannelBindingError, id="plus-alone-and-no-hash"),
        pytest.param([], True, AuthenticationError, ChannelBindingError, id="nothing"),
        pytest.param([""], False, AuthenticationError, ChannelBindingError, id="nothing-and-no-hash"),
        pytest.param(["OAUTHBEARER"], True, AuthenticationError, ChannelBindingError, id="another-one"),
        pytest.param(["SCRAM-SHA-1", "SCRAM-SHA-1-PLUS"], True, AuthenticationError, ChannelBindingError, id="sha1"),
        pytest.param(["SCRAM-SHA-256X"], True, AuthenticationError, ChannelBindingError, id="longer"),
        pytest.param(["scram-sha-256-plus"], True, AuthenticationError, ChannelBindingError, id="small-letters"),
    ],
)
def test_the_strongest_mechanism_is_chosen_or_the_offer_is_refused(
    offered: list[str], can_bind: bool, required: bool, under_prefer: Any, under_require: Any
) -> None:
    expected = under_require if required else under_prefer
    if isinstance(expected, str):
        assert choose_mechanism(offered, can_bind=can_bind, required=required, host=HOST) == expected
        return
    with pytest.raises(AuthenticationError, match=HOST) as caught:
        choose_mechanism(offered, can_bind=can_bind, required=required, host=HOST)
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("mechanism", "binding", "header"),
    [
        pytest.param(PLUS, b"hash", b"p=tls-server-end-point,,", id="bound"),
        pytest.param(PLAIN, b"hash", b"y,,", id="can-bind-but-was-not-offered"),
        pytest.param(PLAIN, None, b"n,,", id="cannot-bind"),
    ],
)
def test_the_gs2_header_states_whether_we_can_bind(
    mechanism: SASLMechanism, binding: bytes | None, header: bytes
) -> None:
    first = Exchange(mechanism, binding=binding, host=HOST).first()
    assert first.startswith(header + b"n=*,r=")
    nonce = first.rpartition(b"r=")[2]
    assert len(nonce) >= 24  # RFC 5802 leaves the length open; libpq takes 18 random bytes
    assert Exchange(mechanism, binding=binding, host=HOST).first() != first


# ---------------------------------------------------------------------------------------------------------------------
# The exchange


def secret() -> str:
    return PASSWORD


def started(mechanism: SASLMechanism = PLAIN, binding: bytes | None = None) -> tuple[Exchange, str]:
    """Return an exchange after its first message, and its nonce."""
    exchange = Exchange(mechanism, binding=binding, host=HOST)
    return exchange, exchange.first().rpartition(b"r=")[2].decode()


SALT = base64.b64encode(HonestServer.salt).decode()


def challenged() -> tuple[Exchange, HonestServer]:
    """Return an exchange that waits for the server's final message, and the server that knows it."""
    exchange = Exchange(PLAIN, binding=None, host=HOST)
    server = HonestServer(PASSWORD)
    first = exchange.first()
    salt, iterations = exchange.challenge(body_of(server.challenge(initial_response(PLAIN, first)))[4:])
    server.final(exchange.final(Keys(secret, salt, iterations)))
    return exchange, server


def initial_response(mechanism: SASLMechanism, first: bytes) -> bytes:
    return mechanism.encode() + struct.pack("!xi", len(first)) + first


def body_of(data: bytes) -> bytes:
    return data[5:]


def test_the_example_of_rfc_7677_is_reproduced() -> None:
    exchange = Exchange(PLAIN, binding=None, host=HOST)
    exchange._client = scram._Client([PLAIN], "user", "", c_nonce="rOprNGfwEbeRWgbNEkqO")
    assert exchange.first() == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    nonce = b"rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    salt, iterations = exchange.challenge(b"r=" + nonce + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096")
    keys = Keys(lambda: "pencil", salt, iterations)
    assert exchange.final(keys) == b"c=biws,r=" + nonce + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    exchange.finish(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")


@pytest.mark.parametrize(
    ("mechanism", "binding", "servers_binding"),
    [
        pytest.param(PLAIN, None, None, id="plain"),
        pytest.param(PLAIN, b"our hash", None, id="plain-although-the-client-can-bind"),
        pytest.param(PLUS, b"our hash", b"our hash", id="plus"),
    ],
)
def test_an_honest_server_is_accepted(
    mechanism: SASLMechanism, binding: bytes | None, servers_binding: bytes | None
) -> None:
    exchange = Exchange(mechanism, binding=binding, host=HOST)
    server = HonestServer(PASSWORD, binding=servers_binding)
    challenge = body_of(server.challenge(initial_response(mechanism, exchange.first())))[4:]
    final = exchange.final(Keys(secret, *exchange.challenge(challenge)))
    exchange.finish(body_of(server.final(final))[4:])


@pytest.mark.parametrize("iterations", [4096, 4097, 600_000, 1_000_000])
def test_an_iteration_count_within_the_limits_is_accepted(iterations: int) -> None:
    exchange, nonce = started()
    assert exchange.challenge(f"r={nonce}+,s={SALT},i={iterations}".encode()) == (HonestServer.salt, iterations)


@pytest.mark.parametrize(
    "challenge",
    [
        pytest.param("r={nonce}+,s={salt},i=4095", id="4095 iterations"),
        pytest.param("r={nonce}+,s={salt},i=1000001", id="1000001 iterations"),
        pytest.param("r={nonce}+,s={salt},i=8000000", id="8000000 iterations"),
        pytest.param("r={nonce}+,s={salt},i=10000001", id="10000001 iterations"),
        pytest.param("r={nonce}+,s={salt},i=" + "9" * 5000, id="a number of 5000 digits"),
        pytest.param("r={nonce}+,s={salt},i=1", id="one iteration"),
        pytest.param("r={nonce}+,s={salt},i=0", id="no iteration"),
        pytest.param("r={nonce}+,s={salt},i=-4096", id="fewer than none"),
        pytest.param("r={nonce}+,s={salt},i=+4096", id="a sign"),
        pytest.param("r={nonce}+,s={salt},i= 4096", id="a space"),
        pytest.param("r={nonce}+,s={salt},i=4_096", id="an underscore"),
        pytest.param("r={nonce}+,s={salt},i=4096.0", id="a fraction"),
        pytest.param("r={nonce}+,s={salt},i=0x1000", id="hexadecimal"),
        pytest.param("r={nonce}+,s={salt},i=04096", id="a leading zero"),
        pytest.param("r={nonce}+,s={salt},i=", id="an empty count"),
        pytest.param("r={nonce},s={salt},i=4096", id="a nonce that equals ours"),
        pytest.param("r={short},s={salt},i=4096", id="a nonce that is shorter than ours"),
        pytest.param("r=x{nonce},s={salt},i=4096", id="a nonce that ends with ours"),
        pytest.param("r=another nonce,s={salt},i=4096", id="another nonce"),
        pytest.param("r={upper}+,s={salt},i=4096", id="a nonce in other letters"),
        pytest.param("r={nonce}\x01,s={salt},i=4096", id="a nonce with a control character"),
        pytest.param("r=,s={salt},i=4096", id="an empty nonce"),
        pytest.param("m=ext,r={nonce}+,s={salt},i=4096", id="an extension before"),
        pytest.param("r={nonce}+,s={salt},i=4096,m=ext", id="an extension after"),
        pytest.param("r={nonce}+,m=ext,s={salt},i=4096", id="an extension between"),
        pytest.param("r={nonce}+,s={salt}", id="no iteration count"),
        pytest.param("r={nonce}+,i=4096", id="no salt"),
        pytest.param("s={salt},i=4096", id="no nonce"),
        pytest.param("s={salt},r={nonce}+,i=4096", id="another order"),
        pytest.param("r={nonce}+,r={nonce}+,s={salt},i=4096", id="two nonces"),
        pytest.param("r={nonce}+,s={salt},i=4096,i=4096", id="two iteration counts"),
        pytest.param("r={nonce}+,s=,i=4096", id="an empty salt"),
        pytest.param("r={nonce}+,s=*,i=4096", id="a salt that is not base64"),
        pytest.param("e=other-error", id="an error"),
        pytest.param("e=call 555-0199", id="an unknown error"),
        pytest.param("v={salt}", id="the final message"),
        pytest.param("", id="nothing"),
        pytest.param(",,,,", id="commas"),
        pytest.param("r={nonce}+,s={salt},i=4096,", id="a comma at the end"),
        pytest.param("r={nonce}+,s={salt},i=4096\0", id="NUL at the end"),
        pytest.param("r={nonce}\u00e9,s={salt},i=4096", id="not ASCII"),
        pytest.param("r={nonce}+,s={salt},i=\u0664\u0660\u0669\u0666", id="digits of another script"),
    ],
)
def test_a_challenge_with_a_fault_is_refused(challenge: str) -> None:
    exchange, nonce = started()
    text = challenge.format(nonce=nonce, short=nonce[:-1], upper=nonce.upper(), salt=SALT)
    with pytest.raises(AuthenticationError, match=HOST) as caught:
        exchange.challenge(text.encode())
    assert type(caught.value) is AuthenticationError
    assert "555-0199" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_challenge_that_is_not_ascii_is_refused() -> None:
    exchange, _ = started()
    with pytest.raises(AuthenticationError, match="not ASCII"):
        exchange.challenge(bytes(range(128, 256)))


def right(signature: bytes) -> bytes:
    return b"v=" + base64.b64encode(signature)


@pytest.mark.parametrize(
    "final",
    [
        pytest.param(lambda right: b"", id="nothing"),
        pytest.param(lambda right: b"v=", id="an empty signature"),
        pytest.param(lambda right: right[:-4], id="a signature cut short"),
        pytest.param(lambda right: right + b"AAAA", id="a signature with more after it"),
        pytest.param(lambda right: b"v=" + base64.b64encode(bytes(32)), id="another signature"),
        pytest.param(lambda right: right[:2] + right[2:].swapcase(), id="a signature in other letters"),
        pytest.param(lambda right: right + b"," + right, id="two signatures"),
        pytest.param(lambda right: right.upper(), id="another attribute"),
        pytest.param(lambda right: right + b"\n", id="a line break"),
        pytest.param(lambda right: b"v=!", id="no base64"),
        pytest.param(lambda right: b"e=invalid-proof", id="an error"),
        pytest.param(lambda right: b"e=invalid-proof," + right, id="an error and a signature"),
        pytest.param(lambda right: right + b",e=invalid-proof", id="a signature and an error"),
        pytest.param(lambda right: b"e=555-0199", id="an unknown error"),
        pytest.param(lambda right: b"m=ext," + right, id="an extension"),
        pytest.param(lambda right: bytes(range(128, 256)), id="not ASCII"),
    ],
)
def test_a_final_message_without_the_servers_signature_is_refused(final: Callable[[bytes], bytes]) -> None:
    exchange, server = challenged()
    assert server.server_signature is not None
    with pytest.raises(AuthenticationError, match=HOST) as caught:
        exchange.finish(final(right(server.server_signature)))
    assert "555-0199" not in str(caught.value)


def test_after_a_wrong_final_message_the_right_one_is_refused_too() -> None:
    exchange, server = challenged()
    assert server.server_signature is not None
    for signature in (bytes(32), server.server_signature):
        with pytest.raises(AuthenticationError, match=HOST):
            exchange.finish(right(signature))


@pytest.mark.parametrize(
    ("password", "accepted"),
    [pytest.param(PASSWORD, True, id="ours"), pytest.param(OTHER_PASSWORD, False, id="another")],
)
def test_a_server_is_accepted_only_when_it_knows_the_password(password: str, accepted: bool) -> None:
    exchange = Exchange(PLAIN, binding=None, host=HOST)
    first = exchange.first()
    challenge = body_of(HonestServer(password).challenge(initial_response(PLAIN, first)))[4:]
    final = exchange.final(Keys(secret, *exchange.challenge(challenge)))
    signed_text = b",".join([first.removeprefix(b"n,,"), challenge, final.rpartition(b",p=")[0]])
    verdict = right(hmac.digest(keys_of(password).server_key, signed_text, "sha256"))
    if accepted:
        exchange.finish(verdict)
    else:
        with pytest.raises(AuthenticationError, match="signature"):
            exchange.finish(verdict)


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda exchange, nonce: exchange.finish(b"v=" + SALT.encode()), id="final-before-challenge"),
        pytest.param(
            lambda exchange, nonce: [exchange.challenge(f"r={nonce}+,s={SALT},i=4096".encode()) for _ in range(2)],
            id="two-challenges",
        ),
        pytest.param(
            lambda exchange, nonce: [
                exchange.challenge(f"r={nonce}+,s={SALT},i=4096".encode()),
                exchange.finish(b"v=" + SALT.encode()),
            ],
            id="final-before-proof",
        ),
    ],
)
def test_messages_of_the_server_out_of_order_are_refused(take: Callable[[Exchange, str], object]) -> None:
    exchange, nonce = started()
    with pytest.raises(AuthenticationError, match=HOST):
        take(exchange, nonce)


def test_a_second_final_message_is_refused() -> None:
    exchange, server = challenged()
    assert server.server_signature is not None
    exchange.finish(right(server.server_signature))
    with pytest.raises(AuthenticationError, match=HOST):
        exchange.finish(right(server.server_signature))


FRAGMENTS = st.sampled_from(
    ["r=", "s=", "i=", "m=", "e=", "v=", ",", "=", "{nonce}", "{nonce}x", SALT, "4096", "1000000", "other-error", "\0"]
)


@given(parts=st.lists(FRAGMENTS | st.text(max_size=8), max_size=12), noise=st.binary(max_size=8))
def test_any_challenge_is_accepted_within_the_limits_or_refused(parts: list[str], noise: bytes) -> None:
    exchange, nonce = started()
    data = "".join(parts).replace("{nonce}", nonce).encode("utf-8", "surrogatepass") + noise
    try:
        salt, iterations = exchange.challenge(data)
    except AuthenticationError:
        return
    assert salt
    assert 4096 <= iterations <= 1_000_000
    assert data.startswith(b"r=" + nonce.encode())


@given(
    data=st.binary(max_size=60)
    | st.text("vem=,ABCabc+/", max_size=60).map(str.encode)
    | st.binary(min_size=30, max_size=34).map(right)
)
def test_any_final_message_but_the_right_one_is_refused(data: bytes) -> None:
    exchange, _ = started()
    exchange._client.server_signature = bytes(32)
    exchange._client.stage = ClientStage.get_client_final
    try:
        exchange.finish(data)
    except AuthenticationError:
        return
    assert base64.b64decode(data.partition(b",")[0][2:]) == bytes(32)


# ---------------------------------------------------------------------------------------------------------------------
# Passwords


@pytest.mark.parametrize(("password", "expected"), PASSWORDS)
def test_a_password_is_prepared_as_in_postgresql(password: str, expected: bytes) -> None:
    assert normalize(password) == expected


def test_a_password_that_is_not_utf_8_stays_raw() -> None:
    assert normalize(os.fsdecode(b"caf\xe9")) == b"caf\xe9"


def test_a_surrogate_from_elsewhere_becomes_bytes_that_no_server_accepts() -> None:
    assert normalize("hunter2\ud800") == b"hunter2\xed\xa0\x80"


@given(st.text(st.characters()))
def test_every_text_is_prepared_without_an_exception(text: str) -> None:
    prepared = normalize(text)
    assert bool(prepared) == bool(text)


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def keys_of(password: str) -> Keys:
    return Keys(lambda: password, HonestServer.salt, 4096)


def test_keys_are_cached_by_password_salt_and_iteration_count() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, HonestServer.salt, 4096, keys)
    assert cache.get(secret, HonestServer.salt, 4096) is keys
    assert cache.get(lambda: OTHER_PASSWORD, HonestServer.salt, 4096) is None
    assert cache.get(secret, HonestServer.salt[1:], 4096) is None
    assert cache.get(secret, HonestServer.salt, 4097) is None


def test_the_cache_is_bounded_and_evicts_the_oldest_keys() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    for count in range(4096, 4196):
        cache.put(secret, HonestServer.salt, count, keys)
    found = [count for count in range(4096, 4196) if cache.get(secret, HonestServer.salt, count)]
    assert len(found) <= 16
    assert found == list(range(4196 - len(found), 4196))


def test_keys_that_are_in_use_stay_in_the_cache() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, HonestServer.salt, 4096, keys)
    for count in range(4097, 4197):
        cache.put(secret, HonestServer.salt, count, keys)
        assert cache.get(secret, HonestServer.salt, 4096) is keys


def test_the_keys_of_a_rejected_password_are_evicted_under_every_salt() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, HonestServer.salt, 4096, keys)
    cache.put(secret, HonestServer.salt[1:], 4096, keys)
    cache.put(lambda: OTHER_PASSWORD, HonestServer.salt, 4096, keys)
    cache.evict(secret)
    assert cache.get(secret, HonestServer.salt, 4096) is cache.get(secret, HonestServer.salt[1:], 4096) is None
    assert cache.get(lambda: OTHER_PASSWORD, HonestServer.salt, 4096) is keys
    cache.evict(secret)  # a second time is harmless


def test_no_repr_shows_a_secret() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, HonestServer.salt, 4096, keys)
    exchange, _ = challenged()
    shown = repr([cache, keys, exchange, LoginCache()])
    for hidden in (PASSWORD, repr(keys.client_key), repr(keys.server_key), repr(HonestServer.salt)):
        assert hidden not in shown
    assert (repr(cache), repr(keys), repr(exchange)) == ("<KeyCache of 1>", "<Keys>", f"<Exchange {PLAIN}>")
