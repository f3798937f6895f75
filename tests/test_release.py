"""What is released is consistent: the version, the changelog, the classifiers and the workflow that publishes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import neon_async

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEADING = re.compile(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)


def test_every_version_in_the_changelog_is_a_version_with_a_date_and_the_newest_is_first() -> None:
    headings = HEADING.findall(CHANGELOG)
    assert [line for line in CHANGELOG.splitlines() if line.startswith("## ")] == [
        f"## [{version}]" + (f" - {date}" if date else "") for version, date in headings
    ]
    released = [(version, date) for version, date in headings if version != "Unreleased"]
    assert headings[: len(headings) - len(released)] in ([], [("Unreleased", "")])
    assert all(date for _, date in released)
    numbers = [tuple(map(int, version.split("."))) for version, _ in released]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_changelog_has_the_version_of_the_code_or_changes_for_it() -> None:
    newest = HEADING.findall(CHANGELOG)[0][0]
    assert newest in ("Unreleased", neon_async.__version__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", neon_async.__version__)


def test_the_classifiers_name_every_python_that_is_supported() -> None:
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert named == [f"3.{minor}" for minor in range(11, 16)]
    assert PROJECT["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize("document", ["README.md", "docs/quick-start.md"])
def test_the_documents_name_the_same_pythons(document: str) -> None:
    assert "Python 3.11 to 3.15" in (ROOT / document).read_text(encoding="utf-8")


def test_the_workflow_publishes_what_has_been_checked_without_a_token() -> None:
    build, publish = WORKFLOW.split("\n  publish:\n")
    assert ".ci/dist dist" in build
    assert "id-token: write" in publish
    assert "needs: build" in publish
    assert "secrets." not in WORKFLOW
    assert "password" not in WORKFLOW


def test_the_check_of_what_is_released_is_part_of_ci() -> None:
    assert ".ci/dist " in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


METADATA: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"][
    "metadata"
]
SITE = PROJECT["urls"]["Documentation"]


def test_every_address_of_the_site_is_the_same() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^site_url: (\S+)", config, re.MULTILINE) == [SITE]
    assert all(url.startswith(SITE) for url in PROJECT["urls"].values())


def test_every_link_of_the_readme_leads_to_the_site_on_pypi() -> None:
    """There is no repository around it there."""
    [readme] = METADATA["hooks"].values()
    text = (ROOT / readme["fragments"][0]["path"]).read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https://)", text)
    for substitution in readme["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert re.findall(r"\]\((?!https://)", text) == []
    paths = [url.removeprefix(SITE) for url in re.findall(r"\]\((https://[^)]+)\)", text) if url.startswith(SITE)]
    assert len(paths) == len(relative) >= 15
    pages = [path.partition("#")[0] for path in paths]
    files = [f"{page.removesuffix('/')}.md" if page.endswith("/") else page for page in pages]
    assert [file for file in files if not (ROOT / "docs" / file).is_file()] == []


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
