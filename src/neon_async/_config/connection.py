"""DSN, keywords and environment become one frozen `ConnectionParameters`, or one clear refusal.

The effective value is judged: a keyword wins over the DSN, the DSN over the environment (the order of libpq and
asyncpg). Every keyword of libpq 18 and of asyncpg is honoured or refused by name; none is ever passed on as a server
setting. This module knows text only: no sockets, no TLS objects, no files.
"""

from __future__ import annotations

import inspect
import ipaddress
import os
import re
import urllib.parse
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias, TypedDict, cast

from .._errors import ConfigurationError, InsecureConfigurationError
from .._neon.endpoint import parse_host
from .._neon.sql import TRACKED_SETTINGS
from .dsn import decode, harden_dsn, redact, split

PasswordSource: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]


class Password:
    """A password, or the caller's function that tells it. Neither `repr` nor pickle shows it."""

    __slots__ = ("_source",)

    def __init__(self, source: PasswordSource) -> None:
        self._source = source

    def __repr__(self) -> str:
        return "<Password>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Password is not pickled")

    async def resolve(self) -> Password:
        """Return the password as it is now; a function is called anew each time, so that rotation needs no restart.

        Raises `ConfigurationError` when the function returns anything but a non-empty string without NUL.
        """
        if isinstance(self._source, str):
            return self
        answer = self._source()
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, str) and answer and "\0" not in answer:
            return Password(answer)
        kind = "an unusable string" if isinstance(answer, str) else f"a value of type {type(answer).__name__}"
        del answer
        raise ConfigurationError(f"The password function returned {kind}; return a non-empty str without NUL.")

    def reveal(self) -> str:
        """Return the text of a resolved password."""
        assert isinstance(self._source, str)
        return self._source


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionParameters:
    """What one dial needs to know, checked. Names and meanings are libpq's, or asyncpg's where libpq has none."""

    host: str
    hostaddr: str | None
    port: int
    user: str
    database: str
    password: Password = field(repr=False)
    connect_timeout: float
    keepalives: bool
    keepalives_idle: int
    keepalives_interval: int
    keepalives_count: int
    tcp_user_timeout: int
    sslnegotiation: str | None
    sslrootcert: str | None
    sslcrl: str | None
    sslcert: str | None
    sslkey: str | None
    sslpassword: str | None = field(repr=False)
    channel_binding: str
    startup_settings: Mapping[str, str]
    command_timeout: float | None
    statement_cache_size: int
    max_cached_statement_lifetime: int
    max_cacheable_statement_size: int

    @property
    def endpoint(self):
        return parse_host(self.host)

    @property
    def redacted_dsn(self) -> str:
        """A DSN that says where this leads, and no secret."""
        user, database = (urllib.parse.quote(text, safe="") for text in (self.user, self.database))
        hostaddr = f"&hostaddr={urllib.parse.quote(self.hostaddr, safe=':')}" if self.hostaddr else ""
        return f"postgresql://{user}@{self.host}:{self.port}/{database}?sslmode=verify-full{hostaddr}"


class ConnectKeywords(TypedDict, total=False):
    """The keywords of `connect()` and `create_pool()`: libpq's that are honoured, and asyncpg's."""

    host: str | None
    hostaddr: str | None
    port: int | str | None
    dbname: str | None
    database: str | None
    user: str | None
    password: PasswordSource | None
    options: str | None
    application_name: str | None
    fallback_application_name: str | None
    client_encoding: str | None
    connect_timeout: float | str | None
    timeout: float | None
    keepalives: bool | int | str | None
    keepalives_idle: int | str | None
    keepalives_interval: int | str | None
    keepalives_count: int | str | None
    tcp_user_timeout: int | str | None
    sslmode: str | None
    ssl: bool | str | None
    sslnegotiation: str | None
    sslrootcert: str | os.PathLike[str] | None
    sslcrl: str | os.PathLike[str] | None
    crl: str | os.PathLike[str] | None
    sslcert: str | os.PathLike[str] | None
    sslkey: str | os.PathLike[str] | None
    sslpassword: str | None
    sslsni: int | str | None
    ssl_min_protocol_version: str | None
    ssl_max_protocol_version: str | None
    channel_binding: str | None
    require_auth: str | None
    target_session_attrs: str | None
    gssencmode: str | None
    command_timeout: float | None
    statement_cache_size: int
    max_cached_statement_lifetime: int
    max_cacheable_statement_size: int
    server_settings: Mapping[str, str] | None


# ---------------------------------------------------------------------------------------------------------------------
# One value and how it is judged


@dataclass(frozen=True, slots=True)
class _Given:
    """One value, under its canonical name, and the place it came from."""

    name: str
    value: object = field(repr=False)
    place: str

    def refuse(self, why: str, *, insecure: bool = False) -> NoReturn:
        kind = InsecureConfigurationError if insecure else ConfigurationError
        raise kind(f"{self.name} ({self.place}): {why}") from None

    @property
    def shown(self) -> str:
        if isinstance(self.value, str):
            return repr(self.value if len(self.value) <= 80 else self.value[:77] + "...")
        if isinstance(self.value, (int, float)) and -_COUNT_MAX <= self.value <= _COUNT_MAX:
            return repr(self.value)
        return f"a value of type {type(self.value).__name__}"

    def text(self) -> str:
        """The value as text that can stand in a startup message, where NUL ends a string."""
        value = os.fspath(self.value) if isinstance(self.value, os.PathLike) else self.value
        if not isinstance(value, str):
            self.refuse(f"expected a string, got {self.shown}.")
        if "\0" in value:
            self.refuse("contains a NUL character; remove it.")
        return value

    def unicode(self) -> str:
        """The value as text that UTF-8 has bytes for, unlike what Python makes of other bytes in the environment."""
        if not _is_unicode(self.text()):
            self.refuse("is not text in UTF-8; write it anew.")
        return self.text()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_Reader: TypeAlias = Callable[[_Given], object]

# What each sslmode of libpq leaves unchecked (PostgreSQL documentation, section 34.19.3, table 34.1).
_WEAK_SSLMODES = {
    "disable": "sends everything, the password exchange included, in plaintext",
    "allow": "tries plaintext first",
    "prefer": "falls back to plaintext when the server, or anybody on the way, says so",
    "require": "encrypts, but checks neither the certificate nor the host name",
    "verify-ca": "does not check the host name, so any certificate of the same CA passes",
}


def _read_sslmode(given: _Given) -> str:
    if given.value is True and given.place == "keyword argument":
        return "verify-full"
    value = given.text() if isinstance(given.value, str) else None
    if value == "verify-full":
        return value
    advice = 'Write sslmode=verify-full, or pass sslmode="verify-full", which wins over DSN and environment.'
    if value is None:
        given.refuse(f"{given.shown} is not accepted: neon-async builds its own TLS context. {advice}", insecure=True)
    if value in _WEAK_SSLMODES:
        given.refuse(f"{value!r} {_WEAK_SSLMODES[value]}. {advice}", insecure=True)
    if value.lower() in ("true", "1", "on", "yes"):  # libpq reads ssl=true in a URL as sslmode=require
        given.refuse(f"{value!r} means sslmode=require there. {advice}", insecure=True)
    given.refuse(f"{given.shown} is not a value of sslmode. {advice}")


def _read_host(given: _Given) -> str:
    host = given.text()
    if host.startswith(("/", "@", "\\")) or "/" in host:
        given.refuse(
            f"{given.shown} is a socket path, and asyncpg speaks plaintext to sockets. Write the server's DNS name.",
            insecure=True,
        )
    if "," in host:
        given.refuse(
            "is a list of hosts: a failed verification would move on to the next one. Write exactly one host.",
            insecure=True,
        )
    if "@" in host:
        given.refuse("contains '@'. If it belongs to the user or password, write it as %40.")
    if _is_ip_literal(host):
        given.refuse(
            f"{given.shown} is an IP address, which no public certificate names. "
            "Write the DNS name as host, and the address as hostaddr.",
            insecure=True,
        )
    if not host.isascii():
        given.refuse(f"{given.shown} is not ASCII; write the A-label of the name (xn--...).")
    if "*" in host:
        given.refuse(f"{given.shown} is a wildcard; write the name of one host.")
    if host.endswith("."):
        given.refuse(f"{given.shown} ends in a dot, and certificates do not; leave the dot out.")
    # RFC 1123, section 2.1: labels of 1 to 63 letters, digits and hyphens; RFC 1035: 253 characters in all.
    if len(host) > 253 or not re.fullmatch(r"(?:(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!\Z)|\Z))+", host):
        given.refuse(f"{given.shown} is not a DNS name: labels of letters, digits and hyphens, separated by dots.")
    if "." not in host and host.lower() != "localhost":
        given.refuse(
            f"{given.shown} has a single label; write the full name, as in ep-name-123456.region.aws.neon.tech."
        )
    return host.lower()


def _is_ip_literal(host: str) -> bool:
    # A name whose last label is a number is an IPv4 address to inet_aton and getaddrinfo ("127.1", "0x7f.1").
    last = host.rpartition(".")[2].lower()
    if host.startswith("[") or ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _read_hostaddr(given: _Given) -> str:
    try:
        address = ipaddress.ip_address(given.text())
    except ValueError:
        given.refuse(f"{given.shown} is not an IP address. hostaddr says where to connect, host what to verify.")
    zone = getattr(address, "scope_id", None)
    if zone is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", zone):  # IFNAMSIZ of Linux and macOS, with NUL
        given.refuse(f"{given.shown} names no interface behind '%'.")
    return str(address)


def _integer(minimum: int, maximum: int, unit: str = "") -> _Reader:
    def read(given: _Given) -> int:
        value = given.value
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            given.refuse(f"expected a whole number{unit} from {minimum} to {maximum}, got {given.shown}.")
        return value

    return read


def _seconds(maximum: float) -> _Reader:
    def read(given: _Given) -> float:
        value = given.value
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,9})?", value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= maximum:
            given.refuse(
                f"expected seconds above 0 and at most {maximum:,.0f}, got {given.shown}. Every wait has an end."
            )
        return float(value)

    return read


def _flag(given: _Given) -> bool:
    if given.value in ("0", "1") or (isinstance(given.value, int) and given.value in (False, True)):
        return bool(int(given.value))
    given.refuse(f"expected 0 or 1, got {given.shown}.")


def _choice(*accepted: str, instead: str, weakens: str | None = None) -> _Reader:
    """Accept the values named. `weakens` tells how any other value asks for less than verify-full, where it does."""

    def read(given: _Given) -> str:
        # Flags may be given as numbers or as booleans, too.
        value = str(int(given.value)) if isinstance(given.value, int) and given.value in (0, 1) else given.text()
        if value in accepted:
            return value
        if value and weakens:
            given.refuse(f"{given.shown} {weakens}. {instead}", insecure=True)
        given.refuse(f"{given.shown} is not accepted. {instead}")

    return read


def _refused(why: str, *, insecure: bool = False) -> _Reader:
    def read(given: _Given) -> NoReturn:
        given.refuse(why, insecure=insecure)

    return read


def _read_text(given: _Given) -> str:
    return given.unicode()


def _read_name(given: _Given) -> str:
    return given.unicode() or given.refuse("is empty; write a name, or leave it out.")


def _read_path(given: _Given) -> str:
    return given.text() or given.refuse("is empty; write a path, or leave it out.")


def _read_encoding(given: _Given) -> str:
    if given.text().lower() not in ("utf8", "utf-8"):
        given.refuse(f"{given.shown} is not accepted: asyncpg decodes UTF-8 only. Write UTF8, or leave it out.")
    return "UTF8"


def _read_password(given: _Given) -> Password:
    value = given.value
    if callable(value):
        return Password(cast(PasswordSource, value))
    if not isinstance(value, str):
        given.refuse(f"expected a string or a function that returns one, got a value of type {type(value).__name__}.")
    if not value:
        given.refuse("is empty, and SCRAM needs a password. Copy the connection string from the Neon console anew.")
    return Password(given.text())


def _read_server_settings(given: _Given) -> Mapping[str, str]:
    settings = given.value
    if not isinstance(settings, Mapping) or not all(isinstance(x, str) for kv in settings.items() for x in kv):
        given.refuse("expected a dict of strings to strings.")
    for name, value in settings.items():
        if not name or "\0" in name + value or not _is_unicode(name + value):
            given.refuse("a name is empty, or a name or value holds a NUL character or is not text; mend it.")
        if name.lower() in _NOT_A_SETTING or name.startswith("_pq_."):
            given.refuse(f"{name!r} is a parameter of the connection, not a server setting; pass it by itself.")
        if not _SETTING_NAME.fullmatch(name):
            given.refuse(f"{name[:60]!r} is not the name of a setting: letters, digits, '_' and '$', joined by dots.")
        if name.lower() in _WITHOUT_EFFECT:
            given.refuse(f"{name!r} has no effect when a session starts. {_WITHOUT_EFFECT[name.lower()]}")
    if len({name.lower() for name in settings}) < len(settings):
        given.refuse("a name is given twice, in upper and lower case; write it once.")
    return dict(settings)


# `endpoint` and `project` are words of Neon's proxy, which takes them out of `options` (its source, proxy/src/auth).
_NOT_A_SETTING = {
    *("user", "database", "replication", "client_encoding", "options", "password"),
    *("endpoint", "project"),
}
# PostgreSQL's valid_custom_variable_name(), src/backend/utils/misc/guc.c; '-' would be read as '_'.
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)*")
# What PostgreSQL takes at the start of a session and forgets, or refuses for a reason that tells nothing.
_WITHOUT_EFFECT = {
    "seed": "Call setseed().",
    "session_authorization": "Log in as that user, or set role.",
    "transaction_isolation": "Write default_transaction_isolation.",
    "transaction_read_only": "Write default_transaction_read_only.",
    "transaction_deferrable": "Write default_transaction_deferrable.",
}

_GSS = "Neon has no GSSAPI; neon-async authenticates with SCRAM-SHA-256 inside TLS. Leave it out."
_OAUTH = "OAuth is not supported; neon-async authenticates with SCRAM-SHA-256. Leave it out."
_SCRAM_KEY = "keys in place of a password are not supported. Give the password, or a function that returns it."
_SERVICE = "service files are not read: parameters come from code, DSN and environment only. Leave it out."
_OWN_CONTEXT = "neon-async opens each connection and its TLS context itself, anew for every dial. Leave it out."
_COUNT_MAX = 2_147_483_647

# libpq's keywords (PostgreSQL 18, section 34.1.2) with their environment variables (34.15).
_LIBPQ: Mapping[str, tuple[str | None, _Reader]] = {
    "host": ("PGHOST", _read_host),
    "hostaddr": ("PGHOSTADDR", _read_hostaddr),
    "port": ("PGPORT", _integer(1, 65535)),
    "dbname": ("PGDATABASE", _read_name),
    "user": ("PGUSER", _read_name),
    "password": ("PGPASSWORD", _read_password),
    "options": ("PGOPTIONS", _read_text),
    "application_name": ("PGAPPNAME", _read_text),
    "fallback_application_name": (None, _read_text),
    "client_encoding": ("PGCLIENTENCODING", _read_encoding),
    "connect_timeout": ("PGCONNECT_TIMEOUT", _seconds(3600.0)),
    "keepalives": (None, _flag),
    # Linux refuses more than 32767 s and 127 probes (MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT).
    "keepalives_idle": (None, _integer(1, 32767, " of seconds")),
    "keepalives_interval": (None, _integer(1, 32767, " of seconds")),
    "keepalives_count": (None, _integer(1, 127)),
    "tcp_user_timeout": (None, _integer(0, _COUNT_MAX, " of milliseconds")),
    "sslmode": ("PGSSLMODE", _read_sslmode),
    "sslnegotiation": ("PGSSLNEGOTIATION", _choice("direct", "postgres", instead="Write direct or postgres.")),
    "sslrootcert": ("PGSSLROOTCERT", _read_path),
    "sslcrl": ("PGSSLCRL", _read_path),
    "sslcrldir": ("PGSSLCRLDIR", _refused("folders of CRLs are not read. Name one file with sslcrl.")),
    "sslcert": ("PGSSLCERT", _read_path),
    "sslkey": ("PGSSLKEY", _read_path),
    "sslpassword": (None, _read_text),
    "sslcertmode": (
        "PGSSLCERTMODE",
        _choice("allow", instead="sslcert is sent to a server that asks for it; leave this out."),
    ),
    "sslsni": (
        "PGSSLSNI",
        _choice("1", weakens="leaves out the name Neon finds the endpoint by", instead="Leave it out."),
    ),
    "sslcompression": (
        "PGSSLCOMPRESSION",
        _choice("0", weakens="asks for what TLS 1.3 has not", instead="Leave it out."),
    ),
    "sslkeylogfile": (None, _refused("would write the session keys to a file. Leave it out.", insecure=True)),
    "ssl_min_protocol_version": (
        "PGSSLMINPROTOCOLVERSION",
        _choice("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3", instead="Leave it out: TLS 1.3 is the only version spoken."),
    ),
    "ssl_max_protocol_version": (
        "PGSSLMAXPROTOCOLVERSION",
        _choice("TLSv1.3", weakens="rules TLS 1.3 out, the only version spoken", instead="Leave it out."),
    ),
    "min_protocol_version": ("PGMINPROTOCOLVERSION", _choice("3.0", instead="asyncpg speaks 3.0. Leave it out.")),
    "max_protocol_version": (
        "PGMAXPROTOCOLVERSION",
        _choice("3.0", "3.2", "latest", instead="asyncpg speaks 3.0. Leave it out."),
    ),
    "channel_binding": (
        "PGCHANNELBINDING",
        _choice(
            "prefer",
            "require",
            weakens="leaves the login open to whoever relays it",
            instead="Write prefer or require, or leave it out.",
        ),
    ),
    "require_auth": (
        "PGREQUIREAUTH",
        _choice("scram-sha-256", weakens="admits other methods than scram-sha-256", instead="Leave it out."),
    ),
    "target_session_attrs": (
        "PGTARGETSESSIONATTRS",
        _choice("any", instead="There is one host, so there is nothing to choose from. Write any, or leave it out."),
    ),
    "load_balance_hosts": ("PGLOADBALANCEHOSTS", _choice("disable", instead="There is one host. Leave it out.")),
    "gssencmode": (
        "PGGSSENCMODE",
        _choice("disable", "prefer", instead="Encryption is TLS, always. Leave it out."),
    ),
    "gssdelegation": ("PGGSSDELEGATION", _choice("0", instead=_GSS)),
    "krbsrvname": ("PGKRBSRVNAME", _refused(_GSS)),
    "gsslib": ("PGGSSLIB", _refused(_GSS)),
    "requirepeer": ("PGREQUIREPEER", _refused("is for Unix sockets, which are never used. Leave it out.")),
    "replication": (None, _refused("asyncpg has no replication protocol. Leave it out.")),
    "service": ("PGSERVICE", _refused(_SERVICE)),
    "servicefile": ("PGSERVICEFILE", _refused(_SERVICE)),
    "passfile": ("PGPASSFILE", _refused("password files are not read. Pass password=, or a function that reads one.")),
    "scram_client_key": (None, _refused(_SCRAM_KEY)),
    "scram_server_key": (None, _refused(_SCRAM_KEY)),
    "oauth_issuer": (None, _refused(_OAUTH)),
    "oauth_client_id": (None, _refused(_OAUTH)),
    "oauth_client_secret": (None, _refused(_OAUTH)),
    "oauth_scope": (None, _refused(_OAUTH)),
}

# asyncpg's keywords and ours: arguments in code, refused anywhere else.
_CODE_ONLY: Mapping[str, _Reader] = {
    "command_timeout": _seconds(_COUNT_MAX),
    "statement_cache_size": _integer(0, _COUNT_MAX),
    "max_cached_statement_lifetime": _integer(0, _COUNT_MAX, " of seconds"),
    "max_cacheable_statement_size": _integer(0, _COUNT_MAX, " of bytes"),
    "server_settings": _read_server_settings,
    "direct_tls": _refused(
        "is a door of asyncpg's to its own TLS. Write sslnegotiation=direct (the default) or postgres.", insecure=True
    ),
    "connect": _refused(_OWN_CONTEXT, insecure=True),
    "loop": _refused("the running event loop is used. Leave it out.", insecure=True),
}
_ALIASES = {"database": "dbname", "ssl": "sslmode", "timeout": "connect_timeout", "crl": "sslcrl"}
_DSN_ALIASES = ("database", "ssl")
_IN_CODE_ONLY = {"trust_anchor", "crl", "timeout", *_CODE_ONLY}
_INSECURE_FROM_TEXT = {"trust_anchor", "direct_tls", "connect", "loop"}
_SECRET = {"password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"}
_PUBLIC = {*_DSN_ALIASES, *_LIBPQ} - _SECRET
# PostgreSQL's and Neon's bound (MAX_STARTUP_PACKET_LENGTH) is 10,000; the names of the fields take less than 100 of it.
_MAX_STARTUP_SIZE = 9_900
# Empty means unset in the environment (libpq), except where a value decides what is checked.
_JUDGED_WHEN_EMPTY = {"sslmode", "channel_binding", "require_auth"}

# TCP: a silent peer is given up after idle + interval * count seconds, and unacknowledged data after the same time.
# Neon's load balancer forgets idle flows after about 350 s; TCP keepalive does not keep a compute awake.
_DEFAULTS: Mapping[str, object] = {
    "port": 5432,
    "connect_timeout": 15.0,
    "keepalives": True,
    "keepalives_idle": 60,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 90_000,
    "channel_binding": "prefer",
    "statement_cache_size": 100,
    "max_cached_statement_lifetime": 300,
    "max_cacheable_statement_size": 15 * 1024,
    "server_settings": {},
}


def parse(dsn: str | None, keywords: Mapping[str, object], environ: Mapping[str, str]) -> ConnectionParameters:
    """Merge the three sources, judge every effective value, and return the result.

    Raises `InsecureConfigurationError` where a value asks for less than verify-full, else `ConfigurationError`.
    """
    given = _from_environment(environ)
    given |= _from_dsn(dsn) if dsn is not None else {}
    given |= _from_keywords(keywords)
    if dsn is not None and "sslmode" in given and given["sslmode"].place == "DSN":
        _judge_sslmode_of_dsn(given["sslmode"], dsn)
    return _assemble({**_DEFAULTS, **{name: _reader(name)(value) for name, value in given.items()}})


def _judge_sslmode_of_dsn(given: _Given, dsn: str) -> None:
    """Refuse a weak sslmode together with the string to write instead, for there it can be told in full."""
    try:
        _read_sslmode(given)
    except InsecureConfigurationError as error:
        raise InsecureConfigurationError(f"{error} Hardened: {redact(harden_dsn(dsn), public=_PUBLIC)}") from None


def _reader(name: str) -> _Reader:
    return _LIBPQ[name][1] if name in _LIBPQ else _CODE_ONLY[name]


def _assemble(read: dict[str, object]) -> ConnectionParameters:
    """Check what only the whole can tell, and drop what has been judged and is not needed again."""
    for name, example in (("host", "PGHOST"), ("user", "PGUSER"), ("password", "PGPASSWORD")):
        if name not in read:
            raise ConfigurationError(
                f"No {name} given. Pass a DSN such as postgresql://user:password@host/dbname, the keyword {name}, "
                f"or set {example}."
            )
    if "sslkey" in read and "sslcert" not in read:
        raise ConfigurationError("sslkey is given without sslcert. Write both, or neither.")
    settings = _startup_settings(read)
    read |= {"startup_settings": settings, "database": read.get("dbname", read["user"])}
    size = sum(len(str(text).encode()) + 1 for text in (read["user"], read["database"], *settings, *settings.values()))
    if size > _MAX_STARTUP_SIZE:
        raise ConfigurationError(
            f"user, dbname and server settings come to {size:,} bytes, and servers take {_MAX_STARTUP_SIZE:,}. "
            "Shorten application_name, options or server_settings."
        )
    fields = ConnectionParameters.__dataclass_fields__
    return ConnectionParameters(**{name: read.get(name) for name in fields})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# What a session starts with


def _startup_settings(read: Mapping[str, object]) -> dict[str, str]:
    """Return what the StartupMessage says besides user and database: `application_name` and `options`.

    Neon's proxy forwards no other parameter and drops the rest in silence, so that settings travel inside `options`.
    """
    settings = {name.lower(): (name, value) for name, value in cast("dict[str, str]", read["server_settings"]).items()}
    _, name_of_application = settings.pop("application_name", ("", None))
    if read.get("application_name") and name_of_application is not None:
        raise ConfigurationError("application_name is given by itself and in server_settings. Write it once.")
    if name_of_application is None:
        name_of_application = str(read.get("application_name") or read.get("fallback_application_name") or "")
    options = str(read.get("options", ""))
    in_options = _settings_in(options)
    for name in settings:
        if name in in_options:
            raise ConfigurationError(f"{name} is given in options and in server_settings. Write it once.")
    _check_pooled_host(str(read["host"]), options=in_options, server_settings=settings)
    assignments = [f"-c {name}={_escaped(value)}" for name, value in settings.values()]
    if (len(options) - len(options.rstrip("\\"))) % 2:  # it would escape the space that ends it
        options = options[:-1]
    startup = {"application_name": name_of_application, "options": " ".join(filter(None, [options, *assignments]))}
    return {name: value for name, value in startup.items() if value}


# PostgreSQL's pg_split_opts() (src/backend/utils/init/postinit.c) ends a word at white space, unless a backslash stands
# in front; Neon's proxy and PgBouncer read the same.
_WORD = re.compile(r"(?:[^ \t\n\r\f\v\\]|\\.|\\\Z)+", re.DOTALL)
_NEEDS_ESCAPE = re.compile(r"[ \t\n\r\f\v\\]")
# What Neon's proxy takes for itself (proxy/src/auth/credentials.rs and proxy/src/proxy/mod.rs).
_NEONS_OWN = re.compile(r"(?:endpoint|project)=|neon_\w+:.")
_OTHER_SWITCH = "a switch other than -c"


def _escaped(value: str) -> str:
    return _NEEDS_ESCAPE.sub(r"\\\g<0>", value)


def _settings_in(options: str) -> list[str]:
    """Return the names that `options` sets as `-c name=value`, `-cname=value` or `--name=value`, in lower case."""
    names = []
    words = (word for word in _WORD.findall(options) if not _NEONS_OWN.match(word))
    for word in words:
        if word == "-c":
            assignment = next(words, "")
        elif word.startswith(("-c", "--")):
            assignment = word[2:]
        else:
            assignment = _OTHER_SWITCH
        names.append(assignment.partition("=")[0].lower() or _OTHER_SWITCH)
    return names


def _check_pooled_host(host: str, **names: Collection[str]) -> None:
    """Refuse what PgBouncer would: everything but the settings it tracks for each of its clients."""
    endpoint = parse_host(host)
    if endpoint is None or not endpoint.pooled:
        return
    for place, given in names.items():
        for name in given:
            if name not in TRACKED_SETTINGS:
                raise ConfigurationError(
                    f"{name} ({place}) cannot be set on the pooled host {host}, where sessions are shared. Use the "
                    f"direct host {endpoint.direct_host}, SET LOCAL in a transaction, or ALTER ROLE ... SET."
                )


# ---------------------------------------------------------------------------------------------------------------------
# The three sources


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    return {
        name: _Given(name, environ[variable], f"environment variable {variable}")
        for name, (variable, _) in _LIBPQ.items()
        if variable is not None and variable in environ and (environ[variable] or name in _JUDGED_WHEN_EMPTY)
    }


def _from_keywords(keywords: Mapping[str, object]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for key, value in keywords.items():
        if value is not None:
            _add(given, key, value, "keyword argument", known=(*_ALIASES, *_LIBPQ, *_CODE_ONLY))
    return given


def _from_dsn(dsn: object) -> dict[str, _Given]:
    url = split(dsn)
    given: dict[str, _Given] = {}
    for key, text in (("user", url.user), ("password", url.password), ("host", url.host), ("port", url.port)):
        if text:
            _add(given, key, decode(text), "DSN", known=_LIBPQ)
    if url.path not in ("", "/"):
        _add(given, "dbname", decode(url.path[1:]), "DSN", known=_LIBPQ)
    behind_a_secret = False
    known = (*_DSN_ALIASES, *_LIBPQ)
    for item in filter(None, url.query.split("&")):
        encoded_key, equals, text = item.partition("=")
        key = decode(encoded_key)
        if behind_a_secret and key not in known:
            raise ConfigurationError(
                "A parameter in the DSN is not known. If it belongs to a password, write '&' as %26."
            )
        if not equals:
            raise ConfigurationError("A parameter in the DSN has no value. Write key=value pairs separated by '&'.")
        _add(given, key, decode(text), "DSN", known=known)
        behind_a_secret |= key in _SECRET
    return given


def _add(given: dict[str, _Given], key: str, value: object, place: str, *, known: Collection[str]) -> None:
    if key not in known:
        _refuse_unknown(key, place, known)
    name = _ALIASES.get(key, key)
    if name in given:
        raise ConfigurationError(f"{name} is given twice ({place}). Programs differ on which one wins; write it once.")
    given[name] = _Given(name, value, place)


def _refuse_unknown(key: str, place: str, known: Collection[str]) -> NoReturn:
    if key in _IN_CODE_ONLY:
        kind = InsecureConfigurationError if key in _INSECURE_FROM_TEXT else ConfigurationError
        raise kind(f"{key} ({place}) can be given in code only. Pass it to create_pool() or connect().")
    import difflib  # costs a millisecond, and only a refusal needs it

    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    advice = f"Did you mean {close[0]}?" if close else "Leave it out; server settings go into server_settings=."
    raise ConfigurationError(f"{key[:60]!r} ({place}) is not a connection parameter. {advice}")
