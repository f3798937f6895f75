"""What a connection needs at the end of its loan, as a table and as rules; and what a caller can leave behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.probes import (
    HANG,
    connected,
    make_pool,
    password_of,
    until,
)

from neon_async._driver import holder
from neon_async._pool.loan import Facts, Need, need_of
from neon_async.testing import LocalPostgres

NAME = "ep-cool-darkness-123456"

# ---------------------------------------------------------------------------------------------------------------------
# What a connection needs


def facts(**known: bool) -> Facts:
    """Return the facts of a connection that was used, with our own reset, except for what is `known`."""
    used = Facts(
        closed=False,
        worn=False,
        own_reset=False,
        untouched=False,
        leftovers=False,
        has_reset_query=True,
        ahead=True,
    )
    return used._replace(**known)


@pytest.mark.parametrize(
    ("known", "need"),
    [
        pytest.param(facts(), Need.RESET_AHEAD, id="used"),
        pytest.param(facts(ahead=False), Need.RESET, id="used, with a reset query of the class's own"),
        pytest.param(facts(untouched=True, has_reset_query=False), Need.NOTHING, id="untouched"),
        pytest.param(facts(untouched=True), Need.NOTHING, id="untouched, with a reset query"),
        pytest.param(facts(has_reset_query=False), Need.NOTHING, id="used, without a reset query"),
        pytest.param(facts(leftovers=True), Need.RESET, id="leftovers"),
        pytest.param(facts(leftovers=True, has_reset_query=False), Need.RESET, id="leftovers, without a reset query"),
        pytest.param(facts(own_reset=True), Need.RESET, id="own reset"),
        pytest.param(facts(own_reset=True, has_reset_query=False), Need.RESET, id="own reset, without a reset query"),
        pytest.param(facts(own_reset=True, untouched=True), Need.RESET, id="own reset, untouched"),
        pytest.param(facts(worn=True), Need.CLOSE, id="worn"),
        pytest.param(facts(worn=True, untouched=True), Need.CLOSE, id="worn, untouched"),
        pytest.param(facts(worn=True, leftovers=True, own_reset=True), Need.CLOSE, id="worn, with everything to reset"),
        pytest.param(facts(closed=True), Need.FORGET, id="closed"),
        pytest.param(facts(closed=True, worn=True, own_reset=True, leftovers=True), Need.FORGET, id="closed and worn"),
    ],
)
def test_what_a_connection_needs_follows_from_the_facts(known: Facts, need: Need) -> None:
    assert need_of(known) is need


@given(st.builds(Facts, *[st.booleans()] * len(Facts._fields)))
def test_the_rules_hold_for_any_facts(known: Facts) -> None:
    need = need_of(known)
    # An ended connection is forgotten whatever else is true, and only an ended one.
    assert (need is Need.FORGET) == known.closed
    # A worn one is closed, whatever else there is to do, and only a worn one.
    assert (need is Need.CLOSE) == (known.worn and not known.closed)
    if need in (Need.NOTHING, Need.RESET_AHEAD, Need.RESET):
        # The caller's own reset runs always; what was left behind is always ended. Neither can be done ahead.
        assert need is Need.RESET or not (known.own_reset or known.leftovers)
        # There is nothing to do where nothing was sent, or where there is nothing to send.
        assert need is Need.NOTHING or known.own_reset or known.leftovers or not known.untouched
        assert need is Need.NOTHING or known.own_reset or known.leftovers or known.has_reset_query
        # A reset goes ahead where it may; only then is the connection free before the server has answered.
        assert need is not Need.RESET_AHEAD or known.ahead
        assert need is not Need.RESET or known.own_reset or known.leftovers or not known.ahead


@given(st.builds(Facts, *[st.booleans()] * len(Facts._fields)))
def test_nothing_to_do_stays_nothing_if_less_has_happened(known: Facts) -> None:
    if need_of(known) is Need.NOTHING:
        assert need_of(known._replace(untouched=True)) is Need.NOTHING
        assert need_of(known._replace(has_reset_query=False)) is Need.NOTHING


# ---------------------------------------------------------------------------------------------------------------------
# What a caller can leave behind


class NoReset(asyncpg.Connection):
    """A connection without SQL to reset it, as on a pooled host."""

    def get_reset_query(self) -> str:
        return ""


class BrokenResetQuery(asyncpg.Connection):
    """A connection whose reset query cannot be had."""

    def get_reset_query(self) -> str:
        raise LookupError("the caller's own mistake")


class OwnResetQuery(asyncpg.Connection):
    """A connection whose reset query is the caller's own."""

    def get_reset_query(self) -> str:
        return "RESET ALL"


class Subclass(asyncpg.Connection):
    """A class of the caller's without a reset of its own."""


class OwnReset(asyncpg.Connection):
    """A connection whose reset is the caller's own code."""

    async def reset(self, **options: object) -> None:
        pass


async def own_reset(connection: object) -> None:
    """Reset nothing."""


Leave: TypeAlias = Callable[[Any], Awaitable[object]]


async def nothing(connection: Any) -> None:
    pass


async def a_log_listener(connection: Any) -> None:
    connection.add_log_listener(lambda *_: None)


async def a_log_listener_that_is_removed(connection: Any) -> None:
    connection.add_log_listener(listener := lambda *_: None)
    connection.remove_log_listener(listener)


async def a_listener(connection: Any) -> None:
    await connection.add_listener("news", lambda *_: None)


async def a_listener_that_is_removed(connection: Any) -> None:
    await connection.add_listener("news", listener := lambda *_: None)
    await connection.remove_listener("news", listener)


async def a_query_logger(connection: Any) -> None:
    connection.add_query_logger(print)


async def a_type_codec(connection: Any) -> None:
    await connection.execute("DROP TYPE IF EXISTS loan_mood; CREATE TYPE loan_mood AS ENUM ('good')")
    await connection.set_type_codec("loan_mood", encoder=str, decoder=str)


async def a_type_codec_of_which_the_server_does_not_know(connection: Any) -> None:
    writes = holder.transport_of(connection._con).writes
    await connection.set_type_codec("int8", schema="pg_catalog", encoder=str, decoder=str)
    assert holder.transport_of(connection._con).writes == writes


async def a_type_codec_that_is_reset(connection: Any) -> None:
    await a_type_codec(connection)
    await connection.reset_type_codec("loan_mood")


async def a_transaction_that_has_ended(connection: Any) -> None:
    async with connection.transaction():
        await connection.execute("SELECT 1")


async def a_failed_query(connection: Any) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")


async def a_query_that_is_under_way(connection: Any) -> None:
    asyncio.ensure_future(connection.execute("SELECT pg_sleep(600)")).add_done_callback(lambda task: task.exception())
    await asyncio.sleep(0.01)


async def a_query(connection: Any) -> None:
    await connection.execute("SELECT 1")


async def an_open_transaction(connection: Any) -> None:
    await connection.execute("BEGIN")


async def a_started_transaction(connection: Any) -> None:
    await connection.transaction().start()


async def a_transaction_that_asyncpg_believes_open(connection: Any) -> None:
    await connection.transaction().start()
    await connection.execute("ROLLBACK")
    assert not connection.is_in_transaction()


async def a_query_that_is_being_cancelled(connection: Any) -> None:
    # The server says when the query runs: an earlier cancel request has no effect.
    runs = asyncio.Event()
    connection.add_log_listener(listener := lambda *_: runs.set())
    query = asyncio.ensure_future(connection.execute("DO 'BEGIN RAISE NOTICE ''runs''; PERFORM pg_sleep(600); END'"))
    await runs.wait()
    connection.remove_log_listener(listener)
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query


async def a_closed_connection(connection: Any) -> None:
    connection._con._transport.abort()
    await until(connection._con.is_closed)


def left(leave: Leave, need: Need, **options: Any) -> Any:
    names = [f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()]
    return pytest.param(leave, options, need, id=", ".join([leave.__name__.replace("_", " "), *names]))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("leave", "options", "need"),
    [
        left(nothing, Need.NOTHING),
        left(nothing, Need.RESET, reset=own_reset),
        left(nothing, Need.RESET, connection_class=OwnReset),
        left(nothing, Need.NOTHING, max_queries=1),
        left(a_log_listener, Need.NOTHING),
        left(a_log_listener, Need.NOTHING, connection_class=NoReset),
        left(a_log_listener_that_is_removed, Need.NOTHING),
        left(a_query_logger, Need.NOTHING),
        left(a_query, Need.RESET_AHEAD),
        left(a_query, Need.RESET_AHEAD, connection_class=Subclass),
        left(a_query, Need.CLOSE, max_queries=1),
        left(a_query, Need.NOTHING, connection_class=NoReset),
        left(a_query, Need.RESET, connection_class=OwnResetQuery),
        left(a_query, Need.RESET, connection_class=BrokenResetQuery),
        left(a_query, Need.RESET, connection_class=OwnReset),
        left(a_query, Need.RESET, reset=own_reset),
        left(a_query, Need.RESET, connection_class=NoReset, reset=own_reset),
        left(a_query, Need.CLOSE, connection_class=NoReset, max_queries=1),
        left(a_failed_query, Need.RESET_AHEAD),
        left(a_query_that_is_under_way, Need.RESET),
        left(a_query_that_is_being_cancelled, Need.RESET),
        left(a_query_that_is_being_cancelled, Need.RESET, connection_class=NoReset),
        left(a_transaction_that_has_ended, Need.RESET_AHEAD),
        left(an_open_transaction, Need.RESET),
        left(an_open_transaction, Need.RESET, connection_class=NoReset),
        left(a_started_transaction, Need.RESET),
        left(a_started_transaction, Need.RESET, connection_class=NoReset),
        left(a_transaction_that_asyncpg_believes_open, Need.RESET),
        left(a_transaction_that_asyncpg_believes_open, Need.RESET, connection_class=NoReset),
        left(a_listener, Need.RESET),
        left(a_listener, Need.RESET, connection_class=NoReset),
        left(a_listener_that_is_removed, Need.RESET_AHEAD),
        left(a_type_codec, Need.RESET),
        left(a_type_codec, Need.RESET, connection_class=NoReset),
        left(a_type_codec_of_which_the_server_does_not_know, Need.RESET),
        left(a_type_codec_that_is_reset, Need.RESET_AHEAD),
    ],
)
async def test_a_connection_needs_what_its_caller_left_to_do(
    postgres: LocalPostgres, leave: Leave, options: dict[str, Any], need: Need
) -> None:
    async with make_pool(postgres, max_size=1, **options) as pool, asyncio.timeout(HANG):
        connection: Any = await pool.acquire()
        [slot] = pool._supply.slots
        assert slot.loan is not None
        await leave(connection)
        assert need_of(slot.loan._facts(time.monotonic())) is need
        pool.terminate()


@pytest.mark.anyio
async def test_a_connection_that_a_call_of_the_pool_uses_is_not_idle(postgres: LocalPostgres) -> None:
    async with make_pool(postgres) as pool:
        await pool.fetchval("SELECT 1")
        assert pool.get_idle_size() == 1
        call = asyncio.ensure_future(pool.execute("SELECT pg_sleep(600)"))
        await until(lambda: pool.stats().in_use == 1)
        assert (pool.get_size(), pool.get_idle_size()) == (1, 0)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: pool.get_idle_size() == 1)


@pytest.mark.anyio
@pytest.mark.parametrize("query", ["DO 'BEGIN RAISE NOTICE ''heard''; END'", "NOTIFY news"])
async def test_a_callback_of_init_gets_what_is_of_no_use_after_the_call_of_the_pool(
    postgres: LocalPostgres, query: str
) -> None:
    kept: list[Any] = []

    async def init(connection: Any) -> None:
        connection.add_log_listener(lambda connection, *_: kept.append(connection))
        await connection.add_listener("news", lambda connection, *_: kept.append(connection))

    async with make_pool(postgres, max_size=1, init=init) as pool:
        await pool.execute(query)
        [connection] = kept
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            connection.get_server_pid()


@pytest.mark.anyio
async def test_a_connection_is_untouched_again_in_the_next_loan(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, connection_class=NoReset) as pool:
        [slot] = pool._supply.slots
        for used in (True, False):
            connection = await pool.acquire()
            if used:
                await connection.execute("SELECT 1")
            assert slot.loan is not None
            assert slot.loan._facts(time.monotonic()).untouched is not used
            await pool.release(connection)


# ---------------------------------------------------------------------------------------------------------------------
# Connections that are not released


@pytest.mark.anyio
async def test_a_connection_that_is_not_released_is_reported_with_the_stack_that_acquired_it(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    async def forgetful() -> Any:
        return await pool.acquire()

    async with make_pool(postgres, leak_after=0.05) as pool:
        async with pool.acquire():
            pass  # released in time
        connection = await forgetful()
        await until(lambda: caplog.records)
        await asyncio.sleep(0.1)
        await pool.release(connection)
    [record] = [record for record in caplog.records if record.name == "neon_async"]
    assert record.levelno == logging.WARNING
    for part in (NAME, "0.05 s", "forgetful", "return await pool.acquire()", __file__):
        assert part in record.getMessage()
    assert password_of(postgres) not in record.getMessage()


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["release", "terminate", "the server", "the pool"])
async def test_a_loan_that_has_ended_is_not_reported(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    async with connected(postgres) as admin, make_pool(postgres, leak_after=0.05) as pool:
        connection: Any = await pool.acquire()
        if end == "release":
            await pool.release(connection)
        elif end == "terminate":
            connection.terminate()
        elif end == "the server":
            await admin.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
            await until(lambda: pool.stats().in_use == 0)
        else:
            pool.terminate()
        await asyncio.sleep(0.1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
