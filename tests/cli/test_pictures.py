"""The pictures of the site show what the commands print; `python docs/pictures.py` draws them."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from pathlib import Path

from support.command_line import run

from neon_async.testing import LocalPostgres

DOCS = Path(__file__).parents[2] / "docs"


def drawn(name: str) -> list[str]:
    """Return the lines of text of a picture."""
    lines: defaultdict[float, list[tuple[float, str]]] = defaultdict(list)
    picture = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    for x, y, text in re.findall(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', picture):
        lines[float(y)].append((float(x), html.unescape(text).replace("\xa0", " ").rstrip("\n")))
    return ["".join(text for _, text in sorted(lines[y])) for y in sorted(lines)]


def labels(lines: list[str]) -> list[str]:
    """Return what stands at the beginning of each line, without what differs from run to run."""
    return [re.sub(r"#\S+|\d+", "", re.split(r" {2,}", line.strip())[0]) for line in lines if line.strip()]


def test_the_picture_of_check_shows_what_it_prints(postgres: LocalPostgres, anchor: str) -> None:
    wide = {"COLUMNS": "110"}
    shown = run("check", "--offline", postgres.dsn, "--trust-anchor", anchor, variables=wide).stdout.splitlines()
    assert labels(drawn("check")) == labels([line for line in shown if anchor not in line])


def test_the_picture_of_the_demo_shows_what_it_prints() -> None:
    shown = run("demo", variables={"COLUMNS": "110"}).stdout.splitlines()
    titles = [[line for line in lines if line.startswith("refused  ")] for lines in (drawn("demo"), shown)]
    assert titles[0] == titles[1] != []
