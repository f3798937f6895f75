"""The tree of errors: what happened, whether a retry can help, and the next step.

Everything neon-async raises derives from `NeonAsyncError`. The second parent of each class is the one a caller would
already catch: a builtin, or asyncpg's own class. This module knows nothing of what raises these.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable
from typing import ClassVar, ParamSpec, TypeVar

import asyncpg

_P = ParamSpec("_P")
_T = TypeVar("_T")


class NeonAsyncError(Exception):
    """The root of every error of neon-async.

    The message tells the state and the next step. `retryable` tells whether the same call can succeed later without
    anybody changing anything; it is a property of the class.
    """

    retryable: ClassVar[bool] = False

    def __str__(self) -> str:
        # Spelled out because ssl.SSLError and asyncpg.PostgresError, which stand behind us in some MROs, decorate it.
        return str(self.args[0]) if self.args else ""


class ConfigurationError(NeonAsyncError, ValueError):
    """A parameter that is unknown, contradictory, out of range or not supported. Raised before any socket exists."""


class InsecureConfigurationError(ConfigurationError):
    """A parameter that asks for less than TLS 1.3, full verification and SCRAM. Raised before any socket exists."""


class UnsupportedEventLoopError(NeonAsyncError, RuntimeError):
    """The call runs under something other than an asyncio event loop, trio for one."""


class ConnectError(NeonAsyncError, ConnectionError):
    """The server could not be reached, or the connection broke while it was being made."""

    retryable = True


class ProtocolError(ConnectError):
    """The server sent bytes that no PostgreSQL server sends."""

    retryable = False


class ConnectTimeoutError(NeonAsyncError, TimeoutError):
    """The connection was not ready within `connect_timeout`."""

    retryable = True


class TLSError(NeonAsyncError, ssl.SSLError):
    """The server refused TLS, or offered less than TLS 1.3 with what PostgreSQL requires of it."""


class CertificateError(TLSError, ssl.SSLCertVerificationError):
    """The server's certificate did not pass verification. Final: no other mode, address or retry is tried."""


class AuthenticationError(NeonAsyncError, asyncpg.InvalidAuthorizationSpecificationError):
    """The server asked for something other than SCRAM-SHA-256, failed to prove itself, or rejected the user."""


class InvalidPasswordError(AuthenticationError, asyncpg.InvalidPasswordError):
    """The role or its password is wrong. Neon answers the same for an unknown role."""


class ChannelBindingError(AuthenticationError):
    """The login cannot be bound to the TLS channel, so somebody in between could not be told from the server."""


class EndpointError(NeonAsyncError, asyncpg.InternalServerError):
    """Neon refused the connection for a reason of the endpoint.

    Neon's proxy reports every failure before login as SQLSTATE XX000, which is `asyncpg.InternalServerError`.
    """


class EndpointNotFoundError(EndpointError):
    """The host name names no endpoint that this connection may see."""


class EndpointDisabledError(EndpointError):
    """The endpoint exists and is disabled."""


class IPNotAllowedError(EndpointError):
    """IP Allow or private networking keeps this client out."""


class QuotaExceededError(EndpointError):
    """A quota of the project or plan is used up."""


class ComputeUnavailableError(EndpointError, asyncpg.CannotConnectNowError):
    """The compute is waking, busy or unreachable; a later attempt may succeed."""

    retryable = True


class TooManyConnectionsError(EndpointError, asyncpg.TooManyConnectionsError):
    """A connection or rate limit is reached; a later attempt may succeed, after a long and jittered pause."""

    retryable = True


class DatabaseNotFoundError(EndpointError, asyncpg.InvalidCatalogNameError):
    """The endpoint answers, and has no database of this name."""


class PooledHostError(NeonAsyncError, asyncpg.FeatureNotSupportedError):
    """The statement needs a session of its own, and a `-pooler` host has none to give. Use the direct host."""


class PoolTimeoutError(NeonAsyncError, TimeoutError):
    """The pool could not do it within the deadline. The cause, where there is one, is the latest failure to connect."""

    retryable = True


class PoolBusyError(NeonAsyncError, RuntimeError):
    """As many callers wait for a connection as `max_waiting` allows."""

    retryable = True


class PoolClosedError(NeonAsyncError, asyncpg.InterfaceError):
    """The pool is closed, or closes while the call waits."""

    def __init__(self, message: str = "") -> None:  # asyncpg's wants one
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
    """The connection was lost while COMMIT was under way: the transaction may have been committed, or not."""


class TransactionAbortedError(NeonAsyncError, asyncpg.InFailedSQLTransactionError):
    """The work of a transaction returned, and its COMMIT did not happen.

    A statement had failed, and all of it is rolled back; or the work had ended the transaction itself, and what it
    committed is kept.
    """


ServerError = asyncpg.PostgresError  # what an ErrorResponse becomes


def server_error(body: bytes) -> asyncpg.PostgresError:
    """Return asyncpg's exception for the body of an ErrorResponse (PostgreSQL documentation, section 54.8)."""
    fields = {chr(field[0]): field[1:].decode("utf-8", "replace") for field in body.split(b"\0") if field}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(fields)
    return error


def forget_arguments(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let an exception leave `function` without the frames, and so the arguments, that lead to it.

    A DSN holds a password, and error trackers record the locals of every frame of a traceback. The caller's own frames
    are the caller's; below them only this wrapper stays, with nothing in it.
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
