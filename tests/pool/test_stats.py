"""The stats of a pool: a snapshot whose counts have their seconds and balance, and that is taken without effects."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import itertools
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias, get_type_hints

import pytest
from support.probes import HANG, assert_balanced, connected, make_pool, password_of, until, until_settled

import neon_async
from neon_async._pool.tallies import SECONDS_OF, Tallies, Tally
from neon_async.testing import LocalEndpoint, LocalPostgres

NAME = "ep-cool-darkness-123456"
FIELDS = get_type_hints(neon_async.PoolStats)
# What the docstring promises of every snapshot.
BALANCES = re.findall(r"`([^`]+==[^`]+)`", neon_async.PoolStats.__doc__ or "")


def snapshot(**known: Any) -> neon_async.PoolStats:
    return neon_async.PoolStats(**{name: known.get(name, 0) for name in FIELDS})


# ---------------------------------------------------------------------------------------------------------------------
# The snapshot and the tallies


def test_a_snapshot_cannot_be_changed() -> None:
    stats: Any = snapshot(size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.size = 2
    assert not hasattr(stats, "__dict__")
    assert stats == snapshot(size=1) != snapshot(size=2)


def test_a_snapshot_is_made_by_names_only() -> None:
    positional: Any = neon_async.PoolStats
    with pytest.raises(TypeError):
        positional(*range(len(FIELDS)))


def test_every_count_has_its_seconds() -> None:
    seconds = {name for name, kind in FIELDS.items() if kind is float}
    assert seconds == set(SECONDS_OF.values()) == {name for name in FIELDS if name.endswith("_seconds")}
    assert {FIELDS[name] for name in SECONDS_OF} == {int}
    assert len(set(SECONDS_OF.values())) == len(SECONDS_OF)


def test_seconds_are_named_after_their_count() -> None:
    for count, seconds in SECONDS_OF.items():
        singular = seconds.removesuffix("_seconds")
        assert count in (f"{singular}s", re.sub("y$", "ies", singular)), (count, seconds)


def test_the_docstring_balances_fields_that_exist() -> None:
    assert len(BALANCES) == 3
    for balance in BALANCES:
        names = {node.id for node in ast.walk(ast.parse(balance)) if isinstance(node, ast.Name)}
        assert names <= FIELDS.keys()


def test_tallies_have_the_names_of_the_fields() -> None:
    tallies = Tallies()
    for number, name in enumerate(SECONDS_OF):
        for _ in range(number):
            getattr(tallies, name).add(0.5)
    expected: dict[str, float] = {}
    for number, (count, seconds) in enumerate(SECONDS_OF.items()):
        expected |= {count: number, seconds: number * 0.5}
    assert tallies.snapshot() == expected
    assert set(Tallies.__slots__) == set(Tallies.__annotations__) == set(SECONDS_OF)
    assert snapshot(**tallies.snapshot()).terminations == list(SECONDS_OF).index("terminations")


def test_a_tally_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    assert (tally.count, tally.seconds, repr(tally)) == (0, 0.0, "<Tally: 0 in 0.000 s>")
    tally.add(1.25)
    monkeypatch.setattr("time.monotonic", lambda: 100.5)
    tally.since(100.0)
    assert (tally.count, tally.seconds, repr(tally)) == (2, 1.75, "<Tally: 2 in 1.750 s>")


# ---------------------------------------------------------------------------------------------------------------------
# The stats of a pool


@pytest.mark.anyio
async def test_the_balances_of_the_docstring_hold_from_before_the_pool_opens_until_after_it_has_closed(
    postgres: LocalPostgres,
) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> neon_async.PoolStats:
        stats = pool.stats()
        seen.append(dataclasses.asdict(stats))
        for balance in BALANCES:
            assert eval(balance, {"__builtins__": {}}, seen[-1]), (balance, stats)
        return stats

    pool = make_pool(postgres, max_size=3)
    assert look().vacant == 3
    async with connected(postgres) as admin, pool:
        async with pool.acquire() as first, pool.acquire() as second:
            assert (look().in_use, look().size) == (2, 2)
            await second.fetchval("SELECT 1")
            await admin.execute("SELECT pg_terminate_backend($1)", await first.fetchval("SELECT pg_backend_pid()"))
            await until(lambda: look().in_use == 1)
        assert look().idle == 1
        await until(lambda: look().resets == 1)
        ended = look()
        assert (ended.in_use, ended.vacant, ended.acquires, ended.releases, ended.dials) == (0, 2, 2, 2, 2)
        assert (ended.resets, ended.terminations, ended.wakes, ended.dial_failures) == (1, 1, 1, 0)
        await pool.close(timeout=HANG)
    assert (look().vacant, look().size, look().terminations) == (3, 0, 2)
    for before, after in itertools.pairwise(seen):
        assert all(before[name] <= after[name] for name in (*SECONDS_OF, *SECONDS_OF.values())), (before, after)


@pytest.mark.anyio
async def test_stats_count_every_slot_in_its_state(postgres: LocalPostgres) -> None:
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
async def test_stats_count_what_has_happened(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1) as pool:
        fresh = pool.stats()
        counters = [name.removesuffix("_seconds") for name in dir(fresh) if name.endswith("_seconds")]
        assert len(counters) == 12
        assert {getattr(fresh, name, None) for name in dir(fresh) if name.endswith("_seconds")} == {0.0}

        async with pool.acquire() as connection:
            await connection.execute("SELECT pg_sleep(0.01)")
            with pytest.raises(neon_async.PoolTimeoutError):
                await pool.acquire(timeout=0.01)
        assert pool.stats().resets == 0, "the server has not answered"
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
        assert fresh.acquires == 0  # a snapshot


# ---------------------------------------------------------------------------------------------------------------------
# stats() has no side effects

# Brings a pool of two connections at an endpoint into a state, and keeps it there.
State: TypeAlias = Callable[[neon_async.Pool, LocalEndpoint], contextlib.AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def idle(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    await pool.fetchval("SELECT 1")
    await until_settled(pool)
    yield


@contextlib.asynccontextmanager
async def idle_and_ended_without_notice(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    """The transport is closing, and the event loop has not reported the end of the connection yet."""
    connection: Any = await pool.acquire()
    raw = connection._con
    await pool.release(connection)
    raw._transport.abort()
    assert (pool.stats().idle, pool.stats().size) == (1, 1)
    yield


@contextlib.asynccontextmanager
async def in_use_with_waiters(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    async with pool.acquire(), pool.acquire():
        waiting = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(3)]
        await until(lambda: pool.stats().waiting == 3)
        yield
    assert await asyncio.gather(*waiting) == [1] * 3


@contextlib.asynccontextmanager
async def handed_over(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    """A waiter has been handed a connection and has not run since."""
    async with pool.acquire():
        held = await pool.acquire()
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().waiting == 1)
        await pool.release(held)
        assert (pool.stats().waiting, pool.stats().idle) == (0, 1)
        yield
        assert await waiting == 1


@contextlib.asynccontextmanager
async def connecting(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    endpoint.freeze()
    waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await until(lambda: endpoint.connects == 1)
    yield
    endpoint.thaw()
    assert await waiting == 1


@contextlib.asynccontextmanager
async def pausing_between_dials(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    endpoint.refuse()
    waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await until(lambda: pool.stats().dial_failures and not pool.stats().connecting)
    yield
    endpoint.accept()
    assert await waiting == 1


@contextlib.asynccontextmanager
async def resetting(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    async with pool.acquire() as connection:
        await connection.execute("BEGIN")
        endpoint.freeze()
    assert pool.stats().resetting == 1
    yield
    endpoint.thaw()


@contextlib.asynccontextmanager
async def idle_with_a_reset_that_is_not_answered(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    async with pool.acquire() as connection:
        await connection.execute("SET search_path TO pg_catalog")
        endpoint.freeze()
    stats = pool.stats()
    assert (stats.idle, stats.resetting, stats.resets) == (1, 0, 0)
    yield
    endpoint.thaw()
    await until(lambda: pool.stats().resets == 1)


@contextlib.asynccontextmanager
async def closed(pool: neon_async.Pool, endpoint: LocalEndpoint) -> AsyncIterator[None]:
    await pool.fetchval("SELECT 1")
    await pool.close()
    yield


def inside(pool: Any) -> tuple[Any, ...]:
    """Return everything inside the pool that a call could change."""
    supply = pool._supply
    slots = [(slot.state, slot.task, slot.loan, slot.holder.connection, slot.idle_since) for slot in supply.slots]
    timers = [(timer._handle, timer._due) for timer in (supply._reaper, supply._resumption, supply.waiters._timer)]
    queue = list(supply.waiters._waiters.items())
    return slots, timers, queue, set(supply._tasks), list(supply.slots.idle), list(supply.slots.vacant), pool._phase


@pytest.mark.anyio
@pytest.mark.parametrize(
    "state",
    [
        pytest.param(state, id=state.__name__.replace("_", " "))
        for state in (
            idle,
            idle_and_ended_without_notice,
            in_use_with_waiters,
            handed_over,
            connecting,
            pausing_between_dials,
            resetting,
            idle_with_a_reset_that_is_not_answered,
            closed,
        )
    ],
)
async def test_stats_can_be_called_any_number_of_times_and_change_nothing(
    postgres: LocalPostgres, state: State
) -> None:
    async with LocalEndpoint(postgres) as endpoint, make_pool(endpoint, max_size=2) as pool, asyncio.timeout(HANG):
        async with state(pool, endpoint):
            before, sent, tasks = inside(pool), endpoint.client_bytes, asyncio.all_tasks()
            first = pool.stats()
            assert [pool.stats() for _ in range(100)] == [first] * 100
            assert repr(pool) == repr(pool)
            assert (inside(pool), endpoint.client_bytes, asyncio.all_tasks()) == (before, sent, tasks)
            assert_balanced(pool)
        await until_settled(pool)


def test_stats_are_those_of_a_pool_that_was_never_opened(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, max_size=3)
    assert pool.stats() == pool.stats() == snapshot(max_size=3, vacant=3)
