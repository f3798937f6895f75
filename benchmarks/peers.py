"""Give every client that is compared the same small interface, and the same verified TLS to the same server.

This module must not know what is measured. Of neon_async it uses the public names only.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import asyncpg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import neon_async

OURS, ASYNCPG, PSYCOPG, SQLALCHEMY = "neon-async", "asyncpg", "psycopg_pool", "SQLAlchemy on asyncpg"
POOLS = (OURS, ASYNCPG, PSYCOPG, SQLALCHEMY)  # with their defaults

# The same pools without their defaults.
OURS_BARE, ASYNCPG_BARE = "neon-async, no reset", "asyncpg, no reset"
ASYNCPG_DIRECT, PSYCOPG_DIRECT = "asyncpg, direct_tls=True", "psycopg_pool, sslnegotiation=direct"
PSYCOPG_AUTOCOMMIT = "psycopg_pool, autocommit"

# psycopg_pool logs every connect that fails; the numbers contain that.
logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)


class Server(Protocol):
    """A `LocalPostgres`, or a relay or PgBouncer in front of one."""

    @property
    def dsn(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def trust_anchor(self) -> bytes: ...


def dsn_of(server: Server, port: int | None = None, *, password: str | None = None) -> str:
    """Return a DSN that every client understands, with `localhost` and without options.

    Args:
        server: The server.
        port: The port of a relay in front of the server. None (the default): the server's own.
        password: Another password than the server's.
    """
    seed = urlsplit(server.dsn)
    return f"postgresql://{seed.username}:{password or seed.password}@localhost:{port or server.port}{seed.path}"


def verified_context(trust_anchor: bytes) -> ssl.SSLContext:
    """Return a TLS context that verifies in full. asyncpg is fastest with one such context for all dials."""
    context = ssl.create_default_context(cadata=trust_anchor.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["postgresql"])  # without it PostgreSQL 17 closes a direct TLS connection
    return context


# ---------------------------------------------------------------------------------------------------------------------
# The clients


@dataclass(frozen=True, slots=True)
class Work:
    """What runs in one transaction.

    Attributes:
        statements: How often `SELECT 1` runs, one after the other.
        claims: Whether the transaction has `ROLE` and `SETTINGS`. Clients without parameters for them send one
            statement more.
        nested: Whether the statements run in a savepoint block.
    """

    statements: int = 1
    claims: bool = False
    nested: bool = False


ROLE = "pg_monitor"
SETTINGS = {"app.user": "4711", "app.tenant": "acme", "app.claims": '{"admin": false}'}
_CLAIMS = ", ".join(
    f"set_config('{name}', '{value}', true)" for name, value in {"role": ROLE, **SETTINGS}.items()
)  # a role can be set like a setting, so that one statement sets all


@dataclass(frozen=True, slots=True)
class Client:
    """What is measured of a pool.

    Attributes:
        acquire: Return a context manager that acquires a connection and releases it.
        fetchval: Acquire a connection, run a query, release the connection, and return the first value.
        transact: Acquire a connection, run work in a transaction, commit, and release the connection.
        size: Return how many connections are open.
    """

    acquire: Callable[[], AbstractAsyncContextManager[object]]
    fetchval: Callable[[str], Awaitable[object]]
    transact: Callable[[Work], Awaitable[None]]
    size: Callable[[], int]


class OpenClient(Protocol):
    """Open an empty pool of at most `size` connections.

    `deadline` is how many seconds an acquire may take, by the pool's own parameter if it has one that includes the
    connect. None (the default): the pool's default.
    """

    def __call__(self, size: int, *, deadline: float | None = None) -> AbstractAsyncContextManager[Client]: ...


@asynccontextmanager
async def our_client(
    create_pool: Callable[..., neon_async.Pool], size: int, *, deadline: float | None = None
) -> AsyncIterator[Client]:
    """Yield a client on our pool."""
    options = {} if deadline is None else {"acquire_timeout": deadline}
    async with create_pool(max_size=size, **options) as pool:

        async def transact(work: Work) -> None:
            claims: dict[str, Any] = {"role": ROLE, "settings": SETTINGS} if work.claims else {}
            async with (
                pool.transaction(**claims) as connection,
                connection.transaction() if work.nested else nullcontext(),
            ):
                for _ in range(work.statements):
                    await connection.fetchval("SELECT 1")

        yield Client(pool.acquire, pool.fetchval, transact, pool.get_size)


@asynccontextmanager
async def asyncpg_client(
    create_pool: Callable[..., Any], size: int, *, deadline: float | None = None
) -> AsyncIterator[Client]:
    """Yield a client on asyncpg's pool."""
    async with create_pool(min_size=0, max_size=size) as pool:

        async def fetchval(query: str) -> object:
            async with pool.acquire(timeout=deadline) as connection:
                return await connection.fetchval(query)

        async def transact(work: Work) -> None:
            async with pool.acquire(timeout=deadline) as connection, connection.transaction():
                if work.claims:
                    await connection.fetchval(f"SELECT {_CLAIMS}")
                async with connection.transaction() if work.nested else nullcontext():
                    for _ in range(work.statements):
                        await connection.fetchval("SELECT 1")

        yield Client(partial(pool.acquire, timeout=deadline), fetchval, transact, pool.get_size)


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

    async def transact(work: Work) -> None:
        # The outermost block is the pool's own, unless every statement commits by itself.
        async with pool.connection() as connection, connection.transaction() if autocommit else nullcontext():
            if work.claims:
                await connection.execute(f"SELECT {_CLAIMS}".encode())
            async with connection.transaction() if work.nested else nullcontext():
                for _ in range(work.statements):
                    cursor = await connection.execute("SELECT 1")
                    await cursor.fetchone()

    async with pool:
        yield Client(pool.connection, fetchval, transact, lambda: pool.get_stats()["pool_size"])


@asynccontextmanager
async def sqlalchemy_client(
    url: str, connect_args: dict[str, object], size: int, *, deadline: float | None = None
) -> AsyncIterator[Client]:
    """Yield a client on an engine of SQLAlchemy, which sets up each new connection with queries of its own."""
    engine = create_async_engine(url, connect_args=connect_args, pool_size=size, max_overflow=0)
    waiting = engine.pool

    @asynccontextmanager
    async def connection_in_time() -> AsyncIterator[Any]:
        # `pool_timeout=` does not include the connect.
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

    async def transact(work: Work) -> None:
        async with acquire() as connection, connection.begin():
            if work.claims:
                await connection.execute(text(f"SELECT {_CLAIMS}".replace(":", "\\:")))
            async with connection.begin_nested() if work.nested else nullcontext():
                for _ in range(work.statements):
                    await connection.scalar(text("SELECT 1"))

    try:
        yield Client(acquire, fetchval, transact, lambda: waiting.checkedin() + waiting.checkedout())  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


async def _no_reset(_: object) -> None:
    """Reset nothing."""


@contextmanager
def clients_of(
    server: Server, port: int | None = None, *, password: str | None = None
) -> Iterator[dict[str, OpenClient]]:
    """Yield how to open each client, by its name.

    Args:
        server: The server to which the clients connect.
        port: The port of a relay in front of the server. None (the default): the server's own.
        password: Another password than the server's.
    """
    dsn = dsn_of(server, port, password=password)
    # Ours needs the server's host name, which says whether it is pooled. The others do not know hostaddr=.
    seed, place = urlsplit(server.dsn), urlsplit(dsn)
    own_dsn = seed._replace(netloc=place.netloc.replace("localhost", seed.hostname or "")).geturl()
    with tempfile.TemporaryDirectory() as folder:
        anchor = Path(folder, "root.pem")
        anchor.write_bytes(server.trust_anchor)
        yield _clients(own_dsn, dsn, server.trust_anchor, anchor)


def _clients(own_dsn: str, dsn: str, trust_anchor: bytes, anchor: Path) -> dict[str, OpenClient]:
    context = verified_context(trust_anchor)
    # With gssencmode a machine with a Kerberos ticket would take one more round trip.
    libpq = f"{dsn}?sslmode=verify-full&sslrootcert={anchor}&gssencmode=disable"
    url = dsn.replace("postgresql://", "postgresql+asyncpg://")
    ours = partial(neon_async.create_pool, own_dsn, trust_anchor=trust_anchor)
    theirs = partial(asyncpg.create_pool, dsn, ssl=context)
    return {
        OURS: partial(our_client, ours),
        OURS_BARE: partial(our_client, partial(ours, reset=_no_reset)),
        ASYNCPG: partial(asyncpg_client, theirs),
        ASYNCPG_BARE: partial(asyncpg_client, partial(theirs, reset=_no_reset)),
        ASYNCPG_DIRECT: partial(asyncpg_client, partial(theirs, direct_tls=True)),
        PSYCOPG: partial(psycopg_client, libpq),
        PSYCOPG_AUTOCOMMIT: partial(psycopg_client, libpq, autocommit=True),
        PSYCOPG_DIRECT: partial(psycopg_client, f"{libpq}&sslnegotiation=direct"),
        SQLALCHEMY: partial(sqlalchemy_client, url, {"ssl": context}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Equal conditions


async def open_all(
    stack: AsyncExitStack, candidates: Mapping[str, OpenClient], names: Iterable[str], size: int
) -> dict[str, Client]:
    """Open the clients with these names until `stack` is left, each with all of its `size` connections."""
    opened = {name: await stack.enter_async_context(candidates[name](size)) for name in names}
    for client in opened.values():
        await fill(client, size)
    return opened


async def fill(client: Client, size: int) -> None:
    """Let the pool open all of its `size` connections, by acquiring them at the same time."""
    all_acquired = asyncio.Barrier(size)

    async def hold() -> None:
        async with client.acquire():
            await all_acquired.wait()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(size):
            tasks.create_task(hold())
