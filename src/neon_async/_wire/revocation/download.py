"""Fetch one revocation list over plain HTTP, within limits. It blocks, and runs in a thread.

The signature of a list protects it, so that plain HTTP is enough (RFC 5280, section 8). This module must not know what
is fetched.
"""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request
from typing import Any

from .. import threads
from .lists import ListRefusedError

# Let's Encrypt announced shards of up to 70 MB (2022).
MAX_SIZE = 70_000_000
# Seconds for everything: a caller may be waiting.
TIME_LIMIT = 5.0


def fetch(url: str) -> bytes:
    """Return the body that an HTTP server sends for `url`. Redirects are not followed.

    Proxies come from the environment, as urllib reads it: `http_proxy` and `no_proxy`.

    Raises:
        ListRefusedError: There is no such body, it is longer than 70 MB, or did not arrive within 5 s.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(urllib.request.getproxies_environment()),
        _Handler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "neon-async"), ("Accept", "application/pkix-crl")]
    try:
        with opener.open(url, timeout=TIME_LIMIT) as response:
            return _read(response)
    except urllib.error.HTTPError as error:
        error.close()
        raise ListRefusedError(f"was answered with HTTP status {error.code}") from error
    except TimeoutError as error:
        raise ListRefusedError(f"did not arrive within {TIME_LIMIT:g} s") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ListRefusedError(f"did not arrive within {TIME_LIMIT:g} s") from error
        reason = getattr(error.reason, "strerror", None) or str(error.reason)
        raise ListRefusedError(f"cannot be fetched ({reason})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ListRefusedError(f"cannot be fetched ({reason})") from error


def _read(response: Any) -> bytes:
    if response.status != http.client.OK:
        raise ListRefusedError(f"was answered with HTTP status {response.status}")
    expected = response.length
    if expected is not None and expected > MAX_SIZE:
        raise ListRefusedError(f"is larger than {MAX_SIZE // 1_000_000} MB")
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > MAX_SIZE:
            raise ListRefusedError(f"is larger than {MAX_SIZE // 1_000_000} MB")
    if expected is not None and len(body) < expected:
        raise ListRefusedError("is truncated")
    return bytes(body)


_CHUNK = 1 << 16


# ---------------------------------------------------------------------------------------------------------------------
# One deadline for everything that a connection does


class _Socket(socket.socket):
    """A socket whose every call ends by a deadline. `http.client` uses `sendall()` and `recv_into()`."""

    __slots__ = ("_deadline",)

    def __init__(self, family: int, deadline: float) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._deadline = deadline

    def wait_until(self, deadline: float) -> None:
        """Let the next call end by `deadline`, a time of the monotonic clock."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)

    def sendall(self, *args: Any) -> None:
        self.wait_until(self._deadline)
        super().sendall(*args)

    def recv_into(self, *args: Any, **keywords: Any) -> int:
        self.wait_until(self._deadline)
        return super().recv_into(*args, **keywords)


class _Connection(http.client.HTTPConnection):
    """An HTTP connection that has `timeout` seconds for everything, and shares them among the addresses."""

    def connect(self) -> None:
        assert isinstance(self.timeout, (int, float))
        deadline = time.monotonic() + self.timeout
        # A resolver that does not answer can take half a minute.
        looking_up = threads.start(socket.getaddrinfo, self.host, self.port, type=socket.SOCK_STREAM)
        addresses = looking_up.result(self.timeout)
        failure: OSError | None = None
        for number, (family, _, _, _, address) in enumerate(addresses):
            sock = _Socket(family, deadline)
            try:
                now = time.monotonic()
                sock.wait_until(now + (deadline - now) / (len(addresses) - number))
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                self.sock = sock
                return
        raise failure or OSError("the name has no address")


class _Handler(urllib.request.HTTPHandler):
    """urllib's handler of `http://`, over such a connection."""

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)
