"""The slots of a pool: the states of a slot as one table, and which slot stands in which state.

    VACANT ───dial──▶ CONNECTING ─┐
    IDLE ─────ping──▶ CHECKING ───┤             ┌─ a caller waits ──▶ RESERVED ──▶ IN_USE
    IN_USE ───reset─▶ RESETTING ──┼── offered ──┤
    IN_USE, clean ────────────────┤             └─ no caller waits ─▶ IDLE ──────▶ IN_USE
    IDLE, a caller waits ─────────┤
    RESERVED, its caller gave up ─┘

    every state with a connection ──close──▶ CLOSING
    every state but VACANT ──the connection has ended, or was never made──▶ VACANT

    CHECKING ───────────no answer for a while──▶ SILENT, which is left in the same ways as CHECKING
    RESETTING, CLOSING ─no answer for a while──▶ STUCK, which is left in the same ways as these

Knows nothing of asyncpg, of waiters or of time: a slot owns a holder and never looks into it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._driver.holder import Holder
    from .loan import Loan


class State(enum.IntEnum):
    """What a slot is doing. It is in one state at a time."""

    VACANT = 0
    """It has no connection."""
    CONNECTING = 1
    """A dial is under way."""
    IDLE = 2
    """Its connection can be lent."""
    CHECKING = 3
    """Its connection was idle for long and is being pinged."""
    RESERVED = 4
    """Its connection was handed to a waiter that has not run since."""
    IN_USE = 5
    """A caller has its connection."""
    RESETTING = 6
    """Its connection was released and is being reset."""
    CLOSING = 7
    """Its connection is being closed."""
    SILENT = 8
    """Its connection has not answered a ping for a while. It is not expected to work."""
    STUCK = 9
    """Its connection has not answered a reset or a close for a while. It is not expected to work."""


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.VACANT: frozenset({State.CONNECTING}),
    State.CONNECTING: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING}),
    State.IDLE: frozenset({State.VACANT, State.CHECKING, State.RESERVED, State.IN_USE, State.CLOSING}),
    State.CHECKING: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING, State.SILENT}),
    State.RESERVED: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.IN_USE, State.CLOSING}),
    State.IN_USE: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.RESETTING, State.CLOSING}),
    State.RESETTING: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING, State.STUCK}),
    State.CLOSING: frozenset({State.VACANT, State.STUCK}),
    State.SILENT: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING}),
    State.STUCK: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING}),
}
# What a slot becomes whose work in the background has had no answer for a while.
UNANSWERED: Mapping[State, State] = {
    State.CHECKING: State.SILENT,
    State.RESETTING: State.STUCK,
    State.CLOSING: State.STUCK,
}
# For what every acquire and release does: Python 3.11 takes longer to find `State.IDLE` than to compare with it.
VACANT, CONNECTING, IDLE, CHECKING, RESERVED, IN_USE, RESETTING, CLOSING, SILENT, STUCK = State
_ALLOWED = [TRANSITIONS[state] for state in State]


class Slot:
    """One place for a connection, and what is known of the connection in it. Times are of the monotonic clock."""

    __slots__ = (
        "dialed_for",
        "expires_at",
        "generation",
        "heard_at",
        "holder",
        "idle_since",
        "loan",
        "opened_at",
        "proven",
        "queries_before",
        "reset_began",
        "state",
        "task",
        "used",
        "work_began",
        "work_until",
    )

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.state = State.VACANT
        self.loan: Loan | None = None
        self.task: asyncio.Task[object] | None = None  # what is being done to the connection in the background
        self.work_began = 0.0
        self.work_until = 0.0  # when it is cancelled
        self.dialed_for: asyncio.Future[Slot] | None = None  # the waiter for which a dial is under way
        self.generation = 0  # of the pool's `expire_connections()`, when the connection was made
        self.opened_at = 0.0
        self.expires_at = 0.0
        self.heard_at = 0.0  # the latest sign of life from the server
        self.idle_since = 0.0
        self.reset_began = 0.0  # the latest one that was sent ahead
        self.used = False  # whether the connection was lent since it was made
        self.proven = False  # whether it has answered a statement of a caller
        self.queries_before = 0  # how many statements it had run before it was first lent

    def __repr__(self) -> str:
        return f"<Slot {self.state.name.lower()}>"


class Slots:
    """All slots of a pool by state. Idle and vacant slots are stacks: the last to join is used first.

    Args:
        slots: The slots, all of them vacant.
    """

    __slots__ = ("_all", "_counts", "idle", "vacant")

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._all = tuple(slots)
        self._counts = [0] * len(State)
        self._counts[State.VACANT] = len(self._all)
        self.vacant = list(slots)
        self.idle: list[Slot] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    def __repr__(self) -> str:
        return f"<Slots: {', '.join(f'{self._counts[state]} {state.name.lower()}' for state in State)}>"

    def count(self, state: State) -> int:
        """Return how many slots are in `state`."""
        return self._counts[state]

    @property
    def connected(self) -> int:
        """How many slots have a connection that is expected to work; one that ended a moment ago may be among them."""
        counts = self._counts  # written out, because every release asks
        unusable = counts[VACANT] + counts[CONNECTING] + counts[CLOSING] + counts[SILENT] + counts[STUCK]
        return len(self._all) - unusable

    def move(self, slot: Slot, state: State) -> None:
        """Put `slot` into `state`.

        Raises:
            RuntimeError: The table of transitions does not allow it: a fault of the pool.
        """
        left = slot.state
        if state not in _ALLOWED[left]:
            raise RuntimeError(f"a slot cannot go from {left.name} to {state.name}")
        if left is IDLE:
            _take(self.idle, slot)
        elif left is VACANT:
            _take(self.vacant, slot)
        if state is IDLE:
            self.idle.append(slot)
        elif state is VACANT:
            self.vacant.append(slot)
        self._counts[left] -= 1
        self._counts[state] += 1
        slot.state = state


def _take(stack: list[Slot], slot: Slot) -> None:
    if stack[-1] is slot:
        stack.pop()
    else:
        stack.remove(slot)
