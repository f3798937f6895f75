"""Who waits for a connection waits in line, for no longer than allowed, and is told why; also when the pool closes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import pytest
from support.probes import (
    HANG,
    assert_balanced,
    assert_secret_free,
    assert_whole,
    connected,
    make_pool,
    nothing_is_left,
    password_of,
    until,
    until_gone,
    until_settled,
)

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

NAME = "ep-cool-darkness-123456"
SOON = 0.2  # Seconds that callers allow who are meant to be disappointed.
NEVER = 100 * HANG


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint


async def wait_in_line(pool: neon_async.Pool, count: int, then: Callable[[int, Any], Any]) -> list[asyncio.Task[Any]]:
    """Let `count` tasks acquire, one after the other; each calls `then` with its number and what it got."""

    async def caller(number: int) -> Any:
        async with pool.acquire() as connection:
            return await then(number, connection)

    tasks = []
    for number in range(count):
        waiting = pool.stats().waiting
        tasks.append(asyncio.ensure_future(caller(number)))
        await until(lambda: pool.stats().waiting == waiting + 1)  # noqa: B023
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Deadlines: what an acquire waits for

# Opens a pool of one connection in a state in which an acquire has to wait, and returns what ends that state.
Phase: TypeAlias = Callable[[LocalEndpoint], Awaitable[tuple[neon_async.Pool, Callable[[], object]]]]


async def in_line(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    pool = await make_pool(endpoint, max_size=1)
    connection = await pool.acquire()
    return pool, lambda: asyncio.ensure_future(pool.release(connection))


async def behind_a_dial(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    endpoint.freeze()
    return await make_pool(endpoint, max_size=1), endpoint.thaw


async def between_two_dials(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    endpoint.refuse()
    return await make_pool(endpoint, max_size=1), endpoint.accept


async def behind_a_check(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    pool = await make_pool(endpoint, max_size=1, init_size=1, check_after_idle=0)
    endpoint.freeze()
    return pool, endpoint.thaw


async def behind_a_reset(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    pool = await make_pool(endpoint, max_size=1, release_timeout=NEVER)
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1")
        endpoint.freeze()
    return pool, endpoint.thaw


async def in_setup(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    go_on = asyncio.Event()

    async def setup(connection: Any) -> None:
        await go_on.wait()

    return await make_pool(endpoint, max_size=1, init_size=1, setup=setup), go_on.set


async def by_its_own_deadline(pool: neon_async.Pool) -> None:
    with pytest.raises(neon_async.PoolTimeoutError, match=NAME):
        await pool.acquire(timeout=SOON)


async def by_the_deadline_of_a_query(pool: neon_async.Pool) -> None:
    with pytest.raises(neon_async.PoolTimeoutError, match=NAME):
        await pool.fetchval("SELECT 1", timeout=SOON)


async def by_asyncio_timeout(pool: neon_async.Pool) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(SOON):
            await pool.acquire()
    assert not isinstance(caught.value, neon_async.NeonAsyncError)


async def by_wait_for(pool: neon_async.Pool) -> None:
    with pytest.raises(TimeoutError) as caught:
        await asyncio.wait_for(pool.fetchval("SELECT 1"), SOON)
    assert not isinstance(caught.value, neon_async.NeonAsyncError)


async def by_cancellation(pool: neon_async.Pool) -> None:
    task = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await asyncio.sleep(SOON)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def table(*functions: Callable[..., Any]) -> list[Any]:
    return [pytest.param(function, id=function.__name__) for function in functions]


@pytest.mark.parametrize(
    "phase", table(in_line, behind_a_dial, between_two_dials, behind_a_check, behind_a_reset, in_setup)
)
@pytest.mark.parametrize(
    "ended",
    table(by_its_own_deadline, by_the_deadline_of_a_query, by_asyncio_timeout, by_wait_for, by_cancellation),
)
async def test_an_acquire_ends_in_time_whatever_it_waits_for_and_costs_no_slot(
    endpoint: LocalEndpoint, phase: Phase, ended: Callable[[neon_async.Pool], Awaitable[None]]
) -> None:
    pool, lift = await phase(endpoint)
    async with asyncio.timeout(HANG):
        await ended(pool)
        assert pool.stats().waiting == 0
        assert_balanced(pool)
        lift()
        await assert_whole(pool)
        await pool.close()


async def test_a_late_acquire_tells_the_pools_numbers_and_the_latest_failure(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, max_size=3) as pool:
        async with pool.acquire():
            endpoint.refuse()
            with pytest.raises(
                neon_async.PoolTimeoutError, match=rf"within 0\.5 s: {NAME} has 1 of 3 connections in use"
            ) as caught:
                await pool.acquire(timeout=0.5)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value.__cause__, neon_async.ConnectError)
        assert caught.value.retryable
        assert_secret_free(caught.value, password_of(endpoint))


async def test_a_late_acquire_on_a_frozen_server_tells_the_latest_failure(endpoint: LocalEndpoint) -> None:
    endpoint.freeze()
    async with make_pool(endpoint, connect_timeout=0.1) as pool:
        with pytest.raises(neon_async.PoolTimeoutError, match="latest failure to connect is the cause") as caught:
            await pool.acquire(timeout=0.5)
        assert isinstance(caught.value.__cause__, neon_async.ConnectTimeoutError)
        assert_secret_free(caught.value, password_of(endpoint))


async def test_a_late_acquire_without_a_failure_has_no_cause(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool, pool.acquire():

        async def another_task() -> None:
            await pool.acquire(timeout=0.01)

        with pytest.raises(neon_async.PoolTimeoutError, match=r"1 of 1 connections in use.*raise max_size") as caught:
            await asyncio.ensure_future(another_task())
    assert caught.value.__cause__ is None


async def test_acquire_timeout_is_the_default_of_every_acquire(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, max_size=1, acquire_timeout=0.01)
    async with pool, pool.acquire(timeout=HANG), asyncio.timeout(HANG):
        with pytest.raises(neon_async.PoolTimeoutError, match=r"within 0\.01 s"):
            await pool.acquire()
        with pytest.raises(neon_async.PoolTimeoutError, match=r"within 0\.01 s"):
            await pool.fetchval("SELECT 1")
        assert pool.stats().timeouts == 2


@pytest.mark.parametrize(
    ("parameter", "default"),
    [
        ("acquire_timeout", 30.0),
        ("release_timeout", 5.0),
        ("max_waiting", None),
        ("min_size", 0),
        ("max_lifetime", 3600.0),
        ("max_inactive_connection_lifetime", 240.0),
        ("check_after_idle", 30.0),
        ("leak_after", None),
    ],
)
async def test_a_service_that_only_gives_a_dsn_gets_the_defaults(parameter: str, default: float | None) -> None:
    assert inspect.signature(neon_async.create_pool).parameters[parameter].default == default


async def test_the_timeout_of_setups_own_is_not_the_pools(postgres: LocalPostgres) -> None:
    async def setup(connection: Any) -> None:
        raise TimeoutError("my own")

    async with make_pool(postgres, max_size=1, setup=setup) as pool:
        with pytest.raises(TimeoutError, match="my own") as caught:
            await pool.acquire()
        assert not isinstance(caught.value, neon_async.PoolTimeoutError)
        await until_settled(pool)
        assert (pool.stats().in_use, pool.stats().timeouts) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Deadlines: what is done with a connection to a server that has fallen silent

Call: TypeAlias = Callable[[neon_async.Pool, float | None], Awaitable[object]]


async def fetch_within(pool: neon_async.Pool, limit: float | None) -> object:
    async with pool.acquire() as connection:
        return await connection.fetchval("SELECT 1", timeout=limit)


CALLS = pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda pool, timeout: pool.fetch("SELECT 1", timeout=timeout), id="fetch"),
        pytest.param(lambda pool, timeout: pool.fetchrow("SELECT 1", timeout=timeout), id="fetchrow"),
        pytest.param(lambda pool, timeout: pool.fetchval("SELECT 1", timeout=timeout), id="fetchval"),
        pytest.param(lambda pool, timeout: pool.execute("SELECT 1", timeout=timeout), id="execute"),
        pytest.param(lambda pool, timeout: pool.executemany("SELECT $1::int", [(1,)], timeout=timeout), id="many"),
        pytest.param(
            lambda pool, timeout: pool.copy_from_query("SELECT 1", output=lambda _: None, timeout=timeout), id="copy"
        ),
        pytest.param(fetch_within, id="within acquire"),
    ],
)


@contextlib.asynccontextmanager
async def frozen_with_a_connection(
    endpoint: LocalEndpoint, *, release_timeout: float = NEVER, **keywords: Any
) -> AsyncIterator[neon_async.Pool]:
    """A pool of one connection, which is there and believed to be alive, while the server answers nothing."""
    pool = await make_pool(endpoint, max_size=1, release_timeout=release_timeout, **keywords)
    await pool.execute("SELECT 1")
    await until_settled(pool)
    endpoint.freeze()
    try:
        yield pool
    finally:
        endpoint.thaw()
        pool.terminate()


@CALLS
async def test_timeout_ends_any_call_to_a_frozen_server(endpoint: LocalEndpoint, call: Call) -> None:
    async with frozen_with_a_connection(endpoint) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await call(pool, SOON)


@CALLS
async def test_asyncio_timeout_ends_any_call_to_a_frozen_server(endpoint: LocalEndpoint, call: Call) -> None:
    async with frozen_with_a_connection(endpoint) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON):
                await call(pool, None)


@CALLS
async def test_cancellation_ends_any_call_to_a_frozen_server(endpoint: LocalEndpoint, call: Call) -> None:
    async with frozen_with_a_connection(endpoint) as pool, asyncio.timeout(HANG):
        task = asyncio.ensure_future(call(pool, None))
        await until(lambda: pool.stats().in_use == 1)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("own", [True, False], ids=["timeout=", "asyncio.timeout"])
async def test_a_transaction_on_a_frozen_server_is_left_in_time(endpoint: LocalEndpoint, own: bool) -> None:
    pool = await make_pool(endpoint, max_size=1)

    async def work(connection: Any) -> None:
        async with asyncio.timeout(None if own else SOON), connection.transaction():
            endpoint.freeze()
            await connection.fetchval("SELECT 1", timeout=SOON if own else None)

    async with asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            with pytest.raises(TimeoutError):
                await work(connection)
        endpoint.thaw()
        await assert_whole(pool)
        await pool.close()


@pytest.mark.parametrize("cancels", [1, 2, 3])
async def test_no_slot_is_lost_on_a_frozen_server_however_often_its_user_is_cancelled(
    endpoint: LocalEndpoint, cancels: int
) -> None:
    async with frozen_with_a_connection(endpoint, release_timeout=SOON) as pool, asyncio.timeout(HANG):

        async def use() -> None:
            connection = await pool.acquire()
            try:
                await connection.fetchval("SELECT 1")
            finally:
                await pool.release(connection)

        task = asyncio.ensure_future(use())
        await until(lambda: pool.stats().in_use == 1)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: pool.stats().vacant == 1)
        assert_balanced(pool)
        endpoint.thaw()
        await assert_whole(pool)


async def test_release_timeout_frees_the_slot_of_a_frozen_connection(endpoint: LocalEndpoint) -> None:
    async with frozen_with_a_connection(endpoint, release_timeout=SOON) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT 1", timeout=SOON)
        assert pool.stats().resetting == 1
        await until(lambda: pool.stats().vacant == 1)
        assert pool.stats().terminations == 1
        assert_balanced(pool)
        endpoint.thaw()
        await until(lambda: endpoint.connections == 0)


@pytest.mark.parametrize("own", [True, False], ids=["timeout=", "release_timeout="])
async def test_an_explicit_release_on_a_frozen_server_ends_in_time(endpoint: LocalEndpoint, own: bool) -> None:
    pool = await make_pool(endpoint, max_size=1, release_timeout=NEVER if own else SOON)
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    endpoint.freeze()
    async with asyncio.timeout(HANG):
        with pytest.raises(neon_async.PoolTimeoutError, match=r"not reset within 0\.2 s.*terminated") as caught:
            await pool.release(connection, timeout=SOON if own else None)
    assert_secret_free(caught.value, password_of(endpoint))
    assert pool.stats().vacant == 1
    endpoint.thaw()
    await assert_whole(pool)
    await pool.close()


async def test_what_was_frozen_leaves_nothing_behind(endpoint: LocalEndpoint) -> None:
    """The cancel request that asyncpg sends for a query that was given up hangs, too."""
    async with nothing_is_left(), frozen_with_a_connection(endpoint, release_timeout=SOON) as pool:
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT 1", timeout=SOON)
        await until(lambda: pool.stats().vacant == 1)
        async with asyncio.timeout(HANG):
            await pool.close()


# ---------------------------------------------------------------------------------------------------------------------
# Fair


async def test_waiters_are_served_in_the_order_they_came(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)
        await connection.execute("SELECT 1")

    async with make_pool(postgres, max_size=3) as pool, asyncio.timeout(HANG):
        async with pool.acquire(), pool.acquire(), pool.acquire():
            tasks = await wait_in_line(pool, 50, then)
        await asyncio.gather(*tasks)
    assert served == list(range(50))


async def test_who_comes_when_a_connection_comes_back_does_not_overtake(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        tasks = await wait_in_line(pool, 3, then)
        await pool.release(connection)
        async with pool.acquire():  # at once, before any of them has run
            served.append(-1)
        await asyncio.gather(*tasks)
    assert served == [0, 1, 2, -1]


async def test_who_gives_up_leaves_the_order_of_the_others(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        async with pool.acquire():
            tasks = await wait_in_line(pool, 6, then)
            for number in (0, 3, 5):
                tasks[number].cancel()
            await until(lambda: pool.stats().waiting == 3)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [1, 2, 4]


async def test_a_connection_given_to_who_is_cancelled_goes_to_the_next(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(number)

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        tasks = await wait_in_line(pool, 3, then)
        await pool.release(connection)  # untouched: it is the first one's, who has not run since
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert served == [2]
        await until_settled(pool)


async def test_who_is_given_a_connection_that_has_just_ended_stays_first_in_line(postgres: LocalPostgres) -> None:
    served = []

    async def then(number: int, connection: Any) -> None:
        served.append(await connection.fetchval("SELECT $1::int", number))

    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection: Any = await pool.acquire()
        behind = connection._con
        tasks = await wait_in_line(pool, 3, then)
        await pool.release(connection)  # untouched: it is the first one's, who has not run since
        behind.terminate()
        await asyncio.gather(*tasks)
        assert served == [0, 1, 2]
        await until_settled(pool)
        assert pool.stats().terminations == 1


async def test_the_connection_that_came_back_last_goes_out_first(postgres: LocalPostgres) -> None:
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
# Bounded


async def test_more_than_max_waiting_callers_are_refused_at_once(postgres: LocalPostgres) -> None:
    async def then(number: int, connection: Any) -> int:
        return number

    async with make_pool(postgres, max_size=1, max_waiting=2) as pool, asyncio.timeout(HANG):
        async with pool.acquire():
            tasks = await wait_in_line(pool, 2, then)
            for _ in range(2):
                with pytest.raises(neon_async.PoolBusyError, match=r"1 of 1.* in use.*2 callers waiting") as caught:
                    await pool.acquire()
                assert "max_waiting=2" in str(caught.value)
                assert caught.value.retryable
            assert pool.stats().waiting == 2
        assert await asyncio.gather(*tasks) == [0, 1]
        assert await pool.fetchval("SELECT 1") == 1
        assert_balanced(pool)


async def test_a_pool_that_opens_with_connections_does_not_count_them_as_waiting(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=3, init_size=3, max_waiting=1) as pool:
        assert pool.get_size() == 3


async def test_with_max_waiting_0_callers_get_what_is_free_and_wait_for_nobody(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2, max_waiting=0) as pool, asyncio.timeout(HANG):
        first, second = await pool.acquire(), await pool.acquire()
        assert [await one.fetchval("SELECT 1") for one in (first, second)] == [1, 1]
        with pytest.raises(neon_async.PoolBusyError):
            await pool.acquire()
        pool.terminate()


async def test_callers_for_whom_there_is_room_do_not_count_as_waiting(postgres: LocalPostgres) -> None:
    """After a night of sleep the first ten requests come at once, and there is room for ten."""
    async with make_pool(postgres, max_size=10, max_waiting=2) as pool, asyncio.timeout(HANG):
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(10))) == [1] * 10


async def test_a_task_that_waits_for_itself_is_told_so(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2) as pool, pool.acquire(), pool.acquire():
        with pytest.raises(neon_async.PoolTimeoutError, match=r"This task itself holds 2 of them.*wait for itself"):
            await pool.acquire(timeout=0.01)

        async def another_task() -> None:
            await pool.acquire(timeout=0.01)

        with pytest.raises(neon_async.PoolTimeoutError) as caught:
            await asyncio.ensure_future(another_task())
        assert "itself" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Close


async def test_close_tells_waiters_first_and_then_waits_for_connections(postgres: LocalPostgres) -> None:
    name = f"closing {id(object())}"
    async with connected(postgres) as admin, nothing_is_left(), asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=2, init_size=2, application_name=name)
        connection = await pool.acquire()
        held = await pool.acquire()
        tasks = await wait_in_line(pool, 5, lambda *_: pytest.fail("nobody is served any more"))
        closing = asyncio.ensure_future(pool.close())
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, neon_async.PoolClosedError)
        with pytest.raises(neon_async.PoolClosedError, match="closing"):
            await pool.acquire()
        assert await connection.fetchval("SELECT 1") == 1
        assert await held.fetchval("SELECT 1") == 1
        await pool.release(connection)
        await asyncio.sleep(0.01)
        assert not closing.done()
        await pool.release(held)
        await closing
        with pytest.raises(neon_async.PoolClosedError, match="closed"):
            await pool.acquire()
        assert pool.stats().vacant == 2
        assert_balanced(pool)
        await until_gone(admin, name)
        del tasks, closing


async def test_idle_connections_close_while_others_are_out(postgres: LocalPostgres) -> None:
    pool = await make_pool(postgres, max_size=3, init_size=3)
    connection = await pool.acquire()
    closing = asyncio.ensure_future(pool.close())
    await until(lambda: pool.get_size() == 1)
    assert not closing.done()
    await pool.release(connection)
    async with asyncio.timeout(HANG):
        await closing


async def test_close_ends_in_time_and_terminates_what_did_not_come_back(postgres: LocalPostgres) -> None:
    name = f"stays out {id(object())}"
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
        async with frozen_with_a_connection(endpoint, **keywords) as pool, asyncio.timeout(HANG):
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


async def test_a_cancelled_close_terminates_at_once(postgres: LocalPostgres) -> None:
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


async def test_two_who_close_both_wait_for_the_end(postgres: LocalPostgres) -> None:
    pool = await make_pool(postgres, max_size=1)
    connection = await pool.acquire()
    closings = [asyncio.ensure_future(pool.close()) for _ in range(2)]
    await until(pool.is_closing)
    assert not any(one.done() for one in closings)
    await pool.release(connection)
    async with asyncio.timeout(HANG):
        await asyncio.gather(*closings)
    assert pool.stats().vacant == 1


async def test_close_waits_for_the_reset_of_what_came_back(postgres: LocalPostgres) -> None:
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


async def test_a_terminated_pool_tells_its_waiters(postgres: LocalPostgres) -> None:
    async with nothing_is_left(), asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=1)
        await pool.acquire()
        tasks = await wait_in_line(pool, 3, lambda *_: pytest.fail("nobody is served any more"))
        pool.terminate()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, neon_async.PoolClosedError)
        assert pool.stats().vacant == 1
        assert_balanced(pool)
        del tasks, error


@pytest.mark.parametrize("seconds", ["1", -1, float("nan"), float("inf"), True], ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda pool, proxy, timeout: pool.acquire(timeout=timeout).__aenter__(), id="acquire"),
        pytest.param(lambda pool, proxy, timeout: pool.fetchval("SELECT 1", timeout=timeout), id="fetchval"),
        pytest.param(lambda pool, proxy, timeout: pool.release(proxy, timeout=timeout), id="release"),
        pytest.param(lambda pool, proxy, timeout: pool.close(timeout=timeout), id="close"),
    ],
)
async def test_a_timeout_that_is_no_number_of_seconds_is_refused_and_changes_nothing(
    postgres: LocalPostgres, call: Callable[..., Awaitable[Any]], seconds: Any
) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        proxy = await pool.acquire()
        with pytest.raises(
            neon_async.ConfigurationError, match=r"timeout must be seconds from 0, for at once, to .* not"
        ):
            await call(pool, proxy, seconds)
        assert await proxy.fetchval("SELECT 1") == 1
        await pool.release(proxy)
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_caller_who_goes_on_at_once_is_not_one_too_many(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, max_waiting=0) as pool, asyncio.timeout(HANG):
        assert [await pool.fetchval("SELECT 1") for _ in range(20)] == [1] * 20


def test_an_open_pool_is_refused_in_another_event_loop(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(pool.__aenter__())
        assert first.run(pool.fetchval("SELECT 1")) == 1
        with pytest.raises(neon_async.UnsupportedEventLoopError, match="opened in another event loop"):
            second.run(pool.fetchval("SELECT 1"))
        assert first.run(pool.fetchval("SELECT 1")) == 1
        first.run(pool.close())
