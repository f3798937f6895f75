"""LISTEN that survives: one connection of its own, made again whenever it is lost.

It must not know a pool. What it cannot know, the notifications that were sent while it did not listen, it reports as a
`Gap`.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, Unpack

from .._config.arguments import AnchorSource, ConnectKeywords
from .._config.readers import LIMIT, Integer, Seconds
from .._errors import ConfigurationError, NeonAsyncError, forget_arguments, is_retryable
from .._neon.endpoint import short_name
from .._text import escape, log
from .._timing import backoff
from .connector import Connector, prepare

# Seconds between two attempts to connect: the shortest pause, which limits the connects per second, and the longest.
_PAUSE_BASE = 0.25
_PAUSE_CAP = 15.0
# Seconds. A compute that is suspended was idle for longer, and a connection that is busy is lost for another reason.
_QUIET = 1.0
# Seconds for a polite end of the connection.
_CLOSE_TIMEOUT = 2.0

_MAX_IDLE = Seconds(zero="at once")
_QUEUE_SIZE = Integer(1, LIMIT)


@dataclass(frozen=True, slots=True)
class Notification:
    """A notification of the server (NOTIFY).

    Attributes:
        channel: The channel.
        payload: The payload, which can be empty.
        pid: The process id of the session that sent it.
    """

    channel: str
    payload: str
    pid: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Notifications may have been missed. What they would have announced must be looked up now, with a query.

    The listener listens again when it yields this, so that nothing falls between the gap and what follows.

    Attributes:
        since: From when on notifications may be missing, or None for the first gap, before which there was no listener.
    """

    since: datetime | None


@forget_arguments
def listen(
    dsn: str | None,
    *channels: str,
    max_idle: float = 0.0,
    queue_size: int = 10_000,
    trust_anchor: AnchorSource | None = None,
    **keywords: Unpack[ConnectKeywords],
) -> "Listener":
    """Return an async iterator of what is notified on these channels.

        async with neon_async.listen(dsn, "orders") as events:
            async for event in events:
                await work_off_the_queue()  # after a Gap, and after each Notification

    It listens on a direct connection of its own, also where `dsn` names the pooled host: a transaction pooler forgets
    LISTEN. When the connection is lost (Neon suspends an idle compute although it has listeners), it is made again,
    with growing pauses while that fails, and a `Gap` says from when on notifications may be missing. The first thing is
    always a `Gap`. A connection that a network has dropped silently is found by TCP keepalive (`keepalives_idle`).

    It connects in the first iteration, and not while the consumer is busy.

    Args:
        dsn: The connection string. None: the environment variables of libpq (`PG*`).
        *channels: The names of the channels, at least one. They are not folded to lower case.
        max_idle: Seconds without a connection after an idle one was lost. Each connect wakes a suspended compute, so a
            listener that reconnects at once keeps waking it. Default 0.0: at once. A connection that was lost within a
            second of a notification is replaced at once in any case.
        queue_size: Notifications that may wait for the consumer; further ones are dropped, and a `Gap` takes their
            place. Default 10,000, at least 1.
        trust_anchor: As for `connect()`.
        **keywords: The connection keywords of `connect()`.

    Raises:
        ConfigurationError: A parameter is refused; from the call itself.
    """
    _MAX_IDLE.check("max_idle", max_idle)
    _QUEUE_SIZE.check("queue_size", queue_size)
    if not channels or not all(isinstance(channel, str) and channel for channel in channels):
        raise ConfigurationError('listen() needs the names of channels, such as listen(dsn, "orders").')
    connector = prepare(dsn, trust_anchor=trust_anchor, **keywords)
    if connector.parameters.pooled:
        endpoint = connector.parameters.endpoint
        if endpoint is None or not endpoint.pooled:
            raise ConfigurationError(
                f"LISTEN does not work behind a transaction pooler, and the name {connector.parameters.host} does not "
                "say which host is the direct one. Pass the direct host to listen()."
            )
        keywords["host"] = endpoint.direct_host
        keywords.pop("pooled", None)
        connector = prepare(dsn, trust_anchor=trust_anchor, **keywords)
    return Listener(connector, channels, max_idle=max_idle, queue_size=queue_size)


class Listener:
    """What `listen()` returns: an async iterator of `Notification` and `Gap`.

    Leave its `async with` block, or call `aclose()`, to close the connection. One task at a time may iterate.
    """

    def __init__(self, connector: Connector, channels: tuple[str, ...], *, max_idle: float, queue_size: int) -> None:
        self._connector = connector
        self._name = short_name(connector.parameters.host, connector.parameters.endpoint)
        self._channels = channels
        self._max_idle = max_idle
        self._queue: deque[Notification | Gap] = deque()
        self._queue_size = queue_size
        self._connection: Any = None
        self._changed = asyncio.Event()  # something came, the connection was lost, or the listener was closed
        self._heard_at: datetime | None = None  # until when nothing can be missing
        self._heard = 0.0  # the same, of the monotonic clock
        self._in_vain = 0  # connections in a row that were lost at once, without a notification
        self._closed = False

    def __repr__(self) -> str:
        return f"<Listener of {self._name}: {', '.join(self._channels)}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Notification | Gap]:
        return self

    async def __anext__(self) -> Notification | Gap:
        """Return the next notification or gap, however long that takes.

        Raises:
            StopAsyncIteration: The listener was closed.
            NeonAsyncError: The server cannot be reached for a reason that does not pass by itself, such as a wrong
                password. The next call tries again.
        """
        while not self._closed:
            if self._queue:
                return self._queue.popleft()
            if self._connection is None:
                await self._connect()
                continue
            self._changed.clear()
            await self._changed.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Close the connection. A task that waits for a notification gets the end of the iteration."""
        self._closed = True
        self._changed.set()
        connection, self._connection = self._connection, None
        if connection is not None:
            await _close(connection)

    # -----------------------------------------------------------------------------------------------------------------
    # The connection

    async def _connect(self) -> None:
        """Connect, as often as it takes, and listen. The gap is the first thing in the queue then."""
        if self._heard_at is not None and time.monotonic() - self._heard >= _QUIET:
            self._in_vain = 0
            await self._pause(self._max_idle)
        elif self._in_vain > 1:  # a server can accept every connection and end it at once
            await self._pause(_pause_after(self._in_vain))
        began, failures = time.monotonic(), 0
        while not self._closed:
            try:
                connection = await self._connector.connect()
                await self._start(connection)
            except Exception as error:
                if not is_retryable(error):
                    raise
                if not failures:
                    what = str(error) if isinstance(error, NeonAsyncError) else type(error).__name__
                    log(
                        logging.WARNING,
                        "%(endpoint)s: cannot listen, retrying: %(reason)s",
                        endpoint=self._name,
                        event="listen_failed",
                        reason=escape(what),
                        error=type(error).__name__,
                    )
                failures += 1
                await self._pause(_pause_after(failures))
            else:
                if failures:
                    log(
                        logging.WARNING,
                        "%(endpoint)s: listening again after %(seconds).2f s, failed connects: %(failures)d",
                        endpoint=self._name,
                        event="listening",
                        seconds=time.monotonic() - began,
                        failures=failures,
                    )
                return

    async def _start(self, connection: Any) -> None:
        """Listen on a new connection. If that fails, the connection is closed."""
        try:
            for channel in self._channels:
                await connection.add_listener(channel, self._take)
        except BaseException:
            connection.terminate()
            raise
        if self._closed:  # meanwhile
            await _close(connection)
            return
        self._queue.appendleft(Gap(self._heard_at))  # in front of what has come since the first LISTEN
        self._connection = connection
        self._note_life()
        connection.add_termination_listener(self._forget)
        if connection.is_closed():
            self._forget(connection)

    async def _pause(self, seconds: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._closed:
                    await self._changed.wait()
                    self._changed.clear()

    def _take(self, connection: object, pid: int, channel: str, payload: object) -> None:
        if len(self._queue) < self._queue_size:
            self._queue.append(Notification(channel, str(payload), pid))
        elif not isinstance(self._queue[-1], Gap):
            # A slow consumer: from here on notifications are missing.
            self._queue.append(Gap(datetime.now(UTC)))
        self._note_life()
        self._in_vain = 0
        self._changed.set()

    def _forget(self, connection: object) -> None:
        self._connection = None
        self._in_vain += 1
        self._changed.set()

    def _note_life(self) -> None:
        self._heard_at, self._heard = datetime.now(UTC), time.monotonic()


def _pause_after(failures: int) -> float:
    """Return the seconds until the next attempt, after so many failures in a row: random between two bounds."""
    return random.uniform(_PAUSE_BASE, backoff(_PAUSE_BASE, failures, _PAUSE_CAP))  # noqa: S311


async def _close(connection: Any) -> None:
    """Close a connection politely, but within bounded time."""
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            await connection.close()
    except Exception:  # noqa: BLE001  it ends, one way or the other
        connection.terminate()
