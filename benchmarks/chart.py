"""Draw a bar chart as SVG that is readable on light and dark pages.

This module must not know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its label, its number, and an extra part that is drawn paler."""

    label: str
    value: int
    extra: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one candidate. The first group of a chart is ours."""

    name: str
    bars: Sequence[Bar]


def bar_chart(title: str, groups: Sequence[Group], *, extra: str) -> str:
    """Return the SVG text.

    Args:
        title: Drawn above the bars.
        groups: The bars of each candidate.
        extra: What the paler parts of the bars mean.
    """
    longest = max(bar.value + bar.extra for group in groups for bar in group.bars)
    scale = (_WIDTH - _LABELS - 90) / longest
    rows, y = [], _TOP
    for number, group in enumerate(groups):
        colour = "bar" if number else "bar ours"
        rows.append(f'<text class="text name" x="20" y="{y}">{escape(group.name)}</text>')
        for bar in group.bars:
            y += _ROW
            rows += _draw(bar, y, scale, colour)
        y += _GAP
    height = y - 8
    summary = "; ".join(
        f"{group.name}: " + ", ".join(f"{bar.label} {bar.value + bar.extra}" for bar in group.bars) for group in groups
    )
    box = f"0 0 {_WIDTH} {height}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(summary)}</desc>',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
            f'<text class="text title" x="20" y="32">{escape(title)}</text>',
            '<rect class="bar extra" x="20" y="43" width="14" height="11"/>',
            f'<text class="soft" x="40" y="53">{escape(extra)}</text>',
            *rows,
            "</svg>\n",
        ]
    )


def _draw(bar: Bar, y: int, scale: float, colour: str) -> list[str]:
    solid, pale = bar.value * scale, bar.extra * scale
    number = f"{bar.value} + {bar.extra}" if bar.extra else f"{bar.value}"
    drawn = [
        f'<text class="soft" x="20" y="{y}">{escape(bar.label)}</text>',
        f'<rect class="{colour}" x="{_LABELS}" y="{y - 11}" width="{solid:.1f}" height="13"/>',
    ]
    if bar.extra:
        drawn.append(
            f'<rect class="{colour} extra" x="{_LABELS + solid:.1f}" y="{y - 11}" width="{pale:.1f}" height="13"/>'
        )
    drawn.append(f'<text class="text" x="{_LABELS + solid + pale + 8:.1f}" y="{y}">{number}</text>')
    return drawn
