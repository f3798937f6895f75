"""Prepare and execute statements, and heal those that have become stale within the call.

A statement that is stale is prepared again under another text (see `Healing`) and executed again, where nothing of it
was executed and no transaction was aborted by it, or where the transaction is read-only. Otherwise the error is raised
once, and the next use is healed. Cursors are not healed, because they may have returned rows. `stale.judge()` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import asyncpg

from .._errors import StaleStatementError
from .._text import escape, log
from . import holder
from .holder import RecordT, StatementHooks, own_session, timed_out_call, timeout_of
from .losses import is_server_error
from .session import Session

# The OIDs of types by schema and name.
_TYPES = """
SELECT nspname, typname, t.oid FROM pg_catalog.pg_type AS t JOIN pg_catalog.pg_namespace AS n ON typnamespace = n.oid
WHERE (nspname, typname) IN (SELECT * FROM unnest($1::text[], $2::text[]))
"""


# The names and types of the attributes of composite types, as asyncpg's introspection returns them.
_ATTRIBUTES = """
SELECT reltype, array_agg(attname::text ORDER BY attnum), array_agg(atttypid ORDER BY attnum)
FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_class ON attrelid = pg_class.oid
WHERE reltype = ANY($1::oid[]) AND attnum > 0 AND NOT attisdropped GROUP BY reltype
"""


class HealedStatements(StatementHooks[RecordT]):
    """asyncpg's connection, which heals stale statements."""

    __slots__ = ()

    async def get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:
        """Prepare the text, or take it from the cache; once more where a pooler has an old statement for it."""
        began, session = time.monotonic(), own_session(self)
        if session.heals_seen != session.healing.heals:
            await self._renew_types(session)
        text = _text_of(self, query)
        try:
            return await super().get_statement(text, timeout, **options)
        except (asyncpg.PostgresError, asyncpg.InternalClientError) as error:
            from .stale import is_stale_when_prepared  # only a failure needs it

            if self.is_closed() or not is_stale_when_prepared(error):
                raise
            self.note_stale(query, text)
            if _aborts(self, error):
                raise _as_cached_statement_error(error)  # noqa: B904  it has its cause
        with _second_run(self, timeout, began) as left:
            await self._renew_types(session)
            return await super().get_statement(_text_of(self, query), left, **options)

    async def run_statement(
        self, session: Session, query: str, executor: Any, timeout: float | None, options: Mapping[str, Any]
    ) -> Any:
        """Prepare and execute a text, and once more where it is stale and that does no harm."""
        healing, began, left = session.healing, time.monotonic(), timeout
        # What nearly every statement is: prepared, and not stale. It needs none of what `get_statement()` does.
        is_usual = session.heals_seen == healing.heals and not healing.has_tokens
        state = self.cached_statement(query, options) if is_usual else None
        is_old = state is not None
        try:
            if state is None:
                prepared = holder.prepares(self)
                state = await holder.get_statement(self, query, timeout, options)
                is_old = holder.prepares(self) == prepared
                left = None if timeout is None else timeout - (time.monotonic() - began)
            return await executor(state, left), state
        except TimeoutError as error:
            raise timed_out_call(self, error, began, timeout) from error.__cause__
        except Exception as error:
            if state is None or self.is_closed():
                raise
            async with _within(self, timeout, began):
                await self._allow_second_run(error, query, state, is_old=is_old)
        with _second_run(self, timeout, began) as left:
            began_again = time.monotonic()
            try:
                state = await holder.get_statement(self, query, left, options)
                left = None if left is None else left - (time.monotonic() - began_again)
                return await executor(state, left), state
            except Exception as error:  # noqa: BLE001  of a codec, too
                self._refuse_third_run(error, query, state)

    async def run_prepared(self, statement: Any, method: Callable[..., Awaitable[Any]], args: Any, options: Any) -> Any:
        """Call a method of a prepared statement. A stale one is prepared again, and stays the same object.

        Args:
            statement: The prepared statement.
            method: Its method.
            args: The arguments of the method.
            options: The keyword arguments of the method.
        """
        timeout, began = options.get("timeout"), time.monotonic()
        query, state = holder.query_of(statement), holder.state_of(statement)
        try:
            return await method(*args, **options)
        except Exception as error:
            if self.is_closed() or not holder.has_own_name(state):
                raise
            async with _within(self, timeout, began):
                await self._allow_second_run(error, query, state, is_old=True)
        with _second_run(self, timeout, began) as left:
            own = {"named": bool(state.name), "use_cache": False, "record_class": state.record_class}
            holder.set_state(statement, await holder.get_statement(self, query, left, own))
            if timeout is not None:
                options = {**options, "timeout": timeout - (time.monotonic() - began)}
            try:
                return await method(*args, **options)
            except Exception as error:  # noqa: BLE001  of a codec, too
                self._refuse_third_run(error, query, holder.state_of(statement))

    def note_failure(self, cursor: Any, error: Exception) -> None:
        """Have the text of a cursor prepared again where `error` says that it is stale.

        Raises:
            StaleStatementError: Rows were read that are not as they were described.
        """
        from .stale import Verdict, judge

        state = holder.state_of(cursor)
        verdict = judge(error, lambda: holder.types_of(state) if state else ())
        sent = state.query if state else getattr(error, "query", None)
        if verdict.is_certain and sent is not None:
            self.note_stale(holder.query_of(cursor), sent)
        if verdict is Verdict.MISREAD:
            raise _stale_error(error) from error

    def note_stale(self, query: str, sent: str) -> None:
        """Have `query` prepared again from now on, because it was stale as it was sent."""
        session = own_session(self)
        if session.healing.renew(query, holder.search_path(self), sent):
            log(
                logging.INFO,
                "%(endpoint)s: a prepared statement is stale, the schema has changed; it is prepared again from now on",
                endpoint=session.name,
                event="healed",
            )

    async def _allow_second_run(self, error: Exception, query: str, state: Any, *, is_old: bool) -> None:
        """Return where the statement may be executed once more, and raise what the caller gets otherwise.

        Args:
            error: What the first run raised.
            query: The text of the caller.
            state: asyncpg's state of the statement that was executed.
            is_old: Whether it was prepared before this call.
        """
        from .stale import Verdict, judge

        verdict = Verdict.OTHER if self.is_closed() else judge(error, lambda: holder.types_of(state))
        if verdict is Verdict.OTHER:
            raise error
        is_old = is_old or own_session(self).healing.is_shared
        if isinstance(error, asyncpg.exceptions.OutdatedSchemaCacheError):
            await self.reload_schema_state()
        if _aborts(self, error):
            if verdict.is_certain or is_old:
                self.note_stale(query, state.query)
                own_session(self).suspects_composites = not verdict.is_certain
            raise (_as_cached_statement_error(error) if verdict.is_certain else error)
        if not verdict.is_certain and not (is_old and await self._has_changed(error, query, state)):
            raise error
        self.note_stale(query, state.query)
        if verdict.is_misread and not await self._is_read_only():
            raise _stale_error(error) from error

    def _refuse_third_run(self, error: Exception, query: str, state: Any) -> NoReturn:
        """Raise `error`, which the second run has raised."""
        from .stale import Verdict, judge

        verdict = Verdict.OTHER if state is None or self.is_closed() else judge(error, lambda: holder.types_of(state))
        if verdict.is_certain:
            self.note_stale(query, state.query)
        if verdict is Verdict.MISREAD:
            raise _stale_error(error) from error
        raise error

    async def _has_changed(self, error: Exception, query: str, state: Any) -> bool:
        """Return whether the server describes the text otherwise than when it was prepared.

        A pooler does not share statements without a name.
        """
        try:
            fresh = await super().get_statement(query, None, named=False, use_cache=False)
        except asyncpg.PostgresError as failure:
            raise failure from error  # the text itself is wrong by now
        if holder.description_of(fresh) != holder.description_of(state):
            return True
        if await self._reload_changed_composites():
            return True
        if not self.is_in_transaction():
            await holder.send(self, "SELECT 1")  # a prepare keeps its locks on tables until something is executed
        return False

    async def _reload_changed_composites(self) -> bool:
        """Have asyncpg forget its types if a composite type has other attributes by now; its OID stays the same."""
        known = own_session(self).composites
        rows = await holder.fetch(self, _ATTRIBUTES, list(known)) if known else []
        changed = any((names, types) != known[oid] for oid, names, types in rows)
        if changed:
            await self.reload_schema_state()
        own_session(self).suspects_composites = False
        return changed

    async def _renew_types(self, session: Session) -> None:
        """Have asyncpg know the types of now, where a statement of the pool has been healed since the last time."""
        seen, session.heals_seen = session.heals_seen, session.healing.heals  # what is prepared in here does not wait
        try:
            if session.suspects_composites:
                await self._reload_changed_composites()
            await self._renew_codecs(session)
        except BaseException:
            session.heals_seen = seen
            raise

    async def _renew_codecs(self, session: Session) -> None:
        """Register the type codecs of the caller again for types that were created again: asyncpg knows OIDs only."""
        names = [name for name in session.codecs if name[0] != "pg_catalog"]
        if not names:
            return
        for schema, name, oid in await holder.fetch(self, _TYPES, *map(list, zip(*names, strict=True))):
            if not holder.has_own_codec(self, oid):
                codec = session.codecs[schema, name]
                with holder.between_calls(self):
                    await getattr(super(), codec.method)(name, schema=schema, **codec.options)

    async def _is_read_only(self) -> bool:
        rows = await holder.fetch(self, "SELECT current_setting('transaction_read_only') = 'on'")
        return bool(rows[0][0])


def _text_of(connection: Any, query: str) -> str:
    """Return the text that is sent for `query`."""
    healing = own_session(connection).healing
    return healing.text_of(query, holder.search_path(connection)) if healing.has_tokens else query


def _aborts(connection: Any, error: Exception) -> bool:
    """Return whether an error of the server has aborted a transaction of the caller."""
    return is_server_error(error) and bool(connection.is_in_transaction())


@contextlib.asynccontextmanager
async def _within(connection: Any, timeout: float | None, began: float) -> AsyncIterator[None]:
    """Bound what comes between the two runs of a call that began at `began`."""
    try:
        async with asyncio.timeout(_left(connection, timeout, began)):
            yield
    except TimeoutError as error:
        raise timed_out_call(connection, error, began, timeout) from error.__cause__


@contextlib.contextmanager
def _second_run(connection: Any, timeout: float | None, began: float) -> Iterator[float | None]:
    """The second run of a statement: yield its share of the timeout, and count its time.

    Args:
        connection: The connection that the statement runs on.
        timeout: Seconds for both runs together. Default: the connection's `command_timeout`.
        began: When the first run began.
    """
    healing, begins = own_session(connection).healing, time.monotonic()
    try:
        yield _left(connection, timeout, began)
    except TimeoutError as error:
        raise timed_out_call(connection, error, began, timeout) from error.__cause__
    finally:
        healing.seconds += time.monotonic() - begins


def _left(connection: Any, timeout: float | None, began: float) -> float | None:
    """Return the seconds that are left of the timeout of a call, or of the connection's `command_timeout`."""
    limit = timeout_of(connection, timeout)
    return None if limit is None else limit - (time.monotonic() - began)


def _as_cached_statement_error(error: Exception) -> Exception:
    """Return an error of the server as the one that callers know of a stale statement."""
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return error
    failure = asyncpg.InvalidCachedStatementError(
        f"A prepared statement is stale: {_reason_of(error)}. The transaction is aborted, and the statement is "
        "prepared again from now on: run the transaction again."
    )
    failure.__cause__ = error
    return failure


def _stale_error(error: Exception) -> StaleStatementError:
    return StaleStatementError(
        f"The statement was executed, and its rows could not be read: they are not as they were when it was prepared "
        f"({_reason_of(error)}). It is prepared again from now on: call again, if it may be executed twice."
    )


def _reason_of(error: Exception) -> str:
    return escape(str(error.args[0] if error.args else error))


class Once:
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


def once(rows: Iterable[Any]) -> Iterable[Any]:
    """Return `rows` such that a second run does not write a part of them."""
    return Once(rows) if isinstance(rows, Iterator) else rows
