"""Count the connects per second that reach a server that refuses, while callers keep trying: ours and the other pools.

    python -m pip install -e '.[dev]'
    python benchmarks/herd.py [--seconds 2] [--rounds 1] [--json FILE]

50 tasks each call `fetchval` on a pool of ten connections and try again at once after an error. An acquire may take one
second. The server is a PostgreSQL after a relay, over verified TLS. It refuses in two ways, each for some seconds:

- down: every connect is reset (RST). Then connects are accepted again, and the time until the first answer is measured.
- wrong password: it accepts the connect and refuses the login. A retry is of no use.

Measured are the connects per second that reach the relay: the average, and those of the worst second. The largest
number of the rounds is shown. Limits: at most five connects of ours per second, in either case, and the first answer
within 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harness import Figure, Limit, Option, Report, Table, run, take_turns
from peers import OURS, POOLS, Client, OpenClient, clients_of

from neon_async.testing import LocalEndpoint, LocalPostgres

CALLERS, SIZE, DEADLINE = 50, 10, 1.0
MOST_CONNECTS = 5.0  # per second
MOST_SECONDS = 5.0  # until the first answer

DOWN, DOWN_WORST, ANSWER = "down", "down, worst second", "answer after"
PASSWORD, PASSWORD_WORST = "wrong password", "wrong password, worst second"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the connects per second of each client."""
    # asyncpg leaves a future with an unretrieved exception where a connect is reset, and asyncio logs each.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    counts = [Figure(name, show=("max",)) for name in (DOWN, DOWN_WORST)]
    counts += [Figure(ANSWER, "s", show=("max",))]
    counts += [Figure(name, show=("max",)) for name in (PASSWORD, PASSWORD_WORST)]
    table = Table(f"connects per second, {CALLERS} callers that keep trying", POOLS, counts)
    async with LocalPostgres(settings={"max_connections": "100"}) as server, LocalEndpoint(server) as endpoint:
        with clients_of(endpoint) as candidates, clients_of(endpoint, password="wrong") as locked_out:  # noqa: S106
            pools = {name: candidates[name] for name in POOLS}
            for _, name, open_client in take_turns(pools, arguments.rounds, warm_up=False):
                await while_down(table, name, open_client, endpoint, arguments.seconds)
                await while_locked_out(table, name, locked_out[name], endpoint, arguments.seconds)
    limits = [
        *(
            Limit(f"{way}: {{}} connects of ours per second", table.value(OURS, way), at_most=MOST_CONNECTS)
            for way in (DOWN, PASSWORD)
        ),
        Limit("the first answer of ours takes {} s", table.value(OURS, ANSWER), at_most=MOST_SECONDS),
    ]
    return Report([table], limits)


async def while_down(table: Table, name: str, open_client: OpenClient, endpoint: LocalEndpoint, seconds: int) -> None:
    """Measure one client while the server resets every connect, and until its first answer afterwards."""
    gc.collect()
    answer = asyncio.Event()
    endpoint.refuse()
    async with open_client(SIZE, deadline=DEADLINE) as client:
        with persistent_callers(client, answer.set):
            average, worst = await connects_of(endpoint, seconds)
            begin = time.perf_counter()
            endpoint.accept()
            async with asyncio.timeout(60):
                await answer.wait()
            table.add(name, ANSWER, time.perf_counter() - begin)
    table.add(name, DOWN, average)
    table.add(name, DOWN_WORST, worst)


async def while_locked_out(
    table: Table, name: str, open_client: OpenClient, endpoint: LocalEndpoint, seconds: int
) -> None:
    """Measure one client with a wrong password."""
    async with open_client(SIZE, deadline=DEADLINE) as client:
        with persistent_callers(client, lambda: None):
            average, worst = await connects_of(endpoint, seconds)
    table.add(name, PASSWORD, average)
    table.add(name, PASSWORD_WORST, worst)


@contextmanager
def persistent_callers(client: Client, answered: Callable[[], None]) -> Iterator[None]:
    """Let `CALLERS` tasks try until the block is left. Each stops at its first answer."""

    async def call() -> None:
        while True:
            try:
                await client.fetchval("SELECT 1")
            except Exception:  # noqa: BLE001  # each client has errors of its own
                await asyncio.sleep(0)  # an error can occur without a turn of the event loop
            else:
                answered()
                return

    tasks = [asyncio.ensure_future(call()) for _ in range(CALLERS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def connects_of(endpoint: LocalEndpoint, seconds: int) -> tuple[float, int]:
    """Return the connects per second that reach `endpoint` in that time, and those of the worst second."""
    seen = [endpoint.connects]
    begin = time.perf_counter()
    for second in range(seconds):
        await asyncio.sleep(begin + second + 1 - time.perf_counter())
        seen.append(endpoint.connects)
    each = [after - before for before, after in itertools.pairwise(seen)]
    return sum(each) / (time.perf_counter() - begin), max(each)


if __name__ == "__main__":
    options = [Option("--seconds", "seconds per pool and kind of refusal", 2)]
    sys.exit(run(measure, __doc__, rounds=1, options=options))
