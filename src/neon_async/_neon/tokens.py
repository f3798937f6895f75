"""Split an SQL text into its statements, and each statement into tokens, as PostgreSQL does (scan.l, psqlscan.l).

It must not know what a statement means.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator


def statements(query: str, *, backslashes: bool = False) -> Iterator[list[str]]:
    """Yield the tokens of each statement of `query`.

    A token is a word in lower case; a sign; a string in its quotes; or a quoted name as `"` and the name. See
    `identifier()` and `string()`.

    Args:
        query: The text.
        backslashes: Whether every string has backslash escapes, because `standard_conforming_strings` is off.
    """
    statement: list[str] = []
    depth = nested = 0  # open parentheses; and open blocks of the body of an SQL function
    tokens = _tokens(query, backslashes)
    for lexeme in tokens:
        if lexeme == ";" and depth <= 0 and not nested:
            yield _decoded(statement)
            statement, depth = [], 0
            continue
        depth += (lexeme == "(") - (lexeme == ")")
        if nested:  # as psql finds the end of BEGIN ATOMIC ... END
            is_label = statement[-1] in ("as", ".")
            nested += 0 if is_label else (lexeme == "case") - (lexeme == "end")
            if lexeme == "atomic" and statement[-1] == "begin":
                statement += [lexeme, *tokens]
                break
        elif lexeme == "atomic" and depth == 0 and statement[-1:] == ["begin"]:
            nested = int(statement[0] == "create" and not _ROUTINES.isdisjoint(statement[1:4]))
        statement.append(lexeme)
    # A body that has no end, or begins in another one: its end was missed, as in `SELECT 1 case; END`, where CASE is
    # the name of a column. The server has found it.
    yield from map(_decoded, _split(statement) if nested else [statement])


_ROUTINES = frozenset({"function", "procedure"})


def _split(tokens: list[str]) -> Iterator[list[str]]:
    """Yield what stands between the semicolons."""
    for is_end, group in itertools.groupby(tokens, ";".__eq__):
        if not is_end:
            yield list(group)


def identifier(lexeme: str) -> str:
    """Return the name that a lexeme stands for, where it is one: a word, or a quoted name without its quotes."""
    return lexeme.removeprefix('"')


def string(lexeme: str) -> str | None:
    """Return the value of a lexeme that is a string, whichever way it was quoted, or None."""
    return lexeme[1:-1].replace("''", "'") if lexeme[0] == "'" else None


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
    |(?P<bits>[bBxX]{_PLAIN})
    |(?P<string>[nN]?{_PLAIN}|[uU]&{_PLAIN})
    |(?P<name>(?:[uU]&)?"(?P<quoted>[^"]*+(?:""[^"]*+)*+)")
    |(?P<dollar>\$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*+)?\$)
    |(?P<word>[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_$\x80-\U0010ffff]*+)
    |(?P<number>[0-9][A-Za-z0-9_.]*+|\$[0-9]++)
    |(?P<open>['"])
    |(?P<sign>.)"""
_TOKEN_WITH_BACKSLASHES = _TOKEN.replace("[eE]", "[eEnN]?", 1).replace(f"[nN]?{_PLAIN}|", "", 1)
_COMMENT_EDGE = r"/\*|\*/"


def _tokens(query: str, backslashes: bool) -> Iterator[str]:
    """Yield the tokens of `query` up to its end, or up to an unterminated string or comment."""
    pattern = _compiled(_TOKEN_WITH_BACKSLASHES if backslashes else _TOKEN, re.VERBOSE | re.DOTALL)
    continuation = _compiled(_ESCAPED, re.DOTALL)
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
            yield _quoted(query[position : end if end >= 0 else len(query)])
            position = end + len(match[0]) if end >= 0 else len(query)
        elif kind == "escaped":
            yield _unescaped(match[0])
        elif kind == "string":
            yield match[0].lstrip("nN")
        elif kind == "name":
            mark = '"' if match[0][0] == '"' else _ENCODED
            yield mark + match["quoted"].replace('""', '"')
        else:
            yield match[0].lower()


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# PostgreSQL documentation, section 4.1.2.2.
_ESCAPE = r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))"
_CONTROLS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _unescaped(lexeme: str) -> str:
    """Return a string with backslash escapes as one without."""
    inner = lexeme[lexeme.index("'") + 1 : -1]
    if "\\" not in inner:
        return f"'{inner}'"

    def character(escape: re.Match[str]) -> str:
        octal, *hexadecimal, other = escape.groups()
        if other is not None:
            value = _CONTROLS.get(other, other)
        else:
            value = _character(int(octal, 8) if octal else int(next(filter(None, hexadecimal)), 16), escape[0])
        return value.replace("'", "''")

    return "'" + _compiled(_ESCAPE, re.DOTALL).sub(character, inner) + "'"


def end_of_comment(query: str, position: int) -> int:
    """Return where the comment ends that begins before `position`; comments can be nested."""
    depth = 1
    for edge in _compiled(_COMMENT_EDGE).finditer(query, position):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(query)


# A name or a string with Unicode escapes, until it is decoded: U&"d\0061ta", or U&"d!0061ta" UESCAPE '!'.
_ENCODED = 'U&"'
_ENCODINGS = (_ENCODED, "U&'", "u&'")


def _decoded(statement: list[str]) -> list[str]:
    if not any(lexeme.startswith(_ENCODINGS) for lexeme in statement):
        return statement
    decoded, position = [], 0
    while position < len(statement):
        lexeme = statement[position]
        position += 1
        if lexeme.startswith(_ENCODINGS):
            mark, rest = "\\", statement[position : position + 2]
            if rest[:1] == ["uescape"] and len(rest) > 1:
                mark, position = string(rest[1]) or mark, position + 2
            mark = re.escape(mark)
            code = rf"{mark}(?:\+([0-9A-Fa-f]{{6}})|([0-9A-Fa-f]{{4}})|({mark}))"
            lexeme = re.sub(code, _unicode, lexeme[2:])
        decoded.append(lexeme)
    return decoded


def _unicode(escape: re.Match[str]) -> str:
    return escape[3] or _character(int(escape[1] or escape[2], 16), escape[0])


def _character(code: int, otherwise: str) -> str:
    return chr(code) if code <= 0x10FFFF else otherwise
