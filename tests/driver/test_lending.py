"""What a pool lends and what asyncpg's code sees of it: proxies, holders and the base class of pools."""

from __future__ import annotations

import asyncio
import gc
import inspect
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from asyncpg.pool import PoolAcquireContext
from support.plain import asyncpg_arguments
from support.private_names import pins
from support.probes import HANG, connected, make_pool, until

from neon_async._driver.holder import Holder, HolderQueue, PoolBase, Proxy, holder_of, session_of
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture
async def connection(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres) as connection:
        yield connection


@pytest.fixture
def owner(connection: Any) -> Holder:
    """A holder of `connection`."""
    owner = Holder(None)
    owner.adopt(connection)
    return owner


# ---------------------------------------------------------------------------------------------------------------------
# Proxies

# Every coroutine of asyncpg's connections, with arguments.
CALLS: dict[str, tuple[Any, ...]] = {
    "execute": ("SELECT 1",),
    "executemany": ("SELECT $1::int", [(1,)]),
    "fetch": ("SELECT 1",),
    "fetchval": ("SELECT 1",),
    "fetchrow": ("SELECT 1",),
    "fetchmany": ("SELECT $1::int", [(1,)]),
    "prepare": ("SELECT 1",),
    "copy_from_table": ("pg_am",),
    "copy_from_query": ("SELECT 1",),
    "copy_to_table": ("pg_am",),
    "copy_records_to_table": ("pg_am",),
    "add_listener": ("news", print),
    "remove_listener": ("news", print),
    "set_type_codec": ("json",),
    "reset_type_codec": ("json",),
    "set_builtin_type_codec": ("json",),
    "reload_schema_state": (),
    "reset": (),
    "close": (),
}


class TestProxy:
    def test_it_has_every_coroutine_of_a_connection(self) -> None:
        public = {name for name in dir(asyncpg.Connection) if not name.startswith("_")}
        coroutines = {name for name in public if inspect.iscoroutinefunction(getattr(asyncpg.Connection, name))}
        assert coroutines == CALLS.keys()
        for name in coroutines:
            ours, asyncpgs = vars(Proxy)[name], getattr(asyncpg.Connection, name)
            assert inspect.iscoroutinefunction(ours)  # asyncpg's are only from Python 3.12 on
            assert inspect.signature(ours) == inspect.signature(asyncpgs)
            assert ours.__doc__ == asyncpgs.__doc__

    @pytest.mark.parametrize("name", CALLS)
    @pins("_con")
    async def test_a_call_of_one_loan_that_begins_after_it_does_not_reach_the_next(
        self, owner: Holder, name: str
    ) -> None:
        call = getattr(owner.lend(), name)(*CALLS[name])
        owner.take_back()
        following = owner.lend()
        with pytest.raises(asyncpg.InterfaceError) as caught:
            await call
        assert str(caught.value) == (f"cannot call Connection.{name}(): connection has been released back to the pool")
        assert await following.fetchval("SELECT 1") == 1

    async def test_a_call_that_has_begun_can_be_cancelled(self, owner: Holder) -> None:
        proxy = owner.lend()
        task = asyncio.ensure_future(proxy.execute("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.01)
        task.cancel()
        async with asyncio.timeout(HANG):
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await proxy.fetchval("SELECT 1") == 1

    async def test_it_passes_on_what_is_no_coroutine(self, owner: Holder, connection: Any) -> None:
        proxy = owner.lend()
        assert proxy.get_server_pid() == connection.get_server_pid()
        assert proxy.get_settings().server_encoding == "UTF8"
        assert proxy.is_closed() is proxy.is_in_transaction() is False
        assert isinstance(proxy, asyncpg.Connection)
        owner.take_back()
        for name in ("get_server_pid", "is_closed", "transaction"):
            with pytest.raises(asyncpg.InterfaceError, match=f"cannot call Connection.{name}"):
                getattr(proxy, name)()


# ---------------------------------------------------------------------------------------------------------------------
# Holders


class TestHolder:
    @pins("_con", "_proxy")
    async def test_it_is_connected_with_a_connection_and_idle_without_a_loan(self, connection: Any) -> None:
        owner = Holder(None)
        assert (owner.connection, owner.is_connected(), owner.is_idle()) == (None, False, True)
        owner.terminate()
        owner.adopt(connection)
        assert (owner.connection, owner.is_connected(), owner.is_idle()) == (connection, True, True)
        owner.lend()
        assert (owner.is_connected(), owner.is_idle()) == (True, False)
        owner.take_back()
        assert (owner.is_connected(), owner.is_idle()) == (True, True)
        owner.terminate()
        assert (owner.connection, owner.is_connected(), connection.is_closed()) == (connection, False, True)
        owner.mark_closed()
        assert owner.connection is None

    @pins("_detach", "_on_release", "_con")
    async def test_after_the_loan_the_proxy_is_dead_for_its_caller_and_the_connection_lives(
        self, owner: Holder, connection: Any
    ) -> None:
        proxy = owner.lend()
        statement = await proxy.prepare("SELECT 1")
        cursor, transaction = proxy.cursor("SELECT 1"), proxy.transaction()
        owner.take_back()
        assert await connection.fetchval("SELECT 2") == 2
        again = owner.lend()
        assert await again.fetchval("SELECT 3") == 3
        for call in (proxy.fetchval, statement.fetchval):
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                await call("SELECT 4")
        for use in (transaction.start, lambda: cursor.__aiter__()):
            with pytest.raises(asyncpg.InterfaceError, match=r"released back\s+to the pool"):
                use()

    @pins("_on_release")
    async def test_the_end_of_a_loan_warns_of_listeners_and_the_proxy_dies_nevertheless(self, owner: Holder) -> None:
        proxy = owner.lend()
        await proxy.add_listener("news", lambda *_: None)
        with pytest.raises(asyncpg.InterfaceWarning, match="active notification listener"):  # warnings are errors here
            owner.take_back()
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await proxy.fetchval("SELECT 1")

    @pytest.mark.parametrize("end", ["close", "terminate"])
    @pins("_release_on_close")
    async def test_asyncpg_does_not_touch_it_when_its_connection_ends(
        self, owner: Holder, connection: Any, end: str
    ) -> None:
        proxy = owner.lend()
        ended = getattr(proxy, end)()
        if isinstance(ended, Awaitable):
            await ended
        assert connection.is_closed()
        assert owner.connection is connection
        assert proxy.is_closed()
        assert not owner.is_idle()
        owner.mark_closed()
        assert (owner.connection, owner.is_idle()) == (None, True)
        with pytest.raises(asyncpg.InterfaceError, match="connection is closed"):
            await proxy.fetchval("SELECT 1")

    @pins("_set_proxy")
    async def test_a_connection_can_be_marked_as_closed_while_it_is_lent(self, owner: Holder, connection: Any) -> None:
        proxy = owner.lend()
        connection.terminate()
        owner.mark_closed()
        assert owner.connection is None
        with pytest.raises(asyncpg.InterfaceError, match="connection is closed"):
            await proxy.fetchval("SELECT 1")

    @pins("_aborted", "_transport")
    def test_a_connection_whose_event_loop_is_closed_can_be_terminated(
        self, postgres: LocalPostgres, anyio_backend: object
    ) -> None:
        owner, reported = Holder(None), []

        async def connect() -> None:
            async with asyncio.timeout(HANG):
                pool = make_pool(postgres)
                connection = await pool._connector.connect()
                session = session_of(connection)
                assert session is not None
                session.on_closed = lambda: reported.append(connection.is_closed())
                owner.adopt(connection)

        owner.terminate()
        asyncio.run(connect())
        assert owner.is_connected()
        owner.terminate()
        assert not owner.is_connected()
        assert reported == [True]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # transports of the closed loop, which nothing can close
            owner.mark_closed()
            gc.collect()

    @pins("_holder", "_pool", "_con")
    async def test_a_pool_knows_what_it_has_lent(self, postgres: LocalPostgres) -> None:
        async with (
            make_pool(postgres) as pool,
            make_pool(postgres) as other,
            asyncpg.create_pool(**asyncpg_arguments(postgres), min_size=0) as asyncpgs,
        ):
            async with pool.acquire() as proxy, other.acquire() as foreign, asyncpgs.acquire() as strange:
                holder = holder_of(proxy, pool)
                assert holder is not None
                for stranger in (foreign, strange, holder.connection, holder, None, object()):
                    with pytest.raises(asyncpg.InterfaceError) as caught:
                        holder_of(stranger, pool)
                    assert str(caught.value).startswith("Pool.release() received invalid connection: ")
                    assert str(caught.value).endswith(" is not a member of this pool")
            assert holder_of(proxy, pool) is None


# ---------------------------------------------------------------------------------------------------------------------
# The base class of pools


def base_of(*holders: Holder) -> PoolBase:
    options: dict[str, Any] = {"min_size": 0, "max_size": 3, "max_queries": 1, "max_inactive_connection_lifetime": 0}
    pool = PoolBase(**options, connection_class=asyncpg.Connection, record_class=asyncpg.Record)
    pool._set_holders(holders, HolderQueue(3, lambda: list(holders), lambda: 0))
    return pool


def read_as_health_checks_do(pool: Any) -> dict[str, object]:
    """Return what other packages and in-house health checks read of a pool, by names that asyncpg does not document."""
    holders = pool._holders
    return {
        "free": pool._queue.qsize(),
        "the free ones are": [holder in holders for holder in pool._queue._queue],
        "none is free": pool._queue.empty(),
        "all are free": pool._queue.full(),
        "places": pool._queue.maxsize,
        "waiting": len(pool._queue._getters),
        "used": pool._maxsize - pool._queue.qsize(),
        "sizes": (pool._minsize, pool._maxsize, len(holders)),
        "in use": len([holder for holder in holders if holder._in_use]),
        "not in use": len([holder for holder in holders if holder._in_use is None]),
        "idle": len([holder for holder in holders if holder.is_idle()]),
        "connected": len([holder for holder in holders if holder._con is not None and not holder._con.is_closed()]),
        "addresses": {len(holder._con._addr) for holder in holders if holder._con},
        "of the pool": all(holder._pool is pool for holder in holders),
        "life": (pool._initializing, pool._initialized, pool._closing, pool._closed),
        "options": (pool._max_queries, pool._max_inactive_connection_lifetime),
        "callbacks": (pool._setup, pool._init, pool._reset),
        "classes": (pool._connection_class, pool._record_class),
    }


async def look_at_health(pool: Any) -> list[dict[str, object]]:
    """Return what is read of a pool of two, from its opening to its end."""
    seen = []
    await pool
    seen.append(read_as_health_checks_do(pool))
    one = await pool.acquire()
    seen.append(read_as_health_checks_do(pool))
    two = await pool.acquire()
    waiting = asyncio.ensure_future(pool.acquire().__aenter__())
    await until(lambda: len(pool._queue._getters))
    seen.append(read_as_health_checks_do(pool))
    await pool.release(one)
    three = await waiting
    seen.append(read_as_health_checks_do(pool))
    await pool.release(two)
    seen.append(read_as_health_checks_do(pool))
    closing = asyncio.ensure_future(pool.close())
    await until(pool.is_closing)
    life = read_as_health_checks_do(pool)["life"]
    await pool.release(three)
    await closing
    after = read_as_health_checks_do(pool)
    return [*seen, {"life": life}, {name: after[name] for name in ("sizes", "in use", "connected", "life")}]


async def do_nothing(connection: Any) -> None:
    pass


class TestPoolBase:
    def test_it_can_be_made_where_no_event_loop_runs(self) -> None:
        pool = base_of()
        assert isinstance(pool, asyncpg.Pool)
        assert (pool.get_min_size(), pool.get_max_size(), pool.get_size(), pool.is_closing()) == (0, 3, 0, False)

    @pins("_queue", "_in_use", "_initializing", "_initialized", "_closing", "_closed")
    async def test_health_checks_read_of_it_what_they_read_of_asyncpgs(self, postgres: LocalPostgres) -> None:
        options: dict[str, Any] = {"min_size": 0, "max_size": 2, "max_queries": 7, "setup": do_nothing}
        options["max_inactive_connection_lifetime"] = 11.0
        ours = make_pool(postgres, **options)
        assert (ours._queue.qsize(), ours._queue.full(), repr(ours._queue)) == (2, True, "<HolderQueue: 2 of 2 free>")
        seen = await look_at_health(asyncpg.create_pool(**asyncpg_arguments(postgres), **options))
        assert await look_at_health(ours) == seen

    @pytest.mark.filterwarnings("ignore:min_size=1 keeps")
    async def test_its_sizes_are_those_that_were_asked_for(self, postgres: LocalPostgres) -> None:
        pool: Any = make_pool(postgres, min_size=1, init_size=2, max_size=3)
        assert (pool._minsize, pool._maxsize) == (1, 3)
        assert getattr(pool, "_initsize", 2) == 2  # asyncpg 0.31 has none

    @pins("_connect_kwargs")
    async def test_it_keeps_no_parameter_of_its_connections(self, postgres: LocalPostgres) -> None:
        pool: Any = make_pool(postgres)
        assert (tuple(pool._connect_args), pool._connect_kwargs) == ((), {})

    @pins("_holders")
    async def test_it_counts_our_holders(self, postgres: LocalPostgres) -> None:
        async with connected(postgres) as one, connected(postgres) as two:
            holders = [Holder(None) for _ in range(3)]
            pool = base_of(*holders)
            assert (pool.get_size(), pool.get_idle_size()) == (0, 0)
            holders[0].adopt(one)
            holders[1].adopt(two)
            holders[0].lend()
            assert (pool.get_size(), pool.get_idle_size()) == (2, 1)

    @pytest.mark.parametrize(
        ("forget", "left"),
        [
            pytest.param(lambda proxy: proxy.reload_schema_state(), 0, id="reload_schema_state"),
            pytest.param(lambda proxy: meet_a_stale_statement(proxy), 1, id="a stale statement concerns itself alone"),
        ],
    )
    @pins("_holders", "_pool", "_holder")
    async def test_one_connection_can_clear_the_caches_of_all(
        self, postgres: LocalPostgres, forget: Callable[[Any], Awaitable[None]], left: int
    ) -> None:
        statements = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'"
        async with connected(postgres) as admin, make_pool(postgres, max_size=2) as pool:
            await admin.execute("DROP TABLE IF EXISTS forgotten; CREATE TABLE forgotten (a int)")
            async with pool.acquire() as one, pool.acquire() as two:
                await two.fetchval("SELECT 42")
                assert await two.fetchval(statements) == 1
                await forget(one)
                await two.fetchval("SELECT 43")
                assert await two.fetchval(statements) == left, "asyncpg has closed what its cache had dropped"
            await admin.execute("DROP TABLE forgotten")

    @pins("_loop")
    async def test_its_event_loop_is_where_asyncpg_has_it(self, postgres: LocalPostgres) -> None:
        async with (
            make_pool(postgres) as ours,
            asyncpg.create_pool(**asyncpg_arguments(postgres), min_size=0) as asyncpgs,
        ):
            loop = asyncio.get_running_loop()
            assert ours._loop is asyncpgs._loop is loop  # type: ignore[attr-defined]
            assert ours._own_loop is loop

    @pins("_acquire")
    async def test_code_that_acquires_as_asyncpg_does_gets_a_connection(self, postgres: LocalPostgres) -> None:
        async with make_pool(postgres, max_size=1) as pool:
            async with PoolAcquireContext(pool, 3) as connection:
                assert type(connection) is Proxy
                assert await connection.fetchval("SELECT 1") == 1
                with pytest.raises(TimeoutError):
                    await PoolAcquireContext(pool, 0.01)
            connection = await PoolAcquireContext(pool, None)
            assert await connection.fetchval("SELECT 2") == 2
            waiting = asyncio.ensure_future(hold(PoolAcquireContext(pool, None)))
            await until(lambda: pool.stats().waiting)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await pool.release(connection)
            assert await pool.fetchval("SELECT 3") == 3


async def meet_a_stale_statement(connection: Any) -> None:
    await connection.fetch("SELECT * FROM forgotten")
    await connection.execute("ALTER TABLE forgotten ADD COLUMN b int")
    await connection.fetch("SELECT * FROM forgotten")


async def hold(acquiring: Any) -> None:
    async with acquiring:
        await asyncio.sleep(HANG)
