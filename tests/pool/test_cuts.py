"""A short run of `support/cuts.py`; `python -m support.chaos --cuts` cuts after every byte."""

from __future__ import annotations

import secrets

import pytest
from support import cuts

from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

STEP = 41


async def test_a_write_behind_a_reset_is_neither_lost_nor_doubled_wherever_the_connection_is_cut(
    postgres: LocalPostgres,
) -> None:
    first = secrets.randbelow(STEP)
    print(f"the first cut is after {first} bytes")  # noqa: T201  pytest shows it when this fails
    report = await cuts.run(postgres, first=first, step=STEP)
    assert not report.problems, str(report)
    assert len(report.cuts) == len(cuts.WAYS) * len(cuts.DIRECTIONS), str(report)
    assert min(report.cuts.values()) >= 5, str(report)
    assert report.fates["acknowledged, kept 1 times"] >= len(report.cuts), str(report)
