"""Closed sets of strings are literals, for what callers give and for what they get, each under one public name."""

from __future__ import annotations

from typing import Literal, Unpack, assert_type

import neon_async
from neon_async import IsolationLevel, PoolKeywords, PoolState, RevocationMode, RevocationStatus, SSLNegotiation
from neon_async.events import Connected, ConnectStep


def the_sets(
    isolation: IsolationLevel,
    mode: RevocationMode,
    negotiation: SSLNegotiation,
    status: RevocationStatus,
    state: PoolState,
    step: ConnectStep,
) -> None:
    assert_type(isolation, Literal["read_uncommitted", "read_committed", "repeatable_read", "serializable"])
    assert_type(mode, Literal["off", "advise", "require"])
    assert_type(negotiation, Literal["direct", "postgres"])
    assert_type(status, Literal["off", "good", "revoked", "unknown", "pending", "short-lived"])
    assert_type(state, Literal["ready", "asleep", "unavailable"])
    assert_type(step, Literal["dns", "tcp", "tls", "revocation", "authentication"])


async def given(dsn: str, mode: RevocationMode, text: str) -> None:
    neon_async.create_pool(dsn, sslmode="verify-full", ssl=True, channel_binding="require", revocation="advise")
    neon_async.create_pool(dsn, revocation=mode, sslnegotiation="postgres", keepalives="1", sslrootcert="system")
    await neon_async.connect(
        dsn, sslmode="verify-full", sslnegotiation="direct", channel_binding="prefer", revocation=mode
    )
    await neon_async.connect(dsn, sslnegotiation="", service="")  # variables of libpq that are ignored
    neon_async.listen(dsn, "orders", revocation="require", sslmode="verify-full")
    neon_async.patch_asyncpg(revocation="require", sslmode="verify-full")

    neon_async.create_pool(dsn, sslmode="require")  # type: ignore[call-overload]
    neon_async.create_pool(dsn, ssl=False)  # type: ignore[call-overload]
    neon_async.create_pool(dsn, revocation="on")  # type: ignore[call-overload]
    neon_async.create_pool(dsn, revocation=text)  # type: ignore[call-overload]
    neon_async.create_pool(dsn, channel_binding="disable")  # type: ignore[call-overload]
    await neon_async.connect(dsn, sslnegotiation="ssl")  # type: ignore[call-overload]
    await neon_async.connect(dsn, target_session_attrs="read-write")  # type: ignore[call-overload]
    await neon_async.connect(dsn, service="orders")  # type: ignore[call-overload]
    neon_async.listen(dsn, "orders", revocation="on")  # type: ignore[arg-type]
    neon_async.patch_asyncpg(sslmode="require")  # type: ignore[arg-type]


async def in_transactions(pool: neon_async.Pool, connection: neon_async.Connection, level: IsolationLevel) -> None:
    async with pool.transaction(isolation="serializable", readonly=True, deferrable=True), pool.transaction():
        pass
    async with connection.transaction(isolation=level), connection.transaction(role="app", settings={"app.user": "7"}):
        pass

    async def work(connection: neon_async.Connection) -> int:
        return 1

    assert_type(await pool.run_transaction(work, isolation="repeatable_read"), int)

    pool.transaction(isolation="snapshot")  # type: ignore[arg-type]
    connection.transaction(isolation="read committed")  # type: ignore[arg-type]
    await pool.run_transaction(work, isolation="SERIALIZABLE")  # type: ignore[arg-type]


def returned(pool: neon_async.Pool, report: neon_async.TLSReport, event: Connected) -> int:
    assert_type(pool.health().state, PoolState)
    assert_type(report.negotiation, SSLNegotiation)
    assert_type(report.version, Literal["TLSv1.3"])
    assert_type(report.mechanism, Literal["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"] | None)
    assert_type(report.revocation.status, RevocationStatus)
    assert_type(event.steps, tuple[tuple[ConnectStep, float], ...])
    match pool.health().state:
        case "ready" | "asleep":
            return 200
        case "unavailable":
            return 503


def my_pool(dsn: str, **options: Unpack[PoolKeywords]) -> neon_async.Pool:
    """A wrapper of a user's own, whose callers are checked."""
    return neon_async.create_pool(dsn, **options)


def my_listener(dsn: str, **keywords: Unpack[neon_async.ConnectKeywords]) -> neon_async.Listener:
    return neon_async.listen(dsn, "orders", **keywords)


def through_wrappers(dsn: str, anchor: neon_async.AnchorSource, password: neon_async.PasswordSource) -> None:
    my_pool(dsn, max_size=3, password=password, isolation=1)  # type: ignore[call-arg]
    my_pool(dsn, max_size=3, revocation="off")
    my_pool(dsn, revocation="on")  # type: ignore[arg-type]
    my_listener(dsn, revocation="advise", password=lambda: "secret")
    my_listener(dsn, max_size=3)  # type: ignore[call-arg]
    neon_async.create_ssl_context(trust_anchor=anchor)
