"""What a connection does differently behind a transaction pooler: PgBouncer in transaction mode, as on `-pooler` hosts.

It refuses what needs a session of its own, and resets only what would follow the next client. Knows no pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .._errors import PooledHostError
from .._neon.endpoint import direct_host
from .._neon.features import REPORTED_SETTINGS
from .._neon.quoting import quote
from .._neon.sql import session_feature
from .connection import Connection
from .holder import Use, own_session
from .session import Session
from .transaction import Transaction


class PooledConnection(Connection):
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
        return await super().executemany(command, args, **options)

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
        return await super().fetchmany(query, args, **options)

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

    def check_search_path(self, search_path: object) -> None:
        """Raise `PooledHostError` where CREATE would make temporary objects, which stay in the session."""
        refuse_session_features(self, "SELECT set_config('search_path', $1, true)", (search_path,))

    def use_of(self, resource: object) -> Use:
        """Return a call on a prepared statement, a cursor or a transaction of this connection."""
        return Use(self, resource) if isinstance(resource, Transaction) else _HeldUse(self, resource)

    async def copy_from_query(self, query: str, *args: Any, **options: Any) -> Any:
        """Copy the rows of a query, as asyncpg does; `PooledHostError` where it needs a session of its own."""
        refuse_session_features(self, query, args)
        with _HeldServer(refuse_session_features(self, _unquoted(options))):
            return await super().copy_from_query(query, *args, **options)

    async def copy_from_table(self, table_name: str, **options: Any) -> Any:
        """Copy the rows of a table, as asyncpg does."""
        with _HeldServer(refuse_session_features(self, _unquoted(options))):
            return await super().copy_from_table(table_name, **options)

    async def copy_to_table(self, table_name: str, *, where: str | None = None, **options: Any) -> Any:
        """Copy data to a table, as asyncpg does; `PooledHostError` where `where` needs a session of its own."""
        with _HeldForData(refuse_session_features(self, _unquoted(options, where))):
            return await super().copy_to_table(table_name, where=where, **options)

    async def copy_records_to_table(self, table_name: str, *, where: str | None = None, **options: Any) -> Any:
        """Copy records to a table, as asyncpg does; `PooledHostError` where `where` needs a session of its own."""
        with _HeldForData(refuse_session_features(self, _unquoted(options, where))):
            return await super().copy_records_to_table(table_name, where=where, **options)

    async def add_listener(self, *_: Any, **__: Any) -> NoReturn:
        """Raise `PooledHostError`: LISTEN needs a session of its own."""
        _refuse(own_session(self), "LISTEN")

    def get_reset_query(self) -> str:
        """Return the SQL that ends what is open and sets back what would follow the next client, or ""."""
        session = own_session(self)
        return _restoring(self, session.initial_settings) or ("SELECT 1" if session.holds_server else "")

    # How statements are prepared and executed

    def get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:
        """Prepare the text, or take it from the cache."""
        own_session(self).holds_server = True
        return super().get_statement(query, timeout, **options)

    def cached_statement(self, query: str, options: Mapping[str, Any]) -> Any:
        """Take the statement from the cache, if it is there."""
        own_session(self).holds_server = True
        return super().cached_statement(query, options)

    async def run_statement(
        self, session: Session, query: str, executor: Any, timeout: float | None, options: Mapping[str, Any]
    ) -> Any:
        """Prepare and execute a text."""
        result = await super().run_statement(session, query, executor, timeout, options)
        session.holds_server = False
        return result


def _unquoted(options: Mapping[str, object], where: str | None = None) -> str:
    """Return as SQL what asyncpg writes into a COPY as it is: the condition, and its flags, which may be strings."""
    return f"SELECT {', '.join(str(options.get(name)) for name in ('oids', 'freeze', 'header'))}, {where}"


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


class _HeldForData(_HeldServer):
    """A COPY to the server, which PgBouncer does not get over when it fails; see `Session.pins_server`."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        super().__exit__(kind, error, traceback)
        if error is not None:  # also of the caller's source: the server may have failed before
            self._session.pins_server = True


class _HeldUse(Use):
    """A call on a prepared statement or cursor, for which PgBouncer reserves a server connection."""

    __slots__ = ()

    def __enter__(self) -> Use:
        self.session.holds_server = True
        return super().__enter__()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.session.holds_server = False
        super().__exit__(kind, error, traceback)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, what is set back


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
    if not isinstance(query, str):
        return session
    backslashes = "\\" in query and _has_backslash_escapes(connection)
    feature = session_feature(query, args, backslashes=backslashes)
    if feature is not None:
        _refuse(session, feature.name, f"Write {feature.instead}, or use" if feature.instead else "Use")
    return session


def _refuse(session: Session, what: str, use: str = "Use") -> NoReturn:
    raise PooledHostError(
        f"{what} needs a session of its own, and {session.host} may run each transaction in another session. "
        f"{use} {direct_host(session.endpoint)}."
    )


def _has_backslash_escapes(connection: Any) -> bool:
    """Return whether the server reads backslashes as escapes in every string."""
    return getattr(connection.get_settings(), "standard_conforming_strings", "on") == "off"


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
