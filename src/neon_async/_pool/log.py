"""What a pool logs: an outage once when it begins and once when it ends, and what befalls many connections together.

Knows no connections: it is notified of what happens to them.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import Counter

from .._errors import text_of
from .._text import log
from .._timing import Timer

# Seconds in which everything of one kind that follows the first one makes one more record.
_WINDOW = 1.0


class Cause(enum.Enum):
    """Why no connection can be made, or none can be used."""

    RETRYING = "cannot connect, retrying: %(reason)s"
    REFUSED = "cannot connect, not retrying for now: %(reason)s"
    CALLERS_CODE = "init, the password function or connection_class failed: %(reason)s"
    IN_VAIN = "new connections are closed before they have answered a statement"


class Mishap(enum.Enum):
    """What befalls a connection, and often many at once: for one of them, and for several."""

    RESET_LATE = "was not reset in time and was closed", "were not reset in time and were closed"
    RESET_FAILED = "could not be reset and was closed", "could not be reset and were closed"
    CLOSE_FAILED = "could not be closed and was terminated", "could not be closed and were terminated"
    SILENT = "was idle, did not answer and was closed", "were idle, did not answer and were closed"


class _Outage:
    """An outage that the log has announced.

    Attributes:
        cause: Its latest cause.
        began: When the first connect of it began; a time of the monotonic clock.
        failures: Failed connects, or sessions that ended before they did any work.
    """

    __slots__ = ("began", "cause", "failures")

    def __init__(self, cause: Cause, began: float) -> None:
        self.cause = cause
        self.began = began
        self.failures = 1

    def __repr__(self) -> str:
        return f"<_Outage: {self.cause.name}, {self.failures} failures>"


class PoolLog:
    """The log of one pool.

    Args:
        name: The endpoint, as each record names it.
    """

    __slots__ = ("_name", "_outage", "_timer", "_untold")

    def __init__(self, name: str) -> None:
        self._name = name
        self._outage: _Outage | None = None
        self._untold: Counter[Mishap] = Counter()  # since the first one of its kind was logged
        self._timer = Timer(self.flush)

    def __repr__(self) -> str:
        return f"<PoolLog of {self._name}: {'no outage' if self._outage is None else self._outage}>"

    def info(self, text: str, **facts: object) -> None:
        """Log a change of state. `text` contains the facts by name, as `%(seconds).2f`."""
        log(logging.INFO, f"%(endpoint)s: {text}", endpoint=self._name, **facts)

    # Outages

    def failed(self, cause: Cause, error: Exception, *, began: float) -> None:
        """Note that a connect has failed, or that a session has ended before it did any work, at the time `began`."""
        outage = self._outage
        if outage is not None:
            outage.failures += 1
            if outage.cause is cause:
                return
            outage.cause = cause
        else:
            self._outage = _Outage(cause, began)
        log(
            logging.WARNING if outage is None else logging.INFO,
            f"%(endpoint)s: {cause.value}",
            endpoint=self._name,
            event="outage_began" if outage is None else "outage_continues",
            reason=text_of(error),
            error=type(error).__name__,
            retryable=cause is not Cause.REFUSED,
        )

    def connected(self, seconds: float, *, woke: bool) -> None:
        """Note that a connect took so many seconds. That ends an outage, unless sessions ended without any work."""
        if self._outage is not None:
            if self._outage.cause is not Cause.IN_VAIN:
                self._end(self._outage)
        elif woke:
            self.info("connected in %(seconds).2f s", event="connected", seconds=seconds)

    def worked(self) -> None:
        """Note that a session has answered a statement of a caller, which ends every outage."""
        if self._outage is not None:
            self._end(self._outage)

    def _end(self, outage: _Outage) -> None:
        self._outage = None
        log(
            logging.WARNING,
            "%(endpoint)s: connected again after an outage of %(seconds).2f s, failed connects: %(failures)d",
            endpoint=self._name,
            event="outage_ended",
            seconds=time.monotonic() - outage.began,
            failures=outage.failures,
        )

    # What befalls many connections at once

    def befell(self, mishap: Mishap, error: Exception | type[Exception]) -> None:
        """Log what has befallen a connection, or count it where the same has just befallen another one."""
        if mishap in self._untold:
            self._untold[mishap] += 1
            return
        self._untold[mishap] = 0
        self._timer.set(time.monotonic() + _WINDOW)
        kind = error if isinstance(error, type) else type(error)
        one, _ = mishap.value
        self.info(f"a connection {one} (%(error)s)", event=mishap.name.lower(), count=1, error=kind.__name__)

    def flush(self) -> None:
        """Log how many more connections befell what was logged of the first."""
        self._timer.cancel()
        for mishap, count in self._untold.items():
            if count:
                _, several = mishap.value
                self.info(f"%(count)d more connections {several}", event=mishap.name.lower(), count=count)
        self._untold.clear()
