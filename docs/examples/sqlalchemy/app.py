"""Order something and list all orders.

python app.py tea
"""

import asyncio
import os
import sys

from models import Order
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker

from neon_async.sqlalchemy import create_async_engine


async def main(item: str) -> None:
    engine = create_async_engine(
        os.environ["DATABASE_URL"],
        sslmode="verify-full",  # the string of the console says `require`, which verifies nothing
        trust_anchor=os.environ.get("DATABASE_TRUST_ANCHOR"),  # of `neon-async dev`; not set in production
    )
    sessions = async_sessionmaker(engine)
    async with sessions.begin() as session:
        session.add(Order(item=item))
    async with sessions() as session:
        for order in await session.scalars(select(Order).order_by(Order.id)):
            print(order.id, order.item)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
