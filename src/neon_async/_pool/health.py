"""The answer of `Pool.health()`, imported when it is needed: the class takes half a millisecond to define."""

# No `from __future__ import annotations`: see `_publish()` of the facade.

from dataclasses import dataclass
from datetime import datetime

from .._config.literals import PoolState


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHealth:
    """What a pool knew about its database at one moment. Nothing was sent to find out.

    Attributes:
        state: `ready`: at least one connection is open. `asleep`: no connection is open, and the latest connect
            succeeded or there was none; the compute may scale to zero, and the next acquire wakes it. `unavailable`: no
            connection is open and the latest connect failed, or the pool is not open.
        since: When the state began.
        last_error: The error of the latest connect that failed, or None. It stays when a later connect succeeds.
        last_error_at: When that was, or None.
        last_success_at: When the latest connect succeeded, or None.
    """

    __module__ = "neon_async"

    state: PoolState
    since: datetime
    last_error: Exception | None
    last_error_at: datetime | None
    last_success_at: datetime | None
