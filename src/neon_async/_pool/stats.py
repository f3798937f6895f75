"""The statistics of a pool: the tallies it keeps, and the snapshot that `Pool.stats()` returns.

Knows names and numbers only.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import time
from dataclasses import dataclass
from typing import Any

SECONDS_OF = {  # the field with the seconds of each count of PoolStats
    "acquires": "acquire_seconds",
    "releases": "release_seconds",
    "waits": "wait_seconds",
    "timeouts": "timeout_seconds",
    "dials": "dial_seconds",
    "dial_failures": "dial_failure_seconds",
    "wakes": "wake_seconds",
    "resets": "reset_seconds",
    "terminations": "termination_seconds",
    "heals": "heal_seconds",
    "retries": "retry_seconds",
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


class Tallies:
    """The tallies of one pool, by the names of their counts in `PoolStats`."""

    __slots__ = tuple(SECONDS_OF)

    acquires: Tally
    releases: Tally
    waits: Tally
    timeouts: Tally
    dials: Tally
    dial_failures: Tally
    wakes: Tally
    resets: Tally
    terminations: Tally
    heals: Tally
    retries: Tally

    def __init__(self) -> None:
        for name in SECONDS_OF:
            setattr(self, name, Tally())

    def snapshot(self) -> dict[str, Any]:
        """Return counts and seconds by the names of `PoolStats`' fields."""
        found: dict[str, Any] = {}
        for name, seconds in SECONDS_OF.items():
            tally: Tally = getattr(self, name)
            found[name], found[seconds] = tally.count, tally.seconds
        return found
