"""Statements sent ahead, byte by byte: the answers of a real server, recorded, and cut at every place.

The answers of statements that were sent ahead end in `_wire.transport`; everything else has to reach the protocol of
the session, in order, however the network cuts the stream and wherever it ends.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.probes import HANG, connected, until

import neon_async
from neon_async._wire.transport import SessionTransport
from neon_async.testing import LocalEndpoint, LocalPostgres

# Statements whose answers contain every message that may come while they are read, and every status of a transaction.
AHEAD = (
    "SET application_name = 'sent ahead'; LISTEN news; NOTIFY news, 'from a statement sent ahead'",
    "DO $$ BEGIN RAISE NOTICE 'look here'; END $$; SELECT 'a row', 2 UNION SELECT 'another', 3; SELECT repeat('x', 99)",
    "",
    "BEGIN; SELECT 1/0; SELECT 'not run'",
    "ROLLBACK; BEGIN; NOTIFY news, 'second'; SELECT 1",
    "COMMIT",
)
BEHIND = "SELECT 'what follows'; SET application_name = 'behind'"
STATUSES = [b"I", b"I", b"I", b"E", b"T", b"I"]


@dataclass(frozen=True)
class Recording:
    """What a real server has answered to `AHEAD` and then to `BEHIND`.

    Attributes:
        data: All bytes.
        expected: What the protocol of the session has to receive of them.
        before: The bytes of a notification, as the server sends it to an idle client.
    """

    data: bytes
    expected: bytes
    before: bytes


class Recorder(asyncio.Protocol):
    """The protocol of a session, which keeps what it is called with."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.calls: list[object] = []

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")


class Below(asyncio.Transport):
    """The transport below a session's, without a network."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.written = bytearray()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


@dataclass
class Session:
    """A session transport over no network, with `count` statements sent ahead."""

    count: int = len(AHEAD)
    recorder: Recorder = field(default_factory=Recorder)
    answers: list[tuple[bytes, bytes | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.below = Below()
        self.transport = SessionTransport(self.below)
        self.below.protocol = self.transport.in_front_of(self.recorder)
        for number in range(self.count):
            self.send(f"SELECT {number}")

    def send(self, sql: str) -> None:
        self.transport.send_ahead(sql, lambda status, error: self.answers.append((status, error)))

    def receive(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self.below.protocol.data_received(chunk)


def messages(data: bytes) -> Iterator[bytes]:
    """Yield the messages of a server one by one."""
    position = 0
    while position < len(data):
        end = position + 1 + struct.unpack_from("!I", data, position + 1)[0]
        yield data[position:end]
        position = end


def kinds(data: bytes) -> str:
    """Return the type bytes of the messages of a server."""
    return "".join(chr(message[0]) for message in messages(data))


def without_answers(data: bytes, count: int) -> bytes:
    """Return what is left of `data` without `count` answers: messages of no statement, and what follows."""
    kept = b""
    for message in messages(data):
        if not count or message[:1] in (b"S", b"A", b"N"):
            kept += message
        count -= bool(count) and message[:1] == b"Z"
    return kept


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Return the parts of `data` between `places`."""
    edges = [0, *sorted(places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges) if end > begin]


def query(text: str) -> bytes:
    body = text.encode() + b"\0"
    return struct.pack("!cI", b"Q", 4 + len(body)) + body


async def record(server: LocalPostgres, queries: Sequence[str]) -> bytes:
    """Return what a real server answers to these simple queries on a session of asyncpg's."""
    connection: Any = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
    transport, recorder = connection._transport, Recorder()
    protocol = transport.get_protocol()
    transport.set_protocol(recorder)
    transport.write(b"".join(map(query, queries)))
    await until(lambda: bytes(recorder.data).count(b"Z\0\0\0\5") == len(queries))
    transport.set_protocol(protocol)
    await connection.close()
    return bytes(recorder.data)


@pytest.fixture(scope="module")
def recording(postgres: LocalPostgres) -> Recording:
    """The bytes of the server under test, not those of another version."""
    data = asyncio.run(record(postgres, [*AHEAD, BEHIND]))
    [before] = [it for it in messages(data) if it[:1] == b"A" and b"second" in it]
    return Recording(data, without_answers(data, len(AHEAD)), before)


def assert_whole(session: Session, recording: Recording) -> None:
    """Check that the session's protocol received what it has to receive, and that nothing is under way."""
    assert bytes(session.recorder.data) == recording.expected
    assert [status for status, _ in session.answers] == STATUSES
    errors = [error for _, error in session.answers]
    assert [error is not None and b"C22012\0" in error for error in errors] == [status == b"E" for status in STATUSES]
    assert session.transport.unanswered == 0
    assert session.transport.is_settled
    assert not session.below.aborted
    assert session.recorder.calls == []


# ---------------------------------------------------------------------------------------------------------------------
# However the stream is cut


def test_the_recording_contains_every_message_that_may_come(recording: Recording) -> None:
    assert set(kinds(recording.data)) == set("SANTDCIZE")
    assert kinds(recording.expected).startswith("SANA") or kinds(recording.expected).startswith("ASNA")
    assert kinds(recording.expected).endswith("TDCCSZ")


def test_the_server_s_bytes_can_be_cut_in_two_at_every_place(recording: Recording) -> None:
    for place in range(len(recording.data) + 1):
        session = Session()
        session.receive(*cut(recording.data, [place]))
        assert_whole(session, recording)


def test_the_server_s_bytes_can_come_one_by_one(recording: Recording) -> None:
    session = Session()
    session.receive(*(bytes([byte]) for byte in recording.data))
    assert_whole(session, recording)


@given(data=st.data())
def test_the_server_s_bytes_can_be_cut_at_random(recording: Recording, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(1, len(recording.data) - 1), max_size=40))
    session = Session()
    session.receive(*cut(recording.data, places))
    assert_whole(session, recording)


@given(data=st.data())
def test_statements_can_be_sent_ahead_while_others_are_being_answered(
    recording: Recording, data: st.DataObject
) -> None:
    """The first answers come before the last statements are sent."""
    places = data.draw(st.sets(st.integers(1, len(recording.data) - 1), min_size=1, max_size=8))
    chunks = cut(recording.data, places)
    session, sent = Session(count=1), 1
    for chunk in chunks:
        # The server cannot answer before it was asked: at the latest when its answer begins, the statement was sent.
        needed = min(len(AHEAD), answered_by(recording, chunks, chunk) + 1)
        sends = data.draw(st.integers(needed, len(AHEAD))) if needed > sent else sent
        for _ in range(sends - sent):
            session.send("SELECT 1")
        sent = max(sent, sends)
        session.receive(chunk)
    assert_whole(session, recording)


def answered_by(recording: Recording, chunks: list[bytes], last: bytes) -> int:
    """Return how many answers have ended, or begun, with the chunk `last`."""
    seen = b"".join(chunks[: chunks.index(last) + 1])
    return seen.count(b"Z\0\0\0\5")


# ---------------------------------------------------------------------------------------------------------------------
# When a statement may be sent ahead


def test_a_session_is_settled_when_the_latest_bytes_end_an_answer(recording: Recording) -> None:
    """Then the session's protocol has no message in part, and the server no transaction of a Parse without Sync."""
    session, ready = Session(count=0), b"Z\0\0\0\5I"
    assert not session.transport.is_settled
    for place in range(1, len(recording.data) + 1):
        session.receive(recording.data[place - 1 : place])
        assert session.transport.is_settled == (recording.data[:place][-6:-1] == ready[:5])
    for place in range(len(ready) + 1):
        session.receive(b"1\0\0\0\4", *cut(ready, [place]))
        assert session.transport.is_settled
    for place in range(1, len(recording.before) + 1):  # a notification that has come halfway, or after the answer
        session.receive(ready, recording.before[:place])
        assert not session.transport.is_settled
        session.receive(recording.before[place:])
        assert not session.transport.is_settled


# ---------------------------------------------------------------------------------------------------------------------
# Where the stream ends


async def wait_until_ended(session: Session) -> asyncio.Task[None]:
    waiting = asyncio.ensure_future(session.transport.wait_for_answers())
    await asyncio.sleep(0)
    return waiting


@pytest.mark.anyio
async def test_the_end_of_the_connection_reaches_the_protocol_once_wherever_it_comes(recording: Recording) -> None:
    ends = list(itertools.accumulate(len(message) for message in messages(recording.data)))
    for place in range(len(recording.data) + 1):
        session, error = Session(), ConnectionResetError(f"after {place} bytes")
        session.receive(*cut(recording.data[:place], [place // 2]))
        waiting = await wait_until_ended(session)
        session.below.protocol.connection_lost(error)
        async with asyncio.timeout(HANG):
            await waiting
            await session.transport.wait_for_answers()  # also afterwards
        assert session.recorder.calls == [error]
        assert session.transport.unanswered == 0
        whole = recording.data[: max((end for end in ends if end <= place), default=0)]
        assert len(session.answers) == min(kinds(whole).count("Z"), len(AHEAD))
        received = bytes(session.recorder.data)
        if len(session.answers) < len(AHEAD):
            assert received == without_answers(whole, len(AHEAD))
        else:  # a protocol receives its own answers as they come
            assert received == without_answers(recording.data, len(AHEAD))[: len(received)]
            assert len(recording.data) - place == len(recording.expected) - len(received)


@pytest.mark.anyio
async def test_waiting_ends_with_the_last_answer_and_can_be_cancelled(recording: Recording) -> None:
    session = Session()
    await Session(count=0).transport.wait_for_answers()  # nothing to wait for
    first, cancelled = await wait_until_ended(session), await wait_until_ended(session)
    cancelled.cancel()
    *most, last = cut(recording.data, [recording.data.rindex(b"Z\0\0\0\5", 0, len(recording.data) - 6)])
    session.receive(*most)
    await asyncio.sleep(0)
    assert cancelled.done()
    assert not first.done()
    session.receive(last)
    async with asyncio.timeout(HANG):
        await first


@pytest.mark.parametrize("count", [0, 1])
def test_the_end_of_the_stream_and_the_flow_of_writing_are_passed_on(count: int) -> None:
    session = Session(count)
    protocol = session.below.protocol
    assert protocol.eof_received() is True
    protocol.pause_writing()
    protocol.resume_writing()
    assert session.recorder.calls == ["eof", "pause", "resume"]


# ---------------------------------------------------------------------------------------------------------------------
# What is no answer to a simple query


@pytest.mark.parametrize("kind", [chr(code) for code in range(256) if chr(code) not in "SANTDCIEZ"])
def test_a_message_that_is_no_answer_to_a_simple_query_ends_the_connection(kind: str) -> None:
    session = Session(count=1)
    message = struct.pack("!cI", kind.encode("latin-1"), 4)
    session.receive(message + b"Z\0\0\0\5I")
    assert session.below.aborted
    assert session.answers == []
    assert bytes(session.recorder.data) == b""


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("kind", ["S", "C", "Z", "E"])
def test_a_message_whose_length_is_impossible_ends_the_connection(kind: str, length: int) -> None:
    session = Session(count=1)
    session.receive(struct.pack("!cI", kind.encode(), length) + b"Z\0\0\0\5I")
    assert session.below.aborted
    assert session.answers == []
    assert bytes(session.recorder.data) == b""


@pytest.mark.parametrize("more", [0, 1])
def test_nothing_is_read_any_more_where_an_answer_led_to_the_end(recording: Recording, more: int) -> None:
    """Nothing behind a reset that failed may look like the answer to the next statement."""
    first = recording.data[: recording.data.index(b"Z\0\0\0\5") + 6]
    session = Session(count=0)
    session.transport.send_ahead("SELECT 1", lambda status, error: session.transport.abort())
    for _ in range(more):
        session.send("SELECT 2")
    session.receive(recording.data)
    session.receive(recording.data)
    assert bytes(session.recorder.data) == without_answers(first, 1)
    assert session.answers == []


# ---------------------------------------------------------------------------------------------------------------------
# With asyncpg and a real server


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


@pytest.mark.anyio
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


@pytest.mark.anyio
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


@pytest.mark.anyio
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


@pytest.mark.anyio
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


@pytest.mark.anyio
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


@pytest.mark.anyio
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


@pytest.mark.anyio
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


@pytest.mark.anyio
async def test_a_connection_is_closed_politely_while_answers_are_missing(live: Live) -> None:
    live.endpoint.freeze()
    live.send("SELECT 1")
    closing = asyncio.ensure_future(live.connection.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    live.endpoint.thaw()
    await closing
    assert live.answers == [(b"I", None)]


@pytest.mark.anyio
@pytest.mark.parametrize("copy", ["COPY (SELECT 1) TO STDOUT", "CREATE TEMP TABLE t (id int); COPY t FROM STDIN"])
async def test_a_copy_sent_ahead_ends_the_connection(live: Live, copy: str) -> None:
    live.send(copy)
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await live.connection.fetchval("SELECT 1")
    assert live.answers == []
