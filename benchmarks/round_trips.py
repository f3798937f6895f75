"""How many round trips a connection and a query take: ours beside the other clients', against one server in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/round_trips.py [--rounds 3] [--json FILE] [--svg FILE]

Each client's pool reaches one PostgreSQL over verified TLS, through a TCP relay that holds back every byte for 10 ms,
as a network would. The relay counts flights: bytes of a client after which bytes of the server come. A client that
waits for an answer makes one, however slow the machine, so that the numbers are the same everywhere. Counted is what
happens until the caller has what it asked for, without the TCP handshake, and what happens behind it stands apart:

- first dial: a new pool's first `acquire()`; later dial: its second, with the first connection still in use;
- warm query: `fetchval("SELECT 1")` of one pool, run often enough before that every cache holds it;
- behind it: what still follows a warm query when the caller has its answer and has gone on, in the background;
- new query: `fetchval("SELECT 2")` of the same pool, for the first time.

Taking a connection from the pool and giving it back belong to a query, with all that the defaults of a pool do then.
PostgreSQL 17 accepts the curve P-256 only, and OpenSSL offers another one first. So the server asks everybody for
another ClientHello (HelloRetryRequest, RFC 8446, section 4.1.4): one flight more, which a server that accepts X25519
does not need. The relay recognises it, and it stands in a column of its own.

The numbers are the smallest of the rounds: a machine that stalls can split a flight in two and never joins two. Exit
status: 0 when a first dial of ours takes one flight less, and a later one two less, than those of asyncpg and libpq as
they connect by default, and none and one less than theirs with direct TLS; else 1.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from chart import Bar, Group, bar_chart
from peers import ASYNCPG, ASYNCPG_DIRECT, OURS, PSYCOPG, PSYCOPG_DIRECT, SQLALCHEMY, OpenClient, clients_of
from relay import Relay
from report import conclude, parser, print_table

from neon_async.testing import LocalPostgres

DELAY = 0.01
WARM_UP = 6  # psycopg prepares a statement that has run five times
NAMES = (OURS, ASYNCPG, ASYNCPG_DIRECT, PSYCOPG, PSYCOPG_DIRECT, SQLALCHEMY)

COLUMNS = ("first dial", "later dial", "of these, HRR", "warm query", "behind it", "new query")

# By how many flights a dial of ours must be shorter than the other's: the first one, and later ones.
LEADS = {ASYNCPG: (1, 2), PSYCOPG: (1, 2), ASYNCPG_DIRECT: (0, 1), PSYCOPG_DIRECT: (0, 1)}

# ---------------------------------------------------------------------------------------------------------------------
# The measurement


@dataclass(frozen=True, slots=True)
class Flights:
    """How many flights each thing took; `retry` is the share of HelloRetryRequest in either dial.

    `behind_query` is what follows a warm query when the caller has its answer and has gone on.
    """

    first_dial: int
    later_dial: int
    retry: int
    warm_query: int
    behind_query: int
    new_query: int


async def flights_of(open_client: OpenClient, relay: Relay) -> Flights:
    """Return the flights of one client."""
    retries = relay.retries
    async with open_client(2) as client, AsyncExitStack() as held:
        first_dial = (await relay.count(held.enter_async_context(client.acquire()))).flights
        retry = relay.retries - retries
        later_dial = (await relay.count(held.enter_async_context(client.acquire()))).flights
    async with open_client(1) as client:
        for _ in range(WARM_UP):
            await client.fetchval("SELECT 1")
        warm_query = await relay.count(client.fetchval("SELECT 1"))
        new_query = await relay.count(client.fetchval("SELECT 2"))
    return Flights(first_dial, later_dial, retry, warm_query.flights, warm_query.flights_behind, new_query.flights)


async def measure(rounds: int) -> dict[str, Flights]:
    """Return the flights of each client: of every figure the smallest that a round has seen."""
    seen: dict[str, list[Flights]] = {}
    async with LocalPostgres() as server, Relay(server.port, DELAY).listening() as relay:
        with clients_of(server, relay.port) as candidates:
            for _ in range(rounds):
                for name in NAMES:
                    seen.setdefault(name, []).append(await flights_of(candidates[name], relay))
    return {
        name: Flights(**{key: min(asdict(one)[key] for one in runs) for key in asdict(runs[0])})
        for name, runs in seen.items()
    }


def shortfalls(results: dict[str, Flights]) -> list[str]:
    """Return a sentence for every lead of ours that is smaller than it must be; the retry counts for nobody."""
    ours, sentences = results[OURS], []
    for name, (first, later) in LEADS.items():
        other = results[name]
        for which, mine, theirs, lead in (
            ("first", ours.first_dial - ours.retry, other.first_dial - other.retry, first),
            ("later", ours.later_dial - ours.retry, other.later_dial - other.retry, later),
        ):
            if theirs - mine < lead:
                sentences.append(f"{which} dial: ours takes {mine}, {name} {theirs}; the lead must be {lead}")
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# The report


def draw(results: dict[str, Flights]) -> str:
    """Return the chart as SVG: a group of bars for each client."""
    groups = [
        Group(
            name,
            [
                Bar("first connect", flights.first_dial - flights.retry, flights.retry),
                Bar("later connects", flights.later_dial - flights.retry, flights.retry),
                Bar("warm query", flights.warm_query),
            ],
        )
        for name, flights in results.items()
    ]
    return bar_chart(
        "Round trips after TCP, PostgreSQL 17 over verified TLS 1.3",
        groups,
        extra="of these, HelloRetryRequest: PostgreSQL 17 accepts P-256 only",
    )


def table_of(results: dict[str, Flights]) -> dict[str, list[str]]:
    """Return the rows of the table."""
    return {
        name: [
            f"{one.first_dial}",
            f"{one.later_dial}",
            f"{one.retry}",
            f"{one.warm_query}",
            f"{one.behind_query}",
            f"{one.new_query}",
        ]
        for name, one in results.items()
    }


def main() -> int:
    """Run the benchmark, print the table, write JSON and chart, and return the exit status."""
    arguments_parser = parser("Round trips per connection and per query.", rounds=3)
    arguments_parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw the chart into FILE")
    arguments = arguments_parser.parse_args()

    results = asyncio.run(measure(arguments.rounds))

    print_table("round trips after TCP", COLUMNS, table_of(results))
    if arguments.svg:
        arguments.svg.write_text(draw(results))
    return conclude(
        shortfalls(results),
        "one less than asyncpg and libpq on the first dial, two less from then on",
        {"leads": LEADS, "flights": {name: asdict(flights) for name, flights in results.items()}},
        arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
