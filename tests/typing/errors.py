"""Code that catches asyncpg's class of an error catches ours."""

from __future__ import annotations

from typing import assert_type

import asyncpg

import neon_async


def interface_errors(*classes: type[asyncpg.InterfaceError]) -> None: ...
def refused_logins(*classes: type[asyncpg.InvalidAuthorizationSpecificationError]) -> None: ...
def internal_errors(*classes: type[asyncpg.InternalServerError]) -> None: ...
def server_errors(*classes: type[asyncpg.PostgresError]) -> None: ...
def lost_connections(*classes: type[asyncpg.PostgresConnectionError]) -> None: ...


def second_parents() -> None:
    interface_errors(neon_async.PoolClosedError, neon_async.WrongMethodError)
    refused_logins(neon_async.AuthenticationError, neon_async.InvalidPasswordError, neon_async.ChannelBindingError)
    internal_errors(neon_async.EndpointError, neon_async.EndpointNotFoundError, neon_async.QuotaExceededError)
    server_errors(neon_async.ComputeUnavailableError, neon_async.DatabaseNotFoundError, neon_async.PooledHostError)
    server_errors(neon_async.TooManyConnectionsError, neon_async.TransactionAbortedError)
    lost_connections(neon_async.ConnectionLostError, neon_async.CommitUnknownError)

    server_errors(neon_async.PoolClosedError)  # type: ignore[arg-type]
    interface_errors(neon_async.ConnectionLostError)  # type: ignore[arg-type]


async def caught(pool: neon_async.Pool) -> str | None:
    try:
        await pool.execute("SELECT 1")
    except neon_async.ConnectionLostError as error:
        assert_type(error.sqlstate, str)
        return error.sqlstate
    return None
