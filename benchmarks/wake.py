"""Measure what happens when 50 requests reach a suspended endpoint: ours and the other pools in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/wake.py [--rounds 2] [--json FILE]

Each pool has ten open connections to a PostgreSQL after a relay, over verified TLS. The relay suspends as a Neon
compute does: it closes every connection, and the next connect wakes it, which takes 0.6 s. Then 50 tasks each call one
`fetchval`, all at once. An acquire may take

- 0.4 s, less than the wake: no request can be served at the first try. Each that failed tries again at once, at most
  twice.
- 5 s, more than the wake: no request has to fail. Each that failed tries again, too.

Measured are the requests that were served at the first try and in the end, the seconds until the last answer, and the
connects that reached the relay: before it was awake, and in total. The worst number of the rounds is shown. Limits:
ours serves every request in the end, and with 5 s at the first try, with one connect before the endpoint is awake and
at most ten in total.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time

from harness import Figure, Limit, Report, Table, run, take_turns
from peers import OURS, POOLS, Client, OpenClient, clients_of, fill

from neon_async.testing import LocalEndpoint, LocalPostgres

REQUESTS, TRIES, SIZE, WAKE_TIME = 50, 3, 10, 0.6
TOO_SHORT, LONG_ENOUGH = 0.4, 5.0

FIRST_TRY, SERVED, LAST_ANSWER = "served at first try", "in the end", "last answer"
CONNECTS_ASLEEP, CONNECTS = "connects before awake", "in total"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return what each client shows, with either deadline."""
    tables: list[Table] = []
    limits: list[Limit] = []
    async with (
        LocalPostgres(settings={"max_connections": "200"}) as server,
        LocalEndpoint(server, wake_time=WAKE_TIME) as endpoint,
    ):
        with clients_of(endpoint) as candidates:
            for deadline in (TOO_SHORT, LONG_ENOUGH):
                table = new_table(deadline)
                pools = {name: candidates[name] for name in POOLS}
                for _, name, open_client in take_turns(pools, arguments.rounds, warm_up=False):
                    await wake(table, name, open_client, endpoint, deadline)
                tables.append(table)
                limits += limits_of(table, deadline)
    return Report(tables, limits)


def new_table(deadline: float) -> Table:
    """Return a table whose values are the worst of the rounds."""
    return Table(
        f"{REQUESTS} requests, a wake of {WAKE_TIME} s, a deadline of {deadline} s",
        POOLS,
        [
            Figure(FIRST_TRY, show=("min",)),
            Figure(SERVED, show=("min",)),
            Figure(LAST_ANSWER, "s", show=("max",)),
            Figure(CONNECTS_ASLEEP, show=("max",)),
            Figure(CONNECTS, show=("max",)),
        ],
    )


def limits_of(table: Table, deadline: float) -> list[Limit]:
    """Return the limits of ours with this deadline."""
    case = f"deadline of {deadline} s"
    limits = [
        Limit(f"{case}: {{}} of {REQUESTS} requests are served", table.value(OURS, SERVED), at_least=REQUESTS),
        Limit(f"{case}: {{}} connects before it is awake", table.value(OURS, CONNECTS_ASLEEP), at_most=1),
        Limit(f"{case}: {{}} connects in total", table.value(OURS, CONNECTS), at_most=SIZE),
    ]
    if deadline > WAKE_TIME:
        sentence = f"{case}: {{}} of {REQUESTS} requests are served at the first try"
        limits.append(Limit(sentence, table.value(OURS, FIRST_TRY), at_least=REQUESTS))
    return limits


async def wake(table: Table, name: str, open_client: OpenClient, endpoint: LocalEndpoint, deadline: float) -> None:
    """Suspend the endpoint, let all requests wake it at once, and add what happens to the table."""
    gc.collect()
    async with open_client(SIZE, deadline=deadline) as client:
        await fill(client, SIZE)
        endpoint.suspend()
        await asyncio.sleep(0.05)  # a pool that checks its connections can see that they have ended
        before, begin = endpoint.connects, time.perf_counter()
        asleep = asyncio.ensure_future(connects_until_awake(endpoint))
        answers = await asyncio.gather(*[request(client) for _ in range(REQUESTS)])
        table.add(name, CONNECTS_ASLEEP, await asleep - before)
    served = [answer for answer in answers if answer is not None]
    table.add(name, FIRST_TRY, sum(tries == 1 for _, tries in served))
    table.add(name, SERVED, len(served))
    table.add(name, LAST_ANSWER, max((at - begin for at, _ in served), default=0.0))
    table.add(name, CONNECTS, endpoint.connects - before)


async def request(client: Client) -> tuple[float, int] | None:
    """Try until there is an answer. Return the time of the answer and the number of tries, or None without one."""
    for tries in range(1, TRIES + 1):
        try:
            await client.fetchval("SELECT 1")
        except Exception:  # noqa: BLE001, S112  # each client has errors of its own
            continue
        return time.perf_counter(), tries
    return None


async def connects_until_awake(endpoint: LocalEndpoint) -> int:
    """Return the number of connects when the endpoint becomes awake, or after two seconds if it does not."""
    begin, connects = time.perf_counter(), endpoint.connects
    while endpoint.state != "awake" and time.perf_counter() - begin < 2:
        connects = endpoint.connects
        await asyncio.sleep(0.005)
    return connects


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=2))
