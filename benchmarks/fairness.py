"""Measure how evenly a pool shares the waiting when tasks outnumber connections: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/fairness.py [--turns 6] [--rounds 3] [--json FILE]

100 workers share 10 open connections to one PostgreSQL over verified TLS. Each worker acquires a connection, keeps it
for 5 ms, releases it, and acquires the next one. With a first-come-first-served queue that costs no time, nine other
workers use each connection between two turns of a worker, so that every acquire waits 45 ms. Measured is the wait of
each acquire except a worker's first one, because the queue is empty at the start.

For the 5 ms the task sleeps, or a query sleeps in the server. After a query the connection has to be reset in the pools
that do so, which makes every worker wait longer. There the time of the whole request less the 5 ms is measured.

The pools take turns, in an order that changes from round to round. Percentiles are those of a round, and the smallest
of the rounds is shown, because other load can only make the wait longer. The event loop has timers with a resolution of
microseconds. Limit: the 99th percentile of ours, with the task asleep, is at most 1.25 times the ideal.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from harness import Figure, Limit, Option, Report, Table, run, take_turns
from loops import exact_loop
from peers import ASYNCPG_BARE, OURS, POOLS, Client, clients_of, open_all

from neon_async.testing import LocalPostgres

WORKERS, SIZE, KEEP = 100, 10, 0.005
IDEAL = (WORKERS / SIZE - 1) * KEEP
NAMES = (*POOLS, ASYNCPG_BARE)
ASLEEP, IN_A_QUERY = "asleep", "in a query"
MEDIAN, P99, LONGEST = "median", "p99", "longest"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the percentiles of each client's waits in seconds, for both ways to keep a connection."""
    table = Table(
        f"waiting for one of {SIZE} connections: {WORKERS} workers, {KEEP * 1e3:.0f} ms, ideal {IDEAL * 1e3:.0f} ms",
        NAMES,
        [Figure(f"{way}, {what}", "ms", show=("min",)) for way in KEEPING for what in (MEDIAN, P99, LONGEST)],
    )
    async with LocalPostgres(settings={"max_connections": "100"}) as server, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server))
        opened = await open_all(stack, candidates, NAMES, SIZE)
        for way, keep in KEEPING.items():
            for counts, name, client in take_turns(opened, arguments.rounds, warm_up=True):
                waits = await waits_of(partial(keep, client), arguments.turns)
                if counts:
                    table.add(name, f"{way}, {MEDIAN}", statistics.median(waits))
                    table.add(name, f"{way}, {P99}", statistics.quantiles(waits, n=100)[98])
                    table.add(name, f"{way}, {LONGEST}", max(waits))
    ratio = table.value(OURS, f"{ASLEEP}, {P99}") / IDEAL
    return Report([table], [Limit("the p99 of ours is {} times the ideal", ratio, at_most=1.25)])


async def asleep(client: Client) -> float:
    """Keep a connection without using it, and return the seconds of the wait for it."""
    begin = time.perf_counter()
    async with client.acquire():
        waited = time.perf_counter() - begin
        await asyncio.sleep(KEEP)
    return waited


async def in_a_query(client: Client) -> float:
    """Keep a connection with a query, and return the seconds in which the query did not run."""
    begin = time.perf_counter()
    await client.fetchval(f"SELECT pg_sleep({KEEP})")
    return time.perf_counter() - begin - KEEP


KEEPING = {ASLEEP: asleep, IN_A_QUERY: in_a_query}


async def waits_of(keep: Callable[[], Awaitable[float]], turns: int) -> list[float]:
    """Return the seconds that every acquire except a worker's first one has waited."""
    gc.collect()

    async def work() -> list[float]:
        return [await keep() for _ in range(turns + 1)][1:]

    return [wait for waits in await asyncio.gather(*[work() for _ in range(WORKERS)]) for wait in waits]


if __name__ == "__main__":
    options = [Option("--turns", "acquires per worker that count", 6)]
    sys.exit(run(measure, __doc__, rounds=3, options=options, loop_factory=exact_loop))
