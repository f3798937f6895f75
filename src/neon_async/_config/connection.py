"""Merge code, DSN and environment into one frozen `ConnectionParameters`, or raise one clear error.

A keyword wins over the DSN, and the DSN over the environment, as in libpq and asyncpg. Only the value that takes effect
is judged, by its row in the table of keywords. It must not know what the parameters are used for, nor read a file.
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NoReturn, cast

from .._errors import ConfigurationError, InsecureConfigurationError
from .._neon.endpoint import Endpoint, is_named_pooled, parse_host
from .arguments import AnchorSource
from .dsn import VERIFIED_SCHEME, decode, harden_dsn, redact, split
from .hints import answer_to_parameter, fold, invisible_in, is_masked, is_password_placeholder, is_placeholder
from .keyword_readers import Host, Level
from .keywords import BY_DSN_NAME, BY_NAME, KEYWORDS, Keyword
from .literals import ChannelBinding, RevocationMode, SSLNegotiation
from .password import Password
from .readers import Given, Reader
from .roots import KnownRoots
from .startup import check_startup_size, startup_settings


@dataclass(init=False, frozen=True, slots=True, eq=False, repr=False)
class ConnectionParameters:
    """What one connection needs to know, checked.

    Names and meanings are those of the table of keywords, and besides:

    Attributes:
        endpoint: What the host name says about the endpoint, or None where it is not a name of Neon's.
        pooled: Whether the host is a transaction pooler: the endpoint says so, or the code does.
        database: The database; the user's name where none was given.
        startup_settings: What the StartupMessage contains besides user and database.
    """

    host: str
    endpoint: Endpoint | None
    pooled: bool
    hostaddr: str | None
    port: int
    user: str
    database: str
    password: Password
    connect_timeout: float
    keepalives: bool
    keepalives_idle: int
    keepalives_interval: int
    keepalives_count: int
    tcp_user_timeout: int
    sslnegotiation: SSLNegotiation | None
    sslrootcert: str | None
    sslcrl: str | None
    revocation: RevocationMode
    sslcert: str | None
    sslkey: str | None
    sslpassword: str | None
    trust_anchor: AnchorSource | None
    channel_binding: ChannelBinding
    startup_settings: Mapping[str, str]
    command_timeout: float | None
    statement_cache_size: int
    max_cached_statement_lifetime: float
    max_cacheable_statement_size: int

    def __init__(self, values: Mapping[str, object]) -> None:  # one for each field would take long to define
        for each in fields(self):
            object.__setattr__(self, each.name, values[each.name])

    def __repr__(self) -> str:
        return f"<ConnectionParameters {self.redacted_dsn}>"

    @property
    def redacted_dsn(self) -> str:
        """A DSN that leads to the same place, without the password."""
        user, database = (urllib.parse.quote(text, safe="") for text in (self.user, self.database))
        hostaddr = f"&hostaddr={urllib.parse.quote(self.hostaddr, safe=':')}" if self.hostaddr else ""
        return f"postgresql://{user}@{self.host}:{self.port}/{database}?sslmode=verify-full{hostaddr}"


def parse(dsn: str | None, keywords: Mapping[str, object], environ: Mapping[str, str]) -> ConnectionParameters:
    """Merge the three sources, judge every value that takes effect, and return the result.

    Args:
        dsn: A connection URL, or None.
        keywords: The keywords of the call, by any of their names. None counts as not given, unless the table says
            otherwise. "" switches off what DSN and environment say, for the keywords that can be off.
        environ: The environment variables.

    Raises:
        InsecureConfigurationError: A value asks for less than verify-full.
        ConfigurationError: A value is unknown, given twice, not accepted, or in conflict with another one.
    """
    given = _effective(_given_in_environment(environ), _given_in_dsn(dsn), _given_in_code(keywords))
    _require_one_root(given)
    _refuse_templates(given)
    if dsn is not None:
        _judge_sslmode_of_dsn(given, lambda: _hardened(dsn, keywords, environ))
    values = {keyword.name: keyword.default for keyword in KEYWORDS}
    readers = _readers(given)
    values |= {name: None if each.value is None else readers[name].read(each) for name, each in given.items()}
    return _assemble(values)


def check_keywords(keywords: Mapping[str, object]) -> None:
    """Judge keywords of code each by itself, for calls that are made later.

    Raises:
        InsecureConfigurationError: A value asks for less than verify-full.
        ConfigurationError: A value is unknown, given twice, or not accepted.
    """
    given = _given_in_code(keywords)
    readers = _readers(given)
    for name, value in given.items():
        readers[name].read(value)


def keywords_of_url(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """Return the parts of a URL that other code has parsed, as keywords by their canonical names.

    The values are not judged: `parse()` does that, together with the other sources.

    Raises:
        ConfigurationError: A name is unknown, is given twice, or can be given in code only.
    """
    given: dict[str, Given] = {}
    for key, value in pairs:
        _add(given, key, value, _DSN)
    return {name: each.value for name, each in given.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The three sources

_CODE = "keyword argument"
_DSN = "DSN"


def _effective(environment: dict[str, Given], dsn: dict[str, Given], code: dict[str, Given]) -> dict[str, Given]:
    """Return what takes effect of each keyword."""
    merged = environment | dsn | code
    _raise_levels(merged, (environment, dsn, code))
    given = {name: value for name, value in merged.items() if not (BY_NAME[name].can_be_off and _is_off(value))}
    return {
        name: value
        for name, value in given.items()
        if value is not environment.get(name) or BY_NAME[name].variable_counts(given)
    }


def _is_off(given: Given) -> bool:
    return given.source == _CODE and given.value == ""


def _given_in_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for keyword in KEYWORDS:
        value = environ.get(keyword.variable) if keyword.variable else None
        if value or (value is not None and keyword.judged_when_empty):
            source = f"environment variable {keyword.variable}"
            given[keyword.name] = Given(keyword.name, value, source, secret=keyword.secret)
    return given


def _given_in_dsn(dsn: object) -> dict[str, Given]:
    given: dict[str, Given] = {}
    if dsn is None:
        return given
    url = split(dsn)
    for key, text in (("user", url.user), ("password", url.password), ("host", url.host), ("port", url.port)):
        if text:
            _add(given, key, decode(text), _DSN)
    if url.path not in ("", "/"):
        if re.search(_FROM_AROUND, url.path):
            raise ConfigurationError(
                "The name of the database in the DSN ends with '/' or a quotation mark, or with another sign that "
                "comes from around it. Remove it, or percent-encode it where it belongs to the name, such as %2F."
            )
        _add(given, "dbname", decode(url.path[1:]), _DSN)
    after_a_secret = False
    for item in filter(None, url.query.split("&")):
        encoded_key, equals, text = item.partition("=")
        key = decode(encoded_key)
        # It may be a piece of the secret, so it is not shown, unless everybody knows it.
        if after_a_secret and key not in BY_DSN_NAME and not answer_to_parameter(key):
            raise ConfigurationError(
                "The DSN contains an unknown parameter. If it belongs to a password, write '&' as %26."
            )
        if not equals:
            raise ConfigurationError(
                "The DSN contains a parameter without a value. Write key=value pairs separated by '&'."
            )
        _add(given, key, decode(text), _DSN)
        after_a_secret |= BY_DSN_NAME[key].secret
    if url.scheme == VERIFIED_SCHEME:
        given["sslmode"] = Given("sslmode", "verify-full", f"scheme {VERIFIED_SCHEME}")
    return given


# What a database's name ends with where more than the URL was copied. A bracket that was opened belongs to the name.
_FROM_AROUND = r"""(?:[/'"`,;\\]|\\n|^[^<]*>|^[^(]*\)|^[^\[]*\]|^[^{]*\})\Z"""


def _given_in_code(keywords: Mapping[str, object]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for key, value in keywords.items():
        if value is not None or (key in BY_NAME and BY_NAME[key].none_counts):
            _add(given, key, value, _CODE)
    return given


def _add(given: dict[str, Given], key: str, value: object, source: str) -> None:
    keyword = (BY_DSN_NAME if source == _DSN else BY_NAME).get(key)
    if keyword is None:
        _refuse_key(key, source)
    name = keyword.name
    if name in given:
        raise ConfigurationError(
            f"{name} is given twice ({source}). Programs disagree about which one wins. Write it once."
        )
    given[name] = Given(name, value, source, secret=keyword.secret)


def _refuse_key(key: str, source: str) -> NoReturn:
    if key in BY_NAME:
        _refuse_outside_code(BY_NAME[key], key, source)
    advice = answer_to_parameter(key) or _nearest(key, BY_DSN_NAME if source == _DSN else BY_NAME)
    raise ConfigurationError(f"{key[:60]!r} ({source}) is not a connection parameter. {advice}")


def _nearest(key: str, known: Iterable[str]) -> str:
    """Return the advice for a key that no library has: how a known one is spelled that looks like it."""
    import difflib  # takes a millisecond to import, and only this refusal needs it

    spelled = {fold(name): name for name in known}
    close = difflib.get_close_matches(fold(key), spelled, n=1, cutoff=_ALIKE)
    return f"Did you mean {spelled[close[0]]}?" if close else "Leave it out. Server settings go into server_settings=."


# From here on difflib's ratio means a slip: `sslmod` and `aplication_name`, but not `charset` for `host`.
_ALIKE = 0.75


def _refuse_outside_code(keyword: Keyword, key: str, source: str) -> NoReturn:
    if keyword.refused:
        keyword.reader.read(Given(key, None, source))
    error = InsecureConfigurationError if keyword.insecure_as_text else ConfigurationError
    advice = "Pass it to create_pool() or connect()." if keyword.code_only else f"Write {keyword.name} here."
    raise error(f"{key} ({source}) can be given in code only. {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# What only the whole can show


def _raise_levels(given: dict[str, Given], sources: Sequence[Mapping[str, Given]]) -> None:
    """Let the value that asks for the most win, wherever it is given, where a keyword's values are levels."""
    for keyword in KEYWORDS:
        if isinstance(keyword.reader, Level) and keyword.name in given:
            values = [source[keyword.name] for source in sources if keyword.name in source]
            given[keyword.name] = keyword.reader.highest(values)


def _refuse_templates(given: Mapping[str, Given]) -> None:
    """Refuse what stands for a value: a placeholder, a hidden password, a whole URL in place of a part of it."""
    for each in (given[name] for name in ("host", "dbname", "user") if name in given):
        text = each.value if isinstance(each.value, str) else ""
        if is_placeholder(text):
            each.refuse(f"is the placeholder {each.shown}. Write your own value; the Neon console shows all of them.")
        if "://" in text:
            each.refuse("is a URL. Write the name only; a connection URL is passed as the DSN, the first argument.")
        mark = invisible_in(text)
        if mark and each.source != _DSN:  # of a DSN the text was judged, and what is encoded is meant
            each.refuse(f"contains the invisible character {mark}. Remove it, or copy the value again.")
    password = given["password"].value if "password" in given else None
    if isinstance(password, str) and is_masked(password):
        given["password"].refuse(
            "consists of asterisks, which stand for a hidden password. Copy the connection string with its password "
            "shown."
        )
    if isinstance(password, str) and is_password_placeholder(password):
        given["password"].refuse("is a placeholder. Copy the password from the Neon console.")


def _require_one_root(given: Mapping[str, Given]) -> None:
    """Refuse two roots in code. A sslrootcert from another source does not replace the trust_anchor, so it may stay.

    A set of known roots is not in a file of its own: sslrootcert is one more place in which to find it.
    """
    anchor, place = given.get("trust_anchor"), given.get("sslrootcert")
    if anchor is None or place is None or isinstance(anchor.value, KnownRoots):
        return
    if place.source == _CODE:
        raise ConfigurationError(
            "trust_anchor and sslrootcert are both given, and name different roots. Write one of them."
        )


def _readers(given: Mapping[str, Given]) -> dict[str, Reader[object]]:
    """Return the reader of each keyword. A server below a root of one's own may have a host name of one label."""
    readers = {name: BY_NAME[name].reader for name in given}
    anchor = given.get("trust_anchor")
    if "host" in given and anchor is not None and not isinstance(anchor.value, KnownRoots):
        readers["host"] = Host(single_label=True)
    return readers


def _is_pooled(host: str, endpoint: Endpoint | None, stated: object) -> bool:
    """Return whether the host is a transaction pooler: by the name of a Neon host, or what code says, or any name."""
    if endpoint is None or stated is None:
        if endpoint is not None:
            return endpoint.pooled
        return is_named_pooled(host) if stated is None else bool(stated)
    if stated is not endpoint.pooled:
        kind = "pooled" if endpoint.pooled else "direct"
        raise ConfigurationError(
            f"pooled={stated} is given, but {host} is the {kind} host of a Neon endpoint. Leave pooled out."
        )
    return endpoint.pooled


def _judge_sslmode_of_dsn(given: Mapping[str, Given], hardened: Callable[[], str]) -> None:
    """Refuse a weak sslmode in the DSN before anything else, together with the DSN to write instead."""
    sslmode = given.get("sslmode")
    if sslmode is None or sslmode.source != _DSN:
        return
    try:
        BY_NAME["sslmode"].reader.read(sslmode)
    except InsecureConfigurationError as error:
        raise InsecureConfigurationError(f"{error}{hardened()}") from None


def _hardened(dsn: str, keywords: Mapping[str, object], environ: Mapping[str, str]) -> str:
    """Return the DSN to write instead, without its secrets, or "" if that one would be refused, too."""
    hardened = harden_dsn(dsn)
    try:
        parse(hardened, keywords, environ)
    except ConfigurationError:
        return ""
    return f" Hardened: {redact(hardened)}"


def _assemble(values: dict[str, object]) -> ConnectionParameters:
    for keyword in KEYWORDS:
        if keyword.required and values[keyword.name] is None:
            raise ConfigurationError(
                f"No {keyword.name} is given. Pass a DSN such as postgresql://user:password@host/dbname or the keyword "
                f"{keyword.name}, or set {keyword.variable}."
            )
    if values["sslkey"] is not None and values["sslcert"] is None:
        raise ConfigurationError("sslkey is given without sslcert. Write both, or neither.")
    host, user = str(values["host"]), str(values["user"])
    database = str(values["dbname"] or user)
    endpoint = parse_host(host)
    pooled = _is_pooled(host, endpoint, values["pooled"])
    settings = startup_settings(
        host,
        endpoint,
        pooled=pooled,
        application_name=cast("str | None", values["application_name"]),
        fallback_application_name=cast("str | None", values["fallback_application_name"]),
        options=cast("str | None", values["options"]),
        server_settings=cast("Mapping[str, str] | None", values["server_settings"]),
    )
    check_startup_size(user, database, settings)
    values |= {"endpoint": endpoint, "pooled": pooled, "database": database, "startup_settings": settings}
    # Each reader returns what the field of its keyword declares.
    return ConnectionParameters(values)
