"""The transport that a finished session writes to.

It counts writes, so that a connection on which nothing was sent needs no reset, and it sends statements ahead: their
answers are read here and never reach asyncpg. It must not know what is written, nor what a statement is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

# What is called with the answer to a statement that was sent ahead: the transaction status of its ReadyForQuery (b"I",
# b"T" or b"E"), and the body of its ErrorResponse, if there was one.
Answer: TypeAlias = Callable[[bytes, bytes | None], None]

_HEADER = struct.Struct("!cI")
_HEADER_SIZE = 5
# Messages that may come at any time and belong to no statement (PostgreSQL documentation, section 54.2.7).
_ASYNCHRONOUS = frozenset({b"S", b"A", b"N"})
# What a simple Query may be answered with besides (section 54.2.2), and has to be read over: RowDescription, DataRow,
# CommandComplete, EmptyQueryResponse. A COPY is never sent ahead.
_PASSED_OVER = frozenset({b"T", b"D", b"C", b"I"})


class SessionTransport(asyncio.Transport):
    """A transport over a TLS transport. It counts writes and sends statements ahead.

    Attributes:
        writes: How often anything was written.
        session: What `_driver` keeps for the connection.
    """

    __slots__ = ("_answers", "_transport", "session", "writes")

    def __init__(self, transport: asyncio.Transport) -> None:
        # Not super().__init__(): get_extra_info() is the TLS transport's.
        self._transport = transport
        self._answers: _Answers | None = None
        self.session: object = None
        self.writes = 0

    def __repr__(self) -> str:
        return f"<SessionTransport {self.writes} writes over {self._transport!r}>"

    # -----------------------------------------------------------------------------------------------------------------
    # Statements sent ahead

    @property
    def unanswered(self) -> int:
        """How many statements were sent ahead and have not been answered."""
        return 0 if self._answers is None else len(self._answers.waiting)

    def send_ahead(self, sql: str, on_answer: Answer) -> None:
        """Send a simple Query whose answer the session's protocol never sees, and return at once.

        The protocol must be idle: everything that it sent has been answered. It may send its next statement at once;
        the server answers in order. Until the answer to `sql` has ended, a protocol of ours stands in front: it passes
        ParameterStatus, NotificationResponse and NoticeResponse on, and afterwards everything that follows.

        Args:
            sql: One or several statements, but no COPY.
            on_answer: Called when ReadyForQuery has come. Not called when the connection ends before.
        """
        if self._answers is None:
            protocol = self._transport.get_protocol()
            self._answers = _Answers(self._transport, cast(asyncio.Protocol, protocol))
        self._answers.expect(on_answer)
        body = sql.encode() + b"\0"
        self.write(struct.pack("!cI", b"Q", 4 + len(body)) + body)

    async def wait_for_answers(self) -> None:
        """Wait until every statement that was sent ahead has been answered, or the connection has ended."""
        if self.unanswered:
            assert self._answers is not None
            await self._answers.wait()

    # -----------------------------------------------------------------------------------------------------------------
    # The transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        self._transport.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.writes += 1
        self._transport.writelines(list_of_data)

    def write_eof(self) -> None:
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once, even where the event loop is closed."""
        try:
            self._transport.abort()
        except RuntimeError:
            sock = self.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._transport.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class _Answers(asyncio.Protocol):
    """Reads the answers to statements that were sent ahead, in front of the session's protocol."""

    def __init__(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        self.waiting: deque[Answer] = deque()
        self._transport = transport
        self._protocol = protocol
        self._buffer = b""
        self._error: bytes | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def expect(self, on_answer: Answer) -> None:
        """Stand in front of the session's protocol until one more answer has come."""
        if not self.waiting:
            self._transport.set_protocol(self)
        self.waiting.append(on_answer)

    async def wait(self) -> None:
        """Wait until all answers have come, or the connection has ended."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        position, end = 0, len(data)
        while self.waiting and end - position >= _HEADER_SIZE:
            kind, length = _HEADER.unpack_from(data, position)
            following = position + 1 + length
            if following > end:
                break
            if kind in _ASYNCHRONOUS:
                self._protocol.data_received(data[position:following])
            elif kind == b"E":
                self._error = data[position + _HEADER_SIZE : following]
            elif kind == b"Z":
                self._end_one(data[position + _HEADER_SIZE : following])
            elif kind not in _PASSED_OVER:
                self._transport.abort()  # no answer to a simple Query; what follows cannot be understood
                return
            position = following
            if self._transport.is_closing():
                return  # what the answer led to
        self._buffer = data[position:]
        if not self.waiting:
            rest, self._buffer = self._buffer, b""
            self._transport.set_protocol(self._protocol)
            self._release()
            if rest:
                self._protocol.data_received(rest)

    def _end_one(self, status: bytes) -> None:
        error, self._error = self._error, None
        self.waiting.popleft()(status, error)

    def _release(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # What concerns the session's protocol meanwhile

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.clear()
        self._release()
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()
