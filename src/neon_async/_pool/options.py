"""State every option of a pool once: its default, its limits and what it does.

It must not know how a pool works. The parameters of a connection are another table (`_config.keywords`).
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, cast

import asyncpg

from .._config.arguments import ConnectKeywords
from .._config.readers import LIMIT, AsyncFunction, Function, Integer, Seconds
from .._driver.arguments import CONNECTION_CLASS, RECORD_CLASS
from .._driver.holder import RecordT, Subscriptable

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    from .._driver.connection import Connection
    from .events import PoolEvent

    _Callback: TypeAlias = Callable[[Connection[RecordT]], Awaitable[None]] | None
    _Setup: TypeAlias = Callable[[PoolConnectionProxy[RecordT]], Awaitable[None]] | _Callback[RecordT]
    _ConnectionClass: TypeAlias = type[asyncpg.Connection[RecordT]]
    _EventFunction: TypeAlias = Callable[[PoolEvent], object]
else:  # asyncpg's classes are generic to type checkers only
    _Setup = _Callback = Subscriptable(Callable[[Any], Awaitable[None]] | None)
    _ConnectionClass = Subscriptable(type[asyncpg.Connection])
    _EventFunction = Callable[[Any], object]

_AnyCallback: TypeAlias = Callable[[Any], Awaitable[None]]

_COUNT = {"reader": Integer(1, LIMIT)}
_DURATION = {"reader": Seconds()}
_LIFETIME = {"reader": Seconds(zero="never")}
_CALLBACK = {"reader": AsyncFunction()}


@dataclass(init=False, frozen=True, slots=True, eq=False)
class PoolOptions:
    """The options of a pool, checked. `create_pool()` takes the same ones, by the same names.

    Durations are in seconds, and at most 1,000,000,000. Sizes are numbers of connections.

    Attributes:
        min_size: Connections that the pool keeps while they are idle. Default 0, at most `max_size`. Neon closes
            connections when it suspends a compute; the pool then opens `min_size` new ones, which wakes the compute
            again, so that it never scales to zero.
        max_size: The largest number of connections. Default 10, at least 1.
        init_size: Connections that opening the pool waits for. Default `min_size`; from `min_size` to `max_size`. With
            0, opening connects to nothing, and a wrong password shows at the first acquire.
        acquire_timeout: Limit for everything that an acquire does: waiting, connecting (transient failures are retried
            within it), and `setup`. Default 30.0, above 0.
        release_timeout: Limit for the reset, and for the cancellation, of a connection that was released; after that
            it is terminated. Default 5.0, above 0.
        max_waiting: Callers that may wait at once for a connection that another caller uses; the next one gets
            `PoolBusyError`. Default None for any number; with 0, no caller waits for another.
        max_queries: Queries after which a connection is replaced. Default 50,000, at least 1.
        max_lifetime: Age at which a connection is replaced, up to a tenth earlier at random. Default 3600.0; 0 for
            never.
        max_inactive_connection_lifetime: Idle time after which a connection is closed. Default 240.0, because Neon
            suspends a compute after 300 s by default; 0 for never.
        check_after_idle: Idle time after which a connection is pinged before it is lent. Default 30.0; 0 for always.
        leak_after: Time after which a connection that was not released is logged as a warning, with the stack that
            acquired it. Default None for never, because every acquire then has to record its stack; otherwise above 0.
        setup: An async function that is called with the connection on every acquire, within `acquire_timeout`. Default
            None. An error ends the connection and reaches the caller.
        init: An async function that is called with every new connection, within `connect_timeout`. Default None. An
            error ends the connection, and reaches the acquire for which the connection was made.
        reset: An async function that is called with every released connection, within `release_timeout`, instead of
            the pool's own reset. Default None. An error ends the connection.
        on_event: A function that is called with each `PoolEvent`, such as `Acquired` or `Connected`, when it happens.
            Metrics and traces are made from it. It must return quickly, and must not use the pool. What it raises is
            logged. Default None.
        connection_class: The class of the connections, a subclass of `asyncpg.Connection`, which is the default. What
            its methods return belongs to the loan: coroutines, tasks, generators, `asynccontextmanager` blocks and the
            connection itself. Give an object that lives longer what `acquire()` returned, not `self`.
        record_class: The class of the rows, a subclass of `asyncpg.Record`, which is the default.

    Raises:
        ConfigurationError: An option is out of range or of the wrong type.
    """

    min_size: int = 0
    max_size: int = field(default=10, metadata=_COUNT)
    init_size: int | None = None
    acquire_timeout: float = field(default=30.0, metadata=_DURATION)
    release_timeout: float = field(default=5.0, metadata=_DURATION)
    max_waiting: int | None = field(default=None, metadata={"reader": Integer(0, LIMIT)})
    max_queries: int = field(default=50_000, metadata=_COUNT)
    max_lifetime: float = field(default=3600.0, metadata=_LIFETIME)
    max_inactive_connection_lifetime: float = field(default=240.0, metadata=_LIFETIME)
    check_after_idle: float = field(default=30.0, metadata={"reader": Seconds(zero="always")})
    leak_after: float | None = field(default=None, metadata={"reader": Seconds()})
    setup: _AnyCallback | None = field(default=None, metadata=_CALLBACK)
    init: _AnyCallback | None = field(default=None, metadata=_CALLBACK)
    reset: _AnyCallback | None = field(default=None, metadata=_CALLBACK)
    on_event: _EventFunction | None = field(default=None, metadata={"reader": Function("an event")})
    connection_class: type[Any] = field(default=asyncpg.Connection, metadata={"reader": CONNECTION_CLASS})
    record_class: type[Any] = field(default=asyncpg.Record, metadata={"reader": RECORD_CLASS})

    def __init__(self, **options: Any) -> None:  # one parameter for each would take long to define
        for option in fields(self):
            value = options.pop(option.name, option.default)
            by_default = value is None and option.default is None
            if "reader" in option.metadata and not by_default:
                option.metadata["reader"].check(option.name, value)
            object.__setattr__(self, option.name, value)
        assert not options, f"not options of a pool: {sorted(options)}"
        # The bounds of these two are other options.
        Integer(0, self.max_size, maximum_is="max_size").check("min_size", self.min_size)
        Integer(self.min_size, self.max_size, maximum_is="max_size").check("init_size", self.opening_size)

    @classmethod
    def split(cls, keywords: Mapping[str, object]) -> "tuple[PoolOptions, ConnectKeywords]":
        """Return the options in the keywords of `create_pool()`, and the keywords that are not options of the pool.

        Raises:
            ConfigurationError: An option is out of range or of the wrong type.
        """
        names = {option.name for option in fields(cls)}
        options = {name: value for name, value in keywords.items() if name in names}
        others = {name: value for name, value in keywords.items() if name not in names}
        return cls(**cast(dict[str, Any], options)), cast(ConnectKeywords, others)

    @property
    def opening_size(self) -> int:
        """The number of connections that opening the pool waits for: `init_size`, or else `min_size`."""
        return self.min_size if self.init_size is None else self.init_size


class RowlessPoolKeywords(ConnectKeywords, Generic[RecordT], total=False):
    """The keywords of `create_pool()`, but for `record_class`.

    The types are those of asyncpg-stubs. Functions may also ask for a `Connection` of ours, which is what they get.
    """

    min_size: int
    max_size: int
    init_size: int | None
    acquire_timeout: float
    release_timeout: float
    max_waiting: int | None
    max_queries: int
    max_lifetime: float
    max_inactive_connection_lifetime: float
    check_after_idle: float
    leak_after: float | None
    on_event: _EventFunction | None
    setup: _Setup[RecordT]
    init: _Callback[RecordT]
    reset: _Callback[RecordT]
    connection_class: _ConnectionClass[RecordT]


class PoolKeywords(RowlessPoolKeywords[RecordT], total=False):
    """The keywords of `create_pool()`: the fields of `PoolOptions`, and the keywords of every connection."""

    record_class: type[RecordT]


def check_timeout(name: str, value: object) -> None:
    """Check a `timeout=` of one of the pool's methods.

    Raises:
        ConfigurationError: It is not a number of seconds, or out of range. 0 is in range and means at once.
    """
    _TIMEOUT.check(name, value)


_TIMEOUT = Seconds(zero="at once")
