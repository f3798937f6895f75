"""Find the function calls in a statement that would change the session, and the SQL that functions execute.

It must not know what else a statement does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from .features import TRACKED_SETTINGS, NestedText, SessionFeature
from .tokens import identifier, string

# PostgreSQL's functions that change the session, and what has the same effect inside a transaction.
_BUILT_IN = {
    **{
        name: f"{name.replace('_lock', '_xact_lock', 1)}() inside a transaction"
        for name in (
            *("pg_advisory_lock", "pg_advisory_lock_shared"),
            *("pg_try_advisory_lock", "pg_try_advisory_lock_shared"),
        )
    },
    "setseed": "",
    "pg_replication_origin_session_setup": "",
    "pg_backup_start": "",
    "pg_start_backup": "",  # until PostgreSQL 14
}
# The same of extensions, in whichever schema: dblink; pg_session_jwt, which is Neon's; and pg_trgm, with one argument.
_OF_EXTENSIONS = {"dblink_connect": "", "dblink_connect_u": "", "jwt_session_init": ""}
_SET_LIMIT = SessionFeature("set_limit()", "SET LOCAL pg_trgm.similarity_threshold inside a transaction")

# Functions whose third argument, or the one named `temporary`, makes a replication slot of the session.
_SLOTS = frozenset(
    f"pg_{verb}_{kind}_replication_slot" for verb in ("create", "copy") for kind in ("physical", "logical")
)

# Functions that execute SQL: of PostgreSQL, and of the extension tablefunc.
_EXECUTING = frozenset({"query_to_xml", "query_to_xmlschema", "query_to_xml_and_xmlschema", "ts_stat", "ts_rewrite"})
_EXECUTING_EXTENSIONS = frozenset({"crosstab", "crosstab2", "crosstab3", "crosstab4"})

_IN_ANY_SCHEMA = _OF_EXTENSIONS.keys() | _EXECUTING_EXTENSIONS | {"set_limit"}

# The words before a name that is followed by a parenthesis without being a function.
_NAMES_SOMETHING = frozenset({"into", "with", "recursive", "as", "table", "copy", "references"})


def of_calls(statement: list[str]) -> Iterator[Finding]:
    """Yield what the function calls in a statement need a session for, and what SQL they execute."""
    opened: list[tuple[str, list[int]]] = []  # for each parenthesis: the function, and where its arguments begin
    for index, lexeme in enumerate(statement):
        if lexeme in ("(", "["):
            opened.append((_called(statement, index) if lexeme == "(" else "", [index + 1]))
        elif lexeme == "," and opened:
            opened[-1][1].append(index + 1)
        elif lexeme in (")", "]") and opened:
            name, starts = opened.pop()
            if name:
                ends = itertools.pairwise([*starts, index + 1])
                yield from _of_call(name, [statement[start : end - 1] for start, end in ends])


def _called(statement: list[str], parenthesis: int) -> str:
    """Return the name before a parenthesis, where it may be a function that is judged, or ''."""
    if parenthesis == 0:
        return ""
    name, before = identifier(statement[parenthesis - 1]), statement[max(parenthesis - 3, 0) : parenthesis - 1]
    if name not in JUDGED:
        return ""
    if before[-1:] == ["."]:
        return name if identifier(before[0]) == "pg_catalog" or name in _IN_ANY_SCHEMA else ""
    return "" if before and before[-1] in _NAMES_SOMETHING else name


def _of_call(name: str, arguments: list[list[str]]) -> Iterator[Finding]:
    if name in _BUILT_IN or name in _OF_EXTENSIONS:
        yield SessionFeature(f"{name}()", _BUILT_IN.get(name, ""))
    elif name == "set_config" and len(arguments) == 3:
        yield _of_set_config(*arguments)
    elif name == "set_limit" and len(arguments) == 1 and arguments[0]:
        yield _SET_LIMIT
    elif name in _SLOTS:
        yield from _of_slot(name, arguments)
    elif name in _EXECUTING or name in _EXECUTING_EXTENSIONS:
        for argument in arguments:
            text = _visible(_without_casts(argument, _TEXT))
            if text is not None:
                yield NestedText(text)


# The functions that are judged.
JUDGED = _BUILT_IN.keys() | _IN_ANY_SCHEMA | _SLOTS | _EXECUTING | {"set_config"}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

# PostgreSQL's parse_bool(), src/backend/utils/adt/bool.c.
_TRUE = frozenset({"t", "tr", "tru", "true", "y", "ye", "yes", "on", "1"})
_FALSE = frozenset({"f", "fa", "fal", "fals", "false", "n", "no", "of", "off", "0"})
_BOOLEAN = frozenset({"bool", "boolean"})
_TEXT = frozenset({"text", "varchar"})


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
            case [kind, value] if kind in types and string(value) is not None:
                tokens = [value]
            case _:
                return ""
    return "".join(tokens)


def _visible(lexeme: str) -> str | int | None:
    """Return the value of a string, or the number of a parameter, or None for anything else."""
    if re.fullmatch(r"\$[0-9]{1,5}", lexeme):
        return int(lexeme[1:])
    return string(lexeme) if lexeme else None


def _visible_flag(tokens: list[str]) -> bool | int | None:
    """Return the value of a boolean, or the number of a parameter, or None for anything else."""
    lexeme = _without_casts(tokens, _BOOLEAN)
    value = _visible(lexeme)
    if isinstance(value, int):
        return value
    word = lexeme if value is None and lexeme in ("true", "false") else (value or "").strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def value_of(known: str | int | None, args: Sequence[object]) -> object:
    """Return what is visible: itself, or the argument for a parameter, or None."""
    if isinstance(known, bool) or not isinstance(known, int):
        return known
    return args[known - 1] if 0 < known <= len(args) else None


# ---------------------------------------------------------------------------------------------------------------------
# set_config()

ADVICE_TABLE = "CREATE TEMP TABLE ... ON COMMIT DROP inside a transaction"
# What CREATE makes is in the session's own schema then.
PATH_TO_TEMPORARY = SessionFeature("search_path = pg_temp", ADVICE_TABLE)
_ADVICE_CONFIG = "set_config(..., true) inside a transaction"


def is_temporary_schema(name: str) -> bool:
    """Return whether a schema contains the temporary objects of a session."""
    return re.fullmatch(r"pg_temp(_[0-9]+)?", name) is not None


class SetConfig(NamedTuple):
    """A call of set_config(). A number stands for the parameter of this number, None for what cannot be known.

    Attributes:
        setting: The name of the setting.
        value: What it is set to.
        local: Whether it is set for the transaction only.
        shown: The call, as messages show it.
    """

    setting: str | int | None
    value: str | int | None
    local: bool | int | None
    shown: str

    def feature(self, args: Sequence[object]) -> SessionFeature | None:
        """Return the feature that the call needs with these arguments, or None."""
        setting, local = value_of(self.setting, args), value_of(self.local, args)
        name = setting.lower() if isinstance(setting, str) else ""
        if local is not True:
            return None if name in TRACKED_SETTINGS else SessionFeature(self.shown, _ADVICE_CONFIG)
        value = value_of(self.value, args) if name == "search_path" else None
        if isinstance(value, str) and is_temporary_schema(value.split(",")[0].strip().strip('"').lower()):
            return PATH_TO_TEMPORARY
        return None


def _of_set_config(first: list[str], second: list[str], third: list[str]) -> SetConfig:
    name = _without_casts(first, _TEXT)
    setting = _visible(name)
    shown_setting = "..." if setting is None else name.lower()
    shown_flag = third[0] if len(third) == 1 and len(third[0]) <= 20 else "..."
    return SetConfig(
        setting=setting,
        value=_visible(_without_casts(second, _TEXT)),
        local=_visible_flag(third),
        shown=f"set_config({shown_setting}, ..., {shown_flag})",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Replication slots


class Slot(NamedTuple):
    """A call that makes a replication slot.

    Attributes:
        name: The name of the function.
        temporary: Whether the slot is temporary, as in `SetConfig.local`.
    """

    name: str
    temporary: bool | int | None

    def feature(self, args: Sequence[object]) -> SessionFeature | None:
        """Return the feature that the call needs with these arguments, or None."""
        is_permanent = value_of(self.temporary, args) is False
        return None if is_permanent else SessionFeature(f"{self.name}(temporary => true)", "")


def _of_slot(name: str, arguments: list[list[str]]) -> Iterator[Slot]:
    for number, argument in enumerate(arguments):
        match argument:
            case ["temporary", "=", ">", *value] | ["temporary", ":", "=", *value]:
                yield Slot(name, _visible_flag(value))
            case [_, "=", ">", *_] | [_, ":", "=", *_]:
                pass
            case value if number == 2:
                yield Slot(name, _visible_flag(value))


Finding: TypeAlias = SessionFeature | SetConfig | Slot | NestedText
