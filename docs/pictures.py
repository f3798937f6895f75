"""Draw the pictures of the site as SVG: `neon-async check`, `neon-async demo` and the chart of round trips.

    python docs/pictures.py

It starts a real PostgreSQL and runs a benchmark, so it needs the extra `dev`.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path

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
    draw_round_trips()
    draw_diagrams()


def draw_round_trips() -> None:
    """Count the round trips and draw them."""
    script, chart = FOLDER.parent / "benchmarks" / "round_trips.py", FOLDER / "round_trips.svg"
    subprocess.run([sys.executable, script, "--svg", chart], check=True)


def recording() -> Console:
    """Return a console that remembers what is printed on it."""
    return Console(file=io.StringIO(), record=True, width=110, force_terminal=True)


def write(console: Console, command: str) -> None:
    """Write what was printed. The class names are made from the command, so that they do not change by themselves."""
    console.save_svg(str(FOLDER / f"{command}.svg"), title=f"neon-async {command}", unique_id=command)


if __name__ == "__main__":
    asyncio.run(main())
