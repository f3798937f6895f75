"""A table to write to in transactions, an observer's connection, and what can go wrong on the way to a COMMIT."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

import pytest

import neon_async
from neon_async._driver.transaction import run_transaction
from neon_async._errors import server_error
from neon_async.testing import LocalEndpoint

from .probes import HANG, until


class Bench:
    """A table `{name}`, an observer's connection, and runs of work on connections through a relay.

    Attributes:
        connections: The connections that runs have acquired, in order.
        retries: The seconds that were reported for each retry.
    """

    def __init__(self, endpoint: LocalEndpoint, admin: Any, name: str) -> None:
        self.endpoint = endpoint
        self.admin = admin
        self.name = name
        self.connections: list[Any] = []
        self.retries: list[float] = []

    async def connect(self, **keywords: Any) -> Any:
        return await neon_async.connect(self.endpoint.dsn, trust_anchor=self.endpoint.trust_anchor, **keywords)

    @contextlib.asynccontextmanager
    async def acquire(self, **keywords: Any) -> AsyncIterator[Any]:
        connection = await self.connect(**keywords)
        self.connections.append(connection)
        try:
            yield connection
        finally:
            connection.terminate()

    async def run(
        self, work: Callable[[Any], Awaitable[Any]], acquire: Any = None, bound: float | None = HANG, **options: Any
    ) -> Any:
        """Call `run_transaction()` with connections of this bench, within `bound` seconds."""
        defaults = {"attempts": 3, "isolation": None, "readonly": None, "deferrable": None}
        async with asyncio.timeout(bound):
            return await run_transaction(
                acquire or self.acquire, work, on_retry=self.retries.append, **(defaults | options)
            )

    async def add(self, connection: Any, value: int = 1) -> None:
        await connection.execute(f"INSERT INTO {self.name} VALUES ({value})")

    async def kept(self) -> list[int]:
        """Return the committed values."""
        return [row["value"] for row in await self.admin.fetch(f"SELECT value FROM {self.name} ORDER BY value")]

    async def at_commit(self, body: str) -> None:
        """Have the server run `body` (PL/pgSQL) when a transaction that has written to the table commits."""
        await self.admin.execute(f"""
            CREATE FUNCTION {self.name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {self.name} DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION {self.name}()""")

    async def until_committing(self, like: str = "COMMIT%") -> None:
        """Wait until a backend has begun to commit, by a statement like this, and sleeps in it."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE $1 AND wait_event = 'PgSleep'"
        async with asyncio.timeout(HANG):
            while not await self.admin.fetchval(query, like):
                await asyncio.sleep(0.005)

    async def kill(self, connection: Any) -> None:
        await self.admin.fetchval("SELECT pg_terminate_backend($1, 10000)", connection.get_server_pid())


class Mishap(Exception):
    """An error of the caller's own."""


async def within_transaction(connection: Any, body: Callable[[], Awaitable[Any]], *, nested: bool = False) -> None:
    """Run `body` in a transaction block, or in a savepoint block inside one."""
    async with connection.transaction():
        if nested:
            await within_transaction(connection, body)
        else:
            await body()


class Unproxied:
    """A connection of a pool that can still be asked whether it is closed after it has left the pool."""

    def __init__(self, proxy: Any) -> None:
        self._lent = proxy
        self._itself = proxy._con

    def __getattr__(self, name: str) -> Any:
        return getattr(self._itself if name == "is_closed" else self._lent, name)


@types.coroutine
def drive(run: Any, *, until: Callable[[], bool]) -> Generator[Any, Any, None]:
    """Run the steps of a coroutine in the place of a task, which cannot be closed."""
    while True:
        awaited = run.send(None)
        if until():
            return
        yield awaited


# ---------------------------------------------------------------------------------------------------------------------
# Conflicts


async def raced_update(bench: Bench, connection: Any) -> None:
    """40001 from a statement: the row has changed since this transaction read it."""
    await connection.fetch(f"SELECT * FROM {bench.name}")
    await bench.admin.execute(f"UPDATE {bench.name} SET value = 10")
    await connection.execute(f"UPDATE {bench.name} SET value = value + 1")


async def write_skew(bench: Bench, connection: Any) -> None:
    """40001 from COMMIT: each of two serializable transactions read what the other writes; the other commits first."""
    async with bench.acquire() as other:
        bench.connections.remove(other)
        rival = other.transaction(isolation="serializable")
        await rival.start()
        await other.fetch(f"SELECT count(*) FROM {bench.name}")
        await connection.fetch(f"SELECT count(*) FROM {bench.name}")
        await connection.execute(f"INSERT INTO {bench.name} VALUES (5)")
        await other.execute(f"INSERT INTO {bench.name} VALUES (10)")
        await rival.commit()


async def deadlock(bench: Bench, connection: Any) -> None:
    """40P01: two transactions wait for each other, and this one gives up."""
    await connection.execute("SET LOCAL deadlock_timeout = '10ms'")
    await connection.execute("SELECT pg_advisory_xact_lock(1)")
    async with bench.acquire() as other:
        bench.connections.remove(other)
        await other.execute("SET deadlock_timeout = '1min'")
        await other.execute("SELECT pg_advisory_lock(2)")
        waiting = asyncio.ensure_future(other.execute("SELECT pg_advisory_lock(1)"))
        try:
            async with asyncio.timeout(HANG):
                while not await bench.admin.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                ):
                    await asyncio.sleep(0.005)
            await connection.execute("SELECT pg_advisory_xact_lock(2)")
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


# Each with the options of the transaction.
CONFLICTS = [
    pytest.param(raced_update, {"isolation": "repeatable_read"}, id="40001 from a statement"),
    pytest.param(write_skew, {"isolation": "serializable"}, id="40001 from COMMIT"),
    pytest.param(deadlock, {}, id="40P01"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Lost connections


async def killed_in_a_statement(bench: Bench, connection: Any) -> None:
    running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    await bench.kill(connection)
    await running


async def killed_between_statements(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await connection.execute("SELECT 1")


async def killed_and_noticed(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await until(connection.is_closed)
    await connection.execute("SELECT 1")


async def killed_before_commit(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await until(connection.is_closed)


async def cut_in_a_statement(bench: Bench, connection: Any) -> None:
    running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    bench.endpoint.cut()
    await running


async def killed_in_a_savepoint(bench: Bench, connection: Any) -> None:
    async with connection.transaction():
        await killed_in_a_statement(bench, connection)


async def killed_with_the_words_of_the_server(bench: Bench, connection: Any) -> None:
    """asyncpg sometimes raises what the server said last."""
    await killed_before_commit(bench, connection)
    raise server_error(b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0")


LOSSES = [
    pytest.param(loss, {}, id=loss.__name__.replace("_", " "))
    for loss in (
        killed_in_a_statement,
        killed_between_statements,
        killed_and_noticed,
        killed_before_commit,
        killed_with_the_words_of_the_server,
        cut_in_a_statement,
        killed_in_a_savepoint,
    )
]


# ---------------------------------------------------------------------------------------------------------------------
# Failures during COMMIT


async def killed_in_commit(bench: Bench, **options: str) -> None:
    await bench.until_committing(**options)
    await bench.kill(bench.connections[0])


async def cut_in_commit(bench: Bench, **options: str) -> None:
    await bench.until_committing(**options)
    bench.endpoint.cut()


async def suspended_in_commit(bench: Bench, **options: str) -> None:
    await bench.until_committing(**options)
    bench.endpoint.suspend()


async def frozen_in_commit(bench: Bench, **options: str) -> None:
    await bench.until_committing(**options)
    bench.endpoint.freeze()
