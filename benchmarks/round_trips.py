"""Count the round trips of connections, queries and transactions: ours and the other clients' in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/round_trips.py [--rounds 3] [--json FILE]

Each client's pool connects to one PostgreSQL over verified TLS, through a TCP relay that delays every byte by 10 ms, as
a network would. The relay counts round trips: bytes of a client followed by bytes of the server. A client that waits
for an answer makes one however slow the machine is, so that the numbers are the same everywhere. Counted are the round
trips until the caller has its result, without the TCP handshake:

- first dial: the first `acquire()` of a new pool; later dial: its second, while the first connection is in use;
- warm query: `fetchval("SELECT 1")` of one pool, run before until every cache contains it;
- in the background: what follows a warm query when the caller has its answer;
- new query: `fetchval("SELECT 2")` of the same pool, for the first time;
- transaction: BEGIN, a warm `SELECT 1` and COMMIT; `transaction.py` counts more of them.

A query and a transaction include the acquire and the release, with everything that a pool does by default. PostgreSQL
17 accepts only the curve P-256, and OpenSSL offers another one first. So the server asks every client for another
ClientHello (HelloRetryRequest, RFC 8446, section 4.1.4): one more round trip, which a server that accepts X25519 does
not need. The relay recognises it, and it has a column of its own.

The numbers are the smallest of the rounds, because a machine that stalls can split a round trip in two and never joins
two. Limits: a first dial of ours takes one round trip less, and a later dial two less, than those of asyncpg and libpq
with their defaults, and none and one less than theirs with direct TLS.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import AsyncExitStack

from harness import Figure, Limit, Report, Table, run
from peers import ASYNCPG, ASYNCPG_DIRECT, OURS, PSYCOPG, PSYCOPG_DIRECT, SQLALCHEMY, OpenClient, Work, clients_of
from relay import Relay

from neon_async.testing import LocalPostgres

DELAY = 0.01
WARM_UP = 6  # psycopg prepares a statement after it has run five times
NAMES = (OURS, ASYNCPG, ASYNCPG_DIRECT, PSYCOPG, PSYCOPG_DIRECT, SQLALCHEMY)

FIRST_DIAL, LATER_DIAL, RETRY = "first dial", "later dial", "of these, HRR"
WARM_QUERY, IN_BACKGROUND, NEW_QUERY = "warm query", "in the background", "new query"
TRANSACTION = "transaction"
FIGURES = (FIRST_DIAL, LATER_DIAL, RETRY, WARM_QUERY, IN_BACKGROUND, NEW_QUERY, TRANSACTION)

# How many round trips less than the other client a dial of ours takes.
LEADS = {
    ASYNCPG: {FIRST_DIAL: 1, LATER_DIAL: 2},
    PSYCOPG: {FIRST_DIAL: 1, LATER_DIAL: 2},
    ASYNCPG_DIRECT: {FIRST_DIAL: 0, LATER_DIAL: 1},
    PSYCOPG_DIRECT: {FIRST_DIAL: 0, LATER_DIAL: 1},
}


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the round trips of each client."""
    table = Table("round trips after TCP", NAMES, [Figure(name, show=("min",)) for name in FIGURES])
    async with LocalPostgres() as server, Relay(server.port, DELAY).listening() as relay:
        with clients_of(server, relay.port) as candidates:
            for _ in range(arguments.rounds):
                for name in NAMES:
                    for figure, count in (await round_trips_of(candidates[name], relay)).items():
                        table.add(name, figure, count)
    limits = [
        Limit(
            f"{dial}: ours takes {{}} round trips less than {name}",
            without_retry(table, name, dial) - without_retry(table, OURS, dial),
            at_least=lead,
        )
        for name, leads in LEADS.items()
        for dial, lead in leads.items()
    ]
    return Report([table], limits)


async def round_trips_of(open_client: OpenClient, relay: Relay) -> dict[str, int]:
    """Return the round trips of one client, by figure."""
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
        for _ in range(WARM_UP):
            await client.transact(Work())
        transaction = await relay.count(client.transact(Work()))
    return {
        FIRST_DIAL: first_dial.round_trips,
        LATER_DIAL: later_dial.round_trips,
        RETRY: retry,
        WARM_QUERY: warm_query.round_trips,
        IN_BACKGROUND: warm_query.in_background,
        NEW_QUERY: new_query.round_trips,
        TRANSACTION: transaction.round_trips,
    }


def without_retry(table: Table, name: str, dial: str) -> int:
    """Return the round trips of a dial without the HelloRetryRequest, which is the server's choice."""
    return round(table.value(name, dial) - table.value(name, RETRY))


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=3))
