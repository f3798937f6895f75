"""Every impostor is refused: with the right error, within the deadline, without a hang or a crash; no secret is on the
wire, in the error or in a log, and no socket or task is left behind.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import hmac
import logging
import re
import secrets
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import ACCEPTED, REFUSED, Case, Presented, issue, present, root
from support.forged_tls import ECDSA_P256, ForgedServer, receive_record
from support.forged_tls import script as forged

import neon_async
from neon_async import (
    AuthenticationError,
    CertificateError,
    ConnectError,
    ConnectTimeoutError,
    EndpointNotFoundError,
    InvalidPasswordError,
    NeonAsyncError,
    ProtocolError,
    TLSError,
    TooManyConnectionsError,
)
from neon_async.testing._impostor import (
    SSL_REQUEST,
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

pytestmark = pytest.mark.anyio

PASSWORD = secrets.token_hex(12)
LIE = "call 555-0199 to unlock this database"  # what no client should pass on as the server's word
SILENT_TIMEOUT = 1.0  # seconds; for the impostors that only the clock can tell
HANG = 10.0  # seconds until a test counts as hanging

# libpq's values of sslnegotiation; the default is direct, then the other for a server that does not speak it.
DIRECT, POSTGRES, DEFAULT = "direct", "postgres", "default"
Error = type[NeonAsyncError] | type[asyncpg.PostgresError]

# What the client says inside TLS.
NOTHING: tuple[str, ...] = ()
STARTUP = ("StartupMessage",)
MECHANISM = (*STARTUP, "SASLInitialResponse")
PROOF = (*MECHANISM, "SASLResponse")


@dataclass(frozen=True)
class Misbehaviour:
    """What an impostor does, and how that must end.

    `error` is the class raised, by negotiation where that matters; `says` is a part of its message. `heard` is what the
    client says inside TLS and no more. `silent` marks an impostor that only the clock can tell; `hasty` one so quick
    that the client may have said `heard` by then, or just its StartupMessage.
    """

    id: str
    script: Script
    error: Error | Mapping[str, Error]
    says: str = ""
    heard: tuple[str, ...] = NOTHING
    silent: bool = False
    hasty: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# The judge


@pytest.fixture(scope="module", autouse=True)
def young_garbage_only() -> Iterator[None]:
    """Let every gc.collect() below look at what its test made, and not at all modules once more."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def every_log_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


async def refusal(
    impostor: Impostor, negotiation: str = DEFAULT, *, silent: bool = False, **keywords: Any
) -> NeonAsyncError | asyncpg.PostgresError:
    """Return the error with which a connection to `impostor` is refused. Any other outcome fails the test."""
    if negotiation != DEFAULT:
        keywords["sslnegotiation"] = negotiation
    timeout = SILENT_TIMEOUT if silent else HANG - 1
    async with asyncio.timeout(HANG):
        with pytest.raises((NeonAsyncError, asyncpg.PostgresError)) as caught:
            await neon_async.connect(
                impostor.dsn, trust_anchor=impostor.trust_anchor, connect_timeout=timeout, **keywords
            )
    assert isinstance(caught.value, NeonAsyncError | asyncpg.PostgresError)
    return caught.value


async def judge(
    error: Exception,
    impostor: Impostor,
    heard: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    *,
    hasty: bool = False,
) -> None:
    """Check what holds for every refusal, whatever the misbehaviour."""
    home = neon_async if isinstance(error, NeonAsyncError) else asyncpg
    assert getattr(home, type(error).__name__, None) is type(error), "this class is not public"
    if isinstance(error, NeonAsyncError):
        assert impostor.host in str(error)
    assert list(leaks(error, impostor.password)) == []
    assert LIE not in " ".join(texts(error))
    *earlier, last = await impostor.finish()
    assert all(one.closed_by_client for one in (*earlier, last)), "a socket was left open"
    assert all(outside_tls(one) in (b"", SSL_REQUEST) for one in (*earlier, last))
    assert [said(one) for one in earlier] == [NOTHING] * len(earlier)
    assert said(last) == heard or (hasty and said(last) == STARTUP)
    assert impostor.password.encode() not in b"".join(one.wire + one.decrypted for one in (*earlier, last))
    gc.collect()
    await asyncio.sleep(0)  # finalisers may leave their complaints to the loop
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert impostor.password not in caplog.text


def outside_tls(conversation: Conversation) -> bytes:
    """Return what the client sent that is not part of a TLS record."""
    found, rest = b"", bytes(conversation.wire)
    while rest:
        size = 5 + int.from_bytes(rest[3:5])
        if 20 <= rest[0] <= 23 and rest[1:2] == b"\x03" and size <= len(rest):
            rest = rest[size:]
        else:
            found, rest = found + rest[:1], rest[1:]
    return found


def said(conversation: Conversation) -> tuple[str, ...]:
    """Return the names of the messages that the client sent inside TLS; one that it has no business to send fails."""
    names: list[str] = []
    rest = bytes(conversation.decrypted)
    while rest:
        start = 1 if names else 0  # the first one is the only one without a type
        size = start + int.from_bytes(rest[start : start + 4])
        names.append(name_of(rest[:size]))
        rest = rest[size:]
    return tuple(names)


KNOWN_MESSAGES = {
    "StartupMessage": rb"....\x00\x03\x00\x00client_encoding\x00'utf-8'\x00user\x00alex\x00database\x00neondb\x00\x00",
    "SASLInitialResponse": rb"p....SCRAM-SHA-256(-PLUS)?\x00....(n|y|p=tls-server-end-point),,n=(alex|\*)?,r=[^,\s]+",
    "SASLResponse": rb"p....c=[a-z0-9+/]+=*,r=[^,\s]+,p=[A-Za-z0-9+/]{43}=",
    "Terminate": rb"X\x00\x00\x00\x04",
}


def name_of(data: bytes) -> str:
    for name, pattern in KNOWN_MESSAGES.items():
        if re.fullmatch(pattern, data, re.DOTALL | re.IGNORECASE):
            return name
    raise AssertionError(f"the client sent {data!r}")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    if error is not None:
        yield error
        yield from chain(error.__cause__)
        yield from chain(error.__context__)


def texts(error: BaseException) -> Iterator[str]:
    """Yield all that an error tracker would record of `error`, but for its frames."""
    for one in chain(error):
        yield from (str(one), repr(one), repr(one.args), repr(vars(one)))


def leaks(error: BaseException, secret: str) -> Iterator[str]:
    """Yield every place in the chain of `error`, the locals of our own frames included, where `secret` shows."""
    yield from (text for text in texts(error) if secret in text)
    ours = str(Path(neon_async.__file__).parent)
    for one in chain(error):
        traceback = one.__traceback__
        while traceback:
            frame, traceback = traceback.tb_frame, traceback.tb_next
            if frame.f_code.co_filename.startswith(ours):
                found = (name for name, value in frame.f_locals.items() if secret in repr(value))
                yield from (f"{name} in {frame.f_code.co_name}()" for name in found)


@cache
def good_chain() -> Presented:
    return present(issue(root()))


@cache
def good_context() -> ssl.SSLContext:
    return server_context(good_chain().chain)


# ---------------------------------------------------------------------------------------------------------------------
# Servers that do something else than TLS

OK = authentication_request(0)
READY = message(b"Z", b"I")
CLEARTEXT = authentication_request(3)
TLS_RECORD = struct.pack("!BHH", 22, 0x0303, 16000)  # the header of a record that never ends

see = Conversation.opens_with_tls  # takes an SSLRequest, leaves a ClientHello
consent = Conversation.consent_to_tls
hang_up = Conversation.hang_up
reset = Conversation.reset


def never_read(conversation: Conversation) -> None:
    conversation.over.wait()


def alert(code: int) -> bytes:
    """Return a fatal TLS alert (RFC 8446 section 6)."""
    return struct.pack("!BHHBB", 21, 0x0303, 2, 2, code)


def trickle(data: bytes) -> Script:
    """Return a step that sends a byte now and then, often enough for any timer that starts anew with each."""

    def step(conversation: Conversation) -> None:
        for byte in data:
            if conversation.over.wait(0.1):
                return
            conversation.send(bytes([byte]))

    return step


def without_end(data: bytes) -> Script:
    """Return a step that sends `data` again and again."""

    def step(conversation: Conversation) -> None:
        while not conversation.over.is_set():
            conversation.send(data)

    return step


def half_a_flight(conversation: Conversation) -> None:
    """Answer the ClientHello with the first half of what an honest server would."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = good_context().wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(receive_record(conversation))
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    flight = outgoing.read()
    conversation.send(flight[: len(flight) // 2])


# A server that closes says nothing of itself: over direct TLS it may be one that does not speak that.
CLOSED = {DIRECT: TLSError, POSTGRES: ConnectError, DEFAULT: ConnectError}
LATE = {DIRECT: ConnectTimeoutError, POSTGRES: ConnectTimeoutError}  # the default is direct here

BEFORE_TLS = (
    Misbehaviour("says-no", play(see, b"N", hang_up), TLSError),
    Misbehaviour("says-no-and-stays", play(see, b"N"), {POSTGRES: TLSError}),
    Misbehaviour("says-no-and-asks-for-the-password", play(see, b"N" + CLEARTEXT), TLSError),
    Misbehaviour("says-error", play(see, error_response(LIE), hang_up), TLSError),
    Misbehaviour("says-error-as-of-old", play(see, b"E" + LIE.encode() + b"\0", hang_up), TLSError),
    Misbehaviour("says-error-and-stays", play(see, error_response(LIE)), TLSError),
    Misbehaviour("says-garbage", play(see, bytes(range(150, 250))), TLSError),
    Misbehaviour("says-nul", play(see, b"\0", hang_up), TLSError),
    Misbehaviour("says-lower-case-s", play(see, b"s", hang_up), TLSError),
    Misbehaviour("says-yes-to-gss", play(see, b"G", hang_up), TLSError),
    Misbehaviour("says-http", play(see, b"HTTP/1.1 400 Bad Request\r\n\r\n" + LIE.encode()), TLSError),
    Misbehaviour("says-ssh", play(b"SSH-2.0-OpenSSH_9.9\r\n"), TLSError),
    Misbehaviour("consents-twice", play(see, b"SS", hang_up), TLSError),
    Misbehaviour("consents-with-an-error-behind", play(see, b"S" + error_response(LIE)), TLSError),
    Misbehaviour("consents-with-a-password-request-behind", play(see, b"S" + CLEARTEXT), TLSError),
    Misbehaviour("consents-with-a-welcome-behind", play(see, b"S" + OK + READY), TLSError),
    Misbehaviour("consents-with-a-handshake-behind", play(see, b"S" + TLS_RECORD), TLSError),
    Misbehaviour("welcomes-in-plaintext", play(OK + READY), TLSError),
    Misbehaviour("asks-for-the-password-in-plaintext", play(consent, CLEARTEXT), TLSError),
    Misbehaviour("accuses-in-plaintext", play(consent, error_response(LIE)), TLSError),
    Misbehaviour("answers-hello-with-garbage", play(consent, TLS_RECORD + b"\xee" * 16000), TLSError),
    Misbehaviour("answers-hello-with-a-huge-record", play(consent, b"\x16\x03\x03\xff\xff" + bytes(100)), TLSError),
    Misbehaviour("alerts-handshake-failure", play(consent, alert(40), hang_up), TLSError),
    Misbehaviour("alerts-protocol-version", play(consent, alert(70), hang_up), TLSError, "TLS 1.3"),
    Misbehaviour("alerts-internal-error", play(consent, alert(80), hang_up), TLSError),
    Misbehaviour("alerts-no-application-protocol", play(consent, alert(120), hang_up), TLSError, "postgresql"),
    Misbehaviour("closes-at-once", hang_up, CLOSED),
    Misbehaviour("closes-when-asked", play(see, hang_up), CLOSED),
    Misbehaviour("resets-at-once", reset, {POSTGRES: ConnectError, DEFAULT: ConnectError}),
    Misbehaviour("resets-when-asked", play(see, reset), CLOSED),
    Misbehaviour("closes-after-consent", play(consent, hang_up), CLOSED),
    Misbehaviour("resets-with-its-consent", play(see, b"S", reset), CLOSED),
    Misbehaviour("resets-after-consent", play(consent, reset), CLOSED),
    Misbehaviour("closes-in-mid-handshake", play(consent, half_a_flight, hang_up), CLOSED),
    Misbehaviour("resets-in-mid-handshake", play(consent, half_a_flight, reset), CLOSED),
    Misbehaviour("is-silent", play(), LATE, "connect_timeout=1 s", silent=True),
    Misbehaviour("never-reads", never_read, LATE, "connect_timeout=1 s", silent=True),
    Misbehaviour("is-silent-after-consent", play(consent), LATE, silent=True),
    Misbehaviour("is-silent-in-mid-handshake", play(consent, half_a_flight), LATE, silent=True),
    Misbehaviour("trickles", play(consent, trickle(TLS_RECORD + bytes(99))), LATE, silent=True),
)


def in_each_negotiation(table: tuple[Misbehaviour, ...]) -> list[Any]:
    return [
        pytest.param(it, negotiation, id=f"{it.id}-{negotiation}")
        for it in table
        for negotiation in (it.error if isinstance(it.error, Mapping) else (DIRECT, POSTGRES, DEFAULT))
    ]


async def refuse(it: Misbehaviour, negotiation: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Impostor(it.script, trust_anchor=good_chain().anchor, password=PASSWORD) as impostor:
        error = await refusal(impostor, negotiation, silent=it.silent)
        assert type(error) is (it.error[negotiation] if isinstance(it.error, Mapping) else it.error), error
        assert it.says in str(error)
        await judge(error, impostor, it.heard, caplog, hasty=it.hasty)


@pytest.mark.parametrize(("it", "negotiation"), in_each_negotiation(BEFORE_TLS))
async def test_a_server_without_proper_tls_is_refused_before_the_first_message(
    it: Misbehaviour, negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse(it, negotiation, caplog)


# ---------------------------------------------------------------------------------------------------------------------
# Servers that do TLS, but not as they must


@cache
def tls_1_2_context() -> ssl.SSLContext:
    return server_context(good_chain().chain, maximum_version=ssl.TLSVersion.TLSv1_2)


@cache
def context_without_alpn() -> ssl.SSLContext:
    return server_context(good_chain().chain, alpn=())


@cache
def context_that_wants_a_certificate() -> ssl.SSLContext:
    context = server_context(good_chain().chain)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def accept(make: Callable[[], ssl.SSLContext]) -> Script:
    return lambda conversation: conversation.accept_tls(make())


def with_a_stolen_certificate() -> ForgedServer:
    return ForgedServer([issue(root()).der], scheme=ECDSA_P256)


def well_forged(alpn: bytes | None = b"postgresql", first_words: bytes = b"") -> Script:
    """Return a script that has a good certificate and its key, and is wrong in what it says."""

    def make() -> ForgedServer:
        key = ec.generate_private_key(ec.SECP256R1())
        return ForgedServer(
            [issue(root(), key=key).der],
            scheme=ECDSA_P256,
            sign=lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())),
            alpn=alpn,
            first_words=first_words,
        )

    return forged(make)


# PostgreSQL up to 16 has no ALPN: without direct TLS that is no fault, and the fault is what comes after it.
NO_ALPN = {DIRECT: TLSError, POSTGRES: AuthenticationError, DEFAULT: AuthenticationError}

IN_TLS = (
    Misbehaviour("speaks-tls-1.2-only", accept(tls_1_2_context), TLSError, "TLS 1.3"),
    Misbehaviour("has-a-certificate-but-not-its-key", forged(with_a_stolen_certificate), TLSError, "BAD_SIGNATURE"),
    Misbehaviour("chooses-a-protocol-not-offered", well_forged(b"http/1.1"), TLSError),
    Misbehaviour("chooses-an-empty-protocol", well_forged(b""), TLSError),
    Misbehaviour("chooses-no-protocol", well_forged(None), {DIRECT: TLSError}, "direct TLS"),
    Misbehaviour("wants-a-client-certificate", accept(context_that_wants_a_certificate), TLSError, "sslcert"),
    Misbehaviour("closes-after-the-handshake", play(accept(good_context), hang_up), ConnectError, hasty=True),
    Misbehaviour("resets-after-the-handshake", play(accept(good_context), reset), ConnectError, hasty=True),
)


@pytest.mark.parametrize(("it", "negotiation"), in_each_negotiation(IN_TLS))
async def test_a_server_that_cheats_in_tls_is_refused(
    it: Misbehaviour, negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse(it, negotiation, caplog)


@pytest.mark.parametrize("negotiation", [DIRECT, POSTGRES])
@pytest.mark.parametrize(
    "first_words",
    [
        pytest.param(OK + READY, id="a-welcome"),
        pytest.param(CLEARTEXT, id="a-request-for-the-password"),
        pytest.param(authentication_request(12), id="the-end-of-sasl"),
        pytest.param(b"N" * 16000, id="babble"),
    ],
)
async def test_a_server_that_speaks_before_it_is_asked_is_refused(
    first_words: bytes, negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The first words arrive with the handshake, and the event loop decides whether they precede our StartupMessage.
    async with Impostor(well_forged(first_words=first_words), trust_anchor=good_chain().anchor) as impostor:
        error = await refusal(impostor, negotiation)
        assert type(error) in (ProtocolError, AuthenticationError), error
        await judge(error, impostor, NOTHING, caplog, hasty=True)


@pytest.mark.parametrize("negotiation", [DIRECT, POSTGRES, DEFAULT])
async def test_a_server_without_alpn_is_refused_under_direct_tls_only(
    negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = login_after(accept(context_without_alpn), CLEARTEXT)
    heard = NOTHING if negotiation == DIRECT else STARTUP
    await refuse(Misbehaviour("", script, NO_ALPN, heard=heard), negotiation, caplog)


@pytest.mark.parametrize("negotiation", [DEFAULT, POSTGRES])
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
async def test_a_bad_certificate_is_refused_at_the_first_attempt(
    case: Case, negotiation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    presented = case.make()
    script = login(server_context(presented.chain), CLEARTEXT)
    async with Impostor(script, trust_anchor=presented.anchor) as impostor:
        error = await refusal(impostor, negotiation, **revocation(presented, tmp_path))
        assert type(error) is CertificateError, error
        assert case.reason in str(error)
        assert impostor.connections == 1
        await judge(error, impostor, NOTHING, caplog)


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
async def test_a_good_certificate_gets_the_startup_message(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    presented = case.make()
    script = login(server_context(presented.chain), CLEARTEXT)
    async with Impostor(script, trust_anchor=presented.anchor) as impostor:
        error = await refusal(impostor, **revocation(presented, tmp_path))
        assert type(error) is AuthenticationError, error
        await judge(error, impostor, STARTUP, caplog)


def revocation(presented: Presented, folder: Path) -> dict[str, Any]:
    if presented.crl is None:
        return {}
    path = folder / "crl.pem"
    path.write_bytes(presented.crl)
    return {"crl": path}


# ---------------------------------------------------------------------------------------------------------------------
# Servers that are verified, and cheat at login


@dataclass
class Scram:
    """A server's half of SCRAM-SHA-256 (RFC 5802, RFC 7677), with whatever is wrong in place of what is right."""

    first: Callable[[bytes], bytes] = lambda nonce: b"r=%s,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096" % nonce
    final: Callable[[bytes], bytes] = lambda signature: b"v=" + base64.b64encode(signature)

    def challenge(self, conversation: Conversation) -> bytes:
        """Ask for SASL, read the client's first message, send ours; return both as the signature needs them."""
        conversation.send(SASL)
        _, body = conversation.read_message()
        client_first = body.partition(b",,")[2]  # the part that is signed
        server_first = self.first(client_first.partition(b",r=")[2] + b"0123456789abcdef")
        conversation.send(authentication_request(11, server_first))
        return client_first + b"," + server_first

    def exchange(self, conversation: Conversation) -> None:
        """Do the whole exchange up to and including SASLFinal."""
        so_far = self.challenge(conversation)
        _, client_final = conversation.read_message()
        signed = so_far + b"," + client_final.rpartition(b",p=")[0]
        salted = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), b"saltsaltsaltsalt", 4096)
        key = hmac.digest(salted, b"Server Key", "sha256")
        conversation.send(authentication_request(12, self.final(hmac.digest(key, signed, "sha256"))))


def sasl(*mechanisms: bytes) -> bytes:
    return authentication_request(10, b"".join(name + b"\0" for name in mechanisms) + b"\0")


def challenge(first: bytes | None = None) -> Script:
    return (Scram() if first is None else Scram(first=lambda nonce: first.replace(b"NONCE", nonce))).challenge


def verdict(final: bytes | None = None) -> Script:
    return (Scram() if final is None else Scram(final=lambda _: final)).exchange


def login_after(accept_tls: Script, *steps: bytes | Script) -> Script:
    return play(accept_tls, Conversation.read_startup, *steps)


def at_login(
    id: str,  # noqa: A002 - as pytest calls it
    steps: bytes | Script,
    error: Error = AuthenticationError,
    says: str = "",
    heard: tuple[str, ...] = STARTUP,
    *,
    silent: bool = False,
    hasty: bool = False,
) -> Misbehaviour:
    return Misbehaviour(id, login_after(accept(good_context), steps), error, says, heard, silent, hasty)


SASL = sasl(b"SCRAM-SHA-256")
FIRST, SALT = b"r=NONCE,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096", b"s=c2FsdHNhbHRzYWx0c2FsdA=="
WRONG = b"v=" + base64.b64encode(bytes(32))
FINAL = authentication_request(12, WRONG)
MIB, GIB = 2**20, 2**30
STATUS = message(b"S", b"is_superuser\0on\0")

AT_LOGIN = (
    # Another method than SCRAM
    at_login("cleartext", CLEARTEXT, says="cleartext"),
    at_login("md5", authentication_request(5, b"salt"), says="MD5"),
    at_login("trust", OK + READY, says="without authentication"),
    at_login("trust-and-silence", OK, says="without authentication"),
    at_login("kerberos-4", authentication_request(1), says="unknown authentication method 1"),
    at_login("kerberos-5", authentication_request(2), says="Kerberos"),
    at_login("crypt", authentication_request(4, b"xx"), says="unknown authentication method 4"),
    at_login("scm-credential", authentication_request(6), says="unknown authentication method 6"),
    at_login("gss", authentication_request(7), says="GSS"),
    at_login("gss-continue-first", authentication_request(8, b"token"), says="GSS"),
    at_login("sspi", authentication_request(9), says="SSPI"),
    at_login("unknown-method-13", authentication_request(13), says="unknown authentication method 13"),
    at_login("unknown-method-99", authentication_request(99), says="unknown authentication method 99"),
    at_login("method-of-all-ones", authentication_request(0xFFFFFFFF), says="unknown authentication method"),
    at_login("no-method-at-all", message(b"R"), ProtocolError),
    at_login("half-a-method", message(b"R", b"\0\0"), ProtocolError),
    at_login("only-plus", play(sasl(b"SCRAM-SHA-256-PLUS"), OK + READY), heard=MECHANISM, hasty=True),
    at_login("only-an-unknown-mechanism", sasl(b"OAUTHBEARER"), says="SCRAM-SHA-256"),
    at_login("only-an-older-mechanism", sasl(b"SCRAM-SHA-1"), says="SCRAM-SHA-256"),
    at_login("only-a-mechanism-that-starts-alike", sasl(b"SCRAM-SHA-256X"), says="SCRAM-SHA-256"),
    at_login("no-mechanism", sasl(), says="SCRAM-SHA-256"),
    at_login("no-mechanism-list", authentication_request(10), says="SCRAM-SHA-256"),
    # SCRAM out of order
    at_login("final-first", FINAL, says="SASL"),
    at_login("final-first-and-a-welcome", FINAL + OK + READY, says="SASL"),
    at_login("empty-final-first", authentication_request(12), says="SASL"),
    at_login("continue-first", authentication_request(11, FIRST), says="SASL"),
    at_login("empty-continue-first", authentication_request(11), says="SASL"),
    at_login("sasl-twice", SASL + SASL, says="SASL", heard=MECHANISM),
    at_login("welcome-after-sasl", SASL + OK + READY, says="SCRAM", heard=MECHANISM),
    at_login("final-after-sasl", SASL + FINAL, says="SASL", heard=MECHANISM),
    at_login("cleartext-after-sasl", SASL + CLEARTEXT, says="cleartext", heard=MECHANISM),
    at_login("md5-after-sasl", SASL + authentication_request(5, b"salt"), says="MD5", heard=MECHANISM),
    at_login("whole-exchange-at-once", SASL + authentication_request(11, FIRST) + FINAL + OK + READY, heard=MECHANISM),
    at_login("continue-twice", play(challenge(), authentication_request(11, FIRST)), says="SASL", heard=PROOF),
    at_login("welcome-without-final", play(challenge(), OK + READY), says="SCRAM", heard=PROOF),
    at_login("cleartext-after-the-proof", play(challenge(), CLEARTEXT), says="cleartext", heard=PROOF),
    at_login("final-twice", play(verdict(), FINAL), says="SASL", heard=PROOF),
    at_login("cleartext-after-final", play(verdict(), CLEARTEXT), says="cleartext", heard=PROOF),
    # SCRAM with something wrong in it
    at_login("nonce-of-another", challenge(FIRST.replace(b"NONCE", b"abcdefghijklmnop")), heard=MECHANISM),
    at_login("nonce-of-another-and-on", play(challenge(b"r=abc," + SALT + b",i=4096"), FINAL + OK), heard=MECHANISM),
    at_login("empty-challenge", challenge(b""), heard=MECHANISM),
    at_login("empty-challenge-and-on", play(challenge(b""), FINAL + OK + READY), heard=MECHANISM),
    at_login("challenge-of-commas", challenge(b",,,,"), heard=MECHANISM),
    at_login("challenge-of-garbage", challenge(bytes(range(128, 256))), heard=MECHANISM),
    at_login("challenge-without-salt", challenge(b"r=NONCE,i=4096"), heard=MECHANISM),
    at_login("challenge-without-iterations", challenge(b"r=NONCE," + SALT), heard=MECHANISM),
    at_login("challenge-that-accuses", challenge(b"e=" + LIE.encode()), heard=MECHANISM),
    at_login("salt-that-is-not-base64", challenge(b"r=NONCE,s=a,i=4096"), heard=MECHANISM),
    at_login("iterations-that-are-no-number", challenge(b"r=NONCE," + SALT + b",i=many"), heard=MECHANISM),
    at_login("iterations-of-zero", challenge(b"r=NONCE," + SALT + b",i=0"), heard=MECHANISM),
    at_login("iterations-below-zero", challenge(b"r=NONCE," + SALT + b",i=-1"), heard=MECHANISM),
    at_login("wrong-signature", verdict(WRONG), heard=PROOF),
    at_login("wrong-signature-and-a-welcome", play(verdict(WRONG), OK + READY), heard=PROOF),
    at_login("empty-final", verdict(b""), heard=PROOF),
    at_login("empty-final-and-a-welcome", play(verdict(b""), OK + READY), heard=PROOF),
    at_login("final-of-garbage", verdict(bytes(range(128, 256))), heard=PROOF),
    at_login("final-that-is-not-base64", play(verdict(b"v=!"), OK + READY), heard=PROOF),
    at_login("final-that-accuses", verdict(b"e=invalid-proof"), heard=PROOF),
    # Messages that have no place here, or no sense
    at_login("ready-at-once", READY, ProtocolError, "b'Z'"),
    at_login("parameter-status-at-once", STATUS, ProtocolError, "b'S'"),
    at_login("key-data-at-once", message(b"K", bytes(8)), ProtocolError, "b'K'"),
    at_login("row-at-once", message(b"D", b"\0\0"), ProtocolError, "b'D'"),
    at_login("copy-at-once", message(b"G", b"\0\0\0"), ProtocolError, "b'G'"),
    at_login("ready-after-sasl", SASL + READY, ProtocolError, "b'Z'", MECHANISM),
    at_login("parameter-status-after-the-proof", play(challenge(), STATUS), ProtocolError, "b'S'", PROOF),
    at_login("type-of-nul", message(b"\0", b"data"), ProtocolError),
    at_login("garbage", bytes(range(200, 255)), ProtocolError),
    at_login("http", b"HTTP/1.1 400 Bad Request\r\n\r\n" + LIE.encode(), ProtocolError),
    at_login("length-of-minus-1", message(b"R", length=-1), ProtocolError, "-1 bytes"),
    at_login("length-of-0", message(b"R", length=0), ProtocolError, " 0 bytes"),
    at_login("length-of-3", message(b"R", length=3), ProtocolError, " 3 bytes"),
    at_login("length-of-2-gib", message(b"R", length=2 * GIB - 1), ProtocolError, "2147483647 bytes"),
    at_login("length-of-minus-2-gib", message(b"R", length=-2 * GIB), ProtocolError, "-2147483648 bytes"),
    at_login("error-of-2-gib", message(b"E", length=2 * GIB - 1), ProtocolError, "2147483647 bytes"),
    at_login("error-of-minus-1", message(b"E", length=-1), ProtocolError, "-1 bytes"),
    at_login("notice-of-1-mib", message(b"N", bytes(MIB)), ProtocolError, "1048580 bytes"),
    at_login("length-of-minus-1-after-sasl", SASL + message(b"R", length=-1), ProtocolError, "-1 bytes", MECHANISM),
    at_login("length-of-0-after-the-proof", play(challenge(), message(b"R", length=0)), ProtocolError, heard=PROOF),
    at_login("endless-notices", without_end(message(b"N", b"SNOTICE\0M" + LIE.encode() + b"\0\0")), ProtocolError),
    at_login("endless-empty-notices", without_end(message(b"N")), ProtocolError),
    # Errors
    at_login("wrong-password", error_response("password authentication failed for user 'alex'"), InvalidPasswordError),
    at_login(
        "wrong-password-after-the-proof",
        play(challenge(), error_response("password authentication failed for user 'alex'")),
        InvalidPasswordError,
        heard=PROOF,
    ),
    at_login("unknown-endpoint", error_response("The requested endpoint could not be found"), EndpointNotFoundError),
    at_login(
        "too-many-connections",
        play(verdict(), OK, error_response("sorry, too many clients already", code="53300")),
        TooManyConnectionsError,
        heard=PROOF,
    ),
    # Closing and silence
    at_login("close", hang_up, ConnectError),
    at_login("reset", reset, ConnectError),
    at_login("close-after-sasl", play(SASL, Conversation.read_message, hang_up), ConnectError, heard=MECHANISM),
    at_login("close-after-the-proof", play(challenge(), Conversation.read_message, hang_up), ConnectError, heard=PROOF),
    at_login("close-after-the-welcome", play(verdict(), OK, hang_up), ConnectError, heard=PROOF),
    at_login("silence", play(), ConnectTimeoutError, "authentication", silent=True),
    at_login("silence-in-mid-message", SASL[:-1], ConnectTimeoutError, "authentication", silent=True),
    at_login("silence-after-sasl", SASL, ConnectTimeoutError, "authentication", MECHANISM, silent=True),
    at_login("silence-after-the-proof", challenge(), ConnectTimeoutError, "authentication", PROOF, silent=True),
    at_login("silence-after-final", verdict(), ConnectTimeoutError, "authentication", PROOF, silent=True),
    at_login("silence-after-the-welcome", play(verdict(), OK), ConnectTimeoutError, heard=PROOF, silent=True),
    at_login("trickled-request", trickle(sasl(b"SCRAM-SHA-256", b"X" * 200)), ConnectTimeoutError, silent=True),
    at_login("trickled-notices", trickle(message(b"N") * 40), ConnectTimeoutError, silent=True),
)  # fmt: skip


@pytest.mark.parametrize("it", AT_LOGIN, ids=lambda it: it.id)
async def test_a_verified_server_that_cheats_at_login_is_refused(
    it: Misbehaviour, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse(it, DEFAULT, caplog)


# ---------------------------------------------------------------------------------------------------------------------
# The other way round


def let_in() -> Script:
    """Return what a server says to a client that has proven itself, up to the first ReadyForQuery."""
    return play(verdict(), OK, message(b"S", b"server_version\x0017.0\x00"), message(b"K", bytes(8)), READY)


@pytest.mark.parametrize("negotiation", [DIRECT, POSTGRES, DEFAULT])
@pytest.mark.parametrize("notice", [b"", message(b"N", b"SNOTICE\0Mgood morning\0\0")], ids=["", "after-a-notice"])
async def test_the_same_machinery_is_let_in_where_it_is_honest(negotiation: str, notice: bytes) -> None:
    script = login_after(accept(good_context), notice, let_in())
    async with Impostor(script, trust_anchor=good_chain().anchor, password=PASSWORD) as server, asyncio.timeout(HANG):
        keywords: dict[str, Any] = {} if negotiation == DEFAULT else {"sslnegotiation": negotiation}
        connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor, **keywords)
        connection.terminate()
        (conversation,) = await server.finish()
        assert said(conversation) == (*PROOF, "Terminate")


async def test_a_forged_handshake_without_a_fault_is_let_in_up_to_the_login(caplog: pytest.LogCaptureFixture) -> None:
    await refuse(Misbehaviour("", well_forged(), ConnectTimeoutError, heard=STARTUP, silent=True), DEFAULT, caplog)


@pytest.mark.parametrize("init_size", [0, 1], ids=["when-acquiring", "when-opening"])
@pytest.mark.parametrize(
    ("script", "error", "heard"),
    [
        pytest.param(play(see, b"N", hang_up), TLSError, NOTHING, id="no-tls"),
        pytest.param(forged(with_a_stolen_certificate), TLSError, NOTHING, id="stolen-certificate"),
        pytest.param(login_after(accept(good_context), CLEARTEXT), AuthenticationError, STARTUP, id="cleartext"),
        pytest.param(login_after(accept(good_context), FINAL), AuthenticationError, STARTUP, id="final-first"),
    ],
)
async def test_a_pool_refuses_as_a_single_connection_does(
    script: Script, error: Error, heard: tuple[str, ...], init_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with Impostor(script, trust_anchor=good_chain().anchor, password=PASSWORD) as impostor:
        pool = neon_async.create_pool(impostor.dsn, trust_anchor=impostor.trust_anchor, init_size=init_size)
        async with asyncio.timeout(HANG):
            with pytest.raises(error) as caught:  # noqa: PT012 - the two ways to meet the server
                await pool
                await pool.acquire()
            pool.terminate()
        await judge(caught.value, impostor, heard, caplog)
