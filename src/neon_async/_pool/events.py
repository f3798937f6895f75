"""What a pool reports to `on_event`: the public stream that metrics and traces are made from.

Knows only what it carries. An event is a named tuple, because two of them are made for every acquire.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .._config.literals import ConnectStep

if TYPE_CHECKING:
    from .pool import Pool


class PoolOpened(NamedTuple):
    """A pool was opened. `pool.stats()` has its gauges from now on.

    Attributes:
        pool: The pool.
    """

    pool: "Pool[Any]"


class PoolClosed(NamedTuple):
    """A pool was closed.

    Attributes:
        pool: The pool.
    """

    pool: "Pool[Any]"


class Acquired(NamedTuple):
    """A caller got a connection.

    Attributes:
        pool_name: The name of the pool: the endpoint id or the host name.
        seconds: From the call to the connection.
    """

    pool_name: str
    seconds: float


class Waited(NamedTuple):
    """A caller had to wait for a connection. It follows that it acquired one, timed out or was cancelled.

    Attributes:
        pool_name: The name of the pool.
        seconds: In the wait queue.
    """

    pool_name: str
    seconds: float


class TimedOut(NamedTuple):
    """A caller got no connection before its deadline.

    Attributes:
        pool_name: The name of the pool.
        seconds: For how long it waited.
    """

    pool_name: str
    seconds: float


class Released(NamedTuple):
    """A connection was released, or ended while a caller had it.

    Attributes:
        pool_name: The name of the pool.
        seconds: For how long the caller had it.
    """

    pool_name: str
    seconds: float


class Connected(NamedTuple):
    """A dial made a connection.

    Attributes:
        pool_name: The name of the pool.
        seconds: From the first look-up to the end of `init`.
        steps: The steps with the seconds from the begin of the dial to the begin of each: `dns`, `tcp`, `tls`,
            `revocation` where it waits for a list, and `authentication`.
    """

    pool_name: str
    seconds: float
    steps: tuple[tuple[ConnectStep, float], ...]


class ConnectFailed(NamedTuple):
    """A dial failed, or was cancelled.

    Attributes:
        pool_name: The name of the pool.
        seconds: For how long it took.
        steps: As for `Connected`, up to the one that failed.
        error: What happened; None where the pool was closed meanwhile.
    """

    pool_name: str
    seconds: float
    steps: tuple[tuple[ConnectStep, float], ...]
    error: Exception | None


class Woke(NamedTuple):
    """A pool without a connection has one again, after a caller asked for it.

    Attributes:
        pool_name: The name of the pool.
        seconds: From the first dial to that connection, failed dials and pauses included.
    """

    pool_name: str
    seconds: float


class ConnectionClosed(NamedTuple):
    """A connection ended, closed by either side for whatever reason.

    Attributes:
        pool_name: The name of the pool.
        seconds: Its age.
    """

    pool_name: str
    seconds: float


class Reset(NamedTuple):
    """A reset succeeded.

    Attributes:
        pool_name: The name of the pool.
        seconds: From the release to the server's answer.
    """

    pool_name: str
    seconds: float


class ResetFailed(NamedTuple):
    """A reset failed or took too long, and its connection was closed.

    Attributes:
        pool_name: The name of the pool.
        seconds: From the release to the failure.
    """

    pool_name: str
    seconds: float


class Retried(NamedTuple):
    """`run_transaction()` runs its work once more.

    Attributes:
        pool_name: The name of the pool.
        seconds: The attempt that failed, and the pause after it.
    """

    pool_name: str
    seconds: float


PoolEvent: TypeAlias = (
    PoolOpened
    | PoolClosed
    | Acquired
    | Waited
    | TimedOut
    | Released
    | Connected
    | ConnectFailed
    | Woke
    | ConnectionClosed
    | Reset
    | ResetFailed
    | Retried
)
"""What `on_event=` is called with: one of the events of this module."""
