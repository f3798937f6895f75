"""Run a benchmark: parse its arguments, print tables and verdict, write JSON, and return the exit status.

Every benchmark has the arguments `--rounds` and `--json`, measures into tables, and names its limits:

    def measure(arguments: argparse.Namespace) -> Report: ...

    if __name__ == "__main__":
        sys.exit(run(measure, __doc__, rounds=9))

The exit status is 0 if every limit is kept, or else 1. Benchmarks import `neon_async` from the first place on the
path, so that `PYTHONPATH=OTHER/src python benchmarks/acquire.py` measures another checkout. To compare two checkouts in
one run, use `compare.py`. This module must not know what the numbers mean.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import shlex
import ssl
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

Item = TypeVar("Item")
Statistic: TypeAlias = Literal["median", "mean", "min", "max"]

_STATISTICS: dict[Statistic, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.mean,
    "min": min,
    "max": max,
}

# Unit on display: the factor from the unit of the number, and the format.
_UNITS = {"us": (1e6, ".1f"), "ms": (1e3, ".2f"), "s": (1, ".2f"), "/s": (1, ".1f"), "B": (1, ".0f"), "": (1, ".4g")}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity, and how a table shows it.

    Attributes:
        name: What is measured. It is the heading of the column.
        unit: The unit on display: "us", "ms" or "s" for numbers in seconds, "/s" for a rate, "B" for bytes, "" for a
            count.
        show: The statistics of the rounds that the table shows. The first one is the value of the figure.
        base: The row whose value is 1 in an additional column of ratios. None: there is no such column.
    """

    name: str
    unit: str = ""
    show: tuple[Statistic, ...] = ("median",)
    base: str | None = None

    def format(self, number: float) -> str:
        """Return `number` as the table shows it."""
        factor, form = _UNITS[self.unit]
        return f"{number * factor:{form}} {self.unit}".rstrip()


class Table:
    """The numbers of a comparison: for each row and figure one number, or several, per round.

    Args:
        title: Printed above the table.
        rows: The names of the rows, for example those of the clients.
        figures: The columns.
    """

    def __init__(self, title: str, rows: Iterable[str], figures: Sequence[Figure]) -> None:
        self.title = title
        self.figures = {figure.name: figure for figure in figures}
        self.numbers: dict[str, dict[str, list[float]]] = {row: {figure.name: [] for figure in figures} for row in rows}

    def add(self, row: str, figure: str, *numbers: float) -> None:
        """Add the numbers of a round."""
        self.numbers[row][figure].extend(numbers)

    def value(self, row: str, figure: str) -> float:
        """Return the value of a figure: the first statistic that the table shows."""
        return _STATISTICS[self.figures[figure].show[0]](self.numbers[row][figure])

    def ratio(self, figure: str, row: str, base: str) -> float:
        """Return the value of `row` divided by the value of `base`."""
        return self.value(row, figure) / self.value(base, figure)

    def paired_ratio(self, figure: str, row: str, base: str) -> float:
        """Return the median of the rounds' ratios of `row` to `base`. Other load disturbs both sides of a round."""
        pairs = zip(self.numbers[row][figure], self.numbers[base][figure], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def __str__(self) -> str:
        lines = {"": self._headings(), **{row: self._cells(row) for row in self.numbers}}
        first = max(map(len, lines))
        widths = [max(map(len, column)) + 3 for column in zip(*lines.values(), strict=True)]
        texts = [self.title]
        for row, cells in lines.items():
            padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
            texts.append(row.ljust(first) + "".join(padded))
        return "\n".join(texts)

    def document(self) -> dict[str, object]:
        """Return the table for the JSON: the numbers of every round, in seconds or bytes, and their spread."""
        return {
            "title": self.title,
            "units": {name: figure.unit for name, figure in self.figures.items()},
            "rows": {
                row: {name: self._spread(row, name) for name in figures if figures[name]}
                for row, figures in self.numbers.items()
            },
        }

    def _spread(self, row: str, figure: str) -> dict[str, object]:
        numbers = self.numbers[row][figure]
        spread: dict[str, object] = {name: statistic(numbers) for name, statistic in _STATISTICS.items()}
        return {"value": self.value(row, figure), **spread, "rounds": numbers}

    def _headings(self) -> list[str]:
        headings = []
        for figure in self.figures.values():
            if len(figure.show) == 1:
                headings.append(figure.name)
            elif len(self.figures) == 1:
                headings += figure.show
            else:
                headings += [f"{figure.name}, {statistic}" for statistic in figure.show]
            headings += ["ratio"] * (figure.base is not None)
        return headings

    def _cells(self, row: str) -> list[str]:
        cells = []
        for name, figure in self.figures.items():
            numbers = self.numbers[row][name]
            cells += [figure.format(_STATISTICS[key](numbers)) if numbers else "-" for key in figure.show]
            if figure.base is not None:
                cells.append(f"{self.ratio(name, row, figure.base):.2f}")
        return cells


@dataclass(frozen=True, slots=True)
class Limit:
    """A number on which the verdict depends. It has one bound: `at_most` or `at_least`.

    Attributes:
        sentence: What the number means, with `{}` in place of the number.
        value: The number.
        at_most: The largest value that keeps the limit.
        at_least: The smallest value that keeps the limit.
    """

    sentence: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_kept(self) -> bool:
        """Return whether the value is within the limit."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is not None and self.value >= self.at_least

    def __str__(self) -> str:
        bound = f"at most {self.at_most:.4g}" if self.at_most is not None else f"at least {self.at_least:.4g}"
        return f"{self.sentence.format(f'{self.value:.4g}')} (limit: {bound})"


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark has found.

    Attributes:
        tables: The numbers.
        limits: What the verdict depends on. Without limits there is no verdict, and the exit status is 0.
        notes: Lines that are printed below the tables, for example about what was left out.
    """

    tables: Sequence[Table]
    limits: Sequence[Limit] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """An argument of one benchmark in addition to `--rounds` and `--json`.

    Attributes:
        name: As in `ArgumentParser.add_argument()`.
        help: What it means. A default is appended.
        default: Its value if it is not given.
        type: What converts its text.
        metavar: Its name in the usage line.
    """

    name: str
    help: str
    default: object = None
    type: Callable[[str], object] = int
    metavar: str | None = None


Measure: TypeAlias = Callable[[argparse.Namespace], Report | Awaitable[Report]]


def run(
    measure: Measure,
    documentation: str | None,
    *,
    rounds: int,
    options: Sequence[Option] = (),
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run a benchmark and return its exit status: 0 if every limit is kept, or else 1.

    Args:
        measure: The benchmark, a function or a coroutine function.
        documentation: The docstring of the benchmark. Its first line is shown by `--help`.
        rounds: How many rounds count by default.
        options: Further arguments.
        loop_factory: Creates the event loop for a coroutine function. None (the default): asyncio's own.
    """
    arguments = _parse(documentation, rounds, options)
    outcome = measure(arguments)
    if inspect.iscoroutine(outcome):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            outcome = runner.run(outcome)
    assert isinstance(outcome, Report)
    print(f"{_name()}, rounds: {arguments.rounds}")
    for part in (*outcome.tables, *outcome.notes):
        print(part)
    for limit in outcome.limits:
        print(f"{'good' if limit.is_kept else 'MISSED'}: {limit}")
    if arguments.json:
        arguments.json.write_text(json.dumps(_document(outcome, arguments), indent=2, default=str) + "\n")
    return 0 if all(limit.is_kept for limit in outcome.limits) else 1


def take_turns(items: Mapping[str, Item], rounds: int, *, warm_up: bool) -> Iterator[tuple[bool, str, Item]]:
    """Yield every item once per round, in an order that changes from round to round.

    Each item comes as whether the round counts, its name and itself.

    Args:
        items: The items by name.
        rounds: How many rounds count.
        warm_up: Whether there is one more round, at the start, that does not count.
    """
    order = list(items.items())
    for number in range(rounds + warm_up):
        first = number % len(order)
        for name, item in order[first:] + order[:first]:
            yield number >= warm_up, name, item


def _parse(documentation: str | None, rounds: int, options: Sequence[Option]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    for option in options:
        text = option.help if option.default is None else f"{option.help} (default: {option.default})"
        parser.add_argument(option.name, type=option.type, default=option.default, metavar=option.metavar, help=text)
    return parser.parse_args()


def _document(report: Report, arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "benchmark": _name(),
        "command": shlex.join(["python", *sys.argv]),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
        "machine": _machine(),
        "good": all(limit.is_kept for limit in report.limits),
        "limits": [
            {"sentence": str(limit), "value": limit.value, "kept": limit.is_kept}
            | {"at_most": limit.at_most, "at_least": limit.at_least}
            for limit in report.limits
        ],
        "tables": [table.document() for table in report.tables],
        "notes": list(report.notes),
    }


def _name() -> str:
    return Path(sys.argv[0]).stem


def _machine() -> dict[str, object]:
    package = importlib.util.find_spec("neon_async")
    return {
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "asyncpg": importlib.metadata.version("asyncpg"),
        # Which checkout was measured, without the folders of the machine.
        "neon_async": package and package.origin and os.path.relpath(package.origin),
    }
