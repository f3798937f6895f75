"""One borrow of one connection: lend it, decide what it needs at the end, and give it back on one path.

Knows nothing of waiters and of dials.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from .._text import log
from .slots import IN_USE, Slot

if TYPE_CHECKING:
    from .supply import Supply


class Facts(NamedTuple):
    """What is known of a connection at the end of its loan.

    Attributes:
        closed: It has ended.
        worn: It is not to be lent again: too old, too many queries, without statements that `init` had prepared in SQL,
            with a server connection of PgBouncer that it pins, expired, or the pool is closing.
        own_reset: The reset is the caller's own code, which may do anything.
        untouched: Nothing was written to the server, and no type codec changed.
        leftovers: A call is under way, a statement is running or being cancelled, a transaction is open, or channels or
            type codecs were changed.
        has_reset_query: There is SQL to send.
        ahead: That SQL may be sent ahead of the next statement.
    """

    closed: bool
    worn: bool
    own_reset: bool
    untouched: bool
    leftovers: bool
    has_reset_query: bool
    ahead: bool


# There are few, and making one takes longer than deciding what follows.
_known = functools.cache(Facts)
_ENDED = _known(True, False, False, False, False, False, False)


class Need(enum.Enum):
    """What a connection needs at the end of its loan."""

    NOTHING = "nothing"
    RESET_AHEAD = "a reset sent ahead of the next statement"
    RESET = "a reset in the background"
    CLOSE = "to be closed"
    FORGET = "to be forgotten, because it has ended"


NOTHING, RESET_AHEAD, RESET, CLOSE, FORGET = Need  # as the constants of `slots`


def need_of(facts: Facts) -> Need:
    """Return what a connection needs before it can be lent again."""
    if facts.closed:
        return FORGET
    if facts.worn:
        return CLOSE
    if facts.own_reset or facts.leftovers:
        return RESET
    if facts.untouched or not facts.has_reset_query:
        return NOTHING
    return RESET_AHEAD if facts.ahead else RESET


class Loan:
    """One borrow of the connection of one slot, from `lend` to `end()`.

    Args:
        supply: What the slot goes back to.
        slot: A slot with a connection that is reserved for the caller, or idle.
        called_at: When the caller asked for it; a time of the monotonic clock.
    """

    __slots__ = ("_leak_timer", "_supply", "_writes", "called_at", "lent_at", "owner", "slot")

    def __init__(self, supply: Supply, slot: Slot, called_at: float) -> None:
        self.slot = slot
        self._supply = supply
        slot.holder.is_lent = True
        self.owner: asyncio.Task[Any] | None = None  # set where a task has the connection
        self.called_at = called_at
        self.lent_at = time.monotonic()
        self._writes = slot.holder.transport.writes
        self._leak_timer: asyncio.TimerHandle | None = None
        supply.slots.move(slot, IN_USE)
        slot.loan = self
        slot.used = True
        if supply.options.leak_after is not None:
            self._watch(supply.options.leak_after)

    def __repr__(self) -> str:
        return f"<Loan of {self.slot!r}>"

    def report(self) -> None:
        """Count the acquire. This calls `on_event`, which may do anything: what the caller gets is taken before."""
        self._supply.tallies.acquires.add(self.lent_at - self.called_at)

    def end(self, timeout: float | None = None) -> asyncio.Task[Any] | None:
        """End the loan. All ways back come through here: release, the end of the block, and a connection that ended.

        Args:
            timeout: Seconds for a reset or a close. Default: `release_timeout`.

        Returns:
            The task that resets or closes the connection in the background, where there is something to do. Its result
            is the error that ended the connection, or None.
        """
        slot, supply, now = self.slot, self._supply, time.monotonic()
        slot.loan = None
        if self._leak_timer is not None:
            self._leak_timer.cancel()
        supply.tallies.releases.add(now - self.lent_at)  # which calls `on_event`: the facts are what it leaves
        facts = self._facts(now)
        answered = not (facts.closed or facts.untouched or facts.leftovers)
        try:
            if facts.closed:
                slot.holder.dismiss()
            else:
                slot.holder.take_back()  # warns of listeners, and a warning can be an exception
        finally:
            if facts.leftovers:
                supply.suspect_silence(slot, since=self.lent_at)
            elif answered:
                slot.heard_at = now
            task = supply.take_back(slot, need_of(facts), timeout)
            if answered and not slot.proven:
                supply.note_work(slot)
        return task

    def _facts(self, now: float) -> Facts:
        owned, supply = self.slot.holder, self._supply
        if not owned.is_connected():
            return _ENDED
        session = owned.session
        # asyncpg knows the built-in types, and asks the server nothing to set a codec of one.
        codecs_kept = session.codecs == session.snapshot.codecs
        worn = supply.is_worn(self.slot, now)
        if codecs_kept and self._writes == owned.transport.writes:  # there is nothing else to ask for
            return _known(False, worn, supply.own_reset, True, session.calls > 0, False, False)
        worn = (
            worn
            or owned.protocol.queries_count >= supply.options.max_queries
            or (bool(session.snapshot.statements) and owned.protocol.has_deallocated)
            or session.pins_server
        )
        leftovers = not codecs_kept or owned.has_leftovers()
        own_query = supply.own_reset_query
        has_reset_query = not own_query or _has_reset_query(owned.connection)
        return _known(False, worn, supply.own_reset, False, leftovers, has_reset_query, not own_query)

    def _watch(self, leak_after: float) -> None:
        """Log the stack that acquired the connection if it is not released within `leak_after` seconds."""
        stack = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
        self._leak_timer = asyncio.get_running_loop().call_later(leak_after, self._report_leak, leak_after, stack)

    def _report_leak(self, leak_after: float, stack: traceback.StackSummary) -> None:
        stack.reverse()  # as in a traceback: the latest call comes last
        log(
            logging.WARNING,
            "%(endpoint)s: a connection has not been released for %(limit)g s. It was acquired at:\n%(acquired_at)s",
            endpoint=self._supply.name,
            event="leak",
            limit=leak_after,
            acquired_at="".join(stack.format()),
        )


def _has_reset_query(connection: Any) -> bool:
    try:
        return bool(connection.get_reset_query())
    except Exception:  # noqa: BLE001  the caller's own; the reset raises it again, and ends the connection
        return True
