"""A session that ends unused, or in its first statement, counts as a failed connect: a pool does not dial in a loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.probes import HANG, assert_whole, make_pool, until, until_settled
from support.waiting import until_served

import neon_async
from neon_async.testing import LocalEndpoint

pytestmark = pytest.mark.anyio

SUICIDE = "SELECT pg_terminate_backend(pg_backend_pid())"


def failures(pool: neon_async.Pool) -> int:
    """Return how many failures in a row the pool has counted."""
    return int(re.findall(r"\d+", repr(pool._supply.pace))[0])


async def most_connects(endpoint: LocalEndpoint, seconds: int) -> int:
    """Return the most connects that reach `endpoint` in any of the next seconds."""
    seen = [endpoint.connects]
    for _ in range(seconds):
        await asyncio.sleep(1.0)
        seen.append(endpoint.connects)
    return max(after - before for before, after in itertools.pairwise(seen))


async def without_init(connection: Any) -> None:
    pass


async def with_init(connection: Any) -> None:
    await connection.execute("SET application_name = 'initialised'")


@pytest.mark.parametrize("init", [without_init, with_init])
@pytest.mark.parametrize("min_size", [1, 2, 5])
async def test_sessions_that_the_server_ends_at_once_are_replaced_ever_more_slowly(
    endpoint: LocalEndpoint, min_size: int, init: Callable[[Any], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    settings = {"idle_session_timeout": "5ms"}
    with pytest.warns(UserWarning, match="min_size"):
        pool = make_pool(endpoint, min_size=min_size, init_size=min_size, init=init, server_settings=settings)
    async with pool, asyncio.timeout(HANG):
        assert await most_connects(endpoint, 3) <= 5
        before = endpoint.connects
        await asyncio.sleep(1.0)
        assert endpoint.connects - before <= 2
        assert failures(pool) > 0
        assert await until_served(pool, ConnectionError) == 1  # on a busy machine 5 ms may be too short
        assert len(caplog.records) <= 2 * endpoint.connects
        if init is without_init:  # otherwise a session may also end while init runs, which is another line
            assert sum("before they have answered a statement" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda pool: pool.execute(SUICIDE), id="execute"),
        pytest.param(lambda pool: pool.fetchval(SUICIDE), id="fetchval"),
        pytest.param(lambda pool: pool.executemany(f"{SUICIDE} WHERE $1", [(True,)]), id="executemany"),
    ],
)
async def test_callers_whose_sessions_end_in_the_first_statement_do_not_storm_the_server(
    endpoint: LocalEndpoint, call: Callable[[neon_async.Pool], Awaitable[Any]]
) -> None:
    async with make_pool(endpoint) as pool:

        async def keep_calling() -> None:
            while True:
                with pytest.raises(Exception):  # noqa: B017, PT011  the connection is lost
                    await call(pool)

        callers = [asyncio.ensure_future(keep_calling()) for _ in range(20)]
        assert await most_connects(endpoint, 3) <= 5
        assert not any(caller.done() for caller in callers)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await until_settled(pool)


async def test_a_caller_that_waits_for_sessions_that_end_in_vain_learns_that(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, server_settings={"idle_session_timeout": "1ms"}, init=slow_init) as pool:
        with pytest.raises(neon_async.PoolTimeoutError) as caught:
            await pool.acquire(timeout=3.0)
        assert isinstance(caught.value.__cause__, neon_async.ConnectError)
        assert endpoint.connects <= 15


async def slow_init(connection: Any) -> None:
    await connection.execute("SELECT 1")
    await until(connection.is_closed)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda connection: connection.fetchval("SELECT 1"), id="a statement"),
        pytest.param(lambda connection: connection.execute("SELECT 1"), id="a simple query"),
        pytest.param(lambda connection: connection.fetchval("SELECT 1/0"), id="a statement that fails"),
        pytest.param(lambda connection: connection.executemany("SELECT $1::int", [(1,), (2,)]), id="executemany"),
    ],
)
async def test_a_session_that_has_answered_is_a_success_whatever_ends_it(
    endpoint: LocalEndpoint, use: Callable[[Any], Awaitable[Any]]
) -> None:
    async with make_pool(endpoint, max_size=1) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        await asyncio.gather(use(connection), return_exceptions=True)
        endpoint.cut()
        await until(lambda: pool.get_size() == 0)
        assert failures(pool) == 0
        await assert_whole(pool)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda pool, connection: connection.close(), id="close"),
        pytest.param(lambda pool, connection: asyncio.sleep(0, connection.terminate()), id="terminate"),
        pytest.param(lambda pool, connection: expire(pool, connection), id="expire_connections"),
    ],
)
async def test_a_session_that_we_end_unused_is_no_failure(
    endpoint: LocalEndpoint, end: Callable[[neon_async.Pool, Any], Awaitable[None]]
) -> None:
    async with make_pool(endpoint, max_size=1) as pool, asyncio.timeout(HANG):
        for _ in range(3):
            connection = await pool.acquire()
            await end(pool, connection)
            await until(lambda: pool.get_size() == 0)
        assert failures(pool) == 0
        assert pool._supply.pace.pause(0.0) == 0.0
        await assert_whole(pool)


async def expire(pool: neon_async.Pool, connection: Any) -> None:
    await pool.expire_connections()
    await pool.release(connection)


async def test_unused_connections_that_end_with_their_compute_do_not_delay_the_wake(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=5) as pool, asyncio.timeout(HANG):
        endpoint.suspend()
        await until(lambda: pool.get_size() == 0)
        assert failures(pool) == 1
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20))) == [1] * 20
        assert failures(pool) == 0
        await until_settled(pool)
