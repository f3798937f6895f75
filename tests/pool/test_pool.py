"""A pool offers asyncpg's calls, classes and callbacks, on both event loops."""

from __future__ import annotations

import asyncio
import inspect
import io
import pickle
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.certificates import issue
from support.probes import HANG, make_pool, until
from support.waiting import until_served

import neon_async
from neon_async.testing import LocalPostgres

ROOT = issue(subject="root", ca=True)
DSN = "postgresql://alex:s3cret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"
NAME = "ep-cool-darkness-123456"

# Most programs create their pool like this: at import, while no event loop runs.
MODULE_LEVEL_POOL = neon_async.create_pool(DSN, trust_anchor=ROOT.pem)


def test_a_pool_is_an_asyncpg_pool() -> None:
    assert isinstance(MODULE_LEVEL_POOL, asyncpg.Pool)
    assert isinstance(MODULE_LEVEL_POOL, neon_async.Pool)
    assert not asyncio.iscoroutine(MODULE_LEVEL_POOL)


def test_create_pool_accepts_every_keyword_of_asyncpg() -> None:
    ours = inspect.signature(neon_async.create_pool).parameters
    theirs = inspect.signature(asyncpg.create_pool).parameters
    ignored = {"dsn", "connect", "loop", "connect_kwargs", "init_size"}
    assert set(theirs) - ignored <= set(ours)


def test_the_connect_arguments_of_a_pool_cannot_be_changed() -> None:
    for arguments in ((), (DSN,), ("postgresql://alex:other@evil.example.com/d?sslmode=disable",)):
        with pytest.raises(neon_async.ConfigurationError, match="judged when it is created"):
            MODULE_LEVEL_POOL.set_connect_args(*arguments, ssl=False)
    assert MODULE_LEVEL_POOL._connector.parameters.host.startswith(NAME)


def test_a_pool_cannot_be_pickled_with_its_password() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(MODULE_LEVEL_POOL)


@pytest.mark.anyio
class TestMethodsOfAsyncpg:
    @pytest.fixture
    async def pool(self, postgres: LocalPostgres) -> AsyncIterator[neon_async.Pool]:
        async with make_pool(postgres, max_size=2) as pool:
            yield pool

    @pytest.fixture
    async def table(self, pool: neon_async.Pool) -> AsyncIterator[str]:
        await pool.execute("CREATE TABLE items (id int, name text)")
        yield "items"
        await pool.execute("DROP TABLE items")

    async def test_a_pool_fetches_rows(self, pool: neon_async.Pool) -> None:
        query = "SELECT * FROM generate_series(1, $1::int) AS n"
        assert [row["n"] for row in await pool.fetch(query, 3)] == [1, 2, 3]
        row = await pool.fetchrow(query, 3)
        assert row is not None
        assert row["n"] == 1
        assert await pool.fetchval(query, 3) == 1

    async def test_a_pool_executes_statements(self, pool: neon_async.Pool, table: str) -> None:
        assert await pool.execute(f"INSERT INTO {table} VALUES ($1, $2)", 1, "a") == "INSERT 0 1"
        await pool.executemany(f"INSERT INTO {table} VALUES ($1, $2)", [(2, "b"), (3, "c")])
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 3

    async def test_a_pool_copies_records_in_and_out(self, pool: neon_async.Pool, table: str) -> None:
        assert await pool.copy_records_to_table(table, records=[(1, "a"), (2, "b")]) == "COPY 2"
        assert await pool.copy_to_table(table, source=io.BytesIO(b"3\tc\n")) == "COPY 1"
        out, query = io.BytesIO(), io.BytesIO()
        assert await pool.copy_from_table(table, output=out) == "COPY 3"
        assert out.getvalue() == b"1\ta\n2\tb\n3\tc\n"
        await pool.copy_from_query("SELECT $1::int", 7, output=query)
        assert query.getvalue() == b"7\n"

    async def test_a_pool_acquires_and_releases_connections(self, pool: neon_async.Pool) -> None:
        connection = await pool.acquire()
        assert isinstance(connection, asyncpg.Connection)
        assert (pool.get_size(), pool.get_idle_size()) == (1, 0)
        await pool.release(connection)
        assert (pool.get_size(), pool.get_idle_size()) == (1, 1)
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await connection.fetchval("SELECT 1")
        async with pool.acquire(timeout=HANG) as connection, connection.transaction():
            assert await connection.fetchval("SELECT 1") == 1

    async def test_a_connection_of_a_pool_receives_notifications(self, pool: neon_async.Pool) -> None:
        received: asyncio.Queue[str] = asyncio.Queue()

        def listener(connection: Any, pid: int, channel: str, payload: object) -> None:
            received.put_nowait(str(payload))

        async with pool.acquire() as connection, asyncio.timeout(HANG):
            await connection.add_listener("news", listener)
            await pool.execute("NOTIFY news, 'hello'")
            assert await received.get() == "hello"
            await connection.remove_listener("news", listener)

    async def test_cursors_and_composite_types_work(self, pool: neon_async.Pool) -> None:
        async with pool.acquire() as connection, connection.transaction():
            cursor = connection.cursor("SELECT generate_series(1, 100) AS n", prefetch=7)
            assert [row["n"] async for row in cursor] == list(range(1, 101))
            assert await connection.fetchval("SELECT ARRAY[(1, 'a')::record]") == [(1, "a")]

    async def test_a_broken_connection_is_replaced(self, pool: neon_async.Pool) -> None:
        async with pool.acquire() as first, pool.acquire() as second:
            proxy: Any = first
            pid, underlying = first.get_server_pid(), proxy._con  # asyncpg detaches the proxy when the connection ends
            await second.execute("SELECT pg_terminate_backend($1)", pid)
            await until(underlying.is_closed)
        assert await pool.fetchval("SELECT 1") == 1

    async def test_expired_connections_are_replaced(self, pool: neon_async.Pool) -> None:
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        await pool.expire_connections()
        assert await pool.fetchval("SELECT pg_backend_pid()") != pid


# ---------------------------------------------------------------------------------------------------------------------
# Classes and callbacks


class OwnConnection(asyncpg.Connection):
    async def seven(self) -> Any:
        return await self.fetchval("SELECT 7")


class OwnRecord(asyncpg.Record):
    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.anyio
async def test_a_pool_returns_connections_and_records_of_the_given_classes(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, connection_class=OwnConnection, record_class=OwnRecord) as pool:
        async with pool.acquire() as connection:
            named: Any = connection
            assert await named.seven() == 7
            assert neon_async.connection_tls_report(connection) == pool.tls_report()
        row: Any = await pool.fetchrow("SELECT 7 AS seven")
        assert row.seven == 7


@pytest.mark.anyio
async def test_callbacks_are_called_in_the_same_order_as_by_asyncpg(postgres: LocalPostgres) -> None:
    called: list[str] = []

    async def init(connection: asyncpg.Connection[Any]) -> None:
        called.append("init")
        assert neon_async.connection_tls_report(connection).version == "TLSv1.3"
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda text: ("json", text))

    async def setup(connection: neon_async.Connection) -> None:
        called.append("setup")
        assert neon_async.connection_tls_report(connection).version == "TLSv1.3"

    async def reset(connection: asyncpg.Connection[Any]) -> None:
        called.append("reset")

    async with make_pool(postgres, init=init, setup=setup, reset=reset, max_size=1) as pool:
        for _ in range(2):
            assert await pool.fetchval("SELECT '1'::json") == ("json", "1")
    assert called == ["init", "setup", "reset", "setup", "reset"]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["init", "setup"])
async def test_a_failing_callback_ends_the_connection_and_frees_its_slot(postgres: LocalPostgres, name: str) -> None:
    failures = [RuntimeError("first time")]

    async def callback(connection: Any) -> None:
        if failures:
            raise failures.pop()

    async with make_pool(postgres, max_size=1, **{name: callback}) as pool, asyncio.timeout(HANG):
        with pytest.raises(RuntimeError, match="first time"):
            await pool.fetchval("SELECT 1")
        assert pool.get_size() == 0
        assert await until_served(pool, RuntimeError) == 1
