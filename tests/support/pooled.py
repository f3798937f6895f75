"""A table whose prepared statements become stale on a real PgBouncer, and connections like those of one pool."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from neon_async._driver.connector import Connector, prepare
from neon_async._driver.holder import session_of

from .pgbouncer import LocalPgBouncer
from .plain import asyncpg_connection
from .probes import HANG

TABLE = "healing"
LOCKS = f"SELECT count(*) FROM pg_locks WHERE relation = '{TABLE}'::regclass"
numbers = itertools.count()


def fresh(query: str = f"SELECT * FROM {TABLE}") -> str:
    """Return `query` as a text that was never sent before, so that no test meets the statements of another."""
    return f"/* {next(numbers)} */ {query}"


def connector_to(bouncer: LocalPgBouncer, **keywords: Any) -> Connector:
    """Return what makes connections as those of one pool: they share `connector.healing`."""
    return prepare(bouncer.dsn, trust_anchor=bouncer.trust_anchor, **keywords)


@contextlib.asynccontextmanager
async def opened(connector: Connector, *, base: type[Any] = asyncpg.Connection) -> AsyncIterator[Any]:
    """A connection to PgBouncer."""
    connection = await connector.connect(connection_class=base)
    try:
        yield connection
    finally:
        await connection.close(timeout=HANG)


def holds_server(connection: Any) -> bool:
    """Return whether PgBouncer may have reserved a server connection for this client."""
    session = session_of(connection)
    assert session is not None
    return session.holds_server


@contextlib.asynccontextmanager
async def other_client(bouncer: LocalPgBouncer, *queries: str) -> AsyncIterator[Any]:
    """Another client, plain asyncpg, that has prepared the same texts: PgBouncer drops what no other client has."""
    async with asyncpg_connection(bouncer) as connection:
        _statements = [await connection.prepare(query) for query in queries]
        await connection.execute("SELECT 1")  # what is only prepared reserves a server connection, with locks on tables
        yield connection


async def change(direct: Any) -> None:
    """Change the result of `SELECT * FROM healing` by DDL."""
    await direct.execute(f"ALTER TABLE {TABLE} ADD COLUMN c{next(numbers)} int")
