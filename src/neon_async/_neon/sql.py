"""Find the session feature that an SQL text uses and a pooler in transaction mode cannot provide.

The text is taken apart as PostgreSQL's scanner does it, so that nothing inside a string, a comment or a quoted name
counts. What would outlive its transaction is refused unless the text, or an argument of the call, shows that it does
not. Not examined are the bodies of functions and of `DO`, SQL that functions execute, and what is far behind in a long
text. Statements that only clean up (`UNLISTEN`, `RESET`, `DEALLOCATE`, `pg_advisory_unlock`) pass: they are harmless
where there is nothing to clean up.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from .tokens import compiled, end_of_comment, identifier, statements


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


def session_feature(query: str, args: Sequence[object] = ()) -> SessionFeature | None:
    """Return the session feature that `query`, one statement or several, would use, or None.

    Args:
        query: The text.
        args: The values of its parameters, as far as they are known.
    """
    findings = _cached_scan(query) if len(query) <= _CACHED else _scan(query[:_SCANNED])
    for finding in findings:
        feature = finding if isinstance(finding, SessionFeature) else finding.feature(args)
        if feature is not None:
            return feature
    return None


def prepare() -> None:
    """Compile the patterns: this takes about 15 ms, too long for an import and for the event loop."""
    session_feature("LISTEN a; SELECT E''")


# Long texts are mostly data: only the beginning is scanned, and the result is not cached.
_SCANNED = 65_536
_CACHED = 4_096

# A text without one of these words is never refused. The search for words is ten times as fast as that for the pattern,
# which tells them from parts of other words.
_WORDS = ("listen", "advisory_lock", "set", "origin_session", "temp", 'u&"', "cursor", "prepare", "load")
_SUSPICIOUS = (
    r"listen|advisory_lock|set_config|setseed|origin_session|pg_settings|pg_temp|u&\""
    r"|(?<![\w$])(?:temp|temporary|cursor)(?![\w$])|(?:\A|[;/\s])(?:set|prepare|load)(?![\w$])"
)


def _scan(query: str) -> tuple[_Finding, ...]:
    lowered = query.lower()
    if not any(word in lowered for word in _WORDS) or not compiled(_SUSPICIOUS).search(lowered):
        return ()
    return tuple(itertools.chain.from_iterable(map(_findings, statements(query))))


_cached_scan = functools.lru_cache(maxsize=512)(_scan)


# ---------------------------------------------------------------------------------------------------------------------
# Statements

_ADVICE_SET = "SET LOCAL inside a transaction"
_ADVICE_TABLE = "CREATE TEMP TABLE ... ON COMMIT DROP inside a transaction"
_ADVICE_CURSOR = "DECLARE ... WITHOUT HOLD inside a transaction"

# What names functions without calling them.
_DEFINES = frozenset({"alter", "comment", "drop", "grant", "revoke", "security"})

# What CREATE makes on a table that exists.
_ON_A_TABLE = frozenset({"constraint", "index", "policy", "rule", "statistics", "trigger", "unique"})


def _findings(statement: list[str]) -> Iterator[_Finding]:
    """Yield what a statement needs a session for (src/backend/parser/gram.y)."""
    match statement:
        case ["prepare", "transaction", name] if name.startswith("'"):
            return  # the first half of a two-phase commit
        case ["listen" | "load" | "prepare" as first, *_]:
            yield SessionFeature(first.upper(), "")
        case ["set", *words]:
            yield from _of_set(words)
        case ["create", *words]:
            yield from _of_create(words)
        case ["explain", *words]:
            yield from _findings(_executed_by_explain(words))
        case ["alter", "table", *_]:
            yield from _of_expressions(statement)
        case [first, *words] if first not in _DEFINES:
            if first == "declare" and _contains(list(itertools.takewhile("for".__ne__, words)), "with", "hold"):
                yield SessionFeature("DECLARE ... WITH HOLD", _ADVICE_CURSOR)
            yield from _of_expressions(statement)


def _of_set(words: list[str]) -> Iterator[_Finding]:
    """Yield the feature of `SET [SESSION] ...`. Each keyword may also be the first part of a setting's name."""
    scope = _keyword(words)
    while scope == "session":
        words = words[1:]
        scope = _keyword(words)
    match [scope, *words[1:2]]:
        case ["local" | "transaction" | "constraints" | "names", *_] | ["time", "zone"] | ["authorization", "default"]:
            return
        case ["characteristics" | "authorization" as what, *_]:
            yield SessionFeature(f"SET SESSION {what.upper()}", "")
            return
        case ["role", *_]:
            yield SessionFeature("SET ROLE", "SET LOCAL ROLE inside a transaction")
            return
        case ["schema", *_]:
            yield SessionFeature("SET SCHEMA", "SET LOCAL SCHEMA inside a transaction")
            return
        case ["xml", "option"]:
            yield SessionFeature("SET XML OPTION", "SET LOCAL XML OPTION inside a transaction")
            return
    name, rest = _dotted_name(words)
    takes_effect = rest[:1] in (["="], ["to"], ["from"]) and rest[1:] != ["default"]
    if takes_effect and ".".join(name).lower() not in TRACKED_SETTINGS:
        yield SessionFeature(f"SET {'.'.join(name).lower()}", _ADVICE_SET)


def _keyword(words: list[str]) -> str:
    """Return the keyword that a SET begins with, or '' where its first word is the name of a setting."""
    return "" if words[1:2] in (["."], ["="], ["to"]) else "".join(words[:1])


def _dotted_name(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Return the parts of the name that `tokens` begin with, and what follows it."""
    count = 1
    while tokens[count : count + 1] == ["."]:
        count += 2
    return [identifier(lexeme) for lexeme in tokens[:count:2]], tokens[count:]


def _of_create(words: list[str]) -> Iterator[_Finding]:
    """Yield the feature of a temporary object that stays, and what the query of CREATE ... AS uses."""
    words = words[2:] if words[:2] == ["or", "replace"] else words
    words = words[1:] if words[:1] in (["local"], ["global"]) else words
    head, query = _head(words)
    is_table = "table" in head[:3]
    stays = not (is_table and _contains(head, "on", "commit", "drop"))
    if stays and head[:1] in (["temp"], ["temporary"]):
        kind = next((word for word in head[1:3] if word in ("table", "view", "sequence")), "")
        yield SessionFeature(f"CREATE TEMP {kind.upper()}".rstrip(), _ADVICE_TABLE if is_table else "")
    elif stays and head and head[0] not in _ON_A_TABLE and any(map(_is_temporary_schema, head, head[1:])):
        yield SessionFeature("CREATE in pg_temp", _ADVICE_TABLE if is_table else "")
    if is_table or head[:1] == ["materialized"]:
        yield from _of_expressions(query)


def _head(words: list[str]) -> tuple[list[str], list[str]]:
    """Return what stands in no parentheses before `AS`, and what follows `AS`."""
    head: list[str] = []
    depth = 0
    for index, word in enumerate(words):
        if depth == 0 and word == "as":
            return head, words[index + 1 :]
        depth += (word == "(") - (word == ")")
        if depth == 0:
            head.append(word)
    return head, []


def _is_temporary_schema(lexeme: str, following: str) -> bool:
    return following == "." and re.fullmatch(r"pg_temp(_[0-9]+)?", identifier(lexeme)) is not None


def _executed_by_explain(words: list[str]) -> list[str]:
    """Return the statement that EXPLAIN executes, or nothing where it only plans it."""
    if words[:1] == ["("] and ")" in words:
        end = words.index(")")
        options, statement = words[1:end], words[end + 1 :]
    else:
        options = list(itertools.takewhile({"analyze", "analyse", "verbose"}.__contains__, words))
        statement = words[len(options) :]
    executes = any(
        identifier(option) in ("analyze", "analyse") and following not in ("off", "false", "0")
        for option, following in itertools.zip_longest(options, options[1:], fillvalue="")
    )
    return statement if executes else []


def _contains(words: list[str], *wanted: str) -> bool:
    return any(tuple(words[start : start + len(wanted)]) == wanted for start in range(len(words)))


# ---------------------------------------------------------------------------------------------------------------------
# Inside a statement

# PostgreSQL's functions that change the session, and what has the same effect inside a transaction.
_SESSION_FUNCTIONS = {
    **{
        name: f"{name.replace('_lock', '_xact_lock', 1)}() inside a transaction"
        for name in (
            *("pg_advisory_lock", "pg_advisory_lock_shared"),
            *("pg_try_advisory_lock", "pg_try_advisory_lock_shared"),
        )
    },
    "setseed": "",
    "pg_replication_origin_session_setup": "",
}
# The words before a name that is followed by a parenthesis without being a function.
_NAMES_SOMETHING = frozenset({"into", "with", "recursive", "as", "table", "copy", "references"})
# What can follow a table that is named `temp`, but not the keyword TEMP.
_AFTER_A_NAME = frozenset(
    {"cross", "except", "fetch", "for", "from", "full", "group", "having", "inner", "intersect", "join", "left"}
    | {"limit", "natural", "offset", "order", "right", "union", "where", "window", ")", ";", ","}
)


def _of_expressions(statement: list[str]) -> Iterator[_Finding]:
    """Yield what the function calls, SELECT INTO and UPDATE in a statement need a session for."""
    yield from _of_calls(statement)
    for index, lexeme in enumerate(statement):
        following = statement[index + 1 : index + 8]
        if lexeme == "update" and _is_pg_settings(following):
            yield SessionFeature("UPDATE pg_settings", _ADVICE_SET)
        elif lexeme == "into" and statement[index - 1] not in ("insert", "merge") and _is_temporary(following):
            yield SessionFeature("SELECT INTO TEMP", _ADVICE_TABLE)


def _of_calls(statement: list[str]) -> Iterator[_Finding]:
    opened: list[tuple[str, list[int]]] = []  # for each parenthesis: the function, and where its arguments begin
    for index, lexeme in enumerate(statement):
        if lexeme == "(":
            opened.append((_called(statement, index), [index + 1]))
        elif lexeme == "," and opened:
            opened[-1][1].append(index + 1)
        elif lexeme == ")" and opened:
            name, starts = opened.pop()
            if name in _SESSION_FUNCTIONS:
                yield SessionFeature(f"{name}()", _SESSION_FUNCTIONS[name])
            elif name == "set_config" and len(starts) == 3:
                yield from _of_set_config(statement[starts[0] : starts[1] - 1], statement[starts[2] : index])


def _called(statement: list[str], parenthesis: int) -> str:
    """Return the name before a parenthesis, where it may be a built-in function of PostgreSQL, or ''."""
    if parenthesis == 0:
        return ""
    name, before = identifier(statement[parenthesis - 1]), statement[max(parenthesis - 3, 0) : parenthesis - 1]
    if before[-1:] == ["."]:
        return name if identifier(before[0]) == "pg_catalog" else ""
    return "" if before and before[-1] in _NAMES_SOMETHING else name


def _is_temporary(target: list[str]) -> bool:
    """Return whether the table of SELECT INTO, which `target` begins with, is a temporary one."""
    if target[:1] in (["local"], ["global"]):
        target = target[1:]
    if target[:1] in (["temp"], ["temporary"]):
        return bool(target[1:]) and target[1] not in _AFTER_A_NAME
    return any(map(_is_temporary_schema, target[:1], target[1:2]))


def _is_pg_settings(target: list[str]) -> bool:
    name, _ = _dotted_name([lexeme for lexeme in target if lexeme not in ("only", "(")])
    return name[-1:] == ["pg_settings"] and name[:-1][-1:] in ([], ["pg_catalog"])


# ---------------------------------------------------------------------------------------------------------------------
# set_config()

_ADVICE_CONFIG = "set_config(..., true) inside a transaction"
# PostgreSQL's parse_bool(), src/backend/utils/adt/bool.c.
_TRUE = frozenset({"t", "tr", "tru", "true", "y", "ye", "yes", "on", "1"})
_BOOLEAN = frozenset({"bool", "boolean"})
_TEXT = frozenset({"text", "varchar"})


class _SetConfig(NamedTuple):
    """A call of set_config(). A number stands for the parameter of this number, None for what cannot be known.

    Attributes:
        setting: The name of the setting.
        local: Whether it is set for the transaction only.
        shown: The call, as messages show it.
    """

    setting: str | int | None
    local: bool | int | None
    shown: str

    def feature(self, args: Sequence[object]) -> SessionFeature | None:
        """Return the feature that the call needs with these arguments, or None."""
        setting, local = _value_of(self.setting, args), _value_of(self.local, args)
        if local is True or (isinstance(setting, str) and setting.lower() in TRACKED_SETTINGS):
            return None
        return SessionFeature(self.shown, _ADVICE_CONFIG)


_Finding: TypeAlias = SessionFeature | _SetConfig


def _value_of(known: str | int | None, args: Sequence[object]) -> object:
    if isinstance(known, bool) or not isinstance(known, int):
        return known
    return args[known - 1] if 0 < known <= len(args) else None


def _of_set_config(first: list[str], third: list[str]) -> Iterator[_Finding]:
    name, flag = _without_casts(first, _TEXT), _without_casts(third, _BOOLEAN)
    setting = name[1:-1] if len(name) > 1 and name[0] == name[-1] == "'" else _parameter(name)
    is_true = flag == "true" or (flag.startswith("'") and flag[1:-1].strip().lower() in _TRUE)
    shown_setting = name.lower() if isinstance(setting, str) else name if setting else "..."
    shown_flag = third[0] if len(third) == 1 and len(third[0]) <= 20 else "..."
    yield _SetConfig(
        setting=setting,
        local=True if is_true else _parameter(flag),
        shown=f"set_config({shown_setting}, ..., {shown_flag})",
    )


def _parameter(lexeme: str) -> int | None:
    return int(lexeme[1:]) if re.fullmatch(r"\$[0-9]{1,5}", lexeme) else None


def _without_casts(tokens: list[str], types: frozenset[str]) -> str:
    """Return the one lexeme of an argument without parentheses and casts to one of `types`, or '' for anything else."""
    while len(tokens) > 1:
        match tokens:
            case ["(", *inner, ")"]:
                tokens = inner
            case [*inner, ":", ":", kind] if kind in types:
                tokens = inner
            case ["cast", "(", *inner, "as", kind, ")"] if kind in types:
                tokens = inner
            case [kind, value] if kind in types and value.startswith("'"):
                tokens = [value]
            case _:
                return ""
    return "".join(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a transaction

# What a server runs in a failed transaction (PostgreSQL, IsTransactionExitStmt).
_ENDS_TRANSACTION = frozenset({"abort", "commit", "end", "prepare", "rollback"})
_GAP = r"(?:[\s;]+|--[^\r\n]*)*"
_FIRST_WORD = r"[A-Za-z]*"


def goes_on_after_transaction(query: str) -> bool:
    """Return whether a text of several statements begins with one that ends a transaction, a failed one as well."""
    word = compiled(_FIRST_WORD).match(query, _first_position(query))
    assert word
    return word[0].lower() in _ENDS_TRANSACTION and ";" in query[word.end() :].rstrip("; \t\r\n\f\v")


def commits(query: str) -> bool:
    """Return whether one of the statements of a text ends a transaction block and keeps what it wrote.

    In a block nothing else does: neither CALL nor DO can commit there (PostgreSQL documentation, section 43.8).
    """
    if not compiled(r"\b(?:commit|end|prepare)\b", re.IGNORECASE).search(query):
        return False
    return any(
        statement[:1] in (["commit"], ["end"]) or statement[:2] == ["prepare", "transaction"]
        for statement in statements(query)
    )


def _first_position(query: str) -> int:
    """Return where the first statement begins, after empty ones and comments."""
    position = _end_of_gap(query, 0)
    while query.startswith("/*", position):
        position = _end_of_gap(query, end_of_comment(query, position + 2))
    return position


def _end_of_gap(query: str, position: int) -> int:
    gap = compiled(_GAP).match(query, position)
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
