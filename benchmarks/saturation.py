"""How many requests a second go through a pool that everybody wants: ours beside the other pools, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/saturation.py [--requests 400] [--rounds 20] [--json FILE]

64 tasks share 10 connections to one PostgreSQL over verified TLS, all open beforehand, on asyncio's own event loop.
Each task does one `fetchval("SELECT 1")` per acquire, and at once the next, until all requests of the round are done.
The clock stops when the last answer is there and every connection is back, so that no reset is left out of the bill.

The pools take turns, in an order that changes from round to round. psycopg_pool is there as it is by default (BEGIN and
COMMIT around a query), and with autocommit. Exit status: 0 when ours does no fewer requests a second than asyncpg's
pool (median of the rounds' ratios), else 1.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import sys
import time
from contextlib import AsyncExitStack

from peers import ASYNCPG, OURS, POOLS, PSYCOPG_AUTOCOMMIT, Client, clients_of, fill, in_turns, open_all
from report import conclude, parser, print_table

from neon_async.testing import LocalPostgres

TASKS, SIZE = 64, 10
NAMES = (*POOLS, PSYCOPG_AUTOCOMMIT)
LIMIT = 1.0


async def rate_of(client: Client, requests: int) -> float:
    """Return the requests a second of `TASKS` tasks that share the work."""
    gc.collect()
    tickets = itertools.repeat(None, requests)

    async def work() -> None:
        for _ in tickets:
            await client.fetchval("SELECT 1")

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(TASKS):
            tasks.create_task(work())
    await fill(client, SIZE)  # has every connection once more, so every reset has ended
    return requests / (time.perf_counter() - begin)


async def measure(requests: int, rounds: int) -> dict[str, list[float]]:
    """Return the requests a second of each client, one per round."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    async with LocalPostgres(settings={"max_connections": "100"}) as server, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server))
        opened = await open_all(stack, candidates, NAMES, SIZE)
        for number, name, client in in_turns(opened, rounds + 1):
            rate = await rate_of(client, requests)
            if number:  # in the first round everybody warms up
                rates[name].append(rate)
    return rates


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    arguments_parser = parser("Requests a second through a pool that is exhausted.", rounds=20)
    arguments_parser.add_argument("--requests", type=int, default=400, help="requests per round (default: 400)")
    arguments = arguments_parser.parse_args()

    rates = asyncio.run(measure(arguments.requests, arguments.rounds))

    print_table(
        f"requests a second, {TASKS} tasks on {SIZE} connections; {arguments.rounds} rounds",
        ("median", "slowest", "fastest"),
        {
            name: [f"{value:.0f}" for value in (statistics.median(taken), min(taken), max(taken))]
            for name, taken in rates.items()
        },
    )
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates[OURS], rates[ASYNCPG], strict=True))
    sentence = f"ours does {ratio:.2f} times as many as asyncpg's pool; the limit is {LIMIT}"
    document = {"limit": LIMIT, "ratio": ratio, "rates": rates}
    return conclude([sentence] if ratio < LIMIT else [], sentence, document, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
