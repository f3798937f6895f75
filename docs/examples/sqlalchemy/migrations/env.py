"""Migrate over the direct host, also where DATABASE_URL names the pooled one."""

import asyncio
import os

from alembic import context
from models import Base
from sqlalchemy import Connection, pool
from sqlalchemy.ext.asyncio import async_engine_from_config

import neon_async.sqlalchemy

config = context.config
neon_async.sqlalchemy.use_direct_host(config)


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    engine = async_engine_from_config(
        config.get_section(config.config_ini_section, {}),
        poolclass=pool.NullPool,
        connect_args={"trust_anchor": os.environ.get("DATABASE_TRUST_ANCHOR")},
    )
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


asyncio.run(main())
