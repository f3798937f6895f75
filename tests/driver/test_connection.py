"""The class of connections: the same from `connect()` and from a pool, with the caller's class in front of ours."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import itertools
from collections.abc import AsyncIterator, Awaitable
from typing import Any, ClassVar

import asyncpg
import pytest
from support.probes import HANG, connected, make_pool

import neon_async
from neon_async._driver.connection import Connection, combine, resets_itself
from neon_async._driver.pooled import PooledConnection
from neon_async._driver.transaction import Transaction
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


# ---------------------------------------------------------------------------------------------------------------------
# Classes of callers


class WithSlots(asyncpg.Connection):
    __slots__ = ("note",)


class WithDict(asyncpg.Connection):
    pass


class Mixin:
    def double(self, number: int) -> int:
        return 2 * number


class WithMixin(Mixin, asyncpg.Connection):
    pass


class OfOurs(neon_async.Connection):
    pass


class OfOursWithSlots(neon_async.Connection):
    __slots__ = ("note",)


class Left(asyncpg.Connection):
    def get_reset_query(self) -> str:
        return f"SELECT 'left'; {super().get_reset_query()}"


class Right(asyncpg.Connection):
    def get_reset_query(self) -> str:
        return f"SELECT 'right'; {super().get_reset_query()}"


class Diamond(Left, Right):
    pass


class DiamondWithOurs(Left, OfOurs):
    pass


CLASSES = [
    asyncpg.Connection,
    neon_async.Connection,
    WithSlots,
    WithDict,
    WithMixin,
    OfOurs,
    OfOursWithSlots,
    Diamond,
    DiamondWithOurs,
]

BASES = pytest.mark.parametrize(
    "base", CLASSES, ids=[f"{base.__module__.split('.')[0]}.{base.__name__}" for base in CLASSES]
)


@pytest.fixture(params=["direct", "pooled"])
def server(request: pytest.FixtureRequest) -> Any:
    """A server by the name of its direct host, and by the name of its pooled host."""
    return request.getfixturevalue("postgres" if request.param == "direct" else "pgbouncer")


@contextlib.asynccontextmanager
async def from_connect(server: Any, base: type[Any]) -> AsyncIterator[Any]:
    async with connected(server, connection_class=base) as connection:
        yield connection


@contextlib.asynccontextmanager
async def from_pool(server: Any, base: type[Any]) -> AsyncIterator[Any]:
    async with make_pool(server, connection_class=base) as pool, pool.acquire() as connection:
        yield connection


SOURCES = pytest.mark.parametrize("source", [from_connect, from_pool], ids=["connect", "pool"])


def itself(connection: Any) -> Any:
    """Return a connection without the proxy that a pool lends."""
    return getattr(connection, "_con", connection)


# ---------------------------------------------------------------------------------------------------------------------
# One class


class TestOneClass:
    @BASES
    async def test_connect_and_a_pool_return_the_same_class(self, server: Any, base: type[Any]) -> None:
        ours = Connection if isinstance(server, LocalPostgres) else PooledConnection
        async with from_connect(server, base) as one, from_pool(server, base) as lent:
            cls = type(one)
            assert type(itself(lent)) is cls
            # isinstance() is true for every connection of asyncpg, whatever its class.
            assert issubclass(cls, base)
            assert issubclass(cls, ours)
            assert issubclass(cls, neon_async.Connection)
            if not issubclass(ours, base):
                assert f"{cls.__module__}.{cls.__qualname__}" == f"{base.__module__}.{base.__qualname__}"
                assert repr(one).startswith(f"<{base.__module__}.{base.__qualname__} object at ")
                assert cls.__doc__ == base.__doc__
            assert await one.fetchval("SELECT 1") == await lent.fetchval("SELECT 1") == 1

    @BASES
    def test_there_is_one_class_for_each_pair(self, base: type[Any]) -> None:
        for ours in (Connection, PooledConnection):
            cls = combine(base, ours)
            assert combine(base, ours) is cls
            assert combine(cls, ours) is cls
            assert issubclass(cls, base)
            assert issubclass(cls, ours)

    def test_a_class_that_is_ours_already_stays_as_it_is(self) -> None:
        assert combine(asyncpg.Connection, Connection) is Connection
        assert combine(neon_async.Connection, Connection) is Connection
        assert combine(neon_async.Connection, PooledConnection) is PooledConnection
        assert combine(OfOurs, Connection) is OfOurs
        assert combine(OfOurs, PooledConnection) is not OfOurs

    @SOURCES
    @pytest.mark.parametrize("base", [WithSlots, WithDict, OfOurs, OfOursWithSlots])
    async def test_a_caller_can_keep_attributes_on_a_connection(
        self, server: Any, base: type[Any], source: Any
    ) -> None:
        async with source(server, base) as connection:
            itself(connection).note = "kept"
            assert connection.note == "kept"

    @SOURCES
    async def test_methods_of_a_mixin_are_there(self, server: Any, source: Any) -> None:
        async with source(server, WithMixin) as connection:
            assert connection.double(4) == 8

    @pytest.mark.parametrize(
        ("base", "first"),
        [
            pytest.param(Diamond, ["'left'", "'right'"], id="diamond"),
            pytest.param(DiamondWithOurs, ["'left'"], id="diamond with ours"),
        ],
    )
    async def test_super_reaches_every_class_of_a_diamond_and_then_ours(
        self, postgres: LocalPostgres, base: type[Any], first: list[str]
    ) -> None:
        async with from_connect(postgres, base) as connection:
            parts = connection.get_reset_query().split("; ")
            assert parts[: len(first)] == [f"SELECT {text}" for text in first]
            assert "SET SESSION AUTHORIZATION DEFAULT" in parts
            await connection.reset(timeout=HANG)


# ---------------------------------------------------------------------------------------------------------------------
# Methods that the caller overrides

_INSERT = "INSERT INTO overridden VALUES ($1)"


class MyStatement:
    """A statement that asyncpg 0.31 can use when it copies records."""

    def __init__(self, statement: Any) -> None:
        self._statement = statement

    def __getattr__(self, name: str) -> Any:
        return getattr(self._statement, name)

    def __getitem__(self, _: int) -> str:
        return "mine"


class Overriding(asyncpg.Connection):
    """Notes the calls, each with a keyword of its own, and returns what nothing else does."""

    calls: ClassVar[list[tuple[str, str]]] = []

    def _note(self, name: str, tag: str) -> None:
        self.calls.append((name, tag))

    async def execute(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("execute", tag)
        return "mine", await super().execute(*args, **keywords)

    async def executemany(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("executemany", tag)
        return "mine", await super().executemany(*args, **keywords)  # type: ignore[func-returns-value]

    async def fetch(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("fetch", tag)
        return "mine", await super().fetch(*args, **keywords)

    async def fetchval(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("fetchval", tag)
        return "mine", await super().fetchval(*args, **keywords)

    async def fetchrow(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("fetchrow", tag)
        return "mine", await super().fetchrow(*args, **keywords)

    async def fetchmany(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("fetchmany", tag)
        return "mine", await super().fetchmany(*args, **keywords)

    async def prepare(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("prepare", tag)
        return MyStatement(await super().prepare(*args, **keywords))

    async def copy_from_table(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("copy_from_table", tag)
        return "mine", await super().copy_from_table(*args, **keywords)

    async def copy_from_query(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("copy_from_query", tag)
        return "mine", await super().copy_from_query(*args, **keywords)

    async def copy_to_table(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("copy_to_table", tag)
        return "mine", await super().copy_to_table(*args, **keywords)

    async def copy_records_to_table(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("copy_records_to_table", tag)
        return "mine", await super().copy_records_to_table(*args, **keywords)

    async def close(self, *, tag: str = "default", **keywords: Any) -> Any:
        self._note("close", tag)
        return "mine", await super().close(**keywords)  # type: ignore[func-returns-value]

    def cursor(self, *args: Any, tag: str = "default", **keywords: Any) -> Any:
        self._note("cursor", tag)
        return "mine", super().cursor(*args, **keywords)

    def get_reset_query(self, *, tag: str = "default") -> Any:
        self._note("get_reset_query", tag)
        return f"SELECT 'mine'; {super().get_reset_query()}"


@pytest.fixture
async def overridden(postgres: LocalPostgres) -> AsyncIterator[None]:
    """A table for the calls that write."""
    async with connected(postgres) as admin:
        await admin.execute("CREATE TABLE overridden (a int)")
        Overriding.calls.clear()
        yield
        await admin.execute("DROP TABLE overridden")


# The name of a method, its arguments, its own keywords, and whether a pool has it, too.
METHODS = [
    ("execute", ["SELECT 1"], {}, True),
    ("execute", [_INSERT, 1], {}, True),
    ("executemany", [_INSERT, [(1,)]], {}, True),
    ("fetch", ["SELECT $1::int", 1], {}, True),
    ("fetchval", ["SELECT 1, 2"], {"column": 1}, True),
    ("fetchrow", ["SELECT 1"], {"timeout": HANG}, True),
    ("fetchmany", [f"{_INSERT} RETURNING a", [(1,)]], {}, True),
    ("prepare", ["SELECT 1"], {}, False),
    ("cursor", ["SELECT 1"], {"prefetch": 5}, False),
    ("copy_from_table", ["overridden"], {"output": functools.partial(io.BytesIO)}, True),
    ("copy_from_query", ["SELECT 1"], {"output": functools.partial(io.BytesIO)}, True),
    ("copy_to_table", ["overridden"], {"source": functools.partial(io.BytesIO, b"1\n")}, True),
    ("copy_records_to_table", ["overridden"], {"records": functools.partial(list, [(1,)])}, True),
    ("get_reset_query", [], {}, False),
    ("close", [], {"timeout": HANG}, False),
]


def made(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in keywords.items()}


@pytest.mark.usefixtures("overridden")
class TestOverriddenMethods:
    @SOURCES
    @pytest.mark.parametrize(
        ("name", "arguments", "keywords"),
        [pytest.param(*one[:3], id=f"{number} {one[0]}") for number, one in enumerate(METHODS)],
    )
    async def test_it_is_called_with_its_own_defaults_and_keywords_and_its_result_is_returned(
        self, server: Any, source: Any, name: str, arguments: list[Any], keywords: dict[str, Any]
    ) -> None:
        async with source(server, Overriding) as connection:
            for tags in ({}, {"tag": "own"}):
                if name == "close" and tags:
                    break  # it can be closed once
                Overriding.calls.clear()
                result = getattr(connection, name)(*arguments, **made(keywords), **tags)
                result = await result if isinstance(result, Awaitable) else result
                assert result[0] == "mine" or result.startswith("SELECT 'mine'")
                assert Overriding.calls[0] == (name, tags.get("tag", "default"))
                assert [called for called, _ in Overriding.calls].count(name) == 1

    @pytest.mark.parametrize(
        ("name", "arguments", "keywords"),
        [pytest.param(*one[:3], id=f"{number} {one[0]}") for number, one in enumerate(METHODS) if one[3]],
    )
    async def test_the_pools_own_calls_go_through_it(
        self, server: Any, name: str, arguments: list[Any], keywords: dict[str, Any]
    ) -> None:
        async with make_pool(server, connection_class=Overriding) as pool:
            result = await getattr(pool, name)(*arguments, **made(keywords))
            assert result[0] == "mine"
            assert (name, "default") in Overriding.calls

    async def test_the_pool_sends_the_callers_reset_query(self, postgres: LocalPostgres) -> None:
        class Counting(asyncpg.Connection):
            def get_reset_query(self) -> str:
                return f"INSERT INTO overridden VALUES (7); {super().get_reset_query()}"

        async with make_pool(postgres, connection_class=Counting) as pool:
            connection = await pool.acquire()
            await connection.execute("SELECT 1")
            await pool.release(connection)
            assert await pool.fetchval("SELECT a FROM overridden") == 7


class Strict(asyncpg.Connection):
    """Transactions are serializable and read-only unless the caller asks for something else."""

    def transaction(self, *, isolation: Any = "serializable", readonly: bool = True, deferrable: bool = False) -> Any:
        return super().transaction(isolation=isolation, readonly=readonly, deferrable=deferrable)


class StrictByOurs(neon_async.Connection):
    def transaction(
        self, *, isolation: Any = "serializable", readonly: bool = True, deferrable: bool = False, **claims: Any
    ) -> Any:
        return super().transaction(isolation=isolation, readonly=readonly, deferrable=deferrable)


async def settings_of(connection: Any) -> tuple[str, str, str]:
    names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
    isolation, readonly, deferrable = [await connection.fetchval(f"SHOW {name}") for name in names]
    return isolation, readonly, deferrable


class TestOverriddenTransaction:
    @SOURCES
    @pytest.mark.parametrize("base", [Strict, StrictByOurs])
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            pytest.param({}, ("serializable", "on", "off"), id="its own defaults"),
            pytest.param({"deferrable": True}, ("serializable", "on", "on"), id="one argument"),
            pytest.param(
                {"isolation": "repeatable_read", "readonly": False}, ("repeatable read", "off", "off"), id="others"
            ),
        ],
    )
    async def test_it_is_called_with_its_own_defaults_and_arguments(
        self, server: Any, source: Any, base: type[Any], options: dict[str, Any], expected: tuple[str, ...]
    ) -> None:
        async with source(server, base) as connection:
            transaction = connection.transaction(**options)
            assert isinstance(transaction, Transaction)
            async with transaction:
                assert await settings_of(connection) == expected

    @pytest.mark.parametrize("base", [Strict, StrictByOurs])
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            pytest.param({}, ("serializable", "on", "off"), id="its own defaults"),
            pytest.param({"readonly": False}, ("serializable", "off", "off"), id="one argument"),
            pytest.param({"isolation": "repeatable_read"}, ("repeatable read", "on", "off"), id="another"),
        ],
    )
    async def test_run_transaction_leaves_it_its_defaults(
        self, server: Any, base: type[Any], options: dict[str, Any], expected: tuple[str, ...]
    ) -> None:
        async with make_pool(server, connection_class=base) as pool:
            assert await pool.run_transaction(settings_of, **options) == expected

    @SOURCES
    async def test_its_result_is_what_the_caller_gets(self, server: Any, source: Any) -> None:
        class Elsewhere(asyncpg.Connection):
            def transaction(self, **_: Any) -> Any:
                return contextlib.nullcontext("a result of its own")

        async with source(server, Elsewhere) as connection, connection.transaction() as result:
            assert result == "a result of its own"

    async def test_run_transaction_refuses_a_transaction_whose_end_it_cannot_follow(
        self, postgres: LocalPostgres
    ) -> None:
        class Elsewhere(asyncpg.Connection):
            def transaction(self, **_: Any) -> Any:
                return contextlib.nullcontext()

        async with make_pool(postgres, connection_class=Elsewhere) as pool:
            with pytest.raises(neon_async.ConfigurationError, match=r"returns nullcontext, .* Return that\."):
                await pool.run_transaction(settings_of)

    @SOURCES
    async def test_a_closed_connection_begins_none(self, server: Any, source: Any) -> None:
        async with source(server, asyncpg.Connection) as lent:
            connection = itself(lent)
            connection.terminate()
            with pytest.raises(asyncpg.InterfaceError, match="closed"):
                connection.transaction()


# ---------------------------------------------------------------------------------------------------------------------
# Reset


def unconnected(cls: Any) -> Any:
    connection = cls.__new__(cls)
    connection._aborted = True  # closed
    return connection


class TestReset:
    @pytest.mark.parametrize("base", [asyncpg.Connection, WithSlots, OfOurs])
    async def test_reset_cleans_everything_that_a_caller_can_leave(
        self, postgres: LocalPostgres, base: type[Any]
    ) -> None:
        async with connected(postgres) as other, from_connect(postgres, base) as connection:
            user = await connection.fetchval("SELECT current_user")
            await other.execute("DROP SEQUENCE IF EXISTS numbers; CREATE SEQUENCE numbers CACHE 100")
            await connection.execute("SELECT nextval('numbers'), pg_advisory_lock(11)")
            await connection.execute("CREATE TEMP TABLE left_over (a int); DECLARE c CURSOR WITH HOLD FOR SELECT 1")
            await connection.execute("SET search_path = nowhere; SET ROLE pg_monitor")
            await connection.add_listener("news", lambda *_: None)
            await connection.reset(timeout=HANG)
            assert await connection.fetchval("SELECT current_user") == user
            assert await connection.fetchval("SHOW search_path") == '"$user", public'
            assert await other.fetchval("SELECT pg_try_advisory_xact_lock(11)")
            assert await connection.fetchval("SELECT to_regclass('left_over')") is None
            assert await connection.fetchval("SELECT count(*) FROM pg_cursors WHERE name = 'c'") == 0
            assert await connection.fetchval("SELECT count(*) FROM pg_listening_channels()") == 0
            assert await connection.fetchval("SELECT nextval('numbers')") == 101  # the cached 99 are dropped
            await other.execute("DROP SEQUENCE numbers")

    async def test_reset_keeps_prepared_statements_and_takes_one_message(self, postgres: LocalPostgres) -> None:
        async with connected(postgres) as connection:
            statement = await connection.prepare("SELECT 5")
            queries: list[str] = []
            with connection.query_logger(lambda record: queries.append(record.query)):
                await connection.reset(timeout=HANG)
                await asyncio.sleep(0)
            assert queries == [connection.get_reset_query()]
            assert await statement.fetchval() == 5

    async def test_a_cancelled_reset_is_cancelled(self, postgres: LocalPostgres) -> None:
        async with LocalEndpoint(postgres) as endpoint, connected(endpoint) as connection:
            endpoint.freeze()
            task = asyncio.create_task(connection.reset())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            connection.terminate()

    def test_a_class_resets_itself_where_a_class_in_front_of_asyncpgs_has_a_reset(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class OwnReset(asyncpg.Connection):
            async def reset(self, **_: Any) -> None:
                pass

        class ResetMixin:
            async def reset(self, **_: Any) -> None:
                pass

        class ByMixin(ResetMixin, asyncpg.Connection):
            pass

        def judged() -> list[bool]:
            classes = (asyncpg.Connection, WithSlots, OfOurs, OwnReset, ByMixin)
            ours: tuple[type[Connection[Any]], ...] = (Connection, PooledConnection)
            pairs = itertools.product(classes, ours)
            return [resets_itself(unconnected(combine(base, own))) for base, own in pairs]

        expected = [False] * 6 + [True] * 4
        assert judged() == expected
        original = asyncpg.Connection.reset
        monkeypatch.setattr(asyncpg.Connection, "reset", lambda *args, **keywords: original(*args, **keywords))
        assert judged() == expected, "a tracer that replaces asyncpg's function changes nothing"
