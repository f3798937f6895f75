"""Impostors with a good certificate that cheat at login are refused, and learn nothing about the password."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from support.certificates import issue, root
from support.forged_tls import ECDSA_P256, ForgedServer
from support.forged_tls import script as forged
from support.impostors import (
    CLEARTEXT,
    DEFAULT,
    DIRECT,
    HANG,
    LIE,
    MECHANISM,
    NOTHING,
    OK,
    PASSWORD,
    POSTGRES,
    PROOF,
    READY,
    STARTUP,
    Error,
    Misbehaviour,
    accept,
    check_refusal,
    endless,
    good_chain,
    good_context,
    hang_up,
    login_after,
    messages_of,
    refuse,
    reset,
    see,
    trickle,
)

import neon_async
from neon_async import (
    AuthenticationError,
    ConnectError,
    ConnectTimeoutError,
    EndpointNotFoundError,
    InvalidPasswordError,
    ProtocolError,
    TLSError,
    TooManyConnectionsError,
)
from neon_async.testing._impostor import (
    Conversation,
    Impostor,
    Script,
    authentication_request,
    error_response,
    message,
    play,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("young_garbage_only", "every_log_record")]

read = Conversation.read_message


@dataclass
class Scram:
    """The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), with faults of choice."""

    first: Callable[[bytes], bytes] = lambda nonce: b"r=%s,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096" % nonce
    final: Callable[[bytes], bytes] = lambda signature: b"v=" + base64.b64encode(signature)

    def challenge(self, conversation: Conversation) -> bytes:
        """Request SASL, read the client's first message, send the challenge; return both as they are signed."""
        conversation.send(SASL)
        _, body = conversation.read_message()
        client_first = body.partition(b",,")[2]  # the part that is signed
        server_first = self.first(client_first.partition(b",r=")[2] + b"0123456789abcdef")
        conversation.send(authentication_request(11, server_first))
        return client_first + b"," + server_first

    def exchange(self, conversation: Conversation) -> None:
        """Run the whole exchange, up to and including SASLFinal."""
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


def final(final: bytes | None = None) -> Script:
    return (Scram() if final is None else Scram(final=lambda _: final)).exchange


def at_login(
    id: str,  # noqa: A002  pytest's word
    steps: bytes | Script,
    error: Error = AuthenticationError,
    text: str = "",
    sends: tuple[str, ...] = STARTUP,
    *,
    silent: bool = False,
    hasty: bool = False,
) -> Misbehaviour:
    return Misbehaviour(id, login_after(accept(good_context), steps), error, text, sends, silent, hasty)


SASL = sasl(b"SCRAM-SHA-256")
FIRST, SALT = b"r=NONCE,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096", b"s=c2FsdHNhbHRzYWx0c2FsdA=="
WRONG = b"v=" + base64.b64encode(bytes(32))
FINAL = authentication_request(12, WRONG)
MIB, GIB = 2**20, 2**30
STATUS = message(b"S", b"is_superuser\0on\0")

AT_LOGIN = (
    # Another method than SCRAM
    at_login("cleartext", CLEARTEXT, text="cleartext"),
    at_login("md5", authentication_request(5, b"salt"), text="MD5"),
    at_login("trust", OK + READY, text="without authentication"),
    at_login("trust-and-silence", OK, text="without authentication"),
    at_login("kerberos-4", authentication_request(1), text="unknown authentication method 1"),
    at_login("kerberos-5", authentication_request(2), text="Kerberos"),
    at_login("crypt", authentication_request(4, b"xx"), text="unknown authentication method 4"),
    at_login("scm-credential", authentication_request(6), text="unknown authentication method 6"),
    at_login("gss", authentication_request(7), text="GSS"),
    at_login("gss-continue-first", authentication_request(8, b"token"), text="GSS"),
    at_login("sspi", authentication_request(9), text="SSPI"),
    at_login("unknown-method-13", authentication_request(13), text="unknown authentication method 13"),
    at_login("unknown-method-99", authentication_request(99), text="unknown authentication method 99"),
    at_login("method-of-all-ones", authentication_request(0xFFFFFFFF), text="unknown authentication method"),
    at_login("no-method-at-all", message(b"R"), ProtocolError),
    at_login("half-a-method", message(b"R", b"\0\0"), ProtocolError),
    at_login("only-plus", play(sasl(b"SCRAM-SHA-256-PLUS"), OK + READY), sends=MECHANISM, hasty=True),
    at_login("only-an-unknown-mechanism", sasl(b"OAUTHBEARER"), text="SCRAM-SHA-256"),
    at_login("only-an-older-mechanism", sasl(b"SCRAM-SHA-1"), text="SCRAM-SHA-256"),
    at_login("only-a-mechanism-that-starts-alike", sasl(b"SCRAM-SHA-256X"), text="SCRAM-SHA-256"),
    at_login("no-mechanism", sasl(), text="SCRAM-SHA-256"),
    at_login("no-mechanism-list", authentication_request(10), text="SCRAM-SHA-256"),
    # SCRAM out of order
    at_login("final-first", FINAL, text="SASL"),
    at_login("final-first-and-a-session-start", FINAL + OK + READY, text="SASL"),
    at_login("empty-final-first", authentication_request(12), text="SASL"),
    at_login("continue-first", authentication_request(11, FIRST), text="SASL"),
    at_login("empty-continue-first", authentication_request(11), text="SASL"),
    at_login("sasl-twice", SASL + SASL, text="SASL", sends=MECHANISM),
    at_login("session-start-after-sasl", SASL + OK + READY, text="SCRAM", sends=MECHANISM),
    at_login("final-after-sasl", SASL + FINAL, text="SASL", sends=MECHANISM),
    at_login("cleartext-after-sasl", SASL + CLEARTEXT, text="cleartext", sends=MECHANISM),
    at_login("md5-after-sasl", SASL + authentication_request(5, b"salt"), text="MD5", sends=MECHANISM),
    at_login("whole-exchange-at-once", SASL + authentication_request(11, FIRST) + FINAL + OK + READY, sends=MECHANISM),
    at_login("continue-twice", play(challenge(), read, authentication_request(11, FIRST)), text="SASL", sends=PROOF),
    at_login("session-start-without-final", play(challenge(), read, OK + READY), text="SCRAM", sends=PROOF),
    at_login("cleartext-after-the-proof", play(challenge(), read, CLEARTEXT), text="cleartext", sends=PROOF),
    at_login("final-twice", play(final(), FINAL), text="SASL", sends=PROOF),
    at_login("cleartext-after-final", play(final(), CLEARTEXT), text="cleartext", sends=PROOF),
    # SCRAM with a fault in it
    at_login("nonce-of-another", challenge(FIRST.replace(b"NONCE", b"abcdefghijklmnop")), sends=MECHANISM),
    at_login("nonce-of-another-and-on", play(challenge(b"r=abc," + SALT + b",i=4096"), FINAL + OK), sends=MECHANISM),
    at_login("empty-challenge", challenge(b""), sends=MECHANISM),
    at_login("empty-challenge-and-on", play(challenge(b""), FINAL + OK + READY), sends=MECHANISM),
    at_login("challenge-of-commas", challenge(b",,,,"), sends=MECHANISM),
    at_login("challenge-of-garbage", challenge(bytes(range(128, 256))), sends=MECHANISM),
    at_login("challenge-without-salt", challenge(b"r=NONCE,i=4096"), sends=MECHANISM),
    at_login("challenge-without-iterations", challenge(b"r=NONCE," + SALT), sends=MECHANISM),
    at_login("challenge-with-an-error", challenge(b"e=" + LIE.encode()), sends=MECHANISM),
    at_login("salt-that-is-not-base64", challenge(b"r=NONCE,s=a,i=4096"), sends=MECHANISM),
    at_login("iterations-that-are-no-number", challenge(b"r=NONCE," + SALT + b",i=many"), sends=MECHANISM),
    at_login("iterations-of-zero", challenge(b"r=NONCE," + SALT + b",i=0"), sends=MECHANISM),
    at_login("iterations-below-zero", challenge(b"r=NONCE," + SALT + b",i=-1"), sends=MECHANISM),
    at_login("wrong-signature", final(WRONG), sends=PROOF),
    at_login("wrong-signature-and-a-session-start", play(final(WRONG), OK + READY), sends=PROOF),
    at_login("empty-final", final(b""), sends=PROOF),
    at_login("empty-final-and-a-session-start", play(final(b""), OK + READY), sends=PROOF),
    at_login("final-of-garbage", final(bytes(range(128, 256))), sends=PROOF),
    at_login("final-that-is-not-base64", play(final(b"v=!"), OK + READY), sends=PROOF),
    at_login("final-with-an-error", final(b"e=invalid-proof"), sends=PROOF),
    # Messages that are not allowed here, or make no sense
    at_login("ready-at-once", READY, ProtocolError, "b'Z'"),
    at_login("parameter-status-at-once", STATUS, ProtocolError, "b'S'"),
    at_login("key-data-at-once", message(b"K", bytes(8)), ProtocolError, "b'K'"),
    at_login("row-at-once", message(b"D", b"\0\0"), ProtocolError, "b'D'"),
    at_login("copy-at-once", message(b"G", b"\0\0\0"), ProtocolError, "b'G'"),
    at_login("ready-after-sasl", SASL + READY, ProtocolError, "b'Z'", MECHANISM),
    at_login("parameter-status-after-the-proof", play(challenge(), read, STATUS), ProtocolError, "b'S'", PROOF),
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
    at_login(
        "length-of-0-after-the-proof", play(challenge(), read, message(b"R", length=0)), ProtocolError, sends=PROOF
    ),
    at_login("endless-notices", endless(message(b"N", b"SNOTICE\0M" + LIE.encode() + b"\0\0")), ProtocolError),
    at_login("endless-empty-notices", endless(message(b"N")), ProtocolError),
    # Errors
    at_login("wrong-password", error_response("password authentication failed for user 'alex'"), InvalidPasswordError),
    at_login(
        "wrong-password-after-the-proof",
        play(challenge(), read, error_response("password authentication failed for user 'alex'")),
        InvalidPasswordError,
        sends=PROOF,
    ),
    at_login("unknown-endpoint", error_response("The requested endpoint could not be found"), EndpointNotFoundError),
    at_login(
        "too-many-connections",
        play(final(), OK, error_response("sorry, too many clients already", code="53300")),
        TooManyConnectionsError,
        sends=PROOF,
    ),
    # Closing and silence
    at_login("close", hang_up, ConnectError),
    at_login("reset", reset, ConnectError),
    at_login("close-after-sasl", play(SASL, read, hang_up), ConnectError, sends=MECHANISM),
    at_login("close-after-the-proof", play(challenge(), read, hang_up), ConnectError, sends=PROOF),
    at_login("close-after-ok", play(final(), OK, hang_up), ConnectError, sends=PROOF),
    at_login("silence", play(), ConnectTimeoutError, "authentication", silent=True),
    at_login("silence-in-mid-message", SASL[:-1], ConnectTimeoutError, "authentication", silent=True),
    at_login("silence-after-sasl", SASL, ConnectTimeoutError, "authentication", MECHANISM, silent=True),
    at_login("silence-after-the-proof", challenge(), ConnectTimeoutError, "authentication", PROOF, silent=True),
    at_login("silence-after-final", final(), ConnectTimeoutError, "authentication", PROOF, silent=True),
    at_login("silence-after-ok", play(final(), OK), ConnectTimeoutError, sends=PROOF, silent=True),
    at_login("trickled-request", trickle(sasl(b"SCRAM-SHA-256", b"X" * 200)), ConnectTimeoutError, silent=True),
    at_login("trickled-notices", trickle(message(b"N") * 40), ConnectTimeoutError, silent=True),
)  # fmt: skip


@pytest.mark.parametrize("it", AT_LOGIN, ids=lambda it: it.id)
async def test_a_verified_server_that_cheats_at_login_is_refused(
    it: Misbehaviour, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse(it, DEFAULT, caplog)


# ---------------------------------------------------------------------------------------------------------------------
# Honest servers, and pools


def accept_login() -> Script:
    """Return the steps of a server that accepts the login, up to the first ReadyForQuery."""
    return play(final(), OK, message(b"S", b"server_version\x0017.0\x00"), message(b"K", bytes(8)), READY)


@pytest.mark.parametrize("negotiation", [DIRECT, POSTGRES, DEFAULT])
@pytest.mark.parametrize("notice", [b"", message(b"N", b"SNOTICE\0Mgood morning\0\0")], ids=["", "after-a-notice"])
async def test_the_same_server_is_accepted_where_it_is_honest(negotiation: str, notice: bytes) -> None:
    script = login_after(accept(good_context), notice, accept_login())
    async with Impostor(script, trust_anchor=good_chain().anchor, password=PASSWORD) as server, asyncio.timeout(HANG):
        keywords: dict[str, Any] = {} if negotiation == DEFAULT else {"sslnegotiation": negotiation}
        connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor, **keywords)
        connection.terminate()
        (conversation,) = await server.finish()
        assert messages_of(conversation) == (*PROOF, "Terminate")


def with_a_stolen_certificate() -> ForgedServer:
    return ForgedServer([issue(root()).der], scheme=ECDSA_P256)


@pytest.mark.parametrize("init_size", [0, 1], ids=["when-acquiring", "when-opening"])
@pytest.mark.parametrize(
    ("script", "error", "sends"),
    [
        pytest.param(play(see, b"N", hang_up), TLSError, NOTHING, id="no-tls"),
        pytest.param(forged(with_a_stolen_certificate), TLSError, NOTHING, id="stolen-certificate"),
        pytest.param(login_after(accept(good_context), CLEARTEXT), AuthenticationError, STARTUP, id="cleartext"),
        pytest.param(login_after(accept(good_context), FINAL), AuthenticationError, STARTUP, id="final-first"),
    ],
)
async def test_a_pool_refuses_impostors_as_a_single_connection_does(
    script: Script, error: Error, sends: tuple[str, ...], init_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with Impostor(script, trust_anchor=good_chain().anchor, password=PASSWORD) as impostor:
        pool = neon_async.create_pool(impostor.dsn, trust_anchor=impostor.trust_anchor, init_size=init_size)
        async with asyncio.timeout(HANG):
            with pytest.raises(error) as caught:  # noqa: PT012  both ways to meet the server
                await pool
                await pool.acquire()
            pool.terminate()
        await check_refusal(caught.value, impostor, sends, caplog)
