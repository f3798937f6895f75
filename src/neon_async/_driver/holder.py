"""Every private name of asyncpg that this package uses, in one file.

asyncpg's pool, holders, connections and statements keep some things under names with an underscore that have no
public counterpart. Here they get public names of ours. `tests/driver/test_holder.py` pins what each of them does, on
the oldest and on the newest asyncpg, and fails where another file uses one.

Knows no slots, no waiters and no deadlines, and decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import operator
import sys
import time
import types
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import asyncpg
from asyncpg import connresource
from asyncpg.pool import PoolConnectionHolder, PoolConnectionProxy

from .._errors import NeonAsyncError, ServerError, UnsupportedEventLoopError, server_error
from .._text import escape, log
from .losses import Loss, Outcome, loss_with, lost_error, timed_out
from .session import NO_CALLBACKS, Callbacks, Session


class Subscriptable:
    """A class or type of asyncpg's, which is generic to type checkers only."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getitem__(self, _: object) -> Any:
        return self._of


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from .._wire.transport import SessionTransport
    from .protocol import SessionProtocol
    from .signatures import ConnectionCalls, PoolCalls

    RecordT = TypeVar("RecordT", bound=asyncpg.Record, default=asyncpg.Record)  # the class of the rows
    _Proxy: TypeAlias = PoolConnectionProxy[asyncpg.Record]

    _Connection: TypeAlias = ConnectionCalls[RecordT]
    _Pool: TypeAlias = PoolCalls[RecordT]
else:
    from typing import TypeVar

    RecordT = TypeVar("RecordT", bound=asyncpg.Record)
    _Connection, _Pool = Subscriptable(asyncpg.Connection), Subscriptable(asyncpg.Pool)
    _Proxy = PoolConnectionProxy

Record: TypeAlias = asyncpg.Record
"""One row of a result: `asyncpg.Record`. Its values are found by name and by position."""

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def guarded(method: _F) -> _F:
        """Have a method of a statement, cursor or transaction refused after the loan."""

else:
    guarded = connresource.guarded

# ---------------------------------------------------------------------------------------------------------------------
# A connection


def session_of(connection: Any) -> Session | None:
    """Return the session of a connection of ours, or of a pool's proxy for one; None for any other."""
    transport = getattr(getattr(connection, "_con", connection), "_transport", None)
    session = getattr(transport, "session", None)
    return session if isinstance(session, Session) else None


def own_session(connection: Any) -> Session:
    """Return the session of a connection of ours."""
    session: Session = connection._transport.session
    return session


def has_ended(connection: Any) -> bool:
    """Return whether a connection is closed, or is what a pool lent and has been released or has ended since."""
    connection = getattr(connection, "_con", connection)
    return connection is None or bool(connection.is_closed())


class CallersError(Exception):
    """The caller's own code failed in a dial: `init`, the password function, or `__init__()` of its class.

    Attributes:
        error: What it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def give_up(connection: Any) -> None:
    """Have a connection that was never made be closed: asyncpg's `__del__` looks for what was never set."""
    connection._aborted = True


def is_given_up(connection: Any) -> bool:
    """Return whether `give_up()` was called."""
    return bool(getattr(connection, "_aborted", False))


def is_initialized(connection: Any) -> bool:
    """Return whether asyncpg's `__init__()` has run."""
    return hasattr(connection, "_transport")


class ConnectionHooks(_Connection[RecordT]):
    """asyncpg's connection: it ends from anywhere, its end is reported, and its cancel requests are ours."""

    __slots__ = ()

    _protocol: Any
    _transport: Any
    _loop: asyncio.AbstractEventLoop

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(types.GenericAlias)

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            super().__init__(*args, **options)
        except Exception as error:
            give_up(self)
            if isinstance(error, (LookupError, ValueError, AttributeError)):  # of the settings that the server sent
                raise
            raise CallersError(error) from None

    def terminate(self) -> None:
        """End the connection at once, without waiting for anything.

        It can be called from any thread, and after the connection's event loop has stopped or was closed. While that
        loop runs in another thread, the server learns of the end at once, and `is_closed()` is true a moment later.
        """
        session = session_of(self)
        if session is not None and session.loss is None:
            session.left = True
        loop = self._loop
        if is_current(loop):
            super().terminate()
        elif loop.is_running() and call_in(loop, super().terminate):
            self._shut_down()  # the loop may be blocked, or stop before it makes the call
        elif loop.is_closed():
            self._abandon()
        else:
            super().terminate()
            self._shut_down()  # what asyncpg has begun ends only when the loop runs again

    async def close(self, *, timeout: float | None = None) -> None:
        """Close the connection politely, as asyncpg does.

        After the connection's event loop was closed, the connection is terminated: it cannot be closed politely.

        Args:
            timeout: Seconds after which `TimeoutError` is raised and the connection is terminated. Default: none.

        Raises:
            UnsupportedEventLoopError: The connection belongs to another event loop, which still exists.
        """
        if self.is_closed() or is_current(self._loop):
            own_session(self).left |= not self.is_closed()
            await super().close(timeout=timeout)
        elif self._loop.is_closed():
            self.terminate()
        else:
            raise UnsupportedEventLoopError(
                "This connection belongs to another event loop. Close it there, or call terminate(), which works from "
                "anywhere."
            )

    def _shut_down(self) -> None:
        """Have the server learn of the end, from any thread, without the event loop."""
        session = session_of(self)
        if session is not None:
            cast(Any, self)._transport.shut_down()

    def _abandon(self) -> None:
        """End the connection where its event loop is closed: there asyncpg's `terminate()` raises."""
        self._aborted = True  # so that `is_closed()` is true
        self._shut_down()
        session = session_of(self)
        if session is not None:
            session.notify_closed()

    def _abort(self) -> None:
        # asyncpg forgets its protocol here, and a call that comes back between two messages raises AttributeError.
        ended, session = self._protocol, session_of(self)
        super()._abort()  # type: ignore[misc]
        self._protocol = _ClosedProtocol(session, was_in_transaction=had_transaction(ended))
        if session is not None:
            transport_of(self).abort()  # where a close() was cancelled, asyncpg's protocol leaves the socket open

    def _cleanup(self) -> None:
        # asyncpg calls this for every end of a connection: close(), terminate(), and a connection that was lost.
        session = session_of(self)
        if session is not None:
            transport = transport_of(self)
            session.note_loss(loss_with(last_words(transport), transport.failure))
        super()._cleanup()  # type: ignore[misc]
        if session is not None:
            session.notify_closed()

    def _check_open(self) -> None:
        if self.is_closed():
            raise closed_error(self)

    def add_log_listener(self, callback: Any) -> None:
        """Register a callback for log messages, as asyncpg does."""
        self._check_open()
        super().add_log_listener(callback)

    async def _executemany(self, query: Any, args: Any, timeout: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return await super()._executemany(query, args, timeout, **options)  # type: ignore[misc]
        except TimeoutError as error:
            raise timed_out_call(self, error, began, timeout) from error.__cause__

    def _cancel_current_command(self, waiter: asyncio.Future[None], *others: Any) -> None:
        # Where a sink fails, asyncpg cancels the COPY and waits for the end of its answer, even if it has read that.
        # Then it gets the end once more, and no request is sent.
        transport = transport_of(self)
        if not self.is_closed() and self._protocol.has_read_copy and transport.is_settled:
            waiter.set_result(None)
            self._loop.call_soon(transport.repeat_end)  # asyncpg is about to wait
        else:
            super()._cancel_current_command(waiter, *others)  # type: ignore[misc]

    async def _cancel(self, waiter: Any, cancel_waiter: Any = None) -> None:
        """Send a cancel request over a verified channel, within `command_timeout`, and always resolve `waiter`.

        Where the request cannot be sent, the connection is terminated: the state of its session is unknown.

        Args:
            waiter: Resolved when the request has been sent.
            cancel_waiter: Resolved by asyncpg when the cancelled statement has ended. asyncpg 0.31 does not pass it.
        """
        session, protocol = session_of(self), self._protocol
        assert session is not None
        try:
            if self.is_closed():
                return  # it was terminated meanwhile, and nothing runs on it any more
            async with asyncio.timeout(self._config.command_timeout):  # type: ignore[attr-defined]
                await session.cancel(protocol.backend_pid, protocol.backend_secret)
                if not waiter.done():
                    waiter.set_result(None)
                if cancel_waiter is not None:
                    await asyncio.shield(cancel_waiter)
        except asyncio.CancelledError:
            pass  # the connection or the event loop is being closed
        except Exception as error:  # noqa: BLE001  a task of asyncpg's: an exception would reach no caller
            _give_up_cancelling(self, session.name, waiter, error)
        finally:
            self._cancellations.discard(asyncio.current_task())  # type: ignore[attr-defined]
            if not waiter.done():
                waiter.set_result(None)


def timed_out_call(connection: Any, error: TimeoutError, began: float, timeout: float | None) -> Exception:
    """Return the error of a call whose time is over, of which the step that `error` ended had a part only.

    Args:
        connection: The connection.
        error: What ended the step.
        began: When the call began.
        timeout: The `timeout` of the call, or the `command_timeout` that asyncpg has put in its place.
    """
    host, limit = own_session(connection).host, connection._config.command_timeout
    return timed_out(host, error, time.monotonic() - began, None if timeout == limit else timeout, limit)


def _give_up_cancelling(connection: Any, name: str, waiter: asyncio.Future[None], error: Exception) -> None:
    if not connection._aborted:
        end_lost(connection, f"a statement could not be cancelled ({type(error).__name__}), so it was terminated")
    if not waiter.done():  # asyncpg 0.31: a call that waits for the cancellation would wait for ever without an error
        waiter.set_exception(error)
        waiter.exception()  # often no call waits
    if isinstance(error, (NeonAsyncError, OSError)):
        # Not at INFO: in an outage it happens to many at once, and the pool says that it cannot connect.
        log(
            logging.DEBUG,
            "%(endpoint)s: a statement could not be cancelled, its connection is terminated: %(reason)s",
            endpoint=name,
            event="cancel_failed",
            reason=escape(str(error)),
        )
    else:
        context = {"message": "A cancel request failed unexpectedly", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)


def coroutine_function(function: _F) -> _F:
    """Mark a function that returns a coroutine as what `inspect.iscoroutinefunction()` looks for."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    code = cast(Any, function).__code__  # Python 3.11 has no other mark, and does nothing else with this one
    cast(Any, function).__code__ = code.replace(co_flags=code.co_flags | inspect.CO_COROUTINE)
    return function


def mark_coroutine_functions(own: type[Any], asyncpgs: type[Any]) -> None:
    """Mark those methods of a class of ours that are coroutine functions in asyncpg's."""
    for name, method in vars(own).items():
        if inspect.iscoroutinefunction(getattr(asyncpgs, name, None)):
            coroutine_function(method)


def is_current(loop: object) -> bool:
    """Return whether this is the event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> bool:
    """Have the event loop of another thread make a call, and return whether it is going to."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # it was closed a moment ago
        return False
    return True


class _ClosedProtocol:
    """The protocol of a connection that was terminated: it refuses everything because the connection is closed.

    Args:
        session: The session that has ended, or None where there was none yet.
        was_in_transaction: Whether a transaction was open.
    """

    def __init__(self, session: Session | None, *, was_in_transaction: bool) -> None:
        self._session = session
        self.was_in_transaction = was_in_transaction

    def __getattr__(self, name: str) -> Any:
        raise refusal_of(self._session, self.was_in_transaction, "cannot perform operation: connection is closed")

    def abort(self) -> None:
        """Do nothing: it is done."""


def has_open_transaction(connection: Any) -> bool:
    """Return whether a transaction is open, or was when the connection ended."""
    return had_transaction(connection._protocol)


def had_transaction(protocol: Any) -> bool:
    """Return whether a transaction was open on a connection that has ended, by its protocol."""
    if isinstance(protocol, _ClosedProtocol):
        return protocol.was_in_transaction
    return bool(protocol is not None and protocol.is_in_transaction())


def closed_error(connection: Any, refusal: str = "connection is closed") -> Exception:
    """Return the error of a call on a connection that has ended.

    Args:
        connection: The connection.
        refusal: What asyncpg says of a connection that its owner has closed.
    """
    return refusal_of(session_of(connection), had_transaction(connection._protocol), refusal)


def refusal_of(session: Session | None, was_in_transaction: bool, refusal: str) -> Exception:
    """Return what `closed_error()` does, by what is known of the connection."""
    if session is None or session.loss is None:
        return asyncpg.InterfaceError(refusal)
    rolled_back = was_in_transaction and not session.commit_unknown
    return lost_error(session.host, session.loss, Outcome.ROLLED_BACK_UNSENT if rolled_back else Outcome.NOT_SENT)


def last_words(transport: SessionTransport) -> ServerError | None:
    """Return the error with which the server has ended a session, if it sent one."""
    body = transport.last_words
    return None if body is None else server_error(body)


class ResourceHooks:
    """asyncpg's statement, cursor or transaction: on a connection that was lost it says so."""

    __slots__ = ()

    _connection: Any
    _con_release_ctr: int

    def _check_conn_validity(self, meth_name: str) -> None:
        if self._connection._pool_release_ctr != self._con_release_ctr:
            super()._check_conn_validity(meth_name)  # type: ignore[misc]
        if self._connection.is_closed():
            raise _closed_error_of(self, meth_name)


def transport_of(connection: Any) -> SessionTransport:
    """Return the transport of the session of a connection."""
    transport: SessionTransport = connection._transport
    return transport


def open_resource(resource: Any) -> Any:
    """Return a cursor of asyncpg's, unless its connection was lost during the loan."""
    connection = resource._connection
    if connection.is_closed() and connection._pool_release_ctr == resource._con_release_ctr:
        raise _closed_error_of(resource, "fetch")
    return resource


class CursorHooks:
    """What wraps an open cursor of asyncpg's. Its `guarded` methods are refused where that one's are."""

    __slots__ = ()

    def _check_conn_validity(self: Any, meth_name: str) -> None:
        open_resource(self._opened)._check_conn_validity(meth_name)


def _closed_error_of(resource: Any, method: str) -> Exception:
    name = f"{type(resource).__name__}.{method}()"
    return closed_error(resource._connection, f"cannot call {name}: the underlying connection is closed")


class StatementHooks(ConnectionHooks[RecordT]):
    """asyncpg's connection: what prepares and what executes a statement can be overridden."""

    __slots__ = ()

    def get_statement(self, query: str, timeout: float | None, **options: Any) -> Awaitable[Any]:
        """Return asyncpg's state of a prepared statement, from its cache or from the server."""
        state: Awaitable[Any] = super()._get_statement(query, timeout, **options)  # type: ignore[misc]
        return state

    def cached_statement(self, query: str, options: Mapping[str, Any]) -> Any:
        """Return asyncpg's state of a prepared statement where it is in the cache, else None."""
        cache: Any = self._stmt_cache  # type: ignore[attr-defined]
        record_class = options.get("record_class")
        if record_class is None:
            record_class = self._protocol.get_record_class()
        elif not isinstance(record_class, type):
            return None  # asyncpg refuses it
        return cache.get((query, record_class, options.get("ignore_custom_codec", False)))

    def run_statement(
        self, session: Session, query: str, executor: Any, timeout: float | None, options: Mapping[str, Any]
    ) -> Awaitable[Any]:
        """Get the statement and execute it with `executor`; return the result and the state."""
        result: Awaitable[Any] = super()._do_execute(query, executor, timeout, retry=False, **options)  # type: ignore[misc]
        return result

    def _get_statement(self, query: str, timeout: float | None, **options: Any) -> Awaitable[Any]:
        return self.get_statement(query, timeout, **options)

    def _do_execute(
        self,
        query: str,
        executor: Any,
        timeout: float | None,
        retry: bool = True,
        **options: Any,
    ) -> Awaitable[Any]:
        return self.run_statement(self._transport.session, query, executor, timeout, options)

    async def _introspect_types(self, typeoids: Any, timeout: float | None) -> Any:
        types, statement = await super()._introspect_types(typeoids, timeout)  # type: ignore[misc]
        composites = {row["oid"]: (row["attrnames"], row["attrtypoids"]) for row in types if row["attrtypoids"]}
        own_session(self).composites.update(composites)
        return types, statement

    async def _prepare(self, query: str, *, use_cache: bool = False, **options: Any) -> Any:
        # asyncpg itself caches only what copy_records_to_table() asks for the columns of a table: after DDL it would
        # encode records for the old ones, which the server may take.
        return await super()._prepare(query, use_cache=False, **options)  # type: ignore[misc]


def get_statement(connection: Any, query: str, timeout: float | None, options: Mapping[str, Any]) -> Awaitable[Any]:
    """Return a prepared statement as asyncpg's own code gets it, through a caller's overrides as well."""
    state: Awaitable[Any] = connection._get_statement(query, timeout, **options)
    return state


def prepares(connection: Any) -> int:
    """Return how often the connection has prepared a statement."""
    count: int = connection._protocol.prepares
    return count


def search_path(connection: Any) -> str | None:
    """Return the `search_path` of the transaction or session, where it is known."""
    path: str | None = connection._protocol.search_path
    return path


def has_own_codec(connection: Any, oid: int) -> bool:
    """Return whether a caller has registered a codec for the type with this OID."""
    settings = connection.get_settings()
    own, asyncpgs = settings.get_data_codec(oid), settings.get_data_codec(oid, ignore_custom_codec=True)
    return own is not asyncpgs


@contextlib.contextmanager
def between_calls(connection: Any) -> Iterator[None]:
    """Let asyncpg make a call of its own inside another one that has nothing under way."""
    section = connection._stmt_exclusive_section
    acquired, section._acquired = section._acquired, 0
    try:
        yield
    finally:
        section._acquired = acquired


def query_of(resource: Any) -> str:
    """Return the text of a prepared statement or cursor, as its caller wrote it."""
    query: str = resource._query
    return query


def state_of(resource: Any) -> Any:
    """Return asyncpg's state of a prepared statement or cursor; None for a cursor that is not prepared yet."""
    return resource._state


def set_state(statement: Any, state: Any) -> None:
    """Give a prepared statement another state. asyncpg closes the old one on the server."""
    old = statement._state
    state.attach()
    statement._state = state
    old.detach()
    statement._connection._maybe_gc_stmt(old)


def has_own_name(state: Any) -> bool:
    """Return whether asyncpg has named a statement, or it has none: it can be prepared again under another name."""
    name: str = state.name
    return not name or name.startswith("__asyncpg_")


def description_of(state: Any) -> Any:
    """Return how the server has described a statement: the types of its parameters, the names and types of its rows.

    None where asyncpg has forgotten the types.
    """
    try:
        return (
            [type_.oid for type_ in state._get_parameters() or ()],
            [(column.name, column.type.oid) for column in state._get_attributes()],
        )
    except (asyncpg.InternalClientError, TypeError):
        return None


def types_of(state: Any) -> set[int]:
    """Return the OIDs of the types of a statement's parameters and columns."""
    parameters, columns = description_of(state) or ((), ())
    return {*parameters, *(oid for _, oid in columns)}


class Use:
    """A call of a caller on a resource of a connection: it is under way from its first step to its end."""

    __slots__ = ("connection", "resource", "session")

    def __init__(self, connection: Any, resource: Any) -> None:
        self.connection: Any = connection
        self.resource: Any = resource
        self.session: Session = own_session(connection)

    def __enter__(self) -> Use:
        self.session.calls += 1
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.session.end_call()


def use_of(resource: Any) -> Use:
    """Return one use of a prepared statement, cursor or transaction, as its connection wants it."""
    use: Use = resource._connection.use_of(resource)
    return use


def lent(connection: Any) -> Any:
    """Return what a caller may have of a connection: the proxy of the loan, or the connection where no pool lent it."""
    return connection if connection._proxy is None else connection._proxy


def begin_session(
    connection: Any, session: Session, make_protocol: Callable[[Any, SessionTransport], SessionProtocol]
) -> None:
    """Attach a session and a protocol to a new connection, and have the connection use the running loop itself.

    It was dialed through a loop adapter. From Python 3.14 on `asyncio.current_task(loop)` compares loops by identity,
    and asyncpg forgets a finished cancel request only when it finds the task by it.

    Args:
        connection: The connection.
        session: Its session.
        make_protocol: Makes the protocol from asyncpg's own and the transport of the session.
    """
    transport = connection._transport
    transport.session = session
    connection._protocol = protocol = make_protocol(connection._protocol, transport)
    protocol.on_dropped = functools.partial(_forget_statements, weakref.ref(connection))
    connection._loop = connection._stmt_cache._loop = asyncio.get_running_loop()


def leave_jit_alone(connection: Any) -> None:
    """Have asyncpg not turn `jit` off for the session while it asks the server about types."""
    connection._server_caps = connection._server_caps._replace(jit=False)


def _forget_statements(reference: weakref.ref[Any], certainly: bool) -> None:
    """Forget the cached statements of a connection, which may be gone on the server. If they are, none is closed."""
    connection = reference()
    if connection is not None:
        connection._stmt_cache.clear()
        if certainly:
            connection._mark_stmts_as_closed()


async def prepare_cached(connection: Any, query: str) -> Any:
    """Return a prepared statement as `prepare()` does, and keep it in the cache of the connection as `fetch()` does."""
    asyncpgs: Any = asyncpg.Connection
    return await asyncpgs._prepare(connection, query, use_cache=True)


def end_lost(connection: Any, why: str) -> None:
    """Terminate a connection that is of no use any more, so that later calls say why it is lost."""
    session = session_of(connection)
    if session is not None and not connection.is_closed():
        session.note_loss(Loss(why))
    connection.terminate()


async def send(connection: Any, sql: str) -> None:
    """Run `sql` for the pool itself: no query logger and no tracer sees it."""
    await connection._protocol.query(sql, None)


def timeout_of(connection: Any, timeout: float | None) -> float | None:
    """Return the seconds that a call may take: its own `timeout`, or the connection's `command_timeout`."""
    return timeout_by(connection._protocol, timeout)


def timeout_by(protocol: Any, timeout: float | None) -> float | None:
    """Return what `timeout_of()` does, by the protocol of the connection."""
    seconds: float | None = protocol._get_timeout(timeout)
    return seconds


def queries_run(connection: Any) -> int:
    """Return how many statements the connection has run."""
    return int(connection._protocol.queries_count)


def is_cancelling(connection: Any) -> bool:
    """Return whether a cancelled statement has not ended yet."""
    return bool(connection._protocol.has_cancelled())


# What asyncpg and this package call of a protocol in every statement.
FREQUENT_METHODS = ("is_connected", "get_settings", "get_record_class", "_get_timeout")


def ignore(_: bool) -> None:
    """Do nothing."""


def in_front_of_protocol(own: type[_T]) -> type[_T]:
    """Forward the names that a class does not define to asyncpg's protocol, which its objects have as `_asyncpg`.

    Not by `__getattr__()`, because a class that has it finds all its attributes more slowly.
    """
    for name in dir(asyncpg.protocol.Protocol):
        if not hasattr(own, name):
            setattr(own, name, property(operator.attrgetter(f"_asyncpg.{name}")))
    return own


def keep_frequent_methods(own: Any, protocol: Any) -> None:
    """Give `own`, which stands in for asyncpg's protocol, those methods of it that every statement needs."""
    for name in FREQUENT_METHODS:
        setattr(own, name, getattr(protocol, name))
    own.has_cancelled = protocol._is_cancelling


@contextlib.contextmanager
def retrieving(protocol: Any, note: Callable[[Any], object] | None = None) -> Iterator[None]:
    """Retrieve the exception of each future that asyncpg's protocol makes in the block, so that none is logged.

    asyncpg awaits the future of a COPY only after the caller's code. Where that code ends the connection, asyncpg fails
    before it comes to that, and the event loop would log "Future exception was never retrieved".

    Args:
        protocol: asyncpg's own object.
        note: Called with the result of each that has one.
    """
    completed = protocol._on_waiter_completed  # asyncpg adds it to each future as a callback

    def retrieve(waiter: asyncio.Future[Any]) -> None:
        if not waiter.cancelled() and waiter.exception() is None and note is not None:
            note(waiter.result())
        completed(waiter)

    protocol._on_waiter_completed = retrieve
    try:
        yield
    finally:
        del protocol._on_waiter_completed


def is_idle(connection: Any) -> bool:
    """Return whether no statement is under way or being cancelled."""
    return bool(connection._protocol.is_idle())


def protocol_of(connection: Any) -> SessionProtocol | None:
    """Return the protocol of a connection of ours, or None when the connection has ended."""
    protocol: SessionProtocol | None = connection._protocol
    return protocol


def was_lost(connection: Any) -> bool:
    """Return whether a connection that has ended was ended by the other side, and not by us."""
    return own_session(connection).loss is not None and not connection._aborted


def is_running(connection: Any) -> bool:
    """Return whether a statement is under way, or was when the connection was lost."""
    return bool(connection._protocol.is_running)


def has_transaction(connection: Any) -> bool:
    """Return whether a transaction is open, on the server or in asyncpg's bookkeeping."""
    return bool(connection._protocol.is_in_transaction() or connection._top_xact is not None)


def callbacks_of(connection: Any) -> Callbacks:
    """Return the callbacks that are registered on a connection."""
    return Callbacks(
        {channel: frozenset(callbacks) for channel, callbacks in connection._listeners.items()},
        frozenset(connection._log_listeners),
        frozenset(connection._query_loggers),
        frozenset(connection._termination_listeners),
    )


def set_callbacks(connection: Any, callbacks: Callbacks) -> None:
    """Register these callbacks and no others. Nothing is sent to the server."""
    connection._listeners = {channel: set(kept) for channel, kept in callbacks.listeners.items()}
    connection._log_listeners = set(callbacks.log_listeners)
    connection._query_loggers = set(callbacks.query_loggers)
    connection._termination_listeners = set(callbacks.termination_listeners)


def _keep_only_others(connection: Any, callbacks: Callbacks) -> None:
    for channel, listeners in callbacks.listeners.items():
        if channel in connection._listeners:
            connection._listeners[channel] -= listeners
    connection._log_listeners -= callbacks.log_listeners


def listens_otherwise(connection: Any, callbacks: Callbacks) -> bool:
    """Return whether the connection listens to other channels than `callbacks` has."""
    ours, others = connection._listeners, callbacks.listeners
    return bool((ours or others) and ours.keys() != others.keys())


async def end_calls(connection: Any) -> None:
    """Wait until the calls of a finished loan have ended, of which there are some.

    They send nothing more: see `Holder.take_back()`.

    Raises:
        asyncpg.InterfaceError: The server still runs a statement of one of them.
    """
    session = own_session(connection)
    if connection._protocol.is_running:
        raise asyncpg.InterfaceError(
            f"A connection of {session.name} was released while another operation was in progress on it, and was "
            "terminated. Await every call before the release."
        )
    ended = asyncio.Event()
    session.on_last_call = ended.set
    try:
        await ended.wait()
    finally:
        session.on_last_call = None
    if not connection.is_closed():
        connection._protocol.loan_has_ended = False


async def end_cancellation(connection: Any) -> None:
    """Wait until a cancelled statement has ended. The connection may have ended with it."""
    protocol = connection._protocol
    with contextlib.suppress(asyncpg.ConnectionDoesNotExistError):
        await protocol.while_connected(protocol._wait_for_cancellation(), None)


async def roll_back(connection: Any) -> None:
    """Roll back an open transaction, as `Connection.reset()` does.

    asyncpg reports it to the event loop's exception handler, unless an `async with` block owns the transaction.
    """
    transaction, connection._top_xact = connection._top_xact, None
    if transaction is None or not transaction._managed:
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"Resetting connection with an active transaction {connection!r}"}
        )
    await send(connection, "ROLLBACK")


async def fetch(connection: Any, query: str, *args: object) -> list[Any]:
    """Return the rows of a query of the pool itself: no query logger and no tracer sees it."""
    statement = await connection._get_statement(query, None, use_cache=False)
    rows: list[Any] = await connection._protocol.bind_execute(statement, args, "", 0, False, None)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What a pool lends


class Proxy(_Proxy):
    """What a caller gets for one loan of a connection; after the loan it does nothing any more.

    asyncpg's proxy checks that the loan has not ended when a method is called. This one checks it again when the
    coroutine starts to run, so that one that was created during the loan and awaited after it does not reach the next
    caller's session.
    """

    __slots__ = ()

    _con: Any

    def _lent(self, method: str) -> Any:
        connection = self._con
        if connection is None:
            raise asyncpg.InterfaceError(
                f"cannot call Connection.{method}(): connection has been released back to the pool"
            )
        return connection

    async def _call(self, method: Callable[..., Awaitable[Any]], args: Any, keywords: Any) -> Any:
        connection = self._con or self._lent(method.__name__)
        session: Session = connection._transport.session
        session.calls += 1
        try:
            return await method(*args, **keywords)
        finally:
            session.end_call()

    def __getattr__(self, name: str) -> Any:
        """Return what a caller's own class has besides asyncpg's methods. What it returns belongs to the loan, too."""
        connection = self._con
        value = getattr(connection, name)
        if connection is None:
            return value
        if getattr(value, "__self__", None) is not connection:
            return self._own(name, value)
        call = self._await_own if inspect.iscoroutinefunction(value) else self._call_own
        return functools.update_wrapper(functools.partial(call, name, value), value)

    def _call_own(self, name: str, method: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        self._lent(name)
        return self._own(name, method(*args, **keywords))

    async def _await_own(self, name: str, method: Callable[..., Awaitable[Any]], *args: Any, **keywords: Any) -> Any:
        session = own_session(self._lent(name))
        session.calls += 1
        try:
            return self._own(name, await method(*args, **keywords))
        finally:
            session.end_call()

    async def _await_created(self, name: str, created: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await self._await_own(name, lambda: created)
        finally:
            created.close()  # where the loan has ended before it began

    async def _iterate_created(self, name: str, created: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
        async with contextlib.aclosing(created):
            while True:
                try:
                    item = await self._await_own(name, created.__anext__)
                except StopAsyncIteration:
                    return
                yield item

    def _own(self, name: str, value: Any) -> Any:
        """Return what `name` of the caller's class has returned such that it reaches the session in this loan only."""
        if value is self._con:
            return self
        if inspect.iscoroutine(value):
            return self._await_created(name, value)
        if inspect.isasyncgen(value):
            return self._iterate_created(name, value)
        if isinstance(value, _GeneratorContext):
            return _LentContext(self, name, value)
        if asyncio.isfuture(value) and not value.done():
            session = own_session(self._con)
            session.calls += 1
            value.add_done_callback(lambda _: session.end_call())
        return value

    if not TYPE_CHECKING:  # asyncpg-stubs has the signatures; `wraps` also copies the mark of a coroutine function

        @functools.wraps(PoolConnectionProxy.execute)
        def execute(self, *args, **keywords):
            return self._call(self._lent("execute").execute, args, keywords)

        @functools.wraps(PoolConnectionProxy.executemany)
        def executemany(self, *args, **keywords):
            return self._call(self._lent("executemany").executemany, args, keywords)

        @functools.wraps(PoolConnectionProxy.fetch)
        def fetch(self, *args, **keywords):
            return self._call(self._lent("fetch").fetch, args, keywords)

        @functools.wraps(PoolConnectionProxy.fetchval)
        def fetchval(self, *args, **keywords):
            return self._call(self._lent("fetchval").fetchval, args, keywords)

        @functools.wraps(PoolConnectionProxy.fetchrow)
        def fetchrow(self, *args, **keywords):
            return self._call(self._lent("fetchrow").fetchrow, args, keywords)

        @functools.wraps(PoolConnectionProxy.fetchmany)
        def fetchmany(self, *args, **keywords):
            return self._call(self._lent("fetchmany").fetchmany, args, keywords)

        @functools.wraps(PoolConnectionProxy.prepare)
        def prepare(self, *args, **keywords):
            return self._call(self._lent("prepare").prepare, args, keywords)

        async def prepare_cached(self, *args, **keywords):
            return await self._call(self._lent("prepare_cached").prepare_cached, args, keywords)

        @functools.wraps(PoolConnectionProxy.copy_from_table)
        def copy_from_table(self, *args, **keywords):
            return self._call(self._lent("copy_from_table").copy_from_table, args, keywords)

        @functools.wraps(PoolConnectionProxy.copy_from_query)
        def copy_from_query(self, *args, **keywords):
            return self._call(self._lent("copy_from_query").copy_from_query, args, keywords)

        @functools.wraps(PoolConnectionProxy.copy_to_table)
        def copy_to_table(self, *args, **keywords):
            return self._call(self._lent("copy_to_table").copy_to_table, args, keywords)

        @functools.wraps(PoolConnectionProxy.copy_records_to_table)
        def copy_records_to_table(self, *args, **keywords):
            return self._call(self._lent("copy_records_to_table").copy_records_to_table, args, keywords)

        @functools.wraps(PoolConnectionProxy.add_listener)
        def add_listener(self, *args, **keywords):
            return self._call(self._lent("add_listener").add_listener, args, keywords)

        @functools.wraps(PoolConnectionProxy.remove_listener)
        def remove_listener(self, *args, **keywords):
            return self._call(self._lent("remove_listener").remove_listener, args, keywords)

        @functools.wraps(PoolConnectionProxy.set_type_codec)
        def set_type_codec(self, *args, **keywords):
            return self._call(self._lent("set_type_codec").set_type_codec, args, keywords)

        @functools.wraps(PoolConnectionProxy.reset_type_codec)
        def reset_type_codec(self, *args, **keywords):
            return self._call(self._lent("reset_type_codec").reset_type_codec, args, keywords)

        @functools.wraps(PoolConnectionProxy.set_builtin_type_codec)
        def set_builtin_type_codec(self, *args, **keywords):
            return self._call(self._lent("set_builtin_type_codec").set_builtin_type_codec, args, keywords)

        @functools.wraps(PoolConnectionProxy.reload_schema_state)
        def reload_schema_state(self, *args, **keywords):
            return self._call(self._lent("reload_schema_state").reload_schema_state, args, keywords)

        @functools.wraps(PoolConnectionProxy.reset)
        def reset(self, *args, **keywords):
            return self._call(self._lent("reset").reset, args, keywords)

        @functools.wraps(PoolConnectionProxy.close)
        def close(self, *args, **keywords):
            return self._call(self._lent("close").close, args, keywords)

        @contextlib.contextmanager
        @functools.wraps(PoolConnectionProxy.query_logger)
        def query_logger(self, callback):
            # asyncpg's registers it on the connection when the block is entered. Another caller may have it by then.
            self.add_query_logger(callback)
            try:
                yield
            finally:
                if self._con is not None:  # else the end of the loan has removed it
                    self.remove_query_logger(callback)


async def _nothing() -> AsyncGenerator[None, None]:
    yield


# What `contextlib.asynccontextmanager` makes. Other context managers can be anything, such as a lock.
_GeneratorContext = type(contextlib.asynccontextmanager(_nothing)())


class _LentContext(contextlib.AbstractAsyncContextManager[Any, Any]):
    """A context manager that a method of the caller's class has returned.

    Args:
        proxy: What the caller has of the connection.
        name: The name of the method.
        manager: The context manager.
    """

    def __init__(self, proxy: Proxy, name: str, manager: contextlib.AbstractAsyncContextManager[Any, Any]) -> None:
        self._proxy = proxy
        self._name = name
        self._manager = manager

    async def __aenter__(self) -> Any:
        return await self._proxy._await_own(self._name, self._manager.__aenter__)

    async def __aexit__(self, *failure: Any) -> Any:
        return await self._proxy._await_own(self._name, self._manager.__aexit__, *failure)


mark_coroutine_functions(Proxy, asyncpg.Connection)  # with Python 3.11, asyncpg does not mark them


class Holder(PoolConnectionHolder):
    """asyncpg's holder: what its proxies and its pool know of a connection of the pool. A slot owns it.

    Args:
        pool: The pool that asyncpg's code finds through it.

    Attributes:
        connection: The connection, or None.
        session: Its session; this and the next two only while there is a connection.
        protocol: Its protocol.
        transport: Its transport.
        is_lent: Whether a caller has the connection, by a proxy or in a call of the pool.
        is_observed: Whether callbacks of `init` get what the caller has of the connection, and may keep it.
    """

    # Each is found in one step, because every loan needs them.
    __slots__ = ("connection", "is_lent", "is_observed", "protocol", "session", "transport")

    _pool: Any
    _proxy: Proxy | None

    connection: Any
    session: Session
    protocol: SessionProtocol
    transport: SessionTransport
    is_lent: bool
    is_observed: bool

    def __init__(self, pool: object) -> None:
        # `setup` and the end of idle connections are the pool's own: asyncpg bounds neither in time.
        super().__init__(cast(Any, pool), max_queries=0, setup=None, max_inactive_time=0)
        self.is_lent = False

    @property
    def _con(self) -> Any:
        """asyncpg's name for `connection`."""
        return self.connection

    @_con.setter
    def _con(self, connection: Any) -> None:
        self.connection = connection

    def adopt(self, connection: Any) -> None:
        """Own a new connection."""
        self.connection = connection
        self.session = own_session(connection)
        self.protocol = connection._protocol
        self.transport = connection._transport
        listeners, log_listeners, _, termination_listeners = self.session.snapshot.callbacks
        self.is_observed = bool(listeners or log_listeners or termination_listeners)

    def is_connected(self) -> bool:
        """Return whether there is a connection that has not ended."""
        connection = self.connection
        return connection is not None and self.protocol.is_connected() and not connection._aborted

    def lend(self) -> Proxy:
        """Return a new proxy for the connection."""
        self.is_lent = True
        self._proxy = proxy = Proxy(self, self.connection)
        return proxy

    def has_leftovers(self) -> bool:
        """Return whether the caller has left more than a reset sent ahead cleans: see `Facts.leftovers` of the pool."""
        connection, session = self.connection, self.session
        return bool(
            session.calls
            or not self.protocol.is_at_rest()
            or connection._top_xact is not None
            or listens_otherwise(connection, session.snapshot.callbacks)
        )

    def take_back(self) -> None:
        """Make the proxy useless to its caller, with its cursors and statements, and calls that are under way.

        Callbacks that the caller registered are forgotten. Warns of listeners among them; the warning can be an
        exception.
        """
        connection, session, proxy = self.connection, self.session, self._proxy
        self._proxy, self.is_lent = None, False
        if session.calls:
            self.protocol.loan_has_ended = True
        kept = session.snapshot.callbacks
        has_callbacks = bool(  # now, and not when some of them have been removed
            connection._listeners
            or connection._log_listeners
            or connection._query_loggers
            or connection._termination_listeners
            or kept != NO_CALLBACKS
        )
        try:
            if has_callbacks:
                _keep_only_others(connection, kept)  # asyncpg would warn of those that `init` registered, too
                connection._on_release()
            else:
                connection._pool_release_ctr += 1  # which is all that it does without listeners
        finally:
            if has_callbacks:
                set_callbacks(connection, kept)
            if proxy is not None:
                proxy._detach()

    def dismiss(self) -> None:
        """Make the proxy useless to its caller, who releases a connection whose end has not been noticed yet."""
        proxy, self._proxy, self.is_lent = self._proxy, None, False
        if proxy is not None:
            proxy._detach()

    def mark_closed(self) -> None:
        """Forget a connection that has ended. A proxy for it says so to its caller, until the caller releases it."""
        # A caller may keep what belongs to the connection longer than the pool.
        if self._proxy is not None:
            self.connection._set_proxy(None)
        self.protocol.on_reset = ignore
        self._proxy = self.connection = None
        self.session = self.protocol = self.transport = cast(Any, None)
        self.is_lent = False

    def terminate(self) -> None:
        """End the connection at once, if there is one."""
        if self.connection is not None:
            self.connection.terminate()

    def shut_down(self) -> None:
        """Have the server learn of the end of the connection, if there is one, from any thread."""
        if self.connection is not None:
            self.connection._shut_down()

    def leave_to_parent(self) -> None:
        """Let go of the connection, if there is one, in a forked process."""
        if self.connection is not None:
            self.transport.leave_to_parent()

    def is_idle(self) -> bool:
        """Return whether no caller has the connection; asyncpg asks."""
        return not self.is_lent

    @property
    def _in_use(self) -> bool | None:
        """Something true while a caller has the connection; with asyncpg a future, which nothing awaits here."""
        return self.is_lent or None

    @_in_use.setter
    def _in_use(self, _: None) -> None:
        """Do nothing for asyncpg, which sets it at first."""

    def _release_on_close(self) -> None:
        """Do nothing for asyncpg, which calls this when the connection has ended: `ConnectionHooks` reports it."""


def holder_of(connection: object, pool: object) -> Holder | None:
    """Return the holder of what `pool` has lent, or None when it was released before.

    Raises:
        asyncpg.InterfaceError: It is not a connection that this pool has lent.
    """
    proxy: Any = connection
    holder = proxy._holder if isinstance(connection, Proxy) else None
    if not isinstance(holder, Holder) or holder._pool is not pool:
        raise asyncpg.InterfaceError(
            f"Pool.release() received invalid connection: {connection!r} is not a member of this pool"
        )
    if holder._proxy is connection:
        return holder
    proxy._detach()  # its connection may have ended during the loan
    return None


def pool_of(proxy: Proxy) -> Any:
    """Return the pool that lent a connection; also after the loan."""
    return proxy._holder._pool


# ---------------------------------------------------------------------------------------------------------------------
# The pool


class HolderQueue:
    """What other code reads of the queue in asyncpg's pool, which contains the holders that are free.

    Health checks take `qsize()` for the number of callers that can acquire at once. Nothing can be put or taken.

    Args:
        maxsize: The number of holders.
        free: Returns the holders that are free now; the last one is used first.
        waiting: Returns the number of callers that wait.
    """

    __slots__ = ("_free", "_waiting", "maxsize")

    def __init__(self, maxsize: int, free: Callable[[], list[Holder]], waiting: Callable[[], int]) -> None:
        self.maxsize = maxsize
        self._free = free
        self._waiting = waiting

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.qsize()} of {self.maxsize} free>"

    def qsize(self) -> int:
        """Return how many holders are free, with an idle connection or with none."""
        return len(self._free())

    def empty(self) -> bool:
        """Return whether no holder is free."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Return whether all holders are free."""
        return self.qsize() == self.maxsize

    @property
    def _queue(self) -> list[Holder]:
        return self._free()

    @property
    def _getters(self) -> list[None]:
        return [None] * self._waiting()


class PoolBase(_Pool[RecordT]):
    """asyncpg's pool as a base class: what other code reads of it is true, and none of its machinery runs.

    It keeps no parameter of its connections, because these include the password.

    Args:
        **options: The options of the pool, by asyncpg's names.
    """

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(types.GenericAlias)

    _queue: HolderQueue
    _connect_kwargs: dict[str, object]

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **options,
            loop=cast(asyncio.AbstractEventLoop, object()),  # nothing runs before the pool is opened in a loop
        )
        self._connect_kwargs = {}  # asyncpg 0.31 does not know init_size, and takes it for one

    def _set_holders(self, holders: Sequence[Holder], queue: HolderQueue) -> None:
        """Name the holders that `get_size()` counts and whose caches `reload_schema_state()` clears."""
        self._holders = list(holders)
        self._queue = queue

    def _set_state(self, *, initializing: bool, initialized: bool, closing: bool, closed: bool) -> None:
        """Note how far the life of the pool has come, in asyncpg's words."""
        self._initializing, self._initialized, self._closing, self._closed = initializing, initialized, closing, closed

    def _set_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the event loop that the pool belongs to."""
        self._loop = loop

    @property
    def _own_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    if TYPE_CHECKING:  # the pool's own

        async def _lend(self, timeout: float | None) -> Any: ...

    async def _acquire(self, timeout: float | None) -> Any:
        """Serve code that calls asyncpg's own method of this name, such as asyncpg's acquire context."""
        return await self._lend(timeout)
