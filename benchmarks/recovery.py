"""Measure how long callers still wait when an outage is over: ours and psycopg_pool in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/recovery.py [--outages 20] [--rounds 1] [--json FILE]

Outages of 1 to 20 s, evenly spaced, begin together. Each has its own pool of ten open connections and its own relay, to
one PostgreSQL over verified TLS. The outage closes every connection of the relay and resets every connect. 50 callers
wait for a connection meanwhile, each for one `fetchval`; one that gets an error tries again at once. Then connects are
accepted again.

Measured are the seconds from then until the last of the 50 callers is served, and the most connects that reached one
relay in any second of its outage. Limits: ours serves all of them within 0.6 s (median) and within 1.5 s (worst), with
at most five connects per second. asyncpg and SQLAlchemy do not wait for a server: see herd.py for what they do.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import sys
import time
from contextlib import AsyncExitStack

from harness import Figure, Limit, Option, Report, Table, run, take_turns
from peers import OURS, PSYCOPG, Client, OpenClient, clients_of, fill

from neon_async.testing import LocalEndpoint, LocalPostgres

CALLERS, SIZE, DEADLINE = 50, 10, 60.0
SHORTEST, LONGEST = 1.0, 20.0
MEDIAN, WORST, MOST_CONNECTS = 0.6, 1.5, 5  # seconds, seconds, per second

SERVED, CONNECTS = "all served after", "connects in the worst second"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return how each client recovers."""
    figures = [Figure(SERVED, "s", show=("median", "max")), Figure(CONNECTS, show=("max",))]
    table = Table(f"{CALLERS} callers, outages of {SHORTEST:g} to {LONGEST:g} s", (OURS, PSYCOPG), figures)
    step = (LONGEST - SHORTEST) / max(1, arguments.outages - 1)
    lengths = [SHORTEST + number * step for number in range(arguments.outages)]
    limit = str(len(lengths) * (SIZE + 1) + 20)
    async with LocalPostgres(settings={"max_connections": limit}) as server, AsyncExitStack() as stack:
        endpoints = [await stack.enter_async_context(LocalEndpoint(server)) for _ in lengths]
        candidates = [stack.enter_context(clients_of(endpoint)) for endpoint in endpoints]
        clients = {name: [candidate[name] for candidate in candidates] for name in (OURS, PSYCOPG)}
        for _, name, open_clients in take_turns(clients, arguments.rounds, warm_up=False):
            gc.collect()
            outages = zip(open_clients, endpoints, lengths, strict=True)
            for seconds, connects in await asyncio.gather(*(outage(*one) for one in outages)):
                table.add(name, SERVED, seconds)
                table.add(name, CONNECTS, connects)
    worst = max(table.numbers[OURS][SERVED])
    return Report(
        [table],
        [
            Limit("all callers of ours are served after {} s (median)", table.value(OURS, SERVED), at_most=MEDIAN),
            Limit("and after {} s (worst)", worst, at_most=WORST),
            Limit("{} connects of ours in the worst second", table.value(OURS, CONNECTS), at_most=MOST_CONNECTS),
        ],
    )


async def outage(open_client: OpenClient, endpoint: LocalEndpoint, seconds: float) -> tuple[float, int]:
    """Return the seconds from the end of an outage until every caller is served, and the connects per second in it."""
    async with open_client(SIZE, deadline=DEADLINE) as client:
        await fill(client, SIZE)
        endpoint.refuse()
        endpoint.cut()
        callers = [asyncio.ensure_future(call(client)) for _ in range(CALLERS)]
        connects = await most_connects(endpoint, seconds)
        begin = time.perf_counter()
        endpoint.accept()
        await asyncio.gather(*callers)
        return time.perf_counter() - begin, connects


async def call(client: Client) -> None:
    """Try until there is an answer."""
    while True:
        try:
            await client.fetchval("SELECT 1")
        except Exception:  # noqa: BLE001  # each client has errors of its own
            await asyncio.sleep(0)  # an error can occur without a turn of the event loop
        else:
            return


async def most_connects(endpoint: LocalEndpoint, seconds: float) -> int:
    """Wait so many seconds, and return the most connects that reach `endpoint` in any one of them."""
    begin, seen = time.perf_counter(), [endpoint.connects]
    for second in range(1, int(seconds) + 1):
        await asyncio.sleep(begin + second - time.perf_counter())
        seen.append(endpoint.connects)
    await asyncio.sleep(begin + seconds - time.perf_counter())
    return max(after - before for before, after in itertools.pairwise(seen))


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=1, options=[Option("--outages", "outages at once", 20)]))
