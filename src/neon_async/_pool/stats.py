"""The statistics of a pool: the tallies it keeps, the snapshot that `Pool.stats()` returns, and who is told of them.

Knows names and numbers only.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import events
from .events import PoolEvent

_log = logging.getLogger("neon_async")

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

# What is reported for each that is counted. Dials have events of their own, and heals are counted by the connections.
_EVENT_OF: dict[str, Callable[[str, float], PoolEvent]] = {
    "acquires": events.Acquired,
    "releases": events.Released,
    "waits": events.Waited,
    "timeouts": events.TimedOut,
    "wakes": events.Woke,
    "resets": events.Reset,
    "reset_failures": events.ResetFailed,
    "terminations": events.ConnectionClosed,
    "retries": events.Retried,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A pool at one moment: its slots, and what has happened since it was created, each as a count and total seconds.

    Every slot is in one state: `in_use + idle + checking + resetting + connecting + vacant == max_size`. Every dial
    that has ended failed or made a connection, which is open or has ended:
    `dials == dial_failures + terminations + size`. Every connection that was lent is in use or was released:
    `acquires == releases + in_use`.
    """

    max_size: int
    min_size: int
    size: int
    """Open connections."""
    in_use: int
    """Connections that callers hold."""
    idle: int
    checking: int
    """Idle connections that are being pinged before a caller gets them."""
    resetting: int
    """Connections that are being reset or closed in the background."""
    connecting: int
    """Dials under way."""
    vacant: int
    """Slots without a connection."""
    waiting: int
    """Callers that wait for a connection."""

    acquires: int
    """Connections that were lent."""
    acquire_seconds: float
    """From the call to the connection."""
    releases: int
    """Connections that were released, or ended while they were in use."""
    release_seconds: float
    """For how long they were in use."""
    waits: int
    """Callers that had to wait."""
    wait_seconds: float
    timeouts: int
    """Callers whose deadline passed while they waited, or while `setup` ran."""
    timeout_seconds: float
    dials: int
    """Attempts to connect that have ended."""
    dial_seconds: float
    dial_failures: int
    dial_failure_seconds: float
    wakes: int
    """Connections that were made when there was none."""
    wake_seconds: float
    """From the first attempt to that connection."""
    resets: int
    """Resets that succeeded."""
    reset_seconds: float
    reset_failures: int
    """Resets that failed or took too long; each ended its connection."""
    reset_failure_seconds: float
    terminations: int
    """Connections that ended, closed by either side for whatever reason."""
    termination_seconds: float
    """For how long they were open."""
    heals: int
    """How often a prepared statement was prepared again because it had become stale."""
    heal_seconds: float
    retries: int
    """Further attempts of `run_transaction()`."""
    retry_seconds: float
    """The time of the attempts that failed, and of the pause after each."""


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


def report(on_event: Callable[[PoolEvent], object], event: PoolEvent) -> None:
    """Call `on_event`. What it raises is logged and reaches neither a caller nor the pool."""
    try:
        on_event(event)
    except Exception:  # noqa: BLE001  the caller's own code
        _note_failure(type(event).__name__)


def _note_failure(name: str) -> None:
    _log.exception("on_event failed for %s", name)


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
            event = _EVENT_OF.get(name)
            if on_event is None or event is None:
                setattr(self, name, Tally())
            else:
                setattr(self, name, ReportingTally(event, on_event, pool_name))

    def snapshot(self) -> dict[str, Any]:
        """Return counts and seconds by the names of `PoolStats`' fields."""
        found: dict[str, Any] = {}
        for name, seconds in SECONDS_OF.items():
            tally: Tally = getattr(self, name)
            found[name], found[seconds] = tally.count, tally.seconds
        return found
