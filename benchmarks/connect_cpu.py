"""Measure the CPU time of a new connection: ours and asyncpg's in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/connect_cpu.py [--connections 20] [--rounds 25] [--json FILE]

Each round opens an empty pool of either kind and acquires connections from the two in turn, each of them new, from the
same PostgreSQL with direct TLS. Ours builds a TLS context with one anchor for every dial and binds the login to the
channel. asyncpg has one verified context that was built beforehand, the best that it can do. The first dial of our
pool, which derives the keys of the password, counts as the others do.

The CPU time is `time.process_time()`: user and system time of all threads of this process, which does not include the
server. Other processes disturb it less than they disturb a clock, and they disturb both sides of a round alike. Limit:
ours takes at most 1.1 times as long as asyncpg (median of the rounds' ratios).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import asyncpg
from harness import Figure, Limit, Option, Report, Table, run
from peers import dsn_of, verified_context

import neon_async
from neon_async.testing import LocalPostgres

OURS, SHARED = "neon-async", "asyncpg, shared context"
CPU = "CPU time"

CreatePool = Callable[[], asyncpg.Pool]


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the CPU seconds of one connection on each side."""
    connections, rounds = arguments.connections, arguments.rounds
    table = Table(
        f"CPU time of a connection, {connections} in a row",
        (OURS, SHARED),
        [Figure(CPU, "ms", show=("median", "min", "max"))],
    )
    async with LocalPostgres(settings={"max_connections": str(2 * connections + 10)}) as server:
        dsn, context = dsn_of(server), verified_context(server.trust_anchor)
        ours = partial(neon_async.create_pool, dsn, trust_anchor=server.trust_anchor)
        shared = partial(asyncpg.create_pool, dsn, ssl=context, direct_tls=True)
        sides: dict[str, CreatePool] = {
            OURS: partial(ours, min_size=0, max_size=connections),
            SHARED: partial(shared, min_size=0, max_size=connections),
        }
        await costs_of(sides, connections)  # warm up
        for _ in range(rounds):
            for name, cost in (await costs_of(sides, connections)).items():
                table.add(name, CPU, cost)
    ratio = table.paired_ratio(CPU, OURS, SHARED)
    return Report([table], [Limit("ours takes {} times the CPU time of asyncpg's", ratio, at_most=1.1)])


async def costs_of(sides: dict[str, CreatePool], connections: int) -> dict[str, float]:
    """Return the mean CPU seconds of a connection on each side, for `connections` that are made in turn."""
    gc.collect()
    spent = dict.fromkeys(sides, 0.0)
    async with AsyncExitStack() as held:
        pools = {name: await held.enter_async_context(create_pool()) for name, create_pool in sides.items()}
        for _ in range(connections):
            for name, pool in pools.items():
                before = time.process_time()
                await held.enter_async_context(pool.acquire())
                spent[name] += time.process_time() - before
    return {name: seconds / connections for name, seconds in spent.items()}


if __name__ == "__main__":
    options = [Option("--connections", "connections per side and round", 20)]
    sys.exit(run(measure, __doc__, rounds=25, options=options))
