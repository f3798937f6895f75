"""Measure how long the event loop stands still while many connections are made at once: ours and asyncpg's in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/loop_stall.py [--connections 20] [--rounds 15] [--json FILE]

Each round opens an empty pool, and 20 tasks acquire a connection at once, from the same PostgreSQL over verified TLS.
The number of a round is the longest time in which the event loop ran no other task. Three kinds take turns, in an order
that changes from round to round:

- ours: `neon_async.create_pool(dsn, trust_anchor=...)`, which builds a context with one anchor for every dial;
- asyncpg, shared context: `asyncpg.create_pool(ssl=context, direct_tls=True)`, with one context that was built
  beforehand, the best that asyncpg can do;
- asyncpg, verify-full DSN: `sslmode=verify-full&sslrootcert=...` with a complete bundle of roots, the usual way.

Limit: the median of ours is at most 1.2 times that of the shared context.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote, urlencode

import asyncpg
import certifi
from harness import Figure, Limit, Option, Report, Table, run, take_turns
from loops import longest_stall
from peers import dsn_of, verified_context

import neon_async
from neon_async.testing import LocalPostgres

OURS, SHARED, BUNDLE = "neon-async", "asyncpg, shared context", "asyncpg, verify-full DSN"
STALL = "longest stall"

OpenPool = Callable[[], Awaitable[asyncpg.Pool]]


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the longest stall of each kind in seconds."""
    connections, rounds = arguments.connections, arguments.rounds
    table = Table(
        f"longest event-loop stall, {connections} connections at once",
        (OURS, SHARED, BUNDLE),
        [Figure(STALL, "ms", show=("median", "min", "max"), base=SHARED)],
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle.pem")
        async with LocalPostgres() as server:
            bundle.write_bytes(Path(certifi.where()).read_bytes() + b"\n" + server.trust_anchor)
            candidates = kinds(server, connections, bundle)
            for counts, name, open_pool in take_turns(candidates, rounds, warm_up=True):
                stall = await stall_of(open_pool, connections)
                if counts:
                    table.add(name, STALL, stall)
    ratio = table.ratio(STALL, OURS, SHARED)
    return Report([table], [Limit("ours stalls the loop {} times as long as the shared context", ratio, at_most=1.2)])


def kinds(server: LocalPostgres, connections: int, bundle: Path) -> dict[str, OpenPool]:
    """Return how to open each kind of pool. `bundle` is a file with all public roots and the server's own."""
    dsn, context = dsn_of(server), verified_context(server.trust_anchor)
    options = f"?{urlencode({'sslmode': 'verify-full', 'sslrootcert': str(bundle)}, quote_via=quote)}"

    async def ours() -> asyncpg.Pool:
        return await neon_async.create_pool(dsn, trust_anchor=server.trust_anchor, min_size=0, max_size=connections)

    async def shared() -> asyncpg.Pool:
        return await asyncpg.create_pool(dsn, ssl=context, direct_tls=True, min_size=0, max_size=connections)

    async def from_dsn() -> asyncpg.Pool:
        return await asyncpg.create_pool(dsn + options, direct_tls=True, min_size=0, max_size=connections)

    return {OURS: ours, SHARED: shared, BUNDLE: from_dsn}


async def stall_of(open_pool: OpenPool, connections: int) -> float:
    """Return the longest stall in seconds while `connections` tasks each acquire a new connection."""
    gc.collect()
    all_connected = asyncio.Barrier(connections)

    async def work(pool: asyncpg.Pool) -> None:
        async with pool.acquire():
            await all_connected.wait()

    async with longest_stall() as stall:
        pool = await open_pool()
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for _ in range(connections):
                tasks.create_task(work(pool))
    await pool.close()
    return stall[0]


if __name__ == "__main__":
    options = [Option("--connections", "connections that are made at once", 20)]
    sys.exit(run(measure, __doc__, rounds=15, options=options))
