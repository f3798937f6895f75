"""Statements that need a session of their own are found; the contents of strings, comments and names do not count."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.probes import HANG

from neon_async._neon.calls import JUDGED
from neon_async._neon.sql import session_feature


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("LISTEN orders", "LISTEN"),
        ("  /* a /* nested */ one */ -- and more\n listen orders;", "LISTEN"),
        ("SELECT 1; LISTEN orders", "LISTEN"),
        ('/**/LISTEN"orders"', "LISTEN"),
        ("SELECT pg_advisory_lock(1)", "pg_advisory_lock()"),
        ("select 1, PG_Try_Advisory_Lock ($1)", "pg_try_advisory_lock()"),
        ("SELECT pg_catalog.pg_advisory_lock_shared(1, 2)", "pg_advisory_lock_shared()"),
        ("WITH a AS (SELECT pg_try_advisory_lock_shared(1)) SELECT * FROM a", "pg_try_advisory_lock_shared()"),
        ("SELECT * FROM pg_try_advisory_lock(7)", "pg_try_advisory_lock()"),
        ("(SELECT pg_advisory_lock(1)) UNION SELECT null", "pg_advisory_lock()"),
        ("SELECT 'a''b', E'\\'', $a$ ' $a$, pg_advisory_lock(1)", "pg_advisory_lock()"),
        ("UPDATE t SET a = 1 WHERE pg_try_advisory_lock(id)", "pg_try_advisory_lock()"),
        ("SET search_path TO orders", "SET search_path"),
        ("SET search_path=orders", "SET search_path"),
        ("set session Statement_Timeout = 5", "SET statement_timeout"),
        ('SET "work_mem" = 5', "SET work_mem"),
        ("SET app.tenant TO '7'", "SET app.tenant"),
        ("BEGIN;\nSET lock_timeout = '1s';\nCOMMIT", "SET lock_timeout"),
        ("SET ROLE alex", "SET ROLE"),
        ("SET SESSION ROLE alex", "SET ROLE"),
        ("SET SCHEMA 'orders'", "SET SCHEMA"),
        ("SET SESSION AUTHORIZATION alex", "SET SESSION AUTHORIZATION"),
        (
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
            "SET SESSION CHARACTERISTICS",
        ),
        ("SELECT set_config('search_path', $1, false)", "set_config('search_path', ..., false)"),
        ("SELECT pg_catalog.set_config('a', f($2, 'x'), FALSE)", "set_config('a', ..., false)"),
        ("SELECT set_config('a.b', 'c', true), set_config('a.b', 'c', false)", "set_config('a.b', ..., false)"),
        ("SELECT set_config('a.b', $1, $2)", "set_config('a.b', ..., $2)"),
        ("SELECT set_config($1, $2, false)", "set_config($1, ..., false)"),
        ("SELECT set_config('time' || 'zone', $1, false)", "set_config(..., ..., false)"),
        ("SELECT set_config('a.b', 'c', false OR $1)", "set_config('a.b', ..., ...)"),
        ("SELECT set_config('a.b', 'c', length('it is no secret') > 100)", "set_config('a.b', ..., ...)"),
        ("SELECT set_config('a.b', 'c', (SELECT true))", "set_config('a.b', ..., ...)"),
        ("SELECT neondb.pg_catalog.set_config('a', 'b', false)", "set_config('a', ..., false)"),
        ("CALL p(set_config('a', 'b', false))", "set_config('a', ..., false)"),
        ("EXECUTE p(set_config('a', 'b', false))", "set_config('a', ..., false)"),
        ("COPY (SELECT set_config('a', 'b', false)) TO STDOUT", "set_config('a', ..., false)"),
        ("CREATE TABLE t AS SELECT set_config('a', 'b', false)", "set_config('a', ..., false)"),
        ("CREATE MATERIALIZED VIEW v AS SELECT set_config('a', 'b', false)", "set_config('a', ..., false)"),
        ("CREATE TEMP TABLE t ON COMMIT DROP AS SELECT set_config('a', 'b', false)", "set_config('a', ..., false)"),
        ("ALTER TABLE t ALTER a TYPE text USING set_config('a', a, false)", "set_config('a', ..., false)"),
        ("DECLARE c CURSOR FOR SELECT set_config('a', 'b', false)", "set_config('a', ..., false)"),
        ('SELECT "pg_advisory_lock"(1)', "pg_advisory_lock()"),
        ("SELECT setseed(0.5)", "setseed()"),
        ("SELECT extensions.dblink_connect('a', 'b')", "dblink_connect()"),
        ("SELECT dblink_connect_u('b')", "dblink_connect_u()"),
        ("SELECT auth.jwt_session_init($1)", "jwt_session_init()"),
        ("SELECT set_limit(0.5)", "set_limit()"),
        ("SELECT extensions.show_limit(), extensions.set_limit($1::real)", "set_limit()"),
        ("SELECT pg_backup_start('a', true)", "pg_backup_start()"),
        (
            "SELECT pg_create_logical_replication_slot('a', 'b', temporary := $1)",
            "pg_create_logical_replication_slot(temporary => true)",
        ),
        (
            "SELECT pg_copy_logical_replication_slot('a', 'b', true, 'c')",
            "pg_copy_logical_replication_slot(temporary => true)",
        ),
        (
            "IMPORT FOREIGN SCHEMA a FROM SERVER b INTO pg_temp OPTIONS (c 'd')",
            "IMPORT FOREIGN SCHEMA ... INTO pg_temp",
        ),
        ("SET LOCAL search_path TO 'pg_temp_3'", "search_path = pg_temp"),
        ("SELECT crosstab('SELECT set_config(''a'', ''b'', false)')", "set_config('a', ..., false)"),
        ("SELECT ts_rewrite('a', (('SELECT set_config(''a'', ''b'', false)'))::text)", "set_config('a', ..., false)"),
        ("SELECT query_to_xml($$SELECT query_to_xml('SELECT setseed(1)', a)$$, b)", "setseed()"),
        ("DO $$ BEGIN EXECUTE 'SET ' || a; END $$", "SET"),
        ("DO $$ BEGIN EXECUTE ('LISTEN ' || a); END $$", "LISTEN"),
        ("DO $$ BEGIN PERFORM CASE WHEN a THEN comment ELSE set END, setseed(1); END $$", "setseed()"),
        (
            (
                "CREATE FUNCTION a() RETURNS int BEGIN ATOMIC SELECT 1 case; END;"
                "CREATE FUNCTION b() RETURNS int BEGIN ATOMIC SELECT 1; END; LISTEN c"
            ),
            "LISTEN",
        ),
        ("SELECT pg_replication_origin_session_setup('a')", "pg_replication_origin_session_setup()"),
        ("/**/SET/**/app.tenant='a'", "SET app.tenant"),
        ("SET a.b.c = 1", "SET a.b.c"),
        ('SET "Session"."b" TO 1', "SET session.b"),
        ("SET SESSION SESSION AUTHORIZATION alex", "SET SESSION AUTHORIZATION"),
        ("SET XML OPTION CONTENT", "SET XML OPTION"),
        ("SET app.tenant FROM CURRENT", "SET app.tenant"),
        ('SET search_path = "default"', "SET search_path"),
        ("UPDATE ONLY (pg_settings) SET setting = 1", "UPDATE pg_settings"),
        ("PREPARE a AS SELECT 1", "PREPARE"),
        ("LOAD 'auto_explain'", "LOAD"),
        ("DECLARE a NO SCROLL CURSOR WITH HOLD FOR SELECT 1", "DECLARE ... WITH HOLD"),
        ("CREATE TEMP TABLE a (b int)", "CREATE TEMP TABLE"),
        ("CREATE TEMP TABLE a (b text DEFAULT 'ON COMMIT DROP')", "CREATE TEMP TABLE"),
        ("CREATE TEMP TABLE a ON COMMIT DELETE ROWS AS SELECT 1 -- ON COMMIT DROP", "CREATE TEMP TABLE"),
        ("CREATE OR REPLACE TEMPORARY VIEW a AS SELECT 1", "CREATE TEMP VIEW"),
        ("CREATE LOCAL TEMP SEQUENCE a", "CREATE TEMP SEQUENCE"),
        ("CREATE TYPE pg_temp.a AS (b int)", "CREATE in pg_temp"),
        ("SELECT 1 INTO TEMP a", "SELECT INTO TEMP"),
        ("WITH a AS (SELECT 1) SELECT * INTO pg_temp_3.b FROM a", "SELECT INTO TEMP"),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN a THEN 1 END; END; LISTEN a", "LISTEN"),
        ("CREATE OR REPLACE PROCEDURE p() BEGIN ATOMIC SELECT 1 AS case, t.case, 2 AS end; END; LISTEN a", "LISTEN"),
        ("CREATE TABLE t (begin atomic); LISTEN a", "LISTEN"),
        ("CREATE TABLE begin atomic; LISTEN a", "LISTEN"),
        ("BEGIN ATOMIC; LISTEN a", "LISTEN"),
    ],
    ids=lambda value: value[:50],
)
def test_a_session_feature_is_found_and_named(query: str, name: str) -> None:
    feature = session_feature(query)
    assert feature is not None
    assert feature.name == name


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        "",
        ";;",
        "SELECT listen FROM t",
        "SELECT 'LISTEN orders; SET search_path = a; pg_advisory_lock('",
        "SELECT 'a''; LISTEN b'",
        "SELECT E'a\\'; LISTEN b'",
        "SELECT E'a'\n'\\'; LISTEN b'",
        "SELECT e'a' -- c\n '\\'; LISTEN b'",
        "SELECT U&'a\\0041'';LISTEN b'",
        "SELECT B'1', X'1F', N'; LISTEN a'",
        "SELECT $$; LISTEN a; $$",
        "SELECT $a$; LISTEN $$ a; $b$ $a$",
        "SELECT a$$ FROM t; SELECT 1 AS a$b, $1",
        "SELECT $é$; SET search_path = a; $é$",
        'SELECT 1 AS "; LISTEN a", "pg_advisory_lock(1)"',
        'SELECT 1 AS "a""; LISTEN a"',
        'SELECT U&"; LISTEN a"',
        "SELECT 1 -- ; LISTEN a",
        "SELECT 1 /* ; LISTEN a; /* */ LISTEN b */",
        "SELECT 1 /* ; LISTEN a",
        "SELECT '; LISTEN a",
        'SELECT "; LISTEN a',
        "SELECT $$; LISTEN a",
        "DO $$ DECLARE load text; prepare text; set int := 1; listen int := 0; BEGIN set := load; END $$",
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path TO a, b', current_database()); END $$",
        "DO $$ BEGIN EXECUTE 'SET LOCAL search_path = ' || a; FOR b IN SELECT c LOOP EXECUTE b; END LOOP; END $$",
        "DO LANGUAGE plpython3u $$ plpy.execute('LISTEN a') $$",
        "DO $$ BEGIN CREATE VIEW a AS SELECT pg_advisory_lock(1); END $$",
        "DO $$ BEGIN DROP FUNCTION pg_advisory_lock(bigint); END $$",
        "DO $$ BEGIN PERFORM CASE WHEN a THEN set ELSE listen END FROM b; END $$",
        "DO $$ BEGIN EXECUTE 'ALTER TABLE ' || a || ' SET SCHEMA b'; EXECUTE a || ' SET b = 1'; END $$",
        "DO $$ BEGIN EXECUTE format('ALTER ROLE %I SET search_path = %L', a, 'b'); EXECUTE a; END $$",
        "DO $$ BEGIN EXECUTE format('COMMENT ON TABLE a IS %L', 'b; LISTEN c'); END $$",
        "DO $$ BEGIN CREATE TRIGGER a AFTER INSERT ON b EXECUTE FUNCTION c('LISTEN d'); END $$",
        "DO",
        "DO LANGUAGE",
        "DO $$ BEGIN EXECUTE",
        "SELECT set_limit($1, $2), app.setseed(1), set_limit()",
        "SELECT query_to_xml(a, true, true, ''), ts_stat($1), query_to_xml('LISTEN a' || b, true, true, '')",
        "SELECT pg_create_logical_replication_slot('a', 'b', twophase => true)",
        "SELECT pg_create_logical_replication_slot('a', 'b', temporary => false)",
        "SELECT pg_copy_physical_replication_slot('a', 'b', 'off'::bool) FROM pg_drop_replication_slot",
        "IMPORT FOREIGN SCHEMA a FROM SERVER b INTO c",
        "SET LOCAL search_path = a, pg_temp",
        "SET LOCAL pg_temp.a = pg_temp",
        "SELECT set_config('search_path', $1, true)",
        "CREATE STATISTICS a ON b, c FROM pg_temp.d",
        "CREATE FUNCTION a() RETURNS int LANGUAGE sql SET search_path = pg_temp AS 'SELECT 1'",
        "CREATE TABLE a PARTITION OF b FOR VALUES IN (lower('A'))",
        "SELECT a[1], ARRAY[1, 2], set_config('a.b', ARRAY['c', 'd']::text, true)",
        "WITH a AS (SELECT 1) INSERT INTO temp SELECT 1",
        "(INSERT INTO temp SELECT 1)",
        "UNLISTEN *",
        "NOTIFY orders",
        "SELECT pg_advisory_xact_lock(1), pg_try_advisory_xact_lock_shared(1)",
        "SELECT pg_advisory_unlock_all()",
        "SELECT pg_advisory_unlock(1)",
        "SELECT pg_advisory_lock FROM t",
        "SELECT app.pg_advisory_lock(1), app.set_config('a', 'b', false)",
        "SELECT 'pg_advisory_lock(bigint)'::regprocedure",
        "INSERT INTO pg_advisory_lock (a) VALUES (1)",
        "WITH pg_advisory_lock (a) AS (SELECT 1) SELECT * FROM pg_advisory_lock",
        "SELECT * FROM t AS pg_advisory_lock (a)",
        "EXPLAIN SELECT pg_advisory_lock(1)",
        "CREATE VIEW a AS SELECT pg_advisory_lock(1)",
        "CREATE TABLE pg_advisory_lock (a int DEFAULT set_config('a', 'b', false))",
        "CREATE FUNCTION f() RETURNS void BEGIN ATOMIC SELECT 1; SELECT pg_advisory_lock(1); END",
        "CREATE RULE a AS ON INSERT TO t DO ALSO (SELECT 1; SELECT pg_advisory_lock(1))",
        "GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO alex",
        "COMMENT ON FUNCTION pg_advisory_lock(bigint) IS 'LISTEN'",
        "SET LOCAL search_path = orders",
        "SET LOCAL ROLE alex",
        "SET LOCAL SESSION AUTHORIZATION alex",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET CONSTRAINTS ALL DEFERRED",
        "SET TimeZone = 'UTC'",
        "SET SESSION timezone TO 'UTC'",
        'SET "TimeZone" = 5',
        "SET TIME ZONE 'UTC'",
        "SET NAMES 'UTF8'",
        "SET datestyle = ISO, DMY",
        "SET application_name TO 'x'",
        "SET search_path TO DEFAULT",
        "RESET search_path",
        "RESET ALL",
        "UPDATE t SET a = 1; UPDATE t\nSET search_path = 2",
        "INSERT INTO t VALUES (1) ON CONFLICT DO UPDATE SET a = 1",
        "ALTER ROLE alex SET search_path = a",
        "ALTER FUNCTION f() SET search_path = a",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET search_path = a AS 'SELECT 1'",
        "SELECT set_config('a.b', $1, true)",
        "SELECT set_config('TimeZone', $1, false)",
        "SELECT set_config('TimeZone'::text, $1, $2)",
        "SELECT set_config('a.b', $1, 'true')",
        "SELECT set_config('a.b', $1, ((true)))",
        "PREPARE TRANSACTION 'a'",
        "DEALLOCATE ALL",
        "DISCARD ALL",
        "EXECUTE a",
        "DECLARE a CURSOR WITHOUT HOLD FOR SELECT with_hold FROM t WHERE hold",
        "SELECT hold, load, prepare FROM t",
        "INSERT INTO temp SELECT 1",
        "INSERT INTO temp (a) VALUES (1)",
        "WITH a AS (INSERT INTO temp SELECT 1) SELECT * FROM temp",
        "SELECT 1 INTO temp FROM t",
        "SELECT 1 INTO temp",
        "MERGE INTO temp USING t ON true WHEN MATCHED THEN DO NOTHING",
        "CREATE TABLE temp (a int)",
        "CREATE TEMP TABLE a (b int) ON COMMIT DROP",
        "CREATE TEMP TABLE a ON COMMIT DROP AS SELECT 1",
        "CREATE INDEX ON pg_temp.a (b)",
        "DROP TABLE pg_temp.a",
        "SELECT * FROM pg_temp.a, pg_settings FOR UPDATE OF pg_settings",
        "UPDATE app.pg_settings SET a = 1",
        "CREATE TABLE a AS SELECT 1 AS set_config",
        "ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES pg_advisory_lock (a)",
        "COPY pg_advisory_lock (a) FROM STDIN",
        "EXPLAIN (ANALYZE false) SELECT pg_advisory_lock(1)",
        "EXPLAIN (SELECT pg_advisory_lock(1))",
        'SELECT "PG_ADVISORY_LOCK"(1), U&"pg_advisory!005flock"(1)',
        "SET LOCAL local.b = 1",
        "SET SESSION TRANSACTION READ ONLY",
        "SET SESSION TIME ZONE 'UTC'",
        "SELECT set_config('a.b', f(1, 2, false), true)",
        "SELECT set_config(",
        "SELECT set_config()",
        "SELECT set_config('a', 'b')",
        "SELECT set_config('a', 'b', ",
        "SET",
        "SET SESSION",
        "SET a",
        "LISTENER",
        "listen_1",
        "SELECT 1; SELECT listen",
        "SELECT 1 AS \u00a0LISTEN",
        "SELECT 1.5e3, 1_000, 0x1F, $1",
    ],
    ids=lambda value: value[:60] or "empty",
)
def test_a_statement_without_a_session_feature_passes(query: str) -> None:
    assert session_feature(query) is None


@pytest.mark.parametrize(
    ("query", "instead"),
    [
        ("LISTEN a", ""),
        ("SET ROLE a", "SET LOCAL ROLE inside a transaction"),
        ("SET a = 1", "SET LOCAL inside a transaction"),
        ("SELECT pg_advisory_lock(1)", "pg_advisory_xact_lock() inside a transaction"),
        ("SELECT pg_try_advisory_lock_shared(1)", "pg_try_advisory_xact_lock_shared() inside a transaction"),
        ("SELECT set_config('a', 'b', false)", "set_config(..., true) inside a transaction"),
        ("CREATE TEMP TABLE a (b int)", "CREATE TEMP TABLE ... ON COMMIT DROP inside a transaction"),
        ("SELECT 1 INTO TEMP a", "CREATE TEMP TABLE ... ON COMMIT DROP inside a transaction"),
        ("CREATE TEMP VIEW a AS SELECT 1", ""),
        ("DECLARE a CURSOR WITH HOLD FOR SELECT 1", "DECLARE ... WITHOUT HOLD inside a transaction"),
        ("PREPARE a AS SELECT 1", ""),
    ],
)
def test_the_advice_names_what_works_inside_a_transaction(query: str, instead: str) -> None:
    feature = session_feature(query)
    assert feature is not None
    assert feature.instead == instead


@pytest.mark.parametrize(
    ("query", "args", "passes"),
    [
        ("SELECT set_config($1, $2, $3)", ("a.b", "c", True), True),
        ("SELECT set_config($1, $2, $3)", ("a.b", "c", False), False),
        ("SELECT set_config($1, $2, $3)", ("a.b", "c", 1), False),
        ("SELECT set_config($1, $2, $3)", ("a.b", "c", "true"), False),
        ("SELECT set_config($1, $2, $3)", ("a.b", "c"), False),
        ("SELECT set_config($1, $2, $3)", (), False),
        ("SELECT set_config($1, $2, $0)", (True, True), False),
        ("SELECT set_config($2, $3, $1::boolean)", (True, "a.b", "c"), True),
        ("SELECT set_config($1, $2, false)", ("TimeZone", "UTC"), True),
        ("SELECT set_config($1::text, $2, false)", ("a.b", "UTC"), False),
        ("SELECT set_config('a.b', $1, NOT $2)", ("c", True), False),
        ("SELECT set_config('a.b', $1, $2), pg_advisory_lock(1)", ("c", True), False),
        ("SELECT set_config('search_path', $1, true)", ("pg_temp, a",), False),
        ("SELECT set_config($1, $2, $3)", ("Search_Path", '"pg_temp_3" , a', True), False),
        ("SELECT set_config($1, $2, $3)", ("search_path", "a, pg_temp", True), True),
        ("SELECT pg_create_physical_replication_slot('a', $1, $2)", (True, False), True),
        ("SELECT pg_create_physical_replication_slot('a', $1, $2)", (False, True), False),
        ("SELECT pg_create_physical_replication_slot('a', $1, $2)", (), False),
        ("SELECT query_to_xml($1, $2, true, '')", ("SELECT 'LISTEN a'", True), True),
        ("SELECT query_to_xml($1, $2, true, '')", ("SELECT set_config('a', 'b', false)", True), False),
        ("SELECT query_to_xml($1, $2, true, '')", (), True),
    ],
)
def test_an_argument_of_the_call_decides_where_the_text_does_not(
    query: str, args: tuple[object, ...], passes: bool
) -> None:
    assert (session_feature(query, args) is None) == passes


@pytest.mark.parametrize("name", sorted(JUDGED))
def test_a_text_with_a_function_that_is_judged_is_scanned(name: str) -> None:
    query = f"SELECT {name}('a', 'b', $2), {name}($1)"
    assert session_feature(query, ("SELECT setseed(1)",)) is not None


SQL = st.text("'\"$;/*-\\ \nEeUu&()=,.a1é")
PIECES = st.lists(
    SQL | st.sampled_from(["LISTEN x", "SET a = 1", " set_config(", "'a',", "false)", "pg_advisory_lock(1)", "SELECT "])
).map("".join)


@given(PIECES)
def test_any_text_is_scanned_without_an_exception(query: str) -> None:
    session_feature(query)


@given(SQL)
def test_the_contents_of_strings_names_and_comments_do_not_count(text: str) -> None:
    hidden = text + "; LISTEN a; SET b = 1; SELECT pg_advisory_lock(1) ;"
    for query in (
        "SELECT '" + hidden.replace("'", "''") + "'",
        "SELECT E'" + hidden.replace("\\", "\\\\").replace("'", "\\'") + "'",
        'SELECT 1 AS "' + hidden.replace('"', '""') + '"',
        "SELECT $tag$" + hidden.replace("$", "") + "$tag$",
        "SELECT 1 /*" + hidden.replace("*", "").replace("/", "") + "*/",
        "SELECT 1 --" + hidden.replace("\n", ""),
    ):
        assert session_feature(query) is None
        assert session_feature(query + "\n; LISTEN a") is not None


@pytest.mark.parametrize(
    "piece",
    [
        "'",
        '"',
        "E'\\",
        "E'a''",
        "$",
        "$a$",
        "$$ ",
        "/*",
        "--",
        "(",
        "set_config(",
        "set_config('a',",
        'U&"a" ',
        "CREATE TABLE a AS ",
        "EXPLAIN ANALYZE ",
        "::bool",
        "a.",
        "; ",
        "''",
        "DO $a$ ",
        "ARRAY[",
        "E'\\x41' ",
        "x",
    ],
)
def test_the_scan_takes_linear_time(piece: str) -> None:
    """10 MB take less than the limit for a hang: only the first 64 kB are scanned."""
    query = "SET LOCAL a = 1; SELECT " + piece * (10_000_000 // len(piece))
    started = time.monotonic()
    session_feature(query)
    assert time.monotonic() - started < HANG


def test_only_the_beginning_of_a_long_text_is_scanned() -> None:
    data = "INSERT INTO t VALUES " + "('LISTEN a'), " * 100_000
    assert session_feature(data) is None
    assert session_feature("SET search_path = a; " + data) is not None
    assert session_feature(data[:65_530] + "; LISTEN a") is None
