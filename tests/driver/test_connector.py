"""connect(): the settings that reach the session, reports, and event loops that are not asyncio's."""

from __future__ import annotations

import gc
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
import trio
from support.handshakes import ROOT
from support.probes import assert_secret_free, connected, open_sockets, password_of, until

import neon_async
from neon_async._driver.connector import prepare
from neon_async._driver.session import Session
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

NAME = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
SECRET = "s3cret-of-alex"


@pytest.mark.parametrize(
    ("keywords", "setting", "value"),
    [
        pytest.param(
            {"application_name": "orders 'n' more"}, "application_name", "orders 'n' more", id="application_name"
        ),
        pytest.param({"fallback_application_name": "fallback"}, "application_name", "fallback", id="fallback"),
        pytest.param(
            {"application_name": "first", "fallback_application_name": "second"},
            "application_name",
            "first",
            id="application_name before the fallback",
        ),
        pytest.param({"options": "-c statement_timeout=1234"}, "statement_timeout", "1234ms", id="options"),
        pytest.param({"options": "-c application_name=a\\ b"}, "application_name", "a b", id="options with a space"),
        pytest.param({"server_settings": {"search_path": "orders"}}, "search_path", "orders", id="server_settings"),
        pytest.param({"server_settings": {"TimeZone": "Asia/Tokyo"}}, "timezone", "Asia/Tokyo", id="time zone"),
        pytest.param({"server_settings": {"search_path": ""}}, "search_path", "", id="an empty value"),
        pytest.param(
            {"server_settings": {"application_name": "a b"}}, "application_name", "a b", id="name in settings"
        ),
        pytest.param(
            {"server_settings": {"app.text": 'it\'s "a"\t\\b -c\n x=é\u2003 \\'}},
            "app.text",
            'it\'s "a"\t\\b -c\n x=é\u2003 \\',
            id="everything in a value",
        ),
        pytest.param(
            {"server_settings": {"statement_timeout": "1234"}, "options": "-c work_mem=1MB"},
            "statement_timeout",
            "1234ms",
            id="server_settings with options",
        ),
        pytest.param(
            {"server_settings": {"statement_timeout": "1234"}, "options": "-c work_mem=1MB"},
            "work_mem",
            "1MB",
            id="options with server_settings",
        ),
        pytest.param({"client_encoding": "utf-8"}, "client_encoding", "UTF8", id="client_encoding"),
    ],
)
async def test_settings_reach_the_session(
    postgres: LocalPostgres, keywords: dict[str, Any], setting: str, value: str
) -> None:
    async with connected(postgres, **keywords) as connection:
        assert await connection.fetchval(f"SHOW {setting}") == value


async def test_the_environment_reaches_the_session_unless_the_dsn_wins(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGAPPNAME", "from the environment")
    monkeypatch.setenv("PGDATABASE", "not this one")
    async with connected(postgres) as connection:
        assert await connection.fetchval("SHOW application_name") == "from the environment"
        assert await connection.fetchval("SELECT current_database()") == "neondb"


async def test_a_later_change_of_the_environment_has_no_effect(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg reads PG* variables when it connects; the connector has read them before."""
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    for name, value in {
        "PGHOST": "evil.example.com",
        "PGPORT": "1",
        "PGUSER": "mallory",
        "PGPASSWORD": "x",
        "PGDATABASE": "evil",
        "PGSSLMODE": "disable",
        "PGSSLNEGOTIATION": "postgres",
        "PGSSLROOTCERT": "/nowhere",
        "PGSSLKEY": "/nowhere",
        "PGSSLCERT": "/nowhere",
        "PGSSLMINPROTOCOLVERSION": "SSLv2",
        "PGTARGETSESSIONATTRS": "standby",
        "PGSERVICE": "evil",
        "PGPASSFILE": "/nowhere",
        "PGKRBSRVNAME": "evil",
        "PGGSSLIB": "evil",
    }.items():
        monkeypatch.setenv(name, value)
    connection = await connector.connect()
    try:
        assert await connection.fetchval("SELECT current_user || '@' || current_database()") == "neon@neondb"
        assert neon_async.connection_tls_report(connection).negotiation == "direct"
    finally:
        await connection.close()


async def test_the_keywords_of_asyncpg_reach_asyncpg(postgres: LocalPostgres) -> None:
    class MyConnection(asyncpg.Connection):
        pass

    class MyRecord(asyncpg.Record):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    async with connected(
        postgres,
        connection_class=MyConnection,
        record_class=MyRecord,
        command_timeout=1.0,
        statement_cache_size=0,
        max_cached_statement_lifetime=0.5,
    ) as connection:
        row: Any = await connection.fetchrow("SELECT 7 AS seven")
        assert row.seven == 7
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)")
        assert connection._stmt_cache.get_max_size() == 0
        assert connection._stmt_cache.get_max_lifetime() == 0.5
        assert isinstance(connection, MyConnection)
        assert type(connection).__name__ == "MyConnection"


# ---------------------------------------------------------------------------------------------------------------------
# Reports


async def test_the_report_describes_the_handshake(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        report = neon_async.connection_tls_report(connection)
        assert (report.version, report.negotiation, report.alpn) == ("TLSv1.3", "direct", "postgresql")
        assert report.server_name == postgres.host
        cipher = await connection.fetchval("SELECT cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert report.cipher == cipher
        assert report.anchor.endswith("from trust_anchor")
        with pytest.raises(AttributeError):
            report.version = "TLSv1.3"  # type: ignore[misc]


async def test_a_connection_of_a_pool_has_a_report_until_it_is_released(postgres: LocalPostgres) -> None:
    async with neon_async.create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor) as pool:
        async with pool.acquire() as connection:
            assert neon_async.connection_tls_report(connection) == pool.tls_report()
        with pytest.raises(neon_async.ConfigurationError, match="not an open connection of neon-async"):
            neon_async.connection_tls_report(connection)


async def test_a_foreign_connection_has_no_report(postgres: LocalPostgres) -> None:
    foreign = await asyncpg.connect(
        host="localhost",
        port=postgres.port,
        user="neon",
        password=password_of(postgres),
        database="neondb",
        ssl=neon_async.create_ssl_context(trust_anchor=postgres.trust_anchor),
    )
    try:
        with pytest.raises(neon_async.ConfigurationError, match="not an open connection of neon-async"):
            neon_async.connection_tls_report(foreign)
    finally:
        await foreign.close()


@pytest.mark.parametrize("thing", [None, object(), "connection", 7, [], {}], ids=lambda thing: type(thing).__name__)
async def test_an_object_that_is_not_a_connection_has_no_report(thing: Any) -> None:
    with pytest.raises(neon_async.ConfigurationError):
        neon_async.connection_tls_report(thing)


async def test_a_connection_and_its_session_are_freed_together(postgres: LocalPostgres) -> None:
    def sessions() -> int:
        gc.collect()
        return sum(isinstance(thing, Session) for thing in gc.get_objects())

    before = sessions()
    for _ in range(3):
        async with connected(postgres):
            assert sessions() > before
    await until(lambda: sessions() <= before)


async def test_a_weakened_context_of_one_session_does_not_affect_the_next(postgres: LocalPostgres) -> None:
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    first = await connector.connect()
    context = first._transport.get_extra_info("ssl_object").context
    context.check_hostname = False
    context.verify_mode = 0
    second = await connector.connect()
    try:
        other = second._transport.get_extra_info("ssl_object").context
        assert other is not context
        assert (other.check_hostname, other.verify_mode) == (True, 2)
    finally:
        await first.close()
        await second.close()


async def test_the_repr_of_a_connector_shows_the_endpoint_and_no_secret() -> None:
    connector = prepare(f"postgresql://alex:{SECRET}@{NAME}/neondb", trust_anchor=ROOT.pem)
    assert repr(connector) == "<Connector ep-cool-darkness-123456>"
    assert SECRET not in repr(connector.parameters) + connector.parameters.redacted_dsn
    assert connector.tls_report is None


async def test_a_refusal_is_raised_by_the_call_before_a_socket_is_opened() -> None:
    before = open_sockets()
    with pytest.raises(neon_async.InsecureConfigurationError) as caught:
        _ = neon_async.connect(f"postgresql://alex:{SECRET}@{NAME}/neondb?sslmode=require")
    assert open_sockets() == before
    assert_secret_free(caught.value, SECRET)


# ---------------------------------------------------------------------------------------------------------------------
# Other event loops


TRIO: list[Any] = [
    pytest.param(lambda pool, dsn: pool, id="await pool"),
    pytest.param(lambda pool, dsn: pool.__aenter__(), id="async with pool"),
    pytest.param(lambda pool, dsn: neon_async.connect(dsn, trust_anchor=ROOT.pem), id="connect"),
]


@pytest.mark.parametrize("use", TRIO)
@pytest.mark.parametrize("anyio_backend", [pytest.param("trio", id="trio")])
async def test_trio_gets_a_clear_error(use: Callable[[Any, str], Awaitable[Any]], anyio_backend: str) -> None:
    dsn = f"postgresql://alex:{SECRET}@{NAME}/neondb"
    pool = neon_async.create_pool(dsn, trust_anchor=ROOT.pem)
    with pytest.raises(neon_async.UnsupportedEventLoopError, match="No asyncio event loop is running") as caught:
        await use(pool, dsn)
    assert_secret_free(caught.value, SECRET)
    assert trio.current_time() > 0  # this test runs on trio


def test_without_an_event_loop_the_error_is_the_same() -> None:
    coroutine = neon_async.connect(f"postgresql://alex:{SECRET}@{NAME}/neondb", trust_anchor=ROOT.pem)
    with pytest.raises(neon_async.UnsupportedEventLoopError):
        coroutine.send(None)


async def test_the_socket_of_a_session_is_a_stream(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        sock = connection._transport.get_extra_info("socket")
        assert sock.family in (socket.AF_INET, socket.AF_INET6)
        assert sock.type == socket.SOCK_STREAM


class Alike(asyncpg.Connection):
    """A class whose instances all compare equal, and cannot be hashed."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


async def test_each_connection_has_its_own_report_even_if_all_compare_equal(postgres: LocalPostgres) -> None:
    async with (
        connected(postgres, connection_class=Alike, sslnegotiation="direct") as one,
        connected(postgres, connection_class=Alike, sslnegotiation="postgres") as other,
    ):
        assert neon_async.connection_tls_report(one).negotiation == "direct"
        assert neon_async.connection_tls_report(other).negotiation == "postgres"
