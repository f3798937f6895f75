"""An acquire, or the use of what it returned, is cancelled at each await, once and twice.

The cancelled task gets CancelledError at once, also while the server is silent, and no other task gets it. No slot is
lost, and no task, socket or session on the server is left.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.probes import ResetInBackground, assert_whole, until
from support.scenes import BLOCKED_QUERY, Reach, Scene, cancel, cases, close, once_and_twice, play, start

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------------------------------------------------------------------
# Waiting


async def in_the_wait_queue(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    await scene.acquire()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    return task


async def in_the_middle_of_the_wait_queue(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    await scene.acquire()
    first, task, last = (start(pool.fetchval("SELECT 1")) for _ in range(3))
    await until(lambda: scene.stats.waiting == 3)
    first.add_done_callback(lambda _: scene.over.set())
    last.add_done_callback(lambda _: scene.over.set())
    return task


async def after_the_hand_over_of_a_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    held = await pool.acquire()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    await pool.release(held)  # unused, so that there is nothing to wait for
    assert (scene.stats.waiting, scene.stats.idle) == (0, 1)
    return task


async def after_the_hand_over_of_a_connection_that_has_ended(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    held: Any = await pool.acquire()
    connection = held._con
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    await pool.release(held)
    connection.terminate()
    return task


async def after_the_hand_over_of_a_connection_that_has_expired(scene: Scene) -> asyncio.Task[Any]:
    task = await after_the_hand_over_of_a_connection(scene)
    await scene.pool.expire_connections()
    scene.endpoint.freeze()
    assert (scene.stats.waiting, scene.stats.idle) == (0, 1)
    return task


async def at_the_front_after_a_connection_that_had_expired(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    held = await pool.acquire()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    await pool.release(held)
    await pool.expire_connections()
    scene.endpoint.freeze()
    connects = scene.endpoint.connects
    # The acquire must not replace the connection itself: if it were cancelled meanwhile, the slot would be lost.
    await until(lambda: scene.endpoint.connects > connects or scene.stats.resetting)
    return task


async def during_a_wake(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    scene.endpoint.suspend()
    task = start(pool.acquire())
    await until(lambda: scene.endpoint.state == "waking")
    return task


async def during_a_dial_that_is_not_answered(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.endpoint.connects == 1)
    return task


async def during_init_of_a_new_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init=scene.hold)
    task = start(pool.acquire())
    await scene.reached.wait()
    return task


async def during_a_pause_between_dials(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    scene.endpoint.refuse()
    task = start(pool.acquire())
    await until(lambda: scene.stats.dial_failures and not scene.stats.connecting)
    assert scene.stats.waiting == 1
    return task


async def during_the_check_of_an_idle_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init_size=1, check_after_idle=0)
    scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.stats.checking == 1)
    return task


async def during_the_reset_after_another_caller(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, connection_class=ResetInBackground)
    async with pool.acquire() as connection:
        await connection.execute("SET search_path TO pg_catalog")
        scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    assert scene.stats.resetting == 1
    return task


async def during_the_close_of_an_expired_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, init_size=1)
    await pool.expire_connections()
    scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    assert scene.stats.resetting == 1
    return task


# ---------------------------------------------------------------------------------------------------------------------
# Setup


async def during_setup(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(setup=scene.hold)
    task = start(pool.acquire())
    await scene.reached.wait()
    return task


async def during_a_query_of_setup(scene: Scene) -> asyncio.Task[Any]:
    async def ask(connection: neon_async.Connection) -> None:
        if not scene.over.is_set():
            await connection.execute(BLOCKED_QUERY)

    pool = await scene.open(setup=ask)
    task = start(pool.acquire())
    await scene.until_running(BLOCKED_QUERY)
    scene.endpoint.freeze()
    return task


async def during_setup_at_the_start_of_async_with(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(setup=scene.hold)

    async def use() -> None:
        async with pool.acquire():
            pytest.fail("setup has not returned")

    task = start(use())
    await scene.reached.wait()
    return task


async def during_setup_that_has_released_its_connection(scene: Scene) -> asyncio.Task[Any]:
    async def release(connection: neon_async.Connection) -> None:
        if not scene.reached.is_set():
            await scene.pool.release(connection)
            await scene.hold()

    pool = await scene.open(max_size=1, setup=release)
    task = start(pool.acquire())
    await scene.reached.wait()
    assert (scene.stats.in_use, scene.stats.idle) == (0, 1)
    return task


@once_and_twice
@cases(
    in_the_wait_queue,
    in_the_middle_of_the_wait_queue,
    after_the_hand_over_of_a_connection,
    after_the_hand_over_of_a_connection_that_has_ended,
    after_the_hand_over_of_a_connection_that_has_expired,
    at_the_front_after_a_connection_that_had_expired,
    during_a_wake,
    during_a_dial_that_is_not_answered,
    during_init_of_a_new_connection,
    during_a_pause_between_dials,
    during_the_check_of_an_idle_connection,
    during_the_reset_after_another_caller,
    during_the_close_of_an_expired_connection,
    during_setup,
    during_a_query_of_setup,
    during_setup_at_the_start_of_async_with,
    during_setup_that_has_released_its_connection,
)
async def test_a_cancelled_acquire_ends_at_once_and_loses_no_slot(
    postgres: LocalPostgres, reach: Reach, times: int
) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        await scene.resume()
        await assert_whole(scene.pool)
        await close(scene)


@once_and_twice
async def test_a_cancelled_setup_leaves_the_connection_that_it_released_to_the_next_caller(
    postgres: LocalPostgres, times: int
) -> None:
    async with play(postgres) as scene:
        task = await during_setup_that_has_released_its_connection(scene)
        connection = await scene.acquire()
        await cancel(task, times)
        assert await connection.fetchval("SELECT 1") == 1
        await scene.resume()
        await close(scene)


# ---------------------------------------------------------------------------------------------------------------------
# Use


async def a_query(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    task = start(pool.fetchval("SELECT pg_sleep(3600)"))
    await scene.until_running("SELECT pg_sleep(3600)")
    return task


async def a_query_that_is_never_answered(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    task = start(pool.fetchval(BLOCKED_QUERY))
    await scene.until_running(BLOCKED_QUERY)
    scene.endpoint.freeze()
    return task


async def the_body_of_async_with(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SET search_path TO pg_catalog")
            scene.endpoint.freeze()
            await scene.hold()

    task = start(use())
    await scene.reached.wait()
    return task


async def a_transaction_block(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def use() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(BLOCKED_QUERY)

    task = start(use())
    await scene.until_running(BLOCKED_QUERY)
    scene.endpoint.freeze()
    return task


async def the_work_of_run_transaction(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def work(connection: neon_async.Connection) -> None:
        await connection.execute(BLOCKED_QUERY)

    task = start(pool.run_transaction(work))
    await scene.until_running(BLOCKED_QUERY)
    scene.endpoint.freeze()
    return task


async def the_commit_of_run_transaction(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def work(connection: neon_async.Connection) -> None:
        scene.endpoint.freeze()

    sent = scene.endpoint.client_bytes
    task = start(pool.run_transaction(work))
    await until(lambda: scene.stats.in_use and scene.endpoint.client_bytes > sent)
    await asyncio.sleep(0)
    return task


@once_and_twice
@cases(
    a_query,
    a_query_that_is_never_answered,
    the_body_of_async_with,
    a_transaction_block,
    the_work_of_run_transaction,
    the_commit_of_run_transaction,
)
async def test_a_connection_is_released_when_its_user_is_cancelled_in(
    postgres: LocalPostgres, reach: Reach, times: int
) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        assert scene.stats.in_use == 0
        await scene.resume()
        await assert_whole(scene.pool)
        await close(scene)
