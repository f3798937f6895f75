"""The transport that a finished session writes to.

It counts writes, so that a connection on which nothing was sent needs no reset. It must not know what is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from typing import Any


class SessionTransport(asyncio.Transport):
    """A transport that counts what is written to it and passes everything on to the TLS transport.

    Attributes:
        writes: How often anything was written.
        session: What `_driver` keeps for the connection.
    """

    __slots__ = ("_transport", "session", "writes")

    def __init__(self, transport: asyncio.Transport) -> None:
        # Not super().__init__(): get_extra_info() is the TLS transport's.
        self._transport = transport
        self.writes = 0
        self.session: object = None

    def __repr__(self) -> str:
        return f"<SessionTransport {self.writes} writes over {self._transport!r}>"

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
