"""Sessions on a real PgBouncer in transaction mode: what heals after DDL, what is refused, and what is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.pgbouncer import LocalPgBouncer
from support.probes import HANG

import neon_async
from neon_async._driver.connection import Healing, is_unfinished, session_class
from neon_async._driver.transaction import Transaction
from neon_async._neon.endpoint import parse_host
from neon_async.testing import LocalPostgres

TABLE = "healing"
LOCKS = f"SELECT count(*) FROM pg_locks WHERE relation = '{TABLE}'::regclass"
_numbers = itertools.count()


def fresh(query: str = f"SELECT * FROM {TABLE}") -> str:
    """`query` as a text that was never sent before, so that no test sees the statements of another."""
    return f"/* {next(_numbers)} */ {query}"


@contextlib.asynccontextmanager
async def opened(
    bouncer: LocalPgBouncer, healing: Healing, *, base: type[Any] = asyncpg.Connection, **keywords: Any
) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection to PgBouncer, of the class that a pool's connections are of."""
    cls = session_class(base, endpoint=parse_host(bouncer.host), host=bouncer.host, healing=healing)
    connection = await neon_async.connect(
        bouncer.dsn, trust_anchor=bouncer.trust_anchor, connection_class=cls, **keywords
    )
    try:
        yield connection
    finally:
        await connection.close(timeout=HANG)


@pytest.fixture
async def direct(postgres: LocalPostgres) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection past PgBouncer, for DDL, with a table of three rows."""
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    await connection.execute(f"DROP TABLE IF EXISTS {TABLE}")
    await connection.execute(f"CREATE TABLE {TABLE} (a int); INSERT INTO {TABLE} VALUES (1), (2), (3)")
    try:
        yield connection
    finally:
        await connection.execute(f"DROP TABLE {TABLE}")
        await connection.close(timeout=HANG)


@contextlib.asynccontextmanager
async def shared(bouncer: LocalPgBouncer, *queries: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Another client, bare asyncpg, that has prepared the same texts: PgBouncer forgets what nobody else has."""
    async with contextlib.AsyncExitStack() as stack:
        other = await neon_async.connect(bouncer.dsn, trust_anchor=bouncer.trust_anchor)
        stack.push_async_callback(other.close, timeout=HANG)
        _statements = [await other.prepare(query) for query in queries]
        await other.execute("SELECT 1")  # asyncpg leaves what it has only prepared unfinished, with locks on tables
        yield other


async def change(direct: asyncpg.Connection[Any]) -> None:
    """DDL after which `SELECT * FROM healing` has another result."""
    await direct.execute(f"ALTER TABLE {TABLE} ADD COLUMN c{next(_numbers)} int")


# ---------------------------------------------------------------------------------------------------------------------
# Healing

Call = Callable[[Any, str], Awaitable[object]]
RETURNING = f"INSERT INTO {TABLE} (a) VALUES ($1) RETURNING *"


async def copy_out(connection: Any, query: str) -> bytes:
    sink = io.BytesIO()
    await connection.copy_from_query(query, 1, output=sink)
    return sink.getvalue()


async def prepare(connection: Any, query: str) -> object:
    statement = await connection.prepare(query)
    return await statement.fetch()


async def iterate(connection: Any, query: str) -> object:
    async with connection.transaction():
        return [row async for row in connection.cursor(query)]


async def open_cursor(connection: Any, query: str) -> object:
    async with connection.transaction():
        return await (await connection.cursor(query)).fetch(10)


@pytest.mark.anyio
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
        pytest.param(prepare, f"SELECT * FROM {TABLE}", id="prepare"),
        pytest.param(copy_out, f"SELECT * FROM {TABLE} WHERE a = $1", id="copy_from_query"),
    ],
)
async def test_a_stale_plan_heals_inside_the_call(
    pgbouncer: LocalPgBouncer, direct: Any, call: Call, query: str
) -> None:
    healing, query = Healing(), fresh(query)
    async with shared(pgbouncer, query), opened(pgbouncer, healing) as connection:
        before = await call(connection, query)
        assert healing.heals == 0
        await change(direct)
        after = await call(connection, query)
        assert healing.heals == 1
        assert type(after) is type(before)
        await call(connection, query)
        assert healing.heals == 1
    assert healing.seconds > 0


@pytest.mark.anyio
async def test_rows_can_be_copied_into_a_table_that_has_changed(pgbouncer: LocalPgBouncer, direct: Any) -> None:
    healing = Healing()
    async with shared(pgbouncer, f'SELECT * FROM "{TABLE}" LIMIT 1'):
        await change(direct)
        async with opened(pgbouncer, healing) as connection:
            await connection.copy_records_to_table(TABLE, records=[(5, 6)])
    assert healing.heals == 1
    assert await direct.fetchval(f"SELECT count(*) FROM {TABLE}") == 4


@pytest.mark.anyio
async def test_each_pool_heals_by_itself_and_a_bare_asyncpg_never(pgbouncer: LocalPgBouncer, direct: Any) -> None:
    """The plans are PgBouncer's, and shared by text. Two pools stand for two processes: they know nothing in common."""
    one, two, query = Healing(), Healing(), fresh()
    async with shared(pgbouncer, query) as bare, opened(pgbouncer, one) as first, opened(pgbouncer, two) as second:
        for connection in (first, second):
            await connection.fetch(query)
        for _ in range(3):
            await change(direct)
            for connection in (first, second):
                assert len(await connection.fetch(query)) == 3
        assert (one.heals, two.heals) == (3, 3)
        assert one.token != two.token
        for _ in range(3):
            with pytest.raises(asyncpg.InvalidCachedStatementError):
                await bare.fetch(query)


@pytest.mark.usefixtures("pgbouncer_installed")
@pytest.mark.anyio
async def test_the_connections_of_a_pool_share_one_renewal(postgres: LocalPostgres, direct: Any) -> None:
    healing, query = Healing(), fresh()
    async with LocalPgBouncer(postgres, default_pool_size=1) as pgbouncer, contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(opened(pgbouncer, healing)) for _ in range(8)]
        await asyncio.gather(*(connection.fetch(query) for connection in connections))
        await change(direct)
        results = await asyncio.gather(*(connection.fetch(query) for connection in connections))
        assert [len(rows) for rows in results] == [3] * 8
        assert healing.heals == 1


@pytest.mark.usefixtures("pgbouncer_installed")
@pytest.mark.anyio
async def test_rows_that_are_not_as_they_were_described_are_an_error_once(postgres: LocalPostgres, direct: Any) -> None:
    """On a server connection that is new to the statement nothing is stale but what asyncpg knows of it."""
    healing, query = Healing(), fresh()
    async with LocalPgBouncer(postgres, default_pool_size=2) as pgbouncer:
        async with opened(pgbouncer, healing) as one, opened(pgbouncer, healing) as two:
            await one.fetch(query)
            await change(direct)
            async with two.transaction():  # on the server connection that has the old plan
                with pytest.raises(asyncpg.exceptions.ProtocolError, match="number of columns"):
                    await one.fetch(query)
                assert len(await one.fetch(query)) == 3
        assert healing.heals == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda c, q: c.fetch(q), id="fetch"),
        pytest.param(iterate, id="for row in cursor"),
        pytest.param(open_cursor, id="await cursor"),
    ],
)
async def test_in_a_transaction_the_error_passes_and_the_next_use_is_healed(
    pgbouncer: LocalPgBouncer, direct: Any, call: Call
) -> None:
    healing, query = Healing(), fresh()

    async def use(connection: Any) -> None:
        async with connection.transaction():
            await call(connection, query)

    async with shared(pgbouncer, query), opened(pgbouncer, healing) as connection:
        await use(connection)
        await change(direct)
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            await use(connection)
        assert not connection.is_in_transaction()
        await use(connection)
        assert healing.heals == 1
        assert healing.seconds == 0


@pytest.mark.anyio
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
    pgbouncer: LocalPgBouncer, direct: Any, use: Callable[[Any], Awaitable[object]]
) -> None:
    healing, query = Healing(), fresh(f"SELECT * FROM {TABLE} WHERE a = $1")
    async with shared(pgbouncer, query), opened(pgbouncer, healing) as connection:
        kept = await connection.prepare(query)
        await connection.reset(timeout=HANG)
        await change(direct)
        for _ in range(2):
            with pytest.raises(asyncpg.InvalidCachedStatementError):
                async with connection.transaction():
                    await use(kept)
        assert healing.heals == 1
        async with connection.transaction():
            await use(await connection.prepare(query))
        assert kept.get_query() == query
        assert type(kept).__name__ == "PreparedStatement"


@pytest.mark.anyio
async def test_rows_from_an_iterator_are_written_whole_or_not_at_all(pgbouncer: LocalPgBouncer, direct: Any) -> None:
    """asyncpg's own second attempt goes on with the rows that the first has left."""
    healing, command = Healing(), fresh(RETURNING)
    count = f"SELECT count(*) FROM {TABLE}"
    async with shared(pgbouncer, command), opened(pgbouncer, healing) as connection:
        await connection.executemany(command, ((number,) for number in range(2)))
        for method in (connection.executemany, connection.fetchmany):
            before = await direct.fetchval(count)
            await change(direct)
            with pytest.raises(asyncpg.InvalidCachedStatementError, match="Call again with the rows"):
                await method(command, ((number,) for number in range(1000)))
            assert await direct.fetchval(count) == before
            await method(command, args=((number,) for number in range(1000)))
            assert await direct.fetchval(count) == before + 1000


@pytest.mark.anyio
async def test_a_text_of_several_statements_is_never_sent_twice(pgbouncer: LocalPgBouncer, direct: Any) -> None:
    name = f"prepared_{next(_numbers)}"
    async with opened(pgbouncer, Healing()) as connection:
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            await connection.execute(
                f"INSERT INTO {TABLE} VALUES (4); COMMIT; PREPARE {name} AS SELECT * FROM {TABLE};"
                f"ALTER TABLE {TABLE} ADD COLUMN b int; EXECUTE {name}"
            )
        assert await direct.fetchval(f"SELECT count(*) FROM {TABLE} WHERE a = 4") == 1


class Recording(asyncpg.Connection):
    """A caller's own connection class."""

    timeouts: list[float | None] = []  # noqa: RUF012  the class is used by one test at a time

    async def fetch(self, *args: Any, timeout: float | None = None, tag: str = "", **keywords: Any) -> Any:  # noqa: ASYNC109
        self.timeouts.append(timeout)
        return await super().fetch(*args, timeout=timeout, **keywords)


@pytest.mark.anyio
async def test_timeout_is_for_both_attempts_and_a_callers_class_stays_in_charge(
    pgbouncer: LocalPgBouncer, direct: Any
) -> None:
    query = fresh()
    async with shared(pgbouncer, query), opened(pgbouncer, Healing(), base=Recording) as connection:
        assert isinstance(connection, Recording)
        assert repr(connection).startswith(f"<{__name__}.Recording object")
        fetch: Any = connection.fetch
        await fetch(query, tag="the caller's own keyword")
        await change(direct)
        Recording.timeouts.clear()
        await fetch(query, timeout=HANG)
        first, second = Recording.timeouts
        assert first == HANG
        assert second is not None
        assert 0 < second < HANG


@pytest.mark.anyio
async def test_the_callers_own_text_is_what_loggers_see(
    pgbouncer: LocalPgBouncer, direct: Any, caplog: pytest.LogCaptureFixture
) -> None:
    healing, query, seen = Healing(), fresh(), []
    async with shared(pgbouncer, query), opened(pgbouncer, healing) as connection:
        await connection.fetch(query)
        await change(direct)
        with caplog.at_level(logging.INFO, "neon_async"), connection.query_logger(lambda record: seen.append(record)):
            await connection.fetch(query)
            await connection.fetch(query)
            await asyncio.sleep(0)
        assert {record.query for record in seen} == {query}
    assert [record.getMessage() for record in caplog.records if record.name == "neon_async"] == [
        "ep-cool-darkness-123456: a plan is stale, the schema has changed; statements are prepared anew from now on"
    ]
    assert repr(healing).startswith("<Healing 1 heals in 0.")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("call", "feature"),
    [
        pytest.param(lambda c: c.execute("LISTEN orders"), "LISTEN", id="execute"),
        pytest.param(lambda c: c.fetch("SELECT pg_advisory_lock($1)", 1), "pg_advisory_lock()", id="fetch"),
        pytest.param(lambda c: c.fetchval(query="SET search_path = a"), "SET search_path", id="fetchval by keyword"),
        pytest.param(lambda c: c.fetchrow("SET ROLE a"), "SET ROLE", id="fetchrow"),
        pytest.param(
            lambda c: c.executemany(command="SELECT pg_advisory_lock($1)", args=[(1,)]),
            "pg_advisory_lock()",
            id="executemany by keyword",
        ),
        pytest.param(
            lambda c: c.fetchmany("SELECT pg_try_advisory_lock($1)", [(1,)]), "pg_try_advisory_lock()", id="fetchmany"
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
async def test_what_needs_a_session_is_refused_with_the_direct_hosts_name(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres, call: Callable[[Any], Awaitable[object]], feature: str
) -> None:
    async with opened(pgbouncer, Healing()) as connection, connection.transaction():
        with pytest.raises(neon_async.PooledHostError) as caught:
            await call(connection)
        assert str(caught.value).startswith(f"{feature} needs a session that lasts, and {pgbouncer.host} ")
        assert str(caught.value).endswith(f" the direct host {postgres.host}.")
        assert isinstance(caught.value, asyncpg.FeatureNotSupportedError)
        assert await connection.fetchval("SELECT 1") == 1  # nothing was sent: the transaction is as it was


@pytest.mark.anyio
async def test_what_works_on_a_pooled_host_works(pgbouncer: LocalPgBouncer) -> None:
    async with opened(pgbouncer, Healing()) as one, opened(pgbouncer, Healing()) as two:
        async with one.transaction():
            await one.execute("SET LOCAL statement_timeout = 1234")
            assert await one.fetchval("SHOW statement_timeout") == "1234ms"
            assert await one.fetchval("SELECT pg_try_advisory_xact_lock(7)")
        await one.execute("SET TimeZone = 'Asia/Tokyo'")
        assert await two.fetchval("SHOW TimeZone") != "Asia/Tokyo"
        assert await one.fetchval("SHOW TimeZone") == "Asia/Tokyo"
        with pytest.raises(TypeError):
            await one.fetch(7)  # type: ignore[call-overload]


@pytest.mark.anyio
async def test_reset_gives_back_the_settings_that_pgbouncer_tracks(pgbouncer: LocalPgBouncer) -> None:
    """PgBouncer has them follow the client, and so the next caller: with other strings, the next query is another."""
    async with opened(pgbouncer, Healing()) as connection:
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


@pytest.mark.anyio
@pytest.mark.parametrize("call", ["execute", "fetch"])
async def test_a_query_that_is_left_running_is_waited_for_by_the_reset(pgbouncer: LocalPgBouncer, call: str) -> None:
    async with opened(pgbouncer, Healing()) as connection:
        assert await connection.fetchval("SELECT 1") == 1
        assert connection.get_reset_query() == ""
        running = asyncio.ensure_future(getattr(connection, call)("SELECT pg_sleep(0.1)"))
        await asyncio.sleep(0)
        assert connection.get_reset_query()
        await running
        assert connection.get_reset_query() == ""


async def wrong_argument(connection: Any, query: str) -> None:
    with pytest.raises(asyncpg.DataError):
        await connection.fetch(f"{query} WHERE a = $1", "no number")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda c, q: c.prepare(q), id="only prepared"),
        pytest.param(wrong_argument, id="a wrong argument"),
        pytest.param(lambda c, q: c.fetch(q), id="nothing unfinished"),
    ],
)
async def test_reset_ends_what_keeps_a_server_session_and_its_locks(
    pgbouncer: LocalPgBouncer, direct: Any, leave: Call
) -> None:
    async with opened(pgbouncer, Healing()) as connection:
        await leave(connection, fresh())
        assert is_unfinished(connection) or await direct.fetchval(LOCKS) == 0
        await connection.reset(timeout=HANG)
        assert await direct.fetchval(LOCKS) == 0
        assert not is_unfinished(connection)


class Pausing(asyncpg.Connection):
    """One that stands still between the answer to a prepare and the execution."""

    prepared = asyncio.Event()

    async def _get_statement(self, *args: Any, **keywords: Any) -> Any:
        statement = await super()._get_statement(*args, **keywords)  # type: ignore[misc]
        self.prepared.set()
        await asyncio.sleep(HANG)
        return statement


@pytest.mark.anyio
async def test_reset_ends_what_a_cancelled_call_has_only_prepared(pgbouncer: LocalPgBouncer, direct: Any) -> None:
    """There, asyncpg sends neither a cancel request nor Sync."""
    Pausing.prepared = asyncio.Event()
    async with opened(pgbouncer, Healing(), base=Pausing) as connection:
        task = asyncio.create_task(connection.fetch(fresh()))
        await Pausing.prepared.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await direct.fetchval(LOCKS) == 1
        assert is_unfinished(connection)
        await connection.reset(timeout=HANG)
        assert await direct.fetchval(LOCKS) == 0


@pytest.mark.anyio
async def test_asyncpg_still_keeps_locks_behind_a_prepare(pgbouncer: LocalPgBouncer, direct: Any) -> None:
    """When it no longer does, what we do about it can go."""
    async with opened(pgbouncer, Healing()) as connection:
        _kept = await connection.prepare(fresh())
        assert is_unfinished(connection)
        assert await direct.fetchval(LOCKS) == 1


@pytest.mark.anyio
async def test_transactions_are_ours_on_every_host(pgbouncer: LocalPgBouncer, postgres: LocalPostgres) -> None:
    async with opened(pgbouncer, Healing()) as connection:
        assert type(connection.transaction(readonly=True)) is Transaction
        async with connection.transaction(isolation="serializable"):
            assert await connection.fetchval("SHOW transaction_isolation") == "serializable"
    with pytest.raises(asyncpg.InterfaceError, match="closed"):
        connection.transaction()


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["the server's own", "db.example.com"])
async def test_on_a_direct_host_nothing_is_refused_and_nothing_added(postgres: LocalPostgres, host: str) -> None:
    healing = Healing()
    host = postgres.host if host == "the server's own" else host
    cls = session_class(asyncpg.Connection, endpoint=parse_host(host), host=host, healing=healing)
    healing.renew()
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, connection_class=cls)
    await connection.execute("LISTEN orders; SET search_path = a; SELECT pg_advisory_lock(1)")
    await connection.add_listener("orders", print)
    await connection.remove_listener("orders", print)
    query = "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    assert await connection.fetchval(query) == query
    assert "RESET ALL" in connection.get_reset_query()
    assert type(connection.transaction()) is Transaction
    await connection.close(timeout=HANG)


# ---------------------------------------------------------------------------------------------------------------------
# Server settings


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("keywords", "setting", "value"),
    [
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
    ],
)
async def test_settings_that_pgbouncer_tracks_reach_every_server_connection(
    pgbouncer: LocalPgBouncer, keywords: dict[str, Any], setting: str, value: str
) -> None:
    async with opened(pgbouncer, Healing(), **keywords) as one, opened(pgbouncer, Healing()) as two:
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
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres, keywords: dict[str, Any]
) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=f"direct host {postgres.host},"):
        _ = neon_async.connect(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, **keywords)
