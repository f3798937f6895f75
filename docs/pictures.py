"""Draw the pictures of the site as SVG: `neon-async check` and `neon-async demo`, charts and diagrams.

    python docs/pictures.py

It starts a real PostgreSQL, so it needs the extra `dev`. The charts show the figures that are stored in `docs/figures`.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

from charts import draw_charts
from diagrams import draw_diagrams
from rich.console import Console

from neon_async._cli.check import check
from neon_async._cli.demo import demo
from neon_async._cli.render import print_check
from neon_async.testing import LocalPostgres

FOLDER = Path(__file__).parent


async def main() -> None:
    """Write one SVG file for each command."""
    async with LocalPostgres() as postgres:
        result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor, offline=True)
    console = recording()
    print_check(result, console)
    write(console, "check")
    console = recording()
    await demo(console)
    write(console, "demo")
    draw_charts()
    draw_diagrams()


def recording() -> Console:
    """Return a console that remembers what is printed on it."""
    return Console(file=io.StringIO(), record=True, width=110, force_terminal=True)


def write(console: Console, command: str) -> None:
    """Write what was printed. The class names are made from the command, so that they do not change by themselves."""
    console.save_svg(str(FOLDER / f"{command}.svg"), title=f"neon-async {command}", unique_id=command)


if __name__ == "__main__":
    asyncio.run(main())
