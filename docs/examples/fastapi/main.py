"""Orders over HTTP: a transaction for each request, 503 during an outage, and a probe that lets the database sleep.

uvicorn main:app
"""

import os

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from neon_async.fastapi import Pool, Transaction, add_exception_handlers, lifespan, readiness

app = FastAPI(
    lifespan=lifespan(
        os.environ["DATABASE_URL"],
        sslmode="verify-full",  # the string of the console says `require`, which verifies nothing
        trust_anchor=os.environ.get("DATABASE_TRUST_ANCHOR"),  # of `neon-async dev`; not set in production
    )
)
add_exception_handlers(app)
app.add_route("/ready", readiness())


class Order(BaseModel):
    item: str
    amount: int


@app.post("/orders")
async def order(wanted: Order, connection: Transaction) -> int:
    taken = "UPDATE stock SET amount = amount - $2 WHERE item = $1 AND amount >= $2"
    if await connection.execute(taken, wanted.item, wanted.amount) == "UPDATE 0":
        raise HTTPException(409, "not in stock")  # rolls back
    insert = "INSERT INTO orders (item, amount) VALUES ($1, $2) RETURNING id"
    return await connection.fetchval(insert, wanted.item, wanted.amount)


@app.get("/orders")
async def orders(pool: Pool) -> list[Order]:
    return [Order(**row) for row in await pool.fetch("SELECT item, amount FROM orders ORDER BY id")]
