"""Prometheus: a collector with the numbers of `PoolStats`, and histograms made from the events of a pool.

    metrics = PoolMetrics()
    pool = neon_async.create_pool(dsn, on_event=metrics)

One object serves any number of pools. Install it with `pip install neon-async[prometheus]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ._pool.events import Acquired, Connected, PoolClosed, PoolEvent, PoolOpened, Released, Woke
from ._pool.pool import Pool

__all__ = ("PoolMetrics",)

# Seconds; the same as for OpenTelemetry.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

_GAUGES = {
    "max_size": "The largest number of connections.",
    "size": "Open connections.",
    "in_use": "Connections that callers hold.",
    "idle": "Connections that are ready to be lent.",
    "checking": "Idle connections that are being pinged.",
    "resetting": "Connections that are being reset or closed.",
    "connecting": "Dials under way.",
    "waiting": "Callers that wait for a connection.",
}
_COUNTERS = {
    "acquires": "Connections that were lent.",
    "waits": "Callers that had to wait.",
    "timeouts": "Callers that got no connection in time.",
    "dials": "Attempts to connect.",
    "dial_failures": "Attempts to connect that failed.",
    "wakes": "Connections that were made when there was none.",
    "resets": "Resets that succeeded.",
    "reset_failures": "Resets that failed and ended their connection.",
    "terminations": "Connections that ended.",
    "heals": "Renewals of prepared statements whose result had changed.",
    "retries": "Further attempts of run_transaction().",
}


class PoolMetrics(Collector):
    """A function for `on_event=`, and a collector: gauges and counters of `pool.stats()`, and histograms of durations.

    Every metric is named `neon_async_pool_...` and has the label `pool`, the name of the pool. Pools of the same name
    are added up.

    Args:
        registry: Where to register. Default: the global registry.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._pools: list[Pool] = []
        self._times = {event: _histogram(registry, *texts) for event, texts in _HISTOGRAMS.items()}
        registry.register(self)

    def __repr__(self) -> str:
        return f"<PoolMetrics of {len(self._pools)} pools>"

    def __call__(self, event: PoolEvent) -> None:
        """Record one event."""
        match event:
            case Acquired() | Released() | Connected() | Woke():
                self._times[type(event)].labels(event.pool_name).observe(event.seconds)
            case PoolOpened():
                self._pools.append(event.pool)
            case PoolClosed():
                self._pools = [pool for pool in self._pools if pool is not event.pool]

    def collect(self) -> Iterable[Metric]:
        """Return the gauges and counters of all open pools."""
        sums: dict[str, Counter[str]] = {}
        for pool in self._pools:
            stats = pool.stats()
            numbers = {name: getattr(stats, name) for name in (*_GAUGES, *_COUNTERS)}
            sums.setdefault(pool.name, Counter()).update(numbers)
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, documentation in table.items():
                family = kind(f"neon_async_pool_{name}", documentation, labels=["pool"])
                for pool_name, sum_of in sums.items():
                    family.add_metric([pool_name], sum_of[name])
                yield family


_HISTOGRAMS: dict[Callable[..., PoolEvent], tuple[str, str]] = {
    Acquired: ("wait", "Time to acquire a connection."),
    Released: ("use", "Time from an acquire to its release."),
    Connected: ("create", "Time to make a connection."),
    Woke: ("wake", "Time until a pool without a connection has one."),
}


def _histogram(registry: CollectorRegistry, name: str, documentation: str) -> Histogram:
    full_name = f"neon_async_pool_{name}_seconds"
    return Histogram(full_name, documentation, ["pool"], registry=registry, buckets=_BUCKETS)
