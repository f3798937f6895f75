"""The pictures of the site show what its pages say."""

from __future__ import annotations

import json
import re
import sys
from xml.etree import ElementTree as ET

import pytest
from support.documents import ROOT, blocks_in

sys.path.append(str(ROOT / "docs"))
import charts
import diagrams


def test_every_diagram_is_drawn_from_the_text_of_its_page() -> None:
    drawn = list(diagrams.diagrams())
    assert len(drawn) == len(blocks_in("mermaid")) == 4
    assert [path.name for diagram in drawn for path in diagram.pictures.values() if not diagram.is_drawn] == []


MEASURED = [pytest.param(chart, id=chart.name) for chart in charts.measured()]


def test_every_file_of_figures_has_a_chart_and_every_chart_a_benchmark() -> None:
    names = {chart.name for chart in charts.CHARTS}
    assert {path.stem for path in (ROOT / "docs" / "figures").iterdir()} <= names
    assert names <= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert len(MEASURED) >= 5


@pytest.mark.parametrize("chart", MEASURED)
def test_a_chart_shows_the_figures_that_are_stored(chart: charts.Chart) -> None:
    picture = (ROOT / "docs" / f"{chart.name}.svg").read_text(encoding="utf-8")
    assert picture == charts.svg_of(chart)
    document = json.loads((ROOT / "docs" / "figures" / f"{chart.name}.json").read_text(encoding="utf-8"))
    assert document["benchmark"] == chart.name
    # The page says how they were measured; it shows no folder of the machine.
    assert f"`{document['command']}` on " in charts.charts()
    assert document["machine"]["neon_async"] == "src/neon_async/__init__.py"
    assert re.fullmatch(
        rf"python benchmarks/{chart.name}\.py [^/]*--json docs/figures/{chart.name}\.json", document["command"]
    )


@pytest.mark.parametrize("chart", [pytest.param(chart, id=chart.name) for chart in charts.CHARTS])
def test_a_chart_draws_figures_that_its_benchmark_measures(chart: charts.Chart) -> None:
    """Also where the figures are not stored yet."""
    source = (ROOT / "benchmarks" / f"{chart.name}.py").read_text(encoding="utf-8")
    words = {word for figure in chart.bars for word in re.split(", ", figure)}
    assert [word for word in words if f'{word}"' not in source] == []


def test_the_length_of_a_bar_is_its_value() -> None:
    bars = [charts.Bar("one", 20.0, "20 ms", "20 ms"), charts.Bar("two", 30.0, "30 + 10", "40", extra=10.0)]
    root = ET.fromstring(charts.bar_chart("a < b", [charts.Group("ours", bars, True)], extra="of these"))
    drawn = [element for element in root if "bar" in element.get("class", "").split() and element.get("height") == "13"]
    widths = [float(element.get("width", 0)) for element in drawn]
    assert [round(width / sum(widths[1:]), 2) for width in widths] == [0.5, 0.75, 0.25]
    assert "a < b" in "".join(root.itertext())
    assert [element.get("class") for element in drawn] == ["bar ours", "bar ours", "bar ours extra"]
