"""A man in the middle who has a certificate, between a client and a real server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from neon_async.testing._impostor import SERVER_NAME, server_context
from support.signatures import Signed, context_without_checks

__all__ = ("Interceptor", "Message")


@dataclass(frozen=True)
class Message:
    """One message: its sender, its type (empty for the StartupMessage), and its body."""

    sender: str
    kind: bytes
    body: bytes


def _until_ready(messages: list[Message]) -> list[Message]:
    kinds = [one.kind if one.sender == "server" else b"" for one in messages]
    return messages[: kinds.index(b"Z") + 1] if b"Z" in kinds else messages


Rewrite = Callable[[Message], bytes]


def _unchanged(it: Message) -> bytes:
    return it.body


class Interceptor:
    """A man in the middle: terminates TLS with his own certificate, speaks TLS to the real server, and records both.

    Args:
        port: The real server's port.
        certificate: What clients are shown. With the real server's own, which no attacker has, this is a recorder.
        direct: Whether clients come with direct TLS or with an SSLRequest.
        rewrite: Returns the body to pass on for each message of the server.
    """

    def __init__(self, port: int, certificate: Signed, *, direct: bool = True, rewrite: Rewrite = _unchanged) -> None:
        self.port = 0
        self.connections: list[list[Message]] = []
        self._target = port
        self._context = server_context(certificate.chain)
        self.direct = direct
        self._rewrite = rewrite
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def dsn(self, dsn: str) -> str:
        """Return `dsn` with the interceptor's port in place of the server's."""
        return dsn.replace(f":{self._target}/", f":{self.port}/")

    @property
    def round_trips(self) -> list[int]:
        """How often the server answered the client, for each connection until it was ready."""
        return [
            sum((one.sender, two.sender) == ("client", "server") for one, two in itertools.pairwise(login))
            for login in map(_until_ready, self.connections)
        ]

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._start(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._listener is not None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._start(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        messages: list[Message] = []
        self.connections.append(messages)
        if not self.direct:
            assert await loop.sock_recv(sock, 8) == struct.pack("!II", 8, 80877103)
            await loop.sock_sendall(sock, b"S")
        reader = asyncio.StreamReader()
        try:
            transport, protocol = await loop.connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(reader), sock, ssl=self._context
            )
        except OSError:
            sock.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        from_server, to_server = await asyncio.open_connection(
            "127.0.0.1", self._target, ssl=context_without_checks(), server_hostname=SERVER_NAME
        )
        try:
            await self._forward(reader, writer, from_server, to_server, messages)
        finally:
            for one in (transport, to_server.transport):
                with contextlib.suppress(AttributeError):  # asyncio's abort() fails on a closed one in Python 3.11.2
                    one.abort()

    async def _forward(
        self,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        messages: list[Message],
    ) -> None:
        async def pump(sender: str, source: asyncio.StreamReader, target: asyncio.StreamWriter, kind_size: int) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    kind = await source.readexactly(kind_size)
                    (length,) = struct.unpack("!I", await source.readexactly(4))
                    it = Message(sender, kind, await source.readexactly(length - 4))
                    messages.append(it)
                    body = self._rewrite(it) if sender == "server" else it.body
                    target.write(kind + struct.pack("!I", len(body) + 4) + body)
                    kind_size = 1
            target.close()

        pumps = [
            asyncio.ensure_future(pump("client", from_client, to_server, 0)),
            asyncio.ensure_future(pump("server", from_server, to_client, 1)),
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for one in pumps:
                one.cancel()
