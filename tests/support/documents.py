"""The documents of the project and the code in them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Warns|Yields):$")  # of a docstring in Google style
# Whoever copies an example gets its files as they are; the pages are what is read.
DOCUMENTS = sorted([ROOT / "README.md", *(path for path in ROOT.glob("docs/**/*.md") if "examples" not in path.parts)])


class Block(NamedTuple):
    """One block of code in a document.

    Attributes:
        where: The document and the line.
        page: The document, relative to the project.
        language: What stands behind the three back ticks.
        title: The name of the file that it is to be saved as, or "".
        code: The code, after as many empty lines as are above it, so that a traceback shows the line of the document.
    """

    where: str
    page: str
    language: str
    title: str
    code: str


def blocks() -> Iterator[Block]:
    """Return every block of code in README.md and in the pages of the site."""
    for path in DOCUMENTS:
        text, page = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        for found in re.finditer(r"^```(\w*)(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
            above = text.count("\n", 0, found.start(3))
            title = re.search(r'title="(.*?)"', found[2])
            yield Block(f"{page}:{above + 1}", page, found[1], title[1] if title else "", "\n" * above + found[3])


def blocks_in(language: str) -> list[Block]:
    """Return the blocks of one language."""
    return [block for block in blocks() if block.language == language]


def docstring_blocks() -> Iterator[Block]:
    """Return every block of code in a docstring of the package: what is indented outside of the sections of Google."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        page = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = getattr(node, "name", "")
                code = _indented(ast.get_docstring(node) or "")
                if code.strip() and not re.search("[─▶]", code):  # a diagram
                    yield Block(f"{page}:{name}", page, "python", "", code)


def _indented(docstring: str) -> str:
    paragraphs = docstring.split("\n\n")
    # A section with several paragraphs goes on until a line that is not indented.
    kept: list[str] = []
    in_section = False
    for paragraph in paragraphs:
        if not paragraph.startswith("    "):
            in_section = bool(SECTION.match(paragraph.partition("\n")[0]))
        elif not in_section:
            kept.append(paragraph)
    return inspect.cleandoc("\n" + "\n\n".join(kept)) + "\n"
