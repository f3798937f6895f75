"""`LocalEndpoint` relays every byte while it is awake, and leaves nothing when its block is left."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import socket
from collections.abc import Callable
from typing import Any

import pytest
from support.endpoints import NEVER, SSL_REQUEST, Client, Elsewhere, a_while, client, has_ended, reply_to_eof, session
from support.probes import nothing_is_left, until

import neon_async
from neon_async import ConfigurationError
from neon_async.testing import LocalEndpoint, LocalEndpointError, LocalPostgres

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------------------------------------------------------------------
# The relay


async def test_tls_is_end_to_end(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        report = neon_async.connection_tls_report(con)
        assert report.version == "TLSv1.3"
        assert report.server_name == endpoint.host == postgres.host
        assert await con.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")


async def test_a_slow_reader_receives_every_byte(postgres: LocalPostgres) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as talker:
        talker.setblocking(False)
        async with LocalEndpoint(Elsewhere(talker.getsockname()[1])) as endpoint, client(endpoint.port) as one:
            accepted, _ = await loop.sock_accept(talker)
            with accepted:
                talking = asyncio.ensure_future(loop.sock_sendall(accepted, sent := secrets.token_bytes(20_000_000)))
                await until(lambda: not one.received_nothing())
                await a_while(postgres)  # until every buffer between the two is full
                assert not talking.done()
                received = bytearray()
                while len(received) < len(sent) and (data := await one.receive()):
                    received += data
                await talking
            assert received == sent


@pytest.mark.parametrize("delay", [0.0, 0.003])
async def test_every_byte_arrives_in_order(postgres: LocalPostgres, delay: float) -> None:
    sent = secrets.token_bytes(5_000_000)
    async with LocalEndpoint(postgres, delay=delay) as endpoint, session(endpoint) as con:
        assert await con.fetchval("SELECT $1::bytea", sent) == sent
        assert endpoint.client_bytes > len(sent)


async def test_it_can_replace_the_server_of_another_endpoint(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as near, LocalEndpoint(near) as far, session(far) as con:
        assert await con.fetchval("SELECT 1") == 1
        assert far.dsn == postgres.dsn.replace(f":{postgres.port}/", f":{far.port}/")
        assert (near.connects, far.connects, near.wakes, far.wakes) == (1, 1, 0, 0)


async def test_a_dsn_without_a_port_keeps_its_host_and_its_password(postgres: LocalPostgres) -> None:
    server = Elsewhere(postgres.port, dsn="postgresql://me:5432@ep.neon.tech/db?hostaddr=127.0.0.1")
    async with LocalEndpoint(server) as endpoint:
        assert endpoint.dsn == f"postgresql://me:5432@ep.neon.tech:{endpoint.port}/db?hostaddr=127.0.0.1"
        assert endpoint.host == "ep.neon.tech"


async def test_a_cancel_request_reaches_the_server(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        with pytest.raises(TimeoutError):
            await con.execute(f"SELECT pg_sleep({NEVER})", timeout=0.1)
        assert await con.fetchval("SELECT 1") == 1
        assert endpoint.connects == 2


async def test_only_the_bytes_of_clients_are_counted(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as idle, client(endpoint.port) as speaking:
        assert await speaking.ask() == b"S"
        assert idle.received_nothing()
        assert endpoint.client_bytes == len(SSL_REQUEST)
        assert (endpoint.connects, endpoint.connections) == (2, 2)


async def test_a_client_that_closes_ends_its_server_process(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        async with session(endpoint) as con:
            backend = con.get_server_pid()
        await until(lambda: endpoint.connections == 0)
        await has_ended(postgres, backend)


async def test_the_end_of_one_direction_leaves_the_other_direction_open(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as one:
        await one.send()
        one.sock.shutdown(socket.SHUT_WR)
        assert await one.receive_all() == b"S" + await reply_to_eof(postgres)
        await until(lambda: endpoint.connections == 0)


async def test_a_reset_is_passed_on(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as near, LocalEndpoint(near) as far, client(far.port) as one:
        assert await one.ask() == b"S"
        near.cut()
        with pytest.raises(ConnectionResetError):
            await one.receive()
        await until(lambda: far.connections == 0)


async def test_a_client_is_reset_if_the_server_is_down() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with LocalEndpoint(Elsewhere(unused.getsockname()[1])) as endpoint, client(endpoint.port) as one:
            with pytest.raises(ConnectionResetError):
                await one.receive()
            assert endpoint.connections == 0


async def test_a_sender_waits_when_too_many_bytes_are_held(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, delay=NEVER) as endpoint, client(endpoint.port) as one:
        sending = asyncio.ensure_future(one.send(bytes(64_000_000)))
        await until(lambda: endpoint.client_bytes >= 1_000_000)
        await a_while(postgres)
        assert endpoint.client_bytes < 2_000_000
        assert not sending.done()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------------------
# The object


async def do_nothing(endpoint: LocalEndpoint, one: Client) -> None:
    pass


async def freeze(endpoint: LocalEndpoint, one: Client) -> None:
    endpoint.freeze()
    await one.send()


async def wake(endpoint: LocalEndpoint, one: Client) -> None:
    endpoint.suspend()
    async with client(endpoint.port):
        await until(lambda: endpoint.state == "waking")


async def talk(endpoint: LocalEndpoint, one: Client) -> None:
    assert await one.ask() == b"S"


async def flood(endpoint: LocalEndpoint, one: Client) -> None:
    endpoint.delay = NEVER
    await one.send(bytes(500_000))


@pytest.mark.parametrize("before", [do_nothing, talk, freeze, wake, flood])
@pytest.mark.parametrize("suspend_after", [None, NEVER], ids=["", "suspend_after"])
async def test_no_socket_and_no_task_is_left(
    postgres: LocalPostgres,
    before: Callable[[LocalEndpoint, Client], Any],
    suspend_after: float | None,
) -> None:
    async with nothing_is_left(), contextlib.AsyncExitStack() as clients:
        async with LocalEndpoint(postgres, wake_time=NEVER, suspend_after=suspend_after) as endpoint:
            one = await clients.enter_async_context(client(endpoint.port))
            await before(endpoint, one)
        assert endpoint.connections == 0
        await until(lambda: not one.received_nothing())


async def test_the_port_is_free_afterwards(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        port = endpoint.port
    with pytest.raises(ConnectionRefusedError):
        async with client(port):
            pass


async def test_the_repr_shows_the_state(postgres: LocalPostgres) -> None:
    endpoint = LocalEndpoint(postgres, wake_time=NEVER)
    assert repr(endpoint) == "<LocalEndpoint: new>"
    async with endpoint:
        place = f"<LocalEndpoint on 127.0.0.1:{endpoint.port}: "
        assert repr(endpoint) == place + "awake, 0 connections, 0 wakes>"
        endpoint.suspend()
        async with client(endpoint.port), client(endpoint.port):
            await until(lambda: endpoint.connections == 2)
            assert repr(endpoint) == place + "waking, 2 connections, 1 wake>"
        endpoint.cut()
        endpoint.suspend()
        endpoint.freeze()
        endpoint.refuse()
        assert repr(endpoint) == place + "suspended, frozen, refusing, 0 connections, 1 wake>"
        endpoint.accept()
        endpoint.thaw()
    assert repr(endpoint) == place + "closed, 0 connections, 1 wake>"


METHODS: list[Callable[[LocalEndpoint], object]] = [
    LocalEndpoint.suspend,
    LocalEndpoint.cut,
    LocalEndpoint.freeze,
    LocalEndpoint.thaw,
    LocalEndpoint.refuse,
    LocalEndpoint.accept,
    lambda endpoint: endpoint.port,
    lambda endpoint: endpoint.dsn,
]


@pytest.mark.parametrize("use", METHODS)
async def test_it_can_be_used_only_inside_its_block(
    postgres: LocalPostgres, use: Callable[[LocalEndpoint], object]
) -> None:
    endpoint = LocalEndpoint(postgres)
    with pytest.raises(LocalEndpointError, match="async with"):
        use(endpoint)
    async with endpoint:
        use(endpoint)
    with pytest.raises(LocalEndpointError, match="Create a new one"):
        use(endpoint)
    with pytest.raises(LocalEndpointError, match="entered only once"):
        await endpoint.__aenter__()


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf, "1", True])
@pytest.mark.parametrize("name", ["wake_time", "suspend_after", "delay"])
def test_a_time_that_is_negative_or_not_finite_or_no_number_is_refused(name: str, seconds: Any) -> None:
    keywords: dict[str, Any] = {name: seconds}
    with pytest.raises(ConfigurationError, match=f"{name} must be a number of seconds .*, not {seconds!r}"):
        LocalEndpoint(Elsewhere(1), **keywords)


def test_suspend_after_0_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"suspend_after must be a number of seconds above 0 .*, not 0"):
        LocalEndpoint(Elsewhere(1), suspend_after=0)
