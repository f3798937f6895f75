"""neon_async.fastapi: applications under uvicorn, in front of an endpoint that can fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any

import asyncpg
import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, WebSocket
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from support.probes import connected, until
from support.services import served_by_uvicorn

import neon_async
from neon_async.fastapi import (
    Claims,
    Connection,
    Pool,
    Transaction,
    add_exception_handlers,
    lifespan,
    pool_of,
    readiness,
    transaction,
)
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

TABLE = "orders_of_fastapi"
SLEEPS = f"wait_event = 'PgSleep' AND query LIKE 'INSERT INTO {TABLE}%'"


class Order(BaseModel):
    id: int


def claims(x_tenant: Annotated[str, Header()]) -> Claims:
    return Claims(settings={"app.tenant": x_tenant})


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with connected(postgres) as admin:
        await admin.execute(f"DROP TABLE IF EXISTS {TABLE}")
        await admin.execute(f"CREATE TABLE {TABLE} (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, tenant text)")
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint


router = APIRouter()


@router.get("/one")
async def one(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT 1"))


@router.get("/same")
async def same(first: Connection, second: Connection) -> bool:
    return first is second


@router.post("/orders/{number}")
async def order(number: int, connection: Transaction) -> Order:
    await connection.execute(f"INSERT INTO {TABLE} VALUES ($1)", number)
    return Order(id=number)


@router.post("/raises/{number}")
async def raises(number: int, connection: Transaction) -> None:
    await connection.execute(f"INSERT INTO {TABLE} VALUES ($1)", number)
    raise HTTPException(409)


@router.post("/unfit/{number}", response_model=Order)
async def unfit(number: int, connection: Transaction) -> Any:
    await connection.execute(f"INSERT INTO {TABLE} VALUES ($1)", number)
    return {"id": "no number"}


@router.post("/tenant/{number}")
async def tenant(number: int, connection: Annotated[neon_async.Connection, transaction(claims)]) -> str:
    await connection.execute(f"INSERT INTO {TABLE} VALUES ($1, current_setting('app.tenant'))", number)
    return str(await connection.fetchval("SELECT current_setting('app.tenant')"))


@router.get("/snapshot")
async def snapshot(
    connection: Annotated[neon_async.Connection, transaction(isolation="repeatable_read", readonly=True)],
) -> list[str]:
    return [str(await connection.fetchval(f"SHOW transaction_{name}")) for name in ("isolation", "read_only")]


@router.get("/stream")
async def stream(pool: Pool, connection: Connection) -> StreamingResponse:
    async def in_use() -> AsyncIterator[str]:
        yield str(pool.stats().in_use)

    return StreamingResponse(in_use())


@router.get("/unknown")
async def unknown() -> None:
    raise neon_async.CommitUnknownError("ep-secret-host-123456: no answer to COMMIT")


@router.get("/unknown/group")
async def unknown_in_a_group() -> None:
    raise ExceptionGroup("of tasks", [neon_async.ConnectError("gone"), neon_async.CommitUnknownError("no answer")])


@router.get("/group")
async def group(pool: Pool) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(pool.fetchval("SELECT 1"))


@router.api_route("/insert", methods=["POST", "PUT", "PATCH", "GET"])
async def insert(pool: Pool) -> None:
    await pool.execute(f"INSERT INTO {TABLE} SELECT 1 FROM pg_sleep(3600)")


@router.post("/insert/transaction")
async def insert_in_a_transaction(connection: Transaction) -> None:
    await connection.execute(f"INSERT INTO {TABLE} SELECT 1 FROM pg_sleep(3600)")


@router.get("/broken")
async def broken(pool: Pool) -> None:
    await pool.fetchval("SELECT nothing_of_this_name")


@router.get("/half")
async def half() -> StreamingResponse:
    async def fail() -> AsyncIterator[str]:
        yield "begun"
        raise neon_async.ConnectError("gone")

    return StreamingResponse(fail())


@router.websocket("/socket")
async def socket(websocket: WebSocket, pool: Pool) -> None:
    await websocket.accept()
    await websocket.send_json(await pool.fetchval("SELECT 1"))
    await websocket.close()


def service(endpoint: LocalEndpoint, **options: Any) -> FastAPI:
    """Return an application in front of the endpoint."""
    app = FastAPI(lifespan=lifespan(endpoint.dsn, trust_anchor=endpoint.trust_anchor, **options))
    add_exception_handlers(app)
    app.add_route("/ready", readiness())

    app.include_router(router)
    return app


async def numbers(server: LocalPostgres | LocalEndpoint) -> list[int]:
    async with connected(server) as admin:
        return [row["id"] for row in await admin.fetch(f"SELECT id FROM {TABLE} ORDER BY id")]


async def test_the_dependencies_of_one_request_share_a_connection(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        assert (await client.get("/one")).json() == 1
        assert (await client.get("/same")).json() is True


async def test_a_transaction_is_committed_when_the_answer_arrives(
    endpoint: LocalEndpoint, postgres: LocalPostgres
) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        answer = await client.post("/orders/1")
        assert (answer.status_code, answer.json()) == (200, {"id": 1})
        assert await numbers(postgres) == [1]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        pytest.param("/raises/2", 409, id="the endpoint raises"),
        pytest.param("/unfit/2", 500, id="the response does not fit its model"),
        pytest.param("/orders/1", 500, id="the server refuses COMMIT"),
    ],
)
async def test_an_answer_other_than_2xx_means_that_nothing_was_committed(
    endpoint: LocalEndpoint, postgres: LocalPostgres, path: str, status: int
) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        assert (await client.post("/orders/1")).status_code == 200
        assert (await client.post(path)).status_code == status
        assert await numbers(postgres) == [1]


async def test_a_transaction_has_the_claims_of_its_request(endpoint: LocalEndpoint, postgres: LocalPostgres) -> None:
    async with served_by_uvicorn(service(endpoint, max_size=1)) as client:
        for number, tenant in enumerate(("a", "b'; --")):
            answer = await client.post(f"/tenant/{number}", headers={"X-Tenant": tenant})
            assert answer.json() == tenant
        assert (await client.get("/snapshot")).json() == ["repeatable read", "on"]


async def test_a_connection_is_released_before_the_response_is_sent(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        assert (await client.get("/stream")).text == "0"


async def test_an_outage_is_answered_with_503_and_its_end_with_200(
    endpoint: LocalEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    async with served_by_uvicorn(service(endpoint, acquire_timeout=0.3)) as client:
        endpoint.refuse()
        answer = await client.get("/one")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json() == {
            "type": "about:blank",
            "title": "Service Unavailable",
            "status": 503,
            "detail": "The database is unavailable at the moment. Try again.",
        }
        [record] = [record for record in caplog.records if getattr(record, "event", "") == "answered"]
        assert record.getMessage().startswith("GET /one: answered 503, PoolTimeoutError: ")
        facts = {name: vars(record)[name] for name in ("levelname", "method", "path", "status", "error")}
        assert facts == {
            "levelname": "INFO",
            "method": "GET",
            "path": "/one",
            "status": 503,
            "error": "PoolTimeoutError",
        }
        assert record.getMessage().endswith(vars(record)["reason"])
        endpoint.accept()

        async def is_back() -> bool:
            return (await client.get("/one")).status_code == 200

        async with asyncio.timeout(20):
            while not await is_back():
                pass


async def test_an_outage_that_a_task_group_reports_is_answered_with_503(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint, acquire_timeout=0.3)) as client:
        assert (await client.get("/group")).status_code == 200
        endpoint.refuse()
        endpoint.cut()
        answer = await client.get("/group")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]


@pytest.mark.parametrize("path", ["/unknown", "/unknown/group"])
async def test_a_commit_of_unknown_outcome_is_answered_without_an_invitation_to_repeat(
    endpoint: LocalEndpoint, path: str
) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        answer = await client.get(path)
    assert answer.status_code == 503
    assert "retry-after" not in answer.headers
    assert "may have been committed" in answer.json()["detail"]
    assert "secret-host" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "invited"),
    [
        ("POST", "/insert", False),
        ("PATCH", "/insert", False),
        ("PUT", "/insert", True),
        ("GET", "/insert", True),
        ("POST", "/insert/transaction", True),
    ],
)
async def test_a_write_that_may_have_been_executed_is_no_invitation_to_write_twice(
    endpoint: LocalEndpoint, postgres: LocalPostgres, method: str, path: str, invited: bool
) -> None:
    async with served_by_uvicorn(service(endpoint)) as client, connected(postgres) as admin, asyncio.timeout(20):
        running = asyncio.ensure_future(client.request(method, path))
        while not await admin.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {SLEEPS}"):
            await asyncio.sleep(0.005)
        endpoint.cut()
        answer = await running
        # The server does not notice that its client is gone: it sleeps on, with a lock on the table.
        await admin.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {SLEEPS}")
        assert answer.status_code == 503
        assert ("retry-after" in answer.headers) is invited
        assert ("may have been executed" in answer.json()["detail"]) is not invited


async def test_a_write_that_timed_out_is_no_invitation_to_write_twice(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint, command_timeout=0.1)) as client:
        answer = await client.post("/insert")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, False)


async def test_a_fault_of_the_code_stays_an_internal_error(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        assert (await client.get("/broken")).status_code == 500


async def test_an_error_after_the_start_of_a_response_is_not_answered_again(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/half")


async def test_probes_of_readiness_keep_no_compute_awake(endpoint: LocalEndpoint) -> None:
    app = service(endpoint, acquire_timeout=0.3)
    async with served_by_uvicorn(app) as client:
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()["pools"]["default"]["state"]) == (200, "asleep")
        assert (endpoint.connects, answer.headers["cache-control"]) == (0, "no-store")
        deep = await client.get("/ready?deep=1")
        assert (deep.status_code, deep.json()["pools"]["default"]["state"]) == (200, "ready")
        assert endpoint.connects > 0

        endpoint.suspend()
        endpoint.refuse()
        await until(lambda: pool_of(app).stats().size == 0)
        assert (await client.get("/one")).status_code == 503
        answer = await client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["pools"]["default"]["error"] == "ConnectError"
        connects = endpoint.connects
        for _ in range(10):
            await client.get("/ready")
        assert endpoint.connects == connects


async def test_a_deep_probe_fails_where_the_database_does_not_answer(endpoint: LocalEndpoint) -> None:
    async with served_by_uvicorn(service(endpoint)) as client:
        assert (await client.get("/one")).status_code == 200
        endpoint.freeze()
        answer = await client.get("/ready?deep=1")
        assert (answer.status_code, answer.json()["pools"]["default"]["state"]) == (503, "unavailable")
        endpoint.thaw()


async def test_lifespans_compose_and_pools_have_names(endpoint: LocalEndpoint) -> None:
    seen: list[int] = []

    @contextlib.asynccontextmanager
    async def own(app: Starlette) -> AsyncIterator[dict[str, object]]:
        seen.append(await pool_of(app).fetchval("SELECT 1") + await pool_of(app, "reports").fetchval("SELECT 2"))
        yield {"answer": 42}

    reports = lifespan(endpoint.dsn, name="reports", trust_anchor=endpoint.trust_anchor, inner=own)
    app = FastAPI(lifespan=lifespan(endpoint.dsn, trust_anchor=endpoint.trust_anchor, inner=reports))
    app.add_route("/ready", readiness("reports"))

    @app.get("/state")
    async def state(request: Request) -> list[int]:
        return [request.state.answer, await pool_of(request, "reports").fetchval("SELECT 2")]

    mounted = FastAPI()

    @mounted.get("/one")
    async def one(pool: Pool) -> int:
        return int(await pool.fetchval("SELECT 1"))

    app.mount("/mounted", mounted)
    async with served_by_uvicorn(app) as client:
        assert seen == [3]
        assert (await client.get("/state")).json() == [42, 2]
        assert (await client.get("/mounted/one")).json() == 1
        assert list((await client.get("/ready")).json()["pools"]) == ["reports"]
    with pytest.raises(neon_async.ConfigurationError, match=r"has no pool 'default'\. It has: none; give lifespan"):
        pool_of(app)


async def test_two_pools_of_one_name_are_refused(endpoint: LocalEndpoint) -> None:
    arguments: dict[str, Any] = {"dsn": endpoint.dsn, "trust_anchor": endpoint.trust_anchor}
    run = lifespan(**arguments, inner=lifespan(**arguments))
    with pytest.raises(neon_async.ConfigurationError, match=r"has a pool 'default' already\. Give"):
        async with run(FastAPI()):
            pass


def test_bad_parameters_are_refused_before_the_application_starts() -> None:
    with pytest.raises(neon_async.InsecureConfigurationError):
        lifespan("postgresql://u:p@ep-a-b-123456.eu-central-1.aws.neon.tech/db?sslmode=require")


async def test_a_starlette_application_has_the_same_pool_errors_and_readiness(endpoint: LocalEndpoint) -> None:
    async def one(request: Request) -> JSONResponse:
        return JSONResponse(await pool_of(request).fetchval("SELECT 1"))

    app = Starlette(
        routes=[Route("/one", one), Route("/ready", readiness())],
        lifespan=lifespan(endpoint.dsn, trust_anchor=endpoint.trust_anchor, acquire_timeout=0.3),
    )
    add_exception_handlers(app)
    async with served_by_uvicorn(app) as client:
        assert (await client.get("/one")).json() == 1
        endpoint.suspend()
        endpoint.refuse()
        assert (await client.get("/one")).status_code == 503


async def test_a_client_that_disconnects_leaves_nothing_behind(endpoint: LocalEndpoint) -> None:
    app = service(endpoint, max_size=2)

    @app.get("/slow")
    async def slow(connection: Transaction) -> None:
        await connection.execute("SELECT pg_sleep(0.2)")

    async with served_by_uvicorn(app) as client:
        for _ in range(5):
            with pytest.raises(httpx2.ReadTimeout):
                await client.get("/slow", timeout=0.05)
        pool = pool_of(app)
        await until(lambda: pool.stats().in_use == 0)
        assert (await client.get("/one")).json() == 1


def test_a_websocket_has_the_pool_and_the_test_client_works(postgres: LocalPostgres) -> None:
    async def make() -> tuple[str, bytes]:
        return postgres.dsn, postgres.trust_anchor

    dsn, anchor = asyncio.run(make())
    app = FastAPI(lifespan=lifespan(dsn, trust_anchor=anchor))

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, pool: Pool) -> None:
        await websocket.accept()
        await websocket.send_text(json.dumps(await pool.fetchval("SELECT 1")))
        await websocket.close()

    for _ in range(2):  # each client has an event loop of its own
        with TestClient(app) as client, client.websocket_connect("/socket") as connection:
            assert connection.receive_text() == "1"


def test_a_claim_can_be_asynchronous_and_depend_on_others() -> None:
    async def user() -> str:
        return "7"

    async def claims_of(user: Annotated[str, Depends(user)]) -> Claims:
        return Claims(role="pg_monitor", settings={"app.user": user})

    assert transaction(claims_of).scope == "function"


def test_the_error_of_the_server_is_no_outage() -> None:
    assert not neon_async.is_unavailable(asyncpg.UniqueViolationError("duplicate"))
