"""Find the session feature that an SQL text uses and a pooler in transaction mode cannot provide.

The text is taken apart as PostgreSQL's scanner does it, so that nothing inside a string, a comment or a quoted name
counts. What would outlive its transaction is refused unless the text, or an argument of the call, shows that it does
not. The blocks of `DO` in PL/pgSQL count, with what they EXECUTE as far as it is visible, and so does SQL in an
argument of PostgreSQL's own functions that execute it. Not examined are the bodies of functions, and what is far behind
in a long text. Statements that only clean up (`UNLISTEN`, `RESET`, `DEALLOCATE`, `pg_advisory_unlock`) pass: they are
harmless where there is nothing to clean up.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from . import blocks
from .calls import (
    ADVICE_TABLE,
    JUDGED,
    PATH_TO_TEMPORARY,
    Finding,
    SetConfig,
    Slot,
    is_temporary_schema,
    of_calls,
    value_of,
)
from .features import TRACKED_SETTINGS, NestedText, SessionFeature
from .tokens import compiled, end_of_comment, identifier, statements, string


def session_feature(query: str, args: Sequence[object] = (), *, backslashes: bool = False) -> SessionFeature | None:
    """Return the session feature that `query`, one statement or several, would use, or None.

    Args:
        query: The text.
        args: The values of its parameters, as far as they are known.
        backslashes: Whether every string has backslash escapes, because `standard_conforming_strings` is off.
    """
    cacheable = len(query) <= _CACHED and not backslashes
    findings = _cached_scan(query) if cacheable else _scan(query[:_SCANNED], backslashes=backslashes)
    for finding in findings:
        feature = finding.feature(args)
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
# which tells them from parts of other words. Escapes can hide any word, in names and in SQL that is executed.
_WORDS = (
    *("listen", "advisory_lock", "set", "temp", "cursor", "prepare", "load", "u&", "\\", "origin_session"),
    *("replication_slot", "dblink_connect", "jwt_session_init", "pg_backup_start", "pg_start_backup"),
    *("query_to_xml", "ts_stat", "ts_rewrite", "crosstab"),
)
_SUSPICIOUS = (
    rf"listen|pg_settings|pg_temp|{'|'.join(sorted(JUDGED))}|u&[\"']|\\[0-7bfnrtxu]"
    r"|(?<![\w$])(?:temp|temporary|cursor)(?![\w$])|(?:\A|[;/\s'$>])(?:set|prepare|load)(?![\w$])"
)


class _ParameterText(NamedTuple):
    """SQL that is the argument for the parameter `number`."""

    number: int

    def feature(self, args: Sequence[object]) -> SessionFeature | None:
        """Return the feature that the text needs, or None."""
        text = value_of(self.number, args)
        return session_feature(text) if isinstance(text, str) else None


def _scan(query: str, *, backslashes: bool = False) -> tuple[_Judged, ...]:
    lowered = query.lower()
    if not any(word in lowered for word in _WORDS) or not compiled(_SUSPICIOUS).search(lowered):
        return ()
    found: list[_Judged] = []
    texts = [(query, False)]
    for text, is_block in texts:  # which grows meanwhile
        find = _of_block if is_block else _findings
        for finding in itertools.chain.from_iterable(map(find, statements(text, backslashes=backslashes))):
            if not isinstance(finding, NestedText):
                found.append(finding)
            elif isinstance(finding.text, int):
                found.append(_ParameterText(finding.text))
            else:
                texts.append((finding.text, finding.is_block))
    return tuple(found)


_Judged: TypeAlias = SessionFeature | SetConfig | Slot | _ParameterText
_cached_scan = functools.lru_cache(maxsize=512)(_scan)


# ---------------------------------------------------------------------------------------------------------------------
# Statements

_ADVICE_SET = "SET LOCAL inside a transaction"
_ADVICE_CURSOR = "DECLARE ... WITHOUT HOLD inside a transaction"

# What names functions without calling them.
_DEFINES = frozenset({"alter", "comment", "drop", "grant", "revoke", "security"})

# What CREATE makes on a table that exists.
_ON_A_TABLE = frozenset({"constraint", "index", "policy", "rule", "statistics", "trigger", "unique"})


def _findings(statement: list[str]) -> Iterator[Finding]:
    """Yield what a statement needs a session for (src/backend/parser/gram.y)."""
    match statement:
        case ["prepare", "transaction", name] if string(name) is not None:
            return  # the first half of a two-phase commit
        case ["listen" | "load" | "prepare" as first, *_]:
            yield SessionFeature(first.upper(), "")
        case ["set", *words]:
            yield from _of_set(words)
        case ["create", *words]:
            yield from _of_create(words)
        case ["explain", *words]:
            yield from _findings(_executed_by_explain(words))
        case ["do", *words]:
            yield NestedText(blocks.block_of(words), is_block=True)
        case ["import", *words] if any(map(is_temporary_schema, _after(words, "into"))):
            yield SessionFeature("IMPORT FOREIGN SCHEMA ... INTO pg_temp", "")
        case ["alter", "table" | "domain", *_]:  # which execute expressions on the rows that exist
            yield from _of_expressions(statement)
        case [first, *words] if first not in _DEFINES:
            yield from _of_declare(first, words)
            yield from _of_expressions(statement)
            yield from _of_select_into(statement)


def _of_declare(first: str, words: list[str]) -> Iterator[Finding]:
    if first == "declare" and _contains(list(itertools.takewhile("for".__ne__, words)), "with", "hold"):
        yield SessionFeature("DECLARE ... WITH HOLD", _ADVICE_CURSOR)


def _of_block(statement: list[str]) -> Iterator[Finding]:
    """Yield what a statement of a block of PL/pgSQL needs a session for. INTO names variables there."""
    expressions, command = blocks.split(statement)
    yield from _of_expressions(expressions)
    yield from _findings(command)
    yield from map(NestedText, blocks.executed(statement))


def _of_set(words: list[str]) -> Iterator[Finding]:
    """Yield the feature of `SET [SESSION] ...`. Each keyword may also be the first part of a setting's name."""
    scope = _keyword(words)
    while scope == "session":
        words = words[1:]
        scope = _keyword(words)
    match [scope, *words[1:2]]:
        case ["local", *_]:
            if _is_path_to_temporary(words[1:]):
                yield PATH_TO_TEMPORARY
            return
        case ["transaction" | "constraints" | "names", *_] | ["time", "zone"] | ["authorization", "default"]:
            return
        case ["characteristics" | "authorization" as what, *_]:
            yield SessionFeature(f"SET SESSION {what.upper()}", "")
            return
        case ["role" | "schema" as what, *_]:
            yield SessionFeature(f"SET {what.upper()}", f"SET LOCAL {what.upper()} inside a transaction")
            return
        case ["xml", "option"]:
            yield SessionFeature("SET XML OPTION", "SET LOCAL XML OPTION inside a transaction")
            return
    name, rest = _dotted_name(words)
    takes_effect = rest[:1] in (["="], ["to"], ["from"]) and rest[1:] != ["default"]
    if name == [blocks.UNKNOWN]:
        yield SessionFeature("SET", _ADVICE_SET)
    elif takes_effect and ".".join(name).lower() not in TRACKED_SETTINGS:
        yield SessionFeature(f"SET {'.'.join(name).lower()}", _ADVICE_SET)


def _keyword(words: list[str]) -> str:
    """Return the keyword that a SET begins with, or '' where its first word is the name of a setting."""
    return "" if words[1:2] in (["."], ["="], ["to"]) else "".join(words[:1])


def _is_path_to_temporary(words: list[str]) -> bool:
    """Return whether `[SET LOCAL] search_path = pg_temp, ...`, or SCHEMA instead, makes CREATE use that schema."""
    match words:
        case ["schema", value, *_] | ["search_path" | '"search_path', "=" | "to", value, *_]:
            name = string(value)
            return is_temporary_schema(identifier(value) if name is None else name)
    return False


def _dotted_name(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Return the parts of the name that `tokens` begin with, and what follows it."""
    count = 1
    while tokens[count : count + 1] == ["."]:
        count += 2
    return [identifier(lexeme) for lexeme in tokens[:count:2]], tokens[count:]


def _of_create(words: list[str]) -> Iterator[Finding]:
    """Yield the feature of a temporary object that stays, and what the query of CREATE ... AS uses."""
    words = words[2:] if words[:2] == ["or", "replace"] else words
    words = words[1:] if words[:1] in (["local"], ["global"]) else words
    head, query = _head(words)
    is_table = "table" in head[:3]
    stays = not (is_table and _contains(head, "on", "commit", "drop"))
    if stays and head[:1] in (["temp"], ["temporary"]):
        kind = next((word for word in head[1:3] if word in ("table", "view", "sequence")), "")
        yield SessionFeature(f"CREATE TEMP {kind.upper()}".rstrip(), ADVICE_TABLE if is_table else "")
    elif stays and head[:1] == ["statistics"] and "on" in head and _has_temporary_schema(head[: head.index("on")]):
        yield SessionFeature("CREATE in pg_temp", "")
    elif stays and head and head[0] not in _ON_A_TABLE and _has_temporary_schema(head):
        yield SessionFeature("CREATE in pg_temp", ADVICE_TABLE if is_table else "")
    if is_table and _contains(head, "partition", "of"):
        yield from _of_expressions(words)  # bounds are computed at once
    elif is_table or head[:1] == ["materialized"]:
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


def _has_temporary_schema(words: list[str]) -> bool:
    return any(
        following == "." and is_temporary_schema(identifier(word)) for word, following in itertools.pairwise(words)
    )


def _after(words: list[str], word: str) -> list[str]:
    """Return the name after each `word`."""
    return [identifier(following) for before, following in itertools.pairwise(words) if before == word]


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

# What can follow a table that is named `temp`, but not the keyword TEMP.
_AFTER_A_NAME = frozenset(
    {"cross", "except", "fetch", "for", "from", "full", "group", "having", "inner", "intersect", "join", "left"}
    | {"limit", "natural", "offset", "order", "right", "union", "where", "window", ")", ";", ","}
)


def _of_expressions(statement: list[str]) -> Iterator[Finding]:
    """Yield what the function calls and UPDATE in a statement need a session for."""
    yield from of_calls(statement)
    for index, lexeme in enumerate(statement):
        if lexeme == "update" and _is_pg_settings(statement[index + 1 : index + 8]):
            yield SessionFeature("UPDATE pg_settings", _ADVICE_SET)


def _of_select_into(statement: list[str]) -> Iterator[Finding]:
    for index, lexeme in enumerate(statement):
        if (
            lexeme == "into"
            and not _is_command(statement, index - 1)
            and _is_temporary(statement[index + 1 : index + 8])
        ):
            yield SessionFeature("SELECT INTO TEMP", ADVICE_TABLE)


def _is_command(statement: list[str], index: int) -> bool:
    """Return whether INSERT or MERGE stands at `index`, and not a column of that name."""
    is_word = index >= 0 and statement[index] in ("insert", "merge")
    return is_word and (index == 0 or statement[index - 1] in ("(", ")"))


def _is_temporary(target: list[str]) -> bool:
    """Return whether the table of SELECT INTO, which `target` begins with, is a temporary one."""
    if target[:1] in (["local"], ["global"]):
        target = target[1:]
    if target[:1] in (["temp"], ["temporary"]):
        return bool(target[1:]) and target[1] not in _AFTER_A_NAME
    return _has_temporary_schema(target[:2])


def _is_pg_settings(target: list[str]) -> bool:
    name, _ = _dotted_name([lexeme for lexeme in target if lexeme not in ("only", "(")])
    return name[-1:] == ["pg_settings"] and name[:-1][-1:] in ([], ["pg_catalog"])


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
