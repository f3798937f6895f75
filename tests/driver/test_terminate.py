"""`connection.terminate()` ends the connection from anywhere: from a thread, and without its event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import asyncpg
import pytest
import uvloop
from support.probes import HANG, connected, open_sockets, sessions, until
from support.processes import wait_for

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

NAME = "to be terminated at once"
NewLoop: TypeAlias = Callable[[], asyncio.AbstractEventLoop]
loops = pytest.mark.parametrize(
    "new_loop",
    [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")],
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of loops that are closed with transports in them
    pytest.mark.usefixtures("collected"),
]


@pytest.fixture
def collected() -> Iterator[None]:
    """Collects the garbage after the test, while the warnings that the test expects of it are ignored."""
    yield
    gc.collect()


def in_a_thread(call: Callable[[], Any]) -> Any:
    """Return the result of a call in another thread, for which this one waits."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(HANG)
    return results[0]


def count_sessions(postgres: LocalPostgres) -> int:
    async def count() -> int:
        async with connected(postgres) as admin:
            return await sessions(admin, NAME)

    found: int = in_a_thread(lambda: asyncio.run(count()))
    return found


async def open_connection(postgres: LocalPostgres) -> neon_async.Connection:
    return await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, application_name=NAME)


# ---------------------------------------------------------------------------------------------------------------------
# Each of these terminates a connection, from somewhere.


def from_a_thread(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    async def run() -> None:
        await asyncio.to_thread(connection.terminate)
        await until(connection.is_closed)

    loop.run_until_complete(run())


def from_the_event_loop_of_a_thread(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    async def end() -> None:
        connection.terminate()

    async def run() -> None:
        await asyncio.to_thread(asyncio.run, end())
        await until(connection.is_closed)

    loop.run_until_complete(run())


def while_the_loop_is_stopped(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    connection.terminate()
    assert connection.is_closed()


def from_a_thread_as_the_loop_stops(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    def stop() -> None:
        loop.stop()  # what the thread asks for is not done in this iteration, which is the last one
        in_a_thread(connection.terminate)

    loop.call_soon(stop)
    loop.run_forever()


def after_the_loop_was_closed(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    loop.close()
    connection.terminate()
    assert connection.is_closed()


def from_a_thread_after_the_loop_was_closed(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    loop.close()
    in_a_thread(connection.terminate)
    assert connection.is_closed()


def by_close_after_the_loop_was_closed(loop: asyncio.AbstractEventLoop, connection: neon_async.Connection) -> None:
    loop.close()
    asyncio.run(connection.close())
    assert connection.is_closed()


WAYS = [
    from_a_thread,
    from_the_event_loop_of_a_thread,
    while_the_loop_is_stopped,
    from_a_thread_as_the_loop_stops,
    after_the_loop_was_closed,
    from_a_thread_after_the_loop_was_closed,
    by_close_after_the_loop_was_closed,
]


@loops
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("way", [pytest.param(way, id=way.__name__.replace("_", " ")) for way in WAYS])
def test_a_connection_ends_and_close_returns(
    postgres: LocalPostgres,
    new_loop: NewLoop,
    way: Callable[[asyncio.AbstractEventLoop, neon_async.Connection], None],
    debug: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def close() -> None:
        async with asyncio.timeout(HANG):
            await connection.close()
            connection.terminate()

    caplog.set_level("WARNING")
    loop = new_loop()
    loop.set_debug(debug)
    connection = loop.run_until_complete(open_connection(postgres))
    way(loop, connection)
    wait_for(lambda: count_sessions(postgres) == 0)
    if not loop.is_closed():
        loop.run_until_complete(close())
        loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    asyncio.run(close())
    assert connection.is_closed()
    assert [record for record in caplog.records if "took" not in record.message] == []  # debug mode notes slow calls


@loops
def test_the_server_learns_of_the_end_while_the_event_loop_is_blocked(
    postgres: LocalPostgres, new_loop: NewLoop
) -> None:
    async def run() -> None:
        connection = await open_connection(postgres)
        in_a_thread(connection.terminate)
        wait_for(lambda: count_sessions(postgres) == 0)  # which blocks the event loop
        await until(connection.is_closed)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


@pytest.mark.anyio
async def test_a_query_ends_when_its_connection_is_terminated_from_a_thread(postgres: LocalPostgres) -> None:
    connection = await open_connection(postgres)
    query = asyncio.ensure_future(connection.fetchval("SELECT pg_sleep(600)"))
    async with connected(postgres) as admin, asyncio.timeout(HANG):
        while not await admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'active'", NAME
        ):
            pass
        await asyncio.to_thread(connection.terminate)
        with pytest.raises(asyncpg.PostgresConnectionError):
            await query
        assert connection.is_closed()
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", NAME)


@loops
def test_a_connection_is_not_closed_in_another_event_loop_while_its_own_exists(
    postgres: LocalPostgres, new_loop: NewLoop
) -> None:
    async def close(connection: neon_async.Connection) -> None:
        async with asyncio.timeout(HANG):
            await connection.close()

    with asyncio.Runner(loop_factory=new_loop) as first, asyncio.Runner(loop_factory=new_loop) as second:
        connection = first.run(open_connection(postgres))
        with pytest.raises(neon_async.UnsupportedEventLoopError, match=r"Close it there, or call terminate\(\)"):
            second.run(close(connection))
        assert first.run(connection.fetchval("SELECT 1")) == 1
        first.run(close(connection))
        second.run(close(connection))


@pytest.mark.anyio
async def test_a_close_that_is_cancelled_closes_the_socket(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint, asyncio.timeout(HANG):
        connection: Any = await neon_async.connect(endpoint.dsn, trust_anchor=endpoint.trust_anchor)
        number = connection._transport.get_extra_info("socket").fileno()
        own_socket = number, os.fstat(number).st_ino
        query = asyncio.ensure_future(connection.execute("SELECT pg_sleep(1)"))
        await until(lambda: connection._protocol.is_running)
        endpoint.freeze()
        closing = asyncio.ensure_future(connection.close())
        await until(connection.is_closed)
        assert own_socket in open_sockets()
        closing.cancel()
        await asyncio.gather(closing, query, return_exceptions=True)
        await until(lambda: own_socket not in open_sockets())
