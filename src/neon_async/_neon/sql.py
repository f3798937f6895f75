"""Find the session feature that an SQL text uses and a pooler in transaction mode cannot provide.

The text is scanned as PostgreSQL's scanner does it (src/backend/parser/scan.l), so that nothing inside a string, a
comment or a quoted name counts. A refusal must never be wrong, so in doubt a text passes: function bodies, `DO`, what
follows `EXPLAIN` or `CREATE`, and statements that only clean up (`UNLISTEN`, `RESET`, `pg_advisory_unlock`), which are
harmless where there is nothing to clean up.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple


class SessionFeature(NamedTuple):
    """A feature that needs a session of its own.

    Attributes:
        name: The feature, as SQL spells it.
        instead: What has the same effect inside a transaction, or ''.
    """

    name: str
    instead: str


# The settings that PgBouncer restores on every server connection that it assigns to a client (its documentation,
# track_extra_parameters), as servers report them (PostgreSQL documentation, section 54.2.7), and in lower case.
REPORTED_SETTINGS = (
    "standard_conforming_strings",
    "client_encoding",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "application_name",
)
TRACKED_SETTINGS = frozenset(map(str.lower, REPORTED_SETTINGS))


def session_feature(query: str) -> SessionFeature | None:
    """Return the session feature that `query`, one statement or several, would use, or None."""
    return _cached_scan(query) if len(query) <= _CACHED else _scan(query[:_SCANNED])


def prepare() -> None:
    """Compile the patterns: this takes about 15 ms, too long for an import and for the event loop."""
    session_feature("LISTEN a; SELECT E''")


_SESSION_LOCKS = frozenset(
    {"pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared"}
)
# Long texts are mostly data: only the beginning is scanned, and the result is not cached.
_SCANNED = 65_536
_CACHED = 4_096

# A text without one of these words is never refused. The test is one search at C speed per text.
_SUSPICIOUS = r"listen|advisory_lock|set_config|(?:^|[;/\s])set\s"


def _scan(query: str) -> SessionFeature | None:
    if not _compiled(_SUSPICIOUS, re.IGNORECASE).search(query):
        return None
    return next(filter(None, map(_feature, _statements(query))), None)


_cached_scan = functools.lru_cache(maxsize=512)(_scan)


@functools.cache
def _compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(pattern, flags)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: a word in lower case; a sign; a string in its quotes, or as "'"; a quoted name as '"' and the name

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
    """Return where the comment ends that begins before `position`; comments can be nested."""
    depth = 1
    for edge in _compiled(_COMMENT_EDGE).finditer(query, position):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(query)


def _statements(query: str) -> Iterator[list[str]]:
    """Yield the tokens of each statement, up to the body of an SQL function, whose end only a parser can find."""
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
# The words before a name that is followed by a parenthesis without being a function.
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
    """Return the feature of `SET [SESSION] name ...` (src/backend/parser/gram.y, set_rest)."""
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
    opened: list[tuple[str, list[int]]] = []  # for each parenthesis: the function, and where its arguments begin
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
    """Return the name before a parenthesis, where it may be a built-in function of PostgreSQL, or ''."""
    name, before = statement[parenthesis - 1], statement[max(parenthesis - 3, 0) : parenthesis - 1]
    built_in = before == ["pg_catalog", "."] or not (before and before[-1] in _NAMES_SOMETHING)
    return name if parenthesis and built_in else ""


def _of_set_config(statement: list[str], arguments: list[int], *, end: int) -> SessionFeature | None:
    """Return the feature of `set_config('name', value, false)`, where name and `false` are literals."""
    if len(arguments) != 3 or statement[arguments[2] : end] != ["false"]:
        return None
    first = statement[arguments[0] : arguments[1] - 1]
    setting = first[0][1:-1].lower() if len(first) == 1 and len(first[0]) > 2 and first[0][0] == "'" else ""
    if not setting or setting in TRACKED_SETTINGS:
        return None
    return SessionFeature(f"set_config('{setting}', ..., false)", _ADVICE_CONFIG)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a transaction

# What a server runs in a failed transaction (PostgreSQL, IsTransactionExitStmt).
_ENDS_TRANSACTION = frozenset({"abort", "commit", "end", "prepare", "rollback"})
_GAP = r"(?:[\s;]+|--[^\r\n]*)*"
_FIRST_WORD = r"[A-Za-z]*"


def goes_on_after_transaction(query: str) -> bool:
    """Return whether a text of several statements begins with one that ends a transaction, a failed one as well."""
    word = _compiled(_FIRST_WORD).match(query, _first_position(query))
    assert word
    return word[0].lower() in _ENDS_TRANSACTION and ";" in query[word.end() :].rstrip("; \t\r\n\f\v")


def _first_position(query: str) -> int:
    """Return where the first statement begins, after empty ones and comments."""
    position = _end_of_gap(query, 0)
    while query.startswith("/*", position):
        position = _end_of_gap(query, _end_of_comment(query, position + 2))
    return position


def _end_of_gap(query: str, position: int) -> int:
    gap = _compiled(_GAP).match(query, position)
    assert gap
    return gap.end()


# ---------------------------------------------------------------------------------------------------------------------
# Literals


def quote(text: str) -> str:
    """Return `text` as a string literal, whatever `standard_conforming_strings` says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def quote_name(name: str) -> str:
    """Return `name` as a quoted identifier."""
    return '"' + name.replace('"', '""') + '"'
