"""A server on which the reset of a session can be made to fail, and connections that are lent while it does.

The user of `LocalPostgres` is a superuser, who may do anything. Here another user logs in, and the right to execute a
function of the reset is taken away.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

from .probes import connected, make_pool, until

FUNCTION = "pg_advisory_unlock_all()"
REASON = "permission denied for function pg_advisory_unlock_all"
TABLE = "made"


@dataclass(frozen=True)
class Database:
    """A database of a server, with the user that logs in."""

    dsn: str
    port: int
    trust_anchor: bytes

    @classmethod
    def of(cls, server: LocalPostgres, name: str, user: str | None = None, password: str | None = None) -> Database:
        """Return the database `name` of `server`, for its superuser or another user."""
        url = urlsplit(server.dsn)
        place = f"{user or url.username}:{password or url.password}@{url.hostname}:{url.port}"
        return cls(url._replace(netloc=place, path=f"/{name}").geturl(), server.port, server.trust_anchor)


@dataclass(frozen=True)
class RestrictedServer:
    """A database with a table `made`, its user, who is no superuser, and an administrator's way to it."""

    own: Database
    administrators: Database


@contextlib.contextmanager
def restricted(server: LocalPostgres) -> Iterator[RestrictedServer]:
    """Yield a new database and a new user on `server`, for synchronous code: in an event loop of their own."""
    name, password = f"restricted_{secrets.token_hex(4)}", secrets.token_hex(16)

    async def execute(where: Database | LocalPostgres, *statements: str) -> None:
        async with connected(where) as admin:  # type: ignore[arg-type]
            for statement in statements:
                await admin.execute(statement)

    administrators = Database.of(server, name)
    asyncio.run(execute(server, f"CREATE ROLE {name} LOGIN PASSWORD '{password}'", f"CREATE DATABASE {name}"))
    asyncio.run(execute(administrators, f"CREATE TABLE {TABLE} (tenant text)", f"GRANT ALL ON {TABLE} TO {name}"))
    try:
        yield RestrictedServer(Database.of(server, name, name, password), administrators)
    finally:
        asyncio.run(execute(server, f"DROP DATABASE {name} WITH (FORCE)", f"DROP ROLE {name}"))


class Lender:
    """A pool whose connections can be lent with a reset ahead of them that fails.

    Attributes:
        pool: The pool.
        endpoint: What stands between the pool and the server.
        admin: A superuser's connection to the same database, past the endpoint.
    """

    def __init__(self, pool: neon_async.Pool, endpoint: LocalEndpoint, admin: Any) -> None:
        self.pool = pool
        self.endpoint = endpoint
        self.admin = admin

    async def rows(self) -> list[str]:
        """Return what has been written to the table."""
        return [row["tenant"] for row in await self.admin.fetch(f"SELECT tenant FROM {TABLE} ORDER BY tenant")]

    async def let_resets_fail(self) -> None:
        """Take the right to execute a function of the reset away."""
        await self.admin.execute(f"REVOKE EXECUTE ON FUNCTION {FUNCTION} FROM PUBLIC")

    async def let_resets_succeed(self) -> None:
        """Give the right back."""
        await self.admin.execute(f"GRANT EXECUTE ON FUNCTION {FUNCTION} TO PUBLIC")

    async def leave_unclean(self, count: int = 1) -> None:
        """Release `count` connections with a setting left in their sessions and a reset on its way that will fail.

        The endpoint is frozen then: no reset has reached the server.
        """
        async with contextlib.AsyncExitStack() as lent:
            for _ in range(count):
                connection = await lent.enter_async_context(self.pool.acquire())
                await connection.execute("SET app.tenant = 'the tenant before'")
            await self.let_resets_fail()
            self.endpoint.freeze()

    async def behind_failing_reset(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return the result of `call`, or its exception, after the first of its statements was sent behind a reset."""
        await self.leave_unclean()
        running = asyncio.ensure_future(call())
        await until(lambda: not self.pool.get_idle_size() or running.done())
        for _ in range(10):
            await asyncio.sleep(0)  # time to send it
        self.endpoint.thaw()
        await asyncio.wait([running])
        return running.exception() or running.result()


@contextlib.asynccontextmanager
async def lender(server: RestrictedServer, **options: Any) -> AsyncIterator[Lender]:
    """Yield a pool on `server`, whose table is empty; `options` are those of the pool."""
    async with (
        connected(server.administrators) as admin,  # type: ignore[arg-type]
        LocalEndpoint(server.own) as endpoint,
        make_pool(endpoint, **options) as pool,
    ):
        await admin.execute(f"TRUNCATE {TABLE}")
        it = Lender(pool, endpoint, admin)
        try:
            yield it
        finally:
            endpoint.thaw()
            await it.let_resets_succeed()
