"""What Neon's host names and error texts say.

Pure: no sockets, no asyncio. Before login Neon's proxy reports everything as SQLSTATE XX000 with a text (its source,
`proxy/src/`, and `compute_tools/` of neondatabase/neon); a plain PostgreSQL uses the SQLSTATEs of its Appendix A.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .._errors import (
    AuthenticationError,
    ChannelBindingError,
    ComputeUnavailableError,
    DatabaseNotFoundError,
    EndpointDisabledError,
    EndpointError,
    EndpointNotFoundError,
    InvalidPasswordError,
    IPNotAllowedError,
    NeonAsyncError,
    QuotaExceededError,
    TooManyConnectionsError,
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a Neon host name tells: `ep-<name>[-pooler][.c-<n>].<region>.<aws|azure|gcp>.neon.tech`.

    `id`: the endpoint, as the Neon console and API name it. `pooled`: whether the name leads to Neon's PgBouncer, where
    each transaction gets another session. `region` and `provider`: where it runs. `direct_host`: the host name of the
    same endpoint without PgBouncer, which LISTEN, session locks and server settings need.
    """

    id: str
    pooled: bool
    region: str
    provider: str
    direct_host: str


# The id is a name and 6 or more digits, or 8 base-36 characters (Neon's docs).
_HOST = re.compile(
    r"(?P<id>ep-[a-z0-9]+-[a-z0-9]+-[a-z0-9]{6,})(?P<pooled>-pooler)?(?:\.c-[0-9]+)?"
    r"\.(?P<region>[a-z0-9-]+)\.(?P<provider>[a-z]+)\.neon\.tech"
)


def parse_host(host: str) -> Endpoint | None:
    """Return what `host` says, or None when it is not an endpoint's name at Neon."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    direct_host = host.replace("-pooler.", ".", 1) if match["pooled"] else host
    return Endpoint(match["id"], match["pooled"] is not None, match["region"], match["provider"], direct_host)


def short_name(host: str) -> str:
    """Return what to call this database in a line of log: the endpoint's id, or the host."""
    endpoint = parse_host(host)
    return endpoint.id if endpoint else host


_COPY = "Copy the connection string from the Neon console anew."
_QUOTA = "Wait for the next billing period or raise the limit in the Neon console."
_FULL = "Use the -pooler host, lower max_size, or wait: retry after a long, jittered pause."
_WAKING = "The compute may be waking: try again in a few seconds."

_BETWEEN = "Somebody may stand between you and the server. Do not go on; check host and network."

# (text the message contains, error, what to do); the first match counts.
_TEXTS: tuple[tuple[str, type[NeonAsyncError], str], ...] = (
    ("password authentication failed for user", InvalidPasswordError, f"Check user and password. {_COPY}"),
    ("SASL authentication failed", InvalidPasswordError, f"Check user and password. {_COPY}"),  # PgBouncer
    ("SCRAM channel binding", ChannelBindingError, _BETWEEN),  # PostgreSQL: check failed, negotiation error
    ("secure channel data mismatch", ChannelBindingError, _BETWEEN),  # Neon's proxy, scram/exchange.rs, and the next
    ("SCRAM-PLUS not used", ChannelBindingError, _BETWEEN),
    ("not allowed to connect to this endpoint", IPNotAllowedError, "Add this address to IP Allow of the Neon project."),
    ("from a blocked network", IPNotAllowedError, "Connect from an allowed network, or change IP Allow."),
    ("VPC endpoint ID is not specified", IPNotAllowedError, "Connect through the project's VPC endpoint."),
    ("This VPC endpoint id", IPNotAllowedError, "Allow this VPC endpoint in the Neon project."),
    ("endpoint cannot be found", EndpointNotFoundError, _COPY),
    ("The requested endpoint could not be found", EndpointNotFoundError, _COPY),
    ("endpoint is disabled", EndpointDisabledError, "Enable the endpoint in the Neon console."),
    ("Endpoint ID is not specified", EndpointNotFoundError, f"The host must be the endpoint's own name. {_COPY}"),
    (
        "Inconsistent project name inferred from SNI",
        EndpointNotFoundError,
        "Host and options name two endpoints. " + _COPY,
    ),
    ("exceeded the compute time quota", QuotaExceededError, _QUOTA),
    ("exceeded the data transfer quota", QuotaExceededError, _QUOTA),
    ("active time quota", QuotaExceededError, _QUOTA),
    ("written data quota", QuotaExceededError, _QUOTA),
    ("logical size quota", QuotaExceededError, _QUOTA),
    ("limit of concurrently active endpoints", QuotaExceededError, "Suspend another endpoint, or raise the limit."),
    ("unsupported startup parameter", EndpointError, "The -pooler host takes no such setting; use the direct host."),
    ("Couldn't connect to compute node", ComputeUnavailableError, _WAKING),
    ("Control plane request failed", ComputeUnavailableError, "Try again in a few seconds; see neonstatus.com."),
    ("endpoint is temporarily unavailable", ComputeUnavailableError, "Try again, and check the project's quotas."),
    ("Your project already has running operations", ComputeUnavailableError, "Try again when they have ended."),
    ("Failed to acquire permit to connect to the database", TooManyConnectionsError, _FULL),
    ("Too many connections attempts", TooManyConnectionsError, _FULL),
    ("Too many connections to this endpoint", TooManyConnectionsError, _FULL),
    ("exceeded the rate limit", TooManyConnectionsError, _FULL),
    ("no more connections allowed", TooManyConnectionsError, _FULL),
    ("remaining connection slots are reserved", TooManyConnectionsError, _FULL),
    ("sorry, too many clients already", TooManyConnectionsError, _FULL),
    ("Authentication timed out", ComputeUnavailableError, "Try again."),
)

_SQLSTATES: dict[str, tuple[type[NeonAsyncError], str]] = {
    "28P01": (InvalidPasswordError, f"Check user and password. {_COPY}"),
    "28000": (AuthenticationError, "Check the role, and what the server's pg_hba.conf allows."),
    "3D000": (DatabaseNotFoundError, "Check dbname, or create the database."),
    "53300": (TooManyConnectionsError, _FULL),
    "57P01": (ComputeUnavailableError, _WAKING),  # admin_shutdown: the compute is being suspended
    "57P02": (ComputeUnavailableError, _WAKING),
    "57P03": (ComputeUnavailableError, _WAKING),
}
# XX000 is all that Neon's proxy ever says; `database "..." does not exist` comes relayed.
_MISSING_DATABASE = re.compile(r'database "[^"]*" does not exist')


def classify(sqlstate: str | None, message: str) -> tuple[type[NeonAsyncError], str] | None:
    """Return the error class and the next step for what a server said during login, or None for what is not known.

    The text decides where it is known, because at Neon it alone tells; a genuine SQLSTATE decides the rest.
    """
    for text, kind, advice in _TEXTS:
        if text in message:
            return kind, advice
    if _MISSING_DATABASE.search(message):
        return _SQLSTATES["3D000"]
    return _SQLSTATES.get(sqlstate or "")
