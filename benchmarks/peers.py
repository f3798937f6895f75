"""What the benchmarks that compare share: the DSN and the TLS context with which anybody reaches a `LocalPostgres`."""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

from neon_async.testing import LocalPostgres


def dsn_of(server: LocalPostgres, port: int | None = None) -> str:
    """Return a DSN that every client understands: `localhost`, no options; `port` is a relay's, if there is one."""
    seed = urlsplit(server.dsn)
    return f"postgresql://{seed.username}:{seed.password}@localhost:{port or server.port}{seed.path}"


def verified_context(server: LocalPostgres) -> ssl.SSLContext:
    """Return a context that verifies `server` in full: what asyncpg does best with is one of these for all dials."""
    context = ssl.create_default_context(cadata=server.trust_anchor.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["postgresql"])  # PostgreSQL 17 closes a direct TLS connection without it
    return context
