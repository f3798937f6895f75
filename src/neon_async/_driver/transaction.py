"""Transactions that end: a ROLLBACK within a bound, and work that runs again when nothing of it can have been kept.

`Transaction` is what `transaction()` of our connections returns; `run_transaction()` is behind the pool's method of
that name. This module knows one connection at a time. It knows no slots, no waiters, and not how connections are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg
from asyncpg.connresource import guarded
from asyncpg.transaction import ISOLATION_LEVELS
from asyncpg.transaction import Transaction as AsyncpgTransaction

from .._errors import CommitUnknownError, ConfigurationError, NeonAsyncError, TransactionAbortedError
from .._timing import backoff

if TYPE_CHECKING:
    from .connection import Connection

_T = TypeVar("_T")

Acquire: TypeAlias = "Callable[[], AbstractAsyncContextManager[Connection]]"
Work: TypeAlias = "Callable[[Connection], Awaitable[_T]]"

# Seconds that a ROLLBACK may take: as long as the reset of a connection may, or as long as somebody who has run out of
# time already, or who is being cancelled, should wait. The second is one cancel request to a server far away.
_ROLLBACK_TIMEOUT = 5.0
_LATE_ROLLBACK_TIMEOUT = 0.5

# Pauses between two runs: full jitter ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that those
# who met in a conflict do not meet again. Conflicts last as long as transactions do, hence milliseconds.
_PAUSE_BASE = 0.02
_PAUSE_CAP = 1.0


class Transaction(AsyncpgTransaction):
    """asyncpg's transaction or savepoint block, which is left in bounded time when it is left with an exception.

    ROLLBACK gets 5.0 s, or 0.5 s when the exception is a cancellation or a timeout. When it is not answered by then, or
    fails, the connection is terminated: the server rolls back what it had begun. Either way the exception that ended
    the block passes, unless the task is cancelled meanwhile. COMMIT has no bound but the connection's
    `command_timeout`, for nobody can tell what became of one that was given up.
    """

    __slots__ = ("_observed",)

    def __init__(
        self, connection: Any, isolation: Any = None, readonly: bool = False, deferrable: bool = False
    ) -> None:
        self._observed = _Observed(connection)
        super().__init__(cast(Any, self._observed), isolation, readonly, deferrable)

    @property
    def connection(self) -> Any:
        """The connection itself. A pool's proxy for it is detached, and tells nothing, once the connection is lost."""
        return self._observed.connection

    @property
    def status(self) -> str:
        """What the server answered to the latest of BEGIN, SAVEPOINT, COMMIT, ROLLBACK; "" before any."""
        return self._observed.status

    async def __aexit__(self, extype: object, ex: Any, tb: object) -> None:
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
        """Terminate the connection, unless it has been released: it may be somebody else's by now."""
        with contextlib.suppress(asyncpg.InterfaceError):
            self._terminate()

    @guarded  # asyncpg's: raises InterfaceError where the connection is closed, or was released after this was made
    def _terminate(self) -> None:
        self.connection.terminate()


class _Observed:
    """A connection as asyncpg's `Transaction` sees it: the same, but what the server answered last is kept.

    asyncpg drops the answer to COMMIT. Like this it can be had, and asyncpg's bookkeeping stays asyncpg's.
    """

    __slots__ = ("connection", "status")

    connection: Any
    status: str

    def __init__(self, connection: Any) -> None:
        object.__setattr__(self, "connection", connection)
        object.__setattr__(self, "status", "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.connection, name, value)

    async def execute(self, query: str) -> str:
        status: str = await self.connection.execute(query)
        object.__setattr__(self, "status", status)
        return status


def _rollback_timeout(error: BaseException) -> float:
    late = isinstance(error, TimeoutError) or not isinstance(error, Exception)
    return _LATE_ROLLBACK_TIMEOUT if late else _ROLLBACK_TIMEOUT


async def run_transaction(
    acquire: Acquire,
    work: Work[_T],
    *,
    attempts: int,
    isolation: str | None,
    readonly: bool,
    deferrable: bool,
    on_retry: Callable[[float], None],
) -> _T:
    """Return what `work` returns, run in a transaction that is committed; see `Pool.run_transaction()`.

    `acquire`: gives a connection whose `transaction()` is a `Transaction`, a new one for each run. What it raises
    passes. `on_retry`: called before each run but the first, with the seconds that the one before and the pause took.
    """
    _check(work, attempts, isolation)
    clock = asyncio.get_running_loop().time
    for number in itertools.count(1):
        began = clock()
        async with acquire() as connection:
            run = _Run(connection, isolation=isolation, readonly=readonly, deferrable=deferrable)
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

    `repeatable`: whether it failed for a reason that passes, with certainty that nothing of it was kept.
    """

    def __init__(self, connection: Connection, **options: Any) -> None:
        self.repeatable = False
        self._lent = connection
        self._transaction = cast(Transaction, connection.transaction(**options))
        self._session = self._transaction.connection

    async def through(self, work: Work[_T]) -> _T:
        await self._begin()
        try:
            result = await work(self._lent)
            self._require_open()
        except BaseException as error:
            # Judged before ROLLBACK, which may end the connection itself.
            self.repeatable = self._was_lost(error) or (_is_conflict(error) and self._is_open())
            await self._roll_back(error)
            raise
        await self._commit()
        return result

    async def _begin(self) -> None:
        try:
            await self._transaction.__aenter__()
        except Exception as error:
            self.repeatable = self._was_lost(error)
            raise

    async def _roll_back(self, error: BaseException) -> None:
        if isinstance(error, GeneratorExit):  # a coroutine that is being closed must not await any more
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
                "A statement had failed and the work went on, so that COMMIT rolled everything back. Let the error "
                "leave the work, or put the statement into `async with connection.transaction()`."
            )

    def _require_open(self) -> None:
        if not self._session.is_closed() and not self._is_open():
            raise TransactionAbortedError(
                "The work ended the transaction itself: what it committed is kept, and what followed ran in none. "
                "Leave COMMIT and ROLLBACK to run_transaction(); to roll back, raise an exception."
            )

    def _is_open(self) -> bool:
        """Whether the transaction goes on. Where the work has ended it, something may be kept."""
        return not self._session.is_closed() and bool(self._session.is_in_transaction())

    def _was_lost(self, error: BaseException) -> bool:
        """Whether the connection is gone and `error` says just that: another error of the work's is the work's."""
        if isinstance(error, NeonAsyncError):
            return False
        if isinstance(error, asyncpg.InternalClientError):
            # The server's last words came between two statements, which asyncpg does not foresee: it refuses the next
            # one, unsent, until the end of the stream comes, too. Nothing can be done with the connection but end it.
            self._transaction.end_connection()
            return True
        # What asyncpg raises for a connection that is closed, or was released because of it. Its subclasses are about
        # arguments, and not this.
        refused = type(error) is asyncpg.InterfaceError
        return bool(self._session.is_closed()) and (refused or isinstance(error, _LOSSES))


# A session that is ended in the middle of a statement, as asyncpg reports it (08003) or in the server's words.
_LOSSES = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError)


def _is_conflict(error: BaseException) -> bool:
    """Whether the server says that the same transaction can succeed if it runs again (PostgreSQL, section 13.5)."""
    return isinstance(error, (asyncpg.SerializationError, asyncpg.DeadlockDetectedError))


def _leaves_commit_open(error: Exception) -> bool:
    """Whether `error`, raised by COMMIT, does not tell what became of the transaction."""
    if type(error) is asyncpg.InterfaceError:  # asyncpg refused to send it: the connection is closed, or in use
        return False
    if not isinstance(error, asyncpg.PostgresError):  # command_timeout, for one
        return True
    # Only a plain ERROR is an answer to COMMIT: everything is rolled back. A FATAL may come after the commit, from a
    # wait for a standby (PostgreSQL, SyncRepWaitForLSN), and 08 and 40003 say themselves that nobody knows.
    return error.severity_en != "ERROR" or error.sqlstate[:2] == "08" or error.sqlstate == "40003"


def _pause(number: int) -> float:
    return random.random() * backoff(_PAUSE_BASE, number - 1, _PAUSE_CAP)  # noqa: S311


def _check(work: object, attempts: object, isolation: object) -> None:
    if not callable(work):
        raise ConfigurationError("work must be an async function that takes a connection, not what it returns.")
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ConfigurationError("attempts must be a whole number of at least 1.")
    if isolation is not None and isolation not in sorted(ISOLATION_LEVELS):
        raise ConfigurationError(f"isolation must be one of {', '.join(sorted(ISOLATION_LEVELS))}.")
