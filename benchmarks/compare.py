"""Run one benchmark on two checkouts in turn, and compare every number.

    python benchmarks/compare.py acquire ../before/src src [--rounds 5] [--json FILE]

BEFORE and AFTER are folders that contain the package `neon_async`. Each round runs the benchmark of this checkout once
with either of them first on PYTHONPATH, in an order that changes from round to round. The ratio is that of AFTER to
BEFORE within a round. The rows of the other clients show the noise of the machine: they would be 1 without it. There
are no limits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Figure, Option, Report, Table, run, take_turns

BEFORE, AFTER, RATIO = "before", "after", "ratio"


def measure(arguments: argparse.Namespace) -> Report:
    """Return one table for each figure of the benchmark."""
    tables: dict[str, Table] = {}
    sides = {BEFORE: arguments.before, AFTER: arguments.after}
    documents: dict[str, Any] = {}
    for _, side, source in take_turns(sides, arguments.rounds, warm_up=False):
        documents[side] = run_once(arguments.benchmark, source)
        if len(documents) == len(sides):
            add_round(tables, documents[BEFORE], documents[AFTER])
            documents = {}
    return Report(list(tables.values()))


def run_once(benchmark: str, source: Path) -> Any:
    """Run one round of the benchmark with the package in `source`, and return its JSON document."""
    if not (source / "neon_async").is_dir():
        raise SystemExit(f"{source} does not contain the package neon_async. Pass the folder that does.")
    path = os.pathsep.join([str(source.absolute()), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name(f"{benchmark}.py")
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder, "document.json")
        command = [sys.executable, str(script), "--rounds", "1", "--json", str(document)]
        finished = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if not document.exists():  # a missed limit has a document, too
            raise SystemExit(f"{benchmark} failed with {source}:\n{finished.stderr}")
        return json.loads(document.read_text())


def add_round(tables: dict[str, Table], before: Any, after: Any) -> None:
    """Add the numbers of one round to the tables, which are created in the first round."""
    for one, other in zip(before["tables"], after["tables"], strict=True):
        for figure, unit in one["units"].items():
            title = f"{one['title']}: {figure}"
            if title not in tables:
                tables[title] = Table(title, one["rows"], [Figure(BEFORE, unit), Figure(AFTER, unit), Figure(RATIO)])
            for row in one["rows"]:
                old, new = one["rows"][row][figure]["value"], other["rows"][row][figure]["value"]
                tables[title].add(row, BEFORE, old)
                tables[title].add(row, AFTER, new)
                tables[title].add(row, RATIO, 1.0 if old == new else new / (old or float("nan")))


if __name__ == "__main__":
    options = [
        Option("benchmark", "name of the benchmark, for example acquire", type=str),
        Option("before", "folder with the package neon_async", type=Path),
        Option("after", "folder with the package neon_async to compare", type=Path),
    ]
    sys.exit(run(measure, __doc__, rounds=5, options=options))
