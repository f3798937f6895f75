"""The import contracts of pyproject.toml hold, and would notice if they did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package below `tree`, whatever is installed."""
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "COLUMNS": "200"}  # long names are not wrapped
    return subprocess.run(
        [sys.executable, "-c", command], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def test_every_import_contract_is_kept() -> None:
    finished = lint_imports(ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        pytest.param("_errors", "from . import _pool", "point down only", id="upward"),
        pytest.param("_timing", "from . import _errors", "point down only", id="sibling"),
        pytest.param("_wire/tls", "from .._driver import connector", "point down only", id="upward from a package"),
        pytest.param("_new", "from . import _pool", "point down only", id="module without a layer"),
        pytest.param("_new/__init__", "from .. import _pool", "point down only", id="package without a layer"),
        pytest.param("_config/dsn", "import asyncio", "What is pure", id="event loop in a pure package"),
        pytest.param("_config/new", "import asyncio", "What is pure", id="event loop in a new module"),
        pytest.param("_wire/tls", "import asyncpg", "asyncpg is imported", id="asyncpg below the seam"),
        pytest.param("_wire/dial", "import cryptography", "What the extras install", id="extra in the core"),
        pytest.param("_pool/pool", "import sqlalchemy", "What the extras install", id="framework in the core"),
        pytest.param("testing/__init__", "from .. import sqlalchemy", "point down only", id="edge in a lower layer"),
    ],
)
def test_a_planted_import_breaks_its_contract(module: str, line: str, contract: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "src" / "neon_async" / f"{module}.py"
    planted.parent.mkdir(exist_ok=True)
    with planted.open("a") as file:
        file.write(f"\n{line}\n")
    finished = lint_imports(tmp_path)
    broken = [text for text in finished.stdout.splitlines() if "BROKEN" in text.split()]
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert any(contract in text for text in broken), finished.stdout
