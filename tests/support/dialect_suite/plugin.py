"""SQLAlchemy's plugin for pytest, for engines on a local server. Only a run of its own can load it.

The variable ENGINE says whose pool the connections are from: `sqlalchemy`, or `neon_async`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.testing.plugin.pytestplugin import *  # noqa: F403

import neon_async

ANCHOR = Path(os.environ["TRUST_ANCHOR"])
pools: dict[asyncio.AbstractEventLoop, neon_async.Pool] = {}


async def acquire() -> Any:
    """Return a connection of the event loop's pool."""
    loop = asyncio.get_running_loop()
    if loop not in pools:
        pools[loop] = await neon_async.create_pool(os.environ["DSN"], trust_anchor=ANCHOR, max_size=50)
    return await pools[loop].acquire()


@event.listens_for(Engine, "do_connect")
def connect(dialect: Any, entry: Any, args: Any, keywords: dict[str, Any]) -> Any:
    """Have every engine trust the local server, whose root no URL can name, or borrow a connection."""
    if os.environ["ENGINE"] == "neon_async":
        return dialect.dbapi.connect(async_creator_fn=acquire)
    keywords["trust_anchor"] = ANCHOR
    return None
