"""neon_async.opentelemetry: metrics and spans, with OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from support.probes import make_pool

import neon_async
from neon_async.opentelemetry import Telemetry
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

POOL_NAME = "db.client.connection.pool.name"


class Backend:
    """The SDK with everything in memory."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(meter_provider=MeterProvider([self.reader]), tracer_provider=self.tracers)

    def metrics(self) -> dict[str, list[Any]]:
        """Return the data points of each metric."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}

    def spans(self, name: str) -> list[Any]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint


async def test_the_metrics_of_the_semantic_conventions_have_the_numbers_of_the_pool(postgres: LocalPostgres) -> None:
    backend = Backend()
    async with make_pool(postgres, init_size=1, max_size=3, on_event=backend.telemetry) as pool:
        async with pool.acquire() as connection, pool.acquire():
            await connection.execute("SELECT 1")
            found = backend.metrics()
        await pool.fetchval("SELECT 1")
        later = backend.metrics()
    prefix = "db.client.connection."
    counts = {point.attributes[f"{prefix}state"]: point.value for point in found[f"{prefix}count"]}
    assert counts == {"idle": 0, "used": 2}
    for name, value in {"max": 3, "idle.max": 3, "idle.min": 0, "pending_requests": 0}.items():
        [point] = found[prefix + name]
        assert (point.value, dict(point.attributes)) == (value, {POOL_NAME: pool.name})
    for name, count in {"wait_time": 3, "use_time": 3, "create_time": 2}.items():
        [point] = later[prefix + name]
        assert (point.count, point.attributes[POOL_NAME]) == (count, pool.name)
    assert later["neon_async.wake_time"][0].count == 1
    assert backend.metrics().get(f"{prefix}count", []) == []  # the pool is closed


async def test_pools_of_one_name_are_added_up(postgres: LocalPostgres) -> None:
    backend = Backend()
    async with (
        make_pool(postgres, max_size=2, on_event=backend.telemetry),
        make_pool(postgres, max_size=3, on_event=backend.telemetry),
    ):
        [point] = backend.metrics()["db.client.connection.max"]
        assert point.value == 5


async def test_a_dial_is_a_span_with_its_steps_and_a_wait_is_one_in_the_trace_of_its_caller(
    postgres: LocalPostgres,
) -> None:
    backend = Backend()
    tracer = backend.tracers.get_tracer("test")
    async with make_pool(postgres, on_event=backend.telemetry) as pool:
        with tracer.start_as_current_span("request") as request:
            await pool.fetchval("SELECT 1")
        await pool.fetchval("SELECT 1")
    [dial] = backend.spans("connect")
    assert [event.name for event in dial.events] == ["tcp", "tls", "authentication"]
    assert dial.start_time <= dial.events[0].timestamp <= dial.events[-1].timestamp <= dial.end_time
    assert dial.parent is None
    [wait] = backend.spans("acquire")
    assert wait.parent.span_id == request.get_span_context().span_id
    assert wait.attributes[POOL_NAME] == pool.name
    assert len(backend.spans("wake")) == 1


async def test_failures_are_counted_and_their_spans_have_the_error(endpoint: LocalEndpoint) -> None:
    backend = Backend()
    endpoint.refuse()
    async with make_pool(endpoint, acquire_timeout=0.3, on_event=backend.telemetry) as pool:
        with pytest.raises(neon_async.PoolTimeoutError):
            await pool.fetchval("SELECT 1")
    [timeouts] = backend.metrics()["db.client.connection.timeouts"]
    assert timeouts.value == 1
    dial = backend.spans("connect")[0]
    assert (dial.status.status_code, dial.attributes["error.type"]) == (StatusCode.ERROR, "ConnectError")


async def test_retries_and_resets_are_counted(postgres: LocalPostgres) -> None:
    backend = Backend()
    attempts = iter([True, False])

    async def work(connection: Any) -> None:
        if next(attempts):
            await connection.execute("DO $$BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END$$")

    async with make_pool(postgres, on_event=backend.telemetry) as pool:
        await pool.run_transaction(work)
        await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(3)))
        found = backend.metrics()
        assert found["neon_async.resets"][0].value == pool.stats().resets
    assert found["neon_async.retries"][0].value == 1
    assert repr(backend.telemetry) == "<Telemetry of 0 pools>"
