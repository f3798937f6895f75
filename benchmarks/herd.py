"""How many connects a second reach a server that refuses, while callers do not give up: ours beside the other pools.

    python -m pip install -e '.[dev]'
    python benchmarks/herd.py [--seconds 2] [--rounds 1] [--json FILE]

50 tasks each want a `fetchval` from a pool of ten connections, and try again at once when there is an error; taking a
connection may last a second. The server is a PostgreSQL behind a relay, and is seen over verified TLS. It refuses in
two ways, each for some seconds:

- down: every connect is reset (RST). Then connects are let through again, and the time until the first answer counts;
- wrong password: it takes the connect, and refuses the login. There is no point in trying again soon.

Counted are the connects that reach the relay: a second on the average, and in the worst of the seconds. The average of
each round counts; shown is the largest of the rounds. Exit status: 0 when no more than five a second of ours arrive,
either way, and its first answer comes within 5 s; else 1.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from peers import OURS, POOLS, Client, OpenClient, clients_of, in_turns
from report import conclude, parser, print_table

from neon_async.testing import LocalEndpoint, LocalPostgres

CALLERS, SIZE, DEADLINE = 50, 10, 1.0
MOST_CONNECTS = 5.0  # a second
MOST_PATIENCE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Herd:
    """Connects a second: the average, and the most in one second; for each way to refuse. Seconds until an answer."""

    down: float
    down_most: int
    answer: float
    password: float
    password_most: int


@contextmanager
def persistent_callers(client: Client, answered: Callable[[], None]) -> Iterator[None]:
    """Have `CALLERS` tasks try until the block is left; each stops at its first answer."""

    async def call() -> None:
        while True:
            try:
                await client.fetchval("SELECT 1")
            except Exception:  # noqa: BLE001  every client has errors of its own
                await asyncio.sleep(0)  # an error can come without a turn of the loop
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
    """Return the connects a second that reach `endpoint` in that time, and the most in one second."""
    seen = [endpoint.connects]
    begin = time.perf_counter()
    for second in range(seconds):
        await asyncio.sleep(begin + second + 1 - time.perf_counter())
        seen.append(endpoint.connects)
    each = [after - before for before, after in itertools.pairwise(seen)]
    return sum(each) / (time.perf_counter() - begin), max(each)


async def herd_of(open_client: OpenClient, open_locked_out: OpenClient, endpoint: LocalEndpoint, seconds: int) -> Herd:
    """Return what one client does; `open_locked_out` opens the same one with a wrong password."""
    gc.collect()
    answer = asyncio.Event()
    endpoint.refuse()
    async with open_client(SIZE, deadline=DEADLINE) as client:
        with persistent_callers(client, answer.set):
            down, down_most = await connects_of(endpoint, seconds)
            begin = time.perf_counter()
            endpoint.accept()
            async with asyncio.timeout(60):
                await answer.wait()
            answered = time.perf_counter() - begin
    async with open_locked_out(SIZE, deadline=DEADLINE) as client:
        with persistent_callers(client, answer.set):
            password, password_most = await connects_of(endpoint, seconds)
    return Herd(down, down_most, answered, password, password_most)


async def measure(seconds: int, rounds: int) -> dict[str, Herd]:
    """Return what each client does, the largest number of the rounds."""
    seen: dict[str, list[Herd]] = {name: [] for name in POOLS}
    async with LocalPostgres(settings={"max_connections": "100"}) as server, LocalEndpoint(server) as endpoint:
        with clients_of(endpoint) as candidates, clients_of(endpoint, password="wrong") as locked_out:  # noqa: S106
            for _, name, open_client in in_turns({name: candidates[name] for name in POOLS}, rounds):
                seen[name].append(await herd_of(open_client, locked_out[name], endpoint, seconds))
    return {
        name: Herd(**{key: max(asdict(one)[key] for one in herds) for key in asdict(herds[0])})
        for name, herds in seen.items()
    }


def shortfalls(ours: Herd) -> list[str]:
    """Return a sentence for each limit that ours misses."""
    limit = f"the limit is {MOST_CONNECTS:.0f}"
    sentences = [
        f"{way}: {rate:.1f} connects a second of ours reach the server; {limit}"
        for way, rate in (("down", ours.down), ("wrong password", ours.password))
        if rate > MOST_CONNECTS
    ]
    if ours.answer > MOST_PATIENCE:
        sentences.append(f"the first answer of ours takes {ours.answer:.1f} s; the limit is {MOST_PATIENCE:.0f} s")
    return sentences


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    arguments_parser = parser("Connects a second that reach a server which refuses.", rounds=1)
    arguments_parser.add_argument("--seconds", type=int, default=2, help="seconds per pool and refusal (default: 2)")
    arguments = arguments_parser.parse_args()

    # asyncpg leaves a future with an exception behind where a connect is reset, and asyncio tells of each.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    herds = asyncio.run(measure(arguments.seconds, arguments.rounds))

    print_table(
        f"connects a second, {CALLERS} callers that do not give up",
        ("down", "worst second", "answer after", "wrong password", "worst second"),
        {
            name: [
                f"{herd.down:.1f}",
                f"{herd.down_most}",
                f"{herd.answer:.2f} s",
                f"{herd.password:.1f}",
                f"{herd.password_most}",
            ]
            for name, herd in herds.items()
        },
    )
    ours = herds[OURS]
    good = f"{max(ours.down, ours.password):.1f} connects a second of ours at most; the limit is {MOST_CONNECTS:.0f}"
    limits = {"connects_a_second": MOST_CONNECTS, "first_answer": MOST_PATIENCE}
    document = {"limits": limits, "herds": {name: asdict(herd) for name, herd in herds.items()}}
    return conclude(shortfalls(ours), good, document, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
