"""`create_pool()` and the `Pool` it returns: asyncpg's pool, with our slots, deadlines and supply.

This module decides what a caller gets, for how long it waits, and what happens to a connection that comes back. Which
connection is next, and when one is made, checked and retired, is `_supply`'s. It knows no wire formats.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar, Unpack, cast

import asyncpg
from asyncpg.pool import PoolAcquireContext

from .._config.connection import ConnectKeywords
from .._driver.connection import Healing, session_class
from .._driver.connector import Connection, Connector, check_classes, prepare, require_asyncio
from .._driver.transaction import run_transaction
from .._errors import (
    ConfigurationError,
    ConnectError,
    ConnectTimeoutError,
    NeonAsyncError,
    PoolBusyError,
    PoolClosedError,
    PoolTimeoutError,
    forget_arguments,
)
from .._neon.endpoint import Endpoint, parse_host, short_name
from .._wire.tls import TLSReport
from .._wire.trust import AnchorSource
from .slots import Place, Proxy, Slot, SlotPool, slot_of
from .stats import PoolStats, Tallies
from .supply import Supply
from .waiters import TurnExpired

if TYPE_CHECKING:
    _AcquireContext: TypeAlias = PoolAcquireContext[asyncpg.Record]
else:
    _AcquireContext = PoolAcquireContext

_T = TypeVar("_T")
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Callback: TypeAlias = Callable[[Any], Awaitable[None]]

_log = logging.getLogger("neon_async")

# What is cancelled ends within an iteration or two of the event loop; closing waits no longer for anything else.
_CANCEL_GRACE = 1.0
# Far above what anybody wants, and below what a timer of the event loop or a slot counter chokes on.
_MAX_COUNT = 1_000_000_000


class AcquireContext(_AcquireContext):
    """What `pool.acquire()` returns: `await` it for a connection, or enter it with `async with`."""

    __slots__ = ()

    async def __aexit__(self, *_: object) -> None:
        """Give the connection back, and return at once: what is left to do for the next caller is done behind."""
        self.done = True
        connection, self.connection = self.connection, None
        cast(Pool, self.pool)._give_back(connection, None)


def _on_one_connection(method: _Method) -> _Method:
    """Return asyncpg's `method` of a pool, with a `timeout` that is for the whole of it, `acquire()` included."""

    name = method.__name__

    @functools.wraps(method)
    async def call(self: Pool, *args: Any, timeout: float | None = None, **keywords: Any) -> Any:  # noqa: ASYNC109
        acquiring = self.acquire(timeout=timeout)  # which judges it
        until = None if timeout is None else time.monotonic() + timeout
        async with acquiring as connection:
            left = None if until is None else until - time.monotonic()
            return await getattr(connection, name)(*args, timeout=left, **keywords)

    return cast(_Method, call)


class Pool(SlotPool):
    """A pool of verified connections, made by `create_pool()`; everything that asyncpg's pool does, it does.

    Open it with `async with pool:` or `await pool`, and close it with `await pool.close()` where `async with` does not.
    """

    def __init__(
        self,
        connector: Connector,
        supply: Supply,
        *,
        healing: Healing,
        tallies: Tallies,
        min_size: int,
        init_size: int,
        acquire_timeout: float,
        release_timeout: float,
        max_waiting: int | None,
        leak_after: float | None,
        setup: _Callback | None,
        init: _Callback | None,
        **options: Any,
    ) -> None:
        super().__init__(connect=self._make_connection, **options)
        self._endpoint = parse_host(connector.parameters.host)
        self._connector = connector
        self._supply = supply
        self._healing = healing
        self._tallies = tallies
        self._sizes = min_size, init_size
        self._acquire_timeout = acquire_timeout
        self._release_timeout = release_timeout
        self._max_waiting = max_waiting
        self._leak_after = leak_after
        self._on_acquire = setup
        self._on_connect = init
        self._name = short_name(connector.parameters.host)

    # -----------------------------------------------------------------------------------------------------------------
    # Seeing

    def __repr__(self) -> str:
        in_use, idle = self._slots.count(Place.IN_USE), sum(slot.is_connected() for slot in self._slots.idle)
        state = ", closed" if self.is_closing() else ""
        return f"<Pool {self._name}: {in_use} in use, {idle} idle, {len(self._supply.line)} waiting{state}>"

    @property
    def endpoint(self) -> Endpoint | None:
        """What the host name says, or None when it is not an endpoint's name at Neon."""
        return self._endpoint

    def get_min_size(self) -> int:
        """Return the number of connections that are kept while nobody needs them."""
        return self._sizes[0]

    def get_init_size(self) -> int:
        """Return the number of connections that the pool opens with."""
        return self._sizes[1]

    def tls_report(self) -> TLSReport | None:
        """Return what the latest TLS handshake of this pool came to, or None before the first."""
        return self._connector.tls_report

    def stats(self) -> PoolStats:
        """Return what the pool is doing, and what it has done since it was made."""
        for slot in list(self._slots.idle):
            if not slot.is_connected():
                self._supply.bury(slot)
        count = self._slots.count
        self._tallies.heals.count, self._tallies.heals.seconds = self._healing.heals, self._healing.seconds
        return PoolStats(
            max_size=self.get_max_size(),
            min_size=self._sizes[0],
            size=sum(slot.born is not None for slot in self._slots),
            in_use=count(Place.IN_USE),
            idle=count(Place.IDLE) + count(Place.GIVEN),
            checking=count(Place.CHECKING),
            resetting=count(Place.RESETTING),
            connecting=count(Place.CONNECTING),
            vacant=self.get_max_size() - self._slots.connected - count(Place.CONNECTING),
            waiting=len(self._supply.line),
            **self._tallies.snapshot(),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Opening

    def __await__(self) -> Generator[Any, None, Pool]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Pool:
        """Open the pool, with `init_size` connections, and return it. What fails here leaves no connection behind."""
        require_asyncio()
        await super().__aenter__()
        return self

    async def _warm_up(self) -> None:
        """Serve `SlotPool`, which opens with this: make the first connections."""
        self._supply.slots = self._slots
        began = time.monotonic()
        warming = [
            asyncio.ensure_future(self._wait_in_line(self._acquire_timeout, began)) for _ in range(self._sizes[1])
        ]
        try:
            slots = await asyncio.gather(*warming)
        except BaseException:
            for one in warming:
                one.cancel()
            self._begin_closing()
            self._shut()
            for outcome in await asyncio.gather(*warming, return_exceptions=True):
                if isinstance(outcome, Slot):
                    self._supply.offer(outcome)
            raise
        for slot in slots:
            self._supply.offer(slot)

    async def _make_connection(
        self, *_: object, connection_class: type[Any], record_class: type[Any], **__: object
    ) -> asyncpg.Connection[Any]:
        """Serve asyncpg's holders, which fill themselves with this."""
        connection = await self._connector.connect(connection_class=connection_class, record_class=record_class)
        if self._on_connect is not None:
            await self._run_init(self._on_connect, connection)
        return connection

    async def _run_init(self, init: _Callback, connection: asyncpg.Connection[Any]) -> None:
        """Run the caller's `init` within `connect_timeout`. A connection that it fails on is not used."""
        limit = self._connector.parameters.connect_timeout
        deadline = asyncio.timeout(limit)
        failure: NeonAsyncError
        try:
            async with deadline:
                await init(connection)
        except BaseException as error:
            lost = connection.is_closed()
            connection.terminate()
            if isinstance(error, TimeoutError) and deadline.expired():
                failure = ConnectTimeoutError(
                    f"init had not returned within connect_timeout={limit:g} s. Let it do less."
                )
            elif isinstance(error, Exception) and lost:
                failure = ConnectError(f"{self._name} broke off the connection while init ran. Try again.")
            else:
                raise
            raise failure from error

    def set_connect_args(self, dsn: str | None = None, **connect_kwargs: Any) -> NoReturn:
        """Refuse: what connections are made with is judged once, by `create_pool()`.

        Raises `ConfigurationError`. Make another pool for another server; a password that changes is a function.
        """
        raise ConfigurationError(
            "A pool's parameters are judged when it is created and do not change. Create another pool; for a password "
            "that changes, pass a function as password=."
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Acquire

    def acquire(self, *, timeout: float | None = None) -> AcquireContext:
        """Return a connection: `async with pool.acquire() as connection`, or `await` and `release()`.

        `timeout`: seconds for all of it, the wait for a compute that wakes included; default `acquire_timeout`.

        Raises `PoolTimeoutError` when that has passed, `PoolBusyError` when `max_waiting` callers wait, and
        `PoolClosedError`. When the server cannot be reached for a reason that will not pass by itself, such as a wrong
        password, raises that error at once.
        """
        if timeout is not None:
            _check_seconds("timeout", timeout, zero="for at once")
        return AcquireContext(self, timeout)

    execute = _on_one_connection(SlotPool.execute)
    executemany = _on_one_connection(SlotPool.executemany)
    fetchval = _on_one_connection(SlotPool.fetchval)
    copy_from_table = _on_one_connection(SlotPool.copy_from_table)
    copy_from_query = _on_one_connection(SlotPool.copy_from_query)
    copy_to_table = _on_one_connection(SlotPool.copy_to_table)
    copy_records_to_table = _on_one_connection(SlotPool.copy_records_to_table)
    if not TYPE_CHECKING:  # overloaded in asyncpg's stubs, which no assignment can repeat
        fetch = _on_one_connection(SlotPool.fetch)
        fetchrow = _on_one_connection(SlotPool.fetchrow)
        fetchmany = _on_one_connection(SlotPool.fetchmany)

    async def run_transaction(
        self,
        work: Callable[[Connection], Awaitable[_T]],
        *,
        attempts: int = 3,
        isolation: str | None = None,
        readonly: bool = False,
        deferrable: bool = False,
    ) -> _T:
        """Run `work(connection)` in a transaction, commit, and return what it returned.

        The work runs again, on a connection acquired anew, when the server reports a serialization failure (40001) or a
        deadlock (40P01), from a statement or from COMMIT, and when the connection is lost before COMMIT was sent. All
        but the database must bear that. `connection.transaction()` inside makes a savepoint. The work must not end the
        transaction itself; to roll back, raise an exception.

        `work`: an async function that takes a connection. `attempts`: how often it may run in all, default 3, at least
        1; the pauses in between are random, up to 20 ms at first, doubling to at most 1 s, and hold no connection.
        `isolation`: `read_uncommitted`, `read_committed`, `repeatable_read` or `serializable`; default the server's.
        `readonly`, `deferrable`: as in BEGIN. There is no deadline but the pool's and `command_timeout`; use
        `asyncio.timeout()`.

        Raises `CommitUnknownError` when no answer to COMMIT came: the transaction may have been committed, or not, and
        is never run again. `TransactionAbortedError` when a statement had failed and the work went on, or the work
        ended the transaction itself. `ConfigurationError` for a bad argument. Any other error of the work passes after
        a ROLLBACK, and the last one when the attempts are used up. A cancellation passes, too; one during COMMIT leaves
        the outcome unknown.
        """
        return await run_transaction(
            self.acquire,
            work,
            attempts=attempts,
            isolation=isolation,
            readonly=readonly,
            deferrable=deferrable,
            on_retry=self._tallies.retries.add,
        )

    async def _acquire(self, timeout: float | None) -> Proxy:  # noqa: ASYNC109  asyncpg's name
        """Serve `AcquireContext`."""
        self._require_open()
        self._require_initialized()
        self._require_own_loop()
        began = time.monotonic()
        limit = self._acquire_timeout if timeout is None else timeout
        slot = None if self._supply.line else self._supply.usable_idle(began)  # nobody overtakes
        if slot is None:
            self._require_room()
            slot = await self._wait_in_line(limit, began)
        proxy = await slot.lend()
        self._begin_loan(slot, began)
        if self._on_acquire is not None:
            await self._run_setup(self._on_acquire, slot, proxy, began + limit)
        return proxy

    def _require_open(self) -> None:
        if self.is_closing():
            state = "closed" if self._has_closed() else "closing"
            raise PoolClosedError(f"The pool is {state}: {self._name}. Make another.")

    def _require_room(self) -> None:
        """Raise `PoolBusyError` where as many wait as may, besides those for whom a connection is to be had or made."""
        if self._max_waiting is None:
            return
        free = self.get_max_size() - self._slots.count(Place.IN_USE)
        if len(self._supply.line) >= self._max_waiting + free - self._slots.count(Place.GIVEN):
            raise PoolBusyError(
                f"{self._state()}; max_waiting={self._max_waiting}. Try again later, or raise max_size or max_waiting."
            )

    async def _wait_in_line(self, limit: float, began: float) -> Slot:
        """Return a slot that is connected, and this caller's."""
        supply = self._supply
        until = asyncio.get_running_loop().time() + limit
        in_vain = False
        try:
            while True:
                self._require_open()
                waiter = supply.line.join(until, first=in_vain)
                supply.balance()
                slot = await supply.line.turn(waiter)
                if slot.is_connected() and not slot.is_outdated():
                    return slot
                supply.offer(slot)  # it has ended, or expired, since it was given
                in_vain = True
        except TurnExpired:
            self._tallies.timeouts.since(began)
            raise self._late(f"No connection within {limit:g} s") from supply.pace.last_failure
        finally:
            self._tallies.waits.since(began)

    def _late(self, what: str, step: str = "") -> PoolTimeoutError:
        return PoolTimeoutError(f"{what}: {self._state()}. {step or self._next_step()}")

    def _next_step(self) -> str:
        task, count = asyncio.current_task(), self._slots.count
        held = sum(slot.owner is task for slot in self._slots if slot.place is Place.IN_USE)
        if held and not self._slots.vacant:
            return f"This task itself holds {held} of them and would wait for itself: let it use the one it has."
        if self._supply.pace.last_failure is not None:
            return "The latest failure to connect is the cause of this error."
        if count(Place.CONNECTING):
            return "The compute may be waking. The connect goes on: try again, or allow more with acquire_timeout=."
        if count(Place.CHECKING) or count(Place.RESETTING):
            return "The server has not answered yet: try again, or allow more with acquire_timeout=."
        return "Hold connections for less time, raise max_size, or allow more with timeout= or acquire_timeout=."

    def _state(self) -> str:
        count = self._slots.count
        return (
            f"{self._name} has {count(Place.IN_USE)} of {self.get_max_size()} connections in use, "
            f"{count(Place.CONNECTING)} connecting, {count(Place.CHECKING) + count(Place.RESETTING)} checked or reset, "
            f"and {len(self._supply.line)} callers waiting"
        )

    async def _run_setup(self, setup: _Callback, slot: Slot, proxy: Proxy, until: float) -> None:
        """Run the caller's `setup` within the acquire. A connection that it fails on is not used again."""
        began = time.monotonic()
        deadline = asyncio.timeout(until - began)
        try:
            async with deadline:
                await setup(proxy)
        except BaseException as error:
            if slot_of(proxy, self) is not None:  # or it has ended, and another may stand in its place
                slot.discard()
            if isinstance(error, TimeoutError) and deadline.expired():
                self._tallies.timeouts.since(began)
                late = self._late("The time to acquire was over before setup returned", "Let setup do less.")
                raise late from error
            raise

    def _begin_loan(self, slot: Slot, began: float) -> None:
        self._slots.move(slot, Place.IN_USE)
        slot.lent_at = time.monotonic()
        slot.owner = asyncio.current_task()
        self._tallies.acquires.add(slot.lent_at - began)
        if self._leak_after is not None:
            stack = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
            slot.leak_timer = asyncio.get_running_loop().call_later(self._leak_after, self._report_leak, stack)

    def _report_leak(self, stack: traceback.StackSummary) -> None:
        stack.reverse()  # as a traceback: the latest call comes last
        lines = "".join(stack.format())
        _log.warning(
            "%s: a connection has not come back for %g s, acquired at:\n%s", self._name, self._leak_after, lines
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Release

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ASYNC109  asyncpg's name
        """Take a connection back, and wait until it is reset. `async with pool.acquire()` does not wait.

        `timeout`: seconds, default `release_timeout`, after which the connection is terminated; its slot is free either
        way, also when this call is cancelled. A task that is being cancelled does not wait. A connection that was
        released before is left alone.

        Raises `PoolTimeoutError` when the connection was terminated for being late, what the reset raised, and
        asyncpg's `InterfaceError` for what is not this pool's.
        """
        if timeout is not None:
            _check_seconds("timeout", timeout, zero="for at once")
        restoring = self._give_back(connection, timeout)
        task = asyncio.current_task()
        if restoring is None or (task is not None and task.cancelling()):
            return  # being cancelled, and on the way out: it should not wait for a server that may not answer
        await asyncio.wait([restoring])  # which goes on when this call is cancelled
        failure = None if restoring.cancelled() else restoring.result()  # cancelled: the pool was closed meanwhile
        if failure is not None:
            raise failure

    def _give_back(self, connection: object, timeout: float | None) -> asyncio.Task[Exception | None] | None:
        """End a loan. Returns the task that makes the connection fit for the next, where there is something to do."""
        slot = slot_of(connection, self)
        if slot is None:
            return None
        untouched = slot.is_untouched()
        fit = untouched or slot.needs_no_reset()
        if fit and not untouched:
            slot.heard_at = time.monotonic()
        restoring = None
        try:
            slot.recall()
        finally:
            if fit or not slot.is_connected():
                slot.free()
            else:
                self._end_loan(slot)
                limit = self._release_timeout if timeout is None else timeout
                restoring = self._supply.mend(slot, self._restore(slot, limit), limit)
        return restoring

    async def _restore(self, slot: Slot, limit: float) -> Exception | None:
        """Reset what a caller left, or end the connection. Returns what went wrong, for who waits for it."""
        if slot.task is not asyncio.current_task():
            return None  # the connection has ended before this began, and asyncpg has given the slot back
        began = time.monotonic()
        try:
            await slot.restore(began)
        except asyncio.CancelledError:
            if time.monotonic() < slot.until:
                raise  # the pool is closed
            _log.info("%s: a connection was not reset within %g s and ends", self._name, limit)
            return PoolTimeoutError(
                f"A connection of {self._name} was not reset within {limit:g} s and has been terminated; its slot is "
                "free. The server, or the way to it, may be stuck."
            )
        except Exception as error:  # noqa: BLE001  told to who waits; the connection is not used again in any case
            _log.info("%s: a connection could not be reset and ends (%s)", self._name, type(error).__name__)
            return error
        self._tallies.resets.since(began)
        slot.heard_at = time.monotonic()
        return None

    def _end_loan(self, slot: Slot) -> None:
        self._tallies.releases.since(slot.lent_at)
        slot.owner = None
        if slot.leak_timer is not None:
            slot.leak_timer.cancel()
            slot.leak_timer = None

    def _came_back(self, slot: Slot) -> None:
        """Serve `SlotPool`: the loan of `slot` has ended, and its connection is reset or gone."""
        if slot.place is Place.IN_USE:  # untouched, or its connection ended in its caller's hands
            self._end_loan(slot)
        self._supply.offer(slot)

    # -----------------------------------------------------------------------------------------------------------------
    # Closing

    async def close(self, *, timeout: float = 10.0) -> None:  # noqa: ASYNC109  psycopg_pool's name
        """Close the pool in time: callers in line are told at once, idle connections close, then those that come back.

        `timeout`: seconds, default 10.0, after which the connections still out are terminated. When this call is
        cancelled they are terminated at once.
        """
        _check_seconds("timeout", timeout, zero="for at once")
        if self._has_closed():
            return
        self._require_initialized()
        if self._begin_closing():
            self._wind_down()
        try:
            async with asyncio.timeout(timeout):
                await self._supply.emptied.wait()
        except TimeoutError:
            count = self._slots.count
            _log.info(
                "%s: not closed within %g s; terminating %d connections in use and %d being reset",
                *(self._name, timeout, count(Place.IN_USE), count(Place.RESETTING)),
            )
        finally:
            self.terminate()
        await self._supply.ended(_CANCEL_GRACE)

    def terminate(self) -> None:
        """Close the pool at once: callers in line are told, all connections terminated, also those in use."""
        if self._has_closed():
            return
        self._require_initialized()
        self._begin_closing()
        self._shut()
        self._end()
        _log.info("%s: the pool is closed", self._name)

    def _wind_down(self) -> None:
        self._supply.wind_down(lambda: PoolClosedError(f"The pool is closing: {self._name}. Make another."))

    def _shut(self) -> None:
        self._wind_down()
        self._supply.end()


# ---------------------------------------------------------------------------------------------------------------------
# Making one


@forget_arguments
def create_pool(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    min_size: int = 0,
    max_size: int = 10,
    init_size: int | None = None,
    acquire_timeout: float = 30.0,
    release_timeout: float = 5.0,
    max_waiting: int | None = None,
    max_queries: int = 50_000,
    max_lifetime: float = 3600.0,
    max_inactive_connection_lifetime: float = 240.0,
    check_after_idle: float = 30.0,
    leak_after: float | None = None,
    setup: Callable[[Connection], Awaitable[None]] | None = None,
    init: Callable[[asyncpg.Connection[Any]], Awaitable[None]] | None = None,
    reset: Callable[[asyncpg.Connection[Any]], Awaitable[None]] | None = None,
    connection_class: type[Any] = asyncpg.Connection,
    record_class: type[Any] = asyncpg.Record,
    **keywords: Unpack[ConnectKeywords],
) -> Pool:
    """Return a pool whose every connection is TLS 1.3, verified in full against one root and the host name.

    `dsn`: a connection URL, as the Neon console shows it; what it does not say comes from libpq's `PG*` variables. Any
    keyword of libpq or asyncpg may be given besides, and wins. No `sslmode` means verify-full; a weaker one is refused.

    `trust_anchor`: the root certificate to trust in place of ISRG Root X1, for a private endpoint or a test: PEM bytes,
    PEM text, or a path. `sslcrl` (or `crl`): the path of a CRL file; with it the server's certificate must be covered.

    `password`: a string, or a function, plain or async, that returns it; it is called for every new connection.

    `channel_binding`: `prefer` (default) binds the login to the TLS channel wherever the server offers it; `require`
    refuses a server that does not.

    `connect_timeout` (or asyncpg's `timeout`): seconds for everything one connection needs, DNS included; default 15.0,
    above 0, at most 3600.0. Neon advises 10 to 15 s, for a compute may have to wake.

    `acquire_timeout`: seconds for all that an acquire does, default 30.0; within it failures that may pass are tried
    again. `release_timeout`: seconds for reset and cancellation after a connection was given back, default 5.0; after
    that it is terminated. Both above 0. `max_waiting`: how many callers may wait at once for a connection that another
    has, default None for any number.

    `max_size`: the most connections, default 10, at least 1. `init_size`: connections to open with, default `min_size`.
    `min_size`: connections kept while nobody needs them, default 0; each one that Neon closes when it suspends the
    compute is made anew, which wakes it again.

    `max_inactive_connection_lifetime`: seconds after which an idle connection is closed, default 240.0, before Neon
    suspends the compute at 300 s. `max_lifetime`: seconds after which any connection is replaced, default 3600.0, up to
    a tenth earlier by chance. Both 0 for never. `max_queries`: queries after which it is replaced, default 50,000.

    `check_after_idle`: seconds of idleness after which a connection is pinged before it is handed out, default 30.0; 0
    for always. `leak_after`: seconds after which the stack that acquired a connection is logged as a warning, if it has
    not come back; default None for never, for every acquire then has to remember its stack.

    `server_settings`: what the session starts with, by name; one that cannot apply is refused.

    `setup` is called on every acquire with what the caller gets, within its deadline; `init` on every new connection,
    within `connect_timeout`; `reset` replaces the reset after use, within `release_timeout`. What they raise ends the
    connection.
    `connection_class`, `record_class`, and `command_timeout`, `statement_cache_size`, `max_cached_statement_lifetime`,
    `max_cacheable_statement_size` are asyncpg's.

    `keepalives_idle`, `keepalives_interval`: seconds, default 60 and 10; `keepalives_count`: default 3;
    `tcp_user_timeout`: milliseconds, default 90,000, 0 for the system's.

    Raises `InsecureConfigurationError` where a parameter asks for less than verify-full, and `ConfigurationError` for
    any other that cannot be honoured, in the call itself. Opening the pool connects only where `init_size` asks for it,
    and then raises what an acquire does. Warns, with a `UserWarning`, of a `min_size` above 0 on a Neon host.
    """
    init_size = min_size if init_size is None else init_size
    for name, count, lowest, highest in (
        ("max_size", max_size, 1, _MAX_COUNT),
        ("min_size", min_size, 0, max_size),
        ("init_size", init_size, min_size, max_size),
        ("max_queries", max_queries, 1, _MAX_COUNT),
        ("max_waiting", 0 if max_waiting is None else max_waiting, 0, _MAX_COUNT),
    ):
        _check_count(name, count, lowest, highest)
    for name, seconds, meaning in (
        ("acquire_timeout", acquire_timeout, None),
        ("release_timeout", release_timeout, None),
        ("leak_after", 1.0 if leak_after is None else leak_after, None),
        ("max_lifetime", max_lifetime, "for never"),
        ("max_inactive_connection_lifetime", max_inactive_connection_lifetime, "for never"),
        ("check_after_idle", check_after_idle, "for always"),
    ):
        _check_seconds(name, seconds, zero=meaning)
    check_classes(connection_class, record_class)
    for name, callback in (("setup", setup), ("init", init), ("reset", reset)):
        if callback is not None and not callable(callback):
            raise ConfigurationError(f"{name} must be an async function that takes a connection.")
    connector = prepare(dsn, trust_anchor=trust_anchor, **keywords)
    host = connector.parameters.host
    endpoint, healing, tallies = parse_host(host), Healing(), Tallies()
    if min_size > 0 and endpoint is not None:
        _warn_of_floor(min_size, endpoint)
    supply = Supply(
        short_name(host),
        tallies,
        min_size=min_size,
        max_lifetime=max_lifetime or math.inf,
        max_inactive=max_inactive_connection_lifetime or math.inf,
        check_after_idle=check_after_idle,
        close_timeout=release_timeout,
    )
    return Pool(
        connector,
        supply,
        healing=healing,
        tallies=tallies,
        min_size=min_size,
        init_size=init_size,
        max_size=max_size,
        acquire_timeout=acquire_timeout,
        release_timeout=release_timeout,
        max_waiting=max_waiting,
        max_queries=max_queries,
        leak_after=leak_after,
        setup=setup,
        init=init,
        reset=reset,
        connection_class=session_class(connection_class, host=host, endpoint=endpoint, healing=healing),
        record_class=record_class,
    )


def _check_count(name: str, value: object, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        of = " (max_size)" if name != "max_size" and highest != _MAX_COUNT else ""
        raise ConfigurationError(f"{name} must be a whole number from {lowest} to {highest}{of}, not {_shown(value)}.")


def _check_seconds(name: str, value: object, *, zero: str | None) -> None:
    """`zero`: what 0 stands for, where it is allowed."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= cast(float, value) <= _MAX_COUNT or (value == 0 and zero is None):
        least = "above 0" if zero is None else f"from 0, {zero},"
        raise ConfigurationError(f"{name} must be seconds {least} to {_MAX_COUNT}, not {_shown(value)}.")


def _shown(value: object) -> str:
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= _MAX_COUNT):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def _warn_of_floor(min_size: int, endpoint: Endpoint) -> None:
    warnings.warn(
        f"min_size={min_size} lets {endpoint.id} sleep no more: Neon closes the connections of a compute that it "
        "suspends, the pool opens them anew, and that wakes it, and is billed, day and night. Leave min_size at 0; "
        "where the first requests must not wait, open with init_size.",
        UserWarning,
        stacklevel=4,  # the caller of create_pool(), which is wrapped
    )
