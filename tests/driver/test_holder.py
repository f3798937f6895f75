"""Each private name of asyncpg that `_driver.holder` uses on connections does what we need, in every version.

`pins` names them; `test_private_names.py` checks that none is missing. The names of pools are in `test_lending.py`,
those of statements in `test_holder_statements.py`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.plain import asyncpg_arguments, asyncpg_connection
from support.private_names import pins
from support.probes import HANG, connected, until

from neon_async._driver import holder
from neon_async._driver.holder import ConnectionHooks, Holder, session_of
from neon_async._driver.session import NO_CALLBACKS, Callbacks
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

IS_ASYNCPG_0_31 = "_pool_holder" not in asyncpg.Connection.__slots__


@pytest.fixture
async def connection(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres) as connection:
        yield connection


@pytest.fixture
async def admin(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres) as connection:
        yield connection


async def cancel_a_statement(connection: Any) -> None:
    """Cancel a statement, so that its cancellation is under way afterwards."""
    # The server reports that the statement runs: a cancel request that comes earlier has no effect.
    runs = asyncio.Event()
    connection.add_log_listener(listener := lambda *_: runs.set())
    statement = asyncio.ensure_future(
        connection.execute("DO 'BEGIN RAISE NOTICE ''runs''; PERFORM pg_sleep(600); END'")
    )
    async with asyncio.timeout(HANG):
        await runs.wait()
    connection.remove_log_listener(listener)
    statement.cancel()
    with pytest.raises(asyncio.CancelledError):
        await statement


# ---------------------------------------------------------------------------------------------------------------------
# A connection: its session, its end, its cancel requests


class TestSession:
    @pins("_transport", "_con")
    async def test_it_is_found_on_a_connection_and_on_its_proxy_until_its_loan_has_ended(self, connection: Any) -> None:
        session = session_of(connection)
        assert session is not None
        owner = Holder(None)
        owner.adopt(connection)
        proxy = owner.lend()
        assert session_of(proxy) is session
        owner.take_back()
        assert session_of(proxy) is None
        assert session_of(connection) is session

    async def test_it_is_not_found_on_connections_of_plain_asyncpg_or_on_anything_else(
        self, postgres: LocalPostgres
    ) -> None:
        async with (
            asyncpg_connection(postgres) as plain,
            asyncpg.create_pool(**asyncpg_arguments(postgres), min_size=0) as pool,
            pool.acquire() as lent,
        ):
            assert [session_of(one) for one in (plain, lent, pool, None, object())] == [None] * 5


async def close(connection: Any, _: Any) -> None:
    await connection.close()


async def terminate(connection: Any, _: Any) -> None:
    connection.terminate()


async def kill(connection: Any, admin: Any) -> None:
    await admin.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
    await until(connection.is_closed)


async def kill_in_a_statement(connection: Any, admin: Any) -> None:
    statement = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    await kill(connection, admin)
    await asyncio.wait({statement})
    statement.exception()


async def close_without_an_end(connection: Any, admin: Any) -> None:
    closing = asyncio.ensure_future(connection.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})


class TestEnd:
    @pytest.mark.parametrize(
        "end",
        [
            pytest.param(close, id="closed"),
            pytest.param(close_without_an_end, id="close is cancelled"),
            pytest.param(terminate, id="terminated"),
            pytest.param(kill, id="killed"),
            pytest.param(kill_in_a_statement, id="killed in a statement"),
        ],
    )
    @pins("_cleanup")
    async def test_the_end_of_a_connection_is_reported_once(
        self, connection: Any, admin: Any, end: Callable[[Any, Any], Awaitable[None]]
    ) -> None:
        reported: list[bool] = []
        session = session_of(connection)
        assert session is not None
        session.on_closed = lambda: reported.append(connection.is_closed())
        await end(connection, admin)
        await until(lambda: reported)
        connection.terminate()
        await connection.close()
        assert reported == [True]


class TestHasEnded:
    async def test_a_connection_has_ended_when_it_is_closed(self, connection: Any) -> None:
        assert not holder.has_ended(connection)
        connection.terminate()
        assert holder.has_ended(connection)

    @pins("_con")
    async def test_what_was_lent_has_ended_with_its_loan(self, connection: Any) -> None:
        owner = Holder(None)
        owner.adopt(connection)
        proxy = owner.lend()
        assert not holder.has_ended(proxy)
        owner.take_back()
        assert holder.has_ended(proxy)

    @pins("_holder", "_pool")
    async def test_the_pool_of_a_loan_is_known_after_it(self, connection: Any) -> None:
        pool = object()
        owner = Holder(pool)
        owner.adopt(connection)
        proxy = owner.lend()
        owner.take_back()
        assert holder.pool_of(proxy) is pool


class TestCancelRequests:
    @pins("_cancel")
    def test_asyncpgs_method_has_the_parameters_of_ours(self) -> None:
        asyncpgs = inspect.signature(asyncpg.Connection._cancel).parameters  # type: ignore[attr-defined]
        ours = inspect.signature(ConnectionHooks._cancel).parameters
        assert list(ours)[: len(asyncpgs)] == list(asyncpgs)
        assert inspect.iscoroutinefunction(asyncpg.Connection._cancel)  # type: ignore[attr-defined]

    @pins("_protocol", "_config")
    async def test_a_connection_has_what_a_cancel_request_needs(self, postgres: LocalPostgres) -> None:
        async with connected(postgres, command_timeout=7) as connection:
            assert connection._protocol.backend_pid == await connection.fetchval("SELECT pg_backend_pid()")
            assert isinstance(connection._protocol.backend_secret, int)
            assert connection._config.command_timeout == 7

    @pins("_cancel_current_command")
    def test_asyncpg_passes_the_future_of_a_request_first(self) -> None:
        """Ours resolves it where there is nothing to cancel; test_copy_sinks shows that it is called."""
        asyncpgs = inspect.signature(asyncpg.Connection._cancel_current_command)  # type: ignore[attr-defined]
        assert list(asyncpgs.parameters)[:2] == ["self", "waiter"]
        assert not inspect.iscoroutinefunction(asyncpg.Connection._cancel_current_command)  # type: ignore[attr-defined]

    @pins("_cancel", "_cancellations")
    async def test_asyncpg_runs_it_as_a_task_that_it_keeps_until_its_end(
        self, connection: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[bool, tuple[Any, ...]]] = []
        genuine = ConnectionHooks._cancel

        async def record(connection: Any, *arguments: Any) -> None:
            calls.append((asyncio.current_task() in connection._cancellations, arguments))
            await genuine(connection, *arguments)

        monkeypatch.setattr(ConnectionHooks, "_cancel", record)
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
        await until(lambda: not connection._cancellations)
        ((was_kept, (waiter, *_)),) = calls
        assert was_kept
        assert isinstance(waiter, asyncio.Future)
        assert waiter.done()

    @pins("_abort", "_protocol")
    async def test_a_call_that_meets_the_end_of_its_connection_between_two_messages_says_so(
        self, connection: Any
    ) -> None:
        """asyncpg's connection has no protocol any more then, and raises AttributeError."""
        statement = await connection.prepare("SELECT 1")
        connection.terminate()
        assert connection.is_closed()
        with pytest.raises(asyncpg.InterfaceError, match="connection is closed"):
            connection._protocol.bind_execute(None, (), "", 0, False, None)
        with pytest.raises(asyncpg.InterfaceError, match="closed"):
            await statement.fetch()
        connection.terminate()
        await connection.close()

    @pins("_aborted")
    async def test_a_terminated_connection_is_aborted(self, connection: Any) -> None:
        assert connection._aborted is False
        connection.terminate()
        assert connection._aborted is True

    @pins("_loop", "_stmt_cache")
    async def test_a_connection_and_its_statement_cache_hold_the_running_loop(self, connection: Any) -> None:
        loop, session = asyncio.get_running_loop(), session_of(connection)
        assert (connection._loop, connection._stmt_cache._loop) == (loop, loop)
        connection._loop = connection._stmt_cache._loop = None
        assert session is not None
        holder.begin_session(connection, session, lambda protocol, _: protocol)
        assert (connection._loop, connection._stmt_cache._loop) == (loop, loop)

    @pins("_stmt_cache")
    async def test_cached_statements_expire_by_the_loop_of_the_cache(self, postgres: LocalPostgres) -> None:
        prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'"
        async with connected(postgres, max_cached_statement_lifetime=0.5) as connection:
            await connection.fetch("SELECT 42")
            assert await connection.fetchval(prepared) == 1
            await asyncio.sleep(0.6)
            await connection.fetch("SELECT 43")  # asyncpg closes expired ones when it prepares another
            assert await connection.fetchval(prepared) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What a caller has left


async def end_unnoticed(connection: Any) -> None:
    """End a transaction of asyncpg's without asyncpg."""
    await connection.transaction().start()
    await connection.execute("ROLLBACK")
    assert not connection.is_in_transaction()


class TestCachedStatements:
    @pins("_prepare")
    async def test_a_statement_is_prepared_once_and_others_by_asyncpgs_method_each_time(self, connection: Any) -> None:
        known = "SELECT count(*) FROM pg_prepared_statements WHERE statement = $1"
        for query, times in (("SELECT 6 * 7", 1), ("SELECT 7 * 6", 3)):
            prepare = connection.prepare if times > 1 else lambda query: holder.prepare_cached(connection, query)
            statements = [await prepare(query) for _ in range(3)]
            assert [await statement.fetchval() for statement in statements] == [42, 42, 42]
            assert await connection.fetchval(known, query) == times


class TestLeftovers:
    @pytest.mark.parametrize(
        "leave",
        [
            pytest.param(lambda c: c.execute("BEGIN"), id="on the server"),
            pytest.param(lambda c: c.transaction().start(), id="of asyncpg"),
            pytest.param(end_unnoticed, id="that asyncpg takes for open"),
        ],
    )
    @pins("_top_xact", "_protocol")
    async def test_an_open_transaction_is_seen_reported_and_rolled_back(
        self, connection: Any, leave: Callable[[Any], Awaitable[None]]
    ) -> None:
        assert not holder.has_transaction(connection)
        await connection.execute("CREATE TEMP TABLE left_over (a int)")
        await leave(connection)
        assert holder.has_transaction(connection)
        reported: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context["message"]))
        try:
            await holder.roll_back(connection)
        finally:
            loop.set_exception_handler(None)
        assert not holder.has_transaction(connection)
        assert reported == [f"Resetting connection with an active transaction {connection!r}"]
        async with connection.transaction():
            await connection.execute("INSERT INTO left_over VALUES (1)")
        assert await connection.fetchval("SELECT count(*) FROM left_over") == 1

    @pins("_managed")
    async def test_a_transaction_of_a_block_is_rolled_back_without_a_report(self, connection: Any) -> None:
        reported: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        try:
            async with connection.transaction():
                assert holder.has_transaction(connection)
                await holder.roll_back(connection)
                assert not holder.has_transaction(connection)
        finally:
            loop.set_exception_handler(None)
        assert reported == []

    @pins("_listeners", "_log_listeners", "_query_loggers", "_termination_listeners")
    async def test_callbacks_are_seen_and_set_back(self, connection: Any) -> None:
        def hear(*_: object) -> None:
            raise AssertionError("a callback that was forgotten has been called")

        before = holder.callbacks_of(connection)
        assert before == NO_CALLBACKS
        await connection.add_listener("news", hear)
        assert holder.listens_otherwise(connection, before)
        assert not holder.callbacks_of(connection).log_listeners
        connection.add_log_listener(hear)
        connection.add_query_logger(hear)
        connection.add_termination_listener(hear)
        assert holder.callbacks_of(connection).log_listeners
        hearing = holder.callbacks_of(connection)
        assert list(hearing.listeners) == ["news"]
        assert [len(one) for one in (hearing.listeners["news"], *hearing[1:])] == [1] * 4
        writes = holder.transport_of(connection).writes
        holder.set_callbacks(connection, before)
        assert holder.transport_of(connection).writes == writes
        assert not holder.listens_otherwise(connection, before)
        assert holder.callbacks_of(connection) == NO_CALLBACKS
        await connection.execute("NOTIFY news; DO 'BEGIN RAISE NOTICE ''heard''; END'")
        holder.set_callbacks(connection, hearing)
        assert holder.callbacks_of(connection) == hearing
        assert not holder.listens_otherwise(connection, hearing)
        holder.set_callbacks(connection, before)

    @pins("_listeners", "_log_listeners", "_query_loggers")
    async def test_callbacks_that_are_set_back_are_not_those_that_a_caller_adds_to(self, connection: Any) -> None:
        before = holder.callbacks_of(connection)
        holder.set_callbacks(connection, before)
        await connection.add_listener("news", print)
        connection.add_log_listener(print)
        connection.add_query_logger(print)
        assert before == Callbacks()
        holder.set_callbacks(connection, before)
        assert holder.callbacks_of(connection) == before

    @pins("_is_cancelling", "_wait_for_cancellation")
    async def test_a_cancelled_statement_is_busy_until_it_has_ended(self, connection: Any) -> None:
        assert (holder.is_cancelling(connection), holder.is_idle(connection)) == (False, True)
        await cancel_a_statement(connection)
        assert (holder.is_cancelling(connection), holder.is_idle(connection)) == (True, False)
        async with asyncio.timeout(HANG):
            await holder.end_cancellation(connection)
        assert (holder.is_cancelling(connection), holder.is_idle(connection)) == (False, True)
        assert await connection.fetchval("SELECT 1") == 1

    @pins("_wait_for_cancellation")
    async def test_a_connection_that_ends_while_its_statement_is_cancelled_ends_the_wait(self, connection: Any) -> None:
        await cancel_a_statement(connection)
        waiting = asyncio.ensure_future(holder.end_cancellation(connection))
        await asyncio.sleep(0)
        connection.terminate()
        async with asyncio.timeout(HANG):
            await waiting

    async def test_a_wait_for_a_cancelled_statement_can_be_cancelled(self, connection: Any) -> None:
        await cancel_a_statement(connection)
        waiting = asyncio.ensure_future(holder.end_cancellation(connection))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if IS_ASYNCPG_0_31:
            connection.terminate()  # the next call would be cancelled, too; the pool terminates such a connection
        else:
            async with asyncio.timeout(HANG):
                assert await connection.fetchval("SELECT 1") == 1
