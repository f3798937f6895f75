"""Every call to a pool ends in time, whatever it waits for, and says why."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest
from support.probes import (
    HANG,
    ResetInBackground,
    assert_balanced,
    assert_secret_free,
    assert_whole,
    make_pool,
    nothing_is_left,
    password_of,
    until,
    until_settled,
)
from support.waiting import frozen_pool

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

NAME = "ep-cool-darkness-123456"
SOON = 0.2  # The seconds allowed to a call that is expected to time out.
NEVER = 100 * HANG


# ---------------------------------------------------------------------------------------------------------------------
# Acquire


# Opens a pool of one connection in a phase in which an acquire has to wait. Returns the pool and what ends the phase.
Phase: TypeAlias = Callable[[LocalEndpoint], Awaitable[tuple[neon_async.Pool, Callable[[], object]]]]


async def while_all_are_in_use(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    pool = await make_pool(endpoint, max_size=1)
    connection = await pool.acquire()
    return pool, lambda: asyncio.ensure_future(pool.release(connection))


async def while_connecting(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    endpoint.freeze()
    return await make_pool(endpoint, max_size=1), endpoint.thaw


async def between_two_attempts(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    endpoint.refuse()
    return await make_pool(endpoint, max_size=1), endpoint.accept


async def while_checking(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    pool = await make_pool(endpoint, max_size=1, init_size=1, check_after_idle=0)
    endpoint.freeze()
    return pool, endpoint.thaw


async def while_resetting(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    pool = await make_pool(endpoint, max_size=1, release_timeout=NEVER, connection_class=ResetInBackground)
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1")
        endpoint.freeze()
    return pool, endpoint.thaw


async def while_setup_runs(endpoint: LocalEndpoint) -> tuple[neon_async.Pool, Callable[[], object]]:
    go_on = asyncio.Event()

    async def setup(connection: Any) -> None:
        await go_on.wait()

    return await make_pool(endpoint, max_size=1, init_size=1, setup=setup), go_on.set


async def by_the_timeout_of_acquire(pool: neon_async.Pool) -> None:
    with pytest.raises(neon_async.PoolTimeoutError, match=NAME):
        await pool.acquire(timeout=SOON)


async def by_the_timeout_of_a_query(pool: neon_async.Pool) -> None:
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


def cases(*functions: Callable[..., Any]) -> list[Any]:
    return [pytest.param(function, id=function.__name__) for function in functions]


@pytest.mark.parametrize(
    "phase",
    cases(
        while_all_are_in_use,
        while_connecting,
        between_two_attempts,
        while_checking,
        while_resetting,
        while_setup_runs,
    ),
)
@pytest.mark.parametrize(
    "ended",
    cases(by_the_timeout_of_acquire, by_the_timeout_of_a_query, by_asyncio_timeout, by_wait_for, by_cancellation),
)
async def test_an_acquire_ends_in_time_in_every_phase_and_loses_no_slot(
    endpoint: LocalEndpoint, phase: Phase, ended: Callable[[neon_async.Pool], Awaitable[None]]
) -> None:
    pool, end_phase = await phase(endpoint)
    async with asyncio.timeout(HANG):
        await ended(pool)
        assert pool.stats().waiting == 0
        assert_balanced(pool)
        end_phase()
        await assert_whole(pool)
        await pool.close()


async def test_an_acquire_timeout_states_the_sizes_of_the_pool_and_its_latest_failure(endpoint: LocalEndpoint) -> None:
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


async def test_an_acquire_timeout_on_a_frozen_server_states_the_latest_failure(endpoint: LocalEndpoint) -> None:
    endpoint.freeze()
    async with make_pool(endpoint, connect_timeout=0.1) as pool:
        with pytest.raises(neon_async.PoolTimeoutError, match="latest failure to connect is the cause") as caught:
            await pool.acquire(timeout=0.5)
        assert isinstance(caught.value.__cause__, neon_async.ConnectTimeoutError)
        assert str(caught.value).endswith(f" is the cause of this error: {caught.value.__cause__}")
        assert_secret_free(caught.value, password_of(endpoint))


async def test_an_acquire_timeout_without_a_failure_has_no_cause(postgres: LocalPostgres) -> None:
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


async def test_a_timeout_error_raised_by_setup_is_not_turned_into_one_of_the_pool(postgres: LocalPostgres) -> None:
    async def setup(connection: Any) -> None:
        raise TimeoutError("my own")

    async with make_pool(postgres, max_size=1, setup=setup) as pool:
        with pytest.raises(TimeoutError, match="my own") as caught:
            await pool.acquire()
        assert not isinstance(caught.value, neon_async.PoolTimeoutError)
        await until_settled(pool)
        assert (pool.stats().in_use, pool.stats().timeouts) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Calls on a connection to a frozen server


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


@CALLS
async def test_a_timeout_ends_any_call_to_a_frozen_server(endpoint: LocalEndpoint, call: Call) -> None:
    async with frozen_pool(endpoint) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await call(pool, SOON)


@CALLS
async def test_asyncio_timeout_ends_any_call_to_a_frozen_server(endpoint: LocalEndpoint, call: Call) -> None:
    async with frozen_pool(endpoint) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON):
                await call(pool, None)


@CALLS
async def test_cancellation_ends_any_call_to_a_frozen_server(endpoint: LocalEndpoint, call: Call) -> None:
    async with frozen_pool(endpoint) as pool, asyncio.timeout(HANG):
        task = asyncio.ensure_future(call(pool, None))
        await until(lambda: pool.stats().in_use == 1)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("own", [True, False], ids=["timeout=", "asyncio.timeout"])
async def test_a_transaction_on_a_frozen_server_ends_in_time(endpoint: LocalEndpoint, own: bool) -> None:
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
async def test_no_slot_is_lost_on_a_frozen_server_however_often_the_caller_is_cancelled(
    endpoint: LocalEndpoint, cancels: int
) -> None:
    async with frozen_pool(endpoint, release_timeout=SOON) as pool, asyncio.timeout(HANG):

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
    async with frozen_pool(endpoint, release_timeout=SOON) as pool, asyncio.timeout(HANG):
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
    limit = NEVER if own else SOON
    pool = await make_pool(endpoint, max_size=1, release_timeout=limit, connection_class=ResetInBackground)
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


async def test_a_release_whose_reset_goes_ahead_needs_no_answer_and_the_next_query_ends_in_time(
    endpoint: LocalEndpoint,
) -> None:
    pool = await make_pool(endpoint, max_size=1, release_timeout=NEVER)
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    endpoint.freeze()
    async with asyncio.timeout(HANG):
        await pool.release(connection)
        assert (pool.stats().idle, pool.stats().resets) == (1, 0)
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT 1", timeout=SOON)
    endpoint.thaw()
    await assert_whole(pool)
    await pool.close()


async def test_a_query_that_times_out_on_a_frozen_server_leaves_no_socket_and_no_task(endpoint: LocalEndpoint) -> None:
    # asyncpg sends a cancel request for the query, and that request hangs, too.
    async with nothing_is_left(), frozen_pool(endpoint, release_timeout=SOON) as pool:
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT 1", timeout=SOON)
        await until(lambda: pool.stats().vacant == 1)
        async with asyncio.timeout(HANG):
            await pool.close()


# ---------------------------------------------------------------------------------------------------------------------
# Timeouts that are refused


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
async def test_a_timeout_that_is_not_a_number_of_seconds_is_refused_and_changes_nothing(
    postgres: LocalPostgres, call: Callable[..., Awaitable[Any]], seconds: Any
) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        proxy = await pool.acquire()
        with pytest.raises(
            neon_async.ConfigurationError,
            match=r"^timeout must be a number of seconds from 0 \(at once\) to 1,000,000,000, not ",
        ):
            await call(pool, proxy, seconds)
        assert await proxy.fetchval("SELECT 1") == 1
        await pool.release(proxy)
        assert await pool.fetchval("SELECT 1") == 1
