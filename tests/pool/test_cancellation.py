"""Each await of the pool is cancelled here by a case of its own, once and twice, and then each step of each call.

Whoever is cancelled sees CancelledError at once, however silent the server is; nobody else does. No slot is lost, and
no task, socket or session on the server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar, cast

import asyncpg
import pytest
from support.certificates import issue
from support.logins import OK, PLAIN, honest_login
from support.probes import (
    HANG,
    assert_balanced,
    assert_whole,
    black_hole,
    nothing_is_left,
    open_sockets,
    password_of,
    resolve_to,
    until,
)

import neon_async
from neon_async._pool.stats import PoolStats
from neon_async.testing import LocalEndpoint, LocalPostgres
from neon_async.testing._impostor import Conversation, Impostor, server_context

pytestmark = pytest.mark.anyio

_T = TypeVar("_T")

_names = itertools.count(1)

ROOT = issue(subject="root", ca=True)
# Until a test lets the server speak again: longer than any test waits.
SILENCE = 10 * HANG
# A query that the server is at until the observer lets go of the lock. (It would sleep on without its client.)
STUCK = "SELECT pg_advisory_lock(4711)"


class Scene:
    """A pool behind an endpoint that can be frozen, and an observer's own connection to the server.

    `hold()` is a callback, for any of the pool's, that stays where it is until the scene goes on; `reached` tells that
    somebody is there.
    """

    def __init__(self, server: LocalPostgres, endpoint: LocalEndpoint, observer: asyncpg.Connection[Any]) -> None:
        self.server = server
        self.endpoint = endpoint
        self.observer = observer
        self.name = f"scene {next(_names)}"
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self.pool: neon_async.Pool
        self.waiting: list[asyncio.Task[Any]] = []
        self._held: list[Any] = []

    @property
    def stats(self) -> PoolStats:
        return self.pool.stats()

    def make(self, dsn: str | None = None, trust_anchor: bytes | None = None, **keywords: Any) -> neon_async.Pool:
        """Make the pool. Its own deadlines are out of reach: what ends in time here was ended by the cancellation."""
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
        return await self.make(**keywords)

    async def take(self) -> Any:
        """Acquire a connection that is given back when the scene goes on."""
        connection = await self.pool.acquire()
        self._held.append(connection)
        return connection

    def wait_in_line(self) -> None:
        self.waiting = [start(self.pool.acquire()) for _ in range(3)]

    async def hold(self, *_: object) -> None:
        self.reached.set()
        await self.over.wait()

    async def password(self) -> str:
        await self.hold()
        return password_of(self.server)

    async def until_running(self, query: str) -> None:
        """Wait until the server is at work on `query`."""
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'active' AND query = $2"
        async with asyncio.timeout(HANG):
            while not await self.observer.fetchval(sql, self.name, query):
                await asyncio.sleep(0.001)

    async def go_on(self) -> None:
        """Let everybody who was held go on, and give back what is out."""
        self.over.set()
        await self.observer.execute("SELECT pg_advisory_unlock_all()")
        self.endpoint.accept()
        self.endpoint.thaw()
        for connection in self._held:
            await self.pool.release(connection)

    async def until_left(self) -> None:
        """Wait until the server has no session of the pool any more."""
        async with asyncio.timeout(HANG):
            while await self.observer.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", self.name
            ):
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def play(postgres: LocalPostgres) -> AsyncIterator[Scene]:
    """Set the scene, and check that nothing is left of it."""
    observer = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    await observer.execute(STUCK)
    try:
        async with nothing_is_left(), LocalEndpoint(postgres, wake_time=0.2) as endpoint:
            scene = Scene(postgres, endpoint, observer)
            yield scene
            assert scene.pool.is_closing()
            assert_balanced(scene.pool)
            assert (scene.stats.vacant, scene.stats.size) == (scene.stats.max_size, 0), scene.stats
            await scene.until_left()
    finally:
        await observer.close()


async def close(scene: Scene) -> None:
    async with asyncio.timeout(HANG):
        await scene.pool.close(timeout=SILENCE)  # nothing is out, so that it waits for nothing


def start(work: Awaitable[_T]) -> asyncio.Task[_T]:
    task: Any = asyncio.ensure_future(work)
    return cast("asyncio.Task[_T]", task)


async def cancel(task: asyncio.Task[Any], times: int = 1) -> None:
    """Cancel `task` so many times, and check that it ends with CancelledError."""
    for _ in range(times):
        assert task.cancel()
        await asyncio.sleep(0)
        if task.done():
            break
    done, _ = await asyncio.wait([task], timeout=HANG)
    assert done, "it goes on, though it was cancelled"
    assert task.cancelled(), task


Reach: TypeAlias = Callable[[Scene], Coroutine[Any, Any, "asyncio.Task[Any]"]]
once_and_twice = pytest.mark.parametrize("times", [pytest.param(1, id="once"), pytest.param(2, id="twice")])


def cases(*reach: Reach) -> pytest.MarkDecorator:
    """Parametrise over functions that bring a task to the await which their name tells, and return the task."""
    return pytest.mark.parametrize("reach", [pytest.param(one, id=one.__name__.replace("_", " ")) for one in reach])


# ---------------------------------------------------------------------------------------------------------------------
# Acquire


async def in_line(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    await scene.take()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    return task


async def in_the_middle_of_the_line(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    await scene.take()
    first, task, last = (start(pool.fetchval("SELECT 1")) for _ in range(3))
    await until(lambda: scene.stats.waiting == 3)
    first.add_done_callback(lambda _: scene.over.set())
    last.add_done_callback(lambda _: scene.over.set())
    return task


async def given_a_connection_and_not_yet_run(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    held = await pool.acquire()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    await pool.release(held)  # unused, so that there is nothing to wait for
    assert (scene.stats.waiting, scene.stats.idle) == (0, 1)
    return task


async def given_a_connection_that_has_ended_since(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    held: Any = await pool.acquire()
    behind = held._con
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    await pool.release(held)
    behind.terminate()
    return task


async def given_a_connection_that_has_expired_since(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    held = await pool.acquire()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    await pool.release(held)
    await pool.expire_connections()
    scene.endpoint.freeze()
    connects = scene.endpoint.connects
    # Whoever runs now must not fill the slot itself: when it is cancelled, nobody would know of the slot any more.
    await until(lambda: scene.endpoint.connects > connects or scene.stats.resetting)
    return task


async def a_wake(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    scene.endpoint.suspend()
    task = start(pool.acquire())
    await until(lambda: scene.endpoint.state == "waking")
    return task


async def a_dial_that_hears_nothing(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.endpoint.connects == 1)
    return task


async def a_pause_between_dials(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    scene.endpoint.refuse()
    task = start(pool.acquire())
    await until(lambda: scene.stats.dial_failures and not scene.stats.connecting)
    assert scene.stats.waiting == 1
    return task


async def a_check_of_an_idle_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init_size=1, check_after_idle=0)
    scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.stats.checking == 1)
    return task


async def the_reset_after_somebody_else(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    async with pool.acquire() as connection:
        await connection.execute("SET search_path TO pg_catalog")
        scene.endpoint.freeze()
    task = start(pool.acquire())
    await until(lambda: scene.stats.waiting == 1)
    assert scene.stats.resetting == 1
    return task


async def setup(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(setup=scene.hold)
    task = start(pool.acquire())
    await scene.reached.wait()
    return task


async def a_query_of_setup(scene: Scene) -> asyncio.Task[Any]:
    async def ask(connection: neon_async.Connection) -> None:
        if not scene.over.is_set():
            await connection.execute(STUCK)

    pool = await scene.open(setup=ask)
    task = start(pool.acquire())
    await scene.until_running(STUCK)
    scene.endpoint.freeze()
    return task


@once_and_twice
@cases(
    in_line,
    in_the_middle_of_the_line,
    given_a_connection_and_not_yet_run,
    given_a_connection_that_has_ended_since,
    given_a_connection_that_has_expired_since,
    a_wake,
    a_dial_that_hears_nothing,
    a_pause_between_dials,
    a_check_of_an_idle_connection,
    the_reset_after_somebody_else,
    setup,
    a_query_of_setup,
)
async def test_an_acquire_can_be_cancelled_in(postgres: LocalPostgres, reach: Reach, times: int) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        await scene.go_on()
        await assert_whole(scene.pool)
        await close(scene)


# ---------------------------------------------------------------------------------------------------------------------
# Use


async def a_query(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    task = start(pool.fetchval("SELECT pg_sleep(3600)"))
    await scene.until_running("SELECT pg_sleep(3600)")
    return task


async def a_query_that_is_never_answered(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    task = start(pool.fetchval(STUCK))
    await scene.until_running(STUCK)
    scene.endpoint.freeze()
    return task


async def the_body_of_async_with(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SET search_path TO pg_catalog")
            scene.endpoint.freeze()
            await scene.hold()

    task = start(use())
    await scene.reached.wait()
    return task


async def a_transaction_block(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def use() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(STUCK)

    task = start(use())
    await scene.until_running(STUCK)
    scene.endpoint.freeze()
    return task


async def the_work_of_run_transaction(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def work(connection: neon_async.Connection) -> None:
        await connection.execute(STUCK)

    task = start(pool.run_transaction(work))
    await scene.until_running(STUCK)
    scene.endpoint.freeze()
    return task


async def the_commit_of_run_transaction(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()

    async def work(connection: neon_async.Connection) -> None:
        scene.endpoint.freeze()

    sent = scene.endpoint.client_bytes
    task = start(pool.run_transaction(work))
    await until(lambda: scene.stats.in_use and scene.endpoint.client_bytes > sent)
    await asyncio.sleep(0)
    return task


@once_and_twice
@cases(
    a_query,
    a_query_that_is_never_answered,
    the_body_of_async_with,
    a_transaction_block,
    the_work_of_run_transaction,
    the_commit_of_run_transaction,
)
async def test_the_use_of_a_connection_can_be_cancelled_in(postgres: LocalPostgres, reach: Reach, times: int) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        assert scene.stats.in_use == 0
        await scene.go_on()
        await assert_whole(scene.pool)
        await close(scene)


# ---------------------------------------------------------------------------------------------------------------------
# Release


async def the_reset(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


async def the_end_of_a_cancelled_query(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    connection = await pool.acquire()
    query = start(connection.execute(STUCK))
    await scene.until_running(STUCK)
    scene.endpoint.freeze()
    await cancel(query)
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


async def the_rollback_of_what_was_left_open(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1)
    connection = await pool.acquire()
    await connection.execute("BEGIN")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


async def a_reset_of_the_callers_own(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, reset=scene.hold)
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    task = start(pool.release(connection))
    await scene.reached.wait()
    return task


async def the_close_of_a_worn_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(max_size=1, max_queries=1)
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    scene.endpoint.freeze()
    task = start(pool.release(connection))
    await until(lambda: scene.stats.resetting == 1)
    return task


releases = (
    the_reset,
    the_end_of_a_cancelled_query,
    the_rollback_of_what_was_left_open,
    a_reset_of_the_callers_own,
    the_close_of_a_worn_connection,
)


@once_and_twice
@cases(*releases)
async def test_a_release_can_be_cancelled_in(postgres: LocalPostgres, reach: Reach, times: int) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        assert scene.stats.resetting == 1  # it goes on behind
        await scene.go_on()
        await assert_whole(scene.pool)
        await close(scene)


@pytest.mark.parametrize("end", ["close", "terminate"])
@cases(*releases)
async def test_the_end_of_the_pool_ends_a_release_in(postgres: LocalPostgres, reach: Reach, end: str) -> None:
    """Who waits for the release is not cancelled by that: nobody has cancelled it."""
    async with play(postgres) as scene:
        task = await reach(scene)
        await end_pool(scene, end)
        done, _ = await asyncio.wait([task], timeout=HANG)
        assert done
        assert not task.cancelled()
        task.exception()  # it may say that the connection was not reset
        await scene.go_on()


async def end_pool(scene: Scene, how: str) -> None:
    async with asyncio.timeout(HANG):
        if how == "close":
            await scene.pool.close(timeout=0.05)
        else:
            scene.pool.terminate()
            await until(lambda: scene.stats.vacant == scene.stats.max_size)


# ---------------------------------------------------------------------------------------------------------------------
# Dials, checks and what else goes on behind: they are cancelled by the end of the pool


@contextlib.asynccontextmanager
async def in_its_password_function(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(password=scene.password)
    scene.wait_in_line()
    await scene.reached.wait()
    yield


@contextlib.asynccontextmanager
async def in_name_resolution(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(dsn=scene.endpoint.dsn.partition("?")[0])
    resolve_to(patch, ("127.0.0.1", scene.endpoint.port))
    resolve = asyncio.get_running_loop().getaddrinfo

    async def resolve_slowly(*args: Any, **keywords: Any) -> Any:
        await scene.hold()
        return await resolve(*args, **keywords)

    patch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve_slowly)
    scene.wait_in_line()
    await scene.reached.wait()
    yield


@contextlib.asynccontextmanager
async def in_tcp(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    with black_hole() as port:
        await scene.open(dsn=scene.endpoint.dsn.replace(f":{scene.endpoint.port}/", f":{port}/"))
        sockets = open_sockets()
        scene.wait_in_line()
        await until(lambda: open_sockets() - sockets)
        yield


@contextlib.asynccontextmanager
async def in_the_tls_handshake(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with Impostor(lambda conversation: None) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem)
        scene.wait_in_line()
        await until(lambda: impostor.conversations and impostor.conversations[0].wire)
        yield


@contextlib.asynccontextmanager
async def in_authentication(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    leaf = issue(ROOT)
    context = server_context(b"".join((leaf.key_pem, leaf.pem)))

    def fall_silent(conversation: Conversation) -> None:
        conversation.accept_tls(context)
        conversation.read_startup()

    async with Impostor(fall_silent) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem)
        scene.wait_in_line()
        await until(lambda: impostor.conversations and impostor.conversations[0].decrypted)
        yield


@contextlib.asynccontextmanager
async def in_the_start_of_the_session(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    leaf = issue(ROOT)
    context = server_context(b"".join((leaf.key_pem, leaf.pem)))
    let_in = threading.Event()

    def fall_silent(conversation: Conversation) -> None:
        conversation.accept_tls(context)
        conversation.read_startup()
        honest_login(impostor.password, offer=[PLAIN], last=OK)(conversation)
        let_in.set()

    async with Impostor(fall_silent) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem)
        scene.wait_in_line()
        await until(let_in.is_set)
        yield


@contextlib.asynccontextmanager
async def in_init(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init=scene.hold)
    scene.wait_in_line()
    await scene.reached.wait()
    yield


@contextlib.asynccontextmanager
async def before_its_first_step(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open()
    scene.wait_in_line()
    await asyncio.sleep(0)
    assert scene.stats.connecting == 1
    yield


@contextlib.asynccontextmanager
async def checking(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init_size=1, check_after_idle=0)
    scene.endpoint.freeze()
    scene.wait_in_line()
    await until(lambda: scene.stats.checking == 1)
    yield


@contextlib.asynccontextmanager
async def about_to_check(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init_size=1, check_after_idle=0)
    scene.wait_in_line()
    await asyncio.sleep(0)
    assert scene.stats.checking == 1
    yield


@contextlib.asynccontextmanager
async def about_to_close_a_worn_one(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init_size=1)
    await scene.pool.expire_connections()
    scene.wait_in_line()
    await asyncio.sleep(0)
    assert scene.stats.resetting == 1
    yield


@pytest.mark.parametrize("end", ["close", "terminate"])
@pytest.mark.parametrize(
    "reach",
    [
        pytest.param(in_its_password_function, id="dial in its password function"),
        pytest.param(in_name_resolution, id="dial in name resolution"),
        pytest.param(in_tcp, id="dial in tcp"),
        pytest.param(in_the_tls_handshake, id="dial in the tls handshake"),
        pytest.param(in_authentication, id="dial in authentication"),
        pytest.param(in_the_start_of_the_session, id="dial in the start of the session"),
        pytest.param(in_init, id="dial in init"),
        pytest.param(before_its_first_step, id="dial before its first step"),
        pytest.param(checking, id="check"),
        pytest.param(about_to_check, id="check before its first step"),
        pytest.param(about_to_close_a_worn_one, id="close of a worn one before its first step"),
    ],
)
async def test_the_end_of_the_pool_ends_a(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, reach: Any, end: str
) -> None:
    async with play(postgres) as scene:
        async with reach(scene, monkeypatch), asyncio.timeout(HANG):
            if end == "close":
                await close(scene)
            else:
                scene.pool.terminate()
            for failure in await asyncio.gather(*scene.waiting, return_exceptions=True):
                assert isinstance(failure, neon_async.PoolClosedError), failure
            scene.waiting.clear()
            await until(lambda: scene.stats.vacant == scene.stats.max_size)
        await scene.go_on()


# ---------------------------------------------------------------------------------------------------------------------
# Close


async def a_connection_in_use(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init_size=2)
    await pool.acquire()
    task = start(pool.close(timeout=SILENCE))
    await until(lambda: scene.stats.size == 1)
    return task


async def a_connection_in_use_that_somebody_else_waits_for(scene: Scene) -> asyncio.Task[Any]:
    task = await a_connection_in_use(scene)
    scene.waiting = [start(scene.pool.close(timeout=SILENCE))]
    await asyncio.sleep(0)
    return task


async def the_end_of_an_idle_connection(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open(init_size=2)
    scene.endpoint.freeze()
    task = start(pool.close(timeout=SILENCE))
    await until(lambda: scene.stats.resetting == 2)
    return task


async def a_reset(scene: Scene) -> asyncio.Task[Any]:
    pool = await scene.open()
    async with pool.acquire() as connection:
        await connection.execute("SET search_path TO pg_catalog")
        scene.endpoint.freeze()
    task = start(pool.close(timeout=SILENCE))
    await until(pool.is_closing)
    assert scene.stats.resetting == 1
    return task


async def a_dial_that_will_not_be_cancelled(scene: Scene) -> asyncio.Task[Any]:
    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await scene.hold()
        await scene.over.wait()
        return "of no use any more"

    pool = await scene.open(password=stubborn)
    scene.wait_in_line()
    await scene.reached.wait()
    task = start(pool.close(timeout=SILENCE))
    await until(pool.is_closing)
    return task


async def what_goes_on_after_its_timeout(scene: Scene) -> asyncio.Task[Any]:
    async def stubborn(_: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await scene.hold()
        await scene.over.wait()

    pool = await scene.open(reset=stubborn)
    connection = await pool.acquire()
    await connection.execute("SELECT 1")
    scene.waiting = [start(pool.release(connection))]
    await scene.reached.wait()
    task = start(pool.close(timeout=0.001))
    await until(lambda: scene.stats.size == 0)
    return task


@once_and_twice
@cases(
    a_connection_in_use,
    a_connection_in_use_that_somebody_else_waits_for,
    the_end_of_an_idle_connection,
    a_reset,
    a_dial_that_will_not_be_cancelled,
    what_goes_on_after_its_timeout,
)
async def test_a_close_can_be_cancelled_in_its_wait_for(postgres: LocalPostgres, reach: Reach, times: int) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        assert scene.pool.is_closing()
        await scene.go_on()
        async with asyncio.timeout(HANG):
            await asyncio.gather(*scene.waiting, return_exceptions=True)
            await until(lambda: scene.stats.vacant == scene.stats.max_size)
        scene.waiting.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Opening


async def its_first_dial(scene: Scene) -> asyncio.Task[Any]:
    pool = scene.make(init_size=2)
    scene.endpoint.freeze()
    task = start(pool)
    await until(lambda: scene.endpoint.connects == 1)
    return task


async def its_second_dial(scene: Scene) -> asyncio.Task[Any]:
    async def init(connection: asyncpg.Connection[Any]) -> None:
        scene.endpoint.freeze()

    pool = scene.make(init_size=2, init=init)
    task = start(pool)
    await until(lambda: scene.stats.size == 1 and scene.stats.connecting == 1)
    await take_steps(3)  # until whoever waited for the first has run, too
    return task


async def init_of_its_connections(scene: Scene) -> asyncio.Task[Any]:
    pool = scene.make(init_size=2, init=scene.hold)
    task = start(pool)
    await scene.reached.wait()
    return task


async def its_pause_between_dials(scene: Scene) -> asyncio.Task[Any]:
    pool = scene.make(init_size=2)
    scene.endpoint.refuse()
    task = start(pool)
    await until(lambda: scene.stats.dial_failures and not scene.stats.connecting)
    return task


@once_and_twice
@cases(its_first_dial, its_second_dial, init_of_its_connections, its_pause_between_dials)
async def test_the_opening_of_a_pool_can_be_cancelled_in(postgres: LocalPostgres, reach: Reach, times: int) -> None:
    async with play(postgres) as scene:
        await cancel(await reach(scene), times)
        await scene.go_on()


# ---------------------------------------------------------------------------------------------------------------------
# Every step

STEPS = range(0, 61, 2)
# How long the server gets to answer before each step, in seconds, so that the answers, too, are spread over the steps.
PAUSE = 0.0002


async def take_steps(count: int) -> None:
    """Let the event loop go round `count` times."""
    for _ in range(count):
        _let_others_work()
        await asyncio.sleep(0)


def _let_others_work() -> None:
    time.sleep(PAUSE)


async def cancel_after(steps: int, task: asyncio.Task[_T]) -> _T | None:
    """Cancel `task` after so many steps. Returns its result where it was done by then."""
    await take_steps(steps)
    if task.done():
        return task.result()
    await cancel(task)
    return None


async def acquire_in_line(pool: neon_async.Pool, steps: int) -> None:
    others = [start(pool.fetchval("SELECT 1")) for _ in range(2)]
    connection = await cancel_after(steps, start(pool.acquire()))
    if connection is not None:
        await pool.release(connection)
    await asyncio.gather(*others)


async def acquire_cold(pool: neon_async.Pool, steps: int) -> None:
    await pool.expire_connections()
    connection = await cancel_after(steps, start(pool.acquire()))
    if connection is not None:
        await pool.release(connection)


async def fetchval_warm(pool: neon_async.Pool, steps: int) -> None:
    assert await cancel_after(steps, start(pool.fetchval("SELECT 1"))) in (1, None)


async def fetchval_cold(pool: neon_async.Pool, steps: int) -> None:
    await pool.expire_connections()
    assert await cancel_after(steps, start(pool.fetchval("SELECT 1"))) in (1, None)


async def release(pool: neon_async.Pool, steps: int) -> None:
    connection = await pool.acquire()
    await connection.execute("SET search_path TO pg_catalog")
    waiter = start(pool.fetchval("SHOW search_path"))
    await cancel_after(steps, start(pool.release(connection)))
    await pool.release(connection)  # for the cancellation before its first step; a second release changes nothing
    assert await waiter == '"$user", public'


async def release_of_an_expired_one(pool: neon_async.Pool, steps: int) -> None:
    connection = await pool.acquire()
    await pool.expire_connections()
    await connection.execute("SELECT 1")
    await cancel_after(steps, start(pool.release(connection)))
    await pool.release(connection)


async def run_transaction(pool: neon_async.Pool, steps: int) -> None:
    async def work(connection: neon_async.Connection) -> int:
        assert await connection.fetchval("SELECT 1") == 1
        return 1

    assert await cancel_after(steps, start(pool.run_transaction(work))) in (1, None)


@pytest.mark.parametrize("max_size", [1, 2])
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(one, id=one.__name__.replace("_", " "))
        for one in (
            acquire_in_line,
            acquire_cold,
            fetchval_warm,
            fetchval_cold,
            release,
            release_of_an_expired_one,
            run_transaction,
        )
    ],
)
async def test_a_pool_is_whole_after_a_cancellation_at_any_step_of(
    postgres: LocalPostgres, use: Callable[[neon_async.Pool, int], Awaitable[None]], max_size: int
) -> None:
    async with play(postgres) as scene:
        pool = await scene.open(dsn=postgres.dsn, max_size=max_size)
        for steps in STEPS:
            async with asyncio.timeout(HANG):
                await use(pool, steps)
            await assert_whole(pool)
        await close(scene)


async def open_pool(scene: Scene, steps: int) -> None:
    pool = scene.make(dsn=scene.server.dsn, init_size=2)
    if await cancel_after(steps, start(pool)) is not None:
        await close(scene)


async def close_pool(scene: Scene, steps: int) -> None:
    """One connection is idle, one about to be, one being made, and somebody in line."""

    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SET search_path TO pg_catalog")

    pool = await scene.open(dsn=scene.server.dsn, init_size=2, max_size=3)
    scene.waiting = [start(use()) for _ in range(4)]
    await take_steps(2)
    await cancel_after(steps, start(pool.close(timeout=SILENCE)))


async def before_terminate(scene: Scene, steps: int) -> None:
    async def use() -> None:
        async with pool.acquire() as connection:
            await connection.execute("SET search_path TO pg_catalog")
        await pool.release(await pool.acquire())

    pool = await scene.open(dsn=scene.server.dsn, init_size=2, max_size=3)
    await pool.expire_connections()
    scene.waiting = [start(use()) for _ in range(4)]
    await take_steps(steps)
    pool.terminate()


@pytest.mark.parametrize(
    "use", [pytest.param(one, id=one.__name__.replace("_", " ")) for one in (open_pool, close_pool, before_terminate)]
)
async def test_a_pool_has_ended_after_a_cancellation_at_any_step_of(
    postgres: LocalPostgres, use: Callable[[Scene, int], Awaitable[None]]
) -> None:
    async with play(postgres) as scene:
        for steps in STEPS[1:]:  # a call that is cancelled before its first step has not been made
            async with asyncio.timeout(HANG):
                await use(scene, steps)
                for failure in await asyncio.gather(*scene.waiting, return_exceptions=True):
                    # CancelledError is for who was cancelled.
                    assert isinstance(failure, Exception | None), f"after {steps} steps: {failure!r}"
                scene.waiting.clear()
                await until(lambda: scene.stats.vacant == scene.stats.max_size)
            assert_balanced(scene.pool)
