"""A pool wakes its compute with one connect, retries transient failures, and does not storm a server that refuses."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.certificates import issue, present, root
from support.probes import HANG, assert_secret_free, assert_whole, make_pool, password_of, until, until_settled

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres
from neon_async.testing._impostor import Impostor, error_response, login, server_context

pytestmark = pytest.mark.anyio


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres, wake_time=0.2) as endpoint:
        yield endpoint


# ---------------------------------------------------------------------------------------------------------------------
# Wakes


async def test_one_dial_wakes_the_compute_and_then_the_number_of_dials_doubles(postgres: LocalPostgres) -> None:
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
            for future in opened:
                future.set_result(None)
            await until(lambda: pool.stats().size == size + len(opened))  # noqa: B023
        done.set()
        await asyncio.gather(*users)
        # Dials start as others end: there are never more of them than open connections.
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


async def test_a_dial_without_a_waiter_ends_as_an_idle_connection(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()
    async with make_pool(endpoint) as pool:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pool.acquire()
        await until(lambda: pool.stats().idle == 1)
        await until_settled(pool)
        await asyncio.sleep(0.05)
        assert endpoint.connects == 1


async def test_a_burst_of_callers_that_timed_out_causes_no_more_dials(endpoint: LocalEndpoint) -> None:
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
# Transient failures


async def test_a_transient_failure_is_retried_until_a_dial_succeeds(endpoint: LocalEndpoint) -> None:
    endpoint.refuse()
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        callers = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(5)]
        await until(lambda: pool.stats().dial_failures >= 3)
        assert pool.stats().waiting == 5
        endpoint.accept()
        assert await asyncio.gather(*callers) == [1] * 5
        await until_settled(pool)


async def test_a_dial_that_times_out_is_retried(endpoint: LocalEndpoint) -> None:
    endpoint.freeze()
    async with make_pool(endpoint, connect_timeout=0.2) as pool, asyncio.timeout(HANG):
        caller = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 2)
        endpoint.thaw()
        assert await caller == 1


async def test_a_connection_that_ends_during_init_is_a_transient_failure(endpoint: LocalEndpoint) -> None:
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
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        assert calls > 200
        assert 2 <= endpoint.connects <= 10
        await until_settled(pool)  # `dials` counts a dial when it ends, and one may still be under way
        assert endpoint.connects == pool.stats().dials


async def test_a_waiter_between_two_attempts_gets_a_connection_that_is_released(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, max_size=2) as pool, asyncio.timeout(HANG):
        connection = await pool.acquire()
        endpoint.refuse()
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 1)
        await pool.release(connection)
        assert await waiting == 1


# ---------------------------------------------------------------------------------------------------------------------
# Final failures


class Passwords:
    """A password function whose answer a test can change."""

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
    errors = await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(count)), return_exceptions=True)
    assert all(isinstance(error, Exception) for error in errors)
    return errors


async def test_a_wrong_password_fails_every_waiter_after_one_connect(
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


FINAL_REFUSALS = [
    (neon_async.EndpointNotFoundError, "The requested endpoint could not be found, or you don't have access to it."),
    (neon_async.EndpointDisabledError, "The endpoint is disabled. Enable it using Neon API and retry."),
    (neon_async.QuotaExceededError, "Your account or project has exceeded the compute time quota."),
    (neon_async.IPNotAllowedError, "This IP address 192.0.2.1 is not allowed to connect to this endpoint."),
]


@pytest.mark.parametrize(("kind", "text"), FINAL_REFUSALS, ids=[kind.__name__ for kind, _ in FINAL_REFUSALS])
async def test_a_final_refusal_of_neon_fails_every_waiter_after_one_dial(kind: type[Exception], text: str) -> None:
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


async def test_an_untrusted_certificate_fails_every_waiter_after_one_connect(endpoint: LocalEndpoint) -> None:
    other = issue(subject="another root", ca=True)
    async with neon_async.create_pool(endpoint.dsn, trust_anchor=other.pem) as pool, asyncio.timeout(HANG):
        errors = await failures_of(pool, 20) + await failures_of(pool, 20)
        assert {type(error) for error in errors} == {neon_async.CertificateError}
        assert endpoint.connects == 1


async def test_a_missing_database_fails_every_waiter_after_one_dial(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, database="missing") as pool, asyncio.timeout(HANG):
        errors = await failures_of(pool, 20)
        assert {type(error) for error in errors} == {neon_async.DatabaseNotFoundError}
        assert pool.stats().dials == 1


async def test_the_breaker_allows_few_attempts_and_fewer_over_time(
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
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        assert calls > 200
        assert 2 <= endpoint.connects <= 4
        await until_settled(pool)  # `dials` counts a dial when it ends, and one may still be under way
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


async def test_a_final_failure_leaves_open_connections_in_use(endpoint: LocalEndpoint, passwords: Passwords) -> None:
    passwords.answer = passwords.right
    async with make_pool(endpoint, password=passwords, max_size=2) as pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            passwords.answer = "a wrong one"
            with pytest.raises(neon_async.InvalidPasswordError):
                await pool.acquire()
            assert await connection.fetchval("SELECT 1") == 1
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.stats().dials == 2


async def test_the_traceback_of_an_error_of_the_password_function_does_not_grow(postgres: LocalPostgres) -> None:
    sealed = RuntimeError("the vault is sealed")

    def password() -> str:
        raise sealed

    async with make_pool(postgres, password=password) as pool, asyncio.timeout(HANG):
        depths = []
        for _ in range(300):
            try:
                await pool.fetchval("SELECT 1")
            except RuntimeError as error:
                depths.append(len(list(traceback.walk_tb(error.__traceback__))))
        assert len(depths) == 300
        assert max(depths) <= 2 * depths[0] + 10
