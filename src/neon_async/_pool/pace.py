"""When the next connection may be dialed: the ramp, the pauses after failures, and the breaker.

Pure: time and random numbers are arguments, and nothing here waits. Knows how many connections there are, and none of
them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from .._errors import NeonAsyncError
from .._timing import backoff

# Pauses after failures that may pass: full jitter, as in "Exponential Backoff And Jitter" (AWS Architecture Blog,
# 2015). Neon advises 1 to 16 s for clients that start in step. A pool has one attempt under way at a time and may begin
# lower, because a wake takes a few hundred milliseconds.
_BACKOFF_BASE = 0.25
_BACKOFF_CAP = 4.0
# No random pause is shorter than this: it alone limits the connects per second.
_PAUSE_FLOOR = 0.1

# How long callers get a final failure without another attempt. A developer who has just corrected the password should
# not have to wait for long.
_BREAKER_BASE = 0.5
_BREAKER_CAP = 10.0


class Pace:
    """How fast one pool may dial, learned from how its dials ended.

    Args:
        jitter: Returns a random number from 0 to 1.

    Attributes:
        last_failure: The latest failure since the latest success, or None.
    """

    __slots__ = ("_failed_at", "_failures", "_jitter", "_not_before", "_refusal", "last_failure")

    def __init__(self, *, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._failures = 0
        self._failed_at = -math.inf
        self._not_before = 0.0
        self._refusal: Exception | None = None
        self.last_failure: Exception | None = None

    def __repr__(self) -> str:
        state = "closed" if self._refusal is None else "open"
        return f"<Pace: {self._failures} failures in a row, breaker {state}>"

    def allowed(self, connected: int) -> int:
        """Return how many dials may be under way at once: as many as there are connections, so that these double.

        With no connection it is one, which wakes the compute. After a failure it is one until a dial succeeds.

        Args:
            connected: The number of connections.
        """
        return 1 if self._failures else max(1, connected)

    def pause(self, now: float) -> float:
        """Return the seconds from `now` until the next dial may start."""
        return max(0.0, self._not_before - now)

    def refusal(self, now: float) -> Exception | None:
        """Return the failure for which the breaker is open at `now`, or None: no attempt can succeed now."""
        return self._refusal if now < self._not_before else None

    def succeeded(self) -> None:
        """Note that a dial has made a connection."""
        self._failures = 0
        self._failed_at = -math.inf
        self._not_before = 0.0
        self._refusal = self.last_failure = None

    def failed(self, error: Exception, *, began: float, now: float) -> None:
        """Note that a dial has failed. Dials that were under way together fail together and count once.

        Args:
            error: What the dial raised.
            began: When it began; a time of the monotonic clock.
            now: When it ended.
        """
        if began >= self._failed_at:
            self._failures += 1
        self._failed_at = now
        doublings = self._failures - 1
        self.last_failure = error
        if may_pass(error):
            self._refusal = None
            pause = max(_PAUSE_FLOOR, self._jitter() * backoff(_BACKOFF_BASE, doublings, _BACKOFF_CAP))
        else:
            self._refusal = error
            pause = backoff(_BREAKER_BASE, doublings, _BREAKER_CAP)
        self._not_before = now + pause


def may_pass(error: Exception) -> bool:
    """Return whether the same dial can succeed later although nothing is changed."""
    return isinstance(error, NeonAsyncError) and error.retryable
