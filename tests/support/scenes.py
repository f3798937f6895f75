"""The stage for tests that cancel calls of a pool: an endpoint that can fall silent, and an observer on the server.

Knows which state a pool is in by its public `stats()` and by the server's own view of its sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar, cast

import asyncpg
import pytest

import neon_async
from neon_async._pool.stats import PoolStats
from neon_async.testing import LocalEndpoint, LocalPostgres

from .probes import HANG, assert_balanced, nothing_is_left, password_of

_T = TypeVar("_T")

_numbers = itertools.count(1)

# Seconds for every deadline of the pool: longer than any test waits.
SILENCE = 10 * HANG
# A query that runs until the observer releases its lock. `pg_sleep` would go on after its client has gone.
BLOCKED_QUERY = "SELECT pg_advisory_lock(4711)"


class Scene:
    """A pool whose endpoint can be frozen, and the observer's own connection to the server.

    Args:
        server: The server that the pool connects to.
        endpoint: The way to it, which can be frozen.
        observer: Holds the lock that `BLOCKED_QUERY` waits for.
    """

    def __init__(self, server: LocalPostgres, endpoint: LocalEndpoint, observer: asyncpg.Connection[Any]) -> None:
        self.server = server
        self.endpoint = endpoint
        self.observer = observer
        self.name = f"scene {next(_numbers)}"
        self.reached = asyncio.Event()  # a callback runs `hold()`
        self.over = asyncio.Event()
        self.pool: neon_async.Pool
        self.waiting: list[asyncio.Task[Any]] = []
        self._held: list[Any] = []

    @property
    def stats(self) -> PoolStats:
        return self.pool.stats()

    @property
    def background(self) -> list[asyncio.Task[Any]]:
        """The dials, checks, resets and closes that the pool has under way."""
        pool: Any = self.pool
        return [slot.task for slot in pool._supply.slots if slot.task is not None]

    def make(self, dsn: str | None = None, trust_anchor: bytes | None = None, **keywords: Any) -> neon_async.Pool:
        """Create the pool. No deadline of its own passes during a test, so only the cancellation can end a call."""
        keywords = {"max_size": 2, "release_timeout": SILENCE, "acquire_timeout": SILENCE, **keywords}
        self.pool = neon_async.create_pool(
            dsn or self.endpoint.dsn,
            trust_anchor=trust_anchor or self.server.trust_anchor,
            application_name=self.name,
            connect_timeout=SILENCE,
            **keywords,
        )
        return self.pool

    async def open(self, **keywords: Any) -> neon_async.Pool:
        """Create the pool and open it."""
        return await self.make(**keywords)

    async def acquire(self) -> Any:
        """Acquire a connection that `resume()` releases."""
        connection = await self.pool.acquire()
        self._held.append(connection)
        return connection

    def start_waiters(self) -> None:
        """Start three acquires, and keep their tasks in `waiting`."""
        self.waiting = [start(self.pool.acquire()) for _ in range(3)]

    async def hold(self, *_: object) -> None:
        """Wait until `resume()`. It can be any callback of the pool."""
        self.reached.set()
        await self.over.wait()

    async def password(self) -> str:
        """Return the password of the role after `resume()`."""
        await self.hold()
        return password_of(self.server)

    async def until_running(self, query: str) -> None:
        """Wait until the server runs `query`."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'active' AND query = $2"
        async with asyncio.timeout(HANG):
            while not await self.observer.fetchval(sql, self.name, query):
                await asyncio.sleep(0.001)

    async def resume(self) -> None:
        """Let everything go on that the scene holds, and release the connections that it acquired."""
        self.over.set()
        await self.observer.execute("SELECT pg_advisory_unlock_all()")
        self.endpoint.accept()
        self.endpoint.thaw()
        for connection in self._held:
            await self.pool.release(connection)

    async def until_sessions_have_ended(self) -> None:
        """Wait until the server has no session of the pool."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
        async with asyncio.timeout(HANG):
            while await self.observer.fetchval(sql, self.name):
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def known_report_of_uvloop() -> AsyncIterator[None]:
    """Let pass one report of uvloop to the event loop's exception handler, which says nothing of us.

    uvloop 0.23 writes the end of a TLS handshake to a transport that it has just closed, when the task that
    waits for the handshake is cancelled in the iteration in which the server's last bytes arrive. It reports
    "the handler is closed", and the connection is closed as it should be.
    """
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if type(loop).__module__.startswith("uvloop") and "handler is closed" in str(context.get("exception")):
            return
        if handler is None:
            loop.default_exception_handler(context)
        else:
            handler(loop, context)

    loop.set_exception_handler(report)
    try:
        yield
    finally:
        loop.set_exception_handler(handler)


@contextlib.asynccontextmanager
async def play(postgres: LocalPostgres) -> AsyncIterator[Scene]:
    """Yield a scene, and check that its pool has ended and left no task, socket, slot or session."""
    observer = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    await observer.execute(BLOCKED_QUERY)
    try:
        async with known_report_of_uvloop(), nothing_is_left(), LocalEndpoint(postgres, wake_time=0.2) as endpoint:
            scene = Scene(postgres, endpoint, observer)
            yield scene
            assert scene.pool.is_closing()
            assert_balanced(scene.pool)
            assert (scene.stats.vacant, scene.stats.size) == (scene.stats.max_size, 0), scene.stats
            await scene.until_sessions_have_ended()
    finally:
        await observer.close()


async def close(scene: Scene) -> None:
    """Close the pool of a scene in which no connection is in use, so that the close has nothing to wait for."""
    async with asyncio.timeout(HANG):
        await scene.pool.close(timeout=SILENCE)


def start(work: Awaitable[_T]) -> asyncio.Task[_T]:
    """Run `work`, which may be any awaitable, in a task."""
    task: Any = asyncio.ensure_future(work)
    return cast("asyncio.Task[_T]", task)


async def cancel(task: asyncio.Task[Any], times: int = 1) -> None:
    """Cancel `task` up to `times` times, one step apart, and check that it ends with CancelledError."""
    for _ in range(times):
        assert task.cancel()
        await asyncio.sleep(0)
        if task.done():
            break
    done, _ = await asyncio.wait([task], timeout=HANG)
    assert done, "the task goes on after it was cancelled"
    assert task.cancelled(), task


async def take_steps(count: int) -> None:
    """Let the event loop run `count` iterations, and the server work for a moment before each."""
    for _ in range(count):
        _let_server_work()
        await asyncio.sleep(0)


def _let_server_work() -> None:
    time.sleep(0.0002)  # blocks the event loop, so that the answers of the server are spread over the steps, too


Reach: TypeAlias = Callable[[Scene], Coroutine[Any, Any, "asyncio.Task[Any]"]]
once_and_twice = pytest.mark.parametrize("times", [pytest.param(1, id="once"), pytest.param(2, id="twice")])


def cases(*reach: Reach) -> pytest.MarkDecorator:
    """Parametrize over functions that bring a task to the await that their name states, and return the task."""
    return pytest.mark.parametrize("reach", phrased(*reach))


def phrased(*functions: Callable[..., object]) -> list[Any]:
    """Return the functions as parameters of a test, with their names as words for ids."""
    return [pytest.param(one, id=one.__name__.replace("_", " ")) for one in functions]
