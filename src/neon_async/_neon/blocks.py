"""Find the SQL in a block of PL/pgSQL, such as that of DO.

It must not know what a command means.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from .tokens import identifier, string

# Stands in the texts of `executed()` for what is known only while the block runs.
UNKNOWN = "?"

# The commands of which not all expressions are executed. All others are like an expression.
_COMMANDS = frozenset(
    {"alter", "comment", "create", "do", "drop", "explain", "grant", "import", "listen", "load", "prepare", "revoke"}
    | {"security", "set"}
)
# The words of PL/pgSQL before a command; `>` ends a label.
_BEFORE = frozenset({"begin", "else", "loop", "then", ">"})
# What follows the name of a variable or column, but no such word of a command.
_AFTER_NAME = frozenset({":", "=", ".", "[", ",", ")", "else", "end", "when"})
# What ends the text of EXECUTE.
_AFTER_TEXT = frozenset({"into", "loop", "using"})
# What can stand before the beginning of the text.
_BEFORE_TEXT = frozenset({"(", ".", "concat", "format", "pg_catalog"})
_SPECIFIER = r"%(?:[0-9]+\$)?-?[0-9]*[sIL]"


def block_of(words: list[str]) -> str:
    """Return the block that DO executes, or '' where it is in another language than PL/pgSQL."""
    language, parts = "plpgsql", []
    for before, lexeme in itertools.pairwise(["do", *words]):
        value = string(lexeme)
        if before == "language":
            language = (value or identifier(lexeme)).lower()
        elif value is not None:
            parts.append(value)
    return "".join(parts) if language == "plpgsql" else ""


def split(statement: list[str]) -> tuple[list[str], list[str]]:
    """Return the expressions at the beginning of a statement of a block, and the command that follows them."""
    for index, (before, lexeme) in enumerate(itertools.pairwise([">", *statement])):
        if lexeme in _COMMANDS and before in _BEFORE and _is_command(lexeme, statement[index + 1 :]):
            return statement[:index], statement[index:]
    return statement, []


def _is_command(word: str, rest: list[str]) -> bool:
    if not rest or rest[0] in _AFTER_NAME:
        return False
    match word:  # and not a variable that is declared, with its type
        case "listen":
            return len(rest) == 1
        case "load":
            return string(rest[0]) is not None
        case "prepare":
            return rest[1:2] in (["as"], ["("])
    return True


def executed(statement: list[str]) -> Iterator[str]:
    """Yield the texts that EXECUTE executes, with `UNKNOWN` as a name for what is known only later."""
    for index, lexeme in enumerate(statement):
        if lexeme == "execute":
            yield _assembled(itertools.takewhile(lambda word: word not in _AFTER_TEXT, statement[index + 1 :]))


def _assembled(tokens: Iterable[str]) -> str:
    text, gap, outer = "", list[str](), frozenset[str]()
    for lexeme in tokens:
        value = string(lexeme)
        if value is None:
            gap.append(lexeme)
            continue
        if text:
            if "format" in outer and gap[:1] == [","]:  # the value of a specifier
                return text
            is_joined = gap == ["|", "|"] or (gap == [","] and "concat" in outer)
            text += "" if is_joined else _PLACEHOLDER
        elif _BEFORE_TEXT.issuperset(gap):
            outer = frozenset(gap)
        else:
            text = _PLACEHOLDER
        text += re.sub(_SPECIFIER, _PLACEHOLDER, value) if "format" in outer else value
        gap = []
    return text + (_PLACEHOLDER if text and not _CLOSING.issuperset(gap) else "")


_PLACEHOLDER = f' "{UNKNOWN}" '
_CLOSING = frozenset({")"})
