"""The frameworks: dependencies of FastAPI, aiohttp, SQLAlchemy, telemetry, and servers for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Annotated, assert_type

import fastapi as framework
import pytest
from aiohttp import web
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

import neon_async
from neon_async import Pool, aiohttp, fastapi, opentelemetry, prometheus, sqlalchemy, testing
from neon_async.fastapi import Claims, Connection, Transaction, transaction

# ---------------------------------------------------------------------------------------------------------------------
# FastAPI

app = framework.FastAPI(lifespan=fastapi.lifespan("postgresql://host/db", max_size=5, revocation="advise"))


def claims() -> Claims:
    return Claims(role="app", settings={"app.user": "7"})


UserTransaction = Annotated[neon_async.Connection, transaction(claims, isolation="serializable")]


@app.post("/orders")
async def order(connection: Transaction, other: Connection, user: UserTransaction, pool: fastapi.Pool) -> int:
    assert_type(connection, neon_async.Connection)
    assert_type(other, neon_async.Connection)
    assert_type(user, neon_async.Connection)
    assert_type(pool, Pool)
    return int(await connection.fetchval("SELECT 1"))


def set_up_fastapi() -> None:
    assert_type(fastapi.pool_of(app), Pool)
    fastapi.add_exception_handlers(app)
    app.add_route("/ready", fastapi.readiness("default"))
    fastapi.lifespan("postgresql://host/db", max_sise=5)  # type: ignore[call-arg]
    fastapi.lifespan("postgresql://host/db", revocation="on")  # type: ignore[arg-type]
    transaction(claims, isolation="snapshot")  # type: ignore[arg-type]
    transaction(int)  # type: ignore[arg-type]
    Claims(settings={"app.user": 7})  # type: ignore[dict-item]


# ---------------------------------------------------------------------------------------------------------------------
# aiohttp


async def handle(request: web.Request) -> web.Response:
    assert_type(request.app[aiohttp.POOL], Pool)
    begun = aiohttp.transaction(request, isolation="read_committed", role="app")
    assert_type(begun, AbstractAsyncContextManager[neon_async.Connection])
    async with begun as connection:
        assert_type(connection, neon_async.Connection)
    aiohttp.transaction(request, isolation="snapshot")  # type: ignore[arg-type]
    return web.json_response(1)


def set_up_aiohttp() -> None:
    service = web.Application(middlewares=[aiohttp.unavailable_middleware])
    service.cleanup_ctx.append(aiohttp.pool_context("postgresql://host/db", max_size=5))
    service.router.add_get("/ready", aiohttp.readiness())
    service.router.add_get("/orders", handle)
    aiohttp.pool_context("postgresql://host/db", max_sise=5)  # type: ignore[call-arg]
    aiohttp.readiness("default")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# SQLAlchemy and telemetry


def make_engines(dsn: str, url: URL, pool: Pool) -> None:
    assert_type(sqlalchemy.create_async_engine(dsn, pool_size=5, revocation="require", echo="debug"), AsyncEngine)
    assert_type(sqlalchemy.create_async_engine(url, isolation_level="REPEATABLE READ"), AsyncEngine)
    assert_type(sqlalchemy.create_async_engine(pool), AsyncEngine)
    sqlalchemy.create_async_engine(dsn, sslmode="require")  # type: ignore[arg-type]
    sqlalchemy.create_async_engine(dsn, isolation_level="snapshot")  # type: ignore[arg-type]
    sqlalchemy.create_async_engine(dsn, pool_sise=5)  # type: ignore[call-arg]


def observe(dsn: str) -> None:
    neon_async.create_pool(dsn, on_event=opentelemetry.Telemetry())
    neon_async.create_pool(dsn, on_event=prometheus.PoolMetrics())


# ---------------------------------------------------------------------------------------------------------------------
# Tests


@pytest.fixture
def client(neon_rollback: Pool) -> Iterator[framework.FastAPI]:
    with fastapi.use_pool(app, neon_rollback, name="default"):
        yield app


def note(state: testing.EndpointState) -> None: ...
def not_of_states(number: int) -> None: ...


async def with_servers() -> None:
    async with testing.LocalPostgres() as server, testing.LocalEndpoint(server, on_state=note) as endpoint:
        assert_type(endpoint.state, testing.EndpointState)
        assert_type((server.dsn, server.trust_anchor), tuple[str, bytes])
        testing.LocalEndpoint(server, on_state=not_of_states)  # type: ignore[arg-type]
        if endpoint.state == "asleep":  # type: ignore[comparison-overlap]
            endpoint.suspend()
