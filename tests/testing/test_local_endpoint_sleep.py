"""`LocalEndpoint` suspends and wakes as a Neon compute does, on demand and by itself."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from support.endpoints import NEVER, SSL_REQUEST, Elsewhere, a_while, client, clock, has_ended, session
from support.probes import until

from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------------------------------------------------------------------
# Suspended on demand


async def test_suspend_closes_every_connection_on_both_sides(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as one, session(endpoint) as con:
        assert await one.ask() == b"S"
        backend = con.get_server_pid()
        endpoint.suspend()
        assert (endpoint.state, endpoint.connections) == ("suspended", 0)
        assert await one.receive() == b""
        await until(con.is_closed)
        await has_ended(postgres, backend)


async def test_suspend_closes_without_a_reset_even_if_neither_side_has_read_everything(postgres: LocalPostgres) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as talker:
        talker.setblocking(False)
        async with LocalEndpoint(Elsewhere(talker.getsockname()[1])) as endpoint, client(endpoint.port) as one:
            accepted, _ = await loop.sock_accept(talker)
            with accepted:
                talking = asyncio.ensure_future(loop.sock_sendall(accepted, bytes(64_000_000)))
                await until(lambda: not one.received_nothing())
                full = 0
                while full < 50:  # every buffer between the two is full and stays full
                    writable = select.select([], [accepted], [], 0)[1]
                    full = 0 if writable else full + 1
                    await asyncio.sleep(0.001)
                endpoint.freeze()
                await one.send(bytes(100_000))
                endpoint.suspend()
                with pytest.raises(ConnectionError):  # the server's side is closed, too
                    await talking
            received = 0
            while data := await one.receive():
                received += len(data)
            assert received > 1_000_000


async def test_suspend_ends_a_running_query_with_the_error_that_neon_leads_to(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        query = asyncio.ensure_future(con.execute("SELECT pg_sleep(1)"))
        sent = endpoint.client_bytes
        await until(lambda: endpoint.client_bytes > sent)
        endpoint.suspend()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await query


async def test_the_next_connect_wakes_it(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.2) as endpoint:
        endpoint.suspend()
        began = time.monotonic()
        async with session(endpoint) as con:
            assert await con.fetchval("SELECT 1") == 1
            assert time.monotonic() - began >= 0.2
            assert (endpoint.state, endpoint.wakes, endpoint.connects) == ("awake", 1, 1)
        async with session(endpoint):
            assert endpoint.wakes == 1
        endpoint.suspend()
        async with session(endpoint):
            assert endpoint.wakes == 2


async def test_no_byte_passes_while_it_wakes(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=NEVER) as endpoint, client(endpoint.port) as before:
        assert await before.ask() == b"S"
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await one.send()
            await until(lambda: endpoint.state == "waking")
            await a_while(postgres)
            assert one.received_nothing()
            assert endpoint.client_bytes == len(SSL_REQUEST)
            assert (endpoint.connections, endpoint.wakes) == (1, 1)


async def test_many_connects_wake_it_once_and_are_all_served(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.2) as endpoint, contextlib.AsyncExitStack() as stack:
        endpoint.suspend()
        herd = [await stack.enter_async_context(client(endpoint.port)) for _ in range(30)]
        await until(lambda: endpoint.connects == 30)
        assert await asyncio.gather(*(one.ask() for one in herd)) == [b"S"] * 30
        assert endpoint.wakes == 1


async def test_it_wakes_even_if_the_client_that_woke_it_has_closed(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port):
            await until(lambda: endpoint.state == "waking")
        await until(lambda: endpoint.state == "awake" and endpoint.connections == 0)
        assert endpoint.wakes == 1


async def test_suspend_during_a_wake_closes_the_connections_that_wait(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.state == "waking")
            endpoint.suspend()
            assert await one.receive() == b""
        async with client(endpoint.port) as one:
            assert await one.ask() == b"S"
        assert endpoint.wakes == 2


async def test_suspend_stops_a_wake(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint, clock(postgres, 0.2) as later:
        endpoint.suspend()
        async with client(endpoint.port):
            await until(lambda: endpoint.state == "waking")
        endpoint.suspend()
        await later()
        assert endpoint.state == "suspended"


async def test_it_stays_suspended_without_a_connect(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.0) as endpoint, session(endpoint) as con:
        endpoint.suspend()
        await until(con.is_closed)
        await a_while(postgres)
        assert (endpoint.state, endpoint.wakes, endpoint.connects) == ("suspended", 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Suspended by itself


async def test_it_suspends_after_the_given_time_without_activity(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.0, suspend_after=0.3) as endpoint:
        await until(lambda: endpoint.state == "suspended")
        began = time.monotonic()
        async with client(endpoint.port) as one:
            assert await one.receive() == b""
            assert time.monotonic() - began >= 0.3
            assert (endpoint.state, endpoint.wakes) == ("suspended", 1)


async def speak(endpoint: LocalEndpoint, con: Any) -> None:
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError):  # it was suspended; the test reports it
        await con.execute("SELECT 1")


async def connect_once(endpoint: LocalEndpoint, con: Any) -> None:
    async with client(endpoint.port):
        pass


@pytest.mark.parametrize("activity", [speak, connect_once])
async def test_bytes_and_connects_of_clients_keep_it_awake(
    postgres: LocalPostgres, activity: Callable[[LocalEndpoint, Any], Any]
) -> None:
    async with LocalEndpoint(postgres, suspend_after=0.3) as endpoint, session(endpoint) as con:
        began = last = time.monotonic()
        longest = 0.0
        while time.monotonic() - began < 0.8 and longest < 0.2:  # a machine that stalls cannot show anything
            await activity(endpoint, con)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert (endpoint.state, con.is_closed()) == ("awake", False) or longest >= 0.2


async def test_it_does_not_suspend_by_itself_without_suspend_after(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, clock(postgres, 0.05) as later:
        await later()
        assert endpoint.state == "awake"


async def test_it_does_not_suspend_by_itself_while_frozen(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, suspend_after=0.05) as endpoint, clock(postgres, 0.2) as later:
        endpoint.freeze()
        await later()
        assert endpoint.state == "awake"
        endpoint.thaw()
        await until(lambda: endpoint.state == "suspended")
