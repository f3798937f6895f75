"""Map what a server says during login to an error class and the next step.

Before login, Neon's proxy reports every failure as SQLSTATE XX000 and a text (`proxy/src/` and `compute_tools/` of
neondatabase/neon). PostgreSQL and PgBouncer use the SQLSTATEs of PostgreSQL's Appendix A.
"""

from __future__ import annotations

import re
from typing import Final

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


class ServerVerdict:
    """The meaning of a server's error.

    Attributes:
        error: The class to raise.
        advice: What the user can do next: one or two sentences.
        texts: What messages with this meaning contain.
        sqlstates: The SQLSTATEs with this meaning, and the classes of SQLSTATEs (two characters), for messages whose
            text is unknown.
    """

    __slots__ = ("advice", "error", "sqlstates", "texts")

    def __init__(
        self,
        error: type[NeonAsyncError],
        advice: str,
        texts: tuple[str | re.Pattern[str], ...] = (),
        sqlstates: tuple[str, ...] = (),
    ) -> None:
        self.error: Final = error
        self.advice: Final = advice
        self.texts: Final = texts
        self.sqlstates: Final = sqlstates


def classify(sqlstate: str | None, message: str) -> ServerVerdict:
    """Return the meaning of an error that the server reported during login.

    A known text decides, because on Neon only the text distinguishes failures; then the SQLSTATE, then its class. What
    is not known at all may pass: a caller who waits longer loses less than one who is refused for an error that passes.
    """
    for verdict in _VERDICTS:
        if any(_contains(message, text) for text in verdict.texts):
            return verdict
    for code in (sqlstate, (sqlstate or "")[:2]):
        for verdict in _VERDICTS:
            if code in verdict.sqlstates:
                return verdict
    return _VERDICTS[-1]


def _contains(message: str, text: str | re.Pattern[str]) -> bool:
    return text in message if isinstance(text, str) else text.search(message) is not None


_COPY = "Copy the connection string from the Neon console again."
_WAKING = "The compute may be waking: try again in a few seconds."

# The first row with a text in the message wins, then the first with the SQLSTATE, then the first with its class.
# "password authentication failed" comes first, because it quotes the user's name, which may read like any other text.
_VERDICTS = (
    ServerVerdict(
        InvalidPasswordError,
        f"Check user and password. {_COPY}",
        texts=(
            "password authentication failed for user",
            "SASL authentication failed",  # PgBouncer
            "no such user",  # PgBouncer before 1.17
        ),
        sqlstates=("28P01",),
    ),
    ServerVerdict(
        ChannelBindingError,
        "An attacker may be intercepting this connection. Do not continue; check host and network.",
        texts=(
            "SCRAM channel binding",  # PostgreSQL: check failed, negotiation error
            "secure channel data mismatch",  # Neon's proxy, scram/exchange.rs
            "SCRAM-PLUS not used",  # the same
        ),
    ),
    ServerVerdict(IPNotAllowedError, "Allow this VPC endpoint in the Neon project.", texts=("This VPC endpoint id",)),
    ServerVerdict(
        IPNotAllowedError,
        "Connect through the project's VPC endpoint.",
        texts=("VPC endpoint ID is not specified",),
    ),
    ServerVerdict(
        IPNotAllowedError,
        "Add this address to IP Allow of the Neon project.",
        texts=("not allowed to connect to this endpoint",),
    ),
    ServerVerdict(
        IPNotAllowedError,
        "Connect from an allowed network, or change IP Allow.",
        texts=("from a blocked network",),
    ),
    ServerVerdict(
        EndpointNotFoundError,
        _COPY,
        texts=("endpoint cannot be found", "The requested endpoint could not be found"),
    ),
    ServerVerdict(
        EndpointNotFoundError,
        f"The host must be the endpoint's own name. {_COPY}",
        texts=("Endpoint ID is not specified",),
    ),
    ServerVerdict(
        EndpointNotFoundError,
        f"host and options name two different endpoints. {_COPY}",
        texts=("Inconsistent project name inferred from SNI",),
    ),
    ServerVerdict(EndpointDisabledError, "Enable the endpoint in the Neon console.", texts=("endpoint is disabled",)),
    ServerVerdict(
        QuotaExceededError,
        "Wait for the next billing period or raise the limit in the Neon console.",
        texts=(
            "exceeded the compute time quota",
            "exceeded the data transfer quota",
            "active time quota",
            "written data quota",
            "logical size quota",
        ),
    ),
    ServerVerdict(
        QuotaExceededError,
        "Suspend another endpoint, or raise the limit.",
        texts=("limit of concurrently active endpoints",),
    ),
    ServerVerdict(
        EndpointError,
        "The -pooler host does not accept this setting; use the direct host.",
        texts=("unsupported startup parameter",),
    ),
    ServerVerdict(
        EndpointError,
        "Check options and server_settings.",
        texts=("unrecognized configuration parameter", "invalid value for parameter"),
    ),
    ServerVerdict(
        ComputeUnavailableError,
        _WAKING,
        texts=("Couldn't connect to compute node",),
        sqlstates=("57P01", "57P02", "57P03"),  # 57P01, admin_shutdown: the compute is being suspended
    ),
    ServerVerdict(
        ComputeUnavailableError,
        "Try again in a few seconds; see neonstatus.com.",
        texts=("Control plane request failed",),
    ),
    ServerVerdict(
        ComputeUnavailableError,
        "Try again, and check the project's quotas.",
        texts=("endpoint is temporarily unavailable",),
    ),
    ServerVerdict(
        ComputeUnavailableError,
        "Try again when they have finished.",
        texts=("Your project already has running operations",),
    ),
    ServerVerdict(ComputeUnavailableError, "Try again.", texts=("Authentication timed out",)),
    ServerVerdict(
        TooManyConnectionsError,
        "Use the -pooler host, lower max_size, or wait: retry after a long, jittered pause.",
        texts=(
            "Failed to acquire permit to connect to the database",
            "Too many connections attempts",
            "Too many connections to this endpoint",
            "exceeded the rate limit",
            "no more connections allowed",  # PgBouncer
            "remaining connection slots are reserved",
            "sorry, too many clients already",
        ),
        sqlstates=("53300",),
    ),
    ServerVerdict(
        ComputeUnavailableError,
        "Every server connection of PgBouncer is in use: try again, or run shorter transactions.",
        texts=("query_wait_timeout",),  # PgBouncer
    ),
    ServerVerdict(
        ComputeUnavailableError,
        f"PgBouncer cannot reach the server. {_WAKING}",
        texts=("server login has been failing", "server conn crashed", "cannot connect to server"),  # PgBouncer
    ),
    ServerVerdict(
        DatabaseNotFoundError,
        "Check dbname, or create the database.",
        texts=(re.compile(r'database "[^"]*" does not exist'), "no such database"),  # the latter is PgBouncer's
        sqlstates=("3D",),
    ),
    ServerVerdict(
        AuthenticationError,
        "Check the role, and what the server's pg_hba.conf allows.",
        texts=(
            "is not permitted to log in",
            "no pg_hba.conf entry for",
            "pg_hba.conf rejects",
            "permission denied for database",
            re.compile(r'role "[^"]*" does not exist'),
        ),
        sqlstates=("28", "42501"),
    ),
    ServerVerdict(
        EndpointError,
        "Check user, dbname, options and server_settings.",
        # What stays until code or configuration changes: a feature that is not supported, a value, a schema or a name
        # that is wrong, and what a login trigger of the database raises.
        sqlstates=("0A", "22", "3F", "42", "P0"),
    ),
    # The last row is also the meaning of whatever no row names.
    ServerVerdict(
        ComputeUnavailableError,
        "This may pass: try again in a few seconds. If it does not, check the server's log.",
        sqlstates=("08", "53", "57", "58", "XX"),
    ),
)
