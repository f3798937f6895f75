"""`pool_class=`: a subclass of `Pool` with methods and overrides of its own, as other packages build on asyncpg's."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import Any

import asyncpg
import pytest
from asyncpg.pool import PoolAcquireContext
from support.probes import HANG, make_pool, until

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


def pool_of(postgres: LocalPostgres, **options: Any) -> Any:
    """Return a pool; which class it is of, `make_pool` does not know."""
    return make_pool(postgres, **options)


class Methods:
    """A mixin that adds methods to pools and to connections."""

    async def answer(self: Any) -> int:
        number: int = await self.fetchval("SELECT 42")
        return number


class WithMethods(Methods, neon_async.Pool):
    pass


class WithState(neon_async.Pool):
    """A pool that counts what it does."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.acquired = 0
        self.queries: list[str] = []

    def acquire(self, *, timeout: float | None = None) -> Any:
        self.acquired += 1
        return super().acquire(timeout=timeout)

    async def fetchval(self, query: str, *args: object, **options: Any) -> Any:
        self.queries.append(query)
        return await super().fetchval(query, *args, **options)


class WithOwnContext(neon_async.Pool):
    """A pool with an acquire context of asyncpg's, as it was written before."""

    def acquire(self, *, timeout: float | None = None) -> Any:
        return PoolAcquireContext(self, timeout)


class WithOwnEnds(neon_async.Pool):
    """A pool that notes what ends: a loan, and the pool itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ends: list[str] = []

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        self.ends.append("release")
        await super().release(connection, timeout=timeout)

    def terminate(self) -> None:
        self.ends.append("terminate")
        super().terminate()


class OfRows(neon_async.Pool[asyncpg.Record]):
    pass


async def test_a_pool_has_the_methods_and_the_state_of_its_class(postgres: LocalPostgres) -> None:
    async with pool_of(postgres, pool_class=WithMethods) as pool:
        assert await pool.answer() == 42
        assert type(pool) is WithMethods
        assert isinstance(pool, asyncpg.Pool)
    async with pool_of(postgres, pool_class=WithState) as pool:
        assert await pool.fetchval("SELECT 1") == 1
        async with pool.acquire(timeout=HANG) as connection:
            assert await connection.fetchval("SELECT 2") == 2
        async with pool.transaction() as connection:
            assert await connection.fetchval("SELECT 3") == 3
        assert (pool.acquired, pool.queries) == (3, ["SELECT 1"])


@pytest.mark.parametrize("opened", ["async with", "await"])
async def test_opening_a_pool_returns_the_pool_of_the_class(postgres: LocalPostgres, opened: str) -> None:
    pool = pool_of(postgres, pool_class=WithMethods)
    entered = await (pool.__aenter__() if opened == "async with" else pool)
    assert entered is pool
    await pool.close()


@pytest.mark.parametrize("pool_class", [WithState, WithOwnContext, OfRows])
async def test_every_call_that_acquires_by_itself_works_with_an_overridden_acquire(
    postgres: LocalPostgres, pool_class: type[Any]
) -> None:
    async with pool_of(postgres, pool_class=pool_class, max_size=1) as pool:
        assert await pool.fetchval("SELECT 1", timeout=HANG) == 1
        assert [*await pool.fetchrow("SELECT 1")] == [1]
        assert await pool.execute("SELECT 1") == "SELECT 1"
        assert len(await pool.fetch("SELECT 1")) == 1
        assert await pool.executemany("SELECT $1::int", [(1,)]) is None
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(600)", timeout=0.01)

        async def work(connection: Any) -> Any:
            return await connection.fetchval("SELECT 5")

        assert await pool.run_transaction(work) == 5
        await until(lambda: pool.get_idle_size() == 1 or not pool.get_size())


async def test_a_release_of_the_class_ends_every_loan_as_on_asyncpg(postgres: LocalPostgres) -> None:
    async with pool_of(postgres, pool_class=WithOwnEnds, max_size=1) as pool:
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        assert pool.ends == ["release"]
        await pool.fetchval("SELECT 1")
        async with pool.transaction():
            pass
        with pytest.raises(ZeroDivisionError):
            async with pool.acquire():
                raise ZeroDivisionError
        await pool.release(await pool.acquire())
        assert pool.ends == ["release"] * 5
        assert (pool.get_size(), pool.get_idle_size()) == (1, 1)
    assert pool.ends == ["release"] * 5  # closing is not terminating


async def test_a_terminate_of_the_class_is_called_where_closing_fails(postgres: LocalPostgres) -> None:
    for limit in ({"timeout": 0.01}, {}):
        pool = pool_of(postgres, pool_class=WithOwnEnds)
        await pool
        await pool.acquire()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if limit else 0.01):
                await pool.close(**limit)
        assert pool.ends == ["terminate"]


async def test_a_connection_class_and_a_pool_class_go_together(postgres: LocalPostgres) -> None:
    class OwnConnection(Methods, asyncpg.Connection):
        pass

    async with pool_of(postgres, pool_class=WithMethods, connection_class=OwnConnection) as pool:
        async with pool.acquire() as connection:
            assert isinstance(connection._con, OwnConnection)
            assert await connection._con.answer() == 42
        assert await pool.answer() == 42


@pytest.mark.parametrize("of", ["the pool", "the class", "a subclass"])
async def test_a_call_of_the_pool_uses_an_acquire_that_replaces_ours(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    acquire, acquired = neon_async.Pool.acquire, []

    async with pool_of(postgres, pool_class=WithState if of == "a subclass" else neon_async.Pool) as pool:

        def noting(*_: Any, timeout: float | None = None) -> Any:
            acquired.append(timeout)
            return acquire(pool, timeout=timeout)

        monkeypatch.setattr(
            {"the pool": pool, "the class": neon_async.Pool, "a subclass": WithState}[of], "acquire", noting
        )
        assert await pool.fetchval("SELECT 1") == 1
    assert acquired == [None]


async def test_a_call_of_the_pool_leaves_a_connection_class_its_own_default_timeout(postgres: LocalPostgres) -> None:
    seen: list[float | None] = []

    class OwnConnection(neon_async.Connection):
        async def fetchval(self, query: str, *args: Any, timeout: float | None = 7.5) -> Any:  # type: ignore[override]  # noqa: ASYNC109
            seen.append(timeout)
            return await super().fetchval(query, *args, timeout=timeout)

        async def execute(self, query: str, *args: Any) -> str:  # type: ignore[override]
            return await super().execute(query, *args)

    for options in ({}, {"pool_class": WithState}):
        async with pool_of(postgres, connection_class=OwnConnection, **options) as pool:
            assert await pool.fetchval("SELECT 1") == 1
            assert seen == [7.5]
            assert await pool.fetchval("SELECT 1", timeout=HANG) == 1
            assert seen[1] is not None
            assert 7.5 < seen[1] <= HANG
            assert await pool.execute("SELECT 1") == "SELECT 1"
        seen.clear()


@pytest.mark.parametrize(
    ("pool_class", "shown"),
    [
        pytest.param(asyncpg.Pool, "the class asyncpg.pool.Pool", id="asyncpg's pool"),
        pytest.param(asyncpg.Connection, "the class asyncpg.connection.Connection", id="a connection"),
        pytest.param(WithMethods.__init__, "a value of type function", id="a function"),
        pytest.param("Pool", "'Pool'", id="a name"),
        pytest.param(None, "None", id="None"),
    ],
)
def test_any_other_class_is_refused_by_the_call(pool_class: Any, shown: str) -> None:
    dsn = "postgresql://alex:secret@db.example.com/neondb"
    with pytest.raises(neon_async.ConfigurationError) as caught:
        neon_async.create_pool(dsn, pool_class=pool_class)
    assert str(caught.value) == f"pool_class must be a subclass of neon_async.Pool, not {shown}."
    assert not isinstance(caught.value, neon_async.InsecureConfigurationError)


def test_the_signature_names_the_class() -> None:
    assert inspect.signature(neon_async.create_pool).parameters["pool_class"].default is neon_async.Pool


@pytest.mark.parametrize("cls", [neon_async.Pool, neon_async.Connection])
def test_annotations_with_the_class_of_rows_can_be_evaluated(cls: Any) -> None:
    assert cls[asyncpg.Record].__origin__ is cls


async def test_a_subclass_does_not_keep_the_event_loop_from_ending(postgres: LocalPostgres) -> None:
    async with asyncio.timeout(HANG), pool_of(postgres, pool_class=WithState, init_size=1) as pool:
        assert pool.get_size() == 1
