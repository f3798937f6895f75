"""What a connection does differently behind a transaction pooler: PgBouncer in transaction mode, as on `-pooler` hosts.

It refuses what needs a session of its own, heals stale prepared statements, and resets only what would follow the next
client. Knows no pools.

A stale statement is healed within the call outside a transaction. Inside a transaction, from a prepared statement or
from a cursor the error is raised, and what is prepared next is healed; a statement that was prepared before the DDL
stays stale. The same holds for asyncpg's `ProtocolError`, which means that the query was executed and its rows are not
as asyncpg knew them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import asyncpg

from .._errors import PooledHostError
from .._neon.endpoint import direct_host
from .._neon.sql import REPORTED_SETTINGS, quote, session_feature
from .connection import Connection
from .holder import StatementHooks, Use, own_session, timeout_of
from .session import Session
from .transaction import Transaction

_log = logging.getLogger("neon_async")

# A server connection that has not had the statement before prepares it again after the DDL. asyncpg reads the rows as
# they were described to it earlier, and finds a wrong number of columns or of bytes.
_MISREAD = (asyncpg.exceptions.ProtocolError,)
_STALE = (asyncpg.InvalidCachedStatementError, *_MISREAD)


class PooledConnection(StatementHooks, Connection):
    """A connection to a pooled host."""

    __slots__ = ()

    # Calls that carry SQL: what needs a session is refused before anything is sent.

    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        """Execute SQL, as asyncpg does; `PooledHostError` where it needs a session of its own."""
        session = refuse_session_features(self, query, args)
        if args:
            return await super().execute(query, *args, **options)
        with _HeldServer(session):
            return await super().execute(query, **options)

    async def executemany(self, command: str, args: Any, **options: Any) -> Any:
        """Execute SQL for each sequence of arguments, as asyncpg does; `PooledHostError` where it needs a session."""
        refuse_session_features(self, command)
        return await super().executemany(command, _once(args), **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        """Return all rows, as asyncpg does; `PooledHostError` where the query needs a session of its own."""
        refuse_session_features(self, query, args)
        return await super().fetch(query, *args, **options)

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        """Return one value, as asyncpg does; `PooledHostError` where the query needs a session of its own."""
        refuse_session_features(self, query, args)
        return await super().fetchval(query, *args, **options)

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        """Return one row, as asyncpg does; `PooledHostError` where the query needs a session of its own."""
        refuse_session_features(self, query, args)
        return await super().fetchrow(query, *args, **options)

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        """Return the rows of all runs, as asyncpg does; `PooledHostError` where the query needs a session."""
        refuse_session_features(self, query)
        return await super().fetchmany(query, _once(args), **options)

    async def prepare(self, query: str, **options: Any) -> Any:
        """Return a prepared statement, as asyncpg does; `PooledHostError` where it needs a session of its own."""
        refuse_session_features(self, query)
        return await super().prepare(query, **options)

    async def prepare_cached(self, query: str) -> Any:
        """Return a prepared statement from the cache; `PooledHostError` where it needs a session of its own."""
        refuse_session_features(self, query)
        return await super().prepare_cached(query)

    def cursor(self, query: str, *args: Any, **options: Any) -> Any:
        """Return a cursor factory, as asyncpg does; `PooledHostError` where the query needs a session of its own."""
        refuse_session_features(self, query, args)
        return super().cursor(query, *args, **options)

    def use_of(self, resource: object) -> Use:
        """Return a call on a prepared statement, a cursor or a transaction of this connection."""
        session = own_session(self)
        return Use(session) if isinstance(resource, Transaction) else _ResourceUse(session)

    async def copy_from_query(self, query: str, *args: Any, **options: Any) -> Any:
        """Copy the rows of a query, as asyncpg does; `PooledHostError` where it needs a session of its own."""
        with _HeldServer(refuse_session_features(self, query, args)):
            return await super().copy_from_query(query, *args, **options)

    async def copy_from_table(self, table_name: str, **options: Any) -> Any:
        """Copy the rows of a table, as asyncpg does."""
        with _HeldServer(own_session(self)):
            return await super().copy_from_table(table_name, **options)

    async def copy_to_table(self, table_name: str, *, where: str | None = None, **options: Any) -> Any:
        """Copy data to a table, as asyncpg does; `PooledHostError` where `where` needs a session of its own."""
        with _HeldServer(refuse_session_features(self, f"SELECT {where}")):
            return await super().copy_to_table(table_name, where=where, **options)

    async def copy_records_to_table(self, table_name: str, *, where: str | None = None, **options: Any) -> Any:
        """Copy records to a table, as asyncpg does; `PooledHostError` where `where` needs a session of its own."""
        with _HeldServer(refuse_session_features(self, f"SELECT {where}")):
            return await super().copy_records_to_table(table_name, where=where, **options)

    async def add_listener(self, *_: Any, **__: Any) -> NoReturn:
        """Raise `PooledHostError`: LISTEN needs a session of its own."""
        _refuse(own_session(self), "LISTEN")

    def get_reset_query(self) -> str:
        """Return the SQL that ends what is open and sets back what would follow the next client, or ""."""
        session = own_session(self)
        return _restoring(self, session.initial_settings) or ("SELECT 1" if session.holds_server else "")

    # How statements are prepared and executed

    async def get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:
        """Prepare the text with the token of this pool, and once more where it has become stale."""
        session, began = own_session(self), time.monotonic()
        session.holds_server = True
        token = session.healing.token
        try:
            return await super().get_statement(query + token, timeout, **options)
        except asyncpg.InvalidCachedStatementError:
            if not self._may_retry(token):
                raise
        with _Retry(self, timeout, began) as retry:
            return await super().get_statement(query + session.healing.token, retry.timeout, **options)

    async def run_statement(self, query: str, executor: Any, timeout: float | None, **options: Any) -> Any:
        """Execute a statement, and once more where it has become stale and nothing of it was executed."""
        session, began = own_session(self), time.monotonic()
        token = session.healing.token
        try:
            result = await super().run_statement(query, executor, timeout, **options)
        except asyncpg.InvalidCachedStatementError:
            if not self._may_retry(token):
                raise
        except _MISREAD:
            note_stale(session, token)
            raise  # it was executed: only the caller can decide whether it may be once more
        else:
            session.holds_server = False
            return result
        with _Retry(self, timeout, began) as retry:
            result = await super().run_statement(query, executor, retry.timeout, **options)
        session.holds_server = False
        return result

    def _may_retry(self, token: str) -> bool:
        note_stale(own_session(self), token)
        return not (self.is_closed() or self.is_in_transaction())


class _HeldServer:
    """A call that is sent as one unit: PgBouncer reserves a server connection until it has ended.

    It may be left running, and it may fail on the way; a reset finds out.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._session.holds_server = True

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self._session.holds_server = False


class _Retry:
    """The second run of a statement: its share of the timeout, and its time in the statistics.

    Args:
        connection: The connection that the statement runs on.
        timeout: Seconds for both runs together. Default: the connection's `command_timeout`.
        began: When the first run began.
    """

    def __init__(self, connection: PooledConnection, timeout: float | None, began: float) -> None:
        self._session = own_session(connection)
        self._began = time.monotonic()
        self._token = self._session.healing.token
        limit = timeout_of(connection, timeout)
        self.timeout = None if limit is None else limit - (self._began - began)

    def __enter__(self) -> _Retry:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._session.healing.seconds += time.monotonic() - self._began
        if isinstance(error, _STALE):
            note_stale(self._session, self._token)


class _ResourceUse(Use):
    """A call on a prepared statement or cursor, which cannot be healed: it reports that it is stale."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self.session.holds_server = True

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.session.holds_server = False
        elif isinstance(error, _STALE):
            note_stale(self.session, getattr(error, "query", None))
        super().__exit__(kind, error, traceback)


# ---------------------------------------------------------------------------------------------------------------------
# What is stale, what is refused, what is set back


def note_stale(session: Session, stale: str | None) -> None:
    """Have everything prepared again from now on, because `stale`, a text or the end of one, was refused as stale."""
    if session.healing.renew(stale):
        _log.info(
            "%s: a prepared statement is stale, the schema has changed; statements are prepared again from now on",
            session.name,
        )


def refuse_session_features(connection: object, query: object, args: Sequence[object] = ()) -> Session:
    """Return the session of `connection`.

    Args:
        connection: A connection of ours.
        query: The SQL to execute.
        args: The values of its parameters, as far as they are known.

    Raises:
        PooledHostError: `query` needs a session of its own.
    """
    session = own_session(connection)
    feature = session_feature(query, args) if isinstance(query, str) else None
    if feature is not None:
        _refuse(session, feature.name, f"Write {feature.instead}, or use" if feature.instead else "Use")
    return session


def _refuse(session: Session, what: str, use: str = "Use") -> NoReturn:
    raise PooledHostError(
        f"{what} needs a session of its own, and {session.host} may run each transaction in another session. "
        f"{use} {direct_host(session.endpoint)}."
    )


def is_pooled(connection: object) -> bool:
    """Return whether a connection of ours goes to a pooled host."""
    return issubclass(type(connection), PooledConnection)  # isinstance() is true for every connection of asyncpg


def tracked_settings(connection: Any) -> dict[str, str]:
    """Return the settings that PgBouncer tracks for its clients, as they are now.

    PgBouncer sets them on whichever server connection a client is given, so what one caller has set would follow the
    next.
    """
    settings = connection.get_settings()
    return {name: getattr(settings, name) for name in REPORTED_SETTINGS if hasattr(settings, name)}


def _restoring(connection: Any, initial: dict[str, str]) -> str:
    now = tracked_settings(connection)
    return "; ".join(f"SET {name} TO {quote(value)}" for name, value in initial.items() if now.get(name) != value)


class _Once:
    """Rows from an iterator. A second run would go on with the rows that the first run has left."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows: Iterator[Any] | None = rows

    def __iter__(self) -> Iterator[Any]:
        rows, self._rows = self._rows, None
        if rows is None:
            raise asyncpg.InvalidCachedStatementError(
                "The prepared statement was stale, and its rows came from an iterator that is used up. Nothing was "
                "written. Call again with the rows from the beginning."
            )
        return rows


def _once(rows: Iterable[Any]) -> Iterable[Any]:
    return _Once(rows) if isinstance(rows, Iterator) else rows
