"""The class that our connections are of: asyncpg's, with calls that end in time and a reset that cleans everything.

`connect()` and a pool return the same class. A caller's own `connection_class` stands in front of it, so that the
caller's overrides run first and reach ours through `super()`.

Knows neither how connections are made nor pools.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

import asyncpg

from .._config.literals import IsolationLevel
from .._errors import ConfigurationError
from .healing import HealedStatements, once
from .holder import (
    CallersError,
    ConnectionHooks,
    RecordT,
    Use,
    give_up,
    is_given_up,
    is_initialized,
    own_session,
    prepare_cached,
    protocol_of,
    session_of,
)
from .progress import bounded, run_many
from .resources import PreparedStatement, adopt_factory, adopt_statement
from .session import Codec
from .transaction import Transaction

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    from .._wire.report import TLSReport
    from .signatures import (
        CopyFromTableOptions,
        CopyOptions,
        CopyRecordsOptions,
        CopyToTableOptions,
        Output,
        Rows,
        Source,
    )


class Connection(HealedStatements[RecordT]):
    """One verified connection, from `connect()` or from a pool. It does all that asyncpg's does.

    Three things differ from asyncpg. `transaction()` blocks end in bounded time. One cancellation or `timeout=` ends
    `executemany()`, `fetchmany()` and COPY to the server, and the connection is terminated where the call cannot end
    cleanly. `reset()` also resets the role, temporary tables and the caches of sequences, still in one round trip.
    """

    __slots__ = ()

    def transaction(
        self,
        *,
        isolation: IsolationLevel | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        role: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Transaction:
        """Return a transaction or savepoint block, for `async with`.

        BEGIN or SAVEPOINT, the role and the settings travel with the first statement and cost no round trip. What the
        server refuses of them is raised by that statement, which has not run then.

        Leaving the block commits. Where a statement had failed and its error was suppressed, the server rolls back and
        `TransactionAbortedError` is raised: put a statement that may fail into a block of its own.

        Args:
            isolation: `read_uncommitted`, `read_committed`, `repeatable_read` or `serializable`. Default: the server's.
            readonly: Whether the transaction is READ ONLY.
            deferrable: Whether the transaction is DEFERRABLE.
            role: The role for this transaction (`SET LOCAL ROLE`), for row-level security. Default: the session's.
            settings: Settings for this transaction by name (`set_config(name, value, true)`), such as the claims that
                policies of row-level security read. Default: none.

        Raises:
            ConfigurationError: `role` or `settings` is not valid, or this is a nested block and has any.
            asyncpg.InterfaceError: The connection is closed.
        """
        super().transaction()  # raises where the connection is closed
        return Transaction(self, isolation, readonly, deferrable, role, settings)

    def check_search_path(self, search_path: object) -> None:
        """Raise an error where a transaction with this `search_path` could leave something in the session."""

    def get_reset_query(self) -> str:
        """Return the SQL that `reset()` sends: it cleans everything, and restores what the pool's `init` set up."""
        protocol = protocol_of(self)
        return own_session(self).reset_query if protocol is None else protocol.reset_query

    async def set_type_codec(
        self,
        typename: str,
        *,
        schema: str = "public",
        encoder: Callable[[Any], Any],
        decoder: Callable[[Any], Any],
        format: Literal["text", "binary", "tuple"] = "text",  # type: ignore[override]  # noqa: A002
    ) -> None:
        """Set an encoder and a decoder for a type, as asyncpg does. At the end of a loan that is undone."""
        options: Any = {"encoder": encoder, "decoder": decoder, "format": format}
        await super().set_type_codec(typename, schema=schema, **options)
        own_session(self).codecs[schema, typename] = Codec("set_type_codec", options)

    async def set_builtin_type_codec(
        self,
        typename: str,
        *,
        schema: str = "public",
        codec_name: str,
        format: Literal["text", "binary"] | None = None,  # type: ignore[override]  # noqa: A002
    ) -> None:
        """Set a built-in codec for a type, as asyncpg does. At the end of a loan that is undone."""
        options: Any = {"codec_name": codec_name, "format": format}
        await super().set_builtin_type_codec(typename, schema=schema, **options)
        own_session(self).codecs[schema, typename] = Codec("set_builtin_type_codec", options)

    async def reset_type_codec(self, typename: str, *, schema: str = "public") -> None:
        """Reset the codec of a type to the default, as asyncpg does. At the end of a loan that is undone."""
        await super().reset_type_codec(typename, schema=schema)
        own_session(self).codecs.pop((schema, typename), None)

    if not TYPE_CHECKING:  # `signatures` has the types, which depend on `record_class`

        async def prepare(self, query, **options):
            """Return a prepared statement, as asyncpg does. It cannot be used after the loan of the connection."""
            return adopt_statement(await super().prepare(query, **options))

        def cursor(self, query, *args, **options):
            """Return a cursor factory, as asyncpg does. It cannot be used after the loan of the connection."""
            return adopt_factory(super().cursor(query, *args, **options))

        async def fetchmany(self, query, args, *, timeout=None, **options):
            """Run `query` for each sequence of arguments and return the rows, as asyncpg does; see `executemany()`."""
            call = functools.partial(super().fetchmany, query, once(args), **options)
            return await run_many(self, lambda seconds: call(timeout=seconds), timeout)

    async def prepare_cached(self, query: str) -> PreparedStatement[RecordT]:
        """Return a prepared statement as `prepare()` does, from the cache that `fetch()` and the others use.

        `prepare()` asks the server each time, and has it forget the statement afterwards. A cached one serves later
        loans, too.

        Args:
            query: The text of the statement.
        """
        statement: PreparedStatement[RecordT] = adopt_statement(await prepare_cached(self, query))
        return statement

    def use_of(self, resource: object) -> Use:
        """Return a call on a prepared statement, a cursor or a transaction of this connection."""
        return Use(self, resource)

    async def executemany(self, command: str, args: Rows, *, timeout: float | None = None) -> None:
        """Run `command` for each sequence of arguments, as asyncpg does; one cancellation ends it.

        Args:
            command: The text of the statement.
            args: The sequences of arguments.
            timeout: Seconds for the whole call. Default: none; it ends when nothing moves for `command_timeout`.

        Raises:
            QueryTimeoutError: The time is over.
        """
        call = functools.partial(super().executemany, command, once(args))
        await run_many(self, lambda seconds: call(timeout=seconds), timeout)

    async def copy_from_query(
        self, query: str, *args: object, output: Output, timeout: float | None = None, **options: Unpack[CopyOptions]
    ) -> str:
        """Copy the rows of a query, as asyncpg does; see `copy_to_table()` for its time."""
        call = super().copy_from_query
        async with bounded(self, timeout) as (progress, seconds):
            return await call(query, *args, output=progress.of_sink(output), timeout=seconds, **options)

    async def copy_from_table(
        self,
        table_name: str,
        *,
        output: Output,
        timeout: float | None = None,
        **options: Unpack[CopyFromTableOptions],
    ) -> str:
        """Copy the rows of a table, as asyncpg does; see `copy_to_table()` for its time."""
        call = super().copy_from_table
        async with bounded(self, timeout) as (progress, seconds):
            return await call(table_name, output=progress.of_sink(output), timeout=seconds, **options)

    async def copy_to_table(
        self, table_name: str, *, source: Source, timeout: float | None = None, **options: Unpack[CopyToTableOptions]
    ) -> str:
        """Copy data to a table, as asyncpg does; `timeout` ends it whatever it waits for.

        Args:
            table_name: The name of the table.
            source: What to read from.
            timeout: Seconds for the whole call. Default: none; it ends when nothing moves for `command_timeout`, not
                counting the time that an asynchronous source or sink takes.
            **options: As for asyncpg.

        Raises:
            QueryTimeoutError: The time is over.
        """
        call = super().copy_to_table
        async with bounded(self, timeout) as (progress, seconds):
            return await call(table_name, source=progress.of_source(source), timeout=seconds, **options)

    async def copy_records_to_table(
        self,
        table_name: str,
        *,
        records: Rows | AsyncIterable[Sequence[object]],
        timeout: float | None = None,
        **options: Unpack[CopyRecordsOptions],
    ) -> str:
        """Copy records to a table, as asyncpg does; see `copy_to_table()` for its time."""
        call = super().copy_records_to_table
        async with bounded(self, timeout) as (progress, seconds):
            return await call(table_name, records=progress.of_source(records), timeout=seconds, **options)


def connection_tls_report(connection: asyncpg.Connection[Any] | PoolConnectionProxy[Any]) -> TLSReport:
    """Return the result of the TLS handshake of `connection`.

    Args:
        connection: An open connection from `connect()`, or one that is acquired from a pool.

    Raises:
        ConfigurationError: The connection was not made by neon-async, or has been released to its pool.
    """
    session = session_of(connection)
    if session is None:
        raise ConfigurationError("This is not an open connection of neon-async. Pass one while it is acquired.")
    return session.tls_report()


def combine(base: type[Any], ours: type[Connection[Any]]) -> type[Any]:
    """Return the class of connections that are of the caller's class `base` and behave as `ours` does.

    The caller's class stands in front: its overrides run first, with its own defaults, and `super()` reaches ours.

    Args:
        base: asyncpg's class or a subclass of it.
        ours: `Connection` or a subclass of it.

    Raises:
        ConfigurationError: `base` cannot have a subclass.
    """
    if issubclass(ours, base):
        return ours
    if issubclass(base, ours) and _definer(cast(Any, base), "__init__") in (ConnectionHooks, *_guarded):
        return base
    try:
        return _combined(cast(Any, base), ours)
    except Exception as error:
        raise ConfigurationError(
            f"connection_class={base.__qualname__} cannot be used, because making a subclass of it failed "
            f"({type(error).__name__}: {error}). Check its __init_subclass__() and its metaclass."
        ) from error


# The classes whose `__init__()` raises `CallersError` for an error of the caller's.
_guarded: weakref.WeakSet[type[Any]] = weakref.WeakSet()


@functools.lru_cache(maxsize=64)  # so that connections of one pair are of one class
def _combined(base: Any, ours: Any) -> type[Any]:
    class Combined(base, ours):  # type: ignore[misc]
        __slots__ = ()
        __module__ = base.__module__
        __doc__ = base.__doc__

        def __init__(self, *args: Any, **options: Any) -> None:
            try:
                super().__init__(*args, **options)
            except Exception as error:
                if is_given_up(self):  # by ours: asyncpg cannot read what the server sent
                    raise
                give_up(self)
                raise CallersError(error) from None
            if not is_initialized(self):
                give_up(self)
                raise CallersError(
                    ConfigurationError(
                        f"connection_class={base.__qualname__} has an __init__() that does not call "
                        "super().__init__(). Call it with all the arguments."
                    )
                )

    _guarded.add(Combined)
    Combined.__name__, Combined.__qualname__ = base.__name__, base.__qualname__  # for `repr` and messages
    return Combined


def resets_itself(connection: object) -> bool:
    """Return whether the caller's class has a `reset()` of its own, which may do anything."""
    return _definer(cast(Any, type(connection)), "reset") is not asyncpg.Connection


def has_own_reset_query(connection: object) -> bool:
    """Return whether the caller's class has a `get_reset_query()` of its own."""
    return _definer(cast(Any, type(connection)), "get_reset_query") is not Connection


@functools.lru_cache(maxsize=64)
def _definer(cls: Any, method: str) -> Any:
    # By the class that has it, not by the function, which a tracer may have replaced.
    return next(base for base in cls.__mro__ if method in vars(base))
