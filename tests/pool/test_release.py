"""A released connection is reset: its caller does not wait for that, and the next caller finds a clean session."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.probes import (
    HANG,
    assert_balanced,
    assert_whole,
    connected,
    make_pool,
    nothing_is_left,
    sessions,
    until,
    until_gone,
    until_settled,
)

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

NEVER = 100 * HANG


class HeldReset:
    """A `reset=` that starts at once and ends when `go_on` is set."""

    def __init__(self) -> None:
        self.started = 0
        self.go_on = asyncio.Event()

    async def __call__(self, connection: Any) -> None:
        self.started += 1
        await self.go_on.wait()


@pytest.fixture
async def reset() -> HeldReset:
    return HeldReset()


@pytest.fixture
async def held_pool(postgres: LocalPostgres, reset: HeldReset) -> AsyncIterator[neon_async.Pool]:
    """A pool of one connection whose resets do not end before `reset.go_on` is set."""
    async with make_pool(postgres, max_size=1, reset=reset, release_timeout=NEVER) as pool:
        yield pool
        reset.go_on.set()


# ---------------------------------------------------------------------------------------------------------------------
# The next caller waits for the reset


async def test_leaving_the_block_returns_at_once_and_the_next_caller_waits_for_the_reset(
    held_pool: neon_async.Pool, reset: HeldReset
) -> None:
    async with asyncio.timeout(HANG):
        async with held_pool.acquire() as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
        assert (reset.started, held_pool.stats().resetting, held_pool.stats().idle) == (0, 1, 0)
        following = asyncio.ensure_future(held_pool.fetchval("SELECT pg_backend_pid()"))
        await until(lambda: reset.started)
        await asyncio.sleep(0.01)
        assert held_pool.stats().waiting == 1
        assert not following.done()
        reset.go_on.set()
        assert await following == pid
        await until_settled(held_pool)
        assert held_pool.stats().resets == 2


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError], ids=["error", "cancellation"])
async def test_leaving_the_block_with_an_exception_returns_at_once(
    held_pool: neon_async.Pool, error: type[BaseException]
) -> None:
    async def fail() -> None:
        async with held_pool.acquire() as connection:
            await connection.execute("SELECT 1")
            raise error

    async with asyncio.timeout(HANG):
        with pytest.raises(error):
            await fail()
    assert held_pool.stats().resetting == 1


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda pool: pool.execute("SELECT 1"), id="execute"),
        pytest.param(lambda pool: pool.executemany("SELECT $1::int", [(1,)]), id="executemany"),
        pytest.param(lambda pool: pool.fetch("SELECT 1"), id="fetch"),
        pytest.param(lambda pool: pool.fetchrow("SELECT 1"), id="fetchrow"),
        pytest.param(lambda pool: pool.fetchval("SELECT 1"), id="fetchval"),
        pytest.param(lambda pool: pool.fetchmany("SELECT $1::int", [(1,)]), id="fetchmany"),
        pytest.param(lambda pool: pool.copy_from_query("SELECT 1", output=io.BytesIO()), id="copy_from_query"),
        pytest.param(lambda pool: pool.copy_from_table("items", output=io.BytesIO()), id="copy_from_table"),
        pytest.param(lambda pool: pool.copy_to_table("items", source=io.BytesIO(b"1\n")), id="copy_to_table"),
        pytest.param(lambda pool: pool.copy_records_to_table("items", records=[(1,)]), id="copy_records_to_table"),
    ],
)
async def test_a_query_method_of_the_pool_returns_before_the_reset(
    postgres: LocalPostgres,
    held_pool: neon_async.Pool,
    reset: HeldReset,
    call: Callable[[neon_async.Pool], Awaitable[object]],
) -> None:
    async with connected(postgres) as admin, asyncio.timeout(HANG):
        await admin.execute("CREATE TABLE items (id int)")
        try:
            await call(held_pool)
            assert held_pool.stats().resetting == 1
            reset.go_on.set()
            await until_settled(held_pool)
        finally:
            await admin.execute("DROP TABLE items")


async def test_an_explicit_release_waits_for_the_reset(held_pool: neon_async.Pool, reset: HeldReset) -> None:
    connection = await held_pool.acquire()
    await connection.execute("SELECT 1")
    releasing = asyncio.ensure_future(held_pool.release(connection))
    await until(lambda: reset.started)
    await asyncio.sleep(0.01)
    assert not releasing.done()
    reset.go_on.set()
    async with asyncio.timeout(HANG):
        await releasing
    assert held_pool.stats().idle == 1
    assert_balanced(held_pool)


async def test_a_cancelled_release_continues_in_the_background(held_pool: neon_async.Pool, reset: HeldReset) -> None:
    connection = await held_pool.acquire()
    await connection.execute("SELECT 1")
    releasing = asyncio.ensure_future(held_pool.release(connection))
    await until(lambda: reset.started)
    for _ in range(2):
        releasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await releasing
    assert held_pool.stats().resetting == 1
    reset.go_on.set()
    await until_settled(held_pool)
    assert (held_pool.stats().idle, held_pool.stats().resets) == (1, 1)


@pytest.mark.parametrize("untouched", [True, False], ids=["untouched", "used"])
@pytest.mark.parametrize("explicit", [True, False], ids=["release", "block"])
async def test_a_released_connection_cannot_be_used(
    held_pool: neon_async.Pool, untouched: bool, explicit: bool
) -> None:
    """Its statements, cursors and transactions cannot be used either, even while the reset still runs."""
    releasing = None
    context = held_pool.acquire()
    connection: Any = await context.__aenter__()
    transaction = connection.transaction()
    cursor = connection.cursor("SELECT 1")
    statement = None if untouched else await connection.prepare("SELECT 1")
    if explicit:
        releasing = asyncio.ensure_future(held_pool.release(connection))
        await asyncio.sleep(0)
    else:
        await context.__aexit__(None, None, None)

    async def open_cursor() -> None:
        await cursor

    uses = [lambda: connection.fetchval("SELECT 1"), transaction.start, open_cursor]
    for use in [*uses, statement.fetchval] if statement else uses:
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await use()
    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
        connection.is_closed()
    assert "released" in repr(connection)
    assert held_pool.stats().in_use == 0
    if releasing is not None:
        releasing.cancel()


async def test_a_second_release_of_a_connection_does_nothing(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        async with pool.acquire() as connection:
            await pool.release(connection)
            async with pool.acquire() as other:
                await pool.release(connection)
                assert await other.fetchval("SELECT 1") == 1
                assert pool.stats().in_use == 1
        await until_settled(pool)
        assert pool.stats().acquires == 2


@pytest.mark.parametrize("whose", ["another pool's", "no pool's", "a number"])
async def test_the_release_of_a_connection_that_the_pool_did_not_lend_is_refused(
    postgres: LocalPostgres, whose: str
) -> None:
    async with make_pool(postgres) as pool, make_pool(postgres) as other, connected(postgres) as lone:
        async with other.acquire() as connection:
            foreign: Any = {"another pool's": connection, "no pool's": lone, "a number": 7}[whose]
            with pytest.raises(asyncpg.InterfaceError, match="not a member of this pool"):
                await pool.release(foreign)
            assert await connection.fetchval("SELECT 1") == 1
        assert_balanced(pool)


async def test_an_acquire_and_release_without_a_query_send_nothing(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, make_pool(endpoint, max_size=1) as pool:

        async def bytes_of_one_query() -> int:
            before, resets = endpoint.client_bytes, pool.stats().resets
            await pool.fetchval("SELECT 1")
            await until(lambda: pool.stats().resets > resets)
            return endpoint.client_bytes - before

        await bytes_of_one_query()  # prepares the statement
        of_one_query = await bytes_of_one_query()
        before = endpoint.client_bytes
        for _ in range(3):
            async with pool.acquire():
                pass
            await pool.release(await pool.acquire())
        await bytes_of_one_query()  # bytes arrive in order: all earlier ones have been counted
        assert endpoint.client_bytes - before == of_one_query
        assert pool.stats().resets == 3


# ---------------------------------------------------------------------------------------------------------------------
# The next caller finds a clean session


@pytest.mark.parametrize(
    ("statement", "query", "fresh"),
    [
        pytest.param("SET ROLE pg_monitor", "SELECT current_user::text", "neon", id="SET ROLE"),
        pytest.param(
            "SET SESSION AUTHORIZATION pg_monitor", "SELECT session_user::text", "neon", id="SET SESSION AUTHORIZATION"
        ),
        pytest.param("CREATE TEMP TABLE mine (id int)", "SELECT to_regclass('mine')::text", None, id="temporary table"),
        pytest.param("SET statement_timeout = '77s'", "SHOW statement_timeout", "0", id="SET"),
        pytest.param("SET search_path = pg_catalog", "SHOW search_path", '"$user", public', id="search_path"),
        pytest.param(
            "SELECT set_config('my.tenant', '7', false)", "SELECT current_setting('my.tenant', true)", "", id="own GUC"
        ),
        pytest.param(
            "SELECT pg_advisory_lock(77)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
            0,
            id="advisory lock",
        ),
        pytest.param("LISTEN news", "SELECT count(*) FROM pg_listening_channels()", 0, id="LISTEN"),
        pytest.param(
            "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT",
            "SELECT count(*) FROM pg_cursors WHERE name = 'c'",
            0,
            id="cursor WITH HOLD",
        ),
        pytest.param("BEGIN", "SELECT 1", 1, id="open transaction"),
        pytest.param("BEGIN; SAVEPOINT a; SELECT 1", "SELECT 1", 1, id="savepoint"),
    ],
)
async def test_the_session_state_that_a_caller_leaves_is_reset(
    postgres: LocalPostgres, statement: str, query: str, fresh: object
) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
            await connection.execute(statement)
            if not statement.startswith("BEGIN"):
                assert await connection.fetchval(query) != fresh, "this test would prove nothing"
        async with pool.acquire() as connection:
            assert connection.get_server_pid() == pid
            assert not connection.is_in_transaction()
            assert await connection.fetchval(query) == fresh


async def test_a_failed_transaction_that_was_left_open_is_rolled_back(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.execute("BEGIN; SELECT 1/0")
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid


async def test_the_cached_values_of_a_sequence_are_reset(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        await pool.execute("CREATE SEQUENCE tickets CACHE 10")
        try:
            assert await pool.fetchval("SELECT nextval('tickets')") == 1
            for query in ("SELECT currval('tickets')", "SELECT lastval()"):
                with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
                    await pool.fetchval(query)
            assert await pool.fetchval("SELECT nextval('tickets')") == 11
        finally:
            await pool.execute("DROP SEQUENCE tickets")


async def test_prepared_statements_survive_the_reset(postgres: LocalPostgres) -> None:
    query = "SELECT name, prepare_time FROM pg_prepared_statements WHERE statement LIKE 'SELECT name, prepare_time%'"
    async with make_pool(postgres, max_size=1) as pool:
        first = await pool.fetch(query)
        assert len(first) == 1
        for _ in range(3):
            assert await pool.fetch(query) == first
        assert pool.stats().size == 1


async def test_a_reset_function_replaces_the_default_reset_except_for_an_open_transaction(
    postgres: LocalPostgres,
) -> None:
    called = []

    async def reset(connection: Any) -> None:
        called.append((type(connection).__mro__.count(asyncpg.Connection), connection.is_in_transaction()))

    async with make_pool(postgres, max_size=1, reset=reset) as pool:
        async with pool.acquire() as connection:
            await connection.execute("SET my.tenant = '7'; BEGIN")
        assert await pool.fetchval("SELECT current_setting('my.tenant', true)") == ""
        async with pool.acquire() as connection:
            await connection.execute("SET my.tenant = '8'")
        assert await pool.fetchval("SELECT current_setting('my.tenant', true)") == "8"
        await until_settled(pool)
    assert called == [(1, False)] * 4


class WithResetQuery(asyncpg.Connection):
    def get_reset_query(self) -> str:
        return "SET my.tenant = 'none'"


async def test_the_reset_query_of_the_connection_class_is_used(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, connection_class=WithResetQuery) as pool:
        await pool.execute("SET my.tenant = '7'; SET my.other = '7'")
        query = "SELECT current_setting('my.tenant') || ' ' || current_setting('my.other')"
        assert await pool.fetchval(query) == "none 7"


async def test_a_caller_that_leaves_a_listener_is_warned_and_the_listener_is_removed(postgres: LocalPostgres) -> None:
    received: list[object] = []
    async with make_pool(postgres, max_size=1) as pool:
        connection = await pool.acquire()
        await connection.add_listener("news", lambda *args: received.append(args))
        with pytest.warns(asyncpg.InterfaceWarning, match="listener"):
            await pool.release(connection)
        await pool.execute("NOTIFY news")
        assert await pool.fetchval("SELECT 1") == 1
        await until_settled(pool)
    assert received == []


async def test_a_warning_that_is_raised_as_an_error_loses_no_slot(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        with pytest.raises(asyncpg.InterfaceWarning):
            async with pool.acquire() as connection:
                await connection.add_listener("news", lambda *_: None)
        await assert_whole(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Connections that are released in a bad state


async def test_a_connection_stays_open_after_a_cancelled_query(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await pool.execute("SELECT pg_sleep(3600)", timeout=0.05)
            assert await pool.fetchval("SELECT pg_backend_pid()") == pid
        await until_settled(pool)
        assert (pool.stats().dials, pool.stats().terminations) == (1, 0)


async def test_a_connection_that_ends_while_in_use_leaves_a_vacant_slot(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2) as pool, connected(postgres) as admin:
        async with pool.acquire() as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await admin.execute("SELECT pg_terminate_backend($1)", pid)
            await until(lambda: pool.stats().vacant == 2)
            assert_balanced(pool)
        assert_balanced(pool)
        assert pool.stats().in_use == 0
        await assert_whole(pool)


@pytest.mark.parametrize("how", ["close", "terminate"])
async def test_a_connection_that_its_caller_closes_leaves_a_vacant_slot(postgres: LocalPostgres, how: str) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            if how == "close":
                await connection.close()
            else:
                connection.terminate()
        assert pool.stats().vacant == 1
        await assert_whole(pool)


async def test_the_slot_of_a_connection_that_has_ended_serves_the_next_waiter(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().waiting)
        connection.terminate()  # it is never released
        assert await waiting == 1


async def broken(connection: Any) -> None:
    raise RuntimeError("the reset is broken")


async def test_a_failing_reset_terminates_the_connection_and_an_explicit_release_raises(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    name = f"broken reset {id(caplog)}"
    async with (
        make_pool(postgres, max_size=1, reset=broken, application_name=name) as pool,
        connected(postgres) as admin,
    ):
        connection = await pool.acquire()
        await connection.execute("SELECT 1")
        with pytest.raises(RuntimeError, match="the reset is broken"):
            await pool.release(connection)
        assert pool.stats().vacant == 1
        await until_gone(admin, name)

        assert await pool.fetchval("SELECT 1") == 1  # no caller waits for this reset
        await until_settled(pool)
        assert (pool.stats().vacant, pool.stats().terminations, pool.stats().resets) == (1, 2, 0)
        await until_gone(admin, name)
    assert sum("could not be reset" in record.message for record in caplog.records) == 2
    assert "the reset is broken" not in caplog.text  # the caller's message may contain secrets


async def test_a_reset_that_hangs_is_stopped_at_release_timeout(postgres: LocalPostgres) -> None:
    async def reset(connection: Any) -> None:
        await asyncio.Event().wait()

    pool = make_pool(postgres, max_size=1, reset=reset, release_timeout=0.05)
    async with nothing_is_left(), pool, asyncio.timeout(HANG):
        for number in range(1, 4):
            assert await pool.fetchval("SELECT 1") == 1
            await until_settled(pool)
            assert (pool.stats().vacant, pool.stats().terminations) == (1, number)


async def test_a_connection_is_replaced_after_max_queries(postgres: LocalPostgres) -> None:
    name = f"max_queries {id(object())}"
    pool = make_pool(postgres, max_size=1, max_queries=10, application_name=name)
    async with connected(postgres) as admin, pool, asyncio.timeout(HANG):
        pids = {await pool.fetchval("SELECT pg_backend_pid()") for _ in range(40)}
        assert 4 <= len(pids) <= 20
        await until_settled(pool)
        while await sessions(admin, name) > pool.get_size():
            await asyncio.sleep(0.001)


async def test_a_connection_that_expired_while_in_use_is_replaced(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2) as pool:
        for explicit in (True, False):
            connection = await pool.acquire()
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await pool.expire_connections()
            if explicit:
                await pool.release(connection)
            else:
                async with pool.acquire() as other:
                    assert other.get_server_pid() != pid
                await pool.release(connection)
            assert await pool.fetchval("SELECT pg_backend_pid()") != pid
            await until_settled(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Late calls do not affect the next caller


async def test_a_call_that_has_not_started_before_the_release_does_not_run(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        await pool.fetchval("SELECT 1")
        async with pool.acquire() as connection:
            late = asyncio.ensure_future(connection.execute("SELECT set_config('app.tenant', 'alice', false)"))
        async with pool.acquire() as connection:
            with pytest.raises(asyncpg.InterfaceError, match=r"Connection.execute\(\): connection has been released"):
                await late
            assert await connection.fetchval("SELECT current_setting('app.tenant', true)") is None


async def test_a_setup_whose_connection_has_ended_does_not_affect_the_next_caller(postgres: LocalPostgres) -> None:
    pids: list[int] = []

    async def setup(connection: Any) -> None:
        pids.append(await connection.fetchval("SELECT pg_backend_pid()"))
        if len(pids) == 1:
            await asyncio.Event().wait()  # waits for something other than the database

    async with (
        connected(postgres) as admin,
        make_pool(postgres, max_size=1, setup=setup) as pool,
        asyncio.timeout(HANG),
    ):
        first = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pids)
        await admin.execute("SELECT pg_terminate_backend($1)", pids[0])
        async with pool.acquire() as connection:
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert await connection.fetchval("SELECT 1") == 1


async def test_a_reset_whose_connection_has_ended_does_not_affect_the_next_loan(postgres: LocalPostgres) -> None:
    resets: list[int] = []
    go_on = asyncio.Event()

    async def reset(connection: Any) -> None:
        resets.append(connection.get_server_pid())
        if len(resets) == 1:
            await go_on.wait()  # waits for something other than the database

    async with (
        connected(postgres) as admin,
        make_pool(postgres, max_size=1, reset=reset) as pool,
        asyncio.timeout(HANG),
    ):
        await pool.fetchval("SELECT 1")
        await until(lambda: resets)
        await admin.execute("SELECT pg_terminate_backend($1)", resets[0])
        async with pool.acquire() as connection, connection.transaction():
            go_on.set()
            await asyncio.sleep(0.05)  # enough time for the late reset to do damage
            assert await connection.fetchval("SELECT 1") == 1
            assert pool.stats().in_use == 1
        await until_settled(pool)
        assert len(resets) == 2


async def test_a_reset_function_runs_even_if_nothing_was_sent(postgres: LocalPostgres) -> None:
    resets: list[object] = []

    async def reset(connection: Any) -> None:
        resets.append(connection)

    async with make_pool(postgres, max_size=1, reset=reset) as pool:
        for number in (1, 2):
            await pool.release(await pool.acquire())
            assert len(resets) == number


if sys.version_info >= (3, 12):

    async def test_an_eager_task_factory_changes_nothing(postgres: LocalPostgres) -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, asyncio.BaseEventLoop):
            return  # uvloop creates its own tasks without the factory
        loop.set_task_factory(asyncio.eager_task_factory)
        try:
            async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
                async with pool.acquire() as connection:
                    await connection.execute("BEGIN; SET LOCAL ROLE pg_monitor; SET app.tenant = 'alice'")
                async with pool.acquire() as connection:
                    assert not connection.is_in_transaction()
                    assert await connection.fetchval("SELECT current_user") == "neon"
                    assert not await connection.fetchval("SELECT current_setting('app.tenant', true)")
                await until(lambda: pool.stats().resets == 2)
        finally:
            loop.set_task_factory(None)
