"""Look-ups of names: one at a time for each name, shared by all dials, and in no thread that anyone waits for."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
from support.negotiations import connected
from support.probes import HANG, resolve_to, slow_resolver, until

import neon_async
from neon_async._wire import resolver, threads
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

DSN = "postgresql://alex:s3cret@db.example.com/neondb"
DIALS = 2 * min(32, (os.cpu_count() or 1) + 4)  # more than the default executor has threads


def threads_of_look_ups() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "neon-async"]


async def give_up(dsn: str) -> None:
    """Dial until the deadline expires."""
    with pytest.raises(neon_async.ConnectTimeoutError, match="name had not been resolved"):
        await neon_async.connect(dsn, connect_timeout=0.1)


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one after the other"])
async def test_dials_to_one_host_share_one_look_up_and_leave_the_default_executor_alone(
    monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    before = len(threads_of_look_ups())
    with slow_resolver(monkeypatch) as asked:
        if at_once:
            await asyncio.gather(*(give_up(DSN) for _ in range(DIALS)))
        else:
            for _ in range(5):
                await give_up(DSN)
        assert asked == ["db.example.com"]
        assert len(threads_of_look_ups()) == before + 1
        async with asyncio.timeout(HANG):
            assert await asyncio.to_thread(sum, [1, 2]) == 3
    await until(lambda: len(threads_of_look_ups()) == before)


async def test_a_pool_of_waiters_shares_one_look_up(monkeypatch: pytest.MonkeyPatch, postgres: LocalPostgres) -> None:
    with slow_resolver(monkeypatch) as asked:
        dsn, anchor = postgres.dsn.partition("?")[0], postgres.trust_anchor
        async with neon_async.create_pool(dsn, trust_anchor=anchor, connect_timeout=0.1, acquire_timeout=1.0) as pool:
            for outcome in await asyncio.gather(
                *(pool.fetchval("SELECT 1") for _ in range(20)), return_exceptions=True
            ):
                assert isinstance(outcome, neon_async.PoolTimeoutError), outcome
        assert pool.stats().dials > 1
        assert len(asked) == 1


async def test_each_host_has_a_look_up_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_resolver(monkeypatch) as asked:
        await asyncio.gather(*(give_up(DSN.replace("db.", f"db{number % 3}.")) for number in range(9)))
        assert sorted(asked) == ["db0.example.com", "db1.example.com", "db2.example.com"]
    await until(lambda: not resolver._running)


async def test_a_waiter_that_is_cancelled_leaves_the_look_up_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_resolver(monkeypatch) as asked:
        waiting = [asyncio.ensure_future(resolver.look_up("db.example.com", 5432)) for _ in range(3)]
        await until(lambda: asked)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert not waiting[1].done()
    outcomes = await asyncio.gather(*waiting[1:], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [socket.gaierror] * 2
    assert outcomes[0] is not outcomes[1]  # two dials do not add their frames to one traceback


async def test_a_look_up_that_has_ended_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_resolver(monkeypatch):
        waiting = asyncio.ensure_future(resolver.look_up("db.example.com", 5432))
        await until(lambda: resolver._running)
    with pytest.raises(socket.gaierror):
        await waiting
    asked = resolve_to(monkeypatch, ("127.0.0.1", 5432))
    for _ in range(2):
        ((_, _, _, _, address),) = await resolver.look_up("db.example.com", 5432)
        assert address == ("127.0.0.1", 5432)
    assert len(asked) == 2
    assert not resolver._running


async def test_two_event_loops_share_a_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    async def look_up() -> None:
        found.append(await asyncio.gather(resolver.look_up("db.example.com", 1), return_exceptions=True))

    with slow_resolver(monkeypatch) as asked:
        other = threading.Thread(target=asyncio.run, args=(look_up(),))
        other.start()
        mine = asyncio.ensure_future(look_up())
        await until(lambda: asked)
    await mine
    await asyncio.to_thread(other.join, HANG)
    assert [type(error) for (error,) in found] == [socket.gaierror] * 2
    assert len(asked) == 1


async def test_an_event_loop_that_was_closed_leaves_the_look_up_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop_waiting() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(resolver.look_up("db.example.com", 1), 0.01)

    with slow_resolver(monkeypatch) as asked:
        await asyncio.to_thread(asyncio.run, stop_waiting())
        await until(lambda: asked)  # its thread may be late
        mine = asyncio.ensure_future(resolver.look_up("db.example.com", 1))
        await asyncio.sleep(0)
    with pytest.raises(socket.gaierror):
        await asyncio.wait_for(mine, HANG)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["a..example.com", "a" * 64 + ".example.com"], ids=["an empty label", "a long label"])
async def test_a_name_that_cannot_be_looked_up_leaves_nothing_behind(name: str) -> None:
    with pytest.raises((UnicodeError, socket.gaierror)):
        await resolver.look_up(name, 5432)
    assert not resolver._running


async def test_a_process_without_a_thread_to_spare_gets_a_connect_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threads, "_idle", [])
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(neon_async.ConnectError, match="can start no thread"):
            await neon_async.connect(DSN)
    assert not resolver._running


async def test_localhost_is_looked_up_by_the_systems_resolver(postgres: LocalPostgres) -> None:
    dsn = postgres.dsn.replace(postgres.host, "localhost").partition("?")[0]
    async with connected(postgres, dsn) as connection:
        assert await connection.fetchval("SELECT 1") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The end of a process, and its forks

PROCESS = """
import asyncio, socket, sys, threading
import neon_async

never = threading.Event()
socket.getaddrinfo = lambda *args, **keywords: never.wait()

async def main():
    for _ in range(3):
        try:
            await neon_async.connect({dsn!r}, connect_timeout=0.05)
        except neon_async.ConnectTimeoutError:
            pass

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
print("ended")
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_service_ends_while_a_look_up_has_not_ended(loop: str) -> None:
    command = [sys.executable, "-c", PROCESS.format(dsn=DSN), loop]
    output = subprocess.run(command, check=True, timeout=HANG, capture_output=True, text=True)
    assert (output.stdout, output.stderr) == ("ended\n", "")


FORK = """
import asyncio, os, socket, threading
import neon_async
from neon_async._wire import resolver

never, asked = threading.Event(), threading.Event()

def hang(*args, **keywords):
    asked.set()
    never.wait()

async def look_up():
    return await resolver.look_up("db.example.com", 5432)

async def parent():
    task = asyncio.ensure_future(look_up())
    await asyncio.to_thread(asked.wait)
    task.cancel()

socket.getaddrinfo = hang
asyncio.run(parent())
pid = os.fork()
if pid == 0:
    socket.getaddrinfo = lambda *args, **keywords: ["found"]
    print(asyncio.run(look_up()), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_a_fork_does_not_wait_for_a_look_up_of_its_parent() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK]  # Python 3.12 warns of forks beside threads
    assert subprocess.run(command, check=True, timeout=HANG, capture_output=True, text=True).stdout == "['found']\n"
