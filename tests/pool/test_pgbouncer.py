"""A real PgBouncer behaves as the package and its tests assume of a pooled host.

The first tests check `LocalPgBouncer` itself. The others check what PgBouncer in transaction mode does to sessions,
prepared statements and asyncpg. Most of them use plain asyncpg, so that the package cannot influence the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import asyncpg
import pytest
from support.pgbouncer import MINIMUM_VERSION, LocalPgBouncer, installed_version
from support.probes import HANG, nothing_is_left, until

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@contextlib.asynccontextmanager
async def session(server: LocalPgBouncer | LocalPostgres, **keywords: Any) -> AsyncIterator[Connection]:
    """Yield a connection of plain asyncpg, verified against the name localhost."""
    url = urlsplit(server.dsn)
    context = ssl.create_default_context(cadata=server.trust_anchor.decode())
    connection = await asyncpg.connect(
        host="localhost",
        port=server.port,
        user=url.username,
        password=url.password,
        database=url.path[1:],
        ssl=context,
        timeout=HANG,
        **keywords,
    )
    try:
        yield connection
    finally:
        connection.terminate()


@contextlib.asynccontextmanager
async def occupied(bouncer: LocalPgBouncer) -> AsyncIterator[Connection]:
    """Yield another client in a transaction on the server connection used last, which PgBouncer assigns first."""
    async with session(bouncer) as other, other.transaction():
        await other.execute("SELECT 1")
        yield other


async def backend(connection: Connection) -> int:
    """Return the process id of the server connection that serves `connection` right now."""
    pid: int = await connection.fetchval("SELECT pg_backend_pid()")
    return pid


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until `condition` returns something true."""
    async with asyncio.timeout(HANG):
        while not await condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def pooler(pgbouncer_installed: None, postgres: LocalPostgres) -> AsyncIterator[LocalPgBouncer]:
    """A PgBouncer for one test, with new server connections."""
    async with LocalPgBouncer(postgres) as bouncer:
        yield bouncer


@pytest.fixture
async def direct(postgres: LocalPostgres) -> AsyncIterator[Connection]:
    """A session with the server itself."""
    async with session(postgres) as connection:
        yield connection


@pytest.fixture
async def table(direct: Connection) -> AsyncIterator[str]:
    """A table with one row and one column."""
    await direct.execute("CREATE TABLE migrated AS SELECT 1 AS first")
    yield "migrated"
    await direct.execute("DROP TABLE migrated")


# ---------------------------------------------------------------------------------------------------------------------
# LocalPgBouncer


async def test_its_version_supports_prepared_statements(pgbouncer: LocalPgBouncer) -> None:
    [row] = await pgbouncer.admin("SHOW VERSION")
    name, version = row["version"].split()
    assert name == "PgBouncer"
    assert tuple(map(int, version.split("."))) >= MINIMUM_VERSION


async def test_neon_async_connects_to_the_pooled_host_with_full_verification(pgbouncer: LocalPgBouncer) -> None:
    connection = await neon_async.connect(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor)
    try:
        assert await connection.fetchval("SELECT 41 + $1::int", 1) == 42
        report = neon_async.connection_tls_report(connection)
    finally:
        await connection.close()
    assert report.server_name == pgbouncer.host == "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech"
    assert report.version == "TLSv1.3"
    assert report.mechanism == "SCRAM-SHA-256"  # PgBouncer does not support channel binding


async def test_one_trust_anchor_serves_the_direct_and_the_pooled_host(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres
) -> None:
    for server in (pgbouncer, postgres):
        connection = await neon_async.connect(server.dsn, trust_anchor=postgres.trust_anchor)
        await connection.close()


async def test_a_wrong_password_is_refused(pgbouncer: LocalPgBouncer) -> None:
    # This is PgBouncer's message. On Neon the proxy in front of PgBouncer answers.
    with pytest.raises(neon_async.InvalidPasswordError, match="SASL authentication failed"):
        await neon_async.connect(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, password="wrong")


async def test_plaintext_is_refused(pgbouncer: LocalPgBouncer) -> None:
    dsn = f"postgresql://neon:password@127.0.0.1:{pgbouncer.port}/neondb"
    async with nothing_is_left():
        with pytest.raises(asyncpg.ProtocolViolationError, match="SSL required"):
            await asyncpg.connect(dsn, ssl=False, timeout=HANG)


async def test_the_connection_to_the_server_uses_tls(pgbouncer: LocalPgBouncer) -> None:
    async with session(pgbouncer) as client:
        version = await client.fetchval("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert version == "TLSv1.3"


async def test_two_transactions_of_one_client_can_run_on_two_server_connections(pgbouncer: LocalPgBouncer) -> None:
    async with session(pgbouncer) as client:
        first = await backend(client)
        async with occupied(pgbouncer) as other:
            assert await backend(other) == first
            assert await backend(client) != first


async def test_a_prepared_statement_works_on_another_server_connection(pgbouncer: LocalPgBouncer) -> None:
    async with session(pgbouncer) as client:
        statement = await client.prepare("SELECT pg_backend_pid() + $1::int")
        first = await statement.fetchval(0)
        async with occupied(pgbouncer):
            assert await statement.fetchval(0) != first


async def test_a_prepared_statement_fails_on_another_server_connection_if_support_is_off(
    pgbouncer_installed: None, postgres: LocalPostgres
) -> None:
    async with LocalPgBouncer(postgres, max_prepared_statements=0) as bouncer, session(bouncer) as client:
        statement = await client.prepare("SELECT pg_backend_pid() + $1::int")
        await statement.fetchval(0)
        async with occupied(bouncer):
            with pytest.raises(asyncpg.InvalidSQLStatementNameError):
                await statement.fetchval(0)


async def test_the_pool_size_limits_the_server_connections(pgbouncer_installed: None, postgres: LocalPostgres) -> None:
    async with LocalPgBouncer(postgres, default_pool_size=1) as bouncer, session(bouncer) as client:
        async with occupied(bouncer) as other:
            query = asyncio.ensure_future(backend(client))
            await eventually(lambda: is_waiting(bouncer))
            taken = await backend(other)
        assert await query == taken


async def is_waiting(bouncer: LocalPgBouncer) -> bool:
    """Return whether a client waits for a server connection."""
    return any(row["cl_waiting"] for row in await bouncer.admin("SHOW POOLS"))


async def test_reconnect_replaces_the_server_connections(pooler: LocalPgBouncer) -> None:
    async with session(pooler) as client:
        first = await backend(client)
        await pooler.admin("RECONNECT")
        assert await backend(client) != first


@pytest.mark.parametrize("end", [LocalPgBouncer.stop, LocalPgBouncer.kill], ids=["stop", "kill"])
async def test_clients_lose_their_connections_when_it_ends_and_it_restarts_on_the_same_port(
    pooler: LocalPgBouncer, end: Callable[[LocalPgBouncer], Awaitable[None]]
) -> None:
    async with session(pooler) as client:
        await backend(client)
        await end(pooler)
        await until(client.is_closed)
        with pytest.raises(OSError, match=r"[Rr]efused|Connect call failed"):
            await asyncio.open_connection("127.0.0.1", pooler.port)
    await pooler.start()
    async with session(pooler) as client:
        assert await backend(client)


async def test_it_leaves_no_process_and_no_folder(pgbouncer_installed: None, postgres: LocalPostgres) -> None:
    async with LocalPgBouncer(postgres) as bouncer:
        pid = bouncer.pid
        assert pid is not None
        assert is_alive(pid)
    assert not is_alive(pid)
    assert not bouncer.folder.exists()


_CHILD = """
import asyncio, sys
from neon_async.testing import LocalPostgres
from support.pgbouncer import LocalPgBouncer

async def main():
    async with LocalPostgres() as server, LocalPgBouncer(server) as bouncer:
        print(bouncer.pid, bouncer.folder, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_it_leaves_nothing_when_the_tests_are_killed(pgbouncer_installed: None) -> None:
    with start_child() as child:
        assert child.stdout is not None
        pid, folder = (await asyncio.to_thread(child.stdout.readline)).split()
        assert is_alive(int(pid))
        child.kill()
    await until(lambda: not is_alive(int(pid)) and not Path(folder).exists())


def start_child() -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True, env=environment)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Prepared statements after a migration

QUERY = "SELECT * FROM migrated"


async def row(client: Connection, query: str = QUERY) -> tuple[Any, ...]:
    [record] = await client.fetch(query)
    return tuple(record)


async def test_after_ddl_a_prepared_statement_fails_on_every_connection(
    pooler: LocalPgBouncer, direct: Connection, table: str
) -> None:
    async with session(pooler) as first, session(pooler) as second, session(pooler) as newcomer:
        assert await row(first) == (1,)
        assert await row(second) == (1,)
        await direct.execute("ALTER TABLE migrated ADD COLUMN second int DEFAULT 2")
        for client in [first, second, newcomer] * 3:  # asyncpg drops its own copy each time, without effect
            with pytest.raises(asyncpg.InvalidCachedStatementError) as failure:
                await row(client)
            # asyncpg writes a message of its own and keeps the server's message in the details.
            assert failure.value.as_dict()["message"] == "cached plan must not change result type"


@pytest.mark.parametrize("change", ["{} /* 2 */", "{} --2", "{} "], ids=["comment", "line-comment", "blank"])
async def test_after_ddl_the_same_query_with_a_different_text_works_at_once(
    pooler: LocalPgBouncer, direct: Connection, table: str, change: str
) -> None:
    async with session(pooler) as client, session(pooler) as other:
        await row(client)
        await direct.execute("ALTER TABLE migrated ADD COLUMN second int DEFAULT 2")
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            await row(client)
        assert await row(client, change.format(QUERY)) == (1, 2)
        assert await row(other, change.format(QUERY)) == (1, 2)


async def test_after_ddl_the_description_a_client_has_stays_wrong_on_a_new_server_connection(
    pooler: LocalPgBouncer, direct: Connection, table: str
) -> None:
    async with session(pooler) as client, session(pooler) as newcomer:
        await row(client)
        await direct.execute("ALTER TABLE migrated ADD COLUMN second int DEFAULT 2")
        await pooler.admin("RECONNECT")
        for _ in range(3):  # no plan is stale now, so asyncpg has no reason to drop its copy
            with pytest.raises(asyncpg.ProtocolError, match="different from what was described"):
                await row(client)
        assert await row(newcomer) == (1, 2)
        await client.reload_schema_state()
        assert await row(client) == (1, 2)


async def test_after_a_change_of_type_results_are_decoded_with_the_old_type(
    pooler: LocalPgBouncer, direct: Connection, table: str
) -> None:
    """No error is raised, because the result has as many columns, each with as many bytes, as asyncpg expects."""
    async with session(pooler) as client:
        assert await client.fetchval(QUERY) == 1
        await direct.execute("ALTER TABLE migrated ALTER COLUMN first TYPE real")
        await pooler.admin("RECONNECT")
        assert await client.fetchval(QUERY) == 0x3F800000  # 1.0 as an IEEE 754 single, decoded as an integer


async def test_a_stale_plan_aborts_the_transaction(pooler: LocalPgBouncer, direct: Connection, table: str) -> None:
    async with session(pooler) as client:
        await row(client)
        await direct.execute("ALTER TABLE migrated ADD COLUMN second int DEFAULT 2")
        transaction = client.transaction()
        await transaction.start()
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            await row(client)
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await row(client, QUERY + " /* 2 */")
        await transaction.rollback()


# ---------------------------------------------------------------------------------------------------------------------
# Session state


async def test_a_listener_receives_no_notification(pooler: LocalPgBouncer, direct: Connection) -> None:
    received: list[object] = []
    received_directly: list[object] = []
    async with session(pooler) as client:
        await direct.add_listener("news", lambda *arguments: received_directly.append(arguments[-1]))
        await client.add_listener("news", lambda *arguments: received.append(arguments[-1]))
        listening = await backend(client)
        await direct.execute("NOTIFY news, 'from afar'")
        async with occupied(pooler) as other:
            assert await backend(other) == listening
            await until(lambda: received_directly)
            assert await backend(client) != listening
    assert received_directly == ["from afar"]
    assert received == []


async def test_a_setting_is_lost_for_its_client_and_leaks_to_another_client(pooler: LocalPgBouncer) -> None:
    async with session(pooler) as client:
        await client.execute("SET statement_timeout = '54321ms'")
        async with occupied(pooler) as other:
            assert await client.fetchval("SHOW statement_timeout") == "0"
            assert await other.fetchval("SHOW statement_timeout") == "54321ms"


async def test_a_local_setting_ends_with_its_transaction(pooler: LocalPgBouncer) -> None:
    async with session(pooler) as client:
        async with client.transaction():
            await client.execute("SET LOCAL statement_timeout = '54321ms'")
            assert await client.fetchval("SHOW statement_timeout") == "54321ms"
        assert await client.fetchval("SHOW statement_timeout") == "0"


async def test_a_session_advisory_lock_stays_with_the_server_connection(pooler: LocalPgBouncer) -> None:
    async with session(pooler) as client:
        await client.execute("SELECT pg_advisory_lock(4711)")
        async with occupied(pooler):
            assert await client.fetchval("SELECT pg_advisory_unlock(4711)") is False


# The settings that every version of PgBouncer tracks per client: its documentation, track_extra_parameters.
TRACKED = {
    "application_name": "billing",
    "client_encoding": "LATIN1",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "standard_conforming_strings": "off",
    "TimeZone": "Asia/Tokyo",
}


@pytest.mark.parametrize("name", TRACKED)
async def test_a_tracked_setting_follows_its_client(pooler: LocalPgBouncer, name: str) -> None:
    async with session(pooler) as client:
        await client.execute(f"SET {name} = '{TRACKED[name]}'")
        first = await backend(client)
        async with occupied(pooler) as other:
            assert await backend(other) == first
            assert await other.fetchval(f"SHOW {name}") != TRACKED[name]
            assert await client.fetchval(f"SHOW {name}") == TRACKED[name]


@pytest.mark.parametrize(
    "name", [name for name in TRACKED if name != "client_encoding"]
)  # asyncpg sends this one itself
async def test_a_tracked_server_setting_is_applied(pgbouncer: LocalPgBouncer, name: str) -> None:
    async with session(pgbouncer, server_settings={name: TRACKED[name]}) as client:
        assert await client.fetchval(f"SHOW {name}") == TRACKED[name]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"statement_timeout": "1000"}, id="as-a-parameter"),
        pytest.param({"options": "-c statement_timeout=1000"}, id="in-options"),
        pytest.param({"lock_timeout": "1000"}, id="another-parameter"),
        pytest.param({"jit": "off"}, id="jit"),
    ],
)
async def test_a_server_setting_that_no_version_tracks_is_refused(
    pgbouncer: LocalPgBouncer, settings: dict[str, str]
) -> None:
    await refused(pgbouncer, settings)


async def test_search_path_as_a_server_setting_is_applied_since_1_26_and_refused_before(
    pgbouncer: LocalPgBouncer,
) -> None:
    version = installed_version()
    assert version is not None
    if version < (1, 26):
        await refused(pgbouncer, {"search_path": "other"})
    else:
        async with session(pgbouncer, server_settings={"search_path": "other"}) as client:
            assert await client.fetchval("SHOW search_path") == "other"


async def refused(pgbouncer: LocalPgBouncer, settings: dict[str, str]) -> None:
    """Check that PgBouncer refuses a connection with these server settings."""
    async with nothing_is_left():  # asyncpg does not wait until a connection that failed is closed
        with pytest.raises(asyncpg.ProtocolViolationError, match="unsupported startup parameter"):
            async with session(pgbouncer, server_settings=settings):
                pass


# ---------------------------------------------------------------------------------------------------------------------
# The type introspection of asyncpg


@pytest.fixture
async def mood(direct: Connection) -> AsyncIterator[str]:
    """A value of a type that asyncpg must look up."""
    await direct.execute("CREATE TYPE mood AS (level int, since timestamptz)")
    yield "(1,2026-01-01)"
    await direct.execute("DROP TYPE mood")


async def test_introspection_can_leave_jit_off_on_a_server_connection(
    pgbouncer_installed: None, postgres: LocalPostgres, direct: Connection, mood: str
) -> None:
    """asyncpg turns jit off, looks the type up and turns jit on: three statements, each on any server connection."""
    async with (
        LocalPgBouncer(postgres, default_pool_size=2) as bouncer,
        session(bouncer) as client,
        session(bouncer) as second,
    ):
        assert await client.fetchval("SHOW jit") == "on"
        lock = direct.transaction()
        await lock.start()
        await direct.execute("LOCK TABLE pg_catalog.pg_range IN ACCESS EXCLUSIVE MODE")  # only the look-up reads it
        query = asyncio.ensure_future(client.fetchval(f"SELECT '{mood}'::mood"))
        await eventually(lambda: direct.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        async with occupied(bouncer) as third:  # on the other server connection
            begin = asyncio.ensure_future(second.execute("BEGIN"))
            await eventually(lambda: is_waiting(bouncer))
            await lock.rollback()
            await begin  # on the server connection that the look-up has just released
            assert await second.fetchval("SHOW jit") == "off"
            assert await third.fetchval("SHOW jit") == "on"
        await query  # jit was turned on where it was on already
        assert await second.fetchval("SHOW jit") == "off"
        await second.execute("COMMIT")

        async with occupied(bouncer) as third:
            assert await third.fetchval("SHOW jit") == "off"
            assert await client.fetchval("SHOW jit") == "on"
