"""Count the round trips of a transaction and take its time: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/transaction.py [--rounds 3] [--json FILE]

Each transaction acquires a connection from a pool with the pool's defaults, begins, runs `SELECT 1` once or twice,
commits, and releases the connection, on one PostgreSQL over verified TLS and asyncio's own event loop. Ours is
`pool.transaction()`. The clients have run each transaction before, so that all caches are warm.

- one, two: a transaction of one statement, or of two;
- claims: of one statement, with a role and three settings, as policies of row-level security read them. The other
  clients set them with one statement more;
- nested: of one statement in a savepoint block;
- empty: of no statement.

A relay that delays every byte by 10 ms in each direction counts the round trips until the caller has its connection
released; those of the background cost the caller no time. The numbers are the smallest of the rounds, because a machine
that stalls can split a round trip in two and never joins two. The times are medians of transactions that one task runs
in a row, with the same 20 ms through a relay in a process of its own. The pools take turns.

Limits: a transaction of ours takes two round trips with one statement and three with two, the same with claims, at most
one more with a savepoint, and one if it is empty; with one statement it takes at most 0.55 times as long as asyncpg's.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from contextlib import AsyncExitStack

from harness import Figure, Limit, Report, Table, run, take_turns
from peers import ASYNCPG, ASYNCPG_BARE, OURS, POOLS, Client, OpenClient, Server, Work, clients_of
from relay import Relay, distant

from neon_async.testing import LocalPostgres

NAMES = (*POOLS, ASYNCPG_BARE)
DELAY = 0.01  # seconds each way
CALLS = 5  # in a row, for the times
WARM_UP = 6  # psycopg prepares a statement after it has run five times

ONE, TWO, CLAIMS, TWO_WITH_CLAIMS, NESTED, EMPTY = "one", "two", "claims", "two, claims", "nested", "empty"
WORK = {
    ONE: Work(),
    TWO: Work(statements=2),
    CLAIMS: Work(claims=True),
    TWO_WITH_CLAIMS: Work(statements=2, claims=True),
    NESTED: Work(nested=True),
    EMPTY: Work(statements=0),
}
MOST = {ONE: 2, TWO: 3, CLAIMS: 2, TWO_WITH_CLAIMS: 3, NESTED: 3, EMPTY: 1}  # round trips of ours
TIMED = (ONE, TWO, CLAIMS)


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the round trips and the times of each client."""
    async with LocalPostgres() as server:
        counted = await count(server, arguments.rounds)
        timed = await take_times(server, arguments.rounds)
    ratio = round(timed.ratio(ONE, OURS, ASYNCPG), 2)
    limits = [
        *(
            Limit(f"{name}: ours takes {{}} round trips", counted.value(OURS, name), at_most=MOST[name])
            for name in WORK
        ),
        Limit("one: ours takes {} times as long as asyncpg", ratio, at_most=0.55),
    ]
    return Report([counted, timed], limits)


async def count(server: Server, rounds: int) -> Table:
    """Return the round trips of each client's transactions."""
    table = Table("round trips of a transaction", NAMES, [Figure(name, show=("min",)) for name in WORK])
    async with Relay(server.port, DELAY).listening() as relay:
        with clients_of(server, relay.port) as candidates:
            for name in NAMES:
                await count_client(table, name, candidates[name], relay, rounds)
    return table


async def count_client(table: Table, name: str, open_client: OpenClient, relay: Relay, rounds: int) -> None:
    """Add the round trips of one client."""
    async with open_client(1) as client:
        for figure, work in WORK.items():
            for _ in range(WARM_UP):
                await client.transact(work)
            for _ in range(rounds):
                counted = await relay.count(client.transact(work))
                table.add(name, figure, counted.round_trips)


async def take_times(server: Server, rounds: int) -> Table:
    """Return the seconds of each client's transactions."""
    figures = [Figure(name, "ms", base=ASYNCPG) for name in TIMED]
    table = Table(f"a transaction with {2 * DELAY * 1e3:.0f} ms round trip", NAMES, figures)
    async with distant(server.port, DELAY) as port, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server, port))
        opened = {name: await stack.enter_async_context(candidates[name](1)) for name in NAMES}
        for counts, name, client in take_turns(opened, rounds, warm_up=True):
            gc.collect()
            for figure in TIMED:
                taken = await in_a_row(client, WORK[figure], CALLS if counts else WARM_UP)
                if counts:
                    table.add(name, figure, *taken)
    return table


async def in_a_row(client: Client, work: Work, calls: int) -> list[float]:
    """Return the seconds of each transaction when one follows the other."""
    taken = []
    for _ in range(calls):
        begin = time.perf_counter()
        await client.transact(work)
        taken.append(time.perf_counter() - begin)
    return taken


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=3))
