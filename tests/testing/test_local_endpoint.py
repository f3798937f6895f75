"""`LocalEndpoint` in front of a real PostgreSQL: what clients see of sleep, wake and trouble, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import secrets
import select
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, nothing_is_left, until

import neon_async
from neon_async import ConfigurationError
from neon_async.testing import LocalEndpoint, LocalEndpointError, LocalPostgres

pytestmark = pytest.mark.anyio

NEVER = 100 * HANG
SSL_REQUEST = struct.pack("!ii", 8, 80877103)  # a server answers S, and waits for TLS
HERD = 200

ENDS = pytest.mark.parametrize("end", [LocalEndpoint.suspend, LocalEndpoint.cut], ids=["suspend", "cut"])


class Client:
    """A TCP connection without a driver, so that nothing is sent or closed but by the test."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def send(self, data: bytes = SSL_REQUEST) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> bytes:
        async with asyncio.timeout(HANG):
            return await asyncio.get_running_loop().sock_recv(self.sock, 65536)

    async def ask(self) -> bytes:
        await self.send()
        return await self.receive()

    def hears_nothing(self) -> bool:
        """Tell whether there is neither a byte nor an end nor a reset to read."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False


@contextlib.asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    with socket.socket() as sock:
        sock.setblocking(False)
        async with asyncio.timeout(HANG):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        yield Client(sock)


@contextlib.asynccontextmanager
async def session(server: LocalEndpoint | LocalPostgres) -> AsyncIterator[Any]:
    async with asyncio.timeout(HANG):
        connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        try:
            yield connection
        finally:
            connection.terminate()


@dataclass(frozen=True)
class Elsewhere:
    """A server that is no PostgreSQL, or none at all."""

    port: int
    dsn: str = "postgresql://localhost/db"
    trust_anchor: bytes = b""


async def a_while(postgres: LocalPostgres) -> None:
    """Let as much time pass as several round trips with the server take."""
    for _ in range(5):
        async with client(postgres.port) as other:
            assert await other.ask() == b"S"


@contextlib.asynccontextmanager
async def clock(postgres: LocalPostgres, seconds: float) -> AsyncIterator[Callable[[], Any]]:
    """What returns when another endpoint, made now, has suspended by itself after `seconds`."""
    async with LocalEndpoint(postgres, suspend_after=seconds) as other:
        yield lambda: until(lambda: other.state == "suspended")


async def is_gone(postgres: LocalPostgres, backend: int) -> None:
    async with session(postgres) as admin:
        while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend):
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Awake


async def test_tls_is_end_to_end(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        report = neon_async.connection_tls_report(con)
        assert report.version == "TLSv1.3"
        assert report.server_name == endpoint.host == postgres.host
        assert await con.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")


async def test_a_slow_reader_misses_nothing(postgres: LocalPostgres) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as talker:
        talker.setblocking(False)
        async with LocalEndpoint(Elsewhere(talker.getsockname()[1])) as endpoint, client(endpoint.port) as one:
            accepted, _ = await loop.sock_accept(talker)
            with accepted:
                talking = asyncio.ensure_future(loop.sock_sendall(accepted, sent := secrets.token_bytes(20_000_000)))
                await until(lambda: not one.hears_nothing())
                await a_while(postgres)  # until everything between the two is full
                assert not talking.done()
                received = bytearray()
                while len(received) < len(sent) and (data := await one.receive()):
                    received += data
                await talking
            assert received == sent


@pytest.mark.parametrize("delay", [0.0, 0.003])
async def test_every_byte_arrives_in_its_order(postgres: LocalPostgres, delay: float) -> None:
    sent = secrets.token_bytes(5_000_000)
    async with LocalEndpoint(postgres, delay=delay) as endpoint, session(endpoint) as con:
        assert await con.fetchval("SELECT $1::bytea", sent) == sent
        assert endpoint.client_bytes > len(sent)


async def test_it_stands_wherever_the_server_stands(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as near, LocalEndpoint(near) as far, session(far) as con:
        assert await con.fetchval("SELECT 1") == 1
        assert far.dsn == postgres.dsn.replace(f":{postgres.port}/", f":{far.port}/")
        assert (near.connects, far.connects, near.wakes, far.wakes) == (1, 1, 0, 0)


async def test_the_name_and_the_password_of_a_dsn_without_a_port_stay(postgres: LocalPostgres) -> None:
    server = Elsewhere(postgres.port, dsn="postgresql://me:5432@ep.neon.tech/db?hostaddr=127.0.0.1")
    async with LocalEndpoint(server) as endpoint:
        assert endpoint.dsn == f"postgresql://me:5432@ep.neon.tech:{endpoint.port}/db?hostaddr=127.0.0.1"
        assert endpoint.host == "ep.neon.tech"


async def test_a_cancel_request_goes_through(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        with pytest.raises(TimeoutError):
            await con.execute(f"SELECT pg_sleep({NEVER})", timeout=0.1)
        assert await con.fetchval("SELECT 1") == 1
        assert endpoint.connects == 2


async def test_bytes_of_clients_are_counted_and_silence_is_not(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as idle, client(endpoint.port) as speaking:
        assert await speaking.ask() == b"S"
        assert idle.hears_nothing()
        assert endpoint.client_bytes == len(SSL_REQUEST)
        assert (endpoint.connects, endpoint.connections) == (2, 2)


async def test_a_client_that_closes_is_closed_to_the_server(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        async with session(endpoint) as con:
            backend = con.get_server_pid()
        await until(lambda: endpoint.connections == 0)
        await is_gone(postgres, backend)


async def test_the_end_of_one_direction_leaves_the_other_open(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as one:
        await one.send()
        one.sock.shutdown(socket.SHUT_WR)
        assert await one.receive() == b"S"
        assert await one.receive() == b""
        await until(lambda: endpoint.connections == 0)


async def test_a_reset_is_passed_on(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as near, LocalEndpoint(near) as far, client(far.port) as one:
        assert await one.ask() == b"S"
        near.cut()
        with pytest.raises(ConnectionResetError):
            await one.receive()
        await until(lambda: far.connections == 0)


async def test_where_the_server_is_down_a_client_is_reset() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with LocalEndpoint(Elsewhere(nobody.getsockname()[1])) as endpoint, client(endpoint.port) as one:
            with pytest.raises(ConnectionResetError):
                await one.receive()
            assert endpoint.connections == 0


async def test_a_sender_waits_when_much_is_held(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, delay=NEVER) as endpoint, client(endpoint.port) as one:
        sending = asyncio.ensure_future(one.send(bytes(64_000_000)))
        await until(lambda: endpoint.client_bytes >= 1_000_000)
        await a_while(postgres)
        assert endpoint.client_bytes < 2_000_000
        assert not sending.done()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------------------
# Sleep and wake


async def test_suspend_ends_every_connection_on_both_sides(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as one, session(endpoint) as con:
        assert await one.ask() == b"S"
        backend = con.get_server_pid()
        endpoint.suspend()
        assert (endpoint.state, endpoint.connections) == ("suspended", 0)
        assert await one.receive() == b""
        await until(con.is_closed)
        await is_gone(postgres, backend)


async def test_suspend_is_no_reset_though_neither_side_has_read_all(postgres: LocalPostgres) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as talker:
        talker.setblocking(False)
        async with LocalEndpoint(Elsewhere(talker.getsockname()[1])) as endpoint, client(endpoint.port) as one:
            accepted, _ = await loop.sock_accept(talker)
            with accepted:
                talking = asyncio.ensure_future(loop.sock_sendall(accepted, bytes(64_000_000)))
                await until(lambda: not one.hears_nothing())
                full = 0
                while full < 50:  # everything between the two, and it stays so
                    writable = select.select([], [accepted], [], 0)[1]
                    full = 0 if writable else full + 1
                    await asyncio.sleep(0.001)
                endpoint.freeze()
                await one.send(bytes(100_000))
                endpoint.suspend()
                with pytest.raises(ConnectionError):  # the server's side is closed, too, and tells it
                    await talking
            received = 0
            while data := await one.receive():
                received += len(data)
            assert received > 1_000_000


async def test_a_query_on_its_way_ends_as_on_neon(postgres: LocalPostgres) -> None:
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


async def test_nothing_passes_while_it_wakes(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=NEVER) as endpoint, client(endpoint.port) as before:
        assert await before.ask() == b"S"
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await one.send()
            await until(lambda: endpoint.state == "waking")
            await a_while(postgres)
            assert one.hears_nothing()
            assert endpoint.client_bytes == len(SSL_REQUEST)
            assert (endpoint.connections, endpoint.wakes) == (1, 1)


async def test_a_herd_wakes_it_once_and_is_let_through(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.2) as endpoint, contextlib.AsyncExitStack() as stack:
        endpoint.suspend()
        herd = [await stack.enter_async_context(client(endpoint.port)) for _ in range(30)]
        await until(lambda: endpoint.connects == 30)
        assert await asyncio.gather(*(one.ask() for one in herd)) == [b"S"] * 30
        assert endpoint.wakes == 1


async def test_it_wakes_though_the_client_that_woke_it_has_gone(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port):
            await until(lambda: endpoint.state == "waking")
        await until(lambda: endpoint.state == "awake" and endpoint.connections == 0)
        assert endpoint.wakes == 1


async def test_suspend_while_it_wakes_ends_those_who_wait(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.state == "waking")
            endpoint.suspend()
            assert await one.receive() == b""
        async with client(endpoint.port) as one:
            assert await one.ask() == b"S"
        assert endpoint.wakes == 2


async def test_a_wake_that_was_broken_off_never_comes(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint, clock(postgres, 0.2) as later:
        endpoint.suspend()
        async with client(endpoint.port):
            await until(lambda: endpoint.state == "waking")
        endpoint.suspend()
        await later()
        assert endpoint.state == "suspended"


async def test_a_suspended_one_stays_so_while_nobody_comes(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.0) as endpoint, session(endpoint) as con:
        endpoint.suspend()
        await until(con.is_closed)
        await a_while(postgres)
        assert (endpoint.state, endpoint.wakes, endpoint.connects) == ("suspended", 0, 1)


# By itself


async def test_silence_suspends_it(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.0, suspend_after=0.3) as endpoint:
        await until(lambda: endpoint.state == "suspended")
        began = time.monotonic()
        async with client(endpoint.port) as one:
            assert await one.receive() == b""
            assert time.monotonic() - began >= 0.3
            assert (endpoint.state, endpoint.wakes) == ("suspended", 1)


async def speak(endpoint: LocalEndpoint, con: Any) -> None:
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError):  # it was suspended; the test tells
        await con.execute("SELECT 1")


async def knock(endpoint: LocalEndpoint, con: Any) -> None:
    async with client(endpoint.port):
        pass


@pytest.mark.parametrize("sign_of_life", [speak, knock])
async def test_a_client_that_gives_a_sign_of_life_keeps_it_awake(
    postgres: LocalPostgres, sign_of_life: Callable[[LocalEndpoint, Any], Any]
) -> None:
    async with LocalEndpoint(postgres, suspend_after=0.3) as endpoint, session(endpoint) as con:
        began = last = time.monotonic()
        longest = 0.0
        while time.monotonic() - began < 0.8 and longest < 0.2:  # on a machine that stalls, nothing can be shown
            await sign_of_life(endpoint, con)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert (endpoint.state, con.is_closed()) == ("awake", False) or longest >= 0.2


async def test_it_never_suspends_by_itself_without_being_asked_to(postgres: LocalPostgres) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Frozen


async def test_nothing_moves_while_frozen_and_all_of_it_afterwards(postgres: LocalPostgres) -> None:
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
            assert one.hears_nothing()
            assert newcomer.hears_nothing()
            assert (endpoint.client_bytes, endpoint.connects, endpoint.connections) == (sent, 3, 3)
            endpoint.thaw()
            assert await query == 1
            assert await one.receive() == b"S"
            assert await newcomer.receive() == b"S"


async def test_an_answer_on_its_way_is_held(postgres: LocalPostgres) -> None:
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


async def test_what_waits_for_its_time_is_held_beyond_it(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as near, LocalEndpoint(near, delay=0.1) as far, client(far.port) as one:
        await one.send()
        await until(lambda: far.client_bytes)
        far.freeze()
        async with clock(postgres, 0.4) as later:
            await later()
        assert near.client_bytes == 0
        far.thaw()
        assert await one.receive() == b"S"


async def test_the_end_of_a_client_is_held(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        async with session(endpoint) as con:
            backend = con.get_server_pid()
            endpoint.freeze()
        async with session(postgres) as admin:
            assert await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend) == 1
        assert endpoint.connections == 1
        endpoint.thaw()
        await until(lambda: endpoint.connections == 0)
        await is_gone(postgres, backend)


async def test_the_end_of_a_server_is_held(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        backend = con.get_server_pid()
        endpoint.freeze()
        async with session(postgres) as admin:
            await admin.execute("SELECT pg_terminate_backend($1, 20000)", backend)
        assert not con.is_closed()
        endpoint.thaw()
        await until(con.is_closed)


async def test_a_connect_wakes_it_only_when_it_has_thawed(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.0) as endpoint:
        endpoint.suspend()
        endpoint.freeze()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.connects == 1)
            assert (endpoint.state, endpoint.wakes) == ("suspended", 0)
            endpoint.thaw()
            assert await one.ask() == b"S"
            assert (endpoint.state, endpoint.wakes) == ("awake", 1)


async def test_awake_and_frozen_is_silent(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await one.send()
            await until(lambda: endpoint.state == "waking")
            endpoint.freeze()
            await until(lambda: endpoint.state == "awake")
            await a_while(postgres)
            assert one.hears_nothing()
            endpoint.thaw()
            assert await one.receive() == b"S"


@ENDS
async def test_a_frozen_one_can_be_ended(postgres: LocalPostgres, end: Callable[[LocalEndpoint], None]) -> None:
    async with LocalEndpoint(postgres) as endpoint, client(endpoint.port) as one:
        assert await one.ask() == b"S"
        endpoint.freeze()
        end(endpoint)
        assert endpoint.connections == 0
        with contextlib.suppress(ConnectionResetError):
            assert await one.receive() == b""


# ---------------------------------------------------------------------------------------------------------------------
# Cut and refusing


async def test_cut_resets_every_connection_and_wakes_nothing(postgres: LocalPostgres) -> None:
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


async def test_cut_while_it_wakes_lets_it_wake(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, wake_time=0.05) as endpoint:
        endpoint.suspend()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.state == "waking")
            endpoint.cut()
            with pytest.raises(ConnectionResetError):
                await one.receive()
        await until(lambda: endpoint.state == "awake")
        assert endpoint.wakes == 1


async def test_newcomers_are_refused_and_counted_while_open_connections_stay(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        endpoint.refuse()
        with pytest.raises(neon_async.ConnectError):
            await neon_async.connect(endpoint.dsn, trust_anchor=endpoint.trust_anchor, sslnegotiation="postgres")
        assert (endpoint.connects, endpoint.connections) == (2, 1)
        assert await con.fetchval("SELECT 1") == 1
        endpoint.accept()
        async with session(endpoint) as another:
            assert await another.fetchval("SELECT 1") == 1


async def test_who_was_let_in_stays_when_newcomers_are_refused(postgres: LocalPostgres) -> None:
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


async def test_each_of_a_herd_is_counted_and_none_wakes_it(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        endpoint.suspend()
        endpoint.refuse()
        await asyncio.gather(*(refused(endpoint.port) for _ in range(HERD)))
        await until(lambda: endpoint.connects == HERD)
        assert (endpoint.state, endpoint.wakes, endpoint.connections) == ("suspended", 0, 0)


async def test_who_came_while_frozen_is_refused_when_it_thaws(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        endpoint.freeze()
        endpoint.refuse()
        async with client(endpoint.port) as one:
            await until(lambda: endpoint.connects == 1)
            assert one.hears_nothing()
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


async def test_the_end_of_the_stream_waits_behind_the_bytes(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres, delay=0.1) as endpoint, client(endpoint.port) as one:
        began = time.monotonic()
        await one.send()
        one.sock.shutdown(socket.SHUT_WR)
        assert await one.receive() == b"S"
        assert await one.receive() == b""
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
        assert (await one.receive()).startswith(b"\x16")  # its own half of the handshake


async def test_the_delay_can_be_changed_under_way(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, session(endpoint) as con:
        for seconds in (0.1, 0.0):
            endpoint.delay = seconds
            began = time.monotonic()
            assert await con.fetchval("SELECT 1") == 1
            assert time.monotonic() - began >= 2 * seconds
        with pytest.raises(ConfigurationError, match="delay=-1"):
            endpoint.delay = -1
        assert endpoint.delay == 0.0


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
async def test_nothing_is_left(
    postgres: LocalPostgres,
    before: Callable[[LocalEndpoint, Client], Any],
    suspend_after: float | None,
) -> None:
    async with nothing_is_left(), contextlib.AsyncExitStack() as clients:
        async with LocalEndpoint(postgres, wake_time=NEVER, suspend_after=suspend_after) as endpoint:
            one = await clients.enter_async_context(client(endpoint.port))
            await before(endpoint, one)
        assert endpoint.connections == 0
        await until(lambda: not one.hears_nothing())


async def test_the_port_is_free_afterwards(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        port = endpoint.port
    with pytest.raises(ConnectionRefusedError):
        async with client(port):
            pass


async def test_its_repr_tells_its_state(postgres: LocalPostgres) -> None:
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
async def test_it_is_used_inside_of_its_block_only(
    postgres: LocalPostgres, use: Callable[[LocalEndpoint], object]
) -> None:
    endpoint = LocalEndpoint(postgres)
    with pytest.raises(LocalEndpointError, match="async with"):
        use(endpoint)
    async with endpoint:
        use(endpoint)
    with pytest.raises(LocalEndpointError, match="make another one"):
        use(endpoint)
    with pytest.raises(LocalEndpointError, match="entered once"):
        await endpoint.__aenter__()


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["wake_time", "suspend_after", "delay"])
def test_a_time_that_is_none_is_refused(name: str, seconds: float) -> None:
    keywords: dict[str, Any] = {name: seconds}
    with pytest.raises(ConfigurationError, match=f"{name}={seconds}"):
        LocalEndpoint(Elsewhere(1), **keywords)


def test_suspending_at_once_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="suspend_after=0"):
        LocalEndpoint(Elsewhere(1), suspend_after=0)
