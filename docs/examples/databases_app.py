"""`databases` on neon-async: its backend calls asyncpg itself.

Set DATABASE_URL to the string of the Neon console.
"""

import asyncio
import os

import neon_async

# Before the import of the package.
neon_async.patch_asyncpg(sslmode="verify-full")

from databases import Database


async def main():
    async with Database(os.environ["DATABASE_URL"]) as database:
        await database.execute("CREATE TABLE IF NOT EXISTS databases_notes (body text)")
        async with database.transaction():
            await database.execute("INSERT INTO databases_notes VALUES (:body)", {"body": "hello"})
        print(await database.fetch_val("SELECT body FROM databases_notes"))


asyncio.run(main())
