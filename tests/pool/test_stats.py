"""What a pool tells about itself: a snapshot that nobody can change, whose counts have their seconds and add up."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from typing import Any

import pytest
from support.probes import HANG, connected, make_pool, until

import neon_async
from neon_async._pool.stats import SECONDS_OF, Tallies, Tally
from neon_async.testing import LocalPostgres

FIELDS = {field.name: field.type for field in dataclasses.fields(neon_async.PoolStats)}
# What the docstring promises of every snapshot.
BALANCES = re.findall(r"`([^`]+==[^`]+)`", neon_async.PoolStats.__doc__ or "")


def snapshot(**known: Any) -> neon_async.PoolStats:
    return neon_async.PoolStats(**{name: known.get(name, 0) for name in FIELDS})


def test_a_snapshot_cannot_be_changed() -> None:
    stats: Any = snapshot(size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.size = 2
    assert not hasattr(stats, "__dict__")
    assert stats == snapshot(size=1) != snapshot(size=2)


def test_a_snapshot_is_made_by_names_only() -> None:
    positional: Any = neon_async.PoolStats
    with pytest.raises(TypeError):
        positional(*range(len(FIELDS)))


def test_every_count_has_its_seconds() -> None:
    seconds = {name for name, kind in FIELDS.items() if kind == "float"}
    assert seconds == set(SECONDS_OF.values()) == {name for name in FIELDS if name.endswith("_seconds")}
    assert {FIELDS[name] for name in SECONDS_OF} == {"int"}
    assert len(set(SECONDS_OF.values())) == len(SECONDS_OF)


def test_seconds_are_named_as_what_they_are_of() -> None:
    for count, seconds in SECONDS_OF.items():
        singular = seconds.removesuffix("_seconds")
        assert count in (f"{singular}s", re.sub("y$", "ies", singular)), (count, seconds)


def test_the_docstring_balances_fields_that_exist() -> None:
    assert len(BALANCES) == 3
    for balance in BALANCES:
        names = {node.id for node in ast.walk(ast.parse(balance)) if isinstance(node, ast.Name)}
        assert names <= FIELDS.keys()


def test_tallies_are_snapshots_fields() -> None:
    tallies = Tallies()
    for number, name in enumerate(SECONDS_OF):
        for _ in range(number):
            getattr(tallies, name).add(0.5)
    expected: dict[str, float] = {}
    for number, (count, seconds) in enumerate(SECONDS_OF.items()):
        expected |= {count: number, seconds: number * 0.5}
    assert tallies.snapshot() == expected
    assert set(Tallies.__slots__) == set(Tallies.__annotations__) == set(SECONDS_OF)
    assert snapshot(**tallies.snapshot()).terminations == list(SECONDS_OF).index("terminations")


def test_a_tally_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    assert (tally.count, tally.seconds, repr(tally)) == (0, 0.0, "<Tally: 0 in 0.000 s>")
    tally.add(1.25)
    monkeypatch.setattr("time.monotonic", lambda: 100.5)
    tally.since(100.0)
    assert (tally.count, tally.seconds, repr(tally)) == (2, 1.75, "<Tally: 2 in 1.750 s>")


@pytest.mark.anyio
async def test_the_balances_of_the_docstring_hold_from_before_the_pool_opens_until_after_it_has_closed(
    postgres: LocalPostgres,
) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> neon_async.PoolStats:
        stats = pool.stats()
        seen.append(dataclasses.asdict(stats))
        for balance in BALANCES:
            assert eval(balance, {"__builtins__": {}}, seen[-1]), (balance, stats)
        return stats

    pool = make_pool(postgres, max_size=3)
    assert look().vacant == 3
    async with connected(postgres) as admin, pool:
        async with pool.acquire() as first, pool.acquire() as second:
            assert (look().in_use, look().size) == (2, 2)
            await second.fetchval("SELECT 1")
            await admin.execute("SELECT pg_terminate_backend($1)", await first.fetchval("SELECT pg_backend_pid()"))
            await until(lambda: look().in_use == 1)
        look()
        await until(lambda: look().idle == 1)
        ended = look()
        assert (ended.in_use, ended.vacant, ended.acquires, ended.releases, ended.dials) == (0, 2, 2, 2, 2)
        assert (ended.resets, ended.terminations, ended.wakes, ended.dial_failures) == (1, 1, 1, 0)
        await pool.close(timeout=HANG)
    assert (look().vacant, look().size, look().terminations) == (3, 0, 2)
    for before, after in itertools.pairwise(seen):
        assert all(before[name] <= after[name] for name in (*SECONDS_OF, *SECONDS_OF.values())), (before, after)
