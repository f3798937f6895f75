"""A release is cancelled at each await, once and twice: by its caller, by the end of the pool, and from outside.

A release that its caller cancels goes on in the background. When the background work itself is cancelled, the release
ends without CancelledError, because its own task was not cancelled. No slot is lost.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.probes import HANG, ResetInBackground, assert_whole, until
from support.scenes import (
    BLOCKED_QUERY,
    SILENCE,
    Reach,
    Scene,
    cancel,
    cases,
    close,
    once_and_twice,
    play,
    start,
    take_steps,
)

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


async def the_reset(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, connection_class=ResetInBackground)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


async def the_reset_before_its_first_step(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, connection_class=ResetInBackground)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await asyncio.sleep(0)
    assert scene.stats.resetting == 1
    return task


async def the_end_of_a_cancelled_query(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    connection = await pool.acquire()
    query = start(connection.execute(BLOCKED_QUERY))
    await scene.until_running(BLOCKED_QUERY)
    scene.endpoint.freeze()
    await cancel(query)
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


async def the_rollback_of_an_open_transaction(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    connection = await pool.acquire()
    await connection.execute("BEGIN")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


async def a_reset_function_of_the_caller(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, reset=scene.hold)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    task = start(pool.release(connection))
    await scene.reached.wait()
    return task


async def the_reset_method_of_a_connection_class(scene: Scene) -> asyncio.Task[Any]:
    class Slow(neon_async.Connection):
        __slots__ = ()

        async def reset(self, **keywords: Any) -> None:
            await scene.hold()
            await super().reset(**keywords)

    pool = await scene.open(max_size=1, connection_class=Slow)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    task = start(pool.release(connection))
    await scene.reached.wait()
    return task


async def the_close_of_a_worn_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, max_queries=1)
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


releases = (
    the_reset,
    the_reset_before_its_first_step,
    the_end_of_a_cancelled_query,
    the_rollback_of_an_open_transaction,
    a_reset_function_of_the_caller,
    the_reset_method_of_a_connection_class,
    the_close_of_a_worn_connection,
)


@once_and_twice
@cases(*releases)
async def test_a_cancelled_release_goes_on_in_the_background_with(
    postgres: LocalPostgres, reach: Reach, times: int
) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        assert scene.stats.resetting == 1
        await scene.resume()
        await assert_whole(scene.pool)
        await close(scene)


@pytest.mark.parametrize("end", ["close", "terminate", "terminate during close"])
@cases(*releases)
async def test_the_end_of_the_pool_ends_but_does_not_cancel_a_release_in(
    postgres: LocalPostgres, reach: Reach, end: str
) -> None:
    async with play(postgres) as scene:
        task = await reach(scene)
        await end_pool(scene, end)
        await assert_ended_but_not_cancelled(task)
        await scene.resume()


@once_and_twice
@cases(*releases)
async def test_a_release_ends_and_loses_no_slot_when_the_event_loop_cancels_all_tasks_in(
    postgres: LocalPostgres, reach: Reach, times: int
) -> None:
    """As `asyncio.run()` does at its end: work of the pool in the background is cancelled without the pool."""
    async with play(postgres) as scene:
        task = await reach(scene)
        [work] = scene.background
        await cancel(work, times)
        await assert_ended_but_not_cancelled(task)
        assert scene.stats.terminations == 1  # the next caller must not get a session that was not reset
        await scene.resume()
        await assert_whole(scene.pool)
        await close(scene)


# ---------------------------------------------------------------------------------------------------------------------
# A reset that goes ahead: there is nothing to wait for, so nothing to cancel


async def release_before_a_reset_ahead_is_answered(scene: Scene) -> neon_async.Pool:
    pool = await scene.open(max_size=1)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    scene.endpoint.freeze()
    releasing = pool.release(connection)
    with pytest.raises(StopIteration):
        releasing.send(None)  # it ends in its first step
    assert (scene.stats.idle, scene.stats.resets, scene.background) == (1, 0, [])
    return pool


async def test_a_release_whose_reset_goes_ahead_ends_in_its_first_step(postgres: LocalPostgres) -> None:
    async with play(postgres) as scene:
        pool = await release_before_a_reset_ahead_is_answered(scene)
        await scene.resume()
        assert await pool.fetchval("SHOW search_path") == '"$user", public'
        await assert_whole(pool)
        await close(scene)


@pytest.mark.parametrize("end", ["close", "terminate", "terminate during close"])
async def test_the_end_of_the_pool_needs_no_answer_to_a_reset_ahead(postgres: LocalPostgres, end: str) -> None:
    async with play(postgres) as scene:
        await release_before_a_reset_ahead_is_answered(scene)
        await end_pool(scene, end)
        assert scene.stats.vacant == 1
        await scene.resume()


@once_and_twice
async def test_a_query_that_is_cancelled_before_a_reset_ahead_is_answered_loses_no_slot(
    postgres: LocalPostgres, times: int
) -> None:
    async with play(postgres) as scene:
        pool = await release_before_a_reset_ahead_is_answered(scene)
        query = start(pool.execute("SELECT pg_sleep(600)"))
        await until(lambda: scene.stats.in_use == 1)
        await asyncio.sleep(0.01)
        await cancel(query, times)
        await scene.resume()
        assert await pool.fetchval("SHOW search_path") == '"$user", public'
        await assert_whole(pool)
        await close(scene)


async def end_pool(scene: Scene, how: str) -> None:
    async with asyncio.timeout(HANG):
        if how == "close":
            await scene.pool.close(timeout=0.05)
        elif how == "terminate":
            scene.pool.terminate()
            await until(lambda: scene.stats.vacant == scene.stats.max_size)
        else:
            closing = start(scene.pool.close(timeout=SILENCE))
            await take_steps(2)
            scene.pool.terminate()
            await closing


async def assert_ended_but_not_cancelled(task: asyncio.Task[Any]) -> None:
    done, _ = await asyncio.wait([task], timeout=HANG)
    assert done
    assert not task.cancelled()
    task.exception()  # it may say that the connection was not reset
