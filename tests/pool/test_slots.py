"""What we need of asyncpg's insides is as we think, in every version; and a slot is in one place at a time.

Each private name of asyncpg that `_slots.py` uses is pinned by a test of what it does, on a real server. A name that
is not, or one that another module uses, fails a test at the end.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
from asyncpg.pool import PoolConnectionProxy
from asyncpg.protocol import protocol
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.probes import HANG, connected, until

import neon_async
from neon_async._pool.slots import Place, Slot, SlotPool, Slots, slot_of
from neon_async.testing import LocalPostgres

_F = TypeVar("_F", bound=Callable[..., Any])

PINNED: set[str] = set()


def pins(*names: str) -> Callable[[_F], _F]:
    """Note that a test fails where one of these private names of asyncpg does not do what we need."""

    def note(test: _F) -> _F:
        PINNED.update(names)
        return test

    return note


class BarePool(SlotPool):
    """The least that a pool of slots can be: it notes what comes back, and hands out nothing by itself."""

    def __init__(self, postgres: LocalPostgres, **options: Any) -> None:
        self.openings = 0
        self.came_back: list[Slot] = []

        async def connect(*_: object, connection_class: type[Any], record_class: type[Any], **__: object) -> Any:
            return await neon_async.connect(
                postgres.dsn,
                trust_anchor=postgres.trust_anchor,
                connection_class=connection_class,
                record_class=record_class,
            )

        defaults: dict[str, Any] = {
            "max_size": 1,
            "max_queries": 50_000,
            "reset": None,
            "connection_class": asyncpg.Connection,
            "record_class": asyncpg.Record,
        }
        super().__init__(connect=connect, **defaults | options)

    async def _warm_up(self) -> None:
        self.openings += 1

    def _came_back(self, slot: Slot) -> None:
        self.came_back.append(slot)

    @property
    def slots(self) -> list[Slot]:
        return list(self._slots)


@contextlib.asynccontextmanager
async def opened(postgres: LocalPostgres, **options: Any) -> AsyncIterator[BarePool]:
    pool = BarePool(postgres, **options)
    await pool
    try:
        yield pool
    finally:
        pool.terminate()
        await until(lambda: pool.get_size() == 0)


async def lent(pool: BarePool) -> tuple[Slot, Any]:
    """Return a slot with a new connection, and what its caller has of it."""
    [slot] = pool.slots
    await slot.open()
    slot.expires = math.inf
    return slot, await slot.lend()


async def kill(postgres: LocalPostgres, slot: Slot) -> None:
    """Have the server end the connection of `slot`, and wait until that has been noticed."""
    assert slot.connection is not None
    async with connected(postgres) as admin:
        await admin.execute("SELECT pg_terminate_backend($1)", slot.connection.get_server_pid())
    await until(lambda: not slot.is_connected())


class NoReset(asyncpg.Connection):
    """A connection that has nothing to reset, as behind a `-pooler` host."""

    def get_reset_query(self) -> str:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# asyncpg's pool


@pytest.mark.anyio
class TestPool:
    @pins("_initialize", "_holders", "_maxsize", "_max_queries")
    async def test_it_opens_once_and_counts_our_slots(self, postgres: LocalPostgres) -> None:
        async with opened(postgres, max_size=3, max_queries=7) as pool:
            await pool
            assert pool.openings == 1
            assert (pool._maxsize, pool._max_queries) == (pool.get_max_size(), 7) == (3, 7)
            assert [slot._max_queries for slot in pool.slots] == [7] * 3
            slot, other, _ = pool.slots
            assert (pool.get_size(), pool.get_idle_size()) == (0, 0)
            await slot.open()
            await other.open()
            await slot.lend()
            assert (pool.get_size(), pool.get_idle_size()) == (2, 1)

    @pins("_loop")
    def test_it_may_be_made_where_no_event_loop_runs(self, postgres: LocalPostgres, anyio_backend: object) -> None:
        pool = BarePool(postgres)

        async def use() -> object:
            await pool
            _, proxy = await lent(pool)
            value: object = await proxy.fetchval("SELECT 1")
            pool.terminate()
            return value

        assert asyncio.run(use()) == 1

    @pins("_closed")
    async def test_it_is_closed_where_opening_failed(self, postgres: LocalPostgres) -> None:
        class Failing(BarePool):
            async def _warm_up(self) -> None:
                raise LookupError

        pool = Failing(postgres)
        with pytest.raises(LookupError):
            await pool
        assert pool.is_closing()
        pool.terminate()  # a pool that is closed has nothing more to do
        await pool.close()

    @pins("_closing", "_closed")
    async def test_it_is_closing_by_its_two_flags(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool:
            flags = [(pool._closing, pool._closed, pool.is_closing())]
            pool._closing = True
            flags.append((pool._closing, pool._closed, pool.is_closing()))
            pool.terminate()
            pool._closing = False
            flags.append((pool._closing, pool._closed, pool.is_closing()))
        assert flags == [(False, False, False), (True, False, True), (False, True, True)]

    @pins("_check_init")
    async def test_it_must_be_open_to_be_used(self, postgres: LocalPostgres) -> None:
        pool = BarePool(postgres)
        with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
            pool._require_initialized()
        async with opened(postgres) as pool:
            pool._require_initialized()
            pool.terminate()
            with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
                pool._require_initialized()

    @pins("_acquire")
    async def test_every_way_to_acquire_comes_through_one_method(self, postgres: LocalPostgres) -> None:
        timeouts: list[float | None] = []

        class Acquiring(BarePool):
            async def _acquire(self, timeout: float | None) -> Any:  # noqa: ASYNC109  asyncpg's name
                timeouts.append(timeout)

            async def release(self, *_: object, **__: object) -> None:
                pass

        pool = Acquiring(postgres)
        await pool.acquire(timeout=3)
        async with pool.acquire(timeout=4):
            pass
        await pool.acquire()
        assert timeouts == [3, 4, None]

    @pins("_generation", "_pool")
    async def test_connections_expire_with_their_generation(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool:
            slot, _ = await lent(pool)
            assert not slot.is_worn(time.monotonic())
            await pool.expire_connections()
            assert slot.is_worn(time.monotonic())
            slot.discard()
            await slot.open()
            assert not slot.is_worn(time.monotonic())


# ---------------------------------------------------------------------------------------------------------------------
# How a loan begins and ends


async def _free(slot: Slot, *_: object) -> None:
    slot.recall()
    slot.free()


async def _reset(slot: Slot, *_: object) -> None:
    slot.recall()
    await slot.restore(time.monotonic())


async def _wear_out(slot: Slot, *_: object) -> None:
    slot.recall()
    slot.expires = -math.inf
    await slot.restore(time.monotonic())


async def _discard(slot: Slot, *_: object) -> None:
    slot.discard()
    slot.free()


async def _discard_behind(slot: Slot, *_: object) -> None:
    slot.recall()
    slot.discard()


async def _close(slot: Slot, proxy: Any, _: object) -> None:
    await proxy.close()
    slot.free()


async def _terminate(slot: Slot, proxy: Any, _: object) -> None:
    proxy.terminate()
    slot.free()


async def _kill(slot: Slot, _: object, postgres: LocalPostgres) -> None:
    await kill(postgres, slot)
    slot.free()


async def _kill_behind(slot: Slot, _: object, postgres: LocalPostgres) -> None:
    slot.recall()
    await kill(postgres, slot)
    slot.free()


async def _cancelled_reset(slot: Slot, proxy: Any, _: object) -> None:
    await proxy.execute("SET application_name = 'x'")
    slot.recall()
    task = asyncio.ensure_future(slot.restore(time.monotonic()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    slot.free()


ENDINGS = [  # and whether the connection lives on
    pytest.param(_free, True, id="freed"),
    pytest.param(_reset, True, id="reset"),
    pytest.param(_wear_out, False, id="worn out"),
    pytest.param(_discard, False, id="discarded in use"),
    pytest.param(_discard_behind, False, id="discarded behind"),
    pytest.param(_close, False, id="closed by its caller"),
    pytest.param(_terminate, False, id="terminated by its caller"),
    pytest.param(_kill, False, id="killed in use"),
    pytest.param(_kill_behind, False, id="killed behind"),
    pytest.param(_cancelled_reset, False, id="reset cancelled"),
]


@pytest.mark.anyio
class TestLoan:
    @pins("_con", "_proxy", "_in_use")
    async def test_a_connection_is_lent_without_a_wait(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool:
            [slot] = pool.slots
            await slot.open()
            assert (slot._proxy, slot._in_use) == (None, None)
            with pytest.raises(StopIteration) as stopped:
                slot.lend().send(None)
            proxy = stopped.value.value
            assert type(proxy) is PoolConnectionProxy
            assert slot._proxy is proxy
            assert slot._in_use is not None
            assert await proxy.fetchval("SELECT 1") == 1

    @pytest.mark.parametrize(("end", "lives"), ENDINGS)
    @pins("_queue", "_release", "_release_on_close", "_in_use", "_pool_holder")
    async def test_a_slot_comes_back_once_however_its_loan_ends(
        self, end: Callable[[Slot, Any, LocalPostgres], Awaitable[None]], lives: bool, postgres: LocalPostgres
    ) -> None:
        async with opened(postgres) as pool:
            slot, proxy = await lent(pool)
            assert pool.came_back == []
            async with asyncio.timeout(HANG):
                await end(slot, proxy, postgres)
            assert pool.came_back == [slot]
            assert (slot._in_use, slot.is_connected()) == (None, lives)
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                await proxy.fetchval("SELECT 1")
            slot.free()
            assert pool.came_back == [slot]
            if not lives:
                slot.discard()
                assert slot.connection is None
                await slot.open()
            assert await (await slot.lend()).fetchval("SELECT 1") == 1
            slot.recall()
            slot.free()
            assert pool.came_back == [slot] * 2

    @pins("_reset")
    async def test_a_slot_comes_back_once_where_the_reset_fails(self, postgres: LocalPostgres) -> None:
        async def reset(connection: Any) -> None:
            raise LookupError

        async with opened(postgres, reset=reset) as pool:
            slot, _ = await lent(pool)
            slot.recall()
            with pytest.raises(LookupError):
                await slot.restore(time.monotonic())
            assert (pool.came_back, slot.is_connected()) == ([slot], False)

    @pins("_max_queries")
    async def test_a_connection_whose_queries_are_used_up_is_closed(self, postgres: LocalPostgres) -> None:
        async with opened(postgres, max_queries=2) as pool:
            slot, proxy = await lent(pool)
            await proxy.execute("SELECT 1")
            await proxy.execute("SELECT 1")
            slot.recall()
            await slot.restore(time.monotonic())
            assert (pool.came_back, slot.connection) == ([slot], None)

    @pins("_detach", "_on_release", "_con")
    async def test_what_was_recalled_is_dead_for_its_caller_and_alive_for_the_pool(
        self, postgres: LocalPostgres
    ) -> None:
        async with opened(postgres) as pool:
            slot, proxy = await lent(pool)
            statement = await proxy.prepare("SELECT 1")
            slot.recall()
            assert slot.connection is not None
            assert await slot.connection.fetchval("SELECT 2") == 2
            slot.free()
            again = await slot.lend()
            assert await again.fetchval("SELECT 3") == 3
            for call in (proxy.fetchval, statement.fetchval):
                with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                    await call("SELECT 4")

    @pins("_on_release")
    async def test_listeners_left_behind_are_warned_of_and_the_proxy_dies_nevertheless(
        self, postgres: LocalPostgres
    ) -> None:
        async with opened(postgres) as pool:
            slot, proxy = await lent(pool)
            await proxy.add_listener("news", lambda *_: None)
            with pytest.raises(asyncpg.InterfaceWarning, match="active notification listener"):  # warnings are errors
                slot.recall()
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                await proxy.fetchval("SELECT 1")
            await slot.restore(time.monotonic())
            assert pool.came_back == [slot]

    @pins("_release_on_close")
    @pytest.mark.parametrize("killed", [False, True], ids=["alive", "killed"])
    async def test_an_idle_connection_is_discarded_without_coming_back(
        self, killed: bool, postgres: LocalPostgres
    ) -> None:
        async with opened(postgres) as pool:
            [slot] = pool.slots
            await slot.open()
            slot.born = time.monotonic()
            connection = slot.connection
            if killed:
                await kill(postgres, slot)
                assert not slot.is_connected()
            slot.discard()
            slot.free()
            assert connection is not None
            assert connection.is_closed()
            assert (slot.connection, pool.came_back) == (None, [])

    async def test_a_slot_without_a_connection_can_be_discarded_and_freed(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool:
            [slot] = pool.slots
            slot.discard()
            slot.free()
            assert (slot.is_untouched(), pool.came_back) == (False, [])

    async def test_a_ping_is_answered_or_fails(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool:
            [slot] = pool.slots
            await slot.open()
            await slot.ping()
            assert slot.connection is not None
            slot.connection.terminate()
            with pytest.raises((asyncpg.InterfaceError, AssertionError)):
                await slot.ping()


@pytest.mark.anyio
class TestWhoseItIs:
    @pins("_holder", "_pool", "_con")
    async def test_a_pool_knows_what_it_has_handed_out(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool, opened(postgres) as other:
            slot, proxy = await lent(pool)
            _, foreign = await lent(other)
            assert slot_of(proxy, pool) is slot
            for stranger in (foreign, slot.connection, slot, None, object()):
                with pytest.raises(asyncpg.InterfaceError, match=r"Pool\.release\(\) received invalid connection: "):
                    slot_of(stranger, pool)
            slot.recall()
            assert slot_of(proxy, pool) is None

    async def test_a_connection_of_a_pool_of_asyncpgs_own_is_a_stranger(self, postgres: LocalPostgres) -> None:
        async def connect(*_: object, **__: object) -> Any:
            return await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)

        async with opened(postgres) as pool, asyncpg.create_pool(connect=connect, min_size=0) as theirs:  # noqa: SIM117
            async with theirs.acquire() as proxy:
                with pytest.raises(asyncpg.InterfaceError, match="not a member of this pool"):
                    slot_of(proxy, pool)


# ---------------------------------------------------------------------------------------------------------------------
# What a caller has left behind


@pytest.mark.anyio
class TestTraces:
    @pins("_log_listeners")
    async def test_a_connection_is_untouched_until_something_is_sent_or_left(self, postgres: LocalPostgres) -> None:
        async with opened(postgres) as pool:
            slot, proxy = await lent(pool)
            assert slot.is_untouched()

            def listener(*_: object) -> None:
                pass

            proxy.add_log_listener(listener)
            assert not slot.is_untouched()
            proxy.remove_log_listener(listener)
            assert slot.is_untouched()
            await proxy.execute("SELECT 1")
            assert not slot.is_untouched()
            slot.recall()
            slot.free()
            await slot.lend()
            assert slot.is_untouched()
            await kill(postgres, slot)
            assert not slot.is_untouched()

    @pytest.mark.parametrize(
        ("options", "free"),
        [
            pytest.param({"connection_class": NoReset}, True, id="nothing to send"),
            pytest.param({}, False, id="asyncpg's reset"),
            pytest.param({"connection_class": NoReset, "reset": asyncio.sleep}, False, id="the caller's reset"),
            pytest.param({"connection_class": NoReset, "max_queries": 1}, False, id="no query left"),
        ],
    )
    @pins("_reset", "_protocol", "_max_queries")
    async def test_a_session_needs_no_reset_where_asyncpg_would_send_nothing(
        self, options: dict[str, Any], free: bool, postgres: LocalPostgres
    ) -> None:
        async with opened(postgres, **options) as pool:
            slot, proxy = await lent(pool)
            await proxy.execute("SELECT 1")
            assert slot.needs_no_reset() is free
            if free:
                assert slot.connection is not None
                sent = slot.connection._protocol.queries_count  # type: ignore[attr-defined]
                slot.recall()
                await slot.restore(time.monotonic())
                assert slot.connection._protocol.queries_count == sent  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "leave",
        [
            pytest.param(lambda proxy: proxy.execute("BEGIN"), id="a transaction"),
            pytest.param(lambda proxy: proxy.transaction().start(), id="a transaction of asyncpg's"),
            pytest.param(lambda proxy: _end_behind_its_back(proxy), id="a transaction that asyncpg thinks is open"),
            pytest.param(lambda proxy: proxy.add_listener("news", lambda *_: None), id="a listener"),
            pytest.param(lambda proxy: _add_log_listener(proxy), id="a log listener"),
            pytest.param(lambda proxy: _cancel_a_query(proxy), id="a query that is being cancelled"),
            pytest.param(lambda proxy: proxy.close(), id="nothing"),
        ],
    )
    @pins("_top_xact", "_listeners", "_log_listeners", "_protocol", "_is_cancelling")
    async def test_a_session_needs_a_reset_where_its_caller_left_something(
        self, leave: Callable[[Any], Awaitable[None]], postgres: LocalPostgres
    ) -> None:
        async with opened(postgres, connection_class=NoReset) as pool:
            slot, proxy = await lent(pool)
            assert slot.needs_no_reset()
            await leave(proxy)
            assert not slot.needs_no_reset()

    async def test_a_query_that_was_cancelled_is_over_before_the_slot_comes_back(self, postgres: LocalPostgres) -> None:
        async with opened(postgres, connection_class=NoReset) as pool:
            slot, proxy = await lent(pool)
            await _cancel_a_query(proxy)
            slot.recall()
            async with asyncio.timeout(HANG):
                await slot.restore(time.monotonic())
            assert (pool.came_back, slot.is_connected()) == ([slot], True)
            again = await slot.lend()
            assert slot.needs_no_reset()
            assert await again.fetchval("SELECT 1") == 1

    @pins("_wait_for_cancellation")
    async def test_a_connection_that_ends_while_its_query_is_cancelled_needs_no_reset(
        self, postgres: LocalPostgres
    ) -> None:
        async with opened(postgres) as pool:
            slot, proxy = await lent(pool)
            await _cancel_a_query(proxy)
            slot.recall()
            restoring = asyncio.ensure_future(slot.restore(time.monotonic()))
            await asyncio.sleep(0)
            assert slot.connection is not None
            slot.connection.terminate()
            if "_pool_holder" not in asyncpg.Connection.__slots__:
                restoring.cancel()  # asyncpg 0.31 does not tell who waits; the pool gives that up at release_timeout
            async with asyncio.timeout(HANG):
                await asyncio.wait([restoring])
            assert restoring.cancelled() or restoring.exception() is None
            assert (pool.came_back, slot.is_connected()) == ([slot], False)


async def _end_behind_its_back(proxy: Any) -> None:
    await proxy.transaction().start()
    await proxy.execute("ROLLBACK")
    assert not proxy.is_in_transaction()


async def _add_log_listener(proxy: Any) -> None:
    proxy.add_log_listener(lambda *_: None)


async def _cancel_a_query(proxy: Any) -> None:
    # The server tells that the query runs: a cancel request that comes earlier has no effect.
    runs = asyncio.Event()
    proxy.add_log_listener(listener := lambda *_: runs.set())
    query = asyncio.ensure_future(proxy.execute("DO 'BEGIN RAISE NOTICE ''runs''; PERFORM pg_sleep(600); END'"))
    async with asyncio.timeout(HANG):
        await runs.wait()
    proxy.remove_log_listener(listener)
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query


# ---------------------------------------------------------------------------------------------------------------------
# Nothing else of asyncpg's insides is used

PACKAGE = Path(neon_async.__file__).parent
SOURCES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}

# Besides those of `_slots.py`: what the pool of our slots is told and asked by asyncpg, pinned above, and two names
# that stand where they are explained.
ELSEWHERE = {
    "_pool": {"_acquire"},  # what asyncpg's PoolAcquireContext calls: every test that acquires pins it
    "_connect": {"_con"},  # pinned above; `connection_tls_report()` of what a pool has handed out
    "_session": {"_get_statement"},  # pinned by tests/test_session.py: every way to prepare heals
}

# What asyncpg does not document, without an underscore.
IMPORTS = {
    "_slots": {"asyncpg.pool.PoolConnectionHolder", "asyncpg.pool.PoolConnectionProxy"},
    "_pool": {"asyncpg.pool.PoolAcquireContext"},
    "_connect": {"asyncpg.pool.PoolConnectionProxy"},
    "_session": {
        "asyncpg.cursor.CursorFactory",
        "asyncpg.cursor.CursorIterator",
        "asyncpg.prepared_stmt.PreparedStatement",
    },
    "_transaction": {
        "asyncpg.connresource.guarded",
        "asyncpg.transaction.ISOLATION_LEVELS",
        "asyncpg.transaction.Transaction",
    },
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def asyncpgs_private_names() -> set[str]:
    """Every private name that asyncpg's modules, its compiled one included, give to anything."""
    names = {name for kind in vars(protocol).values() if isinstance(kind, type) for name in dir(kind)}
    for path in Path(inspect.getfile(asyncpg)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
    return {name for name in names if is_private(name)} - {"_replace"}  # a namedtuple's, and public


THEIRS = asyncpgs_private_names() | {"_pool_holder"}  # which 0.31 does not have


class _Uses(ast.NodeVisitor):
    """Private names of asyncpg that a module uses: on `self` those of asyncpg's base classes, elsewhere all."""

    def __init__(self, module: object) -> None:
        self.found: set[str] = set()
        self._module = module
        self._bases: tuple[type[Any], ...] = ()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, cls = self._bases, getattr(self._module, node.name, object)
        self._bases = tuple(base for base in cls.__mro__ if base.__module__.startswith("asyncpg"))
        for one in node.body:
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                self._note_own(one.name)  # overridden
        self.generic_visit(node)
        self._bases = outer

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            self._note_own(node.attr)
        elif node.attr in THEIRS:
            self.found.add(node.attr)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__slots__" for target in node.targets):
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:  # getattr() and the like
        if isinstance(node.value, str) and node.value in THEIRS:
            self.found.add(node.value)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").startswith("asyncpg"):
            self.found |= {alias.name for alias in node.names} & THEIRS

    def _note_own(self, name: str) -> None:
        if is_private(name) and any(hasattr(base, name) for base in self._bases):
            self.found.add(name)


def private_names_in(module: object, source: str) -> set[str]:
    uses = _Uses(module)
    uses.visit(ast.parse(source))
    return uses.found


def test_every_private_name_of_asyncpg_is_pinned_and_stands_where_it_may() -> None:
    found: dict[str, set[str]] = {}
    for name, source in SOURCES.items():
        meets_asyncpg = "import asyncpg" in source or "from asyncpg" in source
        module = importlib.import_module(f"neon_async.{name}") if meets_asyncpg else None
        if names := private_names_in(module, source):
            found[name] = names
    assert found["_slots"] == PINNED - {"_acquire"}
    assert found == ELSEWHERE | {"_slots": found["_slots"]}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        pytest.param("def f(connection): return connection._protocol", "_protocol", id="attribute"),
        pytest.param("def f(connection): return getattr(connection, '_top_xact')", "_top_xact", id="getattr"),
        pytest.param(
            "from asyncpg.pool import _x; from asyncpg import connect_utils as c; c._connect()",
            "_connect",
            id="function",
        ),
        pytest.param("class Pool:\n def f(self): return self._queue", "_queue", id="inherited attribute"),
        pytest.param("class Pool:\n def _drop_type_cache(self): pass", "_drop_type_cache", id="overridden method"),
    ],
)
def test_a_private_name_that_is_used_anywhere_is_found(line: str, name: str) -> None:
    assert private_names_in(neon_async, line) == {name}


def test_what_asyncpg_does_not_document_is_imported_only_where_it_is_needed() -> None:
    found: dict[str, set[str]] = {}
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asyncpg."):
                found.setdefault(name, set()).update(f"{node.module}.{alias.name}" for alias in node.names)
    assert found == IMPORTS


# ---------------------------------------------------------------------------------------------------------------------
# Places


class AnyMoves(RuleBasedStateMachine):
    """Slots that move about, beside a plain list of where each stands and two plain stacks."""

    @initialize(size=st.integers(1, 6))
    def make(self, size: int) -> None:
        self.all = [Slot(None, max_queries=1) for _ in range(size)]
        self.slots = Slots(self.all)
        self.places = [Place.VACANT] * size
        self.stacks: dict[Place, list[int]] = {Place.VACANT: list(range(size)), Place.IDLE: []}

    def note(self, number: int, place: Place) -> None:
        for stack in self.stacks.values():
            if number in stack:
                stack.remove(number)
        if place in self.stacks:
            self.stacks[place].append(number)
        self.places[number] = place

    @rule(data=st.data(), place=st.sampled_from(Place))
    def any_slot_moves(self, data: st.DataObject, place: Place) -> None:
        number = data.draw(st.integers(0, len(self.all) - 1))
        self.slots.move(self.all[number], place)
        self.note(number, place)

    @rule(place=st.sampled_from(Place), stack=st.sampled_from([Place.VACANT, Place.IDLE]))
    def the_top_of_a_stack_moves(self, place: Place, stack: Place) -> None:
        stacked = self.slots.idle if stack is Place.IDLE else self.slots.vacant
        if stacked:
            assert stacked[-1] is self.all[self.stacks[stack][-1]]
            number = self.all.index(stacked[-1])
            self.slots.move(stacked[-1], place)
            self.note(number, place)

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        assert [slot.place for slot in self.slots] == self.places
        counts = {place: self.slots.count(place) for place in Place}
        assert counts == {place: self.places.count(place) for place in Place}
        assert sum(counts.values()) == len(self.slots) == len(self.all)

    @invariant()
    def idle_and_vacant_ones_are_stacks(self) -> None:
        assert [self.all.index(slot) for slot in self.slots.idle] == self.stacks[Place.IDLE]
        assert [self.all.index(slot) for slot in self.slots.vacant] == self.stacks[Place.VACANT]

    @invariant()
    def connected_ones_are_neither_vacant_nor_connecting(self) -> None:
        unconnected = self.places.count(Place.VACANT) + self.places.count(Place.CONNECTING)
        assert self.slots.connected == len(self.all) - unconnected


TestAnyMoves = AnyMoves.TestCase
TestAnyMoves.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_repr_tells_where_slots_stand() -> None:
    slots = Slots([Slot(None, max_queries=1), Slot(None, max_queries=1)])
    slots.move(slots.vacant[-1], Place.IN_USE)
    assert repr(slots).startswith("<Slots: 1 vacant, 0 connecting, 0 idle, ")
    assert [repr(slot) for slot in slots] == ["<Slot vacant>", "<Slot in_use>"]
