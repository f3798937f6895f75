"""Decide what a session starts with: `application_name` and `options` of the StartupMessage.

Neon's proxy forwards no other parameter and drops the rest silently, so that server settings travel inside `options`.
It must not know where the values were written, nor how they are sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from .._errors import ConfigurationError
from .._neon.endpoint import Endpoint, direct_host
from .._neon.features import TRACKED_SETTINGS
from .readers import Given, Reader, is_utf8


def startup_settings(
    host: str,
    endpoint: Endpoint | None,
    *,
    pooled: bool = False,
    application_name: str | None = None,
    fallback_application_name: str | None = None,
    options: str | None = None,
    server_settings: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the parameters of the StartupMessage besides user and database.

    Args:
        host: The server.
        endpoint: The endpoint that it belongs to.
        pooled: Whether it is a pooled host, which accepts only the settings that PgBouncer tracks.
        application_name: The name of the application; an empty one counts as none.
        fallback_application_name: The name to use where there is no other.
        options: Command-line options for the session, as PostgreSQL's `pg_split_opts()` reads them.
        server_settings: Settings by name, as `SERVER_SETTINGS` reads them.

    Raises:
        ConfigurationError: A setting is given twice, or cannot be set on a pooled host.
    """
    settings = {name.lower(): (name, value) for name, value in (server_settings or {}).items()}
    if "application_name" in settings:
        if application_name:
            raise ConfigurationError("application_name is given by itself and in server_settings. Write it once.")
        _, application_name = settings.pop("application_name")
    else:
        application_name = application_name or fallback_application_name
    options = options or ""
    in_options = _names_in(options)
    for name in settings:
        if name in in_options:
            raise ConfigurationError(f"{name} is given in options and in server_settings. Write it once.")
    if pooled:
        _require_tracked(in_options, "options", host, endpoint)
        _require_tracked(settings, "server_settings", host, endpoint)
    if (len(options) - len(options.rstrip("\\"))) % 2:  # it would escape the space that follows
        options = options[:-1]
    assignments = [f"-c {name}={_escaped(value)}" for name, value in settings.values()]
    startup = {"application_name": application_name, "options": " ".join(filter(None, [options, *assignments]))}
    return {name: value for name, value in startup.items() if value}


def check_startup_size(user: str, database: str, settings: Mapping[str, str]) -> None:
    """Check that the StartupMessage is not larger than servers accept.

    Raises:
        ConfigurationError: It is.
    """
    size = sum(len(text.encode()) + 1 for text in (user, database, *settings, *settings.values()))
    if size > _MAX_STARTUP_SIZE:
        raise ConfigurationError(
            f"user, dbname and server settings take {size:,} bytes, and servers accept {_MAX_STARTUP_SIZE:,}. "
            "Shorten application_name, options or server_settings."
        )


# PostgreSQL's and Neon's limit (MAX_STARTUP_PACKET_LENGTH) is 10,000; the names of the fields take less than 100 of it.
_MAX_STARTUP_SIZE = 9_900


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


def _require_tracked(names: Iterable[str], source: str, host: str, endpoint: Endpoint | None) -> None:
    """Refuse what PgBouncer would refuse: every setting that it does not track for each of its clients."""
    for name in names:
        if name not in TRACKED_SETTINGS:
            raise ConfigurationError(
                f"{name} ({source}) cannot be set on the pooled host {host}, where sessions are shared. "
                f"Use {direct_host(endpoint)}, SET LOCAL in a transaction, or ALTER ROLE ... SET."
            )


# ---------------------------------------------------------------------------------------------------------------------
# The text of `options`

# PostgreSQL's pg_split_opts() (src/backend/utils/init/postinit.c) ends a word at white space, unless a backslash
# precedes it; Neon's proxy and PgBouncer read the same.
_WORD = r"(?s:[^ \t\n\r\f\v\\]|\\.|\\\Z)+"
_NEEDS_ESCAPE = r"[ \t\n\r\f\v\\]"
# What Neon's proxy takes for itself (proxy/src/auth/credentials.rs and proxy/src/proxy/mod.rs).
_NEONS_OWN = r"(?:endpoint|project)=|neon_\w+:."
_OTHER_SWITCH = "a switch other than -c"


def _names_in(options: str) -> list[str]:
    """Return the names that `options` sets as `-c name=value`, `-cname=value` or `--name=value`, in lower case."""
    names = []
    words = (word for word in re.findall(_WORD, options) if not re.match(_NEONS_OWN, word))
    for word in words:
        if word == "-c":
            assignment = next(words, "")
        elif word.startswith(("-c", "--")):
            assignment = word[2:]
        else:
            assignment = _OTHER_SWITCH
        names.append(assignment.partition("=")[0].lower() or _OTHER_SWITCH)
    return names


def _escaped(value: str) -> str:
    return re.sub(_NEEDS_ESCAPE, r"\\\g<0>", value)


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
