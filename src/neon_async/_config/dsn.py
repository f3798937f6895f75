"""Take the text of a connection URL apart as libpq does, harden it, and show it without its secrets.

Of a parameter it knows two things, from the table of keywords: whether it is sslmode, and whether it is secret.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Final

from .._errors import ConfigurationError, forget_arguments
from .hints import answer_to_dsn, invisible_in
from .keywords import BY_DSN_NAME, BY_NAME
from .readers import is_utf8

# The scheme of the SQLAlchemy dialect. It asks for verify-full itself, whatever sslmode follows.
VERIFIED_SCHEME = "postgresql+neon"
_SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg", VERIFIED_SCHEME)


@forget_arguments
def harden_dsn(dsn: str) -> str:
    """Return the same connection string with `sslmode=verify-full`, and everything else unchanged, byte for byte.

    An `sslmode` or `ssl` in it is replaced where it stands, and further ones are removed; where there is none,
    `sslmode=verify-full` is appended. The rest is not checked: `create_pool()` does that.

    Args:
        dsn: A connection URL (`postgresql://`, `postgres://`, `postgresql+asyncpg://` or `postgresql+neon://`).

    Returns:
        The connection URL to use, with its password. Hardening it again changes nothing.

    Raises:
        ConfigurationError: The text is not such a URL.
    """
    query = split(dsn).query
    head = dsn[: len(dsn) - len(query)].removesuffix("?")
    items, placed = [], False
    for item in query.split("&"):
        if decode(item.partition("=")[0]) not in BY_NAME["sslmode"].dsn_names:
            items.append(item)
        elif not placed:
            items.append("sslmode=verify-full")
            placed = True
    if not placed:
        items = [*items, "sslmode=verify-full"] if query.strip("&") else ["sslmode=verify-full"]
    return f"{head}?{'&'.join(items)}"


class URL:
    """The parts of a connection URL as they are written, with their percent-encoding. Its `repr` shows none of them."""

    __slots__ = ("host", "password", "path", "port", "query", "scheme", "user")

    def __init__(self, scheme: str, user: str, password: str, host: str, port: str, path: str, query: str) -> None:
        self.scheme: Final = scheme
        self.user: Final = user
        self.password: Final = password
        self.host: Final = host
        self.port: Final = port
        self.path: Final = path
        self.query: Final = query


def split(dsn: object) -> URL:
    """Split a connection URL as libpq does (conninfo_uri_parse_options), and refuse what parsers disagree about.

    No message shows a part of the text: in a DSN with a character that should have been encoded, any part may contain
    a piece of the password.

    Raises:
        ConfigurationError: The text is not a connection URL, or not every parser would split it alike.
    """
    if not isinstance(dsn, str):
        how = next((how for method, how in _MAKES_TEXT.items() if hasattr(dsn, method)), "")
        raise ConfigurationError(
            f"The DSN is of type {type(dsn).__name__}. Pass a str such as postgresql://user@host/db.{how}"
        )
    if not is_utf8(dsn):
        raise ConfigurationError("The DSN contains bytes that are not UTF-8. Enter it again as UTF-8.")
    if mark := invisible_in(dsn):
        raise ConfigurationError(f"The DSN contains the invisible character {mark}. Remove it, or copy the DSN again.")
    if dsn.strip() and (dsn != dsn.strip() or any(ord(character) < 32 for character in dsn)):
        raise ConfigurationError(
            "The DSN contains a line break or control character, or begins or ends with white space. Remove it."
        )
    scheme, separator, rest = dsn.partition("://")
    if not separator or scheme not in _SCHEMES:
        if answer := answer_to_dsn(dsn):
            raise ConfigurationError(f"The DSN {answer[0]}. {answer[1]}")
        is_scheme = separator and re.fullmatch(r"[A-Za-z0-9+.-]{1,40}", scheme)
        what = f"begins with {scheme + '://'!r}" if is_scheme else "is not a URL"
        raise ConfigurationError(f"The DSN {what}. Write postgresql://user:password@host/dbname?sslmode=verify-full.")
    login, _, rest = rest.rpartition("@")
    # libpq takes the first '@' before the first '/', urllib the last one, and asyncpg cuts off what follows a '#'.
    if any(mark in login for mark in "@/?#") or "#" in rest:
        raise ConfigurationError(
            "The DSN contains a character that must be encoded. In user, password and parameters write '@' as %40, "
            "'/' as %2F, ':' as %3A, '?' as %3F and '#' as %23."
        )
    user, _, password = login.partition(":")
    authority_and_path, _, query = rest.partition("?")
    authority, slash, path = authority_and_path.partition("/")
    host, port = _split_authority(authority)
    return URL(scheme, user, password, host, port, slash + path, query)


# How objects that hold a connection URL return its text, by a method that they have.
_MAKES_TEXT = {
    "get_secret_value": " Its get_secret_value() returns one.",  # pydantic's SecretStr
    "render_as_string": " Its render_as_string(hide_password=False) returns one.",  # SQLAlchemy's URL
    "unicode_string": " str() makes one of it.",  # pydantic's PostgresDsn
}


def decode(text: str) -> str:
    """Return a part of a URL without its percent-encoding. A '+' is a plus, as in libpq.

    Raises:
        ConfigurationError: The encoding is broken, or what it encodes is not UTF-8.
    """
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise ConfigurationError(
            "The DSN contains a '%' that is not followed by two hexadecimal digits. Write a plain '%' as %25."
        )
    try:
        return urllib.parse.unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        pass  # raised below, where the error does not carry the bytes as its context
    raise ConfigurationError("The DSN contains percent-encoded bytes that are not UTF-8. Encode the text as UTF-8.")


def redact(dsn: str) -> str:
    """Return `dsn` with the password, and the value of every parameter that is secret or unknown, as `***`."""
    url = split(dsn)
    login = f"{url.user}:***@" if url.password else f"{url.user}@" if url.user else ""
    port = f":{url.port}" if url.port else ""
    items = []
    for item in filter(None, url.query.split("&")):
        encoded_key = item.partition("=")[0]
        keyword = BY_DSN_NAME.get(decode(encoded_key))
        items.append(f"{encoded_key}=***" if keyword is None or keyword.secret else item)
    query = f"?{'&'.join(items)}" if items else ""
    return f"{url.scheme}://{login}{url.host}{port}{url.path}{query}"


def _split_authority(authority: str) -> tuple[str, str]:
    if authority.startswith("["):
        host, bracket, rest = authority.partition("]")
        return host + bracket, rest.removeprefix(":")
    host, _, port = authority.partition(":")
    if port and not re.fullmatch(r"[0-9]+(,[0-9]+)*", urllib.parse.unquote(port)):
        raise ConfigurationError(
            "The port in the DSN is not a number. If it belongs to a password, write '/' as %2F and '@' as %40."
        )
    return host, port
