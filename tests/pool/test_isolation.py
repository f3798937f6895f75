"""Nothing that a borrower leaves in a session reaches the next one, and everything that `init` set up does.

Each pool has one connection, and all examples of one pool run on it, one after the other: what is left by one example
and found by the next is a failure, too.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import io
import json
import warnings
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import asyncpg
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.pgbouncer import LocalPgBouncer
from support.probes import HANG, connected, make_pool

import neon_async
from neon_async.testing import LocalPostgres

Action: TypeAlias = "str | Callable[[Any], Awaitable[Any]]"

ROLE, LOGIN = "isolation_role", "isolation_login"

# ---------------------------------------------------------------------------------------------------------------------
# What a session has


SEEN = """
SELECT json_build_object(
    'user', current_user,
    'session user', session_user,
    'role', current_setting('role'),
    'settings', (SELECT json_object_agg(name, setting ORDER BY name) FROM pg_settings WHERE source = 'session'),
    'values', (SELECT json_object_agg(name, setting ORDER BY name) FROM pg_settings WHERE name IN (
        'DateStyle', 'TimeZone', 'application_name', 'client_encoding', 'lock_timeout', 'search_path',
        'standard_conforming_strings', 'statement_timeout', 'transaction_isolation', 'transaction_read_only')),
    'app.tenant', nullif(current_setting('app.tenant', true), ''),
    'app.other', nullif(current_setting('app.other', true), ''),
    'temporary', (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),
    'locks', (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    'channels', (SELECT array_agg(c ORDER BY c) FROM pg_listening_channels() AS c),
    'prepared', (SELECT count(*) FROM pg_prepared_statements WHERE from_sql),
    'cursors', (SELECT count(*) FROM pg_cursors WHERE name IN ('held', 'open'))
)::text"""
CODECS = "SELECT '{\"a\": 1}'::json, point(1, 2), 7::numeric"


async def look(connection: Any) -> dict[str, Any]:
    """Return everything that a borrower can see of the session, beginning with what only the first statement sees."""
    in_transaction = connection.is_in_transaction()
    seen: dict[str, Any] = json.loads(await connection.fetchval(SEEN))
    try:
        seen["sequence"] = await connection.fetchval("SELECT lastval()")
    except asyncpg.ObjectNotInPrerequisiteStateError:
        seen["sequence"] = "never used"
    inside = connection._con
    known = connection.get_settings()
    return seen | {
        "in transaction": in_transaction,
        "codecs": [repr(value) for value in await connection.fetchrow(CODECS)],
        "listeners": {channel: len(callbacks) for channel, callbacks in inside._listeners.items()},
        "log listeners": len(inside._log_listeners),
        "query loggers": len(inside._query_loggers),
        "termination listeners": len(inside._termination_listeners),
        "known settings": {name: getattr(known, name) for name in ("TimeZone", "DateStyle", "application_name")},
        "encoding": codecs.lookup(known.client_encoding.strip("'")).name,
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a borrower does to it


def hear(*_: object) -> None:
    """A callback of a borrower."""


def hear_for_init(*_: object) -> None:
    """A callback that `init` has registered."""


async def open_transaction(connection: Any) -> None:
    await connection.transaction().start()
    await connection.execute("SET LOCAL app.tenant = 'in a transaction'")


async def open_nested_transaction(connection: Any) -> None:
    await open_transaction(connection)
    await connection.transaction().start()


async def leave_with_claims(connection: Any) -> None:
    async with connection.transaction(role=ROLE, settings={"app.tenant": "a claim", "statement_timeout": "1min"}):
        await connection.execute("SELECT 1")


async def fail_with_claims(connection: Any) -> None:
    async with connection.transaction(role="no such role", settings={"app.tenant": "a claim"}):
        await connection.execute("SET app.other = 'not run'")


async def prepare(connection: Any) -> None:
    await connection.prepare("SELECT 'prepared, and never executed'")


async def time_out(connection: Any) -> None:
    with contextlib.suppress(asyncpg.PostgresError):
        await connection.execute("SELECT 1")  # which waits until another one has ended; else asyncpg terminates
    with contextlib.suppress(TimeoutError):
        await connection.execute("SET app.tenant = 'timed out'; SELECT pg_sleep(60)", timeout=0.002)


async def open_cursor(connection: Any) -> None:
    await connection.transaction().start()
    await connection.cursor("SELECT generate_series(1, 100)")


async def set_json(connection: Any) -> None:
    await connection.set_type_codec("json", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)


async def set_numeric(connection: Any) -> None:
    await connection.set_type_codec("numeric", schema="pg_catalog", encoder=str, decoder=int, format="text")


async def reset_point(connection: Any) -> None:
    await connection.reset_type_codec("point", schema="pg_catalog")


ACTIONS: dict[str, Action] = {
    "nothing": "SELECT 1",
    "SET ROLE": "SET ROLE pg_monitor",
    "SET ROLE NONE": "SET ROLE NONE",
    "RESET ROLE": "RESET ROLE",
    "SET SESSION AUTHORIZATION": "SET SESSION AUTHORIZATION pg_monitor",
    "RESET SESSION AUTHORIZATION": "RESET SESSION AUTHORIZATION",
    "temporary table": "CREATE TEMP TABLE IF NOT EXISTS mine (id int)",
    "temporary function": "CREATE OR REPLACE FUNCTION pg_temp.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "statement_timeout": "SET statement_timeout = '77s'",
    "short lock_timeout": "SET lock_timeout = 1",
    "search_path": "SET search_path = public",
    "search_path without the catalog in front": "SET search_path = public, pg_catalog",
    "time zone": "SET TIME ZONE 'Asia/Tokyo'",
    "DateStyle": "SET datestyle = 'German'",
    "application_name": "SET application_name = 'borrower'",
    "client_encoding": "SET client_encoding = 'LATIN1'",
    "standard_conforming_strings": "SET standard_conforming_strings = off",
    "read only": "SET default_transaction_read_only = on",
    "serializable, read only, deferrable": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE"
    ),
    "own setting": "SELECT set_config('app.tenant', 'of a borrower', false)",
    "another own setting": "SET app.other = 'of a borrower'",
    "own setting reset": "RESET app.tenant",
    "RESET ALL": "RESET ALL",
    "advisory lock": "SELECT pg_advisory_lock(77)",
    "shared advisory lock": "SELECT pg_advisory_lock_shared(78), pg_advisory_lock_shared(78)",
    "LISTEN": "LISTEN news",
    "UNLISTEN": "UNLISTEN *",
    "cursor WITH HOLD": "BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; COMMIT",
    "cursor in a transaction": "BEGIN; DECLARE open CURSOR FOR SELECT 1",
    "open cursor of asyncpg": open_cursor,
    "sequence": "SELECT nextval('isolation_sequence')",
    "open transaction": "BEGIN",
    "open transaction, serializable and read only": "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY",
    "open transaction of asyncpg": open_transaction,
    "open nested transaction of asyncpg": open_nested_transaction,
    "savepoint": "BEGIN; SAVEPOINT a; SELECT 1",
    "failed transaction": "BEGIN; SELECT 1/0",
    "error": "SELECT 1/0",
    "COMMIT": "COMMIT",
    "ROLLBACK": "ROLLBACK; SET app.other = 'after a rollback'",
    "SET LOCAL in a transaction": "BEGIN; SET LOCAL ROLE pg_monitor; SET LOCAL app.tenant = 'local'",
    "transaction with claims": leave_with_claims,
    "transaction with a claim that is refused": fail_with_claims,
    "prepare": prepare,
    "PREPARE": "PREPARE mine AS SELECT 1",
    "DISCARD ALL": "DISCARD ALL",
    "DEALLOCATE ALL": "DEALLOCATE ALL",
    "timeout": time_out,
    "codec of json": set_json,
    "codec of numeric": set_numeric,
    "codec of init reset": reset_point,
    "listener": lambda connection: connection.add_listener("news", hear),
    "second listener": lambda connection: connection.add_listener("init", hear),
    "listener of init removed": lambda connection: connection.remove_listener("init", hear_for_init),
    "log listener": lambda connection: made(connection.add_log_listener, hear),
    "log listener of init removed": lambda connection: made(connection.remove_log_listener, hear_for_init),
    "query logger": lambda connection: made(connection.add_query_logger, hear),
    "query logger of init removed": lambda connection: made(connection.remove_query_logger, hear_for_init),
    "termination listener": lambda connection: made(connection.add_termination_listener, hear),
    "termination listener of init removed": lambda connection: made(
        connection.remove_termination_listener, hear_for_init
    ),
    "COPY": lambda connection: connection.copy_from_query("SELECT 1", output=io.BytesIO()),
}


async def made(call: Callable[..., object], *arguments: object) -> None:
    call(*arguments)


async def act(connection: Any, action: Action) -> None:
    """Do it. An open or a failed transaction, or a role without the right, refuses some of it."""
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, neon_async.ConfigurationError):
        if isinstance(action, str):
            await connection.execute(action)
        else:
            await action(connection)


# ---------------------------------------------------------------------------------------------------------------------
# Pools of one connection


async def set_up(connection: Any) -> None:
    """An `init` that sets up everything that a session can have."""
    await connection.execute(f"SET SESSION AUTHORIZATION {LOGIN}; SET ROLE {ROLE}")
    await connection.execute(
        "SET search_path = \"$user\", 'it''s, a \"schema\"', public; SET statement_timeout = '99s'"
    )
    await connection.execute("SET work_mem = '5MB'; SET DateStyle = 'SQL, DMY'; SET TIME ZONE 'Europe/Berlin'")
    await connection.execute("SELECT set_config('app.tenant', $1, false)", "of init: 'it''s' \\ \"quoted\"")
    await connection.set_type_codec(
        "point", schema="pg_catalog", encoder=str, decoder=lambda text: f"point {text}", format="text"
    )
    await connection.add_listener("init", hear_for_init)
    connection.add_log_listener(hear_for_init)
    connection.add_query_logger(hear_for_init)
    connection.add_termination_listener(hear_for_init)


@dataclass
class Bench:
    """A pool in an event loop of its own, and what the first borrower of its connection has seen.

    Attributes:
        runner: The event loop.
        pool: The pool.
        fresh: What every borrower has to see.
        may_differ: What need not be the same.
    """

    runner: asyncio.Runner
    pool: neon_async.Pool
    fresh: dict[str, Any]
    may_differ: frozenset[str]

    def check(self, names: list[str]) -> None:
        """Let a borrower do all of this, and see that the next one finds what the first one found."""
        self.runner.run(self._check(names))

    async def _check(self, names: list[str]) -> None:
        async with asyncio.timeout(HANG):
            async with self.pool.acquire() as connection:
                backend = connection.get_server_pid()
                for name in names:
                    await act(connection, ACTIONS[name])
            async with self.pool.acquire() as connection:
                seen = await look(connection)
                assert connection.get_server_pid() == backend, "the connection was not reset, but replaced"
        names_to_compare = seen.keys() - self.may_differ
        different = {
            name: (seen[name], self.fresh[name]) for name in names_to_compare if seen[name] != self.fresh[name]
        }
        assert not different, f"seen, and to be seen: {different}"


async def lay_out(server: LocalPostgres) -> None:
    async with connected(server) as admin:
        for name in (ROLE, LOGIN):
            if not await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", name):
                await admin.execute(f"CREATE ROLE {name}")
        await admin.execute(
            f"GRANT {ROLE} TO {LOGIN}; GRANT pg_monitor TO {LOGIN}; CREATE SEQUENCE IF NOT EXISTS isolation_sequence;"
            "GRANT ALL ON SEQUENCE isolation_sequence TO PUBLIC"
        )


async def open_pool(pool: neon_async.Pool) -> dict[str, Any]:
    """Open it, and return what its first borrower sees."""
    # asyncpg reports transactions that were left open.
    asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
    await pool
    async with pool.acquire() as connection:
        return await look(connection)


@pytest.fixture(scope="module", params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


@contextlib.contextmanager
def opened(runner: asyncio.Runner, pool: neon_async.Pool, *, may_differ: str = "") -> Iterator[Bench]:
    bench = Bench(runner, pool, runner.run(open_pool(pool)), frozenset(filter(None, [may_differ])))
    try:
        yield bench
    finally:
        runner.run(pool.close())


@pytest.fixture(scope="module", params=[None, set_up], ids=["without init", "with init"])
def bench(request: pytest.FixtureRequest, postgres: LocalPostgres, runner: asyncio.Runner) -> Iterator[Bench]:
    """A pool whose `init` sets up nothing, or everything."""
    runner.run(lay_out(postgres))
    with opened(runner, make_pool(postgres, max_size=1, init=request.param)) as bench:
        yield bench


@pytest.fixture(autouse=True)
def no_warnings_of_listeners() -> Iterator[None]:
    """asyncpg warns of listeners that a borrower leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", asyncpg.InterfaceWarning)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The tests


def test_the_first_borrower_sees_what_init_has_set_up(bench: Bench) -> None:
    """Otherwise the others would prove nothing."""
    seen = bench.fresh
    has_init = seen["role"] != "none"
    assert seen["in transaction"] is False
    assert (seen["user"], seen["session user"]) == ((ROLE, LOGIN) if has_init else ("neon", "neon"))
    assert seen["app.tenant"] == ("of init: 'it''s' \\ \"quoted\"" if has_init else None)
    assert seen["listeners"] == ({"init": 1} if has_init else {})
    assert seen["codecs"][1] == ("'point (1,2)'" if has_init else "asyncpg.pgproto.types.Point((1.0, 2.0))")
    assert bool(seen["settings"]) == has_init


@pytest.mark.parametrize("name", ACTIONS)
def test_the_next_borrower_finds_nothing_of_it(bench: Bench, name: str) -> None:
    bench.check([name])


@pytest.mark.parametrize(
    ("runner", "bench"),
    [
        pytest.param(asyncio.new_event_loop, None, id="without init, asyncio"),
        pytest.param(uvloop.new_event_loop, set_up, id="with init, uvloop"),
    ],
    indirect=True,
)
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=6))
def test_the_next_borrower_finds_nothing_of_any_sequence(bench: Bench, names: list[str]) -> None:
    bench.check(names)


# ---------------------------------------------------------------------------------------------------------------------
# What `init` sets up by itself


async def by_codec(connection: Any) -> None:
    """The most usual `init` of all. It sends nothing, because asyncpg knows the type."""
    await set_json(connection)


async def by_query_logger(connection: Any) -> None:
    connection.add_query_logger(hear_for_init)


async def by_listener(connection: Any) -> None:
    await connection.add_listener("init", hear_for_init)


async def by_role(connection: Any) -> None:
    await connection.execute(f"SET ROLE {ROLE}")


async def by_own_setting(connection: Any) -> None:
    await connection.execute("SET app.tenant TO 'of init'")


async def by_own_setting_in_an_argument(connection: Any) -> None:
    await connection.fetchval("SELECT set_config($1, $2, false)", "app.tenant", "of init")


async def by_setting(connection: Any) -> None:
    await connection.execute("SET default_transaction_isolation = 'repeatable read'; SET TIME ZONE 'Asia/Tokyo'")


INITS = [by_codec, by_query_logger, by_listener, by_role, by_own_setting, by_own_setting_in_an_argument, by_setting]
ALL_OF_IT = ["codec of json", "another own setting", "RESET ALL", "RESET ROLE", "UNLISTEN", "query logger", "listener"]


@pytest.mark.parametrize("init", INITS, ids=[init.__name__.replace("_", " ") for init in INITS])
def test_what_init_set_up_is_there_for_every_borrower(
    runner: asyncio.Runner, postgres: LocalPostgres, init: Callable[[Any], Awaitable[None]]
) -> None:
    runner.run(lay_out(postgres))
    with opened(runner, make_pool(postgres, max_size=1)) as plain:
        pass
    with opened(runner, make_pool(postgres, max_size=1, init=init)) as bench:
        assert bench.fresh != plain.fresh, "this test would prove nothing"
        bench.check(["nothing"])
        bench.check(ALL_OF_IT)


def test_a_listener_of_init_hears_everything_once_while_its_connection_is_reset(
    runner: asyncio.Runner, postgres: LocalPostgres
) -> None:
    heard: list[int] = []

    async def listen(connection: Any) -> None:
        await connection.add_listener("init", lambda _, __, ___, payload: heard.append(int(payload)))

    async def notify() -> None:
        async with connected(postgres) as other:
            for number in range(300):
                await other.execute("SELECT pg_notify('init', $1)", str(number))

    async def borrow() -> None:
        async with make_pool(postgres, max_size=1, init=listen) as pool, asyncio.timeout(HANG):
            await pool.fetchval("SELECT 1")
            notifying = asyncio.ensure_future(notify())
            while not notifying.done() or len(heard) < 300:
                assert await pool.fetchval("SELECT 1") == 1
            await notifying
            assert pool.stats().dials == 1

    runner.run(borrow())
    assert heard == list(range(300))


# ---------------------------------------------------------------------------------------------------------------------
# Behind a transaction pooler


# What a session of PostgreSQL keeps and PgBouncer does not clean in transaction mode. neon-async does not refuse these.
NOT_CLEANED = {"temporary table", "temporary function", "cursor WITH HOLD", "sequence"}
POOLED_ACTIONS = sorted(set(ACTIONS) - NOT_CLEANED)


async def set_up_pooled(connection: Any) -> None:
    """An `init` that sets up everything that a connection to a pooled host can keep."""
    await connection.execute("SET DateStyle = 'SQL, DMY'; SET TIME ZONE 'Europe/Berlin'; SET application_name = 'init'")
    await set_json(connection)
    connection.add_query_logger(hear_for_init)
    connection.add_log_listener(hear_for_init)
    connection.add_termination_listener(hear_for_init)


@pytest.fixture(scope="module", params=[None, set_up_pooled], ids=["without init", "with init"])
def pooled(
    request: pytest.FixtureRequest, postgres: LocalPostgres, pgbouncer: LocalPgBouncer, runner: asyncio.Runner
) -> Iterator[Bench]:
    runner.run(lay_out(postgres))
    pool = neon_async.create_pool(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, max_size=1, init=request.param)
    with opened(runner, pool, may_differ="settings") as bench:  # PgBouncer sets some to what they are
        yield bench


@pytest.mark.parametrize("name", POOLED_ACTIONS)
def test_on_a_pooled_host_the_next_borrower_finds_nothing_of_it(pooled: Bench, name: str) -> None:
    pooled.check([name])


@pytest.mark.parametrize(
    ("runner", "pooled"),
    [
        pytest.param(asyncio.new_event_loop, set_up_pooled, id="with init, asyncio"),
        pytest.param(uvloop.new_event_loop, None, id="without init, uvloop"),
    ],
    indirect=True,
)
@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from(POOLED_ACTIONS), min_size=1, max_size=6))
def test_on_a_pooled_host_the_next_borrower_finds_nothing_of_any_sequence(pooled: Bench, names: list[str]) -> None:
    pooled.check(names)
