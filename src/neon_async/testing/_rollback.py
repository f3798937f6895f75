"""A connection inside a transaction that is never committed, on which code runs as if each block were committed.

Its blocks are savepoints, and each statement outside of a block has one of its own: what fails rolls back itself and
nothing else, as in production. This module must not know pools.
"""

# No `from __future__ import annotations`: see `_pool/options.py`.

import contextlib
import functools
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from .._driver.connection import Connection
from .._driver.holder import protocol_of, send
from .._driver.losses import aborted_error
from .._driver.transaction import STALE_STATEMENT, Transaction, claims_of
from .._errors import ConfigurationError, ConnectionLostError
from .._neon.quoting import quote

_T = TypeVar("_T")

# Statements that would end the transaction around the test. Any other place of them in a text is found afterwards.
_TRANSACTION_CONTROL = re.compile(
    r"\s*(BEGIN|START\s+TRANSACTION|COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK(?!\s+(\w+\s+)?TO\b))\b",
    re.IGNORECASE,
)

# A savepoint at the beginning of each block.
_BEGINNING = "neon_async_block"

# What COMMIT does to deferred constraints: it checks them. Afterwards they are deferred as before.
_CHECK_CONSTRAINTS = """
SAVEPOINT neon_async_check; SET CONSTRAINTS ALL IMMEDIATE;
ROLLBACK TO SAVEPOINT neon_async_check; RELEASE SAVEPOINT neon_async_check
"""


class RollbackConnection(Connection[Any]):
    """A connection of ours whose transactions and statements are savepoints, once `begin_outer()` was called."""

    __slots__ = ("_outer", "block")

    _outer: Transaction | None
    block: "_Block | None"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._outer = self.block = None

    async def begin_outer(self) -> None:
        """Begin the transaction that is never committed."""
        outer = super().transaction()
        await outer.start()
        await send(self, "SELECT 1")  # BEGIN travels with the first statement
        self._outer = outer

    def transaction(
        self,
        *,
        isolation: Any = None,
        readonly: bool = False,
        deferrable: bool = False,
        role: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Transaction:
        """Return a block as `Connection.transaction()` does. The isolation is that of the transaction around it."""
        if self._outer is None:
            return super().transaction(
                isolation=isolation, readonly=readonly, deferrable=deferrable, role=role, settings=settings
            )
        super().transaction(isolation=isolation, readonly=readonly, deferrable=deferrable)  # judges the arguments
        if self.block is None:
            return _Block(self, readonly=readonly, role=role, settings=settings)
        return super().transaction(role=role, settings=settings)

    def is_in_transaction(self) -> bool:
        """Return whether a block is open, as it would be without the transaction around the test."""
        return super().is_in_transaction() if self._outer is None else self.block is not None

    @property
    def has_failed(self) -> bool:
        """Whether the server refuses every statement until a block is rolled back."""
        protocol = protocol_of(self)
        return protocol is not None and protocol.is_in_failed_transaction

    async def reset(self, *, timeout: float | None = None) -> None:
        """Reset the session at the end of a loan, and keep the transaction."""
        if self.block is not None:  # a caller has left it open, and it cannot be used after the loan
            self.block = None
            await send(self, f"ROLLBACK TO SAVEPOINT {_BEGINNING}")
        await send(self, self.get_reset_query())

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if self._outer is not None and _TRANSACTION_CONTROL.match(query):
            raise ConfigurationError(
                f"{query.split()[0].upper()} would end the transaction that neon_rollback rolls back. "
                "Use `async with connection.transaction():`, or neon_pool for a test of this statement."
            )
        return await self._as_committed(functools.partial(super().execute, query, *args, timeout=timeout))

    async def executemany(self, command: str, args: Any, *, timeout: float | None = None, **options: Any) -> Any:
        return await self._as_committed(
            functools.partial(super().executemany, command, args, timeout=timeout, **options)
        )

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().fetch, query, *args, **options))

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().fetchval, query, *args, **options))

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().fetchrow, query, *args, **options))

    async def fetchmany(self, query: str, args: Any, *, timeout: float | None = None, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().fetchmany, query, args, timeout=timeout, **options))

    async def copy_from_query(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().copy_from_query, query, *args, **options))

    async def copy_from_table(self, table_name: str, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().copy_from_table, table_name, **options))

    async def copy_to_table(self, table_name: str, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().copy_to_table, table_name, **options))

    async def copy_records_to_table(self, table_name: str, **options: Any) -> Any:
        return await self._as_committed(functools.partial(super().copy_records_to_table, table_name, **options))

    async def _as_committed(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Run one statement. Outside of a block it is committed or rolled back on its own.

        Raises:
            ConfigurationError: The statement has ended the transaction around the test.
        """
        if self._outer is None or self.block is not None:
            return await call()
        try:
            return await self._in_block(call)
        except STALE_STATEMENT:  # it has aborted the savepoint, and could not be healed in there
            return await self._in_block(call)

    async def _in_block(self, call: Callable[[], Awaitable[_T]]) -> _T:
        async with self.transaction():
            result = await call()
            self._require_outer()
        return result

    def _require_outer(self) -> None:
        if not self.is_closed() and not super().is_in_transaction():
            self.terminate()
            raise ConfigurationError(
                "A statement ended the transaction that neon_rollback rolls back, and what was written before it may "
                "be committed. Leave COMMIT and ROLLBACK out of it, or use neon_pool for this test."
            )


class _Left(Exception):
    """A block is left without COMMIT; never raised."""


class _Block(Transaction):
    """A savepoint that does what a transaction does: it has a role and settings, and its COMMIT checks constraints."""

    __slots__ = ("_before", "_claims", "_home", "_names")

    def __init__(
        self, connection: RollbackConnection, *, readonly: bool, role: str | None, settings: Mapping[str, str] | None
    ) -> None:
        super().__init__(connection, None, readonly)
        self._home = connection
        self._claims = [*(["SET TRANSACTION READ ONLY"] if readonly else []), *claims_of(role, settings)]
        self._names = [*(["role"] if role is not None else []), *(settings or {})]
        self._before: list[str | None] = []

    async def start(self) -> None:
        """Begin the block, with its role and settings."""
        self._home.block = self
        try:
            await super().start()
        except BaseException:
            self._home.block = None
            raise
        try:
            if self._names:
                query = f"SELECT {', '.join(f'current_setting({quote(name)}, true)' for name in self._names)}"
                self._before = list(await self._home.fetchrow(query))
            await send(self._home, "; ".join([f"SAVEPOINT {_BEGINNING}", *self._claims]))
        except BaseException as error:
            await super().__aexit__(type(error), error, error.__traceback__)
            self._home.block = None
            raise

    async def commit(self) -> None:
        """Keep what the block has written, until the test ends. After a failed statement, roll back as COMMIT does."""
        if self._home.has_failed:
            await self.rollback()
            raise aborted_error()
        try:
            await self._check_constraints()
        except BaseException:
            await self.rollback()
            raise
        with self._ending():
            await super().commit()
        await self._restore()

    async def rollback(self) -> None:
        """Roll the block back."""
        with self._ending():
            await super().rollback()

    async def _give_up(self) -> None:
        """Roll the block back in place of COMMIT."""
        with self._ending():
            await super().__aexit__(_Left, _Left(), None)

    async def __aexit__(self, extype: object, ex: Any, tb: object) -> None:
        if ex is not None:
            with self._ending():
                await super().__aexit__(extype, ex, tb)
            return
        if self._home.has_failed:
            await self._give_up()
            raise aborted_error()
        try:
            await self._check_constraints()
        except BaseException:
            await self._give_up()
            raise
        with self._ending():
            await super().__aexit__(None, None, None)
        await self._restore()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._home.block is self:
                self._home.block = None

    async def _check_constraints(self) -> None:
        if not self._home.is_closed():
            await send(self._home, _CHECK_CONSTRAINTS)

    async def _restore(self) -> None:
        """Set what was local to the block back, because the transaction around it continues."""
        if self._before:
            values = zip(self._names, self._before, strict=True)
            calls = [f"set_config({quote(name)}, {quote(value or '')}, true)" for name, value in values]
            with contextlib.suppress(ConnectionLostError):  # the next call says so
                await send(self._home, f"SELECT {', '.join(calls)}")
