"""List every keyword of libpq and asyncpg, and ours: one row each, which is all that is known about it.

Everything that needs to know something about a keyword reads it here; the documentation's table of settings is made
from these rows. This module is data: it must not know how sources are merged, nor what the values are used for.
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

from collections.abc import Callable, Container, Mapping
from typing import NamedTuple, get_args

from .keyword_readers import PEM, FilePath, Flag, Host, HostAddress, Level, Refused, SSLMode, Text
from .literals import ChannelBinding, ProtocolVersion, RevocationMode, SSLNegotiation, TLSVersion
from .password import PasswordReader
from .readers import INT32_MAX, Choice, Integer, Name, Reader, Seconds
from .settings import SERVER_SETTINGS


class Keyword(NamedTuple):
    """One keyword.

    Attributes:
        name: The canonical name: libpq's, or asyncpg's where libpq has none.
        reader: What a value must be, with unit and limits. `Refused` for a keyword that must not be given.
        note: What the keyword is for, and what it interacts with.
        default: The value where the keyword is given nowhere.
        required: Whether it must be given somewhere.
        variable: The environment variable that gives it.
        aliases: Other names, which may stand in a DSN, too.
        code_aliases: Other names that only code may use.
        secret: Whether no message may show the value.
        code_only: Whether only code may give it.
        insecure_as_text: Whether a DSN that gives a keyword for code only asks for less than verify-full. What a
            refused keyword asks for is its reader's to say.
        judged_when_empty: Whether an empty environment variable is judged. Otherwise it counts as unset, as in libpq.
        variable_counts: Whether the environment variable can take effect, by the names of the keywords that are given.
            Otherwise it is ignored.
        none_counts: Whether None in code is a value, and does not say that the keyword is given elsewhere or nowhere.
        can_be_off: Whether code may give "" so that the keyword is given nowhere, whatever DSN and environment say.
    """

    name: str
    reader: Reader[object]
    note: str = ""
    default: object = None
    required: bool = False
    variable: str | None = None
    aliases: tuple[str, ...] = ()
    code_aliases: tuple[str, ...] = ()
    secret: bool = False
    code_only: bool = False
    insecure_as_text: bool = False
    judged_when_empty: bool = False
    variable_counts: Callable[[Container[str]], bool] = lambda _: True
    none_counts: bool = False
    can_be_off: bool = False

    @property
    def refused(self) -> bool:
        """Whether no value is accepted."""
        return isinstance(self.reader, Refused)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that code may use."""
        return (self.name, *self.aliases, *self.code_aliases)

    @property
    def dsn_names(self) -> tuple[str, ...]:
        """Every name that may stand in a DSN."""
        return () if self.code_only else (self.name, *self.aliases)


_LEAVE_IT_OUT = "Leave it out."
_NO_GSS = "Neon does not offer GSSAPI, and neon-async authenticates with SCRAM-SHA-256 inside TLS. Leave it out."
_NO_OAUTH = "neon-async authenticates with SCRAM-SHA-256 and does not support OAuth. Leave it out."
_NO_SCRAM_KEY = "SCRAM keys cannot replace the password. Give the password, or a function that returns it."
_NO_SERVICE = "parameters come from code, DSN and environment, never from service files. Leave it out."
_ONE_HOST = "There is exactly one host, so there is nothing to choose from. Leave it out."
_PROTOCOL = "asyncpg speaks protocol 3.0. Leave it out."

# libpq's keywords are those of PostgreSQL 18, section 34.1.2, its environment variables those of section 34.15.
KEYWORDS: tuple[Keyword, ...] = (
    # -----------------------------------------------------------------------------------------------------------------
    # Where to connect, and as whom
    Keyword(
        name="host",
        variable="PGHOST",
        reader=Host(),
        required=True,
        note="The server, by the name that its certificate must contain. Exactly one.",
    ),
    Keyword(
        name="hostaddr",
        variable="PGHOSTADDR",
        can_be_off=True,
        reader=HostAddress(),
        note="The address to connect to, without a DNS look-up. The certificate is still verified against host.",
    ),
    Keyword(name="port", variable="PGPORT", reader=Integer(1, 65535), default=5432, note="The server's TCP port."),
    Keyword(
        name="dbname",
        variable="PGDATABASE",
        aliases=("database",),
        reader=Name(),
        note="The database. Default: the name of the user.",
    ),
    Keyword(name="user", variable="PGUSER", reader=Name(), required=True, note="The role to log in as."),
    Keyword(
        name="password",
        variable="PGPASSWORD",
        reader=PasswordReader(),
        required=True,
        secret=True,
        note="The password. In code also a function, plain or async, which is called for each new connection.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # What the session starts with
    Keyword(
        name="options",
        variable="PGOPTIONS",
        reader=Text(),
        note="Command-line options for the session, such as -c name=value. A pooled host accepts only the settings "
        "that PgBouncer tracks.",
    ),
    Keyword(name="application_name", variable="PGAPPNAME", reader=Text(), note="The name of the application."),
    Keyword(
        name="fallback_application_name",
        reader=Text(),
        note="The name of the application where application_name does not give one.",
    ),
    Keyword(
        name="client_encoding",
        variable="PGCLIENTENCODING",
        reader=Choice("UTF8", "UTF-8", advice="asyncpg decodes UTF-8 only. Leave it out.", ignore_case=True),
        default="UTF8",
        note="The encoding of text.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # Time and TCP. A silent peer is given up after idle + interval * count seconds, and unacknowledged data after the
    # same time. Neon's load balancer forgets idle flows after about 350 s; keepalive does not keep a compute awake.
    Keyword(
        name="connect_timeout",
        variable="PGCONNECT_TIMEOUT",
        code_aliases=("timeout",),
        reader=Seconds(3600.0),
        default=15.0,
        note="The time for everything that one connection needs, from DNS to login. Neon recommends 10 to 15 s, "
        "because a compute may have to wake.",
    ),
    Keyword(name="keepalives", reader=Flag(), default=True, note="Whether TCP keepalive is on."),
    # Linux refuses more than 32767 s and 127 probes (MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT).
    Keyword(
        name="keepalives_idle",
        reader=Integer(1, 32767, "seconds"),
        default=60,
        note="Silence before the first probe.",
    ),
    Keyword(
        name="keepalives_interval",
        reader=Integer(1, 32767, "seconds"),
        default=10,
        note="The time between two probes.",
    ),
    Keyword(
        name="keepalives_count",
        reader=Integer(1, 127),
        default=3,
        note="Probes without an answer after which the connection ends.",
    ),
    Keyword(
        name="tcp_user_timeout",
        reader=Integer(0, INT32_MAX, "milliseconds"),
        default=90_000,
        note="The time after which unacknowledged data ends the connection; 0 for the system's default. Linux only.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # TLS, and the version of the protocol inside
    Keyword(
        name="sslmode",
        variable="PGSSLMODE",
        aliases=("ssl",),
        reader=SSLMode(),
        default="verify-full",
        judged_when_empty=True,
        note="How the server is verified: always in full.",
    ),
    Keyword(
        name="sslnegotiation",
        variable="PGSSLNEGOTIATION",
        can_be_off=True,
        reader=Choice(*get_args(SSLNegotiation)),
        note="How TLS begins. Default: direct, and postgres for a server that does not support direct.",
    ),
    Keyword(
        name="sslrootcert",
        variable="PGSSLROOTCERT",
        can_be_off=True,
        reader=FilePath(),
        note="A file or directory in which ISRG Root X1 must be found, or system for the system's stores. To trust "
        "another root, pass trust_anchor in code.",
    ),
    Keyword(
        name="sslcrl",
        variable="PGSSLCRL",
        can_be_off=True,
        code_aliases=("crl",),
        reader=FilePath(),
        note="A file of revocation lists; with it, one of them must cover the server's certificate.",
    ),
    Keyword(
        name="sslcrldir",
        variable="PGSSLCRLDIR",
        can_be_off=True,
        reader=Refused("directories of revocation lists are not read. Name one file with sslcrl."),
    ),
    Keyword(
        name="revocation",
        variable="NEON_ASYNC_REVOCATION",
        reader=Level(*get_args(RevocationMode)),
        default="off",
        note="Whether the revocation list that the server's certificate names is fetched and checked: never, after the "
        "connect, or before it. Code, DSN and environment can each raise it, and none lowers it.",
    ),
    Keyword(
        name="sslcert",
        variable="PGSSLCERT",
        can_be_off=True,
        reader=FilePath(),
        note="A file with the client certificate, for a server that asks for one.",
    ),
    Keyword(
        name="sslkey",
        variable="PGSSLKEY",
        variable_counts=lambda given: "sslcert" in given,
        can_be_off=True,
        reader=FilePath(),
        note="A file with the key of the client certificate. Default: the file named by sslcert.",
    ),
    Keyword(name="sslpassword", reader=Text(), secret=True, note="The password of the key of the client certificate."),
    Keyword(
        name="sslcertmode",
        variable="PGSSLCERTMODE",
        reader=Choice("allow", advice="A server that asks for sslcert gets it. Leave sslcertmode out."),
        default="allow",
        note="When the client certificate is sent.",
    ),
    Keyword(
        name="sslsni",
        variable="PGSSLSNI",
        reader=Choice("1", advice=_LEAVE_IT_OUT, weakness="leaves out the name by which Neon finds the endpoint"),
        default="1",
        note="Whether the TLS handshake names the host.",
    ),
    Keyword(
        name="sslcompression",
        variable="PGSSLCOMPRESSION",
        reader=Choice("0", advice=_LEAVE_IT_OUT, weakness="asks for compression, which TLS 1.3 removed"),
        default="0",
        note="Whether TLS compresses.",
    ),
    Keyword(
        name="sslkeylogfile",
        reader=Refused("it would write the session keys to a file. Leave it out.", insecure=True),
    ),
    Keyword(
        name="ssl_min_protocol_version",
        variable="PGSSLMINPROTOCOLVERSION",
        reader=Choice(
            *get_args(TLSVersion),
            advice="TLS 1.3 is the only version that is used. Leave it out.",
        ),
        default="TLSv1.3",
        note="The lowest version of TLS. TLS 1.3 is required, whatever is written here.",
    ),
    Keyword(
        name="ssl_max_protocol_version",
        variable="PGSSLMAXPROTOCOLVERSION",
        reader=Choice("TLSv1.3", advice=_LEAVE_IT_OUT, weakness="rules out TLS 1.3, the only version that is used"),
        default="TLSv1.3",
        note="The highest version of TLS.",
    ),
    Keyword(
        name="min_protocol_version",
        variable="PGMINPROTOCOLVERSION",
        reader=Choice("3.0", advice=_PROTOCOL),
        default="3.0",
        note="The lowest version of the PostgreSQL protocol.",
    ),
    Keyword(
        name="max_protocol_version",
        variable="PGMAXPROTOCOLVERSION",
        reader=Choice(*get_args(ProtocolVersion), advice=_PROTOCOL),
        default="3.0",
        note="The highest version of the PostgreSQL protocol. 3.0 is used, whatever is written here.",
    ),
    Keyword(
        name="trust_anchor",
        reader=PEM(),
        code_only=True,
        insecure_as_text=True,
        note="The root certificates to trust instead of ISRG Root X1. Together with sslrootcert only where they are "
        "LETS_ENCRYPT_ROOTS, which are searched there, too.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # Authentication
    Keyword(
        name="channel_binding",
        variable="PGCHANNELBINDING",
        reader=Choice(
            *get_args(ChannelBinding),
            advice="Write prefer or require, or leave it out.",
            weakness="leaves the login open to a relay between client and server",
        ),
        default="prefer",
        judged_when_empty=True,
        note="Whether the login is bound to the TLS channel: wherever the server offers it, or always.",
    ),
    Keyword(
        name="require_auth",
        variable="PGREQUIREAUTH",
        reader=Choice(
            "scram-sha-256",
            advice=_LEAVE_IT_OUT,
            weakness="allows authentication methods other than scram-sha-256",
        ),
        default="scram-sha-256",
        judged_when_empty=True,
        note="The authentication method that the server must use.",
    ),
    Keyword(
        name="passfile",
        variable="PGPASSFILE",
        variable_counts=lambda given: "password" not in given,
        can_be_off=True,
        reader=Refused("password files are not read. Pass password=, or a function that reads one."),
    ),
    Keyword(name="scram_client_key", reader=Refused(_NO_SCRAM_KEY), secret=True),
    Keyword(name="scram_server_key", reader=Refused(_NO_SCRAM_KEY), secret=True),
    Keyword(name="oauth_issuer", reader=Refused(_NO_OAUTH)),
    Keyword(name="oauth_client_id", reader=Refused(_NO_OAUTH)),
    Keyword(name="oauth_client_secret", reader=Refused(_NO_OAUTH), secret=True),
    Keyword(name="oauth_scope", reader=Refused(_NO_OAUTH)),
    Keyword(
        name="gssencmode",
        variable="PGGSSENCMODE",
        reader=Choice("disable", "prefer", advice="Every connection is encrypted by TLS. Leave it out."),
        default="disable",
        note="Whether GSSAPI encrypts. It never does.",
    ),
    Keyword(
        name="gssdelegation",
        variable="PGGSSDELEGATION",
        reader=Choice("0", advice=_NO_GSS),
        default="0",
        note="Whether GSSAPI credentials are sent. They never are.",
    ),
    Keyword(
        name="krbsrvname",
        variable="PGKRBSRVNAME",
        variable_counts=lambda _: False,  # it names a service for GSSAPI, which is never used
        can_be_off=True,
        reader=Refused(_NO_GSS),
    ),
    Keyword(
        name="gsslib",
        variable="PGGSSLIB",
        variable_counts=lambda _: False,
        can_be_off=True,
        reader=Refused(_NO_GSS),
    ),
    Keyword(
        name="requirepeer",
        variable="PGREQUIREPEER",
        can_be_off=True,
        reader=Refused("it is about Unix sockets, which are never used. Leave it out."),
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # What needs several hosts, another protocol or other files
    Keyword(
        name="target_session_attrs",
        variable="PGTARGETSESSIONATTRS",
        reader=Choice("any", advice=_ONE_HOST),
        default="any",
        note="Which of several hosts to choose. There is one.",
    ),
    Keyword(
        name="load_balance_hosts",
        variable="PGLOADBALANCEHOSTS",
        reader=Choice("disable", advice=_ONE_HOST),
        default="disable",
        note="Whether to choose among several hosts at random. There is one.",
    ),
    Keyword(name="replication", reader=Refused("asyncpg does not speak the replication protocol. Leave it out.")),
    Keyword(name="service", variable="PGSERVICE", can_be_off=True, reader=Refused(_NO_SERVICE)),
    Keyword(
        name="servicefile",
        variable="PGSERVICEFILE",
        variable_counts=lambda given: "service" in given,
        can_be_off=True,
        reader=Refused(_NO_SERVICE),
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # Ours and asyncpg's, for code only
    Keyword(
        name="pooled",
        code_only=True,
        reader=Flag(),
        note="Whether the host is a transaction pooler, such as a PgBouncer of your own. The name of a Neon host says "
        "that by itself. Default: no.",
    ),
    Keyword(
        name="command_timeout",
        code_only=True,
        reader=Seconds(INT32_MAX),
        default=60.0,
        none_counts=True,
        note="The time for one statement that has no timeout of its own, and for COPY, executemany() and fetchmany() "
        "the time without progress. None for no limit.",
    ),
    Keyword(
        name="statement_cache_size",
        code_only=True,
        reader=Integer(0, INT32_MAX),
        default=100,
        note="Prepared statements that one connection keeps; 0 for none.",
    ),
    Keyword(
        name="max_cached_statement_lifetime",
        code_only=True,
        reader=Seconds(INT32_MAX, zero="for ever"),
        default=300.0,
        note="The time that a prepared statement is kept; 0 for ever.",
    ),
    Keyword(
        name="max_cacheable_statement_size",
        code_only=True,
        reader=Integer(0, INT32_MAX, "bytes"),
        default=15 * 1024,
        note="The size above which a statement is not kept; 0 for any size.",
    ),
    Keyword(
        name="server_settings",
        code_only=True,
        reader=SERVER_SETTINGS,
        note="What the session starts with, by name. A pooled host accepts only the settings that PgBouncer tracks.",
    ),
    Keyword(
        name="direct_tls",
        code_only=True,
        reader=Refused(
            "asyncpg's own TLS is never used. Write sslnegotiation=direct or sslnegotiation=postgres.", insecure=True
        ),
    ),
    Keyword(
        name="connect",
        code_only=True,
        reader=Refused(
            "neon-async opens each connection itself, with a TLS context that is built for it alone. Leave it out.",
            insecure=True,
        ),
    ),
    Keyword(
        name="loop",
        code_only=True,
        reader=Refused(
            "it is not the running event loop, which is the one that is used. Leave it out, or pass "
            "asyncio.get_running_loop().",
            insecure=True,
        ),
    ),
)

# Each keyword by every name of its own.
BY_NAME: Mapping[str, Keyword] = {name: keyword for keyword in KEYWORDS for name in keyword.names}
# Each keyword by every name that may stand in a DSN.
BY_DSN_NAME: Mapping[str, Keyword] = {name: keyword for keyword in KEYWORDS for name in keyword.dsn_names}


def canonical_name(name: str) -> str:
    """Return the canonical name of a keyword, or `name` itself where it is none of ours."""
    return BY_NAME[name].name if name in BY_NAME else name
