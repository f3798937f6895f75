"""What the tests of the driver share: a table behind PgBouncer, and connections past it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.pooled import TABLE
from support.probes import HANG

import neon_async
from neon_async.testing import LocalPostgres


@pytest.fixture
async def direct(postgres: LocalPostgres) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection past PgBouncer, for DDL, with a table of three rows."""
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    await connection.execute(f"DROP TABLE IF EXISTS {TABLE}")
    await connection.execute(f"CREATE TABLE {TABLE} (a int); INSERT INTO {TABLE} VALUES (1), (2), (3)")
    try:
        yield connection
    finally:
        await connection.execute(f"DROP TABLE {TABLE}")
        await connection.close(timeout=HANG)
