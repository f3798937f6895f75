"""`LocalEndpoint` freezes, resets, refuses and delays connections on demand."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import time
from collections.abc import Callable

import pytest
from support.endpoints import a_while, client, clock, has_ended, reply_to_eof, session
from support.probes import HANG, until

import neon_async
from neon_async import ConfigurationError
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

HERD = 200

ENDS = pytest.mark.parametrize("end", [LocalEndpoint.suspend, LocalEndpoint.cut], ids=["suspend", "cut"])


# ---------------------------------------------------------------------------------------------------------------------
# Frozen


async def test_nothing_passes_while_frozen_and_everything_passes_after_thaw(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con, client(endpoint.port) as one:
        await until(lambda: endpoint.connections == 2)
        sent = endpoint.client_bytes
        endpoint.freeze()
        query = asyncio.ensure_future(con.fetchval("SELECT 1"))
        await one.send()
        async with client(endpoint.port) as newcomer:
            await newcomer.send()
            await a_while(postgres)
            assert not query.done()
            assert one.received_nothing()
            assert newcomer.received_nothing()
            assert (endpoint.client_bytes, endpoint.connects, endpoint.connections) == (sent, 3, 3)
            endpoint.thaw()
            assert await query == 1
            assert await one.receive() == b"S"
            assert await newcomer.receive() == b"S"


async def test_an_answer_is_held_while_frozen(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con, session(postgres) as admin:
        state = functools.partial(
            admin.fetchval, "SELECT state FROM pg_stat_activity WHERE pid = $1", con.get_server_pid()
        )
        query = asyncio.ensure_future(con.execute("SELECT pg_sleep(0.1)"))
        while await state() != "active":
            await asyncio.sleep(0.001)
        endpoint.freeze()
        while await state() != "idle":
            await asyncio.sleep(0.001)
        await a_while(postgres)
        assert not query.done()
        endpoint.thaw()
        await query


async def test_delayed_bytes_are_held_beyond_their_due_time(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as near, LocalEndpoint(near, delay=0.1) as far, client(far.port) as one:
        await one.send()
        await until(lambda: far.client_bytes)
        far.freeze()
        async with clock(postgres, 0.4) as later:
            await later()
        assert near.client_bytes == 0
        far.thaw()
        assert await one.receive() == b"S"


async def test_the_close_of_a_client_is_held_while_frozen(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        async with session(endpoint) as con:
            backend = con.get_server_pid()
            endpoint.freeze()
        async with session(postgres) as admin:
            assert await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend) == 1
        assert endpoint.connections == 1
        endpoint.thaw()
        await until(lambda: endpoint.connections == 0)
        await has_ended(postgres, backend)


async def test_the_close_of_the_server_is_held_while_frozen(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        backend = con.get_server_pid()
        endpoint.freeze()
        async with session(postgres) as admin:
            await admin.execute("SELECT pg_terminate_backend($1, 20000)", backend)
        assert not con.is_closed()
        endpoint.thaw()
        await until(con.is_closed)


async def test_a_connect_wakes_it_only_after_thaw(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.0) as endpoint:
        endpoint.suspend()
        endpoint.freeze()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.connects == 1)
            assert (endpoint.state, endpoint.wakes) == ("suspended", 0)
            endpoint.thaw()
            assert await one.ask() == b"S"
            assert (endpoint.state, endpoint.wakes) == ("awake", 1)


async def test_it_is_silent_if_it_wakes_while_frozen(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await one.send()
            await until(lambda: endpoint.state == "waking")
            endpoint.freeze()
            await until(lambda: endpoint.state == "awake")
            await a_while(postgres)
            assert one.received_nothing()
            endpoint.thaw()
            assert await one.receive() == b"S"


@ENDS
async def test_suspend_and_cut_work_while_frozen(postgres: LocalPostgres, end: Callable[[LocalEndpoint], None]) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as one:
        assert await one.ask() == b"S"
        endpoint.freeze()
        end(endpoint)
        assert endpoint.connections == 0
        with contextlib.suppress(ConnectionResetError):
            assert await one.receive() == b""


# ---------------------------------------------------------------------------------------------------------------------
# Cut and refuse


async def test_cut_resets_every_connection_and_does_not_wake_it(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con, client(endpoint.port) as one:
        assert await one.ask() == b"S"
        endpoint.cut()
        assert (endpoint.state, endpoint.connections) == ("awake", 0)
        with pytest.raises(ConnectionResetError):
            await one.receive()
        await until(con.is_closed)
        async with session(endpoint) as another:
            assert await another.fetchval("SELECT 1") == 1
        assert endpoint.wakes == 0


async def test_cut_does_not_stop_a_wake(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.state == "waking")
            endpoint.cut()
            with pytest.raises(ConnectionResetError):
                await one.receive()
        await until(lambda: endpoint.state == "awake")
        assert endpoint.wakes == 1


async def test_refuse_counts_and_resets_new_connections_and_keeps_open_ones(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        endpoint.refuse()
        with pytest.raises(neon_async.ConnectError):
            await neon_async.connect(endpoint.dsn, trust_anchor=endpoint.trust_anchor, sslnegotiation="postgres")
        assert (endpoint.connects, endpoint.connections) == (2, 1)
        assert await con.fetchval("SELECT 1") == 1
        endpoint.accept()
        async with session(endpoint) as another:
            assert await another.fetchval("SELECT 1") == 1


async def test_refuse_keeps_a_connection_that_waits_for_the_wake(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.state == "waking")
            endpoint.refuse()
            await until(lambda: endpoint.state == "awake")
            endpoint.freeze()
            endpoint.thaw()
            assert await one.ask() == b"S"


async def refused(port: int) -> None:
    with pytest.raises(ConnectionError):
        async with client(port) as one:
            await one.receive()


async def test_each_refused_connect_is_counted_and_does_not_wake_it(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        endpoint.suspend()
        endpoint.refuse()
        await asyncio.gather(*(refused(endpoint.port) for _ in range(HERD)))
        await until(lambda: endpoint.connects == HERD)
        assert (endpoint.state, endpoint.wakes, endpoint.connections) == ("suspended", 0, 0)


async def test_a_connect_while_frozen_is_refused_after_thaw(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        endpoint.freeze()
        endpoint.refuse()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.connects == 1)
            assert one.received_nothing()
            endpoint.thaw()
            with pytest.raises(ConnectionResetError):
                await one.receive()


# ---------------------------------------------------------------------------------------------------------------------
# Delay


async def test_each_byte_waits_in_each_direction(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, delay=0.1) as endpoint, client(endpoint.port) as one:
        began = time.monotonic()
        assert await one.ask() == b"S"
        assert time.monotonic() - began >= 0.2


async def test_the_end_of_the_stream_waits_after_the_bytes(postgres: LocalPostgres) -> None:
    reply = await reply_to_eof(postgres)
    async with LocalEndpoint(postgres, delay=0.1) as endpoint, client(endpoint.port) as one:
        began = time.monotonic()
        await one.send()
        one.sock.shutdown(socket.SHUT_WR)
        assert await one.receive_all() == b"S" + reply
        assert time.monotonic() - began >= 0.2


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["postgresql"])
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


async def test_delays_do_not_add_up(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, delay=0.2) as endpoint, client(endpoint.port) as one:
        hello = client_hello()
        assert len(hello) * endpoint.delay > HANG
        for count in range(len(hello)):
            await one.send(hello[count : count + 1])
            await until(lambda wanted=count + 1: endpoint.client_bytes == wanted)  # type: ignore[misc]
        assert (await one.receive()).startswith(b"\x16")  # the server's half of the handshake


async def test_the_delay_can_be_changed_while_connections_are_open(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        for seconds in (0.1, 0.0):
            endpoint.delay = seconds
            began = time.monotonic()
            assert await con.fetchval("SELECT 1") == 1
            assert time.monotonic() - began >= 2 * seconds
        with pytest.raises(ConfigurationError, match=r"delay must be .*, not -1"):
            endpoint.delay = -1
        assert endpoint.delay == 0.0
