"""What a pool reports to `on_event`: one class for each kind of event, and `PoolEvent`, which is any of them."""

from __future__ import annotations

from ._config.literals import ConnectStep
from ._pool.events import (
    Acquired,
    Connected,
    ConnectFailed,
    ConnectionClosed,
    PoolClosed,
    PoolEvent,
    PoolOpened,
    Released,
    Reset,
    ResetFailed,
    Retried,
    TimedOut,
    Waited,
    Woke,
)

__all__ = (
    "Acquired",
    "ConnectFailed",
    "ConnectStep",
    "Connected",
    "ConnectionClosed",
    "PoolClosed",
    "PoolEvent",
    "PoolOpened",
    "Released",
    "Reset",
    "ResetFailed",
    "Retried",
    "TimedOut",
    "Waited",
    "Woke",
)

for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__  # in reprs and pickles
