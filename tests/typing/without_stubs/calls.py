"""Calls on pools, connections, statements and cursors: their results are known, and what is wrong in them is found."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, assert_type

import neon_async
from neon_async import Connection, Pool, Record, Transaction


async def lines() -> AsyncIterator[bytes]:
    yield b"1"


async def write(data: bytes) -> None: ...


async def with_a_pool(pool: Pool) -> None:
    assert_type(await pool.fetch("SELECT $1", 1), list[Record])
    assert_type(await pool.fetchrow("SELECT 1", timeout=1), Record | None)
    assert_type(await pool.fetchval("SELECT 1, 2", column=1), Any)
    assert_type(await pool.execute("SELECT 1"), str)
    assert_type(await pool.fetchmany("SELECT $1", [(1,), (2,)]), list[Record])
    assert_type(await pool.copy_from_table("orders", output=write, format="csv", columns=["id"]), str)
    assert_type(await pool.copy_from_query("SELECT $1", 1, output=BytesIO(), header=True), str)
    assert_type(await pool.copy_to_table("orders", source=lines(), delimiter=",", where="id > 7"), str)
    assert_type(await pool.copy_records_to_table("orders", records=[(1, "tea")], columns=("id", "item")), str)
    await pool.executemany("INSERT INTO orders VALUES ($1)", [(1,), (2,)], timeout=10)
    assert_type((pool.get_size(), pool.get_idle_size(), pool.get_min_size()), tuple[int, int, int])
    assert_type(pool.is_closing(), bool)

    await pool.fetch(1)  # type: ignore[call-overload]
    await pool.fetch("SELECT 1", timeout="1")  # type: ignore[call-overload]
    await pool.fetchval("SELECT 1", col=1)  # type: ignore[call-arg]
    await pool.executemany("SELECT $1", 1)  # type: ignore[arg-type]
    await pool.copy_from_table("orders", output=write, format="json")  # type: ignore[arg-type]
    await pool.copy_to_table("orders", source="orders.csv", delimeter=",")  # type: ignore[call-arg]
    await pool.close(timeout="1")  # type: ignore[arg-type]


async def with_a_loan(pool: Pool) -> None:
    async with pool.acquire(timeout=1.5) as connection:
        assert_type(connection, Connection)
    async with pool.transaction(role="app", settings={"app.user": "7"}) as begun:
        assert_type(begun, Connection)
    lent = await pool.acquire()
    assert_type(lent, Connection)
    await pool.release(lent, timeout=1)

    pool.acquire(1)  # type: ignore[call-arg]
    pool.transaction(settings={"app.user": 7})  # type: ignore[dict-item]


async def run(pool: Pool) -> None:
    async def work(connection: Connection) -> list[Record]:
        return await connection.fetch("SELECT 1")

    assert_type(await pool.run_transaction(work, attempts=5, readonly=True), list[Record])

    await pool.run_transaction(work, attempts="5")  # type: ignore[arg-type]


async def with_a_connection(dsn: str, path: Path) -> None:
    connection = await neon_async.connect(dsn, command_timeout=None)
    assert_type(connection, Connection)
    assert_type(await connection.fetch("SELECT 1"), list[Record])
    assert_type(await connection.fetchrow("SELECT 1"), Record | None)
    assert_type(await connection.fetchval("SELECT 1"), Any)
    assert_type(await connection.execute("SELECT 1", timeout=1), str)
    assert_type(await connection.fetchmany("SELECT $1", [(1,)]), list[Record])
    assert_type(await connection.copy_from_table("orders", output=path, force_quote=["item"]), str)
    assert_type(await connection.copy_from_query("SELECT 1", output=path), str)
    assert_type(await connection.copy_to_table("orders", source=path, force_null=True), str)
    assert_type(await connection.copy_records_to_table("orders", records=[(1,)]), str)
    assert_type(connection.transaction(readonly=True), Transaction)
    assert_type((connection.get_server_pid(), connection.is_in_transaction()), tuple[int, bool])
    async with connection.transaction() as block:
        assert_type(block, None)
    await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=str, format="text")
    await connection.close(timeout=1)

    await connection.fetch(b"SELECT 1")  # type: ignore[call-overload]
    await connection.executemany("SELECT $1", [1])  # type: ignore[list-item]
    await connection.copy_from_query("SELECT 1", output=path, columns=["id"])  # type: ignore[call-arg]
    await connection.copy_to_table("orders", source=path, formt="csv")  # type: ignore[call-arg]
    await connection.set_type_codec("json", encoder=str, decoder=str, format="json")  # type: ignore[arg-type]
    await connection.set_builtin_type_codec("hstore", codec_name=1)  # type: ignore[arg-type]
    connection.transaction(readonly="yes")  # type: ignore[arg-type]


async def with_statements(connection: Connection) -> None:
    statement = await connection.prepare("SELECT $1::int", name="one")
    assert_type(await statement.fetch(1), list[Record])
    assert_type(await statement.fetchrow(1, timeout=1), Record | None)
    assert_type(await statement.fetchmany([(1,), (2,)]), list[Record])
    assert_type(statement.get_query(), str)
    cached = await connection.prepare_cached("SELECT 1")
    assert_type(await cached.fetch(), list[Record])
    async for row in statement.cursor(1, prefetch=10):
        assert_type(row, Record)
    async for row in connection.cursor("SELECT 1"):
        assert_type(row, Record)
    cursor = await connection.cursor("SELECT $1", 1)
    assert_type(await cursor.fetch(3), list[Record])
    assert_type(await cursor.fetchrow(), Record | None)
    assert_type(await cursor.forward(3), int)

    await connection.prepare("SELECT 1", cached=True)  # type: ignore[call-overload]
    await statement.fetchval(1, timeout="1")  # type: ignore[arg-type]
    connection.cursor("SELECT 1", prefetch="10")  # type: ignore[call-overload]
    await cursor.fetch()  # type: ignore[call-arg]


def names_of(rows: Iterable[Record]) -> list[str]:
    return [str(row["name"]) for row in rows]


async def with_listeners(connection: Connection) -> None:
    async def heard(connection: Connection, pid: int, channel: str, payload: str) -> None: ...
    def ended(connection: Connection) -> None: ...
    def no_listener(payload: str) -> None: ...

    await connection.add_listener("orders", heard)
    connection.add_termination_listener(ended)

    await connection.add_listener("orders", no_listener)  # type: ignore[arg-type]


class Executes(Protocol):
    """A protocol of a user's own, which pools and connections fulfil alike."""

    async def execute(self, query: str, *args: object) -> str: ...
    async def fetchrow(self, query: str, *args: object) -> Record | None: ...


async def count(where: Executes) -> Record | None:
    return await where.fetchrow("SELECT count(*) FROM orders")


async def with_the_standard_library(dsn: str, pool: Pool, connection: Connection) -> None:
    await count(pool)
    await count(connection)
    assert_type(await asyncio.wait_for(pool.fetchrow("SELECT 1"), 5), Record | None)
    assert_type(await asyncio.create_task(neon_async.connect(dsn)), Connection)
    async with contextlib.AsyncExitStack() as stack:
        assert_type(await stack.enter_async_context(neon_async.create_pool(dsn)), Pool)
        assert_type(await stack.enter_async_context(pool.acquire()), Connection)
        assert_type(await stack.enter_async_context(pool.transaction()), Connection)
        assert_type(await stack.enter_async_context(connection.transaction()), None)
    execute = functools.partial(pool.execute, "SELECT 1")
    assert_type(await execute(timeout=1), str)

    await count(dsn)  # type: ignore[arg-type]
