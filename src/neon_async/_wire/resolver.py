"""Resolve a host name: one look-up at a time for each, shared by all dials that wait for it.

A look-up cannot be cancelled. Dials that each had their own would leave a thread behind with every deadline that
expires, as long as the resolver does not answer. This module must not know what the addresses are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import socket
import threading
from collections.abc import Sequence
from typing import TypeAlias

from . import threads

# What `socket.getaddrinfo()` returns.
Found: TypeAlias = "Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int | bytes, ...]]]"


async def look_up(host: str, port: int) -> Found:
    """Return the addresses of `host`, as `socket.getaddrinfo()` does. A cancellation does not wait for the look-up.

    Raises:
        OSError: The name cannot be resolved (`socket.gaierror`), or this process can start no thread.
        UnicodeError: The name is not one that can be looked up.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[Found | Exception] = loop.create_future()
    _join((host, port), (loop, waiter))
    found = await waiter
    if isinstance(found, Exception):
        # The result of a look-up is shared, and a traceback is not: each dial raises an exception of its own.
        raise copy.copy(found)
    return found


_Waiter: TypeAlias = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Found | Exception]"]

# The look-ups that are running, and the dials that wait for each, of one or several event loops. Not a future of
# `concurrent.futures`, which would take longer than to look up a name that is cached.
_running: dict[tuple[str, int], list[_Waiter]] = {}
_lock = threading.Lock()


def _join(name: tuple[str, int], waiter: _Waiter) -> None:
    """Have `waiter` wait for the look-up that is running, or start one."""
    with _lock:
        if name in _running:
            _running[name].append(waiter)
        else:
            threads.submit(_look_up, name)
            _running[name] = [waiter]


def _look_up(name: tuple[str, int]) -> None:
    result: Found | Exception
    try:
        result = socket.getaddrinfo(*name, type=socket.SOCK_STREAM)
    except Exception as error:  # noqa: BLE001  raised by `look_up()`
        result = error.with_traceback(None)
    with _lock:
        waiters = _running.pop(name)
    for loop, waiter in waiters:
        with contextlib.suppress(RuntimeError):  # the event loop has been closed
            loop.call_soon_threadsafe(_settle, waiter, result)


def _settle(waiter: asyncio.Future[Found | Exception], result: Found | Exception) -> None:
    if not waiter.done():  # else it was cancelled
        waiter.set_result(result)


def _forget_all() -> None:
    """Forget the look-ups of the parent process: a fork has none of its threads, and the lock may have been held."""
    global _lock
    _lock = threading.Lock()
    _running.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_all)
