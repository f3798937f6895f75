"""The addresses of a server, in the order in which to try them, and a TCP socket to one of them.

This module must not know TLS, what is sent, or which addresses are raced.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from .._config.connection import ConnectionParameters
from . import resolver


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
        found: resolver.Found = socket.getaddrinfo(
            parameters.hostaddr, parameters.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    else:
        found = await resolver.look_up(parameters.host, parameters.port)
    return in_order([Address(family, sockaddr) for family, _, _, _, sockaddr in found])


async def connect(address: Address, parameters: ConnectionParameters) -> socket.socket:
    """Return a socket that is connected to `address`, with the options of `parameters`.

    Raises:
        OSError: The address does not accept the connection.
    """
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _set_options(sock, parameters)
        await asyncio.get_running_loop().sock_connect(sock, address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


# ---------------------------------------------------------------------------------------------------------------------
# The order

# When an address failed, or did not answer in time. An entry loses its effect after `MEMORY`: the address may be well
# again, and it may be the nearer one.
_postponed: dict[Address, float] = {}
# Seconds for which it is remembered how a server, or one of its addresses, behaved.
MEMORY = 600.0


def in_order(addresses: Sequence[Address]) -> list[Address]:
    """Return the addresses in the order in which to try them.

    The address families alternate, the preferred one first (RFC 8305, section 4). The addresses that failed lately come
    last, and of these the one that failed first.
    """
    if len(addresses) < 2:
        return list(addresses)
    expired = time.monotonic() - MEMORY
    preferred = [address for address in addresses if address.family == addresses[0].family]
    others = [address for address in addresses if address.family != addresses[0].family]
    pairs = itertools.zip_longest(preferred, others)
    alternating = [address for pair in pairs for address in pair if address is not None]
    failed = {address: when for address in alternating if (when := _postponed.get(address, -math.inf)) > expired}
    return sorted(alternating, key=lambda address: failed.get(address, -math.inf))


def postpone(address: Address) -> None:
    """Try `address` after the other addresses of its server, for a while."""
    now = time.monotonic()
    for other in [other for other, when in list(_postponed.items()) if when <= now - MEMORY]:
        _postponed.pop(other, None)  # addresses change, and a server may have had many
    _postponed[address] = now


def restore(address: Address) -> None:
    """Try `address` in its usual place again."""
    _postponed.pop(address, None)


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
