"""`connect()`: one connection for one caller. Knows no pools."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, Unpack, overload

import asyncpg

from .._config.arguments import AnchorSource, ConnectKeywords
from .._errors import forget_arguments
from .arguments import CONNECTION_CLASS, RECORD_CLASS, other_loop
from .connection import Connection
from .holder import RecordT, coroutine_function

_C = TypeVar("_C", bound=asyncpg.Connection)


@overload
def connect(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    **keywords: Unpack[ConnectKeywords],
) -> Coroutine[Any, Any, Connection]: ...


@overload
def connect(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    record_class: type[RecordT],
    **keywords: Unpack[ConnectKeywords],
) -> Coroutine[Any, Any, Connection[RecordT]]: ...


@overload
def connect(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    connection_class: type[_C],
    record_class: type[asyncpg.Record] = ...,
    **keywords: Unpack[ConnectKeywords],
) -> Coroutine[Any, Any, _C]: ...


@coroutine_function
@forget_arguments
def connect(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    connection_class: type[Any] = asyncpg.Connection,
    record_class: type[Any] = asyncpg.Record,
    **keywords: Unpack[ConnectKeywords],
) -> Coroutine[Any, Any, Any]:
    """Return one connection, verified in full and authenticated; close it with `await connection.close()`.

    The parameters are checked in the call itself, before the result is awaited and before a socket is opened. The same
    parameters are checked, and the files that they name are read, once, until one of the files or of the `PG*`
    variables changes. The 32 latest sets of parameters are remembered.

    Args:
        dsn: The connection string. Default: the keywords and the environment variables of libpq (`PG*`).
        trust_anchor: The root certificates to trust instead of ISRG Root X1: PEM bytes, PEM text, or the path of a PEM
            file, with at most ten roots; or `LETS_ENCRYPT_ROOTS`.
        loop: The running event loop, which is used in any case. Any other is refused.
        connection_class: A subclass of `asyncpg.Connection`. What its `__init__()` raises is raised unchanged.
        record_class: A subclass of `asyncpg.Record`.
        **keywords: The connection keywords of `create_pool()`; each wins over the DSN, which wins over the environment.

    Raises:
        ConfigurationError: A parameter is refused; from the call itself. The following come when the result is awaited.
        ConnectTimeoutError: The connection was not ready within `connect_timeout`.
        ConnectError: The server could not be reached.
        TLSError: The server refuses TLS, or failed verification (`CertificateError`).
        AuthenticationError: The login failed.
        EndpointError: Neon refused the connection.
        UnsupportedEventLoopError: No asyncio event loop is running.
    """
    from .connectors import connector_for  # not at the top: see the package's __init__

    CONNECTION_CLASS.check("connection_class", connection_class)
    RECORD_CLASS.check("record_class", record_class)
    connector = connector_for(dsn, trust_anchor=trust_anchor, loop=other_loop(loop), **keywords)
    connector.class_for(connection_class)
    return connector.connect(connection_class=connection_class, record_class=record_class)
