"""A TCP relay in front of a server, which holds back every byte and counts the flights of all who pass.

It knows bytes and their directions, and one constant of TLS; it must not know clients or pools.

    python benchmarks/relay.py PORT DELAY

relays to that port until standard input ends, and prints its own port: a process of its own, whose work is not on the
bill of the clients that are measured.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from timers import exact_loop

_HELLO_RETRY_REQUEST = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


@dataclass(frozen=True, slots=True)
class Count:
    """What went over the wire for one action: flights until it was done, then flights and bytes sent behind its back.

    A flight is bytes of a client after which bytes of the server come. What a client leaves to the background, such as
    a reset after the answer is there, costs no waiting but it is traffic, and the server's work.
    """

    flights: int
    flights_behind: int
    bytes_behind: int


class Relay:
    """A TCP relay to port `target` of this machine, which holds back each direction for `delay` seconds and counts."""

    def __init__(self, target: int, delay: float) -> None:
        self.port = 0
        self.flights = 0
        self.sent = 0
        self.retries = 0
        self._target = target
        self._delay = delay
        self._latest = 0.0
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Relay]:
        """Listen on a free port of 127.0.0.1 while the block runs."""
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
        """Return what `action` takes. It begins when the wire has fallen silent; the count ends when it is so again."""
        await self._silence()
        flights = self.flights
        await action
        answered, sent = self.flights, self.sent
        await self._silence()
        return Count(answered - flights, self.flights - answered, self.sent - sent)

    async def _silence(self) -> None:
        loop = asyncio.get_running_loop()
        while (silence := loop.time() - self._latest) < 5 * self._delay:  # noqa: ASYNC110  silence is no event
            await asyncio.sleep(5 * self._delay - silence)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._relay(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _relay(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        unanswered = False

        def note_client(data: bytes) -> None:
            nonlocal unanswered
            self.sent += len(data)
            unanswered = True

        def note_server(data: bytes) -> None:
            nonlocal unanswered
            self.flights += unanswered
            self.retries += _HELLO_RETRY_REQUEST in data
            unanswered = False

        pumps = [
            asyncio.ensure_future(self._pump(from_client, to_server, note_client)),
            asyncio.ensure_future(self._pump(from_server, to_client, note_server)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(self._delay)  # for what has not been passed on yet
        finally:
            for pump in pumps:
                pump.cancel()
            to_server.close()
            to_client.close()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, note: Callable[[bytes], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while data := await source.read(65536):
                self._latest = loop.time()
                note(data)
                loop.call_later(self._delay, target.write, data)


@asynccontextmanager
async def distant(port: int, delay: float) -> AsyncIterator[int]:
    """Yield the port of a relay to `port`, in a process of its own, which holds back each direction for `delay`."""
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
