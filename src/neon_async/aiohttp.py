"""aiohttp: a pool for the life of the application, transactions of a request, errors and readiness.

    app = web.Application(middlewares=[unavailable_middleware])
    app.cleanup_ctx.append(pool_context(dsn))
    app.router.add_get("/ready", readiness())

    async def order(request: web.Request) -> web.Response:
        async with transaction(request) as connection:
            number = await connection.fetchval("INSERT INTO orders DEFAULT VALUES RETURNING id")
        return web.json_response(number)

Install it with `pip install neon-async[aiohttp]`.
"""

# No `from __future__ import annotations`: web.AppKey keeps the type itself.

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final, Unpack

from aiohttp import web

from . import _http
from ._config.arguments import AnchorSource
from ._config.literals import IsolationLevel
from ._driver.connection import Connection
from ._errors import ConfigurationError
from ._pool.options import PoolKeywords
from ._pool.pool import Pool, create_pool

__all__ = ("POOL", "pool_context", "readiness", "transaction", "unavailable_middleware", "use_pool")

POOL: Final[web.AppKey[Pool]] = web.AppKey("neon_async.pool", Pool)
"""The key of the pool: `request.app[POOL]`."""

_SUBSTITUTES = web.AppKey("neon_async.substitutes", dict[web.AppKey[Pool], Pool])


def pool_context(
    dsn: str | None = None,
    *,
    key: web.AppKey[Pool] = POOL,
    trust_anchor: AnchorSource | None = None,
    **options: Unpack[PoolKeywords],
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a cleanup context that opens a pool and closes it: `app.cleanup_ctx.append(pool_context(dsn))`.

    Args:
        dsn: As for `create_pool()`.
        key: Where the application keeps the pool; for a second pool, an `AppKey("name", neon_async.Pool)` of your own.
        trust_anchor: As for `create_pool()`.
        **options: The other parameters of `create_pool()`.

    Raises:
        ConfigurationError: A parameter is not valid; raised by this call, and not when the application starts.
    """
    create_pool(dsn, trust_anchor=trust_anchor, **options)  # judges the parameters

    async def run(app: web.Application) -> AsyncIterator[None]:
        if key in app:
            raise ConfigurationError(f"The application has a pool at {key} already. Give this one another key=.")
        substitute = _substitutes_of(app).get(key)
        if substitute is not None:
            app[key] = substitute
            yield
            return
        async with create_pool(dsn, trust_anchor=trust_anchor, **options) as pool:
            app[key] = pool
            yield

    return run


def use_pool(app: web.Application, pool: Pool, *, key: web.AppKey[Pool] = POOL) -> None:
    """Let `pool_context()` use a pool that exists, in place of its own. Call it before the application starts.

    It is for tests. The pool is neither opened nor closed by the application:

        async def test_order(aiohttp_client, neon_rollback: neon_async.Pool) -> None:
            app = make_app()
            use_pool(app, neon_rollback)
            client = await aiohttp_client(app)

    Args:
        app: The application.
        pool: The pool.
        key: Where the application keeps the pool that it replaces.
    """
    app[_SUBSTITUTES] = {**_substitutes_of(app), key: pool}


def _substitutes_of(app: web.Application) -> dict[web.AppKey[Pool], Pool]:
    nothing: dict[web.AppKey[Pool], Pool] = {}
    return app.get(_SUBSTITUTES, nothing)


def transaction(
    request: web.Request,
    *,
    key: web.AppKey[Pool] = POOL,
    isolation: IsolationLevel | None = None,
    readonly: bool = False,
    deferrable: bool = False,
    role: str | None = None,
    settings: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> AbstractAsyncContextManager[Connection]:
    """Return a connection of the application's pool in a transaction, for `async with`.

    Return the response after the block: the transaction is committed at its end. A request to a subapplication uses
    the pool of the nearest application that has one.

    Args:
        request: The request.
        key: Where the application keeps the pool.
        isolation: As for `pool.transaction()`, as are the other parameters.
        readonly: Whether the transaction is READ ONLY.
        deferrable: Whether the transaction is DEFERRABLE.
        role: The role for the transaction, for row-level security.
        settings: Settings for the transaction by name, for row-level security.
        timeout: Seconds for the acquire. Default: `acquire_timeout`.

    Raises:
        ConfigurationError: The application has no pool at `key`.
    """
    return _pool_of(request, key).transaction(
        isolation=isolation,
        readonly=readonly,
        deferrable=deferrable,
        role=role,
        settings=settings,
        timeout=timeout,
    )


@web.middleware
async def unavailable_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer 503 where the database is unavailable, with a problem document (RFC 9457). No other error is touched.

    Where `neon_async.is_unavailable(error)` is true, the answer has `Retry-After`. A `CommitUnknownError` is answered
    with 503 as well, but without `Retry-After`, because a repeated request may write twice; the document says so. So is
    a statement of a POST or PATCH that was lost or timed out and that no transaction has rolled back for certain. The
    error itself is logged.
    """
    try:
        return await handler(request)
    except Exception as error:
        answer = None if _has_started(request) else _http.answer_to(error, request.method, request.path)
        if answer is None:
            raise
        return _response(answer)


def readiness(*keys: web.AppKey[Pool]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return a handler for readiness probes: `app.router.add_get("/ready", readiness())`.

    It answers 200 where the pool has a connection or can wake its database, and 503 where the latest connect failed or
    the pool is closed. It sends nothing to the database, so a compute that is probed every second can scale to zero.
    With `?deep=1` it runs a query, which wakes a suspended compute.

    Args:
        *keys: Where the application keeps the pools. Default: `POOL`.
    """

    async def ready(request: web.Request) -> web.Response:
        pools = {_name_of(key): _pool_of(request, key) for key in keys or (POOL,)}
        return _response(await _http.readiness_of(pools, deep=request.query.get("deep") == "1"))

    return ready


def _name_of(key: web.AppKey[Pool]) -> str:
    """Return what the answer calls a pool: `default` as in FastAPI, or the full name of the key of another one."""
    # The name is public in `str(key)` only: <AppKey(module.name, type=...)>.
    return "default" if key is POOL else str(key).removeprefix("<AppKey(").partition(", type=")[0]


def _pool_of(request: web.Request, key: web.AppKey[Pool]) -> Pool:
    pool = request.config_dict.get(key)
    if pool is None:
        raise ConfigurationError(f"The application has no pool at {key}. Append pool_context(dsn) to its cleanup_ctx.")
    return pool


def _has_started(request: web.Request) -> bool:
    """Return whether a part of a response has been sent, so that no other one can follow."""
    return request.writer.output_size > 0


def _response(answer: _http.Answer) -> web.Response:
    body = json.dumps(answer.body).encode()
    return web.Response(body=body, status=answer.status, headers=answer.headers, content_type=answer.media_type)
