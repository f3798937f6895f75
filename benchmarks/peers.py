"""What the benchmarks that compare share: how each client reaches a server, and its pool behind one small interface.

Everybody reaches a server over the same verified TLS, on asyncio's own event loop.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import asyncpg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import neon_async

OURS, ASYNCPG, PSYCOPG, SQLALCHEMY = "neon-async", "asyncpg", "psycopg_pool", "SQLAlchemy on asyncpg"
POOLS = (OURS, ASYNCPG, PSYCOPG, SQLALCHEMY)  # as each is by default

# The same, asked for something else than the default.
OURS_BARE, ASYNCPG_BARE = "neon-async, no reset", "asyncpg, no reset"
ASYNCPG_DIRECT, PSYCOPG_DIRECT = "asyncpg, direct_tls=True", "psycopg_pool, sslnegotiation=direct"
PSYCOPG_AUTOCOMMIT = "psycopg_pool, autocommit"

Item = TypeVar("Item")

# psycopg_pool logs every connect that fails; the numbers tell as much.
logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)


class Server(Protocol):
    """A `LocalPostgres`, or what stands in front of one."""

    @property
    def dsn(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def trust_anchor(self) -> bytes: ...


def dsn_of(server: Server, port: int | None = None, *, password: str | None = None) -> str:
    """Return a DSN that every client understands: `localhost`, no options; `port` is a relay's, if there is one."""
    seed = urlsplit(server.dsn)
    return f"postgresql://{seed.username}:{password or seed.password}@localhost:{port or server.port}{seed.path}"


def verified_context(trust_anchor: bytes) -> ssl.SSLContext:
    """Return a context that verifies in full: what asyncpg does best with is one of these for all dials."""
    context = ssl.create_default_context(cadata=trust_anchor.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["postgresql"])  # PostgreSQL 17 closes a direct TLS connection without it
    return context


# ---------------------------------------------------------------------------------------------------------------------
# The clients


@dataclass(frozen=True, slots=True)
class Client:
    """A pool, by what is measured: taking a connection, a query with all that goes with it, and what it has open."""

    acquire: Callable[[], AbstractAsyncContextManager[object]]
    fetchval: Callable[[str], Awaitable[object]]
    size: Callable[[], int]


class OpenClient(Protocol):
    """Opens an empty pool of at most `size` connections.

    `deadline`: seconds that taking a connection may last, by the pool's own parameter where it has one that covers all
    of it; None for the pool's default.
    """

    def __call__(self, size: int, *, deadline: float | None = None) -> AbstractAsyncContextManager[Client]: ...


@asynccontextmanager
async def our_client(
    create_pool: Callable[..., neon_async.Pool], size: int, *, deadline: float | None = None
) -> AsyncIterator[Client]:
    """Yield a client on our pool."""
    options = {} if deadline is None else {"acquire_timeout": deadline}
    async with create_pool(max_size=size, **options) as pool:
        yield Client(pool.acquire, pool.fetchval, pool.get_size)


@asynccontextmanager
async def asyncpg_client(
    create_pool: Callable[..., Any], size: int, *, deadline: float | None = None
) -> AsyncIterator[Client]:
    """Yield a client on asyncpg's pool."""
    async with create_pool(min_size=0, max_size=size) as pool:

        async def fetchval(query: str) -> object:
            async with pool.acquire(timeout=deadline) as connection:
                return await connection.fetchval(query)

        yield Client(partial(pool.acquire, timeout=deadline), fetchval, pool.get_size)


@asynccontextmanager
async def psycopg_client(
    conninfo: str, size: int, *, deadline: float | None = None, autocommit: bool = False
) -> AsyncIterator[Client]:
    """Yield a client on psycopg_pool."""
    pool = AsyncConnectionPool(
        conninfo, min_size=0, max_size=size, open=False, kwargs={"autocommit": autocommit}, timeout=deadline or 30.0
    )

    async def fetchval(query: str) -> object:
        async with pool.connection() as connection:
            cursor = await connection.execute(query.encode())  # psycopg's types take literal strings only
            row = await cursor.fetchone()
            return row and row[0]

    async with pool:
        yield Client(pool.connection, fetchval, lambda: pool.get_stats()["pool_size"])


@asynccontextmanager
async def sqlalchemy_client(
    url: str, connect_args: dict[str, object], size: int, *, deadline: float | None = None
) -> AsyncIterator[Client]:
    """Yield a client on an engine of SQLAlchemy's, which sets up each new connection with queries of its own."""
    engine = create_async_engine(url, connect_args=connect_args, pool_size=size, max_overflow=0)
    waiting = engine.pool

    @asynccontextmanager
    async def connection_in_time() -> AsyncIterator[Any]:
        # `pool_timeout=` is for waiting in line only, not for the connect.
        async with asyncio.timeout(deadline):
            connection = await engine.connect()
        try:
            yield connection
        finally:
            await connection.close()

    acquire = engine.connect if deadline is None else connection_in_time

    async def fetchval(query: str) -> object:
        async with acquire() as connection:
            return await connection.scalar(text(query))

    try:
        yield Client(acquire, fetchval, lambda: waiting.checkedin() + waiting.checkedout())  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


async def _nothing(_: object) -> None:
    """Reset nothing."""


@contextmanager
def clients_of(
    server: Server, port: int | None = None, *, password: str | None = None
) -> Iterator[dict[str, OpenClient]]:
    """Yield, by name, how to open each client.

    `port`: that of a relay in front of `server`, if there is one. `password`: another one than the server's.
    """
    dsn = dsn_of(server, port, password=password)
    # The others know no hostaddr=. Ours learns from the host name whether it is a pooled one.
    seed, place = urlsplit(server.dsn), urlsplit(dsn)
    own_dsn = seed._replace(netloc=place.netloc.replace("localhost", seed.hostname or "")).geturl()
    with tempfile.TemporaryDirectory() as folder:
        anchor = Path(folder, "root.pem")
        anchor.write_bytes(server.trust_anchor)
        yield _clients(own_dsn, dsn, server.trust_anchor, anchor)


def _clients(own_dsn: str, dsn: str, trust_anchor: bytes, anchor: Path) -> dict[str, OpenClient]:
    context = verified_context(trust_anchor)
    # With gssencmode a machine with a Kerberos ticket would take one flight more.
    libpq = f"{dsn}?sslmode=verify-full&sslrootcert={anchor}&gssencmode=disable"
    url = dsn.replace("postgresql://", "postgresql+asyncpg://")
    ours = partial(neon_async.create_pool, own_dsn, trust_anchor=trust_anchor)
    theirs = partial(asyncpg.create_pool, dsn, ssl=context)
    return {
        OURS: partial(our_client, ours),
        OURS_BARE: partial(our_client, partial(ours, reset=_nothing)),
        ASYNCPG: partial(asyncpg_client, theirs),
        ASYNCPG_BARE: partial(asyncpg_client, partial(theirs, reset=_nothing)),
        ASYNCPG_DIRECT: partial(asyncpg_client, partial(theirs, direct_tls=True)),
        PSYCOPG: partial(psycopg_client, libpq),
        PSYCOPG_AUTOCOMMIT: partial(psycopg_client, libpq, autocommit=True),
        PSYCOPG_DIRECT: partial(psycopg_client, f"{libpq}&sslnegotiation=direct"),
        SQLALCHEMY: partial(sqlalchemy_client, url, {"ssl": context}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Fair conditions


def in_turns(items: Mapping[str, Item], rounds: int) -> Iterator[tuple[int, str, Item]]:
    """Yield the number of the round, from 0, and every item in it, in an order that changes from round to round."""
    order = list(items.items())
    for number in range(rounds):
        turn = number % len(order)
        for name, item in order[turn:] + order[:turn]:
            yield number, name, item


async def open_all(
    stack: AsyncExitStack, candidates: Mapping[str, OpenClient], names: Iterable[str], size: int
) -> dict[str, Client]:
    """Open the clients of these names until `stack` is left, each with all of its `size` connections made."""
    opened = {name: await stack.enter_async_context(candidates[name](size)) for name in names}
    for client in opened.values():
        await fill(client, size)
    return opened


async def fill(client: Client, size: int) -> None:
    """Have the pool make all of its `size` connections, by taking them at once."""
    everybody = asyncio.Barrier(size)

    async def hold() -> None:
        async with client.acquire():
            await everybody.wait()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(size):
            tasks.create_task(hold())
