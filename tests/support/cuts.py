"""Cuts: the way to the server ends after every number of bytes of a reset, its answer and the statement behind it.

One connection is released with something left in its session, and lent again at once. The reset and the next write go
out together. A relay cuts the connection after N bytes of either direction, for every N, until nothing is cut any more.
Afterwards a ledger shows whether every acknowledged write is there once, no other one twice, and none in a session that
was not reset. TLS passes through the relay, so the bytes are those of TLS records.

`chaos.py --cuts` runs it from the command line.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import asyncpg

import neon_async
from neon_async.testing import LocalPostgres

from .probes import HANG, assert_balanced, connected

Direction = Literal["to the server", "to the client"]
DIRECTIONS: tuple[Direction, Direction] = ("to the server", "to the client")
LEFT = "left by the borrower before"


@dataclass
class Report:
    """What came of one run. `problems` is empty where everything held.

    Attributes:
        cuts: How many cuts there were, by the way of writing and the direction.
        fates: What the writers were told, and how often.
        problems: What must not be.
    """

    cuts: collections.Counter[str] = field(default_factory=collections.Counter)
    fates: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"  {count} cuts: {name}" for name, count in self.cuts.items()]
        lines += [f"  {count} writes {name}" for name, count in self.fates.items()]
        return "\n".join(["cuts", *lines, *(f"  PROBLEM: {problem}" for problem in self.problems)])


class CuttingRelay:
    """A TCP relay that cuts one connection after a number of bytes.

    Args:
        server: The server behind it.

    Attributes:
        port: Where it listens on 127.0.0.1.
        cuts: How many connections it has cut.
    """

    def __init__(self, server: LocalPostgres) -> None:
        self.port = 0
        self.cuts = 0
        self._server = server
        self._armed: tuple[Direction, bool] | None = None
        self._left = 0
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def dsn(self) -> str:
        """The DSN of the server, with the port of this relay."""
        return self._server.dsn.replace(f":{self._server.port}/", f":{self.port}/")

    def arm(self, direction: Direction, after: int, *, reset: bool) -> None:
        """Cut the connection that has passed `after` more bytes in `direction`, by a TCP reset or a polite end."""
        self._armed, self._left = (direction, reset), after

    def disarm(self) -> None:
        """Cut nothing."""
        self._armed = None

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[CuttingRelay]:
        """Listen for the duration of the block."""
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._relay(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _relay(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        pumps = [
            asyncio.ensure_future(self._pump("to the server", from_client, to_server)),
            asyncio.ensure_future(self._pump("to the client", from_server, to_client)),
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            reset = any(pump.result() for pump in done)
        finally:
            for pump in pumps:
                pump.cancel()
        for writer in (to_client, to_server):
            if reset:
                writer.transport.abort()
            else:
                writer.close()

    async def _pump(self, direction: Direction, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> bool:
        """Pass bytes on until one side ends or the cut, and return whether the connection is to be reset."""
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if self._armed is None or self._armed[0] != direction or len(data) < self._left:
                    self._left -= len(data) if self._armed and self._armed[0] == direction else 0
                    target.write(data)
                    continue
                reset, self._armed = self._armed[1], None
                self.cuts += 1
                target.write(data[: self._left])
                return reset
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Ways to write


Write = Callable[[neon_async.Pool, str, int], Awaitable[object]]


async def by_execute(pool: neon_async.Pool, query: str, number: int) -> None:
    """Write by one call of the pool, which may run it again."""
    await pool.execute(query, number)


async def by_text(pool: neon_async.Pool, query: str, number: int) -> None:
    """Write by a text of several statements, the first of which would end a transaction."""
    await pool.execute(f"ROLLBACK; {query.replace('$1', str(number))}")


async def in_a_block(pool: neon_async.Pool, query: str, number: int) -> None:
    """Write on a connection that was acquired."""
    async with pool.acquire() as connection:
        await connection.execute(query, number)


async def in_a_transaction(pool: neon_async.Pool, query: str, number: int) -> None:
    """Write behind a BEGIN that goes ahead, too."""
    async with pool.transaction(settings={"app.claim": "a claim"}) as connection:
        await connection.execute(query, number)


async def by_run_transaction(pool: neon_async.Pool, query: str, number: int) -> None:
    """Write in a transaction that runs again where nothing of it can have been kept."""
    await pool.run_transaction(lambda connection: connection.execute(query, number))


async def a_moment_later(pool: neon_async.Pool, query: str, number: int) -> None:
    """Write after the reset has been sent by itself, and perhaps answered."""
    await asyncio.sleep(0.001)
    await pool.execute(query, number)


WAYS: tuple[Write, ...] = (
    by_execute,
    by_text,
    in_a_block,
    in_a_transaction,
    by_run_transaction,
    a_moment_later,
)


def _may_be_kept(write: Write, error: BaseException | None) -> set[int]:
    """Return how often a write may be in the ledger whose writer was told this."""
    if error is None:
        return {1}
    if isinstance(error, neon_async.ConnectionLostError) and error.nothing_executed:
        return {0}
    if write is by_run_transaction and not isinstance(error, (neon_async.CommitUnknownError, TimeoutError)):
        return {0}
    return {0, 1}


# ---------------------------------------------------------------------------------------------------------------------
# The run


class _Run:
    def __init__(self, pool: neon_async.Pool, relay: CuttingRelay, table: str) -> None:
        self.report = Report()
        self._pool = pool
        self._relay = relay
        # Nothing is unique in the table, so that a write that was done twice is seen.
        self._query = f"INSERT INTO {table} SELECT $1, current_setting('app.tenant', true) WHERE $1::int > 0"
        self._numbers = itertools.count(1)
        self.may_be_kept: dict[int, tuple[str, set[int]]] = {}

    async def cut_everywhere(self, write: Write, direction: Direction, *, first: int, step: int) -> None:
        """Cut after `first` bytes, `first + step` bytes and so on, until there is nothing to cut."""
        for after in itertools.count(first, step):
            cuts = self._relay.cuts
            await self._write(write, direction, after)
            if self._relay.cuts == cuts:
                return
            self.report.cuts[f"{write.__name__}, {direction}"] += 1

    async def _warm_up(self, write: Write) -> None:
        """Have a connection on which all is prepared. The one before may have been cut behind its last answer."""
        for _ in range(3):
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError):
                await write(self._pool, self._query, 0)
                return
        self.report.problems.append(f"{write.__name__} does not work without a cut")

    async def _write(self, write: Write, direction: Direction, after: int) -> None:
        number = next(self._numbers)
        await self._warm_up(write)
        connection = await self._pool.acquire()
        await connection.execute(f"SET app.tenant = '{LEFT}'")
        self._relay.arm(direction, after, reset=bool(after % 2))
        await self._pool.release(connection)
        try:
            await write(self._pool, self._query, number)
        except Exception as error:  # noqa: BLE001  judged, whatever it is
            outcome: BaseException | None = error
        else:
            outcome = None
        self._relay.disarm()
        told = "acknowledged" if outcome is None else type(outcome).__name__
        kept = _may_be_kept(write, outcome)
        self.report.fates[f"{told}, kept {' or '.join(map(str, sorted(kept)))} times"] += 1
        self.may_be_kept[number] = f"{write.__name__}, {after} bytes {direction}, {told}", kept
        try:
            assert_balanced(self._pool)
        except AssertionError as error:
            self.report.problems.append(f"stats() do not balance: {error}")


async def run(server: LocalPostgres, *, first: int = 0, step: int = 1) -> Report:
    """Cut the way to `server` after `first` bytes, `first + step` bytes and so on, in every way and direction."""
    name = f"cuts_{secrets.token_hex(4)}"
    relay = CuttingRelay(server)
    async with connected(server) as observer, relay.listening():
        await observer.execute(f"CREATE TABLE {name} (number int, tenant text)")
        try:
            async with neon_async.create_pool(
                relay.dsn, trust_anchor=server.trust_anchor, application_name=name, max_size=1, command_timeout=HANG
            ) as pool:
                it = _Run(pool, relay, name)
                for write, direction in itertools.product(WAYS, DIRECTIONS):
                    await it.cut_everywhere(write, direction, first=first, step=step)
            await _audit(observer, name, it)
        finally:
            await observer.execute(f"DROP TABLE {name}")
    return it.report


async def _audit(observer: Any, name: str, it: _Run) -> None:
    """Compare what the server has with what the writers were told, when all its sessions have ended."""
    async with asyncio.timeout(HANG):
        while await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name):
            await asyncio.sleep(0.01)
    rows = await observer.fetch(f"SELECT number, count(*) AS times, max(tenant) AS tenant FROM {name} GROUP BY number")
    kept = {row["number"]: row["times"] for row in rows}
    for number, (what, allowed) in it.may_be_kept.items():
        if (times := kept.pop(number, 0)) not in allowed:
            it.report.problems.append(f"{what}: kept {times} times")
    if kept:
        it.report.problems.append(f"writes that were never made: {kept}")
    it.report.problems += [
        f"{it.may_be_kept[row['number']][0]}: ran in a session that was not reset" for row in rows if row["tenant"]
    ]
