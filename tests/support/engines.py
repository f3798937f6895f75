"""Engines of SQLAlchemy on local servers, and what their connections and errors are made of."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import neon_async
from neon_async.sqlalchemy import create_async_engine
from neon_async.testing import LocalEndpoint, LocalPostgres

from .pgbouncer import LocalPgBouncer
from .probes import HANG

SCHEME = "postgresql+neon"
Server: TypeAlias = LocalPostgres | LocalEndpoint | LocalPgBouncer


def with_scheme(dsn: str, *, sslmode: str = "require") -> str:
    """Return a connection string as the console shows it, with the scheme of the dialect."""
    joint = "&" if "?" in dsn else "?"
    return f"{dsn.replace('postgresql', SCHEME, 1)}{joint}sslmode={sslmode}"


@contextlib.asynccontextmanager
async def engine_to(
    server: LocalPostgres | LocalEndpoint | LocalPgBouncer, **options: Any
) -> AsyncIterator[AsyncEngine]:
    """An engine with a pool of SQLAlchemy's."""
    engine = create_async_engine(server.dsn, trust_anchor=server.trust_anchor, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def engine_on(pool: neon_async.Pool, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine on a pool of ours."""
    engine = create_async_engine(pool, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def scalar(connection: AsyncConnection, query: str) -> Any:
    """Return the value of a query."""
    return (await connection.execute(sa.text(query))).scalar()


async def driver_of(connection: AsyncConnection) -> Any:
    """Return the connection of asyncpg below a connection of SQLAlchemy."""
    return (await connection.get_raw_connection()).driver_connection


def original(error: sa.exc.DBAPIError) -> BaseException | None:
    """Return the error of neon-async or asyncpg below an error of SQLAlchemy."""
    assert error.orig is not None
    return error.orig.__cause__


@contextlib.asynccontextmanager
async def admin_of(server: LocalPostgres) -> AsyncIterator[Any]:
    """A connection of ours past everything that a test breaks."""
    connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
    try:
        yield connection
    finally:
        await connection.close(timeout=HANG)
