"""The slots of a pool: the states of a slot as one table, and which slot stands in which state.

    VACANT ───dial──▶ CONNECTING ─┐
    IDLE ─────ping──▶ CHECKING ───┤             ┌─ a caller waits ──▶ RESERVED ──▶ IN_USE
    IN_USE ───reset─▶ RESETTING ──┼── offered ──┤
    IN_USE, clean ────────────────┤             └─ no caller waits ─▶ IDLE ──────▶ IN_USE
    RESERVED, its caller gave up ─┘

    every state with a connection ──close──▶ CLOSING
    every state but VACANT ──the connection has ended, or was never made──▶ VACANT

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


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.VACANT: frozenset({State.CONNECTING}),
    State.CONNECTING: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING}),
    State.IDLE: frozenset({State.VACANT, State.CHECKING, State.RESERVED, State.IN_USE, State.CLOSING}),
    State.CHECKING: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING}),
    State.RESERVED: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.IN_USE, State.CLOSING}),
    State.IN_USE: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.RESETTING, State.CLOSING}),
    State.RESETTING: frozenset({State.VACANT, State.IDLE, State.RESERVED, State.CLOSING}),
    State.CLOSING: frozenset({State.VACANT}),
}
_ALLOWED = [TRANSITIONS[state] for state in State]


class Slot:
    """One place for a connection, and what is known of the connection in it. Times are of the monotonic clock."""

    __slots__ = (
        "expires_at",
        "generation",
        "heard_at",
        "holder",
        "idle_since",
        "loan",
        "opened_at",
        "state",
        "task",
        "used",
        "work_until",
    )

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.state = State.VACANT
        self.loan: Loan | None = None
        self.task: asyncio.Task[object] | None = None  # what is being done to the connection in the background
        self.work_until = 0.0  # when that is cancelled
        self.generation = 0  # of the pool's `expire_connections()`, when the connection was made
        self.opened_at = 0.0
        self.expires_at = 0.0
        self.heard_at = 0.0  # the latest sign of life from the server
        self.idle_since = 0.0
        self.used = False  # whether the connection was lent since it was made

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
        """How many slots have a connection; one that ended a moment ago may be among them."""
        return len(self._all) - self._counts[State.VACANT] - self._counts[State.CONNECTING]

    def move(self, slot: Slot, state: State) -> None:
        """Put `slot` into `state`.

        Raises:
            RuntimeError: The table of transitions does not allow it: a fault of the pool.
        """
        if state not in _ALLOWED[slot.state]:
            raise RuntimeError(f"a slot cannot go from {slot.state.name} to {state.name}")
        if slot.state is State.IDLE:
            _take(self.idle, slot)
        elif slot.state is State.VACANT:
            _take(self.vacant, slot)
        if state is State.IDLE:
            self.idle.append(slot)
        elif state is State.VACANT:
            self.vacant.append(slot)
        self._counts[slot.state] -= 1
        self._counts[state] += 1
        slot.state = state


def _take(stack: list[Slot], slot: Slot) -> None:
    if stack[-1] is slot:
        stack.pop()
    else:
        stack.remove(slot)
