"""A pool that was closed or terminated is garbage: no timer, task or transport of its event loop keeps it alive."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest
from support.probes import HANG, make_pool, until

import neon_async
from neon_async.testing import LocalEndpoint

pytestmark = pytest.mark.anyio

NEVER = 100 * HANG

Tasks: TypeAlias = "list[asyncio.Task[Any]]"
# Brings an open pool of two connections at an endpoint into a state, and returns the tasks that go on.
Scene: TypeAlias = Callable[[neon_async.Pool, LocalEndpoint], Awaitable[Tasks]]


async def never_used(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    return []


async def with_idle_connections(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    """The timer for `max_lifetime` and `max_inactive_connection_lifetime` is set."""
    await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(4)))
    await until(lambda: pool.stats().idle)
    return []


async def with_a_connection_in_use(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    """The timer for `leak_after` is set."""
    await pool.acquire()
    return []


async def with_waiters(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    """The timer of the wait queue is set."""
    for _ in range(2):
        await pool.acquire()
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(3)]
    await until(lambda: pool.stats().waiting == 3)
    return tasks


async def with_waiters_that_gave_up(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    """The timer of the wait queue is still set for the deadlines of waiters that were cancelled."""
    tasks = await with_waiters(pool, endpoint)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return []


async def with_a_dial_to_be_resumed(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    """The timer for the next dial is set, after some that failed."""
    endpoint.refuse()
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1"))]
    await until(lambda: pool.stats().dial_failures >= 2 and not pool.stats().connecting)
    return tasks


async def with_a_dial_under_way(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    endpoint.freeze()
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1"))]
    await until(lambda: endpoint.connects == 1)
    return tasks


async def with_a_reset_under_way(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1")
        endpoint.freeze()
    return []


async def with_a_check_under_way(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    await pool.fetchval("SELECT 1")
    await until(lambda: pool.stats().idle == 1)
    endpoint.freeze()
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1"))]
    await until(lambda: pool.stats().checking == 1)
    return tasks


async def with_a_query_under_way(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT pg_sleep(1)"))]
    await until(lambda: pool.stats().in_use == 1)
    await asyncio.sleep(0.01)
    return tasks


async def after_a_failed_transaction(pool: neon_async.Pool, endpoint: LocalEndpoint) -> Tasks:
    async def work(connection: neon_async.Connection) -> None:
        await connection.execute("SELECT 1/0")

    with pytest.raises(Exception, match="division by zero"):
        await pool.run_transaction(work)
    return []


async def use_and_end(endpoint: LocalEndpoint, scene: Scene, end: str) -> weakref.ref[neon_async.Pool]:
    """Open a pool, bring it into a state, end it, and return a reference that does not keep it alive."""
    options: dict[str, Any] = {"leak_after": NEVER, "acquire_timeout": NEVER, "release_timeout": NEVER}
    if scene is with_a_check_under_way:
        options["check_after_idle"] = 0
    pool = await make_pool(endpoint, max_size=2, **options)
    tasks = await scene(pool, endpoint)
    if end == "close":
        await pool.close(timeout=0.01)
    else:
        pool.terminate()
    if tasks:
        await asyncio.wait(tasks)
        assert [task.exception() for task in tasks if not task.cancelled()]
    await until(lambda: pool.stats().vacant == 2)
    return weakref.ref(pool)


@pytest.mark.parametrize("end", ["close", "terminate"])
@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(scene, id=scene.__name__.replace("_", " "))
        for scene in (
            never_used,
            with_idle_connections,
            with_a_connection_in_use,
            with_waiters,
            with_waiters_that_gave_up,
            with_a_dial_to_be_resumed,
            with_a_dial_under_way,
            with_a_reset_under_way,
            with_a_check_under_way,
            with_a_query_under_way,
            after_a_failed_transaction,
        )
    ],
)
async def test_a_pool_that_has_ended_is_collected_in_its_event_loop(
    endpoint: LocalEndpoint, scene: Scene, end: str
) -> None:
    async with asyncio.timeout(HANG):
        pool = await use_and_end(endpoint, scene, end)
        for _ in range(3):  # the event loop itself keeps what it has run last
            await asyncio.sleep(0)
        gc.collect()
        assert pool() is None


async def test_a_pool_is_collected_as_soon_as_it_was_terminated(endpoint: LocalEndpoint) -> None:
    pool = await make_pool(endpoint, init_size=2)
    pool.terminate()
    reference = weakref.ref(pool)
    del pool
    gc.collect()
    assert reference() is None


async def test_a_pool_whose_opening_failed_is_collected(
    endpoint: LocalEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    async def open_in_vain() -> weakref.ref[neon_async.Pool]:
        pool = make_pool(endpoint, init_size=2, password="a wrong one")
        with pytest.raises(neon_async.InvalidPasswordError):
            await pool
        return weakref.ref(pool)

    reference = await open_in_vain()
    await asyncio.sleep(0)
    gc.collect()
    assert reference() is None


async def test_a_connection_that_outlives_its_pool_does_not_keep_it(endpoint: LocalEndpoint) -> None:
    """A caller may hold on to what it was lent: it is of no use any more, and is detached from the pool."""

    async def keep() -> tuple[Any, weakref.ref[neon_async.Pool]]:
        pool = await make_pool(endpoint, max_size=2)
        connection: Any = await pool.acquire()
        raw = connection._con
        pool.terminate()
        return raw, weakref.ref(pool)

    raw, reference = await keep()
    await asyncio.sleep(0)
    gc.collect()
    assert reference() is None
    assert raw.is_closed()
