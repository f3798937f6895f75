"""The types of what `create_pool()` and `connect()` are given.

Types only: the values are judged by the table of keywords. It must not know that table, which is loaded with the first
connection; these types are loaded with the package.
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal, TypeAlias, TypedDict

from .literals import ChannelBinding, ProtocolVersion, RevocationMode, SSLNegotiation, TLSVersion
from .roots import KnownRoots

AnchorSource: TypeAlias = str | bytes | os.PathLike[str] | KnownRoots
"""What `trust_anchor=` accepts: PEM text or the path of a PEM file, PEM bytes, a path, or `LETS_ENCRYPT_ROOTS`."""

PasswordSource: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""What `password=` accepts: the password, or a function, plain or async, that is called for each new connection."""


class ConnectKeywords(TypedDict, total=False):
    """The keywords of `connect()` and `create_pool()`: every row of the table that code may give, by all its names.

    `trust_anchor` is a parameter of both functions, and not listed here.
    """

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
    client_encoding: Literal["UTF8", "UTF-8", "utf8", "utf-8"] | None
    connect_timeout: float | str | None
    timeout: float | None
    keepalives: bool | Literal[0, 1, "0", "1"] | None
    keepalives_idle: int | str | None
    keepalives_interval: int | str | None
    keepalives_count: int | str | None
    tcp_user_timeout: int | str | None
    sslmode: Literal["verify-full", True] | None
    ssl: Literal["verify-full", True] | None
    sslnegotiation: SSLNegotiation | Literal[""] | None
    sslrootcert: str | os.PathLike[str] | None
    sslcrl: str | os.PathLike[str] | None
    crl: str | os.PathLike[str] | None
    revocation: RevocationMode | None
    sslcert: str | os.PathLike[str] | None
    sslkey: str | os.PathLike[str] | None
    sslpassword: str | None
    sslcertmode: Literal["allow"] | None
    sslsni: Literal["1", 1, True] | None
    sslcompression: Literal["0", 0, False] | None
    ssl_min_protocol_version: TLSVersion | None
    ssl_max_protocol_version: Literal["TLSv1.3"] | None
    min_protocol_version: Literal["3.0"] | None
    max_protocol_version: ProtocolVersion | None
    channel_binding: ChannelBinding | None
    require_auth: Literal["scram-sha-256"] | None
    target_session_attrs: Literal["any"] | None
    load_balance_hosts: Literal["disable"] | None
    gssencmode: Literal["disable", "prefer"] | None
    gssdelegation: Literal["0", 0, False] | None
    pooled: bool | None
    command_timeout: float | None
    statement_cache_size: int
    max_cached_statement_lifetime: float
    max_cacheable_statement_size: int
    server_settings: Mapping[str, str] | None
    # Refused, and given as "" only: to ignore the environment variable.
    sslcrldir: Literal[""]
    passfile: Literal[""]
    krbsrvname: Literal[""]
    gsslib: Literal[""]
    requirepeer: Literal[""]
    service: Literal[""]
    servicefile: Literal[""]
