"""Piccolo on neon-async: its engine calls asyncpg itself.

Set DATABASE_URL to the string of the Neon console.
"""

import asyncio
import os

import neon_async

# Before the import of the package.
neon_async.patch_asyncpg(sslmode="verify-full")

from piccolo.columns import Text
from piccolo.engine.postgres import PostgresEngine
from piccolo.table import Table

DB = PostgresEngine(config={"dsn": os.environ["DATABASE_URL"]})


class PiccoloNote(Table, db=DB):
    body = Text()


async def main():
    await DB.start_connection_pool()
    await PiccoloNote.create_table(if_not_exists=True)
    async with DB.transaction():
        await PiccoloNote.insert(PiccoloNote(body="hello"))
    print(await PiccoloNote.select(PiccoloNote.body))
    await DB.close_connection_pool()


asyncio.run(main())
