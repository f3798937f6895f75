"""neon_async.listen(): what arrives, and what is said about what may not have arrived."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from support.probes import HANG, connected, nothing_is_left, until

import neon_async
from neon_async import Gap, Listener, Notification, listen
from neon_async._driver import listen as module
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint


def listening(server: LocalEndpoint, *channels: str, **options: Any) -> Listener:
    return listen(server.dsn, *(channels or ("orders",)), trust_anchor=server.trust_anchor, **options)


async def notify(server: LocalPostgres, payload: str, channel: str = "orders") -> None:
    async with connected(server) as connection:
        await connection.execute("SELECT pg_notify($1, $2)", channel, payload)


async def following(events: Listener) -> Notification | Gap:
    async with asyncio.timeout(HANG):
        return await anext(events)


async def test_a_gap_comes_first_and_notifications_in_order(endpoint: LocalEndpoint, postgres: LocalPostgres) -> None:
    async with listening(endpoint, "orders", "Other Channel") as events:
        assert await following(events) == Gap(None)
        for number in range(3):
            await notify(postgres, str(number), ("orders", "Other Channel")[number % 2])
        found = [await following(events) for _ in range(3)]
    assert all(isinstance(event, Notification) and event.pid for event in found)
    assert [(event.channel, event.payload) for event in found if isinstance(event, Notification)] == [
        ("orders", "0"),
        ("Other Channel", "1"),
        ("orders", "2"),
    ]


@pytest.mark.parametrize("fault", ["suspend", "cut"])
async def test_a_lost_connection_is_made_again_with_a_gap(
    endpoint: LocalEndpoint, postgres: LocalPostgres, fault: str
) -> None:
    async with listening(endpoint) as events:
        await following(events)
        await notify(postgres, "heard")
        await following(events)
        heard = datetime.now(UTC)
        getattr(endpoint, fault)()
        await notify(postgres, "missed")
        gap = await following(events)
        assert isinstance(gap, Gap)
        assert gap.since is not None
        assert gap.since <= heard
        await notify(postgres, "heard again")
        event = await following(events)
        assert isinstance(event, Notification)
        assert event.payload == "heard again"


async def test_a_server_that_ends_every_connection_at_once_is_not_connected_to_in_a_loop(
    endpoint: LocalEndpoint,
) -> None:
    async with listening(endpoint, server_settings={"idle_session_timeout": "5ms"}) as events:
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while True:
                    assert isinstance(await anext(events), Gap)
        assert 2 <= endpoint.connects <= 5 * (time.monotonic() - began)


async def test_an_outage_is_outlasted_and_logged_once(
    endpoint: LocalEndpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_CAP", 0.05)
    caplog.set_level("WARNING", "neon_async")
    async with listening(endpoint) as events:
        await following(events)
        endpoint.refuse()
        endpoint.cut()
        waiting = asyncio.ensure_future(following(events))
        connects = endpoint.connects
        await until(lambda: endpoint.connects > connects + 3)
        endpoint.accept()
        assert isinstance(await waiting, Gap)
    assert len([message for message in caplog.messages if "cannot listen, retrying: " in message]) == 1
    assert len([message for message in caplog.messages if "listening again" in message]) == 1


async def test_a_slow_consumer_gets_a_gap_in_place_of_what_was_dropped(
    endpoint: LocalEndpoint, postgres: LocalPostgres
) -> None:
    async with listening(endpoint, queue_size=2) as events:
        await following(events)
        async with connected(postgres) as connection:  # what one transaction notifies of comes in one piece
            await connection.execute("SELECT pg_notify('orders', n::text) FROM generate_series(1, 5) n")
        await until(lambda: len(events._queue) == 3)
        found = [await following(events) for _ in range(3)]
        assert [type(event) for event in found] == [Notification, Notification, Gap]
        assert isinstance(found[2], Gap)
        assert found[2].since is not None
        await notify(postgres, "later")
        event = await following(events)
        assert isinstance(event, Notification)
        assert event.payload == "later"


async def test_an_idle_listener_does_not_wake_the_compute_before_max_idle(
    endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUIET", 0.0)
    async with listening(endpoint, max_idle=1000) as events:
        await following(events)
        endpoint.suspend()
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: events._connection is None)
        await asyncio.sleep(0.05)  # nothing happens, which no condition can show
        assert endpoint.state == "suspended"
    with pytest.raises(StopAsyncIteration):
        await waiting
    async with listening(endpoint, max_idle=0.05) as events:
        await following(events)
        endpoint.suspend()
        assert isinstance(await following(events), Gap)


async def test_a_connection_that_was_busy_is_replaced_at_once(endpoint: LocalEndpoint, postgres: LocalPostgres) -> None:
    async with listening(endpoint, max_idle=1000) as events:
        await following(events)
        await notify(postgres, "busy")
        await following(events)
        endpoint.cut()
        assert isinstance(await following(events), Gap)


async def test_closing_ends_an_iteration(endpoint: LocalEndpoint) -> None:
    events = listening(endpoint)
    found = []

    async def consume() -> None:
        found.extend([event async for event in events])

    consuming = asyncio.ensure_future(consume())
    await until(lambda: events._connection)
    await events.aclose()
    await events.aclose()
    await consuming
    assert found == [Gap(None)]
    assert "orders" in repr(events)


async def test_closing_during_a_connect_leaves_nothing(endpoint: LocalEndpoint) -> None:
    endpoint.freeze()
    async with nothing_is_left():
        events = listening(endpoint)
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: endpoint.connections)
        await events.aclose()
        endpoint.thaw()
        with pytest.raises(StopAsyncIteration):
            await waiting
        await until(lambda: endpoint.connections == 0)


@pytest.mark.parametrize("frozen", [True, False], ids=["during a connect", "while it waits"])
async def test_a_cancelled_iteration_loses_nothing(
    endpoint: LocalEndpoint, postgres: LocalPostgres, frozen: bool
) -> None:
    async with nothing_is_left(), listening(endpoint) as events:
        if frozen:
            endpoint.freeze()
        else:
            assert await following(events) == Gap(None)
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: endpoint.connections)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        endpoint.thaw()
        if frozen:
            assert await following(events) == Gap(None)
        await notify(postgres, "heard")
        event = await following(events)
        assert isinstance(event, Notification)
        assert event.payload == "heard"
        await events.aclose()
        await until(lambda: endpoint.connections == 0)


async def test_a_wrong_password_is_reported_and_the_next_call_tries_again(endpoint: LocalEndpoint) -> None:
    async with listening(endpoint, password="wrong") as events:
        for _ in range(2):
            with pytest.raises(neon_async.InvalidPasswordError):
                await following(events)


async def test_the_pooled_host_leads_to_the_direct_one(endpoint: LocalEndpoint, postgres: LocalPostgres) -> None:
    assert endpoint.host in endpoint.dsn
    direct = endpoint.host
    pooled = direct.replace(direct.partition(".")[0], direct.partition(".")[0] + "-pooler", 1)
    async with listen(endpoint.dsn.replace(direct, pooled), "orders", trust_anchor=endpoint.trust_anchor) as events:
        assert await following(events) == Gap(None)
        await notify(postgres, "heard")
        assert isinstance(await following(events), Notification)


@pytest.mark.parametrize(
    ("channels", "options", "complaint"),
    [
        pytest.param((), {}, r"needs the names of channels, such as listen\(dsn, \"orders\"\)", id="no channel"),
        pytest.param(("",), {}, "needs the names of channels", id="an empty channel"),
        pytest.param(("a",), {"max_idle": -1}, "max_idle", id="a negative time"),
        pytest.param(("a",), {"queue_size": 0}, "queue_size", id="no room"),
        pytest.param(("a",), {"pooled": True, "host": "db.example.com"}, "Pass the direct host", id="unknown pooler"),
    ],
)
def test_bad_arguments_are_refused_in_the_call(
    channels: tuple[str, ...], options: dict[str, Any], complaint: str, postgres: LocalPostgres
) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=complaint):
        listen(postgres.dsn, *channels, trust_anchor=postgres.trust_anchor, **options)


def test_events_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gap(None).since = None  # type: ignore[misc]
