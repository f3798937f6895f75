"""FastAPI: a pool for the life of the application, and connections and transactions as dependencies.

    app = FastAPI(lifespan=lifespan(dsn))
    add_exception_handlers(app)
    app.add_route("/ready", readiness())

    @app.post("/orders")
    async def order(item: Item, connection: Transaction) -> int:
        return await connection.fetchval("INSERT INTO orders (item) VALUES ($1) RETURNING id", item.name)

`lifespan()`, `add_exception_handlers()`, `readiness()` and `pool_of()` work with a Starlette application, too.
Install it with `pip install neon-async[fastapi]`.
"""

# No `from __future__ import annotations`: FastAPI evaluates the annotations of dependencies, also of those that are
# defined in a function.

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias, Unpack, cast

from fastapi import Depends, params
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import _http
from ._config.arguments import AnchorSource
from ._config.literals import IsolationLevel
from ._driver.connection import Connection as _Connection
from ._errors import ConfigurationError
from ._pool.options import PoolKeywords
from ._pool.pool import Pool as _Pool
from ._pool.pool import create_pool

__all__ = (
    "Claims",
    "Connection",
    "Pool",
    "Transaction",
    "add_exception_handlers",
    "lifespan",
    "pool_of",
    "readiness",
    "transaction",
    "use_pool",
)

Lifespan: TypeAlias = Callable[[Starlette], AbstractAsyncContextManager[Mapping[str, object] | None]]

_STATE = "neon_async_pools"
_SUBSTITUTES = "neon_async_substitutes"


# ---------------------------------------------------------------------------------------------------------------------
# The pool


def lifespan(
    dsn: str | None = None,
    *,
    name: str = "default",
    inner: Callable[..., AbstractAsyncContextManager[Mapping[str, object] | None]] | None = None,
    trust_anchor: AnchorSource | None = None,
    **options: Unpack[PoolKeywords],
) -> Callable[..., AbstractAsyncContextManager[Mapping[str, object]]]:
    """Return a lifespan for `FastAPI(lifespan=...)` that opens a pool and closes it.

    Args:
        dsn: As for `create_pool()`.
        name: The name of this pool, for an application that has several. Default: `default`.
        inner: A lifespan that the application has already, or one for another pool. It runs inside: it finds the pool
            with `pool_of(app)`, and what it yields is kept.
        trust_anchor: As for `create_pool()`.
        **options: The other parameters of `create_pool()`.

    Raises:
        ConfigurationError: A parameter is not valid; raised by this call, and not when the application starts.
    """
    create_pool(dsn, trust_anchor=trust_anchor, **options)  # judges the parameters

    @asynccontextmanager
    async def run(app: Starlette) -> AsyncIterator[Mapping[str, object]]:
        substitutes: dict[str, _Pool] = getattr(app.state, _SUBSTITUTES, {})
        own = None if name in substitutes else create_pool(dsn, trust_anchor=trust_anchor, **options)
        async with own or nullcontext(substitutes[name]) as pool:
            pools: dict[str, _Pool] = getattr(app.state, _STATE, {})
            if name in pools:
                raise ConfigurationError(f"The application has a pool {name!r} already. Give this one another name=.")
            pools[name] = pool
            setattr(app.state, _STATE, pools)
            try:
                if inner is None:
                    yield {_STATE: pools}
                else:
                    async with inner(app) as state:
                        yield {**(state or {}), _STATE: pools}
            finally:
                del pools[name]

    return run


@contextmanager
def use_pool(app: Starlette, pool: _Pool, *, name: str = "default") -> Iterator[None]:
    """Let `lifespan()` use a pool that exists, in place of its own, for the applications that start in this block.

    It is for tests. The pool is neither opened nor closed by the application:

        def test_order(neon_rollback: neon_async.Pool) -> None:
            with use_pool(app, neon_rollback), TestClient(app) as client:
                assert client.post("/orders", json={"item": "tea"}).status_code == 200

    Args:
        app: The application.
        pool: The pool.
        name: The name of the pool that it replaces. Default: `default`.
    """
    before: dict[str, _Pool] = getattr(app.state, _SUBSTITUTES, {})
    setattr(app.state, _SUBSTITUTES, {**before, name: pool})
    try:
        yield
    finally:
        setattr(app.state, _SUBSTITUTES, before)


def pool_of(where: Starlette | HTTPConnection, name: str = "default") -> _Pool:
    """Return a pool that `lifespan()` opened.

    Args:
        where: The application, or a request or WebSocket of it.
        name: The name of the pool.

    Raises:
        ConfigurationError: The application has no such pool.
    """
    pools = _pools_of(where)
    if name not in pools:
        known = ", ".join(repr(one) for one in pools) or "none; give lifespan(dsn) to the application"
        raise ConfigurationError(f"The application has no pool {name!r}. It has: {known}.")
    return pools[name]


def _pools_of(where: Starlette | HTTPConnection) -> dict[str, _Pool]:
    # A mounted application has a state of its own, but its requests carry that of the application with the lifespan.
    return cast(dict[str, _Pool], getattr(where.state, _STATE, {}))


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies


@dataclass(frozen=True, slots=True)
class Claims:
    """What a transaction runs as, for row-level security.

    Attributes:
        role: The role for the transaction (`SET LOCAL ROLE`). Default: that of the login.
        settings: Settings for the transaction by name, such as `{"app.user": "7"}`. Default: none.
    """

    role: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def _no_claims() -> Claims:
    return Claims()


def _default_pool(connection: HTTPConnection) -> _Pool:
    return pool_of(connection)


async def _connection(pool: Annotated[_Pool, Depends(_default_pool)]) -> AsyncIterator[_Connection]:
    async with pool.acquire() as connection:
        yield connection


def transaction(
    claims: Callable[..., Claims | Awaitable[Claims]] = _no_claims,
    *,
    pool: str = "default",
    isolation: IsolationLevel | None = None,
    readonly: bool = False,
    deferrable: bool = False,
) -> params.Depends:
    """Return a dependency that runs the endpoint in a transaction.

    It is committed when the endpoint has returned and its response has been made, and before the response is sent; a
    failed COMMIT is the endpoint's error. Where the endpoint raises, or the response does not fit the response model,
    it is rolled back. The body of a `StreamingResponse` is sent after it.

        def claims(user: CurrentUser) -> Claims:
            return Claims(role="authenticated", settings={"app.user": user.id})

        UserTransaction = Annotated[neon_async.Connection, transaction(claims)]

    Args:
        claims: A dependency that returns the role and the settings of the transaction, for row-level security. It can
            have dependencies of its own. Default: none of both.
        pool: The name of the pool. Default: `default`.
        isolation: As for `pool.transaction()`.
        readonly: As for `pool.transaction()`.
        deferrable: As for `pool.transaction()`.
    """

    async def begin(
        connection: HTTPConnection, claimed: Annotated[Claims, Depends(claims)]
    ) -> AsyncIterator[_Connection]:
        async with pool_of(connection, pool).transaction(
            isolation=isolation,
            readonly=readonly,
            deferrable=deferrable,
            role=claimed.role,
            settings=claimed.settings or None,
        ) as begun:
            yield begun

    return _before_the_response(begin)


def _before_the_response(dependency: Callable[..., AsyncIterator[_Connection]]) -> params.Depends:
    # FastAPI ends a dependency after the response by default (its documentation, "Dependencies with yield").
    return cast(params.Depends, Depends(dependency, scope="function"))


Pool = Annotated[_Pool, Depends(_default_pool)]
"""The pool, as a parameter of an endpoint."""

Connection = Annotated[_Connection, _before_the_response(_connection)]
"""A connection for one request. It is released before the response is sent."""

Transaction = Annotated[_Connection, transaction()]
"""A connection in a transaction for one request. It is committed before the response is sent; see `transaction()`."""


# ---------------------------------------------------------------------------------------------------------------------
# Errors and readiness


def add_exception_handlers(app: Starlette) -> None:
    """Answer 503 where the database is unavailable, with a problem document (RFC 9457). No other error is touched.

    Where `neon_async.is_unavailable(error)` is true, the answer has `Retry-After`. A `CommitUnknownError` is answered
    with 503 as well, but without `Retry-After`, because a repeated request may write twice; the document says so. So is
    a statement of a POST or PATCH that was lost or timed out and that no transaction has rolled back for certain. The
    error itself is logged.

    Args:
        app: An application that has not started.
    """
    app.add_middleware(_Middleware)


class _Middleware:
    """Answers what no exception handler of the application has handled."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except Exception as error:
            answer = None if started else _http.answer_to(error, scope["method"], scope["path"])
            if answer is None:
                raise
            await _response(answer)(scope, receive, send)


def readiness(*names: str) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for readiness probes: `app.add_route("/ready", readiness())`.

    It answers 200 where the pool has a connection or can wake its database, and 503 where the latest connect failed or
    the pool is closed. It sends nothing to the database, so a compute that is probed every second can scale to zero.
    With `?deep=1` it runs a query, which wakes a suspended compute.

    Args:
        *names: The names of the pools. Default: all of the application.
    """

    async def ready(request: Request) -> Response:
        pools = {name: pool_of(request, name) for name in names} if names else _pools_of(request)
        return _response(await _http.readiness_of(pools, deep=request.query_params.get("deep") == "1"))

    return ready


def _response(answer: _http.Answer) -> Response:
    return JSONResponse(answer.body, answer.status, answer.headers, answer.media_type)
