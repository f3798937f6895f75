"""`LocalEndpoint`: a byte relay that sleeps, wakes, stalls and breaks as the way to a Neon compute does, for tests.

It moves bytes between non-blocking sockets in callbacks of the running loop. There is no task and nothing is awaited,
so what a method does is done when it returns, and what is closed is closed. It must not know what the bytes mean: TLS,
and the login inside it, stay end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias
from urllib.parse import urlsplit

from neon_async._errors import ConfigurationError, NeonAsyncError

_ADDRESS = "127.0.0.1"
_BACKLOG = 4096  # Connects that come all at once are counted all at once. The kernel's own limit may be lower.
_CHUNK = 65536
_MOST_HELD = 1 << 20  # Bytes held in each direction of a connection. Beyond, the sender has to wait.
_MOST_UNREAD = 1 << 26  # Bytes. More than a kernel holds of one connection (net.ipv4.tcp_rmem: a few MB).
_LINGER_ZERO = struct.pack("ii", 1, 0)  # SO_LINGER on, with 0 s: close() sends RST (socket(7))

_State: TypeAlias = Literal["new", "awake", "suspended", "waking", "closed"]


class _Server(Protocol):
    @property
    def dsn(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def trust_anchor(self) -> bytes: ...


class LocalEndpointError(NeonAsyncError, RuntimeError):
    """`LocalEndpoint` was used outside of its `async with` block, or entered twice."""


class LocalEndpoint:
    """A relay in front of a server on this machine, which sleeps like a Neon compute, and fails when told to.

    It listens on a free port of 127.0.0.1 as long as the `async with` block lasts, and can stand wherever the server
    can: `dsn` and `trust_anchor` are the server's, but for the port. Certificate, login and queries are the real ones,
    as TLS passes through.

        async with LocalPostgres() as server, LocalEndpoint(server) as endpoint:
            async with neon_async.create_pool(endpoint.dsn, trust_anchor=endpoint.trust_anchor) as pool:
                endpoint.suspend()
                await pool.fetchval("SELECT 1")
                assert endpoint.wakes == 1

    At first it is awake. `suspend()` ends every connection; the next connect wakes it, which takes `wake_time`.
    Freezing and refusing are independent of sleep and of each other.

    Two things a Neon compute does are missing. It tells clients of a direct host why it ends their sessions (SQLSTATE
    57P01), which nobody can say inside TLS that passes through; here they see what those of a pooled host see, the bare
    end. And its proxy answers TLS and login before the compute is awake; here a connect is silent until then.

    Works on asyncio and uvloop, on Linux and macOS. The server may live in another event loop. Call the methods in the
    loop, and the thread, that entered the block. One object is entered once.

    Parameters:
        server: the `LocalPostgres`, or anything else with its `dsn`, `port` and `trust_anchor` that listens on
            127.0.0.1; another `LocalEndpoint` too. While it takes no connections, clients see theirs reset.
        wake_time: seconds from the connect that wakes it until bytes pass; 0 or more. Neon needs a few hundred ms.
        suspend_after: seconds without a connect and without a byte from any client after which it suspends by itself;
            above 0. None: never. A query on its way is no activity, unlike on Neon, as nothing tells it from an open
            but idle connection: take more than the longest query.
        delay: seconds that each byte waits, in each direction: half of the round trip; 0 or more. It can be changed any
            time, for what comes later. TCP's own handshake, done by the kernel, is not delayed.

    Raises:
        ConfigurationError: a time is negative or not finite, or `suspend_after` is 0.
    """

    # From the start of the block on.
    _loop: asyncio.AbstractEventLoop
    _listener: socket.socket
    _target: tuple[str, int]

    def __init__(
        self, server: _Server, *, wake_time: float = 0.5, suspend_after: float | None = None, delay: float = 0.0
    ) -> None:
        if suspend_after == 0:
            raise ConfigurationError("suspend_after=0 leaves no time to connect; give more seconds, or None for never")
        self._server = server
        self._wake_time = _checked_seconds("wake_time", wake_time)
        self._suspend_after = math.inf if suspend_after is None else _checked_seconds("suspend_after", suspend_after)
        self._delay = _checked_seconds("delay", delay)
        self._state: _State = "new"
        self._frozen = False
        self._refusing = False
        self._wakes = 0
        self._connects = 0
        self._client_bytes = 0
        self._last_activity = -math.inf
        self._alarm: asyncio.Handle | None = None
        self._connections: dict[_Connection, None] = {}  # in the order of their connects
        self._port = 0

    def __repr__(self) -> str:
        if self._state == "new":
            return "<LocalEndpoint: new>"
        told = [
            self._state,
            *["frozen"] * self._frozen,
            *["refusing"] * self._refusing,
            _counted(self.connections, "connection"),
            _counted(self.wakes, "wake"),
        ]
        return f"<LocalEndpoint on {_ADDRESS}:{self._port}: {', '.join(told)}>"

    @property
    def host(self) -> str:
        """The server's name, for which its certificate is issued. The relay listens on 127.0.0.1."""
        return urlsplit(self._server.dsn).hostname or ""

    @property
    def port(self) -> int:
        """The TCP port of the relay on 127.0.0.1.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        return self._port

    @property
    def dsn(self) -> str:
        """The server's connection string with the relay's port. It verifies only together with `trust_anchor`.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        parts = urlsplit(self._server.dsn)
        netloc = parts.netloc.removesuffix(f":{parts.port}")
        return parts._replace(netloc=f"{netloc}:{self.port}").geturl()

    @property
    def trust_anchor(self) -> bytes:
        """The server's: the certificate, PEM, of the authority that issued its certificate."""
        return self._server.trust_anchor

    @property
    def state(self) -> _State:
        """`awake`, `suspended` or `waking`; `new` before the `async with` block and `closed` after it."""
        return self._state

    @property
    def wakes(self) -> int:
        """How often a connect has found it suspended."""
        return self._wakes

    @property
    def connects(self) -> int:
        """How many TCP connections clients have made so far, the refused ones included."""
        return self._connects

    @property
    def connections(self) -> int:
        """How many connections of clients are open now, those that wait for it to wake included."""
        return len(self._connections)

    @property
    def client_bytes(self) -> int:
        """How many bytes of clients have been read so far, those of TLS included. An idle pool adds none."""
        return self._client_bytes

    @property
    def delay(self) -> float:
        """Seconds that each byte waits, in each direction.

        Raises:
            ConfigurationError: set to a negative time or one that is not finite.
        """
        return self._delay

    @delay.setter
    def delay(self, seconds: float) -> None:
        self._delay = _checked_seconds("delay", seconds)

    async def __aenter__(self) -> Self:
        """Begin to listen.

        Raises:
            LocalEndpointError: it was entered before.
        """
        if self._state != "new":
            raise LocalEndpointError("a LocalEndpoint can be entered once; make another one")
        self._target = (_ADDRESS, self._server.port)
        self._loop = asyncio.get_running_loop()
        self._listener = socket.create_server((_ADDRESS, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._take_connect)
        self._come_awake()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every connection and the port."""
        self.suspend()
        self._state = "closed"
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def suspend(self) -> None:
        """Close every connection and sleep until the next connect, also if frozen.

        Clients see the end of the stream (FIN), after which the kernel answers what they still send with RST. Bytes
        that have not passed yet are lost. The server finds its side closed when it next reads or writes.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        self._state = "suspended"
        self._disarm()
        for connection in list(self._connections):
            connection.end(reset=False)

    def cut(self) -> None:
        """Reset every connection (RST), also if frozen. Bytes that have not passed yet are lost. An endpoint
        that is awake or waking stays so.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        for connection in list(self._connections):
            connection.end(reset=True)

    def freeze(self) -> None:
        """Let nothing pass any more, and close and answer nothing, until `thaw()`.

        The kernel still completes new connections; they count in `connects`, wake nothing and hear nothing. It does not
        suspend by itself while frozen.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        self._frozen = True
        self._advance_all()

    def thaw(self) -> None:
        """End `freeze()`: all that was held goes on, in its order.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        self._frozen = False
        self._note_activity()
        self._advance_all()

    def refuse(self) -> None:
        """Reset (RST) each new connection at once, until `accept()`. Open connections stay, and nothing is woken.

        Each refused connect counts in `connects`; for that it is completed first, so clients may see "connection reset"
        where a closed port would be "connection refused".

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        self._refusing = True

    def accept(self) -> None:
        """End `refuse()`.

        Raises:
            LocalEndpointError: outside of the `async with` block.
        """
        self._require_open()
        self._refusing = False

    def _require_open(self) -> None:
        if self._state == "new":
            raise LocalEndpointError("this LocalEndpoint has no port yet; enter it with `async with` first")
        if self._state == "closed":
            raise LocalEndpointError("this LocalEndpoint is closed; make another one")

    def _take_connect(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it went away while it was waiting
            return
        self._connects += 1
        connection = _Connection(self, self._loop, client, self._target)
        self._connections[connection] = None
        self._advance(connection)

    def _advance(self, connection: _Connection) -> None:
        """Bring one connection to where the state of the endpoint lets it be."""
        if self._frozen:
            connection.hold()
        elif self._refusing and not connection.admitted:
            connection.end(reset=True)
        else:
            self._admit(connection)
            if self._state == "awake":
                connection.go_on()

    def _advance_all(self) -> None:
        for connection in list(self._connections):
            self._advance(connection)

    def _admit(self, connection: _Connection) -> None:
        if connection.admitted:
            return
        connection.admitted = True
        if self._state == "suspended":
            self._state = "waking"
            self._wakes += 1
            self._arm(time.monotonic() + self._wake_time, self._come_awake)
        self._note_activity()

    def _come_awake(self) -> None:
        self._state = "awake"
        self._alarm = None
        self._note_activity()
        self._advance_all()

    def _note_activity(self) -> None:
        self._last_activity = time.monotonic()
        # An alarm that is set finds out by itself that there was activity: this is called for every piece of data.
        if self._state == "awake" and self._alarm is None and self._suspend_after < math.inf:
            self._arm(self._last_activity + self._suspend_after, self._fall_asleep)

    def _fall_asleep(self) -> None:
        self._alarm = None
        due = self._last_activity + self._suspend_after
        if time.monotonic() < due:
            self._arm(due, self._fall_asleep)
        elif not self._frozen:  # thaw() sets the alarm again
            self.suspend()

    def _arm(self, due: float, then: Callable[[], None]) -> None:
        """Have `then` called at `due` of the monotonic clock. Not earlier, though uvloop's timers may be a little."""
        self._disarm()
        wait = due - time.monotonic()
        self._alarm = self._loop.call_later(wait, self._arm, due, then) if wait > 0 else self._loop.call_soon(then)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _client_sent(self, size: int) -> None:
        self._client_bytes += size
        self._note_activity()

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)


class _Connection:
    """A client's connection and, once it goes on for the first time, the one to the server that belongs to it."""

    def __init__(
        self, endpoint: LocalEndpoint, loop: asyncio.AbstractEventLoop, client: socket.socket, target: tuple[str, int]
    ) -> None:
        self.admitted = False
        self._endpoint = endpoint
        self._loop = loop
        self._client = client
        self._target = target
        self._server: socket.socket | None = None
        self._over = False
        self._lanes: list[_Lane] = []
        _prepare(client)

    def go_on(self) -> None:
        """Move what can be moved, and go on moving."""
        if self._server is None:
            self._dial()
        elif not self._lanes:
            self._loop.add_writer(self._server, self._dialled)
        for lane in self._lanes:
            if not self._over:
                lane.go_on()

    def hold(self) -> None:
        """Stand still, in both directions and also at their ends."""
        if self._server is not None and not self._lanes:
            self._loop.remove_writer(self._server)
        for lane in self._lanes:
            lane.hold()

    def end(self, *, reset: bool) -> None:
        """Close both sides, by RST or by FIN."""
        if self._over:
            return
        self._over = True
        self.hold()
        self._endpoint._forget(self)
        _close(self._client, reset=reset)
        if self._server is not None:
            _close(self._server, reset=reset)

    def _dial(self) -> None:
        self._server = socket.socket()
        _prepare(self._server)
        if self._server.connect_ex(self._target) in (0, errno.EINPROGRESS):
            self._loop.add_writer(self._server, self._dialled)
        else:
            self.end(reset=True)

    def _dialled(self) -> None:
        """Begin to relay, also when the dial failed: the first read then tells, as of any broken connection."""
        assert self._server is not None
        self._loop.remove_writer(self._server)
        self._lanes = [
            _Lane(self, self._client, self._server, on_bytes=self._endpoint._client_sent),
            _Lane(self, self._server, self._client, on_bytes=lambda _: None),
        ]
        self.go_on()

    def lane_ended(self) -> None:
        """Close both sides if both directions are at their end."""
        if all(lane.over for lane in self._lanes):
            self.end(reset=False)

    @property
    def delay(self) -> float:
        return self._endpoint.delay

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop


class _Lane:
    """One direction of a connection: what `source` sends waits until it is due and goes to `target`, its end included.

    A piece is what one read returned: bytes; no bytes for the end of the stream; None for a reset. Being due when they
    came plus the delay, pieces do not add their delays up, and pass in the order they came.
    """

    def __init__(
        self, connection: _Connection, source: socket.socket, target: socket.socket, *, on_bytes: Callable[[int], None]
    ) -> None:
        self.over = False  # the end has been passed on
        self._connection = connection
        self._loop = connection.loop
        self._source = source
        self._target = target
        self._on_bytes = on_bytes
        self._held: deque[tuple[float, memoryview | None]] = deque()
        self._size = 0
        self._ended = False  # nothing more comes from the source
        self._reading = False
        self._writing = False
        self._timer: asyncio.TimerHandle | None = None

    def go_on(self) -> None:
        """Pass on what is due, and watch for what lets the rest follow: room, time, or more to read."""
        try:
            blocked = self._pass_on()
        except OSError:
            self._connection.end(reset=True)
            return
        if self.over:
            self.hold()
            self._connection.lane_ended()
            return
        self._watch(reading=not self._ended and self._size < _MOST_HELD, writing=blocked)
        if self._held and not blocked and self._timer is None:
            self._timer = self._loop.call_later(max(0.0, self._held[0][0] - time.monotonic()), self._ring)

    def hold(self) -> None:
        """Stand still."""
        self._watch(reading=False, writing=False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        self.go_on()

    def _receive(self) -> None:
        piece: bytes | None = None
        try:
            piece = self._source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            pass  # a reset, which takes its turn behind what came before it
        self._ended = not piece
        self._held.append((time.monotonic() + self._connection.delay, None if piece is None else memoryview(piece)))
        if piece:
            self._size += len(piece)
            self._on_bytes(len(piece))
        self.go_on()

    def _pass_on(self) -> bool:
        """Send what is due, and tell whether the target takes no more now. Raises OSError when one side is gone."""
        while self._held and self._held[0][0] <= time.monotonic():
            due, piece = self._held[0]
            if piece is None:
                raise ConnectionResetError
            if not piece:
                self._target.shutdown(socket.SHUT_WR)
                self.over = True
                self._held.popleft()
                break
            try:
                sent = self._target.send(piece)
            except BlockingIOError:
                return True
            self._size -= sent
            self._held.popleft()
            if sent < len(piece):
                self._held.appendleft((due, piece[sent:]))
        return False

    def _watch(self, *, reading: bool, writing: bool) -> None:
        if reading and not self._reading:
            self._loop.add_reader(self._source, self._receive)
        elif self._reading and not reading:
            self._loop.remove_reader(self._source)
        if writing and not self._writing:
            self._loop.add_writer(self._target, self.go_on)
        elif self._writing and not writing:
            self._loop.remove_writer(self._target)
        self._reading, self._writing = reading, writing


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    with contextlib.suppress(OSError):  # macOS: the other side is gone already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(sock: socket.socket, *, reset: bool) -> None:
    with contextlib.suppress(OSError):  # there is nobody, or (BlockingIOError) nothing, any more
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        else:
            sock.shutdown(socket.SHUT_WR)
            _drain(sock)
    sock.close()


def _drain(sock: socket.socket) -> None:
    """Read what the kernel holds: unread bytes would make a reset of a close (RFC 2525, section 2.17)."""
    for _ in range(_MOST_UNREAD // _CHUNK):  # bounded, as a sender can be faster than we are
        if not sock.recv(_CHUNK):
            break


def _checked_seconds(name: str, seconds: float) -> float:
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(f"{name}={seconds!r} is no time to wait; give seconds, 0 or more")
    return seconds


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
