"""The events of a pool: what is reported to `on_event`, and that nothing of it reaches a caller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, make_pool, until, until_settled

import neon_async
from neon_async import events
from neon_async._driver.holder import own_session
from neon_async.events import (
    Acquired,
    Connected,
    ConnectFailed,
    ConnectionClosed,
    PoolClosed,
    PoolEvent,
    PoolOpened,
    Released,
    Reset,
    ResetFailed,
    Retried,
    TimedOut,
    Waited,
    Woke,
)
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


def kinds(found: list[PoolEvent]) -> list[str]:
    return [type(event).__name__ for event in found]


async def test_the_life_of_a_pool_is_reported_in_order(postgres: LocalPostgres) -> None:
    found: list[PoolEvent] = []
    pool = make_pool(postgres, on_event=found.append)
    async with pool:
        await pool.fetchval("SELECT 1")
        await pool.fetchval("SELECT 1")  # whose answer follows that to the reset
    assert kinds(found[:5]) == ["PoolOpened", "Connected", "Woke", "Waited", "Acquired"]
    assert kinds(found)[-2:] == ["ConnectionClosed", "PoolClosed"]
    assert [type(event) for event in found if isinstance(event, Released | Reset)][:2] == [Released, Reset]
    assert [event.pool for event in found if isinstance(event, PoolOpened | PoolClosed)] == [pool, pool]
    rest = [event for event in found if not isinstance(event, PoolOpened | PoolClosed)]
    assert {event.pool_name for event in rest} == {pool.name}
    assert all(event.seconds >= 0 for event in rest)
    [connected] = [event for event in found if isinstance(event, Connected)]
    assert [step for step, _ in connected.steps] == ["tcp", "tls", "authentication"]  # `hostaddr` needs no look-up
    times = [after for _, after in connected.steps]
    assert times == sorted(times)
    assert times[-1] <= connected.seconds


async def test_each_count_of_the_statistics_is_the_number_of_its_events(postgres: LocalPostgres) -> None:
    found: list[PoolEvent] = []
    async with make_pool(postgres, max_size=2, on_event=found.append) as pool:
        await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20)))
        await until_settled(pool)
        stats = pool.stats()
        counts = {kind: kinds(found).count(kind) for kind in set(kinds(found))}
    assert counts["Acquired"] == stats.acquires == 20
    assert counts["Released"] == stats.releases == 20
    assert counts["Waited"] == stats.waits
    assert counts["Reset"] == stats.resets
    assert counts["Connected"] == stats.dials - stats.dial_failures


async def test_failures_are_reported_with_their_error(endpoint: LocalEndpoint) -> None:
    found: list[PoolEvent] = []
    async with make_pool(endpoint, acquire_timeout=0.3, on_event=found.append) as pool:
        endpoint.refuse()
        with pytest.raises(neon_async.PoolTimeoutError):
            await pool.fetchval("SELECT 1")
    [failed, *_] = [event for event in found if isinstance(event, ConnectFailed)]
    assert isinstance(failed.error, neon_async.ConnectError)
    assert failed.steps[0][0] == "tcp"
    assert kinds(found).count("TimedOut") == 1


async def test_a_dial_that_is_cancelled_has_no_error(endpoint: LocalEndpoint) -> None:
    found: list[PoolEvent] = []
    async with make_pool(endpoint, on_event=found.append) as pool:
        endpoint.freeze()
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: endpoint.connections)
        pool.terminate()
        with pytest.raises(neon_async.PoolClosedError):
            await waiting
        await until(lambda: "ConnectFailed" in kinds(found))
    [failed] = [event for event in found if isinstance(event, ConnectFailed)]
    assert failed.error is None


@pytest.mark.parametrize("own", [False, True], ids=["sent ahead", "a function of the caller"])
async def test_a_reset_that_fails_is_reported(postgres: LocalPostgres, own: bool) -> None:
    found: list[PoolEvent] = []

    async def fail(connection: Any) -> None:
        raise ZeroDivisionError

    options: dict[str, Any] = {"reset": fail} if own else {}
    async with make_pool(postgres, max_size=1, on_event=found.append, **options) as pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            if not own:
                [slot] = pool._supply.slots
                own_session(slot.holder.connection).reset_query = "SELECT 1/0"
        await until(lambda: "ResetFailed" in kinds(found))
        assert pool.stats().reset_failures == 1


async def test_a_further_attempt_of_a_transaction_is_reported(postgres: LocalPostgres) -> None:
    found: list[PoolEvent] = []
    attempts = iter([True, False])

    async def work(connection: Any) -> None:
        if next(attempts):
            await connection.execute("DO $$BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END$$")

    async with make_pool(postgres, on_event=found.append) as pool:
        await pool.run_transaction(work)
    assert kinds(found).count("Retried") == 1


async def fetch(pool: neon_async.Pool) -> None:
    await pool.fetch("SELECT 1")


async def acquire(pool: neon_async.Pool) -> None:
    async with pool.acquire() as connection:
        await connection.fetch("SELECT 1")


@pytest.mark.parametrize("use", [fetch, acquire])
@pytest.mark.parametrize("ending", ["terminate", "close"])
@pytest.mark.parametrize("kind", ["Acquired", "Released", "Waited", "Connected"])
async def test_a_function_may_end_the_pool(
    postgres: LocalPostgres, use: Callable[[neon_async.Pool], Awaitable[None]], ending: str, kind: str
) -> None:
    closing: list[asyncio.Future[None]] = []

    def end(event: PoolEvent) -> None:
        if type(event).__name__ == kind and not pool.is_closing():
            if ending == "terminate":
                pool.terminate()
            else:
                closing.append(asyncio.ensure_future(pool.close(timeout=HANG)))

    async with asyncio.timeout(HANG):
        pool = await make_pool(postgres, max_size=1, on_event=end)
        with contextlib.suppress(neon_async.PoolClosedError, asyncpg.InterfaceError):
            await use(pool)
        await asyncio.gather(*closing)
        await until(lambda: pool.get_size() == 0)
    assert pool.is_closing()
    assert pool.stats().vacant == 1


async def test_a_function_may_release_the_connection_that_is_being_released(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    releasing: list[BaseException] = []

    def release(event: PoolEvent) -> None:
        if isinstance(event, Released):
            with pytest.raises(StopIteration) as ended:
                pool.release(connection).send(None)
            releasing.append(ended.value)

    async with make_pool(postgres, max_size=1, on_event=release) as pool:
        connection = await pool.acquire()
        await connection.execute("SELECT 1")
        await pool.release(connection)
        assert len(releasing) == 1
        await pool.release(connection)
        assert pool.get_idle_size() == 1
    assert [record for record in caplog.records if vars(record).get("event") == "on_event_failed"] == []


async def test_a_function_that_fails_disturbs_nothing_and_is_logged(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: PoolEvent) -> None:
        raise ZeroDivisionError

    caplog.set_level(logging.ERROR, "neon_async")
    async with make_pool(postgres, on_event=fail) as pool:
        assert await pool.fetchval("SELECT 1") == 1
    [record, *_] = [record for record in caplog.records if vars(record).get("failed") == "Acquired"]
    assert (record.getMessage(), vars(record)["event"]) == ("on_event failed for Acquired", "on_event_failed")
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError


def test_something_that_cannot_be_called_is_refused(postgres: LocalPostgres) -> None:
    with pytest.raises(neon_async.ConfigurationError, match="on_event must be a function that takes an event"):
        make_pool(postgres, on_event="print")


@pytest.mark.parametrize("name", [name for name in events.__all__ if isinstance(getattr(events, name), type)])
def test_an_event_is_pickled_by_its_public_name(name: str) -> None:
    kind = getattr(events, name)
    event = kind(*range(len(kind._fields)))
    assert pickle.loads(pickle.dumps(event)) == event
    assert b"neon_async._" not in pickle.dumps(event)


def test_every_event_is_one_of_the_union() -> None:
    listed = {Acquired, Connected, ConnectFailed, ConnectionClosed, PoolClosed, PoolOpened, Released, Reset}
    assert set(PoolEvent.__args__) == listed | {ResetFailed, Retried, TimedOut, Waited, Woke}
