"""Decide what a session starts with: `application_name` and `options` of the StartupMessage.

Neon's proxy forwards no other parameter and drops the rest silently, so that server settings travel inside `options`.
It must not know where the values were written, nor how they are sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .._errors import ConfigurationError
from .._neon.endpoint import Endpoint, direct_host
from .._neon.features import TRACKED_SETTINGS


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
