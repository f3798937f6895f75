"""Prepared statements and COPY in SQL: what a caller drops is prepared again, what it prepares does not stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.pgbouncer import LocalPgBouncer
from support.probes import HANG, assert_whole, connected, make_pool

import neon_async
from neon_async import WrongMethodError
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

Call = Callable[[Any], Awaitable[Any]]


@pytest.fixture(params=["direct", "pooled"])
async def connection(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    server = request.getfixturevalue("postgres" if request.param == "direct" else "pgbouncer")
    async with connected(server) as connection, asyncio.timeout(HANG):
        yield connection


# ---------------------------------------------------------------------------------------------------------------------
# COPY


async def by_statement(connection: Any) -> Any:
    return await (await connection.prepare("COPY pg_am FROM STDIN")).fetch()


async def by_cursor(connection: Any) -> Any:
    async with connection.transaction():
        return [row async for row in connection.cursor("COPY pg_am FROM STDIN")]


class TestCopy:
    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda c: c.execute("COPY pg_am FROM STDIN"), id="execute"),
            pytest.param(lambda c: c.execute("SELECT 1; COPY pg_am (amname) FROM STDIN; SELECT 2"), id="in the middle"),
            pytest.param(lambda c: c.execute("COPY pg_am FROM STDIN WHERE oid = 1" + " " * 9999), id="a long text"),
            pytest.param(lambda c: c.fetch("COPY pg_am FROM STDIN"), id="fetch"),
            pytest.param(lambda c: c.fetchval("COPY pg_am FROM STDIN"), id="fetchval"),
            pytest.param(lambda c: c.fetchrow("COPY pg_am FROM STDIN"), id="fetchrow"),
            pytest.param(lambda c: c.executemany("COPY pg_am FROM STDIN", [()]), id="executemany"),
            pytest.param(lambda c: c.fetchmany("COPY pg_am FROM STDIN", [()]), id="fetchmany"),
            pytest.param(by_statement, id="statement"),
            pytest.param(by_cursor, id="cursor"),
        ],
    )
    async def test_copy_from_the_client_is_refused_with_the_name_of_the_right_method(
        self, connection: Any, call: Call
    ) -> None:
        with pytest.raises(WrongMethodError, match=r"copy_to_table\(\) or copy_records_to_table\(\)"):
            await call(connection)
        assert await connection.fetchval("SELECT 1") == 1

    @pytest.mark.parametrize("method", ["execute", "fetch"])
    async def test_copy_to_the_client_would_lose_its_rows_and_is_refused(self, connection: Any, method: str) -> None:
        with pytest.raises(WrongMethodError, match=r"copy_from_table\(\) or copy_from_query\(\)"):
            await getattr(connection, method)("COPY (SELECT 1) TO STDOUT")

    async def test_in_a_transaction_the_refusal_leaves_the_transaction_as_it_is(self, connection: Any) -> None:
        async with connection.transaction():
            await connection.execute("SELECT 1")
            with pytest.raises(WrongMethodError):
                await connection.execute("COPY pg_am FROM STDIN")
            assert await connection.fetchval("SELECT 2") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Statements that a caller drops

ALL = ["DISCARD ALL", "DEALLOCATE ALL", "deallocate prepare all", "SELECT 1; DEALLOCATE ALL"]


async def fail_after_it(connection: Any) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("DEALLOCATE ALL; SELECT 1/0")


async def drop_one(connection: Any) -> None:
    for name in await connection.fetch("SELECT name FROM pg_prepared_statements WHERE statement LIKE '%42%'"):
        await connection.execute(f'DEALLOCATE "{name[0]}"')


async def drop_in_a_transaction(connection: Any) -> None:
    async with connection.transaction():
        await connection.execute("DEALLOCATE ALL")


async def drop_by_a_statement(connection: Any) -> None:
    for _ in range(2):
        await connection.fetch("DEALLOCATE ALL")


DROPS: dict[str, Call] = {
    **{text: (lambda c, text=text: c.execute(text)) for text in ALL},  # type: ignore[misc]
    "by fetch()": drop_by_a_statement,
    "by executemany()": lambda c: c.executemany("DEALLOCATE ALL", [()]),
    "in a block of PL/pgSQL": lambda c: c.execute("DO $$BEGIN EXECUTE 'DEALLOCATE ALL'; END$$"),
    "in a transaction": drop_in_a_transaction,
    "and an error after it": fail_after_it,
    "one by its name": drop_one,
}


class TestDropped:
    @pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
    async def test_the_next_caller_of_a_cached_text_notices_nothing(self, postgres: LocalPostgres, drop: Call) -> None:
        async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT 42 + $1::int", 1) == 43
                await drop(connection)
                assert await connection.fetchval("SELECT 42 + $1::int", 2) == 44
                await drop(connection)
            async with pool.acquire() as following, following.transaction():  # where nothing could be repeated
                assert await following.fetchval("SELECT 42 + $1::int", 3) == 45
                assert [row[0] async for row in following.cursor("SELECT 42 + $1::int", 4)] == [46]
            assert pool.stats().dials == 1
            await assert_whole(pool)

    @pytest.mark.parametrize("text", ["DISCARD ALL", "DEALLOCATE ALL"])
    async def test_on_a_pooled_host_neither(self, pgbouncer: LocalPgBouncer, text: str) -> None:
        async with (
            neon_async.create_pool(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, max_size=1) as pool,
            asyncio.timeout(HANG),
        ):
            assert await pool.fetchval("SELECT 42 + $1::int", 1) == 43
            await pool.execute(text)
            async with pool.acquire() as following, following.transaction():
                assert await following.fetchval("SELECT 42 + $1::int", 3) == 45
            await assert_whole(pool)

    async def test_a_text_that_is_refused_by_the_server_drops_nothing(self, postgres: LocalPostgres) -> None:
        async with connected(postgres) as connection:
            await connection.fetchval("SELECT 42")
            with pytest.raises(asyncpg.ActiveSQLTransactionError):
                await connection.execute("BEGIN; DISCARD ALL")
            await connection.execute("ROLLBACK")
            assert await connection.fetchval("SELECT 42") == 42
            names = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'"
            assert await connection.fetchval(names) == 1, "the other one was closed"

    async def test_the_reset_of_a_pool_may_drop_them(self, postgres: LocalPostgres) -> None:
        async def reset(connection: Any) -> None:
            await connection.execute("DISCARD ALL")

        async with make_pool(postgres, max_size=1, reset=reset) as pool:
            for number in range(3):
                assert await pool.fetchval("SELECT 42 + $1::int", number) == 42 + number
            assert pool.stats().dials == 1


# ---------------------------------------------------------------------------------------------------------------------
# Statements that a caller prepares

PREPARED = "SELECT array_agg(name ORDER BY name) FROM pg_prepared_statements WHERE from_sql"


class TestPrepared:
    @pytest.mark.parametrize(
        "prepare",
        [
            pytest.param(lambda c: c.execute("PREPARE mine AS SELECT 1"), id="execute"),
            pytest.param(lambda c: c.fetch("PREPARE mine AS SELECT 1"), id="fetch"),
            pytest.param(lambda c: c.execute('PREPARE "it\'s ""mine""" AS SELECT 1'), id="a quoted name"),
            pytest.param(lambda c: c.execute("DO $$BEGIN EXECUTE 'PREPARE mine AS SELECT 1'; END$$"), id="DO"),
            pytest.param(lambda c: c.execute("BEGIN; PREPARE mine AS SELECT 1"), id="an open transaction"),
        ],
    )
    @pytest.mark.parametrize("times", [1, 2])
    async def test_it_does_not_reach_the_next_caller_and_asyncpgs_own_stay(
        self, postgres: LocalPostgres, prepare: Call, times: int
    ) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: None)  # asyncpg reports transactions that are left open
        async with make_pool(postgres, max_size=1) as pool:
            for _ in range(times):  # the second time a statement of asyncpg is in its cache
                await pool.fetchval("SELECT 42")
                async with pool.acquire() as connection:
                    await prepare(connection)
                    assert await connection.fetchval(PREPARED) is not None
                async with pool.acquire() as following:
                    assert await following.fetchval(PREPARED) is None
                    own = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'"
                    assert await following.fetchval(own) == 1
            assert pool.stats().dials == 1
        loop.set_exception_handler(None)

    async def test_what_init_has_prepared_stays(self, postgres: LocalPostgres) -> None:
        async def init(connection: Any) -> None:
            await connection.execute('PREPARE "init\'s" AS SELECT 7')

        async with make_pool(postgres, max_size=1, init=init) as pool:
            await pool.execute("PREPARE mine AS SELECT 1")
            assert await pool.fetchval(PREPARED) == ["init's"]
            assert pool.stats().dials == 1
            for text in ("DISCARD ALL", 'DEALLOCATE "init\'s"'):
                await pool.execute(text)
                assert await pool.fetchval(PREPARED) == ["init's"]
        assert pool.stats().dials == 3, "only init can prepare it again"

    async def test_a_reset_by_the_caller_drops_them(self, postgres: LocalPostgres) -> None:
        async with connected(postgres) as connection:
            await connection.execute("PREPARE mine AS SELECT 1")
            await connection.reset()
            assert await connection.fetchval(PREPARED) is None
