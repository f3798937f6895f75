"""What 10,000 tasks cost that wait for a connection: ours beside the other pools, in one run.

    python -m pip install -e '.[dev]'
    python benchmarks/memory.py [--waiters 10000] [--rounds 1] [--json FILE]

A pool of one connection to one PostgreSQL over verified TLS, and the connection is in use. Then the tasks start, each
asks for it, and all of them wait. Counted is the memory that Python has given out by then, beyond what it had given out
before (`tracemalloc`): the tasks with their frames, the line, the timers. A task that waits for nothing but an event is
in the table to compare with: so much costs the waiting itself.

Ours waits at most 30 s by default and so does psycopg_pool; asyncpg waits without a limit unless it is given one, which
costs it more. Exit status: 0 when ours, as it is by default, takes at most twice what asyncpg's takes by default (the
smallest number of the rounds on either side), else 1.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from peers import ASYNCPG, OURS, POOLS, OpenClient, clients_of
from report import conclude, parser, print_table

from neon_async.testing import LocalPostgres

LIMIT = 2.0
EVENT, ASYNCPG_TIMEOUT = "a task and an event", "asyncpg, timeout=30"


async def memory_of(wait: Callable[[], Awaitable[object]], waiters: int) -> int:
    """Return the bytes that each of `waiters` tasks costs which have come to a stop in `wait`."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tasks = [asyncio.ensure_future(wait()) for _ in range(waiters)]
    for _ in range(20):  # turns of the loop: more than any pool needs to put a task in its line
        await asyncio.sleep(0)
    gc.collect()
    spent = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert not any(task.done() for task in tasks), "everybody waits"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return spent // waiters


async def in_line(acquire: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    """Take a connection and give it back."""
    async with acquire():
        pass


async def memory_of_client(open_client: OpenClient, waiters: int, deadline: float | None = None) -> int:
    """Return the bytes of one waiter of this client."""
    async with open_client(1, deadline=deadline) as client, client.acquire():
        return await memory_of(partial(in_line, client.acquire), waiters)


async def measure(waiters: int, rounds: int) -> dict[str, int]:
    """Return the bytes of one waiter for each client, the smallest of the rounds."""
    seen: dict[str, list[int]] = {}
    async with LocalPostgres() as server:
        with clients_of(server) as candidates:
            for _ in range(rounds):
                seen.setdefault(EVENT, []).append(await memory_of(asyncio.Event().wait, waiters))
                for name in POOLS:
                    seen.setdefault(name, []).append(await memory_of_client(candidates[name], waiters))
                limited = await memory_of_client(candidates[ASYNCPG], waiters, deadline=30.0)
                seen.setdefault(ASYNCPG_TIMEOUT, []).append(limited)
    return {name: min(taken) for name, taken in seen.items()}


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    arguments_parser = parser("The memory of tasks that wait for a connection.", rounds=1)
    arguments_parser.add_argument("--waiters", type=int, default=10_000, help="tasks that wait (default: 10000)")
    arguments = arguments_parser.parse_args()

    spent = asyncio.run(measure(arguments.waiters, arguments.rounds))

    print_table(
        f"memory of {arguments.waiters} tasks that wait for a connection",
        ("each", "all", "ratio"),
        {
            name: [f"{each} B", f"{each * arguments.waiters / 1e6:.1f} MB", f"{each / spent[ASYNCPG]:.2f}"]
            for name, each in spent.items()
        },
    )
    ratio = spent[OURS] / spent[ASYNCPG]
    sentence = f"ours takes {ratio:.2f} times what asyncpg's pool takes; the limit is {LIMIT}"
    document = {"waiters": arguments.waiters, "limit": LIMIT, "ratio": ratio, "bytes_each": spent}
    return conclude([sentence] if ratio > LIMIT else [], sentence, document, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
