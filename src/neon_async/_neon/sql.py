"""Which feature of a session an SQL text uses that a pooler in transaction mode cannot give.

Pure: text in, answer out. It reads SQL as PostgreSQL's scanner does (src/backend/parser/scan.l), so that nothing inside
a string, a comment or a quoted name counts. A refusal must never be wrong, so in doubt a text passes: what stands in
bodies of functions, in `DO`, behind `EXPLAIN` or `CREATE`, and what only cleans up (`UNLISTEN`, `RESET`,
`pg_advisory_unlock`), which is harmless where there is nothing to clean.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple


class SessionFeature(NamedTuple):
    """Something that only a session can give: its name, and what does the same within a transaction, or ''."""

    name: str
    instead: str


# What PgBouncer sets on whichever server connection a client is given (its documentation, track_extra_parameters).
TRACKED_SETTINGS = frozenset(
    {"application_name", "client_encoding", "datestyle", "intervalstyle", "standard_conforming_strings", "timezone"}
)

_SESSION_LOCKS = frozenset(
    {"pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared"}
)
# Long texts are data, mostly: they are judged by their beginning, and not remembered.
_JUDGED = 65_536
_REMEMBERED = 4_096

# Without one of these words no text is refused. It costs a search at C speed, once for each text.
_SUSPICIOUS = r"listen|advisory_lock|set_config|(?:^|[;/\s])set\s"


def prepare() -> None:
    """Compile what the first judgement needs: it takes some 15 ms, too long for an event loop, and for an import."""
    session_feature("LISTEN a; SELECT E''")


@functools.cache
def _compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(pattern, flags)


def session_feature(query: str) -> SessionFeature | None:
    """Return the feature of a session that `query`, one statement or several, would use, or None."""
    return _remembered(query) if len(query) <= _REMEMBERED else _judge(query[:_JUDGED])


def _judge(query: str) -> SessionFeature | None:
    if not _compiled(_SUSPICIOUS, re.IGNORECASE).search(query):
        return None
    return next(filter(None, map(_feature, _statements(query))), None)


_remembered = functools.lru_cache(maxsize=512)(_judge)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: a word in lower case, a sign, a string in its quotes or as "'", a quoted name as '"' and the name

_SPACE = r"[ \t\n\r\f\v]++"
_PLAIN = r"'[^']*+(?:''[^']*+)*+'"
_ESCAPED = r"'[^'\\]*+(?:(?:\\.|'')[^'\\]*+)*+'"
# Every part is possessive, or a string without an end would be tried at each of its quotes.
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
    """Yield the tokens of `query` up to its end, or up to a string or comment that has none."""
    token, continuation = _compiled(_TOKEN, re.VERBOSE | re.DOTALL), _compiled(_ESCAPED, re.DOTALL)
    position, after_escaped = 0, False
    while position < len(query):
        # A string behind an E'' string is the rest of it, and has its backslashes.
        match = (after_escaped and continuation.match(query, position)) or token.match(query, position)
        assert match
        position, kind = match.end(), match.lastgroup or "escaped"
        if kind == "gap":
            continue
        if kind == "comment":
            position = _end_of_comment(query, position)
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
            yield '"' + match["quoted"]
        else:
            yield match[0].lower()


def _end_of_comment(query: str, position: int) -> int:
    depth = 1
    for edge in _compiled(_COMMENT_EDGE).finditer(query, position):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(query)


def _statements(query: str) -> Iterator[list[str]]:
    """Yield the tokens of each statement, up to the body of a function in SQL, whose end only a parser can tell."""
    statement: list[str] = []
    depth = 0
    for lexeme in _tokens(query):
        if lexeme == ";" and depth <= 0:
            yield statement
            statement, depth = [], 0
            continue
        depth += (lexeme == "(") - (lexeme == ")")
        if lexeme == "atomic" and statement[:1] == ["create"] and statement[-1] == "begin":
            return
        statement.append(lexeme)
    yield statement


# ---------------------------------------------------------------------------------------------------------------------
# Statements

_ADVICE_SET = "SET LOCAL inside a transaction"
_ADVICE_CONFIG = "set_config(..., true) inside a transaction"
_RUNS_FUNCTIONS = frozenset({"select", "with", "values", "insert", "update", "delete", "merge", "("})
# What stands in front of a name that is followed by a parenthesis and yet no function.
_NAMES_SOMETHING = frozenset({"into", "with", "recursive", "as", "table", "."})


def _feature(statement: list[str]) -> SessionFeature | None:
    first = statement[0] if statement else ""
    if first == "listen":
        return SessionFeature("LISTEN", "")
    if first == "set":
        return _of_set(statement)
    if first in _RUNS_FUNCTIONS:
        return _of_functions(statement)
    return None


def _of_set(statement: list[str]) -> SessionFeature | None:
    """`SET [SESSION] name ...`, as src/backend/parser/gram.y has it under set_rest."""
    words = [lexeme.lstrip('"').lower() for lexeme in statement[1:]]
    if words[:1] == ["session"]:
        words = words[1:]
    match words:
        case ["local" | "transaction" | "constraints" | "names", *_] | ["time", "zone", *_] | [*_, "default"]:
            return None
        case ["characteristics" | "authorization" as what, *_]:
            return SessionFeature(f"SET SESSION {what.upper()}", "")
        case ["role", *_]:
            return SessionFeature("SET ROLE", "SET LOCAL ROLE inside a transaction")
        case ["schema", *_]:
            return SessionFeature("SET SCHEMA", "SET LOCAL SCHEMA inside a transaction")
        case [name, "=" | "to", *_]:
            return None if name in TRACKED_SETTINGS else SessionFeature(f"SET {name}", _ADVICE_SET)
        case [prefix, ".", name, "=" | "to", *_]:
            return SessionFeature(f"SET {prefix}.{name}", _ADVICE_SET)
    return None


def _of_functions(statement: list[str]) -> SessionFeature | None:
    opened: list[tuple[str, list[int]]] = []  # of each parenthesis: what it calls, and where its arguments begin
    for index, lexeme in enumerate(statement):
        if lexeme == "(":
            name = _called(statement, index)
            if name in _SESSION_LOCKS:
                of_transaction = name.replace("_lock", "_xact_lock", 1)
                return SessionFeature(f"{name}()", f"{of_transaction}() inside a transaction")
            opened.append((name, [index + 1]))
        elif lexeme == "," and opened:
            opened[-1][1].append(index + 1)
        elif lexeme == ")" and opened:
            name, arguments = opened.pop()
            if name == "set_config" and (feature := _of_set_config(statement, arguments, end=index)):
                return feature
    return None


def _called(statement: list[str], parenthesis: int) -> str:
    """Return the name that a parenthesis stands behind, where that may be a function of PostgreSQL's, or ''."""
    name, before = statement[parenthesis - 1], statement[max(parenthesis - 3, 0) : parenthesis - 1]
    ours = before == ["pg_catalog", "."] or not (before and before[-1] in _NAMES_SOMETHING)
    return name if parenthesis and ours else ""


def _of_set_config(statement: list[str], arguments: list[int], *, end: int) -> SessionFeature | None:
    """`set_config('name', value, false)`, where name and `false` are literals."""
    if len(arguments) != 3 or statement[arguments[2] : end] != ["false"]:
        return None
    first = statement[arguments[0] : arguments[1] - 1]
    setting = first[0][1:-1].lower() if len(first) == 1 and len(first[0]) > 2 and first[0][0] == "'" else ""
    if not setting or setting in TRACKED_SETTINGS:
        return None
    return SessionFeature(f"set_config('{setting}', ..., false)", _ADVICE_CONFIG)


# ---------------------------------------------------------------------------------------------------------------------
# Literals


def quote(text: str) -> str:
    """Return `text` as a string literal, whatever `standard_conforming_strings` says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def quote_name(name: str) -> str:
    """Return `name` as a quoted identifier."""
    return '"' + name.replace('"', '""') + '"'
