"""Calls that send many rows end at one cancellation or at their timeout, on connections from `connect()` as well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, connected

from neon_async._driver import connection as _connection
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

_ROW = "SELECT $1::int"
# More rows than the buffers on the way take, so that the client waits for room.
_MANY = 3_000_000


class OfACaller(asyncpg.Connection):
    """A caller's class, which stands in front."""


def rows(number: int) -> Iterator[tuple[int]]:
    return ((number,) for number in range(number))


async def chunks(number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b"1\n" * 5_000


Call = Callable[..., Awaitable[Any]]

CALLS = [
    pytest.param(lambda it, **options: it.executemany(_ROW, rows(_MANY), **options), id="executemany"),
    pytest.param(lambda it, **options: it.fetchmany(_ROW, rows(_MANY), **options), id="fetchmany"),
    pytest.param(lambda it, **options: it.copy_to_table("copied", source=chunks(_MANY), **options), id="copy_to_table"),
    pytest.param(
        lambda it, **options: it.copy_records_to_table("copied", records=rows(_MANY), **options),
        id="copy_records_to_table",
    ),
]


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint
        endpoint.thaw()


async def prepared(connection: Any) -> None:
    await connection.fetch(_ROW, 1)
    await connection.execute("CREATE TEMP TABLE copied (number int)")


@pytest.mark.parametrize("base", [asyncpg.Connection, OfACaller])
@pytest.mark.parametrize("by_timeout", [False, True], ids=["cancelled", "timeout="])
@pytest.mark.parametrize("call", CALLS)
async def test_a_frozen_server_does_not_hold_the_call(
    endpoint: LocalEndpoint, call: Call, by_timeout: bool, base: type[Any]
) -> None:
    async with asyncio.timeout(HANG), connected(endpoint, connection_class=base) as connection:
        await prepared(connection)
        endpoint.freeze()
        bounded = call(connection, timeout=0.1) if by_timeout else asyncio.wait_for(call(connection), 0.1)
        with pytest.raises(TimeoutError):
            await bounded
        connection.terminate()


@pytest.mark.parametrize("call", CALLS[:2])
async def test_a_call_that_cannot_end_cleanly_ends_the_connection(postgres: LocalPostgres, call: Call) -> None:
    """asyncpg waits for ever, even on a healthy server, for an answer to what it has not sent to the end."""
    async with asyncio.timeout(HANG), connected(postgres) as connection:
        await prepared(connection)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call(connection), 0.1)
        assert connection.is_closed()


@pytest.mark.parametrize("call", CALLS[:2])
async def test_a_second_cancellation_does_not_wait(
    endpoint: LocalEndpoint, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_CANCEL_GRACE", 2 * HANG)
    async with connected(endpoint) as connection:
        await prepared(connection)
        endpoint.freeze()
        task = asyncio.ensure_future(call(connection))
        began = time.monotonic()
        for _ in range(2):
            await asyncio.wait({task}, timeout=0.2)
            assert task.cancel(), "one cancellation is not enough: the call waits for a clean end"
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < HANG
        assert connection.is_closed()


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_is_cancelled_before_its_first_step_sends_nothing(
    postgres: LocalPostgres, call: Call
) -> None:
    async with connected(postgres) as connection:
        await prepared(connection)
        task = asyncio.ensure_future(call(connection))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await connection.fetchval("SELECT count(*) FROM copied") == 0


async def test_a_call_in_time_returns_its_result(postgres: LocalPostgres) -> None:
    async with connected(postgres, connection_class=OfACaller) as connection:
        await prepared(connection)
        assert await connection.executemany("INSERT INTO copied VALUES ($1)", rows(3), timeout=HANG) is None
        assert [row[0] for row in await connection.fetchmany(_ROW, [(1,), (2,)], timeout=HANG)] == [1, 2]
        assert await connection.copy_to_table("copied", source=chunks(1), timeout=HANG) == "COPY 5000"
        assert await connection.copy_records_to_table("copied", records=rows(2), timeout=HANG) == "COPY 2"
        assert await connection.fetchval("SELECT count(*) FROM copied") == 5005


@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
async def test_an_error_of_the_call_is_raised_as_it_is(postgres: LocalPostgres, method: str) -> None:
    async with connected(postgres) as connection:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await getattr(connection, method)("SELECT 1 / $1::int", [(1,), (0,)])
        assert await connection.fetchval("SELECT 1") == 1
