"""The error tree of neon-async.

Everything that neon-async raises derives from `NeonAsyncError`. The second parent of each class is the one that callers
catch already: a builtin, or asyncpg's own class. This module does not know what raises these errors.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import functools
import ssl
from collections.abc import Callable
from typing import ClassVar, ParamSpec, TypeVar

import asyncpg

_P = ParamSpec("_P")
_T = TypeVar("_T")


class NeonAsyncError(Exception):
    """The base class of every error of neon-async.

    The message says what happened and what to do next.

    Attributes:
        retryable: Whether the same call can succeed later without any change. A property of the class.
    """

    retryable: ClassVar[bool] = False

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


class ProtocolError(ConnectError):
    """The server sent bytes that no PostgreSQL server sends."""

    retryable = False


class ConnectTimeoutError(NeonAsyncError, TimeoutError):
    """The connection was not ready within `connect_timeout`."""

    retryable = True


class TLSError(NeonAsyncError, ssl.SSLError):
    """The server refused TLS, or offered less than TLS 1.3 as PostgreSQL requires it."""


class CertificateError(TLSError, ssl.SSLCertVerificationError):
    """The server's certificate failed verification. Final: no other mode, address or attempt follows."""


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


class IPNotAllowedError(EndpointError):
    """IP Allow or private networking blocks this client."""


class QuotaExceededError(EndpointError):
    """A quota of the project or plan is used up."""


class ComputeUnavailableError(EndpointError, asyncpg.CannotConnectNowError):
    """The compute is waking, busy or unreachable; a later attempt may succeed."""

    retryable = True


class TooManyConnectionsError(EndpointError, asyncpg.TooManyConnectionsError):
    """A connection limit or rate limit is reached; a later attempt may succeed, after a long, jittered pause."""

    retryable = True


class DatabaseNotFoundError(EndpointError, asyncpg.InvalidCatalogNameError):
    """The endpoint has no database of this name."""


class PooledHostError(NeonAsyncError, asyncpg.FeatureNotSupportedError):
    """The statement needs a session of its own, which a `-pooler` host does not provide. Use the direct host."""


class PoolTimeoutError(NeonAsyncError, TimeoutError):
    """The pool did not finish within the deadline. The cause, if there is one, is the latest failure to connect."""

    retryable = True


class PoolBusyError(NeonAsyncError, RuntimeError):
    """`max_waiting` callers are waiting for a connection already."""

    retryable = True


class PoolClosedError(NeonAsyncError, asyncpg.InterfaceError):
    """The pool is closed, or was closed while the call was waiting."""

    def __init__(self, message: str = "") -> None:  # asyncpg.InterfaceError requires a message
        super().__init__(message)


class ConnectionLostError(NeonAsyncError, asyncpg.ConnectionDoesNotExistError, ConnectionError):
    """The connection ended while it was in use.

    Attributes:
        nothing_executed: Whether it is certain that nothing of the call was executed.
    """

    retryable = True

    def __init__(self, message: str = "", *, nothing_executed: bool = False) -> None:
        super().__init__(message)
        self.nothing_executed = nothing_executed


class CommitUnknownError(NeonAsyncError, asyncpg.TransactionResolutionUnknownError):
    """The connection was lost during COMMIT: the transaction may have been committed, or not."""


class TransactionAbortedError(NeonAsyncError, asyncpg.InFailedSQLTransactionError):
    """The work of a transaction returned, but its COMMIT did not happen.

    Either a statement had failed, and everything is rolled back; or the work had ended the transaction itself, and what
    it committed is kept.
    """


ServerError = asyncpg.PostgresError  # the class of what `server_error()` returns


def server_error(body: bytes) -> asyncpg.PostgresError:
    """Return asyncpg's exception for the body of an ErrorResponse (PostgreSQL documentation, section 54.8)."""
    fields = {chr(field[0]): field[1:].decode("utf-8", "replace") for field in body.split(b"\0") if field}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(fields)
    return error


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
