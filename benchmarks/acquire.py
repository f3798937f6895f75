"""What taking a connection and giving it back costs by itself: ours beside the other pools, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/acquire.py [--calls 500] [--rounds 9] [--json FILE]

Every pool has its ten connections open to one PostgreSQL over verified TLS, and one task does nothing but
`async with pool.acquire(): pass`, on asyncio's own event loop:

- in a row: one after the other without a pause. What a pool leaves to the background has to be paid for here, too;
- alone: the time of a single one that comes to a pool at rest. Between two of them everything in the background ends.

asyncpg by default resets the connection before the task goes on; with a `reset=` that does nothing it shows what is
left without. Ours is there both ways, too. psycopg_pool and SQLAlchemy send nothing when nothing was sent.

The pools take turns, in an order that changes from round to round. A round's number is its mean in a row and its median
alone; shown is the median of the rounds, and ratios are taken within each round. Exit status: 0 when ours, as it is by
default, takes at most 1.5 times what asyncpg without a reset takes, and at most a fifth of what asyncpg takes by
default, in a row and alone; else 1.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from contextlib import AsyncExitStack

from peers import ASYNCPG, ASYNCPG_BARE, OURS, OURS_BARE, PSYCOPG, SQLALCHEMY, Client, clients_of, in_turns, open_all
from report import conclude, parser, print_table

from neon_async.testing import LocalPostgres

SIZE = 10
PAUSE = 0.002  # seconds; a reset on loopback takes a tenth of it
NAMES = (OURS, OURS_BARE, ASYNCPG, ASYNCPG_BARE, PSYCOPG, SQLALCHEMY)
IN_A_ROW, ALONE = "in a row", "alone"

# The most that ours may take, as a multiple of the other's time.
LIMITS = {ASYNCPG_BARE: 1.5, ASYNCPG: 1 / 5}

Seconds = dict[str, dict[str, list[float]]]


async def in_a_row(client: Client, calls: int) -> float:
    """Return the mean seconds of an acquire and release when one follows the other."""
    gc.collect()
    begin = time.perf_counter()
    for _ in range(calls):
        async with client.acquire():
            pass
    return (time.perf_counter() - begin) / calls


async def alone(client: Client, calls: int) -> float:
    """Return the median seconds of an acquire and release when the pool is at rest before each."""
    gc.collect()
    taken = []
    for _ in range(calls):
        await asyncio.sleep(PAUSE)
        begin = time.perf_counter()
        async with client.acquire():
            pass
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


async def measure(calls: int, rounds: int) -> Seconds:
    """Return the seconds of each client, both ways, one per round."""
    seconds: Seconds = {way: {name: [] for name in NAMES} for way in (IN_A_ROW, ALONE)}
    async with LocalPostgres(settings={"max_connections": "100"}) as server, AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server))
        opened = await open_all(stack, candidates, NAMES, SIZE)
        for number, name, client in in_turns(opened, rounds + 1):
            taken = {IN_A_ROW: await in_a_row(client, calls), ALONE: await alone(client, calls // 10)}
            if number:  # in the first round everybody warms up
                for way, value in taken.items():
                    seconds[way][name].append(value)
    return seconds


def ratio(taken: dict[str, list[float]], name: str) -> float:
    """Return how many times the time of `name` ours takes: the median of the rounds' ratios."""
    return statistics.median(ours / theirs for ours, theirs in zip(taken[OURS], taken[name], strict=True))


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    arguments_parser = parser("The time of an acquire and release.", rounds=9)
    arguments_parser.add_argument("--calls", type=int, default=500, help="calls in a row per round (default: 500)")
    arguments = arguments_parser.parse_args()

    seconds = asyncio.run(measure(arguments.calls, arguments.rounds))

    print_table(
        f"acquire and release, nothing else; median of {arguments.rounds} rounds",
        [f"{way}, {what}" for way in seconds for what in ("median", "fastest")],
        {
            name: [
                f"{value * 1e6:.1f} us"
                for taken in seconds.values()
                for value in (statistics.median(taken[name]), min(taken[name]))
            ]
            for name in NAMES
        },
    )
    ratios = {way: {name: ratio(taken, name) for name in LIMITS} for way, taken in seconds.items()}
    missed = [
        f"{way}: ours takes {ratios[way][name]:.2f} times what {name} takes; the limit is {limit}"
        for way in ratios
        for name, limit in LIMITS.items()
        if ratios[way][name] > limit
    ]
    worst = {name: max(taken[name] for taken in ratios.values()) for name in LIMITS}
    good = ", ".join(f"{value:.2f} times {name}" for name, value in worst.items())
    document = {"limits": LIMITS, "ratios": ratios, "seconds": seconds}
    return conclude(missed, f"ours takes {good}", document, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
