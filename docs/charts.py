"""Draw what the benchmarks have measured as bar charts, and describe it in Markdown for the site.

`python benchmarks/NAME.py --json docs/figures/NAME.json` measures, `python docs/pictures.py` draws NAME.svg from that
file, and `docs/tables.py` puts both on the page of the benchmarks. A chart whose file is missing is not shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent / "benchmarks"))
from harness import Figure  # formats a number as the benchmark prints it


class Chart(NamedTuple):
    """One chart.

    Attributes:
        name: The benchmark, its file of figures and the picture.
        title: Drawn above the bars.
        text: What was measured, in one or two sentences of Markdown.
        bars: The label of each figure that is drawn.
        table: The number of the table in the file.
        pale: A figure that is contained in others, and is drawn as their paler end: its name, the labels of those
            that contain it, and what it means.
    """

    name: str
    title: str
    text: str
    bars: Mapping[str, str]
    table: int = 0
    pale: tuple[str, frozenset[str], str] | None = None


CHARTS = (
    Chart(
        "round_trips",
        "Round trips after TCP, PostgreSQL 17 over verified TLS 1.3",
        "A relay counts the round trips until the caller has its result. The first connect of a pool takes 4 and every "
        "later one 3. asyncpg and libpq take 5, or 4 with direct TLS. A warm query of a pool takes 1, because the "
        "reset is sent ahead of the next one. PostgreSQL 17 with today's OpenSSL adds one to every connect "
        "(HelloRetryRequest).",
        {
            "first dial": "first connect",
            "later dial": "later connects",
            "warm query": "warm query",
            "transaction": "transaction",
        },
        pale=(
            "of these, HRR",
            frozenset({"first connect", "later connects"}),
            "of these, HelloRetryRequest: PostgreSQL 17 accepts P-256 only",
        ),
    ),
    Chart(
        "transaction",
        "Time of a transaction, 20 ms round trip",
        "BEGIN, the role and the settings travel with the first statement, and the reset with the next transaction.",
        {"one": "one statement", "two": "two statements", "claims": "with a role"},
        table=1,
    ),
    Chart(
        "fairness",
        "Wait for one of 10 connections, 100 tasks that hold one for 5 ms",
        "The ideal wait is 45 ms: nine other tasks use each connection between two turns of a task.",
        {"asleep, median": "median", "asleep, p99": "p99", "asleep, longest": "longest"},
    ),
    Chart(
        "wake",
        "Connects of 50 requests to a suspended endpoint",
        "Fifty requests reach a pool of ten connections whose endpoint takes 0.6 s to wake.",
        {"connects before awake": "until it is awake", "in total": "in total"},
        table=1,
    ),
    Chart(
        "herd",
        "Connects per second to a server that refuses, 50 tasks that try again at once",
        "The server resets each connect, or refuses the password. A pool of neon-async sets the pace for all tasks.",
        {"down": "server is down", "wrong password": "wrong password"},
    ),
    Chart(
        "saturation",
        "Requests per second, 64 tasks on 10 connections, asyncio",
        "One `fetchval()` per acquire, without a delay on the network.",
        {"requests": "requests"},
    ),
    Chart(
        "services",
        "Wrong answers of a web service through a suspend, cuts, a freeze and a refusal",
        "220 requests per second, each of which writes a row. Errors are all answers but 2xx and 503. A row behind a "
        "503 that says that the outcome is unknown is not counted.",
        {"other errors": "error", "2xx without a row": "2xx, but no row", "rows without 2xx": "row, but no 2xx"},
    ),
)
# Rows whose names are those of files.
NAMES = {
    "fastapi_ours": "FastAPI with neon-async",
    "fastapi_asyncpg": "FastAPI with asyncpg",
    "aiohttp_ours": "aiohttp with neon-async",
    "aiohttp_asyncpg": "aiohttp with asyncpg",
}


def measured() -> Iterator[Chart]:
    """Return the charts whose figures are stored."""
    return (chart for chart in CHARTS if _file(chart).is_file())


def draw_charts() -> None:
    """Draw the charts of all figures that are stored."""
    for chart in measured():
        (FOLDER / f"{chart.name}.svg").write_text(svg_of(chart), encoding="utf-8")


def charts() -> str:
    """Return a section for each chart, for the page of the benchmarks."""
    return "\n\n".join(_section(chart) for chart in measured())


def _section(chart: Chart) -> str:
    document = _document(chart)
    machine, groups = document["machine"], _groups(chart, document)
    rows = [f"| {group.name} | {' | '.join(bar.spread for bar in group.bars)} |" for group in groups]
    labels = [bar.label for bar in groups[0].bars]
    table = [f"| | {' | '.join(labels)} |", f"|---{'|---' * len(labels)}|", *rows]
    source = (
        f"`{document['command']}` on {machine['system']} with {machine['cpus']} CPUs, Python {machine['python']}, "
        f"{machine['openssl']} and asyncpg {machine['asyncpg']}. The numbers of each round are in "
        f"[{chart.name}.json](figures/{chart.name}.json)."
    )
    figures = [
        '??? note "The figures: the value, and the smallest and the largest of the rounds"',
        *(f"    {line}".rstrip() for line in ["", *table]),
    ]
    picture = f"![{chart.title}]({chart.name}.svg)"
    return "\n\n".join([f"### {chart.title}", chart.text, picture, source, "\n".join(figures)])


# ---------------------------------------------------------------------------------------------------------------------
# From a file of figures to bars


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        label: What is drawn in front of it.
        value: Its length.
        shown: What is drawn behind it.
        spread: The value, with its smallest and largest number.
        extra: The length of a paler end.
    """

    label: str
    value: float
    shown: str
    spread: str
    extra: float = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one candidate, and whether it is ours."""

    name: str
    bars: Sequence[Bar]
    is_ours: bool


def svg_of(chart: Chart) -> str:
    """Return the chart as SVG."""
    return bar_chart(chart.title, _groups(chart, _document(chart)), extra=chart.pale[2] if chart.pale else "")


def _file(chart: Chart) -> Path:
    return FOLDER / "figures" / f"{chart.name}.json"


def _document(chart: Chart) -> Any:
    return json.loads(_file(chart).read_text(encoding="utf-8"))


def _groups(chart: Chart, document: Any) -> list[Group]:
    table = document["tables"][chart.table]
    return [
        Group(
            NAMES.get(row, row),
            [_bar(chart, label, numbers, Figure(name, table["units"][name])) for name, label in chart.bars.items()],
            row == "neon-async" or row.endswith("_ours"),
        )
        for row, numbers in table["rows"].items()
    ]


def _bar(chart: Chart, label: str, numbers: Any, figure: Figure) -> Bar:
    found = numbers[figure.name]
    extra = numbers[chart.pale[0]]["value"] if chart.pale and label in chart.pale[1] else 0
    value = found["value"] - extra
    shown, least, most = (figure.format(number) for number in (value, found["min"], found["max"]))
    spread = figure.format(found["value"]) + (f" ({least} to {most})" if least != most else "")
    return Bar(label, value, f"{shown} + {figure.format(extra)}" if extra else shown, spread, extra)


# ---------------------------------------------------------------------------------------------------------------------
# From bars to SVG that is readable on light and dark pages

_WIDTH, _LABELS, _ROW, _GAP, _TOP = 760, 150, 18, 34, 84

# With a background of its own: an image knows the colour scheme of the browser, but not the colours of the page.
_STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .soft { fill: #59636e }
  .bar { fill: #8c959f } .ours { fill: #1a7f5a } .extra { fill-opacity: 0.35 }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .title { font-weight: 600; font-size: 15px } .name { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d } .text { fill: #f0f6fc } .soft { fill: #9198a1 }
    .bar { fill: #6e7681 } .ours { fill: #3fb98a }
  }
"""


def bar_chart(title: str, groups: Sequence[Group], *, extra: str = "") -> str:
    """Return the SVG text.

    Args:
        title: Drawn above the bars.
        groups: The bars of each candidate.
        extra: What the paler ends of the bars mean. Default: there are none.
    """
    longest = max(bar.value + bar.extra for group in groups for bar in group.bars)
    scale = (_WIDTH - _LABELS - 90) / longest
    rows, y = [], _TOP if extra else _TOP - 22
    for group in groups:
        rows.append(f'<text class="text name" x="20" y="{y}">{escape(group.name)}</text>')
        for bar in group.bars:
            y += _ROW
            rows += _draw(bar, y, scale, "bar ours" if group.is_ours else "bar")
        y += _GAP
    height = y - 8
    summary = "; ".join(
        f"{group.name}: " + ", ".join(f"{bar.label} {bar.shown}" for bar in group.bars) for group in groups
    )
    box = f"0 0 {_WIDTH} {height}"
    legend = [
        '<rect class="bar extra" x="20" y="43" width="14" height="11"/>',
        f'<text class="soft" x="40" y="53">{escape(extra)}</text>',
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(summary)}</desc>',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
            f'<text class="text title" x="20" y="32">{escape(title)}</text>',
            *(legend if extra else ()),
            *rows,
            "</svg>\n",
        ]
    )


def _draw(bar: Bar, y: int, scale: float, colour: str) -> list[str]:
    solid, pale = bar.value * scale, bar.extra * scale
    drawn = [
        f'<text class="soft" x="20" y="{y}">{escape(bar.label)}</text>',
        f'<rect class="{colour}" x="{_LABELS}" y="{y - 11}" width="{solid:.1f}" height="13"/>',
    ]
    if bar.extra:
        drawn.append(
            f'<rect class="{colour} extra" x="{_LABELS + solid:.1f}" y="{y - 11}" width="{pale:.1f}" height="13"/>'
        )
    drawn.append(f'<text class="text" x="{_LABELS + solid + pale + 8:.1f}" y="{y}">{escape(bar.shown)}</text>')
    return drawn
