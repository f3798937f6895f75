"""What callers write passes mypy --strict, and what asyncpg-stubs refuses is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", sorted((HERE / "typing").glob("*.py")), ids=lambda path: path.stem)
def test_mypy_strict_judges_what_callers_write_as_it_is_marked(path: Path, tmp_path: Path) -> None:
    """In a mypy that knows nothing of this project's own configuration, as a caller's does."""
    arguments = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", "--follow-imports=silent"]
    judged = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, str(path)],
        env={**os.environ, "MYPYPATH": str(HERE.parent / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.stdout == "Success: no issues found in 1 source file\n", judged.stdout + judged.stderr
