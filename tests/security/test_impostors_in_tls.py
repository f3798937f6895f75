"""Impostors that do not offer TLS, or cheat in TLS, are refused before they get anything but a StartupMessage."""

from __future__ import annotations

import ssl
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import ACCEPTED, REFUSED, Case, Presented, issue, root
from support.forged_tls import ECDSA_P256, ForgedServer, receive_record
from support.forged_tls import script as forged
from support.impostors import (
    CLEARTEXT,
    DEFAULT,
    DIRECT,
    LIE,
    NOTHING,
    OK,
    POSTGRES,
    READY,
    STARTUP,
    Misbehaviour,
    accept,
    check_refusal,
    good_chain,
    good_context,
    hang_up,
    in_each_negotiation,
    login_after,
    refusal,
    refuse,
    reset,
    see,
    trickle,
)

from neon_async import AuthenticationError, CertificateError, ConnectError, ConnectTimeoutError, ProtocolError, TLSError
from neon_async.testing._impostor import (
    Conversation,
    Impostor,
    Script,
    authentication_request,
    error_response,
    login,
    play,
    server_context,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("young_garbage_only", "every_log_record")]

consent = Conversation.consent_to_tls
TLS_RECORD = struct.pack("!BHH", 22, 0x0303, 16000)  # the header of a record that never ends


def never_read(conversation: Conversation) -> None:
    conversation.over.wait()


def alert(code: int) -> bytes:
    """Return a fatal TLS alert (RFC 8446 section 6)."""
    return struct.pack("!BHHBB", 21, 0x0303, 2, 2, code)


def half_a_flight(conversation: Conversation) -> None:
    """Answer the ClientHello with the first half of an honest server's flight."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = good_context().wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(receive_record(conversation))
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    flight = outgoing.read()
    conversation.send(flight[: len(flight) // 2])


# A server that closes the connection under direct TLS may be one that does not speak it.
CLOSED = {DIRECT: TLSError, POSTGRES: ConnectError, DEFAULT: ConnectError}
LATE = {DIRECT: ConnectTimeoutError, POSTGRES: ConnectTimeoutError}  # the default is direct here

BEFORE_TLS = (
    Misbehaviour("answers-no", play(see, b"N", hang_up), TLSError),
    Misbehaviour("answers-no-and-stays", play(see, b"N"), {POSTGRES: TLSError}),
    Misbehaviour("answers-no-and-requests-the-password", play(see, b"N" + CLEARTEXT), TLSError),
    Misbehaviour("answers-error", play(see, error_response(LIE), hang_up), TLSError),
    Misbehaviour("answers-error-as-before-protocol-3", play(see, b"E" + LIE.encode() + b"\0", hang_up), TLSError),
    Misbehaviour("answers-error-and-stays", play(see, error_response(LIE)), TLSError),
    Misbehaviour("answers-garbage", play(see, bytes(range(150, 250))), TLSError),
    Misbehaviour("answers-nul", play(see, b"\0", hang_up), TLSError),
    Misbehaviour("answers-lower-case-s", play(see, b"s", hang_up), TLSError),
    Misbehaviour("answers-yes-to-gss", play(see, b"G", hang_up), TLSError),
    Misbehaviour("answers-http", play(see, b"HTTP/1.1 400 Bad Request\r\n\r\n" + LIE.encode()), TLSError),
    Misbehaviour("answers-ssh", play(b"SSH-2.0-OpenSSH_9.9\r\n"), TLSError),
    Misbehaviour("consents-twice", play(see, b"SS", hang_up), TLSError),
    Misbehaviour("consents-with-an-error-after-it", play(see, b"S" + error_response(LIE)), TLSError),
    Misbehaviour("consents-with-a-password-request-after-it", play(see, b"S" + CLEARTEXT), TLSError),
    Misbehaviour("consents-with-a-session-start-after-it", play(see, b"S" + OK + READY), TLSError),
    Misbehaviour("consents-with-a-handshake-after-it", play(see, b"S" + TLS_RECORD), TLSError),
    Misbehaviour("accepts-the-login-in-plaintext", play(OK + READY), TLSError),
    Misbehaviour("requests-the-password-in-plaintext", play(consent, CLEARTEXT), TLSError),
    Misbehaviour("sends-an-error-in-plaintext", play(consent, error_response(LIE)), TLSError),
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


@pytest.mark.parametrize(("it", "negotiation"), in_each_negotiation(BEFORE_TLS))
async def test_a_server_without_proper_tls_is_refused_before_the_first_message(
    it: Misbehaviour, negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse(it, negotiation, caplog)


# ---------------------------------------------------------------------------------------------------------------------
# Servers that do TLS, with a fault


@cache
def tls_1_2_context() -> ssl.SSLContext:
    return server_context(good_chain().chain, maximum_version=ssl.TLSVersion.TLSv1_2)


@cache
def context_without_alpn() -> ssl.SSLContext:
    return server_context(good_chain().chain, alpn=())


@cache
def context_that_requires_a_certificate() -> ssl.SSLContext:
    context = server_context(good_chain().chain)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def with_a_stolen_certificate() -> ForgedServer:
    return ForgedServer([issue(root()).der], scheme=ECDSA_P256)


def well_forged(alpn: bytes | None = b"postgresql", first_words: bytes = b"") -> Script:
    """Return a script with a good certificate and its key, and with a fault in what it sends."""

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


# PostgreSQL before 17 does not know ALPN: after an SSLRequest that is no fault, and the login is refused.
NO_ALPN = {DIRECT: TLSError, POSTGRES: AuthenticationError, DEFAULT: AuthenticationError}

IN_TLS = (
    Misbehaviour("speaks-tls-1.2-only", accept(tls_1_2_context), TLSError, "TLS 1.3"),
    Misbehaviour("has-a-certificate-but-not-its-key", forged(with_a_stolen_certificate), TLSError, "BAD_SIGNATURE"),
    Misbehaviour("chooses-a-protocol-not-offered", well_forged(b"http/1.1"), TLSError),
    Misbehaviour("chooses-an-empty-protocol", well_forged(b""), TLSError),
    Misbehaviour("chooses-no-protocol", well_forged(None), {DIRECT: TLSError}, "direct TLS"),
    Misbehaviour("requires-a-client-certificate", accept(context_that_requires_a_certificate), TLSError, "sslcert"),
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
        pytest.param(OK + READY, id="a-session-start"),
        pytest.param(CLEARTEXT, id="a-request-for-the-password"),
        pytest.param(authentication_request(12), id="the-end-of-sasl"),
        pytest.param(b"N" * 16000, id="16-kb-of-notices"),
    ],
)
async def test_a_server_that_sends_data_before_our_first_message_is_refused(
    first_words: bytes, negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The data arrives with the handshake; the event loop decides whether that is before our StartupMessage.
    async with Impostor(well_forged(first_words=first_words), trust_anchor=good_chain().anchor) as impostor:
        error = await refusal(impostor, negotiation)
        assert type(error) in (ProtocolError, AuthenticationError), error
        await check_refusal(error, impostor, NOTHING, caplog, hasty=True)


@pytest.mark.parametrize("negotiation", [DIRECT, POSTGRES, DEFAULT])
async def test_a_server_without_alpn_is_refused_under_direct_tls_only(
    negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = login_after(accept(context_without_alpn), CLEARTEXT)
    sends = NOTHING if negotiation == DIRECT else STARTUP
    await refuse(Misbehaviour("", script, NO_ALPN, sends=sends), negotiation, caplog)


@pytest.mark.parametrize("negotiation", [DEFAULT, POSTGRES])
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
async def test_a_bad_certificate_is_refused_without_a_second_attempt(
    case: Case, negotiation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    presented = case.make()
    script = login(server_context(presented.chain), CLEARTEXT)
    async with Impostor(script, trust_anchor=presented.anchor) as impostor:
        error = await refusal(impostor, negotiation, **revocation(presented, tmp_path))
        assert type(error) is CertificateError, error
        assert case.reason in str(error)
        assert impostor.connections == 1
        await check_refusal(error, impostor, NOTHING, caplog)


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
async def test_a_good_certificate_gets_the_startup_message(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    presented = case.make()
    script = login(server_context(presented.chain), CLEARTEXT)
    async with Impostor(script, trust_anchor=presented.anchor) as impostor:
        error = await refusal(impostor, **revocation(presented, tmp_path))
        assert type(error) is AuthenticationError, error
        await check_refusal(error, impostor, STARTUP, caplog)


def revocation(presented: Presented, folder: Path) -> dict[str, Any]:
    if presented.crl is None:
        return {}
    path = folder / "crl.pem"
    path.write_bytes(presented.crl)
    return {"crl": path}


async def test_a_forged_handshake_without_a_fault_gets_the_startup_message(caplog: pytest.LogCaptureFixture) -> None:
    await refuse(Misbehaviour("", well_forged(), ConnectTimeoutError, sends=STARTUP, silent=True), DEFAULT, caplog)
