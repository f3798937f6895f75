"""The wait queue: callers that wait for a connection, first come, first served, each with a deadline.

Knows futures and deadlines, and not what is handed over.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .._timing import Timer

_T = TypeVar("_T")

# How late a waiter may learn that its time is over. All deadlines share one timer: one timer of the event loop for each
# waiter would cost more than the rest of an acquire, and nearly all of them would be cancelled unused.
_RESOLUTION = 0.01


class WaitExpired(Exception):
    """The deadline of a waiter has passed."""


class WaitQueue(Generic[_T]):
    """Waiters in strict order. A waiter that leaves, at whatever moment, loses nothing that was handed to it.

    Args:
        give_back: Called with what was handed to a waiter that was cancelled before it could take it.
    """

    __slots__ = ("_give_back", "_timer", "_waiters")

    def __init__(self, give_back: Callable[[_T], None]) -> None:
        self._give_back = give_back
        # Each with its deadline. Ordered, because waiters leave from the middle: ten thousand of them at once when
        # their service is stopped.
        self._waiters: OrderedDict[asyncio.Future[_T], float] = OrderedDict()
        self._timer = Timer(self._expire)

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[asyncio.Future[_T]]:
        """Iterate over the waiters, the first one first."""
        return iter(self._waiters)

    def __repr__(self) -> str:
        return f"<WaitQueue: {len(self)} waiting>"

    def join(self, deadline: float, *, front: bool = False) -> asyncio.Future[_T]:
        """Return a new waiter, to be awaited by the same task before anything else. Where that raises, call `leave()`.

        Its result is what is handed over. It raises `WaitExpired` when its deadline has passed, or what `fail()` or
        `close()` made for it.

        Args:
            deadline: A time of the monotonic clock.
            front: Join at the front; used when the connection handed over was already dead.
        """
        waiter: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = deadline
        if front:
            self._waiters.move_to_end(waiter, last=False)
        self._timer.set(deadline)
        return waiter

    def leave(self, waiter: asyncio.Future[_T]) -> None:
        """End a wait that raised: its task was cancelled, or its coroutine closed, or the waiter got an error.

        The caller itself awaits the waiter and calls this: a coroutine in between would take memory for every waiter.
        """
        if self._waiters.pop(waiter, None) is not None:
            return
        # Something was handed over before: the next waiter gets it.
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._give_back(waiter.result())

    def hand_over(self, thing: _T) -> bool:
        """Hand `thing` to the first waiter. Return False when there is none."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(thing)
                return True
        return False

    def fail(self, count: int, make_error: Callable[[], Exception]) -> None:
        """Raise an error in the last `count` waiters, made anew for each of them."""
        for _ in range(min(count, len(self._waiters))):
            waiter, _deadline = self._waiters.popitem(last=True)
            if not waiter.done():
                waiter.set_exception(make_error())

    def fail_one(self, waiter: asyncio.Future[_T], error: Exception) -> bool:
        """Raise an error in one waiter. Return False when it does not wait any more."""
        if self._waiters.pop(waiter, None) is None or waiter.done():
            return False
        waiter.set_exception(error)
        return True

    def close(self, make_error: Callable[[], Exception]) -> None:
        """Raise an error in all waiters, and stop the timer."""
        self._timer.cancel()
        self.fail(len(self._waiters), make_error)

    def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        for waiter in [waiter for waiter, deadline in self._waiters.items() if deadline <= now]:
            del self._waiters[waiter]
            if not waiter.done():
                waiter.set_exception(WaitExpired)
        if self._waiters:
            self._timer.set(max(min(self._waiters.values()), now + _RESOLUTION))
