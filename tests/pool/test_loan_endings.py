"""A loan ends on one path however it ends: the slot is offered once, one release is counted, and the stats balance."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import pytest
from support.probes import HANG, assert_balanced, assert_whole, connected, make_pool, until, until_settled

import neon_async
from neon_async._pool.slots import Slot, Slots, State
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


class Watch:
    """What a pool of one connection does with its slot."""

    def __init__(self, pool: neon_async.Pool, endpoint: LocalEndpoint, admin: Any) -> None:
        self.pool = pool
        self.endpoint = endpoint
        self.admin = admin
        self.states: list[str] = []
        self.offers = 0

    async def acquire(self) -> Any:
        """Return a connection, and watch from now on."""
        connection = await self.pool.acquire()
        self.states.clear()
        self.offers = 0
        return connection

    async def kill(self, connection: Any) -> None:
        """Have the server end the connection."""
        await self.admin.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())


@contextlib.asynccontextmanager
async def watched(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Watch]:
    """Yield a pool of one connection whose slot is watched. Afterwards its books must balance."""
    async with (
        connected(postgres) as admin,
        LocalEndpoint(postgres) as endpoint,
        make_pool(endpoint, max_size=1, init_size=1, **options) as pool,
        asyncio.timeout(HANG),
    ):
        watch = Watch(pool, endpoint, admin)
        supply: Any = pool._supply
        move, offer = Slots.move, supply._offer

        def noting_move(slots: Slots, slot: Slot, state: State) -> None:
            move(slots, slot, state)
            if slots is supply.slots:
                watch.states.append(state.name.lower())

        def noting_offer(slot: Slot, **known: bool) -> None:
            watch.offers += 1
            offer(slot, **known)

        monkeypatch.setattr(Slots, "move", noting_move)
        monkeypatch.setattr(supply, "_offer", noting_offer)
        yield watch


@contextlib.asynccontextmanager
async def a_block(watch: Watch) -> AsyncIterator[Any]:
    """Run the block of an `async with pool.acquire()`, and watch from its beginning."""
    async with watch.pool.acquire() as connection:
        watch.states.clear()
        watch.offers = 0
        yield connection


async def leave_to_a_frozen_server(watch: Watch, statement: str) -> None:
    """Run a statement in a block, and leave the block with a reset that the server does not answer."""
    async with a_block(watch) as connection:
        await connection.execute(statement)
        watch.endpoint.freeze()
    await asyncio.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The ways in which a loan ends


async def by_release(watch: Watch) -> None:
    await watch.pool.release(await watch.acquire())


async def by_release_after_a_query(watch: Watch) -> None:
    connection = await watch.acquire()
    await connection.execute("SELECT 1")
    await watch.pool.release(connection)


async def by_two_releases_in_turn(watch: Watch) -> None:
    connection = await watch.acquire()
    await connection.execute("SELECT 1")
    await watch.pool.release(connection)
    await watch.pool.release(connection)


async def by_two_releases_at_once(watch: Watch) -> None:
    connection = await watch.acquire()
    await connection.execute("SELECT 1")
    await asyncio.gather(watch.pool.release(connection), watch.pool.release(connection))


async def by_a_release_inside_the_block(watch: Watch) -> None:
    async with a_block(watch) as connection:
        await connection.execute("SELECT 1")
        await watch.pool.release(connection)


async def by_release_in_a_transaction(watch: Watch) -> None:
    await watch.pool.release(await in_a_transaction(watch))


async def by_two_releases_in_turn_in_a_transaction(watch: Watch) -> None:
    connection = await in_a_transaction(watch)
    await watch.pool.release(connection)
    await watch.pool.release(connection)


async def by_two_releases_at_once_in_a_transaction(watch: Watch) -> None:
    connection = await in_a_transaction(watch)
    await asyncio.gather(watch.pool.release(connection), watch.pool.release(connection))


async def in_a_transaction(watch: Watch) -> Any:
    """Return a connection that needs a reset in the background."""
    connection = await watch.acquire()
    await connection.execute("BEGIN")
    return connection


async def by_a_cancelled_release(watch: Watch) -> None:
    connection = await in_a_transaction(watch)
    releasing = asyncio.ensure_future(watch.pool.release(connection))
    await asyncio.sleep(0)
    releasing.cancel()
    await asyncio.wait([releasing])
    assert releasing.cancelled()


async def by_the_end_of_the_block(watch: Watch) -> None:
    async with a_block(watch) as connection:
        await connection.execute("SELECT 1")


async def by_an_exception(watch: Watch) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with a_block(watch) as connection:
            await connection.execute("SELECT 1")
            raise ZeroDivisionError


async def by_a_server_error(watch: Watch) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with a_block(watch) as connection:
            await connection.execute("SELECT 1/0")


async def by_a_cancellation_outside_of_a_query(watch: Watch) -> None:
    async def use() -> None:
        async with a_block(watch) as connection:
            await connection.execute("SELECT 1")
            await asyncio.sleep(HANG)

    await cancel_in_use(watch, use())


async def by_a_cancellation_of_a_query(watch: Watch) -> None:
    async def use() -> None:
        async with a_block(watch) as connection:
            await connection.execute("SELECT pg_sleep(600)")

    await cancel_in_use(watch, use())


async def cancel_in_use(watch: Watch, use: Any) -> None:
    sent = watch.endpoint.client_bytes
    task = asyncio.ensure_future(use)
    await until(lambda: watch.endpoint.client_bytes > sent)
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def by_close(watch: Watch) -> None:
    await (await watch.acquire()).close()


async def by_close_inside_the_block(watch: Watch) -> None:
    async with a_block(watch) as connection:
        await connection.close()


async def by_terminate(watch: Watch) -> None:
    (await watch.acquire()).terminate()


async def by_terminate_and_release(watch: Watch) -> None:
    connection = await watch.acquire()
    connection.terminate()
    await watch.pool.release(connection)


async def by_the_server(watch: Watch) -> None:
    await watch.kill(await watch.acquire())
    await until(lambda: watch.states)


async def by_the_server_inside_the_block(watch: Watch) -> None:
    async with a_block(watch) as connection:
        await watch.kill(connection)
        await until(lambda: watch.states)


async def by_the_server_in_a_query(watch: Watch) -> None:
    async with a_block(watch) as connection:
        query = asyncio.ensure_future(connection.execute("SELECT pg_sleep(600)"))
        await asyncio.sleep(0.01)
        await watch.kill(connection)
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError)):
            await query


async def by_a_cut(watch: Watch) -> None:
    await watch.acquire()
    watch.endpoint.cut()
    await until(lambda: watch.states)


async def by_the_end_of_the_pool(watch: Watch) -> None:
    connection = await watch.acquire()
    closing = asyncio.ensure_future(watch.pool.close())
    await until(watch.pool.is_closing)
    await watch.pool.release(connection)
    await closing


async def by_the_timeout_of_the_end_of_the_pool(watch: Watch) -> None:
    await watch.acquire()
    await watch.pool.close(timeout=0.01)


async def by_the_termination_of_the_pool(watch: Watch) -> None:
    await watch.acquire()
    watch.pool.terminate()


async def by_the_termination_of_the_pool_inside_the_block(watch: Watch) -> None:
    async with a_block(watch):
        watch.pool.terminate()


async def by_the_termination_of_the_pool_during_the_reset(watch: Watch) -> None:
    await leave_to_a_frozen_server(watch, "BEGIN")
    watch.pool.terminate()


async def by_the_termination_of_the_pool_before_a_reset_is_answered(watch: Watch) -> None:
    await leave_to_a_frozen_server(watch, "SELECT 1")
    watch.pool.terminate()


async def by_release_after_it_expired(watch: Watch) -> None:
    connection = await watch.acquire()
    await watch.pool.expire_connections()
    await watch.pool.release(connection)


async def by_the_server_during_the_reset(watch: Watch) -> None:
    await leave_to_a_frozen_server(watch, "BEGIN")
    watch.endpoint.cut()
    watch.endpoint.thaw()


async def by_the_server_before_a_reset_is_answered(watch: Watch) -> None:
    await leave_to_a_frozen_server(watch, "SELECT 1")
    watch.endpoint.cut()
    watch.endpoint.thaw()


async def by_the_server_during_the_close(watch: Watch) -> None:
    connection = await watch.acquire()
    await watch.pool.expire_connections()
    watch.endpoint.freeze()
    releasing = asyncio.ensure_future(watch.pool.release(connection))
    await asyncio.sleep(0.01)
    watch.endpoint.cut()
    watch.endpoint.thaw()
    await asyncio.wait([releasing])


async def by_release_with_a_listener(watch: Watch) -> None:
    connection = await watch.acquire()
    await connection.add_listener("news", lambda *_: None)
    with pytest.raises(asyncpg.InterfaceWarning):  # warnings are errors in these tests
        await watch.pool.release(connection)


# ---------------------------------------------------------------------------------------------------------------------
# All of them come back on one path


Ending: TypeAlias = Callable[[Watch], Awaitable[None]]
ENDINGS: list[tuple[Ending, str]] = [  # and the states of the slot from then on
    (by_release, "idle"),
    (by_release_after_a_query, "idle"),
    (by_two_releases_in_turn, "idle"),
    (by_two_releases_at_once, "idle"),
    (by_a_release_inside_the_block, "idle"),
    (by_the_end_of_the_block, "idle"),
    (by_an_exception, "idle"),
    (by_a_server_error, "idle"),
    (by_a_cancellation_outside_of_a_query, "idle"),
    (by_release_in_a_transaction, "resetting idle"),
    (by_two_releases_in_turn_in_a_transaction, "resetting idle"),
    (by_two_releases_at_once_in_a_transaction, "resetting idle"),
    (by_a_cancelled_release, "resetting idle"),
    (by_a_cancellation_of_a_query, "resetting idle"),
    (by_release_with_a_listener, "resetting idle"),
    (by_close, "vacant"),
    (by_close_inside_the_block, "vacant"),
    (by_terminate, "vacant"),
    (by_terminate_and_release, "vacant"),
    (by_the_server, "vacant"),
    (by_the_server_inside_the_block, "vacant"),
    (by_the_server_in_a_query, "vacant"),
    (by_a_cut, "vacant"),
    (by_the_end_of_the_pool, "closing vacant"),
    (by_the_timeout_of_the_end_of_the_pool, "vacant"),
    (by_the_termination_of_the_pool, "vacant"),
    (by_the_termination_of_the_pool_inside_the_block, "vacant"),
    (by_the_termination_of_the_pool_during_the_reset, "resetting vacant"),
    (by_the_termination_of_the_pool_before_a_reset_is_answered, "idle vacant"),
    (by_release_after_it_expired, "closing vacant"),
    (by_the_server_during_the_reset, "resetting vacant"),
    (by_the_server_before_a_reset_is_answered, "idle vacant"),
    (by_the_server_during_the_close, "closing vacant"),
]


@pytest.mark.parametrize(
    ("end", "states"), [pytest.param(*one, id=one[0].__name__.replace("_", " ")) for one in ENDINGS]
)
async def test_a_loan_ends_once_and_its_slot_is_offered_once_however_it_ends(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, end: Ending, states: str
) -> None:
    async with watched(postgres, monkeypatch) as watch:
        await end(watch)
        await until(lambda: watch.states and watch.states[-1] == states.split()[-1])
        await asyncio.sleep(0.01)  # time for a second offer
        assert (" ".join(watch.states), watch.offers) == (states, 1)
        [slot] = watch.pool._supply.slots
        assert (slot.loan, slot.task) == (None, None)
        stats = watch.pool.stats()
        assert (stats.acquires, stats.releases, stats.in_use) == (1, 1, 0)
        assert_balanced(watch.pool)
        if not watch.pool.is_closing():
            await assert_whole(watch.pool)


async def failing(connection: object) -> None:
    raise LookupError


class BrokenResetQuery(asyncpg.Connection):
    """A connection whose reset query cannot be had."""

    def get_reset_query(self) -> str:
        raise LookupError


async def endless(connection: object) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("options", "failure"),
    [
        pytest.param({"reset": failing}, LookupError, id="reset fails"),
        pytest.param({"reset": endless, "release_timeout": 0.05}, neon_async.PoolTimeoutError, id="reset is late"),
        pytest.param({"connection_class": BrokenResetQuery}, LookupError, id="reset query fails"),
    ],
)
async def test_a_loan_whose_reset_fails_offers_its_slot_once_without_the_connection(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], failure: type[Exception]
) -> None:
    async with watched(postgres, monkeypatch, **options) as watch:
        connection = await watch.acquire()
        await connection.execute("SELECT 1")
        with pytest.raises(failure):
            await watch.pool.release(connection)
        assert (watch.states, watch.offers) == (["resetting", "vacant"], 1)
        assert (watch.pool.stats().releases, watch.pool.stats().resets) == (1, 0)
        assert_balanced(watch.pool)


@pytest.mark.parametrize("cancelled", [False, True], ids=["fails", "is cancelled"])
async def test_a_loan_whose_setup_ends_badly_offers_its_slot_once_without_the_connection(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    async with watched(postgres, monkeypatch, setup=endless if cancelled else failing) as watch:
        task = asyncio.ensure_future(watch.acquire())
        await asyncio.sleep(0.01)
        if cancelled:
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), LookupError)
        assert (watch.states, watch.offers) == (["in_use", "vacant"], 1)
        assert (watch.pool.stats().acquires, watch.pool.stats().releases) == (1, 1)
        assert_balanced(watch.pool)


@pytest.mark.parametrize(
    ("query", "resetting"),
    [
        pytest.param(None, [], id="untouched"),
        pytest.param("SELECT 1", [], id="used"),
        pytest.param("BEGIN", ["resetting"], id="in a transaction"),
    ],
)
async def test_the_slot_of_a_loan_goes_to_the_first_waiter(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, query: str | None, resetting: list[str]
) -> None:
    async with watched(postgres, monkeypatch) as watch:
        connection = await watch.acquire()
        waiting = [asyncio.ensure_future(watch.pool.acquire()) for _ in range(2)]
        await until(lambda: watch.pool.stats().waiting == 2)
        if query is not None:
            await connection.execute(query)
        await watch.pool.release(connection)
        await asyncio.wait([waiting[0]])
        assert watch.states == [*resetting, "reserved", "in_use"]
        assert watch.offers == 1
        for one in waiting:
            await watch.pool.release(await one)
        assert (watch.pool.stats().acquires, watch.pool.stats().releases) == (3, 3)
        await until_settled(watch.pool)


@pytest.mark.parametrize("end", ["close", "terminate", "server"])
async def test_the_slot_of_a_connection_that_ends_in_use_serves_the_waiters(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    async with watched(postgres, monkeypatch) as watch:
        connection = await watch.acquire()
        waiting = [asyncio.ensure_future(watch.pool.fetchval("SELECT 1")) for _ in range(2)]
        await until(lambda: watch.pool.stats().waiting == 2)
        if end == "close":
            await connection.close()
        elif end == "terminate":
            connection.terminate()
        else:
            await watch.kill(connection)
        assert await asyncio.gather(*waiting) == [1, 1]
        await until_settled(watch.pool)
        assert (watch.pool.stats().acquires, watch.pool.stats().releases, watch.pool.stats().dials) == (3, 3, 2)
