"""A pool opens once, in one event loop, with as many connections as asked for, or leaves nothing open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from support.certificates import issue
from support.probes import HANG, connected, make_pool, nothing_is_left, password_of, until, until_gone

import neon_async
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Impostor

ROOT = issue(subject="root", ca=True)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda pool: pool.acquire(), id="acquire"),
        pytest.param(lambda pool: pool.fetchval("SELECT 1"), id="fetchval"),
        pytest.param(lambda pool: pool.transaction().__aenter__(), id="transaction"),
        pytest.param(lambda pool: pool.run_transaction(print), id="run_transaction"),
        pytest.param(lambda pool: pool.close(), id="close"),
        pytest.param(lambda pool: asyncio.to_thread(pool.terminate), id="terminate"),
    ],
)
async def test_a_pool_that_is_not_open_says_how_to_open_it(
    postgres: LocalPostgres, use: Callable[[neon_async.Pool], Awaitable[object]]
) -> None:
    with pytest.raises(neon_async.PoolClosedError, match="Open it with `async with pool:` or `await pool`") as caught:
        await use(make_pool(postgres))
    assert "pool is not initialized" in str(caught.value)  # asyncpg's words


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
async def test_a_pool_that_is_not_open_cannot_be_used(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    with pytest.raises(asyncpg.InterfaceError, match="not initialized") as caught:
        await pool.fetchval("SELECT 1")
    assert not neon_async.is_unavailable(caught.value), "a programming error"
    with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
        await pool.close()
    async with pool:
        pass


@pytest.mark.anyio
async def test_a_second_task_cannot_open_a_pool_that_is_opening(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, init_size=2)
    first = asyncio.ensure_future(pool.__aenter__())
    await asyncio.sleep(0)
    with pytest.raises(asyncpg.InterfaceError, match="being initialized in another task"):
        await pool
    with pytest.raises(neon_async.PoolClosedError, match="being initialized") as caught:
        await pool.acquire()
    assert neon_async.is_unavailable(caught.value), "the service starts"
    assert await first is pool
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


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


# ---------------------------------------------------------------------------------------------------------------------
# Opening that fails


@pytest.mark.anyio
async def test_a_pool_that_cannot_open_raises_the_cause_and_leaves_nothing_open(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        pool = neon_async.create_pool(postgres.dsn, trust_anchor=ROOT.pem, init_size=3)
        with pytest.raises(neon_async.CertificateError):
            await pool
        assert (pool.get_size(), pool.is_closing()) == (0, True)


def password_that_fails_from(calls: int, password: str) -> Callable[[], str]:
    """Return a password function that fails from call number `calls` on."""
    past_calls = []

    def answer() -> str:
        past_calls.append(1)
        if len(past_calls) >= calls:
            raise RuntimeError("the vault is sealed")
        return password

    return answer


@pytest.mark.anyio
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
async def test_a_pool_that_fails_while_it_opens_leaves_no_connection(postgres: LocalPostgres, calls: int) -> None:
    password = password_of(postgres)
    name = f"halfway {calls} {id(object())}"
    async with connected(postgres) as admin, nothing_is_left():
        pool = make_pool(
            postgres, init_size=5, application_name=name, password=password_that_fails_from(calls, password)
        )
        with pytest.raises(RuntimeError, match="the vault is sealed"):
            async with pool:
                pytest.fail("the pool opened")
        await until_gone(admin, name)


@pytest.mark.anyio
async def test_a_pool_whose_opening_is_cancelled_leaves_nothing_open(postgres: LocalPostgres) -> None:
    async with Impostor(lambda conversation: None) as impostor, asyncio.timeout(HANG), nothing_is_left():
        pool = neon_async.create_pool(impostor.dsn, trust_anchor=ROOT.pem, init_size=3)
        task = asyncio.ensure_future(pool.__aenter__())
        await until(lambda: impostor.conversations)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.is_closing()
        del task
