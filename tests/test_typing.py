"""What users write passes mypy and pyright in their strict modes as it is marked: with asyncpg-stubs and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkers import completeness, make_environment, mypy, pyright
from support.documents import blocks_in

TYPING = Path(__file__).parent / "typing"
STUBS = "asyncpg-stubs"
EDGES = TYPING / "without_stubs" / "edges.py"  # the frameworks take long to check
WITHOUT_STUBS = sorted({*(TYPING / "without_stubs").glob("*.py")} - {EDGES})
WITH_ASYNCPG = TYPING / "with_asyncpg.py"  # asyncpg's classes must be known: by the stubs or by its code
WITH_STUBS = [*sorted(TYPING.glob("*.py")), *WITHOUT_STUBS, EDGES]


def test_mypy_judges_what_users_write_as_it_is_marked(tmp_path: Path) -> None:
    assert mypy(make_environment(tmp_path / "user"), WITH_STUBS, tmp_path) == ""


def test_pyright_judges_what_users_write_as_it_is_marked(tmp_path: Path) -> None:
    assert pyright(make_environment(tmp_path / "user"), WITH_STUBS, tmp_path) == ""


def test_mypy_judges_what_users_without_stubs_write_as_it_is_marked(tmp_path: Path) -> None:
    assert mypy(make_environment(tmp_path / "user", without=STUBS), [*WITHOUT_STUBS, EDGES], tmp_path) == ""


def test_mypy_judges_it_as_it_is_marked_where_it_reads_the_code_of_asyncpg_itself(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "user", without=STUBS)
    assert mypy(python, [*WITHOUT_STUBS, WITH_ASYNCPG], tmp_path, "--follow-untyped-imports") == ""


def test_pyright_judges_what_users_without_stubs_write_as_it_is_marked(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "user", without=STUBS)
    assert pyright(python, [*WITHOUT_STUBS, EDGES, WITH_ASYNCPG], tmp_path) == ""


@pytest.mark.parametrize("check", [mypy, pyright])
def test_the_code_on_the_page_about_types_passes(tmp_path: Path, check: Callable[..., str]) -> None:
    (block,) = [block for block in blocks_in("python") if block.page == "docs/guides/typing.md"]
    path = tmp_path / "page.py"
    path.write_text(block.code)
    assert check(make_environment(tmp_path / "user", without=STUBS), [path], tmp_path) == ""


@pytest.mark.parametrize("without", ["nothing", STUBS])
def test_the_type_of_every_public_name_is_known(tmp_path: Path, without: str) -> None:
    said = completeness(make_environment(tmp_path / "user", without=without), tmp_path)
    assert "Type completeness score: 100%" in said, said


WRONG = """
import neon_async

neon_async.create_pool("", revocation="on")
neon_async.create_pool("", revocation="off")  # type: ignore[call-overload]
"""


@pytest.mark.parametrize("check", [mypy, pyright])
def test_what_is_wrong_and_a_mark_that_is_not_needed_are_found(tmp_path: Path, check: Callable[..., str]) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    said = check(make_environment(tmp_path / "user"), [path], tmp_path)
    assert all(f"{path.name}:{line}:" in said for line in (4, 5)), said
