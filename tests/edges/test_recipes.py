"""The examples of packages that connect by themselves run, with the string of the console, on verified connections."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neon_async.testing import LocalPostgres

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PACKAGES = ["databases", "piccolo", "tortoise"]

# What a local server needs besides, which the string of the console cannot say. And a look at what was opened.
RUN = """
import runpy, sys
import neon_async

patch, opened = neon_async.patch_asyncpg, []

def patch_for_a_local_server(**options):
    return patch(hostaddr="127.0.0.1", trust_anchor=sys.argv[2], init=init, **options)

async def init(connection):
    opened.append(neon_async.connection_tls_report(connection).version)

neon_async.patch_asyncpg = patch_for_a_local_server
runpy.run_path(sys.argv[1], run_name="__main__")
print(*opened)
"""


def test_there_is_an_example_of_each_package() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} >= {f"{package}_app.py" for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_example_runs(package: str, postgres: LocalPostgres, tmp_path: Path) -> None:
    assert importlib.util.find_spec(package) is not None, f"{package} is not installed: pip install -e '.[dev]'"
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(postgres.trust_anchor)
    dsn = f"{postgres.dsn.partition('?')[0]}?sslmode=require&channel_binding=require"
    finished = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", RUN, EXAMPLES / f"{package}_app.py", anchor],
        env=os.environ | {"DATABASE_URL": dsn},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    *printed, opened = finished.stdout.splitlines()
    assert "hello" in "".join(printed)
    assert set(opened.split()) == {"TLSv1.3"}
