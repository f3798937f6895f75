"""Print how much of each item was ordered, and exit with 75 (try again later) while the database is unavailable.

python report.py
"""

import asyncio
import os
import sys

import neon_async


async def main() -> int:
    try:
        connection = await neon_async.connect(
            os.environ["DATABASE_URL"],
            sslmode="verify-full",  # the string of the console says `require`, which verifies nothing
            trust_anchor=os.environ.get("DATABASE_TRUST_ANCHOR"),  # of `neon-async dev`; not set in production
        )
        try:
            async with connection.transaction(readonly=True):
                async for row in connection.cursor("SELECT item, sum(amount) FROM orders GROUP BY item ORDER BY item"):
                    print(*row)
        finally:
            await connection.close()
    except Exception as error:
        if not neon_async.is_unavailable(error):
            raise
        print(error, file=sys.stderr)
        return 75  # EX_TEMPFAIL of sysexits.h
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
