"""Probes for tests: waits, open sockets, secrets in tracebacks, a TCP relay, and the balance of a pool.

They observe the package from outside and use only its public names.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import socket
import stat
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

HANG = 20.0  # Seconds after which a wait in a test fails.


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` returns something true."""
    async with asyncio.timeout(HANG):
        while not condition():
            await asyncio.sleep(0.001)


def open_sockets() -> set[tuple[int, int]]:
    """Return the number and the inode of every open socket of this process."""
    found = set()
    for path in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):
            status = os.fstat(int(path.name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(path.name), status.st_ino))
    return found


@contextlib.asynccontextmanager
async def nothing_is_left() -> AsyncIterator[None]:
    """Check that the block leaves no socket open and no task running."""
    sockets, tasks = open_sockets(), asyncio.all_tasks()
    yield
    await until(lambda: open_sockets() <= sockets and asyncio.all_tasks() <= tasks)


@contextlib.asynccontextmanager
async def nothing_is_reported() -> AsyncIterator[None]:
    """Check that the block leaves no exception that was never retrieved, and that no callback of it fails."""
    loop, reported = asyncio.get_running_loop(), []
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    try:
        yield
        gc.collect(1)
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(handler)
    assert reported == []


def chain_of(error: BaseException) -> list[BaseException]:
    """Return `error` with all its causes, contexts and members of groups."""
    found: list[BaseException] = []
    to_visit: list[BaseException | None] = [error]
    while to_visit:
        one = to_visit.pop()
        if one is not None and all(one is not other for other in found):
            found.append(one)
            to_visit += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return found


def assert_secret_free(error: BaseException, *secrets: str) -> None:
    """Check that no secret is in what an error tracker records of `error`: its texts and the locals of its frames.

    Frames of the tests are left out: a caller's own variables may contain its secrets.
    """
    tests = str(Path(__file__).parents[1])
    for one in chain_of(error):
        texts = [str(one), repr(one), repr(one.args), repr(vars(one)), *getattr(one, "__notes__", ())]
        places = [(type(one).__name__, text) for text in texts]
        for frame, line in traceback.walk_tb(one.__traceback__):
            if not frame.f_code.co_filename.startswith(tests):
                place = f"{type(one).__name__}: {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
                places += [(f"{place}, {name}", repr(value)) for name, value in frame.f_locals.items()]
        for secret in secrets:
            leaks = [place for place, text in places if secret in text]
            assert not leaks, f"the secret is in {leaks}"


@dataclass
class Passage:
    """One connection through a relay: the bytes that the client has sent so far, and what has become of it."""

    sent: bytearray = field(default_factory=bytearray)
    over: bool = False
    forgotten: bool = False
    resets: bool = False


class Relay:
    """A TCP relay in front of a real server that records what clients send.

    Args:
        port: The port of the server on 127.0.0.1.
        refuse: Called with the first bytes of each connection. If it returns true, the relay closes the connection
            without an answer.
    """

    def __init__(self, port: int, *, refuse: Callable[[bytes], bool] = lambda _: False) -> None:
        self.port = 0
        self.passages: list[Passage] = []
        self._target = port
        self._refuse = refuse
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def dsn(self, dsn: str) -> str:
        """Return `dsn` with the port of the server replaced by the port of this relay."""
        return dsn.replace(f":{self._target}/", f":{self.port}/")

    def forget(self, *, resets: bool = False) -> None:
        """Forget all connections, as a NAT does: nothing passes on them any more, and none of them ends.

        Args:
            resets: Whether what a client sends on one of them is answered by a reset. By default it is not answered.
        """
        for passage in self.passages:
            passage.forgotten, passage.resets = True, resets

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        while self._tasks:  # a connection may be accepted meanwhile
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)  # gather() may not yield where all have ended, and their callbacks remove them
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # One that is cancelled before it begins runs none of its coroutine.
        task.add_done_callback(lambda task: writer.transport.abort() if task.cancelled() else None)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = Passage()
        self.passages.append(passage)
        try:
            passage.sent += (first := await reader.read(65536))
            if self._refuse(first):
                return
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
            to_server.write(first)
            try:
                await self._pump_both(reader, writer, from_server, to_server, passage)
            finally:
                to_server.transport.abort()
        except ConnectionError:
            writer.transport.abort()
        finally:
            passage.over = True
            writer.close()

    async def _pump_both(
        self,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        passage: Passage,
    ) -> None:
        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, kept: bytearray) -> None:
            while data := await source.read(65536):
                if passage.resets and source is from_client:
                    raise ConnectionResetError
                if not passage.forgotten:
                    kept += data
                    target.write(data)
                    await target.drain()
            if passage.forgotten:
                await asyncio.Event().wait()
            with contextlib.suppress(OSError):  # the other side has closed both directions
                target.write_eof()

        pumps = [
            asyncio.ensure_future(pump(from_client, to_server, passage.sent)),
            asyncio.ensure_future(pump(from_server, to_client, bytearray())),
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for one in pumps:
                one.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that answers no SYN, because its accept queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.2)
            try:
                filler.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


def resolve_to(monkeypatch: Any, *addresses: tuple[str, int]) -> list[str]:
    """Resolve every name to `addresses`, in this order. Return the list of resolved names."""
    asked: list[str] = []
    genuine = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **keywords: Any) -> list[Any]:
        if host is None or re.fullmatch(r"[0-9.]+|.*:.*", host):
            return genuine(host, port, *args, **keywords)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@contextlib.contextmanager
def slow_resolver(monkeypatch: Any) -> Iterator[list[str]]:
    """Let every look-up of a name wait until the end of the block. Yield the list of the names that are asked for."""
    asked: list[str] = []
    released, genuine = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **keywords: Any) -> list[Any]:
        if host is None or re.fullmatch(r"[0-9.]+|.*:.*", host):
            return genuine(host, port, *args, **keywords)
        asked.append(host)
        released.wait(3 * HANG)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        try:
            yield asked
        finally:
            released.set()


def assert_balanced(pool: Any) -> None:
    """Check that `stats()` balance: each slot is in one state, and each dial and each loan is accounted for."""
    stats = pool.stats()
    states = (stats.in_use, stats.idle, stats.checking, stats.resetting, stats.connecting, stats.vacant)
    assert sum(states) == stats.max_size, stats
    assert stats.dials == stats.dial_failures + stats.terminations + stats.size, stats
    assert stats.acquires == stats.releases + stats.in_use, stats


async def assert_whole(pool: Any) -> None:
    """Check that no slot is lost: the pool lends all its connections at once, each works, and `stats()` balance."""
    async with asyncio.timeout(HANG):
        connections = await asyncio.gather(*(pool.acquire(timeout=HANG) for _ in range(pool.get_max_size())))
        backends = {await connection.fetchval("SELECT pg_backend_pid()") for connection in connections}
        assert len(backends) == pool.get_max_size()
        for connection in connections:
            await pool.release(connection)
    assert_balanced(pool)
    stats = pool.stats()
    assert (stats.in_use, stats.waiting, stats.idle + stats.vacant) == (0, 0, stats.max_size), stats


class ResetInBackground(neon_async.Connection):
    """A class with a reset query of its own, although it is ours: it is sent in the background, not ahead."""

    __slots__ = ()

    def get_reset_query(self) -> str:
        return super().get_reset_query()


Server: TypeAlias = LocalPostgres | LocalEndpoint


def make_pool(server: Server, **keywords: Any) -> neon_async.Pool:
    """Return a pool of connections to `server` that is not open yet."""
    return neon_async.create_pool(server.dsn, trust_anchor=server.trust_anchor, **keywords)


@contextlib.asynccontextmanager
async def connected(server: Server, **keywords: Any) -> AsyncIterator[Any]:
    """Yield a connection outside any pool, and close it afterwards."""
    connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor, **keywords)
    try:
        yield connection
    finally:
        await connection.close()


async def sessions(admin: Any, name: str) -> int:
    """Return the number of sessions with this application name on the server."""
    count: int = await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name)
    return count


async def until_gone(admin: Any, name: str) -> None:
    """Wait until the server has no session with this application name."""
    async with asyncio.timeout(HANG):
        while await sessions(admin, name):
            await asyncio.sleep(0.001)


def password_of(server: Server) -> str:
    """Return the password in the DSN of `server`."""
    return server.dsn.split(":")[2].partition("@")[0]


async def until_settled(pool: neon_async.Pool) -> None:
    """Wait until the pool does nothing in the background and has no waiters, then check that `stats()` balance."""

    def settled() -> bool:
        now = pool.stats()
        return now.checking == now.resetting == now.connecting == now.waiting == 0

    await until(settled)
    assert_balanced(pool)
