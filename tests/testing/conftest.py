"""The fixtures of the tests of `neon_async.testing`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Scene


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Set TMPDIR to a new folder. Unlike `tmp_path`, every user can enter it."""
    folder = Path(tempfile.mkdtemp(prefix="test-neon-async-"))
    folder.chmod(0o711)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield Scene(folder)
    shutil.rmtree(folder)
