"""The site is built without a warning: every link and anchor leads somewhere, and machines get it as Markdown."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import DOCUMENTS, ROOT

sys.path.append(str(ROOT / "docs"))
import tables


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is published. `.ci/run` installs the extra `docs`; a developer's machine may not have it."""
    if importlib.util.find_spec("mkdocs") is None:
        complaint = "needs MkDocs: python -m pip install -e '.[docs]'"
        pytest.fail(complaint) if os.environ.get("NEON_ASYNC_TEST_SITE") else pytest.skip(complaint)
    folder = tmp_path_factory.mktemp("site")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs") for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")]
    assert len(pages) >= 18
    built = [page.with_suffix("") for page in pages if page.name != "index.md"]
    assert [page for page in built if not (site / page / "index.html").is_file()] == []


def test_the_reference_shows_every_public_name_with_its_docstring(site: Path) -> None:
    reference = (site / "reference" / "index.html").read_text(encoding="utf-8")
    names = re.findall(r"^::: (.+)$", tables.reference(), re.MULTILINE)
    assert len(names) >= 80
    sections = {name: reference.partition(f'id="{name}"')[2].partition("<h3 ")[0] for name in names}
    assert [name for name, section in sections.items() if "<p>" not in section] == []
    assert "Opening the pool connects only where" in sections["neon_async.create_pool"]


def test_a_diagram_is_shown_as_a_picture_and_as_text(site: Path) -> None:
    for name in ("connect", "acquire", "suspend", "shutdown"):
        page = (site / "how-it-works" / name / "index.html").read_text(encoding="utf-8")
        for picture in (f"{name}.svg", f"{name}-dark.svg"):
            assert f'src="../{picture}#only-' in page
            assert (site / "how-it-works" / picture).is_file()
        assert "The diagram as text" in page


def test_long_names_in_tables_break_between_words(site: Path) -> None:
    page = (site / "security" / "index.html").read_text(encoding="utf-8")
    assert "<code>tests/<wbr>security/<wbr>test_<wbr>refusals.py::<wbr>test_<wbr>create_" in page


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    """Mermaid, for one: Material loads it from a server of its own where a page contains a block for it."""
    loaded = re.compile(
        r'<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//|class="mermaid"'
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 20
    assert [str(page.relative_to(site)) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_machines_get_the_site_as_markdown(site: Path) -> None:
    index, full = ((site / name).read_text(encoding="utf-8") for name in ("llms.txt", "llms-full.txt"))
    assert index.startswith("# neon-async\n")
    assert "settings/index.md" in index
    for text in ("connect_timeout", "CommitUnknownError", "add_exception_handlers"):
        assert text in full
