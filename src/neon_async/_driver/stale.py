"""Judge whether an error comes from a prepared statement that has become stale. Pure: it sends nothing.

A statement is stale when the server's tables, types or statements are no longer as they were when it was prepared. Some
errors say so. Others, such as "operator does not exist", may have that cause or another one: they only make a statement
suspect, and preparing its text anew shows whether its description has changed.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable

import asyncpg

from .._errors import NeonAsyncError
from .losses import is_server_error


class Verdict(enum.Enum):
    """What an error says of the prepared statement that it came from."""

    OTHER = "nothing: it has another cause"
    STALE = "it is stale, and nothing of it was executed"
    SUSPECT = "it may be stale; nothing of it was kept"
    MISREAD = "it was executed, and its rows are not as they were described"
    SUSPECT_MISREAD = "it was executed, and its rows may not be as they were described"

    @property
    def is_certain(self) -> bool:
        """Whether nothing needs to be asked."""
        return self in (Verdict.STALE, Verdict.MISREAD)

    @property
    def is_misread(self) -> bool:
        """Whether the statement was executed."""
        return self in (Verdict.MISREAD, Verdict.SUSPECT_MISREAD)


# SQLSTATEs of the server (PostgreSQL documentation, appendix A) that a stale statement can get, and others as well: its
# parameters have types that its tables no longer have, or that no longer exist.
_SUSPECT = frozenset(
    {
        "08P01",  # protocol violation: a parameter has too few bytes for its new type
        "22003",  # numeric value out of range
        "22021",  # character not in repertoire: the bytes of a parameter are no text
        "22P03",  # invalid binary representation
        "42704",  # undefined object
        "42725",  # ambiguous function
        "42804",  # datatype mismatch, also of the attributes of a composite type
        "42846",  # cannot coerce
        "42883",  # undefined function or operator
        "42P18",  # indeterminate datatype
        "XX000",  # internal error: cache lookup failed
    }
)
_VANISHED_TYPE = re.compile(r"cache lookup failed for type (\d+)|type with OID (\d+) does not exist")
# What asyncpg raises, by the beginning of the text: it uses the classes for other things, too.
_UNKNOWN_TYPES = "could not resolve query result and/or argument types"
_OTHER_COLUMNS = "the number of columns in the result row"


def judge(error: Exception, types: Callable[[], Iterable[int]]) -> Verdict:
    """Return what an error says of the statement that was being executed.

    Args:
        error: What asyncpg raised.
        types: Returns the OIDs of the types of the statement's parameters and columns.
    """
    match error:
        case NeonAsyncError() | OSError():  # a lost connection, and a timeout
            return Verdict.OTHER
        case asyncpg.InvalidCachedStatementError() | asyncpg.InvalidSQLStatementNameError():
            return Verdict.STALE
        case asyncpg.DataError() if not is_server_error(error):  # an argument does not fit; nothing was sent
            return Verdict.SUSPECT
        case asyncpg.PostgresError():
            vanished = _vanished_type(error)
            if vanished is not None and vanished in types():
                return Verdict.STALE
            return Verdict.SUSPECT if error.sqlstate in _SUSPECT else Verdict.OTHER
        case asyncpg.exceptions.OutdatedSchemaCacheError():
            return Verdict.MISREAD
        case asyncpg.exceptions.ProtocolError():
            return Verdict.MISREAD if str(error).startswith(_OTHER_COLUMNS) else Verdict.SUSPECT_MISREAD
        case asyncpg.InterfaceError() | asyncpg.InternalClientError():
            return Verdict.OTHER
    return Verdict.SUSPECT_MISREAD  # of a codec that met other bytes than it expects


def is_stale_when_prepared(error: Exception) -> bool:
    """Return whether a pooler has answered a prepare with a statement that it had prepared long ago."""
    if isinstance(error, asyncpg.InternalClientError):
        return str(error).startswith(_UNKNOWN_TYPES)
    stale = (asyncpg.InvalidCachedStatementError, asyncpg.InvalidSQLStatementNameError)
    return isinstance(error, stale) or _vanished_type(error) is not None


def _vanished_type(error: Exception) -> int | None:
    """Return the OID of the type that the server has not found, or None."""
    match = _VANISHED_TYPE.search(str(error))
    return int(match[1] or match[2]) if match else None
