"""How every benchmark of the pool is called and what it prints: arguments, table, verdict, JSON, exit status.

It knows names and numbers, not what they mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser that knows `--rounds` and `--json`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count (default: {rounds})")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    return result


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print the title, the columns' names, and a line for each row; the cells are ready to be printed."""
    first = max(map(len, rows), default=0)
    widths = [max(len(cell) for cell in cells) + 3 for cells in zip(columns, *rows.values(), strict=True)]
    print(title)
    for name, cells in {"": columns, **rows}.items():
        print(name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def conclude(missed: Sequence[str], good: str, document: Mapping[str, object], file: Path | None) -> int:
    """Print a sentence for each limit that is missed, or `good`; write the JSON; return the exit status."""
    for sentence in missed:
        print(f"MISSED: {sentence}")
    if not missed:
        print(f"good: {good}")
    if file:
        file.write_text(json.dumps({"missed": list(missed), **document}, indent=2) + "\n")
    return 1 if missed else 0
