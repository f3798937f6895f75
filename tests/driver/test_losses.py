"""A lost connection is reported as lost, with the server's last words and with what became of the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.logins import OK, SESSION_START, honest_login
from support.private_names import pins
from support.probes import HANG, until
from support.transactions import Bench, cut_in_commit, frozen_in_commit, killed_in_commit, suspended_in_commit
from support.verified_servers import BINDING, PASSWORD, connect_to, verified_server

import neon_async
from neon_async._driver.connection import Connection
from neon_async._driver.losses import loss_with
from neon_async._driver.protocol import SessionProtocol
from neon_async._errors import server_error
from neon_async._neon.sql import commits
from neon_async._wire.transport import _fatal_error_at_end
from neon_async.testing import _impostor

pytestmark = pytest.mark.anyio


async def ignore(_: bytes) -> None:
    pass


async def chunks() -> AsyncIterator[bytes]:
    yield b""


def rows() -> Iterator[tuple[int]]:
    return iter([(1,), (2,)])


async def iterate(connection: Any) -> None:
    async for _ in connection.cursor("SELECT 1"):
        pass


async def begin(connection: Any) -> None:
    async with connection.transaction():
        pass


# Whatever a caller can do with a connection that needs the server, or that hands out what needs it.
CALLS: dict[str, Callable[[Any], Any]] = {
    "execute": lambda it: it.execute("SELECT 1"),
    "execute with arguments": lambda it: it.execute("SELECT $1::int", 1),
    "executemany": lambda it: it.executemany("SELECT $1::int", rows()),
    "fetch": lambda it: it.fetch("SELECT 1"),
    "fetchval": lambda it: it.fetchval("SELECT 1"),
    "fetchrow": lambda it: it.fetchrow("SELECT 1"),
    "fetchmany": lambda it: it.fetchmany("SELECT $1::int", rows()),
    "prepare": lambda it: it.prepare("SELECT 1"),
    "cursor": lambda it: it.cursor("SELECT 1"),
    "iterate": iterate,
    "transaction": lambda it: it.transaction(),
    "begin": begin,
    "copy_from_query": lambda it: it.copy_from_query("SELECT 1", output=ignore),
    "copy_from_table": lambda it: it.copy_from_table("pg_am", output=ignore),
    "copy_to_table": lambda it: it.copy_to_table("pg_am", source=chunks()),
    "copy_records_to_table": lambda it: it.copy_records_to_table("pg_am", records=rows()),
    "add_listener": lambda it: it.add_listener("channel", print),
    "add_log_listener": lambda it: it.add_log_listener(print),
    "set_type_codec": lambda it: it.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog"),
    "set_builtin_type_codec": lambda it: it.set_builtin_type_codec("hstore", codec_name="pg_contrib.hstore"),
    "reset": lambda it: it.reset(),
}

KILLED, IDLE = "57P01", "25P03"


async def killed(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)


async def killed_and_noticed(bench: Bench, connection: Any) -> None:
    await bench.kill(connection)
    await until(connection.is_closed)


async def idle_in_transaction(bench: Bench, connection: Any) -> None:
    await connection.execute("SET idle_in_transaction_session_timeout = 1; BEGIN")
    await until(connection.is_closed)


async def cut(bench: Bench, connection: Any) -> None:
    bench.endpoint.cut()
    await until(connection.is_closed)


async def suspended(bench: Bench, connection: Any) -> None:
    bench.endpoint.suspend()
    await until(connection.is_closed)


# How the connection ends, and the SQLSTATE and a part of the text of what the server said last.
ENDS = [
    pytest.param(killed, KILLED, "terminating connection due to administrator command", id="killed, not noticed"),
    pytest.param(killed_and_noticed, KILLED, "terminating connection due to administrator command", id="killed"),
    pytest.param(idle_in_transaction, IDLE, "idle-in-transaction timeout", id="idle in a transaction"),
    pytest.param(cut, "08003", "the server or the network closed it", id="cut"),
    pytest.param(suspended, "08003", "the server or the network closed it", id="suspended"),
]


async def call(what: Callable[[Any], Any], connection: Any) -> None:
    await awaited(what(connection))


async def awaited(result: Any) -> None:
    if isinstance(result, Awaitable):
        await result


def assert_lost(error: BaseException, sqlstate: str, text: str) -> neon_async.ConnectionLostError:
    assert type(error) is neon_async.ConnectionLostError
    assert isinstance(error, ConnectionError)
    assert isinstance(error, asyncpg.ConnectionDoesNotExistError)
    assert text in str(error)
    assert error.sqlstate == sqlstate
    if sqlstate != "08003":
        assert sqlstate in str(error)
        assert isinstance(error.__cause__, asyncpg.PostgresError)
        assert error.__cause__.sqlstate == sqlstate
    assert neon_async.is_unavailable(error)
    return error


class TestEveryCall:
    @pytest.mark.parametrize(("end", "sqlstate", "text"), ENDS)
    @pytest.mark.parametrize("lent", [False, True], ids=["of connect()", "of a pool"])
    async def test_it_says_that_the_connection_was_lost(
        self, bench: Bench, pool: neon_async.Pool, end: Any, sqlstate: str, text: str, lent: bool
    ) -> None:
        async with pool.acquire() if lent else bench.acquire() as connection:
            await end(bench, connection)
            for name, what in CALLS.items():
                if name in ("transaction", "add_log_listener") and not connection.is_closed():
                    continue  # it needs no server yet
                with pytest.raises(neon_async.ConnectionLostError) as caught:
                    await call(what, connection)
                error = assert_lost(caught.value, sqlstate, text)
                assert error.nothing_executed or end is killed, name
                assert error.nothing_committed or end is killed, name
            assert connection.is_closed()
            connection.terminate()
            await connection.close()

    @pytest.mark.parametrize(("end", "sqlstate", "text"), [one for one in ENDS if one.id != "idle in a transaction"])
    @pytest.mark.parametrize("lent", [False, True], ids=["of connect()", "of a pool"])
    async def test_a_statement_or_cursor_says_so_too(
        self, bench: Bench, pool: neon_async.Pool, end: Any, sqlstate: str, text: str, lent: bool
    ) -> None:
        async with pool.acquire() if lent else bench.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            statement = await connection.prepare("SELECT generate_series(1, 200)")
            cursor = await connection.cursor("SELECT generate_series(1, 200)")
            rows_of_connection = connection.cursor("SELECT generate_series(1, 200)").__aiter__()
            rows_of_statement = statement.cursor(prefetch=2).__aiter__()
            await rows_of_statement.__anext__()
            await rows_of_statement.__anext__()
            await end(bench, connection)
            uses: list[Callable[[], Any]] = [
                *(statement.fetch, statement.fetchval, statement.fetchrow, statement.explain),
                *(lambda: statement.fetchmany([()]), lambda: statement.executemany([()])),
                *(lambda: statement.cursor(), lambda: connection.cursor("SELECT 1")),
                *(lambda: cursor.fetch(1), cursor.fetchrow, lambda: cursor.forward(1)),
                *(rows_of_connection.__anext__, rows_of_statement.__anext__),
                *(transaction.commit, transaction.rollback, lambda: connection.transaction()),
            ]
            for use in uses:
                if not connection.is_closed() and use in uses[6:8] + uses[-1:]:
                    continue  # it needs no server yet
                with pytest.raises(neon_async.ConnectionLostError) as caught:
                    await awaited(use())
                assert assert_lost(caught.value, sqlstate, text).nothing_committed

    async def test_a_statement_that_was_under_way_may_have_been_executed(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0)
            await bench.kill(connection)
            with pytest.raises(neon_async.ConnectionLostError, match="may have been executed, or not") as caught:
                await running
            error = assert_lost(caught.value, KILLED, "terminating connection")
            assert not error.nothing_executed
            assert not error.nothing_committed

    @pytest.mark.parametrize("lent", [False, True], ids=["of connect()", "of a pool"])
    @pytest.mark.parametrize("end", ["close", "terminate"])
    async def test_a_connection_that_its_owner_has_closed_is_not_lost(
        self, bench: Bench, pool: neon_async.Pool, lent: bool, end: str
    ) -> None:
        async with pool.acquire() if lent else bench.acquire() as connection:
            await call(lambda it: getattr(it, end)(), connection)
            for what in CALLS.values():
                with pytest.raises(asyncpg.InterfaceError, match="connection is closed"):
                    await call(what, connection)

    async def test_a_statement_under_way_says_that_its_program_terminated_the_connection(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0)
            connection.terminate()
            with pytest.raises(neon_async.ConnectionLostError, match="closed or terminated by this program"):
                await running

    async def test_after_its_release_a_lost_connection_is_a_released_one(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        async with pool.acquire() as connection:
            await killed_and_noticed(bench, connection)
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await connection.fetchval("SELECT 1")
        await pool.release(connection)
        assert await pool.fetchval("SELECT 1") == 1

    async def test_a_call_of_the_pool_that_finds_a_dead_connection_runs_again(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        """Nothing was executed: the server has ended the session between two statements."""
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
        await bench.admin.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
        assert await pool.fetchval("SELECT 1") == 1

    @pins("_check_open")
    async def test_asyncpg_asks_whether_the_connection_is_open(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            assert isinstance(connection, Connection)
            connection._check_open()
            await cut(bench, connection)
            with pytest.raises(neon_async.ConnectionLostError):
                connection._check_open()


@pytest.mark.parametrize(
    "junk", [b"\xff" * 50, _impostor.message(b"D", b"\0\0")], ids=["no message", "a row of no statement"]
)
async def test_a_server_that_sends_what_no_statement_asked_for_is_left(junk: bytes) -> None:
    """asyncpg raises InternalClientError for this statement and for every other one, for ever."""
    last = OK + SESSION_START + junk
    honest = honest_login(PASSWORD, binding=BINDING, last=last)
    async with asyncio.timeout(HANG), verified_server(honest, _impostor.Conversation.read_message) as server:
        connection = await connect_to(server)
        with pytest.raises(neon_async.ConnectionLostError, match="does not follow from any statement") as caught:
            await connection.fetchval("SELECT 1")
        assert caught.value.nothing_executed
        assert connection.is_closed()


# ---------------------------------------------------------------------------------------------------------------------
# Transactions


class TestTransaction:
    @pytest.mark.parametrize(("end", "sqlstate", "text"), [one for one in ENDS if one.id != "idle in a transaction"])
    @pytest.mark.parametrize("statement", ["SELECT 1", None], ids=["in a statement", "at COMMIT"])
    async def test_a_loss_before_commit_says_that_nothing_was_committed(
        self, bench: Bench, pool: neon_async.Pool, end: Any, sqlstate: str, text: str, statement: str | None
    ) -> None:
        async def work() -> None:
            async with pool.transaction() as connection:
                await bench.add(connection)
                await end(bench, connection)
                if statement is None:
                    await until(connection.is_closed)
                else:
                    await connection.fetchval(statement)

        with pytest.raises(neon_async.ConnectionLostError, match="nothing of the transaction was committed") as caught:
            await work()
        error = assert_lost(caught.value, sqlstate, text)
        assert error.nothing_committed
        assert await bench.kept() == []

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    async def test_the_end_of_a_block_by_hand_says_so_too(self, bench: Bench, end: str) -> None:
        async with bench.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await bench.add(connection)
            await killed_and_noticed(bench, connection)
            with pytest.raises(neon_async.ConnectionLostError, match="nothing of the transaction was committed"):
                await getattr(transaction, end)()

    async def test_a_statement_that_was_under_way_was_not_committed(self, bench: Bench) -> None:
        async with bench.acquire() as connection:
            await connection.execute("BEGIN")
            running = asyncio.ensure_future(connection.fetch("SELECT pg_sleep(60)"))
            await asyncio.sleep(0.01)
            await bench.kill(connection)
            with pytest.raises(neon_async.ConnectionLostError, match="COMMIT was not sent") as caught:
                await running
            assert caught.value.nothing_committed

    async def test_a_release_of_a_savepoint_that_was_lost_has_committed_nothing(self, bench: Bench) -> None:
        async def work() -> None:
            async with bench.acquire() as connection, connection.transaction(), connection.transaction():
                await bench.add(connection)
                await bench.kill(connection)

        with pytest.raises(neon_async.ConnectionLostError, match="nothing of the transaction was committed"):
            await work()
        assert await bench.kept() == []

    @pins("_pool_release_ctr", "_con_release_ctr", "_check_conn_validity")
    async def test_a_transaction_of_another_loan_is_one_of_a_released_connection(
        self, bench: Bench, pool: neon_async.Pool
    ) -> None:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
        async with pool.acquire() as connection:
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                await transaction.start()
            await killed_and_noticed(bench, connection)
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                await transaction.start()


async def by_block(bench: Bench, connection: Any) -> None:
    async with connection.transaction():
        await bench.add(connection)


async def by_hand(bench: Bench, connection: Any) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await bench.add(connection)
    await transaction.commit()


async def by_statement(bench: Bench, connection: Any) -> None:
    await connection.execute("BEGIN")
    await bench.add(connection)
    await connection.execute(" COMMIT ")


async def by_prepared_statement(bench: Bench, connection: Any) -> None:
    await connection.execute("BEGIN")
    await bench.add(connection)
    await connection.fetch("COMMIT")


async def by_text(bench: Bench, connection: Any) -> None:
    await connection.execute(f"BEGIN; INSERT INTO {bench.name} VALUES (1); COMMIT")


LOST_COMMITS = [
    pytest.param(killed_in_commit, {}, id="killed"),
    pytest.param(cut_in_commit, {}, id="cut"),
    pytest.param(suspended_in_commit, {}, id="suspended"),
    pytest.param(frozen_in_commit, {"command_timeout": 0.5}, id="command_timeout"),
]


class TestCommit:
    @pytest.mark.parametrize(("end", "options"), LOST_COMMITS)
    @pytest.mark.parametrize("commit", [by_block, by_hand, by_statement, by_prepared_statement, by_text])
    async def test_a_commit_that_was_lost_is_unknown_however_it_was_sent(
        self, bench: Bench, end: Any, options: Any, commit: Any
    ) -> None:
        await bench.at_commit("PERFORM pg_sleep(60)")
        ending = asyncio.ensure_future(end(bench, like="%COMMIT%"))
        async with asyncio.timeout(HANG), bench.acquire(**options) as connection:
            with pytest.raises(neon_async.CommitUnknownError, match="may have been committed, or not") as caught:
                await commit(bench, connection)
            assert not neon_async.is_retryable(caught.value)
            assert not neon_async.is_unavailable(caught.value), "a client repeats what was answered with 503"
            if not options:
                with pytest.raises(neon_async.ConnectionLostError) as following:
                    await connection.fetchval("SELECT 1")
                assert "nothing of the transaction" not in str(following.value), "it may have been committed"
        await ending

    async def test_a_commit_that_the_server_refuses_is_raised_as_it_is(self, bench: Bench) -> None:
        await bench.at_commit("RAISE SQLSTATE '23505'")
        async with bench.acquire() as connection:
            with pytest.raises(asyncpg.UniqueViolationError):
                await by_block(bench, connection)

    @pytest.mark.parametrize("end", ["cut", "suspend", "freeze"])
    async def test_a_read_only_transaction_has_kept_nothing(
        self, bench: Bench, end: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So it runs again. No trigger can hold its COMMIT: the connection is lost as it is sent."""
        send, ends = SessionProtocol.committing, [getattr(bench.endpoint, end)]

        def lose_and_send(protocol: SessionProtocol, **options: Any) -> Any:
            if ends:
                ends.pop()()
                asyncio.get_running_loop().call_later(0.5, bench.endpoint.thaw)
            return send(protocol, **options)

        async def work(connection: Any) -> int:
            return await connection.fetchval("SELECT 1")  # type: ignore[no-any-return]

        monkeypatch.setattr(SessionProtocol, "committing", lose_and_send)
        assert await bench.run(work, readonly=True, acquire=lambda: bench.acquire(command_timeout=0.2)) == 1
        assert len(bench.connections) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("COMMIT", True),
        ("commit;", True),
        ("/* why */ COMMIT AND CHAIN", True),
        ("END", True),
        ("PREPARE TRANSACTION 'a'", True),
        ("INSERT INTO t VALUES (1); COMMIT; SELECT 1", True),
        ("SELECT 1", False),
        ("SELECT 'COMMIT'", False),
        ("SELECT 1 -- COMMIT", False),
        ("SELECT CASE WHEN true THEN 1 END", False),
        ("PREPARE statement AS SELECT 1", False),
        ("ROLLBACK", False),
        ('SELECT "commit" FROM t', False),
    ],
)
def test_whether_a_text_can_keep_what_a_block_wrote(query: str, expected: bool) -> None:
    assert commits(query) is expected


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "closed it (Connection reset by peer)"),
        (TimeoutError(110, "Connection timed out"), "closed it (Connection timed out)"),
        (ConnectionAbortedError(), "closed it (ConnectionAbortedError)"),
        (None, "closed it"),
    ],
    ids=repr,
)
def test_a_failure_of_the_network_is_named(failure: Exception | None, expected: str) -> None:
    assert loss_with(None, failure).why == f"the server or the network {expected}"


FATAL = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"


def message(kind: bytes, body: bytes) -> bytes:
    return kind + (4 + len(body)).to_bytes(4, "big") + body


@pytest.mark.parametrize("before", [b"", b"D\0\0\0\x0b\0\1\0\0\0\1E", b"E\0\0" * 9, b"x" * 20_000], ids=len)
@pytest.mark.parametrize("body", [FATAL, b"SFATAL\0C08P01\0Mquery_wait_timeout\0\0"], ids=["server", "PgBouncer"])
def test_the_last_words_are_found_behind_anything(before: bytes, body: bytes) -> None:
    assert _fatal_error_at_end(before + message(b"E", body)) == body


@pytest.mark.parametrize(
    "data",
    [
        message(b"E", b"SERROR\0VERROR\0C42601\0Msyntax\0\0"),
        message(b"E", FATAL) + b"\0\0",
        message(b"E", FATAL)[:-3] + b"\0\0",
        b"E\0\0",
    ],
)
def test_no_other_bytes_are_last_words(data: bytes) -> None:
    assert _fatal_error_at_end(data) is None


@given(st.binary(max_size=100))
def test_any_bytes_can_be_searched_for_last_words(data: bytes) -> None:
    body = _fatal_error_at_end(data + b"\0\0")
    assert body is None or isinstance(server_error(body), asyncpg.PostgresError)
