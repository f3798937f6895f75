"""Resolve a host name: one look-up at a time for each, shared by all dials that wait for it.

A look-up cannot be cancelled. Dials that each had their own would leave a thread behind with every deadline that
expires, as long as the resolver does not answer. This module must not know what the addresses are for.
"""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
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
    found = await asyncio.wrap_future(_join(host, port))
    if isinstance(found, Exception):
        # The result of a look-up is shared, and a traceback is not: each dial raises an exception of its own.
        raise copy.copy(found)
    return found


# The look-ups that are running. Dials of several event loops, in several threads, may share one.
_running: dict[tuple[str, int], Future[Found | Exception]] = {}
_lock = threading.Lock()


def _join(host: str, port: int) -> Future[Found | Exception]:
    """Return the future of the look-up that is running, or start one."""
    with _lock:
        future = _running.get((host, port))
        if future is None:
            future = _running[host, port] = threads.start(_look_up, host, port)
    return future


def _look_up(host: str, port: int) -> Found | Exception:
    result: Found | Exception
    try:
        result = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except Exception as error:  # noqa: BLE001  raised by `look_up()`
        result = error.with_traceback(None)
    with _lock:
        del _running[host, port]
    return result


def _forget_all() -> None:
    """Forget the look-ups of the parent process: a fork has none of its threads, and the lock may have been held."""
    global _lock
    _lock = threading.Lock()
    _running.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_all)
