"""neon_async.aiohttp: applications under aiohttp's server, in front of an endpoint that can fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from aiohttp import web
from support.probes import HANG, connected, until
from support.services import served_by_aiohttp

import neon_async
from neon_async.aiohttp import POOL, pool_context, readiness, transaction, unavailable_middleware, use_pool
from neon_async.testing import LocalEndpoint, LocalPostgres
from neon_async.testing._pools import rollback_pool

pytestmark = pytest.mark.anyio

TABLE = "orders_of_aiohttp"
REPORTS = web.AppKey("reports", neon_async.Pool)


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with connected(postgres) as admin:
        await admin.execute(f"DROP TABLE IF EXISTS {TABLE}")
        await admin.execute(f"CREATE TABLE {TABLE} (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint


async def one(request: web.Request) -> web.Response:
    return web.json_response(await request.config_dict[POOL].fetchval("SELECT 1"))


async def order(request: web.Request) -> web.Response:
    async with transaction(request, settings={"app.tenant": "7"}) as connection:
        await connection.execute(f"INSERT INTO {TABLE} VALUES ($1)", int(request.match_info["number"]))
        tenant = await connection.fetchval("SELECT current_setting('app.tenant')")
    return web.json_response(tenant)


async def unknown(request: web.Request) -> web.Response:
    raise neon_async.CommitUnknownError("no answer to COMMIT")


async def broken(request: web.Request) -> web.Response:
    return web.json_response(await request.app[POOL].fetchval("SELECT nothing_of_this_name"))


async def half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"begun")
    raise neon_async.ConnectError("gone")


def service(endpoint: LocalEndpoint, **options: Any) -> web.Application:
    app = web.Application(middlewares=[unavailable_middleware])
    app.cleanup_ctx.append(pool_context(endpoint.dsn, trust_anchor=endpoint.trust_anchor, **options))
    app.router.add_get("/ready", readiness())
    for handler in (one, unknown, broken, half):
        app.router.add_get(f"/{handler.__name__}", handler)
    app.router.add_post("/orders/{number}", order)
    return app


async def test_the_pool_lives_as_long_as_the_application(endpoint: LocalEndpoint) -> None:
    app = service(endpoint)
    async with served_by_aiohttp(app) as client:
        assert (await client.get("/one")).json() == 1
        assert app[POOL].health().state == "ready"
    assert app[POOL].is_closing()


async def test_a_transaction_is_committed_before_the_answer(endpoint: LocalEndpoint, postgres: LocalPostgres) -> None:
    async with served_by_aiohttp(service(endpoint)) as client:
        answers = [await client.post("/orders/1") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 500]  # the server refuses the second COMMIT
        assert answers[0].json() == "7"
        async with connected(postgres) as admin:
            assert await admin.fetchval(f"SELECT count(*) FROM {TABLE}") == 1


async def test_a_test_puts_a_pool_of_its_own_in_place_of_the_applications(
    endpoint: LocalEndpoint, postgres: LocalPostgres
) -> None:
    app, pool = service(endpoint), rollback_pool(postgres.dsn, postgres.trust_anchor, {})
    use_pool(app, pool)
    async with served_by_aiohttp(app) as client:
        answers = [await client.post("/orders/1") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 500]
    assert endpoint.connects == 0
    assert await pool.fetchval(f"SELECT count(*) FROM {TABLE}") == 1  # the application has not closed it
    pool.end()
    async with connected(postgres) as admin:
        assert await admin.fetchval(f"SELECT count(*) FROM {TABLE}") == 0


@pytest.mark.parametrize("cancels", [False, True], ids=["its handler goes on", "its handler is cancelled"])
async def test_a_client_that_disconnects_leaves_nothing_behind(
    cancels: bool, endpoint: LocalEndpoint, postgres: LocalPostgres
) -> None:
    entered = []

    async def slow(request: web.Request) -> web.Response:
        async with transaction(request) as connection:
            entered.append(await connection.fetchval("SELECT pg_backend_pid()"))
            number = len(entered)
            await connection.execute("SELECT pg_sleep($1)", HANG if cancels else 0.1)
            await connection.execute(f"INSERT INTO {TABLE} VALUES ($1)", number)
        return web.json_response(None)

    app = service(endpoint, max_size=2)
    app.router.add_get("/slow", slow)
    async with served_by_aiohttp(app, handler_cancellation=cancels) as client, connected(postgres) as admin:
        for number in range(3):
            asking = asyncio.ensure_future(client.get("/slow"))
            await until(lambda: len(entered) > number)  # noqa: B023
            asking.cancel()
        await until(lambda: app[POOL].stats().in_use == 0)
        assert (await client.get("/one")).json() == 1
        assert await admin.fetchval(f"SELECT count(*) FROM {TABLE}") == (0 if cancels else 3)
        assert not await admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL AND pid = ANY($1::int[])", entered
        )


async def test_an_outage_is_answered_with_503(endpoint: LocalEndpoint) -> None:
    async with served_by_aiohttp(service(endpoint, acquire_timeout=0.3)) as client:
        endpoint.refuse()
        answer = await client.get("/one")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) > 0


async def test_a_commit_of_unknown_outcome_is_answered_without_an_invitation_to_repeat(
    endpoint: LocalEndpoint,
) -> None:
    async with served_by_aiohttp(service(endpoint)) as client:
        answer = await client.get("/unknown")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, False)
        assert "may have been committed" in answer.json()["detail"]


async def test_other_errors_are_not_touched(endpoint: LocalEndpoint) -> None:
    async with served_by_aiohttp(service(endpoint)) as client:
        assert (await client.get("/broken")).status_code == 500
        assert (await client.get("/nothing")).status_code == 404
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/half")


async def test_readiness_asks_the_database_only_where_it_is_told_to(endpoint: LocalEndpoint) -> None:
    app = service(endpoint, acquire_timeout=0.3)
    async with served_by_aiohttp(app) as client:
        assert (await client.get("/ready")).status_code == 200
        assert endpoint.connects == 0
        assert (await client.get("/ready?deep=1")).status_code == 200
        assert endpoint.connects > 0
        endpoint.suspend()
        endpoint.refuse()
        await until(lambda: app[POOL].stats().size == 0)
        assert (await client.get("/one")).status_code == 503
        assert (await client.get("/ready")).status_code == 503


async def test_an_application_can_have_several_pools_and_subapplications(endpoint: LocalEndpoint) -> None:
    async def both(request: web.Request) -> web.Response:
        async with transaction(request, key=REPORTS, readonly=True) as connection:
            return web.json_response(await connection.fetchval("SHOW transaction_read_only"))

    app = service(endpoint)
    app.cleanup_ctx.append(pool_context(endpoint.dsn, key=REPORTS, trust_anchor=endpoint.trust_anchor))
    inside = web.Application()
    inside.router.add_get("/both", both)
    inside.router.add_get("/one", one)
    app.add_subapp("/inside", inside)
    app.router.add_get("/all", readiness(POOL, REPORTS))
    async with served_by_aiohttp(app) as client:
        assert set((await client.get("/ready")).json()["pools"]) == {"default"}
        assert set((await client.get("/all")).json()["pools"]) == {"default", f"{__name__}.reports"}
        assert (await client.get("/inside/both")).json() == "on"
        assert (await client.get("/inside/one")).json() == 1


async def test_two_pools_at_one_key_are_refused(endpoint: LocalEndpoint) -> None:
    app = service(endpoint)
    app.cleanup_ctx.append(pool_context(endpoint.dsn, trust_anchor=endpoint.trust_anchor))
    with pytest.raises(neon_async.ConfigurationError, match=r"has a pool at .* already"):
        async with served_by_aiohttp(app):
            pass


async def test_an_application_without_a_pool_is_told_how_to_get_one() -> None:
    app = web.Application()

    async def order_without(request: web.Request) -> web.Response:
        with pytest.raises(neon_async.ConfigurationError, match=r"Append pool_context\(dsn\) to its cleanup_ctx"):
            transaction(request)
        return web.Response()

    app.router.add_get("/", order_without)
    async with served_by_aiohttp(app) as client:
        assert (await client.get("/")).status_code == 200


def test_bad_parameters_are_refused_before_the_application_starts() -> None:
    with pytest.raises(neon_async.InsecureConfigurationError):
        pool_context("postgresql://u:p@ep-a-b-123456.eu-central-1.aws.neon.tech/db?sslmode=require")
