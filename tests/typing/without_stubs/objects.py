"""What users make, get and pass on: pools, callbacks, classes of their own, events, reports and errors."""

from __future__ import annotations

import ssl
from datetime import datetime
from typing import Any, assert_type

import neon_async
from neon_async import Connection, Gap, Notification, Pool, PoolHealth, PoolStats, TLSReport
from neon_async.events import Acquired, PoolEvent, PoolOpened


async def init(connection: Connection) -> None:
    await connection.execute("SET search_path TO app")


def not_async(connection: Connection) -> None: ...
def on_event(event: PoolEvent) -> None: ...
def not_of_events(number: int) -> None: ...


class OwnConnection(Connection):
    async def ping(self) -> int:
        return int(await self.fetchval("SELECT 1"))


class OwnPool(Pool):
    async def count(self) -> int:
        return int(await self.fetchval("SELECT count(*) FROM orders"))


async def make_pools(dsn: str) -> None:
    assert_type(neon_async.create_pool(dsn), Pool)
    assert_type(neon_async.create_pool(dsn, init=init, setup=init, reset=init, on_event=on_event), Pool)
    assert_type(neon_async.create_pool(dsn, max_size=5, leak_after=None, connection_class=OwnConnection), Pool)
    assert_type(neon_async.create_pool(dsn, pool_class=OwnPool), OwnPool)
    async with neon_async.create_pool(dsn, pool_class=OwnPool, min_size=1) as pool:
        assert_type(await pool.count(), int)
    assert_type(await neon_async.create_pool(dsn), Pool)
    assert_type(await neon_async.connect(dsn, connection_class=OwnConnection), OwnConnection)

    neon_async.create_pool(dsn, reset=not_async)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, on_event=not_of_events)  # type: ignore[arg-type]
    neon_async.create_pool(dsn, max_size="5")  # type: ignore[call-overload]
    neon_async.create_pool(dsn, mx_size=5)  # type: ignore[call-overload]
    neon_async.create_pool(dsn, pool_class=int)  # type: ignore[type-var]
    neon_async.connect(dsn, max_size=5)  # type: ignore[call-overload]


def observe(pool: Pool, connection: Connection) -> None:
    assert_type(pool.stats(), PoolStats)
    assert_type((pool.stats().idle, pool.stats().wait_seconds), tuple[int, float])
    assert_type(pool.health(), PoolHealth)
    assert_type((pool.health().since, pool.health().last_error), tuple[datetime, Exception | None])
    assert_type(pool.tls_report(), TLSReport | None)
    assert_type(neon_async.connection_tls_report(connection), TLSReport)
    assert_type(pool.endpoint, neon_async.Endpoint | None)
    assert_type(pool.name, str)
    pool.stats().idle = 1  # type: ignore[misc]
    pool.health().state = "ready"  # type: ignore[misc]


async def listen(dsn: str) -> None:
    async with neon_async.listen(dsn, "orders", "prices", max_idle=60) as events:
        assert_type(events, neon_async.Listener)
        async for event in events:
            assert_type(event, Notification | Gap)
            if isinstance(event, Gap):
                assert_type(event.since, datetime | None)
            else:
                assert_type((event.channel, event.payload, event.pid), tuple[str, str, int])

    neon_async.listen(dsn, 1)  # type: ignore[arg-type]
    neon_async.listen(dsn, "orders", max_size=1)  # type: ignore[call-arg]


def receive(event: PoolEvent) -> float:
    match event:
        case PoolOpened():
            assert_type(event.pool, Pool[Any])
        case Acquired(name, seconds):
            assert_type((name, seconds), tuple[str, float])
            return seconds
        case _:
            pass
    return 0.0


def handle(error: Exception) -> bool:
    if isinstance(error, neon_async.ConnectionLostError):
        assert_type((error.nothing_executed, error.nothing_committed), tuple[bool, bool])
    if isinstance(error, neon_async.NeonAsyncError):
        assert_type((error.retryable, error.unavailable), tuple[bool, bool])
    assert_type(neon_async.is_unavailable(error), bool)
    return neon_async.is_retryable(error)


def timeouts(*classes: type[TimeoutError]) -> None: ...
def network_errors(*classes: type[ConnectionError]) -> None: ...
def tls_errors(*classes: type[ssl.SSLError]) -> None: ...
def values(*classes: type[ValueError]) -> None: ...
def runtime_errors(*classes: type[RuntimeError]) -> None: ...


def second_parents() -> None:
    """Code that catches the builtin class of an error catches ours."""
    timeouts(neon_async.PoolTimeoutError, neon_async.ConnectTimeoutError, neon_async.QueryTimeoutError)
    network_errors(neon_async.ConnectError, neon_async.ConnectionLostError, neon_async.ProtocolError)
    tls_errors(neon_async.TLSError, neon_async.CertificateError, neon_async.CertificateRevokedError)
    values(neon_async.ConfigurationError, neon_async.InsecureConfigurationError)
    runtime_errors(neon_async.PoolBusyError, neon_async.UnsupportedEventLoopError)

    timeouts(neon_async.PoolBusyError)  # type: ignore[arg-type]
    runtime_errors(neon_async.ConfigurationError)  # type: ignore[arg-type]


def the_rest(dsn: str) -> None:
    assert_type(neon_async.create_ssl_context(trust_anchor=neon_async.LETS_ENCRYPT_ROOTS), ssl.SSLContext)
    assert_type(neon_async.harden_dsn(dsn), str)
    assert_type(neon_async.ISRG_ROOT_X1_SHA256, str)
    with neon_async.patch_asyncpg(min_size=0) as patch:
        assert_type(patch, neon_async.AsyncpgPatch)
    neon_async.create_ssl_context(trust_anchor=1)  # type: ignore[arg-type]
    neon_async.create_connection()  # type: ignore[attr-defined]
