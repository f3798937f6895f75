"""How connections through a `Relay` began: direct TLS or SSLRequest."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any

import neon_async
from neon_async._wire import dial, tcp
from neon_async.testing import LocalPostgres
from support.probes import Relay

__all__ = ("SSL_REQUEST", "TLS", "closes_on_direct_tls", "connected", "forget_servers", "openings")

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
CANCEL_REQUEST = struct.pack("!i", 80877102)
TLS = b"\x16"


@contextlib.asynccontextmanager
async def connected(postgres: LocalPostgres, dsn: str | None = None, **keywords: Any) -> AsyncIterator[Any]:
    """A connection to `postgres`, by default with its own DSN."""
    connection = await neon_async.connect(dsn or postgres.dsn, trust_anchor=postgres.trust_anchor, **keywords)
    try:
        yield connection
    finally:
        connection.terminate()


def forget_servers() -> None:
    """Forget which servers know no direct TLS, and which addresses have failed."""
    dial._without_direct_tls.clear()
    tcp._postponed.clear()


def openings(relay: Relay) -> list[str]:
    """Return how each connection began, and check that TLS followed every SSLRequest."""
    names = []
    for passage in relay.passages:
        assert CANCEL_REQUEST not in passage.sent[:16]
        if passage.sent.startswith(SSL_REQUEST):
            assert passage.sent[8:9] in (b"", TLS)
        names.append("direct" if passage.sent[:1] == TLS else "SSLRequest")
    return names


def closes_on_direct_tls(first: bytes) -> bool:
    """Whether a connection whose first bytes are `first` is closed, by a server without direct TLS."""
    return first.startswith(TLS)
