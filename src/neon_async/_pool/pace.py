"""When the next connection may be dialed: the ramp, the pauses after failures, and the breaker.

Pure: time and chance are given, and nothing here waits. It knows how many connections there are, and none of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from .._errors import NeonAsyncError
from .._timing import backoff

# Pauses between attempts that failed for a reason that may pass: full jitter, as in "Exponential Backoff And Jitter"
# (AWS Architecture Blog, 2015). Neon advises 1 to 16 s for clients that start in step; a pool has one attempt under way
# at a time, and may begin lower, for a wake takes a few hundred milliseconds.
_BACKOFF_BASE = 0.25
_BACKOFF_CAP = 4.0
# Chance may not make a pause shorter than this: it alone bounds the connects a second.
_PAUSE_FLOOR = 0.1

# How long a failure that will not pass by itself is answered without another attempt. Somebody who has just mended the
# password should not wait for long.
_BREAKER_BASE = 0.5
_BREAKER_CAP = 10.0


class Pace:
    """How fast one pool may dial, learned from how its dials ended.

    `jitter`: returns a number from 0 to 1, by chance.
    """

    __slots__ = ("_failed_at", "_failures", "_jitter", "_not_before", "_refusal", "last_failure")

    def __init__(self, *, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._failures = 0
        self._failed_at = -math.inf
        self._not_before = 0.0
        self._refusal: Exception | None = None
        self.last_failure: Exception | None = None  # since the latest success

    def __repr__(self) -> str:
        state = "closed" if self._refusal is None else "open"
        return f"<Pace: {self._failures} failures in a row, breaker {state}>"

    def allowed(self, connected: int) -> int:
        """Return how many dials may be under way at once: as many as connections stand, so that they double.

        One, where none stands: it wakes the compute. One, too, after a failure, until a dial succeeds.
        """
        return 1 if self._failures else max(1, connected)

    def pause(self, now: float) -> float:
        """Return the seconds from `now` until the next dial may start."""
        return max(0.0, self._not_before - now)

    def refusal(self, now: float) -> Exception | None:
        """Return the failure with which the breaker is open at `now`, if it is: no attempt can succeed."""
        return self._refusal if now < self._not_before else None

    def succeeded(self) -> None:
        """A dial has made a connection."""
        self._failures = 0
        self._failed_at = -math.inf
        self._not_before = 0.0
        self._refusal = self.last_failure = None

    def failed(self, error: Exception, *, began: float, now: float) -> None:
        """A dial that was begun at one time has ended in `error` at another.

        Dials that were under way together fail together, and count once.
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
    """Whether the same dial can succeed later without anybody changing anything."""
    return isinstance(error, NeonAsyncError) and error.retryable
