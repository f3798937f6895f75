"""A sink of a COPY that fails, at whatever point of the answer, leaves a connection that works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, connected, make_pool

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

# Few rows come together with the end of the answer, so that nothing is left to cancel.
rows = pytest.mark.parametrize("count", [pytest.param(3, id="few rows"), pytest.param(1_000_000, id="many rows")])
ends = pytest.mark.parametrize(
    ("end", "error"),
    [
        pytest.param("raises", ZeroDivisionError, id="raises"),
        pytest.param("is cancelled", asyncio.CancelledError, id="is cancelled"),
        pytest.param("takes too long", neon_async.QueryTimeoutError, id="takes too long"),
    ],
)


@pytest.fixture
async def connection(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres, command_timeout=None) as connection:
        yield connection


async def copy(owner: Any, count: int, end: str) -> None:
    """Copy rows to a sink that ends like this."""
    called = asyncio.Event()

    async def sink(_: bytes) -> None:
        called.set()
        if end == "raises":
            raise ZeroDivisionError
        await asyncio.Event().wait()

    query, timeout = f"SELECT generate_series(1, {count})", 0.5 if end == "takes too long" else None
    copying = asyncio.ensure_future(owner.copy_from_query(query, output=sink, timeout=timeout))
    await called.wait()
    if end == "is cancelled":
        copying.cancel()
    await copying


@rows
@ends
async def test_the_next_statement_runs_at_once(
    connection: Any, count: int, end: str, error: type[BaseException]
) -> None:
    async with asyncio.timeout(HANG):
        for _ in range(2):
            with pytest.raises(error):
                await copy(connection, count, end)
            assert await connection.fetchval("SELECT 1") == 1
        with pytest.raises(TimeoutError):  # and can be cancelled
            await connection.execute("SELECT pg_sleep(60)", timeout=0.02)
        assert await connection.fetchval("SELECT 1") == 1


@ends
async def test_a_transaction_goes_on_where_the_server_had_nothing_to_cancel(
    connection: Any, end: str, error: type[BaseException]
) -> None:
    async with asyncio.timeout(HANG), connection.transaction():
        await connection.execute("SET LOCAL work_mem TO '99kB'")
        with pytest.raises(error):
            await copy(connection, 3, end)
        assert connection.is_in_transaction()
        assert await connection.fetchval("SHOW work_mem") == "99kB"


@rows
@ends
async def test_the_pool_keeps_the_connection(
    postgres: LocalPostgres, count: int, end: str, error: type[BaseException]
) -> None:
    async with asyncio.timeout(HANG), make_pool(postgres, max_size=1, command_timeout=None) as pool:
        process = await pool.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(error):
            await copy(pool, count, end)
        assert await pool.fetchval("SELECT pg_backend_pid()") == process


async def test_a_sink_that_ends_its_connection_and_fails_is_reported_once(connection: Any) -> None:
    async def sink(_: bytes) -> None:
        connection.terminate()
        raise ZeroDivisionError

    async with asyncio.timeout(HANG):
        with pytest.raises((ZeroDivisionError, neon_async.ConnectionLostError)):
            await connection.copy_from_query("SELECT 1", output=sink)
        with pytest.raises(asyncpg.InterfaceError):
            await connection.fetchval("SELECT 1")
