"""Every call ends at one cancellation or at its timeout, whatever the server does, from `connect()` and from a pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, connected, until
from support.transactions import Bench, within_transaction

import neon_async
from neon_async._driver.holder import own_session, transport_of
from neon_async._wire.transport import SessionTransport
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

_KNOWN, _KNOWN_ROW = "SELECT 42", "SELECT $1::int"  # prepared before the server freezes
# More rows than the buffers on the way take, so that the client waits for room.
_MANY = 3_000_000

Call = Callable[..., Awaitable[Any]]


async def read_on(connection: Any, **deadline: Any) -> None:
    async for _ in connection.cursor("SELECT generate_series(1, 1000)", **deadline):
        pass


async def begin(connection: Any) -> None:
    """Begin a transaction, whose first statement is the first to need an answer."""
    await connection.transaction().start()
    await connection.execute("SELECT 1")


async def ignore(_: bytes) -> None:
    pass


def rows(number: int) -> Iterator[tuple[int]]:
    return ((number,) for number in range(number))


async def chunks(number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b"1\n" * 5_000


# Each takes `timeout=` as well.
CALLS: dict[str, Call] = {
    "execute": lambda it, **deadline: it.execute("SELECT 1", **deadline),
    "execute with arguments": lambda it, **deadline: it.execute("SELECT $1::int", 1, **deadline),
    "fetch": lambda it, **deadline: it.fetch("SELECT 1", **deadline),
    "fetchval": lambda it, **deadline: it.fetchval("SELECT 1", **deadline),
    "fetchrow": lambda it, **deadline: it.fetchrow("SELECT 1", **deadline),
    "fetch of a known statement": lambda it, **deadline: it.fetch(_KNOWN, **deadline),
    "fetchmany": lambda it, **deadline: it.fetchmany("SELECT $1::int", rows(3), **deadline),
    "executemany": lambda it, **deadline: it.executemany("SELECT $1::int", rows(3), **deadline),
    "prepare": lambda it, **deadline: it.prepare("SELECT 1", **deadline),
    "cursor": lambda it, **deadline: read_on(it, **deadline),
    "copy_from_query": lambda it, **deadline: it.copy_from_query("SELECT 1", output=ignore, **deadline),
    "copy_records_to_table": lambda it, **deadline: it.copy_records_to_table("pg_am", records=rows(3), **deadline),
    "reset": lambda it, **deadline: it.reset(**deadline),
    "close": lambda it, **deadline: it.close(**deadline),
}
CALLS_OF_MANY_ROWS: dict[str, Call] = {
    "fetchmany of many": lambda it, **deadline: it.fetchmany(_KNOWN_ROW, rows(_MANY), **deadline),
    "executemany of many": lambda it, **deadline: it.executemany(_KNOWN_ROW, rows(_MANY), **deadline),
    "copy_to_table of many": lambda it, **deadline: it.copy_to_table("copied", source=chunks(_MANY), **deadline),
    "copy_records_to_table of many": lambda it, **deadline: it.copy_records_to_table(
        "copied", records=rows(_MANY), **deadline
    ),
}
# These have no `timeout=`.
CALLS_WITHOUT_TIMEOUT: dict[str, Call] = {
    "add_listener": lambda it: it.add_listener("channel", print),
    "set_type_codec": lambda it: it.set_type_codec("json", encoder=str, decoder=str, schema="public"),
    "begin": begin,
    "savepoint": lambda it: within_transaction(it, lambda: it.execute("SELECT 1")),
}

MANY_ROWS = [pytest.param(call, id=name) for name, call in CALLS_OF_MANY_ROWS.items()]


async def prepare(connection: Any) -> None:
    """Prepare the known statements and a table to copy to."""
    await connection.fetch(_KNOWN)
    await connection.fetch(_KNOWN_ROW, 1)
    await connection.execute("CREATE TEMP TABLE copied (number int)")


def bounded(call: Call, connection: Any, *, by_timeout: bool) -> Awaitable[Any]:
    return call(connection, timeout=0.1) if by_timeout else asyncio.wait_for(call(connection), 0.1)


class TestFromAPool:
    @pytest.mark.parametrize(
        ("call", "by_timeout"),
        [
            *(
                pytest.param(call, False, id=name)
                for name, call in (CALLS | CALLS_OF_MANY_ROWS | CALLS_WITHOUT_TIMEOUT).items()
            ),
            *(pytest.param(call, True, id=f"{name}, timeout=") for name, call in (CALLS | CALLS_OF_MANY_ROWS).items()),
        ],
    )
    async def test_a_frozen_server_does_not_hold_a_call_past_its_deadline(
        self, bench: Bench, pool: neon_async.Pool, call: Call, by_timeout: bool
    ) -> None:
        """One cancellation also ends the transaction and the loan around the call."""

        async def body() -> None:
            bench.endpoint.freeze()
            await bounded(call, connection, by_timeout=by_timeout)

        async with asyncio.timeout(HANG):
            async with pool.acquire() as connection:
                await prepare(connection)
                with pytest.raises(TimeoutError):
                    await within_transaction(connection, body)
            bench.endpoint.thaw()
            assert await pool.fetchval("SELECT 1") == 1, "the slot is not lost"

    async def test_a_frozen_server_does_not_hold_the_beginning_of_a_transaction_which_needs_no_answer(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        async def work() -> None:
            async with pool.acquire() as connection:
                await prepare(connection)
                bench.endpoint.freeze()
                async with connection.transaction(), connection.transaction():
                    assert connection.is_in_transaction()
                    await connection.execute("SELECT 1", timeout=0.1)

        async with asyncio.timeout(HANG):
            with pytest.raises(TimeoutError) as caught:
                await work()
            assert "execute" in [frame.name for frame in caught.traceback], "neither BEGIN nor SAVEPOINT"
            bench.endpoint.thaw()
            assert await pool.fetchval("SELECT 1") == 1, "the slot is not lost"

    async def test_a_healthy_server_does_not_hold_a_call_of_many_rows(self, pool: neon_async.Pool) -> None:
        """asyncpg waits for ever for the answer to what it has not sent to the end."""
        async with asyncio.timeout(HANG):
            async with pool.acquire() as connection:
                await connection.fetch(_KNOWN_ROW, 1)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connection.executemany(_KNOWN_ROW, rows(_MANY)), 0.1)
            assert await pool.fetchval("SELECT 1") == 1


class OfACaller(asyncpg.Connection):
    """A caller's class, which stands in front of ours."""


class TestFromConnect:
    @pytest.mark.parametrize("base", [asyncpg.Connection, OfACaller])
    @pytest.mark.parametrize("by_timeout", [False, True], ids=["cancelled", "timeout="])
    @pytest.mark.parametrize("call", MANY_ROWS)
    async def test_a_frozen_server_does_not_hold_a_call_past_its_deadline(
        self, bench: Bench, call: Call, by_timeout: bool, base: type[Any]
    ) -> None:
        async with asyncio.timeout(HANG), bench.acquire(connection_class=base) as connection:
            await prepare(connection)
            bench.endpoint.freeze()
            with pytest.raises(TimeoutError):
                await bounded(call, connection, by_timeout=by_timeout)

    @pytest.mark.parametrize("call", MANY_ROWS[:2])
    async def test_a_call_that_cannot_end_cleanly_ends_the_connection(
        self, postgres: LocalPostgres, call: Call
    ) -> None:
        async with asyncio.timeout(HANG), connected(postgres) as connection:
            await prepare(connection)
            with pytest.raises(TimeoutError):
                await bounded(call, connection, by_timeout=False)
            assert connection.is_closed()

    @pytest.mark.parametrize("call", MANY_ROWS[:2])
    async def test_a_second_cancellation_ends_the_call_at_once(self, bench: Bench, call: Call) -> None:
        async with bench.acquire() as connection:
            own_session(connection).cancel_time = 2 * HANG
            await prepare(connection)
            bench.endpoint.freeze()
            task = asyncio.ensure_future(call(connection))
            began = time.monotonic()
            for _ in range(2):
                await asyncio.wait({task}, timeout=0.2)
                assert task.cancel(), "one cancellation is not enough: the call waits for a clean end"
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - began < HANG
            assert connection.is_closed()

    @pytest.mark.parametrize("call", MANY_ROWS)
    async def test_a_call_that_is_cancelled_before_its_first_step_sends_nothing(
        self, postgres: LocalPostgres, call: Call
    ) -> None:
        async with connected(postgres) as connection:
            await prepare(connection)
            task = asyncio.ensure_future(call(connection))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await connection.fetchval("SELECT count(*) FROM copied") == 0

    async def test_a_call_in_time_returns_its_result(self, postgres: LocalPostgres) -> None:
        async with connected(postgres, connection_class=OfACaller) as connection:
            await prepare(connection)
            assert await connection.executemany("INSERT INTO copied VALUES ($1)", rows(3), timeout=HANG) is None
            assert [row[0] for row in await connection.fetchmany(_KNOWN_ROW, [(1,), (2,)], timeout=HANG)] == [1, 2]
            assert await connection.copy_to_table("copied", source=chunks(1), timeout=HANG) == "COPY 5000"
            assert await connection.copy_records_to_table("copied", records=rows(2), timeout=HANG) == "COPY 2"
            assert await connection.fetchval("SELECT count(*) FROM copied") == 5005

    @pytest.mark.parametrize("method", ["executemany", "fetchmany"])
    async def test_an_error_of_the_call_is_raised_as_it_is(self, postgres: LocalPostgres, method: str) -> None:
        async with connected(postgres) as connection:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await getattr(connection, method)("SELECT 1 / $1::int", [(1,), (0,)])
            assert await connection.fetchval("SELECT 1") == 1


async def endless(items: Any) -> AsyncIterator[Any]:
    while True:
        yield items
        await asyncio.sleep(0)


async def silent() -> AsyncIterator[bytes]:
    yield b"1\n"
    await asyncio.Event().wait()


# Calls that wait for the caller's own code, or go on with it, when the connection is lost.
SOURCES: dict[str, Call] = {
    "bytes without end": lambda it: it.copy_to_table("copied", source=endless(b"1\n")),
    "records without end": lambda it: it.copy_records_to_table("copied", records=endless((1,))),
    "a source that is silent": lambda it: it.copy_to_table("copied", source=silent()),
}


async def under_way(connection: Any, call: Call, *, writes: int) -> tuple[asyncio.Future[Any], SessionTransport]:
    """Return a call that has written so often, and the transport of its session."""
    await prepare(connection)
    transport = transport_of(connection)
    running, before = asyncio.ensure_future(call(connection)), transport.writes
    await until(lambda: transport.writes >= before + writes)
    return running, transport


class TestLost:
    """There is no `command_timeout` that would end the call."""

    @pytest.mark.parametrize("call", MANY_ROWS)
    async def test_a_call_that_waits_for_room_ends_with_the_connection(self, bench: Bench, call: Call) -> None:
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=None) as connection:
            running, transport = await under_way(connection, call, writes=3)
            bench.endpoint.freeze()
            await until(transport.get_write_buffer_size)
            bench.endpoint.cut()
            with pytest.raises(neon_async.ConnectionLostError, match="What it was doing may have been executed"):
                await running

    @pytest.mark.parametrize("call", SOURCES.values(), ids=SOURCES)
    async def test_a_source_does_not_hold_a_copy_past_its_connection(self, bench: Bench, call: Call) -> None:
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=None) as connection:
            running, _ = await under_way(connection, call, writes=2)
            bench.endpoint.cut()
            with pytest.raises(neon_async.ConnectionLostError):
                await running

    @pytest.mark.parametrize("end", ["cut", "terminate"])
    async def test_a_copy_whose_connection_is_lost_while_its_sink_works_ends_when_the_sink_returns(
        self, bench: Bench, end: str
    ) -> None:
        returned = False

        async def sink(_: bytes) -> None:
            nonlocal returned
            (connection.terminate if end == "terminate" else bench.endpoint.cut)()
            await until(connection.is_closed)
            await asyncio.sleep(0.2)  # a sink is not interrupted, however long it takes
            returned = True

        async with asyncio.timeout(HANG), bench.acquire(command_timeout=None) as connection:
            query = "SELECT generate_series(1, 10000000)"
            with pytest.raises(neon_async.ConnectionLostError):
                await connection.copy_from_query(query, output=sink)
            assert returned

    async def test_in_a_transaction_nothing_was_committed(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await connection.execute("CREATE TEMP TABLE IF NOT EXISTS copied (number int)")
            if len(bench.connections) == 1:
                asyncio.get_running_loop().call_later(0.1, bench.endpoint.cut)
                await connection.copy_to_table("copied", source=silent())

        await bench.run(work)
        assert len(bench.connections) == 2, "it was run again"
