"""Show the Mermaid diagrams of the pages as pictures, which need no script from another server, and draw them.

MkDocs calls `on_page_markdown()` for each page (`hooks` in mkdocs.yml). A diagram of PAGE.md is drawn twice, for light
and dark pages, as PAGE.svg and PAGE-dark.svg beside it. `python docs/pictures.py` draws those whose text has changed;
each picture contains the digest of its text.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

FOLDER = Path(__file__).parent
FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
THEMES = {"": "neutral", "-dark": "dark"}  # what is appended to the name of the picture, and Mermaid's theme for it
# Plain SVG text, because browsers show no HTML of a picture. The fonts are those of the charts.
CONFIGURATION = {
    "htmlLabels": False,
    "flowchart": {"htmlLabels": False},
    "sequence": {"width": 120, "actorFontSize": 18, "messageFontSize": 18, "noteFontSize": 18, "actorMargin": 30},
    "themeVariables": {"fontSize": "17px"},
    "fontFamily": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
}


class Diagram(NamedTuple):
    """One diagram.

    Attributes:
        text: What it shows, in Mermaid's language.
        pictures: The file of each theme.
    """

    text: str
    pictures: dict[str, Path]

    @property
    def mark(self) -> str:
        """The comment by which a picture names the text that it shows."""
        return f"<!-- sha256 of its text: {hashlib.sha256(self.text.encode()).hexdigest()} -->"

    @property
    def is_drawn(self) -> bool:
        """Whether all pictures show this text."""
        pictures = self.pictures.values()
        return all(path.is_file() and self.mark in path.read_text(encoding="utf-8") for path in pictures)


class File(Protocol):
    """What is used here of the file of MkDocs."""

    src_uri: str


class Page(Protocol):
    """What is used here of the page of MkDocs."""

    file: File


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Replace the diagram of one page by its pictures and its text."""
    name = Path(page.file.src_uri).stem

    def show(found: re.Match[str]) -> str:
        alternative = "The diagram of this page. Its text follows it."
        light = f"![{alternative}]({name}.svg#only-light)"
        dark = f"![{alternative}]({name}-dark.svg#only-dark)"
        text = textwrap.indent(f"```text\n{found[1]}```", "    ")
        return f'{light}\n{dark}\n\n??? note "The diagram as text"\n{text}'

    return FENCE.sub(show, markdown)


def diagrams() -> Iterator[Diagram]:
    """Return the diagrams of all pages. A page has one at most."""
    for path in sorted(FOLDER.rglob("*.md")):
        for text in FENCE.findall(path.read_text(encoding="utf-8")):
            yield Diagram(text, {theme: path.with_name(f"{path.stem}{end}.svg") for end, theme in THEMES.items()})


def draw_diagrams() -> None:
    """Draw the diagrams whose text has changed."""
    for diagram in diagrams():
        if not diagram.is_drawn:
            for theme, picture in diagram.pictures.items():
                picture.write_text(f"{_draw(diagram.text, theme)}\n{diagram.mark}\n", encoding="utf-8")


def _draw(text: str, theme: str) -> str:
    mmdc = shutil.which("mmdc")
    if mmdc is None:
        raise SystemExit("A diagram has changed. To draw it: npm install --global @mermaid-js/mermaid-cli")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "diagram.mmd").write_text(text, encoding="utf-8")
        (folder / "mermaid.json").write_text(json.dumps(CONFIGURATION | {"theme": theme}))
        # The sandbox of Chromium does not run as root, and the text is ours.
        (folder / "browser.json").write_text(json.dumps({"args": ["--no-sandbox"]}))
        files = ("-i", "diagram.mmd", "-o", "diagram.svg", "-c", "mermaid.json", "-p", "browser.json")
        subprocess.run([mmdc, "-q", "-b", "transparent", *files], cwd=folder, check=True)
        return (folder / "diagram.svg").read_text(encoding="utf-8")
