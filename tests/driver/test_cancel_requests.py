"""A cancelled statement is cancelled on the server, by a request that is verified and goes to the session's address."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.negotiations import SSL_REQUEST, TLS, connected, openings
from support.probes import HANG, Relay, nothing_is_left, resolve_to, until

from neon_async._driver.connector import prepare
from neon_async._driver.holder import session_of
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["direct", "postgres"])


@contextlib.asynccontextmanager
async def a_sleeping_query(connection: Any, admin: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that runs a query of an hour. In the end, the server must no longer run the query."""
    pid = connection.get_server_pid()
    state = "SELECT state = 'active' FROM pg_stat_activity WHERE pid = $1"
    task = asyncio.create_task(connection.execute("SELECT pg_sleep(3600)"))
    async with asyncio.timeout(HANG):
        while not await admin.fetchval(state + " AND query LIKE '%pg_sleep%'", pid):
            await asyncio.sleep(0.001)
        yield task
        while await admin.fetchval(state, pid):
            await asyncio.sleep(0.001)


@NEGOTIATIONS
async def test_a_cancelled_query_is_cancelled_on_the_server_with_a_request_inside_tls(
    postgres: LocalPostgres, negotiation: str
) -> None:
    async with (
        connected(postgres) as admin,
        Relay(postgres.port) as relay,
        connected(postgres, relay.dsn(postgres.dsn), sslnegotiation=negotiation) as connection,
    ):
        async with a_sleeping_query(connection, admin) as task:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await connection.fetchval("SELECT 1") == 1
        await until(lambda: not connection._cancellations)
        await until(lambda: relay.passages[-1].over)
        kind = "direct" if negotiation == "direct" else "SSLRequest"
        assert openings(relay) == [kind, kind]
        assert not connection.is_closed()


async def test_a_query_that_times_out_is_cancelled_on_the_server(postgres: LocalPostgres) -> None:
    async with connected(postgres) as admin, connected(postgres) as connection, nothing_is_left():
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
        state = "SELECT state FROM pg_stat_activity WHERE pid = $1"
        assert await admin.fetchval(state, connection.get_server_pid()) == "idle"
        await until(lambda: not connection._cancellations)


def channels_and_timers() -> list[Any]:
    """Return every TLS channel and every pending timer of the process."""
    gc.collect()
    kinds = ("SSLProtocol", "TimerHandle")  # of asyncio and of uvloop
    found = [one for one in gc.get_objects() if type(one).__name__ in kinds]
    return [
        one
        for one in found
        if not (isinstance(one, asyncio.TimerHandle) or hasattr(one, "when")) or not one.cancelled()
    ]


@NEGOTIATIONS
async def test_cancelled_queries_leave_no_channel_and_no_timer(postgres: LocalPostgres, negotiation: str) -> None:
    before = {id(one): one for one in channels_and_timers()}  # they are kept, so that no later one has the id of one
    async with connected(postgres, sslnegotiation=negotiation, connect_timeout=100 * HANG) as connection:
        for _ in range(8):
            task = asyncio.create_task(connection.execute("SELECT pg_sleep(3600)"))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await connection.fetchval("SELECT 1") == 1
            await until(lambda: not connection._cancellations)
        # The session's channel, the timers of its statement cache and of this wait; not one of each for each query.
        await until(lambda: sum(id(one) not in before for one in channels_and_timers()) < 8)


async def test_a_cancel_request_goes_to_the_address_of_the_session(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Relay(postgres.port) as relay, connected(postgres) as admin:
        asked = resolve_to(monkeypatch, ("127.0.0.1", relay.port))
        async with connected(postgres, relay.dsn(postgres.dsn).partition("?")[0]) as connection:
            async with a_sleeping_query(connection, admin) as task:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await connection.fetchval("SELECT 1") == 1
        assert len(asked) == 1
        assert len(relay.passages) == 2


async def test_a_cancel_request_announces_no_step(postgres: LocalPostgres) -> None:
    steps: list[str] = []
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    connection = await connector.connect(on_step=steps.append)
    try:
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        connection.terminate()
    assert steps == ["tcp", "tls", "authentication"]


async def test_a_cancel_request_is_verified_as_the_session_is(postgres: LocalPostgres) -> None:
    """Another server answers at the address: it does not get the secret key."""
    asked: list[bytes] = []

    def after_the_first(first: bytes) -> bool:
        asked.append(first[:1])
        return len(asked) > 1

    async with (
        connected(postgres) as admin,
        Relay(postgres.port, refuse=after_the_first) as relay,
        connected(postgres, relay.dsn(postgres.dsn)) as connection,
    ):
        pid = connection.get_server_pid()
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        await until(lambda: not connection._cancellations)
        assert await admin.fetchval("SELECT pg_terminate_backend($1)", pid)
        # Direct TLS was refused, so SSLRequest was tried; no cancel request was sent in plaintext.
        assert set(asked) <= {TLS, SSL_REQUEST[:1]}
        openings(relay)


async def test_a_cancel_request_that_cannot_be_sent_terminates_the_connection(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "neon_async")
    refused: list[bytes] = []

    def after_the_first(first: bytes) -> bool:
        refused.append(first)
        return len(refused) > 1

    async with (
        Relay(postgres.port, refuse=after_the_first) as relay,
        connected(postgres, relay.dsn(postgres.dsn)) as connection,
        asyncio.timeout(HANG),
    ):
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        await until(connection.is_closed)
        await until(lambda: not connection._cancellations)
    (record,) = [one for one in caplog.records if "could not be cancelled" in one.message]
    assert "closed the connection when asked for TLS" in record.message


def replace_cancel(connection: Any, outcome: Exception | None) -> list[tuple[int, int]]:
    """Let the cancel requests of `connection` fail with `outcome`, or never end. Returns the list of the requests."""
    requests: list[tuple[int, int]] = []

    async def cancel(process_id: int, secret_key: int) -> None:
        requests.append((process_id, secret_key))
        if outcome is None:
            await asyncio.Event().wait()
        else:
            raise outcome

    session = session_of(connection)
    assert session is not None
    session.cancel = cancel
    return requests


async def test_a_cancel_request_that_takes_longer_than_command_timeout_terminates_the_connection(
    postgres: LocalPostgres,
) -> None:
    async with connected(postgres, command_timeout=0.3) as connection, asyncio.timeout(HANG):
        pid = connection.get_server_pid()
        requests = replace_cancel(connection, None)
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)")
        await until(connection.is_closed)
        await until(lambda: not connection._cancellations)
        assert [process_id for process_id, _ in requests] == [pid]


async def test_a_defect_in_a_cancel_request_is_reported_and_terminates_the_connection(postgres: LocalPostgres) -> None:
    loop, reported = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: reported.append(context))
    defect = AttributeError("a defect")
    try:
        async with connected(postgres) as connection, asyncio.timeout(HANG):
            replace_cancel(connection, defect)
            with pytest.raises(TimeoutError):
                await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
            await until(connection.is_closed)
            await until(lambda: not connection._cancellations)
    finally:
        loop.set_exception_handler(None)
    assert [context["exception"] for context in reported] == [defect]


async def test_a_connection_that_is_terminated_during_its_cancel_request_leaves_no_task(
    postgres: LocalPostgres,
) -> None:
    async with connected(postgres) as connection, asyncio.timeout(HANG), nothing_is_left():
        requests = replace_cancel(connection, None)
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        await until(lambda: requests)
        connection.terminate()
        await until(lambda: not connection._cancellations)
