"""The tests that SQLAlchemy ships for dialects pass, with a pool of SQLAlchemy's and with one of ours.

They run in processes of their own, because SQLAlchemy's plugin changes pytest.
Those of reflection are left out: there are as many, and they test what PostgreSQL answers and not the driver.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.engines import with_scheme

import neon_async
from neon_async.testing import LocalPostgres

SUITE = Path(__file__).parents[1] / "support" / "dialect_suite"
DATABASE = "suite"


async def execute(server: LocalPostgres, query: str, **keywords: Any) -> None:
    connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor, **keywords)
    await connection.execute(query)
    await connection.close()


@pytest.fixture
def dsn(postgres: LocalPostgres) -> Iterator[str]:
    """A database of its own, because the suite drops everything that it finds."""
    asyncio.run(execute(postgres, f"CREATE DATABASE {DATABASE}"))
    asyncio.run(execute(postgres, "CREATE SCHEMA test_schema", database=DATABASE))
    yield urlsplit(postgres.dsn)._replace(path=f"/{DATABASE}").geturl()
    asyncio.run(execute(postgres, f"DROP DATABASE {DATABASE} WITH (FORCE)"))


# SQLAlchemy 2.0.54 has 178 tests of types, 2.1 twice as many.
@pytest.mark.parametrize("engine", ["sqlalchemy", "neon_async"])
@pytest.mark.parametrize(("name", "at_least"), [("types", 150), ("select", 130), ("writes", 200)])
def test_the_suite_for_dialects_passes(
    name: str, at_least: int, engine: str, dsn: str, postgres: LocalPostgres, tmp_path: Path
) -> None:
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(postgres.trust_anchor)
    path = os.pathsep.join([str(SUITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ["-c", "pytest.ini", "-p", "plugin", "-p", "no:cacheprovider", "-q", "--dburi", with_scheme(dsn)]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"suite_{name}.py"],
        cwd=SUITE,
        env=os.environ | {"ENGINE": engine, "DSN": dsn, "TRUST_ANCHOR": str(anchor), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
