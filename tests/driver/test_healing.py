"""Prepared statements that DDL has made stale heal within the call, on direct and on pooled hosts.

Plain asyncpg heals one error, on direct hosts, and drops all statements of a pool for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from support.healing import Bench, bench_on, numbers
from support.pgbouncer import LocalPgBouncer
from support.pooled import connector_to, opened, other_client

import neon_async
from neon_async import StaleStatementError
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

Call = Callable[[Any, str], Awaitable[Any]]


@pytest.fixture(params=["direct", "pooled"])
async def bench(request: pytest.FixtureRequest, postgres: LocalPostgres) -> AsyncIterator[Bench]:
    server = request.getfixturevalue("postgres" if request.param == "direct" else "pgbouncer")
    async with bench_on(server, postgres) as bench:
        yield bench


@pytest.fixture
async def direct(postgres: LocalPostgres) -> AsyncIterator[Bench]:
    async with bench_on(postgres, postgres) as bench:
        yield bench


# ---------------------------------------------------------------------------------------------------------------------
# What becomes stale: how a statement is used, the DDL, and how it is used again


@dataclass(frozen=True)
class Change:
    """DDL that makes a statement stale.

    Attributes:
        before: What exists.
        query: The text.
        first: Its arguments before the DDL.
        ddl: The DDL.
        second: Its arguments after the DDL.
        result: Its first value then.
    """

    before: str
    query: str
    first: tuple[Any, ...]
    ddl: str
    second: tuple[Any, ...]
    result: Any


MOOD = "CREATE TYPE {s}.mood AS ENUM ('sad', 'happy')"
RECREATED = f"DROP TYPE {{s}}.mood CASCADE; {MOOD}"
TABLE = "CREATE TABLE {s}.t (id int, a int); INSERT INTO {s}.t VALUES (1, 5)"
TO_TEXT = "ALTER TABLE {s}.t ALTER COLUMN id TYPE text"

CHANGES = {
    "an enum as an argument": Change(MOOD, "SELECT $1::{s}.mood", ("sad",), RECREATED, ("happy",), "happy"),
    "an array of an enum": Change(MOOD, "SELECT $1::{s}.mood[]", (["sad"],), RECREATED, (["happy"],), ["happy"]),
    "a column of an enum": Change(
        f"{MOOD}; CREATE TABLE {{s}}.t (m {{s}}.mood); INSERT INTO {{s}}.t VALUES ('sad')",
        "SELECT m FROM {s}.t WHERE m = $1",
        ("sad",),
        f"{RECREATED}; ALTER TABLE {{s}}.t ADD COLUMN m {{s}}.mood DEFAULT 'happy'",
        ("happy",),
        "happy",
    ),
    "a domain": Change(
        "CREATE DOMAIN {s}.d AS int",
        "SELECT $1::{s}.d::text",
        (1,),
        "DROP DOMAIN {s}.d; CREATE DOMAIN {s}.d AS text",
        ("b",),
        "b",
    ),
    "another column": Change(TABLE, "SELECT * FROM {s}.t", (), "ALTER TABLE {s}.t DROP COLUMN id", (), 5),
    "an argument that is no number any more": Change(
        TABLE, "SELECT a FROM {s}.t WHERE id = $1", (1,), TO_TEXT, ("1",), 5
    ),
    "a comparison with another type": Change(
        "CREATE TABLE {s}.t (id int, a int); INSERT INTO {s}.t VALUES (1, 5)",
        "SELECT a FROM {s}.t WHERE id = $1",
        (1,),
        "ALTER TABLE {s}.t ALTER COLUMN id TYPE date USING '2000-01-02'",
        (datetime.date(2000, 1, 2),),
        5,
    ),
    "an argument that has become too large": Change(
        TABLE,
        "INSERT INTO {s}.t (id) VALUES ($1) RETURNING id",
        (2,),
        "ALTER TABLE {s}.t ALTER COLUMN id TYPE bigint",
        (3_000_000_000,),
        3_000_000_000,
    ),
    "an argument of a table that was replaced": Change(
        TABLE,
        "INSERT INTO {s}.t (id) VALUES ($1) RETURNING a",
        (2,),
        "DROP TABLE {s}.t; CREATE TABLE {s}.t (id uuid, a int DEFAULT 7)",
        ("12345678-1234-5678-1234-567812345678",),
        7,
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_stale_statement_heals_within_the_call(bench: Bench, change: Change) -> None:
    query = bench.sql(change.query)
    await bench.ddl(change.before)
    async with other_statements(bench, query):
        await bench.one.fetchval(query, *change.first)
        await bench.two.fetchval(query, *change.first)
        await bench.ddl(change.ddl)
        for connection in (bench.one, bench.two, bench.one):
            assert await connection.fetchval(query, *change.second) == change.result
    assert bench.healing.heals == 1


@contextlib.asynccontextmanager
async def other_statements(bench: Bench, query: str) -> AsyncIterator[None]:
    """Another client of the pooler that has the statement, so that its server connections keep it."""
    if isinstance(bench.server, LocalPgBouncer):
        async with other_client(bench.server, query):
            yield
    else:
        yield


async def fetch_from_statement(connection: Any, query: str) -> Any:
    return await (await connection.prepare(query)).fetch("happy")


CALLS: dict[str, Call] = {
    "fetch": lambda c, q: c.fetch(q, "happy"),
    "fetchrow": lambda c, q: c.fetchrow(q, "happy"),
    "execute": lambda c, q: c.execute(q, "happy"),
    "executemany": lambda c, q: c.executemany(q, [("happy",), ("sad",)]),
    "fetchmany": lambda c, q: c.fetchmany(q, [("happy",), ("sad",)]),
    "prepare": fetch_from_statement,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_every_call_heals_after_an_enum_was_recreated(bench: Bench, call: Call) -> None:
    query = bench.sql("SELECT $1::{s}.mood")
    await bench.ddl(MOOD)
    async with other_statements(bench, query):
        await call(bench.one, query)
        await bench.ddl(RECREATED)
        for _ in range(2):
            await call(bench.one, query)


KEPT = {
    "fetch": lambda s: s.fetch("happy"),
    "fetchval": lambda s: s.fetchval("happy"),
    "fetchrow": lambda s: s.fetchrow("happy"),
    "fetchmany": lambda s: s.fetchmany([("happy",)]),
    "executemany": lambda s: s.executemany([("happy",)]),
}


@pytest.mark.parametrize("use", KEPT.values(), ids=KEPT)
async def test_a_prepared_statement_that_a_caller_keeps_heals_and_stays_the_same(bench: Bench, use: Any) -> None:
    query = bench.sql("SELECT $1::{s}.mood")
    await bench.ddl(MOOD)
    async with other_statements(bench, query):
        statement = await bench.one.prepare(query)
        await use(statement)
        for _ in range(2):
            await bench.ddl(RECREATED)
            await use(statement)
        assert statement.get_query() == query
        assert statement.get_attributes()[0].type.name == "mood"


@pytest.mark.parametrize(
    ("query", "in_transaction"),
    [
        pytest.param("SELECT $1::{s}.mood", False, id="the server refuses to describe it"),
        pytest.param("INSERT INTO {s}.t VALUES ($1)", False, id="the server describes it with the old type"),
        pytest.param("INSERT INTO {s}.t VALUES ($1)", True, id="the same in a transaction"),
    ],
)
async def test_a_new_pool_behind_a_pooler_that_knows_only_the_old_enum_heals(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres, query: str, in_transaction: bool
) -> None:
    """PgBouncer answers the prepare itself, with a type that no longer exists."""
    async with bench_on(pgbouncer, postgres) as bench:
        query = bench.sql(query)
        await bench.ddl(f"{MOOD}; CREATE TABLE {{s}}.t (m {{s}}.mood)")
        connector = connector_to(pgbouncer)
        async with other_client(pgbouncer, query), opened(connector) as new:
            await bench.one.execute(query, "sad")
            await bench.ddl(f"{RECREATED}; ALTER TABLE {{s}}.t ADD COLUMN m {{s}}.mood")
            async with new.transaction() if in_transaction else contextlib.nullcontext():
                await new.execute(query, "happy")
        assert connector.healing.heals == 1


@pytest.mark.parametrize(
    ("query", "first", "second"),
    [
        pytest.param("SELECT ($1::{s}.pair).x", (1, 2), (1, 2, 3), id="an argument"),
        pytest.param("SELECT ($1::{s}.pair[])[1].x", [(1, 2)], [(1, 2, 3)], id="an array"),
        pytest.param("SELECT ($1::{s}.pair).x", (1, 2), {"x": 1, "z": 3}, id="a dict"),
    ],
)
async def test_an_argument_of_a_composite_type_that_has_changed_heals(
    bench: Bench, query: str, first: Any, second: Any
) -> None:
    """Its OID stays the same, so the description of the statement does, too."""
    await bench.ddl("CREATE TYPE {s}.pair AS (x int, y int)")
    query = bench.sql(query)
    assert await bench.one.fetchval(query, first) == 1
    await bench.ddl("ALTER TYPE {s}.pair ADD ATTRIBUTE z int")
    async with bench.one.transaction():  # nothing was sent
        assert await bench.one.fetchval(query, second) == 1
    assert await bench.one.fetchval(query, second) == 1
    for _ in range(2):  # and what is wrong stays wrong
        with pytest.raises(asyncpg.DataError, match="invalid input for query argument"):
            await bench.one.fetchval(query, "no pair")


@pytest.mark.parametrize("in_transaction", [False, True], ids=["outside", "in a transaction"])
async def test_an_argument_of_a_composite_type_that_the_server_refuses_heals(
    bench: Bench, in_transaction: bool
) -> None:
    query = bench.sql("SELECT ($1::{s}.pair).x")
    await bench.ddl("CREATE TYPE {s}.pair AS (x int, y int)")
    assert await bench.one.fetchval(query, (1, 2)) == 1
    await bench.ddl("ALTER TYPE {s}.pair DROP ATTRIBUTE y, ADD ATTRIBUTE y text")
    if in_transaction:
        transaction = bench.one.transaction()
        await transaction.start()
        await bench.one.execute("SELECT 1")
        with pytest.raises(asyncpg.DatatypeMismatchError):
            await bench.one.fetchval(query, (1, 2))
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await bench.one.fetchval(query, (1, "2"))
        await transaction.rollback()
    assert await bench.one.fetchval(query, (1, "2")) == 1
    with pytest.raises((asyncpg.DataError, asyncpg.DatatypeMismatchError)):
        await bench.one.fetchval(query, (1, 2))


async def test_the_callers_codec_of_an_enum_is_registered_for_the_new_one_on_every_connection(bench: Bench) -> None:
    """asyncpg registers codecs by OID."""
    query = bench.sql("SELECT m FROM {s}.t WHERE m = $1")
    await bench.ddl(f"{MOOD}; CREATE TABLE {{s}}.t (m {{s}}.mood); INSERT INTO {{s}}.t VALUES ('sad')")
    async with other_statements(bench, query):
        for connection in (bench.one, bench.two):
            await connection.set_type_codec(
                "mood", schema=bench.schema, encoder=str.lower, decoder=str.upper, format="text"
            )
            assert await connection.fetchval(query, "SAD") == "SAD"
        for _ in range(2):
            await bench.ddl(f"{RECREATED}; ALTER TABLE {{s}}.t ADD COLUMN m {{s}}.mood DEFAULT 'happy'")
            for connection in (bench.one, bench.two):
                assert await connection.fetchval(query, "HAPPY") == "HAPPY"
    assert bench.healing.heals == 2


async def test_after_expire_connections_nothing_old_is_used_behind_a_pooler(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres
) -> None:
    """The one case that cannot be detected: another type of the same width."""
    async with bench_on(pgbouncer, postgres) as bench:
        query = bench.sql("SELECT id FROM {s}.t")
        await bench.ddl(TABLE)
        pool = neon_async.create_pool(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, max_size=1)
        async with pool, other_client(pgbouncer, query):
            assert await pool.fetchval(query) == 1
            await bench.ddl("ALTER TABLE {s}.t ALTER COLUMN id TYPE real")
            await pool.expire_connections()
            assert await pool.fetchval(query) == 1.0
            assert type(await pool.fetchval(query)) is float


# ---------------------------------------------------------------------------------------------------------------------
# In a transaction


async def test_in_a_transaction_it_is_one_known_error_once(bench: Bench) -> None:
    query = bench.sql("SELECT $1::{s}.mood")
    await bench.ddl(MOOD)
    async with other_statements(bench, query):
        await bench.one.fetchval(query, "sad")
        await bench.ddl(RECREATED)
        transaction = bench.one.transaction()
        await transaction.start()
        await bench.one.execute("SELECT 1")
        with pytest.raises(asyncpg.InvalidCachedStatementError) as caught:
            await bench.one.fetchval(query, "happy")
        await transaction.rollback()
        assert "cache lookup failed" in str(caught.value) + str(caught.value.__cause__)
        async with bench.one.transaction():
            assert await bench.one.fetchval(query, "happy") == "happy"


async def test_in_a_transaction_an_argument_that_was_not_sent_heals(bench: Bench) -> None:
    query = bench.sql("SELECT a FROM {s}.t WHERE id = $1")
    await bench.ddl(TABLE)
    async with other_statements(bench, query):
        await bench.one.fetchval(query, 1)
        await bench.ddl(TO_TEXT)
        async with bench.one.transaction():
            await bench.one.execute("SELECT 1")
            assert await bench.one.fetchval(query, "1") == 5


# ---------------------------------------------------------------------------------------------------------------------
# Executed, and its rows cannot be read

PAIR = "CREATE TYPE {s}.pair AS (x int, y int); CREATE SEQUENCE {s}.runs"


async def test_rows_of_a_changed_composite_are_an_error_of_ours_and_the_statement_runs_once(direct: Bench) -> None:
    await direct.ddl(PAIR)
    query = direct.sql("SELECT p FROM {s}.pairs, (SELECT nextval('{s}.runs')) AS run")
    await direct.ddl("CREATE TABLE {s}.pairs (p {s}.pair); INSERT INTO {s}.pairs VALUES (ROW(1, 2))")
    await direct.one.fetch(query)
    await direct.ddl("ALTER TYPE {s}.pair ADD ATTRIBUTE z int")
    with pytest.raises(
        StaleStatementError, match=r"was executed, and its rows could not be read.*call again"
    ) as caught:
        await direct.one.fetch(query)
    assert isinstance(caught.value, asyncpg.exceptions.OutdatedSchemaCacheError)
    assert neon_async.is_retryable(caught.value)
    assert await direct.admin.fetchval(f"SELECT last_value FROM {direct.schema}.runs") == 2
    assert len(await direct.one.fetchval(query)) == 3


@pytest.mark.parametrize("how", ["transaction", "SQL", "session"])
async def test_in_a_read_only_transaction_it_is_repeated(direct: Bench, how: str) -> None:
    await direct.ddl(PAIR)
    query = direct.sql("SELECT p FROM {s}.pairs")
    await direct.ddl("CREATE TABLE {s}.pairs (p {s}.pair); INSERT INTO {s}.pairs VALUES (ROW(1, 2))")
    await direct.one.fetch(query)
    await direct.ddl("ALTER TYPE {s}.pair ADD ATTRIBUTE z int")
    if how == "transaction":
        async with direct.one.transaction(readonly=True):
            assert len(await direct.one.fetchval(query)) == 3
    elif how == "SQL":
        await direct.one.execute("BEGIN; SET TRANSACTION READ ONLY")
        assert len(await direct.one.fetchval(query)) == 3
        await direct.one.execute("COMMIT")
    else:
        await direct.one.execute("SET default_transaction_read_only = on")
        assert len(await direct.one.fetchval(query)) == 3
    assert len(await direct.one.fetchval(query)) == 3


@pytest.mark.parametrize(
    ("ddl", "readonly"),
    [
        pytest.param("ALTER TABLE {s}.t ADD COLUMN b int", False, id="another number of columns"),
        pytest.param("ALTER TABLE {s}.t ALTER COLUMN a TYPE bigint", False, id="another width"),
        pytest.param("ALTER TABLE {s}.t ALTER COLUMN a TYPE text USING 'ünreadable'", False, id="another type"),
        pytest.param("ALTER TABLE {s}.t ADD COLUMN b int", True, id="read only, another number of columns"),
        pytest.param("ALTER TABLE {s}.t ALTER COLUMN a TYPE bigint", True, id="read only, another width"),
    ],
)
@pytest.mark.usefixtures("pgbouncer_installed")
async def test_a_server_connection_that_is_new_to_a_statement_may_read_other_rows(
    postgres: LocalPostgres, ddl: str, readonly: bool
) -> None:
    async with (
        LocalPgBouncer(postgres, default_pool_size=2) as pgbouncer,
        bench_on(pgbouncer, postgres) as bench,
    ):
        await bench.ddl(TABLE)
        query = bench.sql("SELECT * FROM {s}.t")
        await bench.one.fetch(query)
        await bench.ddl(ddl)
        async with bench.two.transaction():
            await bench.two.execute("SELECT 1")  # on the server connection that has the old statement
            if readonly:
                async with bench.one.transaction(readonly=True):
                    assert len(await bench.one.fetch(query)) == 1
            else:
                with pytest.raises(StaleStatementError, match="was executed, and its rows could not be read"):
                    await bench.one.fetch(query)
                assert len(await bench.one.fetch(query)) == 1
        assert bench.healing.heals == 1


# ---------------------------------------------------------------------------------------------------------------------
# Statements that the server has lost


async def test_statements_that_a_function_has_dropped_are_prepared_again(direct: Bench) -> None:
    await direct.ddl(
        "CREATE FUNCTION {s}.drop_all() RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE 'DEALLOCATE ALL'; END$$"
    )
    kept = await direct.one.prepare("SELECT 43 + $1::int")
    for number in range(3):
        assert await direct.one.fetchval("SELECT 42 + $1::int", number) == 42 + number
        assert await kept.fetchval(number) == 43 + number
        await direct.one.execute(direct.sql("SELECT {s}.drop_all()"))


# ---------------------------------------------------------------------------------------------------------------------
# What is not stale

FAILING = """
CREATE SEQUENCE {s}.runs;
CREATE FUNCTION {s}.fail(int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('{s}.runs');
    IF $1 > 0 THEN RAISE SQLSTATE '42883' USING MESSAGE = 'operator does not exist'; END IF;
    RETURN $1;
END$$
"""


async def test_an_error_of_another_cause_is_raised_as_it_is_and_the_statement_runs_once(bench: Bench) -> None:
    await bench.ddl(FAILING)
    query = bench.sql("SELECT {s}.fail($1)")
    assert await bench.one.fetchval(query, 0) == 0
    for runs in (2, 3):
        with pytest.raises(asyncpg.UndefinedFunctionError, match="operator does not exist"):
            await bench.one.fetchval(query, 1)
        assert await bench.admin.fetchval(f"SELECT last_value FROM {bench.schema}.runs") == runs
    assert bench.healing.heals == 0


async def test_a_wrong_argument_and_a_failing_codec_are_raised_as_they_are(bench: Bench) -> None:
    def fail(_: str) -> None:
        raise LookupError("of the caller's own codec")

    for _ in range(2):
        with pytest.raises(asyncpg.DataError, match="invalid input for query argument"):
            await bench.one.fetchval("SELECT $1::int", "no number")
    await bench.one.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=fail)
    for _ in range(2):
        with pytest.raises(LookupError, match="own codec"):
            await bench.one.fetchval("SELECT '1'::json")
    assert await bench.one.fetchval("SELECT 1") == 1
    assert bench.healing.heals == 0


async def test_what_is_asked_of_the_server_has_the_rest_of_the_time(direct: Bench) -> None:
    await direct.ddl(TABLE)
    query = direct.sql("SELECT a FROM {s}.t WHERE id = $1")
    await direct.one.fetchval(query, 1)
    async with direct.admin.transaction():
        await direct.ddl("LOCK TABLE {s}.t")
        with pytest.raises(TimeoutError):
            await direct.one.fetchval(query, "no number", timeout=0.1)


async def test_rows_from_an_iterator_are_written_whole_or_not_at_all(direct: Bench) -> None:
    """asyncpg's own second attempt goes on with the rows that the first has left."""
    await direct.ddl(TABLE)
    command = direct.sql("INSERT INTO {s}.t (a) VALUES ($1) RETURNING *")
    statement = await direct.one.prepare(command)
    for method in (direct.one.executemany, direct.one.fetchmany, lambda _, rows: statement.executemany(rows)):
        await method(command, [(1,)])
        count = await direct.admin.fetchval(f"SELECT count(*) FROM {direct.schema}.t")
        await direct.ddl(f"ALTER TABLE {{s}}.t ADD COLUMN c{next(numbers)} int")
        with pytest.raises(asyncpg.InvalidCachedStatementError, match="Call again with the rows"):
            await method(command, ((number,) for number in range(500)))
        assert await direct.admin.fetchval(f"SELECT count(*) FROM {direct.schema}.t") == count
        await direct.one.execute("SELECT 1")  # a prepare keeps its locks on tables until something is executed


async def test_a_type_that_is_gone_is_reported_by_its_name(bench: Bench) -> None:
    query = bench.sql("SELECT $1::{s}.mood")
    await bench.ddl(MOOD)
    async with other_statements(bench, query):
        await bench.one.fetchval(query, "sad")
        await bench.ddl("DROP TYPE {s}.mood")
        for _ in range(2):
            with pytest.raises(asyncpg.UndefinedObjectError, match=r"mood.*does not exist"):
                await bench.one.fetchval(query, "sad")


@pytest.mark.parametrize("statement", [False, True], ids=["fetch", "statement"])
async def test_the_second_run_can_be_cancelled_and_has_the_rest_of_the_time(direct: Bench, statement: bool) -> None:
    await direct.ddl(TABLE)
    query = direct.sql("SELECT *, pg_sleep($1) FROM {s}.t")
    run: Any = direct.one.fetch
    if statement:
        kept = await direct.one.prepare(query)

        def run(_: str, *args: Any, **options: Any) -> Any:
            return kept.fetch(*args, **options)

    await run(query, 0)
    await direct.ddl("ALTER TABLE {s}.t ADD COLUMN b int")
    with pytest.raises(TimeoutError):
        await run(query, 60, timeout=0.2)
    await direct.one.execute("SELECT 1")  # a prepare keeps its locks on tables until something is executed
    await direct.ddl("ALTER TABLE {s}.t ADD COLUMN c int")
    running = asyncio.ensure_future(run(query, 60))
    while direct.healing.heals < 2:
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await direct.one.fetchval("SELECT 1") == 1
