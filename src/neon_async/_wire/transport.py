"""The transport that a finished session writes to.

It counts writes, so that a connection on which nothing was sent needs no reset, and it sends statements ahead: their
answers are read here and never reach asyncpg. It must not know what is written, nor what a statement is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, cast

# What is called with the answer to a statement that was sent ahead: the transaction status of its ReadyForQuery (b"I",
# b"T" or b"E"), and the body of its ErrorResponse, if there was one.
Answer: TypeAlias = Callable[[bytes, bytes | None], None]

_HEADER = struct.Struct("!cI")
_HEADER_SIZE = 5
# Messages that may come at any time and belong to no statement (PostgreSQL documentation, section 54.2.7).
_ASYNCHRONOUS = frozenset({b"S", b"A", b"N"})
# What a simple Query may be answered with besides (section 54.2.2): RowDescription, DataRow, CommandComplete,
# EmptyQueryResponse, ErrorResponse, ReadyForQuery. A COPY is never sent ahead.
_ANSWER = frozenset({b"T", b"D", b"C", b"I", b"E", b"Z"})
# Fields of an ErrorResponse that ends the session (section 54.8). PgBouncer (1.24) sends "S" only.
_FATAL = frozenset({b"VFATAL", b"VPANIC", b"SFATAL", b"SPANIC"})
# How every ErrorResponse ends, and how long those that end a session are at most, so that no large data is searched.
_END_OF_ERROR = b"\0\0"
_LAST_WORDS_SIZE = 8192
# Flush (section 54.7), and after which Execute messages of a batch it follows.
_FLUSH = b"H\0\0\0\4"
_FLUSHED_EXECUTES = 16
_EXECUTES_PER_FLUSH = 16
# ReadyForQuery, but for the status of the transaction.
_READY = b"Z\0\0\0\5"
_READY_OUTSIDE, _READY_FAILED = _READY + b"I", _READY + b"E"  # outside of a transaction, in a failed one
_READY_SIZE = 6
# As much as asyncio and uvloop read at once, and more than the 16 KiB of a TLS record (RFC 8446, section 5.1).
_READ_BUFFER_SIZE = 256 * 1024


class SessionTransport(asyncio.Transport):
    """A transport over a TLS transport. It counts writes and sends statements ahead.

    Attributes:
        writes: How often anything was written.
        session: What `_driver` keeps for the connection.
    """

    __slots__ = ("_executes", "_flusher", "_held", "_stream", "_transport", "session", "writes")

    def __init__(self, transport: asyncio.Transport) -> None:
        # Not super().__init__(): get_extra_info() is the TLS transport's.
        self._transport = transport
        self._stream: Stream | None = None
        self._held = b""  # statements sent ahead that wait to be written together with what follows
        self._flusher: _Flusher | None = None
        self._executes: int | None = None  # how many Execute messages were written since `flush_executes()`
        self.session: object = None
        self.writes = 0

    def __repr__(self) -> str:
        return f"<SessionTransport {self.writes} writes over {self._transport!r}>"

    def startup_of(self, protocol: asyncio.Protocol) -> bytes:
        """Give this transport to the session's protocol, and return what it writes at once: its StartupMessage.

        The login sends that, together with its own first message where it may: one system call and one packet.
        """
        transport, startup = self._transport, _Startup(self._transport)
        self._transport = cast(asyncio.Transport, startup)
        try:
            protocol.connection_made(self)
        finally:
            self._transport = transport
        return bytes(startup.written)

    def in_front_of(self, protocol: asyncio.Protocol) -> Stream:
        """Return the protocol for the TLS transport: it keeps the answers to statements sent ahead from `protocol`."""
        self._stream = Stream(self._transport, protocol)
        return self._stream

    # -----------------------------------------------------------------------------------------------------------------
    # Statements sent ahead

    @property
    def unanswered(self) -> int:
        """How many statements were sent ahead and have not been answered."""
        return 0 if self._stream is None else len(self._stream.waiting)

    @property
    def is_settled(self) -> bool:
        """Whether the server has ended an answer with its latest bytes, so that a statement may be sent ahead.

        Otherwise the session's protocol may have a message in part, or the server an implicit transaction open, which
        a Parse without Sync begins.
        """
        # Nothing else can end like this while no statement is under way: NUL ends the texts of all messages that come
        # then, and no length or process id is as large as b"Z\0\0\0".
        stream = self._stream
        return stream is not None and (bool(stream.waiting) or stream.tail.startswith(_READY))

    @property
    def is_at_rest(self) -> bool:
        """Whether everything has been answered, and the server has no transaction open."""
        stream = self._stream
        return stream is not None and stream.tail == _READY_OUTSIDE and not stream.waiting

    @property
    def is_in_failed_transaction(self) -> bool:
        """Whether a transaction is open in which a statement has failed, as far as the server has answered."""
        return self._stream is not None and self._stream.tail == _READY_FAILED

    @property
    def traffic(self) -> tuple[int, int, int]:
        """How much has been written and read: it changes whenever bytes move."""
        return self.writes, 0 if self._stream is None else self._stream.chunks, self.get_write_buffer_size()

    @property
    def last_words(self) -> bytes | None:
        """The body of the ErrorResponse with which the server has ended the session, or None."""
        return None if self._stream is None else self._stream.get_last_words()

    @property
    def failure(self) -> Exception | None:
        """The failure of the network or of TLS that ended the connection, or None."""
        return None if self._stream is None else self._stream.failure

    def send_ahead(self, sql: str | bytes, on_answer: Answer) -> None:
        """Send a simple Query whose answer the session's protocol never sees, and return at once.

        The protocol must be idle: everything that it sent has been answered, and `is_settled` is true. It may send its
        next statement at once; the server answers in order. Until the answer to `sql` has ended, the protocol receives
        only ParameterStatus, NotificationResponse and NoticeResponse, and afterwards everything that follows.

        What is written within the next two iterations of the event loop, such as the statement of a task that waited
        for the connection, is written together with `sql`: one system call, one TLS record and one packet.

        Args:
            sql: One or several statements, but no COPY; as text, or as `query_message()` returns it.
            on_answer: Called when ReadyForQuery has come. Not called when the connection ends before.
        """
        assert self._stream is not None
        self._stream.waiting.append(on_answer)
        self.writes += 1
        if not self._held:
            self._flusher = self._flusher or _flusher_of(asyncio.get_running_loop())
            self._flusher.add(self)
        self._held += sql if isinstance(sql, bytes) else query_message(sql)

    def repeat_end(self) -> None:
        """Have the session's protocol receive the latest ReadyForQuery once more, unless the connection has ended."""
        assert self._stream is not None
        if self.is_settled and not self._transport.is_closing():
            self._stream.repeat_end()

    def add_loss_callback(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once when the connection has ended."""
        assert self._stream is not None
        self._stream.loss_callbacks.append(callback)

    def remove_loss_callback(self, callback: Callable[[], None]) -> None:
        """Undo `add_loss_callback()`."""
        assert self._stream is not None
        with contextlib.suppress(ValueError):  # it was called
            self._stream.loss_callbacks.remove(callback)

    @contextlib.contextmanager
    def calling_on_loss(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have `callback` called if the connection ends during the block."""
        self.add_loss_callback(callback)
        try:
            yield
        finally:
            self.remove_loss_callback(callback)

    async def wait_for_answers(self) -> None:
        """Wait until every statement that was sent ahead has been answered, or the connection has ended."""
        if self.unanswered:
            assert self._stream is not None
            await self._stream.wait()

    # -----------------------------------------------------------------------------------------------------------------
    # The transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        if self._held:
            data, self._held = self._held + data, b""
        self._transport.write(data)

    def flush_executes(self, flush: bool) -> None:
        """Have the server send the results of a batch, which `writelines()` writes, while it executes it, or not.

        PostgreSQL sends them when it has 8 KB of them, or at the end. Without them nothing shows that a batch of a few
        slow statements makes progress. So Flush follows the first Execute messages, and then one in sixteen: one for
        each would be a system call and a TLS record for each row.
        """
        self._executes = 0 if flush else None

    def _with_flushes(self, batch: bytes) -> bytes:
        """Return `batch`, which consists of whole messages, with Flush messages in between."""
        assert self._executes is not None
        pieces, begin, position = [], 0, 0
        while position < len(batch):
            kind, length = _HEADER.unpack_from(batch, position)
            position += 1 + length
            if kind == b"E":
                self._executes += 1
                if self._executes <= _FLUSHED_EXECUTES or self._executes % _EXECUTES_PER_FLUSH == 0:
                    pieces += [batch[begin:position], _FLUSH]
                    begin = position
        return b"".join([*pieces, batch[begin:]])

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.writes += 1
        if self._executes is not None:
            list_of_data = [self._with_flushes(bytes(batch)) for batch in list_of_data]
        self.write_held()
        self._transport.writelines(list_of_data)

    def write_held(self) -> None:
        """Write the statements that were sent ahead, if they have not been written together with others."""
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def write_eof(self) -> None:
        self.write_held()
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def close(self) -> None:
        self.write_held()
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once, even where the event loop is closed."""
        try:
            self._transport.abort()
        except RuntimeError:
            self.shut_down()

    def shut_down(self) -> None:
        """Shut the socket down without the event loop, from any thread. The server learns of it at once."""
        sock = self.get_extra_info("socket")
        if sock is None:
            return
        with contextlib.suppress(OSError):  # it has been closed
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except TypeError:  # uvloop's, which can do nothing but name its descriptor
                with socket.socket(fileno=os.dup(sock.fileno())) as twin:
                    twin.shutdown(socket.SHUT_RDWR)

    def leave_to_parent(self) -> None:
        """Let go of the socket in a forked process: its number leads nowhere then, and the parent's socket stays open.

        The number itself stays in use, so whatever closes it later closes nothing else.
        """
        sock = self.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(nowhere, sock.fileno(), inheritable=False)
            os.close(nowhere)

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


def query_message(sql: str) -> bytes:
    """Return the message of a simple Query."""
    body = sql.encode() + b"\0"
    return _HEADER.pack(b"Q", 4 + len(body)) + body


class _Flusher:
    """Writes what the transports of one event loop hold two iterations later, all of an iteration together."""

    __slots__ = ("_loop", "_transports")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._transports: list[SessionTransport] = []

    def add(self, transport: SessionTransport) -> None:
        """Write what `transport` holds two iterations from now."""
        if not self._transports:
            loop = self._loop()
            assert loop is not None
            loop.call_soon(self._wait_once_more, loop)
        self._transports.append(transport)

    def _wait_once_more(self, loop: asyncio.AbstractEventLoop) -> None:
        transports, self._transports = self._transports, []
        loop.call_soon(self._flush, transports)

    def _flush(self, transports: list[SessionTransport]) -> None:
        for transport in transports:
            if transport._held:  # nearly always a statement has followed
                transport.write_held()


_flushers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Flusher] = weakref.WeakKeyDictionary()


def _flusher_of(loop: asyncio.AbstractEventLoop) -> _Flusher:
    flusher = _flushers.get(loop)
    if flusher is None:
        flusher = _flushers[loop] = _Flusher(loop)
    return flusher


class _ReadBuffer(threading.local):
    """Where the streams of a thread receive bytes. It is in use only during one read of one of them."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_READ_BUFFER_SIZE))


_read_buffer = _ReadBuffer()


class _Startup:
    """A transport that keeps what is written."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.written = bytearray()
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


class Stream(asyncio.BufferedProtocol):
    """What the server sends, in front of the session's protocol: reads the answers to statements sent ahead.

    It is a buffered protocol because asyncio and uvloop allocate 256 KiB for every read of any other protocol, and the
    C library may ask the kernel for so much memory each time.
    """

    def __init__(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        self.waiting: deque[Answer] = deque()
        self.chunks = 0  # how often something was received
        self.tail = b""  # the latest bytes, as many as a ReadyForQuery has
        self._last_words: bytes | None = None
        self.failure: Exception | None = None  # that ended the connection
        self._transport = transport
        self._protocol = protocol
        self._pass_on = protocol.data_received
        self._buffer = b""
        self._view = memoryview(b"")  # what is being read
        # The reset of a pool is the same again and again, and so is its answer.
        self._usual = b""  # the latest answer without an error and without messages that belong to no statement
        self._begin: int | None = 0  # of the answer at hand, or None where it is not such a one, or began before
        self._error: bytes | None = None
        self._ended = False  # the transport was aborted, and nothing that still comes counts
        self._waiters: list[asyncio.Future[None]] = []
        self.loss_callbacks: list[Callable[[], None]] = []

    def get_last_words(self) -> bytes | None:
        """Return the body of the ErrorResponse with which the server has ended the session, or None."""
        return self._last_words if self.tail.endswith(_END_OF_ERROR) else None  # else something came after it

    async def wait(self) -> None:
        """Wait until all answers have come, or the connection has ended."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def get_buffer(self, sizehint: int) -> memoryview:
        self._view = _read_buffer.view  # of the thread that the event loop runs in now
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._view[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Receive bytes that were read elsewhere, too: together with the end of the login."""
        self.chunks += 1
        if self.waiting and not self._ended:
            data = self._read_answers(self._buffer + data if self._buffer else data)
        if not data or self._ended:
            return
        self.tail = data[-_READY_SIZE:] if len(data) >= _READY_SIZE else (self.tail + data)[-_READY_SIZE:]
        if data.endswith(_END_OF_ERROR):
            self._last_words = _fatal_error_at_end(data)
        try:
            self._pass_on(data)
        except Exception:
            # The caller's decoder has ended the connection and failed: asyncpg forgets its call at the end, and then
            # looks for it to report the failure.
            if not self._transport.is_closing():
                raise

    def repeat_end(self) -> None:
        """Pass the latest ReadyForQuery on once more."""
        self._pass_on(self.tail)

    def _read_answers(self, data: bytes) -> bytes:
        """Read `data`, which begins with a message, and return what comes after the last answer that is expected."""
        position, usual = 0, self._usual
        while self.waiting:
            if usual and position == self._begin and data.startswith(usual, position):
                following = position + len(usual)
                self._end_answer(data, following)
            else:
                following = self._read_message(data, position)
            if self._ended:
                return b""
            if not following:
                break
            position = following
        self._begin = 0 if self._begin == position else None
        rest = data[position:]
        if self.waiting:
            self._buffer = rest
            return b""
        self._buffer = b""
        if self._waiters:
            self._release()
        return rest

    def _read_message(self, data: bytes, position: int) -> int:
        """Read the message at `position`, and return where it ends, or 0 if not all of it has come."""
        if len(data) - position < _HEADER_SIZE:
            return 0
        kind, length = _HEADER.unpack_from(data, position)
        if length < _HEADER_SIZE - 1 or not (kind in _ASYNCHRONOUS or kind in _ANSWER):
            self._transport.abort()  # no answer to a simple Query; what follows cannot be understood
            self._ended = True
            return 0
        following: int = position + 1 + length
        if following > len(data):
            return 0
        if kind == b"Z":
            if self._begin is not None:
                self._usual = data[self._begin : following]
            self._end_answer(data, following)
        elif kind in _ASYNCHRONOUS:
            self._begin = None
            self._pass_on(data[position:following])
        elif kind == b"E":
            self._begin = None
            self._error = data[position:following]
        return following

    def _end_answer(self, data: bytes, following: int) -> None:
        """Report the answer that ends in `data` at `following`."""
        self._begin = following
        self.tail = data[following - _READY_SIZE : following]
        error, self._error = self._error, None
        self.waiting.popleft()(self.tail[_HEADER_SIZE:], error and error[_HEADER_SIZE:])
        self._ended = self._transport.is_closing()  # what the answer led to

    def _release(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # What concerns the session's protocol in any case

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failure = exc
        self.waiting.clear()
        self._release()
        if self._error is not None and _is_fatal(self._error[_HEADER_SIZE:]):
            self._last_words, self.tail = self._error[_HEADER_SIZE:], _END_OF_ERROR
            self._pass_on(self._error)  # they are not about one statement
        self._protocol.connection_lost(exc)
        # asyncpg 0.31 keeps its transport: without this, only the garbage collector would free the three of them.
        self._protocol = asyncio.Protocol()
        self._pass_on = self._protocol.data_received
        callbacks, self.loss_callbacks = self.loss_callbacks, []
        for callback in callbacks:
            callback()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


def _fatal_error_at_end(data: bytes) -> bytes | None:
    """Return the body of the ErrorResponse that ends the session, if `data` ends with one."""
    data = data[-_LAST_WORDS_SIZE:]
    position = data.rfind(b"E\0\0")
    while position >= 0:
        body = data[position + _HEADER_SIZE :]
        if _HEADER.unpack_from(data[position:].ljust(_HEADER_SIZE))[1] == len(body) + 4 and _is_fatal(body):
            return body
        position = data.rfind(b"E\0\0", 0, position)
    return None


def _is_fatal(body: bytes) -> bool:
    return not _FATAL.isdisjoint(body.split(b"\0"))
