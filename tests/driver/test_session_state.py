"""On a pooled host what would stay in the session is refused, and what ends with its transaction works.

Each refused statement is shown to be right: on a session of its own it leaves something behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.pgbouncer import LocalPgBouncer
from support.pooled import TABLE, connector_to, opened
from support.probes import HANG

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

SETTING = "SELECT nullif(current_setting('app.tenant', true), '')"
LOCK = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() HAVING count(*) > 0"
PREPARED = "SELECT name FROM pg_prepared_statements WHERE from_sql"
CURSOR = "SELECT name FROM pg_cursors WHERE is_holdable"
PATH = "SELECT nullif(current_setting('search_path'), '\"$user\", public')"
TEMPORARY = "SELECT relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND relkind <> 'i'"
TEMPORARY_FUNCTION = "SELECT proname FROM pg_proc WHERE pronamespace = pg_my_temp_schema()"
BODY = "CREATE FUNCTION bodied() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END"
CASE_BODY = "CREATE FUNCTION bodied() RETURNS int BEGIN ATOMIC SELECT 1 case; END"
LISTENING = "SELECT pg_listening_channels()"
SLOT = "SELECT slot_name FROM pg_replication_slots WHERE temporary AND active_pid = pg_backend_pid()"
STATISTICS = "SELECT stxname FROM pg_statistic_ext WHERE stxnamespace = pg_my_temp_schema()"
XML = "SELECT nullif(current_setting('xmloption'), 'content')"


def rows(*cases: tuple[str, tuple[object, ...], str]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]} {case[1] or ''}".strip()) for case in cases]


LEAKS = rows(
    # set_config()
    ("SELECT set_config('app.tenant', 'a', false)", (), SETTING),
    ("SELECT set_config($1, $2, false)", ("app.tenant", "a"), SETTING),
    ("SELECT set_config($1, $2, $3)", ("app.tenant", "a", False), SETTING),
    ("SELECT set_config($1, $2, $3)", ("app.tenant", "a", None), SETTING),
    ("SELECT set_config('app.tenant', 'a', 'f')", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', false::bool)", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', NOT true)", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', (true) AND (false))", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', CAST('off' AS boolean))", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', NULL)", (), SETTING),
    ("SELECT set_config('app.' || 'tenant', 'a', false)", (), SETTING),
    ("SELECT set_config(E'app.tenant', 'a', false)", (), SETTING),
    ("SELECT set_config(/* b */'app.tenant',--\n'a',\nFALSE)", (), SETTING),
    ("SELECT \"set_config\"('app.tenant', 'a', false)", (), SETTING),
    ("SELECT \"pg_catalog\".\"set_config\"('app.tenant', 'a', false)", (), SETTING),
    ("SELECT U&\"set\\005fconfig\"('app.tenant', 'a', false)", (), SETTING),
    ("SELECT U&\"set!005fconfig\" UESCAPE '!' ('app.tenant', 'a', false)", (), SETTING),
    ("EXPLAIN ANALYZE SELECT set_config('app.tenant', 'a', false)", (), SETTING),
    ("EXPLAIN (BUFFERS, ANALYZE) SELECT set_config('app.tenant', 'a', false)", (), SETTING),
    ("SELECT 1 WHERE set_config('app.tenant', 'a', false) IS NULL", (), SETTING),
    ("VALUES (set_config('app.tenant', 'a', false))", (), SETTING),
    ("SELECT set_config('app.tenant', ARRAY['a','b']::text, false)", (), SETTING),
    ("SELECT U&\"set!005fconfig\" UESCAPE E'!' ('app.tenant', 'a', false)", (), SETTING),
    ("SELECT U&\"set!005fconfig\" UESCAPE $$!$$ ('app.tenant', 'a', false)", (), SETTING),
    # What executes expressions at once
    (
        (
            "CREATE TABLE parted (a text) PARTITION BY LIST (a); "
            "CREATE TABLE part PARTITION OF parted FOR VALUES IN (set_config('app.tenant', 'a', false)); "
            "DROP TABLE parted"
        ),
        (),
        SETTING,
    ),
    (
        (
            "CREATE DOMAIN dom AS text; CREATE TABLE doms (a dom); INSERT INTO doms VALUES ('a'); "
            "ALTER DOMAIN dom ADD CHECK (set_config('app.tenant', 'a', false) = VALUE); "
            "DROP TABLE doms; DROP DOMAIN dom"
        ),
        (),
        SETTING,
    ),
    # SQL in an argument of what executes it
    ("SELECT query_to_xml('SELECT set_config(''app.tenant'', ''a'', false)', true, true, '')", (), SETTING),
    ("SELECT query_to_xml($1, true, true, '')", ("SELECT set_config('app.tenant', 'a', false)",), SETTING),
    ("SELECT ts_stat($$SELECT to_tsvector(set_config('app.tenant', 'a', false))$$)", (), SETTING),
    # Blocks
    ("DO $$ BEGIN PERFORM set_config('app.tenant', 'a', false); END $$", (), SETTING),
    ("DO LANGUAGE plpgsql $a$ DECLARE a text := set_config('app.tenant', 'a', false); BEGIN END $a$", (), SETTING),
    ("DO $$ BEGIN IF true THEN SET app.tenant = 'a'; END IF; END $$ LANGUAGE 'plpgsql'", (), SETTING),
    ("DO $$ BEGIN RAISE 'a'; EXCEPTION WHEN others THEN SET SESSION app.tenant TO a; END $$", (), SETTING),
    ("DO $$ <<a>> BEGIN CASE WHEN false THEN NULL; ELSE SET app.tenant = 'a'; END CASE; END $$", (), SETTING),
    ("DO E'BEGIN PERFORM set\\x5fconfig(\\'app.tenant\\', \\'a\\', false); END'", (), SETTING),
    ("DO E'BEGIN\\nSET app.tenant = \\'a\\';\\nEND'", (), SETTING),
    ("DO 'BEGIN '\n'PERFORM set_config(''app.tenant'', ''a'', false); END'", (), SETTING),
    ("DO $$ BEGIN EXECUTE $a$SET app.tenant = 'a'$a$; END $$", (), SETTING),
    ("DO $$ BEGIN EXECUTE 'SET ' || 'app.tenant = 1'; END $$", (), SETTING),
    ("DO $$ DECLARE a text := 'app.tenant'; BEGIN EXECUTE 'SET ' || a || ' = 1'; END $$", (), SETTING),
    ("DO $$ BEGIN EXECUTE 'SET app.tenant TO ' || quote_literal('a'); END $$", (), SETTING),
    ("DO $$ BEGIN EXECUTE format('SET %s = %L', 'app.tenant', 'a'); END $$", (), SETTING),
    ("DO $$ BEGIN EXECUTE 'SELECT set_config($1, $2, false)' USING 'app.tenant', 'a'; END $$", (), SETTING),
    ("DO $$ BEGIN DO $a$ BEGIN SET app.tenant = 'a'; END $a$; END $$", (), SETTING),
    ("DO $$ BEGIN FOR i IN 1..2 LOOP PERFORM pg_try_advisory_lock(i); END LOOP; END $$", (), LOCK),
    ("DO $$ DECLARE r record; BEGIN FOR r IN EXECUTE 'SELECT pg_advisory_lock(1)' LOOP END LOOP; END $$", (), LOCK),
    ("DO 'BEGIN LISTEN orders; END'", (), LISTENING),
    ("DO $$ BEGIN CREATE TEMP TABLE a (b int); END $$", (), TEMPORARY),
    ("DO $$ BEGIN EXECUTE format('CREATE TABLE pg_temp.%I (b int)', 'a'); END $$", (), TEMPORARY),
    ("DO $$ BEGIN PREPARE a AS SELECT 1; END $$", (), PREPARED),
    # SET
    ("SET app.tenant = 'a'", (), SETTING),
    ("/**/SET/**/app.tenant='a'", (), SETTING),
    ("SET\tSESSION\napp.tenant TO 'a'", (), SETTING),
    ('SET "app"."tenant" = a', (), SETTING),
    ('SET U&"\\0061pp".tenant = a', (), SETTING),
    ("SELECT 1;SET app.tenant='a'", (), SETTING),
    ("SET local.x = 'a'", (), "SELECT nullif(current_setting('local.x', true), '')"),
    ('SET "local"."x" = \'a\'', (), "SELECT nullif(current_setting('local.x', true), '')"),
    ("SET session.x = 'a'", (), "SELECT nullif(current_setting('session.x', true), '')"),
    ("SET a.b.c = 'a'", (), "SELECT nullif(current_setting('a.b.c', true), '')"),
    ('SET search_path = "default"', (), PATH),
    ("SET XML OPTION DOCUMENT", (), XML),
    ("SET SESSION XML OPTION DOCUMENT", (), XML),
    ("BEGIN; SET LOCAL app.tenant = 'a'; SET app.tenant FROM CURRENT; COMMIT", (), SETTING),
    ("UPDATE pg_settings SET setting = 'a' WHERE name = 'search_path'", (), PATH),
    ("UPDATE ONLY pg_catalog.pg_settings SET setting = 'a' WHERE name = 'search_path'", (), PATH),
    # Locks
    ('SELECT "pg_advisory_lock"(1)', (), LOCK),
    ("SELECT pg_advisory_lock/**/(1)", (), LOCK),
    ('SELECT pg_catalog."pg_try_advisory_lock_shared"(1)', (), LOCK),
    # Temporary objects
    ("CREATE TEMP TABLE a (b int)", (), TEMPORARY),
    ("CREATE/**/TEMPORARY/**/TABLE a (b int) ON COMMIT DELETE ROWS", (), TEMPORARY),
    ("CREATE LOCAL TEMP TABLE a AS SELECT 1", (), TEMPORARY),
    ("CREATE GLOBAL TEMPORARY TABLE IF NOT EXISTS a (b int)", (), TEMPORARY),
    ("CREATE OR REPLACE TEMP VIEW a AS SELECT 1", (), TEMPORARY),
    ("CREATE TEMP RECURSIVE VIEW a (b) AS SELECT 1", (), TEMPORARY),
    ("CREATE TEMP SEQUENCE a", (), TEMPORARY),
    ("CREATE TABLE pg_temp.a (b int)", (), TEMPORARY),
    ('CREATE TABLE "pg_temp"."a" (b int)', (), TEMPORARY),
    ("CREATE VIEW pg_temp.a AS SELECT 1", (), TEMPORARY),
    ("CREATE FUNCTION pg_temp.a() RETURNS int LANGUAGE sql AS 'SELECT 1'", (), TEMPORARY_FUNCTION),
    ("SELECT 1 AS b INTO TEMP a", (), TEMPORARY),
    ("SELECT 1 AS b INTO TEMPORARY TABLE a", (), TEMPORARY),
    ("SELECT 1 AS b INTO LOCAL TEMP a", (), TEMPORARY),
    ("SELECT 1 AS b INTO pg_temp.a", (), TEMPORARY),
    ("SELECT 1 AS insert INTO TEMP a", (), TEMPORARY),
    (
        "CREATE TABLE IF NOT EXISTS measured (a int, b int); CREATE STATISTICS pg_temp.s ON a, b FROM measured",
        (),
        STATISTICS,
    ),
    ("BEGIN; SET LOCAL search_path = pg_temp, public; CREATE TABLE a (b int); COMMIT", (), TEMPORARY),
    ("BEGIN; SET LOCAL SCHEMA 'pg_temp'; CREATE VIEW a AS SELECT 1; COMMIT", (), TEMPORARY),
    (
        "BEGIN; SELECT set_config('search_path', '\"pg_temp\"', true); CREATE SEQUENCE a; COMMIT",
        (),
        TEMPORARY,
    ),
    # Replication slots
    ("SELECT pg_create_physical_replication_slot('a', false, true)", (), SLOT),
    ("SELECT pg_create_physical_replication_slot('a', temporary => 'on')", (), SLOT),
    ("SELECT pg_create_physical_replication_slot($1, $2, $3)", ("a", False, True), SLOT),
    # Statements and cursors
    ("PREPARE a AS SELECT 1", (), PREPARED),
    ("PREPARE a (int) AS SELECT $1", (), PREPARED),
    ("PREPARE transaction AS SELECT 1", (), PREPARED),
    ("BEGIN; DECLARE a CURSOR WITH HOLD FOR SELECT 1; COMMIT", (), CURSOR),
    ("BEGIN; DECLARE a BINARY INSENSITIVE NO SCROLL CURSOR/**/WITH/**/HOLD FOR SELECT 1; COMMIT", (), CURSOR),
    # After the body of a function
    ("BEGIN; " + BODY + "; ROLLBACK; SET app.tenant = 'a'", (), SETTING),
    ("BEGIN; " + CASE_BODY + "; ROLLBACK; SET app.tenant = 'a'", (), SETTING),
)

LOCAL = rows(
    ("SELECT set_config('app.tenant', 'a', true)", (), SETTING),
    ("SELECT set_config('app.tenant', $1, TRUE::boolean)", ("a",), SETTING),
    ("SELECT set_config($1, $2, true)", ("app.tenant", "a"), SETTING),
    ("SELECT set_config($1, $2, $3)", ("app.tenant", "a", True), SETTING),
    ("SELECT set_config($1, $2, ($3)::bool)", ("app.tenant", "a", True), SETTING),
    ("SELECT set_config('app.tenant', 'a', 't')", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', CAST('yes' AS bool))", (), SETTING),
    ("SELECT set_config('app.tenant', 'a', bool 'on')", (), SETTING),
    ("BEGIN; SET LOCAL app.tenant = 'a'; SET LOCAL local.x = 'a'; COMMIT", (), SETTING),
    ("CREATE TEMP TABLE a (b int) ON COMMIT DROP", (), TEMPORARY),
    ("BEGIN; CREATE TEMP TABLE a ON COMMIT DROP AS SELECT 1 AS b; SELECT * FROM a; COMMIT", (), TEMPORARY),
    ("BEGIN; CREATE TABLE pg_temp.a (b int) ON COMMIT DROP; CREATE INDEX ON pg_temp.a (b); COMMIT", (), TEMPORARY),
    ("BEGIN; DECLARE a CURSOR WITHOUT HOLD FOR SELECT 1; DECLARE b CURSOR FOR SELECT 1; COMMIT", (), CURSOR),
    ("SELECT pg_advisory_xact_lock(1)", (), LOCK),
    ("EXPLAIN SELECT pg_advisory_lock(1)", (), LOCK),
    ("EXPLAIN (ANALYZE off) SELECT pg_advisory_lock(1)", (), LOCK),
    ("DO $$ BEGIN SET LOCAL app.tenant = 'a'; PERFORM set_config('app.tenant', 'a', true); END $$", (), SETTING),
    ("DO $$ BEGIN EXECUTE format('SET LOCAL %I.tenant = %L', 'app', 'SET a = 1'); END $$", (), SETTING),
    ("DO $$ BEGIN CREATE TEMP TABLE a (b int) ON COMMIT DROP; INSERT INTO a VALUES (1); END $$", (), TEMPORARY),
    ("DO $$ DECLARE temp int; BEGIN SELECT 1 INTO temp; SELECT INTO temp 2; END $$", (), TEMPORARY),
    ("DO $$ DECLARE set int; load text; BEGIN set := 1; set = 2; load := 'a'; END $$", (), SETTING),
    ("DO $$ BEGIN GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC; END $$", (), LOCK),
    ("DO $$ BEGIN RAISE NOTICE 'SET app.tenant = 1; LISTEN orders'; END $$", (), SETTING),
    ("SELECT query_to_xml('SELECT 1 AS \"LISTEN a\"', true, true, $1)", ("",), LISTENING),
    ("BEGIN; SET LOCAL search_path = public, pg_temp; COMMIT", (), TEMPORARY),
    ("SELECT set_config('search_path', 'public, pg_temp', true)", (), PATH),
    ("SELECT pg_create_physical_replication_slot('a'), pg_drop_replication_slot('a')", (), SLOT),
    ("SELECT pg_create_physical_replication_slot('a', $1, $2), pg_drop_replication_slot('a')", (True, False), SLOT),
    ("DEALLOCATE ALL", (), PREPARED),
    ("DISCARD TEMP", (), TEMPORARY),
)


@contextlib.asynccontextmanager
async def session(postgres: LocalPostgres) -> AsyncIterator[Any]:
    """A session that no other test uses."""
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        yield connection
    finally:
        await connection.close(timeout=HANG)


async def run(connection: Any, query: str, args: tuple[object, ...]) -> None:
    """Run a query as the callers of asyncpg do: with arguments, it is one statement."""
    await (connection.fetch(query, *args) if args else connection.execute(query))


@pytest.mark.parametrize(("query", "args", "probe"), LEAKS)
async def test_what_stays_in_a_session_is_refused_on_a_pooled_host(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres, query: str, args: tuple[object, ...], probe: str
) -> None:
    async with session(postgres) as own:
        assert await own.fetchval(probe) is None
        await run(own, query, args)
        assert await own.fetchval(probe) is not None  # so the refusal is right
    async with opened(connector_to(pgbouncer)) as connection:
        with pytest.raises(neon_async.PooledHostError, match="needs a session of its own"):
            await run(connection, query, args)


@pytest.mark.parametrize(("query", "args", "probe"), LOCAL)
async def test_what_ends_with_its_transaction_works_on_a_pooled_host(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres, query: str, args: tuple[object, ...], probe: str
) -> None:
    async with session(postgres) as own:
        await run(own, query, args)
        assert await own.fetchval(probe) is None
    async with opened(connector_to(pgbouncer)) as connection:
        await run(connection, query, args)


async def test_backslash_escapes_in_all_strings_hide_nothing(
    pgbouncer: LocalPgBouncer, postgres: LocalPostgres
) -> None:
    """`standard_conforming_strings` is one of the settings that PgBouncer tracks, so a client may turn it off."""
    hidden = r"SELECT 'a\'', set_config('app.tenant', 'a', false), '\''"
    async with session(postgres) as own:
        await own.execute("SET standard_conforming_strings = off")
        await own.execute(hidden)
        assert await own.fetchval(SETTING) == "a"
    async with opened(connector_to(pgbouncer)) as connection:
        await connection.execute("SET standard_conforming_strings = off")
        with pytest.raises(neon_async.PooledHostError, match="set_config"):
            await connection.execute(hidden)
        assert await connection.fetchval(r"SELECT 'a\'; LISTEN b'") == "a'; LISTEN b"


ARGUMENTS = ("app.tenant", "a", False)
CALLS = [
    pytest.param(lambda c, q: c.execute(q, *ARGUMENTS), id="execute"),
    pytest.param(lambda c, q: c.fetch(q, *ARGUMENTS), id="fetch"),
    pytest.param(lambda c, q: c.fetchval(q, *ARGUMENTS), id="fetchval"),
    pytest.param(lambda c, q: c.fetchrow(q, *ARGUMENTS), id="fetchrow"),
    pytest.param(lambda c, q: c.executemany(q, [("app.tenant", "a", True)]), id="executemany, whose rows are not read"),
    pytest.param(lambda c, q: c.fetchmany(q, [("app.tenant", "a", True)]), id="fetchmany"),
    pytest.param(lambda c, q: c.prepare(q), id="prepare, whose arguments come later"),
    pytest.param(lambda c, q: c.cursor(q, *ARGUMENTS), id="cursor"),
    pytest.param(
        lambda c, q: c.copy_from_query(q, "app.tenant", "a", False, output=io.BytesIO()), id="copy_from_query"
    ),
]


@pytest.mark.parametrize("call", CALLS)
async def test_every_call_judges_its_arguments(
    pgbouncer: LocalPgBouncer, call: Callable[[Any, str], Awaitable[object]]
) -> None:
    async with opened(connector_to(pgbouncer)) as connection, connection.transaction():
        with pytest.raises(neon_async.PooledHostError, match=r"set_config\(\$1, \.\.\., \$3\) needs"):
            await call(connection, "SELECT set_config($1, $2, $3)")


@pytest.mark.parametrize("name", ["copy_to_table", "copy_records_to_table"])
async def test_the_condition_of_a_copy_is_judged(pgbouncer: LocalPgBouncer, direct: Any, name: str) -> None:
    source: dict[str, Any] = {"source": io.BytesIO(b"5\n")} if name == "copy_to_table" else {"records": [(5,)]}
    async with opened(connector_to(pgbouncer)) as connection:
        for where in ("set_config('app.tenant', 'a', false) = 'a'", "true; SET app.tenant = 'a'"):
            with pytest.raises(neon_async.PooledHostError):
                await getattr(connection, name)(TABLE, where=where, **source)
        await getattr(connection, name)(TABLE, where="a > 4", **source)
    assert await direct.fetchval(f"SELECT count(*) FROM {TABLE}") == 4


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("option", ["header", "freeze", "oids"])
async def test_the_flags_of_a_copy_are_judged(pgbouncer: LocalPgBouncer, option: str) -> None:
    """asyncpg writes them as they are."""
    hidden: dict[str, Any] = {option: "false); SET app.tenant = 'a'; COPY healing FROM STDIN WITH (header false"}
    async with opened(connector_to(pgbouncer)) as connection:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: connection.copy_to_table(TABLE, source=io.BytesIO(b"5\n"), **hidden),
            lambda: connection.copy_from_table(TABLE, output=io.BytesIO(), **hidden),
            lambda: connection.copy_from_query("SELECT 1", output=io.BytesIO(), **hidden),
        ]
        for call in calls:
            with pytest.raises(neon_async.PooledHostError, match=r"SET app\.tenant"):
                await call()
        await connection.copy_from_table(TABLE, output=io.BytesIO(), format="csv", header=True)


async def test_a_transaction_whose_objects_would_be_temporary_is_refused(pgbouncer: LocalPgBouncer) -> None:
    async with opened(connector_to(pgbouncer)) as connection:
        with pytest.raises(neon_async.PooledHostError, match="search_path = pg_temp needs"):
            connection.transaction(settings={"search_path": "pg_temp, public"})
        async with connection.transaction(settings={"search_path": "public, pg_temp"}):
            assert await connection.fetchval("SHOW search_path") == "public, pg_temp"


async def failing_later() -> AsyncIterator[bytes]:
    """A source of data that fails after the server has."""
    yield b"1\n"
    await asyncio.sleep(0.05)  # the server answers in less, and nothing but the answer would tell
    raise ZeroDivisionError


@pytest.mark.usefixtures("pgbouncer_installed")
@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(lambda c: c.copy_to_table("missing", source=io.BytesIO(b"1\n")), id="no such table"),
        pytest.param(lambda c: c.copy_to_table(TABLE, source=io.BytesIO(b"x\n")), id="data that do not fit"),
        pytest.param(lambda c: c.copy_records_to_table(TABLE, records=[(1,)], where="a / 0 = 1"), id="records"),
        pytest.param(
            lambda c: c.copy_to_table("missing", source=failing_later()), id="no such table, a source that fails"
        ),
    ],
)
async def test_a_copy_that_failed_keeps_no_server_connection_from_other_clients(
    postgres: LocalPostgres, direct: Any, copy: Callable[[Any], Awaitable[object]]
) -> None:
    """PgBouncer waits for an answer to the rest of the data, until the client disconnects."""
    async with LocalPgBouncer(postgres, default_pool_size=1) as bouncer:
        pools = [neon_async.create_pool(bouncer.dsn, trust_anchor=bouncer.trust_anchor) for _ in range(2)]
        async with pools[0] as pool, pools[1] as other:
            with pytest.raises((asyncpg.PostgresError, ZeroDivisionError)):
                async with pool.acquire() as connection:
                    await copy(connection)
            assert await other.fetchval("SELECT 1", timeout=HANG) == 1
            assert await pool.fetchval("SELECT 1", timeout=HANG) == 1


@pytest.mark.usefixtures("pgbouncer_installed")
async def test_asking_the_server_about_types_changes_no_setting(postgres: LocalPostgres) -> None:
    """asyncpg turns jit off for the session meanwhile, and behind PgBouncer that can be another client's."""
    async with LocalPgBouncer(postgres, default_pool_size=1) as bouncer, opened(connector_to(bouncer)) as connection:
        assert await connection.fetchval("SELECT NULL::information_schema.tables") is None
        texts = await connection.fetchval("SELECT string_agg(statement, '') FROM pg_prepared_statements")
        assert "typeinfo_tree" in texts  # it has asked
        assert "set_config" not in texts
