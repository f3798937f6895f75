"""What the tests of the driver share: tables to write to, past PgBouncer and through a relay that can fail."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.pooled import TABLE
from support.probes import HANG
from support.transactions import Bench

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

_numbers = itertools.count(1)


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


@pytest.fixture
async def bench(postgres: LocalPostgres) -> AsyncIterator[Bench]:
    """A new table, and an endpoint that can freeze, cut and suspend the connections of the test."""
    name = f"kept_{next(_numbers)}"
    admin = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        await admin.execute(f"CREATE TABLE {name} (value int)")
        async with LocalEndpoint(postgres) as endpoint:
            yield Bench(endpoint, admin, name)
        # A server does not notice at once that its client is gone: it sleeps on, with locks on the table.
        await admin.execute(f"""
            SELECT pg_terminate_backend(pid, 10000) FROM pg_locks
            WHERE relation = '{name}'::regclass AND pid <> pg_backend_pid();
            DROP TABLE {name} CASCADE; DROP FUNCTION IF EXISTS {name}""")
    finally:
        admin.terminate()


@pytest.fixture
async def pool(bench: Bench) -> AsyncIterator[neon_async.Pool]:
    """A pool of one connection to the endpoint of `bench`."""
    async with neon_async.create_pool(bench.endpoint.dsn, trust_anchor=bench.endpoint.trust_anchor, max_size=1) as pool:
        yield pool
        bench.endpoint.thaw()
