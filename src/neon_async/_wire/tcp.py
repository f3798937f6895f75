"""Connect a TCP socket: resolve the name, race the addresses, set the socket's options.

This module must not know TLS or what is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .._config.connection import ConnectionParameters
from .._errors import ConnectError

# RFC 8305, section 5: the recommended delay before the next address is tried while earlier attempts continue.
_ATTEMPT_DELAY = 0.25


class Address(NamedTuple):
    """A resolved address of a server, as `socket.getaddrinfo()` returns it."""

    family: socket.AddressFamily
    sockaddr: tuple[str | int | bytes, ...]

    def __str__(self) -> str:
        return str(self.sockaddr[0])


async def resolve(parameters: ConnectionParameters) -> list[Address]:
    """Return the addresses of the server, in the order in which to try them.

    Raises:
        socket.gaierror: The name cannot be resolved.
    """
    if parameters.hostaddr is not None:
        # Numeric: parsed immediately, without a look-up.
        found = socket.getaddrinfo(
            parameters.hostaddr, parameters.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    else:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(parameters.host, parameters.port, type=socket.SOCK_STREAM)
    return _interleave([Address(family, sockaddr) for family, _, _, _, sockaddr in found])


async def connect(addresses: Sequence[Address], parameters: ConnectionParameters) -> tuple[socket.socket, Address]:
    """Return a connected socket, and its address.

    The addresses are raced: each attempt starts a little after the one before, or once one has failed. The first to
    connect wins, and the others are closed.

    Raises:
        ConnectError: No address accepts connections.
    """
    waiting = list(addresses)
    running: dict[asyncio.Task[socket.socket], Address] = {}
    failures: dict[str, OSError] = {}
    try:
        while waiting or running:
            if waiting:
                address = waiting.pop(0)
                running[asyncio.ensure_future(_connect_to(address, parameters))] = address
            done, _ = await asyncio.wait(
                running, timeout=_ATTEMPT_DELAY if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                address = running.pop(attempt)
                error = attempt.exception()
                if error is None:
                    return attempt.result(), address
                if not isinstance(error, OSError):
                    raise error
                failures[str(address)] = error
    finally:
        for attempt in running:
            attempt.cancel()
            attempt.add_done_callback(_close_late_winner)
    reasons = "; ".join(f"{address}: {os.strerror(error.errno or 0)}" for address, error in failures.items())
    raise ConnectError(
        f"{parameters.host} does not accept connections on port {parameters.port} ({reasons}). Check host, port and "
        "network."
    ) from next(iter(failures.values()), None)


def _interleave(addresses: Sequence[Address]) -> list[Address]:
    """Alternate the address families, the preferred one first (RFC 8305, section 4)."""
    preferred = [address for address in addresses if address.family == addresses[0].family]
    others = [address for address in addresses if address.family != addresses[0].family]
    pairs = itertools.zip_longest(preferred, others)
    return [address for pair in pairs for address in pair if address is not None]


def _close_late_winner(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _connect_to(address: Address, parameters: ConnectionParameters) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_options(sock, parameters)
        await asyncio.get_running_loop().sock_connect(sock, address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_options(sock: socket.socket, parameters: ConnectionParameters) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parameters.keepalives:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
        for option, value in (
            (idle, parameters.keepalives_idle),
            ("TCP_KEEPINTVL", parameters.keepalives_interval),
            ("TCP_KEEPCNT", parameters.keepalives_count),
        ):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if parameters.tcp_user_timeout and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, parameters.tcp_user_timeout)
