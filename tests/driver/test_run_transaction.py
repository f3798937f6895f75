"""Work in a transaction is kept once or not at all: when it runs again, and when it does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.probes import make_pool, until
from support.transactions import (
    CONFLICTS,
    LOSSES,
    Bench,
    drive,
    killed_before_commit,
    killed_in_a_statement,
    raced_update,
)

import neon_async
from neon_async._driver import transaction as _transaction

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------------------------------------------------------------------
# Work that succeeds


class TestWorkThatSucceeds:
    async def test_the_result_is_returned_and_the_writes_are_kept(self, bench: Bench) -> None:
        async def work(connection: Any) -> str:
            assert connection.is_in_transaction()
            await bench.add(connection)
            return "done"

        assert await bench.run(work) == "done"
        assert await bench.kept() == [1]
        assert bench.retries == []

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            pytest.param({}, ("read committed", "off", "off"), id="defaults"),
            pytest.param({"isolation": "repeatable_read"}, ("repeatable read", "off", "off"), id="isolation"),
            pytest.param({"readonly": True}, ("read committed", "on", "off"), id="readonly"),
            pytest.param(
                {"isolation": "serializable", "readonly": True, "deferrable": True},
                ("serializable", "on", "on"),
                id="all",
            ),
        ],
    )
    async def test_the_transaction_has_the_options_of_the_call(
        self, bench: Bench, options: Any, expected: tuple[str, ...]
    ) -> None:
        async def work(connection: Any) -> tuple[str, ...]:
            names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
            return tuple([await connection.fetchval(f"SHOW {name}") for name in names])

        assert await bench.run(work, **options) == expected

    async def test_a_transaction_inside_it_is_a_savepoint(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection, 1)
            with contextlib.suppress(ZeroDivisionError):
                async with connection.transaction():
                    await bench.add(connection, 2)
                    raise ZeroDivisionError
            async with connection.transaction():
                await bench.add(connection, 3)

        await bench.run(work)
        assert await bench.kept() == [1, 3]

    @pytest.mark.parametrize("fails", [False, True], ids=["committed", "rolled back"])
    async def test_the_connection_can_begin_another_transaction_afterwards(self, bench: Bench, fails: bool) -> None:
        """asyncpg's own bookkeeping is closed: otherwise the next one would be a savepoint outside a transaction."""

        async def work(connection: Any) -> None:
            await bench.add(connection, 1)
            if fails:
                await connection.execute("SELECT 1/0")

        async with bench.acquire() as connection:
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await bench.run(work, acquire=lambda: contextlib.nullcontext(connection))
            async with connection.transaction():
                await bench.add(connection, 2)
        assert await bench.kept() == ([2] if fails else [1, 2])


# ---------------------------------------------------------------------------------------------------------------------
# Work that runs again


class TestWorkThatRunsAgain:
    @pytest.mark.parametrize(("failure", "options"), [*CONFLICTS, *LOSSES])
    async def test_a_conflict_or_a_loss_before_commit_is_retried(
        self, bench: Bench, failure: Any, options: Any
    ) -> None:
        await bench.add(bench.admin, 0)
        runs = 0

        async def work(connection: Any) -> int:
            nonlocal runs
            runs += 1
            await bench.add(connection, 1)
            if runs == 1:
                await failure(bench, connection)
            return runs

        assert await bench.run(work, **options) == 2
        assert (await bench.kept()).count(1) == 1
        assert len(bench.connections) == 2, "each run acquires a connection"
        assert len(bench.retries) == 1
        assert bench.retries[0] > 0

    @pytest.mark.parametrize("noticed", [False, True], ids=["not noticed", "noticed"])
    async def test_a_connection_that_is_found_dead_at_begin_is_retried(self, bench: Bench, noticed: bool) -> None:
        @contextlib.asynccontextmanager
        async def acquire() -> AsyncIterator[Any]:
            async with bench.acquire() as connection:
                if len(bench.connections) == 1:
                    await bench.kill(connection)
                    if noticed:
                        await until(connection.is_closed)
                yield connection

        await bench.run(bench.add, acquire=acquire)
        assert await bench.kept() == [1]
        assert len(bench.retries) == 1

    async def test_a_connection_that_ends_while_setup_runs_is_retried(self, bench: Bench) -> None:
        ended: list[Any] = []

        async def setup(connection: Any) -> None:
            if not ended:
                ended.append(connection._con)
                await bench.kill(connection)
                await until(ended[0].is_closed)

        async with make_pool(bench.endpoint, setup=setup) as pool:
            await pool.run_transaction(bench.add)
            assert pool.stats().retries == 1
        assert await bench.kept() == [1]

    @pytest.mark.parametrize(
        ("failure", "options", "error"),
        [
            pytest.param(raced_update, {"isolation": "repeatable_read"}, asyncpg.SerializationError, id="conflict"),
            pytest.param(killed_in_a_statement, {}, asyncpg.ConnectionDoesNotExistError, id="loss"),
        ],
    )
    @pytest.mark.parametrize("attempts", [1, 2, 4])
    async def test_the_last_error_is_raised_as_it_is(
        self, bench: Bench, failure: Any, options: Any, error: type[Exception], attempts: int
    ) -> None:
        await bench.add(bench.admin, 0)
        raised: list[BaseException] = []

        async def work(connection: Any) -> None:
            try:
                await failure(bench, connection)
            except BaseException as error:
                raised.append(error)
                raise

        with pytest.raises(error) as caught:
            await bench.run(work, attempts=attempts, **options)
        assert caught.value is raised[-1]
        assert len(raised) == attempts
        assert len(bench.retries) == attempts - 1

    async def test_a_stale_statement_is_retried(self, bench: Bench) -> None:
        """The transaction has failed, so nothing of it was kept, and asyncpg prepares the statement anew."""
        runs = 0

        async def work(connection: Any) -> Any:
            nonlocal runs
            runs += 1
            await connection.execute(f"INSERT INTO {bench.name}_log VALUES (1)")
            return await connection.fetch(f"SELECT * FROM {bench.name}")

        await bench.admin.execute(f"CREATE TABLE {bench.name}_log (value int)")
        async with bench.acquire() as connection:
            await connection.fetch(f"SELECT * FROM {bench.name}")
            await bench.admin.execute(f"ALTER TABLE {bench.name} ADD COLUMN added int")
            await bench.run(work, acquire=lambda: contextlib.nullcontext(connection))
        assert runs == 2
        assert await bench.admin.fetchval(f"SELECT count(*) FROM {bench.name}_log") == 1
        await bench.admin.execute(f"DROP TABLE {bench.name}_log")

    async def test_an_error_of_acquire_is_raised_as_it_is(self, bench: Bench) -> None:
        def acquire() -> Any:
            raise neon_async.PoolTimeoutError("none is free")

        with pytest.raises(neon_async.PoolTimeoutError):
            await bench.run(bench.add, acquire=acquire)
        assert bench.retries == []

    def test_pauses_are_random_and_grow_to_a_second_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("random.random", lambda: 1.0)
        assert [_transaction._pause(number) for number in (1, 2, 3, 7, 10_000)] == [0.02, 0.04, 0.08, 1.0, 1.0]
        monkeypatch.setattr("random.random", lambda: 0.0)
        assert _transaction._pause(7) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Work that does not run again


def an_error_of_another_library(_: Any) -> None:
    raise ConnectionResetError("of an HTTP client")


def a_timeout(_: Any) -> None:
    raise TimeoutError


def a_bug(_: Any) -> None:
    raise ValueError


def a_bad_argument(_: Any) -> None:
    raise asyncpg.exceptions.ClientConfigurationError("an InterfaceError, which is not about the connection")


def an_unknown_commit_elsewhere(_: Any) -> None:
    raise neon_async.CommitUnknownError("of another transaction")


class TestWorkThatDoesNotRunAgain:
    @pytest.mark.parametrize("lost", [False, True], ids=["on a live connection", "on a lost connection"])
    @pytest.mark.parametrize(
        "failure", [an_error_of_another_library, a_timeout, a_bug, a_bad_argument, an_unknown_commit_elsewhere]
    )
    async def test_an_error_of_the_work_itself_is_raised_as_it_is(self, bench: Bench, failure: Any, lost: bool) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            if lost:
                await killed_before_commit(bench, connection)
            failure(connection)

        with pytest.raises((ConnectionResetError, TimeoutError, ValueError, neon_async.CommitUnknownError)):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    @pytest.mark.parametrize(
        ("query", "args", "error"),
        [
            pytest.param("SELECT 1/0", (), asyncpg.DivisionByZeroError, id="server"),
            pytest.param("SELECT $1::int", ("x",), asyncpg.DataError, id="client"),
        ],
    )
    async def test_any_other_error_of_a_statement_is_raised_as_it_is(
        self, bench: Bench, query: str, args: Any, error: type[Exception]
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute(query, *args)

        with pytest.raises(error):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_connection_that_is_used_twice_at_once_is_not_lost(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0)
            try:
                await connection.execute("SELECT 1")
            finally:
                running.add_done_callback(lambda it: it.cancelled() or it.exception())

        with pytest.raises(asyncpg.InterfaceError, match="another operation"):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert bench.connections[0].is_closed(), "ROLLBACK could not be sent, so the connection was terminated"
        assert await bench.kept() == []

    async def test_an_error_of_asyncpgs_own_does_not_run_the_work_again(self, bench: Bench) -> None:
        """A text codec cannot be used for a binary COPY: asyncpg raises InternalClientError each time."""
        runs = 0

        async def work(connection: Any) -> None:
            nonlocal runs
            runs += 1
            await connection.copy_records_to_table(f"{bench.name}_json", records=[("{}",)])

        await bench.admin.execute(f"CREATE TABLE {bench.name}_json (value jsonb)")
        async with bench.acquire() as connection:
            await connection.set_type_codec("jsonb", encoder=str, decoder=str, schema="pg_catalog")
            with pytest.raises(asyncpg.InternalClientError, match="no binary format encoder"):
                await bench.run(work, acquire=lambda: contextlib.nullcontext(connection))
            assert runs == 1
            assert not connection.is_closed()
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1
        await bench.admin.execute(f"DROP TABLE {bench.name}_json")

    @pytest.mark.parametrize("method", ["execute", "fetch"])
    async def test_a_class_whose_execute_returns_nothing_is_not_taken_for_a_rollback(
        self, bench: Bench, method: str
    ) -> None:
        class Silent(asyncpg.Connection):
            async def execute(self, query: str, *args: Any, **options: Any) -> None:  # type: ignore[override]
                await getattr(super(), method)(query, *args, **options)

        await bench.run(bench.add, acquire=lambda: bench.acquire(connection_class=Silent))
        assert await bench.kept() == [1]

    async def test_a_class_whose_execute_returns_nothing_hides_no_rollback(self, bench: Bench) -> None:
        class Silent(asyncpg.Connection):
            async def execute(self, query: str, *args: Any, **options: Any) -> str:
                await super().execute(query, *args, **options)
                return "COMMIT"

        async def work(connection: Any) -> None:
            await bench.add(connection)
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await connection.execute("SELECT 1/0")

        with pytest.raises(neon_async.TransactionAbortedError, match="Let the error leave the work"):
            await bench.run(work, acquire=lambda: bench.acquire(connection_class=Silent))
        assert await bench.kept() == []

    async def test_a_class_whose_execute_sends_no_commit_has_committed_nothing(self, bench: Bench) -> None:
        class Forgetful(asyncpg.Connection):
            async def execute(self, query: str, *args: Any, **options: Any) -> str:
                return "COMMIT" if query == "COMMIT;" else await super().execute(query, *args, **options)

        with pytest.raises(neon_async.TransactionAbortedError, match="did not send COMMIT"):
            await bench.run(bench.add, acquire=lambda: bench.acquire(connection_class=Forgetful))
        assert bench.connections[0].is_closed()
        assert await bench.kept() == []

    async def test_a_loss_after_the_work_has_committed_is_raised_as_it_is(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute("COMMIT")
            await killed_before_commit(bench, connection)
            await connection.execute("SELECT 1")

        with pytest.raises(neon_async.ConnectionLostError):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == [1]

    async def test_a_loss_of_another_connection_is_raised_as_it_is(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            other = await bench.connect()
            await killed_before_commit(bench, other)
            await other.execute("SELECT 1")

        with pytest.raises(neon_async.ConnectionLostError):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_violation_of_a_deferred_constraint_is_raised_as_it_is(self, bench: Bench) -> None:
        await bench.admin.execute(f"ALTER TABLE {bench.name} ADD UNIQUE (value) DEFERRABLE INITIALLY DEFERRED")

        async def work(connection: Any) -> None:
            await bench.add(connection)
            await bench.add(connection)

        with pytest.raises(asyncpg.UniqueViolationError):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_failure_that_the_work_suppresses_is_reported(self, bench: Bench) -> None:
        """The server answers COMMIT with ROLLBACK, and asyncpg does not read the answer."""

        async def work(connection: Any) -> None:
            await bench.add(connection)
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await connection.execute("SELECT 1/0")

        with pytest.raises(neon_async.TransactionAbortedError, match="Let the error leave the work"):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    @pytest.mark.parametrize(("command", "kept"), [("COMMIT", [1]), ("ROLLBACK", [])])
    async def test_work_that_ends_the_transaction_itself_is_reported(
        self, bench: Bench, command: str, kept: list[int]
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute(command)

        with pytest.raises(neon_async.TransactionAbortedError, match="ended the transaction itself"):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == kept

    async def test_a_conflict_after_the_work_has_committed_is_raised_as_it_is(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute("COMMIT")
            await connection.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

        with pytest.raises(asyncpg.SerializationError):
            await bench.run(work)
        assert await bench.kept() == [1]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    async def test_an_exception_that_ends_the_program_is_raised_as_it_is(
        self, bench: Bench, error: type[BaseException]
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            raise error

        with pytest.raises(error):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_coroutine_that_is_closed_does_not_await_a_rollback(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            working.append(connection)
            await asyncio.sleep(0)

        working: list[Any] = []
        async with bench.acquire() as connection:
            run = bench.run(work, acquire=lambda: contextlib.nullcontext(connection), bound=None)
            await drive(run, until=lambda: bool(working))
            run.close()
            assert connection.is_closed()
        assert await bench.kept() == []

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"attempts": 0}, "attempts"),
            ({"attempts": True}, "attempts"),
            ({"attempts": 2.0}, "attempts"),
            ({"isolation": "serialisable"}, "isolation"),
            ({"isolation": ["serializable"]}, "isolation"),
            ({"work": None}, "work"),
        ],
        ids=str,
    )
    async def test_a_bad_argument_is_refused_before_a_connection_is_acquired(
        self, bench: Bench, arguments: Any, named: str
    ) -> None:
        with pytest.raises(neon_async.ConfigurationError, match=f"^{named} must be"):
            await bench.run(**({"work": bench.add} | arguments))
        assert bench.connections == []
