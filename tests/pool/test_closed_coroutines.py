"""A coroutine that is closed, in its event loop or where that does not run, loses neither a slot nor a connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import pytest
import uvloop
from support.probes import HANG, assert_whole, make_pool, until, until_settled
from support.scenes import phrased

import neon_async
from neon_async.testing import LocalPostgres

Waiting: TypeAlias = Coroutine[Any, Any, object]


class Releasing(neon_async.Pool):
    """A pool whose blocks are left by its own `release()`."""

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await super().release(connection, timeout=timeout)


async def start(waiting: Waiting) -> Waiting:
    """Run a coroutine to its first suspension, without a task, which nothing could close."""
    waiting.send(None)._asyncio_future_blocking = False  # as a task does
    return waiting


async def held(pool: neon_async.Pool) -> Any:
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    return connection


kept: list[asyncio.Task[None]] = []


async def in_the_wait_queue(pool: neon_async.Pool) -> Waiting:
    connection = await held(pool)
    waiting = await start(pool._lend(None))
    kept.append(asyncio.get_running_loop().create_task(pool.release(connection)))  # runs when it has left
    return waiting


async def with_a_connection_handed_over(pool: neon_async.Pool) -> Waiting:
    connection = await held(pool)
    waiting = await start(pool._lend(None))
    await pool.release(connection)
    return waiting


async def with_a_connection_handed_over_to_a_call(pool: neon_async.Pool) -> Waiting:
    connection = await held(pool)
    waiting = await start(pool.fetchval("SELECT 1"))
    await pool.release(connection)
    return waiting


async def with_an_expired_connection_handed_over(pool: neon_async.Pool) -> Waiting:
    waiting = await with_a_connection_handed_over(pool)
    await pool.expire_connections()
    return waiting


async def with_a_connection_handed_over_that_has_ended(pool: neon_async.Pool) -> Waiting:
    connection = await held(pool)
    raw = connection._con
    waiting = await start(pool._lend(None))
    await pool.release(connection)
    raw.terminate()
    return waiting


async def in_a_call(pool: neon_async.Pool) -> Waiting:
    return await start(pool.fetchval("SELECT pg_sleep(60)"))


async def in_a_call_that_was_answered(pool: neon_async.Pool) -> Waiting:
    waiting = pool.execute("SET work_mem TO '99kB'")
    answer = waiting.send(None)
    answer._asyncio_future_blocking = False
    await until(answer.done)
    return waiting


async def in_a_block(pool: neon_async.Pool) -> Waiting:
    async def use() -> None:
        async with pool.acquire():
            await asyncio.get_running_loop().create_future()

    return await start(use())


async def in_a_statement_of_a_block(pool: neon_async.Pool) -> Waiting:
    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SELECT pg_sleep(60)")

    return await start(use())


async def in_a_transaction(pool: neon_async.Pool) -> Waiting:
    async def use() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT pg_sleep(60)")

    return await start(use())


Place: TypeAlias = Callable[[neon_async.Pool], Awaitable[Waiting]]
PLACES = phrased(
    in_the_wait_queue,
    with_a_connection_handed_over,
    with_a_connection_handed_over_to_a_call,
    with_an_expired_connection_handed_over,
    with_a_connection_handed_over_that_has_ended,
    in_a_call,
    in_a_call_that_was_answered,
    in_a_block,
    in_a_statement_of_a_block,
    in_a_transaction,
)
loops = pytest.mark.parametrize(
    "new_loop",
    [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")],
)
NewLoop: TypeAlias = Callable[[], asyncio.AbstractEventLoop]


@pytest.mark.parametrize(
    ("inside", "pool_class"),
    [  # a release() that waits refuses to be closed, as any coroutine
        pytest.param(True, neon_async.Pool, id="in its event loop"),
        pytest.param(False, neon_async.Pool, id="while its event loop is stopped"),
        pytest.param(False, Releasing, id="while its event loop is stopped, with a release() of its own"),
    ],
)
@pytest.mark.parametrize("place", PLACES)
@loops
def test_a_pool_is_whole_after_a_coroutine_was_closed(
    postgres: LocalPostgres, new_loop: NewLoop, place: Place, inside: bool, pool_class: type[neon_async.Pool]
) -> None:
    async def begin() -> Waiting:
        await pool
        await pool.fetchval("SELECT 1")
        await until_settled(pool)
        waiting = await place(pool)
        if inside:
            waiting.close()
        return waiting

    async def go_on() -> None:
        async with asyncio.timeout(HANG):
            await assert_whole(pool)
            assert await pool.fetchval("SHOW work_mem") == "4MB"
            await pool.close()

    kept.clear()
    pool = make_pool(postgres, max_size=1, pool_class=pool_class)
    with contextlib.closing(new_loop()) as loop:
        waiting = loop.run_until_complete(begin())
        waiting.close()
        loop.run_until_complete(go_on())
    assert pool.stats().vacant == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
@loops
def test_a_caller_whose_event_loop_was_closed_after_the_hand_over_ends_without_an_error(
    postgres: LocalPostgres, new_loop: NewLoop
) -> None:
    async def begin() -> Waiting:
        await pool
        return await with_a_connection_handed_over(pool)

    pool = make_pool(postgres, max_size=1)
    loop = new_loop()
    waiting = loop.run_until_complete(begin())
    loop.close()
    waiting.close()
    pool.terminate()
    assert pool.stats().vacant == 1
    del waiting
    gc.collect()
