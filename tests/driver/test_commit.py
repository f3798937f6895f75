"""COMMIT and cancellation: what is known of the outcome, and that nothing unknown runs again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, until
from support.transactions import Bench, cut_in_commit, frozen_in_commit, killed_in_commit, suspended_in_commit

import neon_async
from neon_async._driver import transaction as _transaction
from neon_async._driver.losses import leaves_commit_open
from neon_async._errors import server_error

pytestmark = pytest.mark.anyio


class TestCommit:
    @pytest.mark.parametrize(
        ("end", "options", "cause"),
        [
            pytest.param(killed_in_commit, {}, asyncpg.PostgresError, id="killed"),
            pytest.param(cut_in_commit, {}, asyncpg.ConnectionDoesNotExistError, id="cut"),
            pytest.param(suspended_in_commit, {}, asyncpg.ConnectionDoesNotExistError, id="suspended"),
            pytest.param(frozen_in_commit, {"command_timeout": 0.5}, TimeoutError, id="command_timeout"),
        ],
    )
    async def test_a_loss_during_commit_is_reported_and_never_retried(
        self, bench: Bench, end: Any, options: Any, cause: type[BaseException]
    ) -> None:
        await bench.at_commit("PERFORM pg_sleep(60)")
        ending = asyncio.ensure_future(end(bench))
        with pytest.raises(neon_async.CommitUnknownError, match="may have been committed, or not") as caught:
            await bench.run(bench.add, acquire=lambda: bench.acquire(**options))
        assert isinstance(caught.value.__cause__, cause)
        assert len(bench.connections) == 1
        assert bench.retries == []
        await ending

    async def test_the_transaction_may_indeed_have_been_committed(self, bench: Bench) -> None:
        """The answer is lost on its way, and the row is kept."""

        async def work(connection: Any) -> None:
            await bench.add(connection)
            bench.endpoint.delay = 0.5

        async def cut_when_kept() -> None:
            async with asyncio.timeout(HANG):
                while not await bench.kept():
                    await asyncio.sleep(0.001)
            bench.endpoint.cut()

        cutting = asyncio.ensure_future(cut_when_kept())
        with pytest.raises(neon_async.CommitUnknownError):
            await bench.run(work)
        await cutting
        assert await bench.kept() == [1]

    @pytest.mark.parametrize("sqlstate", ["40003", "08006", "08007"])
    async def test_an_error_that_says_that_the_outcome_is_unknown_is_no_answer(
        self, bench: Bench, sqlstate: str
    ) -> None:
        await bench.at_commit(f"RAISE SQLSTATE '{sqlstate}'")
        with pytest.raises(neon_async.CommitUnknownError) as caught:
            await bench.run(bench.add)
        assert isinstance(caught.value.__cause__, asyncpg.PostgresError)
        assert caught.value.__cause__.sqlstate == sqlstate
        assert len(bench.connections) == 1

    @pytest.mark.parametrize(
        ("severity", "sqlstate", "is_open"),
        [
            ("ERROR", "23505", False),
            ("ERROR", "57014", False),
            ("FATAL", "57P01", True),
            ("FATAL", "XX000", True),
            ("PANIC", "XX001", True),
        ],
    )
    def test_only_an_error_that_leaves_the_session_alive_is_an_answer(
        self, severity: str, sqlstate: str, is_open: bool
    ) -> None:
        error = server_error(f"SFEHLER\0V{severity}\0C{sqlstate}\0Mtext\0\0".encode())
        assert leaves_commit_open(error) is is_open

    @pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
    async def test_a_conflict_at_commit_is_retried(self, bench: Bench, sqlstate: str) -> None:
        await bench.at_commit(f"IF NEW.value = 1 THEN RAISE SQLSTATE '{sqlstate}'; END IF")
        values = itertools.count(1)
        await bench.run(lambda connection: bench.add(connection, next(values)))
        assert await bench.kept() == [2]

    async def test_a_commit_that_asyncpg_refuses_to_send_is_raised_as_it_is(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
            running.add_done_callback(lambda it: it.cancelled() or it.exception())
            await asyncio.sleep(0)

        with pytest.raises(asyncpg.InterfaceError, match="another operation"):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []


# ---------------------------------------------------------------------------------------------------------------------
# Answered with ROLLBACK


async def by_block(bench: Bench, connection: Any, work: Any) -> None:
    async with connection.transaction():
        await work(connection)


async def by_method(bench: Bench, connection: Any, work: Any) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await work(connection)
    await transaction.commit()


async def by_run_transaction(bench: Bench, connection: Any, work: Any) -> None:
    await bench.run(work, acquire=lambda: contextlib.nullcontext(connection))


async def suppressed_error(bench: Bench, connection: Any) -> None:
    with contextlib.suppress(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")


async def suppressed_error_of_a_prepared_statement(bench: Bench, connection: Any) -> None:
    with contextlib.suppress(asyncpg.DivisionByZeroError):
        await connection.fetchval("SELECT 1/$1::int", 0)


async def suppressed_timeout(bench: Bench, connection: Any) -> None:
    """The server learns of it later than the caller: the transaction has not failed yet when the work returns."""
    with contextlib.suppress(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.05)


async def suppressed_cancellation(bench: Bench, connection: Any) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await connection.fetchval("SELECT pg_sleep($1)", 60)


async def suppressed_error_of_a_savepoint(bench: Bench, connection: Any) -> None:
    with contextlib.suppress(asyncpg.PostgresError):
        async with connection.transaction():
            await suppressed_error(bench, connection)


class TestAnsweredWithRollback:
    @pytest.mark.parametrize("commit", [by_block, by_method, by_run_transaction])
    @pytest.mark.parametrize(
        "failure",
        [
            suppressed_error,
            suppressed_error_of_a_prepared_statement,
            suppressed_timeout,
            suppressed_cancellation,
            suppressed_error_of_a_savepoint,
        ],
    )
    async def test_a_commit_that_kept_nothing_is_an_error(self, bench: Bench, commit: Any, failure: Any) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await failure(bench, connection)

        async with bench.acquire() as connection:
            with pytest.raises(neon_async.TransactionAbortedError, match="nothing of the transaction was committed"):
                await commit(bench, connection, work)
            assert not connection.is_in_transaction()
            await by_block(bench, connection, lambda connection: bench.add(connection, 2))
        assert await bench.kept() == [2]
        assert bench.retries == []

    async def test_it_is_not_repeated_where_it_is_read_only(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await suppressed_error(bench, connection)

        with pytest.raises(neon_async.TransactionAbortedError):
            await bench.run(work, readonly=True)
        assert bench.retries == []

    async def test_what_failed_in_a_block_of_its_own_fails_nothing_else(self, bench: Bench) -> None:
        async with bench.acquire() as connection, connection.transaction():
            await bench.add(connection)
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                async with connection.transaction():
                    await connection.execute("SELECT 1/0")
        assert await bench.kept() == [1]

    async def test_through_the_pool(self, bench: Bench, pool: neon_async.Pool) -> None:
        async def call() -> None:
            async with pool.transaction() as connection:
                await bench.add(connection)
                await suppressed_error(bench, connection)

        with pytest.raises(neon_async.TransactionAbortedError):
            await call()
        assert await pool.fetchval(f"SELECT count(*) FROM {bench.name}") == 0

    async def test_a_class_whose_execute_sends_no_commit_has_committed_nothing(self, bench: Bench) -> None:
        class Forgetful(asyncpg.Connection):
            async def execute(self, query: str, *args: Any, **options: Any) -> str:
                return "COMMIT" if query == "COMMIT;" else await super().execute(query, *args, **options)

        async with bench.acquire(connection_class=Forgetful) as connection:
            with pytest.raises(neon_async.TransactionAbortedError, match="did not send COMMIT"):
                await by_block(bench, connection, bench.add)
            assert connection.is_closed()
        assert await bench.kept() == []


# ---------------------------------------------------------------------------------------------------------------------
# Cancelled


class TestCancelled:
    @pytest.mark.parametrize("statement", ["SELECT pg_sleep(60)", None], ids=["in a statement", "in between"])
    async def test_cancelled_work_is_rolled_back_and_not_run_again(self, bench: Bench, statement: str | None) -> None:
        working = asyncio.Event()

        async def work(connection: Any) -> None:
            await bench.add(connection)
            working.set()
            await (connection.execute(statement) if statement else asyncio.sleep(60))

        async with bench.acquire() as connection:
            run = asyncio.ensure_future(bench.run(work, acquire=lambda: contextlib.nullcontext(connection)))
            await working.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert connection.is_closed() or not connection.is_in_transaction()
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    @pytest.mark.parametrize("fails", [False, True], ids=["in the first statement", "in ROLLBACK"])
    async def test_a_cancellation_while_the_server_is_silent_ends_the_call(self, bench: Bench, fails: bool) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            bench.endpoint.freeze()
            raise LookupError

        async with bench.acquire() as connection:
            if not fails:
                bench.endpoint.freeze()
            run = asyncio.ensure_future(bench.run(work, acquire=lambda: contextlib.nullcontext(connection)))
            await asyncio.wait({run}, timeout=0.1)
            assert run.cancel(), "it waits for the server"
            with pytest.raises(asyncio.CancelledError):
                await run
            assert connection.is_closed()  # BEGIN went ahead, and its ROLLBACK is not answered in time
        bench.endpoint.thaw()
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_cancelled_commit_is_raised_as_a_cancellation(self, bench: Bench) -> None:
        await bench.at_commit("PERFORM pg_sleep(60)")
        run = asyncio.ensure_future(bench.run(bench.add))
        await bench.until_committing()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(bench.connections) == 1

    async def test_a_cancelled_pause_ends_the_call(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_transaction, "_pause", lambda _: 60.0)

        async def work(connection: Any) -> None:
            await connection.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

        run = asyncio.ensure_future(bench.run(work))
        await until(lambda: bench.connections and bench.connections[0].is_closed())  # released
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(bench.connections) == 1
        assert bench.retries == []
