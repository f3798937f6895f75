"""A finished loan reaches no session any more: not what was created in it, and not a call of it that had begun."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, assert_whole, connected, make_pool, until

import neon_async
from neon_async._driver import holder
from neon_async._driver.session import NO_CALLBACKS
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

RELEASED = r"(been )?released back\s+to\s+the pool"


class Own(asyncpg.Connection):
    """A caller's class, with methods of its own."""

    async def count(self) -> int:
        return int(await self.fetchval("SELECT 1"))

    async def wait(self, begun: asyncio.Event, go_on: asyncio.Event) -> int:
        begun.set()
        await go_on.wait()
        return int(await self.fetchval("SELECT 1"))

    async def numbers(self) -> AsyncIterator[int]:
        for number in range(3):
            yield number + int(await self.fetchval("SELECT 0"))

    # What a method that is no coroutine function returns.

    def one(self) -> Any:
        return self.fetchval("SELECT 1")

    def numbers_later(self) -> AsyncIterator[int]:
        return self.numbers()

    def running(self) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self.fetchval("SELECT 1"))

    def itself(self) -> Any:
        return self

    async def itself_later(self) -> Any:
        return self

    @contextlib.asynccontextmanager
    async def block(self) -> AsyncIterator[Any]:
        async with self.transaction():
            yield self

    @property
    def answer(self) -> Any:
        return self.fetchval("SELECT 1")

    partial = functools.partialmethod(asyncpg.Connection.fetchval, "SELECT 1")


@pytest.fixture
async def pool(postgres: LocalPostgres) -> AsyncIterator[neon_async.Pool]:
    """A pool of one connection. asyncpg reports transactions that are left open."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: None)
    try:
        async with make_pool(postgres, max_size=1, connection_class=Own) as pool, asyncio.timeout(HANG):
            yield pool
    finally:
        loop.set_exception_handler(None)


# ---------------------------------------------------------------------------------------------------------------------
# Created during the loan, awaited after it

Create = Callable[[Any], Awaitable[Awaitable[Any]]]


def of_statement(call: Callable[[Any], Awaitable[Any]]) -> Create:
    async def create(connection: Any) -> Any:
        return call(await connection.prepare("SELECT $1::int"))

    return create


def of_transaction(call: Callable[[Any], Awaitable[Any]], *, started: bool) -> Create:
    async def create(connection: Any) -> Any:
        transaction = connection.transaction()
        if started:
            await transaction.start()
            await connection.execute("SELECT 1")
        return call(transaction)

    return create


def of_cursor(call: Callable[[Any], Awaitable[Any]]) -> Create:
    async def create(connection: Any) -> Any:
        await connection.transaction().start()
        return call(await connection.cursor("SELECT generate_series(1, 9)"))

    return create


async def iterated(connection: Any) -> Any:
    await connection.transaction().start()
    rows = aiter(connection.cursor("SELECT generate_series(1, 9)", prefetch=1))
    await anext(rows)
    return anext(rows)


async def opened_later(connection: Any) -> Any:
    await connection.transaction().start()
    factory = connection.cursor("SELECT 1")

    async def later() -> Any:
        return await factory

    return later()


async def logged(connection: Any) -> Any:
    block = connection.query_logger(print)

    async def later() -> None:
        with block:
            pass

    return later()


def at_once(call: Callable[[Any], Awaitable[Any]]) -> Create:
    async def create(connection: Any) -> Any:
        return call(connection)

    return create


async def entered(connection: Any) -> Any:
    transaction = connection.transaction().connection

    async def later() -> Any:
        return await transaction.fetchval("SELECT 1")

    return later()


async def of_itself(connection: Any) -> Any:
    return use(connection.itself())


async def of_itself_later(connection: Any) -> Any:
    return use(await connection.itself_later())


async def of_block(connection: Any) -> Any:
    async with connection.block() as entered:
        pass
    return use(entered)


async def bound(connection: Any) -> Any:
    method = connection.one

    async def later() -> Any:
        return await method()

    return later()


async def use(connection: Any) -> Any:
    return await connection.fetchval("SELECT 1")


CREATED = {
    "statement.explain": of_statement(lambda one: one.explain(1)),
    "statement.fetch": of_statement(lambda one: one.fetch(1)),
    "statement.fetchval": of_statement(lambda one: one.fetchval(1)),
    "statement.fetchrow": of_statement(lambda one: one.fetchrow(1)),
    "statement.fetchmany": of_statement(lambda one: one.fetchmany([(1,)])),
    "statement.executemany": of_statement(lambda one: one.executemany([(1,)])),
    "transaction.start": of_transaction(lambda one: one.start(), started=False),
    "transaction.__aenter__": of_transaction(lambda one: one.__aenter__(), started=False),
    "transaction.commit": of_transaction(lambda one: one.commit(), started=True),
    "transaction.rollback": of_transaction(lambda one: one.rollback(), started=True),
    "transaction.__aexit__": of_transaction(lambda one: one.__aexit__(None, None, None), started=True),
    "transaction.connection": entered,
    "await cursor": opened_later,
    "for row in cursor": iterated,
    "cursor.fetch": of_cursor(lambda one: one.fetch(1)),
    "cursor.fetchrow": of_cursor(lambda one: one.fetchrow()),
    "cursor.forward": of_cursor(lambda one: one.forward(1)),
    "connection.fetchval": at_once(lambda connection: connection.fetchval("SELECT 1")),
    "connection.reset": at_once(lambda connection: connection.reset()),
    "connection.copy_from_query": at_once(lambda one: one.copy_from_query("SELECT 1", output=io.BytesIO())),
    "connection.query_logger": logged,
    "a method of the caller's class": at_once(lambda connection: connection.count()),
    "a generator of the caller's class": at_once(lambda connection: anext(connection.numbers())),
    "a coroutine that a method returns": at_once(lambda connection: connection.one()),
    "a generator that a method returns": at_once(lambda connection: anext(connection.numbers_later())),
    "a task that a method returns": at_once(lambda connection: connection.running()),
    "a context manager that a method returns": at_once(lambda connection: connection.block().__aenter__()),
    "what a context manager yields": of_block,
    "the connection that a method returns": of_itself,
    "the connection that a coroutine returns": of_itself_later,
    "a property of the caller's class": at_once(lambda connection: connection.answer),
    "a partial method": at_once(lambda connection: connection.partial()),
    "a bound method": bound,
}


@pytest.mark.parametrize("create", CREATED.values(), ids=CREATED)
async def test_what_is_awaited_after_the_loan_sends_nothing_to_the_next_session(
    pool: neon_async.Pool, create: Create
) -> None:
    async with pool.acquire() as connection:
        late = await create(connection)
    async with pool.acquire() as following:
        await following.execute("SELECT set_config('app.tenant', 'the next', false)")
        async with following.transaction():
            assert await following.fetchval("SELECT 1") == 1
            session: Any = following._con  # type: ignore[attr-defined]
            writes = holder.transport_of(session).writes
            with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
                await late
            assert holder.transport_of(session).writes == writes
            assert following.is_in_transaction()
            assert holder.callbacks_of(session) == NO_CALLBACKS
        assert await following.fetchval("SELECT current_setting('app.tenant')") == "the next"
    await assert_whole(pool)


async def test_the_methods_of_a_cursor_refuse_when_they_are_called_as_with_asyncpg(
    pool: neon_async.Pool,
) -> None:
    async with pool.acquire() as connection, connection.transaction():
        cursor: Any = await connection.cursor("SELECT generate_series(1, 9)")
    for method in (cursor.fetch, cursor.fetchrow, cursor.forward):
        with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
            method()
    await assert_whole(pool)


async def test_a_connection_that_has_ended_unnoticed_is_of_no_use_after_its_release(pool: neon_async.Pool) -> None:
    connection: Any = await pool.acquire()
    ended = asyncio.Event()
    connection.add_termination_listener(lambda _: ended.set())
    connection._con._protocol.abort()
    await pool.release(connection)
    with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
        await connection.fetchval("SELECT 1")
    await ended.wait()
    assert await pool.fetchval("SELECT 1") == 1


async def test_methods_of_the_callers_class_work_during_the_loan(pool: neon_async.Pool) -> None:
    async with pool.acquire() as lent:
        connection: Any = lent
        assert await connection.count() == 1
        assert [number async for number in connection.numbers()] == [0, 1, 2]
        assert connection.count.__name__ == "count"
        assert inspect.iscoroutinefunction(connection.count)
        assert await connection.one() == 1
        assert [number async for number in connection.numbers_later()] == [0, 1, 2]
        assert await connection.running() == 1
        assert connection.itself() is await connection.itself_later() is connection
        async with connection.block() as entered:
            assert entered is connection
            assert connection.is_in_transaction()
        assert not connection.is_in_transaction()
        assert await connection.answer == 1
        assert await connection.partial() == 1
    await assert_whole(pool)


async def test_a_block_of_the_callers_class_that_outlives_the_loan_is_left_with_an_error(pool: neon_async.Pool) -> None:
    lent: Any = await pool.acquire()
    block = lent.block()
    await block.__aenter__()
    await pool.release(lent)
    async with pool.acquire() as following:
        session: Any = following._con  # type: ignore[attr-defined]
        writes = holder.transport_of(session).writes
        with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
            await block.__aexit__(None, None, None)
        assert holder.transport_of(session).writes == writes
    await assert_whole(pool)


async def test_a_query_logger_is_called_in_its_block_only_and_the_block_may_outlive_the_loan(
    pool: neon_async.Pool,
) -> None:
    seen: list[str] = []

    def note(record: Any) -> None:
        seen.append(record.query)

    async with pool.acquire() as connection:
        with connection.query_logger(note):
            await connection.fetchval("SELECT 1")
        await connection.fetchval("SELECT 2")
    connection = await pool.acquire()
    with connection.query_logger(note):
        await connection.fetchval("SELECT 3")
        await pool.release(connection)
        await pool.fetchval("SELECT 4")
    assert seen == ["SELECT 1", "SELECT 3"]


async def test_a_termination_listener_of_a_loan_is_not_called_after_it_and_that_of_init_is(
    postgres: LocalPostgres,
) -> None:
    heard: list[str] = []

    def hear_for_init(_: object) -> None:
        heard.append("init")

    async def init(connection: Any) -> None:
        connection.add_termination_listener(hear_for_init)

    async with make_pool(postgres, max_size=1, init=init) as pool:
        async with pool.acquire() as connection:
            connection.add_termination_listener(lambda _: heard.append("an earlier loan"))
            connection.remove_termination_listener(hear_for_init)
        async with pool.acquire() as connection:
            connection.terminate()
        await until(lambda: heard)
    assert heard == ["init"]


# ---------------------------------------------------------------------------------------------------------------------
# Begun during the loan


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
async def test_a_call_that_had_just_begun_does_not_reach_the_next_session(
    postgres: LocalPostgres, pool: neon_async.Pool, method: str, steps: int
) -> None:
    async with connected(postgres) as admin:
        await admin.execute("DROP TABLE IF EXISTS begun; CREATE TABLE begun (a int)")
        async with pool.acquire() as connection:
            insert = getattr(connection, method)("INSERT INTO begun VALUES ($1) RETURNING a", [(1,)])
            begun = asyncio.ensure_future(insert)
            for _ in range(steps):
                await asyncio.sleep(0)
        async with pool.acquire() as following, following.transaction():
            await asyncio.wait([begun])
            assert await following.fetchval("SELECT count(*) FROM begun") == 0
        assert isinstance(begun.exception(), (asyncpg.InterfaceError, asyncpg.ConnectionDoesNotExistError))
        assert await admin.fetchval("SELECT count(*) FROM begun") == 0
    await assert_whole(pool)


@contextlib.asynccontextmanager
async def waiting(pool: neon_async.Pool) -> AsyncIterator[tuple[Any, asyncio.Task[int], asyncio.Event]]:
    """A loan with a call that is under way and has sent nothing; it goes on when the event is set."""
    connection: Any = await pool.acquire()
    begun, go_on = asyncio.Event(), asyncio.Event()
    call = asyncio.ensure_future(connection.wait(begun, go_on))
    await begun.wait()
    try:
        yield connection, call, go_on
    finally:
        go_on.set()
        await asyncio.wait([call])
        assert call.exception() is not None


@pytest.mark.parametrize("query", ["SELECT 1", None], ids=["something was sent", "nothing was sent"])
async def test_the_next_loan_begins_when_the_calls_of_the_last_one_have_ended(
    pool: neon_async.Pool, query: str | None
) -> None:
    await pool.fetchval("SELECT 1")
    async with waiting(pool) as (connection, call, go_on):
        if query is not None:
            await connection.execute(query)
        releasing = asyncio.ensure_future(pool.release(connection))
        following = asyncio.ensure_future(pool.fetchval("SELECT 2"))
        await asyncio.sleep(0.01)
        assert not releasing.done()
        assert not following.done()
        go_on.set()
        await releasing
        assert await following == 2
        with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
            await call
    assert pool.stats().dials == 1
    await assert_whole(pool)


async def test_a_call_that_does_not_end_costs_the_connection_at_release_timeout(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, connection_class=Own, release_timeout=0.05) as pool:
        async with waiting(pool) as (connection, _, _):
            with pytest.raises(neon_async.PoolTimeoutError, match="not reset within"):
                await pool.release(connection)
            assert await pool.fetchval("SELECT 2") == 2
        await assert_whole(pool)


async def test_a_cancelled_release_goes_on_waiting_for_the_calls_in_the_background(pool: neon_async.Pool) -> None:
    async with waiting(pool) as (connection, _, go_on):
        releasing = asyncio.ensure_future(pool.release(connection))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        releasing.cancel()
        await asyncio.wait([releasing])
        assert releasing.cancelled()
        assert pool.stats().resetting == 1
        go_on.set()
        assert await pool.fetchval("SELECT 2") == 2
    assert pool.stats().dials == 1
    await assert_whole(pool)


@pytest.mark.parametrize("end", ["the server", "the pool"])
async def test_a_connection_that_ends_meanwhile_ends_the_wait(
    postgres: LocalPostgres, pool: neon_async.Pool, end: str
) -> None:
    async with waiting(pool) as (connection, _, _):
        backend = connection.get_server_pid()
        releasing = asyncio.ensure_future(pool.release(connection))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if end == "the pool":
            pool.terminate()
        else:
            async with connected(postgres) as admin:
                await admin.execute("SELECT pg_terminate_backend($1)", backend)
        began = asyncio.get_running_loop().time()
        await asyncio.wait([releasing])
        releasing.exception()
        assert asyncio.get_running_loop().time() - began < 4, "release_timeout is 5 s"
    if end == "the server":
        await assert_whole(pool)


async def test_a_statement_that_still_runs_at_the_release_costs_the_connection(pool: neon_async.Pool) -> None:
    connection: Any = await pool.acquire()
    running = asyncio.ensure_future(connection.fetchval("SELECT pg_sleep(60)"))
    await asyncio.sleep(0.01)
    with pytest.raises(asyncpg.InterfaceError, match="another operation was in progress"):
        await pool.release(connection)
    await asyncio.wait([running])
    assert running.exception() is not None
    assert await pool.fetchval("SELECT 2") == 2
    assert pool.stats().dials == 2
    await assert_whole(pool)


@pytest.mark.parametrize("query", ["SELECT pg_sleep(60)", "SELECT pg_sleep($1::int)"])
async def test_a_call_whose_coroutine_is_closed_costs_its_connection_and_disturbs_no_other_caller(
    pool: neon_async.Pool, query: str
) -> None:
    unawaited: list[BaseException] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    # asyncpg's future of the statement fails, and nothing awaits it: asyncio says so when it is collected.
    loop.set_exception_handler(lambda _, context: unawaited.append(context["exception"]))
    await pool.fetchval("SELECT pg_sleep($1::int)", 0)
    call = pool.execute(query, *([60] if "$1" in query else []))
    call.send(None)  # it waits for the server
    call.close()
    async with asyncio.timeout(HANG):
        assert await pool.fetchval("SELECT 2") == 2
    assert pool.stats().dials == 2
    await assert_whole(pool)
    del call
    gc.collect()
    loop.set_exception_handler(handler)
    assert {type(error) for error in unawaited} <= {asyncpg.ConnectionDoesNotExistError}
