"""What the tests of `LocalEndpoint` share: clients without a driver, sessions, and waits for a server or a time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres
from support.probes import HANG, until

NEVER = 100 * HANG
SSL_REQUEST = struct.pack("!ii", 8, 80877103)  # a server answers S and then waits for TLS
DECODE_ERROR = bytes.fromhex("15 0303 0002 02 32")  # a TLS record with one alert


class Client:
    """A TCP connection without a driver, so that only the test sends and closes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def send(self, data: bytes = SSL_REQUEST) -> None:
        """Send `data`."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> bytes:
        """Return the next bytes, or no bytes at the end of the stream."""
        async with asyncio.timeout(HANG):
            return await asyncio.get_running_loop().sock_recv(self.sock, 65536)

    async def receive_all(self) -> bytes:
        """Return all bytes up to the end of the stream."""
        received = b""
        while data := await self.receive():
            received += data
        return received

    async def ask(self) -> bytes:
        """Send an SSLRequest and return the answer."""
        await self.send()
        return await self.receive()

    def received_nothing(self) -> bool:
        """Return whether there is no byte, no end and no reset to read."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False


@contextlib.asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    """Yield a new TCP connection to `port`."""
    with socket.socket() as sock:
        sock.setblocking(False)
        async with asyncio.timeout(HANG):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        yield Client(sock)


@contextlib.asynccontextmanager
async def session(server: LocalEndpoint | LocalPostgres) -> AsyncIterator[Any]:
    """Yield a connection of neon_async to `server`."""
    async with asyncio.timeout(HANG):
        connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        try:
            yield connection
        finally:
            connection.terminate()


async def reply_to_eof(postgres: LocalPostgres) -> bytes:
    """Return what the server sends if the stream ends where it expects a TLS handshake, before it closes.

    PostgreSQL 18 sends an alert: fatal, decode_error (RFC 8446, section 6). Earlier versions send nothing.
    """
    async with session(postgres) as connection:
        return DECODE_ERROR if connection.get_server_version().major >= 18 else b""


@dataclass(frozen=True)
class Elsewhere:
    """A server that is not PostgreSQL, or a port without a server."""

    port: int
    dsn: str = "postgresql://localhost/db"
    trust_anchor: bytes = b""


async def a_while(postgres: LocalPostgres) -> None:
    """Wait as long as several round trips to the server take."""
    for _ in range(5):
        async with client(postgres.port) as other:
            assert await other.ask() == b"S"


@contextlib.asynccontextmanager
async def clock(postgres: LocalPostgres, seconds: float) -> AsyncIterator[Callable[[], Any]]:
    """Yield a function that waits until `seconds` have passed: until another endpoint has suspended by itself."""
    async with LocalEndpoint(postgres, suspend_after=seconds) as other:
        yield lambda: until(lambda: other.state == "suspended")


async def has_ended(postgres: LocalPostgres, backend: int) -> None:
    """Wait until the server process `backend` has ended."""
    async with session(postgres) as admin:
        while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend):
            await asyncio.sleep(0.01)
