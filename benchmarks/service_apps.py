"""The services that `services.py` starts as processes: FastAPI and aiohttp, each on our pool and on asyncpg's.

Each has the same two routes: `POST /orders/{number}` writes a row in a transaction, and `GET /ready` is for probes.
Ours use the public helpers and nothing else. The others are what a user of asyncpg writes. Every request prints its
number first, so that it is known which ones were accepted. This module must not know what is measured.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp.web as web
import asyncpg
from fastapi import Depends, FastAPI, Request
from peers import verified_context

import neon_async.aiohttp
import neon_async.fastapi

INSERT = "INSERT INTO orders (number) VALUES ($1)"
SHUTDOWN_TIMEOUT = 15.0  # seconds for the requests in progress when SIGTERM comes

DSN = os.environ.get("SERVICE_DSN", "")
ASYNCPG_POOL = web.AppKey("asyncpg", object)


def _trust_anchor() -> bytes:
    return Path(os.environ["SERVICE_TRUST_ANCHOR"]).read_bytes()


def _open_asyncpg() -> Any:
    return asyncpg.create_pool(DSN, ssl=verified_context(_trust_anchor()))


async def _note(number: int) -> None:
    os.write(sys.stdout.fileno(), b"%d\n" % number)


# ---------------------------------------------------------------------------------------------------------------------
# FastAPI


def fastapi_ours() -> FastAPI:
    """Return the application on our pool."""
    app = FastAPI(lifespan=neon_async.fastapi.lifespan(DSN, trust_anchor=_trust_anchor()))
    neon_async.fastapi.add_exception_handlers(app)
    app.add_route("/ready", neon_async.fastapi.readiness())

    @app.post("/orders/{number}", dependencies=[Depends(_note)])
    async def order(number: int, connection: neon_async.fastapi.Transaction, seconds: float = 0.0) -> int:
        await connection.execute(INSERT, number)
        await asyncio.sleep(seconds)
        return number

    return app


def fastapi_asyncpg() -> FastAPI:
    """Return the application on asyncpg's pool."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open_asyncpg() as app.state.pool:
            yield

    async def transaction(request: Request) -> AsyncIterator[Any]:
        async with request.app.state.pool.acquire() as connection, connection.transaction():
            yield connection

    app = FastAPI(lifespan=lifespan)

    @app.get("/ready")
    async def ready(request: Request) -> int:
        one: int = await request.app.state.pool.fetchval("SELECT 1")
        return one

    @app.post("/orders/{number}", dependencies=[Depends(_note)])
    async def order(number: int, connection: Annotated[Any, Depends(transaction)], seconds: float = 0.0) -> int:
        await connection.execute(INSERT, number)
        await asyncio.sleep(seconds)
        return number

    return app


# ---------------------------------------------------------------------------------------------------------------------
# aiohttp


def aiohttp_ours() -> web.Application:
    """Return the application on our pool."""

    async def order(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        await _note(number)
        async with neon_async.aiohttp.transaction(request) as connection:
            await connection.execute(INSERT, number)
            await asyncio.sleep(float(request.query.get("seconds", 0)))
        return web.json_response(number)

    app = web.Application(middlewares=[neon_async.aiohttp.unavailable_middleware])
    app.cleanup_ctx.append(neon_async.aiohttp.pool_context(DSN, trust_anchor=_trust_anchor()))
    app.router.add_get("/ready", neon_async.aiohttp.readiness())
    app.router.add_post("/orders/{number}", order)
    return app


def aiohttp_asyncpg() -> web.Application:
    """Return the application on asyncpg's pool."""

    async def pool_context(app: web.Application) -> AsyncIterator[None]:
        async with _open_asyncpg() as app[ASYNCPG_POOL]:
            yield

    async def ready(request: web.Request) -> web.Response:
        pool: Any = request.app[ASYNCPG_POOL]
        return web.json_response(await pool.fetchval("SELECT 1"))

    async def order(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        await _note(number)
        pool: Any = request.app[ASYNCPG_POOL]
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(INSERT, number)
            await asyncio.sleep(float(request.query.get("seconds", 0)))
        return web.json_response(number)

    app = web.Application()
    app.cleanup_ctx.append(pool_context)
    app.router.add_get("/ready", ready)
    app.router.add_post("/orders/{number}", order)
    return app


AIOHTTP: dict[str, Callable[[], web.Application]] = {
    "aiohttp_ours": aiohttp_ours,
    "aiohttp_asyncpg": aiohttp_asyncpg,
}

if __name__ == "__main__":
    web.run_app(
        AIOHTTP[sys.argv[1]](),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        print=None,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT,
    )
