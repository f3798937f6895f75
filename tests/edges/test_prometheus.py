"""neon_async.prometheus: the numbers of a pool in a registry of prometheus_client."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.probes import make_pool

from neon_async.prometheus import PoolMetrics
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


async def test_a_scrape_has_the_numbers_of_the_statistics(postgres: LocalPostgres) -> None:
    registry = CollectorRegistry()
    metrics = PoolMetrics(registry)
    async with make_pool(postgres, max_size=3, on_event=metrics) as pool, pool.acquire():
        await pool.fetchval("SELECT 1")
        labels = {"pool": pool.name}
        stats = pool.stats()
        assert registry.get_sample_value("neon_async_pool_in_use", labels) == 1
        assert registry.get_sample_value("neon_async_pool_max_size", labels) == 3
        assert registry.get_sample_value("neon_async_pool_acquires_total", labels) == stats.acquires == 2
        assert registry.get_sample_value("neon_async_pool_wait_seconds_count", labels) == 2
        assert registry.get_sample_value("neon_async_pool_create_seconds_count", labels) == stats.dials
        assert registry.get_sample_value("neon_async_pool_wake_seconds_count", labels) == 1
        assert repr(metrics) == "<PoolMetrics of 1 pools>"
    assert registry.get_sample_value("neon_async_pool_in_use", labels) is None


async def test_pools_of_one_name_are_added_up(postgres: LocalPostgres) -> None:
    registry = CollectorRegistry()
    metrics = PoolMetrics(registry)
    async with make_pool(postgres, on_event=metrics) as pool, make_pool(postgres, on_event=metrics):
        assert registry.get_sample_value("neon_async_pool_max_size", {"pool": pool.name}) == 20
        assert generate_latest(registry).count(b"neon_async_pool_max_size{") == 1
