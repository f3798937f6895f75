"""Connections to a real PgBouncer in transaction mode: what heals after DDL, what is refused, what passes unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.pgbouncer import LocalPgBouncer
from support.pooled import TABLE, change, connector_to, fresh, numbers, opened, other_client
from support.probes import HANG

import neon_async
from neon_async._driver.connector import prepare
from neon_async._driver.holder import search_path, session_of
from neon_async._driver.transaction import Transaction
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

# ---------------------------------------------------------------------------------------------------------------------
# Healing

Call = Callable[[Any, str], Awaitable[object]]
RETURNING = f"INSERT INTO {TABLE} (a) VALUES ($1) RETURNING *"


async def copy_out(connection: Any, query: str) -> bytes:
    sink = io.BytesIO()
    await connection.copy_from_query(query, 1, output=sink)
    return sink.getvalue()


async def prepare_and_fetch(connection: Any, query: str) -> object:
    statement = await connection.prepare(query)
    return await statement.fetch()


async def iterate(connection: Any, query: str) -> object:
    async with connection.transaction():
        return [row async for row in connection.cursor(query)]


async def open_cursor(connection: Any, query: str) -> object:
    async with connection.transaction():
        return await (await connection.cursor(query)).fetch(10)


class TestHealing:
    @pytest.mark.parametrize(
        ("call", "query"),
        [
            pytest.param(lambda c, q: c.fetch(q), f"SELECT * FROM {TABLE}", id="fetch"),
            pytest.param(lambda c, q: c.fetch(query=q, timeout=HANG), f"SELECT * FROM {TABLE}", id="fetch by keyword"),
            pytest.param(lambda c, q: c.fetchrow(q), f"SELECT * FROM {TABLE};", id="fetchrow with a semicolon"),
            pytest.param(lambda c, q: c.fetchval(q, column=0), f"SELECT * FROM {TABLE} -- c", id="fetchval with --"),
            pytest.param(lambda c, q: c.execute(q, 1), f"SELECT * FROM {TABLE} WHERE a = $1", id="execute"),
            pytest.param(lambda c, q: c.executemany(q, [(1,), (2,)]), RETURNING, id="executemany"),
            pytest.param(lambda c, q: c.executemany(command=q, args=[(1,)]), RETURNING, id="executemany by keyword"),
            pytest.param(lambda c, q: c.fetchmany(q, [(1,), (2,)]), RETURNING, id="fetchmany"),
            pytest.param(prepare_and_fetch, f"SELECT * FROM {TABLE}", id="prepare"),
            pytest.param(copy_out, f"SELECT * FROM {TABLE} WHERE a = $1", id="copy_from_query"),
        ],
    )
    async def test_a_stale_statement_heals_within_the_call(
        self, pgbouncer: LocalPgBouncer, direct: Any, call: Call, query: str
    ) -> None:
        connector, query = connector_to(pgbouncer), fresh(query)
        healing = connector.healing
        async with other_client(pgbouncer, query), opened(connector) as connection:
            before = await call(connection, query)
            assert healing.heals == 0
            await change(direct)
            after = await call(connection, query)
            assert healing.heals == 1
            assert type(after) is type(before)
            await call(connection, query)
            assert healing.heals == 1
        assert healing.seconds > 0

    async def test_records_can_be_copied_to_a_table_that_has_changed(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        connector = connector_to(pgbouncer)
        async with other_client(pgbouncer, f'SELECT * FROM "{TABLE}" LIMIT 1'):
            await change(direct)
            async with opened(connector) as connection:
                await connection.copy_records_to_table(TABLE, records=[(5, 6)])
        assert connector.healing.heals == 1
        assert await direct.fetchval(f"SELECT count(*) FROM {TABLE}") == 4

    async def test_each_pool_heals_by_itself_and_plain_asyncpg_never(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        """PgBouncer shares plans by text. Two pools stand for two processes: they know nothing of each other."""
        one, two, query = connector_to(pgbouncer), connector_to(pgbouncer), fresh()
        async with other_client(pgbouncer, query) as plain, opened(one) as first, opened(two) as second:
            for connection in (first, second):
                await connection.fetch(query)
            for _ in range(3):
                await change(direct)
                for connection in (first, second):
                    assert len(await connection.fetch(query)) == 3
            assert (one.healing.heals, two.healing.heals) == (3, 3)
            texts = {
                connector.healing.text_of(query, search_path(connection))
                for connector, connection in ((one, first), (two, second))
            }
            assert len(texts) == 2
            for _ in range(3):
                with pytest.raises(asyncpg.InvalidCachedStatementError):
                    await plain.fetch(query)

    @pytest.mark.usefixtures("pgbouncer_installed")
    async def test_the_connections_of_a_pool_share_one_renewal(self, postgres: LocalPostgres, direct: Any) -> None:
        query = fresh()
        async with LocalPgBouncer(postgres, default_pool_size=1) as pgbouncer, contextlib.AsyncExitStack() as stack:
            connector = connector_to(pgbouncer)
            connections = [await stack.enter_async_context(opened(connector)) for _ in range(8)]
            await asyncio.gather(*(connection.fetch(query) for connection in connections))
            await change(direct)
            results = await asyncio.gather(*(connection.fetch(query) for connection in connections))
            assert [len(rows) for rows in results] == [3] * 8
            assert connector.healing.heals == 1

    async def test_lone_connections_heal(self, pgbouncer: LocalPgBouncer, direct: Any) -> None:
        query = fresh()
        async with contextlib.AsyncExitStack() as stack:
            connections = []
            for _ in range(2):
                connection = await neon_async.connect(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor)
                stack.push_async_callback(connection.close, timeout=HANG)
                connections.append(connection)
                await connection.fetch(query)
            await change(direct)
            for connection in connections:
                assert len(await connection.fetch(query)) == 3
            for connection in connections:
                session = session_of(connection)
                assert session is not None
                assert session.healing.text_of(query, search_path(connection)) != query

    @pytest.mark.usefixtures("pgbouncer_installed")
    async def test_rows_that_do_not_match_their_description_are_an_error_once(
        self, postgres: LocalPostgres, direct: Any
    ) -> None:
        """On a server connection that is new to the statement, only what asyncpg knows of it is stale."""
        query = fresh()
        async with LocalPgBouncer(postgres, default_pool_size=2) as pgbouncer:
            connector = connector_to(pgbouncer)
            async with opened(connector) as one, opened(connector) as two:
                await one.fetch(query)
                await change(direct)
                async with two.transaction():
                    await two.execute("SELECT 1")  # on the server connection that has the old plan
                    with pytest.raises(asyncpg.exceptions.ProtocolError, match="number of columns"):
                        await one.fetch(query)
                    assert len(await one.fetch(query)) == 3
            assert connector.healing.heals == 1

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda c, q: c.fetch(q), id="fetch"),
            pytest.param(iterate, id="for row in cursor"),
            pytest.param(open_cursor, id="await cursor"),
        ],
    )
    async def test_in_a_transaction_the_error_is_raised_and_the_next_use_is_healed(
        self, pgbouncer: LocalPgBouncer, direct: Any, call: Call
    ) -> None:
        connector, query = connector_to(pgbouncer), fresh()

        async def use(connection: Any) -> None:
            async with connection.transaction():
                await call(connection, query)

        async with other_client(pgbouncer, query), opened(connector) as connection:
            await use(connection)
            await change(direct)
            with pytest.raises(asyncpg.InvalidCachedStatementError):
                await use(connection)
            assert not connection.is_in_transaction()
            await use(connection)
            assert connector.healing.heals == 1
            assert connector.healing.seconds == 0

    @pytest.mark.parametrize(
        "use",
        [
            pytest.param(lambda statement: statement.fetch(1), id="fetch"),
            pytest.param(lambda statement: statement.fetchval(1), id="fetchval"),
            pytest.param(lambda statement: statement.fetchrow(1), id="fetchrow"),
            pytest.param(lambda statement: statement.fetchmany([(1,)]), id="fetchmany"),
            pytest.param(lambda statement: statement.executemany([(1,)]), id="executemany"),
            pytest.param(lambda statement: statement.cursor(1), id="await cursor"),
            pytest.param(lambda statement: anext(aiter(statement.cursor(1))), id="for row in cursor"),
        ],
    )
    async def test_a_statement_that_is_kept_stays_stale_and_the_next_is_healed(
        self, pgbouncer: LocalPgBouncer, direct: Any, use: Callable[[Any], Awaitable[object]]
    ) -> None:
        connector, query = connector_to(pgbouncer), fresh(f"SELECT * FROM {TABLE} WHERE a = $1")
        async with other_client(pgbouncer, query), opened(connector) as connection:
            kept = await connection.prepare(query)
            await connection.reset(timeout=HANG)
            await change(direct)
            for _ in range(2):
                with pytest.raises(asyncpg.InvalidCachedStatementError):
                    async with connection.transaction():
                        await use(kept)
            assert connector.healing.heals == 1
            async with connection.transaction():
                await use(await connection.prepare(query))
            assert kept.get_query() == query
            assert type(kept).__name__ == "PreparedStatement"

    async def test_rows_from_an_iterator_are_written_whole_or_not_at_all(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        """asyncpg's own second attempt goes on with the rows that the first has left."""
        command, count = fresh(RETURNING), f"SELECT count(*) FROM {TABLE}"
        async with other_client(pgbouncer, command), opened(connector_to(pgbouncer)) as connection:
            await connection.executemany(command, ((number,) for number in range(2)))
            for method in (connection.executemany, connection.fetchmany):
                before = await direct.fetchval(count)
                await change(direct)
                with pytest.raises(asyncpg.InvalidCachedStatementError, match="Call again with the rows"):
                    await method(command, ((number,) for number in range(1000)))
                assert await direct.fetchval(count) == before
                await method(command, args=((number,) for number in range(1000)))
                assert await direct.fetchval(count) == before + 1000

    async def test_a_text_of_several_statements_is_never_sent_twice(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        name = f"prepared_{next(numbers)}"
        async with opened(connector_to(pgbouncer)) as connection:
            with pytest.raises(asyncpg.InvalidCachedStatementError):
                await connection.execute(
                    f"INSERT INTO {TABLE} VALUES (4); COMMIT; "
                    f"DO $$ DECLARE a text := 'PREPARE {name} AS SELECT * FROM {TABLE}'; BEGIN EXECUTE a; END $$;"
                    f"ALTER TABLE {TABLE} ADD COLUMN b int; EXECUTE {name}"
                )
            assert await direct.fetchval(f"SELECT count(*) FROM {TABLE} WHERE a = 4") == 1

    async def test_loggers_see_the_text_of_the_caller(
        self, pgbouncer: LocalPgBouncer, direct: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        connector, query, seen = connector_to(pgbouncer), fresh(), []
        async with other_client(pgbouncer, query), opened(connector) as connection:
            await connection.fetch(query)
            await change(direct)
            with (
                caplog.at_level(logging.INFO, "neon_async"),
                connection.query_logger(lambda record: seen.append(record)),
            ):
                await connection.fetch(query)
                await connection.fetch(query)
                await asyncio.sleep(0)
            assert [record.query for record in seen] == [query] * 2
        [message] = [record.getMessage() for record in caplog.records if record.name == "neon_async"]
        assert message == (
            "ep-cool-darkness-123456: a prepared statement is stale, the schema has changed; "
            "it is prepared again from now on"
        )
        assert repr(connector.healing).startswith("<Healing 1 heals in 0.")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "feature"),
        [
            pytest.param(lambda c: c.execute("LISTEN orders"), "LISTEN", id="execute"),
            pytest.param(lambda c: c.execute(query="SET ROLE a"), "SET ROLE", id="execute by keyword"),
            pytest.param(lambda c: c.fetch("SELECT pg_advisory_lock($1)", 1), "pg_advisory_lock()", id="fetch"),
            pytest.param(
                lambda c: c.fetchval(query="SET search_path = a"), "SET search_path", id="fetchval by keyword"
            ),
            pytest.param(lambda c: c.fetchrow("SET ROLE a"), "SET ROLE", id="fetchrow"),
            pytest.param(
                lambda c: c.executemany(command="SELECT pg_advisory_lock($1)", args=[(1,)]),
                "pg_advisory_lock()",
                id="executemany by keyword",
            ),
            pytest.param(
                lambda c: c.fetchmany("SELECT pg_try_advisory_lock($1)", [(1,)]),
                "pg_try_advisory_lock()",
                id="fetchmany",
            ),
            pytest.param(lambda c: c.prepare("LISTEN orders"), "LISTEN", id="prepare"),
            pytest.param(
                lambda c: c.copy_from_query("SELECT pg_advisory_lock(1)", output=io.BytesIO()),
                "pg_advisory_lock()",
                id="copy_from_query",
            ),
            pytest.param(lambda c: c.cursor("SELECT pg_advisory_lock(1)"), "pg_advisory_lock()", id="cursor"),
            pytest.param(lambda c: c.add_listener("orders", print), "LISTEN", id="add_listener"),
        ],
    )
    async def test_what_needs_a_session_is_refused_with_the_name_of_the_direct_host(
        self, pgbouncer: LocalPgBouncer, postgres: LocalPostgres, call: Callable[[Any], Awaitable[object]], feature: str
    ) -> None:
        async with opened(connector_to(pgbouncer)) as connection, connection.transaction():
            with pytest.raises(neon_async.PooledHostError) as caught:
                await call(connection)
            assert str(caught.value).startswith(f"{feature} needs a session of its own, and {pgbouncer.host} ")
            assert str(caught.value).endswith(f" the direct host {postgres.host}.")
            assert isinstance(caught.value, asyncpg.FeatureNotSupportedError)
            assert await connection.fetchval("SELECT 1") == 1  # nothing was sent: the transaction is as it was

    async def test_what_works_on_a_pooled_host_works(self, pgbouncer: LocalPgBouncer) -> None:
        async with opened(connector_to(pgbouncer)) as one, opened(connector_to(pgbouncer)) as two:
            async with one.transaction():
                await one.execute("SET LOCAL statement_timeout = 1234")
                assert await one.fetchval("SHOW statement_timeout") == "1234ms"
                assert await one.fetchval("SELECT pg_try_advisory_xact_lock(7)")
            await one.execute("SET TimeZone = 'Asia/Tokyo'")
            assert await two.fetchval("SHOW TimeZone") != "Asia/Tokyo"
            assert await one.fetchval("SHOW TimeZone") == "Asia/Tokyo"
            with pytest.raises(TypeError):
                await one.fetch(7)

    @pytest.mark.parametrize("by_name", [False, True], ids=["endpoint", "localhost"])
    async def test_on_a_direct_host_nothing_is_refused_and_nothing_is_added(
        self, postgres: LocalPostgres, by_name: bool
    ) -> None:
        keywords = {"host": "localhost"} if by_name else {}
        connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor, **keywords)
        connector.healing.renew_all()
        async with opened(connector) as connection:
            await connection.execute("LISTEN orders; SET search_path = a; SELECT pg_advisory_lock(1)")
            await connection.add_listener("orders", print)
            await connection.remove_listener("orders", print)
            query = "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            assert await connection.fetchval(query) == query
            assert "RESET ALL" in connection.get_reset_query()
            assert type(connection.transaction()) is Transaction

    async def test_code_can_say_that_a_host_of_another_name_is_pooled(
        self, pgbouncer: LocalPgBouncer, direct: Any
    ) -> None:
        connector, query = connector_to(pgbouncer, host="localhost", pooled=True), fresh()
        async with other_client(pgbouncer, query), opened(connector) as connection:
            with pytest.raises(neon_async.PooledHostError, match=r"Use a host without PgBouncer in between\.$"):
                await connection.execute("LISTEN orders")
            await connection.fetch(query)
            await change(direct)
            assert len(await connection.fetch(query)) == 3
            assert connector.healing.heals == 1

    async def test_transactions_are_ours(self, pgbouncer: LocalPgBouncer) -> None:
        async with opened(connector_to(pgbouncer)) as connection:
            assert type(connection.transaction(readonly=True)) is Transaction
            async with connection.transaction(isolation="serializable"):
                assert await connection.fetchval("SHOW transaction_isolation") == "serializable"
        with pytest.raises(asyncpg.InterfaceError, match="closed"):
            connection.transaction()


# ---------------------------------------------------------------------------------------------------------------------
# Settings

TRACKED = [
    pytest.param({"server_settings": {"TimeZone": "Asia/Tokyo"}}, "TimeZone", "Asia/Tokyo", id="TimeZone"),
    pytest.param({"server_settings": {"datestyle": "German, DMY"}}, "datestyle", "German, DMY", id="datestyle"),
    pytest.param({"server_settings": {"IntervalStyle": "iso_8601"}}, "intervalstyle", "iso_8601", id="interval"),
    pytest.param(
        {"server_settings": {"standard_conforming_strings": "off"}},
        "standard_conforming_strings",
        "off",
        id="standard_conforming_strings",
    ),
    pytest.param({"server_settings": {"application_name": "a \\b"}}, "application_name", "a \\b", id="name"),
    pytest.param({"options": "-cdatestyle=ISO,\\ YMD"}, "datestyle", "ISO, YMD", id="options"),
    pytest.param({"options": "--timezone=Asia/Tokyo"}, "timezone", "Asia/Tokyo", id="options in the long form"),
    pytest.param({"client_encoding": "utf-8"}, "client_encoding", "UTF8", id="client_encoding"),
]


class TestSettings:
    async def test_reset_restores_the_settings_that_pgbouncer_tracks(self, pgbouncer: LocalPgBouncer) -> None:
        """PgBouncer has them follow the client, and so the next caller."""
        async with opened(connector_to(pgbouncer)) as connection:
            names = ("TimeZone", "standard_conforming_strings", "application_name", "DateStyle", "IntervalStyle")
            before = [await connection.fetchval(f"SHOW {name}") for name in names]
            await connection.execute(
                "SET TimeZone = 'Asia/Tokyo'; SET application_name = 'it''s'; SET DateStyle = 'German'"
            )
            await connection.execute("SET standard_conforming_strings = off; SET IntervalStyle = 'iso_8601'")
            assert [await connection.fetchval(f"SHOW {name}") for name in names] != before
            await connection.reset(timeout=HANG)
            assert [await connection.fetchval(f"SHOW {name}") for name in names] == before
            assert connection.get_reset_query() == ""

    @pytest.mark.parametrize(("keywords", "setting", "value"), TRACKED)
    async def test_settings_that_pgbouncer_tracks_reach_every_server_connection(
        self, pgbouncer: LocalPgBouncer, keywords: dict[str, Any], setting: str, value: str
    ) -> None:
        connector = connector_to(pgbouncer, **keywords)
        async with opened(connector) as one, opened(connector_to(pgbouncer)) as two:
            async with one.transaction(), two.transaction():
                assert await one.fetchval(f"SHOW {setting}") == value
            async with two.transaction():
                assert await one.fetchval(f"SHOW {setting}") == value

    @pytest.mark.parametrize(
        "keywords",
        [
            pytest.param({"server_settings": {"search_path": "a"}}, id="search_path"),
            pytest.param({"server_settings": {"TimeZone": "UTC", "work_mem": "1MB"}}, id="one of two"),
            pytest.param({"options": "-c statement_timeout=5"}, id="options"),
        ],
    )
    def test_other_settings_are_refused_before_anything_is_sent(
        self, pgbouncer: LocalPgBouncer, postgres: LocalPostgres, keywords: dict[str, Any]
    ) -> None:
        with pytest.raises(neon_async.ConfigurationError, match=f"direct host {postgres.host}[,.]"):
            _ = neon_async.connect(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, **keywords)
