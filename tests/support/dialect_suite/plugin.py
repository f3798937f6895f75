"""SQLAlchemy's plugin for pytest, for engines that trust the local server. Only a run of its own can load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.testing.plugin.pytestplugin import *  # noqa: F403


@event.listens_for(Engine, "do_connect")
def trust(dialect: Any, entry: Any, args: Any, keywords: dict[str, Any]) -> None:
    """Have every engine trust the local server, whose root no URL can name."""
    keywords["trust_anchor"] = Path(os.environ["TRUST_ANCHOR"])
