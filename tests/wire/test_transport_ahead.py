"""Statements sent ahead, byte by byte: the answers of a real server, recorded, and cut at every place.

The answers of statements that were sent ahead end in `_wire.transport`; everything else has to reach the protocol of
the session, in order, however the network cuts the stream and wherever it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.probes import HANG, until

import neon_async
from neon_async._wire.transport import SessionTransport
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

# Statements whose answers contain every message that may come while they are read, and every status of a transaction;
# then some with the same answer, byte by byte, and one among them with another.
SAME = "BEGIN; SELECT 'a row'; RESET ALL; COMMIT"
AHEAD = (
    "SET application_name = 'sent ahead'; LISTEN news; NOTIFY news, 'from a statement sent ahead'",
    "DO $$ BEGIN RAISE NOTICE 'look here'; END $$; SELECT 'a row', 2 UNION SELECT 'another', 3; SELECT repeat('x', 99)",
    "",
    "BEGIN; SELECT 1/0; SELECT 'not run'",
    "ROLLBACK; BEGIN; NOTIFY news, 'second'; SELECT 1",
    "COMMIT",
    *(SAME, SAME, SAME, f"NOTIFY news; {SAME}", SAME, SAME),
)
BEHIND = "SELECT 'what follows'; SET application_name = 'behind'"
STATUSES = [b"I", b"I", b"I", b"E", b"T", *[b"I"] * 7]


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
        self.calls: list[object] = []
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.calls.append(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.calls.append(list(list_of_data))

    def write_eof(self) -> None:
        self.calls.append("eof")

    def close(self) -> None:
        self.calls.append("close")

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


async def test_the_recording_contains_every_message_that_may_come(recording: Recording) -> None:
    assert set(kinds(recording.data)) == set("SANTDCIZE")
    assert kinds(recording.expected).startswith("SANA") or kinds(recording.expected).startswith("ASNA")
    assert kinds(recording.expected).endswith("TDCCSZ")


async def test_the_server_s_bytes_can_be_cut_in_two_at_every_place(recording: Recording) -> None:
    for place in range(len(recording.data) + 1):
        session = Session()
        session.receive(*cut(recording.data, [place]))
        assert_whole(session, recording)


async def test_the_server_s_bytes_can_come_one_by_one(recording: Recording) -> None:
    session = Session()
    session.receive(*(bytes([byte]) for byte in recording.data))
    assert_whole(session, recording)


PLACES = st.sets(st.integers(1, 100_000), max_size=40)  # modulo the length of the recording


@given(places=PLACES)
async def test_the_server_s_bytes_can_be_cut_at_random(recording: Recording, places: set[int]) -> None:
    session = Session()
    session.receive(*cut(recording.data, {place % len(recording.data) for place in places}))
    assert_whole(session, recording)


@given(places=PLACES, eagerness=st.lists(st.integers(0, 3), min_size=41, max_size=41))
async def test_statements_can_be_sent_ahead_while_others_are_being_answered(
    recording: Recording, places: set[int], eagerness: list[int]
) -> None:
    """The first answers come before the last statements are sent."""
    chunks = cut(recording.data, {place % len(recording.data) for place in places})
    session, sent = Session(count=1), 1
    for number, chunk in enumerate(chunks):
        # The server cannot answer before it was asked: when its answer begins, the statement has been sent.
        answered = b"".join(chunks[: number + 1]).count(b"Z\0\0\0\5")
        sends = min(len(AHEAD), max(sent, answered + 1) + eagerness[number])
        for _ in range(sends - sent):
            session.send("SELECT 1")
        sent = sends
        session.receive(chunk)
    assert_whole(session, recording)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


async def test_what_follows_soon_is_written_together_with_a_statement() -> None:
    """The task that waited for a connection runs one iteration of the event loop after its release."""
    session = Session(count=2)
    await asyncio.sleep(0)
    assert (session.below.calls, session.transport.writes) == ([], 2)
    session.transport.write(memoryview(b"what follows"))
    await asyncio.sleep(0.001)
    session.transport.write(b"later")
    together = query("SELECT 0") + query("SELECT 1") + b"what follows"
    assert (session.below.calls, session.transport.writes) == ([together, b"later"], 4)


async def test_a_statement_is_written_soon_where_nothing_follows() -> None:
    session = Session(count=2)
    for _ in range(3):
        await asyncio.sleep(0)
    assert session.below.calls == [query("SELECT 0") + query("SELECT 1")]
    session.send("SELECT 2")
    for _ in range(3):
        await asyncio.sleep(0)
    assert session.below.calls[1:] == [query("SELECT 2")]


async def test_a_statement_is_written_before_whatever_follows() -> None:
    calls: list[tuple[Callable[[SessionTransport], None], object]] = [
        (lambda transport: transport.writelines([b"a", b"b"]), [b"a", b"b"]),
        (lambda transport: transport.write_eof(), "eof"),
        (lambda transport: transport.close(), "close"),
    ]
    for call, written in calls:
        session = Session(count=1)
        call(session.transport)
        await asyncio.sleep(0.001)
        assert session.below.calls == [query("SELECT 0"), written]


async def test_nothing_is_written_to_a_transport_that_was_aborted() -> None:
    session = Session(count=1)
    session.transport.abort()
    await asyncio.sleep(0.001)
    assert session.below.calls == []


# ---------------------------------------------------------------------------------------------------------------------
# When a statement may be sent ahead


async def test_a_session_is_settled_when_the_latest_bytes_end_an_answer(recording: Recording) -> None:
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
async def test_the_end_of_the_stream_and_the_flow_of_writing_are_passed_on(count: int) -> None:
    session = Session(count)
    protocol = session.below.protocol
    assert protocol.eof_received() is True
    protocol.pause_writing()
    protocol.resume_writing()
    assert session.recorder.calls == ["eof", "pause", "resume"]


# ---------------------------------------------------------------------------------------------------------------------
# What is no answer to a simple query


async def test_a_message_that_is_no_answer_to_a_simple_query_ends_the_connection() -> None:
    for code in set(range(256)) - set(b"SANTDCIEZ"):
        session = Session(count=1)
        session.receive(bytes([code]) + b"\0\0\0\4" + b"Z\0\0\0\5I")
        assert session.below.aborted, code
        assert session.answers == []
        assert bytes(session.recorder.data) == b""


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("kind", ["S", "C", "Z", "E"])
async def test_a_message_whose_length_is_impossible_ends_the_connection(kind: str, length: int) -> None:
    session = Session(count=1)
    session.receive(struct.pack("!cI", kind.encode(), length) + b"Z\0\0\0\5I")
    assert session.below.aborted
    assert session.answers == []
    assert bytes(session.recorder.data) == b""


@pytest.mark.parametrize("more", [0, 1])
async def test_nothing_is_read_any_more_where_an_answer_led_to_the_end(recording: Recording, more: int) -> None:
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
