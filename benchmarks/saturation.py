"""Measure how many requests per second a saturated pool serves: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/saturation.py [--requests 400] [--rounds 20] [--json FILE]

64 tasks share 10 open connections to one PostgreSQL over verified TLS, on asyncio's own event loop and on uvloop. Each
task repeats one `fetchval("SELECT 1")` per acquire until all requests of the round are done. The clock stops when every
connection is free again after the last answer, so that every reset is included.

The client has one CPU and the server the others, as if they were two machines. Otherwise the operating system moves
processes of the server to the client's CPU and back, and the rates of one client differ by half from run to run. Where
there is one CPU, or no way to choose, they share what there is.

The pools take turns, in an order that changes from round to round. psycopg_pool is measured with its defaults (BEGIN
and COMMIT around a query) and with autocommit. Limit, on each event loop: ours serves at least 1.3 times as many
requests per second as asyncpg's pool (median of the rounds' ratios).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import uvloop
from harness import Figure, Limit, Option, Report, Table, run, take_turns
from peers import ASYNCPG, OURS, POOLS, PSYCOPG_AUTOCOMMIT, Client, clients_of, fill, open_all

from neon_async.testing import LocalPostgres

TASKS, SIZE = 64, 10
NAMES = (*POOLS, PSYCOPG_AUTOCOMMIT)
RATE = "requests"
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def measure(arguments: argparse.Namespace) -> Report:
    """Return the requests per second of each client on each event loop."""
    tables, limits = [], []
    for loop, factory in LOOPS.items():
        with asyncio.Runner(loop_factory=factory) as runner:
            table = runner.run(measure_loop(loop, arguments))
        ratio = table.paired_ratio(RATE, OURS, ASYNCPG)
        tables.append(table)
        limits.append(Limit(f"{loop}: ours serves {{}} times as many requests as asyncpg's pool", ratio, at_least=1.3))
    return Report(tables, limits)


async def measure_loop(loop: str, arguments: argparse.Namespace) -> Table:
    """Return the requests per second of each client on the running event loop."""
    table = Table(
        f"{loop}: requests per second, {TASKS} tasks on {SIZE} connections",
        NAMES,
        [Figure(RATE, "/s", show=("median", "min", "max"))],
    )
    async with server_on_other_cpus() as server, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server))
        opened = await open_all(stack, candidates, NAMES, SIZE)
        for counts, name, client in take_turns(opened, arguments.rounds, warm_up=True):
            rate = await rate_of(client, arguments.requests)
            if counts:
                table.add(name, RATE, rate)
    return table


@contextlib.asynccontextmanager
async def server_on_other_cpus() -> AsyncIterator[LocalPostgres]:
    """Start a server that does not run on the CPU of this process."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    own = {max(allowed)}  # interrupts are often served by the first one
    run_on(allowed - own or allowed)  # which the processes of the server inherit
    try:
        async with LocalPostgres(settings={"max_connections": "100"}) as server:
            run_on(own)
            yield server
    finally:
        run_on(allowed)


def run_on(cpus: set[int]) -> None:
    """Run this process, and those that it starts, on these CPUs, where the system lets it choose."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


async def rate_of(client: Client, requests: int) -> float:
    """Return the requests per second of `TASKS` tasks that share the requests."""
    gc.collect()
    tickets = itertools.repeat(None, requests)

    async def work() -> None:
        for _ in tickets:
            await client.fetchval("SELECT 1")

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(TASKS):
            tasks.create_task(work())
    await fill(client, SIZE)  # acquires every connection once more, so that every reset has ended
    return requests / (time.perf_counter() - begin)


if __name__ == "__main__":
    options = [Option("--requests", "requests per round", 400)]
    sys.exit(run(measure, __doc__, rounds=20, options=options))
