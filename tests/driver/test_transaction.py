"""Work is kept once or not at all, and a transaction is left in time, also when the server has fallen silent."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, until

import neon_async
from neon_async._driver import transaction as _transaction
from neon_async._driver.transaction import Transaction, run_transaction
from neon_async._errors import server_error
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

_names = itertools.count(1)


class OurConnection(asyncpg.Connection):
    """A connection with our transactions, as a pool's are."""

    def transaction(self, *, isolation: Any = None, readonly: bool = False, deferrable: bool = False) -> Transaction:
        return Transaction(self, isolation, readonly, deferrable)


class Bench:
    """A table `{name}`, an observer's connection beside, and runs of work on connections through a relay."""

    def __init__(self, endpoint: LocalEndpoint, admin: Any, name: str) -> None:
        self.endpoint = endpoint
        self.admin = admin
        self.name = name
        self.connections: list[Any] = []  # one for each run
        self.retries: list[float] = []

    async def connect(self, **keywords: Any) -> Any:
        return await neon_async.connect(
            self.endpoint.dsn, trust_anchor=self.endpoint.trust_anchor, connection_class=OurConnection, **keywords
        )

    @contextlib.asynccontextmanager
    async def acquire(self, **keywords: Any) -> AsyncIterator[Any]:
        connection = await self.connect(**keywords)
        self.connections.append(connection)
        try:
            yield connection
        finally:
            connection.terminate()

    async def run(
        self, work: Callable[[Any], Awaitable[Any]], acquire: Any = None, bound: float | None = HANG, **options: Any
    ) -> Any:
        defaults = {"attempts": 3, "isolation": None, "readonly": False, "deferrable": False}
        async with asyncio.timeout(bound):
            return await run_transaction(
                acquire or self.acquire, work, on_retry=self.retries.append, **(defaults | options)
            )

    async def add(self, connection: Any, value: int = 1) -> None:
        await connection.execute(f"INSERT INTO {self.name} VALUES ({value})")

    async def kept(self) -> list[int]:
        return [row["value"] for row in await self.admin.fetch(f"SELECT value FROM {self.name} ORDER BY value")]

    async def at_commit(self, body: str) -> None:
        """Let the server do `body` (PL/pgSQL) when a transaction that has written to the table commits."""
        await self.admin.execute(f"""
            CREATE FUNCTION {self.name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {self.name} DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION {self.name}()""")

    async def until_committing(self) -> None:
        """Wait until a backend has begun to commit, and sleeps in it."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COMMIT%' AND wait_event = 'PgSleep'"
        async with asyncio.timeout(HANG):
            while not await self.admin.fetchval(query):
                await asyncio.sleep(0.005)

    async def kill(self, connection: Any) -> None:
        await self.admin.fetchval("SELECT pg_terminate_backend($1, 10000)", connection.get_server_pid())


@types.coroutine
def drive(run: Any, *, until: Callable[[], bool]) -> Generator[Any, Any, None]:
    """Take the steps of `run`, in the place of a task, which cannot be closed."""
    while True:
        awaited = run.send(None)
        if until():
            return
        yield awaited


@pytest.fixture
async def bench(postgres: LocalPostgres) -> AsyncIterator[Bench]:
    name = f"kept_{next(_names)}"
    admin = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        await admin.execute(f"CREATE TABLE {name} (value int)")
        async with LocalEndpoint(postgres) as endpoint:
            yield Bench(endpoint, admin, name)
        # Servers do not notice at once that a client is gone: they sleep on, with locks on the table.
        await admin.execute(f"""
            SELECT pg_terminate_backend(pid, 10000) FROM pg_locks
            WHERE relation = '{name}'::regclass AND pid <> pg_backend_pid();
            DROP TABLE {name} CASCADE; DROP FUNCTION IF EXISTS {name}""")
    finally:
        admin.terminate()


# ---------------------------------------------------------------------------------------------------------------------
# Work that succeeds


class TestWorkIsRunInATransaction:
    async def test_the_result_is_returned_and_what_was_written_is_kept(self, bench: Bench) -> None:
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
    async def test_the_transaction_is_what_was_asked_for(
        self, bench: Bench, options: Any, expected: tuple[str, ...]
    ) -> None:
        async def work(connection: Any) -> tuple[str, ...]:
            names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
            return tuple([await connection.fetchval(f"SHOW {name}") for name in names])

        assert await bench.run(work, **options) == expected

    async def test_a_transaction_inside_is_a_savepoint(self, bench: Bench) -> None:
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
    async def test_the_connection_can_have_another_transaction_afterwards(self, bench: Bench, fails: bool) -> None:
        """asyncpg's own notes about the transaction are settled, or the next one would be a savepoint in nothing."""

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


async def raced_update(bench: Bench, connection: Any) -> None:
    """40001 from the work: the row was changed since this transaction has read it."""
    await connection.fetch(f"SELECT * FROM {bench.name}")
    await bench.admin.execute(f"UPDATE {bench.name} SET value = 10")
    await connection.execute(f"UPDATE {bench.name} SET value = value + 1")


async def write_skew(bench: Bench, connection: Any) -> None:
    """40001 from COMMIT: two serializable transactions have read what the other writes, and the other was first."""
    async with bench.acquire() as other:
        bench.connections.remove(other)
        rival = other.transaction(isolation="serializable")
        await rival.start()
        await other.fetch(f"SELECT count(*) FROM {bench.name}")
        await connection.fetch(f"SELECT count(*) FROM {bench.name}")
        await connection.execute(f"INSERT INTO {bench.name} VALUES (5)")
        await other.execute(f"INSERT INTO {bench.name} VALUES (10)")
        await rival.commit()


async def deadlock(bench: Bench, connection: Any) -> None:
    """40P01: this transaction waits for one that waits for it, and began to wait last, or gave up first."""
    await connection.execute("SET LOCAL deadlock_timeout = '10ms'")
    await connection.execute("SELECT pg_advisory_xact_lock(1)")
    async with bench.acquire() as other:
        bench.connections.remove(other)
        await other.execute("SET deadlock_timeout = '1min'")
        await other.execute("SELECT pg_advisory_lock(2)")
        waiting = asyncio.ensure_future(other.execute("SELECT pg_advisory_lock(1)"))
        try:
            async with asyncio.timeout(HANG):
                while not await bench.admin.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                ):
                    await asyncio.sleep(0.005)
            await connection.execute("SELECT pg_advisory_xact_lock(2)")
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


CONFLICTS = [
    pytest.param(raced_update, {"isolation": "repeatable_read"}, id="40001 from a statement"),
    pytest.param(write_skew, {"isolation": "serializable"}, id="40001 from COMMIT"),
    pytest.param(deadlock, {}, id="40P01"),
]


async def killed_in_the_middle(bench: Bench, connection: Any) -> None:
    running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    await bench.kill(connection)
    await running


async def killed_between_statements(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await connection.execute("SELECT 1")


async def killed_and_noticed(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await until(connection.is_closed)
    await connection.execute("SELECT 1")


async def killed_before_commit(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await until(connection.is_closed)


async def cut_in_the_middle(bench: Bench, connection: Any) -> None:
    running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    bench.endpoint.cut()
    await running


async def killed_in_a_savepoint(bench: Bench, connection: Any) -> None:
    async with connection.transaction():
        await killed_in_the_middle(bench, connection)


async def killed_and_told(bench: Bench, connection: Any) -> None:
    """In the words of the server, which asyncpg passes on now and then."""
    await killed_before_commit(bench, connection)
    raise server_error(b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0")


LOSSES = [
    pytest.param(loss, {}, id=loss.__name__.replace("_", " "))
    for loss in (
        killed_in_the_middle,
        killed_between_statements,
        killed_and_noticed,
        killed_before_commit,
        killed_and_told,
        cut_in_the_middle,
        killed_in_a_savepoint,
    )
]


class TestWorkIsRunAgain:
    @pytest.mark.parametrize(("failure", "options"), [*CONFLICTS, *LOSSES])
    async def test_a_conflict_or_a_loss_before_commit_costs_another_run(
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
        assert len(bench.connections) == 2, "each run has a connection acquired for it"
        assert len(bench.retries) == 1
        assert bench.retries[0] > 0

    async def test_a_connection_that_turns_out_dead_at_begin_costs_another_run(self, bench: Bench) -> None:
        @contextlib.asynccontextmanager
        async def acquire() -> AsyncIterator[Any]:
            async with bench.acquire() as connection:
                if len(bench.connections) == 1:
                    await bench.kill(connection)
                yield connection

        await bench.run(bench.add, acquire=acquire)
        assert await bench.kept() == [1]
        assert len(bench.retries) == 1

    @pytest.mark.parametrize(
        ("failure", "options", "error"),
        [
            pytest.param(raced_update, {"isolation": "repeatable_read"}, asyncpg.SerializationError, id="conflict"),
            pytest.param(killed_in_the_middle, {}, asyncpg.ConnectionDoesNotExistError, id="loss"),
        ],
    )
    @pytest.mark.parametrize("attempts", [1, 2, 4])
    async def test_the_last_error_passes_as_it_is(
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

    async def test_what_acquire_raises_passes(self, bench: Bench) -> None:
        def acquire() -> Any:
            raise neon_async.PoolTimeoutError("none is free")

        with pytest.raises(neon_async.PoolTimeoutError):
            await bench.run(bench.add, acquire=acquire)
        assert bench.retries == []

    def test_pauses_grow_up_to_a_second_and_are_never_the_same_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("random.random", lambda: 1.0)
        assert [_transaction._pause(number) for number in (1, 2, 3, 7, 10_000)] == [0.02, 0.04, 0.08, 1.0, 1.0]
        monkeypatch.setattr("random.random", lambda: 0.0)
        assert _transaction._pause(7) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Work that does not


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


class TestWorkIsNotRunAgain:
    @pytest.mark.parametrize("lost", [False, True], ids=["on a live connection", "on a lost connection"])
    @pytest.mark.parametrize(
        "failure", [an_error_of_another_library, a_timeout, a_bug, a_bad_argument, an_unknown_commit_elsewhere]
    )
    async def test_an_error_of_the_works_own_passes(self, bench: Bench, failure: Any, lost: bool) -> None:
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
    async def test_any_other_error_of_a_statement_passes(
        self, bench: Bench, query: str, args: Any, error: type[Exception]
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute(query, *args)

        with pytest.raises(error):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_connection_that_is_used_by_two_at_once_is_no_loss(self, bench: Bench) -> None:
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
        assert bench.connections[0].is_closed(), "ROLLBACK could not be sent, so the connection is ended"
        assert await bench.kept() == []

    async def test_a_constraint_that_is_checked_at_commit_passes(self, bench: Bench) -> None:
        await bench.admin.execute(f"ALTER TABLE {bench.name} ADD UNIQUE (value) DEFERRABLE INITIALLY DEFERRED")

        async def work(connection: Any) -> None:
            await bench.add(connection)
            await bench.add(connection)

        with pytest.raises(asyncpg.UniqueViolationError):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_failure_that_the_work_swallows_is_told(self, bench: Bench) -> None:
        """COMMIT is answered with ROLLBACK, which asyncpg does not look at."""

        async def work(connection: Any) -> None:
            await bench.add(connection)
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await connection.execute("SELECT 1/0")

        with pytest.raises(neon_async.TransactionAbortedError, match="Let the error leave the work"):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    @pytest.mark.parametrize(("command", "kept"), [("COMMIT", [1]), ("ROLLBACK", [])])
    async def test_work_that_ends_the_transaction_itself_is_told(
        self, bench: Bench, command: str, kept: list[int]
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute(command)

        with pytest.raises(neon_async.TransactionAbortedError, match="ended the transaction itself"):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == kept

    async def test_a_conflict_after_the_work_has_committed_itself_passes(self, bench: Bench) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            await connection.execute("COMMIT")
            await connection.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

        with pytest.raises(asyncpg.SerializationError):
            await bench.run(work)
        assert await bench.kept() == [1]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    async def test_what_ends_the_program_passes(self, bench: Bench, error: type[BaseException]) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            raise error

        with pytest.raises(error):
            await bench.run(work)
        assert len(bench.connections) == 1
        assert await bench.kept() == []

    async def test_a_coroutine_that_is_closed_awaits_nothing_more(self, bench: Bench) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# COMMIT


async def killed_in_commit(bench: Bench) -> None:
    await bench.until_committing()
    await bench.kill(bench.connections[0])


async def cut_in_commit(bench: Bench) -> None:
    await bench.until_committing()
    bench.endpoint.cut()


async def suspended_in_commit(bench: Bench) -> None:
    await bench.until_committing()
    bench.endpoint.suspend()


async def frozen_in_commit(bench: Bench) -> None:
    await bench.until_committing()
    bench.endpoint.freeze()


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
    async def test_a_loss_while_commit_is_under_way_is_told_and_never_tried_again(
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

    async def test_it_may_have_been_committed_indeed(self, bench: Bench) -> None:
        """The answer is lost on its way, and the row is there."""

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
    async def test_an_answer_that_says_that_nobody_knows_is_no_answer(self, bench: Bench, sqlstate: str) -> None:
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
    def test_only_an_error_after_which_the_session_goes_on_is_an_answer(
        self, severity: str, sqlstate: str, is_open: bool
    ) -> None:
        error = server_error(f"SFEHLER\0V{severity}\0C{sqlstate}\0Mtext\0\0".encode())
        assert _transaction._leaves_commit_open(error) is is_open

    @pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
    async def test_a_conflict_that_commit_meets_costs_another_run(self, bench: Bench, sqlstate: str) -> None:
        await bench.at_commit(f"IF NEW.value = 1 THEN RAISE SQLSTATE '{sqlstate}'; END IF")
        values = itertools.count(1)
        await bench.run(lambda connection: bench.add(connection, next(values)))
        assert await bench.kept() == [2]

    async def test_a_commit_that_asyncpg_refuses_to_send_passes(self, bench: Bench) -> None:
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
# Cancelled


class TestCancelled:
    @pytest.mark.parametrize("statement", ["SELECT pg_sleep(60)", None], ids=["in a statement", "in between"])
    async def test_the_work_is_rolled_back_and_not_run_again(self, bench: Bench, statement: str | None) -> None:
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

    async def test_a_cancelled_commit_is_a_cancellation(self, bench: Bench) -> None:
        await bench.at_commit("PERFORM pg_sleep(60)")
        run = asyncio.ensure_future(bench.run(bench.add))
        await bench.until_committing()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(bench.connections) == 1

    async def test_a_cancelled_pause_is_the_end(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Leaving a transaction


class Mishap(Exception):
    pass


async def within_transaction(connection: Any, body: Callable[[], Awaitable[Any]], *, nested: bool = False) -> None:
    async with connection.transaction():
        if nested:
            await within_transaction(connection, body)
        else:
            await body()


NESTED = pytest.mark.parametrize("nested", [False, True], ids=["outermost", "nested"])


class TestLeavingATransaction:
    async def test_it_is_rolled_back_and_the_connection_goes_on(self, bench: Bench) -> None:
        async def body() -> None:
            await bench.add(connection)
            raise Mishap

        async with bench.acquire() as connection:
            with pytest.raises(Mishap):
                await within_transaction(connection, body)
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1
        assert await bench.kept() == []

    async def test_a_healthy_connection_outlives_a_deadline(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            with pytest.raises(TimeoutError):
                await within_transaction(connection, lambda: connection.execute("SELECT pg_sleep(60)", timeout=0.05))
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1

    async def test_its_status_is_what_the_server_answered_last(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            transaction = connection.transaction()
            statuses = [transaction.status]
            async with transaction:
                statuses.append(transaction.status)
            assert [*statuses, transaction.status] == ["", "BEGIN", "COMMIT"]

    @NESTED
    async def test_the_error_that_tells_of_a_lost_connection_passes(self, bench: Bench, nested: bool) -> None:
        """asyncpg's own would raise InterfaceError in its place, for it cannot roll back."""
        async with bench.acquire() as connection:
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await within_transaction(connection, lambda: killed_in_the_middle(bench, connection), nested=nested)

    async def test_an_error_is_not_hidden_by_a_rollback_that_is_lost(self, bench: Bench) -> None:
        async def body() -> None:
            await bench.kill(connection)  # which nobody has noticed yet
            raise Mishap

        async with bench.acquire() as connection:
            with pytest.raises(Mishap):
                await within_transaction(connection, body)
            assert connection.is_closed()

    @NESTED
    @pytest.mark.parametrize("error", [TimeoutError, asyncio.CancelledError, Mishap])
    async def test_a_rollback_that_is_not_answered_ends_the_connection(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], nested: bool
    ) -> None:
        short, long = "_ROLLBACK_TIMEOUT", "_LATE_ROLLBACK_TIMEOUT"
        if error is not Mishap:
            short, long = long, short
        monkeypatch.setattr(_transaction, short, 0.02)
        monkeypatch.setattr(_transaction, long, 2 * HANG)

        async def body() -> None:
            bench.endpoint.freeze()
            raise error

        async with bench.acquire() as connection, asyncio.timeout(HANG):
            with pytest.raises(error):
                await within_transaction(connection, body, nested=nested)
            assert connection.is_closed()

    @NESTED
    async def test_a_second_cancel_ends_the_connection_at_once(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, nested: bool
    ) -> None:
        monkeypatch.setattr(_transaction, "_LATE_ROLLBACK_TIMEOUT", 2 * HANG)

        async def body() -> None:
            bench.endpoint.freeze()
            await connection.execute("SELECT 1")

        async with bench.acquire() as connection:
            task = asyncio.ensure_future(within_transaction(connection, body, nested=nested))
            for _ in range(2):
                await asyncio.wait({task}, timeout=0.1)
                assert task.cancel(), "one cancel is not enough: it waits for the ROLLBACK"
            async with asyncio.timeout(HANG):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert connection.is_closed()

    async def test_a_cancel_during_the_rollback_takes_the_place_of_an_error(self, bench: Bench) -> None:
        async def body() -> None:
            bench.endpoint.freeze()
            raise Mishap

        async with bench.acquire() as connection:
            task = asyncio.ensure_future(within_transaction(connection, body))
            await asyncio.wait({task}, timeout=0.1)
            assert task.cancel(), "it waits for the ROLLBACK"
            async with asyncio.timeout(HANG):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert connection.is_closed()

    async def test_a_connection_that_was_released_is_not_ended(self, pool: neon_async.Pool) -> None:
        """It may be somebody else's by now."""

        async def body() -> None:
            await pool.release(connection)
            raise Mishap

        connection: Any = await pool.acquire()
        pid = connection.get_server_pid()
        with pytest.raises(Mishap):
            await within_transaction(connection, body)
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid


# ---------------------------------------------------------------------------------------------------------------------
# Through the pool


@pytest.fixture
async def pool(bench: Bench) -> AsyncIterator[neon_async.Pool]:
    async with neon_async.create_pool(bench.endpoint.dsn, trust_anchor=bench.endpoint.trust_anchor, max_size=1) as pool:
        yield pool
        bench.endpoint.thaw()


class TestThePool:
    async def test_it_returns_what_the_work_returns(self, bench: Bench, pool: neon_async.Pool) -> None:
        async def work(connection: Any) -> str:
            await bench.add(connection)
            async with connection.transaction():
                await bench.add(connection)
            return "done"

        assert await pool.run_transaction(work) == "done"
        assert await bench.kept() == [1, 1]
        assert pool.stats().retries == 0

    @pytest.mark.parametrize(("failure", "options"), [*CONFLICTS, *LOSSES])
    async def test_it_runs_work_again_on_the_same_slot(
        self, bench: Bench, pool: neon_async.Pool, failure: Any, options: Any
    ) -> None:
        await bench.add(bench.admin, 0)
        runs = 0

        async def work(connection: Any) -> None:
            nonlocal runs
            runs += 1
            await bench.add(connection, 1)
            if runs == 1:
                await failure(bench, Unproxied(connection))

        async with asyncio.timeout(HANG):
            await pool.run_transaction(work, **options)
        assert (await bench.kept()).count(1) == 1
        assert pool.stats().retries == 1
        assert pool.stats().retry_seconds > 0

    async def test_an_unknown_commit_leaves_the_pool_usable(self, bench: Bench, pool: neon_async.Pool) -> None:
        await bench.at_commit("PERFORM pg_sleep(60)")
        ending = asyncio.ensure_future(cut_in_commit(bench))
        with pytest.raises(neon_async.CommitUnknownError):
            await pool.run_transaction(bench.add)
        await ending
        assert await pool.fetchval("SELECT 1") == 1

    async def test_a_frozen_server_ends_the_work_at_its_deadline_and_loses_no_slot(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            bench.endpoint.freeze()
            await connection.execute("SELECT 1")

        async with asyncio.timeout(HANG):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.run_transaction(work), 0.3)
            bench.endpoint.thaw()
            assert await pool.fetchval("SELECT 1") == 1
        assert await bench.kept() == []


class Unproxied:
    """A connection of a pool, which can be asked whether it is closed when it has left the pool because of that."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy
        self._itself = proxy.transaction().connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._itself if name == "is_closed" else self._proxy, name)


# ---------------------------------------------------------------------------------------------------------------------
# A frozen server

_KNOWN, _KNOWN_ROW = "SELECT 42", "SELECT $1::int"  # prepared before the server freezes
_MANY = 3_000_000


async def read_on(connection: Any, **deadline: Any) -> None:
    async for _ in connection.cursor("SELECT generate_series(1, 1000)", **deadline):
        pass


async def discard(_: bytes) -> None:
    pass


def rows(number: int) -> Iterator[tuple[int]]:
    return ((number,) for number in range(number))


async def chunks(number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b"1\n" * 5_000


# Each takes `timeout=` as well.
CALLS: dict[str, Callable[..., Awaitable[Any]]] = {
    "execute": lambda it, **deadline: it.execute("SELECT 1", **deadline),
    "execute with arguments": lambda it, **deadline: it.execute("SELECT $1::int", 1, **deadline),
    "fetch": lambda it, **deadline: it.fetch("SELECT 1", **deadline),
    "fetchval": lambda it, **deadline: it.fetchval("SELECT 1", **deadline),
    "fetchrow": lambda it, **deadline: it.fetchrow("SELECT 1", **deadline),
    "fetch of a known statement": lambda it, **deadline: it.fetch(_KNOWN, **deadline),
    "fetchmany": lambda it, **deadline: it.fetchmany("SELECT $1::int", rows(3), **deadline),
    "executemany": lambda it, **deadline: it.executemany("SELECT $1::int", rows(3), **deadline),
    "prepare": lambda it, **deadline: it.prepare("SELECT 1", **deadline),
    "cursor": lambda it, **deadline: read_on(it, **deadline),
    "copy_from_query": lambda it, **deadline: it.copy_from_query("SELECT 1", output=discard, **deadline),
    "copy_records_to_table": lambda it, **deadline: it.copy_records_to_table("pg_am", records=rows(3), **deadline),
    # More than the buffers on the way take, so that the client waits for room.
    "fetchmany of many": lambda it, **deadline: it.fetchmany(_KNOWN_ROW, rows(_MANY), **deadline),
    "executemany of many": lambda it, **deadline: it.executemany(_KNOWN_ROW, rows(_MANY), **deadline),
    "copy_to_table of many": lambda it, **deadline: it.copy_to_table("copied", source=chunks(_MANY), **deadline),
    "copy_records_to_table of many": lambda it, **deadline: it.copy_records_to_table(
        "copied", records=rows(_MANY), **deadline
    ),
    "reset": lambda it, **deadline: it.reset(**deadline),
    "close": lambda it, **deadline: it.close(**deadline),
}
# These know no deadline of their own.
CALLS_WITHOUT_TIMEOUT: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "add_listener": lambda it: it.add_listener("channel", print),
    "set_type_codec": lambda it: it.set_type_codec("json", encoder=str, decoder=str, schema="public"),
    "begin": lambda it: it.transaction().start(),
    "savepoint": lambda it: within_transaction(it, lambda: it.execute("SELECT 1")),
}


class TestAFrozenServer:
    @pytest.mark.parametrize(
        ("call", "by_timeout"),
        [
            *(pytest.param(call, False, id=name) for name, call in (CALLS | CALLS_WITHOUT_TIMEOUT).items()),
            *(pytest.param(call, True, id=f"{name}, timeout=") for name, call in CALLS.items()),
        ],
    )
    async def test_every_call_returns_soon_after_its_deadline(
        self, bench: Bench, pool: neon_async.Pool, call: Any, by_timeout: bool
    ) -> None:
        """One cancellation is enough, also for the transaction and the loan that the call stands in."""

        async def body() -> None:
            bench.endpoint.freeze()
            if by_timeout:
                await call(connection, timeout=0.1)
            else:
                async with asyncio.timeout(0.1):
                    await call(connection)

        async with asyncio.timeout(HANG):
            async with pool.acquire() as connection:
                await connection.fetch(_KNOWN)
                await connection.fetch(_KNOWN_ROW, 1)
                await connection.execute("CREATE TEMP TABLE copied (number int)")
                with pytest.raises(TimeoutError):
                    await within_transaction(connection, body)
            bench.endpoint.thaw()
            assert await pool.fetchval("SELECT 1") == 1, "the slot is not lost"

    async def test_many_rows_are_given_up_on_a_healthy_server_too(self, bench: Bench, pool: neon_async.Pool) -> None:
        """asyncpg waits for ever for an answer to what it has not sent to the end."""
        async with asyncio.timeout(HANG):
            async with pool.acquire() as connection:
                await connection.fetch(_KNOWN_ROW, 1)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connection.executemany(_KNOWN_ROW, rows(_MANY)), 0.1)
            assert await pool.fetchval("SELECT 1") == 1
