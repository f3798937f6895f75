"""Judge settings of the server, which are set for a session or for one transaction.

It must not know how they are sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from .readers import Given, Reader, is_utf8


class Settings(Reader[Mapping[str, str]]):
    """Settings of the server by name.

    Attributes:
        refused: Names that are refused, in lower case, and why; a sentence that follows the name.
    """

    __slots__ = ("refused",)

    def __init__(self, refused: Mapping[str, str]) -> None:
        self.refused: Final = refused

    @property
    def expected(self) -> str:
        return "a dict of strings to strings"

    def read(self, given: Given) -> Mapping[str, str]:
        settings = given.value
        if not isinstance(settings, Mapping):
            given.must_be(self.expected)
        if not all(isinstance(text, str) for item in settings.items() for text in item):
            given.refuse("contains a name or a value that is not a string. Write strings only.")
        for name, value in settings.items():
            if not name or "\0" in name + value or not is_utf8(name + value):
                given.refuse("has a name that is empty, or a name or value with NUL or invalid UTF-8. Correct it.")
            if name.lower() in self.refused or name.startswith("_pq_."):
                given.refuse(f"contains {name!r}, which {self.refused.get(name.lower(), _NOT_A_SETTING)}")
            if not re.fullmatch(_SETTING_NAME, name):
                given.refuse(
                    f"contains {name[:60]!r}, which is not the name of a setting. Use letters, digits, '_' and '$', "
                    "joined by dots."
                )
        if len({name.lower() for name in settings}) < len(settings):
            given.refuse("contains a name twice, in upper and lower case. Write it once.")
        return dict(settings)


# PostgreSQL's valid_custom_variable_name(), src/backend/utils/misc/guc.c; '-' would be read as '_'.
_SETTING_NAME = r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)*"

_NOT_A_SETTING = "is a parameter of the connection, not a server setting. Pass it by itself."
_NO_EFFECT = "has no effect when a session starts."
_REFUSED_AT_START = {
    **dict.fromkeys(("user", "database", "replication", "client_encoding", "options", "password"), _NOT_A_SETTING),
    # Words of Neon's proxy, which takes them out of `options` (its source, proxy/src/auth).
    **dict.fromkeys(("endpoint", "project"), _NOT_A_SETTING),
    # What PostgreSQL accepts at the start of a session and forgets, or refuses with a misleading error.
    "seed": f"{_NO_EFFECT} Call setseed().",
    "session_authorization": f"{_NO_EFFECT} Log in as that user, or set role.",
    "transaction_isolation": f"{_NO_EFFECT} Write default_transaction_isolation.",
    "transaction_read_only": f"{_NO_EFFECT} Write default_transaction_read_only.",
    "transaction_deferrable": f"{_NO_EFFECT} Write default_transaction_deferrable.",
}
_ROLE_IS_APART = "is set with role=. Pass it there."
_REFUSED_IN_TRANSACTION = {
    **dict.fromkeys(("role", "session_authorization"), _ROLE_IS_APART),
    **dict.fromkeys(
        ("transaction_isolation", "transaction_read_only", "transaction_deferrable"),
        "is set with isolation=, readonly= or deferrable=. Pass it there.",
    ),
}

SERVER_SETTINGS = Settings(_REFUSED_AT_START)
"""Settings that take effect when a session starts."""
TRANSACTION_SETTINGS = Settings(_REFUSED_IN_TRANSACTION)
"""Settings that are set for one transaction."""
