"""asyncpg's protocol as our connections use it: the one place through which every statement passes.

Connections, prepared statements, cursors and transactions of asyncpg all send through `connection._protocol`. Here that
is a `SessionProtocol`, which knows whether a statement is under way, sends BEGIN and the reset ahead of the next
statement, and holds back what must not follow a reset that can still fail.

Knows nothing of pools and loans.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import asyncpg

from .._errors import ConnectionLostError, ServerError, WrongMethodError, ends_session, server_error
from .._neon.effects import Effects, effects_of
from .._neon.sql import commits, goes_on_after_transaction
from .._wire.transport import SessionTransport, query_message
from . import holder
from .losses import (
    CANCEL_TIMED_OUT,
    CLOSED_HERE,
    OUT_OF_STEP,
    Loss,
    Outcome,
    closed_in_operation,
    commit_error,
    is_server_error,
    leaves_commit_open,
    loss_with,
    lost_error,
    outcome_of,
    timed_out,
)
from .session import Session

_T = TypeVar("_T")

# asyncpg 0.31 waits without a limit for the end of a cancelled statement, before it begins the time of the next one, or
# of a close.
_WAITS_FOR_CANCELLATION = asyncpg.__version__.startswith("0.31.")

_DOTTED_NAME = r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)+"


class Commit:
    """The COMMIT of a transaction block.

    Attributes:
        readonly: Whether the transaction is read-only.
        was_refused: Whether the server has answered it with ROLLBACK.
    """

    __slots__ = ("readonly", "was_refused")

    def __init__(self, readonly: bool) -> None:
        self.readonly = readonly
        self.was_refused = False


@holder.in_front_of_protocol
class SessionProtocol:
    """asyncpg's protocol object of one connection, with what travels ahead of its statements.

    Args:
        protocol: asyncpg's own object; whatever is not defined here is its.
        transport: The session's transport, which knows the session.
        host: The host name, for messages.
    """

    __slots__ = (
        "_ahead",
        "_asyncpg",
        "_begun",
        "_commit",
        "_effects",
        "_failure",
        "_host",
        "_reset_failure",
        "_running",
        "_session",
        "_transport",
        "has_cancelled",
        "has_deallocated",
        "has_prepared",
        "has_read_copy",
        "loan_has_ended",
        "mentioned",
        "on_dropped",
        "on_reset",
        "prepares",
        "transaction_search_path",
        *holder.FREQUENT_METHODS,
    )

    queries_count: int  # how many statements were run
    is_connected: Callable[[], bool]
    has_cancelled: Callable[[], bool]  # whether a cancelled statement has not ended yet
    get_settings: Callable[[], Any]

    def __init__(self, protocol: Any, transport: SessionTransport, *, host: str) -> None:
        self._asyncpg = protocol
        self._transport = transport
        self._host = host
        assert isinstance(transport.session, Session)
        self._session = transport.session
        self._running = 0
        self._ahead: tuple[str, str] | None = None  # a simple query, and what is sent ahead in its place
        self._begun = False  # a BEGIN went ahead, and asyncpg has not seen a ReadyForQuery since
        self._failure: ServerError | None = None  # of a BEGIN that went ahead
        self._reset_failure: ServerError | None = None
        self._effects: dict[str, Effects] = {}  # of prepared texts that have any
        self.has_prepared = False  # statements may have been prepared in SQL
        self.has_deallocated = False  # statements may have been deallocated in SQL
        # Called when statements that asyncpg has prepared may be gone, with whether they are certainly.
        self.on_dropped: Callable[[bool], None] = holder.ignore
        # Called with the outcome of a reset that was sent ahead: True if the server has done it. After a failure the
        # connection ends.
        self.on_reset: Callable[[bool], None] = holder.ignore
        self.has_read_copy = False  # asyncpg has read all of the answer to the COPY that is under way
        self.prepares = 0  # how often a statement was prepared
        self.transaction_search_path: str | None = None  # of the settings of the open transaction
        self.loan_has_ended = False  # the loan has ended, and calls of it are still under way: they send nothing more
        self._commit: Commit | None = None  # under way
        # Dotted names in texts and arguments, where someone collects them: what may be custom settings.
        self.mentioned: set[str] | None = None
        holder.keep_frequent_methods(self, protocol)

    def __repr__(self) -> str:
        return f"<SessionProtocol of {self._host}>"

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def is_idle(self) -> bool:
        """Return whether no statement is under way, so that one may be sent ahead."""
        return not self._running and self._transport.is_settled and self.is_connected() and not self.has_cancelled()

    def is_at_rest(self) -> bool:
        """Return whether no statement is under way, none is being cancelled, and no transaction is open."""
        return self._transport.is_at_rest and not (self._running or self._begun or self.has_cancelled())

    @property
    def search_path(self) -> str | None:
        """The `search_path`, where it is known: PostgreSQL 18 reports it, and a transaction may set it."""
        if self.transaction_search_path is not None and self.is_in_transaction():
            return self.transaction_search_path
        path: str | None = getattr(self.get_settings(), "search_path", None)
        return path

    @property
    def is_running(self) -> bool:
        """Whether the server runs a statement, as far as is known."""
        return self._running > 0

    def is_in_transaction(self) -> bool:
        """Return whether a transaction is open, one whose BEGIN went ahead included."""
        return self._begun or bool(self._asyncpg.is_in_transaction())

    @property
    def is_in_failed_transaction(self) -> bool:
        """Whether a transaction is open in which a statement has failed, so that COMMIT rolls it back."""
        return self._transport.is_in_failed_transaction

    # -----------------------------------------------------------------------------------------------------------------
    # Sent ahead

    @property
    def reset_query(self) -> str:
        """The SQL that cleans the session and restores what its snapshot has."""
        if self.has_prepared:
            return f"{self._session.reset_query}; {self._session.snapshot.deallocate_query()}"
        return self._session.reset_query

    def send_reset_ahead(self) -> None:
        """Send a reset ahead of the next statement. If any part of it fails, the connection ends.

        It is one transaction, so a part that fails leaves a failed transaction, in which the server itself refuses the
        next statement (25P02). READ COMMITTED, because a default of SERIALIZABLE READ ONLY DEFERRABLE would make the
        first query wait for a safe snapshot. No access mode, because READ WRITE is refused on a standby.
        """
        sql = self.reset_query if self.has_prepared else self._session.reset_query
        self._transport.send_ahead(_reset_message(sql), self._take_reset_answer)
        self.has_prepared = self.has_deallocated = False

    def note_reset(self) -> None:
        """Note that a reset was sent, which drops the statements that were prepared in SQL."""
        self.has_prepared = self.has_deallocated = False

    @contextlib.contextmanager
    def replacing(self, query: str, sql: str) -> Iterator[None]:
        """Send `sql` in place of the simple query `query`, and ahead of the next statement where nothing is under way.

        What fails in it is raised by the next statement, which the server has refused then.

        Args:
            query: A BEGIN or SAVEPOINT as asyncpg sends it.
            sql: The same, and what belongs to it.
        """
        self._ahead = query, sql
        try:
            yield
        finally:
            self._ahead = None

    @contextlib.contextmanager
    def committing(self, *, readonly: bool) -> Iterator[Commit]:
        """Follow the COMMIT of a transaction block, and yield what is known of it.

        Args:
            readonly: Whether the transaction is read-only, so that a COMMIT that is lost is as any lost statement.
        """
        self._commit = Commit(readonly)
        try:
            yield self._commit
        finally:
            self._commit = None

    def _take_reset_answer(self, status: bytes, error: bytes | None) -> None:
        if error is None and status == b"I":
            self.on_reset(True)
            return
        self.on_reset(False)
        self._reset_failure = server_error(error or b"")
        self._session.note_loss(Loss(f"its session could not be reset ({self._reset_failure.args[0]})"))
        self._transport.abort()

    def _take_begin_answer(self, status: bytes, error: bytes | None) -> None:
        if error is not None and self._failure is None:  # else it is a consequence of the first one
            self._failure = server_error(error)

    # -----------------------------------------------------------------------------------------------------------------
    # asyncpg's calls

    async def query(self, query: str, timeout: float | None) -> Any:
        """Run a simple query, or send it ahead; see `replacing()`."""
        self._note(query)
        self._require_loan()
        if self._ahead is not None and self._ahead[0] == query:
            query = self._ahead[1]
            if self.is_idle() and not self._transport.is_in_failed_transaction:
                self._transport.send_ahead(query, self._take_begin_answer)
                self._begun = True
            else:
                await self._run(self._asyncpg.query(query, timeout), query, timeout)
            return _tag_of(query)
        is_text = isinstance(query, str)  # anything else is refused by asyncpg
        effects = _allowed(query) if is_text else None
        if is_text and (self._transport.unanswered or self._failure) and goes_on_after_transaction(query):
            timeout = await self._wait_for_answers(timeout)
            if self._failure is not None:
                raise self._take_failure()
            if not self.is_connected() and self._reset_failure is None:
                raise holder.refusal_of(self._session, self.is_in_transaction(), "connection is closed")
        result = self._asyncpg.query(query, timeout)
        call = self._run(result, query, timeout, rolls_back=is_text and query.startswith("ROLLBACK"))
        answer = await (self._tracked(call, effects) if effects else call)
        if self._commit is not None and answer == "ROLLBACK" and commits(query):
            self._commit.was_refused = True
        return answer

    async def prepare(self, name: str, query: str, timeout: Any, **options: Any) -> Any:
        """Prepare a statement. No ReadyForQuery follows, so asyncpg's transaction status stays as it is."""
        self._note(query)
        if effects := _allowed(query):
            self._effects[query] = effects
        self.prepares += 1
        return await self._run(self._asyncpg.prepare(name, query, timeout, **options), None, timeout, ready=False)

    def bind_execute(
        self, state: Any, args: Any, portal_name: str, limit: int, return_extra: bool, timeout: Any
    ) -> Awaitable[Any]:
        """Execute a prepared statement."""
        if self.mentioned is not None:
            self._note(*args)
        result = self._asyncpg.bind_execute(state, args, portal_name, limit, return_extra, timeout)
        call = self._run(result, state, timeout)
        effects = self._effects and self._effects.get(state.query)
        return self._tracked(call, effects) if effects else call

    async def bind_execute_many(self, state: Any, args: Any, portal_name: str, timeout: Any, return_rows: bool) -> Any:
        """Execute a prepared statement for each sequence of arguments."""
        result = self._asyncpg.bind_execute_many(state, args, portal_name, timeout, return_rows)
        call = self._run(result, state, timeout)
        effects = self._effects and self._effects.get(state.query)
        self._transport.flush_executes(True)
        try:
            return await (self._tracked(call, effects) if effects else call)
        finally:
            self._transport.flush_executes(False)

    async def bind(self, state: Any, args: Any, portal_name: str, timeout: Any) -> Any:
        """Bind arguments to a portal."""
        return await self._run(self._asyncpg.bind(state, args, portal_name, timeout), None, timeout)

    async def execute(self, state: Any, portal_name: str, limit: int, return_extra: bool, timeout: Any) -> Any:
        """Execute a portal."""
        result = self._asyncpg.execute(state, portal_name, limit, return_extra, timeout)
        return await self._run(result, state, timeout)

    async def close_portal(self, portal_name: str, timeout: Any) -> Any:
        """Close a portal."""
        return await self._run(self._asyncpg.close_portal(portal_name, timeout), None, timeout)

    async def close_statement(self, state: Any, timeout: Any) -> Any:
        """Close a prepared statement."""
        return await self._run(self._asyncpg.close_statement(state, timeout), None, timeout)

    async def copy_in(
        self, copy_stmt: str, reader: Any, data: Any, records: Any, record_stmt: Any, timeout: Any
    ) -> Any:
        """Copy data to the server."""
        result = self._asyncpg.copy_in(copy_stmt, reader, data, records, record_stmt, timeout)
        with holder.retrieving(self._asyncpg):
            return await self._run(_with_answer(result), copy_stmt, timeout)

    async def copy_out(self, copy_stmt: str, sink: Any, timeout: Any) -> Any:
        """Copy data from the server."""
        result = self._asyncpg.copy_out(copy_stmt, sink, timeout)
        try:
            with holder.retrieving(self._asyncpg, self._note_copied):
                return await self._run(result, copy_stmt, timeout)
        finally:
            self.has_read_copy = False

    def _note_copied(self, result: tuple[bytes, bool, str | None] | None) -> None:
        # Data, whether it was the last, and the command tag; or None where the connection was closed.
        self.has_read_copy = result is not None and result[1]

    async def close(self, timeout: float | None) -> None:
        """Close the connection politely, after the statement that is under way was cancelled."""
        limit = holder.timeout_by(self._asyncpg, timeout) if _WAITS_FOR_CANCELLATION else None
        async with asyncio.timeout(limit):
            await self._asyncpg.close(timeout)

    async def _tracked(self, call: Coroutine[Any, Any, _T], effects: Effects) -> _T:
        """Run a call that prepares or drops statements in SQL. Neither is undone when a transaction is rolled back."""
        self.has_prepared |= effects.prepares
        self.has_deallocated |= effects.deallocates
        succeeded = False
        try:
            result = await call
            succeeded = True
        finally:
            if effects.drops_drivers:
                self.on_dropped(succeeded)
        return result

    async def _wait_for_answers(self, timeout: float | None) -> float | None:
        """Wait until nothing is ahead of the next statement, and return the seconds that are left for it."""
        began = time.monotonic()
        try:
            seconds = holder.timeout_by(self._asyncpg, timeout)
            async with asyncio.timeout(seconds):
                await self._transport.wait_for_answers()
        except TimeoutError as error:
            raise self._timed_out(error, timeout, began) from error
        return None if seconds is None else seconds - (time.monotonic() - began)

    async def _run(
        self,
        call: Coroutine[Any, Any, _T],
        executed: Any,
        timeout: Any,
        *,
        ready: bool = True,
        rolls_back: bool = False,
    ) -> _T:
        """Run one of asyncpg's calls and raise what went wrong with the statement ahead of it, if anything did.

        Args:
            call: The call.
            executed: The text, or asyncpg's state of the prepared statement, that it executes. None: it executes none.
            timeout: Its seconds, or None for `command_timeout`.
            ready: Whether it ends with ReadyForQuery.
            rolls_back: Whether it succeeds also where the statement ahead has failed.
        """
        if self.loan_has_ended:
            call.close()
            self._require_loan()
        if _WAITS_FOR_CANCELLATION and self.has_cancelled():
            call = self._bounded(call, timeout)
        writes, began = self._transport.writes, time.monotonic()
        self._running += 1
        try:
            result = await call
        except Exception as error:
            sent = self._transport.writes != writes
            named = self._timed_out(error, timeout, began) if isinstance(error, TimeoutError) else error
            failure = self._name(named, getattr(executed, "query", executed) if sent else None)
            if failure is error:
                raise
            raise failure from failure.__cause__
        except GeneratorExit:  # the coroutine was closed, and the statement still runs
            self._running += 1
            raise
        finally:
            self._running -= 1
        if ready:
            self._begun = False
        if self._failure is not None and not rolls_back:
            raise self._take_failure()
        self._failure = None
        return result

    async def _bounded(self, call: Coroutine[Any, Any, _T], timeout: Any) -> _T:
        """Bound a call that waits for the end of a cancelled one first, and end the connection as asyncpg 0.32 does."""
        limit = timeout if isinstance(timeout, int | float) else None
        try:
            return await self.while_connected(call, holder.timeout_by(self._asyncpg, limit))
        except TimeoutError:
            # What it waited for is cancelled, too, and would cancel the task of any other call.
            self._session.note_loss(CANCEL_TIMED_OUT)
            self._asyncpg.abort()
            self._session.notify_closed()
            raise

    async def while_connected(self, call: Coroutine[Any, Any, _T], seconds: float | None) -> _T:
        """Await a call that waits for the end of a cancelled one, which asyncpg 0.31 does even without a connection.

        Args:
            call: The call.
            seconds: Its limit, or None.

        Raises:
            TimeoutError: It has taken longer.
            asyncpg.ConnectionDoesNotExistError: The connection has ended.
        """
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                with self._transport.calling_on_loss(lambda: deadline.reschedule(0)):
                    return await call
        except TimeoutError as error:
            if self._asyncpg.is_connected():
                raise
            raise closed_in_operation() from error

    def _timed_out(self, error: TimeoutError, timeout: float | None, began: float) -> Exception:
        limit = holder.timeout_by(self._asyncpg, None) if timeout is None else None
        return timed_out(self._host, error, time.monotonic() - began, timeout, limit)

    def _require_loan(self) -> None:
        if self.loan_has_ended:
            raise asyncpg.InterfaceError(
                "cannot perform operation: the connection has been released back to the pool. Nothing of this step was "
                "sent. Await every call before the release."
            )

    def _note(self, *texts: object) -> None:
        if self.mentioned is not None:
            for text in texts:
                if isinstance(text, str):
                    self.mentioned.update(re.findall(_DOTTED_NAME, text))

    def _name(self, error: Exception, executed: str | None) -> Exception:
        """Return the error that the caller gets.

        Args:
            error: What asyncpg raised.
            executed: The text that the server may have executed, or None.
        """
        if self._reset_failure is not None:
            return ConnectionLostError(
                f"The session at {self._host} could not be reset after its last use "
                f"({self._reset_failure.args[0]}), so the connection was closed. Nothing of this call was executed: "
                "call again.",
                nothing_executed=True,
            )
        if is_server_error(error) and not ends_session(error):
            self._begun = False  # the server answered, and asyncpg knows the state of the transaction
        if isinstance(error, asyncpg.InFailedSQLTransactionError) and self._failure is not None:
            return self._take_failure()
        is_lost, in_transaction = self._was_lost(error), self.is_in_transaction()
        loss = self._session.loss or CLOSED_HERE
        keeps_nothing = self._commit is not None and self._commit.readonly
        if executed is not None and not keeps_nothing and commits(executed) and leaves_commit_open(error):
            self._session.commit_unknown = True
            return commit_error(self._host, (is_lost and loss.words) or error)
        if is_lost and keeps_nothing:
            return lost_error(self._host, loss, Outcome.READ_ONLY, error)
        if is_lost:
            return lost_error(self._host, loss, outcome_of(executed, in_transaction=in_transaction), error)
        return error

    def _was_lost(self, error: Exception) -> bool:
        """Return whether `error` says only that the connection has ended. Notes why it has, where that is new."""
        session, words = self._session, holder.last_words(self._transport)
        if isinstance(error, asyncpg.InternalClientError) and (words is not None or _is_out_of_step(error)):
            # The server's last words, or anything else, came between two statements, which asyncpg does not expect: it
            # refuses the next statement, unsent, and every other one. The connection can only be ended.
            session.note_loss(OUT_OF_STEP if words is None else loss_with(words))
            self._transport.abort()
            session.notify_closed()
            return True
        if self._asyncpg.is_connected():
            return False
        if isinstance(error, TimeoutError):
            # asyncpg terminates a connection whose cancelled statement does not end within the timeout of the next one.
            session.left = False
            session.note_loss(CANCEL_TIMED_OUT)
            return False
        if is_server_error(error):
            return ends_session(error)
        refused = type(error) is asyncpg.InterfaceError or isinstance(error, asyncpg.InternalClientError)
        if isinstance(error, asyncpg.ConnectionDoesNotExistError) or (session.loss is not None and refused):
            return True
        # asyncpg has no transport any more.
        return type(error) is AttributeError and error.obj is None and error.name in _OF_TRANSPORT

    def _take_failure(self) -> Exception:
        failure, self._failure = self._failure, None
        assert failure is not None
        return failure


async def _with_answer(copy: Coroutine[Any, Any, Any]) -> Any:
    """Return the command tag of a COPY. asyncpg 0.31 returns None where its connection was closed meanwhile."""
    tag = await copy
    if tag is None:
        raise closed_in_operation()
    return tag


def _is_out_of_step(error: asyncpg.InternalClientError) -> bool:
    """Return whether asyncpg has received what no statement had asked for. Of two calls at once it says otherwise."""
    return str(error).startswith("cannot switch to state")


# What asyncpg calls of its transport.
_OF_TRANSPORT = frozenset({"abort", "is_closing", "pause_reading", "resume_reading", "write", "writelines"})


def _allowed(query: str) -> Effects | None:
    """Return the effects of `query`, where it has any.

    Raises:
        WrongMethodError: It is a COPY from or to the client, for which asyncpg would wait for ever, or lose the data.
    """
    effects = effects_of(query)
    if effects.copy:
        raise WrongMethodError(
            f"COPY ... {effects.copy} cannot run in execute(), fetch() or a prepared statement: its data would have "
            f"no way. Use {_COPY_METHODS[effects.copy]}."
        )
    return effects if any(effects) else None


_COPY_METHODS = {
    "FROM STDIN": "copy_to_table() or copy_records_to_table()",
    "TO STDOUT": "copy_from_table() or copy_from_query()",
}


@functools.lru_cache(maxsize=8)  # the resets of a pool are all the same
def _reset_message(sql: str) -> bytes:
    return query_message(f"BEGIN ISOLATION LEVEL READ COMMITTED; {sql}; COMMIT")


def _tag_of(query: str) -> str:
    """Return the command tag of the first statement, BEGIN or SAVEPOINT."""
    return query.split(maxsplit=1)[0].rstrip(";")
