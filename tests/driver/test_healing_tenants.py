"""A `search_path` for each tenant makes only those statements stale whose results differ."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.healing import Bench, bench_on

from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["direct", "pooled"])
async def bench(request: pytest.FixtureRequest, postgres: LocalPostgres) -> AsyncIterator[Bench]:
    server = request.getfixturevalue("postgres" if request.param == "direct" else "pgbouncer")
    async with bench_on(server, postgres) as bench:
        yield bench


@pytest.fixture
async def direct(postgres: LocalPostgres) -> AsyncIterator[Bench]:
    async with bench_on(postgres, postgres) as bench:
        yield bench


async def prepared_texts(connection: Any) -> dict[str, Any]:
    """Return when each statement of the session was prepared."""
    rows = await connection.fetch("SELECT statement, prepare_time FROM pg_prepared_statements WHERE NOT from_sql")
    return {row["statement"]: row["prepare_time"] for row in rows}


async def test_a_search_path_for_each_tenant_prepares_only_what_differs(direct: Bench) -> None:
    for tenant, columns in (("a", "x int"), ("b", "x int, y int"), ("c", "x text")):
        schema = f"{direct.schema}_{tenant}"
        await direct.admin.execute(
            f"DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; CREATE TABLE {schema}.things ({columns})"
        )
    same = [f"SELECT {number}, $1::int" for number in range(10)]
    for query in same:
        for connection in (direct.one, direct.two):
            await connection.fetch(query, 1)
    before = await prepared_texts(direct.one)
    before_two = await prepared_texts(direct.two)
    for _ in range(3):
        for tenant in "abc":
            await direct.one.execute(f"SET search_path = {direct.schema}_{tenant}")
            assert await direct.one.fetch("SELECT * FROM things") == []
    for connection, earlier in ((direct.one, before), (direct.two, before_two)):
        later = await prepared_texts(connection)
        assert {query: later.get(query) for query in same} == {query: earlier[query] for query in same}


async def test_a_transaction_with_the_search_path_of_its_tenant_fails_once_for_each(bench: Bench) -> None:
    for tenant, columns in (("a", "x int"), ("b", "x int, y int")):
        schema = f"{bench.schema}_{tenant}"
        await bench.admin.execute(
            f"DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; CREATE TABLE {schema}.things ({columns})"
        )
    failures = 0
    for _ in range(5):
        for tenant in "ab":
            try:
                async with bench.one.transaction(settings={"search_path": f"{bench.schema}_{tenant}"}):
                    await bench.one.fetch("SELECT * FROM things")
            except asyncpg.InvalidCachedStatementError:
                failures += 1
    assert failures <= 1
    assert bench.healing.heals == failures
