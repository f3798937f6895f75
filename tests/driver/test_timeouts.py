"""A call whose time is over says which limit applied, and calls that move many rows may take as long as rows move."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from support.private_names import pins
from support.probes import HANG, make_pool, until
from support.transactions import Bench

import neon_async
from neon_async._driver.connector import prepare
from neon_async._driver.losses import timed_out
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

SLOW = "SELECT pg_sleep(60)"
SLOW_WITH = "SELECT pg_sleep($1)"


async def of_statement(connection: Any, method: str, *args: Any, **deadline: Any) -> None:
    statement = await connection.prepare(SLOW_WITH)
    await getattr(statement, method)(*args, **deadline)


async def of_cursor(connection: Any, **deadline: Any) -> None:
    async with connection.transaction():
        async for _ in connection.cursor(SLOW, **deadline):
            pass


async def of_open_cursor(connection: Any, **deadline: Any) -> None:
    async with connection.transaction():
        cursor = await connection.cursor(SLOW)
        await cursor.fetch(1, **deadline)


async def ignore(_: bytes) -> None:
    pass


# Statements of one result, which `timeout` and `command_timeout` bound alike.
STATEMENTS: dict[str, Callable[..., Any]] = {
    "execute": lambda it, **deadline: it.execute(SLOW, **deadline),
    "execute with arguments": lambda it, **deadline: it.execute(SLOW_WITH, 60, **deadline),
    "fetch": lambda it, **deadline: it.fetch(SLOW, **deadline),
    "fetchval": lambda it, **deadline: it.fetchval(SLOW, **deadline),
    "fetchrow": lambda it, **deadline: it.fetchrow(SLOW, **deadline),
    "statement": lambda it, **deadline: of_statement(it, "fetch", 60, **deadline),
    "cursor": of_cursor,
    "open cursor": of_open_cursor,
}
MANY: dict[str, Callable[..., Any]] = {
    "executemany": lambda it, **deadline: it.executemany(SLOW_WITH, [(60,)], **deadline),
    "fetchmany": lambda it, **deadline: it.fetchmany(SLOW_WITH, [(60,)], **deadline),
    "executemany of a statement": lambda it, **deadline: of_statement(it, "executemany", [(60,)], **deadline),
    "fetchmany of a statement": lambda it, **deadline: of_statement(it, "fetchmany", [(60,)], **deadline),
    "copy_from_query": lambda it, **deadline: it.copy_from_query(SLOW, output=ignore, **deadline),
    "copy_to_table": lambda it, **deadline: it.copy_to_table("slow", source=chunks(1, 0), **deadline),
    "copy_records_to_table": lambda it, **deadline: it.copy_records_to_table("slow", records=[(1,)], **deadline),
}


async def chunks(number: int, pause: float) -> AsyncIterator[bytes]:
    for value in range(number):
        await asyncio.sleep(pause)
        yield f"{value}\n".encode()


async def create_slow_table(connection: Any) -> None:
    """Create a table into which a COPY takes very long."""
    await connection.execute("""
        CREATE TEMP TABLE slow (value int);
        CREATE FUNCTION pg_temp.sleep() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_sleep(60); RETURN NEW; END';
        CREATE TRIGGER slow BEFORE INSERT ON slow FOR EACH ROW EXECUTE FUNCTION pg_temp.sleep()""")


class TestTheLimit:
    @pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in (STATEMENTS | MANY).items()])
    async def test_a_timeout_is_named_with_its_seconds(self, bench: Bench, call: Any) -> None:
        async with asyncio.timeout(HANG), bench.acquire() as connection:
            await create_slow_table(connection)
            with pytest.raises(neon_async.QueryTimeoutError) as caught:
                await call(connection, timeout=0.15)
            assert isinstance(caught.value, TimeoutError)
            assert "its limit is timeout=0.15 s" in str(caught.value)
            assert "given up after 0." in str(caught.value)
            assert "Pass a larger timeout= to the call" in str(caught.value)
            assert isinstance(caught.value.__cause__, TimeoutError)

    @pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in STATEMENTS.items()])
    async def test_command_timeout_is_named_where_the_call_has_no_timeout(self, bench: Bench, call: Any) -> None:
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.15) as connection:
            with pytest.raises(neon_async.QueryTimeoutError, match=r"its limit is command_timeout=0\.15 s") as caught:
                await call(connection)
            assert "raise command_timeout (None for no limit)" in str(caught.value)

    @pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in MANY.items()])
    async def test_a_call_of_many_rows_that_makes_no_progress_says_so(self, bench: Bench, call: Any) -> None:
        async with asyncio.timeout(HANG), bench.acquire() as setup:
            await create_slow_table(setup)
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.3) as connection:
            await create_slow_table(connection)
            with pytest.raises(neon_async.QueryTimeoutError, match=r"nothing has moved for command_timeout=0\.3 s"):
                await call(connection)

    async def test_a_statement_of_a_pool_says_how_much_of_its_time_the_acquire_took(self, bench: Bench) -> None:
        async with make_pool(bench.endpoint, max_size=1) as pool:
            with pytest.raises(neon_async.QueryTimeoutError, match=r"Of the timeout=0\.5 s .* the acquire took 0\."):
                await pool.fetchval(SLOW, timeout=0.5)

    @pytest.mark.parametrize("seconds", [0, -1])
    async def test_a_call_without_any_time_is_not_sent(self, bench: Bench, seconds: float) -> None:
        async with bench.acquire() as connection:
            for name, call in STATEMENTS.items():
                with pytest.raises(TimeoutError):
                    await call(connection, timeout=seconds)
                assert connection.is_closed() is False, name

    async def test_a_statement_behind_a_cancelled_one_ends_in_its_time_as_well(self, bench: Bench) -> None:
        async with asyncio.timeout(HANG), bench.acquire() as connection:
            bench.endpoint.freeze()
            for _ in range(2):
                with pytest.raises(neon_async.QueryTimeoutError, match=r"timeout=0\.2 s"):
                    await connection.fetchval("SELECT 1", timeout=0.2)
            with pytest.raises(neon_async.ConnectionLostError, match="a cancelled statement did not end in time"):
                await connection.fetchval("SELECT 1", timeout=0.2)

    @pytest.mark.parametrize("end", ["cut", "terminate"])
    async def test_a_statement_behind_a_cancelled_one_ends_with_its_connection(self, bench: Bench, end: str) -> None:
        """Without a limit as well. asyncpg 0.31 itself would wait on for the end of the cancelled one."""
        async with asyncio.timeout(HANG), bench.acquire() as connection:
            bench.endpoint.freeze()
            with pytest.raises(neon_async.QueryTimeoutError):
                await connection.fetchval("SELECT 1", timeout=0.05)
            behind = asyncio.ensure_future(connection.fetchval("SELECT 1"))
            await asyncio.sleep(0)
            if end == "cut":
                bench.endpoint.cut()
            else:
                connection.terminate()
            with pytest.raises((neon_async.ConnectionLostError, asyncpg.InterfaceError)):
                await behind

    async def test_the_reset_behind_a_cancelled_statement_ends_with_its_connection(self, bench: Bench) -> None:
        async with (
            asyncio.timeout(HANG),
            make_pool(bench.endpoint, max_size=1, release_timeout=10 * HANG, command_timeout=10 * HANG) as pool,
        ):
            async with pool.acquire() as connection:
                bench.endpoint.freeze()
                with pytest.raises(neon_async.QueryTimeoutError):
                    await connection.fetchval("SELECT 1", timeout=0.05)
            await until(lambda: pool.stats().resetting)
            await asyncio.sleep(0)
            bench.endpoint.thaw()
            bench.endpoint.cut()
            assert await pool.fetchval("SELECT 1") == 1

    async def test_a_transaction_that_begins_and_times_out_says_so(self, bench: Bench) -> None:
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.15) as connection:
            bench.endpoint.freeze()
            transaction = connection.transaction()
            await transaction.start()
            with pytest.raises(neon_async.QueryTimeoutError, match="command_timeout"):
                await transaction.rollback()

    @pins("_executemany")
    async def test_what_is_left_for_a_step_is_not_taken_for_the_limit(self, bench: Bench) -> None:
        """asyncpg gives each step what the steps before have left."""
        calls: list[tuple[Callable[[Any], Any], str]] = [
            (lambda it: it.fetch(SLOW), "command_timeout=0.5 s"),
            (lambda it: it.fetch(SLOW, timeout=0.4), "timeout=0.4 s"),
            (lambda it: it.executemany(SLOW_WITH, [(60,)], timeout=0.4), "timeout=0.4 s"),
        ]
        bench.endpoint.delay = 0.05
        for call, limit in calls:
            async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.5) as connection:
                with pytest.raises(neon_async.QueryTimeoutError, match=f"its limit is {limit}"):
                    await call(connection)


class TestWhatIsNoLimit:
    async def test_a_timeout_of_the_callers_own_code_is_raised_as_it_is(self, bench: Bench) -> None:
        async def fail(_: bytes) -> None:
            raise TimeoutError("of an HTTP client")

        for deadline in ({}, {"timeout": HANG}):
            async with bench.acquire() as connection:
                with pytest.raises(TimeoutError, match="of an HTTP client") as caught:
                    await connection.copy_from_query("SELECT 1", output=fail, **deadline)
                assert type(caught.value) is TimeoutError

    async def test_a_deadline_of_the_callers_own_is_raised_as_it_is(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.1):
                    await connection.execute(SLOW)
            assert type(caught.value) is TimeoutError

    def test_an_error_that_came_before_the_limit_is_left_alone(self) -> None:
        error = TimeoutError()
        assert timed_out("a host", error, 1.0, None, None) is error
        assert timed_out("a host", error, 1.0, None, 2.0) is error
        assert timed_out("a host", error, 1.0, 2.0, None) is error
        assert timed_out("a host", error, 2.0, 2.0, None) is not error


class TestCommandTimeout:
    @pytest.mark.parametrize(
        ("given", "expected"), [({}, 60.0), ({"command_timeout": None}, None), ({"command_timeout": 5}, 5.0)], ids=str
    )
    def test_it_is_a_minute_unless_code_says_otherwise(
        self, postgres: LocalPostgres, given: Any, expected: float | None
    ) -> None:
        connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor, **given)
        assert connector.parameters.command_timeout == expected

    async def test_none_is_no_limit(self, bench: Bench) -> None:
        async with bench.acquire(command_timeout=None) as connection:
            assert connection._config.command_timeout is None
            await connection.executemany("SELECT $1::int", [(1,)])
            await connection.copy_from_query("SELECT 1", output=ignore)

    async def test_the_source_of_a_copy_may_take_longer(self, bench: Bench) -> None:
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.2) as connection:
            await connection.copy_to_table(bench.name, source=chunks(2, 0.5))
            assert await bench.kept() == [0, 1]

    async def test_records_and_the_sink_of_a_copy_may_take_longer(self, bench: Bench) -> None:
        async def records() -> AsyncIterator[tuple[int]]:
            await asyncio.sleep(0.5)
            yield (7,)

        async def write(_: bytes) -> None:
            await asyncio.sleep(0.5)

        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.2) as connection:
            await connection.copy_records_to_table(bench.name, records=records())
            await connection.copy_from_table(bench.name, output=write)
            assert await bench.kept() == [7]

    async def test_a_copy_may_take_longer_while_rows_move(self, bench: Bench) -> None:
        query = "SELECT repeat('x', 10000), pg_sleep(0.1) FROM generate_series(1, 10)"
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.5) as connection:
            assert await connection.copy_from_query(query, output=ignore) == "COPY 10"

    @pytest.mark.parametrize("method", ["executemany", "fetchmany"])
    async def test_a_batch_may_take_longer_while_its_statements_do_not(self, bench: Bench, method: str) -> None:
        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.5) as connection:
            statement = await connection.prepare(SLOW_WITH)
            for target, args in ((connection, (SLOW_WITH,)), (statement, ())):
                rows = await getattr(target, method)(*args, [(0.1,)] * 12)
                assert rows is None or len(rows) == 12

    async def test_a_large_batch_arrives_whole(self, bench: Bench) -> None:
        values = [(value,) for value in range(30_000)]
        async with asyncio.timeout(HANG), bench.acquire() as connection:
            await connection.executemany(f"INSERT INTO {bench.name} VALUES ($1)", values)
            assert len(await connection.fetchmany("SELECT $1::int", values)) == len(values)
        assert await bench.kept() == list(range(30_000))

    async def test_a_pause_of_the_event_loop_is_no_lack_of_progress(self, bench: Bench) -> None:
        async def records() -> AsyncIterator[tuple[int]]:
            for value in range(3):
                time.sleep(0.4)  # noqa: ASYNC251  the caller blocks the event loop
                yield (value,)

        async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.3) as connection:
            await connection.copy_records_to_table(bench.name, records=records())
        assert await bench.kept() == [0, 1, 2]

    async def test_a_frozen_server_ends_each_of_them(self, bench: Bench) -> None:
        calls: list[Callable[[Any], Any]] = [
            lambda it: it.executemany("SELECT $1::int", [(1,)]),
            lambda it: it.copy_from_query("SELECT 1", output=ignore),
            lambda it: it.copy_records_to_table(bench.name, records=[(1,)]),
        ]
        for call in calls:
            async with asyncio.timeout(HANG), bench.acquire(command_timeout=0.2) as connection:
                bench.endpoint.freeze()
                with pytest.raises(neon_async.QueryTimeoutError):
                    await call(connection)
                bench.endpoint.thaw()

    @pytest.mark.parametrize("many", [False, True], ids=["copy", "executemany"])
    async def test_a_cancellation_is_one(self, bench: Bench, many: bool) -> None:
        async with asyncio.timeout(HANG), bench.acquire() as connection:
            call = MANY["executemany"] if many else MANY["copy_from_query"]
            task = asyncio.ensure_future(call(connection))
            await asyncio.wait({task}, timeout=0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
