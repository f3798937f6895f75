"""Who waits, and who is next: a strictly fair line of tasks, each waiting for one thing to be given to it.

It knows futures and when a waiter wants to leave, and not what is given.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from .._timing import Timer

_T = TypeVar("_T")

# How late a waiter may learn that its time is over. All deadlines share one timer: a timer of the event loop for each
# waiter would cost more than the rest of an acquire, and nearly all would be cancelled unused.
_RESOLUTION = 0.01


class TurnExpired(Exception):
    """The waiter's time was over before its turn."""


class WaitingLine(Generic[_T]):
    """First come, first served. Leaving the line, at any moment, loses nothing that was given.

    `give_back`: called with what was given to a waiter who was cancelled before it could take it.
    """

    def __init__(self, give_back: Callable[[_T], None]) -> None:
        self._give_back = give_back
        # With the deadline of each. Ordered, because waiters leave from the middle: ten thousand of them at once when
        # their service is stopped.
        self._waiters: OrderedDict[asyncio.Future[_T], float] = OrderedDict()
        self._timer = Timer(self._expire)

    def __len__(self) -> int:
        return len(self._waiters)

    def __repr__(self) -> str:
        return f"<WaitingLine: {len(self)} waiting>"

    def join(self, until: float, *, first: bool = False) -> asyncio.Future[_T]:
        """Stand in line until that time of the event loop. The same task awaits `turn()` before it waits for anything.

        `first`: in front of everybody, for who was served in vain.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[_T] = loop.create_future()
        self._waiters[waiter] = until
        if first:
            self._waiters.move_to_end(waiter, last=False)
        self._timer.set(until)
        return waiter

    async def turn(self, waiter: asyncio.Future[_T]) -> _T:
        """Return what is given to `waiter`, once it is its turn.

        Raises `TurnExpired` when that is not in time, and what `refuse()` was given.
        """
        try:
            return await waiter
        except asyncio.CancelledError:
            # Cancelled between the gift and this line: the gift goes to the next.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._give_back(waiter.result())
            raise
        finally:
            self._waiters.pop(waiter, None)

    def give(self, thing: _T) -> bool:
        """Give `thing` to the first who still waits. False when there is nobody."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(thing)
                return True
        return False

    def refuse(self, count: int, error: Callable[[], Exception]) -> None:
        """Raise in the last `count` waiters an exception made for each."""
        for _ in range(min(count, len(self._waiters))):
            waiter, _until = self._waiters.popitem(last=True)
            if not waiter.done():
                waiter.set_exception(error())

    def close(self, error: Callable[[], Exception]) -> None:
        """Refuse everybody, and forget the time."""
        self.refuse(len(self._waiters), error)
        self._timer.cancel()

    def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        for waiter in [waiter for waiter, until in self._waiters.items() if until <= now]:
            del self._waiters[waiter]
            if not waiter.done():
                waiter.set_exception(TurnExpired)
        if self._waiters:
            self._timer.set(max(min(self._waiters.values()), now + _RESOLUTION))
