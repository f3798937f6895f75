"""The pictures of the site show what its pages say."""

from __future__ import annotations

import sys

from support.documents import ROOT, blocks_in

sys.path.append(str(ROOT / "docs"))
import diagrams


def test_every_diagram_is_drawn_from_the_text_of_its_page() -> None:
    drawn = list(diagrams.diagrams())
    assert len(drawn) == len(blocks_in("mermaid")) == 4
    assert [path.name for diagram in drawn for path in diagram.pictures.values() if not diagram.is_drawn] == []
