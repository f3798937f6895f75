"""What one new connection costs in CPU time: ours beside asyncpg's, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/connect_cpu.py [--connections 20] [--rounds 25] [--json FILE]

Each round opens an empty pool on either side and takes connections from the two in turn, one after the other, each of
them new, against the same PostgreSQL with direct TLS. Ours builds a TLS context of one anchor for every dial and binds
the login to the channel; asyncpg has one verified context, built beforehand, which is the best it can do. The first
dial of a pool, for which ours derives the keys of the password, is counted like the others.

Counted is `time.process_time()`: user and system time of all threads of this process, which the server is not part of.
Other processes on the machine disturb it less than they disturb a clock, and both sides of a round alike. So the ratio
is taken in every round, and the median of the ratios decides. Exit status: 0 when it is at most 1.1, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import asyncpg
from peers import dsn_of, verified_context

import neon_async
from neon_async.testing import LocalPostgres

LIMIT = 1.1
OURS, SHARED = "neon-async", "asyncpg, shared context"

CreatePool = Callable[[], asyncpg.Pool]


async def costs_of(sides: dict[str, CreatePool], connections: int) -> dict[str, float]:
    """Return the seconds of CPU that one connection took on each side, on the average of `connections` made in turn."""
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


async def measure(connections: int, rounds: int) -> dict[str, list[float]]:
    """Return the cost of one connection on each side in seconds, one per round, after one round that is not counted."""
    costs: dict[str, list[float]] = {OURS: [], SHARED: []}
    async with LocalPostgres(settings={"max_connections": str(2 * connections + 10)}) as server:
        dsn, context = dsn_of(server), verified_context(server.trust_anchor)
        ours = partial(neon_async.create_pool, dsn, trust_anchor=server.trust_anchor)
        shared = partial(asyncpg.create_pool, dsn, ssl=context, direct_tls=True)
        sides: dict[str, CreatePool] = {
            OURS: partial(ours, min_size=0, max_size=connections),
            SHARED: partial(shared, min_size=0, max_size=connections),
        }
        for round_number in range(rounds + 1):
            for name, cost in (await costs_of(sides, connections)).items():
                if round_number:
                    costs[name].append(cost)
    return costs


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description="The CPU time of a new connection.")
    parser.add_argument("--connections", type=int, default=20, help="connections per side and round (default: 20)")
    parser.add_argument("--rounds", type=int, default=25, help="rounds that count (default: 25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    arguments = parser.parse_args()

    costs = asyncio.run(measure(arguments.connections, arguments.rounds))
    ratio = statistics.median(ours / shared for ours, shared in zip(costs[OURS], costs[SHARED], strict=True))

    print(f"CPU time per connection, {arguments.connections} in a row, {arguments.rounds} rounds")
    print(f"{'':26}{'median':>10}{'fastest':>10}{'slowest':>10}")
    for name, taken in costs.items():
        median, low, high = statistics.median(taken) * 1e3, min(taken) * 1e3, max(taken) * 1e3
        print(f"{name:26}{median:7.2f} ms{low:7.2f} ms{high:7.2f} ms")
    verdict = "good" if ratio <= LIMIT else "TOO MUCH"
    print(f"{verdict}: ours is {ratio:.2f} times asyncpg's (median of the rounds' ratios); the limit is {LIMIT}")
    if arguments.json:
        result = {"connections": arguments.connections, "limit": LIMIT, "ratio": ratio, "seconds": costs}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
