"""How long the event loop stands still while many connections are made at once: ours beside asyncpg's, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/loop_stall.py [--connections 20] [--rounds 15] [--json FILE]

Each round opens an empty pool and lets 20 tasks acquire a connection at once, against the same PostgreSQL over verified
TLS. Meanwhile a task that only yields to the loop notes the longest time between two of its turns: so long did nothing
else in the process get its turn either. Three ways take turns, in an order that changes from round to round:

- ours: `neon_async.create_pool(dsn, trust_anchor=...)`, which builds a context of one anchor for every dial;
- asyncpg, shared context: `asyncpg.create_pool(ssl=context, direct_tls=True)`, with one context built beforehand, which
  is the best asyncpg can do;
- asyncpg, DSN: `sslmode=verify-full&sslrootcert=...` with a full bundle of roots, which is what people write.

The numbers are medians over the rounds. Exit status: 0 when ours is at most 1.2 times the shared context's, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import quote, urlencode

import asyncpg
import certifi
from peers import dsn_of, verified_context

import neon_async
from neon_async.testing import LocalPostgres

LIMIT = 1.2
OURS, SHARED, BUNDLE = "neon-async", "asyncpg, shared context", "asyncpg, verify-full DSN"

OpenPool = Callable[[], Awaitable[asyncpg.Pool]]


@contextlib.asynccontextmanager
async def longest_stall() -> AsyncIterator[list[float]]:
    """Yield a list that holds, when the block has ended, the longest stall of the loop in seconds."""
    result = [0.0]

    async def heartbeat() -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            result[0] = max(result[0], now - before)
            before = now

    task = asyncio.create_task(heartbeat())
    await asyncio.sleep(0)
    try:
        yield result
        await asyncio.sleep(0)
    finally:
        task.cancel()


async def stall_of(open_pool: OpenPool, connections: int) -> float:
    """Return the longest stall, in seconds, while `connections` tasks each wait for their own new connection."""
    gc.collect()
    everybody = asyncio.Barrier(connections)

    async def work(pool: asyncpg.Pool) -> None:
        async with pool.acquire():
            await everybody.wait()

    async with longest_stall() as stall:
        pool = await open_pool()
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for _ in range(connections):
                tasks.create_task(work(pool))
    await pool.close()
    return stall[0]


def ways(server: LocalPostgres, connections: int, bundle: Path) -> dict[str, OpenPool]:
    """Return the three ways to open the pool, by name; `bundle` is a file of all public roots and the server's own."""
    dsn, context = dsn_of(server), verified_context(server.trust_anchor)
    options = f"?{urlencode({'sslmode': 'verify-full', 'sslrootcert': str(bundle)}, quote_via=quote)}"

    async def ours() -> asyncpg.Pool:
        return await neon_async.create_pool(dsn, trust_anchor=server.trust_anchor, min_size=0, max_size=connections)

    async def shared() -> asyncpg.Pool:
        return await asyncpg.create_pool(dsn, ssl=context, direct_tls=True, min_size=0, max_size=connections)

    async def from_dsn() -> asyncpg.Pool:
        return await asyncpg.create_pool(dsn + options, direct_tls=True, min_size=0, max_size=connections)

    return {OURS: ours, SHARED: shared, BUNDLE: from_dsn}


async def measure(connections: int, rounds: int) -> dict[str, list[float]]:
    """Return the stalls of each way in seconds, one per round, after one round that is not counted."""
    stalls: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle.pem")
        async with LocalPostgres() as server:
            bundle.write_bytes(Path(certifi.where()).read_bytes() + b"\n" + server.trust_anchor)
            candidates = list(ways(server, connections, bundle).items())
            for round_number in range(rounds + 1):
                turn = round_number % len(candidates)
                for name, open_pool in candidates[turn:] + candidates[:turn]:
                    stall = await stall_of(open_pool, connections)
                    if round_number:
                        stalls.setdefault(name, []).append(stall)
    return stalls


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description="The longest event-loop stall while connecting.")
    parser.add_argument("--connections", type=int, default=20, help="connections made at once (default: 20)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    arguments = parser.parse_args()

    stalls = asyncio.run(measure(arguments.connections, arguments.rounds))
    medians = {name: statistics.median(stalls[name]) for name in (OURS, SHARED, BUNDLE)}
    ratios = {name: median / medians[SHARED] for name, median in medians.items()}

    print(f"longest event-loop stall, {arguments.connections} connections at once, median of {arguments.rounds} rounds")
    print(f"{'':26}{'median':>10}{'fastest':>10}{'slowest':>10}{'ratio':>8}")
    for name, median in medians.items():
        low, high = min(stalls[name]), max(stalls[name])
        print(f"{name:26}{median * 1e3:7.1f} ms{low * 1e3:7.1f} ms{high * 1e3:7.1f} ms{ratios[name]:8.2f}")
    good = ratios[OURS] <= LIMIT
    verdict = "good" if good else "TOO LONG"
    print(f"{verdict}: ours is {ratios[OURS]:.2f} times the shared context's; the limit is {LIMIT}")
    if arguments.json:
        result = {"connections": arguments.connections, "limit": LIMIT, "ratios": ratios, "seconds": stalls}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
