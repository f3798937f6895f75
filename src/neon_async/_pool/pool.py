"""`create_pool()` and the `Pool` it returns: what a caller sees, and for how long it waits.

Which connection is next, and when one is made, checked and closed, is the supply's. Knows no wire formats.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import inspect
import os
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, Unpack, cast, overload

import asyncpg
from asyncpg.pool import PoolAcquireContext

from .._config.arguments import AnchorSource
from .._config.literals import IsolationLevel
from .._config.readers import SubclassOf
from .._driver.arguments import other_loop, require_asyncio
from .._driver.connection import Connection
from .._driver.holder import (
    Holder,
    HolderQueue,
    PoolBase,
    RecordT,
    Subscriptable,
    call_in,
    holder_of,
    is_current,
    mark_coroutine_functions,
)
from .._driver.transaction import run_transaction
from .._errors import (
    ConfigurationError,
    ConnectionLostError,
    PoolBusyError,
    PoolClosedError,
    PoolTimeoutError,
    QueryTimeoutError,
    UnsupportedEventLoopError,
    forget_arguments,
    text_of,
)
from .._text import counted
from .loan import Loan
from .options import PoolKeywords, PoolOptions, RowlessPoolKeywords, check_timeout
from .slots import Slot, State
from .waiters import WaitExpired

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    from .._driver.connector import Connector
    from .._neon.endpoint import Endpoint
    from .._wire.report import TLSReport
    from .health import PoolHealth
    from .stats import PoolStats
    from .supply import Supply

    class _AcquireContext(PoolAcquireContext[RecordT], Generic[RecordT]): ...
else:
    _AcquireContext = Subscriptable(PoolAcquireContext)

_T = TypeVar("_T")
_P = TypeVar("_P", bound="Pool[Any]")


_HOW_TO_OPEN = "Open it with `async with pool:` or `await pool`."


class _Phase(enum.Enum):
    """How far the life of a pool has come."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


_OPEN = _Phase.OPEN  # as the constants of `slots`


class AcquireContext(_AcquireContext[RecordT]):
    """What `pool.acquire()` returns: enter it with `async with`, or `await` it for a connection."""

    __slots__ = ()

    connection: Connection[RecordT] | None  # type: ignore[assignment]  # a proxy for one of ours
    done: bool
    pool: Pool[RecordT]
    timeout: float | None

    async def __aenter__(self) -> Connection[RecordT]:  # type: ignore[override]  # a proxy for one of ours
        if self.connection is not None or self.done:
            raise asyncpg.InterfaceError("a connection is already acquired")
        connection: Connection[RecordT] = await self.pool._lend(self.timeout)
        self.connection = connection
        return connection

    async def __aexit__(self, *failure: object) -> None:
        """Release the connection and return at once; what it needs is done in the background."""
        try:
            self.pool._end_loan(self.connection)
        except UnsupportedEventLoopError as error:  # nothing has changed
            self.pool._leave_elsewhere(self.connection, failure, error)
        self.done, self.connection = True, None

    def __await__(self) -> Generator[Any, None, Connection[RecordT]]:  # type: ignore[override]
        self.done = True
        return self.pool._lend(self.timeout).__await__()


class _ReleasingContext(AcquireContext):
    """The same for a pool whose class has a `release()` of its own, which is called as asyncpg's context does."""

    __slots__ = ()

    async def __aexit__(self, *failure: object) -> None:
        connection, self.connection, self.done = self.connection, None, True
        try:
            await self.pool.release(cast(Any, connection))
        except UnsupportedEventLoopError as error:
            self.pool._leave_elsewhere(connection, failure, error)


class Pool(PoolBase[RecordT]):
    """A pool of verified connections, made by `create_pool()`. It does all that asyncpg's pool does.

    Open it with `async with pool:` or `await pool`. `async with` closes it; otherwise close it with `pool.close()`.

    A subclass that `create_pool(pool_class=)` makes may override and add methods. Its `__init__`, where it has one,
    passes all arguments on; they are private.
    """

    def __init__(self, connector: Connector, options: PoolOptions) -> None:
        super().__init__(
            min_size=options.min_size,
            max_size=options.max_size,
            init_size=options.opening_size,
            max_queries=options.max_queries,
            max_inactive_connection_lifetime=options.max_inactive_connection_lifetime,
            setup=options.setup,
            init=options.init,
            reset=options.reset,
            connection_class=options.connection_class,
            record_class=options.record_class,
        )
        self._connector = connector
        self._options = options
        own_release = type(self).release is not Pool.release
        self._context_class: type[AcquireContext[RecordT]] = cast(
            Any, _ReleasingContext if own_release else AcquireContext
        )
        # Whether code of the caller's runs at the end of each acquire or in each release, and gets a connection.
        self._callers_acquire = own_release or options.setup is not None
        self._begin_life(None)

    def _begin_life(self, before: Supply | None) -> None:
        """Start with no connections, with the statistics of the supply before this one, if there was one."""
        from .supply import Supply  # not at the top: see the package's __init__

        holders = [Holder(self) for _ in range(self._options.max_size)]
        self._supply = Supply(self._connector, self._options, holders, before)
        self._set_holders(holders, HolderQueue(len(holders), self._free_holders, lambda: len(self._supply.waiters)))
        self._enter(_Phase.NEW)

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._supply.health.entered(is_open=phase is _Phase.OPEN)
        if phase is _Phase.OPEN:
            self._supply.report("PoolOpened", self)
        elif phase is _Phase.CLOSED:
            self._supply.report("PoolClosed", self)
        self._set_state(
            initializing=phase is _Phase.OPENING,
            initialized=phase not in (_Phase.NEW, _Phase.OPENING),
            closing=phase is _Phase.CLOSING,
            closed=phase is _Phase.CLOSED,
        )

    def _free_holders(self) -> list[Holder]:
        slots = self._supply.slots
        return [slot.holder for slot in (*slots.vacant, *slots.idle)]

    # -----------------------------------------------------------------------------------------------------------------
    # What the pool is doing

    def __repr__(self) -> str:
        count = self._supply.slots.count
        state = ", closed" if self.is_closing() else ""
        return (
            f"<Pool {self._supply.name}: {count(State.IN_USE)} in use, {count(State.IDLE)} idle, "
            f"{len(self._supply.waiters)} waiting{state}>"
        )

    @property
    def name(self) -> str:
        """The id of the endpoint, or else the host name: the name of the pool in logs, events and metrics."""
        return self._supply.name

    @property
    def endpoint(self) -> Endpoint | None:
        """What the host name says, or None when it is not the name of a Neon endpoint."""
        return self._connector.parameters.endpoint

    def get_init_size(self) -> int:
        """Return the number of connections that the pool opens with."""
        return self._options.opening_size

    def is_closing(self) -> bool:
        """Return whether the pool is closing or closed."""
        return self._phase in (_Phase.CLOSING, _Phase.CLOSED)

    def tls_report(self) -> TLSReport | None:
        """Return what the latest TLS handshake of this pool settled on, or None before the first."""
        return self._connector.tls_report

    def stats(self) -> PoolStats:
        """Return what the pool is doing now, and what it has done since it was created."""
        supply = self._supply
        count, healing = supply.slots.count, self._connector.healing
        from .stats import PoolStats

        return PoolStats(
            max_size=self._options.max_size,
            min_size=self._options.min_size,
            size=supply.size,
            in_use=count(State.IN_USE),
            idle=count(State.IDLE) + count(State.RESERVED),
            checking=count(State.CHECKING) + count(State.SILENT),
            resetting=self._resetting(),
            connecting=count(State.CONNECTING),
            vacant=count(State.VACANT),
            waiting=len(supply.waiters),
            **supply.tallies.snapshot() | {"heals": healing.heals, "heal_seconds": healing.seconds},
        )

    def health(self) -> PoolHealth:
        """Return what the pool knows about its database. Nothing is sent to find out."""
        return self._supply.health.snapshot()

    def _resetting(self) -> int:
        """Return how many connections are being reset or closed."""
        return sum(self._supply.slots.count(state) for state in (State.RESETTING, State.CLOSING, State.STUCK))

    # -----------------------------------------------------------------------------------------------------------------
    # Opening

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        """Open the pool with `init_size` connections and return it. If that fails, no connection is left behind.

        A pool that was closed can be opened again, also in another event loop. What it has learned about the server is
        kept, so that its next connect takes three round trips.

        Raises:
            PoolClosedError: The pool is closing.
        """
        require_asyncio()
        if self._phase not in (_Phase.NEW, _Phase.CLOSED) and self._own_loop.is_closed():
            self._terminate(self._supply)  # that event loop died without closing the pool
        if self._phase is _Phase.OPENING:
            raise asyncpg.InterfaceError("pool is being initialized in another task")
        if self._phase is _Phase.OPEN:
            return self
        if self._phase is _Phase.CLOSING:
            raise self._closed_error()
        if self._phase is _Phase.CLOSED:
            self._begin_life(self._supply)
        self._enter(_Phase.OPENING)
        supply = self._supply
        supply.loop = asyncio.get_running_loop()
        self._set_loop(supply.loop)
        _opened.add(self)
        try:
            await self._make_first_connections(supply, self._options.opening_size)
        except BaseException:
            if self._supply is supply:  # else it was terminated, and another task has opened it again
                self._enter(_Phase.CLOSED)
                supply.terminate(self._closed_error)
            raise
        if self._supply is supply and not self.is_closing():
            self._enter(_Phase.OPEN)
        return self

    async def _make_first_connections(self, supply: Supply, count: int) -> None:
        began = time.monotonic()
        slots: list[Slot] = []

        async def make_one() -> None:
            if self._supply is not supply:  # terminated, and opened again, before this task began
                raise self._closed_error(_Phase.CLOSED)
            slots.append(await self._wait_for_slot(None, began))

        making = [asyncio.ensure_future(make_one()) for _ in range(count)]
        try:
            await asyncio.gather(*making)
        finally:
            for one in making:
                one.cancel()
            for slot in slots:  # only now, so that each of them has made a connection of its own
                supply.give_back(slot)

    def set_connect_args(self, dsn: str | None = None, **connect_kwargs: Any) -> NoReturn:
        """Refuse: the parameters of a pool are judged once, by `create_pool()`.

        Raises:
            ConfigurationError: Always. Create a new pool for another server, and pass a function as `password` where
                the password changes.
        """
        raise ConfigurationError(
            "The parameters of a pool are judged when it is created and do not change. Create a new pool; for a "
            "password that changes, pass a function as password=."
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Acquire

    def acquire(self, *, timeout: float | None = None) -> AcquireContext[RecordT]:
        """Return a connection from the pool.

        Use it as `async with pool.acquire() as connection:`, or `await` it and call `release()`.

        Args:
            timeout: Seconds for the whole acquire, including a compute that has to wake. 0 takes what is there and does
                not wait. Default: `acquire_timeout`.

        Raises:
            PoolTimeoutError: No connection became available in time.
            PoolBusyError: `max_waiting` callers are waiting already.
            PoolClosedError: The pool is not open, is closing, or is closed.
            NeonAsyncError: The server cannot be reached for a reason that does not pass by itself, such as a wrong
                password; raised at once.
            Exception: What `init`, `setup`, the password function or `__init__()` of `connection_class` raised for this
                acquire, unchanged.
        """
        if timeout is not None:
            check_timeout("timeout", timeout)
        return self._context_class(self, timeout)

    async def _lend(self, timeout: float | None) -> Any:
        """Return the connection of a new loan, on which `setup` has run."""
        began = time.monotonic()
        slot = self._take_idle(began) or await self._wait_for_slot(timeout, began)
        loan = Loan(self._supply, slot, began)
        loan.owner = asyncio.current_task()
        proxy = slot.holder.lend()
        loan.report()
        if self._options.setup is not None:
            await self._run_setup(self._options.setup, loan, proxy, timeout)
        return proxy

    def _take_idle(self, now: float) -> Slot | None:
        """Return the slot of an idle connection, or None where this caller has to wait.

        Raises:
            PoolBusyError: It may not wait.
            PoolClosedError: The pool is not open.
            UnsupportedEventLoopError: It was opened in another event loop.
        """
        if self._phase is not _OPEN:
            raise self._unopened_error()
        if not is_current(self._supply.loop):
            raise self._other_loop_error()
        # A caller that comes now must not overtake those that wait.
        slot = None if self._supply.waiters else self._supply.take_idle(now)
        if slot is None and self._options.max_waiting is not None:
            self._require_room(self._options.max_waiting)
        return slot

    async def _wait_for_slot(self, timeout: float | None, began: float) -> Slot:
        """Return a slot that is connected and reserved for this caller."""
        supply, limit = self._supply, self._options.acquire_timeout if timeout is None else timeout
        deadline, front = began + limit, False
        try:
            while True:
                if supply.closing:
                    raise self._closed_error(unavailable=self._phase is _Phase.CLOSING)
                waiter = supply.waiters.join(deadline, front=front)
                supply.balance()
                try:
                    slot = await waiter
                except BaseException:
                    supply.waiters.leave(waiter)
                    raise
                if slot.holder.is_connected() and not supply.is_expired(slot) and not supply.closing:
                    break
                supply.give_back(slot)  # it has ended or expired since it was handed over
                front = True
        except WaitExpired:
            supply.tallies.timeouts.since(began)
            raise self._timeout_error(f"No connection within {limit:g} s") from supply.pace.last_failure
        finally:
            supply.tallies.waits.since(began)
        if slot.holder.connection is None:  # `on_event` has ended it
            supply.give_back(slot)
            return await self._wait_for_slot(timeout, began)
        return slot

    async def _run_setup(
        self, setup: Callable[[Any], Awaitable[None]], loan: Loan, proxy: object, timeout: float | None
    ) -> None:
        """Run the caller's `setup` within the acquire. A connection that it fails on is not used again."""
        began, limit = time.monotonic(), self._options.acquire_timeout if timeout is None else timeout
        deadline = asyncio.timeout(loan.called_at + limit - began)
        try:
            async with deadline:
                await setup(proxy)
        except BaseException as error:
            if loan.slot.loan is loan:  # else it has ended, and another one may have taken its place
                self._supply.terminate_after_setup(loan.slot)
            if isinstance(error, TimeoutError) and deadline.expired():
                self._supply.tallies.timeouts.since(began)
                raise self._timeout_error(
                    "The time to acquire was over before setup returned", "Let setup do less, or allow more time."
                ) from error
            raise

    def _unopened_error(self) -> PoolClosedError:
        if self._phase is _Phase.OPENING:
            return PoolClosedError(
                f"The pool {self._supply.name} is being initialized, but not yet ready: another task is opening it. "
                "Acquire from it when that task has opened it.",
                unavailable=True,
            )
        if self._phase is _Phase.NEW:
            return PoolClosedError(f"The pool {self._supply.name} is not open: pool is not initialized. {_HOW_TO_OPEN}")
        return self._closed_error(unavailable=self._phase is _Phase.CLOSING)

    def _closed_error(self, phase: _Phase | None = None, *, unavailable: bool = True) -> PoolClosedError:
        phase = phase or self._phase
        advice = "Open it again with `async with pool:`." if phase is _Phase.CLOSED else "Create a new pool."
        text = f"The pool is {phase.value}: {self._supply.name}. {advice}"
        return PoolClosedError(text, unavailable=unavailable)

    def _require_own_loop(self) -> None:
        if not is_current(self._own_loop):
            raise self._other_loop_error()

    def _other_loop_error(self) -> UnsupportedEventLoopError:
        return UnsupportedEventLoopError(
            "This pool was opened in another event loop, and its connections belong to that loop. Open one pool in "
            "each event loop, and release a connection in the loop that acquired it."
        )

    def _require_room(self, limit: int) -> None:
        """Raise `PoolBusyError` where as many callers wait as may, beyond those for whom a connection can be had."""
        count = self._supply.slots.count
        # A connection that does not answer gives its slot back, too, but only when its time is over.
        taken = (State.IN_USE, State.RESERVED, State.SILENT, State.STUCK)
        free = self._options.max_size - sum(count(state) for state in taken)
        if len(self._supply.waiters) >= limit + free:
            raise PoolBusyError(
                f"{self._describe()}; max_waiting={limit}. Try again later, or raise max_size or max_waiting."
            )

    # The error of a caller that got no connection in time

    def _timeout_error(self, what: str, advice: str = "") -> PoolTimeoutError:
        own = "" if advice else self._own_advice()
        return PoolTimeoutError(f"{what}: {self._describe()}. {advice or own or self._advice()}", unavailable=not own)

    def _describe(self) -> str:
        count = self._supply.slots.count
        in_between = count(State.CHECKING) + count(State.SILENT) + self._resetting()
        return (
            f"{self._supply.name} has {count(State.IN_USE)} of {self._options.max_size} connections in use, "
            f"{count(State.CONNECTING)} connecting, {in_between} checked or reset, "
            f"and {counted(len(self._supply.waiters), 'caller')} waiting"
        )

    def _own_advice(self) -> str:
        """Return what a task that waits for itself can do about it, or "" where it does not."""
        task, slots = asyncio.current_task(), self._supply.slots
        held = sum(slot.loan is not None and slot.loan.owner is task for slot in slots)
        if held and not slots.vacant:
            return f"This task itself holds {held} of them and would wait for itself. Use the connection it has."
        return ""

    def _advice(self) -> str:
        slots = self._supply.slots
        failure = self._supply.pace.last_failure
        if failure is not None:
            return f"The latest failure to connect is the cause of this error: {text_of(failure)}"
        if slots.count(State.CONNECTING):
            return "The compute may be waking. The connect goes on: try again, or raise acquire_timeout."
        if slots.count(State.CHECKING) or slots.count(State.SILENT) or self._resetting():
            return "The server has not answered yet. Try again, or raise acquire_timeout."
        return "Release connections sooner, raise max_size, or raise timeout or acquire_timeout."

    # -----------------------------------------------------------------------------------------------------------------
    # Release

    async def release(
        self, connection: asyncpg.Connection[Any] | PoolConnectionProxy[Any], *, timeout: float | None = None
    ) -> None:
        """Release a connection. Where its reset runs in the background, wait for that.

        A reset that is sent ahead of the next statement needs no wait, and `async with pool.acquire()` never waits.

        A connection that was released before is left alone. A task that is being cancelled does not wait. A release
        that is cancelled goes on in the background.

        Args:
            connection: What `acquire()` returned.
            timeout: Seconds for the reset; after that the connection is terminated, and its slot is free either way.
                Default: `release_timeout`.

        Raises:
            PoolTimeoutError: The connection was terminated because the reset took too long.
            asyncpg.InterfaceError: The connection does not belong to this pool.
            UnsupportedEventLoopError: The pool was opened in another event loop.
            Exception: What the reset raised; the connection was terminated.
        """
        if timeout is not None:
            check_timeout("timeout", timeout)
        task = self._end_loan(connection, timeout)
        if task is None:
            return
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            return
        await asyncio.wait([task])  # which goes on when this call is cancelled
        failure = None if task.cancelled() else task.result()  # cancelled: the pool was terminated meanwhile
        if failure is not None:
            raise failure

    def _end_loan(self, connection: object, timeout: float | None = None) -> asyncio.Task[Any] | None:
        holder = holder_of(connection, self)
        if holder is None:
            return None
        self._require_own_loop()
        loan = self._supply.slot_of(holder).loan
        return None if loan is None else loan.end(timeout)  # None: `on_event` releases what is being released

    def _leave_elsewhere(
        self, connection: object, failure: tuple[object, ...], error: UnsupportedEventLoopError
    ) -> None:
        """End the loan of a block that is left where the event loop does not run, if its coroutine is being closed.

        Raises:
            UnsupportedEventLoopError: `error`, if the block is left in another way.
        """
        if failure[:1] != (GeneratorExit,):
            raise error
        self._end_closed(holder_of(connection, self))

    def _end_closed(self, holder: Holder | None) -> None:
        """Terminate the connection of a coroutine that is closed, where the event loop does not run.

        Nothing can be sent there, and no work begun. The pool makes another connection when it is needed.
        """
        if holder is not None and not is_current(self._supply.loop):
            holder.terminate()

    async def expire_connections(self) -> None:
        """Lend no connection again that is open now: idle ones are replaced when needed, others when released.

        On a pooled host all statements are prepared under new texts, so that none is one that PgBouncer has kept.
        """
        self._supply.expire()

    # -----------------------------------------------------------------------------------------------------------------
    # Closing

    async def close(self, *, timeout: float = 10.0) -> None:
        """Close the pool: refuse waiters at once, close idle connections, then those that callers release.

        Cancelling this call terminates the connections that are still in use. After the event loop in which the pool
        was opened was closed, all connections are terminated at once.

        Args:
            timeout: Seconds after which the connections that are still in use are terminated. Default: 10.0.

        Raises:
            PoolClosedError: The pool was never opened.
            UnsupportedEventLoopError: The pool was opened in another event loop, which still exists.
        """
        check_timeout("timeout", timeout)
        if self._phase is _Phase.CLOSED:
            return
        self._require_opened()
        supply = self._supply
        if self._own_loop.is_closed():  # nothing can be closed politely any more
            self._terminate(supply)
            return
        self._require_own_loop()
        if self._phase is not _Phase.CLOSING:
            self._enter(_Phase.CLOSING)
            supply.start_closing(self._closed_error)
        try:
            async with asyncio.timeout(timeout):
                await supply.emptied.wait()
        except TimeoutError:
            count = supply.slots.count
            supply.log.info(
                "not closed within %(limit)g s; terminating connections: %(in_use)d in use, %(resetting)d being reset",
                event="close_late",
                limit=timeout,
                in_use=count(State.IN_USE),
                resetting=self._resetting(),
            )
            self._terminate_by_close(supply)
        except BaseException:
            self._terminate_by_close(supply)
            raise
        finally:
            self._terminate(supply)
        await supply.wait_for_tasks()

    def _terminate_by_close(self, supply: Supply) -> None:
        """Terminate the pool by the method that a subclass may have overridden, unless it was opened again."""
        if self._supply is supply:
            self.terminate()

    def terminate(self) -> None:
        """Close the pool at once: refuse waiters, and terminate all connections, also those in use.

        It can be called where no event loop runs, also after the pool's event loop was closed, and from any thread.
        While the pool's event loop runs in another thread, the server learns of the end of the connections at once, and
        the pool counts them as ended a moment later.

        Raises:
            PoolClosedError: The pool was never opened.
        """
        if self._phase is _Phase.CLOSED:
            return
        self._require_opened()
        loop, supply = self._own_loop, self._supply
        if loop.is_running() and not is_current(loop) and call_in(loop, functools.partial(self._terminate, supply)):
            supply.shut_down()  # the loop may be blocked, or stop before it makes the call
        else:
            self._terminate(supply)

    def _terminate(self, supply: Supply) -> None:
        """End the life of the pool that has this supply, unless it has ended: the pool may have been opened again."""
        if self._supply is not supply or self._phase is _Phase.CLOSED:
            return
        self._enter(_Phase.CLOSED)
        if self._own_loop.is_closed():
            supply.abandon()
        else:
            supply.terminate(self._closed_error)
        supply.log.flush()
        supply.log.info("the pool is closed", event="pool_closed")

    def _leave_to_parent(self) -> None:
        """Start empty in a forked process. The connections stay those of the parent, which keeps using them."""
        self._supply.leave_to_parent()
        _of_parent.append(self._supply)
        self._begin_life(None)

    def _require_opened(self) -> None:
        if self._phase is _Phase.NEW:
            raise PoolClosedError(
                f"The pool {self._supply.name} was never opened: pool is not initialized. {_HOW_TO_OPEN}"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Transactions, and asyncpg's calls that acquire by themselves

    @contextlib.asynccontextmanager
    async def transaction(
        self,
        *,
        isolation: IsolationLevel | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        role: str | None = None,
        settings: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Connection[RecordT]]:
        """Acquire a connection and run a transaction on it: `async with pool.transaction() as connection:`.

        BEGIN, the role and the settings travel with the first statement and cost no round trip. Leaving the block
        commits; an exception rolls back. The connection is released either way.

        Put a statement that may fail into `async with connection.transaction()`, which makes a savepoint: without one,
        its failure rolls back everything, also where its error is suppressed.

        Args:
            isolation: `read_uncommitted`, `read_committed`, `repeatable_read` or `serializable`. Default: the server's.
            readonly: Whether the transaction is READ ONLY.
            deferrable: Whether the transaction is DEFERRABLE.
            role: The role for this transaction (`SET LOCAL ROLE`), for row-level security. Default: the session's.
            settings: Settings for this transaction by name (`set_config(name, value, true)`), such as the claims that
                policies of row-level security read. Default: none.
            timeout: Seconds for the acquire. Default: `acquire_timeout`. The transaction itself has no deadline but
                `command_timeout`; use `asyncio.timeout()`.

        Raises:
            ConfigurationError: An argument is not valid.
            TransactionAbortedError: A statement had failed and its error was suppressed, so COMMIT rolled back.
            CommitUnknownError: No answer to COMMIT came. The transaction may have been committed, or not.
            Exception: What `acquire()` raises, and what the server says of the role or of a setting; no statement of
                the block has run then.
        """
        options = {
            "isolation": isolation,
            "readonly": readonly,
            "deferrable": deferrable,
            "role": role,
            "settings": settings,
        }
        # Only what was given, so that a caller's class keeps its own defaults.
        given: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, False)}
        async with self.acquire(timeout=timeout) as connection, connection.transaction(**given):
            yield connection

    async def run_transaction(
        self,
        work: Callable[[Connection[RecordT]], Awaitable[_T]],
        *,
        attempts: int = 3,
        isolation: IsolationLevel | None = None,
        readonly: bool | None = None,
        deferrable: bool | None = None,
    ) -> _T:
        """Run `work(connection)` in a transaction, commit, and return what it returned.

        The work runs again, on another connection, when the server reports a serialization failure (40001) or a
        deadlock (40P01), from a statement or from COMMIT, when a prepared statement was stale, and when the connection
        is lost before COMMIT was sent or, where the transaction is `readonly`, at any time.
        Everything in it but the database must be safe to repeat. `connection.transaction()` inside makes a savepoint.
        The work must not end the transaction itself; to roll back, raise an exception. There is no deadline but those
        of the pool and `command_timeout`; use `asyncio.timeout()`.

        Args:
            work: An async function that takes a connection.
            attempts: How often the work may run in all, at least 1. Default: 3. The pauses in between are random, up to
                20 ms at first, doubling to at most 1 s, and hold no connection.
            isolation: `read_uncommitted`, `read_committed`, `repeatable_read` or `serializable`. Default: as for
                `connection.transaction()`, which is the server's unless a `connection_class` overrides it.
            readonly: Whether the transaction is READ ONLY. Default: as for `connection.transaction()`.
            deferrable: Whether the transaction is DEFERRABLE. Default: as for `connection.transaction()`.

        Raises:
            CommitUnknownError: No answer to COMMIT came. The transaction may have been committed, or not; it is never
                run again. A cancellation during COMMIT leaves the outcome unknown as well.
            TransactionAbortedError: A statement had failed and the work went on, or the work ended the transaction
                itself.
            ConfigurationError: An argument is not valid.
            Exception: Any other error of the work, after a ROLLBACK; the last one when the attempts are used up.
        """
        return await run_transaction(
            self.acquire,
            work,
            attempts=attempts,
            isolation=isolation,
            readonly=readonly,
            deferrable=deferrable,
            on_retry=self._supply.tallies.retries.add,
        )

    async def _call(
        self, method: str, args: Any, options: Mapping[str, Any], timeout: float | None, *, again: bool = True
    ) -> Any:
        """Call a method of a connection on one of its own, within `timeout` for all of it.

        It runs again, on another connection, when a reset sent ahead of it failed: the server has refused it then, and
        nothing of it was executed. What makes one reset fail can make all of them fail, so it may run as often as there
        can be connections, and once more.

        Args:
            method: The name of the method.
            args: Its arguments.
            options: Its keyword arguments but for `timeout`.
            timeout: Seconds, or None for `acquire_timeout` and `command_timeout`.
            again: Whether the arguments can be used a second time.
        """
        further = self._options.max_size if again else 0
        if timeout is not None:
            check_timeout("timeout", timeout)
        whole, until = timeout, None if timeout is None else time.monotonic() + timeout
        while True:  # without a timeout none is passed on: a method of the caller's class keeps its own default
            try:
                if self._callers_acquire or type(self).acquire is not _acquire or "acquire" in self.__dict__:
                    async with self.acquire(timeout=timeout) as connection:
                        options = options if until is None else {**options, "timeout": until - time.monotonic()}
                        return await getattr(connection, method)(*args, **options)
                began = time.monotonic()
                slot = self._take_idle(began) or await self._wait_for_slot(timeout, began)
                loan = Loan(self._supply, slot, began)
                try:  # as the block above, but without a proxy where nothing else gets the connection
                    owned = slot.holder
                    call = getattr(owned.lend() if owned.is_observed else owned.connection, method)
                    loan.report()
                    options = options if until is None else {**options, "timeout": until - time.monotonic()}
                    return await call(*args, **options)
                except GeneratorExit:
                    self._end_closed(slot.holder)
                    raise
                finally:
                    if slot.loan is loan:  # else the connection has ended
                        loan.end()
            except QueryTimeoutError as error:
                if whole is not None and "timeout" in options:
                    taken = whole - options["timeout"]
                    error.args = (f"{error} Of the timeout={whole:g} s of the call, the acquire took {taken:.2f} s.",)
                raise
            except ConnectionLostError as error:
                if not further or not error.nothing_executed:
                    raise
            further -= 1
            timeout = None if until is None else max(until - time.monotonic(), 0.0)

    if not TYPE_CHECKING:  # `signatures` of the driver has the types; each returns the coroutine of `_call()`

        def execute(self, query, *args, timeout=None):
            """Execute SQL on a connection of its own, as asyncpg does. `timeout` is for the acquire, too."""
            return self._call("execute", (query, *args), {}, timeout)

        def executemany(self, command, args, *, timeout=None):
            """Execute SQL for each sequence of arguments, as asyncpg does. `timeout` is for the acquire, too."""
            again = not isinstance(args, Iterator)
            return self._call("executemany", (command, args), {}, timeout, again=again)

        def fetch(self, query, *args, timeout=None, **options):
            """Run a query on a connection of its own and return all rows. `timeout` is for the acquire, too."""
            return self._call("fetch", (query, *args), options, timeout)

        def fetchval(self, query, *args, timeout=None, **options):
            """Run a query on a connection of its own and return one value. `timeout` is for the acquire, too."""
            return self._call("fetchval", (query, *args), options, timeout)

        def fetchrow(self, query, *args, timeout=None, **options):
            """Run a query on a connection of its own and return one row. `timeout` is for the acquire, too."""
            return self._call("fetchrow", (query, *args), options, timeout)

        def fetchmany(self, query, args, *, timeout=None, **options):
            """Run a query for each sequence of arguments and return the rows. `timeout` is for the acquire, too."""
            again = not isinstance(args, Iterator)
            return self._call("fetchmany", (query, args), options, timeout, again=again)

        def copy_from_table(self, table_name, *, timeout=None, **options):
            """Copy the rows of a table, as asyncpg does. `timeout` is for the acquire, too."""
            return self._call("copy_from_table", (table_name,), options, timeout, again=False)

        def copy_from_query(self, query, *args, timeout=None, **options):
            """Copy the rows of a query, as asyncpg does. `timeout` is for the acquire, too."""
            return self._call("copy_from_query", (query, *args), options, timeout, again=False)

        def copy_to_table(self, table_name, *, timeout=None, **options):
            """Copy data to a table, as asyncpg does. `timeout` is for the acquire, too."""
            return self._call("copy_to_table", (table_name,), options, timeout, again=False)

        def copy_records_to_table(self, table_name, *, timeout=None, **options):
            """Copy records to a table, as asyncpg does. `timeout` is for the acquire, too."""
            return self._call("copy_records_to_table", (table_name,), options, timeout, again=False)


mark_coroutine_functions(Pool, asyncpg.Pool)
_acquire = Pool.acquire  # a subclass, a tracer or a test may have another one


# ---------------------------------------------------------------------------------------------------------------------
# Forks

_opened: weakref.WeakSet[Pool[Any]] = weakref.WeakSet()
# Never freed: a destructor would end the connection on the parent's behalf.
_of_parent: list[Supply] = []


def _start_empty() -> None:
    for pool in list(_opened):
        pool._leave_to_parent()
    _opened.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_empty)


# ---------------------------------------------------------------------------------------------------------------------
# The way to a pool


@overload
def create_pool(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    **keywords: Unpack[RowlessPoolKeywords[asyncpg.Record]],
) -> Pool: ...


@overload
def create_pool(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    record_class: type[RecordT],
    **keywords: Unpack[RowlessPoolKeywords[RecordT]],
) -> Pool[RecordT]: ...


@overload
def create_pool(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    pool_class: type[_P],
    **keywords: Unpack[PoolKeywords[Any]],
) -> _P: ...


@forget_arguments
def create_pool(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    pool_class: type[Any] = Pool,
    **keywords: Unpack[PoolKeywords[Any]],
) -> Any:
    """Return a pool whose every connection is TLS 1.3, verified in full against one root and the host name.

    Opening the pool connects only where `init_size` or `min_size` asks for it, and then raises what an acquire does.
    The options of the pool are documented at `PoolOptions`, those of its connections at `connect()`.

    Args:
        dsn: A connection URL, as the Neon console shows it. What it does not contain comes from libpq's `PG*`
            variables. Any keyword of libpq or asyncpg may be given besides, and wins; `""` for a file, an address or a
            keyword that is refused means that its variable is ignored. No `sslmode` means verify-full; a weaker one is
            refused.
        trust_anchor: The root certificates to trust in place of ISRG Root X1, for a private endpoint or a test: PEM
            bytes, PEM text, or a path, with at most ten roots. Or `LETS_ENCRYPT_ROOTS`: ISRG Root X1 and X2, Root YR
            and YE, by their fingerprints, which is more trust than Neon needs today.
        loop: The running event loop, which is used in any case. Any other is refused.
        pool_class: The class of the pool, a subclass of `Pool`, which is the default.
        **keywords: Options of the pool, and parameters of its connections.

    Raises:
        InsecureConfigurationError: A parameter asks for less than verify-full. Raised by the call itself.
        ConfigurationError: Any other parameter that cannot be honoured. Raised by the call itself.

    Warns:
        UserWarning: `min_size` is above 0 on a Neon host, which keeps its compute from scaling to zero.
    """
    from .._driver.connector import prepare  # not at the top: see the package's __init__

    _POOL_CLASS.check("pool_class", pool_class)
    options, parameters = PoolOptions.split(keywords)
    connector = prepare(dsn, trust_anchor=trust_anchor, loop=other_loop(loop), **parameters)
    connector.class_for(options.connection_class)
    endpoint = connector.parameters.endpoint
    if options.min_size > 0 and endpoint is not None:
        _warn_of_floor(options.min_size, endpoint)
    return pool_class(connector, options)


_POOL_CLASS = SubclassOf(Pool, "neon_async.Pool")


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of `create_pool()` with the options of the pool, which stand once, in `PoolOptions`."""
    signature = inspect.signature(function)
    *own, keywords = signature.parameters.values()
    options = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in fields(PoolOptions)
    ]
    return signature.replace(parameters=[*own, *options, keywords])


create_pool.__signature__ = _with_options(create_pool)  # type: ignore[attr-defined]  # for help() and editors


def _warn_of_floor(min_size: int, endpoint: Endpoint) -> None:
    warnings.warn(
        f"min_size={min_size} keeps {endpoint.id} from scaling to zero: Neon closes the connections of a compute that "
        "it suspends, the pool opens new ones, and that wakes the compute, and is billed, day and night. Leave "
        "min_size at 0; where the first requests must not wait, use init_size.",
        UserWarning,
        stacklevel=4,  # the caller of create_pool(), which is wrapped
    )
