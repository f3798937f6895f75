"""Plain asyncpg, to compare with. It verifies a local server by the name localhost.

Knows nothing of neon_async but its local servers.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from neon_async.testing import LocalPostgres

from .pgbouncer import LocalPgBouncer
from .probes import HANG


def asyncpg_arguments(server: LocalPostgres | LocalPgBouncer) -> dict[str, Any]:
    """Return the arguments of `asyncpg.connect()` and `asyncpg.create_pool()`."""
    url = urlsplit(server.dsn)
    return {
        "host": "localhost",
        "port": server.port,
        "user": url.username,
        "password": url.password,
        "database": url.path[1:],
        "ssl": ssl.create_default_context(cadata=server.trust_anchor.decode()),
        "timeout": HANG,
    }


@contextlib.asynccontextmanager
async def asyncpg_connection(server: LocalPostgres | LocalPgBouncer) -> AsyncIterator[Any]:
    """A connection of plain asyncpg."""
    connection = await asyncpg.connect(**asyncpg_arguments(server))
    try:
        yield connection
    finally:
        await connection.close(timeout=HANG)
