"""Pools that make their callers wait: for other callers, for a frozen server, or for the next attempt to connect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import neon_async
from neon_async.testing import LocalEndpoint
from support.probes import HANG, make_pool, until, until_settled

NEVER = 100 * HANG


async def enqueue(pool: neon_async.Pool, count: int, then: Callable[[int, Any], Any]) -> list[asyncio.Task[Any]]:
    """Start `count` waiters, in order. Each calls `then` with its number and the connection it acquires."""

    async def caller(number: int) -> Any:
        async with pool.acquire() as connection:
            return await then(number, connection)

    tasks = []
    for number in range(count):
        waiting = pool.stats().waiting
        tasks.append(asyncio.ensure_future(caller(number)))
        await until(lambda: pool.stats().waiting == waiting + 1)  # noqa: B023
    return tasks


@contextlib.asynccontextmanager
async def frozen_pool(
    endpoint: LocalEndpoint, *, release_timeout: float = NEVER, **keywords: Any
) -> AsyncIterator[neon_async.Pool]:
    """A pool of one idle connection that seems to be alive, while the server answers nothing."""
    pool = await make_pool(endpoint, max_size=1, release_timeout=release_timeout, **keywords)
    await pool.execute("SELECT 1")
    await until_settled(pool)
    endpoint.freeze()
    try:
        yield pool
    finally:
        endpoint.thaw()
        pool.terminate()


async def until_served(pool: neon_async.Pool, failure: type[Exception]) -> Any:
    """Query until the pool, which raises `failure` until its next attempt to connect, serves the query."""
    while True:
        try:
            return await pool.fetchval("SELECT 1")
        except failure:
            await asyncio.sleep(0.01)
