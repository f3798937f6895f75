"""What a pool has done so far, counted: the tallies it keeps, and the snapshot it hands out.

It knows names and numbers only.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import time
from dataclasses import dataclass
from typing import Any

SECONDS_OF = {  # of each count of PoolStats, the field that holds its seconds
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
    """A pool at one moment: its slots, and what has happened since it was opened, each as a count and total seconds.

    Every slot is in one place: `in_use + idle + checking + resetting + connecting + vacant == max_size`. Every dial
    that ended failed or made a connection, which is open or has ended: `dials == dial_failures + terminations + size`.
    Every connection handed out is in use or came back: `acquires == releases + in_use`.
    """

    max_size: int
    min_size: int
    size: int
    """Open connections."""
    in_use: int
    """Connections that callers hold."""
    idle: int
    checking: int
    """Idle connections being pinged before somebody gets them."""
    resetting: int
    """Connections that came back and are being reset or closed."""
    connecting: int
    """Dials under way."""
    vacant: int
    """Slots without a connection."""
    waiting: int
    """Callers in line."""

    acquires: int
    """Connections handed out."""
    acquire_seconds: float
    """From the call to the connection."""
    releases: int
    """Connections that came back, or ended in the hands of their caller."""
    release_seconds: float
    """For how long they had been out."""
    waits: int
    """Callers who joined the line."""
    wait_seconds: float
    timeouts: int
    """Callers whose deadline passed in line, or while `setup` ran."""
    timeout_seconds: float
    dials: int
    """Attempts to connect that have ended."""
    dial_seconds: float
    dial_failures: int
    dial_failure_seconds: float
    wakes: int
    """First connections after there was none."""
    wake_seconds: float
    """From the first attempt to that connection."""
    resets: int
    """Resets that ran to their end."""
    reset_seconds: float
    terminations: int
    """Connections that ended, for whatever reason, on either side."""
    termination_seconds: float
    """For how long they had been open."""
    heals: int
    """Times that a pooled host's prepared statements were renewed after "cached plan must not change result type"."""
    heal_seconds: float
    retries: int
    """Further attempts of `run_transaction()`."""
    retry_seconds: float
    """Of the attempts that came to nothing, with the pause after each."""


class Tally:
    """How often something has happened, and for how many seconds in all."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"<Tally: {self.count} in {self.seconds:.3f} s>"

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.seconds += seconds

    def since(self, began: float) -> None:
        """Count one more, which began at this time of the monotonic clock."""
        self.count += 1
        self.seconds += time.monotonic() - began


class Tallies:
    """The tallies of one pool, by the names that `PoolStats` gives their counts."""

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
