"""Run pytest in a process of its own, on test files as users write them, with the plugin of the package."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import neon_async

ROOT = Path(__file__).parents[2]


def run_pytest(
    folder: Path, *arguments: str, pytest_asyncio: bool = False, **files: str
) -> subprocess.CompletedProcess[str]:
    """Write `files`, and run pytest on them with warnings as errors.

    The plugin is found by its entry point, which is declared in `folder` as in pyproject.toml, so that the package need
    not be installed.

    Args:
        folder: An empty folder.
        *arguments: Arguments of pytest.
        pytest_asyncio: Whether pytest-asyncio is used, which needs a setting.
        **files: The text of each file by its name without `.py`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = folder / "site" / "neon_async_plugin-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: neon-async-plugin\nVersion: 0\n")
    entries = [f"{name} = {target}" for name, target in project["entry-points"]["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *entries, ""]))
    tests = folder / "tests"
    tests.mkdir()
    for name, text in {"conftest": "", **files}.items():
        (tests / f"{name}.py").write_text(text, encoding="utf-8")
    if not any((folder / name).exists() for name in ("pytest.ini", "pyproject.toml")):
        setting = "asyncio_default_fixture_loop_scope = function\n" if pytest_asyncio else ""
        (folder / "pytest.ini").write_text(f"[pytest]\n{setting}")
    plugins = ["-p", "no:cacheprovider", *([] if pytest_asyncio else ["-p", "no:asyncio"])]
    path = [str(metadata.parent), str(Path(neon_async.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    hidden = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    command = [sys.executable, "-X", "dev", "-m", "pytest", "-W", "error", "-q", *plugins, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def passed(finished: subprocess.CompletedProcess[str]) -> int:
    """Return how many tests passed; fail where anything else happened."""
    summary = finished.stdout.splitlines()[-1] if finished.stdout else ""
    assert finished.returncode == 0, finished.stdout + finished.stderr
    words = summary.split()
    assert words[1] == "passed", summary
    assert not {"skipped", "warnings", "warning"}.intersection(words), summary
    return int(words[0])
