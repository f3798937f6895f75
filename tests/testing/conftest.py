"""The fixtures of the tests of `neon_async.testing`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.processes import Scene, temporary_scene


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with temporary_scene(monkeypatch) as made:
        yield made
