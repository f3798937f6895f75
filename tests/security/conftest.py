"""Fixtures of the tests of attacks."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def young_garbage_only() -> Iterator[None]:
    """Limit every gc.collect() of the module's tests to what they allocate themselves."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def every_log_record(caplog: pytest.LogCaptureFixture) -> None:
    """Record the log down to DEBUG."""
    caplog.set_level(logging.DEBUG)
