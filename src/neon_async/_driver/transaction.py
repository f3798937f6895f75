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
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, get_args

import asyncpg
from asyncpg.transaction import Transaction as AsyncpgTransaction

from .._config.literals import IsolationLevel
from .._config.readers import AsyncFunction, Choice, Given, Integer, Name
from .._config.settings import TRANSACTION_SETTINGS
from .._errors import (
    ConfigurationError,
    ConnectionLostError,
    StaleStatementError,
    TransactionAbortedError,
    ends_session,
)
from .._neon.quoting import quote, quote_name
from .._timing import backoff
from .holder import ResourceHooks, end_lost, guarded, has_open_transaction, lent, own_session, protocol_of, use_of
from .losses import aborted_error, is_server_error, leaves_commit_open, unsent_error

if TYPE_CHECKING:
    from .connection import Connection
    from .session import Session

_T = TypeVar("_T")

Acquire: TypeAlias = "Callable[[], AbstractAsyncContextManager[Connection[Any]]]"
Work: TypeAlias = "Callable[[Connection[Any]], Awaitable[_T]]"

# Seconds that a ROLLBACK may take: as long as the reset of a connection may.
_ROLLBACK_TIMEOUT = 5.0

# Pauses between two runs: full jitter ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that two
# transactions that conflicted do not conflict again. A conflict lasts as long as a transaction, hence milliseconds.
_PAUSE_BASE = 0.02
_PAUSE_CAP = 1.0

# What the arguments must be.
_ROLE = Name()
_WORK = AsyncFunction()
_ATTEMPTS = Integer(1)
_ISOLATION = Choice(*get_args(IsolationLevel))


# ---------------------------------------------------------------------------------------------------------------------
# A block of a transaction


class Transaction(ResourceHooks, AsyncpgTransaction):
    """asyncpg's transaction or savepoint block, which is left in bounded time when it is left with an exception.

    ROLLBACK gets 5.0 s. When the exception is a cancellation or a timeout, it gets 0.5 s and six times what the TLS
    handshake of the connection took, because a statement may have to be cancelled first. If it is not answered by then,
    or fails, the connection is terminated and the server rolls back. Either way the exception that ended the block is
    raised, unless the task is cancelled meanwhile. COMMIT has no bound but the connection's `command_timeout`, because
    a COMMIT that was given up leaves it open whether the transaction was committed: `CommitUnknownError`. Where the
    connection was lost before COMMIT was sent, the error is a `ConnectionLostError` that says so. Where a statement had
    failed and the block was left without its error, COMMIT rolls back, and `TransactionAbortedError` is raised; with
    asyncpg that looks like a commit.

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
        isolation: IsolationLevel | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        role: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._lent = lent(connection)
        search_path = (settings or {}).get("search_path")
        if search_path is not None:
            connection.check_search_path(search_path)
        self._observed = _Observed(connection, claims_of(role, settings), readonly=readonly, search_path=search_path)
        super().__init__(cast(Any, self._observed), isolation, readonly, deferrable)

    @property
    def connection(self) -> Any:
        """The connection as it was lent: it cannot be used after the loan."""
        return self._lent

    @property
    def readonly(self) -> bool:
        """Whether it is READ ONLY, so that it can have written nothing."""
        return self._observed.readonly

    if TYPE_CHECKING:

        async def __aenter__(self) -> None: ...

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
            async with asyncio.timeout(_rollback_timeout(ex, own_session(self._observed.connection))):
                await super().__aexit__(extype, ex, tb)
        except BaseException as failure:
            self.end_connection(
                f"a transaction could not be rolled back ({type(failure).__name__}), so it was terminated"
            )
            if not isinstance(failure, Exception):
                raise

    def end_connection(self, why: str) -> None:
        """Terminate the connection because of `why`, unless it has been released: another caller may have it by now."""
        with contextlib.suppress(asyncpg.InterfaceError, ConnectionLostError):
            self._terminate(why)

    @guarded  # raises where the connection is closed, or was released after this was made
    def _terminate(self, why: str) -> None:
        end_lost(self._observed.connection, why)


class _Observed:
    """A connection as asyncpg's `Transaction` sees it: the same, except for what begins the block and what ends it.

    BEGIN and SAVEPOINT are sent ahead of the first statement. A COMMIT that the server has answered with ROLLBACK is an
    error. The rest of the bookkeeping is asyncpg's.
    """

    __slots__ = ("claims", "connection", "readonly", "search_path")

    claims: Sequence[str]
    connection: Any
    readonly: bool
    search_path: str | None

    def __init__(self, connection: Any, claims: Sequence[str], *, readonly: bool, search_path: str | None) -> None:
        object.__setattr__(self, "claims", claims)
        object.__setattr__(self, "search_path", search_path)
        object.__setattr__(self, "connection", connection)
        object.__setattr__(self, "readonly", readonly)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.connection, name, value)

    async def execute(self, query: str) -> None:
        if query.startswith("COMMIT"):
            await self._commit(query)
            return
        protocol, beginning = protocol_of(self.connection), _beginning(query, self.claims)
        with contextlib.ExitStack() as stack:
            if protocol is not None and beginning is not None:
                if query.startswith("BEGIN"):
                    protocol.transaction_search_path = self.search_path
                stack.enter_context(protocol.replacing(query, beginning))
            await self.connection.execute(query)

    async def _commit(self, query: str) -> None:
        protocol = protocol_of(self.connection)
        assert protocol is not None
        # Not by what execute() returns, which a caller's class may have overridden.
        with protocol.committing(readonly=self.readonly) as commit:
            await self.connection.execute(query)
        if commit.was_refused:
            raise aborted_error()
        if not self.connection.is_closed() and protocol.is_in_transaction():
            end_lost(self.connection, "COMMIT did not reach the server")
            raise unsent_error()


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


def claims_of(role: str | None, settings: Mapping[str, str] | None) -> list[str]:
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


def _rollback_timeout(error: BaseException, session: Session) -> float:
    # The deadline of the caller has passed, or the caller is being cancelled.
    late = isinstance(error, TimeoutError) or not isinstance(error, Exception)
    return session.cancel_time if late else _ROLLBACK_TIMEOUT


# ---------------------------------------------------------------------------------------------------------------------
# Work that is run in a transaction


async def run_transaction(
    acquire: Acquire,
    work: Work[_T],
    *,
    attempts: int,
    isolation: IsolationLevel | None,
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
            self.repeatable = self._was_lost(error) or (_can_pass(error) and self._is_open())
            await self._roll_back(error)
            raise
        await self._commit()
        return result

    async def _begin(self) -> None:
        try:
            self._transaction = _require_ours(self._lent.transaction(**self._options))
            self._session = self._transaction._observed.connection  # the proxy is detached when the loan ends
            await self._transaction.__aenter__()
        except ConnectionLostError:
            self.repeatable = True  # BEGIN keeps nothing
            raise

    async def _roll_back(self, error: BaseException) -> None:
        if isinstance(error, GeneratorExit):  # a coroutine that is being closed must not await anything
            self._transaction.end_connection("the coroutine that used it was closed")
        else:
            await self._transaction.__aexit__(type(error), error, error.__traceback__)

    async def _commit(self) -> None:
        try:
            await self._transaction.__aexit__(None, None, None)
        except TransactionAbortedError:
            raise
        except Exception as error:
            self.repeatable = _can_pass(error) or self._was_lost(error) or self._kept_nothing(error)
            raise

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
        """Return whether the connection was lost while the transaction was open, and `error` says only that."""
        session = own_session(self._session)
        if session.loss is None or session.commit_unknown or not has_open_transaction(self._session):
            return False
        return isinstance(error, ConnectionLostError) or (is_server_error(error) and ends_session(error))

    def _kept_nothing(self, error: Exception) -> bool:
        """Return whether COMMIT was not answered, and had nothing to keep."""
        return self._transaction.readonly and (self._session.is_closed() or leaves_commit_open(error))


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


def _can_pass(error: BaseException) -> bool:
    """Return whether the transaction can succeed if it runs again.

    After a conflict the server says so (PostgreSQL documentation, section 13.5). After a stale statement asyncpg
    prepares it anew.
    """
    return isinstance(error, _CAN_PASS)


# What says that a prepared statement was stale. The next use prepares it again.
STALE_STATEMENT = (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError, StaleStatementError)
_CAN_PASS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, *STALE_STATEMENT)


def _pause(number: int) -> float:
    return random.random() * backoff(_PAUSE_BASE, number - 1, _PAUSE_CAP)  # noqa: S311


def _check(work: object, attempts: object, isolation: object) -> None:
    _WORK.check("work", work)
    _ATTEMPTS.check("attempts", attempts)
    if isolation is not None:
        _ISOLATION.check("isolation", isolation)
