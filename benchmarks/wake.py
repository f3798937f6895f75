"""What happens when 50 requests hit an endpoint that sleeps: ours beside the other pools, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/wake.py [--rounds 2] [--json FILE]

Each pool has its ten connections open to a PostgreSQL behind a relay, over verified TLS. The relay suspends as a Neon
compute does: it closes every connection, and the next connect wakes it, which takes 0.6 s. Then 50 tasks each want one
`fetchval`, all at once. Taking a connection may last

- 0.4 s, less than the wake: nobody can be served at the first try. Who was not, tries again at once, twice at most;
- 5 s, more than the wake: there is no reason to lose a request. Who was lost all the same, tries again, too.

Counted are the requests that were served at the first try and in the end, the seconds until the last of these had its
answer, and the connects that reached the relay: before it was awake, and in all. Shown is the round in which the fewest
were served in the end and, among such, in which the most connects were made. Exit status: 0 when ours serves everybody
in the end, with 5 s at the first try, with one connect before the endpoint is awake and no more than ten in all; else
1.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from dataclasses import asdict, dataclass

from peers import OURS, POOLS, Client, OpenClient, clients_of, fill, in_turns
from report import conclude, parser, print_table

from neon_async.testing import LocalEndpoint, LocalPostgres

REQUESTS, TRIES, SIZE, WAKE_TIME = 50, 3, 10, 0.6
TOO_SHORT, LONG_ENOUGH = 0.4, 5.0


@dataclass(frozen=True, slots=True)
class Wake:
    """The requests served, at the first try and in the end; seconds until the last answer; connects made."""

    first_try: int
    served: int
    last_answer: float
    connects_asleep: int
    connects: int


async def wake_of(open_client: OpenClient, endpoint: LocalEndpoint, deadline: float) -> Wake:
    """Return what happens with one client."""
    gc.collect()
    async with open_client(SIZE, deadline=deadline) as client:
        await fill(client, SIZE)
        endpoint.suspend()
        await asyncio.sleep(0.05)  # who looks at its connections can see that they have ended
        before, begin = endpoint.connects, time.perf_counter()
        asleep = asyncio.ensure_future(connects_until_awake(endpoint))
        served_at = await asyncio.gather(*[request(client) for _ in range(REQUESTS)])
        connects_asleep = await asleep - before
        answers = [(at - begin, tries) for at, tries in served_at if at]
    return Wake(
        first_try=sum(tries == 1 for _, tries in answers),
        served=len(answers),
        last_answer=max((at for at, _ in answers), default=0.0),
        connects_asleep=connects_asleep,
        connects=endpoint.connects - before,
    )


async def request(client: Client) -> tuple[float, int]:
    """Try until there is an answer; return when that was, or 0 for never, and at which try."""
    for tries in range(1, TRIES + 1):
        try:
            await client.fetchval("SELECT 1")
        except Exception:  # noqa: BLE001, S112  every client has errors of its own
            continue
        return time.perf_counter(), tries
    return 0.0, TRIES


async def connects_until_awake(endpoint: LocalEndpoint) -> int:
    """Return the number of connects when the endpoint has come awake, or after two seconds in which it has not."""
    begin, connects = time.perf_counter(), endpoint.connects
    while endpoint.state != "awake" and time.perf_counter() - begin < 2:
        connects = endpoint.connects
        await asyncio.sleep(0.005)
    return connects


async def measure(rounds: int) -> dict[float, dict[str, Wake]]:
    """Return for each deadline what happens with each client, in the worst round."""
    worst: dict[float, dict[str, Wake]] = {TOO_SHORT: {}, LONG_ENOUGH: {}}
    async with (
        LocalPostgres(settings={"max_connections": "200"}) as server,
        LocalEndpoint(server, wake_time=WAKE_TIME) as endpoint,
    ):
        with clients_of(endpoint) as candidates:
            for deadline, wakes in worst.items():
                for _, name, open_client in in_turns({name: candidates[name] for name in POOLS}, rounds):
                    seen = [await wake_of(open_client, endpoint, deadline), *filter(None, [wakes.get(name)])]
                    wakes[name] = min(seen, key=lambda wake: (wake.served, -wake.connects))
    return worst


def shortfalls(wakes: dict[float, Wake]) -> list[str]:
    """Return a sentence for each limit that ours misses."""
    sentences = []
    for deadline, ours in wakes.items():
        rows = (
            (ours.served < REQUESTS, f"{ours.served} of {REQUESTS} requests are served"),
            (deadline > WAKE_TIME and ours.first_try < REQUESTS, f"{ours.first_try} are served at the first try"),
            (ours.connects_asleep > 1, f"{ours.connects_asleep} connects before it is awake; the limit is 1"),
            (ours.connects > SIZE, f"{ours.connects} connects in all; the limit is {SIZE}"),
        )
        sentences += [f"deadline of {deadline} s: {sentence}" for missed, sentence in rows if missed]
    return sentences


def main() -> int:
    """Run the benchmark, print the tables, write the JSON, and return the exit status."""
    arguments = parser("Requests that hit an endpoint which sleeps.", rounds=2).parse_args()

    wakes = asyncio.run(measure(arguments.rounds))

    for deadline, results in wakes.items():
        print_table(
            f"{REQUESTS} requests, a wake of {WAKE_TIME} s, a deadline of {deadline} s",
            ("served at first try", "in the end", "last answer", "connects before awake", "in all"),
            {
                name: [
                    f"{wake.first_try}",
                    f"{wake.served}",
                    f"{wake.last_answer:.2f} s",
                    f"{wake.connects_asleep}",
                    f"{wake.connects}",
                ]
                for name, wake in results.items()
            },
        )
    return conclude(
        shortfalls({deadline: results[OURS] for deadline, results in wakes.items()}),
        f"everybody is served; one connect before it is awake, {SIZE} in all at most",
        {
            "wake_time": WAKE_TIME,
            "wakes": {
                str(deadline): {name: asdict(wake) for name, wake in results.items()}
                for deadline, results in wakes.items()
            },
        },
        arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
