"""Orders over HTTP: a transaction for each request, 503 during an outage, and a probe that lets the database sleep.

python main.py
"""

import os

from aiohttp import web

from neon_async.aiohttp import POOL, pool_context, readiness, transaction, unavailable_middleware

routes = web.RouteTableDef()


@routes.post("/orders")
async def order(request: web.Request) -> web.Response:
    wanted = await request.json()
    async with transaction(request) as connection:
        taken = "UPDATE stock SET amount = amount - $2 WHERE item = $1 AND amount >= $2"
        if await connection.execute(taken, wanted["item"], wanted["amount"]) == "UPDATE 0":
            raise web.HTTPConflict(text="not in stock")  # rolls back
        insert = "INSERT INTO orders (item, amount) VALUES ($1, $2) RETURNING id"
        number = await connection.fetchval(insert, wanted["item"], wanted["amount"])
    return web.json_response(number)  # after the block: the order has been committed


@routes.get("/orders")
async def orders(request: web.Request) -> web.Response:
    rows = await request.app[POOL].fetch("SELECT item, amount FROM orders ORDER BY id")
    return web.json_response([dict(row) for row in rows])


app = web.Application(middlewares=[unavailable_middleware])
app.cleanup_ctx.append(
    pool_context(
        os.environ["DATABASE_URL"],
        sslmode="verify-full",  # the string of the console says `require`, which verifies nothing
        trust_anchor=os.environ.get("DATABASE_TRUST_ANCHOR"),  # of `neon-async dev`; not set in production
    )
)
app.router.add_get("/ready", readiness())
app.router.add_routes(routes)

if __name__ == "__main__":
    web.run_app(app, port=int(os.environ.get("PORT", "8080")))
