"""The harness of the benchmarks computes ratios within rounds, and its verdict decides the exit status."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from harness import Figure, Limit, Option, Report, Table, run, take_turns

OURS, THEIRS = "ours", "theirs"
TIME = "time"


def measured(ours: list[float], theirs: list[float], *, base: str | None = None) -> Table:
    table = Table("a title", (OURS, THEIRS), [Figure(TIME, "ms", show=("median", "max"), base=base)])
    table.add(OURS, TIME, *ours)
    table.add(THEIRS, TIME, *theirs)
    return table


def start(monkeypatch: pytest.MonkeyPatch, report: Report, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks/example.py", *arguments])

    async def measure(arguments: argparse.Namespace) -> Report:
        return report

    return run(measure, "The first line.\n\nMore.", rounds=3, options=[Option("--calls", "calls per round", 7)])


def test_a_paired_ratio_is_the_median_of_the_ratios_within_each_round() -> None:
    table = measured([1.0, 20.0, 300.0], [2.0, 10.0, 300.0])
    assert table.paired_ratio(TIME, OURS, THEIRS) == 1.0
    assert table.ratio(TIME, OURS, THEIRS) == 2.0


def test_a_paired_ratio_needs_the_same_number_of_rounds_on_both_sides() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        measured([1.0, 2.0], [1.0]).paired_ratio(TIME, OURS, THEIRS)


def test_a_table_shows_every_statistic_in_its_unit_and_the_ratio_to_the_base() -> None:
    table = measured([0.001, 0.002, 0.006], [0.004], base=THEIRS)
    assert [line.split() for line in str(table).splitlines()] == [
        ["a", "title"],
        ["median", "max", "ratio"],
        [OURS, "2.00", "ms", "6.00", "ms", "0.50"],
        [THEIRS, "4.00", "ms", "4.00", "ms", "1.00"],
    ]


@pytest.mark.parametrize(
    ("limit", "line", "status"),
    [
        pytest.param(Limit("it takes {} s", 2, at_most=2), "good: it takes 2 s (limit: at most 2)", 0, id="at most"),
        pytest.param(Limit("it takes {} s", 3, at_most=2), "MISSED: it takes 3 s (limit: at most 2)", 1, id="too much"),
        pytest.param(Limit("{} are served", 2, at_least=2), "good: 2 are served (limit: at least 2)", 0, id="at least"),
        pytest.param(
            Limit("{} are served", 1, at_least=2), "MISSED: 1 are served (limit: at least 2)", 1, id="too few"
        ),
    ],
)
def test_a_limit_decides_the_verdict_and_the_exit_status(
    limit: Limit, line: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Limit("{} is enough", 1, at_most=1)
    assert start(monkeypatch, Report([measured([1.0], [1.0])], [good, limit])) == status
    assert line in capsys.readouterr().out.splitlines()


def test_the_json_contains_the_machine_the_command_the_spread_and_the_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "numbers.json"
    report = Report([measured([3.0, 1.0, 2.0], [4.0])], [Limit("{}", 3, at_most=2)], ["a note"])
    start(monkeypatch, report, "--rounds", "1", "--json", str(file))
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["benchmark"] == "example"
    assert document["command"] == f"python benchmarks/example.py --rounds 1 --json {file}"
    assert document["arguments"] == {"rounds": 1, "calls": 7}
    assert set(document["machine"]) == {"cpus", "system", "python", "openssl", "asyncpg", "neon_async"}
    assert document["good"] is False
    assert [(limit["value"], limit["at_most"], limit["kept"]) for limit in document["limits"]] == [(3, 2, False)]
    [table] = document["tables"]
    figure = table["rows"][OURS][TIME]
    assert (figure["min"], figure["median"], figure["max"], figure["rounds"]) == (1.0, 2.0, 3.0, [3.0, 1.0, 2.0])
    assert document["notes"] == ["a note"]


def test_every_item_takes_its_turn_once_per_round_and_the_first_one_changes() -> None:
    turns = list(take_turns({"a": 1, "b": 2}, 2, warm_up=True))
    assert turns == [
        (False, "a", 1),
        (False, "b", 2),
        (True, "b", 2),
        (True, "a", 1),
        (True, "a", 1),
        (True, "b", 2),
    ]
