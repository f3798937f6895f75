"""`LocalEndpoint`: a byte relay for tests that suspends, wakes, stalls and fails like the path to a Neon compute.

It moves bytes between non-blocking sockets in callbacks of the running loop. It has no task and awaits nothing, so that
the work of a method is complete when the method returns. This module must not know the meaning of the bytes: TLS, and
the login inside it, are end to end.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias
from urllib.parse import urlsplit

from .._config.readers import Integer, Seconds
from .._errors import NeonAsyncError
from .._text import counted

_ADDRESS = "127.0.0.1"
_BACKLOG = 4096  # connects that arrive at once are counted at once; the kernel's own limit may be lower
_CHUNK = 65536
_MOST_HELD = 1 << 20  # bytes held in each direction of a connection; above this the sender has to wait
_MOST_UNREAD = 1 << 26  # bytes; more than a kernel holds of one connection (net.ipv4.tcp_rmem: a few MB)
_CALL_TIMEOUT = 10.0  # seconds for a call from another thread, which takes microseconds unless the loop is blocked
_LINGER_ZERO = struct.pack("ii", 1, 0)  # SO_LINGER on, with 0 s: close() sends RST (socket(7))
_PORT, _PORT_OF_TWO = Integer(0, 65535), Integer(0, 65534)
_TIME, _LIMIT = Seconds(zero="at once"), Seconds()

EndpointState: TypeAlias = Literal["new", "awake", "suspended", "waking", "closed"]
"""What a `LocalEndpoint` is doing."""


class _Server(Protocol):
    @property
    def dsn(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def trust_anchor(self) -> bytes: ...


class LocalEndpointError(NeonAsyncError, RuntimeError):
    """`LocalEndpoint` was used outside its `async with` block, or entered twice, or its port is taken."""


class LocalEndpoint:
    """A relay in front of a server on this machine that suspends like a Neon compute and fails on demand.

    It listens on a free port of 127.0.0.1 for the duration of the `async with` block and can replace the server
    anywhere: `dsn` and `trust_anchor` are those of the server, except for the port. TLS passes through, so that
    certificate, login and queries are real.

        async with LocalPostgres() as server, LocalEndpoint(server) as endpoint:
            async with neon_async.create_pool(endpoint.dsn, trust_anchor=endpoint.trust_anchor) as pool:
                endpoint.suspend()
                await pool.fetchval("SELECT 1")
                assert endpoint.wakes == 1

    It is awake at the start. `suspend()` closes every connection; the next connect wakes it, which takes `wake_time`.
    Freezing and refusing are independent of being suspended and of each other.

    It differs from a Neon compute in two ways. Neon sends clients of a direct host an error (SQLSTATE 57P01) before it
    closes their sessions. A relay cannot do that inside TLS, so that its clients see only the end of the connection, as
    clients of a pooled host do on Neon. And Neon's proxy answers TLS and login before the compute is awake. Here a
    connection is silent until then.

    It works on asyncio and uvloop, on Linux and macOS. The server may run in another event loop, and the methods can be
    called in any thread while the event loop that entered the block runs. An object can be entered once.

    Args:
        server: A `LocalPostgres`, or any object with its `dsn`, `port` and `trust_anchor` that listens on 127.0.0.1,
            such as another `LocalEndpoint`. If the server accepts no connections, the connections of clients are reset.
        wake_time: Seconds from the connect that wakes it until bytes pass; 0 or more. Neon needs a few hundred ms.
        suspend_after: Seconds without a connect and without a byte from any client after which it suspends by itself;
            above 0. None (the default): never. Unlike on Neon, a running query does not count as activity, because the
            relay cannot distinguish it from an idle connection. Choose more than the longest query takes.
        delay: Seconds that each byte waits in each direction, which is half of the round trip; 0 or more. It can be
            changed at any time and applies to the bytes that arrive later. The TCP handshake, which the kernel does,
            is not delayed.
        pooler: A `LocalPooler` in front of the same server, which then suspends, wakes and fails together with it, as
            the two hosts of a Neon endpoint do. Clients connect with `pooled_dsn`. Default: none.
        port: The TCP port to listen on; the pooled host then has the next one. Default 0: free ones.
        on_state: A function that is called with the new `state` at each change, in the event loop of the endpoint.
            Default: none.

    Raises:
        ConfigurationError: A time is negative, above 1,000,000,000 or no number, `suspend_after` is 0, or `port` is not
            a port.
    """

    def __init__(
        self,
        server: _Server,
        *,
        wake_time: float = 0.5,
        suspend_after: float | None = None,
        delay: float = 0.0,
        pooler: _Server | None = None,
        port: int = 0,
        on_state: Callable[[EndpointState], None] | None = None,
    ) -> None:
        _PORT.check("port", port) if pooler is None else _PORT_OF_TWO.check("port", port)
        self._loop: asyncio.AbstractEventLoop  # this and the next one are set when the block is entered
        self._thread: int
        self._server = server
        self._pooler = pooler
        self._on_state = on_state
        self._listeners: list[socket.socket] = []
        self._wake_time = _TIME.check("wake_time", wake_time)
        self._suspend_after = math.inf if suspend_after is None else _LIMIT.check("suspend_after", suspend_after)
        self._delay = _TIME.check("delay", delay)
        self._state: EndpointState = "new"
        self._frozen = False
        self._refusing = False
        self._wakes = 0
        self._connects = 0
        self._client_bytes = 0
        self._last_activity = -math.inf
        self._timer: asyncio.Handle | None = None
        self._connections: dict[_Connection, None] = {}  # in the order in which they were accepted
        self._port = port
        self._pooled_port = 0

    def __repr__(self) -> str:
        if self._state == "new":
            return "<LocalEndpoint: new>"
        parts = [
            self._state,
            *["frozen"] * self._frozen,
            *["refusing"] * self._refusing,
            counted(self.connections, "connection"),
            counted(self.wakes, "wake"),
        ]
        return f"<LocalEndpoint on {_ADDRESS}:{self._port}: {', '.join(parts)}>"

    @property
    def host(self) -> str:
        """The host name of the server, for which its certificate is issued. The relay listens on 127.0.0.1."""
        return urlsplit(self._server.dsn).hostname or ""

    @property
    def port(self) -> int:
        """The TCP port of the relay on 127.0.0.1.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._require_open()
        return self._port

    @property
    def dsn(self) -> str:
        """The connection string of the server with the port of the relay. Use it together with `trust_anchor`.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._require_open()
        return _with_port(self._server.dsn, self._port)

    @property
    def pooled_dsn(self) -> str:
        """The connection string of `pooler` with the port of the relay. Use it together with `trust_anchor`.

        Raises:
            LocalEndpointError: The endpoint has no `pooler`, or the `async with` block is not entered, or has been
                left.
        """
        self._require_open()
        if self._pooler is None:
            raise LocalEndpointError(
                "This LocalEndpoint has no pooled host. Create one with pooler=LocalPooler(server)."
            )
        return _with_port(self._pooler.dsn, self._pooled_port)

    @property
    def trust_anchor(self) -> bytes:
        """The PEM certificate of the authority that issued the server's certificate."""
        return self._server.trust_anchor

    @property
    def state(self) -> EndpointState:
        """`awake`, `suspended` or `waking`; `new` before the `async with` block and `closed` after it."""
        return self._state

    @property
    def wakes(self) -> int:
        """How many times a connect has woken it."""
        return self._wakes

    @property
    def connects(self) -> int:
        """How many TCP connections clients have made, including refused ones."""
        return self._connects

    @property
    def connections(self) -> int:
        """How many client connections are open now, including those that wait for it to wake."""
        return len(self._connections)

    @property
    def client_bytes(self) -> int:
        """How many bytes have been read from clients, including those of TLS. An idle pool adds none."""
        return self._client_bytes

    @property
    def delay(self) -> float:
        """Seconds that each byte waits, in each direction.

        Raises:
            ConfigurationError: The new value is negative, above 1,000,000,000 or no number.
        """
        return self._delay

    @delay.setter
    def delay(self, seconds: float) -> None:
        self._delay = _TIME.check("delay", seconds)

    async def __aenter__(self) -> Self:
        """Start to listen.

        Raises:
            LocalEndpointError: It was entered before, or the port is taken.
        """
        if self._state != "new":
            raise LocalEndpointError("A LocalEndpoint can be entered only once. Create a new one.")
        server_port, pooler_port = self._server.port, None if self._pooler is None else self._pooler.port
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        try:
            pooled_port = self._port and self._port + 1
            self._port = self._listen(self._port, server_port)
            if pooler_port is not None:
                self._pooled_port = self._listen(pooled_port, pooler_port)
        except LocalEndpointError:
            self._stop_listening()
            raise
        self._become_awake()
        return self

    def _listen(self, port: int, target: int) -> int:
        """Relay what connects to `port` to `target`, and return the port."""
        try:
            listener = socket.create_server((_ADDRESS, port), backlog=_BACKLOG)
        except OSError as error:
            raise LocalEndpointError(
                f"Port {port} of {_ADDRESS} cannot be used: {error.strerror}. "
                "Choose another port, or end the program that uses it."
            ) from error
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._accept_connection, listener, (_ADDRESS, target))
        bound: int = listener.getsockname()[1]
        return bound

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every connection and the port."""
        self._suspend()
        self._enter("closed")
        self._stop_listening()

    def _stop_listening(self) -> None:
        while self._listeners:
            listener = self._listeners.pop()
            self._loop.remove_reader(listener)
            listener.close()

    def suspend(self) -> None:
        """Close every connection and stay suspended until the next connect, also while frozen.

        Clients see the end of the stream (FIN). If they send more, the kernel answers with RST. Bytes that are still
        held are lost. The server finds its side closed at its next read or write.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._call(self._suspend)

    def cut(self) -> None:
        """Reset every connection (RST), also while frozen.

        Bytes that are still held are lost. An endpoint that is awake or waking remains so.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._call(self._cut)

    def freeze(self) -> None:
        """Pass no bytes, close nothing and answer nothing until `thaw()`.

        The kernel still completes new connections. They count in `connects`, but do not wake it and get no answer. It
        does not suspend by itself while frozen.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._call(self._freeze)

    def thaw(self) -> None:
        """End `freeze()`. Everything that was held is passed on in order.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._call(self._thaw)

    def refuse(self) -> None:
        """Reset (RST) each new connection at once until `accept()`.

        Open connections stay open, and a refused connect does not wake it. Each refused connect counts in `connects`.
        To count it, the relay accepts the connection first, so that clients can see "connection reset" where a closed
        port leads to "connection refused".

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._require_open()
        self._refusing = True

    def accept(self) -> None:
        """End `refuse()`.

        Raises:
            LocalEndpointError: The `async with` block is not entered, or has been left.
        """
        self._require_open()
        self._refusing = False

    def _suspend(self) -> None:
        self._enter("suspended")
        self._cancel_timer()
        for connection in list(self._connections):
            connection.close(reset=False)

    def _cut(self) -> None:
        for connection in list(self._connections):
            connection.close(reset=True)

    def _freeze(self) -> None:
        self._frozen = True
        self._update_all()

    def _thaw(self) -> None:
        self._frozen = False
        self._record_activity()
        self._update_all()

    def _call(self, action: Callable[[], None]) -> None:
        """Carry out `action` in the event loop of the endpoint, and return when it is done."""
        self._require_open()
        if threading.get_ident() == self._thread:
            action()
            return
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def act() -> None:
            try:
                action()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
                raise

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(act)
            concurrent.futures.wait([done], _CALL_TIMEOUT)
        if not done.done():
            raise LocalEndpointError("The event loop of this LocalEndpoint does not run. Keep it running.")
        done.result()

    def _enter(self, state: EndpointState) -> None:
        if state != self._state:
            self._state = state
            if self._on_state is not None:
                self._on_state(state)

    def _require_open(self) -> None:
        if self._state == "new":
            raise LocalEndpointError("This LocalEndpoint has no port yet. Enter it with `async with` first.")
        if self._state == "closed":
            raise LocalEndpointError("This LocalEndpoint is closed. Create a new one.")

    def _accept_connection(self, listener: socket.socket, target: tuple[str, int]) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the client has closed it already
            return
        self._connects += 1
        connection = _Connection(self, self._loop, client, target)
        self._connections[connection] = None
        self._update(connection)

    def _update(self, connection: _Connection) -> None:
        """Apply the state of the endpoint to one connection."""
        if self._frozen:
            connection.pause()
        elif self._refusing and not connection.admitted:
            connection.close(reset=True)
        else:
            self._admit(connection)
            if self._state == "awake":
                connection.resume()

    def _update_all(self) -> None:
        for connection in list(self._connections):
            self._update(connection)

    def _admit(self, connection: _Connection) -> None:
        if connection.admitted:
            return
        connection.admitted = True
        if self._state == "suspended":
            self._wakes += 1
            self._enter("waking")
            self._set_timer(time.monotonic() + self._wake_time, self._become_awake)
        self._record_activity()

    def _become_awake(self) -> None:
        self._enter("awake")
        self._timer = None
        self._record_activity()
        self._update_all()

    def _record_activity(self) -> None:
        self._last_activity = time.monotonic()
        # This runs for every chunk of data, so a timer that is set is not moved; it checks the time when it fires.
        if self._state == "awake" and self._timer is None and self._suspend_after < math.inf:
            self._set_timer(self._last_activity + self._suspend_after, self._suspend_if_idle)

    def _suspend_if_idle(self) -> None:
        self._timer = None
        due = self._last_activity + self._suspend_after
        if time.monotonic() < due:
            self._set_timer(due, self._suspend_if_idle)
        elif not self._frozen:  # thaw() sets the timer again
            self._suspend()

    def _set_timer(self, due: float, then: Callable[[], None]) -> None:
        """Call `then` at `due` of the monotonic clock and not earlier; timers of uvloop can fire a little too early."""
        self._cancel_timer()
        wait = due - time.monotonic()
        if wait > 0:
            self._timer = self._loop.call_later(wait, self._set_timer, due, then)
        else:
            self._timer = self._loop.call_soon(then)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _client_sent(self, size: int) -> None:
        self._client_bytes += size
        self._record_activity()

    def _remove(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)


class _Connection:
    """The connection of a client and, after the first `resume()`, the matching connection to the server."""

    def __init__(
        self, endpoint: LocalEndpoint, loop: asyncio.AbstractEventLoop, client: socket.socket, target: tuple[str, int]
    ) -> None:
        self.admitted = False
        self._endpoint = endpoint
        self._loop = loop
        self._client = client
        self._target = target
        self._server: socket.socket | None = None
        self._closed = False
        self._directions: list[_Direction] = []
        _configure(client)

    def resume(self) -> None:
        """Pass on what is due in both directions, and continue to do so."""
        if self._server is None:
            self._connect()
        elif not self._directions:
            self._loop.add_writer(self._server, self._start_relay)
        for direction in self._directions:
            if not self._closed:
                direction.resume()

    def pause(self) -> None:
        """Stop passing on bytes and ends of streams in both directions."""
        if self._server is not None and not self._directions:
            self._loop.remove_writer(self._server)
        for direction in self._directions:
            direction.pause()

    def close(self, *, reset: bool) -> None:
        """Close both sides with RST or with FIN."""
        if self._closed:
            return
        self._closed = True
        self.pause()
        self._endpoint._remove(self)
        _close(self._client, reset=reset)
        if self._server is not None:
            _close(self._server, reset=reset)

    def _connect(self) -> None:
        self._server = socket.socket()
        _configure(self._server)
        if self._server.connect_ex(self._target) in (0, errno.EINPROGRESS):
            self._loop.add_writer(self._server, self._start_relay)
        else:
            self.close(reset=True)

    def _start_relay(self) -> None:
        """Start to relay. If the connect failed, the first read fails as that of any broken connection."""
        assert self._server is not None
        self._loop.remove_writer(self._server)
        self._directions = [
            _Direction(self, self._client, self._server, on_bytes=self._endpoint._client_sent),
            _Direction(self, self._server, self._client, on_bytes=lambda _: None),
        ]
        self.resume()

    def direction_ended(self) -> None:
        """Close both sides if both directions have ended."""
        if all(direction.ended for direction in self._directions):
            self.close(reset=False)

    @property
    def delay(self) -> float:
        return self._endpoint.delay

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop


class _Direction:
    """One direction of a connection. It holds what `source` sends until it is due, and sends it to `target`.

    A chunk is the result of one read: bytes; empty bytes for the end of the stream; None for a reset. A chunk is due
    when the delay has passed since its arrival. So delays do not add up, and chunks are sent in order.
    """

    def __init__(
        self, connection: _Connection, source: socket.socket, target: socket.socket, *, on_bytes: Callable[[int], None]
    ) -> None:
        self.ended = False  # the end of the stream has been passed on
        self._connection = connection
        self._loop = connection.loop
        self._source = source
        self._target = target
        self._on_bytes = on_bytes
        self._held: deque[tuple[float, memoryview | None]] = deque()
        self._size = 0
        self._source_ended = False
        self._reading = False
        self._writing = False
        self._timer: asyncio.TimerHandle | None = None

    def resume(self) -> None:
        """Send what is due, and wait for what the rest needs: the target's buffer, its due time, or more data."""
        try:
            blocked = self._send_due()
        except OSError:
            self._connection.close(reset=True)
            return
        if self.ended:
            self.pause()
            self._connection.direction_ended()
            return
        self._watch(reading=not self._source_ended and self._size < _MOST_HELD, writing=blocked)
        if self._held and not blocked and self._timer is None:
            self._timer = self._loop.call_later(max(0.0, self._held[0][0] - time.monotonic()), self._timer_fired)

    def pause(self) -> None:
        """Stop reading, writing and waiting."""
        self._watch(reading=False, writing=False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timer_fired(self) -> None:
        self._timer = None
        self.resume()

    def _receive(self) -> None:
        chunk: bytes | None = None
        try:
            chunk = self._source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            pass  # a reset, which is passed on after the chunks before it
        self._source_ended = not chunk
        self._held.append((time.monotonic() + self._connection.delay, None if chunk is None else memoryview(chunk)))
        if chunk:
            self._size += len(chunk)
            self._on_bytes(len(chunk))
        self.resume()

    def _send_due(self) -> bool:
        """Send what is due, and return whether the target's buffer is full.

        Raises:
            OSError: One side has reset or closed the connection.
        """
        while self._held and self._held[0][0] <= time.monotonic():
            due, chunk = self._held[0]
            if chunk is None:
                raise ConnectionResetError
            if not chunk:
                self._target.shutdown(socket.SHUT_WR)
                self.ended = True
                self._held.popleft()
                break
            try:
                sent = self._target.send(chunk)
            except BlockingIOError:
                return True
            self._size -= sent
            self._held.popleft()
            if sent < len(chunk):
                self._held.appendleft((due, chunk[sent:]))
        return False

    def _watch(self, *, reading: bool, writing: bool) -> None:
        if reading and not self._reading:
            self._loop.add_reader(self._source, self._receive)
        elif self._reading and not reading:
            self._loop.remove_reader(self._source)
        if writing and not self._writing:
            self._loop.add_writer(self._target, self.resume)
        elif self._writing and not writing:
            self._loop.remove_writer(self._target)
        self._reading, self._writing = reading, writing


def _with_port(dsn: str, port: int) -> str:
    parts = urlsplit(dsn)
    netloc = parts.netloc.removesuffix(f":{parts.port}")
    return parts._replace(netloc=f"{netloc}:{port}").geturl()


def _configure(sock: socket.socket) -> None:
    sock.setblocking(False)
    with contextlib.suppress(OSError):  # macOS fails if the other side has closed already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(sock: socket.socket, *, reset: bool) -> None:
    with contextlib.suppress(OSError):  # the other side has closed, or (BlockingIOError) there is nothing to drain
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        else:
            sock.shutdown(socket.SHUT_WR)
            _drain(sock)
    sock.close()


def _drain(sock: socket.socket) -> None:
    """Read what the kernel holds: unread bytes would turn the close into a reset (RFC 2525, section 2.17)."""
    for _ in range(_MOST_UNREAD // _CHUNK):  # bounded, because a sender can be faster than this loop
        if not sock.recv(_CHUNK):
            break
