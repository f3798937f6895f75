"""What is known and found where a checker knows asyncpg's classes: by asyncpg-stubs, or by the code of asyncpg."""

from __future__ import annotations

import asyncio
from typing import assert_type

import neon_async
from neon_async import Connection, Pool, Record


class Order(Record):
    @property
    def item(self) -> str:
        return str(self["item"])


async def init(connection: Connection[Order]) -> None:
    assert_type(await connection.fetch("SELECT 1"), list[Order])


async def of_numbers(number: int) -> None: ...


async def first(pool: Pool[Order]) -> str | None:
    row = await pool.fetchrow("SELECT item FROM orders")
    return None if row is None else row.item


async def use(dsn: str, anything: Pool) -> None:
    async with neon_async.create_pool(dsn, record_class=Order, init=init) as pool:
        assert_type(pool, Pool[Order])
        assert_type(await pool.fetch("SELECT 1"), list[Order])
        async with pool.acquire() as connection, pool.transaction() as begun:
            assert_type(await connection.fetchrow("SELECT 1"), Order | None)
            assert_type(begun, Connection[Order])
        assert_type(await first(pool), str | None)
    connection = await neon_async.connect(dsn, record_class=Order)
    assert_type(connection, Connection[Order])
    assert_type(await (await connection.prepare("SELECT 1")).fetchrow(), Order | None)
    async for row in connection.cursor("SELECT 1"):
        assert_type(row, Order)
    assert_type(await anything.fetch("SELECT 1", record_class=Order), list[Order])
    async for row in (await neon_async.connect(dsn)).cursor("SELECT 1", record_class=Order):
        assert_type(row, Order)

    rows, status = await asyncio.gather(anything.fetch("SELECT 1"), anything.execute("SELECT 1"))
    assert_type((rows, status), tuple[list[Record], str])

    await first(anything)  # type: ignore[arg-type]
    await anything.fetchh("SELECT 1")  # type: ignore[attr-defined]
    await connection.fetchh("SELECT 1")  # type: ignore[attr-defined]
    await anything.run_transaction(of_numbers)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, init=of_numbers)  # type: ignore[arg-type]
    await anything.fetch("SELECT 1", record_class=dict)  # type: ignore[type-var]
    neon_async.create_pool(dsn, record_class=int)  # type: ignore[type-var]
