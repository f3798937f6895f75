"""Text from elsewhere cannot forge a line, control a terminal or reorder what stands beside it."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import neon_async
from neon_async._text import counted, escape, log


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        pytest.param("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07", id="terminal escapes"),
        pytest.param("a\r\nERROR forged", r"a\r\nERROR forged", id="line breaks"),
        pytest.param("a\x0b\x0c\x1c\x85\u2028\u2029b", r"a\x0b\x0c\x1c\x85\u2028\u2029b", id="every break of Python"),
        pytest.param("admin\u202egnp\u2066\u200f", r"admin\u202egnp\u2066\u200f", id="bidi controls"),
        pytest.param("a\u200b\ufeff\xadb", r"a\u200b\ufeff\xadb", id="what is invisible"),
        pytest.param("a\x9b31m\x00\x7f", r"a\x9b31m\x00\x7f", id="control characters"),
        pytest.param("\udc80\U000e0041", r"\udc80\U000e0041", id="a surrogate, and a tag"),
        pytest.param("nö «é» 日本 😀 \\n", "nö «é» 日本 😀 \\n", id="what is printable stays"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@given(st.text())
def test_escaped_text_is_one_printable_line_and_escaping_it_again_changes_nothing(text: str) -> None:
    escaped = escape(text)
    assert not {unicodedata.category(character) for character in escaped} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert len(escaped.splitlines()) <= 1
    assert escape(escaped) == escaped


def test_every_record_is_made_by_one_function_which_adds_its_facts_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    log(logging.WARNING, "%(endpoint)s: it took %(seconds).1f s", endpoint="ep-a", seconds=2.0, event="a")
    [record] = caplog.records
    assert record.getMessage() == "ep-a: it took 2.0 s"
    assert (vars(record)["endpoint"], vars(record)["seconds"], vars(record)["event"]) == ("ep-a", 2.0, "a")
    package = Path(neon_async.__file__).parent
    loggers = {path.name for path in package.rglob("*.py") if "getLogger(" in path.read_text()}
    assert loggers == {"_text.py", "main.py"}  # the command line adds a handler


@pytest.mark.parametrize(("number", "text"), [(0, "0 callers"), (1, "1 caller"), (2, "2 callers")])
def test_a_noun_agrees_with_its_number(number: int, text: str) -> None:
    assert counted(number, "caller") == text
