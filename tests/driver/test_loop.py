"""The loop adapter: what asyncpg gets from it, what a finished connection keeps, and early logins of later dials."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import struct
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.logins import (
    BOTH,
    PLAIN,
    PLUS,
    READY,
    HonestServer,
    client_messages,
    honest_login,
    in_turn,
    sasl,
)
from support.probes import HANG, assert_secret_free, connected
from support.relays import Interceptor
from support.signatures import PresentingServer, Signed, presenting_server, signed
from support.verified_servers import BINDING, CERTIFICATE, PASSWORD, connect_to, record_pbkdf2, verified_server

import neon_async
from neon_async import (
    AuthenticationError,
    ChannelBindingError,
    EndpointDisabledError,
    InvalidPasswordError,
    NeonAsyncError,
)
from neon_async._driver.connector import prepare
from neon_async._driver.loop import LoopAdapter, StatementTimer
from neon_async._wire.dial import Dialer
from neon_async._wire.login import LoginCache
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

NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["direct", "postgres"])
WHOLE = ["StartupMessage", "SASLInitialResponse", "SASLResponse"]


@NEGOTIATIONS
async def test_after_the_login_the_session_alone_reads_the_connection_and_asyncpgs_protocol_what_it_passes_on(
    postgres: LocalPostgres, negotiation: str
) -> None:
    async with connected(postgres, sslnegotiation=negotiation) as connection:
        stream = connection._transport.get_protocol()
        assert stream is connection._transport._stream
        asyncpgs = connection._protocol._asyncpg
        assert stream._protocol is asyncpgs
        assert stream._pass_on == asyncpgs.data_received
        assert type(asyncpgs).__module__.startswith("asyncpg.")
        assert await connection.fetchval("SELECT repeat('x', 1000000)") == "x" * 1_000_000


async def test_big_messages_flow_in_both_directions(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        value = "neon" * 1_000_000
        assert await connection.fetchval("SELECT $1::text", value) == value


async def test_a_finished_connection_holds_the_running_loop_itself(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        assert connection._loop is asyncio.get_running_loop()
        assert connection._stmt_cache._loop is asyncio.get_running_loop()


def adapter_for(dsn: str) -> LoopAdapter:
    connector = prepare(dsn, trust_anchor=CERTIFICATE.anchor)
    dialer = Dialer(connector.parameters, connector.anchor)
    return LoopAdapter(dialer, secret=lambda: PASSWORD, cache=LoginCache())


async def test_nearly_everything_is_the_running_loops() -> None:
    adapter, loop = adapter_for(f"postgresql://alex:{PASSWORD}@db.example.com/neondb"), asyncio.get_running_loop()
    assert adapter.create_future == loop.create_future
    assert adapter.create_connection != loop.create_connection
    assert repr(adapter) == "<LoopAdapter for db.example.com>"
    assert PASSWORD not in repr(vars(adapter))


async def test_statements_that_end_in_time_share_one_timer_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), list[float]()
    call_at: Any = loop.call_at

    def count(due: float, *args: Any) -> asyncio.TimerHandle:
        timers.append(due)
        handle: asyncio.TimerHandle = call_at(due, *args)
        return handle

    timer = StatementTimer()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_at", count)
        for _ in range(100):
            timer.start(HANG, pytest.fail).cancel()
    assert len(timers) == 1


@pytest.mark.parametrize("earlier", [0.0, 0.02, HANG], ids=["due at once", "due earlier", "due later"])
async def test_a_statement_has_its_own_time_whatever_that_of_an_earlier_one_was(earlier: float) -> None:
    timer, fired = StatementTimer(), asyncio.get_running_loop().create_future()
    timer.start(earlier, pytest.fail).cancel()
    began = time.monotonic()
    timer.start(0.04, fired.set_result, None)
    async with asyncio.timeout(HANG):
        await fired
    assert time.monotonic() - began >= 0.04
    assert repr(timer) == "<StatementTimer off>"


async def test_a_timer_that_has_fired_can_be_started_again() -> None:
    timer = StatementTimer()
    async with asyncio.timeout(HANG):
        for _ in range(3):
            fired = asyncio.get_running_loop().create_future()
            assert timer.start(0.001, fired.set_result, None) is timer
            await fired
    timer.cancel()


async def test_the_adapter_makes_no_connection_without_tls() -> None:
    adapter = adapter_for(f"postgresql://alex:{PASSWORD}@db.example.com/neondb?hostaddr=127.0.0.1")
    with pytest.raises(RuntimeError, match="without TLS"):
        await adapter.create_connection(asyncio.Protocol, "db.example.com", 5432)


class Client(asyncio.Protocol):
    """Sends a StartupMessage, as asyncpg's protocol does."""

    def connection_made(self, transport: Any) -> None:
        transport.write(struct.pack("!ii", 9, 3 << 16) + b"\0")


async def test_the_adapter_makes_one_connection_only() -> None:
    async with verified_server(authentication_request(3)) as server:
        adapter = adapter_for(server.dsn)
        with pytest.raises(AuthenticationError, match="cleartext"):
            await adapter.create_connection(Client, server.host, server.port, ssl=object())
        adapter.abort()
        with pytest.raises(RuntimeError, match="a second connection"):
            await adapter.create_connection(Client, server.host, server.port, ssl=object())
        assert server.connections == 1


async def test_a_closed_connection_frees_its_adapter_without_the_garbage_collector(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        adapter = weakref.ref(connection._transport.session.cancel.__self__)
    gc.disable()
    try:
        del connection
        async with asyncio.timeout(HANG):
            while adapter() is not None:
                await asyncio.sleep(0.001)
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# The first dial


def answer_queries(conversation: Conversation) -> None:
    """Answer every simple query with a CommandComplete."""
    while conversation.read_message()[0] == b"Q":
        conversation.send(message(b"C", b"SET\0") + READY)
    conversation.hang_up()


@pytest.mark.parametrize(
    ("offer", "mechanism"),
    [
        pytest.param(BOTH, PLUS, id="both"),
        pytest.param([PLAIN], PLAIN, id="plain"),
        pytest.param([PLUS], PLUS, id="plus"),
    ],
)
async def test_what_follows_authenticationok_in_the_same_read_reaches_asyncpg(offer: list[str], mechanism: str) -> None:
    async with verified_server(honest_login(PASSWORD, offer=offer, binding=BINDING), answer_queries) as server:
        connection = await connect_to(server)
        assert connection.get_server_pid() == 4711
        assert connection.get_settings().application_name == "from the honest server"
        assert neon_async.connection_tls_report(connection).mechanism == mechanism
        assert await connection.execute("SET work_mem = 64") == "SET"
        await connection.close()
        (conversation,) = await server.finish()
    assert client_messages(conversation.decrypted) == [*WHOLE, "Query", "Terminate"]


@pytest.fixture
def pbkdf2(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The thread and the iteration count of every PBKDF2."""
    return record_pbkdf2(monkeypatch)


async def test_pbkdf2_runs_in_a_thread_and_once_for_each_password(
    postgres: LocalPostgres, pbkdf2: list[tuple[int, int]]
) -> None:
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    for _ in range(3):
        await (await connector.connect()).close()
    assert [iterations for _, iterations in pbkdf2] == [4096]
    assert threading.get_ident() not in [thread for thread, _ in pbkdf2]


# ---------------------------------------------------------------------------------------------------------------------
# Later dials: the login begins before the server's request


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_bin_dir: str | None) -> Iterator[PresentingServer]:
    with presenting_server(tmp_path_factory.mktemp("anchor"), postgres_bin_dir) as server:
        yield server


@pytest.fixture(scope="module")
def certificate() -> Signed:
    """The server's certificate, where any will do."""
    return signed(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())


def password_of(dsn: str) -> str:
    return dsn.partition("://")[2].partition(":")[2].partition("@")[0]


@NEGOTIATIONS
async def test_every_dial_after_the_first_takes_one_round_trip_less(
    server: PresentingServer, certificate: Signed, negotiation: str
) -> None:
    server.present(certificate)
    direct = negotiation == "direct"
    async with Interceptor(server.port, certificate, direct=direct) as recorder:
        connector = prepare(recorder.dsn(server.dsn), trust_anchor=certificate.anchor, sslnegotiation=negotiation)
        for _ in range(3):
            (await connector.connect()).terminate()
        first, *later = recorder.round_trips
        assert later == [first - 1] * 2
        for number, messages in enumerate(recorder.connections):
            senders = [one.sender for one in messages[:3]]
            assert senders == (["client", "server", "client"] if number == 0 else ["client", "client", "server"])
            opening = b"".join(one.body for one in messages[:2] if one.sender == "client")
            assert opening.count(b",r=") == (0 if number == 0 else 1)
            assert b"p=" not in opening.replace(b"p=tls-server-end-point", b"")  # no proof
            assert password_of(server.dsn).encode() not in b"".join(one.body for one in messages)


async def test_the_connections_of_a_pool_share_the_known_mechanism(
    server: PresentingServer, certificate: Signed
) -> None:
    server.present(certificate)
    async with Interceptor(server.port, certificate) as recorder:
        pool = neon_async.create_pool(
            recorder.dsn(server.dsn), trust_anchor=certificate.anchor, init_size=3, min_size=0, max_size=3
        )
        async with pool:
            report = pool.tls_report()
            assert report is not None
            assert report.mechanism == PLUS
            await pool.expire_connections()
            assert await pool.fetchval("SELECT 1") == 1
        first, *later = recorder.round_trips
        assert later == [first - 1] * 3


@contextlib.asynccontextmanager
async def dialled_once(*then: Script, **keywords: Any) -> AsyncIterator[tuple[Any, Impostor]]:
    """Yield a connector that has logged in once with PLUS, and its server, which plays one of `then` for each dial."""
    context = server_context(CERTIFICATE.chain)
    scripts = [login(context, script) for script in (accept(BOTH), *then)]
    async with Impostor(in_turn(*scripts), trust_anchor=CERTIFICATE.anchor, password=PASSWORD) as server:
        connector = prepare(server.dsn, trust_anchor=CERTIFICATE.anchor, **keywords)
        await dial(connector)
        yield connector, server


async def dial(connector: Any) -> str:
    """Connect, and return the mechanism used."""
    async with asyncio.timeout(HANG):
        (await connector.connect()).terminate()
    return str(connector.tls_report.mechanism)


def accept(offer: list[str]) -> Script:
    return honest_login(PASSWORD, offer=offer, binding=BINDING)


def heard(server: Impostor) -> list[list[str]]:
    """Return the messages of the client on each connection, except for Terminate."""
    return [[name for name in client_messages(one.decrypted) if name != "Terminate"] for one in server.conversations]


CLEARTEXT = authentication_request(3)


async def test_each_change_of_the_mechanism_costs_one_retry() -> None:
    only_plain, both = accept([PLAIN]), accept(BOTH)
    async with dialled_once(only_plain, only_plain, only_plain, both, both, both) as (connector, server):
        mechanisms, connections = [], []
        for _ in range(4):
            before = server.connections
            mechanisms.append(await dial(connector))
            connections.append(server.connections - before)
        await server.finish()
        assert mechanisms == [PLAIN, PLAIN, PLUS, PLUS]
        assert connections == [2, 1, 2, 1]
        assert heard(server) == [WHOLE, WHOLE[:2], WHOLE, WHOLE, WHOLE[:2], WHOLE, WHOLE]


async def test_a_server_that_stops_offering_plus_is_refused_after_one_retry_under_require() -> None:
    async with dialled_once(accept([PLAIN]), channel_binding="require") as (
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
    "an-unknown-mechanism": play(sasl("OAUTHBEARER")),
    "error-after-the-offer": play(sasl(*BOTH), error_response("malformed SCRAM message", code="08P01")),
    "cleartext-after-the-offer": play(sasl(*BOTH), CLEARTEXT),
    "a-second-offer": play(sasl(*BOTH), sasl(*BOTH)),
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
async def test_a_server_that_refuses_an_early_login_once_gets_one_retry(otherwise: str) -> None:
    async with dialled_once(OTHERWISE[otherwise], accept(BOTH)) as (connector, server):
        assert await dial(connector) == PLUS
        await server.finish()
        assert heard(server) == [WHOLE, WHOLE[:2], WHOLE]
        assert server.conversations[1].closed_by_client


@pytest.mark.parametrize("otherwise", OTHERWISE)
async def test_a_server_that_keeps_requesting_something_else_is_refused_after_one_retry(otherwise: str) -> None:
    async with dialled_once(OTHERWISE[otherwise]) as (connector, server):
        with pytest.raises((NeonAsyncError, asyncpg.PostgresError)) as caught:
            await dial(connector)
        assert not type(caught.value).__name__.startswith("EarlyLogin")
        assert_secret_free(caught.value, PASSWORD)
        await server.finish()
        assert len(heard(server)) == 3
        assert "SASLResponse" not in heard(server)[1] + heard(server)[2]
        assert PASSWORD.encode() not in b"".join(bytes(one.wire + one.decrypted) for one in server.conversations)


async def test_after_a_failed_retry_the_next_dial_waits_for_the_servers_request() -> None:
    async with dialled_once(OTHERWISE["cleartext"]) as (connector, server):
        for expected in (3, 4):
            with pytest.raises(AuthenticationError, match="cleartext"):
                await dial(connector)
            assert server.connections == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(error_response("endpoint is disabled"), EndpointDisabledError, id="endpoint"),
        pytest.param(error_response("password authentication failed for user 'alex'"), InvalidPasswordError, id="user"),
        pytest.param(error_response("permission denied", code="42501"), AuthenticationError, id="other"),
    ],
)
async def test_an_error_in_place_of_the_offer_causes_no_retry(error: bytes, kind: type[Exception]) -> None:
    async with dialled_once(play(error)) as (connector, server):
        with pytest.raises(kind):
            await dial(connector)
        assert server.connections == 2


async def test_a_wrong_password_on_a_later_dial_causes_no_retry() -> None:
    def reject(conversation: Conversation) -> None:
        server = HonestServer("another password", binding=BINDING)
        conversation.send(sasl(*BOTH))
        conversation.send(server.challenge(conversation.read_message()[1]))
        conversation.read_message()
        conversation.send(error_response("password authentication failed for user 'alex'", code="28P01"))

    async with dialled_once(reject) as (connector, server):
        with pytest.raises(InvalidPasswordError):
            await dial(connector)
        await server.finish()
        assert heard(server) == [WHOLE, WHOLE]


async def test_a_certificate_that_is_renewed_between_two_dials_is_bound_again(
    server: PresentingServer, certificate: Signed
) -> None:
    server.present(certificate)
    connector = prepare(server.dsn, trust_anchor=certificate.anchor)
    assert await dial(connector) == PLUS
    server.present(certificate.another())
    assert await dial(connector) == PLUS


async def test_connections_of_event_loops_in_several_threads_keep_their_bytes_apart(postgres: LocalPostgres) -> None:
    together = threading.Barrier(4)

    def run(letter: str) -> list[bool]:
        async def fetch() -> list[bool]:
            async with connected(postgres) as connection:
                together.wait(HANG)
                query = "SELECT repeat($1, n) FROM generate_series(1, 100000, 9999) n"
                lengths = list(range(1, 100_001, 9_999))
                found = [[row[0] for row in await connection.fetch(query, letter)] for _ in range(10)]
                return [texts == [letter * length for length in lengths] for texts in found]

        return asyncio.run(fetch())

    assert await asyncio.gather(*(asyncio.to_thread(run, letter) for letter in "abcd")) == [[True] * 10] * 4
