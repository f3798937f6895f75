"""What became of a call whose connection was lost or whose time was over: the errors that say it.

Pure functions of what the session and the transport know. Sends nothing and ends nothing.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeGuard

import asyncpg

from .._errors import (
    CommitUnknownError,
    ConnectionLostError,
    QueryTimeoutError,
    ServerError,
    TransactionAbortedError,
    ends_session,
)
from .._text import escape


class Loss(NamedTuple):
    """Why a connection was lost. A connection that its owner closed or terminated was not.

    Attributes:
        why: A clause that continues "was lost: ".
        words: The error with which the server ended the session, if it sent one.
    """

    why: str
    words: ServerError | None = None


_CLOSED = "the server or the network closed it"
CLOSED_BY_SERVER = Loss(_CLOSED)


CANCEL_TIMED_OUT = Loss("a cancelled statement did not end in time, so it was terminated")
OUT_OF_STEP = Loss("what the server sent does not follow from any statement, so it was terminated")
# A call was under way; any later one is refused because the connection is closed.
CLOSED_HERE = Loss("it was closed or terminated by this program while the call was under way")


def loss_with(words: ServerError | None, failure: Exception | None = None) -> Loss:
    """Return the loss of a connection that ended after these last words, or by this failure of the network."""
    if words is None and failure is not None:
        return Loss(f"{_CLOSED} ({getattr(failure, 'strerror', None) or type(failure).__name__})")
    if words is None:
        return CLOSED_BY_SERVER
    sqlstate = f" (SQLSTATE {words.sqlstate})" if words.sqlstate else ""
    return Loss(f"{str(words.args[0]).rstrip('.')}{sqlstate}", words)


class Outcome(enum.Enum):
    """What a lost connection leaves of a call. The value is what the caller is told."""

    NOT_SENT = "Nothing of this call was executed: call again on another connection."
    ROLLED_BACK_UNSENT = (
        "Nothing of this call was executed, COMMIT was not sent, and nothing of the transaction was committed: run the "
        "transaction again on another connection."
    )
    ROLLED_BACK = (
        "COMMIT was not sent, and nothing of the transaction was committed: run the transaction again on another "
        "connection."
    )
    READ_ONLY = "The transaction was read-only, so it has written nothing: run it again on another connection."
    UNKNOWN = "What it was doing may have been executed, or not: look before you repeat it on another connection."


def outcome_of(executed: str | None, *, in_transaction: bool) -> Outcome:
    """Return what a lost connection leaves of a call.

    Args:
        executed: The text that the server may have executed, which is no COMMIT. None: the server has executed nothing.
        in_transaction: Whether a transaction was open.
    """
    if executed is None:
        return Outcome.ROLLED_BACK_UNSENT if in_transaction else Outcome.NOT_SENT
    return Outcome.ROLLED_BACK if in_transaction else Outcome.UNKNOWN


def lost_error(host: str, loss: Loss, outcome: Outcome, cause: BaseException | None = None) -> ConnectionLostError:
    """Return the error of a call on a connection that was lost. Its cause is what the server said, or `cause`."""
    error = ConnectionLostError(
        f"The connection to {host} was lost: {loss.why}. {outcome.value}",
        nothing_executed=outcome in (Outcome.NOT_SENT, Outcome.ROLLED_BACK_UNSENT),
        nothing_committed=outcome is not Outcome.UNKNOWN,
    )
    if loss.words is not None:
        vars(error).update(vars(loss.words))  # sqlstate, detail, hint and the other fields, as in asyncpg's error
    error.__cause__ = loss.words or cause
    return error


def commit_error(host: str, why: BaseException) -> CommitUnknownError:
    """Return the error of a COMMIT to which no answer came, because of `why`."""
    reason = escape(str(why)).rstrip(".") or type(why).__name__
    failure = CommitUnknownError(
        f"The connection to {host} was lost, or its time was over, while COMMIT was under way ({reason}): the "
        "transaction may have been committed, or not. Look for what it writes before you run it again."
    )
    failure.__cause__ = why
    return failure


def aborted_error() -> TransactionAbortedError:
    """Return the error of a COMMIT that the server has answered with ROLLBACK, because a statement had failed."""
    return TransactionAbortedError(
        "A statement had failed and the work went on, so COMMIT rolled everything back: nothing of the transaction was "
        "committed. Let the error leave the work, or put the statement into a savepoint: `async with "
        "connection.transaction()`."
    )


def unsent_error() -> TransactionAbortedError:
    """Return the error of a COMMIT after which the transaction is still open."""
    return TransactionAbortedError(
        "connection_class has an execute() that did not send COMMIT to the server, so nothing was committed. Call "
        "super().execute() in it."
    )


def closed_in_operation() -> asyncpg.ConnectionDoesNotExistError:
    """Return asyncpg's own error of a call whose connection has ended, where asyncpg itself would go on."""
    return asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def timed_out(
    host: str, error: TimeoutError, elapsed: float, timeout: float | None, command_timeout: float | None
) -> Exception:
    """Return the error of a call that was ended because its time was over, or `error` where it was something else.

    Args:
        host: The host name.
        error: What ended the call. The caller's own code, such as the source of a COPY, can have raised it.
        elapsed: The seconds that the call took.
        timeout: The `timeout` of the call.
        command_timeout: The limit of the connection, for a call without one.
    """
    limit = command_timeout if timeout is None else timeout
    if not isinstance(limit, int | float) or elapsed + _CLOCK_RESOLUTION < limit:
        return error
    if timeout is None:
        what, advice = "command_timeout", "Pass timeout= to the call, or raise command_timeout (None for no limit)."
    else:
        what, advice = "timeout", "Pass a larger timeout= to the call."
    failure = QueryTimeoutError(
        f"A statement on {host} was given up after {elapsed:.2f} s: its limit is {what}={round(limit, 3):g} s. "
        f"The server may have executed it, or not. {advice}"
    )
    failure.__cause__ = error.__cause__ or error
    return failure


# Seconds by which a timer may come early.
_CLOCK_RESOLUTION = 0.02


def stalled(host: str, elapsed: float, limit: float) -> QueryTimeoutError:
    """Return the error of a call that moves many rows and was ended because nothing moved for `limit` seconds."""
    return QueryTimeoutError(
        f"A call that moves many rows to or from {host} was given up after {elapsed:.2f} s: nothing has moved for "
        f"command_timeout={limit:g} s. The server may have executed it, or not. Pass timeout= to the call, or raise "
        "command_timeout (None for no limit)."
    )


def is_server_error(error: BaseException) -> TypeGuard[ServerError]:
    """Return whether the server sent `error`. asyncpg raises some of the same classes itself."""
    return isinstance(error, asyncpg.PostgresError) and "sqlstate" in vars(error)


def leaves_commit_open(error: BaseException) -> bool:
    """Return whether `error`, raised after COMMIT was sent, leaves it open whether the transaction was committed."""
    if not isinstance(error, asyncpg.PostgresError):  # its time was over, for example
        return True
    # Only a plain ERROR is an answer to COMMIT: everything is rolled back. A FATAL may come after the commit, from a
    # wait for a standby (PostgreSQL, SyncRepWaitForLSN), and 08 and 40003 say themselves that the outcome is unknown.
    sqlstate = error.sqlstate or ""
    return not is_server_error(error) or ends_session(error) or sqlstate[:2] == "08" or sqlstate == "40003"
