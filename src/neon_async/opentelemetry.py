"""OpenTelemetry: metrics of the semantic conventions and spans, made from the events of a pool.

    telemetry = Telemetry()
    pool = neon_async.create_pool(dsn, on_event=telemetry)

One object serves any number of pools. Spans of queries stay with the instrumentation of asyncpg. Install it with
`pip install neon-async[otel]`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation
from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider

from ._pool.events import (
    Acquired,
    Connected,
    ConnectFailed,
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
from ._pool.pool import Pool
from ._pool.stats import PoolStats

__all__ = ("Telemetry",)

_POOL_NAME = "db.client.connection.pool.name"
_STATE = "db.client.connection.state"
_SCOPE = "neon_async"
# Seconds: those of the semantic conventions for the duration of a database call.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


class Telemetry:
    """A function for `on_event=` that records metrics and spans.

    Metrics of the semantic conventions, which are in development there: `db.client.connection.count` with the state
    `idle` or `used`, `.idle.max`, `.idle.min`, `.max`, `.pending_requests`, `.timeouts`, `.create_time`, `.wait_time`
    and `.use_time`. Metrics of our own: `neon_async.wake_time`, `neon_async.resets`, `neon_async.reset_failures`,
    `neon_async.heals` and `neon_async.retries`. All have `db.client.connection.pool.name`.

    Spans: `acquire` for an acquire that had to wait, in the trace of its caller; `connect` for a dial, with its steps
    as events; `wake` for the time from the first dial of a pool without a connection to that connection.

    Args:
        meter_provider: Default: the global one.
        tracer_provider: Default: the global one.
    """

    def __init__(
        self, *, meter_provider: MeterProvider | None = None, tracer_provider: TracerProvider | None = None
    ) -> None:
        release = version("neon-async")
        meter = (meter_provider or metrics.get_meter_provider()).get_meter(_SCOPE, release)
        self._tracer = (tracer_provider or trace.get_tracer_provider()).get_tracer(_SCOPE, release)
        self._pools: list[Pool] = []
        self._attributes: dict[str, dict[str, str]] = {}
        wait_time = _histogram(meter, "db.client.connection.wait_time", "Time to acquire a connection.")
        use_time = _histogram(meter, "db.client.connection.use_time", "Time from an acquire to its release.")
        self._create_time = _histogram(meter, "db.client.connection.create_time", "Time to make a connection.")
        self._wake_time = _histogram(meter, "neon_async.wake_time", "Time until a pool without a connection has one.")
        self._times = {Acquired: wait_time, Released: use_time}
        self._counters = {
            event: meter.create_counter(name, unit, description)
            for event, (name, unit, description) in _COUNTERS.items()
        }
        for gauge in _GAUGES:
            meter.create_observable_up_down_counter(gauge, [_Observer(self, gauge)], "{connection}")
        meter.create_observable_counter("neon_async.heals", [_Observer(self, "neon_async.heals")], "{heal}")

    def __repr__(self) -> str:
        return f"<Telemetry of {len(self._pools)} pools>"

    def __call__(self, event: PoolEvent) -> None:
        """Record one event."""
        kind = type(event)
        if kind in self._times:
            self._times[kind].record(event.seconds, self.attributes_of(event.pool_name))  # type: ignore[union-attr]
        elif kind in self._counters:
            self._counters[kind].add(1, self.attributes_of(event.pool_name))  # type: ignore[union-attr]
        else:
            self._note_rare(event)

    def _note_rare(self, event: PoolEvent) -> None:
        match event:
            case Waited():
                self._add_span("acquire", event.pool_name, event.seconds)
            case Connected():
                self._create_time.record(event.seconds, self.attributes_of(event.pool_name))
                self._add_span("connect", event.pool_name, event.seconds, event.steps)
            case ConnectFailed():
                self._add_span("connect", event.pool_name, event.seconds, event.steps, event.error)
            case Woke():
                self._wake_time.record(event.seconds, self.attributes_of(event.pool_name))
                self._add_span("wake", event.pool_name, event.seconds)
            case PoolOpened():
                self._pools.append(event.pool)
            case PoolClosed():
                self._pools = [pool for pool in self._pools if pool is not event.pool]

    def attributes_of(self, pool_name: str) -> dict[str, str]:
        """Return the attributes of the metrics of one pool."""
        return self._attributes.setdefault(pool_name, {_POOL_NAME: pool_name})

    def sums(self) -> dict[str, Counter[str]]:
        """Return the numbers of all pools, added up where pools have the same name."""
        found: dict[str, Counter[str]] = {}
        for pool in self._pools:
            found.setdefault(pool.name, Counter()).update(_numbers(pool.stats()))
        return found

    def _add_span(
        self,
        name: str,
        pool_name: str,
        seconds: float,
        steps: Iterable[tuple[str, float]] = (),
        error: Exception | None = None,
    ) -> None:
        """Add a span that ends now."""
        end = time.time_ns()
        begin = end - int(seconds * 1e9)
        attributes = {"db.system.name": "postgresql", **self.attributes_of(pool_name)}
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes, start_time=begin)
        for step, after in steps:
            span.add_event(step, timestamp=begin + int(after * 1e9))
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end(end)


class _Observer:
    """Reports one number of each pool when metrics are collected."""

    def __init__(self, telemetry: Telemetry, metric: str) -> None:
        self._telemetry = telemetry
        self._metric = metric

    def __call__(self, _: CallbackOptions) -> Iterable[Observation]:
        for name, numbers in self._telemetry.sums().items():
            attributes = self._telemetry.attributes_of(name)
            if self._metric == "db.client.connection.count":
                for state in ("idle", "used"):
                    yield Observation(numbers[state], attributes | {_STATE: state})
            else:
                yield Observation(numbers[self._metric], attributes)


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_BUCKETS)


_COUNTERS: dict[Callable[..., PoolEvent], tuple[str, str, str]] = {
    TimedOut: ("db.client.connection.timeouts", "{timeout}", "Acquires that got no connection in time."),
    Reset: ("neon_async.resets", "{reset}", "Resets that succeeded."),
    ResetFailed: ("neon_async.reset_failures", "{reset}", "Resets that failed and ended their connection."),
    Retried: ("neon_async.retries", "{attempt}", "Further attempts of run_transaction()."),
}

_GAUGES = (
    "db.client.connection.count",
    "db.client.connection.idle.max",
    "db.client.connection.idle.min",
    "db.client.connection.max",
    "db.client.connection.pending_requests",
)


def _numbers(stats: PoolStats) -> dict[str, int]:
    return {
        "idle": stats.size - stats.in_use,
        "used": stats.in_use,
        "db.client.connection.idle.max": stats.max_size,
        "db.client.connection.idle.min": stats.min_size,
        "db.client.connection.max": stats.max_size,
        "db.client.connection.pending_requests": stats.waiting,
        "neon_async.heals": stats.heals,
    }
