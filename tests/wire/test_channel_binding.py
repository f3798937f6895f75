"""Channel binding against a real PostgreSQL 17: it is used, and it finds out a man in the middle; and what later dials
save once the mechanism is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
from anyio.from_thread import start_blocking_portal
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from support.probes import HANG, assert_secret_free, until
from support.relays import (
    OK,
    PLAIN,
    PLUS,
    WELCOME,
    Honest,
    Interceptor,
    Message,
    Signed,
    client_messages,
    honest,
    in_turn,
    present_to_clients,
    rsa_key,
    sasl,
    signed,
)

import neon_async
from neon_async._driver import connector as _connect
from neon_async._errors import (
    AuthenticationError,
    ChannelBindingError,
    DatabaseNotFoundError,
    EndpointDisabledError,
    InsecureConfigurationError,
    InvalidPasswordError,
    NeonAsyncError,
    ProtocolError,
)
from neon_async._wire.scram import binding_data
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

pytestmark = pytest.mark.anyio

PASSWORD = "correct-horse-battery-staple"
BOTH = [PLUS, PLAIN]
NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["direct", "postgres"])
MODES = pytest.mark.parametrize("channel_binding", [None, "prefer", "require"], ids=["default", "prefer", "require"])


def mode(channel_binding: str | None) -> dict[str, Any]:
    return {} if channel_binding is None else {"channel_binding": channel_binding}


# ---------------------------------------------------------------------------------------------------------------------
# A real server, under certificates of every kind

ECDSA = ec.generate_private_key(ec.SECP256R1())
CERTIFICATES = {
    "rsa-sha256": lambda: signed(rsa_key(), hashes.SHA256(), leaf_key=rsa_key()),
    "rsa-sha384": lambda: signed(rsa_key(), hashes.SHA384(), leaf_key=rsa_key()),
    "rsa-sha512": lambda: signed(rsa_key(), hashes.SHA512(), leaf_key=rsa_key()),
    "rsa-pss-sha256": lambda: signed(rsa_key(), hashes.SHA256(), pss=True, leaf_key=rsa_key()),
    "ecdsa-sha256": lambda: signed(ECDSA, hashes.SHA256()),
    "ecdsa-sha384": lambda: signed(ECDSA, hashes.SHA384()),
    "ecdsa-sha512": lambda: signed(ECDSA, hashes.SHA512()),
}


class Server:
    """A real server that can be shown under any certificate."""

    def __init__(self, postgres: LocalPostgres, admin: psycopg.Connection[Any]) -> None:
        self.port = postgres.port
        self.dsn = postgres.dsn
        self._postgres = postgres
        self._admin = admin
        self._presented: Signed | None = None

    def present(self, certificate: Signed) -> None:
        """Present `certificate` from now on."""
        if certificate is not self._presented:
            present_to_clients(self._postgres, self._admin, certificate)
            self._presented = certificate


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_bin_dir: str | None) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("anchor") / "root.pem"
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(LocalPostgres(postgres_bin_dir)) as postgres,
    ):
        path.write_bytes(postgres.trust_anchor)
        dsn = f"{postgres.dsn}&sslmode=verify-full&sslrootcert={path}"
        with psycopg.connect(dsn, autocommit=True) as admin:
            yield Server(postgres, admin)


@pytest.fixture(scope="module")
def certificate() -> Signed:
    """The server's certificate wherever it does not matter which."""
    return signed(ECDSA, hashes.SHA256())


@contextlib.asynccontextmanager
async def connected(dsn: str, anchor: bytes, **keywords: Any) -> AsyncIterator[asyncpg.Connection[Any]]:
    async with asyncio.timeout(HANG):
        connection = await neon_async.connect(dsn, trust_anchor=anchor, **keywords)
    try:
        yield connection
    finally:
        connection.terminate()


@NEGOTIATIONS
@pytest.mark.parametrize("kind", CERTIFICATES)
async def test_the_login_is_bound_under_every_certificate(server: Server, kind: str, negotiation: str) -> None:
    certificate = CERTIFICATES[kind]()
    server.present(certificate)
    async with connected(server.dsn, certificate.anchor, sslnegotiation=negotiation) as connection:
        report = neon_async.connection_tls_report(connection)
        assert (report.mechanism, report.negotiation) == (PLUS, negotiation)
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    # A witness who holds the server's own key sees the same: what is sent is PLUS, and the server lets us in.
    direct = negotiation == "direct"
    async with Interceptor(server.port, certificate, direct=direct) as witness:
        async with connected(
            witness.dsn(server.dsn), certificate.anchor, sslnegotiation=negotiation, channel_binding="require"
        ) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        ((_, offer, first, *_),) = witness.connections
    assert offer.body == sasl(*BOTH)[5:]
    assert first.body.startswith(PLUS.encode() + b"\0")
    assert b"p=tls-server-end-point,,n=*,r=" in first.body


@MODES
async def test_a_certificate_whose_signature_has_no_hash_cannot_be_bound_and_is_refused(
    server: Server, channel_binding: str | None
) -> None:
    certificate = signed(ed25519.Ed25519PrivateKey.generate(), None)
    server.present(certificate)  # PostgreSQL offers PLUS all the same
    with pytest.raises(ChannelBindingError, match="signature of its certificate has no hash"):
        await neon_async.connect(server.dsn, trust_anchor=certificate.anchor, **mode(channel_binding))


# ---------------------------------------------------------------------------------------------------------------------
# The man in the middle


async def by_us(interceptor: Interceptor, dsn: str, anchor: bytes, **keywords: Any) -> None:
    negotiation = "direct" if interceptor.direct else "postgres"
    async with connected(interceptor.dsn(dsn), anchor, sslnegotiation=negotiation, **keywords) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def by_a_pool(interceptor: Interceptor, dsn: str, anchor: bytes, **keywords: Any) -> None:
    negotiation: Any = "direct" if interceptor.direct else "postgres"
    async with neon_async.create_pool(
        interceptor.dsn(dsn), trust_anchor=anchor, sslnegotiation=negotiation, **keywords
    ) as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def by_asyncpg(interceptor: Interceptor, dsn: str, anchor: bytes) -> None:
    """Connect with asyncpg and all the verification that there is."""
    context = ssl.create_default_context(cadata=anchor.decode())
    context.set_alpn_protocols(["postgresql"])
    user, _, rest = dsn.removeprefix("postgresql://").partition(":")
    connection = await asyncpg.connect(
        host="localhost",
        port=interceptor.port,
        user=user,
        password=rest.partition("@")[0],
        database="neondb",
        ssl=context,
        direct_tls=interceptor.direct,
        timeout=HANG,
    )
    try:
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        connection.terminate()


Client = Callable[..., Any]


@NEGOTIATIONS
@pytest.mark.parametrize(
    ("client", "keywords", "refuses"),
    [
        pytest.param(by_us, {}, True, id="ours-by-default"),
        pytest.param(by_us, {"channel_binding": "prefer"}, True, id="ours-prefer"),
        pytest.param(by_us, {"channel_binding": "require"}, True, id="ours-require"),
        pytest.param(by_a_pool, {}, True, id="our-pool-by-default"),
        pytest.param(by_a_pool, {"channel_binding": "require"}, True, id="our-pool-require"),
        pytest.param(by_asyncpg, {}, False, id="asyncpg-verified"),
    ],
)
async def test_a_man_in_the_middle_with_a_certificate_of_the_same_ca_is_found_out(
    server: Server, negotiation: str, client: Client, keywords: dict[str, Any], refuses: bool
) -> None:
    genuine = signed(ECDSA, hashes.SHA256())
    stolen = genuine.another()
    assert (stolen.anchor, stolen.der == genuine.der) == (genuine.anchor, False)
    server.present(genuine)
    async with Interceptor(server.port, stolen, direct=negotiation == "direct") as interceptor:
        if not refuses:
            await client(interceptor, server.dsn, genuine.anchor, **keywords)
            return
        with pytest.raises(ChannelBindingError, match="SCRAM channel binding check failed") as caught:
            await client(interceptor, server.dsn, genuine.anchor, **keywords)
        assert_secret_free(caught.value, password_of(server.dsn))
        assert len(interceptor.connections) == 1


def password_of(dsn: str) -> str:
    return dsn.partition("://")[2].partition(":")[2].partition("@")[0]


def without_plus(it: Message) -> bytes:
    """Take PLUS out of the server's offer."""
    return it.body.replace(PLUS.encode() + b"\0", b"")


def only_plus(it: Message) -> bytes:
    return it.body.replace(b"\0" + PLAIN.encode() + b"\0", b"\0")


@NEGOTIATIONS
@pytest.mark.parametrize(
    ("client", "keywords", "says"),
    [
        pytest.param(by_us, {}, "SCRAM channel binding negotiation error", id="ours-by-default"),
        pytest.param(by_us, {"channel_binding": "prefer"}, "channel binding negotiation error", id="ours-prefer"),
        pytest.param(by_us, {"channel_binding": "require"}, f"does not offer {PLUS}", id="ours-require"),
        pytest.param(by_asyncpg, {}, None, id="asyncpg-verified"),
    ],
)
@pytest.mark.parametrize("whose", ["servers-own", "another"])
async def test_an_offer_without_plus_where_the_server_made_one_is_found_out(
    server: Server,
    certificate: Signed,
    negotiation: str,
    client: Client,
    keywords: dict[str, Any],
    says: str,
    whose: str,
) -> None:
    server.present(certificate)
    shown = certificate if whose == "servers-own" else certificate.another()
    direct = negotiation == "direct"
    async with Interceptor(server.port, shown, direct=direct, rewrite=without_plus) as interceptor:
        if says is None:
            await client(interceptor, server.dsn, certificate.anchor, **keywords)
            return
        with pytest.raises(ChannelBindingError, match=says) as caught:
            await client(interceptor, server.dsn, certificate.anchor, **keywords)
        assert_secret_free(caught.value, password_of(server.dsn))
        (messages,) = interceptor.connections
    sent = [one.body for one in messages if one.sender == "client"]
    if "require" in keywords.values():
        assert len(sent) == 1  # the StartupMessage
    else:
        assert len(sent) == 2
        assert b"y,,n=*,r=" in sent[1]  # we could bind; had the server known, it would have offered


async def test_an_offer_of_plus_alone_is_enough(server: Server, certificate: Signed) -> None:
    server.present(certificate)
    async with Interceptor(server.port, certificate, rewrite=only_plus) as interceptor:
        await by_us(interceptor, server.dsn, certificate.anchor)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for, and where


def impostor(*steps: bytes | Script, shown: Signed) -> Impostor:
    script = login(server_context(shown.chain), *steps)
    return Impostor(script, trust_anchor=shown.anchor, password=PASSWORD)


SOURCES = ["keyword", "dsn", "environment"]


def said_in(source: str, value: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Return what to add to the DSN, and the keywords, so that `channel_binding` is `value`."""
    if source == "environment":
        monkeypatch.setenv("PGCHANNELBINDING", value)
    return (f"&channel_binding={value}" if source == "dsn" else "", mode(value) if source == "keyword" else {})


@pytest.mark.parametrize("source", SOURCES)
async def test_channel_binding_is_required_wherever_that_is_said(
    certificate: Signed, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with impostor(honest(PASSWORD, offer=[PLAIN]), shown=certificate) as server:
        in_dsn, keywords = said_in(source, "require", monkeypatch)
        with pytest.raises(ChannelBindingError, match=f"does not offer {PLUS}"):
            await neon_async.connect(server.dsn + in_dsn, trust_anchor=server.trust_anchor, **keywords)
        (conversation,) = await server.finish()
    assert client_messages(conversation.decrypted) == ["StartupMessage"]


@pytest.mark.parametrize("source", SOURCES)
async def test_a_server_that_never_offered_plus_is_used_under_prefer(
    certificate: Signed, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with impostor(honest(PASSWORD, offer=[PLAIN]), shown=certificate) as server:
        in_dsn, keywords = said_in(source, "prefer", monkeypatch)
        async with connected(server.dsn + in_dsn, certificate.anchor, **keywords) as connection:
            assert neon_async.connection_tls_report(connection).mechanism == PLAIN


@pytest.mark.parametrize("source", SOURCES)
def test_channel_binding_cannot_be_switched_off(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_dsn, keywords = said_in(source, "disable", monkeypatch)
    with pytest.raises(InsecureConfigurationError, match="channel_binding"):
        neon_async.create_pool(
            f"postgresql://alex:{PASSWORD}@db.example.com/neondb?sslmode=verify-full{in_dsn}", **keywords
        )


@pytest.mark.parametrize("given", ["required", "Require ", "", "1"])
def test_a_word_that_libpq_does_not_know_is_refused(given: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match="channel_binding"):
        neon_async.create_pool(f"postgresql://alex:{PASSWORD}@db.example.com/neondb", channel_binding=given)  # type: ignore[call-overload,unused-ignore]


@MODES
@pytest.mark.parametrize(
    ("offer", "accepted"),
    [
        pytest.param([PLAIN], True, id="plain-alone"),
        pytest.param(BOTH, False, id="both"),
        pytest.param([PLUS], False, id="plus-alone"),
    ],
)
async def test_a_certificate_without_a_hash_is_used_only_where_nobody_wants_a_binding(
    channel_binding: str | None, offer: list[str], accepted: bool
) -> None:
    shown = signed(ed25519.Ed25519PrivateKey.generate(), None)
    async with impostor(honest(PASSWORD, offer=offer, binding=b"some hash"), shown=shown) as server:
        if accepted and channel_binding != "require":
            async with connected(server.dsn, shown.anchor, **mode(channel_binding)) as connection:
                assert neon_async.connection_tls_report(connection).mechanism == PLAIN
            (conversation,) = await server.finish()
            assert b"n,,n=*,r=" in conversation.decrypted
            return
        with pytest.raises(ChannelBindingError, match="signature of its certificate has no hash") as caught:
            await neon_async.connect(server.dsn, trust_anchor=shown.anchor, **mode(channel_binding))
        assert_secret_free(caught.value, PASSWORD)
        (conversation,) = await server.finish()
    assert client_messages(conversation.decrypted) == ["StartupMessage"]


# ---------------------------------------------------------------------------------------------------------------------
# Later dials


@NEGOTIATIONS
async def test_every_dial_but_the_first_takes_one_round_trip_less(
    server: Server, certificate: Signed, negotiation: str
) -> None:
    server.present(certificate)
    direct = negotiation == "direct"
    async with Interceptor(server.port, certificate, direct=direct) as witness:
        connector = _connect.prepare(
            witness.dsn(server.dsn), trust_anchor=certificate.anchor, sslnegotiation=negotiation
        )
        for _ in range(3):
            (await connector.connect()).terminate()
        first, *later = witness.round_trips
        assert later == [first - 1] * 2
        for number, messages in enumerate(witness.connections):
            senders = [one.sender for one in messages[:3]]
            assert senders == (["client", "server", "client"] if number == 0 else ["client", "client", "server"])
            opening = b"".join(one.body for one in messages[:2] if one.sender == "client")
            assert opening.count(b",r=") == (0 if number == 0 else 1)
            assert b"p=" not in opening.replace(b"p=tls-server-end-point", b"")  # no proof
            assert password_of(server.dsn).encode() not in b"".join(one.body for one in messages)


async def test_a_pool_remembers_the_mechanism(server: Server, certificate: Signed) -> None:
    server.present(certificate)
    async with Interceptor(server.port, certificate) as witness:
        pool = neon_async.create_pool(
            witness.dsn(server.dsn), trust_anchor=certificate.anchor, init_size=3, min_size=0, max_size=3
        )
        async with pool:
            report = pool.tls_report()
            assert report is not None
            assert report.mechanism == PLUS
            await pool.expire_connections()
            assert await pool.fetchval("SELECT 1") == 1
        first, *later = witness.round_trips
        assert later == [first - 1] * 3


@contextlib.asynccontextmanager
async def dialled_once(certificate: Signed, *then: Script, **keywords: Any) -> AsyncIterator[tuple[Any, Impostor]]:
    """Yield a connector that has been let in once with PLUS, and its server, which goes on with `then`, each a dial."""
    context = server_context(certificate.chain)
    scripts = [login(context, script) for script in (let_in(BOTH, certificate), *then)]
    async with Impostor(in_turn(*scripts), trust_anchor=certificate.anchor, password=PASSWORD) as server:
        connector = _connect.prepare(server.dsn, trust_anchor=certificate.anchor, **keywords)
        await dial(connector)
        yield connector, server


async def dial(connector: Any) -> str:
    """Connect, and return the mechanism used."""
    async with asyncio.timeout(HANG):
        (await connector.connect()).terminate()
    return str(connector.tls_report.mechanism)


def let_in(offer: list[str], certificate: Signed, password: str = PASSWORD) -> Script:
    return honest(password, offer=offer, binding=binding_data(certificate.der))


def heard(server: Impostor) -> list[list[str]]:
    """Return what each connection's client has said until it was let in or gave up."""
    return [[name for name in client_messages(one.decrypted) if name != "Terminate"] for one in server.conversations]


CLEARTEXT = authentication_request(3)
WHOLE = ["StartupMessage", "SASLInitialResponse", "SASLResponse"]


async def test_a_server_that_changes_the_mechanism_and_back_gets_one_retry_each_time(certificate: Signed) -> None:
    only_plain, both = let_in([PLAIN], certificate), let_in(BOTH, certificate)
    async with dialled_once(certificate, only_plain, only_plain, only_plain, both, both, both) as (connector, server):
        mechanisms, connections = [], []
        for _ in range(4):
            before = server.connections
            mechanisms.append(await dial(connector))
            connections.append(server.connections - before)
        await server.finish()
        assert mechanisms == [PLAIN, PLAIN, PLUS, PLUS]
        assert connections == [2, 1, 2, 1]
        assert heard(server) == [WHOLE, WHOLE[:2], WHOLE, WHOLE, WHOLE[:2], WHOLE, WHOLE]


async def test_plus_that_is_gone_is_refused_after_one_retry_under_require(certificate: Signed) -> None:
    async with dialled_once(certificate, let_in([PLAIN], certificate), channel_binding="require") as (
        connector,
        server,
    ):
        with pytest.raises(ChannelBindingError, match=f"does not offer {PLUS}"):
            await dial(connector)
        await server.finish()
        assert heard(server) == [WHOLE, WHOLE[:2], WHOLE[:1]]


OTHERWISE = {
    "cleartext": play(CLEARTEXT),
    "md5": play(authentication_request(5, b"salt")),
    "trust": play(authentication_request(0)),
    "nothing-we-know": play(sasl("OAUTHBEARER")),
    "error-behind-the-offer": play(sasl(*BOTH), error_response("malformed SCRAM message", code="08P01")),
    "cleartext-behind-the-offer": play(sasl(*BOTH), CLEARTEXT),
    "a-second-offer": play(sasl(*BOTH), sasl(*BOTH)),
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
async def test_a_server_that_asks_for_something_else_once_gets_one_clean_retry(
    certificate: Signed, otherwise: str
) -> None:
    async with dialled_once(certificate, OTHERWISE[otherwise], let_in(BOTH, certificate)) as (connector, server):
        assert await dial(connector) == PLUS
        await server.finish()
        assert heard(server) == [WHOLE, WHOLE[:2], WHOLE]
        assert server.conversations[1].closed_by_client


@pytest.mark.parametrize("otherwise", OTHERWISE)
async def test_a_server_that_goes_on_to_ask_for_something_else_is_refused_after_one_retry(
    certificate: Signed, otherwise: str
) -> None:
    async with dialled_once(certificate, OTHERWISE[otherwise]) as (connector, server):
        with pytest.raises((NeonAsyncError, asyncpg.PostgresError)) as caught:
            await dial(connector)
        assert not type(caught.value).__name__.startswith("ServerAsks")
        assert_secret_free(caught.value, PASSWORD)
        await server.finish()
        assert len(heard(server)) == 3
        assert "SASLResponse" not in heard(server)[1] + heard(server)[2]
        assert PASSWORD.encode() not in b"".join(bytes(one.wire + one.decrypted) for one in server.conversations)


async def test_after_a_retry_that_failed_the_next_dial_waits_to_be_asked(certificate: Signed) -> None:
    async with dialled_once(certificate, OTHERWISE["cleartext"]) as (connector, server):
        for expected in (3, 4):
            with pytest.raises(AuthenticationError, match="cleartext"):
                await dial(connector)
            assert server.connections == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(error_response("endpoint is disabled"), EndpointDisabledError, id="endpoint"),
        pytest.param(error_response("password authentication failed for user 'alex'"), InvalidPasswordError, id="user"),
        pytest.param(error_response("permission denied", code="42501"), asyncpg.InsufficientPrivilegeError, id="other"),
    ],
)
async def test_an_error_in_place_of_the_offer_gets_no_retry(
    certificate: Signed, error: bytes, kind: type[Exception]
) -> None:
    async with dialled_once(certificate, play(error)) as (connector, server):
        with pytest.raises(kind):
            await dial(connector)
        assert server.connections == 2


async def test_a_wrong_password_on_a_later_dial_gets_no_retry(certificate: Signed) -> None:
    def reject(conversation: Conversation) -> None:
        server = Honest("another password", binding=binding_data(certificate.der))
        conversation.send(sasl(*BOTH))
        conversation.send(server.challenge(conversation.read_message()[1]))
        conversation.read_message()
        conversation.send(error_response("password authentication failed for user 'alex'", code="28P01"))

    async with dialled_once(certificate, reject) as (connector, server):
        with pytest.raises(InvalidPasswordError):
            await dial(connector)
        await server.finish()
        assert heard(server) == [WHOLE, WHOLE]


async def test_a_certificate_renewed_between_two_dials_is_bound_to_anew(server: Server, certificate: Signed) -> None:
    server.present(certificate)
    connector = _connect.prepare(server.dsn, trust_anchor=certificate.anchor)
    assert await dial(connector) == PLUS
    server.present(certificate.another())
    assert await dial(connector) == PLUS


# ---------------------------------------------------------------------------------------------------------------------
# Behind AuthenticationOk


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(authentication_request(3), id="cleartext"),
        pytest.param(authentication_request(10, b"SCRAM-SHA-256\0\0"), id="SASL once more"),
        pytest.param(authentication_request(11, b"v=AAAA"), id="SASLContinue, which crashes asyncpg"),
        pytest.param(authentication_request(12, b"v=AAAA"), id="SASLFinal, which crashes asyncpg"),
        pytest.param(OK, id="AuthenticationOk once more"),
        pytest.param(message(b"D", b"\0\0"), id="DataRow"),
        pytest.param(message(b"S", b"TimeZone\0UTC"), id="ParameterStatus without its end"),
        pytest.param(message(b"S", b"TimeZone\0"), id="ParameterStatus without a value"),
        pytest.param(message(b"K", b"\0\0\0\1"), id="BackendKeyData cut short"),
        pytest.param(message(b"N"), id="NoticeResponse that is empty"),
        pytest.param(message(b"N", b"Mtext\0"), id="NoticeResponse without its end"),
        pytest.param(message(b"Z"), id="ReadyForQuery without a state"),
        pytest.param(message(b"Z", b"T"), id="ReadyForQuery in a transaction"),
    ],
)
async def test_nothing_but_the_sessions_settings_may_stand_behind_the_login(certificate: Signed, body: bytes) -> None:
    script = honest(PASSWORD, binding=binding_data(certificate.der), last=OK + body + WELCOME)
    async with impostor(script, shown=certificate) as server:
        with pytest.raises(ProtocolError, match="behind the login"):
            async with asyncio.timeout(HANG):
                await neon_async.connect(server.dsn, trust_anchor=certificate.anchor)


async def test_an_error_behind_the_login_arrives_under_its_name(certificate: Signed) -> None:
    refusal = error_response('database "nope" does not exist')
    script = honest(PASSWORD, binding=binding_data(certificate.der), last=OK + refusal)
    async with impostor(script, shown=certificate) as server:
        with pytest.raises(DatabaseNotFoundError, match="nope"):
            await neon_async.connect(server.dsn, trust_anchor=certificate.anchor)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(message(b"S", b"client_encoding\0NOSUCH\0"), id="an encoding that nobody knows"),
        pytest.param(message(b"S", b"TimeZone\0\xff\0"), id="a setting that is not UTF-8"),
    ],
)
async def test_settings_that_asyncpg_cannot_read_are_an_error_of_ours(certificate: Signed, body: bytes) -> None:
    script = honest(PASSWORD, binding=binding_data(certificate.der), last=OK + body + WELCOME)
    async with impostor(script, shown=certificate) as server:
        with pytest.raises(ProtocolError, match="settings that asyncpg cannot read"):
            async with asyncio.timeout(HANG):
                await neon_async.connect(server.dsn, trust_anchor=certificate.anchor)


async def test_a_server_that_ends_the_exchange_before_our_proof_is_refused(certificate: Signed) -> None:
    binding = binding_data(certificate.der)

    def hasty(conversation: Conversation) -> None:
        """Go through the whole exchange in one piece. Only who knows the keys could make the verdict right."""
        server = Honest(PASSWORD, binding=binding)
        conversation.send(sasl(*BOTH))
        challenge = server.challenge(conversation.read_message()[1])
        conversation.send(challenge + authentication_request(12, b"v=" + b"A" * 43 + b"=") + OK + WELCOME)

    async with impostor(hasty, shown=certificate) as server:
        with pytest.raises(ProtocolError, match="before it was asked"):
            async with asyncio.timeout(HANG):
                await neon_async.connect(server.dsn, trust_anchor=certificate.anchor)
        (conversation,) = await server.finish()
        assert client_messages(conversation.decrypted)[-1] != "SASLResponse"


async def test_a_connection_that_ends_with_the_login_is_not_handed_out(certificate: Signed) -> None:
    """The server lets us in and is gone, in one go, while we are still deriving the keys."""
    script = honest(PASSWORD, binding=binding_data(certificate.der))

    def let_in_and_leave(conversation: Conversation) -> None:
        script(conversation)
        conversation.hang_up()

    async with impostor(let_in_and_leave, shown=certificate) as server:
        async with asyncio.timeout(HANG):
            try:
                connection = await neon_async.connect(server.dsn, trust_anchor=certificate.anchor)
            except neon_async.ConnectError:
                return
        # Let in before the end arrived: then asyncpg is told of it.
        await until(connection.is_closed)
