"""Chaos: workers write to a ledger through one pool while faults hit the server, the network and the workers' tasks.

Afterwards an audit checks that the ledger contains every acknowledged write once and no write twice, and that the pool
has lost no slot. All random choices come from one seed. To run it for longer than the tests do:

    PYTHONPATH=tests python -m support.chaos --seconds 60 --seed 7

With `--cuts` it cuts a connection after every number of bytes instead; see `cuts.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import enum
import itertools
import random
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import uvloop

import neon_async
from neon_async._pool.stats import PoolStats
from neon_async.testing import LocalEndpoint, LocalPostgres
from support import cuts
from support.probes import HANG, assert_balanced, assert_whole, open_sockets

WORKERS = 64
MAX_SIZE = 10
ACCOUNTS = 20
OPENING_BALANCE = 1000

# Short, so that faults of up to 0.5 s exceed each of them in a short run.
DEADLINES: dict[str, Any] = {
    "acquire_timeout": 1.0,
    "release_timeout": 0.3,
    "connect_timeout": 0.5,
    "check_after_idle": 0.1,
    "max_lifetime": 3.0,
    "max_inactive_connection_lifetime": 0.5,
    "command_timeout": 1.0,
}


class Fate(enum.Enum):
    """What a worker knows about a write."""

    ACKNOWLEDGED = "acknowledged"
    UNKNOWN = "unknown"
    REFUSED = "refused"  # known not to be committed


@dataclass
class Report:
    """The result of one run. `problems` is empty if every check passed."""

    seed: int
    seconds: float
    fates: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)
    stats: PoolStats | None = None
    recovery: float = 0.0

    def __str__(self) -> str:
        def listed(counter: collections.Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"

        lines = [
            f"chaos for {self.seconds:g} s, seed {self.seed}",
            f"  writes: {listed(self.fates)}",
            f"  faults: {listed(self.faults)}",
            f"  errors raised to workers: {listed(self.failures)}",
            f"  at full size again after {self.recovery:.2f} s",
            f"  {self.stats}",
            *(f"  PROBLEM: {problem}" for problem in self.problems),
        ]
        return "\n".join(lines)


class Chaos:
    """One run of chaos against `server`, which no other test may use at the same time."""

    def __init__(self, server: LocalPostgres, endpoint: LocalEndpoint, *, seconds: float, seed: int) -> None:
        self.report = Report(seed, seconds)
        self._server = server
        self._endpoint = endpoint
        self._seconds = seconds
        # The number of writes depends on the machine, so the faults have a random generator of their own.
        self._work_random, self._fault_random = random.Random(seed), random.Random(seed + 1)
        self._name = f"chaos {secrets.token_hex(4)}"
        self._ledger, self._accounts = f"ledger_{secrets.token_hex(4)}", f"accounts_{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._fates: dict[int, Fate] = {}
        self._methods: dict[int, str] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._cancelled: set[asyncio.Task[None]] = set()
        self._observer: Any
        self._pool: neon_async.Pool

    async def run(self) -> Report:
        """Run workers and faults, wait for recovery, and audit the result."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._note_loop_error)
        self._observer = await neon_async.connect(self._server.dsn, trust_anchor=self._server.trust_anchor)
        try:
            await self._create_tables()
            sockets, tasks = open_sockets(), asyncio.all_tasks()
            async with self._open() as self._pool:
                await self._disturb()
                await self._recover()
                self.report.stats = self._pool.stats()
            await self._audit_leaks(sockets, tasks)
            await self._audit_ledger()
        finally:
            loop.set_exception_handler(None)
            await self._observer.execute(f"DROP TABLE IF EXISTS {self._ledger}, {self._accounts}")
            await self._observer.close()
        return self.report

    async def _create_tables(self) -> None:
        await self._observer.execute(
            f"CREATE TABLE {self._ledger} (number int);"  # not unique, so that a write can appear twice
            f"CREATE TABLE {self._accounts} (id int PRIMARY KEY, balance int);"
            f"INSERT INTO {self._accounts} SELECT id, {OPENING_BALANCE} FROM generate_series(1, {ACCOUNTS}) AS id"
        )

    def _open(self) -> neon_async.Pool:
        return neon_async.create_pool(
            self._endpoint.dsn,
            trust_anchor=self._endpoint.trust_anchor,
            application_name=self._name,
            max_size=MAX_SIZE,
            max_queries=200,
            **DEADLINES,
        )

    def _note_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message, error = context["message"], context.get("exception")
        # asyncpg reports each transaction that a cancelled caller leaves open.
        left_open = "Resetting connection with an active transaction" in message
        # asyncpg 0.31 keeps the error of a failed cancel request for the next query, and there may be none.
        cancel_failed = message == "Future exception was never retrieved" and isinstance(error, ConnectionError)
        if not left_open and not cancel_failed:
            self.report.problems.append(f"the event loop reported: {message} {error!r}")

    # -----------------------------------------------------------------------------------------------------------------
    # Workers

    async def _disturb(self) -> None:
        """Run workers and faults side by side until the time is over, then wait for the workers."""
        end = time.monotonic() + self._seconds
        workers = [asyncio.ensure_future(self._work(end)) for _ in range(WORKERS)]
        faults = self._faults()
        try:
            while time.monotonic() < end:
                await asyncio.sleep(self._fault_random.uniform(0.02, 0.3))
                fault = next(faults)
                self.report.faults[fault.__name__.strip("_").replace("_", " ")] += 1
                await fault()
                self._check_balance()
        finally:
            self._endpoint.accept()
            self._endpoint.thaw()
        _, stuck = await asyncio.wait(workers, timeout=HANG)
        for worker in stuck:
            self.report.problems.append(f"a worker is stuck: {worker!r} {worker.get_stack()}")
            worker.cancel()
        await asyncio.gather(*workers)

    async def _work(self, end: float) -> None:
        methods = [
            self._by_execute,
            self._in_a_block,
            self._by_hand,
            self._in_a_transaction,
            self._by_run_transaction,
            self._by_transfer,
        ]
        while time.monotonic() < end:
            number = next(self._numbers)
            method = self._work_random.choice(methods)
            task = asyncio.ensure_future(self._write(method, number))
            self._writes.add(task)
            await asyncio.wait([task])
            self._writes.discard(task)
            self._judge(task, method.__name__, number)

    async def _write(self, method: Callable[[int], Awaitable[None]], number: int) -> None:
        limit = self._work_random.choice([None, None, None, None, None, 0.02, 0.2, 0.5])
        async with asyncio.timeout(limit):
            await method(number)

    def _judge(self, task: asyncio.Task[None], method: str, number: int) -> None:
        """Record the fate of the write `number`, and a problem if its outcome is not an expected one."""
        self._methods[number] = method
        if task.cancelled():
            self._fates[number] = Fate.UNKNOWN
            if task not in self._cancelled:
                self.report.problems.append(f"{method} was cancelled, but not by a fault")
        elif (error := task.exception()) is None:
            self._fates[number] = Fate.ACKNOWLEDGED
        else:
            self._fates[number] = _fate(method, error)
            self.report.failures[type(error).__name__] += 1
            if not _is_expected(method, error):
                place = traceback.extract_tb(error.__traceback__)[-1]
                self.report.problems.append(f"{method} raised {error!r} at {place.filename}:{place.lineno}")
        self._cancelled.discard(task)
        self.report.fates[self._fates[number].value] += 1

    @property
    def _insert(self) -> str:
        return f"INSERT INTO {self._ledger} VALUES ($1)"

    async def _by_execute(self, number: int) -> None:
        await self._pool.execute(self._insert, number)

    async def _in_a_block(self, number: int) -> None:
        async with self._pool.acquire() as connection:
            await connection.execute("SET LOCAL search_path TO public")
            await connection.execute(self._insert, number)

    async def _by_hand(self, number: int) -> None:
        connection = await self._pool.acquire()
        try:
            await connection.execute(self._insert, number)
        finally:
            await self._pool.release(connection)

    async def _in_a_transaction(self, number: int) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(self._insert, number)
            await connection.fetchval("SELECT pg_sleep(0.002)")

    async def _by_run_transaction(self, number: int) -> None:
        async def work(connection: neon_async.Connection) -> None:
            await connection.execute(self._insert, number)
            await connection.fetchval("SELECT pg_sleep(0.002)")

        await self._pool.run_transaction(work)

    async def _by_transfer(self, number: int) -> None:
        """Move money between two accounts, in conflict with other workers that do the same."""
        debtor, creditor = self._work_random.sample(range(1, ACCOUNTS + 1), 2)
        amount = self._work_random.randint(1, 50)
        read = f"SELECT balance FROM {self._accounts} WHERE id = $1"
        write = f"UPDATE {self._accounts} SET balance = $2 WHERE id = $1"

        async def work(connection: neon_async.Connection) -> None:
            balances = [await connection.fetchval(read, account) for account in (debtor, creditor)]
            await connection.execute(write, debtor, balances[0] - amount)
            await connection.execute(write, creditor, balances[1] + amount)
            await connection.execute(self._insert, number)

        await self._pool.run_transaction(work, isolation="serializable", attempts=5)

    # -----------------------------------------------------------------------------------------------------------------
    # Faults

    def _faults(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """Yield the faults: first each of them once, then random ones by weight."""
        weights = {
            self._cancel_some: 8,
            self._cancel_twice: 4,
            self._kill_a_backend: 4,
            self._kill_all_backends: 1,
            self._cut: 2,
            self._suspend: 2,
            self._freeze: 2,
            self._freeze_and_cancel: 2,
            self._refuse: 1,
            self._expire: 1,
        }
        faults = list(weights)
        yield from self._fault_random.sample(faults, len(faults))
        while True:
            yield from self._fault_random.choices(faults, list(weights.values()))

    async def _cancel_some(self) -> None:
        for task in self._victims():
            self._cancelled.add(task)
            task.cancel()

    async def _cancel_twice(self) -> None:
        victims = self._victims()
        for task in victims:
            self._cancelled.add(task)
            task.cancel()
        for _ in range(self._fault_random.randint(0, 5)):
            await asyncio.sleep(0)
        for task in victims:
            task.cancel()

    def _victims(self) -> list[asyncio.Task[None]]:
        alive = [task for task in self._writes if not task.done()]
        return self._fault_random.sample(alive, min(len(alive), self._fault_random.randint(1, 16)))

    async def _kill_a_backend(self) -> None:
        await self._kill("LIMIT 1")

    async def _kill_all_backends(self) -> None:
        await self._kill("")

    async def _kill(self, limit: str) -> None:
        await self._observer.execute(
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE application_name = "
            f"'{self._name}' ORDER BY random() {limit}) AS victims"
        )

    async def _cut(self) -> None:
        self._endpoint.cut()

    async def _suspend(self) -> None:
        self._endpoint.suspend()

    async def _freeze(self) -> None:
        self._endpoint.freeze()
        await asyncio.sleep(self._fault_random.uniform(0.01, 0.4))
        self._endpoint.thaw()

    async def _freeze_and_cancel(self) -> None:
        self._endpoint.freeze()
        await asyncio.sleep(self._fault_random.uniform(0.0, 0.1))
        await self._cancel_twice()
        await asyncio.sleep(self._fault_random.uniform(0.0, 0.4))
        end = self._fault_random.choice([self._endpoint.thaw, self._endpoint.cut, self._endpoint.suspend])
        end()
        self._endpoint.thaw()

    async def _refuse(self) -> None:
        self._endpoint.refuse()
        self._endpoint.cut()
        await asyncio.sleep(self._fault_random.uniform(0.01, 0.4))
        self._endpoint.accept()

    async def _expire(self) -> None:
        await self._pool.expire_connections()

    # -----------------------------------------------------------------------------------------------------------------
    # Audit

    def _check_balance(self) -> None:
        try:
            assert_balanced(self._pool)
        except AssertionError as error:
            self.report.problems.append(f"stats() do not balance: {error}")

    async def _recover(self) -> None:
        """Check that the pool recovers after the last fault: full size, and nothing left to do."""
        began = time.monotonic()
        try:
            await assert_whole(self._pool)
        except (AssertionError, TimeoutError, neon_async.NeonAsyncError) as error:
            self.report.problems.append(f"the pool is not whole: {error!r}; {self._pool.stats()}")
        self.report.recovery = time.monotonic() - began
        self._check_balance()

    async def _audit_leaks(self, sockets: set[Any], tasks: set[asyncio.Task[Any]]) -> None:
        """Check that no task, no socket and no session of the pool is left."""
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG):
                while (
                    await self._observer.fetchval(count, self._name)
                    or open_sockets() - sockets
                    or asyncio.all_tasks() - tasks
                ):
                    await asyncio.sleep(0.01)
        for what, left in (
            ("sessions", await self._observer.fetchval(count, self._name)),
            ("sockets", open_sockets() - sockets),
            ("tasks", asyncio.all_tasks() - tasks),
        ):
            if left:
                self.report.problems.append(f"{what} are left: {left}")
        stats = self._pool.stats()
        if (stats.vacant, stats.size) != (stats.max_size, 0):
            self.report.problems.append(f"the closed pool is not empty: {stats}")
        self._check_balance()

    async def _audit_ledger(self) -> None:
        """Compare the ledger on the server with what the workers know."""
        rows = await self._observer.fetch(f"SELECT number, count(*) FROM {self._ledger} GROUP BY number")
        committed = {row["number"]: row["count"] for row in rows}
        expected = {Fate.ACKNOWLEDGED: {1}, Fate.UNKNOWN: {0, 1}, Fate.REFUSED: {0}}
        for number, fate in self._fates.items():
            if (times := committed.pop(number, 0)) not in expected[fate]:
                method = self._methods[number]
                self.report.problems.append(f"write {number}, {method}, is {fate.value} but committed {times} times")
        if committed:
            self.report.problems.append(f"no worker wrote {committed}")
        total = await self._observer.fetchval(f"SELECT sum(balance) FROM {self._accounts}")
        if total != ACCOUNTS * OPENING_BALANCE:
            self.report.problems.append(f"the accounts contain {total}, not {ACCOUNTS * OPENING_BALANCE}")


_RETRIED = ("_by_run_transaction", "_by_transfer")
# acquire() raises these: nothing was sent.
_NOT_ACQUIRED = (
    neon_async.PoolTimeoutError,
    neon_async.PoolBusyError,
    neon_async.ConnectError,
    neon_async.ConnectTimeoutError,
)
# run_transaction() raises these if the work may have been committed.
_MAY_BE_COMMITTED = (neon_async.CommitUnknownError, TimeoutError)


def _fate(method: str, error: BaseException) -> Fate:
    """Return what a worker knows about a write that raised `error`."""
    if method in _RETRIED and not isinstance(error, _MAY_BE_COMMITTED):
        return Fate.REFUSED
    # With an explicit release the error may come from the release, after the write.
    never_started = isinstance(error, _NOT_ACQUIRED) and method != "_by_hand"
    return Fate.REFUSED if never_started else Fate.UNKNOWN


def _is_expected(method: str, error: BaseException) -> bool:
    """Return whether a fault explains `error`: a lost connection, a deadline or a conflict."""
    if isinstance(error, asyncpg.InterfaceError):  # asyncpg raises it for misuse, too
        return any(text in str(error) for text in ("connection is closed", "released back to the pool"))
    if isinstance(error, asyncpg.InternalClientError):
        # asyncpg raises it on a connection that received the server's last message while idle and is not closed yet.
        return method not in _RETRIED and "another operation (2) is in progress" in str(error)
    return isinstance(
        error,
        (
            *_NOT_ACQUIRED,
            *_MAY_BE_COMMITTED,
            ConnectionError,
            asyncpg.PostgresConnectionError,
            asyncpg.AdminShutdownError,
            asyncpg.SerializationError,
            asyncpg.DeadlockDetectedError,
            asyncpg.QueryCanceledError,
        ),
    )


async def run(server: LocalPostgres, *, seconds: float, seed: int) -> Report:
    """Run chaos against `server` for `seconds`, and return the report."""
    async with LocalEndpoint(server, wake_time=0.1) as endpoint:
        return await Chaos(server, endpoint, seconds=seconds, seed=seed).run()


async def _main(arguments: argparse.Namespace) -> int:
    report: Report | cuts.Report
    sys.stdout.write(f"seed {arguments.seed}\n")
    async with LocalPostgres() as server:
        if arguments.cuts:
            report = await cuts.run(server)
        else:
            report = await run(server, seconds=arguments.seconds, seed=arguments.seed)
    sys.stdout.write(f"{report}\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run chaos against a pool and audit the result.")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration; default: 60")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="default: random")
    parser.add_argument("--cuts", action="store_true", help="cut a connection after every number of bytes instead")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop instead of asyncio's loop")
    options = parser.parse_args()
    factory = uvloop.new_event_loop if options.uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        sys.exit(runner.run(_main(options)))
