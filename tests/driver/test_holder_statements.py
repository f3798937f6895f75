"""Each private name of asyncpg that `_driver.holder` uses on statements does what we need; see `test_holder.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.private_names import pins
from support.probes import HANG, connected

from neon_async._driver import holder
from neon_async._driver.connection import Connection
from neon_async._driver.holder import StatementHooks, session_of
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture
async def connection(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres) as connection:
        yield connection


class Noting(Connection):
    """Notes what is prepared and what is executed."""

    __slots__ = ("prepared", "run")

    prepared: list[str]
    run: list[tuple[str, float | None]]

    async def get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:  # noqa: ASYNC109
        self.prepared.append(query)
        return await super().get_statement(query, timeout, **options)

    async def run_statement(self, session: Any, query: str, executor: Any, timeout: float | None, options: Any) -> Any:  # noqa: ASYNC109
        self.run.append((query, timeout))
        return await super().run_statement(session, query, executor, timeout, options)


class Row(asyncpg.Record):
    """A class of rows of the caller's."""


@pytest.fixture
async def noting(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres, connection_class=Noting, command_timeout=9) as connection:
        await connection.execute("CREATE TEMP TABLE noted (a int)")
        connection.prepared, connection.run = [], []
        yield connection


async def iterate(connection: Any) -> None:
    async with connection.transaction():
        [_ async for _ in connection.cursor("SELECT 1")]


async def open_a_cursor(connection: Any) -> None:
    async with connection.transaction():
        await connection.cursor("SELECT 1")


async def ignore(_: bytes) -> None:
    pass


class TestStatements:
    @pytest.mark.parametrize(
        ("call", "query"),
        [
            pytest.param(lambda c: c.execute("SELECT $1::int", 1), "SELECT $1::int", id="execute"),
            pytest.param(lambda c: c.fetch("SELECT 1"), "SELECT 1", id="fetch"),
            pytest.param(lambda c: c.fetchval("SELECT 1"), "SELECT 1", id="fetchval"),
            pytest.param(lambda c: c.fetchrow("SELECT 1"), "SELECT 1", id="fetchrow"),
            pytest.param(lambda c: c.fetchmany("SELECT 1", [()]), "SELECT 1", id="fetchmany"),
            pytest.param(lambda c: c.executemany("SELECT 1", [()]), "SELECT 1", id="executemany"),
        ],
    )
    @pins("_get_statement", "_do_execute")
    async def test_what_is_executed_is_prepared_and_run_through_the_hooks(
        self, noting: Any, call: Callable[[Any], Awaitable[Any]], query: str
    ) -> None:
        await call(noting)
        assert noting.prepared == [query]
        ((run, seconds),) = noting.run
        assert run == query
        assert seconds == 9 or seconds > 1e6, "asyncpg has resolved command_timeout before, which many rows have not"

    @pytest.mark.parametrize(
        ("call", "query"),
        [
            pytest.param(lambda c: c.prepare("SELECT 1"), "SELECT 1", id="prepare"),
            pytest.param(iterate, "SELECT 1", id="for row in cursor"),
            pytest.param(open_a_cursor, "SELECT 1", id="await cursor"),
            pytest.param(
                lambda c: c.copy_from_query("SELECT $1::int", 1, output=ignore), "SELECT $1::int", id="copy_from_query"
            ),
            pytest.param(
                lambda c: c.copy_records_to_table("noted", records=[(1,)]),
                'SELECT * FROM "noted" LIMIT 1',
                id="copy_records_to_table",
            ),
        ],
    )
    @pins("_get_statement")
    async def test_what_is_only_prepared_is_prepared_through_the_hook(
        self, noting: Any, call: Callable[[Any], Awaitable[Any]], query: str
    ) -> None:
        await call(noting)
        assert noting.prepared[0] == query

    @pins("_stmt_cache")
    @pytest.mark.parametrize("options", [{}, {"record_class": Row}], ids=["", "record_class"])
    async def test_what_is_in_the_cache_is_not_prepared_through_the_hook(self, noting: Any, options: Any) -> None:
        assert noting.cached_statement("SELECT 1", options) is None
        await noting.fetch("SELECT 1", **options)
        assert noting.cached_statement("SELECT 1", options) is not None
        del noting.prepared[:]
        await noting.fetch("SELECT 1", **options)
        assert noting.prepared == []

    @pytest.mark.parametrize("record_class", [[], {}, 0, "", int, dict], ids=repr)
    async def test_a_record_class_that_is_none_is_refused_although_the_statement_is_in_the_cache(
        self, connection: Any, record_class: Any
    ) -> None:
        await connection.fetch("SELECT 1")
        with pytest.raises(asyncpg.InterfaceError, match="record_class is expected to be a subclass"):
            await connection.fetch("SELECT 1", record_class=record_class)

    @pins("_do_execute")
    async def test_a_stale_statement_raises_where_asyncpg_would_retry(self, connection: Any) -> None:
        await connection.execute("CREATE TEMP TABLE noted (a int)")

        def run() -> Any:
            protocol = connection._protocol
            return StatementHooks.run_statement(
                connection,
                holder.own_session(connection),
                "SELECT * FROM noted",
                lambda state, timeout: protocol.bind_execute(state, (), "", 0, False, timeout),
                None,
                {},
            )

        await run()
        await connection.execute("ALTER TABLE noted ADD COLUMN b int")
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            await run()

    @pins("_prepare")
    async def test_what_copy_records_to_table_asks_for_is_asked_each_time(self, connection: Any) -> None:
        await connection.execute("CREATE TEMP TABLE noted (a int4)")
        await connection.copy_records_to_table("noted", records=[(1,)])
        await connection.execute("ALTER TABLE noted ALTER COLUMN a TYPE float4")
        await connection.copy_records_to_table("noted", records=[(2.5,)])
        assert await connection.fetchval("SELECT array_agg(a) FROM noted") == [1, 2.5]

    @pins("_query", "_state", "_maybe_gc_stmt")
    async def test_a_prepared_statement_can_be_given_another_state(self, connection: Any) -> None:
        statement = await connection.prepare("SELECT 42")
        old, other = holder.state_of(statement), await connection.prepare("SELECT 43")
        holder.set_state(statement, holder.state_of(other))
        assert await statement.fetchval() == 43
        assert (holder.query_of(statement), old.closed, holder.state_of(other).closed) == ("SELECT 42", True, False)
        await connection.fetchval("SELECT 44")
        prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'"
        assert await connection.fetchval(prepared) == 0

    @pytest.mark.parametrize(
        ("query", "types"),
        [
            ("SELECT $1::int4 AS a, 'b'::text AS b", {23, 25}),
            ("SET LOCAL work_mem = '1MB'", set()),
        ],
        ids=["some", "none"],
    )
    @pins("_get_parameters", "_get_attributes")
    async def test_a_statement_is_described(self, connection: Any, query: str, types: set[int]) -> None:
        state = holder.state_of(await connection.prepare(query))
        assert holder.types_of(state) == types
        assert holder.description_of(state) == (([23], [("a", 23), ("b", 25)]) if types else ([], []))

    @pytest.mark.parametrize(("name", "own"), [(None, True), ("mine", False)])
    async def test_a_name_of_asyncpgs_is_known(self, connection: Any, name: str | None, own: bool) -> None:
        assert holder.has_own_name(holder.state_of(await connection.prepare("SELECT 1", name=name))) is own

    @pytest.mark.parametrize("certainly", [True, False], ids=["gone", "perhaps gone"])
    @pins("_stmt_cache", "_mark_stmts_as_closed")
    async def test_cached_statements_can_be_forgotten(self, connection: Any, certainly: bool) -> None:
        """What is certainly gone is not closed on the server: that would be a round trip for each."""
        prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'"
        await connection.fetchval("SELECT 42")
        connection._protocol.on_dropped(certainly)
        assert len(connection._stmt_cache) == 0
        assert await connection.fetchval("SELECT 43") == 43
        assert await connection.fetchval(prepared) == certainly

    @pins("_connection")
    async def test_a_resource_knows_its_connection(self, connection: Any) -> None:
        statement = await connection.prepare("SELECT 1")
        async with connection.transaction():
            factory = connection.cursor("SELECT 1")
            opened = await connection.cursor("SELECT 1")
            for resource in (statement, factory, statement.cursor(), aiter(factory)._rows, opened._opened):
                assert holder.use_of(resource).session is session_of(connection)

    @pytest.mark.parametrize(
        ("command_timeout", "own", "expected"),
        [(None, None, None), (None, 5, 5.0), (7, None, 7.0), (7, 5, 5.0)],
        ids=["none", "timeout", "command_timeout", "both"],
    )
    @pins("_get_timeout")
    async def test_the_timeout_of_a_call_wins_over_that_of_the_connection(
        self, postgres: LocalPostgres, command_timeout: float | None, own: float | None, expected: float | None
    ) -> None:
        async with connected(postgres, command_timeout=command_timeout) as connection:
            assert holder.timeout_of(connection, own) == expected
            with pytest.raises(TimeoutError):
                holder.timeout_of(connection, 0)

    @pins("_on_waiter_completed")
    async def test_asyncpg_adds_a_callback_to_each_future_of_its_protocol(self, connection: Any) -> None:
        protocol, futures = connection._protocol._asyncpg, []
        completed = protocol._on_waiter_completed

        def note(future: asyncio.Future[Any]) -> None:
            futures.append(future)
            completed(future)

        protocol._on_waiter_completed = note
        await connection.execute("SELECT 1")
        del protocol._on_waiter_completed
        await connection.execute("SELECT 1")
        assert [type(one.result()) for one in futures] == [str]
        with holder.retrieving(protocol):
            pass
        assert protocol._on_waiter_completed == completed

    @pins("_protocol")
    async def test_what_is_sent_for_the_pool_runs_and_no_logger_sees_it(self, connection: Any) -> None:
        seen: list[str] = []
        with connection.query_logger(lambda record: seen.append(record.query)):
            await holder.send(connection, "CREATE TEMP TABLE sent (a int); INSERT INTO sent VALUES (5)")
            with pytest.raises(asyncpg.DivisionByZeroError):
                await holder.send(connection, "SELECT 1 / 0")
            await asyncio.sleep(0)
        assert seen == []
        assert await connection.fetchval("SELECT a FROM sent") == 5

    async def test_what_is_sent_can_be_cancelled(self, connection: Any) -> None:
        task = asyncio.create_task(holder.send(connection, "SELECT pg_sleep(60)"))
        await asyncio.sleep(0.01)
        task.cancel()
        async with asyncio.timeout(HANG):
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await connection.fetchval("SELECT 1") == 1

    async def test_nothing_is_sent_on_a_connection_that_is_in_use_or_closed(self, connection: Any) -> None:
        running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(0.05)"))
        await asyncio.sleep(0)
        with pytest.raises(asyncpg.InterfaceError, match="another operation"):
            await holder.send(connection, "SELECT 1")
        await running
        connection.terminate()
        with pytest.raises((asyncpg.InterfaceError, AttributeError)):
            await holder.send(connection, "SELECT 1")

    @pins("_transport", "_protocol")
    @pins("_server_caps")
    async def test_asyncpg_can_be_kept_from_turning_jit_off(self, connection: Any) -> None:
        for before, expected in ((False, 3), (True, 1)):  # jit off, the question, jit on again; or the question alone
            await connection.reload_schema_state()
            if before:
                holder.leave_jit_alone(connection)
            assert connection._server_caps.jit is not before
            count = holder.queries_run(connection)
            await connection.fetch(f"SELECT NULL::information_schema.tables AS {'b' if before else 'a'}")
            assert holder.queries_run(connection) - count == expected + 1

    async def test_writes_and_statements_are_counted(self, connection: Any) -> None:
        writes, queries = holder.transport_of(connection).writes, holder.queries_run(connection)
        connection.add_log_listener(listener := lambda *_: None)
        connection.remove_log_listener(listener)
        assert (holder.transport_of(connection).writes, holder.queries_run(connection)) == (writes, queries)
        await connection.execute("SELECT 1")
        assert holder.transport_of(connection).writes > writes
        assert holder.queries_run(connection) == queries + 1
        await holder.send(connection, "SELECT 1")
        assert holder.queries_run(connection) == queries + 2

    @pins("_stmt_exclusive_section", "_acquired")
    async def test_asyncpg_can_make_a_call_of_its_own_inside_another_one(self, connection: Any) -> None:
        with connection._stmt_exclusive_section:
            with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
                await connection.fetchval("SELECT 1")
            with holder.between_calls(connection):
                assert await connection.fetchval("SELECT 1") == 1
            with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
                await connection.fetchval("SELECT 1")
        assert await connection.fetchval("SELECT 1") == 1

    async def test_a_codec_of_the_callers_is_told_from_asyncpgs(self, connection: Any) -> None:
        assert not holder.has_own_codec(connection, 114)
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=str)
        assert holder.has_own_codec(connection, 114)
        assert not holder.has_own_codec(connection, 23)

    @pins("_introspect_types")
    async def test_the_attributes_of_composite_types_are_remembered(self, connection: Any) -> None:
        await connection.execute("CREATE TEMP TABLE noted (a int4, b text)")
        await connection.fetch("SELECT noted, 1 FROM noted")
        oid = await connection.fetchval("SELECT reltype FROM pg_class WHERE relname = 'noted'")
        session = session_of(connection)
        assert session is not None
        assert session.composites == {oid: (["a", "b"], [23, 25])}
