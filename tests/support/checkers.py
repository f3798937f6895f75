"""Environments as users have them, and the type checkers that judge what users write in them.

basedpyright is pyright with its Node.js as a wheel. pyright's own package downloads itself from another registry.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

import neon_async

_PACKAGE = Path(neon_async.__file__).parent
_TOO_LONG = 300.0  # seconds; a check takes a few


def make_environment(folder: Path, *, without: str = "neon_async") -> Path:
    """Return the Python of a new environment: neon-async, and what is installed here.

    Args:
        folder: Where to make it.
        without: What the names of packages that are left out begin with.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    installed = {path.name: path for key in ("purelib", "platlib") for path in Path(sysconfig.get_path(key)).iterdir()}
    for name, path in installed.items():
        if not name.startswith(("neon_async", without)) and path.suffix != ".pth":
            (packages / name).symlink_to(path)
    (packages / "neon_async").symlink_to(_PACKAGE)
    return python


def mypy(python: Path, paths: Iterable[Path], folder: Path, *options: str) -> str:
    """Return what mypy says of `paths` with `--strict`, or "". It knows nothing of this project's own configuration.

    Args:
        python: The Python of the environment.
        paths: What users write.
        folder: Where mypy runs and keeps its cache.
        options: Further options of mypy.
    """
    arguments = ["--strict", "--config-file=", f"--cache-dir={folder / 'cache'}", f"--python-executable={python}"]
    said = _run(folder, "mypy", *arguments, *options, *map(str, paths))
    return "" if said.startswith("Success: ") else said


def pyright(python: Path, paths: Iterable[Path], folder: Path, **settings: object) -> str:
    """Return what pyright says of `paths` in its strict mode, or "".

    Args:
        python: The Python of the environment.
        paths: What users write.
        folder: Where pyright runs and finds its configuration.
        settings: Further settings of pyright.
    """
    configuration = {
        "include": [str(path) for path in paths],
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
        **settings,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration))
    said = _run(folder, "basedpyright", "--project", str(folder), "--pythonpath", str(python))
    return "" if said.startswith("0 errors, 0 warnings, 0 notes") else said


def completeness(python: Path, folder: Path) -> str:
    """Return what pyright says of the types of neon_async, as `--verifytypes` shows it.

    Args:
        python: The Python of the environment.
        folder: Where pyright runs.
    """
    options = ["--verifytypes", "neon_async", "--ignoreexternal", "--pythonpath", str(python)]
    return _run(folder, "basedpyright", *options)


def _run(folder: Path, *command: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False, timeout=_TOO_LONG
    )
    return finished.stdout + finished.stderr
