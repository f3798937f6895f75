"""Transactions that end: a bounded ROLLBACK, and work that runs again when nothing of it can have been kept.

`Transaction` is what `transaction()` of our connections returns; `run_transaction()` is the pool's method of that name.
This module knows one connection at a time. It must not know slots, waiters, or how connections are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg
from asyncpg.connresource import guarded
from asyncpg.transaction import ISOLATION_LEVELS
from asyncpg.transaction import Transaction as AsyncpgTransaction

from .._config.readers import AsyncFunction, Choice, Given, Integer, Name
from .._config.startup import TRANSACTION_SETTINGS
from .._errors import (
    CommitUnknownError,
    ConfigurationError,
    ConnectionLostError,
    NeonAsyncError,
    TransactionAbortedError,
)
from .._neon.sql import quote, quote_name
from .._timing import backoff
from .holder import lent, protocol_of, use_of

if TYPE_CHECKING:
    from .connection import Connection

_T = TypeVar("_T")

Acquire: TypeAlias = "Callable[[], AbstractAsyncContextManager[Connection]]"
Work: TypeAlias = "Callable[[Connection], Awaitable[_T]]"

# Seconds that a ROLLBACK may take: as long as the reset of a connection may; and where the deadline of the caller has
# passed or the caller is being cancelled, one cancel request to a distant server.
_ROLLBACK_TIMEOUT = 5.0
_LATE_ROLLBACK_TIMEOUT = 0.5

# Pauses between two runs: full jitter ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that two
# transactions that conflicted do not conflict again. A conflict lasts as long as a transaction, hence milliseconds.
_PAUSE_BASE = 0.02
_PAUSE_CAP = 1.0

# What the arguments must be.
_ROLE = Name()
_WORK = AsyncFunction()
_ATTEMPTS = Integer(1)
_ISOLATION = Choice(*sorted(ISOLATION_LEVELS))


# ---------------------------------------------------------------------------------------------------------------------
# A block of a transaction


class Transaction(AsyncpgTransaction):
    """asyncpg's transaction or savepoint block, which is left in bounded time when it is left with an exception.

    ROLLBACK gets 5.0 s, or 0.5 s when the exception is a cancellation or a timeout. If it is not answered by then, or
    fails, the connection is terminated and the server rolls back. Either way the exception that ended the block is
    raised, unless the task is cancelled meanwhile. COMMIT has no bound but the connection's `command_timeout`, because
    a COMMIT that was given up leaves it open whether the transaction was committed.

    Args:
        connection: The connection to begin it on.
        isolation: As in `Connection.transaction()`.
        readonly: As in `Connection.transaction()`.
        deferrable: As in `Connection.transaction()`.
        role: As in `Connection.transaction()`.
        settings: As in `Connection.transaction()`.
    """

    __slots__ = ("_lent", "_observed")

    def __init__(
        self,
        connection: Any,
        isolation: Any = None,
        readonly: bool = False,
        deferrable: bool = False,
        role: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._lent = lent(connection)
        self._observed = _Observed(connection, _claims(role, settings))
        super().__init__(cast(Any, self._observed), isolation, readonly, deferrable)

    @property
    def connection(self) -> Any:
        """The connection as it was lent: it cannot be used after the loan."""
        return self._lent

    @property
    def status(self) -> str:
        """The server's answer to the latest of BEGIN, SAVEPOINT, COMMIT and ROLLBACK; "" before the first."""
        return self._observed.status

    @guarded
    async def start(self) -> None:
        """Begin the block, as asyncpg does."""
        with use_of(self):
            await super().start()

    @guarded
    async def commit(self) -> None:
        """Commit, or release the savepoint, as asyncpg does."""
        with use_of(self):
            await super().commit()

    @guarded
    async def rollback(self) -> None:
        """Roll back, as asyncpg does."""
        with use_of(self):
            await super().rollback()

    async def __aexit__(self, extype: object, ex: Any, tb: object) -> None:
        with use_of(self):
            await self._leave(extype, ex, tb)

    async def _leave(self, extype: object, ex: Any, tb: object) -> None:
        if ex is None:
            await super().__aexit__(extype, ex, tb)
            return
        try:
            async with asyncio.timeout(_rollback_timeout(ex)):
                await super().__aexit__(extype, ex, tb)
        except BaseException as failure:
            self.end_connection()
            if not isinstance(failure, Exception):
                raise

    def end_connection(self) -> None:
        """Terminate the connection, unless it has been released: another caller may have it by now."""
        with contextlib.suppress(asyncpg.InterfaceError):
            self._terminate()

    @guarded  # raises InterfaceError where the connection is closed, or was released after this was made
    def _terminate(self) -> None:
        self._observed.connection.terminate()


class _Observed:
    """A connection as asyncpg's `Transaction` sees it: the same, except for what begins the block and what ends it.

    BEGIN and SAVEPOINT are sent ahead of the first statement. asyncpg drops the answer to COMMIT; this keeps it. The
    rest of the bookkeeping is asyncpg's.
    """

    __slots__ = ("claims", "connection", "status")

    claims: Sequence[str]
    connection: Any
    status: str

    def __init__(self, connection: Any, claims: Sequence[str]) -> None:
        object.__setattr__(self, "claims", claims)
        object.__setattr__(self, "connection", connection)
        object.__setattr__(self, "status", "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.connection, name, value)

    async def execute(self, query: str) -> str:
        protocol, beginning = protocol_of(self.connection), _beginning(query, self.claims)
        if protocol is None or beginning is None:
            status: str = await self.connection.execute(query)
        else:
            with protocol.replacing(query, beginning):
                status = await self.connection.execute(query)
        object.__setattr__(self, "status", status)
        return status


def _beginning(query: str, claims: Sequence[str]) -> str | None:
    """Return what begins a block in place of asyncpg's `query`, or None where `query` begins none.

    BEGIN comes first and alone: a mode, a role or a setting that the server refuses then leaves a failed transaction,
    in which no statement runs, and not a session without one.
    """
    if query.startswith("SAVEPOINT"):
        if claims:
            raise ConfigurationError(
                "role and settings belong to a whole transaction. Pass them to the outermost transaction()."
            )
        return query
    if not query.startswith("BEGIN"):
        return None
    modes = query.removeprefix("BEGIN").strip(" ;")
    return "; ".join(["BEGIN", *([f"SET TRANSACTION {modes}"] if modes else []), *claims])


def _claims(role: str | None, settings: Mapping[str, str] | None) -> list[str]:
    """Return the statements that give a transaction its role and its settings."""
    statements = []
    if role is not None:
        statements.append(f"SET LOCAL ROLE {quote_name(_ROLE.check('role', role))}")
    if settings is not None:
        calls = [
            f"set_config({quote(name)}, {quote(value)}, true)"
            for name, value in TRANSACTION_SETTINGS.read(Given("settings", settings, secret=True)).items()
        ]
        if calls:
            statements.append(f"SELECT {', '.join(calls)}")
    return statements


def _rollback_timeout(error: BaseException) -> float:
    late = isinstance(error, TimeoutError) or not isinstance(error, Exception)
    return _LATE_ROLLBACK_TIMEOUT if late else _ROLLBACK_TIMEOUT


# ---------------------------------------------------------------------------------------------------------------------
# Work that is run in a transaction


async def run_transaction(
    acquire: Acquire,
    work: Work[_T],
    *,
    attempts: int,
    isolation: str | None,
    readonly: bool | None,
    deferrable: bool | None,
    on_retry: Callable[[float], None],
) -> _T:
    """Run `work` in a transaction, commit, and return what it returned; see `Pool.run_transaction()`.

    Args:
        acquire: Returns a connection whose `transaction()` is a `Transaction`, a new one for each run. An exception
            from it is raised as it is.
        work: An async function that takes a connection.
        attempts: How often the work may run in all, at least 1.
        isolation: As in `Connection.transaction()`. None: the default of the connection's class.
        readonly: As in `Connection.transaction()`. None: the default of the connection's class.
        deferrable: As in `Connection.transaction()`. None: the default of the connection's class.
        on_retry: Called before each run but the first, with the seconds that the previous run and the pause took.

    Raises:
        CommitUnknownError, TransactionAbortedError, ConfigurationError: See `Pool.run_transaction()`.
        Exception: Any other error of `work` or of the last run.
    """
    _check(work, attempts, isolation)
    options = {"isolation": isolation, "readonly": readonly, "deferrable": deferrable}
    given = {name: value for name, value in options.items() if value is not None}
    clock = asyncio.get_running_loop().time
    for number in itertools.count(1):
        began = clock()
        async with acquire() as connection:
            run = _Run(connection, given)
            try:
                return await run.through(work)
            except Exception:
                if number == attempts or not run.repeatable:
                    raise
        await asyncio.sleep(_pause(number))
        on_retry(clock() - began)
    raise AssertionError("unreachable")


class _Run:
    """One run of the work, from BEGIN to COMMIT or ROLLBACK.

    Attributes:
        repeatable: It failed for a reason that may pass, and nothing of it can have been kept.
    """

    def __init__(self, connection: Connection, options: dict[str, Any]) -> None:
        self.repeatable = False
        self._lent = connection
        self._options = options

    async def through(self, work: Work[_T]) -> _T:
        """Begin, run the work, and commit or roll back."""
        await self._begin()
        try:
            result = await work(self._lent)
            self._require_open()
        except BaseException as error:
            # Decided before ROLLBACK, which may end the connection itself.
            self.repeatable = self._was_lost(error) or (_is_conflict(error) and self._is_open())
            await self._roll_back(error)
            raise
        await self._commit()
        return result

    async def _begin(self) -> None:
        try:
            self._transaction = _require_ours(self._lent.transaction(**self._options))
        except asyncpg.InterfaceError as error:
            self.repeatable = type(error) is asyncpg.InterfaceError  # the connection has ended since it was acquired
            raise
        self._session = self._transaction._observed.connection  # the proxy is detached when the connection is lost
        try:
            await self._transaction.__aenter__()
        except Exception as error:
            self.repeatable = self._was_lost(error)
            raise

    async def _roll_back(self, error: BaseException) -> None:
        if isinstance(error, GeneratorExit):  # a coroutine that is being closed must not await anything
            self._transaction.end_connection()
        else:
            await self._transaction.__aexit__(type(error), error, error.__traceback__)

    async def _commit(self) -> None:
        try:
            await self._transaction.__aexit__(None, None, None)
        except Exception as error:
            if _leaves_commit_open(error):
                raise CommitUnknownError(
                    "The connection was lost while COMMIT was under way: the transaction may have been committed, or "
                    "not. It is not run again; look for what it writes before you do."
                ) from error
            self.repeatable = _is_conflict(error) or self._was_lost(error)
            raise
        if self._transaction.status != "COMMIT":
            raise TransactionAbortedError(
                "A statement failed and the work went on, so COMMIT rolled everything back. Let the error leave the "
                "work, or put the statement into `async with connection.transaction()`."
            )

    def _require_open(self) -> None:
        if not self._session.is_closed() and not self._is_open():
            raise TransactionAbortedError(
                "The work ended the transaction itself: what it committed is kept, and what followed ran outside a "
                "transaction. Leave COMMIT and ROLLBACK to run_transaction(); to roll back, raise an exception."
            )

    def _is_open(self) -> bool:
        """Return whether the transaction goes on. If the work has ended it, something may be kept."""
        return not self._session.is_closed() and bool(self._session.is_in_transaction())

    def _was_lost(self, error: BaseException) -> bool:
        """Return whether the connection has ended and `error` says only that."""
        if isinstance(error, NeonAsyncError):
            return isinstance(error, ConnectionLostError)
        if isinstance(error, asyncpg.InternalClientError):
            # The server's last words came between two statements, which asyncpg does not expect: it refuses the next
            # statement, unsent, until the end of the stream arrives. The connection can only be ended.
            self._transaction.end_connection()
            return True
        # asyncpg raises exactly this class for a connection that is closed, or was released because of that. Its
        # subclasses are about arguments.
        refused = type(error) is asyncpg.InterfaceError
        return bool(self._session.is_closed()) and (refused or isinstance(error, _LOSSES))


# A session that ended in the middle of a statement, as asyncpg reports it (08003) or in the server's words.
_LOSSES = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError)


def _require_ours(transaction: object) -> Transaction:
    """Return `transaction`, the result of `transaction()` of a connection.

    Raises:
        ConfigurationError: The caller's class returned something else, whose COMMIT cannot be followed.
    """
    if not isinstance(transaction, Transaction):
        raise ConfigurationError(
            f"connection_class has a transaction() that returns {type(transaction).__name__}, and run_transaction() "
            "needs what super().transaction() returns. Return that."
        )
    return transaction


def _is_conflict(error: BaseException) -> bool:
    """Return whether the server says that the transaction can succeed if it runs again (PostgreSQL, section 13.5)."""
    return isinstance(error, (asyncpg.SerializationError, asyncpg.DeadlockDetectedError))


def _leaves_commit_open(error: Exception) -> bool:
    """Return whether `error`, raised by COMMIT, leaves it open whether the transaction was committed."""
    if type(error) is asyncpg.InterfaceError:  # asyncpg refused to send it: the connection is closed, or in use
        return False
    if isinstance(error, ConnectionLostError) and error.nothing_executed:
        return False
    if not isinstance(error, asyncpg.PostgresError):  # command_timeout, for example
        return True
    # Only a plain ERROR is an answer to COMMIT: everything is rolled back. A FATAL may come after the commit, from a
    # wait for a standby (PostgreSQL, SyncRepWaitForLSN), and 08 and 40003 say themselves that the outcome is unknown.
    return error.severity_en != "ERROR" or error.sqlstate[:2] == "08" or error.sqlstate == "40003"


def _pause(number: int) -> float:
    return random.random() * backoff(_PAUSE_BASE, number - 1, _PAUSE_CAP)  # noqa: S311


def _check(work: object, attempts: object, isolation: object) -> None:
    _WORK.check("work", work)
    _ATTEMPTS.check("attempts", attempts)
    if isolation is not None:
        _ISOLATION.check("isolation", isolation)
