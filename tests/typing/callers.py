"""What callers write: mypy --strict accepts it, and a `type: ignore` marks what it refuses, as with asyncpg-stubs."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

import asyncpg
from asyncpg.cursor import Cursor, CursorFactory
from asyncpg.pool import PoolConnectionProxy
from asyncpg.prepared_stmt import PreparedStatement

import neon_async


class Row(asyncpg.Record):
    pass


class OwnConnection(asyncpg.Connection):
    async def ping(self) -> int:
        return int(await self.fetchval("SELECT 1"))


class RowConnection(asyncpg.Connection[Row]):
    pass


class OwnPool(neon_async.Pool):
    async def first(self, query: str) -> asyncpg.Record | None:
        return await self.fetchrow(query)


class RowPool(neon_async.Pool[Row]):
    pass


async def setup(connection: PoolConnectionProxy) -> None:
    await connection.execute("SET search_path TO app")


async def setup_any(connection: PoolConnectionProxy[Any]) -> None: ...
async def setup_rows(connection: PoolConnectionProxy[Row]) -> None: ...
async def init(connection: asyncpg.Connection) -> None: ...
async def init_rows(connection: asyncpg.Connection[Row]) -> None: ...
async def init_ours(connection: neon_async.Connection) -> None: ...
async def reset(connection: asyncpg.Connection) -> None: ...
def wants_asyncpgs(pool: asyncpg.Pool) -> None: ...
def not_async(connection: asyncpg.Connection) -> None: ...
async def of_numbers(connection: int) -> None: ...


def create_pools(dsn: str, options: dict[str, Any]) -> None:
    assert_type(neon_async.create_pool(dsn), neon_async.Pool)
    assert_type(neon_async.create_pool(dsn, setup=setup, init=init, reset=reset, min_size=1), neon_async.Pool)
    assert_type(neon_async.create_pool(dsn, setup=setup_any, connection_class=OwnConnection), neon_async.Pool)
    assert_type(neon_async.create_pool(dsn, setup=None, init=None, reset=None), neon_async.Pool)
    assert_type(neon_async.create_pool(dsn, record_class=Row), neon_async.Pool[Row])
    assert_type(
        neon_async.create_pool(dsn, record_class=Row, setup=setup_rows, init=init_rows, connection_class=RowConnection),
        neon_async.Pool[Row],
    )
    assert_type(neon_async.create_pool(dsn, pool_class=OwnPool, setup=setup, max_size=3), OwnPool)
    assert_type(neon_async.create_pool(dsn, pool_class=RowPool, record_class=Row, init=init_rows), RowPool)
    assert_type(neon_async.create_pool(dsn, loop=asyncio.get_event_loop()), neon_async.Pool)
    pool: neon_async.Pool = neon_async.create_pool(dsn, **options)
    wants_asyncpgs(pool)
    neon_async.create_pool(dsn, setup=init_ours, init=init_ours, reset=init_ours)
    neon_async.create_pool(dsn, setup=init)

    neon_async.create_pool(dsn, init=init_rows)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, setup=setup_rows)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, setup=of_numbers)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, init=not_async)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, reset=not_async)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, connection_class=int)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, record_class=dict)  # type: ignore[type-var]
    rows: neon_async.Pool[Row]
    rows = neon_async.create_pool(dsn, record_class=Row, init=init)  # type: ignore[arg-type]
    rows.terminate()
    neon_async.create_pool(dsn, pool_class=asyncpg.Pool)  # type: ignore[type-var]
    neon_async.create_pool(dsn, max_sise=3)  # type: ignore[call-overload]


async def use_pools(dsn: str) -> None:
    async with neon_async.create_pool(dsn, record_class=Row) as rows:
        assert_type(rows, neon_async.Pool[Row])
        assert_type(await rows.fetch("SELECT 1"), list[Row])
        async with rows.acquire() as connection:
            assert_type(connection, neon_async.Connection[Row])
            assert_type(await connection.fetchrow("SELECT 1"), Row | None)
    async with neon_async.create_pool(dsn, pool_class=OwnPool) as pool:
        assert_type(pool, OwnPool)
        assert_type(await pool.first("SELECT 1"), asyncpg.Record | None)
    opened = await neon_async.create_pool(dsn, pool_class=OwnPool)
    assert_type(opened, OwnPool)
    lent = await opened.acquire()
    assert_type(lent, neon_async.Connection)
    await opened.release(lent)
    await opened.run_transaction(init)

    await opened.release("lent")  # type: ignore[arg-type]
    await opened.run_transaction(of_numbers)  # type: ignore[arg-type]
    await opened.run_transaction(not_async)  # type: ignore[arg-type]


async def use_rows(pool: neon_async.Pool, connection: neon_async.Connection, own: bool) -> None:
    assert_type(await pool.fetch("SELECT 1", record_class=Row), list[Row])
    assert_type(await pool.fetch("SELECT 1", record_class=Row if own else None), list[asyncpg.Record] | list[Row])
    assert_type(await connection.fetchrow("SELECT 1", record_class=Row), Row | None)
    assert_type(await (await connection.prepare("SELECT 1", record_class=Row)).fetch(), list[Row])
    async for row in connection.cursor("SELECT 1", record_class=Row):
        assert_type(row, Row)
    statement: PreparedStatement = await connection.prepare("SELECT 1")
    factory: CursorFactory = statement.cursor()
    cursor: Cursor = await factory
    assert_type(await cursor.fetch(1), list[asyncpg.Record])

    await pool.fetch("SELECT 1", record_class=dict)  # type: ignore[type-var]


async def use_connections(dsn: str) -> None:
    assert_type(await neon_async.connect(dsn), neon_async.Connection)
    assert_type(await neon_async.connect(dsn, loop=asyncio.get_running_loop()), neon_async.Connection)
    rows = await neon_async.connect(dsn, record_class=Row)
    assert_type(rows, neon_async.Connection[Row])
    assert_type(await rows.fetch("SELECT 1"), list[Row])
    own = await neon_async.connect(dsn, connection_class=OwnConnection)
    assert_type(own, OwnConnection)
    assert_type(await own.ping(), int)

    await neon_async.connect(dsn, connection_class=int)  # type: ignore[type-var]
    await neon_async.connect(dsn, record_class=dict)  # type: ignore[type-var]
    await neon_async.connect(dsn, loop="running")  # type: ignore[call-overload]
