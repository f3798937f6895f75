"""The login, message by message: the exchange without I/O, the order of messages, and servers that break either."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from scramp.core import ClientStage, ScramException
from support.certificates import REFUSED
from support.probes import HANG, assert_secret_free, until
from support.relays import (
    OK,
    PLAIN,
    PLUS,
    READY,
    WELCOME,
    Honest,
    client_messages,
    honest,
    rsa_key,
    sasl,
    signed,
    verifier,
)

import neon_async
from neon_async._driver import connector as _connect
from neon_async._errors import (
    AuthenticationError,
    ChannelBindingError,
    ComputeUnavailableError,
    ConnectError,
    DatabaseNotFoundError,
    EndpointDisabledError,
    EndpointNotFoundError,
    InvalidPasswordError,
    IPNotAllowedError,
    NeonAsyncError,
    ProtocolError,
    QuotaExceededError,
    TooManyConnectionsError,
)
from neon_async._wire import scram as _scram
from neon_async._wire.login import Logins, Mailbox, ServerAsksOtherwiseError, log_in
from neon_async._wire.scram import Exchange, KeyCache, Keys, binding_data, choose_mechanism, normalize
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import (
    Conversation,
    Impostor,
    Script,
    authentication_request,
    error_response,
    login,
    message,
    play,
    server_context,
)

HOST = "db.example.com"
PASSWORD = "correct horse battery staple"
OTHER_PASSWORD = "Tr0ub4dor&3"


# ---------------------------------------------------------------------------------------------------------------------
# The binding


def der_of(case_id: str) -> bytes:
    """Return a leaf that only a hand-made signature gives: of a case of `REFUSED`."""
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
def test_the_binding_is_the_hash_that_the_signature_of_the_certificate_uses(
    make: Callable[[], bytes], digest: str
) -> None:
    der = make()
    assert binding_data(der) == hashlib.new(digest, der).digest()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: signed(ed25519.Ed25519PrivateKey.generate(), None).der, id="ed25519"),
        pytest.param(lambda: signed(ed448.Ed448PrivateKey.generate(), None).der, id="ed448"),
    ],
)
def test_a_signature_without_a_hash_gives_no_binding(make: Callable[[], bytes]) -> None:
    assert binding_data(make()) is None


@pytest.mark.parametrize(
    "der", [b"", b"0", b"0\x00", b"0\x80", b"0\x030\x01\0", b"\xff" * 99, b"not DER at all"], ids=repr
)
def test_what_is_no_certificate_gives_no_binding(der: bytes) -> None:
    assert binding_data(der) is None


GENUINE = [signed(rsa_key(), hashes.SHA384(), pss=True).der, signed(p256(), hashes.SHA256()).der]


@given(
    der=st.sampled_from(GENUINE),
    changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=5),
    end=st.none() | st.integers(0, 1500),
)
def test_a_damaged_certificate_gives_a_binding_or_none(
    der: bytes, changes: list[tuple[int, int]], end: int | None
) -> None:
    damaged = bytearray(der)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    found = binding_data(bytes(damaged[:end]))
    assert found is None or len(found) in (16, 28, 32, 48, 64)


# ---------------------------------------------------------------------------------------------------------------------
# The mechanism

BOTH = [PLUS, PLAIN]


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
def test_the_strongest_mechanism_is_used_or_none(
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
        pytest.param(PLAIN, b"hash", b"y,,", id="could-bind-and-was-not-offered"),
        pytest.param(PLAIN, None, b"n,,", id="cannot-bind"),
    ],
)
def test_the_gs2_header_tells_the_server_what_we_could(mechanism: str, binding: bytes | None, header: bytes) -> None:
    first = Exchange(mechanism, binding=binding, host=HOST).first()
    assert first.startswith(header + b"n=*,r=")
    nonce = first.rpartition(b"r=")[2]
    assert len(nonce) >= 24  # RFC 5802 leaves the length open; libpq takes 18 random bytes
    assert Exchange(mechanism, binding=binding, host=HOST).first() != first


# ---------------------------------------------------------------------------------------------------------------------
# The exchange


def secret() -> str:
    return PASSWORD


def started(mechanism: str = PLAIN, binding: bytes | None = None) -> tuple[Exchange, str]:
    """Return an exchange whose first message is out, and its nonce."""
    exchange = Exchange(mechanism, binding=binding, host=HOST)
    return exchange, exchange.first().rpartition(b"r=")[2].decode()


SALT = base64.b64encode(Honest.salt).decode()


def challenged() -> tuple[Exchange, Honest]:
    """Return an exchange that awaits the server's verdict, and the server that can give it."""
    exchange = Exchange(PLAIN, binding=None, host=HOST)
    server = Honest(PASSWORD)
    first = exchange.first()
    salt, iterations = exchange.challenge(body_of(server.challenge(initial_response(PLAIN, first)))[4:])
    server.verdict(exchange.final(Keys(secret, salt, iterations)))
    return exchange, server


def initial_response(mechanism: str, first: bytes) -> bytes:
    return mechanism.encode() + struct.pack("!xi", len(first)) + first


def body_of(data: bytes) -> bytes:
    return data[5:]


def test_the_exchange_of_rfc_7677_comes_out_as_printed_there() -> None:
    exchange = Exchange(PLAIN, binding=None, host=HOST)
    exchange._client = _scram._Client([PLAIN], "user", "", c_nonce="rOprNGfwEbeRWgbNEkqO")
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
        pytest.param(PLAIN, b"our hash", None, id="plain-though-we-could-bind"),
        pytest.param(PLUS, b"our hash", b"our hash", id="plus"),
    ],
)
def test_an_honest_server_is_believed(mechanism: str, binding: bytes | None, servers_binding: bytes | None) -> None:
    exchange = Exchange(mechanism, binding=binding, host=HOST)
    server = Honest(PASSWORD, binding=servers_binding)
    challenge = body_of(server.challenge(initial_response(mechanism, exchange.first())))[4:]
    final = exchange.final(Keys(secret, *exchange.challenge(challenge)))
    exchange.finish(body_of(server.verdict(final))[4:])


@pytest.mark.parametrize("iterations", [4096, 4097, 600_000, 1_000_000])
def test_an_iteration_count_within_the_bounds_is_taken(iterations: int) -> None:
    exchange, nonce = started()
    assert exchange.challenge(f"r={nonce}+,s={SALT},i={iterations}".encode()) == (Honest.salt, iterations)


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
        pytest.param("r=somebody elses,s={salt},i=4096", id="a nonce of somebody else"),
        pytest.param("r={upper}+,s={salt},i=4096", id="a nonce in other letters"),
        pytest.param("r={nonce}\x01,s={salt},i=4096", id="a nonce with a control character"),
        pytest.param("r=,s={salt},i=4096", id="an empty nonce"),
        pytest.param("m=ext,r={nonce}+,s={salt},i=4096", id="an extension in front"),
        pytest.param("r={nonce}+,s={salt},i=4096,m=ext", id="an extension behind"),
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
        pytest.param("e=call 555-0199", id="an error that is none"),
        pytest.param("v={salt}", id="the verdict"),
        pytest.param("", id="nothing"),
        pytest.param(",,,,", id="commas"),
        pytest.param("r={nonce}+,s={salt},i=4096,", id="a comma at the end"),
        pytest.param("r={nonce}+,s={salt},i=4096\0", id="NUL at the end"),
        pytest.param("r={nonce}\u00e9,s={salt},i=4096", id="not ASCII"),
        pytest.param("r={nonce}+,s={salt},i=\u0664\u0660\u0669\u0666", id="digits of another script"),
    ],
)
def test_a_challenge_with_anything_wrong_in_it_is_refused(challenge: str) -> None:
    exchange, nonce = started()
    text = challenge.format(nonce=nonce, short=nonce[:-1], upper=nonce.upper(), salt=SALT)
    with pytest.raises(AuthenticationError, match=HOST) as caught:
        exchange.challenge(text.encode())
    assert type(caught.value) is AuthenticationError
    assert "555-0199" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_bytes_that_are_no_text_are_refused_as_a_challenge() -> None:
    exchange, _ = started()
    with pytest.raises(AuthenticationError, match="not ASCII"):
        exchange.challenge(bytes(range(128, 256)))


def right(signature: bytes) -> bytes:
    return b"v=" + base64.b64encode(signature)


@pytest.mark.parametrize(
    "verdict",
    [
        pytest.param(lambda right: b"", id="nothing"),
        pytest.param(lambda right: b"v=", id="an empty signature"),
        pytest.param(lambda right: right[:-4], id="a signature cut short"),
        pytest.param(lambda right: right + b"AAAA", id="a signature with more behind"),
        pytest.param(lambda right: b"v=" + base64.b64encode(bytes(32)), id="another signature"),
        pytest.param(lambda right: right[:2] + right[2:].swapcase(), id="a signature in other letters"),
        pytest.param(lambda right: right + b"," + right, id="two signatures"),
        pytest.param(lambda right: right.upper(), id="another attribute"),
        pytest.param(lambda right: right + b"\n", id="a line break"),
        pytest.param(lambda right: b"v=!", id="no base64"),
        pytest.param(lambda right: b"e=invalid-proof", id="an error"),
        pytest.param(lambda right: b"e=invalid-proof," + right, id="an error and a signature"),
        pytest.param(lambda right: right + b",e=invalid-proof", id="a signature and an error"),
        pytest.param(lambda right: b"e=555-0199", id="an error that is none"),
        pytest.param(lambda right: b"m=ext," + right, id="an extension"),
        pytest.param(lambda right: bytes(range(128, 256)), id="not ASCII"),
    ],
)
def test_a_verdict_without_the_servers_signature_is_refused(verdict: Callable[[bytes], bytes]) -> None:
    exchange, server = challenged()
    assert server.server_signature is not None
    with pytest.raises(AuthenticationError, match=HOST) as caught:
        exchange.finish(verdict(right(server.server_signature)))
    assert "555-0199" not in str(caught.value)


def test_a_wrong_verdict_leaves_no_second_chance() -> None:
    exchange, server = challenged()
    assert server.server_signature is not None
    for signature in (bytes(32), server.server_signature):
        with pytest.raises(AuthenticationError, match=HOST):
            exchange.finish(right(signature))


@pytest.mark.parametrize(
    ("password", "believed"),
    [pytest.param(PASSWORD, True, id="ours"), pytest.param(OTHER_PASSWORD, False, id="another")],
)
def test_a_server_is_believed_only_when_it_knows_our_password(password: str, believed: bool) -> None:
    exchange = Exchange(PLAIN, binding=None, host=HOST)
    first = exchange.first()
    challenge = body_of(Honest(password).challenge(initial_response(PLAIN, first)))[4:]
    final = exchange.final(Keys(secret, *exchange.challenge(challenge)))
    signed_text = b",".join([first.removeprefix(b"n,,"), challenge, final.rpartition(b",p=")[0]])
    verdict = right(hmac.digest(keys_of(password).server_key, signed_text, "sha256"))
    if believed:
        exchange.finish(verdict)
    else:
        with pytest.raises(AuthenticationError, match="signature"):
            exchange.finish(verdict)


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda exchange, nonce: exchange.finish(b"v=" + SALT.encode()), id="verdict-before-challenge"),
        pytest.param(
            lambda exchange, nonce: [exchange.challenge(f"r={nonce}+,s={SALT},i=4096".encode()) for _ in range(2)],
            id="two-challenges",
        ),
        pytest.param(
            lambda exchange, nonce: [
                exchange.challenge(f"r={nonce}+,s={SALT},i=4096".encode()),
                exchange.finish(b"v=" + SALT.encode()),
            ],
            id="verdict-before-proof",
        ),
    ],
)
def test_messages_of_the_server_out_of_order_are_refused(take: Callable[[Exchange, str], object]) -> None:
    exchange, nonce = started()
    with pytest.raises(AuthenticationError, match=HOST):
        take(exchange, nonce)


def test_a_second_verdict_is_refused() -> None:
    exchange, server = challenged()
    assert server.server_signature is not None
    exchange.finish(right(server.server_signature))
    with pytest.raises(AuthenticationError, match=HOST):
        exchange.finish(right(server.server_signature))


FRAGMENTS = st.sampled_from(
    ["r=", "s=", "i=", "m=", "e=", "v=", ",", "=", "{nonce}", "{nonce}x", SALT, "4096", "1000000", "other-error", "\0"]
)


@given(parts=st.lists(FRAGMENTS | st.text(max_size=8), max_size=12), noise=st.binary(max_size=8))
def test_any_challenge_is_taken_within_the_bounds_or_refused(parts: list[str], noise: bytes) -> None:
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
def test_any_verdict_but_the_right_one_is_refused(data: bytes) -> None:
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

PASSWORDS = [
    pytest.param("plain", b"plain", id="ascii"),
    pytest.param(" \t\x01\x1f\x7f ", b" \t\x01\x1f\x7f ", id="ascii-control-characters-stay"),
    pytest.param("'\"\\,=%$", b"'\"\\,=%$", id="punctuation"),
    pytest.param("\u00aa", b"a", id="nfkc"),
    pytest.param("\u2168", b"IX", id="nfkc-roman-number"),
    pytest.param("e\u0301", "\u00e9".encode(), id="nfkc-composes"),
    pytest.param("\ufb01\u00e9", "fi\u00e9".encode(), id="nfkc-ligature"),
    pytest.param("I\u00adX", b"IX", id="mapped-to-nothing"),
    pytest.param("\u00ad\u00ad", "\u00ad\u00ad".encode(), id="nothing-is-left-so-raw"),
    pytest.param("a\u00a0b", b"a b", id="another-space"),
    pytest.param("a\u200bb", b"a b", id="zero-width-space-is-a-space"),
    pytest.param("a\u200db\u00e9", "ab\u00e9".encode(), id="zero-width-joiner-is-nothing"),
    pytest.param("a\u00e9\x07", "a\u00e9\x07".encode(), id="control-character-so-raw"),
    pytest.param("\u2168\x7f", "\u2168\x7f".encode(), id="control-character-so-raw-throughout"),
    pytest.param("\u2168\ue000", "\u2168\ue000".encode(), id="private-use-so-raw"),
    pytest.param("\u2168\ufffd", "\u2168\ufffd".encode(), id="replacement-character-so-raw"),
    pytest.param("\u2168\u200e", "\u2168\u200e".encode(), id="direction-mark-so-raw"),
    pytest.param("\u2168\U000e0041", "\u2168\U000e0041".encode(), id="tag-so-raw"),
    pytest.param("\u2168\u0221", "\u2168\u0221".encode(), id="unassigned-in-unicode-3.2-so-raw"),
    pytest.param("\u2168\U0001f40e", "\u2168\U0001f40e".encode(), id="emoji-so-raw"),
    pytest.param("a\u0340", "a\u0340".encode(), id="prohibited-though-nfkc-would-mend-it"),
    pytest.param("\u05d0\u05d1", "\u05d0\u05d1".encode(), id="right-to-left"),
    pytest.param("\u05d0\u2168\u05d1", "\u05d0\u2168\u05d1".encode(), id="right-to-left-with-latin-so-raw"),
    pytest.param("\u06271\u00aa", "\u06271\u00aa".encode(), id="right-to-left-that-ends-otherwise-so-raw"),
    pytest.param("\u0627\u00b2\u0628", "\u06272\u0628".encode(), id="right-to-left-with-a-digit"),
    pytest.param("\ufb1d", "\u05d9\u05b4".encode(), id="right-to-left-until-nfkc"),
    pytest.param("a\u2135", "a\u05d0".encode(), id="left-to-right-until-nfkc"),
    pytest.param("\u00aa" * 300, b"a" * 300, id="long"),
]


@pytest.mark.parametrize(("password", "expected"), PASSWORDS)
def test_a_password_is_prepared_as_postgresql_does_it(password: str, expected: bytes) -> None:
    assert normalize(password) == expected


def test_a_password_of_other_bytes_than_utf_8_stays_raw() -> None:
    assert normalize(os.fsdecode(b"caf\xe9")) == b"caf\xe9"


def test_half_a_surrogate_pair_comes_to_bytes_that_no_password_has() -> None:
    assert normalize("hunter2\ud800") == b"hunter2\xed\xa0\x80"


@given(st.text(st.characters()))
def test_every_text_comes_to_some_bytes(text: str) -> None:
    prepared = normalize(text)
    assert bool(prepared) == bool(text)


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def keys_of(password: str) -> Keys:
    return Keys(lambda: password, Honest.salt, 4096)


def test_keys_are_found_by_password_salt_and_iteration_count_only() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, Honest.salt, 4096, keys)
    assert cache.get(secret, Honest.salt, 4096) is keys
    assert cache.get(lambda: OTHER_PASSWORD, Honest.salt, 4096) is None
    assert cache.get(secret, Honest.salt[1:], 4096) is None
    assert cache.get(secret, Honest.salt, 4097) is None


def test_the_cache_is_bounded_and_the_oldest_keys_go() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    for count in range(4096, 4196):
        cache.put(secret, Honest.salt, count, keys)
    found = [count for count in range(4096, 4196) if cache.get(secret, Honest.salt, count)]
    assert len(found) <= 16
    assert found == list(range(4196 - len(found), 4196))


def test_a_rejected_password_is_forgotten_under_every_salt_and_others_stay() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, Honest.salt, 4096, keys)
    cache.put(secret, Honest.salt[1:], 4096, keys)
    cache.put(lambda: OTHER_PASSWORD, Honest.salt, 4096, keys)
    cache.evict(secret)
    assert cache.get(secret, Honest.salt, 4096) is cache.get(secret, Honest.salt[1:], 4096) is None
    assert cache.get(lambda: OTHER_PASSWORD, Honest.salt, 4096) is keys
    cache.evict(secret)  # once more does no harm


def test_no_repr_shows_a_secret() -> None:
    cache, keys = KeyCache(), keys_of(PASSWORD)
    cache.put(secret, Honest.salt, 4096, keys)
    exchange, _ = challenged()
    shown = repr([cache, keys, exchange, Logins()])
    for hidden in (PASSWORD, repr(keys.client_key), repr(keys.server_key), repr(Honest.salt)):
        assert hidden not in shown
    assert (repr(cache), repr(keys), repr(exchange)) == ("<KeyCache of 1>", "<Keys>", f"<Exchange {PLAIN}>")


# ---------------------------------------------------------------------------------------------------------------------
# Messages, cut anywhere

CERTIFICATE = signed(p256(), hashes.SHA256())
BINDING = hashlib.sha256(CERTIFICATE.der).digest()
Cut = Callable[[bytes], list[bytes]]


class Line(asyncio.Transport):
    """A transport whose other end is `server`, in this process. What it says arrives in pieces that `cut` makes.

    `mutate` may change what the server says; it is told how often it has spoken before. The server hangs up on a client
    that it does not understand.
    """

    def __init__(
        self, server: Honest, cut: Cut, *, mutate: Callable[[int, bytes], bytes] = lambda _, data: data
    ) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.delivered: list[bytes] = []
        self.mailbox = Mailbox(HOST)
        self._protocol: asyncio.Protocol = self.mailbox
        self._server = server
        self._cut = cut
        self._mutate = mutate
        self._under_way: list[bytes] = []
        self.mailbox.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def abort(self) -> None:
        self.hang_up()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))
        answer = (self._server.challenge, self._server.verdict)[len(self.sent) - 1]
        try:
            reply = answer(self.sent[-1][5:])
        except ScramException:
            self.hang_up()
        else:
            self.deliver(reply if len(self.sent) == 1 else reply + OK + WELCOME)

    def deliver(self, data: bytes) -> None:
        """Let `data` arrive, one piece in each turn of the event loop."""
        data = self._mutate(len(self.delivered), data)
        self.delivered.append(data)
        self._under_way += self._cut(data)
        asyncio.get_running_loop().call_soon(self._feed)

    def _feed(self) -> None:
        if self._under_way:
            self._protocol.data_received(self._under_way.pop(0))
            asyncio.get_running_loop().call_soon(self._feed)

    def hang_up(self) -> None:
        """End the connection as the server does, now."""
        self._under_way.clear()
        self._protocol.connection_lost(None)

    async def hang_up_when_nobody_speaks(self) -> None:
        """Hang up when all has arrived and the client has had the time for an answer, PBKDF2 left aside."""
        spoken, quiet = 0, 0
        while quiet < 10:
            await asyncio.sleep(0)
            quiet = quiet + 1 if spoken == len(self.sent) and not self._under_way else 0
            spoken = len(self.sent)
        self.hang_up()


class Recorder(asyncio.Protocol):
    """In asyncpg's place: keeps what is handed over."""

    def __init__(self) -> None:
        self.received = b""
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def log_in_on(
    line: Line,
    *,
    logins: Logins,
    early: str | None = None,
    binding: str = "prefer",
    certificate: bytes = CERTIFICATE.der,
    offer: list[str] = BOTH,
) -> Recorder:
    """Log in over `line` and hand over."""
    line.deliver(sasl(*offer))
    recorder = Recorder()
    async with asyncio.timeout(HANG):
        await log_in(
            line.mailbox,
            host=HOST,
            certificate=certificate,
            channel_binding=binding,
            secret=secret,
            logins=logins,
            early=early,
        )
        await line.mailbox.hand_over(recorder)
    return recorder


def whole(data: bytes) -> list[bytes]:
    return [data]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def cut_at(position: int) -> Cut:
    return lambda data: [data[:position], data[position:]] if position < len(data) else [data]


@pytest.mark.anyio
@pytest.mark.parametrize("early", [None, PLUS], ids=["first-dial", "later-dial"])
async def test_a_login_works_wherever_its_messages_are_cut(early: str | None) -> None:
    logins = Logins()
    longest = len(OK + WELCOME) + 60
    for cut in (whole, byte_by_byte, *(cut_at(position) for position in range(1, longest))):
        line = Line(Honest(PASSWORD, binding=BINDING), cut)
        recorder = await log_in_on(line, logins=logins, early=early)
        await line.hang_up_when_nobody_speaks()
        assert recorder.received == OK + WELCOME
        assert recorder.lost
        assert [data[:1] for data in line.sent] == [b"p", b"p"]


@pytest.mark.anyio
async def test_several_messages_in_one_read_are_taken_one_after_the_other() -> None:
    notices = message(b"N", b"SNOTICE\0Mhello\0\0") * 3
    line = Line(Honest(PASSWORD, binding=BINDING), whole, mutate=lambda _, data: notices + data)
    recorder = await log_in_on(line, logins=Logins())
    assert recorder.received == OK + WELCOME


@pytest.mark.anyio
async def test_a_connection_that_is_lost_right_behind_authenticationok_is_no_hang() -> None:
    line, recorder = Line(Honest(PASSWORD), whole), Recorder()
    line.mailbox.data_received(OK + message(b"S", b"server_version\x0017\0"))
    line.hang_up()
    try:
        await line.mailbox.hand_over(recorder)
    except ConnectError:
        return
    assert recorder.lost, "nobody ever tells asyncpg that its connection is gone"


@pytest.mark.anyio
@pytest.mark.parametrize("said", [b"", authentication_request(12, right(bytes(32))), error_response("no")], ids=len)
async def test_keys_that_no_server_has_accepted_are_not_kept(said: bytes) -> None:
    line = Line(Honest(PASSWORD, binding=BINDING), whole, mutate=lambda which, data: said if which == 2 else data)
    logins = Logins()
    login_attempt = asyncio.ensure_future(log_in_on(line, logins=logins))
    await until(lambda: len(line.delivered) == 3)
    await line.hang_up_when_nobody_speaks()
    with pytest.raises((NeonAsyncError, asyncpg.PostgresError)):
        await login_attempt
    assert len(line.sent) == 2
    assert repr(logins.keys) == "<KeyCache of 0>"


@pytest.mark.anyio
async def test_a_new_certificate_that_cannot_be_bound_is_not_greeted_with_plus() -> None:
    certificate = signed(ed25519.Ed25519PrivateKey.generate(), None).der
    line = Line(Honest(PASSWORD, binding=b"what the server takes for its hash"), whole)
    with pytest.raises(ChannelBindingError, match="no hash"):
        await log_in_on(line, logins=Logins(), early=PLUS, certificate=certificate)
    assert line.sent == []
    line = Line(Honest(PASSWORD), whole)
    recorder = await log_in_on(line, logins=Logins(), early=PLUS, certificate=certificate, offer=[PLAIN])
    assert recorder.received == OK + WELCOME
    assert b"n,,n=*,r=" in line.sent[0]


@dataclass(frozen=True)
class Damage:
    """A change to one of the things that a server says."""

    which: int
    position: int
    removed: int
    inserted: bytes

    def __call__(self, which: int, data: bytes) -> bytes:
        if which != self.which:
            return data
        at = self.position % (len(data) + 1)
        return data[:at] + self.inserted + data[at + self.removed :]


DAMAGE = st.builds(
    Damage,
    which=st.integers(0, 2),
    position=st.integers(0, 400),
    removed=st.integers(0, 40),
    inserted=st.binary(max_size=20) | st.sampled_from([OK, READY, sasl(PLAIN), sasl(*BOTH), error_response("no")]),
)
CUTS = st.just(whole) | st.just(byte_by_byte) | st.builds(cut_at, st.integers(1, 400))
EARLY = st.sampled_from([None, PLUS, PLAIN])
MODES = st.sampled_from(["prefer", "require"])
KNOWN = Logins()  # one PBKDF2 for all
KNOWN.keys = KeyCache()
KNOWN.keys.put(secret, Honest.salt, 4096, keys_of(PASSWORD))


async def outcome(line: Line, *, early: str | None, binding: str) -> Recorder | None:
    """Return what was handed over, or None where the login was refused in a proper way; nothing else may happen."""
    server = asyncio.ensure_future(line.hang_up_when_nobody_speaks())
    try:
        return await log_in_on(line, logins=KNOWN, early=early, binding=binding)
    except (NeonAsyncError, asyncpg.PostgresError, ServerAsksOtherwiseError) as error:
        assert PASSWORD not in repr(error)
        return None
    finally:
        await server


def verdict_in(data: bytes) -> bytes:
    """Return the signature in the first SASLFinal of `data`, notices left aside."""
    while data[:1] == b"N":
        data = data[1 + int(struct.unpack_from("!I", data, 1)[0]) :]
    assert data[:1] == b"R"
    assert data[5:9] == struct.pack("!I", 12)
    attributes = data[9 : 1 + int(struct.unpack_from("!I", data, 1)[0])].split(b",")
    return base64.b64decode(attributes[0].removeprefix(b"v="))


@pytest.mark.anyio
@given(damage=DAMAGE, cut=CUTS, early=EARLY, binding=MODES)
async def test_a_damaged_login_succeeds_only_with_the_right_signature(
    damage: Damage, cut: Cut, early: str | None, binding: str
) -> None:
    server = Honest(PASSWORD, binding=BINDING)
    line = Line(server, cut, mutate=damage)
    if await outcome(line, early=early, binding=binding):
        assert server.server_signature == verdict_in(line.delivered[-1])


class Stranger(Honest):
    """A server that does not know the password, and says what it has been told to say."""

    def __init__(self, *replies: bytes) -> None:
        super().__init__(OTHER_PASSWORD)
        self._replies = list(replies)

    def challenge(self, initial_response: bytes) -> bytes:
        nonce = initial_response.rpartition(b"r=")[2]
        return self._replies[0].replace(b"NONCE", nonce)

    def verdict(self, response: bytes) -> bytes:
        return self._replies[1]


REQUESTS = st.builds(authentication_request, st.sampled_from([0, 3, 5, 10, 11, 12, 13]), st.binary(max_size=40))
CHALLENGES = st.sampled_from([",i=4096", ",i=4095", ",i=9000000", ",i=4096,m=x"]).map(
    lambda end: authentication_request(11, f"r=NONCE+,s={SALT}{end}".encode())
)
ANY_MESSAGE = st.builds(
    message,
    st.sampled_from([b"R", b"E", b"N", b"S", b"Z", b"K", b"v"]) | st.binary(min_size=1, max_size=1),
    st.binary(max_size=60),
    length=st.none() | st.integers(-10, 100) | st.integers(-(2**31), 2**31 - 1),
)
SAYINGS = st.lists(REQUESTS | CHALLENGES | ANY_MESSAGE | st.binary(max_size=30), max_size=4).map(b"".join)


@pytest.mark.anyio
@given(replies=st.tuples(SAYINGS | CHALLENGES, SAYINGS), cut=CUTS, early=EARLY, binding=MODES)
async def test_a_server_that_does_not_know_the_password_is_never_believed(
    replies: tuple[bytes, bytes], cut: Cut, early: str | None, binding: str
) -> None:
    line = Line(Stranger(*replies), cut)
    assert await outcome(line, early=early, binding=binding) is None


@pytest.mark.anyio
@given(said=SAYINGS, cut=CUTS, early=EARLY, binding=MODES)
async def test_a_server_that_says_anything_at_first_is_never_believed(
    said: bytes, cut: Cut, early: str | None, binding: str
) -> None:
    line = Line(Stranger(b"", b""), cut, mutate=lambda which, data: said if which == 0 else data)
    assert await outcome(line, early=early, binding=binding) is None


# ---------------------------------------------------------------------------------------------------------------------
# Servers with a good certificate that break the login

STARTUP = ["StartupMessage"]
INITIAL = [*STARTUP, "SASLInitialResponse"]
PROOF = [*INITIAL, "SASLResponse"]
LIE = "call 555-0199 to unlock this database"


@dataclass(frozen=True)
class Refused:
    """What a server does behind the StartupMessage, how that must end, and what the client says until then."""

    id: str
    steps: tuple[bytes | Script, ...]
    heard: list[str]
    error: type[Exception] = AuthenticationError
    says: str = ""


def refused(
    id: str,  # noqa: A002  as pytest calls it
    *steps: bytes | Script,
    heard: list[str] = STARTUP,
    error: type[Exception] = AuthenticationError,
    says: str = "",
) -> Refused:
    return Refused(id, steps, heard, error, says)


def challenge(text: str) -> Script:
    """Return a step that offers SCRAM and challenges with `text`; NONCE stands for the client's."""

    def step(conversation: Conversation) -> None:
        conversation.send(sasl(*BOTH))
        nonce = conversation.read_message()[1].rpartition(b"r=")[2]
        conversation.send(authentication_request(11, text.encode().replace(b"NONCE", nonce)))

    return step


def verdict(make: Callable[[bytes], bytes]) -> Script:
    """Return a step that is honest up to SASLFinal, in whose place it sends what `make` returns."""

    def step(conversation: Conversation) -> None:
        server = Honest(PASSWORD, binding=BINDING)
        conversation.send(sasl(*BOTH))
        conversation.send(server.challenge(conversation.read_message()[1]))
        conversation.send(make(server.verdict(conversation.read_message()[1])))

    return step


def without_end(data: bytes) -> Script:
    def step(conversation: Conversation) -> None:
        while not conversation.over.is_set():
            conversation.send(data)

    return step


CLEARTEXT = authentication_request(3)
read, hang_up = Conversation.read_message, Conversation.hang_up
METHODS = {1: "unknown", 2: "Kerberos", 3: "cleartext", 5: "MD5", 6: "unknown", 7: "GSS", 8: "GSS", 9: "SSPI"}
GOOD = "r=NONCE+,s=" + SALT + ",i=4096"

REFUSALS = (
    *(refused(f"method-{code}", authentication_request(code, b"salt"), says=says) for code, says in METHODS.items()),
    *(refused(f"method-{code}", authentication_request(code), says="unknown") for code in (4, 13, 99, 2**32 - 1)),
    refused("trust", OK + WELCOME, says="let us in"),
    refused("no-offer", sasl(), says="offers none of"),
    refused("other-offers", sasl("SCRAM-SHA-1", "SCRAM-SHA-512-PLUS", "OAUTHBEARER"), says="offers none of"),
    refused("offer-that-is-no-text", authentication_request(10, b"\xff\xfe\0\0"), says="offers none of"),
    # Out of order
    refused("challenge-first", authentication_request(11, GOOD.encode())),
    refused("verdict-first", authentication_request(12, b"v=" + SALT.encode()) + OK + WELCOME),
    refused("two-offers", sasl(*BOTH), sasl(*BOTH), heard=INITIAL),
    refused("welcome-behind-the-offer", sasl(*BOTH) + OK + WELCOME, heard=INITIAL),
    refused("verdict-behind-the-offer", sasl(*BOTH) + authentication_request(12, b"v=AAAA"), heard=INITIAL),
    refused("cleartext-behind-the-offer", sasl(*BOTH) + CLEARTEXT, heard=INITIAL, says="cleartext"),
    refused("md5-behind-the-offer", sasl(*BOTH) + authentication_request(5, b"salt"), heard=INITIAL, says="MD5"),
    refused("two-challenges", challenge(GOOD), authentication_request(11, GOOD.encode()), heard=PROOF),
    refused("welcome-behind-the-challenge", challenge(GOOD), OK + WELCOME, heard=PROOF, says="let us in"),
    refused("cleartext-behind-the-challenge", challenge(GOOD), CLEARTEXT, heard=PROOF, says="cleartext"),
    refused("two-verdicts", verdict(lambda data: data + data), heard=PROOF),
    refused("cleartext-behind-the-verdict", verdict(lambda data: data + CLEARTEXT), heard=PROOF, says="cleartext"),
    refused("offer-behind-the-verdict", verdict(lambda data: data + sasl(*BOTH)), heard=PROOF, says="once more"),
    # Something wrong in the exchange
    refused("4095-iterations", challenge(f"r=NONCE+,s={SALT},i=4095"), heard=INITIAL),
    refused("1000001-iterations", challenge(f"r=NONCE+,s={SALT},i=1000001"), heard=INITIAL, says="1,000,001"),
    refused("8000000-iterations", challenge(f"r=NONCE+,s={SALT},i=8000000"), heard=INITIAL, says="8,000,000"),
    refused("2-to-the-31-iterations", challenge(f"r=NONCE+,s={SALT},i=2147483647"), heard=INITIAL),
    refused("nonce-equal-to-ours", challenge(f"r=NONCE,s={SALT},i=4096"), heard=INITIAL),
    refused("nonce-of-somebody-else", challenge(f"r=abcdefghijklmnopqrstuvwx,s={SALT},i=4096"), heard=INITIAL),
    refused("extension", challenge("m=x," + GOOD), heard=INITIAL),
    refused("empty-challenge", challenge(""), heard=INITIAL),
    refused("challenge-that-accuses", challenge(f"e={LIE}"), heard=INITIAL),
    refused("no-signature", verdict(lambda _: authentication_request(12)), heard=PROOF),
    refused("no-signature-and-a-welcome", verdict(lambda _: authentication_request(12) + OK + WELCOME), heard=PROOF),
    refused(
        "wrong-signature-and-a-welcome",
        verdict(lambda _: authentication_request(12, right(bytes(32))) + OK + WELCOME),
        heard=PROOF,
        says="signature",
    ),
    refused("verdict-that-accuses", verdict(lambda _: authentication_request(12, b"e=invalid-proof")), heard=PROOF),
    # Too much, too long, no sense
    refused("over-8-kb", authentication_request(10, bytes(8185)), error=ProtocolError, says="8193 bytes"),
    refused("error-over-8-kb", error_response("x" * 9000), error=ProtocolError),
    refused("challenge-over-8-kb", challenge(GOOD + ",x=" + "y" * 9000), heard=INITIAL, error=ProtocolError),
    refused("verdict-over-8-kb", verdict(lambda _: message(b"R", bytes(9000))), heard=PROOF, error=ProtocolError),
    refused("2-gib", message(b"R", length=2**31 - 1), error=ProtocolError),
    refused("less-than-nothing", message(b"R", length=-1), error=ProtocolError),
    refused("endless-notices", without_end(message(b"N", b"M" + LIE.encode() + b"\0\0")), error=ProtocolError),
    refused("17-notices", message(b"N") * 17, error=ProtocolError),
    refused("ready-behind-the-offer", sasl(*BOTH) + READY, heard=INITIAL, error=ProtocolError),
    refused("half-a-code", message(b"R", b"\0\0"), error=ProtocolError),
    refused("hangs-up-behind-the-offer", sasl(*BOTH), read, hang_up, heard=INITIAL, error=ConnectError),
    refused("hangs-up-behind-the-challenge", challenge(GOOD), read, hang_up, heard=PROOF, error=ConnectError),
    refused("hangs-up-behind-the-verdict", verdict(bytes), hang_up, heard=PROOF, error=ConnectError),
    refused("hangs-up-behind-ok", verdict(lambda it: it + OK), hang_up, heard=PROOF, error=ConnectError),
)  # fmt: skip


@pytest.fixture
def pbkdf2(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The thread and iteration count of every PBKDF2 that this process computes, as it is begun."""
    calls: list[tuple[int, int]] = []
    genuine = hashlib.pbkdf2_hmac
    Honest(PASSWORD), Honest(OTHER_PASSWORD)  # what the servers of the tests need is computed before

    def record(name: str, password: bytes, salt: bytes, iterations: int, dklen: int | None = None) -> bytes:
        calls.append((threading.get_ident(), iterations))
        return genuine(name, password, salt, iterations, dklen)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", record)
    return calls


def impostor(*steps: bytes | Script) -> Impostor:
    """Return a server that has a good certificate, reads the StartupMessage, and goes on with `steps`."""
    script = login(server_context(CERTIFICATE.chain), *steps)
    return Impostor(script, trust_anchor=CERTIFICATE.anchor, password=PASSWORD.replace(" ", "%20"))


async def connect_to(server: Impostor, **keywords: Any) -> asyncpg.Connection[Any]:
    async with asyncio.timeout(HANG):
        return await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor, **keywords)


async def error_from(server: Impostor, **keywords: Any) -> Exception:
    """Return the error with which a connection to `server` is refused."""
    try:
        connection = await connect_to(server, **keywords)
    except (NeonAsyncError, asyncpg.PostgresError) as error:
        return error
    connection.terminate()
    raise AssertionError("the server was believed")


@pytest.mark.anyio
@pytest.mark.parametrize("it", REFUSALS, ids=lambda it: it.id)
async def test_a_server_that_breaks_the_login_is_refused(it: Refused, pbkdf2: list[tuple[int, int]]) -> None:
    async with impostor(*it.steps) as server:
        error = await error_from(server)
        assert type(error) is it.error, error
        assert it.says in str(error)
        assert LIE not in str(error)
        assert server.host in str(error)
        assert_secret_free(error, PASSWORD)
        conversations = await server.finish()
    assert [client_messages(one.decrypted) for one in conversations] == [it.heard]
    assert all(one.closed_by_client for one in conversations)
    everything = b"".join(bytes(one.wire + one.decrypted) for one in conversations)
    assert PASSWORD.encode() not in everything
    # Of the password comes nothing, not even in memory, before there is a challenge worth it; and then in a thread.
    assert len(pbkdf2) == (1 if it.heard == PROOF else 0)
    assert threading.get_ident() not in [thread for thread, _ in pbkdf2]


@pytest.mark.anyio
async def test_the_longest_message_that_is_allowed_is_read() -> None:
    filler = b"X" * (8188 - 4 - len(BOTH[0]) - 3) + b"\0"
    offer = authentication_request(10, PLUS.encode() + b"\0" + filler + b"\0")
    assert len(offer) == 8193  # the type and 8,192 bytes that count themselves
    line = Line(Honest(PASSWORD, binding=BINDING), whole, mutate=lambda which, data: data if which else offer)
    assert (await log_in_on(line, logins=Logins())).received == OK + WELCOME


# Neon's proxy has one SQLSTATE for all; the rest is PostgreSQL's.
TEXTS: tuple[tuple[str, str, type[Exception]], ...] = (
    ("XX000", "password authentication failed for user 'alex'", InvalidPasswordError),
    ("XX000", "The requested endpoint could not be found, or you don't have access to it.", EndpointNotFoundError),
    ("XX000", "The endpoint is disabled. Enable it using Neon API and retry.", EndpointDisabledError),
    ("XX000", "This IP address 192.0.2.1 is not allowed to connect to this endpoint.", IPNotAllowedError),
    ("XX000", "Your account or project has exceeded the compute time quota.", QuotaExceededError),
    ("XX000", "Couldn't connect to compute node", ComputeUnavailableError),
    ("XX000", "Too many connections attempts, please try again later", TooManyConnectionsError),
    ("XX000", 'database "nowhere" does not exist', DatabaseNotFoundError),
    ("XX000", "SCRAM-PLUS not used", ChannelBindingError),  # proxy/src/scram/exchange.rs, for gs2 flag y
    ("XX000", "insecure connection: secure channel data mismatch", ChannelBindingError),  # there, too
    ("XX000", "something that nobody has seen yet", asyncpg.InternalServerError),
    ("28P01", 'password authentication failed for user "alex"', InvalidPasswordError),
    ("28000", "SCRAM channel binding check failed", ChannelBindingError),
    ("28000", "SCRAM channel binding negotiation error", ChannelBindingError),
    ("28000", 'role "alex" is not permitted to log in', AuthenticationError),
    ("3D000", 'database "neondb" does not exist', DatabaseNotFoundError),
    ("53300", "sorry, too many clients already", TooManyConnectionsError),
    ("57P03", "the database system is starting up", ComputeUnavailableError),
    ("08P01", "malformed SCRAM message", asyncpg.ProtocolViolationError),
    ("08P01", "no more connections allowed (max_client_conn)", TooManyConnectionsError),  # PgBouncer
    ("42501", 'permission denied for database "neondb"', asyncpg.InsufficientPrivilegeError),
)
POINTS: dict[str, Callable[[bytes], bytes | Script]] = {
    "in-place-of-the-verdict": lambda error: verdict(lambda _: error),
    "in-place-of-the-offer": lambda error: error,
    "behind-the-offer": lambda error: play(sasl(*BOTH), read, error),
    "in-place-of-ok": lambda error: verdict(lambda data: data + error),
    "behind-ok": lambda error: verdict(lambda data: data + OK + error),
}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("point", "code", "text", "kind"),
    [pytest.param("in-place-of-the-verdict", *case, id=f"{case[0]} {case[1][:40]}") for case in TEXTS]
    + [
        pytest.param(point, *case, id=f"{point} {case[0]} {case[1][:40]}")
        for point in list(POINTS)[1:]
        for case in (TEXTS[0], TEXTS[2], *TEXTS[-3:])
    ],
)
async def test_what_the_server_says_during_the_login_arrives_under_its_class(
    point: str, code: str, text: str, kind: type[Exception]
) -> None:
    async with impostor(POINTS[point](error_response(text, code=code))) as server:
        error = await error_from(server)
        assert type(error) is kind, error
        assert isinstance(error, asyncpg.PostgresError)
        assert error.sqlstate == code
        assert text.rstrip(".") in str(error)
        assert_secret_free(error, PASSWORD)


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"", b"\0", b"M\0\0", b"C28P01\0\0", b"\xff\xfe\0", b"Mhalf"], ids=repr)
async def test_an_error_without_its_fields_is_an_error_of_the_server_still(body: bytes) -> None:
    async with impostor(message(b"E", body)) as server:
        assert isinstance(await error_from(server), asyncpg.PostgresError)


# ---------------------------------------------------------------------------------------------------------------------
# Servers that are honest


def answer_queries(conversation: Conversation) -> None:
    """Answer every simple query with a CommandComplete."""
    while conversation.read_message()[0] == b"Q":
        conversation.send(message(b"C", b"SET\0") + READY)
    hang_up(conversation)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("offer", "mechanism"),
    [
        pytest.param(BOTH, PLUS, id="both"),
        pytest.param([PLAIN], PLAIN, id="plain"),
        pytest.param([PLUS], PLUS, id="plus"),
    ],
)
async def test_what_follows_authenticationok_in_the_same_read_is_asyncpgs(offer: list[str], mechanism: str) -> None:
    async with impostor(honest(PASSWORD, offer=offer, binding=BINDING), answer_queries) as server:
        connection = await connect_to(server)
        assert connection.get_server_pid() == 4711
        assert connection.get_settings().application_name == "from the honest half"
        assert neon_async.connection_tls_report(connection).mechanism == mechanism
        assert await connection.execute("SET work_mem = 64") == "SET"
        await connection.close()
        (conversation,) = await server.finish()
    assert client_messages(conversation.decrypted) == [*PROOF, "Query", "Terminate"]


@pytest.mark.anyio
async def test_pbkdf2_runs_in_a_thread_once_and_again_only_for_another_password(
    postgres: LocalPostgres, pbkdf2: list[tuple[int, int]]
) -> None:
    connector = _connect.prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    for _ in range(3):
        await (await connector.connect()).close()
    assert [iterations for _, iterations in pbkdf2] == [4096]
    assert threading.get_ident() not in [thread for thread, _ in pbkdf2]


@pytest.mark.anyio
@pytest.mark.parametrize("negotiation", ["direct", "postgres"])
async def test_the_data_path_is_asyncpgs_alone(postgres: LocalPostgres, negotiation: str) -> None:
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, sslnegotiation=negotiation)
    protocol = connection._transport.get_protocol()  # type: ignore[attr-defined]
    assert protocol is connection._protocol  # type: ignore[attr-defined]
    assert type(protocol).__module__.startswith("asyncpg.")
    await connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# Passwords, at a real server


@pytest.fixture(scope="module")
def admin(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection through libpq. `libpq_dsn` tells how others come in."""
    with psycopg.connect(libpq_dsn(postgres, tmp_path_factory), autocommit=True) as connection:
        connection.execute("CREATE ROLE singer LOGIN")
        yield connection
        connection.execute("DROP ROLE singer")


def libpq_dsn(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("anchor") / "root.pem"
    path.write_bytes(postgres.trust_anchor)
    return f"{postgres.dsn}&sslmode=verify-full&sslrootcert={path}"


async def log_in_as_singer(postgres: LocalPostgres, password: str | None) -> None:
    keywords = {} if password is None else {"password": password}
    dsn = postgres.dsn.partition("//")[0] + "//" + postgres.dsn.rpartition("@")[2]
    connection = await neon_async.connect(dsn, trust_anchor=postgres.trust_anchor, user="singer", **keywords)  # type: ignore[arg-type]
    assert await connection.fetchval("SELECT current_user") == "singer"
    await connection.close()


@pytest.mark.anyio
@pytest.mark.parametrize(("password", "expected"), PASSWORDS)
async def test_a_password_that_lets_libpq_in_lets_us_in(
    postgres: LocalPostgres, admin: psycopg.Connection[Any], password: str, expected: bytes
) -> None:
    admin.execute(sql.SQL("ALTER ROLE singer PASSWORD {}").format(password))
    with psycopg.connect(admin.info.dsn, user="singer", password=password):
        pass
    await log_in_as_singer(postgres, password)


@pytest.mark.anyio
async def test_a_password_of_other_bytes_than_utf_8_lets_us_in(
    postgres: LocalPostgres, admin: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.execute(sql.SQL("ALTER ROLE singer PASSWORD {}").format(verifier(b"caf\xe9")))
    monkeypatch.setenv("PGPASSWORD", os.fsdecode(b"caf\xe9"))
    await log_in_as_singer(postgres, None)


@pytest.mark.anyio
@pytest.mark.parametrize("source", ["text", "function"])
async def test_a_password_that_is_no_text_is_refused_in_one_of_our_errors(postgres: LocalPostgres, source: str) -> None:
    password: Any = "hunter2\ud800"
    with pytest.raises(NeonAsyncError) as caught:
        await neon_async.connect(
            postgres.dsn,
            trust_anchor=postgres.trust_anchor,
            password=password if source == "text" else lambda: password,
        )
    assert_secret_free(caught.value, "hunter2")


@pytest.mark.anyio
async def test_a_rotated_password_needs_no_restart_and_a_wrong_one_is_forgotten(
    postgres: LocalPostgres, admin: psycopg.Connection[Any]
) -> None:
    def now(password: str) -> None:
        admin.execute(sql.SQL("ALTER ROLE singer PASSWORD {}").format(verifier(password.encode())))

    told = "first"

    async def tell() -> str:
        return told

    dsn = postgres.dsn.partition("//")[0] + "//" + postgres.dsn.rpartition("@")[2]
    now("first")
    async with neon_async.create_pool(
        dsn, trust_anchor=postgres.trust_anchor, user="singer", password=tell, max_size=1
    ) as pool:
        logins = pool._connector._logins

        async def log_in_anew() -> None:
            await until(lambda: not pool._supply.pace.pause(time.monotonic()))  # the breaker of a wrong password
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT current_user") == "singer"
            await pool.expire_connections()

        await log_in_anew()
        await log_in_anew()
        assert repr(logins.keys) == "<KeyCache of 1>"
        now("second")
        with pytest.raises(InvalidPasswordError) as caught:
            await log_in_anew()
        assert_secret_free(caught.value, "first", "second")
        assert repr(logins.keys) == "<KeyCache of 0>"
        told = "wrong"
        with pytest.raises(InvalidPasswordError):
            await log_in_anew()
        assert repr(logins.keys) == "<KeyCache of 0>"
        told = "second"
        await log_in_anew()
        assert repr(logins.keys) == "<KeyCache of 1>"
