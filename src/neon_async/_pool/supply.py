"""Who gets a free connection, and where connections come from.

Demand is a line of waiters, strictly first come, first served. Supply is background tasks: dials, checks of connections
that were idle for long, and what the pool does with those that came back. Each ends in `offer()`, which gives the
connection to the first in line; `balance()` starts what the line needs. No waiter has a dial of its own, so none that
gives up throws one away.

This module knows neither callers nor deadlines of theirs, nor what is done to a connection that came back.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .._errors import NeonAsyncError
from .._timing import Timer
from .pace import Pace, may_pass
from .slots import Place, Slot, Slots
from .stats import Tallies
from .waiters import WaitingLine

_T = TypeVar("_T")

_log = logging.getLogger("neon_async")

# A healthy server answers a ping in one round trip; whoever waits for the answer has other uses for the time.
_PING_TIMEOUT = 2.0
# By how much the wall clock may run ahead of the monotonic one, or behind, before this machine has been asleep: NTP
# slews both alike and steps for less are rare.
_CLOCK_LEAP = 2.0
# Lifetimes differ by up to this part, so that connections made together do not end together.
_LIFETIME_JITTER = 0.1


class Supply:
    """The free connections of one pool, and the line of those who want one.

    `name`: what log lines call the database. The other parameters are `create_pool()`'s; infinity stands for never.
    """

    def __init__(
        self,
        name: str,
        tallies: Tallies,
        *,
        min_size: int,
        max_lifetime: float,
        max_inactive: float,
        check_after_idle: float,
        close_timeout: float,
    ) -> None:
        self._name = name
        self._tallies = tallies
        self._min_size = min_size
        self._max_lifetime = max_lifetime
        self._max_inactive = max_inactive
        self._check_after_idle = check_after_idle
        self._close_timeout = close_timeout
        self.slots = Slots([])
        self.pace = Pace()
        self.line: WaitingLine[Slot] = WaitingLine(give_back=self.offer)
        self.closing = False  # from then on connections end instead of being offered
        self.emptied = asyncio.Event()  # closing, and the last connection has ended
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reaper = Timer(self._reap)
        self._warden = Timer(self._end_late_work)
        self._resumption: asyncio.TimerHandle | None = None
        self._cold_since: float | None = None
        self._clock_ahead = time.time() - time.monotonic()

    def __repr__(self) -> str:
        return f"<Supply {self._name}: {self.slots!r}, {len(self.line)} waiting>"

    # -----------------------------------------------------------------------------------------------------------------
    # Free connections

    def usable_idle(self, now: float) -> Slot | None:
        """Return the idle slot that came back last, if it can be used without a check; it stays where it is."""
        self._notice_leap(now)
        idle = self.slots.idle
        while idle:
            slot = idle[-1]
            if not slot.is_connected():
                self.bury(slot)
            elif slot.is_worn(now):
                self.retire(slot)
            elif now - slot.heard_at >= self._check_after_idle:
                return None  # those below it came back earlier still
            else:
                return slot
        return None

    def _notice_leap(self, now: float) -> None:
        """Trust no idle connection after this machine was asleep: the wall clock went on, the monotonic one did not."""
        ahead = time.time() - now
        if abs(ahead - self._clock_ahead) > _CLOCK_LEAP:
            for slot in self.slots.idle:
                slot.heard_at = -math.inf
            _log.info("%s: the clock has leapt; idle connections are checked before use", self._name)
        self._clock_ahead = ahead

    def offer(self, slot: Slot) -> None:
        """Give a slot that has become free to the first in line, or let it idle, or end its connection."""
        slot.task = None
        now = time.monotonic()
        if not slot.is_connected():
            self.bury(slot)
        elif self.closing or slot.is_outdated() or (slot.is_worn(now) and not slot.is_new()):
            self.retire(slot)  # a new one is used once, or a lifetime below that of a dial would make them for ever
        elif self.line.give(slot):
            self.slots.move(slot, Place.GIVEN)
        else:
            self.slots.move(slot, Place.IDLE)
            slot.idle_since = now
            self._reaper.set(min(now + self._max_inactive, slot.expires))
        self.balance()

    def bury(self, slot: Slot) -> None:
        """Note the end of a connection. Its slot is vacant."""
        slot.discard()
        self.slots.move(slot, Place.VACANT)
        if slot.born is not None:
            self._tallies.terminations.since(slot.born)
            slot.born = None
            if self.slots.connected == 0 and not self.closing:
                _log.info("%s: no connection is open", self._name)
        self._note_emptiness()

    def retire(self, slot: Slot) -> None:
        """Close the connection of a slot that is nobody's, behind."""
        self.mend(slot, self._close(slot), self._close_timeout)

    async def _close(self, slot: Slot) -> None:
        try:
            await slot.close()
        except Exception as error:  # noqa: BLE001  it ends, one way or the other
            _log.info("%s: a connection could not be closed and ends (%s)", self._name, type(error).__name__)
            slot.discard()

    def mend(self, slot: Slot, work: Coroutine[Any, Any, _T], limit: float) -> asyncio.Task[_T]:
        """Let `work` reset or close the connection of a slot that is nobody's, behind, for at most `limit` seconds.

        All such limits share one timer, for nearly all are met.
        """
        now = time.monotonic()
        slot.until = now + limit
        self._warden.set(slot.until)
        return self._work_on(slot, Place.RESETTING, work)

    def _end_late_work(self) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.place is not Place.RESETTING:
                continue
            if slot.until > now:
                self._warden.set(slot.until)
            elif slot.task is not None:
                slot.task.cancel()

    def _work_on(self, slot: Slot, place: Place, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Do something to a slot at `place`, behind. Afterwards it is offered, unless asyncpg has given it back before.

        Also when the task is cancelled, even before it has begun: none of the coroutine has run then, and the
        connection ends.
        """
        self.slots.move(slot, place)
        # Not by create_task(): an eager task (Python 3.12) would run before it is known here.
        slot.task = task = asyncio.Task(work, loop=asyncio.get_running_loop())
        self._tasks.add(task)  # the event loop itself keeps weak references only
        task.add_done_callback(functools.partial(self._worked_on, slot))
        return task

    def _worked_on(self, slot: Slot, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if slot.task is task and task.cancelled():
            slot.discard()
        if slot.task is task:  # asyncpg may have given it back just now, and it may be connecting again
            self.offer(slot)

    # -----------------------------------------------------------------------------------------------------------------
    # What makes them

    def balance(self) -> None:
        """Start what the line, and `min_size`, need: checks of idle connections, then dials, at the pace due."""
        slots, line = self.slots, self.line
        if self.closing or not (line or self._min_size) or not (slots.idle or slots.vacant):
            return
        now = time.monotonic()
        while line and (slot := self.usable_idle(now)) and line.give(slot):
            slots.move(slot, Place.GIVEN)
        while slots.idle and len(line) > slots.count(Place.CHECKING):
            self._work_on(slots.idle[-1], Place.CHECKING, self._check(slots.idle[-1]))
        connecting, checking = slots.count(Place.CONNECTING), slots.count(Place.CHECKING)
        refusal = self.pace.refusal(now)
        if refusal is not None:
            served = connecting + checking + slots.count(Place.RESETTING)
            line.refuse(len(line) - served, functools.partial(_twin, refusal))
        # A reset takes one round trip and a dial five, so half of those under way end long before a dial begun now. Not
        # all count: with one more connection a caller that goes on at once need not wait for its own reset.
        soon = checking + slots.count(Place.RESETTING) // 2
        wanted = max(len(line) - soon, self._min_size - slots.connected) - connecting
        if wanted > 0 and slots.vacant and (pause := self.pace.pause(now)):
            self._resume_in(pause)
            return
        for _ in range(min(wanted, len(slots.vacant), self.pace.allowed(slots.connected) - connecting)):
            self._work_on(slots.vacant[-1], Place.CONNECTING, self._dial(slots.vacant[-1]))

    def _resume_in(self, pause: float) -> None:
        if self._resumption is not None:  # of an earlier pause, which may have been longer
            self._resumption.cancel()
        self._resumption = asyncio.get_running_loop().call_later(pause, self._resume)

    def _resume(self) -> None:
        self._resumption = None
        self.balance()

    async def _dial(self, slot: Slot) -> None:
        """Fill a vacant slot."""
        began = time.monotonic()
        if self.slots.connected == 0 and self._cold_since is None:
            self._cold_since = began
        try:
            await slot.open()
        except asyncio.CancelledError:
            self._tallies.dial_failures.since(began)
            raise
        except Exception as error:  # noqa: BLE001  told to the line, or to who waits in vain
            self._tallies.dial_failures.since(began)
            self._note_failure(error.with_traceback(None), began)  # the frames would live as long as the pool
        else:
            self._note_success(slot, began)
        finally:
            self._tallies.dials.since(began)

    def _note_success(self, slot: Slot, began: float) -> None:
        slot.born = slot.heard_at = time.monotonic()
        slot.expires = slot.born + self._max_lifetime * (1 - _LIFETIME_JITTER * random.random())  # noqa: S311
        assert slot.connection is not None
        slot.connection.add_termination_listener(functools.partial(self._note_end, slot))
        if self.pace.last_failure is not None or self._cold_since is not None:
            _log.info("%s: connected after %.2f s", self._name, slot.born - (self._cold_since or began))
        self.pace.succeeded()
        if self._cold_since is not None:
            self._tallies.wakes.since(self._cold_since)
            self._cold_since = None

    def _note_failure(self, error: Exception, began: float) -> None:
        before = self.pace.last_failure
        if before is None or may_pass(before) != may_pass(error):
            ours = isinstance(error, NeonAsyncError)  # the text of anybody else's may hold anything
            what = " ".join(str(error).split()) if ours else type(error).__name__
            _log.info("%s: cannot connect, %s: %s", self._name, "trying on" if may_pass(error) else "not trying", what)
        self.pace.failed(error, began=began, now=time.monotonic())
        if not self.line:
            self._cold_since = None  # nobody waits for this wake any more

    def _note_end(self, slot: Slot, _: object) -> None:
        """A connection has ended; where it was idle, nobody else tells."""
        if slot.place is Place.IDLE and not slot.is_connected():
            self.bury(slot)
            self.balance()

    async def _check(self, slot: Slot) -> None:
        """Ping a connection that was silent for long. Where it stays so, end all that were silent for as long."""
        deadline = asyncio.timeout(_PING_TIMEOUT)
        try:
            async with deadline:
                await slot.ping()
        except Exception as error:  # noqa: BLE001  whatever it was, the connection is of no use
            _log.info("%s: an idle connection did not answer and ends (%s)", self._name, type(error).__name__)
            slot.discard()
            if deadline.expired():
                self._end_all_silent_since(slot.heard_at)
        else:
            slot.heard_at = time.monotonic()

    def _end_all_silent_since(self, moment: float) -> None:
        for slot in [slot for slot in self.slots.idle if slot.heard_at <= moment]:
            self.bury(slot)

    def _reap(self) -> None:
        """End the connections that were idle for too long, down to `min_size`, and those that are too old."""
        now = time.monotonic()
        spare = self.slots.connected - self.slots.count(Place.RESETTING) - self._min_size  # those may be closing
        for slot in list(self.slots.idle):  # from the bottom: idle for the longest time
            inactive_from = slot.idle_since + self._max_inactive
            if not slot.is_connected():
                self.bury(slot)
            elif slot.is_worn(now) or (inactive_from <= now and spare > 0):
                self.retire(slot)
                spare -= 1
            else:
                self._reaper.set(min(inactive_from, slot.expires) if inactive_from > now else slot.expires)
        self.balance()

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def wind_down(self, error: Callable[[], Exception]) -> None:
        """Tell the line, make no more connections, close those that are free or come back. Then `emptied` is set."""
        self.closing = True
        self.line.close(error)
        self._reaper.cancel()
        if self._resumption is not None:
            self._resumption.cancel()
        for slot in self.slots:
            if slot.task is not None and slot.place in (Place.CONNECTING, Place.CHECKING):
                slot.task.cancel()
        for slot in list(self.slots.idle):
            self.retire(slot)
        self._note_emptiness()

    def end(self) -> None:
        """End every connection at once, also those that are out."""
        self._warden.cancel()
        for task in self._tasks:
            task.cancel()
        for slot in self.slots:
            slot.discard()
            if slot.place is Place.IDLE:  # what is anywhere else is buried by who was to take it from there
                self.bury(slot)

    async def ended(self, timeout: float) -> None:  # noqa: ASYNC109  it says how long to wait, and raises nothing
        """Wait until the tasks that were told to end have ended, for at most `timeout` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)

    def _note_emptiness(self) -> None:
        if self.closing and len(self.slots.vacant) == len(self.slots):
            self.emptied.set()


def _twin(error: Exception) -> Exception:
    """Return `error` for one more waiter: each raises an object, and so a traceback, of its own."""
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001  the caller's own, which does not bear to be copied
        twin = error
    if type(twin) is not type(error):
        twin = error
    twin.__cause__ = error.__cause__
    return twin.with_traceback(None)
