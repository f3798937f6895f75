"""The error tree of neon-async.

Everything that neon-async raises derives from `NeonAsyncError`. The second parent of each class is the one that callers
catch already: a builtin, or asyncpg's own class. This module does not know what raises these errors.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import errno
import functools
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, ParamSpec, TypeVar

import asyncpg

from ._text import escape

_P = ParamSpec("_P")
_T = TypeVar("_T")


class NeonAsyncError(Exception):
    """The base class of every error of neon-async.

    The message says what happened and what to do next.

    Attributes:
        retryable: Whether the same call can succeed later without any change. A property of the class.
        unavailable: Whether the database is down, asleep, overloaded or out of reach; see `is_unavailable()`.
    """

    retryable: ClassVar[bool] = False
    unavailable: bool = False

    def __str__(self) -> str:
        # Explicit, because ssl.SSLError and asyncpg.PostgresError, which follow in some MROs, add to the text.
        return str(self.args[0]) if self.args else ""


class ConfigurationError(NeonAsyncError, ValueError):
    """A parameter is unknown, contradictory, out of range or not supported. Raised before a socket is opened."""


class InsecureConfigurationError(ConfigurationError):
    """A parameter asks for less than TLS 1.3, full verification and SCRAM. Raised before a socket is opened."""


class UnsupportedEventLoopError(NeonAsyncError, RuntimeError):
    """The call runs under something other than an asyncio event loop, such as trio."""


class ConnectError(NeonAsyncError, ConnectionError):
    """The server could not be reached, or the connection broke while it was being established."""

    retryable = True
    unavailable = True


class ProtocolError(ConnectError):
    """The server sent bytes that no PostgreSQL server sends."""

    retryable = False
    unavailable = False


class ConnectTimeoutError(NeonAsyncError, TimeoutError):
    """The connection was not ready within `connect_timeout`."""

    retryable = True
    unavailable = True


class TLSError(NeonAsyncError, ssl.SSLError):
    """The server refused TLS, or offered less than TLS 1.3 as PostgreSQL requires it."""


class CertificateError(TLSError, ssl.SSLCertVerificationError):
    """The server's certificate failed verification. Final: no other mode, address or attempt follows."""


class CertificateRevokedError(CertificateError):
    """The server's certificate, or one of its issuers, has been revoked."""


class RevocationUnknownError(CertificateError):
    """`revocation=require`, and no current revocation list says that the server's certificate has not been revoked."""

    retryable = True


class AuthenticationError(NeonAsyncError, asyncpg.InvalidAuthorizationSpecificationError):
    """The server requested something other than SCRAM-SHA-256, did not prove its identity, or rejected the user."""


class InvalidPasswordError(AuthenticationError, asyncpg.InvalidPasswordError):
    """The role or its password is wrong. Neon gives the same answer for an unknown role."""


class ChannelBindingError(AuthenticationError):
    """The login cannot be bound to the TLS channel, so an attacker in between would go unnoticed."""


class EndpointError(NeonAsyncError, asyncpg.InternalServerError):
    """Neon refused the connection for a reason that concerns the endpoint.

    Neon's proxy reports every failure before login as SQLSTATE XX000, which is `asyncpg.InternalServerError`.
    """


class EndpointNotFoundError(EndpointError):
    """The host name belongs to no endpoint that this connection may use."""


class EndpointDisabledError(EndpointError):
    """The endpoint exists and is disabled."""

    unavailable = True


class IPNotAllowedError(EndpointError):
    """IP Allow or private networking blocks this client."""


class QuotaExceededError(EndpointError):
    """A quota of the project or plan is used up."""

    unavailable = True


class ComputeUnavailableError(EndpointError, asyncpg.CannotConnectNowError):
    """The compute is waking, busy or unreachable; a later attempt may succeed."""

    retryable = True
    unavailable = True


class TooManyConnectionsError(EndpointError, asyncpg.TooManyConnectionsError):
    """A connection limit or rate limit is reached; a later attempt may succeed, after a long, jittered pause."""

    retryable = True
    unavailable = True


class DatabaseNotFoundError(EndpointError, asyncpg.InvalidCatalogNameError):
    """The endpoint has no database of this name."""


class PooledHostError(NeonAsyncError, asyncpg.FeatureNotSupportedError):
    """The statement needs a session of its own, which a `-pooler` host does not provide. Use the direct host."""


class StaleStatementError(
    NeonAsyncError, asyncpg.exceptions.ProtocolError, asyncpg.exceptions.OutdatedSchemaCacheError
):
    """A statement was executed, and its rows could not be read, because they are not as they were when it was prepared.

    The next use is prepared anew. Whether the statement may be executed a second time, only the caller knows.
    """

    retryable = True

    def __init__(self, message: str = "") -> None:  # OutdatedSchemaCacheError requires a message
        super().__init__(message)


class WrongMethodError(NeonAsyncError, asyncpg.InterfaceError):
    """The statement needs another method than the one it was given to, such as COPY. Nothing was sent."""

    def __init__(self, message: str = "") -> None:  # asyncpg.InterfaceError requires a message
        super().__init__(message)


class PoolTimeoutError(NeonAsyncError, TimeoutError):
    """The pool did not finish within the deadline. The cause, if there is one, is the latest failure to connect.

    It is `unavailable`, unless the task that waited holds connections itself, and so waited for itself.
    """

    retryable = True

    def __init__(self, message: str = "", *, unavailable: bool = True) -> None:
        super().__init__(message)
        self.unavailable = unavailable


class PoolBusyError(NeonAsyncError, RuntimeError):
    """`max_waiting` callers are waiting for a connection already."""

    retryable = True
    unavailable = True


class PoolClosedError(NeonAsyncError, asyncpg.InterfaceError):
    """The pool is not open.

    It is `unavailable` where the pool is being opened, is closing, or was closed while the call was waiting: the
    service starts or stops. To use a pool before it was opened or after it was closed is a programming error.
    """

    def __init__(self, message: str = "", *, unavailable: bool = False) -> None:
        super().__init__(message)  # asyncpg.InterfaceError requires a message
        self.unavailable = unavailable


class ConnectionLostError(NeonAsyncError, asyncpg.ConnectionDoesNotExistError, ConnectionError):
    """The connection ended while it was in use. The cause is what the server said last, if it said anything.

    `sqlstate` and the other fields are those of the server's last words, such as 57P01 or 25P03, and 08003 without any.

    Attributes:
        nothing_executed: Whether it is certain that nothing of the call was executed.
        nothing_committed: Whether it is certain that neither the call nor the transaction that was open has kept
            anything, because COMMIT was not sent.
    """

    retryable = True
    unavailable = True

    def __init__(
        self, message: str = "", *, nothing_executed: bool = False, nothing_committed: bool | None = None
    ) -> None:
        super().__init__(message)
        self.nothing_executed: bool = nothing_executed
        self.nothing_committed: bool = nothing_executed if nothing_committed is None else nothing_committed


class QueryTimeoutError(NeonAsyncError, TimeoutError):
    """A statement took longer than its `timeout`, or than the `command_timeout` of the connection.

    The server was asked to cancel it, and may have executed it nevertheless.
    """

    retryable = True
    unavailable = True


class CommitUnknownError(NeonAsyncError, asyncpg.TransactionResolutionUnknownError):
    """The connection was lost during COMMIT: the transaction may have been committed, or not."""


class TransactionAbortedError(NeonAsyncError, asyncpg.InFailedSQLTransactionError):
    """The work of a transaction returned, but its COMMIT did not happen.

    Either a statement had failed, and everything is rolled back; or the work had ended the transaction itself, and what
    it committed is kept.
    """


# ---------------------------------------------------------------------------------------------------------------------
# What a caller can do about an error


def is_retryable(error: BaseException) -> bool:
    """Return whether the same call can succeed later although nothing is changed.

    It does not say that the call is safe to repeat. Of a call that wrote and whose connection was lost or that timed
    out, everything may have been kept; `ConnectionLostError.nothing_executed` says where nothing was. It is never true
    where the outcome of a COMMIT is unknown (`CommitUnknownError`, SQLSTATEs 08007 and 40003).

    Args:
        error: Anything that neon-async or asyncpg raised, also as SQLAlchemy wraps it. For any other exception the
            answer is False, except for a `ConnectionError`, a `TimeoutError` and a failed name resolution, which
            asyncpg raises, too. Of a group, the answer has to be the same for all its exceptions.
    """
    return all(
        one.retryable if isinstance(one, NeonAsyncError) else _outlook(one).retryable for one in originals_of(error)
    )


def is_unavailable(error: BaseException) -> bool:
    """Return whether the database is unavailable, so that a service should answer 503 (Service Unavailable).

    It is true where the database is down, asleep, overloaded, over its quota or out of reach, where it did not answer
    in time, and where the pool has no connection. It is false where code or configuration must change (arguments, SQL,
    a wrong password, a certificate that failed verification), where a live server answered about this statement (a
    conflict, a lock, its own `statement_timeout`), and where the outcome of a COMMIT is unknown: a client repeats a
    request that was answered with 503, and would write twice.

    Args:
        error: As for `is_retryable()`.
    """
    return all(
        one.unavailable if isinstance(one, NeonAsyncError) else _outlook(one).unavailable for one in originals_of(error)
    )


def originals_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors of a group, or else the error itself, and what SQLAlchemy has wrapped in its place."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from originals_of(one)
        return
    # SQLAlchemy's error has one of the DB-API as `orig`, whose cause is what the driver has raised.
    cause = getattr(getattr(error, "orig", None), "__cause__", None)
    yield cause if isinstance(cause, NeonAsyncError | asyncpg.PostgresError | OSError) else error


class _Outlook(NamedTuple):
    retryable: bool
    unavailable: bool


_STAYS = _Outlook(False, False)
_MAY_PASS = _Outlook(True, False)
_OUTAGE = _Outlook(True, True)

# By SQLSTATE, or by its class where the class has no other row (PostgreSQL documentation, appendix A). The rest stays.
_BY_SQLSTATE = {
    "08": _OUTAGE,  # connection_exception
    "08007": _STAYS,  # transaction_resolution_unknown
    "08P01": _STAYS,  # protocol_violation; see `_outlook()`
    "25P03": _OUTAGE,  # idle_in_transaction_session_timeout, which ends the session
    "25P04": _OUTAGE,  # transaction_timeout, which ends the session
    "40": _MAY_PASS,  # transaction_rollback: serialization_failure, deadlock_detected
    "40002": _STAYS,  # transaction_integrity_constraint_violation
    "40003": _STAYS,  # statement_completion_unknown
    "53": _OUTAGE,  # insufficient_resources
    "53400": _STAYS,  # configuration_limit_exceeded, such as temp_file_limit
    "55006": _MAY_PASS,  # object_in_use
    "55P03": _MAY_PASS,  # lock_not_available
    "57": _MAY_PASS,  # operator_intervention: query_canceled, for one
    "57P01": _OUTAGE,  # admin_shutdown: the compute is being suspended, for one
    "57P02": _OUTAGE,  # crash_shutdown
    "57P03": _OUTAGE,  # cannot_connect_now
    "57P04": _STAYS,  # database_dropped
    "57P05": _OUTAGE,  # idle_session_timeout
    "58000": _OUTAGE,  # system_error
    "58030": _OUTAGE,  # io_error
    "72000": _MAY_PASS,  # snapshot_too_old
    "XX000": _MAY_PASS,  # internal_error, such as "tuple concurrently updated"
}


def _outlook(error: BaseException) -> _Outlook:
    """Return what `is_retryable()` and `is_unavailable()` say of an error that is not ours."""
    match error:
        case asyncpg.InvalidCachedStatementError() | asyncpg.OutdatedSchemaCacheError():
            return _MAY_PASS  # what is prepared next is prepared anew
        case asyncpg.ProtocolViolationError() if ends_session(error):
            return _OUTAGE  # PgBouncer has no other SQLSTATE: query_wait_timeout, a lost server, max_client_conn
        case asyncpg.PostgresError():
            sqlstate = error.sqlstate or ""
            return _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get(sqlstate[:2]) or _STAYS
        case ssl.SSLError():
            return _STAYS
        case ConnectionError() | TimeoutError() | socket.gaierror():
            return _OUTAGE
        case OSError() if error.errno in _UNREACHABLE:
            return _OUTAGE
    return _STAYS


# What connect() of a socket reports and has no class of its own in Python.
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, getattr(errno, "EHOSTDOWN", -1)})


def ends_session(error: asyncpg.PostgresError) -> bool:
    """Return whether the server ended the session with `error` (PostgreSQL documentation, section 54.8)."""
    # PostgreSQL's severity "V" is never translated. PgBouncer (1.24) sends "S" only.
    return (error.severity_en or error.severity) in ("FATAL", "PANIC")


# ---------------------------------------------------------------------------------------------------------------------
# What makes errors, and what shows them


ServerError = asyncpg.PostgresError  # the class of what `server_error()` returns


def server_error(body: bytes) -> asyncpg.PostgresError:
    """Return asyncpg's exception for the body of an ErrorResponse (PostgreSQL documentation, section 54.8).

    What is not printable in it is escaped.
    """
    fields = {chr(field[0]): escape(field[1:].decode("utf-8", "replace")) for field in body.split(b"\0") if field}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(fields)
    return error


def text_of(error: Exception) -> str:
    """Return what log lines and messages say of a failed dial."""
    if isinstance(error, NeonAsyncError):
        return escape(str(error))
    return f"{type(error).__name__}."  # its text may contain anything


def forget_arguments(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wrap `function` so that its exceptions carry no frame below this wrapper, and so no argument.

    A DSN contains a password, and error trackers record the local variables of every frame of a traceback. The caller's
    own frames stay; of the frames below, only this wrapper's is left, and it holds nothing.
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  raised again below
            failure = error.with_traceback(None)
        failure.__cause__ = failure.__context__ = None
        del args, kwargs
        raise failure

    return wrapper
