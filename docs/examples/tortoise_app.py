"""Tortoise ORM on neon-async: its client calls asyncpg itself.

Set DATABASE_URL to the string of the Neon console. `min_size=0` replaces the one connection that Tortoise keeps open,
which would keep the compute from scaling to zero.
"""

import os

import neon_async

# Before the import of the package.
neon_async.patch_asyncpg(sslmode="verify-full", min_size=0)

from tortoise import Model, Tortoise, fields, run_async
from tortoise.transactions import in_transaction


class TortoiseNote(Model):
    body = fields.TextField()


async def main():
    await Tortoise.init(db_url=os.environ["DATABASE_URL"], modules={"models": ["__main__"]})
    await Tortoise.generate_schemas()
    async with in_transaction():
        await TortoiseNote.create(body="hello")
    print(await TortoiseNote.all().values("body"))


run_async(main())
