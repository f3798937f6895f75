"""When the next connection may be dialed: the ramp, the pauses after failures, and the breaker.

Pure: time and random numbers are arguments, and nothing here waits. Knows how many connections there are, and none of
them.

A login proves little: a server, or a pooler in front of it, can accept logins and end each session at once. So a
connect is a success only when its session has answered a statement of a caller. Until then what failed before is not
forgotten, and dials start one at a time. A session that ends before counts as a failed connect.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from .._errors import NeonAsyncError, TooManyConnectionsError
from .._timing import backoff

# Seconds between two connects to a server that has failed: four a second, and five where a timer is early. They are the
# lower bound of every pause, so that it is this and not chance that limits the connects per second.
_SPACING = 0.25

# Pauses after failures that may pass: random between that bound and a ceiling that doubles, as in "Exponential Backoff
# And Jitter" (AWS Architecture Blog, 2015). The ceiling stays low, because it is the time that callers still wait when
# an outage is over, and because a pool has one attempt under way at a time, however many callers wait.
_CEILING_BASE = 0.5
_CEILING_CAP = 0.75
# A server that is full or that limits the rate stays so for longer if it is asked more often. Neon advises 1 to 16 s.
_CROWDED_CAP = 4.0

# How long callers get a final failure without another attempt. A developer who has just corrected the password should
# not have to wait for long.
_BREAKER_BASE = 0.5
_BREAKER_CAP = 10.0

# No caller waits for a connection that is only to restore `min_size`, so a server that refuses or ends such connections
# is dialed ever more slowly.
_FLOOR_CAP = 10.0


class Pace:
    """How fast one pool may dial, learned from how its dials and sessions ended. Times are of the monotonic clock.

    Args:
        jitter: Returns a random number from 0 to 1.

    Attributes:
        in_vain: How many connects in a row have succeeded and served no caller, since a session has last worked.
        last_failure: The latest failure since the latest login, or None.
    """

    __slots__ = (
        "_failed_at",
        "_failed_dials",
        "_failures",
        "_floor_not_before",
        "_jitter",
        "_not_before",
        "_refusal",
        "in_vain",
        "last_failure",
    )

    def __init__(self, *, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._failures = 0  # in a row, since a session has last worked
        self._failed_at = -math.inf
        self._not_before = 0.0
        self._refusal: Exception | None = None
        self.in_vain = 0
        self._failed_dials = 0  # in a row
        self._floor_not_before = 0.0
        self.last_failure: Exception | None = None

    def __repr__(self) -> str:
        state = "closed" if self._refusal is None else "open"
        return f"<Pace: {self._failures} failures in a row, breaker {state}>"

    def allowed(self, connected: int) -> int:
        """Return how many dials may be under way at once: as many as there are connections, so that these double.

        With no connection it is one, which wakes the compute. After a failure it is one until a session has worked.

        Args:
            connected: The number of connections that can be expected to work.
        """
        return 1 if self._failures else max(1, connected)

    def pause(self, now: float) -> float:
        """Return the seconds from `now` until the next dial for a caller may start."""
        return max(0.0, self._not_before - now)

    def floor_pause(self, now: float) -> float:
        """Return the seconds from `now` until the next dial may start for which no caller waits."""
        return max(0.0, self._not_before - now, self._floor_not_before - now)

    def refusal(self, now: float) -> Exception | None:
        """Return the failure for which the breaker is open at `now`, or None: no attempt can succeed now."""
        return self._refusal if now < self._not_before else None

    def floor_dialed(self, now: float) -> None:
        """Note that a dial starts for which no caller waits."""
        self._floor_not_before = now + backoff(_SPACING, self.in_vain + self._failed_dials, _FLOOR_CAP)

    def connected(self, *, began: float, connects: int = 1) -> None:
        """Note that a dial has made a connection, which has still to show that it works.

        Args:
            began: When the dial began.
            connects: How many connects it took.
        """
        self._failed_dials = 0
        self._refusal = self.last_failure = None
        if self._failures:
            self._not_before = began + connects * _SPACING

    def worked(self, *, opened_at: float) -> None:
        """Note that a session has answered a statement of a caller.

        Args:
            opened_at: When it began. One that began before the latest failure says nothing about connects of now.
        """
        if opened_at >= self._failed_at:
            self._failures = self.in_vain = 0
            self._failed_at = -math.inf
            self._not_before = self._floor_not_before = 0.0
            self._refusal = self.last_failure = None

    def failed(self, error: Exception, *, began: float, now: float, connects: int = 1) -> None:
        """Note that a dial has failed. Dials that were under way together fail together and count once.

        Args:
            error: What the dial raised.
            began: When it began.
            now: When it ended.
            connects: How many connects it took.
        """
        self._failed_dials += 1
        self._fail(error, began=began, now=now, connects=connects)

    def _fail(self, error: Exception, *, began: float, now: float, connects: int = 1) -> None:
        if began >= self._failed_at:
            self._failures += 1
        self._failed_at = now
        doublings = max(0, self._failures - 1)
        self.last_failure = error
        if may_pass(error):
            self._refusal = None
            cap = _CROWDED_CAP if isinstance(error, TooManyConnectionsError) else _CEILING_CAP
            # Many connects are many addresses, and each of them gets few.
            shortest = min(max(1, connects) * _SPACING, _CEILING_CAP)
            longest = max(shortest, backoff(_CEILING_BASE, doublings, cap))
            pause = shortest + self._jitter() * (longest - shortest)
        else:
            self._refusal = error
            pause = backoff(_BREAKER_BASE, doublings, _BREAKER_CAP)
        self._not_before = now + pause

    def ended_in_vain(self, error: Exception, *, opened_at: float, now: float) -> None:
        """Note that the other side has ended a session before it answered any statement of a caller.

        The first one causes no pause and explains nothing to callers: it may have been idle when its compute was
        suspended. Later ones do, and the pause begins when the session began, because a server may also end each of
        them after a quiet minute.

        Args:
            error: The error of callers that get no connection.
            opened_at: When the session began. Those that were open together and end together count once.
            now: When it ended.
        """
        self.in_vain += opened_at >= self._failed_at
        not_before, explanation = self._not_before, self.last_failure
        self._fail(error, began=opened_at, now=now)
        self._not_before = max(not_before, self._not_before - (now - opened_at))
        if self.in_vain < 2:
            self._not_before, self.last_failure = not_before, explanation

    def stopped_by_caller(self, *, began: float, connects: int, told: bool) -> None:
        """Note that the caller's own code has failed in a dial. That says nothing about the server.

        Args:
            began: When the dial began.
            connects: How many connects it took: none before the password is known.
            told: Whether a caller gets the error. Otherwise nothing would slow down a dial that always fails.
        """
        self._not_before = max(self._not_before, began + connects * _SPACING)
        self.in_vain += not told


def may_pass(error: Exception) -> bool:
    """Return whether the same dial can succeed later although nothing is changed."""
    return isinstance(error, NeonAsyncError) and error.retryable
