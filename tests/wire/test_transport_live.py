"""Statements sent ahead on sessions of asyncpg with a real server, through a relay that can be frozen and cut."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from support.probes import HANG, connected, until

from neon_async._wire.transport import SessionTransport
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


@dataclass
class Live:
    """One session of asyncpg's with a real server, through an endpoint that can be frozen and cut."""

    connection: Any
    endpoint: LocalEndpoint
    answers: list[tuple[bytes, bytes | None]] = field(default_factory=list)

    @property
    def transport(self) -> SessionTransport:
        return self.connection._transport  # type: ignore[no-any-return]

    def send(self, sql: str) -> None:
        self.transport.send_ahead(sql, lambda status, error: self.answers.append((status, error)))


@pytest.fixture
async def live(postgres: LocalPostgres) -> AsyncIterator[Live]:
    async with LocalEndpoint(postgres) as endpoint, connected(endpoint) as connection, asyncio.timeout(HANG):
        yield Live(connection, endpoint)
        connection.terminate()


async def test_the_next_statement_is_written_at_once_and_gets_its_own_answer(live: Live) -> None:
    assert await live.connection.fetchval("SELECT $1::int", 1) == 1
    for number in range(5):
        live.send(f"SELECT {number} FROM generate_series(1, 1000)")
    writes = live.transport.writes
    following = asyncio.ensure_future(live.connection.fetchval("SELECT $1::int", 2))
    await asyncio.sleep(0)
    assert (live.transport.unanswered, live.transport.writes - writes) == (5, 1)
    assert await following == 2
    assert live.answers == [(b"I", None)] * 5
    assert live.transport.unanswered == 0
    assert await live.connection.fetchval("SELECT 3") == 3


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda connection: connection.execute("SELECT 1; SELECT 2"), id="simple query"),
        pytest.param(lambda connection: connection.execute("SELECT $1::int", 1), id="statement with an argument"),
        pytest.param(lambda connection: connection.executemany("SELECT $1::int", [(1,)] * 1000), id="executemany"),
        pytest.param(lambda connection: connection.copy_from_query("SELECT 1", output=io.BytesIO()), id="COPY OUT"),
        pytest.param(
            lambda connection: connection.copy_records_to_table("pg_temp.made", records=[(1,)] * 1000), id="COPY IN"
        ),
        pytest.param(lambda connection: connection.prepare("SELECT 'never prepared before'"), id="prepare"),
        pytest.param(lambda connection: connection.fetchval("SELECT 1/0"), id="error"),
        pytest.param(lambda connection: connection.fetchval("SELECT 1/0 FROM not_there"), id="error of a prepare"),
    ],
)
async def test_every_call_of_asyncpgs_can_follow(live: Live, call: Callable[[Any], Awaitable[Any]]) -> None:
    await live.connection.execute("CREATE TEMP TABLE made (id int)")

    async def outcome() -> str:
        try:
            return str(await call(live.connection))
        except asyncpg.PostgresError as error:
            return repr(error)

    alone = await outcome()
    for _ in range(3):
        live.send("SELECT 'ahead'; SELECT 1/0")
        live.send("SELECT 'ahead'; SELECT 2")
        behind = await outcome()
        assert behind == alone or "PreparedStatement" in alone
    assert [status for status, _ in live.answers] == [b"I"] * 6


async def test_what_belongs_to_no_statement_reaches_asyncpg_from_within_an_answer(live: Live) -> None:
    heard: list[object] = []
    noted: list[object] = []
    await live.connection.add_listener("news", lambda _, __, channel, payload: heard.append((channel, payload)))
    live.connection.add_log_listener(lambda _, message: noted.append(message.message))
    live.send("NOTIFY news, 'first'; SET application_name = 'from ahead'; SELECT pg_notify('news', 'second')")
    live.send("DO $$ BEGIN RAISE NOTICE 'look'; END $$")
    assert await live.connection.fetchval("SELECT 1") == 1
    assert live.connection.get_settings().application_name == "from ahead"
    await until(lambda: len(heard) == 2 and noted)
    assert (heard, noted) == ([("news", "first"), ("news", "second")], ["look"])


async def test_no_notification_is_lost_or_doubled_among_statements_sent_ahead(live: Live) -> None:
    """Another session notifies all the time, so that notifications stand before, within and behind the answers."""
    heard: list[int] = []
    await live.connection.add_listener("news", lambda _, __, ___, payload: heard.append(int(payload)))
    async with connected(live.endpoint) as other:

        async def notify() -> None:
            for number in range(300):
                await other.execute("SELECT pg_notify('news', $1)", str(number))

        notifying = asyncio.ensure_future(notify())
        while not notifying.done():
            live.send("SELECT 1")
            assert await live.connection.fetchval("SELECT 2") == 2
        await notifying
    await until(lambda: len(heard) == 300)
    assert heard == list(range(300))


async def test_a_writer_waits_for_room_while_the_server_does_not_read(live: Live) -> None:
    """`pause_writing()` and `resume_writing()` reach asyncpg, which has written to its limit."""
    produced, size = 0, 400

    def rows() -> Iterator[tuple[str]]:
        nonlocal produced
        for _ in range(size):
            produced += 1
            yield ("x" * 100_000,)

    query = "INSERT INTO made VALUES ($1)"
    await live.connection.execute("CREATE TEMP TABLE made (text text)")
    await live.connection.executemany(query, [("a row",)])
    live.endpoint.freeze()
    live.send("SELECT 1")
    inserting = asyncio.ensure_future(live.connection.executemany(query, rows()))
    await asyncio.sleep(0.1)
    held = produced
    await asyncio.sleep(0.1)
    assert 0 < produced == held < size, "asyncpg does not know that it has to wait"
    live.endpoint.thaw()
    await inserting
    assert produced == size


async def test_a_reader_can_hold_up_the_server(live: Live) -> None:
    """asyncpg pauses reading while the receiver of a COPY is busy."""
    go_on, received = asyncio.Event(), 0

    async def receive(data: bytes) -> None:
        nonlocal received
        received += len(data)
        await go_on.wait()

    live.send("SELECT 1")
    copying = asyncio.ensure_future(
        live.connection.copy_from_query("SELECT repeat('x', 99999) FROM generate_series(1, 200)", output=receive)
    )
    await until(lambda: received)
    assert not live.transport.is_reading()
    held = received
    await asyncio.sleep(0.05)
    assert received == held
    go_on.set()
    assert await copying == "COPY 200"
    assert received == 200 * 100_000


@pytest.mark.parametrize("how", ["cut", "terminated", "closed", "aborted"])
async def test_the_end_of_the_connection_reaches_asyncpg_once(live: Live, postgres: LocalPostgres, how: str) -> None:
    ends: list[object] = []
    live.connection.add_termination_listener(ends.append)
    backend = live.connection.get_server_pid()
    assert await live.connection.fetchval("SELECT 1") == 1
    live.send("SELECT pg_sleep(100)")
    waiting = asyncio.ensure_future(live.transport.wait_for_answers())
    following = asyncio.ensure_future(live.connection.fetchval("SELECT 1"))
    await asyncio.sleep(0.05)
    match how:
        case "cut":
            live.endpoint.cut()
        case "terminated":
            async with connected(postgres) as admin:
                await admin.execute("SELECT pg_terminate_backend($1)", backend)
        case "closed":
            live.connection.terminate()
        case "aborted":
            live.transport.abort()
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as raised:
        await following
    if how == "terminated" and not asyncpg.__version__.startswith("0.31."):  # which drops a server's last words
        assert "terminating connection due to administrator command" in str(raised.value)
    await waiting
    await until(lambda: ends)
    await asyncio.sleep(0.01)
    assert len(ends) == 1
    assert live.connection.is_closed()
    assert (live.answers, live.transport.unanswered) == ([], 0)


async def test_a_connection_is_closed_politely_while_answers_are_missing(live: Live) -> None:
    live.endpoint.freeze()
    live.send("SELECT 1")
    closing = asyncio.ensure_future(live.connection.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    live.endpoint.thaw()
    await closing
    assert live.answers == [(b"I", None)]


@pytest.mark.parametrize("copy", ["COPY (SELECT 1) TO STDOUT", "CREATE TEMP TABLE t (id int); COPY t FROM STDIN"])
async def test_a_copy_sent_ahead_ends_the_connection(live: Live, copy: str) -> None:
    live.send(copy)
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await live.connection.fetchval("SELECT 1")
    assert live.answers == []
