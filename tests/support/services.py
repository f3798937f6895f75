"""Web applications under their real servers, in the event loop of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import uvicorn
from aiohttp import web

from .probes import HANG, until


@contextlib.asynccontextmanager
async def served_by_uvicorn(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of an ASGI application that uvicorn serves on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None))
    serving = asyncio.ensure_future(server.serve())
    try:
        await until(lambda: server.started or serving.done())
        if serving.done():
            raise RuntimeError("the application did not start; its log says why")
        [port] = [socket.getsockname()[1] for one in server.servers for socket in one.sockets]
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=HANG) as client:
            yield client
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def served_by_aiohttp(
    app: web.Application, *, handler_cancellation: bool = False
) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of an aiohttp application on a port of its own.

    Args:
        app: The application.
        handler_cancellation: Whether a client that disconnects cancels the handler of its request.
    """
    runner = web.AppRunner(app, handler_cancellation=handler_cancellation)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=HANG) as client:
            yield client
    finally:
        await runner.cleanup()
