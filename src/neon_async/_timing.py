"""One shared timer for many deadlines, and one backoff.

Knows times only: not what they are the deadlines of.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Timer:
    """Call a function at the earliest of the times it is set to, once.

    Nearly all deadlines are met, so one timer of the event loop serves them all. The function sets the timer again
    when later deadlines remain.

    Args:
        callback: Called when the time has come.
    """

    __slots__ = ("_callback", "_due", "_handle")

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._due = math.inf  # kept apart from the handle: uvloop's handles do not always know their time

    def set(self, due: float) -> None:
        """Call the function at `due`, unless it is going to be called earlier.

        Args:
            due: A time of the monotonic clock, which asyncio and uvloop use for `loop.time()`. Infinity means never.
        """
        if due < self._due:
            self.cancel()
            self._due = due
            self._handle = asyncio.get_running_loop().call_at(due, self._fire)

    def cancel(self) -> None:
        """Forget all times it was set to."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle, self._due = None, math.inf

    def _fire(self) -> None:
        self._handle, self._due = None, math.inf
        self._callback()


# Every cap in use is reached by then; a float would overflow at some later count.
_MAX_DOUBLINGS = 16


def backoff(base: float, doublings: int, cap: float) -> float:
    """Return `base` seconds, doubled so many times, and at most `cap`.

    Args:
        base: Seconds before the first doubling.
        doublings: How often to double; at least 0.
        cap: The most seconds to return.
    """
    return min(cap, base * 2.0 ** min(doublings, _MAX_DOUBLINGS))
