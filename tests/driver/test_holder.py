"""The private names of asyncpg that `holder` uses exist and mean what it takes them for."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import asyncpg
import pytest
from support.probes import connected, make_pool, until

from neon_async._driver.holder import ConnectionHooks, adopt_running_loop, session_of
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


def test_the_mixin_overrides_a_method_of_asyncpg_with_the_same_parameters() -> None:
    asyncpgs = inspect.signature(asyncpg.Connection._cancel).parameters  # type: ignore[attr-defined]
    ours = inspect.signature(ConnectionHooks._cancel).parameters
    assert list(ours)[: len(asyncpgs)] == list(asyncpgs)
    assert inspect.iscoroutinefunction(asyncpg.Connection._cancel)  # type: ignore[attr-defined]
    assert ConnectionHooks.__slots__ == ()


async def test_a_connection_has_the_attributes_that_a_cancel_request_needs(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        assert issubclass(type(connection), ConnectionHooks)
        assert connection._protocol.backend_pid == await connection.fetchval("SELECT pg_backend_pid()")
        assert isinstance(connection._protocol.backend_secret, int)
        assert connection._config.command_timeout is None
        assert connection._aborted is False
        assert connection._cancellations == set()
        connection.terminate()
        assert connection._aborted is True


async def test_asyncpg_runs_a_cancel_request_as_a_task_that_it_keeps_until_the_end(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, tuple[Any, ...]]] = []
    genuine = ConnectionHooks._cancel

    async def record(connection: Any, *arguments: Any) -> None:
        calls.append((asyncio.current_task() in connection._cancellations, arguments))
        await genuine(connection, *arguments)

    monkeypatch.setattr(ConnectionHooks, "_cancel", record)
    async with connected(postgres) as connection:
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)", timeout=0.05)
        assert await connection.fetchval("SELECT 1") == 1
        await until(lambda: not connection._cancellations)
    ((was_kept, (waiter, *_)),) = calls
    assert was_kept
    assert isinstance(waiter, asyncio.Future)
    assert waiter.done()


async def test_a_connection_and_its_statement_cache_hold_the_adopted_loop(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        loop = asyncio.get_running_loop()
        connection._loop = connection._stmt_cache._loop = None
        adopt_running_loop(connection)
        assert (connection._loop, connection._stmt_cache._loop) == (loop, loop)


async def test_a_session_is_found_on_a_connection_and_on_its_proxy_until_it_is_released(
    postgres: LocalPostgres,
) -> None:
    async with make_pool(postgres) as pool:
        async with pool.acquire() as proxy:
            session = session_of(proxy)
            assert session is not None
            assert session_of(proxy._con) is session
        assert session_of(proxy) is None
    assert session_of(pool) is None
