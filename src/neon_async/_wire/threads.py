"""Run a function that blocks in a thread of its own.

The threads are daemons: neither a look-up of the resolver that takes half a minute nor a disk that does not answer
keeps the service from ending, and none occupies the event loop's default executor, whose few threads are the service's.
This module must not know what the functions do.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def run(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return the result of `function`, called in a thread. A cancellation does not wait for the thread.

    Raises:
        OSError: This process can start no more threads.
        Exception: What `function` raises.
    """
    return await asyncio.wrap_future(start(function, *args, **kwargs))


def start(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Call `function` in a new thread, and return the future of its result, which cannot be cancelled.

    Raises:
        OSError: This process can start no more threads.
    """
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()

    def work(future: Future[_T]) -> None:
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001  raised where the result is awaited
            future.set_exception(error)
        else:
            future.set_result(result)
        del future  # the traceback of an error leads to this frame: a cycle that only the garbage collector would free

    try:
        threading.Thread(target=work, args=(future,), name="neon-async", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"this process can start no thread: {error}") from None
    return future
