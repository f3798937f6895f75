"""Where connections come from and where they go: dial, check, hand over, reset, expire, close.

Demand is a queue of waiters, strictly first come, first served. Supply is work in the background: dials, checks of
connections that were idle for long, resets and closes. Each ends in `_finished()`, which offers the slot, and
`balance()` starts what the waiters need. No waiter has a dial of its own, so a waiter that gives up throws none away.

Knows no callers: not how long they wait, and not what they do with a connection.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import math
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from .._driver import holder
from .._driver.connection import has_own_reset_query, resets_itself
from .._driver.connector import Connector
from .._driver.holder import CallersError, Holder, own_session
from .._driver.snapshot import restore_codecs
from .._errors import ConnectError, PoolTimeoutError
from .._neon.endpoint import short_name
from .._timing import Timer
from .health_log import HealthLog
from .loan import CLOSE, FORGET, NOTHING, RESET, RESET_AHEAD, Need
from .log import Cause, Mishap, PoolLog
from .opening import Steps, failure_of, open_connection
from .options import PoolOptions
from .pace import Pace, may_pass
from .slots import (
    CHECKING,
    CLOSING,
    CONNECTING,
    IDLE,
    RESERVED,
    RESETTING,
    SILENT,
    UNANSWERED,
    VACANT,
    Slot,
    Slots,
    State,
)
from .tallies import Tallies, report
from .waiters import WaitQueue

# A healthy server answers a ping in one round trip, and a caller waits for the answer. A distant server has longer, by
# what its TLS handshake took.
_PING_TIMEOUT = 2.0
# After this time without an answer to a ping, a reset or a close, the pool does not count on the connection any more
# and dials another one meanwhile. It is longer than nearly every round trip on earth.
_PATIENCE = 0.3
# A server answers Terminate by closing, in one round trip. Nothing is lost where it does not.
_CLOSE_TIMEOUT = 1.0
# How far the wall clock may gain on the monotonic clock, or fall behind it, before this machine counts as having been
# asleep: NTP slews both alike, and smaller steps are rare.
_CLOCK_JUMP = 2.0
# Lifetimes differ by up to this part, so that connections made together do not end together.
_LIFETIME_JITTER = 0.1
# What is cancelled ends within an iteration or two of the event loop.
_CANCEL_GRACE = 1.0


class Supply:
    """The connections of one pool, and the waiters for them.

    Args:
        connector: Makes the connections.
        options: The pool's options.
        holders: One for each connection the pool may have; a slot is made for each.
        before: The supply of the pool's life before this one, which has ended; its statistics go on.
    """

    def __init__(
        self, connector: Connector, options: PoolOptions, holders: list[Holder], before: Supply | None = None
    ) -> None:
        self.name = short_name(connector.parameters.host, connector.parameters.endpoint)
        self.options = options
        self.connector = connector
        self.slots = Slots([Slot(holder) for holder in holders])
        self._slot_of = {slot.holder: slot for slot in self.slots}
        self.waiters: WaitQueue[Slot] = WaitQueue(give_back=self.give_back)
        self.pace = Pace()
        self.tallies: Tallies = before.tallies if before else Tallies(options.on_event, self.name)
        self.health: HealthLog = before.health if before else HealthLog()
        self.log = PoolLog(self.name)
        self.size = 0  # open connections
        self.own_reset = options.reset is not None  # or, once there is a connection, its class has a reset() of its own
        self.own_reset_query = False  # whether the class of the connections has a get_reset_query() of its own
        self.closing = False  # from then on connections are closed instead of being offered
        self.emptied = asyncio.Event()  # closing, and the last connection has ended
        self.loop: asyncio.AbstractEventLoop | None = None  # the one in which the pool was opened; before that none
        self._generation = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reaper = Timer(self._reap)
        self._late_work = Timer(self._attend_to_late_work)
        self._resumption = Timer(self.balance)
        self._cold_since: float | None = None  # since when there has been no connection and a dial has been under way
        self._clock_offset = time.time() - time.monotonic()
        # Work in the background serves no single caller, so it does not run in the context of the caller that happened
        # to start it: a tracer would take it for a part of that caller's request.
        self._context = contextvars.copy_context()

    def __repr__(self) -> str:
        return f"<Supply {self.name}: {self.slots!r}, {len(self.waiters)} waiting>"

    def report(self, event: str, *facts: Any) -> None:
        """Report an event to the `on_event` of the pool, if there is one.

        Args:
            event: The name of its class. Without `on_event` the classes are not imported.
            facts: The arguments of the class.
        """
        if self.options.on_event is not None:
            report(self.options.on_event, event, *facts)

    def slot_of(self, owned: Holder) -> Slot:
        """Return the slot that owns a holder."""
        return self._slot_of[owned]

    # -----------------------------------------------------------------------------------------------------------------
    # Idle connections

    def take_idle(self, now: float) -> Slot | None:
        """Return the idle slot that was used last, if it needs no check; it stays where it is."""
        self._notice_jump(now)
        idle = self.slots.idle
        while idle:
            slot = idle[-1]
            if not slot.holder.is_connected():
                slot.holder.terminate()  # which vacates it
            elif self.is_worn(slot, now):
                self._close(slot)
            elif now - slot.heard_at >= self.options.check_after_idle:
                return None  # those below it were used earlier still
            else:
                return slot
        return None

    def _notice_jump(self, now: float) -> None:
        """Check all idle connections before use after this machine was asleep.

        The wall clock goes on while a machine sleeps, the monotonic clock does not.
        """
        offset = time.time() - now
        if abs(offset - self._clock_offset) > _CLOCK_JUMP:
            for slot in self.slots.idle:
                slot.heard_at = -math.inf
            self.log.info("the clock jumped; idle connections are checked before use", event="clock_jumped")
        self._clock_offset = offset

    def is_worn(self, slot: Slot, now: float) -> bool:
        """Return whether a connection is not to be lent again."""
        return now >= slot.expires_at or slot.generation != self._generation or self.closing

    def is_expired(self, slot: Slot) -> bool:
        """Return whether the connection was made before `expire_connections()`."""
        return slot.generation != self._generation

    def suspect_silence(self, slot: Slot, *, since: float) -> None:
        """Ping idle connections before use if the statement that was sent on `slot` at `since` has no answer yet.

        It may be slow, or all connections of its age may be dead: a NAT forgets them together.
        """
        if not holder.is_idle(slot.holder.connection):
            self._suspect(since)

    def _suspect(self, since: float) -> None:
        """Ping the idle connections before use that have shown no sign of life since then."""
        for slot in self.slots.idle:
            if slot.heard_at <= since:
                slot.heard_at = -math.inf

    def note_work(self, slot: Slot) -> None:
        """Note that a connection has answered a caller for the first time."""
        slot.proven = True
        self.pace.worked(opened_at=slot.opened_at)
        self.log.worked()
        self.balance()  # more may be dialed now

    def terminate_after_setup(self, slot: Slot) -> None:
        """Terminate a connection on which the caller's `setup` has failed."""
        if not slot.proven:  # it was made for this acquire, and the next dial began when this one ended
            self.pace.stopped_by_caller(began=slot.opened_at, connects=2, told=True)
        slot.holder.terminate()

    def expire(self) -> None:
        """Lend no connection again that has been made so far."""
        self._generation += 1
        self.connector.healing.renew_all()

    def _reap(self) -> None:
        """Close connections that were idle for too long, down to `min_size`, and those that are too old."""
        now, max_idle = time.monotonic(), self.options.max_inactive_connection_lifetime or math.inf
        # A reset may end in a close.
        spare = self.slots.connected - self.slots.count(RESETTING) - self.options.min_size
        for slot in list(self.slots.idle):  # from the bottom of the stack: idle for the longest time
            inactive_at = slot.idle_since + max_idle
            if not slot.holder.is_connected():
                slot.holder.terminate()
            elif self.is_worn(slot, now) or (inactive_at <= now and spare > 0):
                self._close(slot)
                spare -= 1
            else:
                self._reaper.set(min(inactive_at, slot.expires_at) if inactive_at > now else slot.expires_at)
        self.balance()

    # -----------------------------------------------------------------------------------------------------------------
    # The one way back

    def take_back(self, slot: Slot, need: Need, timeout: float | None) -> asyncio.Task[Any] | None:
        """Do what the connection needs at the end of its loan.

        Args:
            slot: The slot of the loan.
            need: What was decided.
            timeout: Seconds for a reset or a close. Default: `release_timeout`.

        Returns:
            The task that does it in the background, if there is one.
        """
        limit = self.options.release_timeout if timeout is None else timeout
        if need is RESET_AHEAD:
            slot.reset_began = time.monotonic()
            slot.holder.protocol.send_reset_ahead()
            self._offer(slot, is_sound=True)
        elif need is NOTHING:
            self._offer(slot, is_sound=True)
        elif need is RESET:
            return self._start(slot, RESETTING, self._reset(slot, limit), limit)
        elif need is CLOSE:
            return self._close(slot, limit)
        elif need is FORGET:
            self._offer(slot)
        return None

    def _offer(self, slot: Slot, *, is_sound: bool = False) -> None:
        """Hand a slot that has become free to the first waiter, or leave it idle, or end its connection.

        Args:
            slot: The slot.
            is_sound: Whether the end of its loan has just found that the connection can be lent. There are as many
                connections as before then, so that the supply needs no balance.
        """
        if not (is_sound or slot.holder.is_connected()):
            slot.holder.terminate()  # asyncpg cleans up after some ends only then
            self._vacate(slot)
        elif not is_sound and self._has_to_end(slot):
            self._close(slot)
        elif self.waiters.hand_over(slot):
            self.slots.move(slot, RESERVED)
        else:
            self.slots.move(slot, IDLE)
            slot.idle_since = now = time.monotonic()
            max_idle = self.options.max_inactive_connection_lifetime or math.inf
            self._reaper.set(min(now + max_idle, slot.expires_at))
        if not is_sound:
            self.balance()

    def _has_to_end(self, slot: Slot) -> bool:
        """Return whether a connection must not be lent. A new one is used once.

        Otherwise a lifetime below the time of a dial would dial for ever.
        """
        return self.is_worn(slot, time.monotonic()) and (slot.used or self.is_expired(slot) or self.closing)

    def give_back(self, slot: Slot) -> None:
        """Offer a reserved slot again, because its waiter cannot use it."""
        if holder.is_current(self.loop):
            self._offer(slot)
        else:  # the coroutine was closed where the event loop does not run
            self._call_in_loop(functools.partial(self._offer, slot))

    def _call_in_loop(self, call: Callable[[], object]) -> None:
        """Have the event loop of the pool make a call, as soon as it runs. Before the pool is opened none is needed."""
        if self.loop is not None:
            holder.call_in(self.loop, call)

    def _vacate(self, slot: Slot) -> None:
        """Note that a slot has no connection any more, or got none."""
        self.slots.move(slot, VACANT)
        if self.closing and len(self.slots.vacant) == len(self.slots):
            self.emptied.set()

    def _connection_closed(self, slot: Slot) -> None:
        """React to the end of a connection, on either side. Work in the background notices it by itself."""
        connection, now = slot.holder.connection, time.monotonic()
        if holder.was_lost(connection):
            if slot.loan is not None:
                self._suspect(slot.loan.lent_at)
            if not slot.proven and _is_in_first_statement(slot, connection):
                self._note_vain_end(slot, now)
        slot.holder.mark_closed()
        self.size -= 1
        self.tallies.terminations.since(slot.opened_at)
        if self.size == 0:
            self.health.emptied()
        if self.size == 0 and not self.closing:
            self.log.info("no connection is open", event="emptied")
        if slot.loan is not None:
            slot.loan.end()
        elif slot.state is IDLE:
            self._vacate(slot)
            self.balance()

    # -----------------------------------------------------------------------------------------------------------------
    # Work in the background

    def _start(
        self, slot: Slot, state: State, work: Coroutine[Any, Any, Exception | None], limit: float = math.inf
    ) -> asyncio.Task[Any]:
        """Run `work` on the slot in the background. Afterwards the slot is offered.

        Args:
            slot: The slot; no other work is under way on it.
            state: The state of the slot meanwhile.
            work: Returns the error for which the connection must not be used again, or None.
            limit: Seconds after which the work is cancelled. All these limits share one timer, because nearly all are
                met, and `asyncio.timeout()` takes longer than the rest of a reset.
        """
        self.slots.move(slot, state)
        slot.work_began = now = time.monotonic()
        slot.work_until = now + limit
        self._late_work.set(now + _PATIENCE if state in UNANSWERED else slot.work_until)
        # Not by create_task(): an eager task (Python 3.12) would run before it is known here.
        slot.task = task = asyncio.Task(work, loop=asyncio.get_running_loop(), context=self._context.copy())
        self._tasks.add(task)  # the event loop itself keeps weak references only
        task.add_done_callback(functools.partial(self._finished, slot))
        return task

    def _attend_to_late_work(self) -> None:
        """Cancel work whose time is over, and do not count on connections that have not answered for a while."""
        now, silence = time.monotonic(), False
        for slot in self.slots:
            if slot.task is None:
                continue
            if slot.work_until <= now:
                slot.task.cancel()
                continue
            due = slot.work_until
            if slot.state in UNANSWERED:
                if slot.work_began + _PATIENCE <= now:
                    self.slots.move(slot, UNANSWERED[slot.state])
                    self._suspect(slot.work_began)
                    silence = True
                else:
                    due = min(due, slot.work_began + _PATIENCE)
            self._late_work.set(due)
        if silence:
            self.balance()

    def _finished(self, slot: Slot, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        slot.task = slot.dialed_for = None
        # A task that was cancelled before it began has run none of its coroutine. The caller's own code can raise
        # anything in one, and the slot must come back.
        if task.cancelled() or task.exception() is not None or task.result() is not None:
            slot.holder.terminate()
        self._offer(slot)

    def _reset_answered(self, slot: Slot, succeeded: bool) -> None:
        """Note the answer to a reset that was sent ahead."""
        if succeeded:
            slot.heard_at = now = time.monotonic()
            self.tallies.resets.add(now - slot.reset_began)
        else:
            self.tallies.reset_failures.since(slot.reset_began)

    async def _reset(self, slot: Slot, limit: float) -> Exception | None:
        """Reset what a caller has left, and return the error that `release()` raises, if there is one."""
        began, connection = time.monotonic(), slot.holder.connection
        if connection is None:
            return None  # it ended before this task began
        try:
            await self._reset_session(connection)
        except asyncio.CancelledError:
            if time.monotonic() < slot.work_until:
                raise  # the pool was terminated
            self.tallies.reset_failures.since(began)
            self.log.befell(Mishap.RESET_LATE, TimeoutError)
            return PoolTimeoutError(
                f"A connection of {self.name} was not reset within {limit:g} s and was terminated; its slot is free. "
                "The server or the network may be stuck."
            )
        except Exception as error:  # noqa: BLE001  raised by `release()`
            self.tallies.reset_failures.since(began)
            if not holder.was_lost(connection):  # else its end is no fault of the reset
                self.log.befell(Mishap.RESET_FAILED, error)
            return error
        if (protocol := holder.protocol_of(connection)) is not None and not connection.is_closed():
            protocol.note_reset()
        self.tallies.resets.since(began)
        slot.heard_at = time.monotonic()
        if not slot.proven:
            self.note_work(slot)
        return None

    async def _reset_session(self, connection: Any) -> None:
        if own_session(connection).calls:
            await holder.end_calls(connection)
        if holder.is_cancelling(connection):
            await holder.end_cancellation(connection)
            if connection.is_closed():
                return
        if self.options.reset is None and resets_itself(connection):
            await connection.reset()
            await restore_codecs(connection)
            return
        if holder.has_transaction(connection):
            await holder.roll_back(connection)
        if self.options.reset is not None:
            await self.options.reset(connection)
        elif query := connection.get_reset_query():
            await holder.send(connection, query)
        session = own_session(connection)
        if session.codecs != session.snapshot.codecs:
            await restore_codecs(connection)  # looks types up, which a search_path or a timeout could disturb

    def _close(self, slot: Slot, limit: float | None = None) -> asyncio.Task[Any]:
        """Close the connection of a slot that no caller has, within `limit` seconds (default: `release_timeout`)."""
        limit = min(self.options.release_timeout if limit is None else limit, _CLOSE_TIMEOUT)
        return self._start(slot, CLOSING, self._close_connection(slot.holder.connection), limit)

    async def _close_connection(self, connection: Any) -> Exception | None:
        if connection is None:
            return None  # it ended before this task began
        try:
            await connection.close()
        except Exception as error:  # noqa: BLE001  it ends, one way or the other
            self.log.befell(Mishap.CLOSE_FAILED, error)
            return error
        return None

    async def _check(self, slot: Slot) -> Exception | None:
        """Ping a connection that was silent for long. If there is no answer, end all that were silent for as long."""
        connection = slot.holder.connection
        if connection is None:
            return None  # it ended before this task began
        deadline = asyncio.timeout(max(_PING_TIMEOUT, own_session(connection).cancel_time))
        try:
            async with deadline:
                await holder.send(connection, "SELECT 1")
        except Exception as error:  # noqa: BLE001  whatever it was, the connection is of no use
            self.log.befell(Mishap.SILENT, error)
            if deadline.expired():
                self._terminate_silent_since(slot.heard_at)
            else:
                self._suspect(slot.work_began)
            return error
        slot.heard_at = time.monotonic()
        return None

    def _terminate_silent_since(self, moment: float) -> None:
        silent = [slot for slot in self.slots.idle if slot.heard_at <= moment]
        for slot in silent:  # all of them first, so that none is checked when another one ends
            self._vacate(slot)
        for slot in silent:
            slot.holder.terminate()

    # -----------------------------------------------------------------------------------------------------------------
    # Dials

    def balance(self) -> None:
        """Start what the waiters and `min_size` need: hand-overs, checks of idle connections, dials at their pace."""
        slots, waiters = self.slots, self.waiters
        if self.closing or not (slots.idle or slots.vacant):
            return
        if not waiters and slots.connected >= self.options.min_size:
            return
        if not holder.is_current(self.loop):  # a connection was terminated where the event loop does not run
            self._call_in_loop(self.balance)
            return
        now = time.monotonic()
        while waiters and (slot := self.take_idle(now)) and waiters.hand_over(slot):
            slots.move(slot, RESERVED)
        # While a ping has no answer, the other idle connections will hardly do better.
        while slots.idle and len(waiters) > slots.count(CHECKING) and not slots.count(SILENT):
            self._start(slots.idle[-1], CHECKING, self._check(slots.idle[-1]))
        connecting, checking = slots.count(CONNECTING), slots.count(CHECKING)
        refusal = self.pace.refusal(now)
        if refusal is not None:
            waiters.fail(len(waiters) - connecting - checking, functools.partial(_twin, refusal))
        if not slots.vacant:
            return
        wanted = len(waiters) - checking - connecting
        if wanted > 0:
            self._dial_for_waiters(wanted, now)
        elif not connecting and slots.connected < self.options.min_size:
            self._dial_for_floor(now)

    def _dial_for_waiters(self, wanted: int, now: float) -> None:
        if self._has_to_pause(self.pace.pause(now), now):
            return
        allowed = self.pace.allowed(self.slots.connected) - self.slots.count(CONNECTING)
        for _ in range(min(wanted, len(self.slots.vacant), allowed)):
            self._start_dial()

    def _dial_for_floor(self, now: float) -> None:
        if not self._has_to_pause(self.pace.floor_pause(now), now):
            self.pace.floor_dialed(now)
            self._start_dial()

    def _has_to_pause(self, pause: float, now: float) -> bool:
        """Return whether no dial may start yet. Then the supply is balanced again after the pause."""
        if pause:
            self._resumption.cancel()  # an earlier pause may have been longer
            self._resumption.set(now + pause)
        return pause > 0

    def _start_dial(self) -> None:
        """Dial for the first waiter for which no dial is under way, or for none."""
        slot = self.slots.vacant[-1]
        served = {other.dialed_for for other in self.slots} if self.slots.count(CONNECTING) else ()
        slot.dialed_for = next((waiter for waiter in self.waiters if waiter not in served), None)
        self._start(slot, CONNECTING, self._dial(slot))

    async def _dial(self, slot: Slot) -> Exception | None:
        """Make a connection for a vacant slot."""
        began = time.monotonic()
        if self.slots.connected == 0 and self._cold_since is None:
            self._cold_since = began
        generation = self._generation
        steps = Steps(began)
        try:
            connection = await open_connection(self.connector, self.options, steps)
        except BaseException as error:
            self.tallies.dial_failures.since(began)
            failure = failure_of(error)
            cause = failure.error if isinstance(failure, CallersError) else failure
            self.report("ConnectFailed", self.name, time.monotonic() - began, tuple(steps.taken), cause)
            if failure is None:
                # The event loop ends, or the caller's code cancels the task that it runs in, and that again and again.
                self.pace.stopped_by_caller(began=began, connects=max(steps.connects, 1), told=False)
                raise
            failure.with_traceback(None)  # its frames would live as long as the pool remembers the failure
        else:
            slot.generation = generation
            self.report("Connected", self.name, time.monotonic() - began, tuple(steps.taken))
            self._adopt(slot, connection, began, steps.connects)
            return None
        finally:
            self.tallies.dials.since(began)
        if isinstance(failure, CallersError):
            self._note_callers_failure(slot, failure.error, began, steps.connects)
            return failure.error
        self._note_failure(failure, began, steps.connects)
        return failure

    def _adopt(self, slot: Slot, connection: Any, began: float, connects: int) -> None:
        """Give a new connection to a slot."""
        now = time.monotonic()
        slot.holder.adopt(connection)
        slot.holder.protocol.on_reset = functools.partial(self._reset_answered, slot)
        self.own_reset = self.options.reset is not None or resets_itself(connection)
        self.own_reset_query = has_own_reset_query(connection)
        self.size += 1
        self.health.connected()
        slot.used = slot.proven = False
        slot.queries_before = holder.queries_run(connection)
        slot.opened_at = slot.heard_at = now
        max_lifetime = self.options.max_lifetime or math.inf
        slot.expires_at = now + max_lifetime * (1 - _LIFETIME_JITTER * random.random())  # noqa: S311
        own_session(connection).on_closed = functools.partial(self._connection_closed, slot)
        self.log.connected(now - (self._cold_since or began), woke=self._cold_since is not None)
        self.pace.connected(began=began, connects=connects)
        if self._cold_since is not None:
            self.tallies.wakes.since(self._cold_since)
            self._cold_since = None

    def _note_failure(self, error: Exception, began: float, connects: int) -> None:
        self.log.failed(Cause.RETRYING if may_pass(error) else Cause.REFUSED, error, began=began)
        self.pace.failed(error, began=began, now=time.monotonic(), connects=connects)
        self.health.failed(error)
        self._forget_wake()

    def _note_callers_failure(self, slot: Slot, error: Exception, began: float, connects: int) -> None:
        """Raise what the caller's own code raised in the waiter for which it ran, and in no other."""
        told = slot.dialed_for is not None and self.waiters.fail_one(slot.dialed_for, error.with_traceback(None))
        self.log.failed(Cause.CALLERS_CODE, error, began=began)
        self.pace.stopped_by_caller(began=began, connects=connects, told=told)
        self.health.failed(error)
        self._forget_wake()

    def _note_vain_end(self, slot: Slot, now: float) -> None:
        """Count a session that has ended unused, or in its first statement, as a failed connect."""
        error = ConnectError(
            f"{self.name} closed a new connection before it had answered a statement. Try again; check the timeouts "
            "and the log of the server."
        )
        self.pace.ended_in_vain(error, opened_at=slot.opened_at, now=now)
        if self.pace.in_vain > 1:  # a single one may have been idle when the compute was suspended
            self.health.failed(error)
            self.log.failed(Cause.IN_VAIN, error, began=slot.opened_at)

    def _forget_wake(self) -> None:
        if not self.waiters:
            self._cold_since = None  # no caller waits for this wake any more

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def start_closing(self, make_error: Callable[[], Exception]) -> None:
        """Refuse waiters, make no more connections, close those that are free or released. Then `emptied` is set."""
        self.closing = True
        self.waiters.close(make_error)
        self._reaper.cancel()
        self._resumption.cancel()
        for slot in self.slots:
            if slot.task is not None and slot.state in (CONNECTING, CHECKING, SILENT):
                slot.task.cancel()
        for slot in list(self.slots.idle):
            self._close(slot)
        if len(self.slots.vacant) == len(self.slots):
            self.emptied.set()

    def terminate(self, make_error: Callable[[], Exception]) -> None:
        """End every connection at once, also those in use. The event loop may have stopped, but not be closed."""
        self.closing = True
        self.waiters.close(make_error)
        self._reaper.cancel()
        self._resumption.cancel()
        for task in self._tasks:
            task.cancel()
        self._late_work.cancel()
        for slot in self.slots:
            slot.holder.terminate()  # which ends its loan, or vacates an idle slot

    def abandon(self) -> None:
        """End every connection where the event loop is closed: none of its tasks, waiters and timers runs again."""
        self.closing = True
        # What belonged to that loop would schedule callbacks in it, which raises.
        self.waiters = WaitQueue(give_back=self.give_back)
        self.emptied = asyncio.Event()
        self._tasks.clear()
        for slot in self.slots:
            slot.holder.terminate()  # which ends its loan, or vacates an idle slot
            if slot.state is not VACANT:
                self._vacate(slot)

    def shut_down(self) -> None:
        """Have the server learn of the end of every connection, from any thread. `terminate()` must follow."""
        for slot in self.slots:
            slot.holder.shut_down()

    def leave_to_parent(self) -> None:
        """Let go of every connection in a forked process, without a byte to the server."""
        for slot in self.slots:
            slot.holder.leave_to_parent()

    async def wait_for_tasks(self) -> None:
        """Wait until the tasks that were cancelled have ended, for a moment at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CANCEL_GRACE)


def _is_in_first_statement(slot: Slot, connection: Any) -> bool:
    """Return whether a connection that was lost had answered no statement of a caller."""
    queries = holder.queries_run(connection) - slot.queries_before
    return queries == 0 or (queries == 1 and holder.is_running(connection))


def _twin(error: Exception) -> Exception:
    """Return a copy of `error` for one more waiter: each raises an object, and so a traceback, of its own."""
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001  the caller's own exception, which cannot be copied
        twin = error
    if type(twin) is not type(error):
        twin = error
    twin.__cause__ = error.__cause__
    return twin.with_traceback(None)
