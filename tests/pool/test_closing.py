"""A pool closes within its timeout, fails its waiters and leaves nothing open."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, assert_balanced, connected, make_pool, nothing_is_left, password_of, until, until_gone
from support.waiting import enqueue, frozen_pool

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

SOON = 0.2  # The seconds allowed to a call that is expected to time out.
NEVER = 100 * HANG


# ---------------------------------------------------------------------------------------------------------------------
# close()


async def test_a_pool_can_be_closed_and_terminated_again(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        pool = await make_pool(postgres, init_size=2)
        await pool.close()
        await pool.close()
        pool.terminate()
        assert (pool.get_size(), pool.is_closing()) == (0, True)
        with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
            await pool.acquire()


async def test_close_fails_the_waiters_first_and_then_waits_for_connections_in_use(postgres: LocalPostgres) -> None:
    name = f"closing {id(object())}"
    async with connected(postgres) as admin, nothing_is_left(), asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=2, init_size=2, application_name=name)
        connection = await pool.acquire()
        held = await pool.acquire()
        tasks = await enqueue(pool, 5, lambda *_: pytest.fail("a waiter of a closed pool was served"))
        closing = asyncio.ensure_future(pool.close())
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, neon_async.PoolClosedError)
            assert neon_async.is_unavailable(error), "the service stops"
        with pytest.raises(neon_async.PoolClosedError, match="closing") as closing_error:
            await pool.acquire()
        assert neon_async.is_unavailable(closing_error.value)
        assert await connection.fetchval("SELECT 1") == 1
        assert await held.fetchval("SELECT 1") == 1
        await pool.release(connection)
        await asyncio.sleep(0.01)
        assert not closing.done()
        await pool.release(held)
        await closing
        with pytest.raises(neon_async.PoolClosedError, match="closed") as closed_error:
            await pool.acquire()
        assert not neon_async.is_unavailable(closed_error.value), "a programming error"
        assert pool.stats().vacant == 2
        assert_balanced(pool)
        await until_gone(admin, name)
        del tasks, closing


async def test_close_closes_idle_connections_while_others_are_in_use(postgres: LocalPostgres) -> None:
    pool = await make_pool(postgres, max_size=3, init_size=3)
    connection = await pool.acquire()
    closing = asyncio.ensure_future(pool.close())
    await until(lambda: pool.get_size() == 1)
    assert not closing.done()
    await pool.release(connection)
    async with asyncio.timeout(HANG):
        await closing


async def test_close_waits_for_the_reset_of_a_released_connection(postgres: LocalPostgres) -> None:
    go_on, seen = asyncio.Event(), []

    async def reset(connection: Any) -> None:
        await go_on.wait()
        seen.append(await connection.fetchval("SELECT 1"))

    pool = await make_pool(postgres, max_size=1, reset=reset)
    await pool.fetchval("SELECT 1")
    closing = asyncio.ensure_future(pool.close())
    await until(pool.is_closing)
    go_on.set()
    async with asyncio.timeout(HANG):
        await closing
    assert seen == [1]
    assert pool.stats().vacant == 1


async def test_two_concurrent_closes_both_wait_until_the_pool_is_closed(postgres: LocalPostgres) -> None:
    pool = await make_pool(postgres, max_size=1)
    connection = await pool.acquire()
    closings = [asyncio.ensure_future(pool.close()) for _ in range(2)]
    await until(pool.is_closing)
    assert not any(closing.done() for closing in closings)
    await pool.release(connection)
    async with asyncio.timeout(HANG):
        await asyncio.gather(*closings)
    assert pool.stats().vacant == 1


async def test_close_terminates_connections_that_are_not_released_in_time(postgres: LocalPostgres) -> None:
    name = f"not released {id(object())}"
    async with connected(postgres) as admin, asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=2, application_name=name)
        connection = await pool.acquire()
        sleeping = asyncio.ensure_future(pool.fetchval("SELECT pg_sleep(3600)"))
        await until(lambda: pool.stats().in_use == 2)
        await pool.close(timeout=SOON)
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await sleeping
        with pytest.raises(asyncpg.InterfaceError):
            await connection.fetchval("SELECT 1")
        await pool.release(connection)
        assert (pool.get_size(), pool.stats().vacant) == (0, 2)
        assert_balanced(pool)
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(3600)'")
        await until_gone(admin, name)


@pytest.mark.parametrize("where", ["idle", "in use", "resetting", "dialing", "checking"])
async def test_close_ends_in_time_on_a_frozen_server(endpoint: LocalEndpoint, where: str) -> None:
    async with nothing_is_left():
        keywords: dict[str, Any] = {"check_after_idle": 0} if where == "checking" else {}
        async with frozen_pool(endpoint, **keywords) as pool, asyncio.timeout(HANG):
            task: asyncio.Task[Any] | None = None
            if where == "dialing":
                await pool.expire_connections()
            if where != "idle":
                task = asyncio.ensure_future(pool.fetchval("SELECT 1", timeout=SOON if where == "resetting" else None))
                await until(lambda: pool.stats().in_use + pool.stats().waiting)
            if where == "resetting":
                await until(lambda: pool.stats().resetting)
            await pool.close(timeout=SOON)
            assert pool.stats().vacant == 1
            assert_balanced(pool)
            if task is not None:
                with pytest.raises((neon_async.PoolClosedError, asyncpg.PostgresConnectionError, TimeoutError)):
                    await task
                del task


async def test_a_cancelled_close_terminates_every_connection_at_once(postgres: LocalPostgres) -> None:
    async with nothing_is_left(), asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=1)
        await pool.acquire()
        closing = asyncio.ensure_future(pool.close(timeout=NEVER))
        await until(pool.is_closing)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert (pool.is_closing(), pool.stats().vacant) == (True, 1)
        assert_balanced(pool)
        del closing


# ---------------------------------------------------------------------------------------------------------------------
# terminate()


async def test_terminate_ends_every_connection(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        pool = await make_pool(postgres, init_size=3)
        connection: Any = await pool.acquire()
        underlying = connection._con
        pool.terminate()
        await pool.close()
        assert underlying.is_closed()


async def test_terminate_fails_the_waiters(postgres: LocalPostgres) -> None:
    async with nothing_is_left(), asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=1)
        await pool.acquire()
        tasks = await enqueue(pool, 3, lambda *_: pytest.fail("a waiter of a closed pool was served"))
        pool.terminate()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, neon_async.PoolClosedError)
        assert pool.stats().vacant == 1
        assert_balanced(pool)
        del tasks, error


async def test_a_connect_that_finishes_after_terminate_leaves_no_connection(postgres: LocalPostgres) -> None:
    arrived, go_on = asyncio.Event(), asyncio.Event()
    secret = password_of(postgres)
    name = f"late {id(arrived)}"

    async def password() -> str:
        arrived.set()
        await go_on.wait()
        return secret

    async with connected(postgres) as admin, nothing_is_left():
        pool = make_pool(postgres, password=password, application_name=name)
        await pool
        task = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await arrived.wait()
        pool.terminate()
        go_on.set()
        with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
            await task
        del task
        await until_gone(admin, name)
