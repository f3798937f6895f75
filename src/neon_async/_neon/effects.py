"""Find what a text does to a session beyond its own result: COPY data that it waits for, and prepared statements.

It must not know what sends the text.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from .tokens import identifier, statements


class Effects(NamedTuple):
    """What a text does, one statement or several.

    Attributes:
        copy: `FROM STDIN` or `TO STDOUT`, where one of its statements is a COPY from or to the client, or ''.
        prepares: It prepares statements in SQL, or may do so.
        deallocates: It drops prepared statements, or may do so.
        drops_drivers: Statements that the driver has prepared are among them, or may be.
    """

    copy: str = ""
    prepares: bool = False
    deallocates: bool = False
    drops_drivers: bool = False


def effects_of(query: str) -> Effects:
    """Return the effects of `query`. The bodies of functions are not examined; those of `DO` are searched for words."""
    return _cached_scan(query) if len(query) <= _CACHED else _scan(query)


_NOTHING = Effects()
_CACHED = 4_096  # long texts are mostly data, and do not come again

# The names of the statements that asyncpg prepares (asyncpg, Connection._get_unique_id).
_DRIVERS = "__asyncpg_"

# A text without one of these words has no effect. This is the fastest search for them: 10 ms per megabyte.
_SUSPICIOUS = ("stdin", "stdout", "prepare", "deallocate", "discard")


def _scan(query: str) -> Effects:
    lowered = query.lower()
    if not any(word in lowered for word in _SUSPICIOUS):
        return _NOTHING
    found = [_effects(statement, lowered) for statement in statements(query)]
    return functools.reduce(_joined, found, _NOTHING)


_cached_scan = functools.lru_cache(maxsize=512)(_scan)


def _effects(statement: list[str], text: str) -> Effects:
    """Return the effects of one statement; `text` is all of the text in lower case."""
    match statement:
        case ["copy", *words]:
            return Effects(copy=_copy(words))
        case ["prepare", "transaction", name] if name.startswith("'"):
            return _NOTHING  # the first half of a two-phase commit
        case ["prepare", *_]:
            return Effects(prepares=True)
        case ["discard", "all"]:
            return Effects(deallocates=True, drops_drivers=True)
        case ["deallocate", "prepare", name] | ["deallocate", name]:
            is_drivers = name == "all" or identifier(name).startswith(_DRIVERS)
            return Effects(deallocates=True, drops_drivers=is_drivers)
        case ["do", *_]:
            deallocates = "deallocate" in text
            drops_drivers = deallocates and "from_sql" not in text  # which asyncpg's are not
            return Effects(prepares="prepare" in text, deallocates=deallocates, drops_drivers=drops_drivers)
    return _NOTHING


def _joined(one: Effects, other: Effects) -> Effects:
    return Effects(
        copy=one.copy or other.copy,
        prepares=one.prepares or other.prepares,
        deallocates=one.deallocates or other.deallocates,
        drops_drivers=one.drops_drivers or other.drops_drivers,
    )


def _copy(words: list[str]) -> str:
    """Return the direction of a COPY from or to the client. Its grammar takes STDIN and STDOUT for the same."""
    depth = 0
    for word, following in itertools.pairwise(words):
        depth += (word == "(") - (word == ")")
        if depth == 0 and word in ("from", "to"):
            if following not in ("stdin", "stdout"):
                return ""
            return "FROM STDIN" if word == "from" else "TO STDOUT"
    return ""
