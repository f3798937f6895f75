"""What a pool shows of itself: its repr, TLS report, stats and log records, none of them with a secret."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest
from support.certificates import issue
from support.probes import HANG, assert_balanced, make_pool, password_of, until, until_settled

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

ROOT = issue(subject="root", ca=True)
DSN = "postgresql://alex:s3cret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"
NAME = "ep-cool-darkness-123456"


@pytest.mark.anyio
async def test_the_repr_of_a_pool_shows_its_state_and_no_secret(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, init_size=2)
    assert repr(pool) == f"<Pool {NAME}: 0 in use, 0 idle, 0 waiting>"
    async with pool:
        async with pool.acquire():
            assert repr(pool) == f"<Pool {NAME}: 1 in use, 1 idle, 0 waiting>"
        assert repr(pool) == f"<Pool {NAME}: 0 in use, 2 idle, 0 waiting>"
    assert repr(pool) == f"<Pool {NAME}: 0 in use, 0 idle, 0 waiting, closed>"


@pytest.mark.anyio
async def test_tls_report_describes_the_latest_handshake(postgres: LocalPostgres) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Stats


@pytest.mark.anyio
async def test_stats_show_the_state_of_every_slot(postgres: LocalPostgres) -> None:
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
async def test_stats_count_events_and_their_seconds(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        fresh = pool.stats()
        counters = [name.removesuffix("_seconds") for name in dir(fresh) if name.endswith("_seconds")]
        assert len(counters) == 11
        assert {getattr(fresh, name, None) for name in dir(fresh) if name.endswith("_seconds")} == {0.0}

        async with pool.acquire() as connection:
            await connection.execute("SELECT pg_sleep(0.01)")
            with pytest.raises(neon_async.PoolTimeoutError):
                await pool.acquire(timeout=0.01)
        await until(lambda: pool.stats().resets == 1)
        await pool.expire_connections()
        await pool.fetchval("SELECT 1")
        await until(lambda: pool.stats().resets == 2)
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
        assert fresh.acquires == 0  # the earlier snapshot is unchanged


def test_stats_cannot_be_changed() -> None:
    stats = neon_async.create_pool(DSN, trust_anchor=ROOT.pem).stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.waiting = 7  # type: ignore[misc]
    assert not hasattr(stats, "__dict__")


# ---------------------------------------------------------------------------------------------------------------------
# Log records


@pytest.mark.anyio
async def test_a_leaked_connection_is_logged_with_the_stack_that_acquired_it(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    async def forgetful() -> Any:
        return await pool.acquire()

    async with make_pool(postgres, leak_after=0.05) as pool:
        async with pool.acquire():
            pass  # released in time: not a leak
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
async def test_each_change_of_state_is_logged_in_one_line(
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
async def test_the_text_of_an_error_of_the_password_function_is_not_logged(
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
