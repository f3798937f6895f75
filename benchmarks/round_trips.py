"""How many round trips a connection and a query take: ours beside the other clients', against one server in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/round_trips.py [--rounds 3] [--json FILE] [--svg FILE]

Each client's pool reaches one PostgreSQL over verified TLS, through a TCP relay that holds back every byte for 10 ms,
as a network would. The relay counts flights: bytes of a client after which bytes of the server come. A client that
waits for an answer makes one, however slow the machine, so that the numbers are the same everywhere. Counted is what
happens until the caller has what it asked for, without the TCP handshake:

- first dial: a new pool's first `acquire()`; later dial: its second, with the first connection still in use;
- warm query: `fetchval("SELECT 1")` of one pool, run often enough before that every cache holds it;
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

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
from chart import Bar, Group, bar_chart
from peers import dsn_of, verified_context
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import neon_async
from neon_async.testing import LocalPostgres

DELAY = 0.01
WARM_UP = 6  # psycopg prepares a statement that has run five times
OURS, ASYNCPG, ASYNCPG_DIRECT = "neon-async", "asyncpg", "asyncpg, direct_tls=True"
PSYCOPG, PSYCOPG_DIRECT = "psycopg_pool", "psycopg_pool, sslnegotiation=direct"
SQLALCHEMY = "SQLAlchemy on asyncpg"

# By how many flights a dial of ours must be shorter than the other's: the first one, and later ones.
LEADS = {ASYNCPG: (1, 2), PSYCOPG: (1, 2), ASYNCPG_DIRECT: (0, 1), PSYCOPG_DIRECT: (0, 1)}

_HELLO_RETRY_REQUEST = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


# ---------------------------------------------------------------------------------------------------------------------
# The wire


class Relay:
    """A TCP relay in front of the server that holds back both directions and counts the flights that are answered."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.flights = 0
        self.retries = 0
        self._target = target
        self._latest = 0.0
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Relay]:
        """Listen on a free port of 127.0.0.1 while the block runs."""
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def count(self, action: Awaitable[object]) -> int:
        """Return how many flights are answered until `action` is done; it begins when the wire has fallen silent."""
        loop = asyncio.get_running_loop()
        while (silence := loop.time() - self._latest) < 5 * DELAY:  # noqa: ASYNC110  silence is no event
            await asyncio.sleep(5 * DELAY - silence)
        before = self.flights
        await action
        return self.flights - before

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._relay(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _relay(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        unanswered = False

        def note_client(_: bytes) -> None:
            nonlocal unanswered
            unanswered = True

        def note_server(data: bytes) -> None:
            nonlocal unanswered
            self.flights += unanswered
            self.retries += _HELLO_RETRY_REQUEST in data
            unanswered = False

        pumps = [
            asyncio.ensure_future(self._pump(from_client, to_server, note_client)),
            asyncio.ensure_future(self._pump(from_server, to_client, note_server)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(DELAY)  # for what has not been passed on yet
        finally:
            for pump in pumps:
                pump.cancel()
            to_server.close()
            to_client.close()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, note: Callable[[bytes], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while data := await source.read(65536):
                self._latest = loop.time()
                note(data)
                loop.call_later(DELAY, target.write, data)


# ---------------------------------------------------------------------------------------------------------------------
# The clients


@dataclass(frozen=True, slots=True)
class Client:
    """A pool, by the two things that are measured: taking a connection, and a query with all that goes with it."""

    acquire: Callable[[], AbstractAsyncContextManager[object]]
    fetchval: Callable[[str], Awaitable[object]]


OpenClient = Callable[[int], AbstractAsyncContextManager[Client]]


@asynccontextmanager
async def asyncpg_client(create_pool: Callable[..., Any], size: int) -> AsyncIterator[Client]:
    """Yield a client on asyncpg's pool, or on ours, which is one."""
    async with create_pool(min_size=0, max_size=size) as pool:
        yield Client(pool.acquire, pool.fetchval)


@asynccontextmanager
async def psycopg_client(conninfo: str, size: int) -> AsyncIterator[Client]:
    """Yield a client on psycopg_pool."""
    async with AsyncConnectionPool(conninfo, min_size=0, max_size=size, open=False) as pool:

        async def fetchval(query: str) -> object:
            async with pool.connection() as connection:
                cursor = await connection.execute(query.encode())  # psycopg's types take literal strings only
                row = await cursor.fetchone()
                return row and row[0]

        yield Client(pool.connection, fetchval)


@asynccontextmanager
async def sqlalchemy_client(url: str, connect_args: dict[str, object], size: int) -> AsyncIterator[Client]:
    """Yield a client on an engine of SQLAlchemy's, which sets up each new connection with queries of its own."""
    engine = create_async_engine(url, connect_args=connect_args, pool_size=size, max_overflow=0)

    async def fetchval(query: str) -> object:
        async with engine.connect() as connection:
            return await connection.scalar(text(query))

    try:
        yield Client(engine.connect, fetchval)
    finally:
        await engine.dispose()


def clients(server: LocalPostgres, port: int, anchor: Path) -> dict[str, OpenClient]:
    """Return how to open each client through the relay at `port`; `anchor` is a file with the server's root."""
    dsn, context = dsn_of(server, port), verified_context(server)
    # With gssencmode a machine with a Kerberos ticket would take one flight more.
    libpq = f"{dsn}?sslmode=verify-full&sslrootcert={anchor}&gssencmode=disable"
    url = dsn.replace("postgresql://", "postgresql+asyncpg://")
    ours = partial(neon_async.create_pool, dsn, trust_anchor=server.trust_anchor)
    return {
        OURS: partial(asyncpg_client, ours),
        ASYNCPG: partial(asyncpg_client, partial(asyncpg.create_pool, dsn, ssl=context)),
        ASYNCPG_DIRECT: partial(asyncpg_client, partial(asyncpg.create_pool, dsn, ssl=context, direct_tls=True)),
        PSYCOPG: partial(psycopg_client, libpq),
        PSYCOPG_DIRECT: partial(psycopg_client, f"{libpq}&sslnegotiation=direct"),
        SQLALCHEMY: partial(sqlalchemy_client, url, {"ssl": context}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


@dataclass(frozen=True, slots=True)
class Flights:
    """How many flights each thing took; `retry` is the share of HelloRetryRequest in either dial."""

    first_dial: int
    later_dial: int
    retry: int
    warm_query: int
    new_query: int


async def flights_of(open_client: OpenClient, relay: Relay) -> Flights:
    """Return the flights of one client."""
    retries = relay.retries
    async with open_client(2) as client, AsyncExitStack() as held:
        first_dial = await relay.count(held.enter_async_context(client.acquire()))
        retry = relay.retries - retries
        later_dial = await relay.count(held.enter_async_context(client.acquire()))
    async with open_client(1) as client:
        for _ in range(WARM_UP):
            await client.fetchval("SELECT 1")
        warm_query = await relay.count(client.fetchval("SELECT 1"))
        new_query = await relay.count(client.fetchval("SELECT 2"))
    return Flights(first_dial, later_dial, retry, warm_query, new_query)


async def measure(rounds: int) -> dict[str, Flights]:
    """Return the flights of each client: of every figure the smallest that a round has seen."""
    seen: dict[str, list[Flights]] = {}
    with tempfile.TemporaryDirectory() as folder:
        anchor = Path(folder, "root.pem")
        async with LocalPostgres() as server, Relay(server.port).listening() as relay:
            anchor.write_bytes(server.trust_anchor)
            candidates = clients(server, relay.port, anchor)
            for _ in range(rounds):
                for name, open_client in candidates.items():
                    seen.setdefault(name, []).append(await flights_of(open_client, relay))
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


def print_table(results: dict[str, Flights]) -> None:
    """Print the table."""
    print("round trips after TCP")
    print(f"{'':38}{'first dial':>12}{'later dial':>12}{'of these, HRR':>15}{'warm query':>12}{'new query':>12}")
    for name, one in results.items():
        print(
            f"{name:38}{one.first_dial:12}{one.later_dial:12}{one.retry:15}{one.warm_query:12}{one.new_query:12}",
        )


def main() -> int:
    """Run the benchmark, print the table, write JSON and chart, and return the exit status."""
    parser = argparse.ArgumentParser(description="Round trips per connection and per query.")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is counted (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw the chart into FILE")
    arguments = parser.parse_args()

    results = asyncio.run(measure(arguments.rounds))

    print_table(results)
    missed = shortfalls(results)
    for sentence in missed:
        print(f"TOO MANY: {sentence}")
    if not missed:
        print("good: one less than asyncpg and libpq on the first dial, two less from then on")
    if arguments.json:
        numbers = {name: asdict(flights) for name, flights in results.items()}
        arguments.json.write_text(json.dumps({"leads": LEADS, "flights": numbers}, indent=2) + "\n")
    if arguments.svg:
        arguments.svg.write_text(draw(results))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
