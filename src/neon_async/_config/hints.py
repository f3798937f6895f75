"""Answer what people paste: parameters of other libraries, and connection strings with something around them.

Tables and the look-up in them. No answer contains any part of what was pasted. It must not know what is accepted.
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Final

# ---------------------------------------------------------------------------------------------------------------------
# Parameters of other libraries

_SETTING = 'pass server_settings={"name": "value"} in code; a pooled host accepts few of them, see ALTER ROLE ... SET.'
_SEARCH_PATH = (
    'pass server_settings={"search_path": "app"} in code, or write options=-csearch_path%3Dapp in the DSN. On a pooled '
    "host use ALTER ROLE ... SET search_path, or SET LOCAL in a transaction."
)
_LIFETIME = "pass max_lifetime= to create_pool(), in seconds."
_MAX_SIZE = "pass max_size= to create_pool()."
_MIN_SIZE = "pass min_size= to create_pool(); 0, the default, lets the compute scale to zero."
_MAX_WAITING = "pass max_waiting= to create_pool()."
_IDLE = "pass max_inactive_connection_lifetime= to create_pool(), in seconds."
_ACQUIRE = "pass acquire_timeout= to create_pool(), in seconds."
_CONNECT = "write connect_timeout, in seconds."
_COMMAND = "pass command_timeout= in code, in seconds."
_CHECKED = "leave it out: the pool checks connections that were idle; see check_after_idle=."
_PREPARED = (
    "leave it out: prepared statements work on pooled hosts, too. In code statement_cache_size=0 turns them off."
)
_TLS_CONTEXT = (
    "leave it out: neon-async builds a TLS context for every connection. To trust another root, pass trust_anchor= in "
    "code."
)
_VERIFIED = "leave it out: the server is always verified in full. To trust another root, pass trust_anchor= in code."
_ROOT = "pass the root of your own CA as trust_anchor= in code; for Neon leave it out."
_OPENS = "leave it out: `async with create_pool(...)` or `await create_pool(...)` opens the pool."
_URL = "pass the connection URL as the first argument."
_CONTENTS = "pass what is in it as keywords of the call."
_NO_SESSION = "leave it out: a connection is asyncpg's; see its transaction(), and record_class=."
_RETRIES = "leave it out: the pool retries until acquire_timeout; run_transaction(attempts=) repeats work."
_FRAMEWORK = "leave it out: it is for another library."
_POOLED = (
    "leave it out: a -pooler host is recognised by its name. For a PgBouncer of your own pass pooled=True in code."
)
_ENDPOINT = "leave it out: the host name contains the endpoint, and the TLS handshake names the host (SNI)."
_OF_POOL = "it is an option of the pool: pass it to create_pool(), in code."

# Names that people give, and the answer. Upper and lower case, `_` and `-` do not matter. SQLAlchemy, psycopg and
# psycopg_pool, Django, node-postgres, Prisma, JDBC and HikariCP, Go's pgx, and asyncpg itself.
_NAMES: Final = (
    ("schema currentSchema search_path schema_name", _SEARCH_PATH),
    ("pool_size maxsize max_pool_size maximum_pool_size pool_max_size max_connections connection_limit max", _MAX_SIZE),
    ("pool_max_conns max_conns max_open_conns pool_max limit_connections", _MAX_SIZE),
    ("max_overflow overflow", "pass max_size= to create_pool(): the sum of pool_size and max_overflow."),
    ("minsize min min_pool_size minimum_idle pool_min_size pool_min_conns min_conns", _MIN_SIZE),
    ("pool_timeout acquire_timeout_millis pool_acquire_timeout", _ACQUIRE),
    ("max_waiters max_queue queue_limit", _MAX_WAITING),
    ("pool_recycle conn_max_age max_conn_lifetime pool_max_conn_lifetime conn_max_lifetime", _LIFETIME),
    ("max_idle idle_timeout idle_timeout_millis max_idle_time pool_max_conn_idle_time", _IDLE),
    ("connection_timeout_millis login_timeout connection_timeout", _CONNECT),
    ("socket_timeout query_timeout read_timeout", _COMMAND),
    ("statement_timeout", 'pass command_timeout= in code, or server_settings={"statement_timeout": "..."}.'),
    ("lock_timeout idle_in_transaction_session_timeout transaction_timeout work_mem jit timezone datestyle", _SETTING),
    ("client_min_messages default_transaction_isolation default_transaction_read_only role plan_cache_mode", _SETTING),
    ("pool_pre_ping conn_health_checks health_check check test_on_borrow validation_query keepalive_query", _CHECKED),
    ("pgbouncer pooling pooler", _POOLED),
    ("endpoint project endpoint_id", _ENDPOINT),
    ("prepare_threshold prepared_statement_cache_size prepared_statement_name_func prepared_max", _PREPARED),
    ("prepared_statements statement_cache_mode default_query_exec_mode prefer_simple_protocol", _PREPARED),
    ("disable_prepared_statements prepared_statement_cache_queries simple_query", _PREPARED),
    ("ssl_context ssl_ctx sslfactory tls tls_config ssl_config ssl_object", _TLS_CONTEXT),
    (
        "sslaccept sslidentity ssl_verify verify reject_unauthorized trust_server_certificate ssl_check_hostname",
        _VERIFIED,
    ),
    ("check_server_identity insecure_skip_verify ssl_cert_reqs sslhostnameverifier", _VERIFIED),
    ("ssl_ca sslca ca cafile ssl_ca_certs ssl_cert_file sslrootcertdata root_cert ca_cert", _ROOT),
    ("check_hostname server_hostname server_name sni cert_reqs verify_mode ssl_version ciphers alpn", _VERIFIED),
    ("open opened", _OPENS),
    ("conninfo connection_string conn_string url uri database_url db_url", _URL),
    ("connect_args connect_kwargs connection_kwargs kwargs connect_options engine_options", _CONTENTS),
    ("autocommit row_factory cursor_factory isolation_level", _NO_SESSION),
    ("echo echo_pool future poolclass pool_use_lifo pool_reset_on_return async_fallback dialect driver", _FRAMEWORK),
    ("server_version target_server_type reuse_password uselibpqcompat workaround", _FRAMEWORK),
    ("encoding charset", "leave it out: asyncpg reads and writes UTF-8."),
    ("tcp_keep_alive tcp_keep_alives", "write keepalives."),
    ("log logger log_level debug name pool pool_name", _FRAMEWORK),
    (
        "on_connect after_connect after_create",
        "pass init= to create_pool(), an async function that takes a connection.",
    ),
    ("before_acquire after_acquire on_acquire configure", "pass setup= to create_pool(), or init= for what stays."),
    ("retry retries max_retries retry_attempts retry_on_error", _RETRIES),
    ("num_workers reconnect_timeout reconnect_failed max_uses allow_exit_on_idle", _FRAMEWORK),
    ("username login", "write user."),
    ("pwd passwd pass pg_password", "write password."),
    ("hostname server address servername", "write host."),
    ("db databasename", "write dbname."),
    ("app_name", "write application_name."),
    ("min_size max_size init_size acquire_timeout release_timeout max_waiting max_queries max_lifetime", _OF_POOL),
    ("max_inactive_connection_lifetime check_after_idle leak_after on_event setup init reset", _OF_POOL),
)


def fold(name: str) -> str:
    """Return a name without what does not matter in it: upper and lower case, `_` and `-`."""
    return re.sub("[_-]", "", name.lower())


@functools.cache  # not at import: only a refused parameter needs it
def _answers() -> Mapping[str, str]:
    """Return the answers by name, and by folded name: `maxsize` is not `max_size`. The first row wins."""
    rows = [(name, answer) for names, answer in reversed(_NAMES) for name in names.split()]
    return {fold(name): answer for name, answer in rows} | dict(rows)


def answer_to_parameter(name: str) -> str:
    """Return what to write in place of a parameter of another library, as a sentence, or ''."""
    if name.startswith("amp;"):
        return "The DSN was copied from a web page: write '&' for '&amp;'."
    answer = _answers().get(name) or _answers().get(fold(name), "")
    return answer[:1].upper() + answer[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Connection strings with something around them

_COPY = "Copy the connection string from the Neon console again."

# What a text that is no connection URL looks like, what it is ("The DSN ..."), and what to do. The first row wins.
_SHAPES: Final = (
    (r"\s*\Z", "is empty", "Set the variable that it comes from, such as DATABASE_URL."),
    (r"""\s*["'`<\u2018-\u201f\u00ab\u2039]""", "begins with a quotation mark or a bracket", "Pass what is in it."),
    (
        r"\s*[$%>#]?\s*(?:sudo\s+)?(?i:psql)\b(?!:)",
        "begins with the command psql",
        "Pass only the URL that follows it, without quotes.",
    ),
    (r"jdbc:", "is for JDBC", "Remove 'jdbc:', and write user and password as postgresql://user:password@host/dbname."),
    (
        r"\s*(?:host|hostaddr|port|dbname|user|password|sslmode|service)\s*=",
        "is a list of keywords and values",
        "Write a URL, postgresql://user:password@host/dbname, or pass them as keywords of the call.",
    ),
    (
        r"\s*(?:(?:export|set|setx|ENV)\s+)?[A-Za-z_][A-Za-z0-9_.]*\s*[=:]\s*[\"']?(?:postgres|psql)",
        "begins with the name of a variable, such as DATABASE_URL=",
        "Pass only what follows the '='.",
    ),
    (r"(?:export\s+)?[A-Za-z_][A-Za-z0-9_]*=", "begins with the name of a variable", "Pass only what follows the '='."),
    (
        r"(?:None|null|nil|undefined|true|false)\Z",
        "is the text of a missing value",
        "Set the variable that it comes from.",
    ),
    (
        r"[${%]|os\.environ|process\.env|(?:url\s*=\s*)?env\(|[A-Z][A-Z0-9_]*_(?:URL|URI|DSN)\Z",
        "is the name of a variable",
        "Pass the value of the variable.",
    ),
    (
        r"(?i:postgres(?:ql)?(?:\+\w+)?%3a)",
        "is percent-encoded as a whole",
        "Encode only its parts, where they need it.",
    ),
    (
        r"(?i:postgres(?:ql)?)(?:\+\w+)?(?:\s+:|:/?(?!/)|//)",
        "lacks the '//' or the ':' behind the scheme",
        "Write postgresql://...",
    ),
    (r"prisma(?:\+postgres)?://", "leads to a service of Prisma and to no PostgreSQL server", _COPY),
    (
        r"(?:op|vault|secret|secretref|ssm|gcp-secret|keyvault|arn):",
        "is the name of a secret",
        "Pass the secret itself.",
    ),
    (r"\.{0,2}/(?!/)|~/|[A-Za-z]:\\", "is the path of a file", "Pass what the file contains."),
    (r"https?://", "is the address of a web page or of an HTTP API", _COPY),
    (r"[^/:\s]*\.neon\.tech\b", "is a host name", "Write postgresql://user:password@host/dbname, or pass host=."),
    (r"(?s:.+?)\bpostgres(?:ql)?(?:\+\w+)?://", "begins with something else than a URL", "Pass only the URL in it."),
    (r"[^/\s]+:[^/\s]*@", "has no scheme", "Begin it with postgresql://."),
)


# The beginning tells all of them apart, and no pattern takes long on it.
_LOOKED_AT = 200


def answer_to_dsn(dsn: str) -> tuple[str, str] | None:
    """Return what a text that should be a connection URL is ("The DSN ..."), and what to do; None for any other."""
    for pattern, what, advice in _SHAPES:
        if re.match(pattern, dsn[:_LOOKED_AT]):
            return what, advice
    return None


def invisible_in(text: str) -> str:
    """Return the name of the first character in `text` that cannot be seen and that no keyboard has, or ''.

    Web pages, chats and documents put them into what is copied: zero-width spaces, no-break spaces, marks of direction.
    """
    for character in text:
        if not character.isascii() and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs"):
            return f"U+{ord(character):04X}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Values that stand for a value

_BRACKETED = r"\[[A-Za-z][A-Za-z _-]*\]|<[A-Za-z][A-Za-z _-]*>|\{+[A-Za-z][A-Za-z _-]*\}+|\$\{?[A-Za-z_]+\}?"
_WHOSE = r"(?:your|my|the)?[-_ ]?(?:neon|db|database|pg|postgres)?[-_ ]?"
_YOURS = r"(?i:your[-_ ]?(?:neon|db|database|pg|postgres)?[-_ ]?(?:host|hostname|user|username|database|dbname|name))"
_WORD = rf"(?i:{_WHOSE}(?:password|passwd|pass|pwd|secret))"
_VARIABLE = r"\$(?:[A-Z_]*(?:PASS|PASSWORD|PWD|SECRET)|\{[A-Z_]+\}|\([A-Z_]+\))"
_CUT_OUT = r"(?i:\[(?:redacted|hidden|masked|filtered)\]|<(?:redacted|hidden|masked|filtered)>|redacted|__password__)"
_HIDDEN = rf"\[{_WORD}\]|<{_WORD}>|\{{+{_WORD}\}}+|{_VARIABLE}|{_CUT_OUT}|(?i:your)[-_ ]?{_WORD}"
_MASKED = r"[*\u2022\u25cf\u2217\u2731]{3,}"


def is_placeholder(text: str) -> bool:
    """Return whether a host, user or database is the placeholder of a template, such as `[neon_hostname]`."""
    return re.fullmatch(f"{_BRACKETED}|{_YOURS}", text) is not None


def is_password_placeholder(text: str) -> bool:
    """Return whether a password is the placeholder of a template, such as `[password]`.

    Any other text in brackets may be a password.
    """
    return re.fullmatch(_HIDDEN, text) is not None


def is_masked(text: str) -> bool:
    """Return whether a password consists of the signs that stand for a hidden one."""
    return re.fullmatch(_MASKED, text) is not None
