"""Servers with a good certificate that break the login are refused, and learn nothing about the password."""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass

import pytest
from support.impostors import endless
from support.logins import BOTH, OK, READY, SESSION_START, HonestServer, client_messages, honest_login, sasl
from support.probes import assert_secret_free, until
from support.verified_servers import BINDING, PASSWORD, connect_to, error_from, final, record_pbkdf2, verified_server

from neon_async import AuthenticationError, ConnectError, ProtocolError
from neon_async.testing._impostor import (
    Conversation,
    Script,
    authentication_request,
    error_response,
    message,
)

pytestmark = pytest.mark.anyio

SALT = base64.b64encode(HonestServer.salt).decode()


def right(signature: bytes) -> bytes:
    return b"v=" + base64.b64encode(signature)


STARTUP = ["StartupMessage"]
INITIAL = [*STARTUP, "SASLInitialResponse"]
PROOF = [*INITIAL, "SASLResponse"]
LIE = "call 555-0199 to unlock this database"


@dataclass(frozen=True)
class Refused:
    """What a server does after the StartupMessage, the error that the client must raise, and what it sends before."""

    id: str
    steps: tuple[bytes | Script, ...]
    sends: list[str]
    error: type[Exception] = AuthenticationError
    text: str = ""


def refused(
    id: str,  # noqa: A002  pytest's word
    *steps: bytes | Script,
    sends: list[str] = STARTUP,
    error: type[Exception] = AuthenticationError,
    text: str = "",
) -> Refused:
    return Refused(id, steps, sends, error, text)


def challenge(text: str) -> Script:
    """Return a step that offers SCRAM and sends the challenge `text`, in which NONCE stands for the client's nonce."""

    def step(conversation: Conversation) -> None:
        conversation.send(sasl(*BOTH))
        nonce = conversation.read_message()[1].rpartition(b"r=")[2]
        conversation.send(authentication_request(11, text.encode().replace(b"NONCE", nonce)))

    return step


CLEARTEXT = authentication_request(3)
read, hang_up = Conversation.read_message, Conversation.hang_up
METHODS = {1: "unknown", 2: "Kerberos", 3: "cleartext", 5: "MD5", 6: "unknown", 7: "GSS", 8: "GSS", 9: "SSPI"}
GOOD = "r=NONCE+,s=" + SALT + ",i=4096"

REFUSALS = (
    *(refused(f"method-{code}", authentication_request(code, b"salt"), text=text) for code, text in METHODS.items()),
    *(refused(f"method-{code}", authentication_request(code), text="unknown") for code in (4, 13, 99, 2**32 - 1)),
    refused("trust", OK + SESSION_START, text="without authentication"),
    refused("no-offer", sasl(), text="offers neither"),
    refused("other-offers", sasl("SCRAM-SHA-1", "SCRAM-SHA-512-PLUS", "OAUTHBEARER"), text="offers neither"),
    refused("offer-that-is-not-text", authentication_request(10, b"\xff\xfe\0\0"), text="offers neither"),
    # Out of order
    refused("challenge-first", authentication_request(11, GOOD.encode())),
    refused("final-first", authentication_request(12, b"v=" + SALT.encode()) + OK + SESSION_START),
    refused("two-offers", sasl(*BOTH), sasl(*BOTH), sends=INITIAL),
    refused("session-start-after-the-offer", sasl(*BOTH) + OK + SESSION_START, sends=INITIAL),
    refused("final-after-the-offer", sasl(*BOTH) + authentication_request(12, b"v=AAAA"), sends=INITIAL),
    refused("cleartext-after-the-offer", sasl(*BOTH) + CLEARTEXT, sends=INITIAL, text="cleartext"),
    refused("md5-after-the-offer", sasl(*BOTH) + authentication_request(5, b"salt"), sends=INITIAL, text="MD5"),
    refused("two-challenges", challenge(GOOD), read, authentication_request(11, GOOD.encode()), sends=PROOF),
    refused(
        "session-start-after-the-challenge",
        *(challenge(GOOD), read, OK + SESSION_START),
        sends=PROOF,
        text="without authentication",
    ),
    refused("cleartext-after-the-challenge", challenge(GOOD), read, CLEARTEXT, sends=PROOF, text="cleartext"),
    refused("two-finals", final(lambda data: data + data), sends=PROOF),
    refused("cleartext-after-the-final", final(lambda data: data + CLEARTEXT), sends=PROOF, text="cleartext"),
    refused("offer-after-the-final", final(lambda data: data + sasl(*BOTH)), sends=PROOF, text="again"),
    # A fault in the exchange
    refused("4095-iterations", challenge(f"r=NONCE+,s={SALT},i=4095"), sends=INITIAL),
    refused("1000001-iterations", challenge(f"r=NONCE+,s={SALT},i=1000001"), sends=INITIAL, text="1,000,001"),
    refused("8000000-iterations", challenge(f"r=NONCE+,s={SALT},i=8000000"), sends=INITIAL, text="8,000,000"),
    refused("2-to-the-31-iterations", challenge(f"r=NONCE+,s={SALT},i=2147483647"), sends=INITIAL),
    refused("nonce-equal-to-ours", challenge(f"r=NONCE,s={SALT},i=4096"), sends=INITIAL),
    refused("another-nonce", challenge(f"r=abcdefghijklmnopqrstuvwx,s={SALT},i=4096"), sends=INITIAL),
    refused("extension", challenge("m=x," + GOOD), sends=INITIAL),
    refused("empty-challenge", challenge(""), sends=INITIAL),
    refused("challenge-that-accuses", challenge(f"e={LIE}"), sends=INITIAL),
    refused("no-signature", final(lambda _: authentication_request(12)), sends=PROOF),
    refused(
        "no-signature-and-a-session-start",
        final(lambda _: authentication_request(12) + OK + SESSION_START),
        sends=PROOF,
    ),
    refused(
        "wrong-signature-and-a-session-start",
        final(lambda _: authentication_request(12, right(bytes(32))) + OK + SESSION_START),
        sends=PROOF,
        text="signature",
    ),
    refused("final-that-accuses", final(lambda _: authentication_request(12, b"e=invalid-proof")), sends=PROOF),
    # Too much, too long, or meaningless
    refused("over-8-kb", authentication_request(10, bytes(8185)), error=ProtocolError, text="8193 bytes"),
    refused("error-over-8-kb", error_response("x" * 9000), error=ProtocolError),
    refused("challenge-over-8-kb", challenge(GOOD + ",x=" + "y" * 9000), sends=INITIAL, error=ProtocolError),
    refused("final-over-8-kb", final(lambda _: message(b"R", bytes(9000))), sends=PROOF, error=ProtocolError),
    refused("2-gib", message(b"R", length=2**31 - 1), error=ProtocolError),
    refused("less-than-nothing", message(b"R", length=-1), error=ProtocolError),
    refused("endless-notices", endless(message(b"N", b"M" + LIE.encode() + b"\0\0")), error=ProtocolError),
    refused("17-notices", message(b"N") * 17, error=ProtocolError),
    refused("ready-after-the-offer", sasl(*BOTH) + READY, sends=INITIAL, error=ProtocolError),
    refused("half-a-code", message(b"R", b"\0\0"), error=ProtocolError),
    refused("hangs-up-after-the-offer", sasl(*BOTH), read, hang_up, sends=INITIAL, error=ConnectError),
    refused("hangs-up-after-the-challenge", challenge(GOOD), read, hang_up, sends=PROOF, error=ConnectError),
    refused("hangs-up-after-the-final", final(bytes), hang_up, sends=PROOF, error=ConnectError),
    refused("hangs-up-after-ok", final(lambda it: it + OK), hang_up, sends=PROOF, error=ConnectError),
)  # fmt: skip


@pytest.fixture
def pbkdf2(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The thread and the iteration count of every PBKDF2."""
    return record_pbkdf2(monkeypatch)


@pytest.mark.parametrize("it", REFUSALS, ids=lambda it: it.id)
async def test_a_server_that_breaks_the_login_is_refused(it: Refused, pbkdf2: list[tuple[int, int]]) -> None:
    async with verified_server(*it.steps) as server:
        error = await error_from(server)
        assert type(error) is it.error, error
        assert it.text in str(error)
        assert LIE not in str(error)
        assert server.host in str(error)
        assert_secret_free(error, PASSWORD)
        conversations = await server.finish()
    assert [client_messages(one.decrypted) for one in conversations] == [it.sends]
    assert all(one.closed_by_client for one in conversations)
    everything = b"".join(bytes(one.wire + one.decrypted) for one in conversations)
    assert PASSWORD.encode() not in everything
    # Nothing is derived from the password before a valid challenge, and then only in a thread.
    assert len(pbkdf2) == (1 if it.sends == PROOF else 0)
    assert threading.get_ident() not in [thread for thread, _ in pbkdf2]


# ---------------------------------------------------------------------------------------------------------------------
# After AuthenticationOk


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(authentication_request(3), id="cleartext"),
        pytest.param(authentication_request(10, b"SCRAM-SHA-256\0\0"), id="SASL again"),
        pytest.param(authentication_request(11, b"v=AAAA"), id="SASLContinue, which crashes asyncpg"),
        pytest.param(authentication_request(12, b"v=AAAA"), id="SASLFinal, which crashes asyncpg"),
        pytest.param(OK, id="AuthenticationOk again"),
        pytest.param(message(b"D", b"\0\0"), id="DataRow"),
        pytest.param(message(b"S", b"TimeZone\0UTC"), id="ParameterStatus without its end"),
        pytest.param(message(b"S", b"TimeZone\0"), id="ParameterStatus without a value"),
        pytest.param(message(b"K", b"\0\0\0\1"), id="BackendKeyData cut short"),
        pytest.param(message(b"N"), id="NoticeResponse that is empty"),
        pytest.param(message(b"N", b"Mtext\0"), id="NoticeResponse without its end"),
        pytest.param(message(b"Z"), id="ReadyForQuery without a state"),
        pytest.param(message(b"Z", b"T"), id="ReadyForQuery in a transaction"),
        pytest.param(message(b"D", bytes(100_000)), id="DataRow of 100 kB"),
    ],
)
async def test_a_message_that_may_not_follow_the_login_is_refused(body: bytes) -> None:
    script = honest_login(PASSWORD, binding=BINDING, last=OK + body + SESSION_START)
    async with verified_server(script) as server:
        with pytest.raises(ProtocolError, match="after the login"):
            await connect_to(server)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(message(b"N", length=2**31 - 1), id="a notice of 2 GiB"),
        pytest.param(message(b"N", length=(4 << 20) + 1), id="a notice of one byte too many"),
        pytest.param(endless(message(b"N", b"M" + LIE.encode() * 1000 + b"\0\0")), id="endless notices"),
    ],
)
async def test_what_a_server_sends_after_the_login_has_a_limit(body: bytes | Script) -> None:
    script = honest_login(PASSWORD, binding=BINDING, last=OK + (body if isinstance(body, bytes) else b""))
    async with verified_server(script, *([] if isinstance(body, bytes) else [body])) as server:
        with pytest.raises(ProtocolError, match="4194304"):
            await connect_to(server)


async def test_a_server_that_ends_the_exchange_before_our_proof_is_refused() -> None:
    def hasty(conversation: Conversation) -> None:
        """Send the whole exchange at once, with a signature that cannot be computed before our proof."""
        server = HonestServer(PASSWORD, binding=BINDING)
        conversation.send(sasl(*BOTH))
        challenge = server.challenge(conversation.read_message()[1])
        conversation.send(challenge + authentication_request(12, b"v=" + b"A" * 43 + b"=") + OK + SESSION_START)

    async with verified_server(hasty) as server:
        with pytest.raises(ProtocolError, match="before the client's message"):
            await connect_to(server)
        (conversation,) = await server.finish()
        assert client_messages(conversation.decrypted)[-1] != "SASLResponse"


async def test_a_connection_that_ends_with_the_login_is_refused_or_reported_as_closed() -> None:
    """The server accepts the login and closes the connection in the same moment."""
    script = honest_login(PASSWORD, binding=BINDING)

    def accept_and_leave(conversation: Conversation) -> None:
        script(conversation)
        conversation.hang_up()

    async with verified_server(accept_and_leave) as server:
        try:
            connection = await connect_to(server)
        except ConnectError:
            return
        # The login was complete before the end arrived: then asyncpg learns of it.
        await until(connection.is_closed)
