"""Functions that block run in threads of their own, which are daemons."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref

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
