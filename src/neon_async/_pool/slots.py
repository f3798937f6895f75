"""A pool's slots: asyncpg's holders, where each stands, and what is known of the connection in it.

Every private name of asyncpg's pool that we need stands in this file, and `tests/test_slots.py` fails when one of them
changes. This module decides nothing: it knows neither waiters nor deadlines.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import asyncpg
from asyncpg.pool import PoolConnectionHolder, PoolConnectionProxy

from .._driver.connector import wire_of
from .._errors import ConnectError, UnsupportedEventLoopError
from .._wire.dial import Wire

if TYPE_CHECKING:
    Proxy: TypeAlias = PoolConnectionProxy[asyncpg.Record]
    _AsyncpgConnection: TypeAlias = asyncpg.Connection[Any]
    _AsyncpgPool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    Proxy = PoolConnectionProxy
    _AsyncpgPool = asyncpg.Pool


# asyncpg 0.31 finds the holder of a connection that ends through its proxy only.
_FOUND_BY_PROXY = "_pool_holder" not in asyncpg.Connection.__slots__


class Place(enum.Enum):
    """Where a slot stands. It is in one place at a time."""

    VACANT = enum.auto()  # without a connection
    CONNECTING = enum.auto()
    IDLE = enum.auto()
    CHECKING = enum.auto()  # pinged, after having been idle for long
    GIVEN = enum.auto()  # to a waiter, who has not run since
    IN_USE = enum.auto()
    RESETTING = enum.auto()  # or closing


class Slot(PoolConnectionHolder):
    """One place for a connection."""

    __slots__ = (
        "_wire",
        "_writes",
        "born",
        "expires",
        "heard_at",
        "idle_since",
        "leak_timer",
        "lent_at",
        "owner",
        "place",
        "task",
        "until",
    )

    # asyncpg's own attributes; the connection's are private, too.
    _con: Any
    _pool: Any
    _proxy: Proxy | None
    _in_use: asyncio.Future[None] | None
    _generation: int | None
    _max_queries: int

    def __init__(self, pool: Any, *, max_queries: int) -> None:
        # Setup and the end of idle connections are the pool's own: asyncpg bounds neither in time.
        super().__init__(pool, max_queries=max_queries, setup=None, max_inactive_time=0)
        self._wire: Wire | None = None
        self._writes = 0
        self.place = Place.VACANT
        self.born: float | None = None  # None, too, once the end of the connection has been noted
        self.expires = 0.0
        self.idle_since = 0.0
        self.heard_at = 0.0  # the server's latest known sign of life
        self.lent_at = 0.0
        self.owner: asyncio.Task[Any] | None = None  # who has borrowed the connection
        self.task: asyncio.Task[Any] | None = None  # what is being done to it, behind
        self.until = math.inf  # when that must have ended, if it is to end
        self.leak_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Slot {self.place.name.lower()}>"

    @property
    def connection(self) -> _AsyncpgConnection | None:
        """The connection itself, if there is one."""
        connection: _AsyncpgConnection | None = self._con
        return connection

    def is_outdated(self) -> bool:
        """Whether the connection was made before `expire_connections()`."""
        return bool(self._generation != self._pool._generation)

    def is_worn(self, now: float) -> bool:
        """Whether the connection is outdated or too old."""
        return now >= self.expires or self.is_outdated()

    def is_new(self) -> bool:
        """Whether nobody has had the connection yet."""
        return self.born is not None and self.lent_at < self.born

    async def open(self) -> None:
        """Make the connection. One that ends at once, too, is a `ConnectError`: that may pass."""
        lost: Exception | None = None
        try:
            await self.connect()
        except asyncpg.ConnectionDoesNotExistError as error:  # asyncpg 0.31 does not look
            lost = error
        if lost is not None or not self.is_connected():
            self.discard()
            raise ConnectError("The server closed the connection as soon as it was made. Try again.") from lost

    async def ping(self) -> None:
        """Ask the server for a sign of life."""
        assert self._con is not None
        await self._con.execute("SELECT 1")  # an empty query raises AttributeError in asyncpg

    async def lend(self) -> Proxy:
        """Return what the caller gets. Does not wait: the connection is there."""
        proxy = await self.acquire()
        self._wire = wire_of(self._con)
        self._writes = self._wire.writes
        return proxy

    def recall(self) -> None:
        """Let the caller's proxy die. What the connection does from here on, it does for the pool."""
        connection, proxy = self._con, self._proxy
        assert connection is not None
        assert proxy is not None
        try:
            # Ends cursors and prepared statements; warns of listeners left behind, perhaps by an exception.
            connection._on_release()
        finally:
            proxy._detach()  # type: ignore[attr-defined]
            self._proxy = PoolConnectionProxy(self, connection) if _FOUND_BY_PROXY else None

    def is_untouched(self) -> bool:
        """Whether nothing at all was sent since the connection was lent, so that there is nothing to reset."""
        if self._con is None or self._wire is None or self._con.is_closed() or self._resets_otherwise():
            return False
        return self._writes == self._wire.writes and not self._con._log_listeners

    def _resets_otherwise(self) -> bool:
        """Whether a reset is the caller's own code, which may do anything."""
        return self._pool._reset is not None or type(self._con).reset is not asyncpg.Connection.reset

    def needs_no_reset(self) -> bool:
        """Whether asyncpg would send nothing to reset this connection, nor wait for anything, nor close it."""
        connection = self._con
        if connection is None or connection.is_closed() or connection.is_in_transaction():
            return False
        return not (
            self._resets_otherwise()
            or connection.get_reset_query()
            or connection._protocol._is_cancelling()
            or connection._protocol.queries_count >= self._max_queries
            or connection._top_xact
            or connection._listeners
            or connection._log_listeners
        )

    async def restore(self, now: float) -> None:
        """Make the connection fit for the next: wait for a cancelled query, roll back, reset; or close it, worn out."""
        # As asyncpg's release(), but for one connection: this one may end meanwhile, and another stand in its place.
        connection, reset = self._con, self._pool._reset
        try:
            if connection._protocol._is_cancelling():
                await connection._protocol._wait_for_cancellation()
            if self._con is not connection:
                return
            if self.is_worn(now) or connection._protocol.queries_count >= self._max_queries:
                await connection.close()
            elif reset is None:
                await connection.reset()
            else:
                await connection._reset()
                await reset(connection)
        except BaseException:
            connection.terminate()
            raise
        if self._con is connection:
            self.free()

    def free(self) -> None:
        """End the loan: asyncpg gives the slot back to the pool, as it has already where the connection ended."""
        if self._in_use is None:
            return
        if self.is_connected():
            self._release()  # type: ignore[attr-defined]
        else:
            self.discard()

    def discard(self) -> None:
        """End the connection at once, without waiting for anything."""
        self.terminate()
        if self._con is not None:  # asyncpg 0.31 forgets idle ones only when it reconnects
            self._release_on_close()  # type: ignore[attr-defined]


def slot_of(connection: object, pool: object) -> Slot | None:
    """Return the slot of what `pool` has handed out, or None when it was released before.

    Raises asyncpg's `InterfaceError` for anything else, as asyncpg's pool does.
    """
    holder = connection._holder if type(connection) is PoolConnectionProxy else None
    if not isinstance(holder, Slot) or holder._pool is not pool:
        raise asyncpg.InterfaceError(
            f"Pool.release() received invalid connection: {connection!r} is not a member of this pool"
        )
    return None if connection._con is None else holder  # type: ignore[attr-defined]


class Slots:
    """All slots of a pool, and which stand where. Idle ones are a stack: the last to come back goes out first."""

    def __init__(self, slots: list[Slot]) -> None:
        self._all = slots
        self._counts = dict.fromkeys(Place, 0) | {Place.VACANT: len(slots)}
        self.vacant = list(slots)
        self.idle: list[Slot] = []
        self._stacks = {Place.VACANT: self.vacant, Place.IDLE: self.idle}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {place.name.lower()}" for place, count in self._counts.items())
        return f"<Slots: {counts}>"

    def count(self, place: Place) -> int:
        """Return how many slots stand at `place`."""
        return self._counts[place]

    @property
    def connected(self) -> int:
        """How many slots have, or had until a moment ago, a connection."""
        return len(self._all) - self._counts[Place.VACANT] - self._counts[Place.CONNECTING]

    def move(self, slot: Slot, place: Place) -> None:
        """Put `slot` at `place`."""
        left, joined = self._stacks.get(slot.place), self._stacks.get(place)
        if left is not None:
            if left[-1] is slot:
                left.pop()
            else:
                left.remove(slot)
        if joined is not None:
            joined.append(slot)
        self._counts[slot.place] -= 1
        self._counts[place] += 1
        slot.place = place


class _ReturnQueue:
    """What asyncpg's holders take for the queue of their pool: they put themselves into it when their loan ends."""

    def __init__(self, came_back: Callable[[Slot], None]) -> None:
        self.put_nowait = came_back


class _RunningLoop:
    """The `loop` of a pool: whichever is running when it is used, so that a pool may be created before there is one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)


class SlotPool(_AsyncpgPool):
    """asyncpg's pool with our slots for its holders, and no queue: who gets which slot is for a subclass to say.

    `connect`, `reset`, `max_size`, `max_queries`, `connection_class` and `record_class` are asyncpg's. Its floor, its
    callbacks and its ends of idle connections know no deadlines, so that it is told of none.
    """

    # asyncpg's own attributes.
    _closing: bool
    _closed: bool
    _maxsize: int
    _max_queries: int

    def __init__(self, *, connect: Callable[..., Awaitable[Any]], **options: Any) -> None:
        self._slots = Slots([])
        super().__init__(
            min_size=0,
            max_inactive_connection_lifetime=0,
            connect=cast(Any, connect),
            loop=cast(asyncio.AbstractEventLoop, _RunningLoop()),
            **options,
        )

    async def _initialize(self) -> None:
        """Serve asyncpg, which opens its pool with this."""
        self._loop = asyncio.get_running_loop()
        self._holders = [Slot(self, max_queries=self._max_queries) for _ in range(self._maxsize)]
        self._slots = Slots(self._holders)
        self._queue = _ReturnQueue(self._came_back)
        try:
            await self._warm_up()
        except BaseException:
            self._closed = True  # asyncpg 0.31 leaves it open
            raise

    async def _warm_up(self) -> None:
        """Make the connections that the pool opens with."""
        raise NotImplementedError

    def _came_back(self, slot: Slot) -> None:
        """The loan of `slot` has ended; its connection is reset, or gone."""
        raise NotImplementedError

    def _has_closed(self) -> bool:
        """Whether the pool is closed, and not only closing."""
        return self._closed

    def _begin_closing(self) -> bool:
        """Let `is_closing()` be true from now on. Returns whether it was not."""
        begins = not self.is_closing()
        self._closing = True
        return begins

    def _end(self) -> None:
        """Close the pool, and whatever connection it still has."""
        super().terminate()
        self._closing = False

    def _require_own_loop(self) -> None:
        """Raise `UnsupportedEventLoopError` in another event loop than the one that the pool was opened in."""
        if asyncio.get_running_loop() is not self._loop:
            raise UnsupportedEventLoopError(
                "This pool was opened in another event loop, and its connections belong there. Open a pool in each."
            )

    def _require_initialized(self) -> None:
        """Raise asyncpg's `InterfaceError` unless the pool was opened."""
        self._check_init()  # type: ignore[attr-defined]
