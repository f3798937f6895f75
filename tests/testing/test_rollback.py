"""The pool of `neon_rollback`: code on it behaves as if it wrote to the database, and nothing of it is kept."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.probes import connected

import neon_async
from neon_async import ConfigurationError, PoolTimeoutError, TransactionAbortedError
from neon_async.testing import LocalPostgres
from neon_async.testing._pools import RollbackError, RollbackPool, rollback_pool

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pool(postgres: LocalPostgres) -> AsyncIterator[RollbackPool]:
    """A rollback pool in whose transaction there is a table `t`."""
    pool = rollback_pool(postgres.dsn, postgres.trust_anchor, {})
    await pool.execute("CREATE TABLE t (n int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    yield pool
    pool.end()


async def rows(pool: RollbackPool) -> list[int]:
    return [row["n"] for row in await pool.fetch("SELECT n FROM t ORDER BY n")]


# ---------------------------------------------------------------------------------------------------------------------
# What is written is seen by the test and by nobody else


async def test_nothing_is_kept(postgres: LocalPostgres) -> None:
    pool = rollback_pool(postgres.dsn, postgres.trust_anchor, {})
    await pool.execute("CREATE TABLE never_kept (n int)")
    async with pool.transaction() as connection:
        await connection.execute("INSERT INTO never_kept VALUES (1)")
    assert await pool.fetchval("SELECT n FROM never_kept") == 1
    async with connected(postgres) as other:
        assert await other.fetchval("SELECT to_regclass('never_kept')") is None
    pool.end()
    async with connected(postgres) as other:
        await other.execute("CREATE TABLE never_kept (n int)")  # waits until the transaction has ended
        await other.execute("DROP TABLE never_kept")


async def test_nested_transactions_and_run_transaction_keep_and_roll_back_their_own_work(pool: RollbackPool) -> None:
    async def work(connection: Any) -> None:
        await connection.execute("INSERT INTO t VALUES (1)")
        with contextlib.suppress(ZeroDivisionError):
            async with connection.transaction():
                await connection.execute("INSERT INTO t VALUES (2)")
                raise ZeroDivisionError
        async with connection.transaction():
            await connection.execute("INSERT INTO t VALUES (3)")

    await pool.run_transaction(work)
    assert await rows(pool) == [1, 3]
    with contextlib.suppress(ZeroDivisionError):
        async with pool.transaction() as connection:
            await connection.execute("DELETE FROM t")
            raise ZeroDivisionError
    assert await rows(pool) == [1, 3]


async def test_run_transaction_runs_again_after_a_conflict(pool: RollbackPool) -> None:
    runs = 0

    async def work(connection: Any) -> int:
        nonlocal runs
        runs += 1
        await connection.execute("INSERT INTO t VALUES ($1)", runs)
        if runs == 1:
            await connection.execute("DO $$ BEGIN RAISE 'conflict' USING ERRCODE = '40001'; END $$")
        return runs

    assert await pool.run_transaction(work, isolation="serializable") == 2
    assert await rows(pool) == [2]


async def test_a_work_that_went_on_after_a_failed_statement_keeps_nothing(pool: RollbackPool) -> None:
    async def work(connection: Any) -> None:
        await connection.execute("INSERT INTO t VALUES (1)")
        with contextlib.suppress(asyncpg.PostgresError):
            await connection.execute("nonsense")

    with pytest.raises(TransactionAbortedError):
        await pool.run_transaction(work)
    with pytest.raises(TransactionAbortedError):
        async with pool.transaction() as connection:
            await work(connection)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await work(connection)
        with pytest.raises(TransactionAbortedError):
            await transaction.commit()
    assert await rows(pool) == []


# ---------------------------------------------------------------------------------------------------------------------
# What fails rolls back itself only

CALLS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "execute": lambda con: con.execute("nonsense"),
    "execute with arguments": lambda con: con.execute("SELECT 1 / $1::int", 0),
    "executemany": lambda con: con.executemany("SELECT 1 / $1::int", [(1,), (0,)]),
    "fetch": lambda con: con.fetch("SELECT 1 / 0"),
    "fetchval": lambda con: con.fetchval("SELECT 1 / 0"),
    "fetchrow": lambda con: con.fetchrow("SELECT 1 / 0"),
    "fetchmany": lambda con: con.fetchmany("SELECT 1 / $1::int", [(0,)]),
    "copy_from_query": lambda con: con.copy_from_query("SELECT 1 / 0", output=io.BytesIO()),
    "copy_from_table": lambda con: con.copy_from_table("no_table", output=io.BytesIO()),
    "copy_to_table": lambda con: con.copy_to_table("no_table", source=io.BytesIO(b"1\n")),
    "copy_records_to_table": lambda con: con.copy_records_to_table("no_table", records=[(1,)]),
    "a deferred constraint": lambda con: con.execute("INSERT INTO t VALUES (7), (7)"),
}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
async def test_a_statement_that_fails_does_not_end_the_transaction_of_the_test(
    pool: RollbackPool, call: Callable[[Any], Awaitable[object]]
) -> None:
    async with pool.acquire() as connection:
        await connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(asyncpg.PostgresError):
            await call(connection)
        assert not connection.is_in_transaction()
        await connection.execute("INSERT INTO t VALUES (2)")
    with pytest.raises(asyncpg.PostgresError):
        await call(pool)
    assert await rows(pool) == [1, 2]


async def test_a_statement_that_a_migration_made_stale_runs_again(pool: RollbackPool) -> None:
    query = "SELECT * FROM t WHERE n > $1"
    await pool.execute("INSERT INTO t VALUES (1)")
    assert len(await pool.fetch(query, 0)) == 1
    await pool.execute("ALTER TABLE t ADD m int DEFAULT 7")
    assert [tuple(row) for row in await pool.fetch(query, 0)] == [(1, 7)]


async def test_a_statement_that_is_cancelled_does_not_end_the_transaction_of_the_test(pool: RollbackPool) -> None:
    await pool.execute("INSERT INTO t VALUES (1)")
    async with pool.acquire() as connection:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.execute("SELECT pg_sleep(60)")
        assert await connection.fetchval("SELECT count(*) FROM t") == 1


@pytest.mark.parametrize("managed", [True, False], ids=["async with", "commit()"])
async def test_a_deferred_constraint_is_checked_when_the_block_is_committed(pool: RollbackPool, managed: bool) -> None:
    async with pool.acquire() as connection:
        block = connection.transaction()
        end = block.__aexit__ if managed else lambda *_: block.commit()
        await (block.__aenter__() if managed else block.start())
        await connection.execute("INSERT INTO t VALUES (1), (1)")
        with pytest.raises(asyncpg.UniqueViolationError):
            await end(None, None, None)
        assert not connection.is_in_transaction()
        async with connection.transaction():  # it is deferred as before
            await connection.execute("INSERT INTO t VALUES (2), (2)")
            await connection.execute("DELETE FROM t")


# ---------------------------------------------------------------------------------------------------------------------
# Roles, settings, read only


async def test_role_and_settings_end_with_their_block(pool: RollbackPool) -> None:
    query = "SELECT ARRAY[current_user, coalesce(current_setting('app.user', true), ''), current_setting('work_mem')]"
    before = await pool.fetchval(query)
    async with pool.transaction(role="pg_monitor", settings={"app.user": "7", "work_mem": "1MB"}) as connection:
        assert await connection.fetchval(query) == ["pg_monitor", "7", "1MB"]
    assert await pool.fetchval(query) == before


async def test_a_role_that_does_not_exist_leaves_no_block_open(pool: RollbackPool) -> None:
    async with pool.acquire() as connection:
        with pytest.raises(asyncpg.PostgresError, match="no_such_role"):
            async with connection.transaction(role="no_such_role"):
                pytest.fail("the block was entered")
        assert not connection.is_in_transaction()
        await connection.execute("INSERT INTO t VALUES (1)")


async def test_a_read_only_block_cannot_write_and_the_next_one_can(pool: RollbackPool) -> None:
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        async with pool.transaction(readonly=True) as connection:
            await connection.execute("INSERT INTO t VALUES (1)")
    async with pool.transaction(readonly=True):
        pass
    await pool.execute("INSERT INTO t VALUES (2)")
    assert await rows(pool) == [2]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"isolation": "chaos"}, id="isolation"),
        pytest.param({"role": 7}, id="role"),
        pytest.param({"settings": {"app.user": 7}}, id="settings"),
    ],
)
async def test_arguments_are_judged_as_elsewhere(pool: RollbackPool, arguments: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        async with pool.transaction(**arguments):
            pytest.fail("the block was entered")
    assert await rows(pool) == []


# ---------------------------------------------------------------------------------------------------------------------
# The end of a loan, and of the transaction


async def test_a_block_that_was_left_open_is_rolled_back_with_its_loan(pool: RollbackPool) -> None:
    async with pool.acquire() as connection:
        await connection.transaction().start()
        await connection.execute("INSERT INTO t VALUES (1)")
    assert await rows(pool) == []


async def test_a_session_is_reset_between_loans(pool: RollbackPool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("SET search_path TO nowhere")
        await connection.execute("CREATE TEMP TABLE mine ()")
    assert await pool.fetchval("SHOW search_path") == '"$user", public'
    assert await pool.fetchval("SELECT to_regclass('mine')") is None


@pytest.mark.parametrize("text", ["COMMIT", " rollback;", "BEGIN", "start  transaction", "END", "Abort"])
async def test_a_statement_that_would_end_the_transaction_is_refused(pool: RollbackPool, text: str) -> None:
    with pytest.raises(ConfigurationError, match="neon_rollback rolls back"):
        await pool.execute(text)
    assert await rows(pool) == []


async def test_savepoints_in_sql_are_not_refused(pool: RollbackPool) -> None:
    async with pool.transaction() as connection:
        await connection.execute("SAVEPOINT one")
        await connection.execute("INSERT INTO t VALUES (1)")
        await connection.execute("ROLLBACK TO one")
        await connection.execute("ROLLBACK TO SAVEPOINT one")
    assert await rows(pool) == []


async def test_a_commit_inside_of_a_text_is_reported(postgres: LocalPostgres) -> None:
    pool = rollback_pool(postgres.dsn, postgres.trust_anchor, {})
    with pytest.raises(ConfigurationError, match="may be committed"):
        await pool.execute("SELECT 1; COMMIT")
    with pytest.raises(RollbackError, match="connection of neon_rollback ended"):
        await pool.execute("SELECT 1")
    pool.end()


async def test_a_connection_that_ended_is_reported_and_not_replaced(pool: RollbackPool) -> None:
    async with pool.acquire() as connection:
        connection.terminate()
    for _ in range(2):
        with pytest.raises(RollbackError):
            await pool.execute("SELECT 1")


async def test_a_prepared_statement_that_fails_outside_of_a_block_ends_the_transaction_loudly(
    pool: RollbackPool,
) -> None:
    async with pool.acquire() as connection:
        statement = await connection.prepare("SELECT 1 / $1::int")
        assert await statement.fetchval(1) == 1
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with connection.transaction():
                await statement.fetchval(0)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await statement.fetchval(0)
    with pytest.raises(RollbackError, match="a prepared statement"):
        await pool.execute("SELECT 1")


async def test_an_init_of_the_tests_own_runs_first(postgres: LocalPostgres) -> None:
    async def init(connection: Any) -> None:
        await connection.set_type_codec("json", encoder=str, decoder=len, schema="pg_catalog")

    pool = rollback_pool(postgres.dsn, postgres.trust_anchor, {"init": init, "max_size": 5, "init_size": 2})
    for _ in range(2):
        assert await pool.fetchval("SELECT '[1, 2]'::json") == 6
    pool.end()


async def test_a_reset_of_the_tests_own_does_not_end_the_transaction(postgres: LocalPostgres) -> None:
    async def reset(connection: Any) -> None:
        pytest.fail("it was called")

    pool = rollback_pool(postgres.dsn, postgres.trust_anchor, {"reset": reset})
    await pool.execute("CREATE TABLE t (n int)")
    assert await rows(pool) == []
    pool.end()


def test_a_connection_class_is_refused(postgres: LocalPostgres) -> None:
    with pytest.raises(ConfigurationError, match="Leave connection_class out of neon_pool_options"):
        rollback_pool(postgres.dsn, postgres.trust_anchor, {"connection_class": neon_async.Connection})


async def test_callers_are_served_one_after_the_other(pool: RollbackPool) -> None:
    await asyncio.gather(*(pool.execute("INSERT INTO t VALUES ($1)", n) for n in range(20)))
    assert await rows(pool) == list(range(20))


async def test_a_caller_that_waits_for_itself_is_told_so(pool: RollbackPool) -> None:
    async with pool.acquire():
        with pytest.raises(PoolTimeoutError, match="Use the connection it has"):
            await pool.acquire(timeout=0.01)
