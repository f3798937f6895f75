"""What one query costs from a pool, and what follows behind the caller's back: ours beside the other pools, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/request.py [--rounds 2] [--json FILE]

One `fetchval("SELECT 1")` per acquire, of pools of at most ten connections, to one PostgreSQL over verified TLS, on
asyncio's own event loop. The round trip takes 0, 1 and 20 ms: a relay in a process of its own holds every byte back
(for 0 there is none). The way is direct, and pooled: through PgBouncer 1.21 or later in transaction mode, under a
`-pooler` host name for ours. Without such a PgBouncer on PATH the pooled half is left out, and a line says so.

- flights: round trips until the caller has the answer and is out of the pool again; behind: those that follow in the
  background, with the bytes sent for them. Counted by another relay, once all caches are warm;
- in a row: seconds of a request when one task does one after the other, and how many connections the pool opens for
  that: what is done in the background takes another one, or time of the next request;
- ten tasks: requests a second of ten tasks that each do so. Now all connections are busy, and nothing is hidden.

The pools take turns, in an order that changes from round to round; medians are those of all rounds. psycopg_pool is
there as it is by default (BEGIN and COMMIT around a query), and with autocommit. Exit status: 0 when ours takes one
flight on either way, and in a row with 20 ms at most 0.50 of the median that asyncpg takes; else 1. One flight against
two can be no less than that, so the third decimal is noise and is rounded away.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from contextlib import AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peers import ASYNCPG, OURS, POOLS, PSYCOPG_AUTOCOMMIT, Client, OpenClient, Server, clients_of, fill, in_turns
from relay import Count, Relay, distant
from report import conclude, parser, print_table

from neon_async.testing import LocalPostgres

# The tests' own PgBouncer, and nothing else of theirs.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.pgbouncer import MINIMUM_VERSION, LocalPgBouncer, installed_version

NAMES = (*POOLS, PSYCOPG_AUTOCOMMIT)
DIRECT, POOLED = "direct", "pooled"
SIZE, TASKS = 10, 10
WARM_UP = 6  # psycopg prepares a statement that has run five times
COUNTING_DELAY = 0.01  # seconds each way, so that flights can be told apart
CALLS = {0.0: 90, 0.001: 24, 0.02: 6}  # in a row, by the seconds of a round trip
JUDGED, LIMIT, FLIGHTS = 0.02, 0.50, 1


@dataclass(slots=True)
class Seen:
    """What one client has shown at one round trip time: seconds of each request in a row, a rate for each round."""

    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    connections: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """All that was seen on the direct or on the pooled way: flights by client; the rest by round trip and client."""

    flights: dict[str, Count]
    seen: dict[float, dict[str, Seen]]

    def ratio(self, round_trip: float) -> float:
        """Return how many times asyncpg's time ours takes in a row, by the medians."""
        ours, theirs = self.seen[round_trip][OURS], self.seen[round_trip][ASYNCPG]
        return statistics.median(ours.seconds) / statistics.median(theirs.seconds)


async def flights_of(open_client: OpenClient, relay: Relay) -> Count:
    """Return the flights of a warm query."""
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


async def by_many(client: Client, calls: int) -> float:
    """Return the requests a second of tasks that do `calls` in a row each."""
    begin = time.perf_counter()
    await asyncio.gather(*[in_a_row(client, calls) for _ in range(TASKS)])
    return TASKS * calls / (time.perf_counter() - begin)


async def measure_way(server: Server, rounds: int) -> Way:
    """Return what is seen on the way to `server`, which is PostgreSQL or PgBouncer."""
    async with Relay(server.port, COUNTING_DELAY).listening() as relay:
        with clients_of(server, relay.port) as candidates:
            flights = {name: await flights_of(candidates[name], relay) for name in NAMES}
    way = Way(flights, {})
    for round_trip in CALLS:
        async with distant(server.port, round_trip / 2) if round_trip else nullcontext(server.port) as port:
            way.seen[round_trip] = await measure_distance(server, port, CALLS[round_trip], rounds)
    return way


async def measure_distance(server: Server, port: int, calls: int, rounds: int) -> dict[str, Seen]:
    """Return what each client shows on the way to `server` through `port`."""
    seen = {name: Seen() for name in NAMES}
    async with AsyncExitStack() as stack:
        candidates = stack.enter_context(clients_of(server, port))
        opened = {name: await stack.enter_async_context(candidates[name](SIZE)) for name in NAMES}
        for number, name, client in in_turns(opened, rounds + 1):
            gc.collect()
            taken = await in_a_row(client, calls)
            if number:  # in the first round everybody warms up
                seen[name].seconds.extend(taken)
                seen[name].connections = client.size()
        for client in opened.values():
            await fill(client, SIZE)
        for _, name, client in in_turns(opened, rounds):
            gc.collect()
            seen[name].rates.append(await by_many(client, calls // 3))
    return seen


async def measure(rounds: int) -> dict[str, Way]:
    """Return what is seen on both ways, or on the direct one only."""
    async with LocalPostgres(settings={"max_connections": "200"}) as server:
        ways = {DIRECT: await measure_way(server, rounds)}
        version = installed_version()
        if version and version >= MINIMUM_VERSION:
            async with LocalPgBouncer(server, default_pool_size=SIZE * len(NAMES)) as bouncer:
                ways[POOLED] = await measure_way(bouncer, rounds)
    return ways


def print_way(name: str, way: Way) -> None:
    """Print the tables of one way."""
    print_table(
        f"{name}: a warm query",
        ("flights", "behind", "bytes behind"),
        {
            client: [f"{count.flights}", f"{count.flights_behind}", f"{count.bytes_behind}"]
            for client, count in way.flights.items()
        },
    )
    for round_trip, seen in way.seen.items():
        print_table(
            f"{name}, {round_trip * 1e3:.0f} ms round trip",
            ("in a row, median", "mean", "connections", f"{TASKS} tasks"),
            {
                client: [
                    f"{statistics.median(one.seconds) * 1e3:.2f} ms",
                    f"{statistics.mean(one.seconds) * 1e3:.2f} ms",
                    f"{one.connections}",
                    f"{statistics.median(one.rates):.0f}/s",
                ]
                for client, one in seen.items()
            },
        )


def shortfalls(ways: dict[str, Way]) -> list[str]:
    """Return a sentence for each limit that ours misses."""
    sentences = []
    for name, way in ways.items():
        if way.flights[OURS].flights != FLIGHTS:
            sentences.append(f"{name}: ours takes {way.flights[OURS].flights} flights; the limit is {FLIGHTS}")
        ratio = way.ratio(JUDGED)
        if round(ratio, 2) > LIMIT:
            sentences.append(f"{name}: ours takes {ratio:.3f} times what asyncpg takes at 20 ms; the limit is {LIMIT}")
    return sentences


def main() -> int:
    """Run the benchmark, print the tables, write the JSON, and return the exit status."""
    arguments = parser("What a query from a pool costs.", rounds=2).parse_args()

    ways = asyncio.run(measure(arguments.rounds))

    for name, way in ways.items():
        print_way(name, way)
    if POOLED not in ways:
        print(f"pooled: left out; there is no PgBouncer {'.'.join(map(str, MINIMUM_VERSION))} or later on PATH")
    ratios = {name: {rtt: way.ratio(rtt) for rtt in CALLS} for name, way in ways.items()}
    told = ", ".join(f"{name} {of_way[JUDGED]:.3f} times asyncpg's time" for name, of_way in ratios.items())
    return conclude(
        shortfalls(ways),
        f"{FLIGHTS} flight; at 20 ms {told}; the limit is {LIMIT}",
        {"limit": LIMIT, "ratios": ratios, "ways": {name: asdict(way) for name, way in ways.items()}},
        arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
