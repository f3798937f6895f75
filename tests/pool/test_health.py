"""What `Pool.health()` says, without a byte to the database."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
from support.probes import make_pool, until

import neon_async
from neon_async._pool.health_log import HealthLog
from neon_async.testing import LocalEndpoint


def test_a_pool_that_is_not_open_is_unavailable() -> None:
    assert HealthLog().snapshot().state == "unavailable"


def test_a_state_that_is_noted_again_keeps_its_begin() -> None:
    log = HealthLog()
    log.entered(is_open=True)
    log.failed(OSError("first"))
    first = log.snapshot()
    log.failed(OSError("second"))
    second = log.snapshot()
    assert (first.state, second.state) == ("unavailable", "unavailable")
    assert second.since == first.since
    assert str(second.last_error) == "second"
    assert repr(log) == "<HealthLog: unavailable>"


def test_a_snapshot_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HealthLog().snapshot().state = "ready"  # type: ignore[misc]


@pytest.mark.anyio
async def test_a_pool_knows_whether_it_is_ready_asleep_or_unavailable(endpoint: LocalEndpoint) -> None:
    began = datetime.now(UTC)
    pool = make_pool(endpoint, acquire_timeout=0.5)
    assert pool.health().state == "unavailable"
    async with pool:
        asleep = pool.health()
        assert (asleep.state, asleep.last_error, asleep.last_success_at) == ("asleep", None, None)
        await pool.fetchval("SELECT 1")
        ready = pool.health()
        assert ready.state == "ready"
        assert ready.last_success_at is not None
        assert began <= asleep.since <= ready.since <= ready.last_success_at
        read = endpoint.client_bytes
        assert pool.health() == ready
        assert endpoint.client_bytes == read

        endpoint.suspend()
        await until(lambda: pool.stats().size == 0)
        assert pool.health().state == "asleep"
        endpoint.refuse()
        with pytest.raises(neon_async.PoolTimeoutError):
            await pool.fetchval("SELECT 1")
        refused = pool.health()
        assert refused.state == "unavailable"
        assert isinstance(refused.last_error, neon_async.ConnectError)
        assert refused.last_error_at is not None

        endpoint.accept()
        await pool.fetchval("SELECT 1", timeout=10)
        again = pool.health()
        assert (again.state, again.last_error) == ("ready", refused.last_error)
    assert pool.health().state == "unavailable"


@pytest.mark.anyio
async def test_a_pool_with_a_connection_is_ready_although_another_connect_fails(endpoint: LocalEndpoint) -> None:
    async with make_pool(endpoint, acquire_timeout=0.5) as pool, pool.acquire():
        endpoint.refuse()
        with pytest.raises(neon_async.PoolTimeoutError):
            await pool.fetchval("SELECT 1")
        assert pool.health().state == "ready"
