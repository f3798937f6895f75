"""Every statement of a connection passes its protocol: it knows what is under way, and what must not run."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import asyncpg
import pytest
from support.probes import HANG, assert_whole, connected, until, until_settled
from support.unclean import REASON, TABLE, Lender, RestrictedServer, lender, restricted

import neon_async
from neon_async._driver.losses import CLOSED_BY_SERVER
from neon_async._driver.protocol import SessionProtocol
from neon_async._driver.session import Healing, Session
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

WRITE = f"INSERT INTO {TABLE} SELECT current_setting('app.tenant', true)"


def protocol_of(connection: Any) -> SessionProtocol:
    protocol = connection._protocol
    assert isinstance(protocol, SessionProtocol)
    return protocol


# ---------------------------------------------------------------------------------------------------------------------
# Whether a statement may be sent ahead


@pytest.fixture
async def connection(postgres: LocalPostgres) -> AsyncIterator[Any]:
    async with connected(postgres) as connection, asyncio.timeout(HANG):
        yield connection


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda connection: connection.execute("SELECT pg_sleep(0.05)"), id="simple query"),
        pytest.param(lambda connection: connection.fetchval("SELECT pg_sleep(0.05), $1::int", 1), id="statement"),
        pytest.param(lambda connection: connection.executemany("SELECT pg_sleep($1)", [(0.05,)]), id="executemany"),
        pytest.param(lambda connection: connection.fetchmany("SELECT pg_sleep($1)", [(0.05,)]), id="fetchmany"),
        pytest.param(
            lambda connection: connection.copy_from_query("SELECT pg_sleep(0.05)", output=io.BytesIO()), id="COPY OUT"
        ),
    ],
)
async def test_a_session_is_idle_unless_a_statement_is_under_way(
    connection: Any, call: Callable[[Any], Awaitable[Any]]
) -> None:
    protocol = protocol_of(connection)
    assert protocol.is_idle()
    running = asyncio.ensure_future(call(connection))
    await asyncio.sleep(0.02)
    assert not protocol.is_idle()
    await running
    assert protocol.is_idle()


async def test_a_session_is_not_idle_while_a_receiver_of_data_is_busy(connection: Any) -> None:
    go_on = asyncio.Event()

    async def receive(_: bytes) -> None:
        await go_on.wait()

    copying = asyncio.ensure_future(connection.copy_from_query("SELECT 1", output=receive))
    await asyncio.sleep(0.02)
    assert not protocol_of(connection).is_idle()
    go_on.set()
    await copying
    assert protocol_of(connection).is_idle()


async def test_a_session_is_not_idle_until_a_cancelled_statement_has_ended(connection: Any) -> None:
    protocol = protocol_of(connection)
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.02)
    assert not protocol.is_idle()
    assert await connection.fetchval("SELECT 1") == 1  # asyncpg waits for the end of the other one first
    assert protocol.is_idle()


async def test_a_session_is_not_idle_after_a_prepare_until_something_is_executed(connection: Any) -> None:
    """asyncpg ends it with Flush: the server has begun an implicit transaction, and goes on with it."""
    protocol = protocol_of(connection)
    statement = await connection.prepare("SELECT 1")
    assert not protocol.is_idle()
    assert await statement.fetchval() == 1
    assert protocol.is_idle()


async def test_a_session_is_idle_between_the_statements_of_a_transaction(connection: Any) -> None:
    protocol = protocol_of(connection)
    transaction = connection.transaction()
    await transaction.start()
    assert protocol.is_idle()
    async for _ in connection.cursor("SELECT generate_series(1, 3)", prefetch=1):
        assert protocol.is_idle()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")
    assert protocol.is_idle()
    await transaction.rollback()


async def test_a_session_is_at_rest_while_it_is_idle_and_no_transaction_is_open(connection: Any) -> None:
    protocol = protocol_of(connection)
    assert protocol.is_at_rest()
    running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(0.05)"))
    await asyncio.sleep(0.02)
    assert not protocol.is_at_rest()
    await running
    assert protocol.is_at_rest()
    transaction = connection.transaction()
    await transaction.start()
    assert not protocol.is_at_rest()  # BEGIN goes ahead of the next statement
    await connection.execute("SELECT 1")
    assert not protocol.is_at_rest()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1/0")
    assert not protocol.is_at_rest()
    await transaction.rollback()
    assert protocol.is_at_rest()
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.02)
    assert not protocol.is_at_rest()
    assert await connection.fetchval("SELECT 1") == 1  # asyncpg waits for the end of the other one first
    assert protocol.is_at_rest()
    statement = await connection.prepare("SELECT 1")
    assert not protocol.is_at_rest()  # the server has begun an implicit transaction
    assert await statement.fetchval() == 1
    assert protocol.is_at_rest()


@pytest.mark.parametrize("how", ["close", "terminate"])
async def test_a_session_that_has_ended_is_not_idle(connection: Any, how: str) -> None:
    protocol = protocol_of(connection)
    if how == "close":
        await connection.close()
    else:
        connection.terminate()
    assert not protocol.is_idle()


# ---------------------------------------------------------------------------------------------------------------------
# Texts that could get past a reset that fails


class Spy:
    """asyncpg's protocol and the session's transport, which note what is sent, and answer when they are told to."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.unanswered = 1
        self.answered = asyncio.Event()
        self.connected = True
        self.is_settled, self.is_in_failed_transaction = True, False
        self.writes = 0
        self.last_words = None
        self.session = Session(
            host="a host",
            endpoint=None,
            healing=Healing(),
            handshake=cast(Any, None),
            handshake_time=0.0,
            cancel=cast(Any, None),
        )
        self.get_settings: Any = None
        self.get_record_class: Any = None

    def is_connected(self) -> bool:
        return self.connected

    def is_in_transaction(self) -> bool:
        return False

    def _is_cancelling(self) -> bool:
        return False

    def _get_timeout(self, timeout: float | None) -> float | None:
        return timeout

    async def wait_for_answers(self) -> None:
        await self.answered.wait()
        self.unanswered = 0

    async def query(self, query: str, seconds: float | None) -> str:
        self.sent.append(query)
        return "DONE"


def spied_on() -> tuple[Spy, SessionProtocol]:
    spy = Spy()
    transport: Any = spy
    return spy, SessionProtocol(spy, transport, host="a host")


@pytest.mark.parametrize("end", ["ABORT", "COMMIT", "END", "PREPARE TRANSACTION 'a'", "ROLLBACK", "ROLLBACK TO a"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{}; SELECT 1", id="two statements"),
        pytest.param("{}\n;\nSELECT 1;", id="on three lines"),
        pytest.param("  \t\r\n\f\v{};SELECT 1", id="behind space"),
        pytest.param("; ;; {}; SELECT 1", id="behind empty statements"),
        pytest.param("-- a comment; SELECT 0\n{}; SELECT 1", id="behind a comment"),
        pytest.param("-- a comment\r{}; SELECT 1", id="behind a comment that CR ends"),
        pytest.param("/* a comment */{}; SELECT 1", id="behind a comment in the other style"),
        pytest.param("/**/ ; /* -- */ -- /*\n {}; SELECT 1", id="behind several comments"),
        pytest.param("/* a /* nested */ comment */ {}; SELECT 1", id="behind a nested comment"),
        pytest.param("/*/**//*/**/*/*/ {}; SELECT 1", id="behind deeply nested comments"),
        pytest.param("{}/* ; */; SELECT 1", id="followed by a comment"),
    ],
)
async def test_a_text_that_goes_on_after_a_transaction_waits_for_the_answer(text: str, end: str) -> None:
    """In a failed transaction the first statement would end it, and the others would run."""
    for query in (text.format(end), text.format(end.lower()), text.format(end.title())):
        spy, protocol = spied_on()
        running = asyncio.ensure_future(protocol.query(query, None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert spy.sent == []
        spy.answered.set()
        async with asyncio.timeout(HANG):
            assert await running == "DONE"
        assert spy.sent == [query]


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("", id="nothing"),
        pytest.param("/* a comment without an end", id="a comment without an end"),
        pytest.param("SELECT 1; ROLLBACK; SELECT 2", id="the server skips the rest"),
        pytest.param("BEGIN; COMMIT; SELECT 2", id="BEGIN is refused, too"),
        pytest.param("ROLLBACK", id="nothing follows"),
        pytest.param(" /* a comment */ commit ;; \n", id="nothing but space follows"),
        pytest.param("ENDING; SELECT 1", id="another word"),
        pytest.param("/* ROLLBACK; */ SELECT 1; SELECT 2", id="in a comment"),
        pytest.param("-- ROLLBACK;\nSELECT 1; SELECT 2", id="in a comment in the other style"),
    ],
)
async def test_any_other_text_is_sent_at_once(query: str) -> None:
    spy, protocol = spied_on()
    async with asyncio.timeout(HANG):
        await protocol.query(query, None)
    assert spy.sent == [query]


async def test_no_text_waits_where_nothing_is_under_way() -> None:
    spy, protocol = spied_on()
    spy.unanswered = 0
    async with asyncio.timeout(HANG):
        await protocol.query("ROLLBACK; SELECT 1", None)
    assert spy.sent == ["ROLLBACK; SELECT 1"]


async def test_the_timeout_of_a_call_bounds_its_wait_for_an_answer() -> None:
    spy, protocol = spied_on()
    async with asyncio.timeout(HANG):
        with pytest.raises(TimeoutError):
            await protocol.query("ROLLBACK; SELECT 1", 0.01)
    assert spy.sent == []


async def test_nothing_of_a_text_was_executed_whose_connection_was_lost_while_it_waited() -> None:
    spy, protocol = spied_on()
    running = asyncio.ensure_future(protocol.query("ROLLBACK; SELECT 1", None))
    await asyncio.sleep(0)
    spy.connected = False
    spy.session.note_loss(CLOSED_BY_SERVER)
    spy.answered.set()
    with pytest.raises(neon_async.ConnectionLostError, match="Nothing of this call was executed") as raised:
        await running
    assert raised.value.nothing_executed
    assert spy.sent == []


# ---------------------------------------------------------------------------------------------------------------------
# A reset that fails


@pytest.fixture(scope="module")
def restricted_server(postgres: LocalPostgres) -> Iterator[RestrictedServer]:
    with restricted(postgres) as server:
        yield server


@pytest.fixture
async def lent(restricted_server: RestrictedServer) -> AsyncIterator[Lender]:
    """A pool of one connection, on a server on which a reset can be made to fail."""
    async with lender(restricted_server, max_size=1) as it, asyncio.timeout(HANG):
        yield it


async def in_a_transaction(connection: Any, call: Callable[[Any], Awaitable[Any]], **options: Any) -> None:
    async with connection.transaction(**options):
        await call(connection)


async def by_cursor(connection: Any) -> None:
    async for _ in connection.cursor(f"{WRITE} RETURNING tenant"):
        pass


async def prepare_and_fetch(connection: Any) -> None:
    await (await connection.prepare(f"{WRITE} RETURNING tenant")).fetch()


async def end_it_and_go_on(connection: Any) -> None:
    with contextlib.suppress(Exception):
        await connection.fetch("ROLLBACK")
    with contextlib.suppress(Exception):
        await connection.execute("COMMIT")
    await connection.execute(WRITE)


async def go_on_after_an_error(connection: Any) -> None:
    for _ in range(3):
        with contextlib.suppress(Exception):
            await connection.execute(WRITE)
    await connection.execute(WRITE)


async def begin_by_hand(connection: Any) -> None:
    with contextlib.suppress(Exception):
        await connection.execute("BEGIN")
    with contextlib.suppress(Exception):
        await connection.execute(WRITE)
    await connection.execute("COMMIT")


async def time_out_and_go_on(connection: Any) -> None:
    with contextlib.suppress(TimeoutError):
        await connection.execute(WRITE, timeout=1e-9)
    await connection.execute(WRITE)


async def nested(connection: Any) -> None:
    async with connection.transaction(), connection.transaction():
        await connection.execute(WRITE)


async def nested_read(connection: Any) -> None:
    async with connection.transaction():
        await connection.fetchval("SELECT 1")


def write(connection: Any) -> Awaitable[Any]:
    return connection.execute(WRITE)  # type: ignore[no-any-return]


CALLS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "a simple query": write,
    "a simple query of several statements": lambda connection: connection.execute(f"{WRITE}; {WRITE}"),
    "several statements that end a transaction first": lambda connection: connection.execute(f"ROLLBACK; {WRITE}"),
    "the same behind comments": lambda connection: connection.execute(f"/* /**/ */;--\n;commit;{WRITE}"),
    "the same with a transaction of its own": lambda connection: connection.execute(
        f"ABORT; BEGIN; {WRITE}; COMMIT AND CHAIN; {WRITE}; COMMIT"
    ),
    "several statements that end a transaction later": lambda connection: connection.execute(
        f"SELECT 1; ROLLBACK; {WRITE}"
    ),
    "a statement with an argument": lambda connection: connection.execute(
        f"{WRITE} WHERE $1::text IS NOT NULL", "an argument"
    ),
    "fetch": lambda connection: connection.fetch(f"{WRITE} RETURNING tenant"),
    "fetchrow": lambda connection: connection.fetchrow(f"{WRITE} RETURNING tenant"),
    "fetchval": lambda connection: connection.fetchval(f"{WRITE} RETURNING tenant"),
    "executemany": lambda connection: connection.executemany(f"{WRITE} WHERE $1::int > 0", [(1,), (2,)]),
    "fetchmany": lambda connection: connection.fetchmany(f"{WRITE} WHERE $1::int > 0 RETURNING tenant", [(1,), (2,)]),
    "a prepared statement": prepare_and_fetch,
    "COPY to a table": lambda connection: connection.copy_to_table(TABLE, source=io.BytesIO(b"a row\n")),
    "COPY of records": lambda connection: connection.copy_records_to_table(TABLE, records=[("a row",)]),
    "COPY from a query": lambda connection: connection.copy_from_query(
        f"{WRITE} RETURNING tenant", output=io.BytesIO()
    ),
    "a cursor": lambda connection: in_a_transaction(connection, by_cursor),
    "a transaction": lambda connection: in_a_transaction(connection, write),
    "a transaction with a mode": lambda connection: in_a_transaction(connection, write, isolation="serializable"),
    "a transaction with claims": lambda connection: in_a_transaction(
        connection, write, role="pg_monitor", settings={"app.tenant": "bob"}
    ),
    "a transaction whose first text ends it": lambda connection: in_a_transaction(
        connection, lambda _: connection.execute(f"ROLLBACK; {WRITE}")
    ),
    "a nested block": nested,
    "a transaction by hand": begin_by_hand,
    "a caller who ends the transaction and goes on": end_it_and_go_on,
    "a caller who goes on after errors": go_on_after_an_error,
}
if not asyncpg.__version__.startswith("0.31."):  # which waits for ever where a connection ends while it is cancelling
    CALLS["a caller who times out and goes on"] = time_out_and_go_on


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_no_statement_runs_in_an_unclean_session(
    lent: Lender, call: Callable[[Any], Awaitable[Any]], warm: bool
) -> None:
    """Warm: asyncpg has prepared what the call needs, and writes everything at once."""

    async def borrow() -> None:
        async with lent.pool.acquire() as connection:
            await call(connection)

    if warm:
        with contextlib.suppress(asyncpg.PostgresError):
            await borrow()
        await until_settled(lent.pool)
        await lent.admin.execute(f"TRUNCATE {TABLE}")
    error = await lent.behind_failing_reset(borrow)
    assert await lent.rows() == []
    assert isinstance(error, (neon_async.ConnectionLostError, asyncpg.InterfaceError)), repr(error)
    if not isinstance(error, neon_async.ConnectionLostError):  # in a call after the one that has lost it
        assert "connection is closed" in str(error) or "released back to the pool" in str(error)
    await lent.let_resets_succeed()
    await assert_whole(lent.pool)
    assert lent.pool.stats().dials == 2


async def test_the_error_says_what_happened_and_that_nothing_was_executed(lent: Lender) -> None:
    async def borrow() -> None:
        async with lent.pool.acquire() as connection:
            await connection.execute("SELECT 'a secret of the caller'")

    error = await lent.behind_failing_reset(borrow)
    assert isinstance(error, neon_async.ConnectionLostError)
    assert isinstance(error, (asyncpg.ConnectionDoesNotExistError, ConnectionError))
    assert (error.nothing_executed, error.retryable) == (True, True)
    assert str(error).startswith(f"The session at {lent.endpoint.host} could not be reset after its last use ({REASON}")
    assert "Nothing of this call was executed" in str(error)
    assert "secret" not in str(error)
    assert "the tenant before" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__


async def test_a_reset_that_fails_while_its_connection_is_idle_leaves_a_vacant_slot(lent: Lender) -> None:
    await lent.leave_unclean()
    lent.endpoint.thaw()
    await until(lambda: lent.pool.stats().vacant == 1)
    assert await lent.pool.fetchval("SELECT current_setting('app.tenant', true)") is None
    assert (lent.pool.stats().dials, lent.pool.stats().terminations) == (2, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Calls that the pool makes


WRITE_OF = f"INSERT INTO {TABLE} VALUES ($1)"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda pool: pool.execute(WRITE_OF, "a row"), id="execute"),
        pytest.param(lambda pool: pool.execute(f"ROLLBACK; INSERT INTO {TABLE} VALUES ('a row')"), id="several"),
        pytest.param(lambda pool: pool.executemany(WRITE_OF, [("a row",)]), id="executemany"),
        pytest.param(lambda pool: pool.executemany(WRITE_OF, (("a row",),)), id="executemany of a tuple"),
        pytest.param(lambda pool: pool.fetch(f"{WRITE_OF} RETURNING 1", "a row"), id="fetch"),
        pytest.param(lambda pool: pool.fetchrow(f"{WRITE_OF} RETURNING 1", "a row"), id="fetchrow"),
        pytest.param(lambda pool: pool.fetchval(f"{WRITE_OF} RETURNING 1", "a row"), id="fetchval"),
        pytest.param(lambda pool: pool.fetchval(f"{WRITE_OF} RETURNING 1", "a row", timeout=HANG), id="timeout"),
        pytest.param(lambda pool: pool.fetchmany(f"{WRITE_OF} RETURNING 1", [("a row",)]), id="fetchmany"),
    ],
)
@pytest.mark.filterwarnings("ignore::asyncpg.InterfaceWarning")
async def test_a_call_of_the_pool_s_own_runs_once_more_on_another_connection(
    lent: Lender, call: Callable[[neon_async.Pool], Awaitable[Any]]
) -> None:
    result = await lent.behind_failing_reset(lambda: call(lent.pool))
    assert not isinstance(result, Exception), repr(result)
    assert await lent.rows() == ["a row"]
    assert (lent.pool.stats().dials, lent.pool.stats().acquires) == (2, 3)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda pool, rows: pool.executemany(WRITE_OF, rows), id="executemany"),
        pytest.param(lambda pool, rows: pool.fetchmany(f"{WRITE_OF} RETURNING 1", rows), id="fetchmany"),
        pytest.param(lambda pool, rows: pool.copy_records_to_table(TABLE, records=rows), id="COPY of records"),
    ],
)
async def test_an_iterator_is_not_used_twice(
    lent: Lender, call: Callable[[neon_async.Pool, Iterator[tuple[str]]], Awaitable[Any]]
) -> None:
    used = 0

    def rows() -> Iterator[tuple[str]]:
        nonlocal used
        for number in range(3):
            used += 1
            yield (f"row {number}",)

    error = await lent.behind_failing_reset(lambda: call(lent.pool, rows()))
    assert isinstance(error, neon_async.ConnectionLostError), repr(error)
    assert error.nothing_executed
    assert used <= 3
    assert await lent.rows() == []
    assert lent.pool.stats().dials == 1


async def test_data_from_a_stream_is_not_used_twice(lent: Lender) -> None:
    source = io.BytesIO(b"a row\n")
    error = await lent.behind_failing_reset(lambda: lent.pool.copy_to_table(TABLE, source=source))
    assert isinstance(error, neon_async.ConnectionLostError), repr(error)
    assert await lent.rows() == []


async def test_a_call_gets_past_several_sessions_that_could_not_be_reset(restricted_server: RestrictedServer) -> None:
    async with lender(restricted_server, max_size=4) as lent, asyncio.timeout(HANG):
        await lent.leave_unclean(count=4)
        running = asyncio.ensure_future(lent.pool.fetchval("SELECT coalesce(current_setting('app.tenant', true), '')"))
        await asyncio.sleep(0.01)
        lent.endpoint.thaw()
        assert await running == ""


# ---------------------------------------------------------------------------------------------------------------------
# A BEGIN that fails


async def with_refused_role(connection: Any, call: Callable[[Any], Awaitable[Any]], pause: float = 0) -> None:
    async def pause_and_call(connection: Any) -> None:
        await asyncio.sleep(pause)
        await call(connection)

    await in_a_transaction(connection, pause_and_call, role="not there")


REFUSED = pytest.raises(asyncpg.InvalidParameterValueError, match='role "not there" does not exist')
PAUSES = pytest.mark.parametrize("pause", [0, 0.01], ids=["before the answer to BEGIN", "after the answer to BEGIN"])


@PAUSES
async def test_no_statement_runs_where_the_role_is_refused(connection: Any, pause: float) -> None:
    await connection.execute("CREATE TEMP TABLE written (a int)")
    write = "INSERT INTO written VALUES (1)"
    for query in (write, f"{write}; {write}", f"ROLLBACK; {write}", f"/* /**/ */ COMMIT; {write}"):
        with REFUSED:
            await with_refused_role(connection, lambda _, query=query: connection.execute(query), pause)  # type: ignore[misc]
        assert not connection.is_in_transaction()
    assert await connection.fetchval("SELECT count(*) FROM written") == 0


async def test_the_first_of_several_failures_is_raised(connection: Any) -> None:
    """The savepoint is refused because the role was."""
    with REFUSED:
        await with_refused_role(connection, nested_read)


async def test_a_block_within_a_failed_transaction_leaves_the_connection_open(connection: Any) -> None:
    async with connection.transaction():
        for _ in range(2):
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.execute("SELECT 1/0")
            with pytest.raises(asyncpg.InFailedSQLTransactionError):
                async with connection.transaction():
                    await connection.execute("SELECT 1")
            await connection.execute("ROLLBACK; BEGIN")
    assert await connection.fetchval("SELECT 1") == 1


@PAUSES
async def test_a_block_left_by_an_error_is_rolled_back_where_its_begin_has_failed(
    connection: Any, pause: float
) -> None:
    async def fail(_: Any) -> None:
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        await with_refused_role(connection, fail, pause)
    assert not connection.is_in_transaction()
    assert await connection.fetchval("SELECT 1") == 1


@PAUSES
async def test_an_empty_block_raises_what_was_refused(connection: Any, pause: float) -> None:
    with REFUSED:
        await with_refused_role(connection, lambda _: asyncio.sleep(0), pause)
    assert not connection.is_in_transaction()
    assert await connection.fetchval("SELECT 1") == 1
