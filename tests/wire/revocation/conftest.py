"""Fixtures of the tests of `_wire.revocation`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crls import ListServer, RevocablePKI, list_server, revocable_pki
from support.revocations import forget_everything


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, and a process that knows no list."""
    return forget_everything(tmp_path, monkeypatch)


@pytest.fixture
def lists() -> Iterator[ListServer]:
    """A server of lists."""
    with list_server() as server:
        yield server


@pytest.fixture
def pki() -> Iterator[RevocablePKI]:
    """A PKI whose lists are published."""
    with revocable_pki() as made:
        yield made
