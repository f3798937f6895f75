"""A pool belongs to the event loop that opened it; every other one is refused with an error that says what to do."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest
import trio
import uvloop
from support.probes import assert_balanced, assert_secret_free, make_pool, password_of

import neon_async
from neon_async.testing import LocalPostgres

NewLoop: TypeAlias = Callable[[], asyncio.AbstractEventLoop]
loops = pytest.mark.parametrize(
    "new_loop",
    [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")],
)
REFUSED = "opened in another event loop, and its connections belong to that loop. Open one pool in each event loop"


@loops
def test_pools_that_are_created_outside_of_event_loops_work_in_one_after_another(
    postgres: LocalPostgres, new_loop: NewLoop
) -> None:
    async def use(pool: neon_async.Pool) -> int:
        async with pool:
            return sum(await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20))))

    pools = [make_pool(postgres, init_size=2, max_size=4) for _ in range(2)]
    for pool in pools:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(use(pool)) == 20


async def fetch(pool: neon_async.Pool) -> object:
    return await pool.fetchval("SELECT 1")


async def acquire(pool: neon_async.Pool) -> object:
    return await pool.acquire()


async def enter(pool: neon_async.Pool) -> object:
    async with pool.acquire() as connection:
        return connection


async def close(pool: neon_async.Pool) -> None:
    await pool.close()


@loops
@pytest.mark.parametrize("use", [fetch, acquire, enter, close])
def test_an_open_pool_is_refused_in_another_event_loop(
    postgres: LocalPostgres, new_loop: NewLoop, use: Callable[[neon_async.Pool], Awaitable[object]]
) -> None:
    async def call() -> object:
        return await use(pool)

    pool = make_pool(postgres)
    with asyncio.Runner(loop_factory=new_loop) as first, asyncio.Runner(loop_factory=new_loop) as second:
        first.run(pool.__aenter__())
        assert first.run(fetch(pool)) == 1
        before = pool.stats()
        with pytest.raises(neon_async.UnsupportedEventLoopError, match=REFUSED):
            second.run(call())
        assert pool.stats() == before
        assert first.run(fetch(pool)) == 1
        first.run(close(pool))


def test_an_open_pool_is_refused_under_trio(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    with asyncio.Runner() as runner:
        runner.run(pool.__aenter__())
        with pytest.raises(neon_async.UnsupportedEventLoopError, match=REFUSED):
            trio.run(fetch, pool)
        assert runner.run(fetch(pool)) == 1
        runner.run(close(pool))


# ---------------------------------------------------------------------------------------------------------------------
# Releasing


async def release(pool: neon_async.Pool, context: Any, connection: Any) -> None:
    await pool.release(connection)


async def leave(pool: neon_async.Pool, context: Any, connection: Any) -> None:
    await context.__aexit__(None, None, None)


Release: TypeAlias = Callable[[neon_async.Pool, Any, Any], Awaitable[None]]
ways = pytest.mark.parametrize(
    "way", [pytest.param(release, id="release()"), pytest.param(leave, id="the end of async with")]
)


async def lend(pool: neon_async.Pool) -> tuple[Any, Any]:
    """Return a context of `async with pool.acquire()`, and the connection that it was entered with."""
    await pool
    context = pool.acquire()
    connection = await context.__aenter__()
    assert await connection.fetchval("SELECT 1") == 1
    return context, connection


@loops
@ways
def test_a_connection_is_not_released_in_another_event_loop_and_still_is_in_its_own(
    postgres: LocalPostgres, new_loop: NewLoop, way: Release
) -> None:
    async def call(pool: neon_async.Pool, context: Any, connection: Any) -> None:
        await way(pool, context, connection)

    pool = make_pool(postgres, max_size=1)
    with asyncio.Runner(loop_factory=new_loop) as first, asyncio.Runner(loop_factory=new_loop) as second:
        context, connection = first.run(lend(pool))
        for _ in range(2):
            with pytest.raises(neon_async.UnsupportedEventLoopError, match=REFUSED) as caught:
                second.run(call(pool, context, connection))
            assert "release a connection in the loop that acquired it" in str(caught.value)
            assert_secret_free(caught.value, password_of(postgres))
            assert (pool.stats().in_use, pool.stats().releases) == (1, 0)
        assert first.run(connection.fetchval("SELECT 2")) == 2
        first.run(call(pool, context, connection))
        assert (pool.stats().in_use, pool.stats().releases) == (0, 1)
        assert first.run(fetch(pool)) == 1
        assert_balanced(pool)
        first.run(close(pool))


def release_after_the_event_loop_was_closed(pool: neon_async.Pool, new_loop: NewLoop, way: Release) -> None:
    async def call() -> None:
        await way(pool, context, connection)

    with asyncio.Runner(loop_factory=new_loop) as first:
        context, connection = first.run(lend(pool))
    with asyncio.Runner(loop_factory=new_loop) as second:
        with pytest.raises(neon_async.UnsupportedEventLoopError, match=REFUSED):
            second.run(call())
        pool.terminate()
        second.run(call())  # the end of the pool has ended the loan


@loops
@ways
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
def test_a_connection_whose_event_loop_was_closed_is_not_released_in_another_one(
    postgres: LocalPostgres, new_loop: NewLoop, way: Release
) -> None:
    release_after_the_event_loop_was_closed(make_pool(postgres, max_size=1), new_loop, way)
    gc.collect()
