"""The calls on connections and pools as type checkers see them: asyncpg's own are known with asyncpg-stubs only.

Declarations for `if TYPE_CHECKING:`. Everything here behaves as asyncpg documents it.
"""

import os
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import IO, Any, Generic, Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

import asyncpg

from .holder import Record, RecordT
from .resources import CursorFactory, PreparedStatement

OtherT = TypeVar("OtherT", bound=Record)

Rows: TypeAlias = Iterable[Sequence[object]]
Output: TypeAlias = str | os.PathLike[Any] | IO[bytes] | Callable[[bytes], Awaitable[None]]
Source: TypeAlias = str | os.PathLike[Any] | IO[bytes] | AsyncIterable[bytes]
Returned: TypeAlias = Awaitable[None] | Generator[Any] | None

class CopyOptions(TypedDict, total=False):
    format: Literal["text", "csv", "binary"] | None
    oids: int | None
    delimiter: str | None
    null: str | None
    header: bool | None
    quote: str | None
    escape: str | None
    force_quote: bool | Iterable[str] | None
    encoding: str | None

class CopyFromTableOptions(CopyOptions, total=False):
    columns: Iterable[str] | None
    schema_name: str | None

class CopyRecordsOptions(TypedDict, total=False):
    columns: Iterable[str] | None
    schema_name: str | None
    where: str | None

class CopyToTableOptions(CopyFromTableOptions, total=False):
    freeze: bool | None
    force_not_null: bool | Iterable[str] | None
    force_null: bool | Iterable[str] | None
    where: str | None

class Calls(Generic[RecordT]):
    """What both a connection and a pool have."""

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str:
        """Execute one or, without arguments, several statements, and return the status of the last one."""

    @overload
    async def fetch(
        self, query: str, *args: object, timeout: float | None = None, record_class: None = None
    ) -> list[RecordT]:
        """Run a query and return all rows."""

    @overload
    async def fetch(
        self, query: str, *args: object, timeout: float | None = None, record_class: type[OtherT]
    ) -> list[OtherT]: ...
    @overload
    async def fetch(
        self, query: str, *args: object, timeout: float | None = None, record_class: type[OtherT] | None
    ) -> list[RecordT] | list[OtherT]: ...
    @overload
    async def fetchrow(
        self, query: str, *args: object, timeout: float | None = None, record_class: None = None
    ) -> RecordT | None:
        """Run a query and return the first row, or None."""

    @overload
    async def fetchrow(
        self, query: str, *args: object, timeout: float | None = None, record_class: type[OtherT]
    ) -> OtherT | None: ...
    @overload
    async def fetchrow(
        self, query: str, *args: object, timeout: float | None = None, record_class: type[OtherT] | None
    ) -> RecordT | OtherT | None: ...
    async def fetchval(self, query: str, *args: object, column: int = 0, timeout: float | None = None) -> Any:
        """Run a query and return one value of the first row, or None."""

    @overload
    async def fetchmany(
        self, query: str, args: Iterable[Any], *, timeout: float | None = None, record_class: None = None
    ) -> list[RecordT]:
        """Run a query for each sequence of arguments, all of them or none, and return all rows."""

    @overload
    async def fetchmany(
        self, query: str, args: Iterable[Any], *, timeout: float | None = None, record_class: type[OtherT]
    ) -> list[OtherT]: ...
    @overload
    async def fetchmany(
        self, query: str, args: Iterable[Any], *, timeout: float | None = None, record_class: type[OtherT] | None
    ) -> list[RecordT | OtherT]: ...
    async def copy_from_table(
        self,
        table_name: str,
        *,
        output: Output,
        timeout: float | None = None,
        **options: Unpack[CopyFromTableOptions],
    ) -> str:
        """Copy the rows of a table to a file, a path or an async function, and return the status."""

    async def copy_from_query(
        self, query: str, *args: object, output: Output, timeout: float | None = None, **options: Unpack[CopyOptions]
    ) -> str:
        """Copy the rows of a query to a file, a path or an async function, and return the status."""

    async def copy_to_table(
        self, table_name: str, *, source: Source, timeout: float | None = None, **options: Unpack[CopyToTableOptions]
    ) -> str:
        """Copy data from a file, a path or an async iterable to a table, and return the status."""

    async def copy_records_to_table(
        self,
        table_name: str,
        *,
        records: Rows | AsyncIterable[Sequence[object]],
        timeout: float | None = None,
        **options: Unpack[CopyRecordsOptions],
    ) -> str:
        """Copy sequences of values to a table, and return the status."""

class ConnectionCalls(Calls[RecordT], asyncpg.Connection[RecordT]):
    """asyncpg's connection."""

    async def executemany(self, command: str, args: Rows, *, timeout: float | None = None) -> None:
        """Execute a statement for each sequence of arguments, all of them or none."""

    @overload
    async def prepare(
        self, query: str, *, name: str | None = None, timeout: float | None = None, record_class: None = None
    ) -> PreparedStatement[RecordT]:
        """Return a prepared statement. It cannot be used after the loan of the connection."""

    @overload
    async def prepare(
        self, query: str, *, name: str | None = None, timeout: float | None = None, record_class: type[OtherT]
    ) -> PreparedStatement[OtherT]: ...
    @overload
    async def prepare(
        self, query: str, *, name: str | None = None, timeout: float | None = None, record_class: type[OtherT] | None
    ) -> PreparedStatement[RecordT] | PreparedStatement[OtherT]: ...
    @overload
    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: None = None,
    ) -> CursorFactory[RecordT]:
        """Return a cursor, for `async for` or `await`, in a transaction. It cannot be used after the loan."""

    @overload
    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: type[OtherT],
    ) -> CursorFactory[OtherT]: ...
    @overload
    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: type[OtherT] | None,
    ) -> CursorFactory[RecordT] | CursorFactory[OtherT]: ...
    async def add_listener(self, channel: str, callback: Callable[[Any, int, str, Any], Returned]) -> None:
        """Listen on a channel and call `callback(connection, pid, channel, payload)` for each notification."""

    async def remove_listener(self, channel: str, callback: Callable[[Any, int, str, Any], Returned]) -> None:
        """Remove a listener."""

    def add_termination_listener(self, callback: Callable[[Any], Returned]) -> None:
        """Call `callback(connection)` when the connection ends."""

    def remove_termination_listener(self, callback: Callable[[Any], Returned]) -> None:
        """Remove a listener."""

    def remove_log_listener(self, callback: Callable[[Any, Any], Returned]) -> None:
        """Remove a listener."""

    def add_query_logger(self, callback: Callable[[Any], Returned]) -> None:
        """Call `callback(record)` after each query."""

    def remove_query_logger(self, callback: Callable[[Any], Returned]) -> None:
        """Remove a logger."""

    @contextmanager
    def query_logger(self, callback: Callable[[Any], Returned]) -> Generator[None]:
        """Call `callback(record)` after each query in the block."""

    def get_server_pid(self) -> int:
        """Return the process id of the session on the server."""

    def is_in_transaction(self) -> bool:
        """Return whether a transaction is open."""

    def is_closed(self) -> bool:
        """Return whether the connection has ended."""

    async def reset(self, *, timeout: float | None = None) -> None:
        """Reset the session to what it was at its start."""

    async def reload_schema_state(self) -> None:
        """Forget what is known of types and statements."""

class PoolCalls(Calls[RecordT], asyncpg.Pool[RecordT]):
    """asyncpg's pool."""

    async def executemany(self, command: str, args: Rows, *, timeout: float | None = None) -> None:  # type: ignore[override]
        """Execute a statement for each sequence of arguments, all of them or none."""

    def get_size(self) -> int:
        """Return the number of open connections."""

    def get_min_size(self) -> int:
        """Return `min_size`."""

    def get_max_size(self) -> int:
        """Return `max_size`."""

    def get_idle_size(self) -> int:
        """Return the number of open connections that no caller has."""

    async def __aexit__(self, *_: object) -> None:
        """Close the pool."""
