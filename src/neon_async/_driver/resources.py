"""Prepared statements and cursors as our connections hand them out: a call on one belongs to the loan it came from.

asyncpg checks the loan when a method is called (`guarded`). These check it again when the coroutine starts to run, so
that one that was created during a loan and awaited after it does not reach the next caller's session. Knows no pools.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any

from asyncpg import cursor, prepared_stmt
from asyncpg.connresource import guarded

from .healing import once
from .holder import ResourceHooks, open_resource, use_of
from .progress import run_many


class PreparedStatement(ResourceHooks, prepared_stmt.PreparedStatement):
    """asyncpg's prepared statement."""

    __slots__ = ()

    @guarded
    async def explain(self, *args: Any, **options: Any) -> Any:
        """Return the execution plan, as asyncpg does."""
        with use_of(self):
            return await super().explain(*args, **options)

    @guarded
    async def fetch(self, *args: Any, **options: Any) -> Any:
        """Return all rows, as asyncpg does."""
        with use_of(self) as use:
            return await use.connection.run_prepared(self, super().fetch, args, options)

    @guarded
    async def fetchval(self, *args: Any, **options: Any) -> Any:
        """Return one value, as asyncpg does."""
        with use_of(self) as use:
            return await use.connection.run_prepared(self, super().fetchval, args, options)

    @guarded
    async def fetchrow(self, *args: Any, **options: Any) -> Any:
        """Return one row, as asyncpg does."""
        with use_of(self) as use:
            return await use.connection.run_prepared(self, super().fetchrow, args, options)

    @guarded
    async def fetchmany(self, args: Any, *, timeout: float | None = None) -> Any:
        """Return the rows of all runs, as asyncpg does; see `Connection.executemany()` for its time."""
        with use_of(self) as use:
            run = functools.partial(use.connection.run_prepared, self, super().fetchmany, [once(args)])
            return await run_many(use.connection, lambda seconds: run({"timeout": seconds}), timeout)

    @guarded
    async def executemany(self, args: Any, *, timeout: float | None = None) -> Any:
        """Execute the statement for each sequence of arguments, as asyncpg does; see `Connection.executemany()`."""
        with use_of(self) as use:
            run = functools.partial(use.connection.run_prepared, self, super().executemany, [once(args)])
            return await run_many(use.connection, lambda seconds: run({"timeout": seconds}), timeout)

    def cursor(self, *args: Any, **options: Any) -> Any:
        """Return a cursor factory, as asyncpg does."""
        return adopt_factory(super().cursor(*args, **options))


class CursorFactory(ResourceHooks, cursor.CursorFactory):
    """asyncpg's cursor factory."""

    __slots__ = ()

    def __aiter__(self) -> Any:
        return CursorIterator(super().__aiter__())

    def __await__(self) -> Generator[Any, None, Any]:
        with use_of(self) as use:
            try:
                return Cursor((yield from super().__await__()))
            except Exception as error:
                use.connection.note_failure(self, error)
                raise


# asyncpg's cursors keep their classes inside: tracers compare them.


class CursorIterator:
    """The rows of a cursor."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __repr__(self) -> str:
        return repr(self._rows)

    def __aiter__(self) -> CursorIterator:
        return self

    async def __anext__(self) -> Any:
        with use_of(open_resource(self._rows)) as use:
            try:
                return await self._rows.__anext__()
            except StopAsyncIteration:
                raise
            except Exception as error:
                use.connection.note_failure(self._rows, error)
                raise


class Cursor:
    """An open cursor."""

    __slots__ = ("_opened",)

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def __repr__(self) -> str:
        return repr(self._opened)

    async def fetch(self, n: int, *, timeout: float | None = None) -> Any:
        """Return the next `n` rows, as asyncpg does."""
        with use_of(open_resource(self._opened)) as use:
            try:
                return await self._opened.fetch(n, timeout=timeout)
            except Exception as error:
                use.connection.note_failure(self._opened, error)
                raise

    async def fetchrow(self, *, timeout: float | None = None) -> Any:
        """Return the next row or None, as asyncpg does."""
        with use_of(open_resource(self._opened)) as use:
            try:
                return await self._opened.fetchrow(timeout=timeout)
            except Exception as error:
                use.connection.note_failure(self._opened, error)
                raise

    async def forward(self, n: int, *, timeout: float | None = None) -> Any:
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
