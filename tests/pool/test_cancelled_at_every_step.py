"""Each call of a pool is cancelled at each step of the event loop, also at those that no other case names.

Afterwards the pool is whole, or has ended where the call ends it. Only the cancelled task gets CancelledError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from support.probes import HANG, assert_balanced, assert_whole, until
from support.scenes import SILENCE, Scene, cancel, close, phrased, play, start, take_steps

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

_T = TypeVar("_T")

STEPS = range(0, 61, 2)


async def cancel_after(steps: int, task: asyncio.Task[_T]) -> _T | None:
    """Cancel `task` after `steps` steps. Return its result if it has ended by then."""
    await take_steps(steps)
    if task.done():
        return task.result()
    await cancel(task)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Calls after which the pool goes on


async def acquire_in_the_wait_queue(pool: neon_async.Pool, steps: int) -> None:
    others = [start(pool.fetchval("SELECT 1")) for _ in range(2)]
    connection = await cancel_after(steps, start(pool.acquire()))
    if connection is not None:
        await pool.release(connection)
    await asyncio.gather(*others)


async def acquire_cold(pool: neon_async.Pool, steps: int) -> None:
    await pool.expire_connections()
    connection = await cancel_after(steps, start(pool.acquire()))
    if connection is not None:
        await pool.release(connection)


async def fetchval_warm(pool: neon_async.Pool, steps: int) -> None:
    assert await cancel_after(steps, start(pool.fetchval("SELECT 1"))) in (1, None)


async def fetchval_cold(pool: neon_async.Pool, steps: int) -> None:
    await pool.expire_connections()
    assert await cancel_after(steps, start(pool.fetchval("SELECT 1"))) in (1, None)


async def release(pool: neon_async.Pool, steps: int) -> None:
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    waiter = start(pool.fetchval("SHOW search_path"))
    await cancel_after(steps, start(pool.release(connection)))
    await pool.release(connection)  # for the cancellation before its first step; a second release changes nothing
    assert await waiter == '"$user", public'


async def release_of_an_expired_connection(pool: neon_async.Pool, steps: int) -> None:
    connection = await pool.acquire()
    await pool.expire_connections()
    await connection.execute("SELECT 1")
    await cancel_after(steps, start(pool.release(connection)))
    await pool.release(connection)


async def run_transaction(pool: neon_async.Pool, steps: int) -> None:
    async def work(connection: neon_async.Connection) -> int:
        assert await connection.fetchval("SELECT 1") == 1
        return 1

    assert await cancel_after(steps, start(pool.run_transaction(work))) in (1, None)


@pytest.mark.parametrize("max_size", [1, 2])
@pytest.mark.parametrize(
    "use",
    phrased(
        acquire_in_the_wait_queue,
        acquire_cold,
        fetchval_warm,
        fetchval_cold,
        release,
        release_of_an_expired_connection,
        run_transaction,
    ),
)
async def test_a_pool_is_whole_after_a_cancellation_at_any_step_of(
    postgres: LocalPostgres, use: Callable[[neon_async.Pool, int], Awaitable[None]], max_size: int
) -> None:
    async with play(postgres) as scene:
        pool = await scene.open(dsn=postgres.dsn, max_size=max_size)
        for steps in STEPS:
            async with asyncio.timeout(HANG):
                await use(pool, steps)
            await assert_whole(pool)
        await close(scene)


# ---------------------------------------------------------------------------------------------------------------------
# Calls that start or end the pool


async def open_pool(scene: Scene, steps: int) -> None:
    pool = scene.make(dsn=scene.server.dsn, init_size=2)
    if await cancel_after(steps, start(pool)) is not None:
        await close(scene)


async def close_pool(scene: Scene, steps: int) -> None:
    """Cancel a close while connections are in use, being reset and being made, and a caller waits."""

    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SET search_path TO pg_catalog")

    pool = await scene.open(dsn=scene.server.dsn, init_size=2, max_size=3)
    scene.waiting = [start(use()) for _ in range(4)]
    await take_steps(2)
    await cancel_after(steps, start(pool.close(timeout=SILENCE)))


async def before_terminate(scene: Scene, steps: int) -> None:
    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SET search_path TO pg_catalog")
        await pool.release(await pool.acquire())

    pool = await scene.open(dsn=scene.server.dsn, init_size=2, max_size=3)
    await pool.expire_connections()
    scene.waiting = [start(use()) for _ in range(4)]
    await take_steps(steps)
    pool.terminate()


@pytest.mark.parametrize("use", phrased(open_pool, close_pool, before_terminate))
async def test_a_pool_has_ended_after_a_cancellation_at_any_step_of(
    postgres: LocalPostgres, use: Callable[[Scene, int], Awaitable[None]]
) -> None:
    async with play(postgres) as scene:
        for steps in STEPS[1:]:  # a call that is cancelled before its first step has not been made
            async with asyncio.timeout(HANG):
                await use(scene, steps)
                for failure in await asyncio.gather(*scene.waiting, return_exceptions=True):
                    # CancelledError is for the task that was cancelled.
                    assert isinstance(failure, Exception | None), f"after {steps} steps: {failure!r}"
                scene.waiting.clear()
                await until(lambda: scene.stats.vacant == scene.stats.max_size)
            assert_balanced(scene.pool)
