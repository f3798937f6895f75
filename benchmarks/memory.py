"""Measure the memory of 10,000 tasks that wait for a connection: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/memory.py [--waiters 10000] [--rounds 1] [--json FILE]

Each pool has one connection to one PostgreSQL over verified TLS, and the connection is in use. The tasks acquire it,
and all of them wait. Measured is the memory that Python has allocated for that (`tracemalloc`): the tasks with their
frames, the wait queue, the timers. A task that waits for an event shows the cost of waiting alone.

Ours and psycopg_pool wait at most 30 s by default. asyncpg waits without a limit by default; with a limit it takes more
memory. Limit: ours takes at most twice the memory of asyncpg's pool, both with their defaults (smallest number of the
rounds on either side).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from harness import Figure, Limit, Option, Report, Table, run
from peers import ASYNCPG, OURS, POOLS, OpenClient, clients_of

from neon_async.testing import LocalPostgres

EVENT, ASYNCPG_TIMEOUT = "a task and an event", "asyncpg, timeout=30"
MEMORY = "each"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the bytes of one waiter of each client."""
    waiters = arguments.waiters
    table = Table(
        f"memory of {waiters} tasks that wait for a connection",
        (*POOLS, ASYNCPG_TIMEOUT, EVENT),
        [Figure(MEMORY, "B", show=("min",), base=ASYNCPG)],
    )
    async with LocalPostgres() as server:
        with clients_of(server) as candidates:
            for _ in range(arguments.rounds):
                table.add(EVENT, MEMORY, await memory_of(asyncio.Event().wait, waiters))
                for name in POOLS:
                    table.add(name, MEMORY, await memory_of_client(candidates[name], waiters))
                limited = await memory_of_client(candidates[ASYNCPG], waiters, deadline=30.0)
                table.add(ASYNCPG_TIMEOUT, MEMORY, limited)
    ratio = table.ratio(MEMORY, OURS, ASYNCPG)
    return Report([table], [Limit("ours takes {} times the memory of asyncpg's pool", ratio, at_most=2.0)])


async def memory_of(wait: Callable[[], Awaitable[object]], waiters: int) -> int:
    """Return the bytes of each of `waiters` tasks that wait in `wait`."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tasks = [asyncio.ensure_future(wait()) for _ in range(waiters)]
    for _ in range(20):  # turns of the event loop; more than any pool needs to queue a task
        await asyncio.sleep(0)
    gc.collect()
    spent = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert not any(task.done() for task in tasks), "all tasks wait"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return spent // waiters


async def acquire_and_release(acquire: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    """Acquire a connection and release it."""
    async with acquire():
        pass


async def memory_of_client(open_client: OpenClient, waiters: int, deadline: float | None = None) -> int:
    """Return the bytes of one waiter of this client."""
    async with open_client(1, deadline=deadline) as client, client.acquire():
        return await memory_of(partial(acquire_and_release, client.acquire), waiters)


if __name__ == "__main__":
    options = [Option("--waiters", "tasks that wait", 10_000)]
    sys.exit(run(measure, __doc__, rounds=1, options=options))
