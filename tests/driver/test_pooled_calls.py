"""Calls through PgBouncer that take long: how they are bounded, cancelled and left running, and what they reserve.

asyncpg ends a prepare with Flush, not with Sync, and PgBouncer then keeps a server connection for the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.pgbouncer import LocalPgBouncer
from support.pooled import LOCKS, TABLE, change, connector_to, fresh, holds_server, opened, other_client
from support.probes import HANG

pytestmark = pytest.mark.anyio

Call = Callable[[Any], Awaitable[object]]


async def iterate(connection: Any) -> object:
    async with connection.transaction():
        return [row async for row in connection.cursor(fresh())]


async def open_cursor(connection: Any) -> object:
    async with connection.transaction():
        return await (await connection.cursor(fresh())).fetch(10)


ONE_ROW = f"SELECT * FROM {TABLE} WHERE a = $1"

# Every call that waits for a lock on the table.
CALLS = [
    pytest.param(lambda c: c.execute(f"SELECT * FROM {TABLE}"), id="execute"),
    pytest.param(lambda c: c.execute(fresh(ONE_ROW), 1), id="execute with arguments"),
    pytest.param(lambda c: c.executemany(fresh(ONE_ROW), [(1,), (2,)]), id="executemany"),
    pytest.param(lambda c: c.fetch(fresh()), id="fetch"),
    pytest.param(lambda c: c.fetchval(fresh()), id="fetchval"),
    pytest.param(lambda c: c.fetchrow(fresh()), id="fetchrow"),
    pytest.param(lambda c: c.fetchmany(fresh(ONE_ROW), [(1,), (2,)]), id="fetchmany"),
    pytest.param(iterate, id="for row in cursor"),
    pytest.param(open_cursor, id="await cursor"),
    pytest.param(lambda c: c.copy_from_query(ONE_ROW, 1, output=io.BytesIO()), id="copy_from_query"),
    pytest.param(lambda c: c.copy_from_table(TABLE, output=io.BytesIO()), id="copy_from_table"),
    pytest.param(lambda c: c.copy_to_table(TABLE, source=io.BytesIO(b"4\n")), id="copy_to_table"),
    pytest.param(lambda c: c.copy_records_to_table(TABLE, records=[(4,)]), id="copy_records_to_table"),
]
# The same for a statement that was prepared before.
STATEMENT_CALLS = [
    pytest.param(lambda s: s.fetch(1), id="statement.fetch"),
    pytest.param(lambda s: s.fetchval(1), id="statement.fetchval"),
    pytest.param(lambda s: s.fetchrow(1), id="statement.fetchrow"),
    pytest.param(lambda s: s.executemany([(1,), (2,)]), id="statement.executemany"),
    pytest.param(lambda s: s.fetchmany([(1,), (2,)]), id="statement.fetchmany"),
]


@contextlib.asynccontextmanager
async def locked(direct: Any) -> AsyncIterator[None]:
    """Lock the table against everything."""
    async with direct.transaction():
        await direct.execute(f"LOCK TABLE {TABLE}")
        yield


async def until_blocked(direct: Any) -> None:
    """Wait until a session waits for the lock."""
    async with asyncio.timeout(HANG):
        while not await direct.fetchval(f"{LOCKS} AND NOT granted"):
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------------
# Deadlines


@contextlib.asynccontextmanager
async def blocked_retry(direct: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """Have a prepare that fails as stale take 0.9 s, and the next one wait for a lock.

    The event is set as soon as the table is locked.
    """
    is_locked = asyncio.Event()
    get_statement = asyncpg.Connection._get_statement  # type: ignore[attr-defined]
    async with contextlib.AsyncExitStack() as lock:

        async def slow(*args: Any, **keywords: Any) -> Any:
            try:
                return await get_statement(*args, **keywords)
            except asyncpg.InvalidCachedStatementError:
                await lock.enter_async_context(locked(direct))
                is_locked.set()
                await asyncio.sleep(0.9)
                raise

        monkeypatch.setattr(asyncpg.Connection, "_get_statement", slow)
        yield is_locked


async def prepare_once(connection: Any, query: str, **options: Any) -> None:
    await connection.prepare(query, **options)


class TestDeadlines:
    @pytest.mark.parametrize(
        ("call", "command_timeout", "options"),
        [
            pytest.param(lambda c, q, **o: c.fetch(q, **o), None, {"timeout": HANG}, id="fetch, timeout"),
            pytest.param(lambda c, q, **o: c.fetch(q, **o), HANG, {}, id="fetch, command_timeout"),
            pytest.param(lambda c, q, **o: c.fetch(q, **o), 99.0, {"timeout": HANG}, id="fetch, both"),
            pytest.param(lambda c, q, **o: c.fetchmany(q, [()], **o), None, {"timeout": HANG}, id="fetchmany, timeout"),
            pytest.param(prepare_once, None, {"timeout": HANG}, id="prepare, timeout"),
            pytest.param(prepare_once, HANG, {}, id="prepare, command_timeout"),
            pytest.param(prepare_once, None, {}, id="prepare, none"),
        ],
    )
    async def test_a_timeout_is_for_both_attempts_together(
        self,
        pgbouncer: LocalPgBouncer,
        direct: Any,
        monkeypatch: pytest.MonkeyPatch,
        call: Any,
        command_timeout: float | None,
        options: dict[str, float],
    ) -> None:
        query, timeouts = fresh(), []
        connector = connector_to(pgbouncer, command_timeout=command_timeout)
        async with other_client(pgbouncer, query), opened(connector) as connection:
            await connection.fetch(query)
            await change(direct)
            get_statement = asyncpg.Connection._get_statement  # type: ignore[attr-defined]

            async def noting(self: Any, text: str, timeout: float | None, **keywords: Any) -> Any:  # noqa: ASYNC109
                timeouts.append(timeout)
                return await get_statement(self, text, timeout, **keywords)

            monkeypatch.setattr(asyncpg.Connection, "_get_statement", noting)
            await call(connection, query, **options)
            assert connector.healing.heals == 1
        second = timeouts[-1]  # the first attempt of most calls finds the statement in the cache
        if command_timeout is None and not options:
            assert second is None
        else:
            assert second is not None
            assert 0 < second < HANG

    @pytest.mark.parametrize(
        ("call", "command_timeout", "options"),
        [
            pytest.param(lambda c, q, **o: c.fetch(q, **o), None, {"timeout": 1.0}, id="fetch, timeout"),
            pytest.param(lambda c, q, **o: c.fetch(q, **o), 1.0, {}, id="fetch, command_timeout"),
            pytest.param(prepare_once, None, {"timeout": 1.0}, id="prepare, timeout"),
            pytest.param(prepare_once, 1.0, {}, id="prepare, command_timeout"),
        ],
    )
    async def test_a_slow_first_attempt_leaves_little_time_for_the_second(
        self,
        pgbouncer: LocalPgBouncer,
        direct: Any,
        monkeypatch: pytest.MonkeyPatch,
        call: Any,
        command_timeout: float | None,
        options: dict[str, float],
    ) -> None:
        query = fresh()
        connector = connector_to(pgbouncer, command_timeout=command_timeout)
        async with other_client(pgbouncer, query), opened(connector) as connection, blocked_retry(direct, monkeypatch):
            await change(direct)
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                await call(connection, query, **options)
            assert 0.9 < time.monotonic() - began < 1.8, "a second for each attempt would be 1.9"
            assert connector.healing.heals == 1

    async def test_a_method_that_the_caller_overrides_runs_once_for_both_attempts(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        calls: list[tuple[float | None, str]] = []

        class Recording(asyncpg.Connection):
            async def fetch(self, *args: Any, timeout: float | None = None, tag: str = "", **keywords: Any) -> Any:  # noqa: ASYNC109
                calls.append((timeout, tag))
                return await super().fetch(*args, timeout=timeout, **keywords)

        query, connector = fresh(), connector_to(pgbouncer)
        async with other_client(pgbouncer, query), opened(connector, base=Recording) as connection:
            assert isinstance(connection, Recording)
            assert repr(connection).startswith(f"<{Recording.__module__}.{Recording.__qualname__} object")
            await connection.fetch(query, tag="the caller's own keyword")
            await change(direct)
            assert len(await connection.fetch(query, timeout=HANG)) == 3
        assert connector.healing.heals == 1
        assert calls == [(None, "the caller's own keyword"), (HANG, "")]


# ---------------------------------------------------------------------------------------------------------------------
# Left running


class TestLeftRunning:
    @pytest.mark.parametrize("call", CALLS)
    async def test_a_call_that_is_left_running_needs_a_reset_until_it_has_ended(
        self, pgbouncer: LocalPgBouncer, direct: Any, call: Call
    ) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            assert await connection.fetchval("SELECT 1") == 1
            assert connection.get_reset_query() == ""
            async with locked(direct):
                running = asyncio.ensure_future(call(connection))
                await until_blocked(direct)
                assert connection.get_reset_query() == "SELECT 1"
            await running
            assert connection.get_reset_query() == ""

    @pytest.mark.parametrize("call", STATEMENT_CALLS)
    async def test_a_statement_that_is_left_running_needs_a_reset_until_it_has_ended(
        self, pgbouncer: LocalPgBouncer, direct: Any, call: Call
    ) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            statement = await connection.prepare(fresh(ONE_ROW))
            assert await connection.fetchval("SELECT 1") == 1
            assert connection.get_reset_query() == ""
            async with locked(direct):
                running = asyncio.ensure_future(call(statement))
                await until_blocked(direct)
                assert connection.get_reset_query() == "SELECT 1"
            await running
            assert connection.get_reset_query() == ""

    @pytest.mark.parametrize("call", ["execute", "fetch"])
    async def test_it_needs_a_reset_from_its_first_step(self, pgbouncer: LocalPgBouncer, call: str) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            running = asyncio.ensure_future(getattr(connection, call)("SELECT pg_sleep(0.1)"))
            await asyncio.sleep(0)
            assert connection.get_reset_query()
            await running
            assert connection.get_reset_query() == ""


async def fail_on_an_argument(connection: Any) -> None:
    with pytest.raises(asyncpg.DataError):
        await connection.fetch(fresh(ONE_ROW), "no number")


class TestReservedServerConnection:
    @pytest.mark.parametrize(
        "leave",
        [
            pytest.param(lambda c: c.prepare(fresh()), id="only prepared"),
            pytest.param(fail_on_an_argument, id="a wrong argument"),
            pytest.param(lambda c: c.fetch(fresh()), id="nothing unfinished"),
        ],
    )
    async def test_reset_releases_it_with_its_locks(self, pgbouncer: LocalPgBouncer, direct: Any, leave: Call) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            _kept = await leave(connection)
            assert holds_server(connection) or await direct.fetchval(LOCKS) == 0
            await connection.reset(timeout=HANG)
            assert await direct.fetchval(LOCKS) == 0
            assert not holds_server(connection)

    async def test_asyncpg_still_keeps_locks_after_a_prepare(self, pgbouncer: LocalPgBouncer, direct: Any) -> None:
        """When it no longer does, `Session.holds_server` can go."""
        async with opened(connector_to(pgbouncer)) as connection:
            _kept = await connection.prepare(fresh())
            assert holds_server(connection)
            assert await direct.fetchval(LOCKS) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Cancelled


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    async with asyncio.timeout(HANG):
        with pytest.raises(asyncio.CancelledError):
            await task


async def assert_clean(connection: Any, direct: Any) -> None:
    """Check that a connection holds nothing after a reset, and works; or that it has ended."""
    if not connection.is_closed():
        await connection.reset(timeout=HANG)
        assert not holds_server(connection)
        assert await connection.fetchval("SELECT 1") == 1
    assert await direct.fetchval(LOCKS) == 0


class TestCancelled:
    @pytest.mark.parametrize("call", [*CALLS, pytest.param(lambda c: c.prepare(fresh()), id="prepare")])
    async def test_a_cancelled_call_leaves_nothing_after_a_reset(
        self, pgbouncer: LocalPgBouncer, direct: Any, call: Call
    ) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            async with locked(direct):
                task = asyncio.create_task(_awaited(call(connection)))
                await until_blocked(direct)
                await cancel(task)
                in_a_transaction = call in (iterate, open_cursor)  # whose ROLLBACK releases the server connection
                assert connection.is_closed() or holds_server(connection) or in_a_transaction
            await assert_clean(connection, direct)

    @pytest.mark.parametrize("call", STATEMENT_CALLS)
    async def test_a_cancelled_statement_leaves_nothing_after_a_reset(
        self, pgbouncer: LocalPgBouncer, direct: Any, call: Call
    ) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            statement = await connection.prepare(fresh(ONE_ROW))
            await connection.execute("SELECT 1")
            async with locked(direct):
                task = asyncio.create_task(_awaited(call(statement)))
                await until_blocked(direct)
                await cancel(task)
                assert connection.is_closed() or holds_server(connection)
            await assert_clean(connection, direct)

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda c, q: c.fetch(q), id="fetch"),
            pytest.param(lambda c, q: c.prepare(q), id="prepare"),
            pytest.param(lambda c, q: c.executemany(q, [()]), id="executemany"),
        ],
    )
    async def test_the_second_attempt_can_be_cancelled(
        self, pgbouncer: LocalPgBouncer, direct: Any, monkeypatch: pytest.MonkeyPatch, call: Any
    ) -> None:
        query, connector = fresh(), connector_to(pgbouncer)
        async with other_client(pgbouncer, query), opened(connector) as connection:
            await change(direct)
            async with blocked_retry(direct, monkeypatch) as is_locked:
                task = asyncio.create_task(_awaited(call(connection, query)))
                await is_locked.wait()
                await until_blocked(direct)
                await cancel(task)
            assert connector.healing.heals == 1
            assert connector.healing.seconds > 0
            await assert_clean(connection, direct)

    async def test_reset_ends_what_a_cancelled_call_has_only_prepared(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        """In between, asyncpg sends neither a cancel request nor Sync."""
        prepared = asyncio.Event()

        class Pausing(asyncpg.Connection):
            async def _get_statement(self, *args: Any, **keywords: Any) -> Any:
                statement = await super()._get_statement(*args, **keywords)  # type: ignore[misc]
                prepared.set()
                await asyncio.sleep(HANG)
                return statement

        async with opened(connector_to(pgbouncer), base=Pausing) as connection:
            task = asyncio.create_task(connection.fetch(fresh()))
            await prepared.wait()
            await cancel(task)
            assert await direct.fetchval(LOCKS) == 1
            assert holds_server(connection)
            await connection.reset(timeout=HANG)
            assert await direct.fetchval(LOCKS) == 0


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call
