"""Callers wait for a connection first come, first served, and are refused when too many wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.probes import HANG, assert_balanced, make_pool, until, until_settled
from support.waiting import enqueue

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

# ---------------------------------------------------------------------------------------------------------------------
# Fairness


async def test_waiters_are_served_first_come_first_served(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)
        await connection.execute("SELECT 1")

    async with make_pool(postgres, max_size=3) as pool, asyncio.timeout(HANG):
        async with pool.acquire(), pool.acquire(), pool.acquire():
            tasks = await enqueue(pool, 50, then)
        await asyncio.gather(*tasks)
    assert served == list(range(50))


async def test_a_caller_that_arrives_at_a_release_does_not_overtake_the_waiters(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        tasks = await enqueue(pool, 3, then)
        await pool.release(connection)
        async with pool.acquire():  # at once, before any waiter has run
            served.append(-1)
        await asyncio.gather(*tasks)
    assert served == [0, 1, 2, -1]


async def test_a_waiter_that_gives_up_does_not_change_the_order_of_the_others(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        async with pool.acquire():
            tasks = await enqueue(pool, 6, then)
            for number in (0, 3, 5):
                tasks[number].cancel()
            await until(lambda: pool.stats().waiting == 3)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [1, 2, 4]


async def test_a_connection_handed_to_a_cancelled_waiter_goes_to_the_next_waiter(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        tasks = await enqueue(pool, 3, then)
        await pool.release(connection)  # unused, so handed at once to the first waiter, which has not run yet
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert served == [2]
        await until_settled(pool)


async def test_a_waiter_that_receives_a_dead_connection_stays_first_in_the_queue(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(await connection.fetchval("SELECT $1::int", number))

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection: Any = await pool.acquire()
        underlying = connection._con
        tasks = await enqueue(pool, 3, then)
        await pool.release(connection)  # unused, so handed at once to the first waiter, which has not run yet
        underlying.terminate()
        await asyncio.gather(*tasks)
        assert served == [0, 1, 2]
        await until_settled(pool)
        assert pool.stats().terminations == 1


async def test_the_connection_released_last_is_acquired_first(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=3) as pool:
        connections = [await pool.acquire() for _ in range(3)]
        pids = [connection.get_server_pid() for connection in connections]
        for number in (1, 2, 0):
            await pool.release(connections[number])
        again = [await pool.acquire() for _ in range(3)]
        assert [connection.get_server_pid() for connection in again] == [pids[0], pids[2], pids[1]]
        for connection in again:
            await pool.release(connection)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


async def test_more_than_max_waiting_callers_are_refused_at_once(postgres: LocalPostgres) -> None:
    async def then(number: int, connection: Any) -> int:
        return number

    async with make_pool(postgres, max_size=1, max_waiting=2) as pool, asyncio.timeout(HANG):
        async with pool.acquire():
            tasks = await enqueue(pool, 2, then)
            for _ in range(2):
                with pytest.raises(neon_async.PoolBusyError, match=r"1 of 1.* in use.*2 callers waiting") as caught:
                    await pool.acquire()
                assert "max_waiting=2" in str(caught.value)
                assert caught.value.retryable
            assert pool.stats().waiting == 2
        assert await asyncio.gather(*tasks) == [0, 1]
        assert await pool.fetchval("SELECT 1") == 1
        assert_balanced(pool)


@pytest.mark.parametrize(("waiting", "text"), [(0, "and 0 callers waiting"), (1, "and 1 caller waiting;")])
async def test_a_message_counts_the_waiters_in_proper_english(postgres: LocalPostgres, waiting: int, text: str) -> None:
    async def then(number: int, connection: Any) -> int:
        return number

    async with make_pool(postgres, max_size=1, max_waiting=waiting) as pool, asyncio.timeout(HANG):
        async with pool.acquire():
            tasks = await enqueue(pool, waiting, then)
            with pytest.raises(neon_async.PoolBusyError, match=text):
                await pool.acquire()
        await asyncio.gather(*tasks)


async def test_connections_that_a_pool_opens_with_do_not_count_as_waiting(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=3, init_size=3, max_waiting=1) as pool:
        assert pool.get_size() == 3


async def test_with_max_waiting_0_callers_get_free_connections_and_never_wait(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2, max_waiting=0) as pool, asyncio.timeout(HANG):
        first, second = await pool.acquire(), await pool.acquire()
        assert [await connection.fetchval("SELECT 1") for connection in (first, second)] == [1, 1]
        with pytest.raises(neon_async.PoolBusyError):
            await pool.acquire()
        pool.terminate()


async def test_callers_that_the_pool_can_connect_for_do_not_count_as_waiting(postgres: LocalPostgres) -> None:
    # The first ten requests after an idle night arrive at once, and the pool may open ten connections.
    async with make_pool(postgres, max_size=10, max_waiting=2) as pool, asyncio.timeout(HANG):
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(10))) == [1] * 10


async def test_a_caller_that_acquires_again_at_once_is_not_refused(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, max_waiting=0) as pool, asyncio.timeout(HANG):
        assert [await pool.fetchval("SELECT 1") for _ in range(20)] == [1] * 20


async def test_an_acquire_timeout_says_when_the_task_waits_for_itself(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2) as pool, pool.acquire(), pool.acquire():
        with pytest.raises(
            neon_async.PoolTimeoutError, match=r"This task itself holds 2 of them.*wait for itself"
        ) as caught:
            await pool.acquire(timeout=0.01)
        assert not neon_async.is_unavailable(caught.value), "a programming error"

        async def another_task() -> None:
            await pool.acquire(timeout=0.01)

        with pytest.raises(neon_async.PoolTimeoutError) as caught:
            await asyncio.ensure_future(another_task())
        assert "itself" not in str(caught.value)
        assert neon_async.is_unavailable(caught.value)
