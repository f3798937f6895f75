"""Calls that move many rows: one cancellation ends them, and so does a lost connection or that no byte moves.

`command_timeout` is the time for one statement. A COPY or an `executemany()` may rightly take hours, so it is the time
that they may go without any progress instead. A `timeout=` of the call bounds the whole call, as for any other.

Knows one connection, and nothing of what the rows are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from . import holder
from .losses import CLOSED_HERE, closed_in_operation, lost_error, outcome_of, stalled, timed_out

if TYPE_CHECKING:
    from .._wire.transport import SessionTransport

_T = TypeVar("_T")

# A call is looked at so often within its limit. It has to be found without progress each time: one look after a pause
# of the event loop says nothing.
_LOOKS = 4
# Seconds: asyncpg takes None for `command_timeout`, and has no public value for none.
_UNBOUNDED = 1e9
# Seconds in which asyncpg ends a call by itself when the connection is lost. It does not where the call waits for room
# in the send buffer, for the caller's source, or begins to wait for data only afterwards.
_LOSS_GRACE = 0.1
# asyncpg's own timer for COPY must come after ours, by whatever an event loop may be late.
_LATER = 0.5


class Progress:
    """Watches that bytes move on a connection, and ends the block that it surrounds with a `TimeoutError` if not.

    It also ends the block when the connection is lost, but waits for a sink to return. The time that the caller's own
    code takes, the source or the sink of a COPY, does not count.

    Args:
        transport: The transport of the session.
        limit: The seconds without progress, or None for any number.

    Attributes:
        is_lost: Whether the connection has ended.
    """

    def __init__(self, transport: SessionTransport, limit: float | None) -> None:
        self.is_lost = False
        self._in_sink = False
        self._transport = transport
        self._limit = limit
        self._deadline = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._seen = transport.traffic
        self._looks = 0
        self._callers_turns = 0

    @property
    def has_stalled(self) -> bool:
        """Whether the time is over."""
        return self._deadline.expired()

    async def __aenter__(self) -> Progress:
        await self._deadline.__aenter__()
        self._transport.add_loss_callback(self._note_loss)
        self._look_later()
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._transport.remove_loss_callback(self._note_loss)
        if self._timer is not None:
            self._timer.cancel()
        await self._deadline.__aexit__(kind, error, traceback)

    @contextlib.contextmanager
    def callers_turn(self) -> Iterator[None]:
        """Do not count the time of the block."""
        self._callers_turns += 1
        try:
            yield
        finally:
            self._callers_turns -= 1

    def of_source(self, source: Any) -> Any:
        """Return what COPY reads from, such that the time that it takes does not count."""
        asynchronous = isinstance(source, AsyncIterable) and not hasattr(source, "read")
        return _Source(self, source) if asynchronous and not isinstance(source, os.PathLike) else source

    def of_sink(self, sink: Any) -> Any:
        """Return what COPY writes to, such that the time that it takes does not count."""
        if not callable(sink) or hasattr(sink, "write") or isinstance(sink, os.PathLike):
            return sink

        async def write(data: bytes) -> None:
            self._in_sink = True
            try:
                with self.callers_turn():
                    await sink(data)
            finally:
                self._in_sink = False
                if self.is_lost:
                    self._end_after(_LOSS_GRACE)

        return write

    def _note_loss(self) -> None:
        self.is_lost = True
        if not self._in_sink:
            self._end_after(_LOSS_GRACE)

    def _end_after(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._deadline.reschedule, loop.time())

    def _look_later(self) -> None:
        if self._limit is not None:
            self._timer = asyncio.get_running_loop().call_later(self._limit / _LOOKS, self._look)

    def _look(self) -> None:
        traffic = self._transport.traffic
        if traffic != self._seen or self._callers_turns:
            self._seen, self._looks = traffic, 0
        else:
            self._looks += 1
        if self._looks == _LOOKS:
            self._end_after(0.0)
        else:
            self._look_later()


class _Source:
    """An asynchronous iterable of the caller's."""

    def __init__(self, progress: Progress, items: AsyncIterable[Any]) -> None:
        self._progress = progress
        self._items = aiter(items)

    def __aiter__(self) -> _Source:
        return self

    async def __anext__(self) -> Any:
        with self._progress.callers_turn():
            item = await anext(self._items)
        if self._progress.is_lost:  # asyncpg would go on to write
            raise closed_in_operation()
        return item


@contextlib.asynccontextmanager
async def bounded(connection: Any, timeout: float | None) -> AsyncIterator[tuple[Progress, float | None]]:
    """Bound a call that moves many rows: by `timeout`, or else by `command_timeout` without progress.

    Yields:
        The progress of the call, and the `timeout` to give to asyncpg.

    Raises:
        QueryTimeoutError: The time is over.
        ConnectionLostError: The connection was lost.
    """
    session, began = holder.own_session(connection), time.monotonic()
    limit = None if timeout is not None else holder.timeout_of(connection, None)
    progress = Progress(holder.transport_of(connection), limit)
    # asyncpg's own timer for COPY ends neither the statement that asks for the columns nor the wait for room in the
    # send buffer, and in between it fails with AttributeError. The cancellation of ours ends them all, and comes first.
    theirs = _UNBOUNDED if timeout is None else timeout + _LATER
    try:
        async with asyncio.timeout(timeout), progress:
            yield progress, theirs
    except TimeoutError as error:
        if progress.is_lost:
            outcome = outcome_of("COPY", in_transaction=holder.has_open_transaction(connection))
            raise lost_error(session.host, session.loss or CLOSED_HERE, outcome) from None
        elapsed = time.monotonic() - began
        if progress.has_stalled and limit is not None:
            raise stalled(session.host, elapsed, limit) from error
        failure = timed_out(session.host, error, elapsed, timeout, None)
        if failure is error:
            raise
        raise failure from error


async def run_many(
    connection: Any, call: Callable[[float | None], Coroutine[Any, Any, _T]], timeout: float | None
) -> _T:
    """Run a call that executes a statement many times, within `timeout` or else as long as it makes progress.

    Args:
        connection: The connection.
        call: Makes the call, with the `timeout` to give to asyncpg.
        timeout: Seconds for the whole call, or None.
    """
    if timeout is not None:
        return await cancellable(connection, call(timeout))
    async with bounded(connection, None) as (_, seconds):
        return await cancellable(connection, call(seconds))


async def cancellable(connection: Any, call: Coroutine[Any, Any, _T]) -> _T:
    """Run a call that sends many rows such that one cancellation ends it.

    asyncpg swallows a cancellation that comes while it waits for room in the send buffer, and then waits for the
    answer to a message that was never sent to its end (`finally: return await waiter` in `bind_execute_many`): for
    ever, even on a healthy server. Such a connection is of no use any more and is terminated.
    """
    running = asyncio.ensure_future(call)
    try:
        await asyncio.wait({running})
    except BaseException:
        running.cancel()
        running.add_done_callback(_retrieve)
        try:
            await asyncio.wait({running}, timeout=holder.own_session(connection).cancel_time)
        finally:
            if not running.done():
                holder.end_lost(
                    connection, "a call that sends many rows did not end when it was cancelled, so it was terminated"
                )
        raise
    return running.result()


def _retrieve(ended: asyncio.Future[Any]) -> None:
    if not ended.cancelled():
        ended.exception()
