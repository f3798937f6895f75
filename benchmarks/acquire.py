"""Measure what an acquire and release costs by itself: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/acquire.py [--calls 500] [--rounds 9] [--json FILE]

Each pool has ten open connections to one PostgreSQL over verified TLS. One task repeats
`async with pool.acquire(): pass` on asyncio's own event loop:

- in a row: without a pause in between, so that work that a pool leaves to the background is included;
- alone: after a pause in which all background work ends.

By default asyncpg resets the connection before the task continues. With a `reset=` that does nothing it shows what
remains without the reset. Ours is measured both ways, too. psycopg_pool and SQLAlchemy send nothing if no statement was
sent.

The pools take turns, in an order that changes from round to round. The number of a round is its mean in a row, and its
median alone. Ratios are taken within each round. Limits: ours with its defaults takes at most 1.5 times as long as
asyncpg without a reset, and at most a fifth as long as asyncpg with its defaults, in a row and alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from contextlib import AsyncExitStack

from harness import Figure, Limit, Option, Report, Table, run, take_turns
from peers import ASYNCPG, ASYNCPG_BARE, OURS, OURS_BARE, PSYCOPG, SQLALCHEMY, Client, clients_of, open_all

from neon_async.testing import LocalPostgres

SIZE = 10
PAUSE = 0.002  # seconds; a reset on loopback takes a tenth of it
NAMES = (OURS, OURS_BARE, ASYNCPG, ASYNCPG_BARE, PSYCOPG, SQLALCHEMY)
IN_A_ROW, ALONE = "in a row", "alone"

# How many times as long as the other pool ours may take.
LIMITS = {ASYNCPG_BARE: 1.5, ASYNCPG: 1 / 5}


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the seconds of an acquire and release of each client, in a row and alone."""
    table = Table(
        "acquire and release, nothing else",
        NAMES,
        [Figure(way, "us", show=("median", "min")) for way in (IN_A_ROW, ALONE)],
    )
    async with LocalPostgres(settings={"max_connections": "100"}) as server, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server))
        opened = await open_all(stack, candidates, NAMES, SIZE)
        for counts, name, client in take_turns(opened, arguments.rounds, warm_up=True):
            taken = {
                IN_A_ROW: await in_a_row(client, arguments.calls),
                ALONE: await alone(client, arguments.calls // 10),
            }
            if counts:
                for way, seconds in taken.items():
                    table.add(name, way, seconds)
    limits = [
        Limit(f"{way}: ours takes {{}} times as long as {name}", table.paired_ratio(way, OURS, name), at_most=limit)
        for way in (IN_A_ROW, ALONE)
        for name, limit in LIMITS.items()
    ]
    return Report([table], limits)


async def in_a_row(client: Client, calls: int) -> float:
    """Return the mean seconds of an acquire and release without a pause in between."""
    gc.collect()
    begin = time.perf_counter()
    for _ in range(calls):
        async with client.acquire():
            pass
    return (time.perf_counter() - begin) / calls


async def alone(client: Client, calls: int) -> float:
    """Return the median seconds of an acquire and release after a pause."""
    gc.collect()
    taken = []
    for _ in range(calls):
        await asyncio.sleep(PAUSE)
        begin = time.perf_counter()
        async with client.acquire():
            pass
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


if __name__ == "__main__":
    options = [Option("--calls", "calls in a row per round", 500)]
    sys.exit(run(measure, __doc__, rounds=9, options=options))
