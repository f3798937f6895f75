"""Relay TCP connections to a server, delay every byte, and count the round trips of all clients.

This module knows bytes, their directions and one constant of TLS. It must not know clients or pools.

    python benchmarks/relay.py PORT DELAY

relays to that port until standard input ends, and prints its own port. As a process of its own, its work is not counted
as that of the measured clients.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loops import exact_loop

_HELLO_RETRY_REQUEST = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


@dataclass(frozen=True, slots=True)
class Count:
    """What one action sent.

    A round trip is bytes of a client followed by bytes of the server. Traffic in the background, such as a reset after
    the answer, costs the caller no time, but it is traffic and the server's work.

    Attributes:
        round_trips: Round trips until the action was done.
        in_background: Round trips that followed in the background.
        background_bytes: Bytes that clients sent in the background.
    """

    round_trips: int
    in_background: int
    background_bytes: int


class Relay:
    """A TCP relay that delays each direction and counts round trips.

    Attributes:
        port: The port on 127.0.0.1 on which it listens.
        round_trips: How many round trips it has seen.
        sent: How many bytes clients have sent.
        retries: How many HelloRetryRequests it has seen (RFC 8446, section 4.1.4).

    Args:
        target: The port of the server on this machine.
        delay: Seconds that each byte waits in each direction.
    """

    def __init__(self, target: int, delay: float) -> None:
        self.port = 0
        self.round_trips = 0
        self.sent = 0
        self.retries = 0
        self._target = target
        self._delay = delay
        self._latest = 0.0
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Relay]:
        """Listen on a free port of 127.0.0.1 for the duration of the block."""
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def count(self, action: Awaitable[object]) -> Count:
        """Return what `action` sends, from one silence of all connections to the next."""
        await self._silence()
        before = self.round_trips
        await action
        answered, sent = self.round_trips, self.sent
        await self._silence()
        return Count(answered - before, self.round_trips - answered, self.sent - sent)

    async def _silence(self) -> None:
        loop = asyncio.get_running_loop()
        while (silence := loop.time() - self._latest) < 5 * self._delay:  # noqa: ASYNC110  silence is not an event
            await asyncio.sleep(5 * self._delay - silence)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._relay(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _relay(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        unanswered = False

        def count_client(data: bytes) -> None:
            nonlocal unanswered
            self.sent += len(data)
            unanswered = True

        def count_server(data: bytes) -> None:
            nonlocal unanswered
            self.round_trips += unanswered
            self.retries += _HELLO_RETRY_REQUEST in data
            unanswered = False

        pumps = [
            asyncio.ensure_future(self._pump(from_client, to_server, count_client)),
            asyncio.ensure_future(self._pump(from_server, to_client, count_server)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(self._delay)  # until the bytes that are held have been passed on
        finally:
            for pump in pumps:
                pump.cancel()
            to_server.close()
            to_client.close()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, count: Callable[[bytes], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while data := await source.read(65536):
                self._latest = loop.time()
                count(data)
                loop.call_later(self._delay, target.write, data)


@asynccontextmanager
async def distant(port: int, delay: float) -> AsyncIterator[int]:
    """Yield the port of a relay to `port` that runs in a process of its own and delays each direction by `delay`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__)), str(port), str(delay), stdin=pipe, stdout=pipe
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


async def _main(port: int, delay: float) -> None:
    async with Relay(port, delay).listening() as relay:
        print(relay.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=exact_loop) as runner:
        runner.run(_main(int(sys.argv[1]), float(sys.argv[2])))
