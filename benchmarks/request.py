"""Measure what one query from a pool costs, and what follows in the background: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/request.py [--rounds 2] [--json FILE]

Each request is one `fetchval("SELECT 1")` per acquire, from pools of at most five connections to one PostgreSQL over
verified TLS, on asyncio's own event loop. The round trip takes 0, 1 and 20 ms: a relay in a process of its own delays
every byte (for 0 ms there is none). The pools connect directly, and through PgBouncer 1.21 or later in transaction
mode, where ours uses a `-pooler` host name. Without such a PgBouncer on PATH the pooled half is left out, and a note
says so.

- round trips: until the caller has the answer and the connection is released; in the background: those that follow,
  and the bytes sent for them. Another relay counts them when all caches are warm.
- in a row: seconds of a request when one task does one after the other, and how many connections the pool opens for
  that. Work in the background takes another connection, or delays the next request; a reset that is sent ahead of the
  next request does neither.
- ten tasks: requests per second of ten tasks that each do requests in a row and share the five connections, so that
  every connection that is not free costs requests. Each connection has prepared the statement before.

The pools take turns, in an order that changes from round to round. Medians are those of all requests of all rounds.
psycopg_pool is measured with its defaults (BEGIN and COMMIT around a query) and with autocommit, in which it resets
nothing. Limits, direct and pooled: ours takes one round trip, and in a row with 20 ms at most 0.50 of the median of
asyncpg. One round trip instead of two cannot take less, so that the third decimal is noise and is rounded away. Direct:
in a row ours opens one connection, and with 20 ms ten tasks do at least 1.9 times as many requests as with asyncpg's
pool and at least 0.95 times as many as with psycopg_pool in autocommit.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path

from harness import Figure, Limit, Report, Table, run, take_turns
from peers import ASYNCPG, OURS, POOLS, PSYCOPG_AUTOCOMMIT, Client, OpenClient, Server, clients_of, fill
from relay import Count, Relay, distant

from neon_async.testing import LocalPostgres

# The PgBouncer of the tests, and nothing else of theirs.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.pgbouncer import MINIMUM_VERSION, LocalPgBouncer, installed_version

NAMES = (*POOLS, PSYCOPG_AUTOCOMMIT)
DIRECT, POOLED = "direct", "pooled"
SIZE, TASKS = 5, 10
WARM_UP = 6  # psycopg prepares a statement after it has run five times
COUNTING_DELAY = 0.01  # seconds each way, so that round trips can be told apart
CALLS = {0.0: 90, 0.001: 24, 0.02: 12}  # in a row, by the seconds of a round trip
JUDGED = 0.02  # seconds of the round trip to which the limits apply
LEADS = {ASYNCPG: 1.9, PSYCOPG_AUTOCOMMIT: 0.95}  # how many times as many requests ours serves at least

ROUND_TRIPS, IN_BACKGROUND, BYTES = "round trips", "in the background", "bytes in the background"
IN_A_ROW, CONNECTIONS, BY_TASKS = "in a row", "connections", f"{TASKS} tasks"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return what each client shows directly and, if there is a PgBouncer, pooled."""
    tables: list[Table] = []
    limits: list[Limit] = []
    notes: list[str] = []
    async with LocalPostgres(settings={"max_connections": "200"}) as server:
        direct = await measure_way(DIRECT, server, arguments.rounds)
        tables += direct.tables
        limits += direct.limits
        version = installed_version()
        if version and version >= MINIMUM_VERSION:
            async with LocalPgBouncer(server, default_pool_size=SIZE * len(NAMES)) as bouncer:
                pooled = await measure_way(POOLED, bouncer, arguments.rounds)
            tables += pooled.tables
            limits += pooled.limits
        else:
            minimum = ".".join(map(str, MINIMUM_VERSION))
            notes.append(f"{POOLED}: left out, because there is no PgBouncer {minimum} or later on PATH")
    return Report(tables, limits, notes)


async def measure_way(way: str, server: Server, rounds: int) -> Report:
    """Return what each client shows on the way to `server`, which is PostgreSQL or PgBouncer."""
    warm = Table(f"{way}: a warm query", NAMES, [Figure(ROUND_TRIPS), Figure(IN_BACKGROUND), Figure(BYTES)])
    async with Relay(server.port, COUNTING_DELAY).listening() as relay:
        with clients_of(server, relay.port) as candidates:
            for name in NAMES:
                count = await count_warm_query(candidates[name], relay)
                warm.add(name, ROUND_TRIPS, count.round_trips)
                warm.add(name, IN_BACKGROUND, count.in_background)
                warm.add(name, BYTES, count.background_bytes)
    by_distance = {}
    for round_trip in CALLS:
        async with distant(server.port, round_trip / 2) if round_trip else nullcontext(server.port) as port:
            by_distance[round_trip] = await measure_distance(way, server, port, round_trip, rounds)
    judged, distance = by_distance[JUDGED], f"at {JUDGED * 1e3:.0f} ms"
    ratio = round(judged.ratio(IN_A_ROW, OURS, ASYNCPG), 2)
    limits = [
        Limit(f"{way}: ours takes {{}} round trips", warm.value(OURS, ROUND_TRIPS), at_most=1),
        Limit(f"{way}: ours takes {{}} times as long as asyncpg {distance}", ratio, at_most=0.5),
    ]
    if way == DIRECT:
        limits.append(
            Limit(f"{way}: ours opens {{}} connections for requests in a row", connections(by_distance), at_most=1)
        )
        limits += [
            Limit(
                f"{way}: {BY_TASKS} do {{}} times as many requests as with {name} {distance}",
                judged.paired_ratio(BY_TASKS, OURS, name),
                at_least=least,
            )
            for name, least in LEADS.items()
        ]
    return Report([warm, *by_distance.values()], limits)


def connections(by_distance: Mapping[float, Table]) -> float:
    """Return how many connections our pool has opened at most for requests in a row."""
    return max(table.value(OURS, CONNECTIONS) for table in by_distance.values())


async def measure_distance(way: str, server: Server, port: int, round_trip: float, rounds: int) -> Table:
    """Return what each client shows on the way to `server` through `port`, with round trips of that many seconds."""
    calls = CALLS[round_trip]
    table = Table(
        f"{way}, {round_trip * 1e3:.0f} ms round trip",
        NAMES,
        [
            Figure(IN_A_ROW, "ms", show=("median", "mean"), base=ASYNCPG),
            Figure(CONNECTIONS, show=("max",)),
            Figure(BY_TASKS, "/s"),
        ],
    )
    async with AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server, port))
        opened = {name: await stack.enter_async_context(candidates[name](SIZE)) for name in NAMES}
        for counts, name, client in take_turns(opened, rounds, warm_up=True):
            gc.collect()
            taken = await in_a_row(client, calls)
            if counts:
                table.add(name, IN_A_ROW, *taken)
                table.add(name, CONNECTIONS, client.size())
        for client in opened.values():
            await fill(client, SIZE)
            await by_tasks(client, WARM_UP)  # so that each connection has prepared the statement
        for _, name, client in take_turns(opened, rounds, warm_up=False):
            gc.collect()
            table.add(name, BY_TASKS, await by_tasks(client, calls // 2))
    return table


async def count_warm_query(open_client: OpenClient, relay: Relay) -> Count:
    """Return the round trips of a warm query."""
    async with open_client(1) as client:
        for _ in range(WARM_UP):
            await client.fetchval("SELECT 1")
        return await relay.count(client.fetchval("SELECT 1"))


async def in_a_row(client: Client, calls: int) -> list[float]:
    """Return the seconds of each request when one follows the other."""
    taken = []
    for _ in range(calls):
        begin = time.perf_counter()
        await client.fetchval("SELECT 1")
        taken.append(time.perf_counter() - begin)
    return taken


async def by_tasks(client: Client, calls: int) -> float:
    """Return the requests per second of tasks that do `calls` requests in a row each."""
    begin = time.perf_counter()
    await asyncio.gather(*[in_a_row(client, calls) for _ in range(TASKS)])
    return TASKS * calls / (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=2))
