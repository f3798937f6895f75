"""What a connection does differently from asyncpg's: the class that a pool's connections are of.

On every host its transactions end in bounded time. On a pooled host (`-pooler`, PgBouncer in transaction mode) it
refuses what only a session can give, and heals cached plans after DDL. It knows neither slots nor how connections are
made.

Healing: PgBouncer shares prepared statements among clients by their text, and a server connection that prepared a text
before the DDL answers "cached plan must not change result type" for ever, however often a client prepares it anew. So
the pool changes its texts: from then on a comment stands behind every query that is prepared. It is random, for another
process may have healed with a comment of its own before, and its texts may be stale again. It stands at the end, for
pg_hint_plan reads the first comment; at the end of a `--` comment it is part of that, and still makes another text.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar, cast

import asyncpg
from asyncpg.cursor import CursorFactory, CursorIterator
from asyncpg.prepared_stmt import PreparedStatement

from .._errors import PooledHostError
from .._neon.endpoint import Endpoint
from .._neon.sql import prepare, session_feature
from .transaction import Transaction

_C = TypeVar("_C", bound="asyncpg.Connection[Any]")
_T = TypeVar("_T")

_log = logging.getLogger("neon_async")


class Healing:
    """What the connections of one pool share about stale plans.

    `token`: the comment behind every prepared query, '' until the first stale plan. `heals`: how often it was renewed.
    `seconds`: the time that calls took to run once more, in total.
    """

    __slots__ = ("heals", "seconds", "token")

    def __init__(self) -> None:
        self.token = ""
        self.heals = 0
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"<Healing {self.heals} heals in {self.seconds:.3f} s>"

    def renew(self, stale: str | None = None) -> bool:
        """Change the text of every query that is prepared from now on, and tell whether that was needed.

        `stale`: the text that was refused, as it was sent, or the end of it; None where nobody knows. Calls fail
        together, and late ones were sent with a token that has been renewed already: one renewal serves them all.
        """
        if stale is not None and not stale.endswith(self.token):
            return False
        self.token = f" /* neon-async {secrets.token_hex(4)} */"
        self.heals += 1
        return True


def session_class(base: type[_C], *, endpoint: Endpoint | None, host: str, healing: Healing) -> type[_C]:
    """Return the subclass of `base` that connections to `host` are of.

    On every host its `transaction()` is ours, and its calls that send many rows end at their deadline, or when they are
    cancelled, where asyncpg's do not.

    `base`: the caller's connection class. `endpoint`: what `host` says, or None where it is not Neon's. `healing`: the
    pool's own.

    On a direct host `reset()` also clears a role, temporary tables and the sequences' caches, in the same flight.

    On a pooled host, the methods that take SQL raise `PooledHostError` for LISTEN, session advisory locks and settings
    that PgBouncer does not track, and `reset()` ends what is open and no more. A stale plan is healed within the
    call outside a transaction; then `timeout=` is for the whole call, and `command_timeout` for each of two attempts.
    Inside a transaction, from a prepared statement or a cursor, and as asyncpg's `ProtocolError`, which comes when a
    query has been executed but its rows are not as asyncpg knew them, the error passes, and what is prepared next is
    healed; a statement object that was prepared before the DDL stays stale.
    """
    base = _subclass(base, _bounded_methods(base))
    methods: dict[str, Any] = {}
    if endpoint is not None and endpoint.pooled:
        prepare()
        methods |= _pooled_methods(base, _Pooled(host, endpoint, healing))
    elif base.get_reset_query is asyncpg.Connection.get_reset_query:  # a caller's own class knows better
        methods["get_reset_query"] = _get_reset_query
    final = _subclass(base, methods)
    return _subclass(final, {name: _of_one_loan(getattr(final, name)) for name in _CALLS})


# asyncpg's coroutines that a caller may have begun to call when the connection is taken back.
_CALLS = (
    *("execute", "executemany", "fetch", "fetchval", "fetchrow", "fetchmany", "prepare"),
    *("copy_from_table", "copy_from_query", "copy_to_table", "copy_records_to_table"),
    *("add_listener", "remove_listener", "set_type_codec", "reset_type_codec", "set_builtin_type_codec"),
)


def _of_one_loan(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `method` such that a call made in one loan, and not yet begun, does not run in the next one's session."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        return _begin(method, self, self._pool_release_ctr, args, keywords)

    return call


async def _begin(method: Callable[..., Any], self: Any, loan: int, args: Any, keywords: Any) -> Any:
    if self._pool_release_ctr != loan:
        raise asyncpg.InterfaceError(
            f"cannot call Connection.{method.__name__}(): connection has been released back to the pool"
        )
    return await method(self, *args, **keywords)


def is_unfinished(connection: object) -> bool:
    """Tell whether PgBouncer may still hold a server session for this client although no transaction is open.

    Any statement ends that; `get_reset_query()` returns one. On direct hosts, where the reset does, this is False.
    """
    return bool(getattr(connection, "_unfinished", False))


# What RESET ALL leaves behind and the next caller would meet, in one flight: a role, temporary tables, the sequences'
# caches. Not DISCARD ALL, which would take asyncpg's prepared statements away.
_RESET = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_advisory_unlock_all(); "
    "DISCARD TEMP; DISCARD SEQUENCES"
)


@functools.wraps(asyncpg.Connection.get_reset_query)
def _get_reset_query(_: object) -> str:
    return _RESET


def _bounded_methods(base: type[Any]) -> dict[str, Any]:
    return {
        "transaction": _transaction(base),
        **{name: _obedient(getattr(base, name)) for name in ("executemany", "fetchmany")},
        **{name: _within_timeout(getattr(base, name)) for name in ("copy_to_table", "copy_records_to_table")},
    }


# Seconds that a cancelled call may take to end, for it may have to wait for what the server still sends.
_CANCEL_GRACE = 0.5


def _obedient(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `method`, which sends many rows, such that one cancellation ends it.

    asyncpg's own swallows the one that comes while it waits for room in the send buffer, and then waits for an answer
    to what it has not sent to the end (`finally: return await waiter` in `bind_execute_many`): for ever, however well
    the server is. Such a connection is of no use any more, and is terminated.
    """

    @functools.wraps(method)
    async def call(self: Any, *args: Any, **keywords: Any) -> Any:
        running = asyncio.ensure_future(method(self, *args, **keywords))
        try:
            await asyncio.wait({running})
        except BaseException:
            running.cancel()
            running.add_done_callback(_retrieve)
            try:
                await asyncio.wait({running}, timeout=_CANCEL_GRACE)
            finally:
                if not running.done():
                    self.terminate()
            raise
        return running.result()

    return call


def _retrieve(ended: asyncio.Future[Any]) -> None:
    if not ended.cancelled():
        ended.exception()


def _within_timeout(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `method`, a COPY to the server, such that `timeout=` ends it.

    asyncpg's own timer ends neither the statement that asks for the columns, nor the wait for room in the send buffer,
    and in between fails with AttributeError. A cancellation ends them all; asyncpg's timer stands behind.
    """

    @functools.wraps(method)
    async def call(self: Any, *args: Any, timeout: float | None = None, **keywords: Any) -> Any:  # noqa: ASYNC109
        later = None if timeout is None else timeout + _CANCEL_GRACE
        async with asyncio.timeout(timeout):
            return await method(self, *args, timeout=later, **keywords)

    return call


def _transaction(base: type[Any]) -> Callable[..., Transaction]:
    @functools.wraps(base.transaction)
    def transaction(
        self: Any, *, isolation: str | None = None, readonly: bool = False, deferrable: bool = False
    ) -> Transaction:
        base.transaction(self)  # raises where the connection is closed
        return Transaction(self, isolation, readonly, deferrable)

    return transaction


def _subclass(base: type[_T], methods: dict[str, Any]) -> type[_T]:
    # Named as the caller's, for `repr` and messages, and of the same size, so that `__class__` may be assigned.
    names = {"__slots__": (), "__doc__": base.__doc__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return cast("type[_T]", type(cast(Any, base))(base.__name__, (base,), names | methods))


# ---------------------------------------------------------------------------------------------------------------------
# Pooled hosts

# asyncpg's methods that prepare SQL, and the parameter they take it by; `copy_records_to_table` makes up its own.
_PREPARING = {
    "execute": "query",
    "executemany": "command",
    "fetch": "query",
    "fetchval": "query",
    "fetchrow": "query",
    "fetchmany": "query",
    "prepare": "query",
    "copy_from_query": "query",
    "copy_records_to_table": "",
    "copy_from_table": "",
    "copy_to_table": "",
}


# A server connection that has not had the statement before prepares it anew, after the DDL. asyncpg reads the rows as
# they were described to it before, and finds a wrong number of columns or of bytes.
_MISREAD = (asyncpg.exceptions.ProtocolError,)
_STALE = (asyncpg.InvalidCachedStatementError, *_MISREAD)


class _Pooled:
    """What the methods of one pool's connections refuse, and whom they tell of a stale plan."""

    def __init__(self, host: str, endpoint: Endpoint, healing: Healing) -> None:
        self.host = host
        self.endpoint = endpoint
        self.healing = healing

    def judge(self, query: object) -> None:
        """Raise `PooledHostError` where `query` needs a session of its own."""
        feature = session_feature(query) if isinstance(query, str) else None
        if feature is not None:
            self.refuse(feature.name, f"Write {feature.instead}, or use" if feature.instead else "Use")

    def refuse(self, what: str, use: str = "Use") -> None:
        raise PooledHostError(
            f"{what} needs a session that lasts, and {self.host} may give each transaction another one. "
            f"{use} the direct host {self.endpoint.direct_host}."
        )

    def note(self, stale: str | None) -> None:
        """Have everything prepared anew from now on, for `stale`, or the query that ended so, turned out to be that."""
        if self.healing.renew(stale):
            _log.info(
                "%s: a plan is stale, the schema has changed; statements are prepared anew from now on",
                self.endpoint.id,
            )


def _pooled_methods(base: type[Any], pooled: _Pooled) -> dict[str, Any]:
    healing = pooled.healing

    # asyncpg's private name, the only one here: all that it prepares goes through this one method, for cursors and
    # copy_records_to_table(), too; and the caller's own text stays what query loggers and get_query() show.
    def get_statement(self: Any, query: str, *args: Any, **keywords: Any) -> Any:
        self._unfinished = True
        return base._get_statement(self, query + healing.token, *args, **keywords)

    @functools.wraps(base.add_listener)
    async def add_listener(*_: Any, **__: Any) -> None:
        pooled.refuse("LISTEN")

    # asyncpg ends a prepare with Flush in place of Sync. Until something is executed, the server session is this
    # client's, and keeps its locks on tables: for ever, when the arguments were wrong or the call was cancelled.
    @functools.wraps(base.get_reset_query)
    def get_reset_query(self: Any) -> str:
        return _restoring(self) or ("SELECT 1" if is_unfinished(self) else "")

    @functools.wraps(base.__init__)
    def init(self: Any, *args: Any, **keywords: Any) -> None:
        base.__init__(self, *args, **keywords)
        self._born_with = _tracked(self)

    return {
        "__slots__": ("_born_with", "_unfinished"),
        "__init__": init,
        "_get_statement": get_statement,
        "add_listener": add_listener,
        "get_reset_query": get_reset_query,
        "cursor": _cursor(base.cursor, pooled),
        **{name: _healed(getattr(base, name), parameter, pooled) for name, parameter in _PREPARING.items()},
        "prepare": _prepare(_healed(base.prepare, "query", pooled), pooled),
    }


# As servers report them (PostgreSQL documentation, section 54.2.7). PgBouncer sets them on whichever server connection
# a client is given: what one caller has set would follow the next.
_REPORTED = (
    "standard_conforming_strings",
    "client_encoding",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "application_name",
)


def _tracked(connection: Any) -> dict[str, str]:
    settings = connection.get_settings()
    return {name: getattr(settings, name) for name in _REPORTED if hasattr(settings, name)}


def _restoring(connection: Any) -> str:
    """Return what sets the settings that PgBouncer tracks to what the connection was born with, or ""."""
    now = _tracked(connection)
    return "; ".join(
        f"SET {name} TO '" + value.replace("'", "''") + "'"
        for name, value in connection._born_with.items()
        if now.get(name) != value
    )


def _healed(method: Callable[..., Any], parameter: str, pooled: _Pooled) -> Callable[..., Any]:
    """Return `method`, which is one of asyncpg's that prepare SQL, with its query judged and its stale plan healed."""
    takes_rows = method.__name__ in ("executemany", "fetchmany")
    may_be_simple = method.__name__ == "execute"
    leaves_unfinished = method.__name__ == "prepare"

    @functools.wraps(method)
    async def call(self: Any, *args: Any, **keywords: Any) -> Any:
        if parameter:
            pooled.judge(args[0] if args else keywords.get(parameter))
        if takes_rows:
            args, keywords = _rows_once(args, keywords)
        started, token = time.monotonic(), pooled.healing.token
        self._unfinished = True  # until it is over; it may be left running
        try:
            result = await method(self, *args, **keywords)
        except asyncpg.InvalidCachedStatementError:
            pooled.note(token)
            # Without arguments, the text may be of many statements, of which some may have been committed.
            if self.is_closed() or self.is_in_transaction() or (may_be_simple and len(args) < 2):
                raise
        except _MISREAD:
            pooled.note(token)
            raise  # it has been executed: nobody but the caller can tell whether it may be once more
        else:
            self._unfinished = leaves_unfinished
            return result
        result = await _once_more(method, self, args, keywords, started, pooled)
        self._unfinished = leaves_unfinished
        return result

    return call


async def _once_more(
    method: Callable[..., Any], self: Any, args: Any, keywords: dict[str, Any], started: float, pooled: _Pooled
) -> Any:
    now, token = time.monotonic(), pooled.healing.token
    if keywords.get("timeout") is not None:
        keywords["timeout"] -= now - started
    try:
        return await method(self, *args, **keywords)
    except _STALE:
        pooled.note(token)
        raise
    finally:
        pooled.healing.seconds += time.monotonic() - now


class _Once:
    """Rows that can be read once only. asyncpg's own second attempt would go on with those that are left."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows: Iterator[Any] | None = rows

    def __iter__(self) -> Iterator[Any]:
        rows, self._rows = self._rows, None
        if rows is None:
            raise asyncpg.InvalidCachedStatementError(
                "The plan of this statement was stale, and its rows came from an iterator that is used up. Nothing was "
                "written. Call again with the rows from the beginning."
            )
        return rows


def _rows_once(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > 1 and isinstance(args[1], Iterator):
        return (args[0], _Once(args[1]), *args[2:]), keywords
    if isinstance(keywords.get("args"), Iterator):
        return args, keywords | {"args": _Once(keywords["args"])}
    return args, keywords


# ---------------------------------------------------------------------------------------------------------------------
# Statements and cursors on pooled hosts: they cannot be healed, and tell the pool, so that the next ones are


def _prepare(method: Callable[..., Any], pooled: _Pooled) -> Callable[..., Any]:
    telling = ("fetch", "fetchval", "fetchrow", "fetchmany", "executemany")
    methods = {name: _telling(getattr(PreparedStatement, name), pooled) for name in telling}
    methods["cursor"] = _cursor(PreparedStatement.cursor, pooled, judged=False)
    statement_class = _subclass(PreparedStatement, methods)

    @functools.wraps(method)
    async def prepare(self: Any, *args: Any, **keywords: Any) -> Any:
        statement = await method(self, *args, **keywords)
        if type(statement) is PreparedStatement:
            statement.__class__ = statement_class
        return statement

    return prepare


def _cursor(method: Callable[..., Any], pooled: _Pooled, *, judged: bool = True) -> Callable[..., Any]:
    iterator_class = _subclass(CursorIterator, {"__anext__": _telling(CursorIterator.__anext__, pooled)})

    def aiter_(self: Any) -> Any:
        iterator = CursorFactory.__aiter__(self)
        iterator.__class__ = iterator_class
        return iterator

    def await_(self: Any) -> Generator[Any, Any, Any]:
        try:
            return (yield from CursorFactory.__await__(self))
        except _STALE as error:
            pooled.note(getattr(error, "query", None))
            raise

    factory_class = _subclass(CursorFactory, {"__aiter__": aiter_, "__await__": await_})

    @functools.wraps(method)
    def cursor(self: Any, *args: Any, **keywords: Any) -> Any:
        if judged:
            pooled.judge(args[0] if args else keywords.get("query"))
        factory = method(self, *args, **keywords)
        if type(factory) is CursorFactory:
            factory.__class__ = factory_class
        return factory

    return cursor


def _telling(method: Callable[..., Any], pooled: _Pooled) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(self: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return await method(self, *args, **keywords)
        except _STALE as error:
            pooled.note(getattr(error, "query", None))
            raise

    return call
