"""Event loops for measurements: one with exact timers, and a watch for the time in which a loop stands still."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import AsyncIterator, Callable


def exact_loop() -> asyncio.AbstractEventLoop:
    """Return asyncio's event loop on select(), whose timeouts have a resolution of microseconds.

    epoll() rounds timeouts up to whole milliseconds, a large part of the 5 and 10 ms that benchmarks sleep.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


@contextlib.asynccontextmanager
async def longest_stall(clock: Callable[[], float] = time.perf_counter) -> AsyncIterator[list[float]]:
    """Yield a list whose one number is, after the block, the longest stall of the event loop in seconds.

    A stall is the time between two turns of a task that does nothing but yield to the event loop. No other task of the
    process runs during a stall either.

    Args:
        clock: What measures it. `time.process_time` counts only what this process does meanwhile, in any thread, and
            not what other processes do.
    """
    result = [0.0]

    async def yield_forever() -> None:
        before = clock()
        while True:
            await asyncio.sleep(0)
            now = clock()
            result[0] = max(result[0], now - before)
            before = now

    task = asyncio.create_task(yield_forever())
    await asyncio.sleep(0)
    try:
        yield result
        await asyncio.sleep(0)
    finally:
        task.cancel()
