"""Run a function that blocks in a thread that it has for itself.

The threads are daemons: neither a look-up of the resolver that takes half a minute nor a disk that does not answer
keeps the service from ending, and none occupies the event loop's default executor, whose few threads are the service's.
A thread that has finished waits a few seconds for the next function: to start one takes longer than a look-up.
This module must not know what the functions do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeAlias, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# What a thread is to call, and the argument.
_Job: TypeAlias = tuple[Callable[[Any], None], Any]

# Seconds for which a thread without work is kept.
_IDLE = 5.0


async def run(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return the result of `function`, called in a thread. A cancellation does not wait for the thread.

    Raises:
        OSError: This process can start no more threads.
        Exception: What `function` raises.
    """
    return await asyncio.wrap_future(start(function, *args, **kwargs))


def start(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Call `function` in a thread, and return the future of its result, which cannot be cancelled.

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

    submit(work, future)
    return future


def submit(function: Callable[[_T], None], argument: _T) -> None:
    """Call `function`, which raises nothing, in a thread.

    Raises:
        OSError: This process can start no more threads.
    """
    try:
        _idle.pop().jobs.put((function, argument))
    except IndexError:
        _start_thread((function, argument))


def _start_thread(job: _Job) -> None:
    thread = _Thread()
    thread.jobs.put(job)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"this process can start no thread: {error}") from None


class _Thread(threading.Thread):
    """A daemon that calls the functions in `jobs`, until there has been none for a while."""

    def __init__(self) -> None:
        super().__init__(name=_BUSY, daemon=True)
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()

    def run(self) -> None:
        timeout: float | None = None
        while True:
            try:
                work, future = self.jobs.get(timeout=timeout)
            except queue.Empty:
                try:
                    _idle.remove(self)
                except ValueError:  # it has just been taken from there, and its next job is coming
                    timeout = None
                    continue
                return
            self.name = _BUSY
            work(future)
            del work, future  # what it refers to must not live as long as this thread
            self.name, timeout = f"{_BUSY}, idle", _IDLE
            _idle.append(self)


_BUSY = "neon-async"
_idle: list[_Thread] = []

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_idle.clear)  # a fork has none of its parent's threads
