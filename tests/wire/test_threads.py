"""Functions that block run in threads of their own, which are daemons."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading
import weakref
from asyncio.subprocess import PIPE

import pytest
from support.probes import HANG, until

from neon_async._wire import threads

pytestmark = pytest.mark.anyio


async def test_a_function_runs_in_a_daemon_thread() -> None:
    thread = await threads.run(threading.current_thread)
    assert thread is not threading.current_thread()
    assert thread.daemon


async def test_its_exception_is_raised() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await threads.run(int, "x")


async def test_a_cancellation_does_not_wait_for_the_function() -> None:
    released = threading.Event()
    waiting = asyncio.ensure_future(threads.run(released.wait, HANG))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    released.set()


async def test_an_exception_is_freed_without_the_garbage_collector() -> None:
    class Failure(Exception):
        pass

    freed: list[weakref.ref[Failure]] = []

    def fail() -> None:
        error = Failure()
        freed.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    gc.disable()
    try:
        with contextlib.suppress(Failure):
            await threads.run(fail)
        await until(lambda: freed[0]() is None)
    finally:
        gc.enable()


async def test_a_thread_that_has_finished_is_used_again() -> None:
    first = await threads.run(threading.current_thread)
    await until(lambda: first in threads._idle)
    assert await threads.run(threading.current_thread) is first


async def test_functions_that_run_at_once_have_a_thread_each() -> None:
    barrier = threading.Barrier(3)

    def meet() -> threading.Thread:
        barrier.wait(HANG)
        return threading.current_thread()

    assert len(set(await asyncio.gather(*(threads.run(meet) for _ in range(3))))) == 3


async def test_a_thread_ends_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_IDLE", 0.01)
    monkeypatch.setattr(threads, "_idle", [])
    thread = await threads.run(threading.current_thread)
    await until(lambda: not thread.is_alive())
    assert threads._idle == []
    assert await threads.run(threading.current_thread) is not thread


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
async def test_a_forked_process_starts_threads_of_its_own() -> None:
    code = (
        "import asyncio, os; from neon_async._wire import threads; asyncio.run(threads.run(int)); child = os.fork()\n"
        "if not child: print(asyncio.run(asyncio.wait_for(threads.run(int, '7'), 20)), flush=True); os._exit(0)\n"
        "os.waitpid(child, 0)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-W", "ignore", "-c", code, stdout=PIPE)
    assert (await process.communicate())[0] == b"7\n"
