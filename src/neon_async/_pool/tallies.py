"""The tallies that a pool keeps, and their events. `Pool.stats()` shows them as a `PoolStats`.

Knows names and numbers only. Without `on_event` it does without the events, which take a millisecond to import.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._text import log_exception

if TYPE_CHECKING:
    from .events import PoolEvent


SECONDS_OF = {  # the field with the seconds of each count of PoolStats
    "acquires": "acquire_seconds",
    "releases": "release_seconds",
    "waits": "wait_seconds",
    "timeouts": "timeout_seconds",
    "dials": "dial_seconds",
    "dial_failures": "dial_failure_seconds",
    "wakes": "wake_seconds",
    "resets": "reset_seconds",
    "reset_failures": "reset_failure_seconds",
    "terminations": "termination_seconds",
    "heals": "heal_seconds",
    "retries": "retry_seconds",
}

# The event that reports each that is counted. Dials have events of their own, and heals are counted by the connections.
_EVENT_OF: dict[str, str] = {
    "acquires": "Acquired",
    "releases": "Released",
    "waits": "Waited",
    "timeouts": "TimedOut",
    "wakes": "Woke",
    "resets": "Reset",
    "reset_failures": "ResetFailed",
    "terminations": "ConnectionClosed",
    "retries": "Retried",
}


class Tally:
    """How often something has happened, and the total seconds."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"<Tally: {self.count} in {self.seconds:.3f} s>"

    def add(self, seconds: float) -> None:
        """Count one more that took `seconds`."""
        self.count += 1
        self.seconds += seconds

    def since(self, began: float) -> None:
        """Count one more that began at `began`, a time of the monotonic clock."""
        self.count += 1
        self.seconds += time.monotonic() - began


class ReportingTally(Tally):
    """A tally that reports each time."""

    __slots__ = ("_event", "_on_event", "_pool_name")

    def __init__(
        self, event: Callable[[str, float], PoolEvent], on_event: Callable[[PoolEvent], object], pool_name: str
    ) -> None:
        super().__init__()
        self._event = event
        self._on_event = on_event
        self._pool_name = pool_name

    def add(self, seconds: float) -> None:
        """Count one more that took `seconds`, and report it."""
        self.count += 1
        self.seconds += seconds
        try:  # not by report(): two of them belong to every acquire
            self._on_event(self._event(self._pool_name, seconds))
        except Exception:  # noqa: BLE001  the caller's own code
            _note_failure(self._event.__name__)

    def since(self, began: float) -> None:
        """Count one more that began at `began`, a time of the monotonic clock, and report it."""
        self.add(time.monotonic() - began)


def report(on_event: Callable[[PoolEvent], object], event: str, *facts: Any) -> None:
    """Call `on_event` with an event, by the name of its class and its fields.

    What `on_event` raises is logged, and reaches neither a caller nor the pool.
    """
    from . import events

    made: PoolEvent = getattr(events, event)(*facts)
    try:
        on_event(made)
    except Exception:  # noqa: BLE001  the caller's own code
        _note_failure(event)


def _note_failure(name: str) -> None:
    log_exception("on_event failed for %(failed)s", event="on_event_failed", failed=name)


class Tallies:
    """The tallies of one pool, by the names of their counts in `PoolStats`.

    Args:
        on_event: What is called with each event, if anything is.
        pool_name: The name of the pool in the events.
    """

    __slots__ = tuple(SECONDS_OF)

    acquires: Tally
    releases: Tally
    waits: Tally
    timeouts: Tally
    dials: Tally
    dial_failures: Tally
    wakes: Tally
    resets: Tally
    reset_failures: Tally
    terminations: Tally
    heals: Tally
    retries: Tally

    def __init__(self, on_event: Callable[[PoolEvent], object] | None = None, pool_name: str = "") -> None:
        for name in SECONDS_OF:
            setattr(self, name, Tally())
        if on_event is not None:
            from . import events

            for name, event in _EVENT_OF.items():
                setattr(self, name, ReportingTally(getattr(events, event), on_event, pool_name))

    def snapshot(self) -> dict[str, Any]:
        """Return counts and seconds by the names of `PoolStats`' fields."""
        found: dict[str, Any] = {}
        for name, seconds in SECONDS_OF.items():
            tally: Tally = getattr(self, name)
            found[name], found[seconds] = tally.count, tally.seconds
        return found
