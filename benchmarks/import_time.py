"""What `import neon_async` costs beyond the `import asyncpg` it contains.

    python -m pip install -e '.[dev]'
    python benchmarks/import_time.py [--rounds 21] [--json FILE]

Each round starts a new Python, which imports asyncpg, then neon_async, and times each; the second is the extra cost, as
asyncpg is loaded by then. The byte code comes from a cache of the benchmark's own. The numbers are medians over the
rounds. Exit status: 0 when the extra cost is at most 25 ms, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 0.025
ASYNCPG, EXTRA = "asyncpg", "neon_async, beyond asyncpg"

CODE = """
from time import perf_counter
start = perf_counter()
import asyncpg
between = perf_counter()
import neon_async
print(between - start, perf_counter() - between)
"""


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each import took, one per round, after a run that fills the caches and does not count."""
    seconds: dict[str, list[float]] = {ASYNCPG: [], EXTRA: []}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        for round_number in range(rounds + 1):
            finished = subprocess.run(
                [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True
            )
            if round_number:
                for taken, text in zip(seconds.values(), finished.stdout.split(), strict=True):
                    taken.append(float(text))
    return seconds


def main() -> int:
    """Run the benchmark, print the table, write the JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description="The import time of neon_async beyond that of asyncpg.")
    parser.add_argument("--rounds", type=int, default=21, help="rounds that count (default: 21)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    arguments = parser.parse_args()

    seconds = measure(arguments.rounds)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}

    print(f"import time in a new interpreter, median of {arguments.rounds} rounds")
    print(f"{'':28}{'median':>10}{'fastest':>10}{'slowest':>10}")
    for name, taken in seconds.items():
        print(f"{name:28}{medians[name] * 1e3:7.1f} ms{min(taken) * 1e3:7.1f} ms{max(taken) * 1e3:7.1f} ms")
    good = medians[EXTRA] <= LIMIT
    print(f"{'good' if good else 'TOO SLOW'}: {medians[EXTRA] * 1e3:.1f} ms; the limit is {LIMIT * 1e3:.0f} ms")
    if arguments.json:
        result = {"limit": LIMIT, "medians": medians, "seconds": seconds}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
