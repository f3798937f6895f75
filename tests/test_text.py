"""Text from elsewhere cannot forge a line, control a terminal or reorder what stands beside it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neon_async._text import counted, escape


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


@pytest.mark.parametrize(("number", "text"), [(0, "0 callers"), (1, "1 caller"), (2, "2 callers")])
def test_a_noun_agrees_with_its_number(number: int, text: str) -> None:
    assert counted(number, "caller") == text
