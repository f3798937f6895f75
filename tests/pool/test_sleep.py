"""A pool lets its compute sleep, wakes it with one connect, storms nothing, and hands out nothing that has died."""

from __future__ import annotations

import asyncio
import inspect
import logging
import selectors
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support.certificates import issue, present, root
from support.probes import (
    HANG,
    assert_secret_free,
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
from neon_async.testing._impostor import Impostor, error_response, login, server_context

pytestmark = pytest.mark.anyio

NEVER = 100 * HANG


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres, wake_time=0.2) as endpoint:
        yield endpoint


class Clock:
    """The two clocks of this machine, moved by hand on top of their own pace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._wall = self._monotonic = 0.0
        wall, monotonic = time.time, time.monotonic
        monkeypatch.setattr(time, "time", lambda: wall() + self._wall)
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + self._monotonic)

    def passes(self, seconds: float) -> None:
        """Let time pass. On asyncio the timers that are due run next; uvloop has a clock of its own."""
        self._wall += seconds
        self._monotonic += seconds

    def leaps(self, seconds: float) -> None:
        """Let the wall clock alone move, as when this machine was asleep."""
        self._wall += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def acquired(pool: neon_async.Pool, count: int) -> list[Any]:
    """Acquire `count` connections, release them all, and return the process ids of their sessions."""
    connections = [await pool.acquire(timeout=HANG) for _ in range(count)]
    pids = [connection.get_server_pid() for connection in connections]
    for connection in reversed(connections):
        await pool.release(connection)
    return pids


async def until_dials_end(pool: neon_async.Pool) -> None:
    await until(lambda: pool.stats().connecting == 0)


# ---------------------------------------------------------------------------------------------------------------------
# An idle pool


async def test_opening_a_pool_connects_to_nothing(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint) as pool:
        assert pool.get_min_size() == 0
        await asyncio.sleep(0.05)
    assert endpoint.connects == 0


async def test_an_idle_pool_sends_nothing(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=3) as pool:
        await pool.fetchval("SELECT 1")
        await until_settled(pool)
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


@pytest.mark.parametrize("floor", [0, 2], ids=["no floor", "floor"])
def test_an_idle_pool_leaves_the_event_loop_asleep(postgres: LocalPostgres, floor: int) -> None:
    """Also when its connections have been idle for longer than they may, and stay for `min_size`."""

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
            min_size=floor,
            init_size=2,
            max_inactive_connection_lifetime=0.05,
        ) as pool:
            await until_settled(pool)
            await asyncio.sleep(0.1)
            before = Counting.turns
            await asyncio.sleep(0.3)
            assert pool.get_size() == floor
            return Counting.turns - before

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Counting())) as runner:
        assert runner.run(idle()) < 20


async def test_connections_that_nobody_needs_end(endpoint: LocalEndpoint) -> None:
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


async def test_a_connection_that_is_used_stays(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, init_size=2, max_inactive_connection_lifetime=0.5) as pool, asyncio.timeout(HANG):
        pids = await acquired(pool, 1)
        while pool.get_size() > 1:
            assert await acquired(pool, 1) == pids
            await asyncio.sleep(0.01)
        assert await acquired(pool, 1) == pids


@pytest.mark.parametrize("name", ["max_lifetime", "max_inactive_connection_lifetime"])
async def test_a_lifetime_below_the_resolution_of_a_timer_is_kept(postgres: LocalPostgres, name: str) -> None:
    async with make_pool(postgres, init_size=3, **{name: 1e-4}) as pool:
        await until(lambda: pool.stats().vacant == 10)
        await until_settled(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Lifetimes


async def test_a_connection_that_is_too_old_is_not_handed_out(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, max_size=1, init_size=1, max_lifetime=0.2) as pool:
        [pid] = await acquired(pool, 1)
        time.sleep(0.25)  # noqa: ASYNC251  the timer that would end it cannot run before the acquire
        assert await acquired(pool, 1) != [pid]
        assert pool.stats().terminations == 1


async def test_a_connection_that_is_too_old_ends_when_it_comes_back(postgres: LocalPostgres) -> None:
    name = f"old {id(object())}"
    async with (
        connected(postgres) as admin,
        make_pool(postgres, max_size=1, max_lifetime=0.1, application_name=name) as pool,
    ):
        async with pool.acquire(timeout=HANG) as connection:
            while await connection.fetchval("SELECT now() - backend_start < '0.15 s' FROM pg_stat_activity LIMIT 1"):
                pass
            await asyncio.sleep(0.15)
            assert await connection.fetchval("SELECT 1") == 1  # never while it is out
        await until_settled(pool)
        assert pool.stats().vacant == 1
        await until_gone(admin, name)


async def test_a_connection_that_is_too_old_ends_while_it_idles(postgres: LocalPostgres) -> None:
    async with make_pool(postgres, init_size=3, max_lifetime=0.2, max_inactive_connection_lifetime=0) as pool:
        await until(lambda: pool.stats().vacant == 10)
        assert (pool.stats().terminations, pool.stats().dials) == (3, 3)


async def test_lifetimes_differ_by_up_to_a_tenth(postgres: LocalPostgres, clock: Clock) -> None:
    """What is made together does not end together. By chance all twenty may be alike once in a million runs."""
    keywords: dict[str, Any] = {"max_inactive_connection_lifetime": 0, "check_after_idle": 1e6, "acquire_timeout": 1e6}
    async with make_pool(postgres, max_size=20, init_size=20, connect_timeout=3600, **keywords) as pool:
        made = set(await acquired(pool, 20))
        clock.passes(3600 * 0.9 - HANG)
        assert set(await acquired(pool, 20)) == made
        clock.passes(HANG + 3600 * 0.05)
        await asyncio.sleep(0)
        kept = made & {connection.get_server_pid() for connection in [await pool.acquire() for _ in range(20)]}
        assert 0 < len(kept) < 20
        pool.terminate()


async def test_no_connection_outlives_its_lifetime(postgres: LocalPostgres, clock: Clock) -> None:
    async with make_pool(
        postgres, max_size=3, init_size=3, max_inactive_connection_lifetime=0, acquire_timeout=1e6
    ) as pool:
        made = set(await acquired(pool, 3))
        clock.passes(3600)
        assert not made & set(await acquired(pool, 3))


async def test_lifetimes_of_0_are_for_ever(postgres: LocalPostgres, clock: Clock) -> None:
    async with make_pool(postgres, init_size=1, max_inactive_connection_lifetime=0, max_lifetime=0) as pool:
        pids = await acquired(pool, 1)
        clock.passes(1e7)
        await asyncio.sleep(0.01)
        assert await acquired(pool, 1) == pids


# ---------------------------------------------------------------------------------------------------------------------
# min_size and init_size


def test_a_floor_on_a_neon_host_warns_once_where_it_is_written(postgres: LocalPostgres) -> None:
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


def test_a_floor_elsewhere_does_not_warn(postgres: LocalPostgres) -> None:
    make_pool_at_localhost(postgres, min_size=2)


def make_pool_at_localhost(postgres: LocalPostgres, **keywords: Any) -> neon_async.Pool:
    dsn = postgres.dsn.replace(postgres.host, "localhost")
    return neon_async.create_pool(dsn, trust_anchor=postgres.trust_anchor, **keywords)


async def test_min_size_connections_are_kept_and_made_anew(postgres: LocalPostgres) -> None:
    name = f"floor {id(object())}"
    async with (
        connected(postgres) as admin,
        make_pool_at_localhost(
            postgres, min_size=2, max_size=4, max_inactive_connection_lifetime=0.1, application_name=name
        ) as pool,
        asyncio.timeout(HANG),
    ):
        pids = set(await acquired(pool, 4))
        await until(lambda: pool.get_size() == 2)
        await asyncio.sleep(0.3)
        assert pool.get_size() == 2
        kept = set(await acquired(pool, 2))
        assert kept < pids

        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name)
        await until(lambda: pool.stats().terminations >= 4)
        await until(lambda: pool.get_size() == 2)
        await until_settled(pool)
        assert not kept & set(await acquired(pool, 2))
        assert await sessions(admin, name) == 2


async def test_min_size_connections_that_are_too_old_are_made_anew(postgres: LocalPostgres) -> None:
    async with make_pool_at_localhost(postgres, min_size=2, max_lifetime=0.3) as pool, asyncio.timeout(HANG):
        await until(lambda: pool.stats().terminations >= 2)
        await until(lambda: pool.get_size() == 2)


async def test_a_floor_is_restored_at_the_pace_that_a_refusing_server_allows(endpoint: LocalEndpoint) -> None:
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


async def test_init_size_warms_up_once(endpoint: LocalEndpoint) -> None:
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
# Wake


async def test_one_dial_wakes_the_compute_and_the_rest_follow_in_a_doubling_ramp(postgres: LocalPostgres) -> None:
    gate: list[asyncio.Future[None]] = []

    async def password() -> str:
        gate.append(asyncio.get_running_loop().create_future())
        await gate[-1]
        return password_of(postgres)

    done = asyncio.Event()

    async def use() -> None:
        async with pool.acquire():
            await done.wait()

    async with make_pool(postgres, max_size=16, password=password) as pool, asyncio.timeout(HANG):
        users = [asyncio.ensure_future(use()) for _ in range(50)]
        steps: list[int] = []
        while sum(steps) < 16:
            await until(lambda: pool.stats().connecting == len(gate) > 0)
            for _ in range(5):
                await asyncio.sleep(0.001)
            steps.append(len(gate))
            opened, gate[:] = list(gate), []
            size = pool.stats().size
            for one in opened:
                one.set_result(None)
            await until(lambda: pool.stats().size == size + len(opened))  # noqa: B023
        done.set()
        await asyncio.gather(*users)
        # The ramp is fed as each dial ends: never more under way than connections stand.
        assert steps[:2] == [1, 1]
        assert all(step <= max(1, sum(steps[:number])) for number, step in enumerate(steps))
        assert sum(steps) == 16
        assert pool.stats().dials == 16


async def test_fifty_callers_wake_a_compute_with_one_connect(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        callers = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(50)]
        await until(lambda: endpoint.state == "waking")
        await asyncio.sleep(0.05)
        if endpoint.state == "waking":
            assert (endpoint.connects, pool.stats().connecting, pool.stats().waiting) == (1, 1, 50)
        assert await asyncio.gather(*callers) == [1] * 50
        await until_settled(pool)
        assert endpoint.wakes == 1
        assert endpoint.connects == pool.stats().dials <= 10
        assert pool.stats().wakes == 1
        assert pool.stats().wake_seconds >= 0.1


async def test_each_wake_is_counted(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        for number in range(1, 4):
            endpoint.suspend()
            await until(lambda: pool.get_size() == 0)
            assert await pool.fetchval("SELECT 1") == 1
            await until_settled(pool)
            assert (pool.stats().wakes, endpoint.wakes, endpoint.connects) == (number, number, number)


async def test_a_waiter_that_gives_up_leaves_the_dial_running(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        with pytest.raises(neon_async.PoolTimeoutError, match="1 connecting"):
            await pool.acquire(timeout=0.05)
        assert await pool.fetchval("SELECT 1") == 1
        assert (endpoint.connects, pool.stats().dials, pool.stats().dial_failures) == (1, 1, 0)
        await until_settled(pool)


async def test_a_dial_that_nobody_waits_for_ends_as_an_idle_connection(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()
    async with make_pool(endpoint) as pool:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pool.acquire()
        await until(lambda: pool.stats().idle == 1)
        await until_settled(pool)
        await asyncio.sleep(0.05)
        assert endpoint.connects == 1


async def test_a_burst_that_gave_up_makes_no_more_connections(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()
    async with make_pool(endpoint) as pool:
        callers = [asyncio.ensure_future(pool.acquire(timeout=0.05)) for _ in range(50)]
        for error in await asyncio.gather(*callers, return_exceptions=True):
            assert isinstance(error, neon_async.PoolTimeoutError)
        await until(lambda: pool.stats().idle == 1)
        await asyncio.sleep(0.05)
        assert endpoint.connects == 1
        await until_settled(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Failures that may pass


async def test_a_failure_that_may_pass_is_tried_again_until_it_has_passed(endpoint: LocalEndpoint) -> None:
    endpoint.refuse()
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        callers = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(5)]
        await until(lambda: pool.stats().dial_failures >= 3)
        assert pool.stats().waiting == 5
        endpoint.accept()
        assert await asyncio.gather(*callers) == [1] * 5
        await until_settled(pool)


async def test_a_dial_that_takes_too_long_is_tried_again(endpoint: LocalEndpoint) -> None:
    endpoint.freeze()
    async with make_pool(endpoint, connect_timeout=0.2) as pool, asyncio.timeout(HANG):
        caller = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 2)
        endpoint.thaw()
        assert await caller == 1


async def test_a_connection_that_ends_as_soon_as_it_is_made_is_a_failure_that_may_pass(endpoint: LocalEndpoint) -> None:
    made = []

    async def init(connection: Any) -> None:
        made.append(connection)
        if len(made) < 3:
            endpoint.cut()
            await until(connection.is_closed)

    async with make_pool(endpoint, init=init) as pool, asyncio.timeout(HANG):
        assert await pool.fetchval("SELECT 1") == 1
        await until_settled(pool)
        assert (len(made), pool.stats().size) == (3, 1)


async def test_a_refusing_server_is_not_stormed(endpoint: LocalEndpoint) -> None:
    endpoint.refuse()
    async with make_pool(endpoint) as pool:
        calls = 0

        async def loop() -> None:
            nonlocal calls
            while True:
                calls += 1
                with pytest.raises((neon_async.PoolTimeoutError, neon_async.ConnectError)):
                    await pool.fetchval("SELECT 1", timeout=0.02)

        loops = [asyncio.ensure_future(loop()) for _ in range(50)]
        await asyncio.sleep(2)
        for one in loops:
            one.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        assert calls > 200
        assert 2 <= endpoint.connects <= 10
        assert endpoint.connects == pool.stats().dials


async def test_what_waits_for_the_next_attempt_uses_a_connection_that_comes_back(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, max_size=2) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        endpoint.refuse()
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 1)
        await pool.release(connection)
        assert await waiting == 1


# ---------------------------------------------------------------------------------------------------------------------
# Failures that do not pass


class Passwords:
    """A password function whose answer may be changed."""

    def __init__(self, right: str) -> None:
        self.right = right
        self.answer = "a wrong one"
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        return self.answer


@pytest.fixture
def passwords(postgres: LocalPostgres) -> Passwords:
    return Passwords(password_of(postgres))


async def failures_of(pool: neon_async.Pool, count: int) -> list[BaseException]:
    found = await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(count)), return_exceptions=True)
    assert all(isinstance(one, Exception) for one in found)
    return found


async def test_a_wrong_password_reaches_every_waiter_at_once_and_costs_one_connect(
    endpoint: LocalEndpoint, passwords: Passwords
) -> None:
    async with make_pool(endpoint, password=passwords) as pool, asyncio.timeout(HANG):
        first = await failures_of(pool, 20)
        assert (endpoint.connects, pool.stats().dials) == (1, 1)
        second = await failures_of(pool, 20)
        assert (endpoint.connects, pool.stats().dials) == (1, 1)
        assert {type(error) for error in first + second} == {neon_async.InvalidPasswordError}
        assert len({id(error) for error in first + second}) == 40
        for error in first + second:
            assert_secret_free(error, passwords.answer, passwords.right)
        await until_settled(pool)


NEONS_REFUSALS = [
    (neon_async.EndpointNotFoundError, "The requested endpoint could not be found, or you don't have access to it."),
    (neon_async.EndpointDisabledError, "The endpoint is disabled. Enable it using Neon API and retry."),
    (neon_async.QuotaExceededError, "Your account or project has exceeded the compute time quota."),
    (neon_async.IPNotAllowedError, "This IP address 192.0.2.1 is not allowed to connect to this endpoint."),
]


@pytest.mark.parametrize(("kind", "text"), [pytest.param(*one, id=one[0].__name__) for one in NEONS_REFUSALS])
async def test_what_neon_refuses_for_good_reaches_every_waiter_at_once(kind: type[Exception], text: str) -> None:
    chain = present(issue(root()))
    script = login(server_context(chain.chain), error_response(text))
    async with (
        Impostor(script, trust_anchor=chain.anchor, password="s3cret") as impostor,
        neon_async.create_pool(impostor.dsn, trust_anchor=chain.anchor) as pool,
        asyncio.timeout(HANG),
    ):
        errors = await failures_of(pool, 20) + await failures_of(pool, 20)
        assert {type(error) for error in errors} == {kind}
        assert (pool.stats().dials, pool.stats().dial_failures) == (1, 1)


async def test_a_certificate_that_is_not_trusted_reaches_every_waiter_at_once(endpoint: LocalEndpoint) -> None:
    other = issue(subject="another root", ca=True)
    async with neon_async.create_pool(endpoint.dsn, trust_anchor=other.pem) as pool, asyncio.timeout(HANG):
        errors = await failures_of(pool, 20) + await failures_of(pool, 20)
        assert {type(error) for error in errors} == {neon_async.CertificateError}
        assert endpoint.connects == 1


async def test_a_missing_database_reaches_every_waiter_at_once(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, database="missing") as pool, asyncio.timeout(HANG):
        errors = await failures_of(pool, 20)
        assert {type(error) for error in errors} == {neon_async.DatabaseNotFoundError}
        assert pool.stats().dials == 1


async def test_the_breaker_lets_few_attempts_through_and_fewer_with_time(
    endpoint: LocalEndpoint, passwords: Passwords
) -> None:
    async with make_pool(endpoint, password=passwords) as pool:
        calls = 0

        async def loop() -> None:
            nonlocal calls
            while True:
                with pytest.raises(neon_async.InvalidPasswordError):
                    await pool.fetchval("SELECT 1")
                calls += 1
                await asyncio.sleep(0.001)

        loops = [asyncio.ensure_future(loop()) for _ in range(50)]
        await asyncio.sleep(2.5)
        for one in loops:
            one.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        assert calls > 200
        assert 2 <= endpoint.connects <= 4
        assert endpoint.connects == pool.stats().dials


async def test_the_breaker_closes_when_the_password_is_right_again(
    endpoint: LocalEndpoint, passwords: Passwords
) -> None:
    async with make_pool(endpoint, password=passwords, max_size=3) as pool, asyncio.timeout(HANG):
        await failures_of(pool, 5)
        passwords.answer = passwords.right
        while True:
            try:
                assert await pool.fetchval("SELECT 1") == 1
            except neon_async.InvalidPasswordError:
                await asyncio.sleep(0.01)
            else:
                break
        assert passwords.calls == endpoint.connects == 2
        await assert_whole(pool)


async def test_a_failure_for_good_leaves_open_connections_in_use(endpoint: LocalEndpoint, passwords: Passwords) -> None:
    passwords.answer = passwords.right
    async with make_pool(endpoint, password=passwords, max_size=2) as pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            passwords.answer = "a wrong one"
            with pytest.raises(neon_async.InvalidPasswordError):
                await pool.acquire()
            assert await connection.fetchval("SELECT 1") == 1
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.stats().dials == 2


async def test_an_error_of_the_callers_own_does_not_grow_with_each_who_gets_it(postgres: LocalPostgres) -> None:
    """One exception object is raised again and again while the breaker is open; its traceback must not pile up."""

    def password() -> str:
        raise RuntimeError("the vault is sealed")

    async with make_pool(postgres, password=password) as pool, asyncio.timeout(HANG):
        depths = []
        for _ in range(300):
            try:
                await pool.fetchval("SELECT 1")
            except RuntimeError as error:
                depths.append(len(list(traceback.walk_tb(error.__traceback__))))
        assert len(depths) == 300
        assert pool.stats().dials <= 3
        assert max(depths) <= 2 * depths[0] + 10


# ---------------------------------------------------------------------------------------------------------------------
# Dead connections


async def test_a_connection_that_was_idle_for_long_is_pinged_first(endpoint: LocalEndpoint, clock: Clock) -> None:
    async with make_pool(endpoint, init_size=1, acquire_timeout=1e6, max_inactive_connection_lifetime=0) as pool:
        pids = await acquired(pool, 1)
        sent = endpoint.client_bytes
        clock.passes(29)
        assert await acquired(pool, 1) == pids
        assert endpoint.client_bytes == sent
        clock.passes(31)
        assert await acquired(pool, 1) == pids
        assert endpoint.client_bytes > sent
        assert (pool.stats().dials, pool.stats().terminations) == (1, 0)
        await until_settled(pool)


async def test_one_ping_in_vain_ends_all_that_were_idle_as_long(endpoint: LocalEndpoint) -> None:
    """A way that is silent, as behind a firewall that forgot the connections: no end arrives."""
    async with make_pool(endpoint, init_size=5, max_size=5, check_after_idle=0) as pool, asyncio.timeout(HANG):
        pids = await acquired(pool, 5)
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
        pids = set(await acquired(pool, 5))
        endpoint.freeze()
        callers = [asyncio.ensure_future(pool.fetchval("SELECT pg_backend_pid()")) for _ in range(3)]
        await until(lambda: pool.stats().checking == 3)
        await until(lambda: pool.stats().terminations == 5)
        assert pool.stats().checking == 0
        endpoint.thaw()
        assert not pids & set(await asyncio.gather(*callers))


async def test_a_check_that_nobody_waits_for_any_more_gives_the_connection_back(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, init_size=1, check_after_idle=0) as pool:
        endpoint.freeze()
        with pytest.raises(neon_async.PoolTimeoutError):
            await pool.acquire(timeout=0.05)
        endpoint.thaw()
        await until(lambda: pool.stats().idle == 1)
        await until_settled(pool)
        assert (pool.stats().dials, pool.stats().terminations) == (1, 0)


async def test_a_connection_that_ended_unnoticed_is_replaced_without_an_error(endpoint: LocalEndpoint) -> None:
    """The end is on its way while a caller comes: it is noticed by the ping, or before."""
    async with make_pool(endpoint, init_size=3, max_size=3, check_after_idle=0) as pool, asyncio.timeout(HANG):
        for _ in range(10):
            endpoint.cut()
            assert await pool.fetchval("SELECT 1") == 1
        await assert_whole(pool)


async def test_an_acquire_that_asked_the_server_nothing_is_no_sign_of_life(
    endpoint: LocalEndpoint, clock: Clock
) -> None:
    async with make_pool(endpoint, init_size=1, acquire_timeout=1e6, max_inactive_connection_lifetime=0) as pool:
        sent = endpoint.client_bytes
        for _ in range(3):
            await acquired(pool, 1)
            clock.passes(20)
        await acquired(pool, 1)
        assert endpoint.client_bytes > sent


async def test_after_a_leap_of_the_clock_every_idle_connection_is_checked_once(
    endpoint: LocalEndpoint, clock: Clock
) -> None:
    async with make_pool(endpoint, init_size=3, max_size=3) as pool:
        pids = await acquired(pool, 3)
        sent = endpoint.client_bytes
        clock.leaps(1)  # a step of NTP's
        assert await acquired(pool, 3) == pids
        assert endpoint.client_bytes == sent
        for leap in (3600, -3600):
            clock.leaps(leap)
            of_each = []
            connections = []
            for _ in range(3):
                connections.append(await pool.acquire())
                of_each.append(endpoint.client_bytes - sent)
                sent = endpoint.client_bytes
            assert len(set(of_each)) == 1
            assert of_each[0] > 0
            for connection in connections:
                await pool.release(connection)
            await acquired(pool, 3)
            assert endpoint.client_bytes == sent
        assert (pool.stats().dials, pool.stats().terminations) == (3, 0)


async def test_a_leap_while_a_connection_is_out_is_noticed_when_it_comes_back(
    endpoint: LocalEndpoint, clock: Clock
) -> None:
    async with make_pool(endpoint, max_size=2, init_size=2) as pool:
        first, second = await pool.acquire(), await pool.acquire()
        clock.leaps(3600)
        await pool.release(first)
        await pool.release(second)
        sent = endpoint.client_bytes
        await acquired(pool, 2)
        assert endpoint.client_bytes > sent


async def test_after_a_leap_dead_connections_are_replaced(
    endpoint: LocalEndpoint, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    async with make_pool(endpoint, init_size=3) as pool, asyncio.timeout(HANG):
        pids = await acquired(pool, 3)
        endpoint.freeze()
        clock.leaps(600)
        caller = asyncio.ensure_future(pool.fetchval("SELECT pg_backend_pid()"))
        await until(lambda: pool.stats().connecting)
        assert pool.stats().terminations == 3
        endpoint.thaw()
        assert await caller not in pids
    assert sum("clock has leapt" in record.message for record in caplog.records) == 1
