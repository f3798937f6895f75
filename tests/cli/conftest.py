"""The fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Scene, temporary_scene

from neon_async.testing import LocalPostgres


@pytest.fixture
def anchor(postgres: LocalPostgres, tmp_path: Path) -> str:
    """Return the path of a file with the trust anchor of `postgres`."""
    path = tmp_path / "root.pem"
    path.write_bytes(postgres.trust_anchor)
    return str(path)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with temporary_scene(monkeypatch) as made:
        yield made


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that change width, colours and encoding of the output."""
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONUTF8", "1")
