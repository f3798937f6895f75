"""A pool loses no slot under load, and after acquires, connects and queries that fail."""

from __future__ import annotations

import asyncio

import pytest
from support.certificates import issue
from support.probes import HANG, Relay, assert_secret_free, black_hole, make_pool, password_of, until, until_settled
from support.waiting import until_served

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

ROOT = issue(subject="root", ca=True)
DSN = "postgresql://alex:s3cret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"


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


async def test_an_acquire_cancelled_while_connecting_leaves_the_slot_usable(postgres: LocalPostgres) -> None:
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


async def test_a_failed_connect_leaves_the_slot_usable(postgres: LocalPostgres) -> None:
    answers = ["wrong", password_of(postgres)]
    async with make_pool(postgres, max_size=1, password=lambda: answers.pop(0)) as pool, asyncio.timeout(HANG):
        with pytest.raises(neon_async.InvalidPasswordError):
            await pool.fetchval("SELECT 1")
        assert await until_served(pool, neon_async.InvalidPasswordError) == 1


async def test_each_connect_of_a_pool_has_its_own_deadline() -> None:
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


async def test_a_query_that_times_out_frees_its_connection(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool, asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(3600)", timeout=0.05)
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.get_size() == 1


async def test_a_pool_reconnects_after_the_server_restarts() -> None:
    async with LocalPostgres() as server, make_pool(server, init_size=2) as pool, asyncio.timeout(HANG):
        await server.stop()
        await until(lambda: pool.get_size() == 0)
        with pytest.raises(neon_async.PoolTimeoutError) as caught:
            await pool.fetchval("SELECT 1", timeout=0.3)
        assert isinstance(caught.value.__cause__, neon_async.ConnectError)
        await server.start()
        assert await pool.fetchval("SELECT 1") == 1
