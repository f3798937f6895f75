"""Measure the CPU time of a new connection: ours and asyncpg's in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/connect_cpu.py [--connections 20] [--rounds 25] [--json FILE]

Each round opens an empty pool of either kind and acquires connections from the two in turn, each of them new, from the
same PostgreSQL with direct TLS. In between it makes single connections with either `connect()`. Ours builds a TLS
context with one anchor for every dial and binds the login to the channel. asyncpg has one verified context that was
built beforehand, the best that it can do. The first dial of our pool, which derives the keys of the password, counts as
the others do.

The CPU time is `time.process_time()`: user and system time of all threads of this process, which does not include the
server. Other processes disturb it less than they disturb a clock, and they disturb both sides of a round alike. Limits:
ours takes at most 1.1 times as long as asyncpg, for a pool and for `connect()` (medians of the rounds' ratios).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import asyncpg
from harness import Figure, Limit, Option, Report, Table, run
from peers import dsn_of, verified_context

import neon_async
from neon_async.testing import LocalPostgres

OURS, SHARED = "neon-async", "asyncpg, shared context"
SINGLE, SINGLE_SHARED = "neon-async, connect()", "asyncpg, shared context, connect()"
CPU = "CPU time"

CreatePool = Callable[[], asyncpg.Pool]
Connect = Callable[[], Awaitable[Any]]


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the CPU seconds of one connection on each side."""
    connections, rounds = arguments.connections, arguments.rounds
    table = Table(
        f"CPU time of a connection, {connections} in a row",
        (OURS, SHARED, SINGLE, SINGLE_SHARED),
        [Figure(CPU, "ms", show=("median", "min", "max"))],
    )
    async with LocalPostgres(settings={"max_connections": str(4 * connections + 10)}) as server:
        dsn, context = dsn_of(server), verified_context(server.trust_anchor)
        ours = partial(neon_async.create_pool, dsn, trust_anchor=server.trust_anchor)
        shared = partial(asyncpg.create_pool, dsn, ssl=context, direct_tls=True)
        sides: dict[str, CreatePool] = {
            OURS: partial(ours, min_size=0, max_size=connections),
            SHARED: partial(shared, min_size=0, max_size=connections),
        }
        singles: dict[str, Connect] = {
            SINGLE: partial(neon_async.connect, dsn, trust_anchor=server.trust_anchor),
            SINGLE_SHARED: partial(asyncpg.connect, dsn, ssl=context, direct_tls=True),
        }
        await costs_of(sides, singles, connections)  # warm up
        for _ in range(rounds):
            for name, cost in (await costs_of(sides, singles, connections)).items():
                table.add(name, CPU, cost)
    pools, connects = table.paired_ratio(CPU, OURS, SHARED), table.paired_ratio(CPU, SINGLE, SINGLE_SHARED)
    return Report(
        [table],
        [
            Limit("our pool takes {} times the CPU time of asyncpg's", pools, at_most=1.1),
            Limit("our connect() takes {} times the CPU time of asyncpg's", connects, at_most=1.1),
        ],
    )


async def costs_of(sides: dict[str, CreatePool], singles: dict[str, Connect], connections: int) -> dict[str, float]:
    """Return the mean CPU seconds of a connection on each side, for `connections` that are made in turn."""
    gc.collect()
    async with AsyncExitStack() as held:
        pools = {name: await held.enter_async_context(create_pool()) for name, create_pool in sides.items()}
        connects = singles | {name: partial(acquired, pool, held) for name, pool in pools.items()}
        spent = dict.fromkeys(connects, 0.0)
        for _ in range(connections):
            for name, connect in connects.items():
                before = time.process_time()
                connection = await connect()
                spent[name] += time.process_time() - before
                if name in singles:
                    held.push_async_callback(connection.close)
    return {name: seconds / connections for name, seconds in spent.items()}


async def acquired(pool: asyncpg.Pool, held: AsyncExitStack) -> Any:
    """Return a connection of a pool, which is released together with everything that is held."""
    return await held.enter_async_context(pool.acquire())


if __name__ == "__main__":
    options = [Option("--connections", "connections per side and round", 20)]
    sys.exit(run(measure, __doc__, rounds=25, options=options))
