"""One transport: both ways to TLS, the addresses, the socket's options, cancel requests, and who reads afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg.connect_utils
import pytest
from support.certificates import issue, present
from support.probes import HANG, Relay, assert_secret_free, black_hole, nothing_is_left, password_of, resolve_to, until

import neon_async
from neon_async._driver import connector as _connect
from neon_async._wire import dial as _dial
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Impostor, authentication_request, login, server_context

pytestmark = pytest.mark.anyio

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
CANCEL_REQUEST = struct.pack("!i", 80877102)
TLS = b"\x16"
NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["direct", "postgres"])


@pytest.fixture(autouse=True)
def no_server_is_known() -> Iterator[None]:
    _dial._without_direct_tls.clear()
    yield
    _dial._without_direct_tls.clear()


@contextlib.asynccontextmanager
async def connected(postgres: LocalPostgres, dsn: str | None = None, **keywords: Any) -> AsyncIterator[Any]:
    connection = await neon_async.connect(dsn or postgres.dsn, trust_anchor=postgres.trust_anchor, **keywords)
    try:
        yield connection
    finally:
        connection.terminate()


def openings(relay: Relay) -> list[str]:
    """Tell how each connection began, and check that what came after an SSLRequest was TLS."""
    names = []
    for passage in relay.passages:
        assert CANCEL_REQUEST not in passage.sent[:16]
        if passage.sent.startswith(SSL_REQUEST):
            assert passage.sent[8:9] in (b"", TLS)
        names.append("direct" if passage.sent[:1] == TLS else "SSLRequest")
    return names


# The two ways to TLS


@pytest.mark.parametrize(
    ("keywords", "negotiation"),
    [
        pytest.param({}, "direct", id="by default"),
        pytest.param({"sslnegotiation": "direct"}, "direct", id="direct"),
        pytest.param({"sslnegotiation": "postgres"}, "postgres", id="postgres"),
    ],
)
async def test_a_real_server_is_reached_in_one_connection(
    postgres: LocalPostgres, keywords: dict[str, Any], negotiation: str
) -> None:
    async with Relay(postgres.port) as relay, connected(postgres, relay.dsn(postgres.dsn), **keywords) as connection:
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        report = neon_async.connection_tls_report(connection)
        assert (report.negotiation, report.alpn, report.version) == (negotiation, "postgresql", "TLSv1.3")
        assert openings(relay) == ["direct" if negotiation == "direct" else "SSLRequest"]


def closes_on_direct_tls(first: bytes) -> bool:
    return first.startswith(TLS)


async def test_a_server_without_direct_tls_is_asked_with_sslrequest_and_remembered(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        for expected in (["direct", "SSLRequest"], ["direct", "SSLRequest", "SSLRequest"]):
            async with connected(postgres, relay.dsn(postgres.dsn)) as connection:
                assert neon_async.connection_tls_report(connection).negotiation == "postgres"
                assert await connection.fetchval("SELECT 1") == 1
            assert openings(relay) == expected


async def test_that_a_server_has_no_direct_tls_is_forgotten_after_ten_minutes(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        for age, expected in ((0.0, ["SSLRequest"]), (599.0, ["SSLRequest"]), (601.0, ["direct", "SSLRequest"])):
            server = (postgres.host, "127.0.0.1", relay.port)
            _dial._without_direct_tls[server] = asyncio.get_running_loop().time() - age
            before = len(openings(relay))
            async with connected(postgres, relay.dsn(postgres.dsn)) as connection:
                assert neon_async.connection_tls_report(connection).negotiation == "postgres"
            assert openings(relay)[before:] == expected


async def test_a_server_that_resets_direct_tls_is_asked_with_sslrequest(postgres: LocalPostgres) -> None:
    def reset(conversation: Any) -> None:
        conversation.receive(1)
        conversation.reset()

    async with Impostor(reset) as impostor:
        connector = _connect.prepare(impostor.dsn, trust_anchor=postgres.trust_anchor)
        with pytest.raises(neon_async.ConnectError):
            await connector.connect()
        conversations = await impostor.finish()
    assert [bytes(one.wire[:1]) for one in conversations] == [TLS, SSL_REQUEST[:1]]
    assert not _dial._without_direct_tls  # nothing is learnt from a server that speaks neither


async def test_direct_tls_that_was_asked_for_never_becomes_anything_else(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        with pytest.raises(neon_async.TLSError, match="does not speak direct TLS") as caught:
            async with connected(postgres, relay.dsn(postgres.dsn), sslnegotiation="direct"):
                pass
        assert type(caught.value) in vars(neon_async).values()  # no private class reaches a caller
        assert openings(relay) == ["direct"]


async def test_what_is_remembered_of_one_server_is_not_held_against_another(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        async with connected(postgres, relay.dsn(postgres.dsn)):
            pass
        async with connected(postgres) as connection:
            assert neon_async.connection_tls_report(connection).negotiation == "direct"


async def test_a_server_that_names_no_protocol_under_direct_tls_is_asked_with_sslrequest() -> None:
    root = issue(subject="root", ca=True)
    context = server_context(present(issue(root)).chain, alpn=())
    async with Impostor(login(context, authentication_request(3))) as impostor:
        with pytest.raises(neon_async.AuthenticationError, match="cleartext"):
            await neon_async.connect(impostor.dsn, trust_anchor=root.pem)
        conversations = await impostor.finish()
    assert [bytes(one.wire[:1]) for one in conversations] == [TLS, SSL_REQUEST[:1]]
    assert conversations[0].decrypted == b""  # not a byte of ours under direct TLS without its protocol name


@pytest.mark.parametrize("keywords", [{}, {"sslnegotiation": "direct"}, {"sslnegotiation": "postgres"}], ids=str)
async def test_a_certificate_that_fails_is_never_tried_in_another_way(
    postgres: LocalPostgres, keywords: dict[str, Any]
) -> None:
    other = issue(subject="root", ca=True).pem
    async with Relay(postgres.port) as relay, nothing_is_left():
        with pytest.raises(neon_async.CertificateError, match=r"does not lead to the trust anchor|another root"):
            await neon_async.connect(relay.dsn(postgres.dsn), trust_anchor=other, **keywords)
        assert len(relay.passages) == 1
        await until(lambda: relay.passages[0].over)
    assert not _dial._without_direct_tls


async def test_a_certificate_that_fails_is_never_tried_at_another_address(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = issue(subject="root", ca=True).pem
    async with Relay(postgres.port) as first, Relay(postgres.port) as second:
        resolve_to(monkeypatch, ("127.0.0.1", first.port), ("127.0.0.1", second.port))
        with pytest.raises(neon_async.CertificateError):
            await neon_async.connect(postgres.dsn.partition("?")[0], trust_anchor=other)
        assert (len(first.passages), len(second.passages)) == (1, 0)


# The steps


async def test_the_steps_are_announced_as_they_begin(postgres: LocalPostgres) -> None:
    steps: list[str] = []
    connector = _connect.prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    await (await connector.connect(on_step=steps.append)).close()
    assert steps == ["tcp", "tls", "authentication"]


async def test_a_fallback_announces_tcp_and_tls_once_more_and_resolves_once(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        asked = resolve_to(monkeypatch, ("127.0.0.1", relay.port))
        dsn = relay.dsn(postgres.dsn).partition("?")[0]
        connector = _connect.prepare(dsn, trust_anchor=postgres.trust_anchor)
        await (await connector.connect(on_step=steps.append)).close()
    assert steps == ["dns", "tcp", "tls", "tcp", "tls", "authentication"]
    assert asked == [postgres.host]


# TCP


def option(connection: Any, level: int, name: int) -> int:
    value: int = connection._transport.get_extra_info("socket").getsockopt(level, name)
    return value


@NEGOTIATIONS
async def test_the_socket_has_the_default_options(postgres: LocalPostgres, negotiation: str) -> None:
    async with connected(postgres, sslnegotiation=negotiation) as connection:
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000


async def test_the_socket_has_the_options_asked_for(postgres: LocalPostgres) -> None:
    async with connected(
        postgres, keepalives_idle=7, keepalives_interval=8, keepalives_count=9, tcp_user_timeout=12_345
    ) as connection:
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 8
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 9
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_345


@pytest.mark.parametrize(
    "limits",
    [
        {"keepalives_idle": 1, "keepalives_interval": 1, "keepalives_count": 1, "tcp_user_timeout": 1},
        {
            "keepalives_idle": 32767,
            "keepalives_interval": 32767,
            "keepalives_count": 127,
            "tcp_user_timeout": 2147483647,
        },
    ],
    ids=["least", "most"],
)
async def test_the_limits_that_are_accepted_are_ones_the_system_takes(
    postgres: LocalPostgres, limits: dict[str, Any]
) -> None:
    async with connected(postgres, **limits):
        pass


async def test_keepalive_and_user_timeout_can_be_left_to_the_system(postgres: LocalPostgres) -> None:
    async with connected(postgres, keepalives=0, tcp_user_timeout=0) as connection:
        assert not option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY)


def refused_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


async def test_an_address_that_answers_nothing_does_not_hold_up_the_next(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = postgres.dsn.partition("?")[0]
    with black_hole() as hole:
        resolve_to(monkeypatch, ("127.0.0.1", hole), ("127.0.0.1", postgres.port))
        # Without the race this would be the kernel's two minutes, and connect_timeout would end it.
        async with nothing_is_left(), connected(postgres, dsn, connect_timeout=HANG) as connection:
            peer = connection._transport.get_extra_info("peername")
            assert peer == ("127.0.0.1", postgres.port)


async def test_addresses_that_refuse_are_passed_over(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = [("127.0.0.1", refused_port()) for _ in range(5)]
    resolve_to(monkeypatch, *dead, ("127.0.0.1", postgres.port))
    async with connected(postgres, postgres.dsn.partition("?")[0]) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_name_without_an_address_is_a_connect_error(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # getaddrinfo() never returns an empty list, but a patched loop may; there is nothing to connect to.
    resolve_to(monkeypatch)
    with pytest.raises(neon_async.ConnectError):
        await neon_async.connect(postgres.dsn.partition("?")[0], trust_anchor=postgres.trust_anchor)


async def test_all_addresses_refusing_are_told_in_one_error(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, ("127.0.0.1", refused_port()), ("127.0.0.2", refused_port()))
    async with nothing_is_left():
        both = r"127\.0\.0\.1: .*refused.*127\.0\.0\.2: .*refused"
        with pytest.raises(neon_async.ConnectError, match=both) as caught:
            await neon_async.connect(postgres.dsn.partition("?")[0], trust_anchor=postgres.trust_anchor)
    assert caught.value.retryable


async def test_every_won_race_closes_the_losers(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dial, "_ATTEMPT_DELAY", 0.0)
    resolve_to(monkeypatch, *[("127.0.0.1", postgres.port)] * 8)
    async with nothing_is_left():
        for _ in range(10):
            async with connected(postgres, postgres.dsn.partition("?")[0]) as connection:
                assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST"])
async def test_localhost_is_resolved_and_verified_by_its_name(postgres: LocalPostgres, name: str) -> None:
    dsn = postgres.dsn.replace(postgres.host, name).partition("?")[0]
    async with connected(postgres, dsn) as connection:
        assert neon_async.connection_tls_report(connection).server_name == "localhost"


async def test_a_certificate_for_the_address_says_nothing_about_the_name(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, ("127.0.0.1", postgres.port))
    dsn = postgres.dsn.replace(postgres.host, "ep-other-endpoint-654321.us-east-2.aws.neon.tech")
    with pytest.raises(neon_async.CertificateError, match="it is for another name"):
        await neon_async.connect(dsn, trust_anchor=postgres.trust_anchor)


# Cancel requests


@contextlib.asynccontextmanager
async def a_sleeping_query(connection: Any, admin: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A task in the middle of a query that takes an hour. The query must be gone from the server in the end."""
    pid = connection.get_server_pid()
    state = "SELECT state = 'active' FROM pg_stat_activity WHERE pid = $1"
    task = asyncio.create_task(connection.execute("SELECT pg_sleep(3600)"))
    async with asyncio.timeout(HANG):
        while not await admin.fetchval(state + " AND query LIKE '%pg_sleep%'", pid):
            await asyncio.sleep(0.001)
        yield task
        while await admin.fetchval(state, pid):
            await asyncio.sleep(0.001)


@NEGOTIATIONS
async def test_a_cancelled_query_is_cancelled_on_the_server_and_inside_tls(
    postgres: LocalPostgres, negotiation: str
) -> None:
    async with (
        connected(postgres) as admin,
        Relay(postgres.port) as relay,
        connected(postgres, relay.dsn(postgres.dsn), sslnegotiation=negotiation) as connection,
    ):
        async with a_sleeping_query(connection, admin) as task:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await connection.fetchval("SELECT 1") == 1
        await until(lambda: not connection._cancellations)
        await until(lambda: relay.passages[-1].over)
        kind = "direct" if negotiation == "direct" else "SSLRequest"
        assert openings(relay) == [kind, kind]
        assert not connection.is_closed()


async def test_a_query_that_times_out_is_cancelled_too(postgres: LocalPostgres) -> None:
    async with connected(postgres) as admin, connected(postgres) as connection, nothing_is_left():
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
        state = "SELECT state FROM pg_stat_activity WHERE pid = $1"
        assert await admin.fetchval(state, connection.get_server_pid()) == "idle"
        await until(lambda: not connection._cancellations)


async def test_a_cancel_request_goes_where_the_session_is(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Relay(postgres.port) as relay, connected(postgres) as admin:
        asked = resolve_to(monkeypatch, ("127.0.0.1", relay.port))
        async with connected(postgres, relay.dsn(postgres.dsn).partition("?")[0]) as connection:
            async with a_sleeping_query(connection, admin) as task:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await connection.fetchval("SELECT 1") == 1
        assert len(asked) == 1
        assert len(relay.passages) == 2


async def test_a_cancel_request_announces_no_step(postgres: LocalPostgres) -> None:
    steps: list[str] = []
    connector = _connect.prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    connection = await connector.connect(on_step=steps.append)
    try:
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        connection.terminate()
    assert steps == ["tcp", "tls", "authentication"]


async def test_a_cancel_request_is_verified_like_the_session_itself(postgres: LocalPostgres) -> None:
    """Somebody else answers at the address: the secret of the cancel request stays with us."""
    asked: list[bytes] = []

    def after_the_first(first: bytes) -> bool:
        asked.append(first[:1])
        return len(asked) > 1

    async with (
        connected(postgres) as admin,
        Relay(postgres.port, refuse=after_the_first) as relay,
        connected(postgres, relay.dsn(postgres.dsn)) as connection,
    ):
        pid = connection.get_server_pid()
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        await until(lambda: not connection._cancellations)
        assert await admin.fetchval("SELECT pg_terminate_backend($1)", pid)
        # Direct TLS was refused, so SSLRequest was tried; no cancel request went out in the clear.
        assert set(asked) <= {TLS, SSL_REQUEST[:1]}
        openings(relay)


async def test_a_cancel_request_ends_when_the_server_drops_it_after_the_handshake(postgres: LocalPostgres) -> None:
    """The connection breaks in the moment between TLS and asyncpg's own protocol: nobody may wait for ever."""

    class SlowLoop:
        """The connection's own door, with time between its TLS and asyncpg's protocol."""

        def __init__(self, door: Any) -> None:
            self._door = door

        def __getattr__(self, name: str) -> Any:
            return getattr(self._door, name)

        async def start_tls(self, transport: Any, *arguments: object, **keywords: object) -> Any:
            transport.finished.abort()
            for _ in range(10):  # rounds of the loop, so that the loss is known
                await asyncio.sleep(0)
            return await self._door.start_tls(transport, *arguments, **keywords)

    async with connected(postgres) as connection:
        asyncpgs: Any = asyncpg.connect_utils
        cancel = asyncpgs._cancel(
            loop=SlowLoop(connection._loop),
            addr=connection._addr,
            params=connection._params,
            backend_pid=1,
            backend_secret=1,
        )
        ended = asyncio.create_task(cancel)
        done, _ = await asyncio.wait([ended], timeout=5.0)
        ended.cancel()
        await asyncio.wait([ended])
        assert done, "asyncpg waits for a connection_lost() that has been delivered to somebody else"


# After the login


@NEGOTIATIONS
async def test_nothing_of_ours_is_in_the_data_path_after_login(postgres: LocalPostgres, negotiation: str) -> None:
    async with connected(postgres, sslnegotiation=negotiation) as connection:
        protocol = connection._transport.get_protocol()
        assert protocol is connection._protocol
        assert type(protocol).__module__.startswith("asyncpg.")
        assert await connection.fetchval("SELECT repeat('x', 1000000)") == "x" * 1_000_000


async def test_the_door_passes_for_the_loop_it_stands_for(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        loop = asyncio.get_running_loop()
        door = connection._loop
        assert door == loop
        assert hash(door) == hash(loop)
        assert door != object()
        assert asyncio.current_task(door) is asyncio.current_task()
        assert repr(door) == f"<Door to {postgres.host}>"


async def test_big_messages_flow_in_both_directions(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        value = "neon" * 1_000_000
        assert await connection.fetchval("SELECT $1::text", value) == value


async def test_no_error_of_the_dialer_holds_the_password(postgres: LocalPostgres) -> None:
    password = password_of(postgres)
    dsn = postgres.dsn.replace(f":{postgres.port}/", f":{refused_port()}/")
    with pytest.raises(neon_async.ConnectError) as caught:
        await neon_async.connect(dsn, trust_anchor=postgres.trust_anchor)
    assert_secret_free(caught.value, password)
