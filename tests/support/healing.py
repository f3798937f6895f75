"""Connections like those of one pool, and a schema for a test, whose DDL makes prepared statements stale."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from neon_async._driver.connector import prepare
from neon_async.testing import LocalPostgres

from .pgbouncer import LocalPgBouncer
from .pooled import opened
from .probes import HANG, connected

numbers = itertools.count()


@dataclass
class Bench:
    """Two connections like those of one pool, another one for DDL, and a schema for the test."""

    one: Any
    two: Any
    admin: Any
    schema: str
    server: Any

    @property
    def healing(self) -> Any:
        return self.one._transport.session.healing

    async def ddl(self, sql: str) -> None:
        await self.admin.execute(sql.replace("{s}", self.schema))

    def sql(self, text: str) -> str:
        return text.replace("{s}", self.schema)


@contextlib.asynccontextmanager
async def bench_on(server: LocalPostgres | LocalPgBouncer, postgres: LocalPostgres) -> AsyncIterator[Bench]:
    connector = prepare(server.dsn, trust_anchor=server.trust_anchor)
    schema = f"healing_{next(numbers)}"
    async with (
        asyncio.timeout(2 * HANG),
        connected(postgres) as admin,
        opened(connector) as one,
        opened(connector) as two,
    ):
        await admin.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}")
        try:
            yield Bench(one, two, admin, schema, server)
        finally:
            await admin.execute(f"DROP SCHEMA {schema} CASCADE")
