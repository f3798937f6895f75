"""One pool in several event loops, one after the other, and in a forked process."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest
import uvloop
from support.probes import HANG, assert_balanced, assert_whole, connected, make_pool, nothing_is_left, sessions

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

LOOPS = [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]


@pytest.mark.anyio
async def test_a_pool_that_was_closed_can_be_opened_again(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, max_size=2)
    async with nothing_is_left():
        for number in range(1, 4):
            async with pool:
                assert await pool.fetchval("SELECT 1") == 1
                assert pool.health().state == "ready"
                assert_balanced(pool)
                assert pool.stats().acquires == number
            with pytest.raises(asyncpg.InterfaceError, match=r"pool is closed.*Open it again"):
                await pool.fetchval("SELECT 1")
            assert (pool.get_size(), pool.health().state) == (0, "unavailable")


@pytest.mark.anyio
async def test_a_pool_can_be_opened_again_after_opening_failed(endpoint: LocalEndpoint) -> None:
    pool = make_pool(endpoint, init_size=1, acquire_timeout=0.3)
    endpoint.refuse()
    with pytest.raises(neon_async.PoolTimeoutError):
        await pool
    endpoint.accept()
    async with pool:
        assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.anyio
async def test_a_pool_that_is_closing_cannot_be_opened(postgres: LocalPostgres) -> None:
    pool = await make_pool(postgres)
    async with pool.acquire():
        closing = asyncio.ensure_future(pool.close(timeout=HANG))
        await asyncio.sleep(0)
        with pytest.raises(neon_async.PoolClosedError, match="is closing"):
            await pool
    await closing


@pytest.mark.anyio
async def test_a_close_does_not_end_a_pool_that_was_terminated_and_opened_again_meanwhile(
    postgres: LocalPostgres,
) -> None:
    pool = await make_pool(postgres, max_size=2)
    await pool.acquire()
    closing = asyncio.ensure_future(pool.close(timeout=HANG))
    await asyncio.sleep(0)
    pool.terminate()
    async with pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            await closing
            assert await connection.fetchval("SELECT 1") == 1
        await assert_whole(pool)


@pytest.mark.anyio
async def test_a_cancelled_close_does_not_end_a_pool_that_was_opened_again_meanwhile(postgres: LocalPostgres) -> None:
    pool = await make_pool(postgres, max_size=2)
    await pool.acquire()
    closing = asyncio.ensure_future(pool.close(timeout=HANG))
    await asyncio.sleep(0)
    closing.cancel()
    pool.terminate()
    async with pool, asyncio.timeout(HANG):
        with pytest.raises(asyncio.CancelledError):
            await closing
        await assert_whole(pool)


@pytest.mark.anyio
@pytest.mark.parametrize("made", range(3))
async def test_an_opening_that_was_terminated_does_not_end_the_one_that_followed(
    postgres: LocalPostgres, made: int
) -> None:
    """Until then it has made none of its two connections, one, or both."""
    pool = make_pool(postgres, init_size=2, max_size=3)
    async with asyncio.timeout(HANG):
        opening = asyncio.ensure_future(pool.__aenter__())
        await asyncio.sleep(0)
        while pool.stats().idle < made:
            await asyncio.sleep(0)
        pool.terminate()
        async with pool:
            await asyncio.wait([opening])
            assert opening.exception() is None or isinstance(opening.exception(), neon_async.PoolClosedError)
            assert pool.get_idle_size() == 2
            await assert_whole(pool)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_every_run_of_an_event_loop_can_open_the_pool_again(
    postgres: LocalPostgres, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    pool = make_pool(postgres)

    async def handle() -> int:
        async with pool:
            return int(await pool.fetchval("SELECT 1"))

    for _ in range(3):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(handle()) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of an event loop that is closed with transports in it
@pytest.mark.parametrize("new_loop", LOOPS)
def test_an_event_loop_that_died_without_closing_the_pool_does_not_prevent_it(
    postgres: LocalPostgres, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    name = f"reopening {id(object())}"
    pool = make_pool(postgres, application_name=name)

    async def leave_open() -> None:
        await pool
        await pool.fetchval("SELECT 1")
        await pool.acquire()

    async def handle() -> int:
        async with pool, connected(postgres) as admin:
            value = int(await pool.fetchval("SELECT 1"))
            assert await sessions(admin, name) == 1
            assert_balanced(pool)
        return value

    for _ in range(2):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(leave_open())
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(handle()) == 1
    gc.collect()  # the transports of the event loops that died warn here, and in no other test


def test_what_was_learned_about_the_server_is_kept(postgres: LocalPostgres) -> None:
    """The first dial takes a round trip more, because the server's mechanism is not known yet."""
    pool = make_pool(postgres)

    async def handle() -> str | None:
        async with pool:
            await pool.fetchval("SELECT 1")
            return pool._connector._logins.mechanism

    assert asyncio.run(handle()) == asyncio.run(handle()) == "SCRAM-SHA-256-PLUS"


# With "in a call" a call waits for the server when the process forks, and both processes close its coroutine.
FORK = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of a fork while threads run
import neon_async

BACKEND = "SELECT pg_backend_pid()"
pool = neon_async.create_pool(sys.argv[1], trust_anchor=sys.argv[2], max_size=2)
loop = asyncio.new_event_loop()


async def begin():
    await pool.fetchval("SELECT $1::int", 1)
    call = pool.fetchval("SELECT $1::int", 1)
    call.send(None)
    return call


async def in_child():
    assert (pool.stats().acquires, pool.get_size()) == (0, 0), pool.stats()
    if call:
        call.close()
    async with pool:
        print("child", await pool.fetchval("SELECT 1"), flush=True)


loop.run_until_complete(pool.__aenter__())
backend = loop.run_until_complete(pool.fetchval(BACKEND))
held = loop.run_until_complete(pool.acquire().__aenter__())
call = loop.run_until_complete(begin()) if "in a call" in sys.argv else None
child = os.fork()
if child == 0:
    asyncio.run(in_child())
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert status == 0, status
if call:
    call.close()
assert loop.run_until_complete(held.fetchval(BACKEND)) == backend
loop.run_until_complete(pool.release(held))
assert loop.run_until_complete(pool.fetchval(BACKEND)) == backend
loop.run_until_complete(pool.close())
print("parent", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("when", ["at rest", "in a call"])
def test_a_forked_process_starts_empty_and_leaves_the_parent_its_connections(
    postgres: LocalPostgres, tmp_path: Path, when: str
) -> None:
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(postgres.trust_anchor)
    command = [sys.executable, "-c", FORK, postgres.dsn, str(anchor), when]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert (finished.stdout.split("\n")[:2], finished.returncode) == (["child 1", "parent"], 0), finished.stderr
