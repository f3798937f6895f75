"""What a pool knows about its database without asking it.

Knows no connections: it is notified of what happens to them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._config.literals import PoolState
    from .health import PoolHealth


class HealthLog:
    """The notes that `PoolHealth` is made from."""

    __slots__ = ("_failing", "_last_error", "_last_error_at", "_last_success_at", "_open", "_ready", "_since")

    def __init__(self) -> None:
        self._since = _now()
        self._open = False
        self._ready = False  # a connection is open
        self._failing = False  # the latest connect failed
        self._last_error: Exception | None = None
        self._last_error_at: datetime | None = None
        self._last_success_at: datetime | None = None

    def __repr__(self) -> str:
        return f"<HealthLog: {self._state}>"

    @property
    def _state(self) -> PoolState:
        if not self._open:
            return "unavailable"
        if self._ready:
            return "ready"
        return "unavailable" if self._failing else "asleep"

    def entered(self, *, is_open: bool) -> None:
        """Note that the pool has been opened, or is closing or closed."""
        self._change(_now(), is_open=is_open)

    def connected(self) -> None:
        """Note that a connect succeeded."""
        self._last_success_at = now = _now()
        self._change(now, ready=True, failing=False)

    def failed(self, error: Exception) -> None:
        """Note that a connect failed."""
        self._last_error, self._last_error_at = error, _now()
        self._change(self._last_error_at, failing=True)

    def emptied(self) -> None:
        """Note that no connection is open any more."""
        self._change(_now(), ready=False)

    def snapshot(self) -> PoolHealth:
        """Return what is known now."""
        from .health import PoolHealth

        return PoolHealth(
            state=self._state,
            since=self._since,
            last_error=self._last_error,
            last_error_at=self._last_error_at,
            last_success_at=self._last_success_at,
        )

    def _change(
        self, now: datetime, *, is_open: bool | None = None, ready: bool | None = None, failing: bool | None = None
    ) -> None:
        before = self._state
        self._open = self._open if is_open is None else is_open
        self._ready = self._ready if ready is None else ready
        self._failing = self._failing if failing is None else failing
        if self._state != before:
            self._since = now


def _now() -> datetime:
    return datetime.now(UTC)
