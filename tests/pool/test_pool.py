"""To who uses it the pool is asyncpg's, on both event loops: calls, classes, callbacks, opening; and what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import io
import logging
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
import uvloop
from support.certificates import issue
from support.probes import (
    HANG,
    Relay,
    assert_balanced,
    assert_secret_free,
    black_hole,
    connected,
    make_pool,
    nothing_is_left,
    password_of,
    until,
    until_gone,
    until_settled,
)

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres
from neon_async.testing._impostor import Impostor

ROOT = issue(subject="root", ca=True)
DSN = "postgresql://alex:s3cret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"
NAME = "ep-cool-darkness-123456"

# Made where most programs make theirs: at import, with no event loop running.
MODULE_LEVEL_POOL = neon_async.create_pool(DSN, trust_anchor=ROOT.pem)


# It is asyncpg's pool


def test_a_pool_is_one_of_asyncpgs() -> None:
    assert isinstance(MODULE_LEVEL_POOL, asyncpg.Pool)
    assert isinstance(MODULE_LEVEL_POOL, neon_async.Pool)
    assert not asyncio.iscoroutine(MODULE_LEVEL_POOL)


def test_create_pool_knows_every_keyword_of_asyncpgs() -> None:
    ours = inspect.signature(neon_async.create_pool).parameters
    theirs = inspect.signature(asyncpg.create_pool).parameters
    ignored = {"dsn", "connect", "loop", "connect_kwargs", "init_size"}
    assert set(theirs) - ignored <= set(ours)


@pytest.mark.anyio
class TestItDoesWhatAsyncpgsDoes:
    @pytest.fixture
    async def pool(self, postgres: LocalPostgres) -> AsyncIterator[neon_async.Pool]:
        async with make_pool(postgres, max_size=2) as pool:
            yield pool

    @pytest.fixture
    async def table(self, pool: neon_async.Pool) -> AsyncIterator[str]:
        await pool.execute("CREATE TABLE items (id int, name text)")
        yield "items"
        await pool.execute("DROP TABLE items")

    async def test_it_fetches(self, pool: neon_async.Pool) -> None:
        query = "SELECT * FROM generate_series(1, $1::int) AS n"
        assert [row["n"] for row in await pool.fetch(query, 3)] == [1, 2, 3]
        row = await pool.fetchrow(query, 3)
        assert row is not None
        assert row["n"] == 1
        assert await pool.fetchval(query, 3) == 1

    async def test_it_executes(self, pool: neon_async.Pool, table: str) -> None:
        assert await pool.execute(f"INSERT INTO {table} VALUES ($1, $2)", 1, "a") == "INSERT 0 1"
        await pool.executemany(f"INSERT INTO {table} VALUES ($1, $2)", [(2, "b"), (3, "c")])
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 3

    async def test_it_copies(self, pool: neon_async.Pool, table: str) -> None:
        assert await pool.copy_records_to_table(table, records=[(1, "a"), (2, "b")]) == "COPY 2"
        assert await pool.copy_to_table(table, source=io.BytesIO(b"3\tc\n")) == "COPY 1"
        out, query = io.BytesIO(), io.BytesIO()
        assert await pool.copy_from_table(table, output=out) == "COPY 3"
        assert out.getvalue() == b"1\ta\n2\tb\n3\tc\n"
        await pool.copy_from_query("SELECT $1::int", 7, output=query)
        assert query.getvalue() == b"7\n"

    async def test_it_acquires_and_releases(self, pool: neon_async.Pool) -> None:
        connection = await pool.acquire()
        assert isinstance(connection, asyncpg.Connection)
        assert (pool.get_size(), pool.get_idle_size()) == (1, 0)
        await pool.release(connection)
        assert (pool.get_size(), pool.get_idle_size()) == (1, 1)
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await connection.fetchval("SELECT 1")
        async with pool.acquire(timeout=HANG) as connection, connection.transaction():
            assert await connection.fetchval("SELECT 1") == 1

    async def test_it_listens(self, pool: neon_async.Pool) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()

        def listener(connection: Any, pid: int, channel: str, payload: object) -> None:
            heard.put_nowait(str(payload))

        async with pool.acquire() as connection, asyncio.timeout(HANG):
            await connection.add_listener("news", listener)
            await pool.execute("NOTIFY news, 'hello'")
            assert await heard.get() == "hello"
            await connection.remove_listener("news", listener)

    async def test_its_cursors_and_types_work(self, pool: neon_async.Pool) -> None:
        async with pool.acquire() as connection, connection.transaction():
            cursor = connection.cursor("SELECT generate_series(1, 100) AS n", prefetch=7)
            assert [row["n"] async for row in cursor] == list(range(1, 101))
            assert await connection.fetchval("SELECT ARRAY[(1, 'a')::record]") == [(1, "a")]

    async def test_a_broken_connection_is_replaced(self, pool: neon_async.Pool) -> None:
        async with pool.acquire() as first, pool.acquire() as second:
            proxy: Any = first
            pid, behind = first.get_server_pid(), proxy._con  # asyncpg takes the proxy away with the connection
            await second.execute("SELECT pg_terminate_backend($1)", pid)
            await until(behind.is_closed)
        assert await pool.fetchval("SELECT 1") == 1

    async def test_expired_connections_are_replaced(self, pool: neon_async.Pool) -> None:
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        await pool.expire_connections()
        assert await pool.fetchval("SELECT pg_backend_pid()") != pid


@pytest.mark.anyio
async def test_await_and_async_with_open_the_same_pool(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    assert await pool is pool
    assert await pool is pool
    async with pool as entered:
        assert entered is pool
        assert await pool.fetchval("SELECT 1") == 1
    with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
        await pool.fetchval("SELECT 1")


@pytest.mark.anyio
async def test_a_pool_is_used_only_when_it_is_open(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
        await pool.fetchval("SELECT 1")
    with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
        await pool.close()
    async with pool:
        pass


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_pools_made_outside_of_any_loop_work_in_one_after_another(
    postgres: LocalPostgres, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def use(pool: neon_async.Pool) -> int:
        async with pool:
            return sum(await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20))))

    pools = [make_pool(postgres, init_size=2, max_size=4) for _ in range(2)]
    for pool in pools:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(use(pool)) == 20


async def until_served(pool: neon_async.Pool, failure: type[Exception]) -> Any:
    """Ask until the breaker, which answers with `failure`, has closed."""
    while True:
        try:
            return await pool.fetchval("SELECT 1")
        except failure:
            await asyncio.sleep(0.01)


# Sizes


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sizes", "opened"),
    [
        pytest.param({}, 0, id="default"),
        pytest.param({"init_size": 3}, 3, id="init_size"),
        pytest.param({"min_size": 2}, 2, id="min_size"),
        pytest.param({"min_size": 1, "init_size": 3}, 3, id="both"),
        pytest.param({"init_size": 5, "max_size": 5}, 5, id="all"),
    ],
)
async def test_a_pool_opens_with_init_size_connections(
    postgres: LocalPostgres, sizes: dict[str, int], opened: int
) -> None:
    with pytest.warns(UserWarning, match="min_size") if "min_size" in sizes else contextlib.nullcontext():
        pool = make_pool(postgres, **sizes)
    async with pool:
        assert (pool.get_size(), pool.get_idle_size()) == (opened, opened)
        assert pool.get_min_size() == sizes.get("min_size", 0)
        assert pool.get_init_size() == opened
        assert pool.get_max_size() == sizes.get("max_size", 10)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        pytest.param({"max_size": 0}, "max_size must be a whole number from 1 to", id="max_size 0"),
        pytest.param({"max_size": -1}, "max_size", id="max_size negative"),
        pytest.param({"max_size": 1.5}, "max_size", id="max_size a fraction"),
        pytest.param({"max_size": "5"}, "max_size", id="max_size a string"),
        pytest.param({"max_size": True}, "max_size", id="max_size a bool"),
        pytest.param({"max_size": None}, "max_size", id="max_size None"),
        pytest.param({"min_size": -1}, "min_size must be a whole number from 0 to 10", id="min_size negative"),
        pytest.param({"min_size": 11}, "min_size must be a whole number from 0 to 10", id="min_size above max_size"),
        pytest.param(
            {"min_size": 2, "init_size": 1}, "init_size must be .* from 2 to 10", id="init_size below min_size"
        ),
        pytest.param({"init_size": 11}, "init_size", id="init_size above max_size"),
        pytest.param({"max_waiting": -1}, "max_waiting must be a whole number from 0", id="max_waiting negative"),
        pytest.param({"acquire_timeout": 0}, "acquire_timeout must be seconds above 0", id="acquire_timeout 0"),
        pytest.param({"acquire_timeout": float("inf")}, "not inf", id="acquire_timeout infinite"),
        pytest.param({"acquire_timeout": None}, "acquire_timeout must be seconds", id="acquire_timeout None"),
        pytest.param({"release_timeout": 0}, "release_timeout must be seconds above 0", id="release_timeout 0"),
        pytest.param({"leak_after": 0}, "leak_after must be seconds above 0", id="leak_after 0"),
        pytest.param({"max_lifetime": -1}, "max_lifetime must be seconds from 0, for never", id="max_lifetime"),
        pytest.param({"check_after_idle": -1}, "check_after_idle must be seconds from 0, for always", id="check"),
        pytest.param({"max_queries": 0}, "max_queries must be a whole number from 1 to", id="max_queries 0"),
        pytest.param({"max_inactive_connection_lifetime": -1}, "must be seconds", id="lifetime negative"),
        pytest.param({"max_inactive_connection_lifetime": float("nan")}, "must be seconds", id="lifetime not a number"),
        pytest.param({"max_inactive_connection_lifetime": float("inf")}, "must be seconds", id="lifetime infinite"),
        pytest.param({"max_inactive_connection_lifetime": "240"}, "must be seconds", id="lifetime a string"),
        pytest.param({"connection_class": object}, "subclass of asyncpg.Connection", id="connection_class"),
        pytest.param({"connection_class": "Connection"}, "subclass of asyncpg", id="connection_class a string"),
        pytest.param({"record_class": dict}, "subclass of asyncpg.Record", id="record_class"),
    ],
)
def test_options_out_of_range_are_refused_by_the_call(sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=reason) as caught:
        neon_async.create_pool(DSN, trust_anchor=ROOT.pem, **sizes)
    assert_secret_free(caught.value, "s3cret")


@pytest.mark.parametrize("name", ["init", "setup", "reset"])
def test_a_callback_that_cannot_be_called_is_refused_by_the_call(name: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=name):
        neon_async.create_pool(DSN, trust_anchor=ROOT.pem, **{name: "not a function"})  # type: ignore[arg-type]


def test_the_arguments_of_a_pool_do_not_change() -> None:
    for arguments in ((), (DSN,), ("postgresql://alex:other@evil.example.com/d?sslmode=disable",)):
        with pytest.raises(neon_async.ConfigurationError, match="judged when it is created"):
            MODULE_LEVEL_POOL.set_connect_args(*arguments, ssl=False)
    assert MODULE_LEVEL_POOL._connector.parameters.host.startswith(NAME)


def test_a_pool_is_not_pickled_with_its_password() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(MODULE_LEVEL_POOL)


@pytest.mark.anyio
async def test_a_pool_shows_its_state_and_no_secret(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, init_size=2)
    assert repr(pool) == f"<Pool {NAME}: 0 in use, 0 idle, 0 waiting>"
    async with pool:
        async with pool.acquire():
            assert repr(pool) == f"<Pool {NAME}: 1 in use, 1 idle, 0 waiting>"
        assert repr(pool) == f"<Pool {NAME}: 0 in use, 2 idle, 0 waiting>"
    assert repr(pool) == f"<Pool {NAME}: 0 in use, 0 idle, 0 waiting, closed>"


# Opening that fails


@pytest.mark.anyio
async def test_a_pool_that_cannot_open_tells_why_and_leaves_nothing(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        pool = neon_async.create_pool(postgres.dsn, trust_anchor=ROOT.pem, init_size=3)
        with pytest.raises(neon_async.CertificateError):
            await pool
        assert (pool.get_size(), pool.is_closing()) == (0, True)


def fails_from(calls: int, password: str) -> Callable[[], str]:
    """Return a password function that fails from its `calls`th call on."""
    made = []

    def answer() -> str:
        made.append(1)
        if len(made) >= calls:
            raise RuntimeError("the vault is sealed")
        return password

    return answer


@pytest.mark.anyio
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
async def test_a_pool_that_opens_halfway_leaves_no_connection(postgres: LocalPostgres, calls: int) -> None:
    password = password_of(postgres)
    name = f"halfway {calls} {id(object())}"
    async with connected(postgres) as admin, nothing_is_left():
        pool = make_pool(postgres, init_size=5, application_name=name, password=fails_from(calls, password))
        with pytest.raises(RuntimeError, match="the vault is sealed"):
            async with pool:
                pytest.fail("it must not open")
        await until_gone(admin, name)


@pytest.mark.anyio
async def test_a_pool_whose_opening_is_cancelled_leaves_nothing(postgres: LocalPostgres) -> None:
    async with Impostor(lambda conversation: None) as impostor, asyncio.timeout(HANG), nothing_is_left():
        pool = neon_async.create_pool(impostor.dsn, trust_anchor=ROOT.pem, init_size=3)
        task = asyncio.ensure_future(pool.__aenter__())
        await until(lambda: impostor.conversations)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.is_closing()
        del task


@pytest.mark.anyio
async def test_a_second_opener_does_not_take_the_pool_from_the_first(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, init_size=2)
    first = asyncio.ensure_future(pool.__aenter__())
    await asyncio.sleep(0)
    with pytest.raises(asyncpg.InterfaceError, match="being initialized in another task"):
        await pool
    assert await first is pool
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


@pytest.mark.anyio
async def test_a_dial_that_ends_after_the_pool_leaves_no_connection(postgres: LocalPostgres) -> None:
    """The pool is terminated while a dial is under way; what that dial brings home belongs to nobody."""
    arrived, go_on = asyncio.Event(), asyncio.Event()
    secret = password_of(postgres)
    name = f"late {id(arrived)}"

    async def password() -> str:
        arrived.set()
        await go_on.wait()
        return secret

    async with connected(postgres) as admin, nothing_is_left():
        pool = make_pool(postgres, password=password, application_name=name)
        await pool
        task = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await arrived.wait()
        pool.terminate()
        go_on.set()
        with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
            await task
        del task
        await until_gone(admin, name)


# Classes and callbacks


class MyConnection(asyncpg.Connection):
    async def seven(self) -> Any:
        return await self.fetchval("SELECT 7")


class MyRecord(asyncpg.Record):
    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.anyio
async def test_a_pool_hands_out_the_classes_it_was_given(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, connection_class=MyConnection, record_class=MyRecord) as pool:
        async with pool.acquire() as connection:
            named: Any = connection
            assert await named.seven() == 7
            assert neon_async.connection_tls_report(connection) == pool.tls_report()
        row: Any = await pool.fetchrow("SELECT 7 AS seven")
        assert row.seven == 7


@pytest.mark.anyio
async def test_callbacks_are_called_as_by_asyncpg(postgres: LocalPostgres) -> None:
    called: list[str] = []

    async def init(connection: asyncpg.Connection[Any]) -> None:
        called.append("init")
        assert neon_async.connection_tls_report(connection).version == "TLSv1.3"
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda text: ("json", text))

    async def setup(connection: neon_async.Connection) -> None:
        called.append("setup")
        assert neon_async.connection_tls_report(connection).version == "TLSv1.3"

    async def reset(connection: asyncpg.Connection[Any]) -> None:
        called.append("reset")

    async with make_pool(postgres, init=init, setup=setup, reset=reset, max_size=1) as pool:
        for _ in range(2):
            assert await pool.fetchval("SELECT '1'::json") == ("json", "1")
    assert called == ["init", "setup", "reset", "setup", "reset"]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["init", "setup"])
async def test_a_callback_that_fails_costs_the_connection_and_not_the_slot(postgres: LocalPostgres, name: str) -> None:
    failures = [RuntimeError("first time")]

    async def callback(connection: Any) -> None:
        if failures:
            raise failures.pop()

    async with make_pool(postgres, max_size=1, **{name: callback}) as pool, asyncio.timeout(HANG):
        with pytest.raises(RuntimeError, match="first time"):
            await pool.fetchval("SELECT 1")
        assert pool.get_size() == 0
        assert await until_served(pool, RuntimeError) == 1


# Closing


@pytest.mark.anyio
async def test_a_pool_is_closed_twice_without_complaint(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        pool = await make_pool(postgres, init_size=2)
        await pool.close()
        await pool.close()
        pool.terminate()
        assert (pool.get_size(), pool.is_closing()) == (0, True)
        with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
            await pool.acquire()


@pytest.mark.anyio
async def test_a_terminated_pool_leaves_nothing(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        pool = await make_pool(postgres, init_size=3)
        connection: Any = await pool.acquire()
        behind = connection._con
        pool.terminate()
        await pool.close()
        assert behind.is_closed()


# Reports


@pytest.mark.anyio
async def test_a_pool_tells_of_its_latest_handshake(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    assert pool.tls_report() is None
    async with pool:
        assert pool.tls_report() is None
        await pool.fetchval("SELECT 1")
        report = pool.tls_report()
        assert report is not None
        assert (report.version, report.negotiation) == ("TLSv1.3", "direct")
        assert report.server_name == postgres.host
    assert pool.tls_report() is report


# Under load


@pytest.mark.anyio
async def test_fifty_tasks_share_five_connections(postgres: LocalPostgres) -> None:
    in_use = []

    async def work(pool: neon_async.Pool, number: int) -> int:
        async with pool.acquire() as connection:
            in_use.append(pool.get_size() - pool.get_idle_size())
            value: int = await connection.fetchval("SELECT $1::int FROM pg_sleep(0.001)", number)
            return value

    async with make_pool(postgres, max_size=5) as pool, asyncio.timeout(HANG):
        assert await asyncio.gather(*(work(pool, number) for number in range(50))) == list(range(50))
        assert max(in_use) <= 5
        await until_settled(pool)
        assert (pool.get_size(), pool.get_idle_size()) == (5, 5)


@pytest.mark.anyio
async def test_an_acquire_cancelled_during_its_dial_leaves_the_slot_usable(postgres: LocalPostgres) -> None:
    hold = asyncio.Event()

    async with Relay(postgres.port) as relay:
        waiting = asyncio.Event()

        async def password() -> str:
            if not hold.is_set():
                waiting.set()
                await hold.wait()
            return password_of(postgres)

        dsn = relay.dsn(postgres.dsn)
        pool = neon_async.create_pool(dsn, trust_anchor=postgres.trust_anchor, max_size=1, password=password)
        async with pool, asyncio.timeout(HANG):
            task = asyncio.ensure_future(pool.fetchval("SELECT 1"))
            await waiting.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            hold.set()
            assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.anyio
async def test_acquires_cancelled_at_any_moment_lose_no_slot(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=2) as pool, asyncio.timeout(HANG):
        for rounds in range(0, 60, 4):
            await pool.expire_connections()
            tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(4)]
            for _ in range(rounds):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        both = await asyncio.gather(pool.acquire(), pool.acquire())
        for connection in both:
            assert await connection.fetchval("SELECT 1") == 1
            await pool.release(connection)


@pytest.mark.anyio
async def test_a_dial_that_fails_leaves_the_slot_usable(postgres: LocalPostgres) -> None:
    answers = ["wrong", password_of(postgres)]
    async with make_pool(postgres, max_size=1, password=lambda: answers.pop(0)) as pool, asyncio.timeout(HANG):
        with pytest.raises(neon_async.InvalidPasswordError):
            await pool.fetchval("SELECT 1")
        assert await until_served(pool, neon_async.InvalidPasswordError) == 1


@pytest.mark.anyio
async def test_a_dial_in_a_pool_has_its_own_deadline() -> None:
    with black_hole() as port:
        dsn = DSN.replace(".tech/", f".tech:{port}/") + "?hostaddr=127.0.0.1"
        pool = neon_async.create_pool(dsn, trust_anchor=ROOT.pem, connect_timeout=0.2, max_size=1)
        async with pool, asyncio.timeout(HANG):
            for number in range(1, 3):
                with pytest.raises(neon_async.PoolTimeoutError) as caught:
                    await pool.fetchval("SELECT 1", timeout=1)
                assert isinstance(caught.value.__cause__, neon_async.ConnectTimeoutError)
                assert_secret_free(caught.value, "s3cret")
                assert pool.stats().dial_failures >= number


@pytest.mark.anyio
async def test_a_query_cancelled_in_a_pool_frees_its_connection(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(3600)", timeout=0.05)
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.get_size() == 1


@pytest.mark.anyio
async def test_a_server_that_stops_and_starts_is_used_again() -> None:
    async with LocalPostgres() as server, make_pool(server, init_size=2) as pool, asyncio.timeout(HANG):
        await server.stop()
        await until(lambda: pool.get_size() == 0)
        with pytest.raises(neon_async.PoolTimeoutError) as caught:
            await pool.fetchval("SELECT 1", timeout=0.3)
        assert isinstance(caught.value.__cause__, neon_async.ConnectError)
        await server.start()
        assert await pool.fetchval("SELECT 1") == 1


# Seeing


@pytest.mark.anyio
async def test_stats_tell_where_every_slot_is(postgres: LocalPostgres) -> None:
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def password() -> str:
        if pool.stats().dials == 3:
            arrived.set()
            await go_on.wait()
        return password_of(postgres)

    async def reset(connection: Any) -> None:
        await go_on.wait()

    pool = make_pool(postgres, init_size=3, max_size=5, password=password, reset=reset)
    async with pool, asyncio.timeout(HANG):
        held = [await pool.acquire() for _ in range(2)]
        await pool.execute("SELECT 1")
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await arrived.wait()
        now = pool.stats()
        assert (now.in_use, now.idle, now.resetting, now.connecting, now.checking, now.vacant) == (2, 0, 1, 1, 0, 1)
        assert (now.size, now.waiting, now.max_size, now.min_size) == (3, 1, 5, 0)
        assert repr(pool) == f"<Pool {NAME}: 2 in use, 0 idle, 1 waiting>"
        assert_balanced(pool)
        go_on.set()
        assert await waiting == 1
        for connection in held:
            await pool.release(connection)
        await until_settled(pool)


@pytest.mark.anyio
async def test_stats_count_what_has_happened(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        fresh = pool.stats()
        counters = [name.removesuffix("_seconds") for name in dir(fresh) if name.endswith("_seconds")]
        assert len(counters) == 11
        assert {getattr(fresh, name, None) for name in dir(fresh) if name.endswith("_seconds")} == {0.0}

        async with pool.acquire() as connection:
            await connection.execute("SELECT pg_sleep(0.01)")
            with pytest.raises(neon_async.PoolTimeoutError):
                await pool.acquire(timeout=0.01)
        await until_settled(pool)
        await pool.expire_connections()
        await pool.fetchval("SELECT 1")
        await until_settled(pool)

        now = pool.stats()
        counted = (now.acquires, now.releases, now.waits, now.timeouts, now.dials, now.dial_failures, now.wakes)
        assert counted == (2, 2, 3, 1, 2, 0, 2)
        assert (now.resets, now.terminations, now.heals, now.retries) == (2, 1, 0, 0)
        for seconds in (
            now.acquire_seconds,
            now.release_seconds,
            now.wait_seconds,
            now.timeout_seconds,
            now.dial_seconds,
            now.wake_seconds,
            now.reset_seconds,
            now.termination_seconds,
        ):
            assert 0 < seconds < HANG
        assert now.release_seconds >= 0.01
        assert fresh.acquires == 0  # a snapshot


def test_stats_cannot_be_changed() -> None:
    stats = MODULE_LEVEL_POOL.stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.waiting = 7  # type: ignore[misc]
    assert not hasattr(stats, "__dict__")


@pytest.mark.anyio
async def test_a_connection_that_does_not_come_back_is_reported_with_the_stack_that_acquired_it(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    async def forgetful() -> Any:
        return await pool.acquire()

    async with make_pool(postgres, leak_after=0.05) as pool:
        async with pool.acquire():
            pass  # comes back
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
async def test_changes_of_state_are_logged_in_one_line_each(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    async with LocalEndpoint(postgres) as endpoint, make_pool(endpoint, init_size=2) as pool, asyncio.timeout(HANG):
        for _ in range(5):
            await pool.fetchval("SELECT 1")
        await until_settled(pool)
        endpoint.refuse()
        endpoint.cut()
        await until(lambda: pool.get_size() == 0)
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 3)
        endpoint.accept()
        assert await waiting == 1
        await pool.close()
    records = [record for record in caplog.records if record.name.startswith("neon_async")]
    assert {(record.name, record.levelno) for record in records} == {("neon_async", logging.INFO)}
    lines = [record.getMessage() for record in records]
    for line, part in zip(
        lines, ["connected in", "no connection is open", "cannot connect", "connected in", "closed"], strict=True
    ):
        assert line.startswith(f"{NAME}: ")
        assert part in line
        assert "\n" not in line
    assert password_of(postgres) not in caplog.text


@pytest.mark.anyio
async def test_the_text_of_an_error_of_the_callers_own_is_not_logged(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def password() -> str:
        raise RuntimeError("the secret is hunter2")

    async with make_pool(postgres, password=password) as pool:
        with pytest.raises(RuntimeError):
            await pool.fetchval("SELECT 1")
    assert "RuntimeError" in caplog.text
    assert "hunter2" not in caplog.text
