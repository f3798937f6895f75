"""How evenly the waiting is shared when more tasks want a connection than there are: ours beside the others, one run.

    python -m pip install -e '.[dev]'
    python benchmarks/fairness.py [--turns 6] [--rounds 3] [--json FILE]

100 workers share 10 connections to one PostgreSQL over verified TLS, all open beforehand, on asyncio's own event loop.
Each worker takes a connection, keeps it for 5 ms and gives it back, and at once asks for the next. In a perfect line
that costs no time itself nine others go before each on every connection: everybody waits 45 ms every time. What is
counted is how long each acquire of a worker waits, from its second on: at the start nobody is in the line before the
first ten.

The 5 ms are a sleep of the task, or a query that sleeps in the server. After a query a connection has to be reset
before the next may have it, where a pool does that: time that is nobody's fault in the line, but everybody's in it.
What is then counted is the time of the whole request, less the 5 ms.

The pools take turns, in an order that changes from round to round. The percentiles are those of a round, and shown is
the smallest of the rounds: other work on the machine can make the line slower, and never faster. Exit status: 0 when
the 99th percentile of ours, where the task sleeps, is at most 1.25 times the ideal, else 1.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from peers import ASYNCPG_BARE, OURS, POOLS, Client, clients_of, in_turns, open_all
from report import conclude, parser, print_table
from timers import exact_loop

from neon_async.testing import LocalPostgres

WORKERS, SIZE, KEEP = 100, 10, 0.005
IDEAL = (WORKERS / SIZE - 1) * KEEP
LIMIT = 1.25
NAMES = (*POOLS, ASYNCPG_BARE)
JUDGED = "asleep"

Rounds = dict[str, dict[str, list[tuple[float, float, float]]]]


async def asleep(client: Client) -> float:
    """Keep a connection without using it; return the seconds of waiting for it."""
    begin = time.perf_counter()
    async with client.acquire():
        waited = time.perf_counter() - begin
        await asyncio.sleep(KEEP)
    return waited


async def in_a_query(client: Client) -> float:
    """Keep a connection with a query; return the seconds in which it did not run."""
    begin = time.perf_counter()
    await client.fetchval(f"SELECT pg_sleep({KEEP})")
    return time.perf_counter() - begin - KEEP


KEEPING = {"asleep": asleep, "in a query": in_a_query}


async def waits_of(keep: Callable[[], Awaitable[float]], turns: int) -> list[float]:
    """Return the seconds that every acquire but a worker's first has waited."""
    gc.collect()

    async def work() -> list[float]:
        return [await keep() for _ in range(turns + 1)][1:]

    return [wait for waits in await asyncio.gather(*[work() for _ in range(WORKERS)]) for wait in waits]


def percentiles(waits: list[float]) -> tuple[float, float, float]:
    """Return the median, the 99th percentile and the longest."""
    return statistics.median(waits), statistics.quantiles(waits, n=100)[98], max(waits)


async def measure(turns: int, rounds: int) -> Rounds:
    """Return the percentiles of each client in seconds, one per round, for each way to keep a connection."""
    seen: Rounds = {way: {name: [] for name in NAMES} for way in KEEPING}
    async with LocalPostgres(settings={"max_connections": "100"}) as server, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server))
        opened = await open_all(stack, candidates, NAMES, SIZE)
        for way, keep in KEEPING.items():
            for number, name, client in in_turns(opened, rounds + 1):
                waits = await waits_of(partial(keep, client), turns)
                if number:  # in the first round everybody warms up
                    seen[way][name].append(percentiles(waits))
    return seen


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    arguments_parser = parser("How long waiting for a connection takes.", rounds=3)
    arguments_parser.add_argument("--turns", type=int, default=6, help="acquires that count per worker (default: 6)")
    arguments = arguments_parser.parse_args()

    with asyncio.Runner(loop_factory=exact_loop) as runner:
        seen = runner.run(measure(arguments.turns, arguments.rounds))
    best = {
        way: {name: [min(values) for values in zip(*each, strict=True)] for name, each in clients.items()}
        for way, clients in seen.items()
    }

    print_table(
        f"waiting for one of {SIZE} connections: {WORKERS} workers, {KEEP * 1e3:.0f} ms, ideal {IDEAL * 1e3:.0f} ms",
        [f"{way}, {what}" for way in KEEPING for what in ("median", "p99", "longest")],
        {name: [f"{value * 1e3:.1f} ms" for way in KEEPING for value in best[way][name]] for name in NAMES},
    )
    ratio = best[JUDGED][OURS][1] / IDEAL
    sentence = f"the p99 of ours is {ratio:.2f} times the ideal; the limit is {LIMIT}"
    document = {"ideal": IDEAL, "limit": LIMIT, "ratio": ratio, "best_median_p99_longest": best, "rounds": seen}
    return conclude([sentence] if ratio > LIMIT else [], sentence, document, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
