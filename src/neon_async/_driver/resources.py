"""Prepared statements and cursors as our connections hand them out: a call on one belongs to the loan it came from.

asyncpg checks the loan when a method is called (`guarded`). These check it again when the coroutine starts to run, so
that one that was created during a loan and awaited after it does not reach the next caller's session. Knows no pools.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self

from asyncpg import cursor, prepared_stmt

from .healing import once
from .holder import CursorHooks, RecordT, ResourceHooks, Subscriptable, guarded, open_resource, use_of
from .progress import run_many

if TYPE_CHECKING:  # generic in any case: without asyncpg-stubs nothing is known of asyncpg's classes

    class _Statement(prepared_stmt.PreparedStatement[RecordT], Generic[RecordT]):
        def get_name(self) -> str: ...
        def get_query(self) -> str: ...
        def get_statusmsg(self) -> str | None: ...

    class _Factory(cursor.CursorFactory[RecordT], Generic[RecordT]): ...

    # To callers ours are what they wrap.
    class _Iterator(cursor.CursorIterator[RecordT], Generic[RecordT]): ...

    class _Cursor(cursor.Cursor[RecordT], Generic[RecordT]): ...
else:
    _Statement, _Factory = Subscriptable(prepared_stmt.PreparedStatement), Subscriptable(cursor.CursorFactory)
    _Iterator = _Cursor = Subscriptable(object)


class PreparedStatement(ResourceHooks, _Statement[RecordT]):
    """asyncpg's prepared statement."""

    __slots__ = ()

    @guarded
    async def explain(self, *args: object, analyze: bool = False) -> Any:
        """Return the execution plan, as asyncpg does."""
        with use_of(self):
            return await super().explain(*args, analyze=analyze)

    @guarded
    async def fetch(self, *args: object, timeout: float | None = None) -> list[RecordT]:
        """Return all rows, as asyncpg does."""
        with use_of(self) as use:
            rows: list[RecordT] = await use.connection.run_prepared(self, super().fetch, args, {"timeout": timeout})
            return rows

    @guarded
    async def fetchval(self, *args: object, column: int = 0, timeout: float | None = None) -> Any:
        """Return one value, as asyncpg does."""
        with use_of(self) as use:
            options = {"column": column, "timeout": timeout}
            return await use.connection.run_prepared(self, super().fetchval, args, options)

    @guarded
    async def fetchrow(self, *args: object, timeout: float | None = None) -> RecordT | None:
        """Return one row, as asyncpg does."""
        with use_of(self) as use:
            row: RecordT | None = await use.connection.run_prepared(self, super().fetchrow, args, {"timeout": timeout})
            return row

    @guarded
    async def fetchmany(self, args: Iterable[Sequence[object]], *, timeout: float | None = None) -> list[RecordT]:
        """Return the rows of all runs, as asyncpg does; see `Connection.executemany()` for its time."""
        with use_of(self) as use:
            run = functools.partial(use.connection.run_prepared, self, super().fetchmany, [once(args)])
            return await run_many(use.connection, lambda seconds: run({"timeout": seconds}), timeout)

    @guarded
    async def executemany(self, args: Iterable[Sequence[object]], *, timeout: float | None = None) -> None:
        """Execute the statement for each sequence of arguments, as asyncpg does; see `Connection.executemany()`."""
        with use_of(self) as use:
            run = functools.partial(use.connection.run_prepared, self, super().executemany, [once(args)])
            await run_many(use.connection, lambda seconds: run({"timeout": seconds}), timeout)

    def cursor(
        self, *args: object, prefetch: int | None = None, timeout: float | None = None
    ) -> CursorFactory[RecordT]:
        """Return a cursor factory, as asyncpg does."""
        factory: CursorFactory[RecordT] = adopt_factory(super().cursor(*args, prefetch=prefetch, timeout=timeout))
        return factory


class CursorFactory(ResourceHooks, _Factory[RecordT]):
    """asyncpg's cursor factory."""

    __slots__ = ()

    def __aiter__(self) -> CursorIterator[RecordT]:
        return CursorIterator(super().__aiter__())

    def __await__(self) -> Generator[Any, None, Cursor[RecordT]]:
        with use_of(self) as use:
            try:
                return Cursor((yield from super().__await__()))
            except Exception as error:
                use.connection.note_failure(self, error)
                raise


# asyncpg's cursors keep their classes inside: tracers compare them.


class CursorIterator(_Iterator[RecordT]):
    """The rows of a cursor."""

    __slots__ = ("_rows",)

    def __init__(self, rows: cursor.CursorIterator[RecordT]) -> None:
        self._rows = rows

    def __repr__(self) -> str:
        return repr(self._rows)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecordT:
        with use_of(open_resource(self._rows)) as use:
            try:
                return await self._rows.__anext__()
            except StopAsyncIteration:
                raise
            except Exception as error:
                use.connection.note_failure(self._rows, error)
                raise


class Cursor(CursorHooks, _Cursor[RecordT]):
    """An open cursor."""

    __slots__ = ("_opened",)

    def __init__(self, opened: cursor.Cursor[RecordT]) -> None:
        self._opened = opened

    def __repr__(self) -> str:
        return repr(self._opened)

    @guarded
    async def fetch(self, n: int, *, timeout: float | None = None) -> list[RecordT]:
        """Return the next `n` rows, as asyncpg does."""
        with use_of(open_resource(self._opened)) as use:
            try:
                return await self._opened.fetch(n, timeout=timeout)
            except Exception as error:
                use.connection.note_failure(self._opened, error)
                raise

    @guarded
    async def fetchrow(self, *, timeout: float | None = None) -> RecordT | None:
        """Return the next row or None, as asyncpg does."""
        with use_of(open_resource(self._opened)) as use:
            try:
                return await self._opened.fetchrow(timeout=timeout)
            except Exception as error:
                use.connection.note_failure(self._opened, error)
                raise

    @guarded
    async def forward(self, n: int, *, timeout: float | None = None) -> int:
        """Skip `n` rows and return how many there were, as asyncpg does."""
        with use_of(open_resource(self._opened)) as use:
            try:
                return await self._opened.forward(n, timeout=timeout)
            except Exception as error:
                use.connection.note_failure(self._opened, error)
                raise


def adopt_statement(statement: Any) -> Any:
    """Return asyncpg's prepared statement as one of ours; one of another class, a caller's own, as it is."""
    return _adopted(statement, prepared_stmt.PreparedStatement, PreparedStatement)


def adopt_factory(factory: Any) -> Any:
    """Return asyncpg's cursor factory as one of ours; one of another class, a caller's own, as it is."""
    return _adopted(factory, cursor.CursorFactory, CursorFactory)


def _adopted(resource: Any, asyncpgs: type[Any], ours: type[Any]) -> Any:
    if type(resource) is asyncpgs:
        resource.__class__ = ours
    return resource
