"""Measure what `import neon_async` costs in addition to the `import asyncpg` that it contains.

    python -m pip install -e '.[dev]'
    python benchmarks/import_time.py [--rounds 21] [--json FILE]

Each round starts a new Python that imports asyncpg, then neon_async, and times both. The second time is the additional
cost, because asyncpg is loaded already. The byte code comes from a cache of this benchmark. Limit: the median of the
additional cost is at most 15 ms.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from harness import Figure, Limit, Report, Table, run

EXTRA, ASYNCPG = "neon_async, after asyncpg", "asyncpg"
TIME = "import time"

CODE = """
from time import perf_counter
start = perf_counter()
import asyncpg
between = perf_counter()
import neon_async
print(perf_counter() - between, between - start)
"""


def measure(arguments: argparse.Namespace) -> Report:
    """Return the seconds of each import in a new interpreter."""
    table = Table(
        "import time in a new interpreter",
        (EXTRA, ASYNCPG),
        [Figure(TIME, "ms", show=("median", "min", "max"))],
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        import_both(environment)  # fills the caches
        for _ in range(arguments.rounds):
            for name, seconds in zip((EXTRA, ASYNCPG), import_both(environment), strict=True):
                table.add(name, TIME, seconds)
    milliseconds = table.value(EXTRA, TIME) * 1e3
    return Report([table], [Limit("neon_async takes {} ms more than asyncpg", milliseconds, at_most=15)])


def import_both(environment: Mapping[str, str]) -> list[float]:
    """Return the seconds of importing neon_async after asyncpg, and of importing asyncpg."""
    command = [sys.executable, "-c", CODE]
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [float(text) for text in finished.stdout.split()]


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=21))
