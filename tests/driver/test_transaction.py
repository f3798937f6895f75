"""A transaction is left in bounded time, also when the server is silent, on a lone connection and through the pool."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import asyncpg
import asyncpg.transaction
import pytest
from support.probes import HANG
from support.transactions import (
    CONFLICTS,
    LOSSES,
    Bench,
    Mishap,
    Unproxied,
    cut_in_commit,
    killed_in_a_statement,
    within_transaction,
)

import neon_async
from neon_async._driver import transaction as _transaction
from neon_async._driver.holder import own_session
from neon_async._driver.session import cancel_time_for

pytestmark = pytest.mark.anyio


NESTED = pytest.mark.parametrize("nested", [False, True], ids=["outermost", "nested"])


class TestLeaving:
    async def test_it_is_rolled_back_and_the_connection_stays_usable(self, bench: Bench) -> None:
        async def body() -> None:
            await bench.add(connection)
            raise Mishap

        async with bench.acquire() as connection:
            with pytest.raises(Mishap):
                await within_transaction(connection, body)
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1
        assert await bench.kept() == []

    async def test_a_healthy_connection_survives_a_timeout(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            with pytest.raises(TimeoutError):
                await within_transaction(connection, lambda: connection.execute("SELECT pg_sleep(60)", timeout=0.05))
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1

    @NESTED
    async def test_the_error_of_a_lost_connection_is_raised_as_it_is(self, bench: Bench, nested: bool) -> None:
        """asyncpg's own block raises InterfaceError instead, because it cannot roll back."""
        async with bench.acquire() as connection:
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await within_transaction(connection, lambda: killed_in_a_statement(bench, connection), nested=nested)

    async def test_a_distant_server_has_the_time_to_cancel_and_to_roll_back(self, bench: Bench) -> None:
        """The inner block is rolled back, and the connection and the outer transaction live on."""
        bench.endpoint.delay = 0.07  # 140 ms for a round trip
        async with asyncio.timeout(HANG), bench.acquire() as connection, connection.transaction():
            await bench.add(connection, 1)
            with pytest.raises(TimeoutError):
                await within_transaction(connection, lambda: connection.execute("SELECT pg_sleep(60)", timeout=0.3))
            await bench.add(connection, 2)
        assert await bench.kept() == [1, 2]

    @pytest.mark.parametrize(("handshake", "expected"), [(0.0, 0.5), (0.14, 1.34), (0.5, 3.5), (60.0, 5.0)])
    def test_the_time_to_cancel_grows_with_the_handshake(self, handshake: float, expected: float) -> None:
        assert cancel_time_for(handshake) == pytest.approx(expected)

    async def test_an_error_is_not_hidden_by_a_rollback_that_is_lost(self, bench: Bench) -> None:
        async def body() -> None:
            await bench.kill(connection)  # which the client has not noticed yet
            raise Mishap

        async with bench.acquire() as connection:
            with pytest.raises(Mishap):
                await within_transaction(connection, body)
            assert connection.is_closed()

    @NESTED
    @pytest.mark.parametrize("error", [TimeoutError, asyncio.CancelledError, Mishap])
    async def test_a_rollback_without_an_answer_ends_the_connection(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], nested: bool
    ) -> None:
        in_time, late = (0.02, 2 * HANG) if error is Mishap else (2 * HANG, 0.02)
        monkeypatch.setattr(_transaction, "_ROLLBACK_TIMEOUT", in_time)

        async def body() -> None:
            bench.endpoint.freeze()
            raise error

        async with bench.acquire() as connection, asyncio.timeout(HANG):
            own_session(connection).cancel_time = late
            with pytest.raises(error):
                await within_transaction(connection, body, nested=nested)
            assert connection.is_closed()

    @NESTED
    async def test_a_second_cancellation_ends_the_connection_at_once(self, bench: Bench, nested: bool) -> None:
        async def body() -> None:
            bench.endpoint.freeze()
            await connection.execute("SELECT 1")

        async with bench.acquire() as connection:
            own_session(connection).cancel_time = 2 * HANG
            task = asyncio.ensure_future(within_transaction(connection, body, nested=nested))
            for _ in range(2):
                await asyncio.wait({task}, timeout=0.1)
                assert task.cancel(), "one cancellation is not enough: the block waits for the ROLLBACK"
            async with asyncio.timeout(HANG):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert connection.is_closed()

    async def test_a_cancellation_during_the_rollback_replaces_the_error(self, bench: Bench) -> None:
        async def body() -> None:
            bench.endpoint.freeze()
            raise Mishap

        async with bench.acquire() as connection:
            task = asyncio.ensure_future(within_transaction(connection, body))
            await asyncio.wait({task}, timeout=0.1)
            assert task.cancel(), "the block waits for the ROLLBACK"
            async with asyncio.timeout(HANG):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert connection.is_closed()

    async def test_a_connection_that_was_released_is_not_ended(self, pool: neon_async.Pool) -> None:
        """Another caller may have it by now."""

        async def body() -> None:
            await pool.release(connection)
            raise Mishap

        connection: Any = await pool.acquire()
        pid = connection.get_server_pid()
        with pytest.raises(Mishap):
            await within_transaction(connection, body)
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid


# ---------------------------------------------------------------------------------------------------------------------
# Through the pool


class TestThroughThePool:
    async def test_it_returns_the_result_of_the_work(self, bench: Bench, pool: neon_async.Pool) -> None:
        async def work(connection: Any) -> str:
            await bench.add(connection)
            async with connection.transaction():
                await bench.add(connection)
            return "done"

        assert await pool.run_transaction(work) == "done"
        assert await bench.kept() == [1, 1]
        assert pool.stats().retries == 0

    @pytest.mark.parametrize(("failure", "options"), [*CONFLICTS, *LOSSES])
    async def test_it_retries_on_the_only_slot(
        self, bench: Bench, pool: neon_async.Pool, failure: Any, options: Any
    ) -> None:
        await bench.add(bench.admin, 0)
        runs = 0

        async def work(connection: Any) -> None:
            nonlocal runs
            runs += 1
            await bench.add(connection, 1)
            if runs == 1:
                await failure(bench, Unproxied(connection))

        async with asyncio.timeout(HANG):
            await pool.run_transaction(work, **options)
        assert (await bench.kept()).count(1) == 1
        assert pool.stats().retries == 1
        assert pool.stats().retry_seconds > 0

    async def test_a_commit_of_unknown_outcome_leaves_the_pool_usable(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        await bench.at_commit("PERFORM pg_sleep(60)")
        ending = asyncio.ensure_future(cut_in_commit(bench))
        with pytest.raises(neon_async.CommitUnknownError):
            await pool.run_transaction(bench.add)
        await ending
        assert await pool.fetchval("SELECT 1") == 1

    async def test_a_frozen_server_does_not_hold_the_work_past_its_deadline_and_no_slot_is_lost(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        async def work(connection: Any) -> None:
            await bench.add(connection)
            bench.endpoint.freeze()
            await connection.execute("SELECT 1")

        async with asyncio.timeout(HANG):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.run_transaction(work), 0.3)
            bench.endpoint.thaw()
            assert await pool.fetchval("SELECT 1") == 1
        assert await bench.kept() == []


def test_the_isolation_levels_are_those_of_asyncpg() -> None:
    assert set(get_args(neon_async.IsolationLevel)) == asyncpg.transaction.ISOLATION_LEVELS
