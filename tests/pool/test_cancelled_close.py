"""The opening and the close of a pool are cancelled at each await, once and twice.

Either way the pool ends: no slot, task, socket or session on the server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, until
from support.scenes import SILENCE, Reach, Scene, cancel, cases, once_and_twice, play, start, take_steps

from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------------------------------------------------------------------
# Opening


async def its_first_dial(scene: Scene) -> asyncio.Task[Any]:
    pool = scene.make(init_size=2)
    scene.endpoint.freeze()
    task = start(pool)
    await until(lambda: scene.endpoint.connects == 1)
    return task


async def the_hand_over_of_its_first_connection(scene: Scene) -> asyncio.Task[Any]:
    task = start(scene.make(init_size=2))
    await until_idle_or_reserved(scene, 1)
    return task


async def its_second_dial(scene: Scene) -> asyncio.Task[Any]:
    async def init(connection: asyncpg.Connection[Any]) -> None:
        scene.endpoint.freeze()

    pool = scene.make(init_size=2, init=init)
    task = start(pool)
    await until(lambda: scene.stats.size == 1 and scene.stats.connecting == 1)
    await take_steps(3)  # until the waiter for the first connection has run, too
    return task


async def the_hand_over_of_its_last_connection(scene: Scene) -> asyncio.Task[Any]:
    task = start(scene.make(init_size=2))
    await until_idle_or_reserved(scene, 2)
    return task


async def its_last_step(scene: Scene) -> asyncio.Task[Any]:
    task = await the_hand_over_of_its_last_connection(scene)
    await take_steps(2)  # the waiter for the last connection has returned, and the task of the opening has not run
    assert not task.done()
    return task


async def init_of_its_connections(scene: Scene) -> asyncio.Task[Any]:
    pool = scene.make(init_size=2, init=scene.hold)
    task = start(pool)
    await scene.reached.wait()
    return task


async def its_pause_between_dials(scene: Scene) -> asyncio.Task[Any]:
    pool = scene.make(init_size=2)
    scene.endpoint.refuse()
    task = start(pool)
    await until(lambda: scene.stats.dial_failures and not scene.stats.connecting)
    return task


async def until_idle_or_reserved(scene: Scene, count: int) -> None:
    """Wait until `count` connections are idle or handed over, in the same iteration of the event loop."""
    async with asyncio.timeout(HANG):
        while scene.stats.idle < count:
            await asyncio.sleep(0)


@once_and_twice
@cases(
    its_first_dial,
    the_hand_over_of_its_first_connection,
    its_second_dial,
    the_hand_over_of_its_last_connection,
    its_last_step,
    init_of_its_connections,
    its_pause_between_dials,
)
async def test_an_opening_leaves_nothing_when_it_is_cancelled_in(
    postgres: LocalPostgres, reach: Reach, times: int
) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        await scene.resume()


# ---------------------------------------------------------------------------------------------------------------------
# Close


async def a_connection_in_use(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init_size=2)
    await pool.acquire()
    task = start(pool.close(timeout=SILENCE))
    await until(lambda: scene.stats.size == 1)
    return task


async def a_connection_in_use_that_another_close_waits_for(scene: Scene) -> asyncio.Task[Any]:
    task = await a_connection_in_use(scene)
    scene.waiting = [start(scene.pool.close(timeout=SILENCE))]
    await asyncio.sleep(0)
    return task


async def the_close_of_idle_connections(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init_size=2)
    scene.endpoint.freeze()
    task = start(pool.close(timeout=SILENCE))
    await until(lambda: scene.stats.resetting == 2)
    return task


async def a_reset(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    async with pool.acquire() as connection:
        await connection.execute("SET search_path TO pg_catalog")
        scene.endpoint.freeze()
    task = start(pool.close(timeout=SILENCE))
    await until(pool.is_closing)
    assert scene.stats.resetting == 1
    return task


async def a_dial_that_suppresses_its_cancellation(scene: Scene) -> asyncio.Task[Any]:
    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await scene.hold()
        await scene.over.wait()
        return "of no use any more"

    pool = await scene.open(password=stubborn)
    scene.start_waiters()
    await scene.reached.wait()
    task = start(pool.close(timeout=SILENCE))
    await until(pool.is_closing)
    return task


async def a_reset_that_goes_on_after_the_timeout_of_the_close(scene: Scene) -> asyncio.Task[Any]:
    async def stubborn(_: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await scene.hold()
        await scene.over.wait()

    pool = await scene.open(reset=stubborn)
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    scene.waiting = [start(pool.release(connection))]
    await scene.reached.wait()
    task = start(pool.close(timeout=0.001))
    await until(lambda: scene.stats.size == 0)
    return task


@once_and_twice
@cases(
    a_connection_in_use,
    a_connection_in_use_that_another_close_waits_for,
    the_close_of_idle_connections,
    a_reset,
    a_dial_that_suppresses_its_cancellation,
    a_reset_that_goes_on_after_the_timeout_of_the_close,
)
async def test_a_close_ends_the_pool_when_it_is_cancelled_while_it_waits_for(
    postgres: LocalPostgres, reach: Reach, times: int
) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        assert scene.pool.is_closing()
        await scene.resume()
        async with asyncio.timeout(HANG):
            await asyncio.gather(*scene.waiting, return_exceptions=True)
            await until(lambda: scene.stats.vacant == scene.stats.max_size)
        scene.waiting.clear()
