"""Connections that do not answer are no capacity, and one of them makes the others suspect.

A NAT forgets flows that were idle. Nothing closes then: what is sent on them is lost, or answered by a reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from support.probes import HANG, Relay, ResetInBackground, assert_balanced, make_pool, until, until_settled

import neon_async
from neon_async._pool import supply as _supply
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

SOON = 0.2
FOUR = 4


@pytest.fixture
async def relay(postgres: LocalPostgres) -> AsyncIterator[Relay]:
    async with Relay(postgres.port) as relay:
        yield relay


@contextlib.asynccontextmanager
async def pool_of_four(relay: Relay, postgres: LocalPostgres, **keywords: Any) -> AsyncIterator[neon_async.Pool]:
    """A pool of four idle connections through `relay`, each of which has been used."""
    keywords = {"init_size": FOUR, "check_after_idle": 1e6, "release_timeout": 1.0} | keywords
    async with neon_async.create_pool(relay.dsn(postgres.dsn), trust_anchor=postgres.trust_anchor, **keywords) as pool:
        try:
            for connection in [await pool.acquire() for _ in range(FOUR)]:
                await connection.fetchval("SELECT 1")
                await pool.release(connection)
            await until_settled(pool)
            await until(lambda: pool.stats().resets == FOUR)
            yield pool
        finally:
            pool.terminate()


async def outcome(pool: neon_async.Pool, **options: Any) -> Any:
    return (await asyncio.gather(pool.fetchval("SELECT 1", **options), return_exceptions=True))[0]


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


async def test_a_call_waits_for_no_ping_timeout_where_slots_are_vacant(relay: Relay, postgres: LocalPostgres) -> None:
    async with pool_of_four(relay, postgres, check_after_idle=1e-9) as pool, asyncio.timeout(HANG):
        relay.forget()
        assert await pool.fetchval("SELECT 1") == 1
        # The ping has not timed out yet, or the four connections would have ended.
        assert (pool.stats().checking, pool.stats().terminations, pool.stats().size) == (1, 0, FOUR + 1)
        await until(lambda: pool.stats().terminations == FOUR)
        assert await pool.fetchval("SELECT 1") == 1
        await until_settled(pool)


async def test_without_a_vacant_slot_a_call_waits_for_one_ping_timeout(relay: Relay, postgres: LocalPostgres) -> None:
    async with pool_of_four(relay, postgres, check_after_idle=1e-9, max_size=FOUR) as pool, asyncio.timeout(HANG):
        relay.forget()
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(3))) == [1] * 3
        assert pool.stats().terminations == FOUR
        await until_settled(pool)


@pytest.mark.filterwarnings("ignore:min_size")
async def test_connections_that_are_stuck_in_a_close_are_not_counted_for_min_size(
    relay: Relay, postgres: LocalPostgres
) -> None:
    async with pool_of_four(relay, postgres, min_size=FOUR) as pool, asyncio.timeout(HANG):
        relay.forget()
        await pool.expire_connections()
        assert await pool.fetchval("SELECT 1") == 1  # closes the four on its way
        await until(lambda: pool.stats().connecting)
        assert pool.stats().resetting == FOUR
        await until(lambda: pool.stats().idle == FOUR)
        await until_settled(pool)


async def test_connections_that_are_stuck_in_a_close_free_their_slots_soon(
    relay: Relay, postgres: LocalPostgres
) -> None:
    async with pool_of_four(relay, postgres, max_size=FOUR, release_timeout=10 * HANG) as pool, asyncio.timeout(HANG):
        relay.forget()
        await pool.expire_connections()
        assert await pool.fetchval("SELECT 1") == 1
        await until_settled(pool)


async def test_a_caller_is_refused_where_every_connection_is_stuck_in_a_reset(
    relay: Relay, postgres: LocalPostgres
) -> None:
    options: dict[str, Any] = {"max_size": FOUR, "max_waiting": 0, "connection_class": ResetInBackground}
    async with pool_of_four(relay, postgres, **options) as pool, asyncio.timeout(HANG):
        connections = [await pool.acquire() for _ in range(FOUR)]
        for connection in connections:
            await connection.fetchval("SELECT 1")
        relay.forget()
        releases = [asyncio.ensure_future(pool.release(connection)) for connection in connections]
        await until(lambda: pool.stats().resetting == FOUR)
        await until(lambda: "4 stuck" in repr(pool._supply.slots))
        with pytest.raises(neon_async.PoolBusyError, match="4 checked or reset"):
            await pool.acquire()
        pool.terminate()
        await asyncio.gather(*releases, return_exceptions=True)


async def test_a_slow_reset_that_ends_after_all_gives_its_connection_back(postgres: LocalPostgres) -> None:
    async def reset(connection: Any) -> None:
        await connection.execute("SELECT pg_sleep(0.6)")

    pool = neon_async.create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor, max_size=1, reset=reset)
    async with pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
        await until(lambda: "1 stuck" in repr(pool._supply.slots))
        assert_balanced(pool)
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid
        await until_settled(pool)


async def test_a_distant_server_has_the_time_to_answer_a_ping(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_supply, "_PING_TIMEOUT", 0.05)
    async with LocalEndpoint(postgres) as endpoint, make_pool(endpoint, check_after_idle=1e-9) as pool:
        endpoint.delay = 0.1  # 200 ms for a round trip, and at least as long for the handshake
        async with asyncio.timeout(HANG):
            pids = {await pool.fetchval("SELECT pg_backend_pid()") for _ in range(3)}
        assert len(pids) == pool.stats().dials == 1


async def test_a_slow_ping_that_is_answered_after_all_gives_its_connection_back(postgres: LocalPostgres) -> None:
    async with neon_async.testing.LocalEndpoint(postgres) as endpoint:
        pool = neon_async.create_pool(
            endpoint.dsn, trust_anchor=endpoint.trust_anchor, max_size=1, init_size=1, check_after_idle=1e-9
        )
        async with pool, asyncio.timeout(HANG):
            endpoint.freeze()
            caller = asyncio.ensure_future(pool.fetchval("SELECT 1"))
            await until(lambda: "1 silent" in repr(pool._supply.slots))
            assert_balanced(pool)
            endpoint.thaw()
            assert await caller == 1
            assert pool.stats().dials == 1
            await until_settled(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Suspicion


@pytest.mark.parametrize("max_size", [FOUR, 10])
async def test_one_timeout_makes_the_other_connections_suspect(
    relay: Relay, postgres: LocalPostgres, max_size: int
) -> None:
    async with pool_of_four(relay, postgres, max_size=max_size) as pool, asyncio.timeout(HANG):
        relay.forget()
        assert isinstance(await outcome(pool, timeout=SOON), TimeoutError)
        assert [await outcome(pool) for _ in range(FOUR)] == [1] * FOUR
        await until_settled(pool)


async def test_one_cancelled_statement_makes_the_other_connections_suspect(
    relay: Relay, postgres: LocalPostgres
) -> None:
    async with pool_of_four(relay, postgres) as pool, asyncio.timeout(HANG):
        relay.forget()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON):
                await pool.fetchval("SELECT 1")
        assert [await outcome(pool) for _ in range(FOUR)] == [1] * FOUR
        await until_settled(pool)


async def test_one_lost_connection_makes_the_other_connections_suspect(relay: Relay, postgres: LocalPostgres) -> None:
    async with pool_of_four(relay, postgres) as pool, asyncio.timeout(HANG):
        relay.forget(resets=True)
        async with pool.acquire() as connection:
            with pytest.raises(Exception):  # noqa: B017, PT011  the connection is lost
                await connection.fetchval("SELECT 1")
        assert [await outcome(pool) for _ in range(FOUR)] == [1] * FOUR
        await until_settled(pool)


async def test_one_reset_without_an_answer_makes_the_other_connections_suspect(
    relay: Relay, postgres: LocalPostgres
) -> None:
    async with pool_of_four(relay, postgres, connection_class=ResetInBackground) as pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            relay.forget()
        await until(lambda: "1 stuck" in repr(pool._supply.slots))
        assert [await outcome(pool) for _ in range(FOUR)] == [1] * FOUR
        await until_settled(pool)


async def test_a_statement_that_timed_out_is_no_sign_of_life(relay: Relay, postgres: LocalPostgres) -> None:
    async with pool_of_four(relay, postgres, max_size=FOUR) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        slot = pool._supply.slot_of(cast(Any, connection)._holder)
        before = slot.heard_at
        relay.forget()
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT 1", timeout=SOON)
        released = asyncio.ensure_future(pool.release(connection))
        await until(lambda: pool.stats().resetting == 1)
        assert slot.heard_at == before
        pool.terminate()
        await asyncio.gather(released, return_exceptions=True)


async def test_connections_that_were_heard_of_since_are_trusted(relay: Relay, postgres: LocalPostgres) -> None:
    async with pool_of_four(relay, postgres) as pool, asyncio.timeout(HANG):
        async with pool.acquire() as slow:
            with pytest.raises(TimeoutError):
                await slow.fetchval("SELECT pg_sleep(3600)", timeout=SOON)
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT 1")
            await until(lambda: pool.stats().resets == FOUR + 1)
        await until_settled(pool)
        now = time.monotonic()
        slot = pool._supply.take_idle(now)
        assert slot is not None, "the one that has just been used is pinged"


async def test_suspect_connections_that_answer_stay_open(relay: Relay, postgres: LocalPostgres) -> None:
    async with pool_of_four(relay, postgres) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(3600)", timeout=SOON)
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(FOUR))) == [1] * FOUR
        await until_settled(pool)
        assert pool.stats().terminations == 0
