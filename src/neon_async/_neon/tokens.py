"""Split an SQL text into its statements, and each statement into tokens, as PostgreSQL does (scan.l, psqlscan.l).

It must not know what a statement means.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator


def statements(query: str) -> Iterator[list[str]]:
    """Yield the tokens of each statement of `query`.

    A token is a word in lower case; a sign; a string in its quotes, or `'` alone where only the server can tell its
    value; or a quoted name as `"` and the name. See `identifier()`.
    """
    statement: list[str] = []
    depth = nested = 0  # open parentheses; and open blocks of the body of an SQL function
    for lexeme in _tokens(query):
        if lexeme == ";" and depth <= 0 and not nested:
            yield _decoded(statement)
            statement, depth = [], 0
            continue
        depth += (lexeme == "(") - (lexeme == ")")
        if nested:  # as psql finds the end of BEGIN ATOMIC ... END
            is_label = statement[-1] in ("as", ".")
            nested += 0 if is_label else (lexeme == "case") - (lexeme == "end")
        elif lexeme == "atomic" and depth == 0 and statement[-1:] == ["begin"]:
            nested = int(statement[0] == "create" and not _ROUTINES.isdisjoint(statement[1:4]))
        statement.append(lexeme)
    yield _decoded(statement)


_ROUTINES = frozenset({"function", "procedure"})


def identifier(lexeme: str) -> str:
    """Return the name that a lexeme stands for, where it is one: a word, or a quoted name without its quotes."""
    return lexeme.removeprefix('"')


def compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Return a compiled pattern: all of them take 15 ms, too long for an import."""
    return _compiled(pattern, flags)


_compiled = functools.cache(re.compile)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

_SPACE = r"[ \t\n\r\f\v]++"
_PLAIN = r"'[^']*+(?:''[^']*+)*+'"
_ESCAPED = r"'[^'\\]*+(?:(?:\\.|'')[^'\\]*+)*+'"
# Every part is possessive: without that, an unterminated string would be tried again at each of its quotes.
_TOKEN = rf"""(?P<gap>{_SPACE}|--[^\r\n]*+)
    |(?P<comment>/\*)
    |(?P<escaped>[eE]{_ESCAPED})
    |(?P<string>(?:[bBxXnN]|[uU]&)?{_PLAIN})
    |(?P<name>(?:[uU]&)?"(?P<quoted>[^"]*+(?:""[^"]*+)*+)")
    |(?P<dollar>\$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*+)?\$)
    |(?P<word>[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_$\x80-\U0010ffff]*+)
    |(?P<number>[0-9][A-Za-z0-9_.]*+|\$[0-9]++)
    |(?P<open>['"])
    |(?P<sign>.)"""
_COMMENT_EDGE = r"/\*|\*/"


def _tokens(query: str) -> Iterator[str]:
    """Yield the tokens of `query` up to its end, or up to an unterminated string or comment."""
    pattern, continuation = _compiled(_TOKEN, re.VERBOSE | re.DOTALL), _compiled(_ESCAPED, re.DOTALL)
    position, after_escaped = 0, False
    while position < len(query):
        # A string that follows an E'' string continues it, with the same backslash escapes.
        match = (after_escaped and continuation.match(query, position)) or pattern.match(query, position)
        assert match
        position, kind = match.end(), match.lastgroup or "escaped"
        if kind == "gap":
            continue
        if kind == "comment":
            position = end_of_comment(query, position)
            continue
        after_escaped = kind == "escaped"
        if kind == "open":
            return
        if kind == "dollar":
            end = query.find(match[0], position)
            position = end + len(match[0]) if end >= 0 else len(query)
            yield "'"
        elif kind in ("string", "escaped"):
            yield match[0] if kind == "string" else "'"
        elif kind == "name":
            mark = '"' if match[0][0] == '"' else _ENCODED
            yield mark + match["quoted"].replace('""', '"')
        else:
            yield match[0].lower()


def end_of_comment(query: str, position: int) -> int:
    """Return where the comment ends that begins before `position`; comments can be nested."""
    depth = 1
    for edge in _compiled(_COMMENT_EDGE).finditer(query, position):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(query)


# A name with Unicode escapes, until it is decoded: U&"d\0061ta", or U&"d!0061ta" UESCAPE '!'.
_ENCODED = 'U&"'


def _decoded(statement: list[str]) -> list[str]:
    if not any(lexeme.startswith(_ENCODED) for lexeme in statement):
        return statement
    decoded, position = [], 0
    while position < len(statement):
        lexeme = statement[position]
        position += 1
        if lexeme.startswith(_ENCODED):
            escape, rest = "\\", statement[position : position + 2]
            if rest[:1] == ["uescape"] and len(rest) > 1:
                escape, position = rest[1][1:2], position + 2
            code = rf"{re.escape(escape)}(?:\+([0-9A-Fa-f]{{6}})|([0-9A-Fa-f]{{4}}))"
            lexeme = '"' + re.sub(code, _character, lexeme.removeprefix(_ENCODED))
        decoded.append(lexeme)
    return decoded


def _character(escape: re.Match[str]) -> str:
    code = int(escape[1] or escape[2], 16)
    return chr(code) if code <= 0x10FFFF else escape[0]
