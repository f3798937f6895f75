"""An idle pool sends nothing, closes connections that are idle or old, and checks a connection before it lends it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import selectors
import time
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support.probes import (
    HANG,
    assert_whole,
    connected,
    make_pool,
    password_of,
    sessions,
    until,
    until_gone,
    until_settled,
)

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres, wake_time=0.2) as endpoint:
        yield endpoint


class Clock:
    """The wall clock and the monotonic clock of this machine, which a test can move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._wall = self._monotonic = 0.0
        wall, monotonic = time.time, time.monotonic
        monkeypatch.setattr(time, "time", lambda: wall() + self._wall)
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + self._monotonic)

    def advance(self, seconds: float) -> None:
        """Move both clocks. On asyncio the timers that are due run next; uvloop reads a clock of its own."""
        self._wall += seconds
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Move the wall clock only, as after a sleep of this machine."""
        self._wall += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def use(pool: neon_async.Pool, count: int) -> list[Any]:
    """Acquire `count` connections, release them all, and return the process ids of their sessions."""
    connections = [await pool.acquire(timeout=HANG) for _ in range(count)]
    pids = [connection.get_server_pid() for connection in connections]
    for connection in reversed(connections):
        await pool.release(connection)
    return pids


# ---------------------------------------------------------------------------------------------------------------------
# An idle pool


async def test_opening_a_pool_makes_no_connection(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint) as pool:
        assert pool.get_min_size() == 0
        await asyncio.sleep(0.05)
    assert endpoint.connects == 0


async def test_an_idle_pool_sends_nothing(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=3) as pool:
        await pool.fetchval("SELECT 1")
        await until(lambda: pool.stats().resets == 1)
        connects, sent = endpoint.connects, endpoint.client_bytes
        await asyncio.sleep(0.3)
        assert (endpoint.connects, endpoint.client_bytes) == (connects, sent)


@pytest.mark.parametrize("end", [LocalEndpoint.suspend, LocalEndpoint.cut], ids=["suspend", "cut"])
async def test_a_server_that_closes_idle_connections_causes_no_reconnect(
    endpoint: LocalEndpoint, end: Callable[[LocalEndpoint], None]
) -> None:
    async with make_pool(endpoint, init_size=3) as pool:
        end(endpoint)
        await until(lambda: pool.get_size() == 0)
        await until_settled(pool)
        await asyncio.sleep(0.1)
        assert (endpoint.connects, endpoint.wakes) == (3, 0)
        assert (pool.stats().vacant, pool.stats().terminations) == (10, 3)
        await assert_whole(pool)


@pytest.mark.parametrize("min_size", [0, 2])
def test_an_idle_pool_does_not_wake_the_event_loop(postgres: LocalPostgres, min_size: int) -> None:
    """This includes connections that `min_size` keeps open beyond their idle lifetime."""

    class Counting(selectors.DefaultSelector):
        turns = 0

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            Counting.turns += 1
            return super().select(timeout)

    async def idle() -> int:
        dsn = postgres.dsn.replace(postgres.host, "localhost")
        async with neon_async.create_pool(
            dsn,
            trust_anchor=postgres.trust_anchor,
            min_size=min_size,
            init_size=2,
            max_inactive_connection_lifetime=0.05,
        ) as pool:
            await until_settled(pool)
            await asyncio.sleep(0.1)
            before = Counting.turns
            await asyncio.sleep(0.3)
            assert pool.get_size() == min_size
            return Counting.turns - before

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Counting())) as runner:
        assert runner.run(idle()) < 20


async def test_idle_connections_close_at_the_end_of_their_idle_lifetime(endpoint: LocalEndpoint) -> None:
    name = f"inactive {id(endpoint)}"
    async with (
        connected(endpoint) as admin,
        make_pool(endpoint, init_size=3, max_inactive_connection_lifetime=0.1, application_name=name) as pool,
    ):
        connects = endpoint.connects
        await until(lambda: pool.stats().vacant == 10)
        await until_gone(admin, name)
        assert pool.stats().terminations == 3
        assert endpoint.connects == connects
        await until_settled(pool)


async def test_a_connection_in_regular_use_stays_open(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, init_size=2, max_inactive_connection_lifetime=0.5) as pool, asyncio.timeout(HANG):
        pids = await use(pool, 1)
        while pool.get_size() > 1:
            assert await use(pool, 1) == pids
            await asyncio.sleep(0.01)
        assert await use(pool, 1) == pids


@pytest.mark.parametrize("name", ["max_lifetime", "max_inactive_connection_lifetime"])
async def test_a_lifetime_below_the_resolution_of_a_timer_is_respected(postgres: LocalPostgres, name: str) -> None:
    async with make_pool(postgres, init_size=3, **{name: 1e-4}) as pool:
        await until(lambda: pool.stats().vacant == 10)
        await until_settled(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Lifetimes


async def test_a_connection_past_its_lifetime_is_not_lent(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, init_size=1, max_lifetime=0.2) as pool:
        [pid] = await use(pool, 1)
        time.sleep(0.25)  # noqa: ASYNC251  the timer that would close it cannot run before the acquire
        assert await use(pool, 1) != [pid]
        assert pool.stats().terminations == 1


async def test_a_connection_past_its_lifetime_is_closed_on_release(postgres: LocalPostgres) -> None:
    name = f"old {id(object())}"
    async with (
        connected(postgres) as admin,
        make_pool(postgres, max_size=1, max_lifetime=0.1, application_name=name) as pool,
    ):
        async with pool.acquire(timeout=HANG) as connection:
            while await connection.fetchval("SELECT now() - backend_start < '0.15 s' FROM pg_stat_activity LIMIT 1"):
                pass
            await asyncio.sleep(0.15)
            assert await connection.fetchval("SELECT 1") == 1  # a connection in use is not closed
        await until_settled(pool)
        assert pool.stats().vacant == 1
        await until_gone(admin, name)


async def test_a_connection_past_its_lifetime_is_closed_while_idle(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, init_size=3, max_lifetime=0.2, max_inactive_connection_lifetime=0) as pool:
        await until(lambda: pool.stats().vacant == 10)
        assert (pool.stats().terminations, pool.stats().dials) == (3, 3)


async def test_lifetimes_differ_by_up_to_a_tenth(postgres: LocalPostgres, clock: Clock) -> None:
    """Connections made together do not expire together. By chance all twenty are alike once in a million runs."""
    keywords: dict[str, Any] = {"max_inactive_connection_lifetime": 0, "check_after_idle": 1e6, "acquire_timeout": 1e6}
    async with make_pool(postgres, max_size=20, init_size=20, connect_timeout=3600, **keywords) as pool:
        before = set(await use(pool, 20))
        clock.advance(3600 * 0.9 - HANG)
        assert set(await use(pool, 20)) == before
        clock.advance(HANG + 3600 * 0.05)
        await asyncio.sleep(0)
        kept = before & {connection.get_server_pid() for connection in [await pool.acquire() for _ in range(20)]}
        assert 0 < len(kept) < 20
        pool.terminate()


async def test_no_connection_outlives_its_lifetime(postgres: LocalPostgres, clock: Clock) -> None:
    async with make_pool(
        postgres, max_size=3, init_size=3, max_inactive_connection_lifetime=0, acquire_timeout=1e6
    ) as pool:
        before = set(await use(pool, 3))
        clock.advance(3600)
        assert not before & set(await use(pool, 3))


async def test_a_lifetime_of_0_is_unlimited(postgres: LocalPostgres, clock: Clock) -> None:
    async with make_pool(postgres, init_size=1, max_inactive_connection_lifetime=0, max_lifetime=0) as pool:
        pids = await use(pool, 1)
        clock.advance(1e7)
        await asyncio.sleep(0.01)
        assert await use(pool, 1) == pids


# ---------------------------------------------------------------------------------------------------------------------
# min_size and init_size


def test_min_size_on_a_neon_host_warns_once_at_the_line_of_the_caller(postgres: LocalPostgres) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_pool(postgres, init_size=2)
        assert not caught
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        neon_async.create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor, min_size=2)
    [warning] = caught
    assert warning.category is UserWarning
    assert (warning.filename, warning.lineno) == (__file__, line)
    for part in ("min_size=2", "ep-cool-darkness-123456", "wakes", "billed", "init_size"):
        assert part in str(warning.message)
    assert password_of(postgres) not in str(warning.message)


def test_min_size_on_another_host_does_not_warn(postgres: LocalPostgres) -> None:
    make_pool_at_localhost(postgres, min_size=2)


def make_pool_at_localhost(postgres: LocalPostgres, **keywords: Any) -> neon_async.Pool:
    dsn = postgres.dsn.replace(postgres.host, "localhost")
    return neon_async.create_pool(dsn, trust_anchor=postgres.trust_anchor, **keywords)


async def test_min_size_connections_stay_open_and_are_replaced_when_they_end(postgres: LocalPostgres) -> None:
    name = f"min_size {id(object())}"
    async with (
        connected(postgres) as admin,
        make_pool_at_localhost(
            postgres, min_size=2, max_size=4, max_inactive_connection_lifetime=0.1, application_name=name
        ) as pool,
        asyncio.timeout(HANG),
    ):
        pids = set(await use(pool, 4))
        await until(lambda: pool.get_size() == 2)
        await asyncio.sleep(0.3)
        assert pool.get_size() == 2
        kept = set(await use(pool, 2))
        assert kept < pids

        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name)
        await until(lambda: pool.stats().terminations >= 4)
        await until(lambda: pool.get_size() == 2)
        await until_settled(pool)
        assert not kept & set(await use(pool, 2))
        assert await sessions(admin, name) == 2


async def test_min_size_connections_past_their_lifetime_are_replaced(postgres: LocalPostgres) -> None:
    async with make_pool_at_localhost(postgres, min_size=2, max_lifetime=0.3) as pool, asyncio.timeout(HANG):
        await until(lambda: pool.stats().terminations >= 2)
        await until(lambda: pool.get_size() == 2)


async def test_min_size_is_restored_with_few_attempts_while_the_server_refuses(endpoint: LocalEndpoint) -> None:
    with pytest.warns(UserWarning, match="min_size"):
        pool = make_pool(endpoint, min_size=3)
    async with pool:
        endpoint.refuse()
        endpoint.cut()
        await asyncio.sleep(1.0)
        assert endpoint.connects <= 3 + 6
        endpoint.accept()
        await until(lambda: pool.get_size() == 3)
        await until_settled(pool)


async def test_init_size_applies_only_when_the_pool_opens(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=3) as pool:
        assert (pool.get_size(), endpoint.connects) == (3, 3)
        endpoint.suspend()
        await until(lambda: pool.get_size() == 0)
        assert await pool.fetchval("SELECT 1") == 1
        await until_settled(pool)
        assert (pool.get_size(), endpoint.connects) == (1, 4)


async def test_opening_waits_for_a_compute_that_wakes(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()
    async with asyncio.timeout(HANG), make_pool(endpoint, init_size=4) as pool:
        assert (pool.get_size(), endpoint.connects, endpoint.wakes) == (4, 4, 1)
        assert pool.stats().idle == 4


# ---------------------------------------------------------------------------------------------------------------------
# Checks of idle connections


async def test_a_connection_that_was_idle_for_long_is_pinged_before_it_is_lent(
    endpoint: LocalEndpoint, clock: Clock
) -> None:
    async with make_pool(endpoint, init_size=1, acquire_timeout=1e6, max_inactive_connection_lifetime=0) as pool:
        pids = await use(pool, 1)
        sent = endpoint.client_bytes
        clock.advance(29)
        assert await use(pool, 1) == pids
        assert endpoint.client_bytes == sent
        clock.advance(31)
        assert await use(pool, 1) == pids
        assert endpoint.client_bytes > sent
        assert (pool.stats().dials, pool.stats().terminations) == (1, 0)
        await until_settled(pool)


async def test_one_ping_timeout_terminates_every_connection_that_was_idle_as_long(endpoint: LocalEndpoint) -> None:
    """The network is silent, as with a firewall that has forgotten the connections: no end of stream arrives."""
    async with make_pool(endpoint, init_size=5, max_size=5, check_after_idle=0) as pool, asyncio.timeout(HANG):
        pids = await use(pool, 5)
        await until_settled(pool)
        endpoint.freeze()
        sent = endpoint.client_bytes
        caller = asyncio.ensure_future(pool.fetchval("SELECT pg_backend_pid()"))
        await until(lambda: pool.stats().checking)
        assert (pool.stats().checking, pool.stats().idle, pool.stats().connecting) == (1, 4, 0)
        await until(lambda: pool.stats().connecting)
        assert (pool.stats().terminations, pool.stats().checking, pool.stats().idle) == (5, 0, 0)
        assert endpoint.client_bytes == sent
        endpoint.thaw()
        assert await caller not in pids
        await until_settled(pool)


async def test_several_callers_wait_for_one_ping_timeout_only(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=5, max_size=5, check_after_idle=0) as pool, asyncio.timeout(HANG):
        pids = set(await use(pool, 5))
        endpoint.freeze()
        callers = [asyncio.ensure_future(pool.fetchval("SELECT pg_backend_pid()")) for _ in range(3)]
        await until(lambda: pool.stats().checking == 3)
        await until(lambda: pool.stats().terminations == 5)
        assert pool.stats().checking == 0
        endpoint.thaw()
        assert not pids & set(await asyncio.gather(*callers))


async def test_a_check_whose_waiter_has_timed_out_leaves_an_idle_connection(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=1, check_after_idle=0) as pool:
        endpoint.freeze()
        with pytest.raises(neon_async.PoolTimeoutError):
            await pool.acquire(timeout=0.05)
        endpoint.thaw()
        await until(lambda: pool.stats().idle == 1)
        await until_settled(pool)
        assert (pool.stats().dials, pool.stats().terminations) == (1, 0)


async def test_a_connection_that_has_ended_is_replaced_without_an_error(endpoint: LocalEndpoint) -> None:
    """The end of the stream may arrive during the acquire: the ping notices it, or the pool before the ping."""
    async with make_pool(endpoint, init_size=3, max_size=3, check_after_idle=0) as pool, asyncio.timeout(HANG):
        for _ in range(10):
            endpoint.cut()
            assert await pool.fetchval("SELECT 1") == 1
        await assert_whole(pool)


async def test_an_acquire_without_a_query_does_not_postpone_the_ping(endpoint: LocalEndpoint, clock: Clock) -> None:
    async with make_pool(endpoint, init_size=1, acquire_timeout=1e6, max_inactive_connection_lifetime=0) as pool:
        sent = endpoint.client_bytes
        for _ in range(3):
            await use(pool, 1)
            clock.advance(20)
        await use(pool, 1)
        assert endpoint.client_bytes > sent


async def test_after_a_clock_jump_every_idle_connection_is_checked_once(endpoint: LocalEndpoint, clock: Clock) -> None:
    async with make_pool(endpoint, init_size=3, max_size=3) as pool:
        pids = await use(pool, 3)
        sent = endpoint.client_bytes
        clock.jump(1)  # a correction by NTP
        assert await use(pool, 3) == pids
        assert endpoint.client_bytes == sent
        for seconds in (3600, -3600):
            clock.jump(seconds)
            sent_by_each = []
            connections = []
            for _ in range(3):
                connections.append(await pool.acquire())
                sent_by_each.append(endpoint.client_bytes - sent)
                sent = endpoint.client_bytes
            assert len(set(sent_by_each)) == 1
            assert sent_by_each[0] > 0
            for connection in connections:
                await pool.release(connection)
            await use(pool, 3)
            assert endpoint.client_bytes == sent
        assert (pool.stats().dials, pool.stats().terminations) == (3, 0)


async def test_a_connection_that_was_in_use_during_a_clock_jump_is_checked_before_the_next_loan(
    endpoint: LocalEndpoint, clock: Clock
) -> None:
    async with make_pool(endpoint, max_size=2, init_size=2) as pool:
        first, second = await pool.acquire(), await pool.acquire()
        clock.jump(3600)
        await pool.release(first)
        await pool.release(second)
        sent = endpoint.client_bytes
        await use(pool, 2)
        assert endpoint.client_bytes > sent


async def test_after_a_clock_jump_dead_connections_are_replaced(
    endpoint: LocalEndpoint, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    async with make_pool(endpoint, init_size=3) as pool, asyncio.timeout(HANG):
        pids = await use(pool, 3)
        endpoint.freeze()
        clock.jump(600)
        caller = asyncio.ensure_future(pool.fetchval("SELECT pg_backend_pid()"))
        await until(lambda: pool.stats().terminations == 3)
        assert pool.stats().connecting == 1
        endpoint.thaw()
        assert await caller not in pids
    assert sum("the clock jumped" in record.message for record in caplog.records) == 1
