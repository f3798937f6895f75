"""Judge what `connect()` and `create_pool()` are given besides the parameters of a connection.

Knows neither those parameters nor how connections are made.
"""

from __future__ import annotations

import asyncio

import asyncpg

from .._config.readers import SubclassOf
from .._errors import UnsupportedEventLoopError
from .holder import is_current

CONNECTION_CLASS = SubclassOf(asyncpg.Connection, "asyncpg.Connection")
RECORD_CLASS = SubclassOf(asyncpg.Record, "asyncpg.Record")


def other_loop(loop: object) -> object:
    """Return None for the running event loop, which is used in any case, and anything else to be judged, and refused.

    With another event loop, code could replace the sockets and the TLS of a connection.
    """
    return None if is_current(loop) else loop


def require_asyncio() -> None:
    """Raise `UnsupportedEventLoopError` unless an asyncio event loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return
    raise UnsupportedEventLoopError(
        "No asyncio event loop is running. neon-async runs on asyncio and uvloop, and asyncpg cannot run on trio: run "
        "this service with asyncio, for instance with anyio.run(main, backend='asyncio')."
    )
