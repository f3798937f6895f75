"""The snapshot that `Pool.stats()` returns, imported when it is needed: the class takes a millisecond to define."""

# No `from __future__ import annotations`: see `_publish()` of the facade.

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A pool at one moment: its slots, and what has happened since it was created, each as a count and total seconds.

    Every slot is in one state: `in_use + idle + checking + resetting + connecting + vacant == max_size`. Every dial
    that has ended failed or made a connection, which is open or has ended:
    `dials == dial_failures + terminations + size`. Every connection that was lent is in use or was released:
    `acquires == releases + in_use`.
    """

    __module__ = "neon_async"

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
