"""`pool.terminate()` ends the connections from anywhere: without an event loop, from a thread, at exit, and twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest
import uvloop
from anyio.from_thread import BlockingPortal, start_blocking_portal
from support.probes import (
    HANG,
    ResetInBackground,
    assert_balanced,
    connected,
    make_pool,
    nothing_is_left,
    open_sockets,
    sessions,
    until,
    until_gone,
)
from support.processes import wait_for

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

NEVER = 100 * HANG
NAME = "to be terminated"
LOOPS = [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]


class Remote:
    """An endpoint in an event loop of its own, which runs whatever happens to the event loop of the pool."""

    def __init__(self, server: LocalPostgres, endpoint: LocalEndpoint, portal: BlockingPortal) -> None:
        self.endpoint = endpoint
        self._server = server
        self._portal = portal

    def count_sessions(self) -> int:
        """Return how many sessions the server has of the pool."""
        return self._portal.call(self._count_sessions)

    async def _count_sessions(self) -> int:
        async with connected(self._server) as admin:
            return await sessions(admin, NAME)

    def end_sessions(self) -> None:
        """Have the server end the sessions of the pool, and wait for their end."""
        self._portal.call(self._end_sessions)

    async def _end_sessions(self) -> None:
        async with connected(self._server) as admin:
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1"
            await admin.execute(end, NAME)
            await until_gone(admin, NAME)

    def freeze(self) -> None:
        self._portal.call(self.endpoint.freeze)

    def refuse(self) -> None:
        self._portal.call(self.endpoint.refuse)

    def recover(self) -> None:
        self._portal.call(self.endpoint.accept)
        self._portal.call(self.endpoint.thaw)


@pytest.fixture
def remote(postgres: LocalPostgres) -> Iterator[Remote]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(LocalEndpoint(postgres)) as endpoint:
        yield (remote := Remote(postgres, endpoint, portal))
        remote.recover()
        remote.end_sessions()


@pytest.fixture
def collected() -> Iterator[None]:
    """Collects the garbage after the test, while the warnings that the test expects of it are ignored."""
    yield
    gc.collect()


# Brings an open pool of two connections into a state, and returns the tasks that go on.
Scene: TypeAlias = Callable[[neon_async.Pool, Remote], Awaitable[list["asyncio.Task[Any]"]]]
Tasks: TypeAlias = "list[asyncio.Task[Any]]"


async def never_used(pool: neon_async.Pool, remote: Remote) -> Tasks:
    return []


async def idle(pool: neon_async.Pool, remote: Remote) -> Tasks:
    await pool.fetchval("SELECT 1")
    await until(lambda: pool.stats().idle == 1)
    return []


async def in_use(pool: neon_async.Pool, remote: Remote) -> Tasks:
    await pool.acquire()
    return []


async def in_a_transaction(pool: neon_async.Pool, remote: Remote) -> Tasks:
    connection = await pool.acquire()
    await connection.transaction().start()
    return []


async def in_a_query(pool: neon_async.Pool, remote: Remote) -> Tasks:
    task = asyncio.ensure_future(pool.fetchval("SELECT pg_sleep(600)"))
    await until(lambda: pool.stats().in_use == 1)
    await asyncio.sleep(0.01)
    return [task]


async def in_a_reset(pool: neon_async.Pool, remote: Remote) -> Tasks:
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1")
        remote.freeze()
    await asyncio.sleep(0.01)
    assert pool.stats().resetting == 1
    return []


async def before_a_reset(pool: neon_async.Pool, remote: Remote) -> Tasks:
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1")
    assert pool.stats().resetting == 1
    return []


async def before_the_answer_to_a_reset_ahead(pool: neon_async.Pool, remote: Remote) -> Tasks:
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1")
        remote.freeze()
    assert (pool.stats().idle, pool.stats().resets) == (1, 0)
    return []


async def with_waiters(pool: neon_async.Pool, remote: Remote) -> Tasks:
    for _ in range(2):
        await pool.acquire()
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(3)]
    await until(lambda: pool.stats().waiting == 3)
    return tasks


async def with_a_connection_handed_over(pool: neon_async.Pool, remote: Remote) -> Tasks:
    await pool.acquire()
    connection = await pool.acquire()
    tasks = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(2)]
    await until(lambda: pool.stats().waiting == 2)
    await pool.release(connection)
    assert pool.stats().waiting == 1
    return tasks


async def in_a_dial(pool: neon_async.Pool, remote: Remote) -> Tasks:
    remote.freeze()
    task = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await until(lambda: remote.endpoint.connections == 1)
    return [task]


async def in_the_pause_after_a_failed_dial(pool: neon_async.Pool, remote: Remote) -> Tasks:
    remote.refuse()
    task = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await until(lambda: pool.stats().dial_failures and not pool.stats().connecting)
    return [task]


async def in_its_own_close(pool: neon_async.Pool, remote: Remote) -> Tasks:
    await pool.acquire()
    task = asyncio.ensure_future(pool.close(timeout=NEVER))
    await until(pool.is_closing)
    return [task]


SCENES = [
    never_used,
    idle,
    in_use,
    in_a_transaction,
    in_a_query,
    in_a_reset,
    before_a_reset,
    before_the_answer_to_a_reset_ahead,
    with_waiters,
    with_a_connection_handed_over,
    in_a_dial,
    in_the_pause_after_a_failed_dial,
    in_its_own_close,
]


# The server is busy, or the network is frozen: it does not hear of the end of the connections.
OUT_OF_REACH = (in_a_query, in_a_reset, before_the_answer_to_a_reset_ahead, in_a_dial)


def each(scenes: Iterable[Scene]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scene", [pytest.param(one, id=one.__name__.replace("_", " ")) for one in scenes])


async def open_pool(remote: Remote, scene: Scene, **options: Any) -> tuple[neon_async.Pool, Tasks]:
    defaults: dict[str, Any] = {"max_size": 2, "leak_after": NEVER, "acquire_timeout": NEVER, "application_name": NAME}
    if scene in (in_a_reset, before_a_reset):
        defaults["connection_class"] = ResetInBackground
    pool = await make_pool(remote.endpoint, **defaults | options)
    async with asyncio.timeout(HANG):
        return pool, await scene(pool, remote)


def assert_all_refused(outcomes: list[Any], scene: Scene) -> None:
    """Check that callers that were waiting, or using a connection, got an error that says so; `close()` returned."""
    # The query of the connection handed over may have been answered before the pool was terminated.
    allowed = [None, 1] if scene is with_a_connection_handed_over else [None]
    for outcome in outcomes:
        if outcome not in allowed:
            assert isinstance(outcome, asyncpg.InterfaceError | asyncpg.PostgresConnectionError)
            assert "clos" in str(outcome)


def assert_ended(pool: neon_async.Pool) -> None:
    assert pool.is_closing()
    assert pool.get_size() == pool.stats().size == 0
    assert_balanced(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Where no event loop runs


@each(SCENES)
@pytest.mark.parametrize("new_loop", LOOPS)
def test_terminate_ends_the_connections_while_the_event_loop_is_stopped(
    remote: Remote, new_loop: Callable[[], asyncio.AbstractEventLoop], scene: Scene
) -> None:
    reported: list[dict[str, Any]] = []
    with contextlib.closing(new_loop()) as loop:
        sockets = open_sockets()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        pool, tasks = loop.run_until_complete(open_pool(remote, scene))
        pool.terminate()
        assert_ended(pool)
        if scene not in OUT_OF_REACH:
            wait_for(lambda: remote.count_sessions() == 0)
        remote.recover()

        async def go_on() -> list[Any]:
            """Let the event loop run again."""
            await pool.close()
            pool.terminate()
            return await asyncio.gather(*tasks, return_exceptions=True)

        assert_all_refused(loop.run_until_complete(go_on()), scene)
        remote.end_sessions()  # of the query that the server is still busy with

        def everything_has_ended() -> bool:
            loop.run_until_complete(asyncio.sleep(0))
            return pool.stats().vacant == 2 and open_sockets() <= sockets

        wait_for(everything_has_ended)
        assert_ended(pool)
    assert reported == []


# In these, asyncio.run() leaves no task behind. Where it cancels a query, asyncpg begins a cancel request afterwards.
QUIET = [scene for scene in SCENES if scene not in (in_a_query, in_a_reset, with_a_connection_handed_over)]


@each(QUIET)
@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
def test_terminate_ends_the_connections_after_the_event_loop_was_closed(
    remote: Remote,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    scene: Scene,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING")
    with asyncio.Runner(loop_factory=new_loop) as runner:
        pool, tasks = runner.run(open_pool(remote, scene, release_timeout=NEVER))
    # As asyncio.run() does, the runner has cancelled all tasks.
    pool.terminate()
    assert_ended(pool)
    assert pool.stats().vacant == 2
    remote.recover()
    wait_for(lambda: remote.count_sessions() == 0)
    pool.terminate()
    asyncio.run(pool.close())
    del pool, tasks
    gc.collect()
    assert [record for record in caplog.records if vars(record).get("event") != "outage_began"] == []


_CHILD = """
import asyncio, sys
from anyio.from_thread import start_blocking_portal
from neon_async.testing import LocalEndpoint, LocalPostgres
from pool.test_terminate import LOOPS, SCENES, Remote, assert_ended, open_pool
from support.processes import wait_for

new_loop = dict(asyncio=LOOPS[0], uvloop=LOOPS[1])[sys.argv[1]].values[0]
with start_blocking_portal() as portal, portal.wrap_async_context_manager(LocalPostgres()) as server:
    for scene in SCENES:
        with portal.wrap_async_context_manager(LocalEndpoint(server)) as endpoint:
            remote, loop = Remote(server, endpoint, portal), new_loop()
            pool, tasks = loop.run_until_complete(open_pool(remote, scene))
            loop.close()
            pool.terminate()
            assert_ended(pool)
            assert (pool.stats().vacant, pool.stats().waiting) == (2, 0)
            asyncio.run(pool.close())
            remote.recover()
            if scene.__name__ != "in_a_query":  # the server is busy with it
                wait_for(lambda: remote.count_sessions() == 0)
            remote.end_sessions()
            print(scene.__name__, flush=True)
"""


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_terminate_ends_the_connections_after_the_event_loop_was_closed_with_tasks_in_it(name: str) -> None:
    """In a process of its own, because the tasks that were never cancelled complain when they are collected."""
    child = run_child(_CHILD, name)
    assert child.stdout.split() == [scene.__name__ for scene in SCENES], child.stderr


def run_child(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = [str(Path(__file__).parents[1]), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{textwrap.dedent(program)}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


_AT_EXIT = """
import asyncio, atexit, psycopg, sys, time, uvloop
import neon_async

loop, dsn, anchor = sys.argv[1:]
pool = neon_async.create_pool(dsn, trust_anchor=anchor, application_name="at exit " + loop, init_size=3)

def report():
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'at exit " + loop + "'"
    with psycopg.connect(dsn, sslmode="verify-full", sslrootcert=anchor, autocommit=True) as admin:
        while count := admin.execute(query).fetchone()[0]:
            time.sleep(0.01)
        print(count, pool.get_size(), pool.is_closing())

async def main():
    await pool
    kept.append(await pool.acquire())
    print(await kept[0].fetchval("SELECT 1"), pool.get_size())

kept = []
atexit.register(report)  # runs after the next one
atexit.register(pool.terminate)
with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_terminate_is_an_exit_handler(postgres: LocalPostgres, tmp_path: Path, loop: str) -> None:
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(postgres.trust_anchor)
    child = run_child(_AT_EXIT, loop, postgres.dsn, str(anchor))
    assert (child.stdout, child.stderr, child.returncode) == ("1 3\n0 0 True\n", "", 0)


@each(QUIET)
@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
@pytest.mark.usefixtures("collected")
def test_close_ends_the_connections_after_the_event_loop_was_closed(
    remote: Remote, new_loop: Callable[[], asyncio.AbstractEventLoop], scene: Scene
) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        pool, _ = runner.run(open_pool(remote, scene, release_timeout=NEVER))
    asyncio.run(pool.close())
    assert_ended(pool)
    assert pool.stats().vacant == 2
    remote.recover()
    wait_for(lambda: remote.count_sessions() == 0)
    pool.terminate()
    asyncio.run(pool.close())


# ---------------------------------------------------------------------------------------------------------------------
# From another thread


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
@pytest.mark.usefixtures("collected")
def test_the_server_learns_of_the_end_from_a_thread_although_the_event_loop_stops(
    remote: Remote, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The loop is in its last iteration, and never does what the thread asks it to do."""
    loop = new_loop()
    pool, _ = loop.run_until_complete(open_pool(remote, in_use))

    def stop() -> None:
        loop.stop()
        thread = threading.Thread(target=pool.terminate)
        thread.start()
        thread.join(HANG)

    loop.call_soon(stop)
    loop.run_forever()
    wait_for(lambda: remote.count_sessions() == 0)
    loop.close()
    asyncio.run(pool.close())
    assert_ended(pool)
    assert pool.stats().vacant == 2


@pytest.mark.anyio
@each(SCENES)
async def test_terminate_ends_the_connections_from_another_thread(remote: Remote, scene: Scene) -> None:
    async with nothing_is_left(), asyncio.timeout(HANG):
        pool, tasks = await open_pool(remote, scene)
        await asyncio.to_thread(pool.terminate)
        await until(lambda: pool.is_closing() and pool.stats().vacant == 2)
        assert_ended(pool)
        assert_all_refused(await asyncio.gather(*tasks, return_exceptions=True), scene)
        await pool.close()
        tasks.clear()
        remote.recover()
        remote.end_sessions()


@pytest.mark.anyio
async def test_terminate_can_be_called_from_many_threads_at_once(
    remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "neon_async")
    pool, _ = await open_pool(remote, in_use)
    barrier = threading.Barrier(4)

    def end() -> None:
        barrier.wait()
        pool.terminate()

    async with asyncio.timeout(HANG):
        await asyncio.gather(*(asyncio.to_thread(end) for _ in range(4)))
        await until(lambda: pool.stats().vacant == 2)
    assert sum("the pool is closed" in record.message for record in caplog.records) == 1


@pytest.mark.anyio
async def test_terminate_can_be_called_in_the_event_loop_of_another_thread(remote: Remote) -> None:
    pool, tasks = await open_pool(remote, with_waiters)

    async def end() -> None:
        pool.terminate()

    async with asyncio.timeout(HANG):
        await asyncio.to_thread(asyncio.run, end())
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, neon_async.PoolClosedError)
        await until(lambda: pool.stats().vacant == 2)


# ---------------------------------------------------------------------------------------------------------------------
# A connection that is lent


@pytest.mark.anyio
@pytest.mark.parametrize("options", [{"max_size": 1}, {"max_size": 2, "min_size": 2}], ids=["waiters", "min_size"])
@pytest.mark.filterwarnings("ignore:min_size=2 keeps")
async def test_a_lent_connection_that_a_thread_terminates_is_replaced(remote: Remote, options: dict[str, Any]) -> None:
    async with asyncio.timeout(HANG), await make_pool(remote.endpoint, **options) as pool:
        connection = await pool.acquire()
        await connection.fetchval("SELECT 1")
        waiters = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(3)]
        await until(lambda: options["max_size"] > 1 or pool.stats().waiting == 3)
        await asyncio.to_thread(connection.terminate)
        assert await asyncio.gather(*waiters) == [1, 1, 1]
        await until(lambda: pool.get_idle_size() == options["max_size"])
        await pool.release(connection)


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
@pytest.mark.usefixtures("collected")
def test_a_lent_connection_that_is_terminated_outside_of_the_event_loop_is_replaced_in_it(
    remote: Remote, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def begin() -> tuple[neon_async.Pool, Any, Tasks]:
        pool = await make_pool(remote.endpoint, max_size=1, application_name=NAME)
        connection = await pool.acquire()
        waiters = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(3)]
        await until(lambda: pool.stats().waiting == 3)
        return pool, connection, waiters

    async def go_on(waiters: Tasks) -> list[Any]:
        async with asyncio.timeout(HANG):
            return await asyncio.gather(*waiters)

    loop = new_loop()
    pool, connection, waiters = loop.run_until_complete(begin())
    connection.terminate()
    assert pool.get_size() == 0
    assert loop.run_until_complete(go_on(waiters)) == [1, 1, 1]
    pool.terminate()
    pool, connection, waiters = loop.run_until_complete(begin())
    for waiter in waiters:
        waiter.cancel()
    loop.close()
    connection.terminate()
    assert pool.get_size() == 0
    pool.terminate()
    wait_for(lambda: remote.count_sessions() == 0)


# ---------------------------------------------------------------------------------------------------------------------
# More than once, too early, and together with close()


@pytest.mark.anyio
@each(SCENES)
async def test_terminate_can_be_called_twice_and_close_returns_afterwards(remote: Remote, scene: Scene) -> None:
    async with nothing_is_left(), asyncio.timeout(HANG):
        pool, tasks = await open_pool(remote, scene)
        for _ in range(2):
            pool.terminate()
            assert_ended(pool)
        await pool.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: pool.stats().vacant == 2)
        with pytest.raises(neon_async.PoolClosedError, match="is closed"):
            await pool.acquire()
        tasks.clear()
        remote.recover()
        remote.end_sessions()


def test_a_pool_that_was_never_opened_cannot_be_terminated(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    with pytest.raises(neon_async.PoolClosedError, match="was never opened"):
        pool.terminate()


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["close", "terminate"])
@pytest.mark.parametrize("steps", range(6))
async def test_a_pool_that_is_ended_while_it_opens_says_so_at_once(
    postgres: LocalPostgres, end: str, steps: int
) -> None:
    async with nothing_is_left(), asyncio.timeout(HANG):
        pool = make_pool(postgres, init_size=2, max_size=2, acquire_timeout=NEVER)
        opening = asyncio.ensure_future(pool.__aenter__())
        for _ in range(steps + 1):
            await asyncio.sleep(0)
        if end == "close":
            await pool.close()
        else:
            pool.terminate()
        with pytest.raises(neon_async.PoolClosedError, match=r"is (closed|closing)"):
            await opening
        await until(lambda: pool.stats().vacant == 2)
        assert_ended(pool)
        del opening
