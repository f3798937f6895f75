"""The messages of a login: cut anywhere, damaged, out of order, or from a server that does not know the password."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

import asyncpg
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st
from scramp.core import ScramException
from support.logins import BOTH, OK, PLAIN, PLUS, READY, SESSION_START, HonestServer, sasl
from support.probes import HANG, until
from support.signatures import signed

from neon_async._config.literals import SASLMechanism
from neon_async._errors import ChannelBindingError, ConnectError, NeonAsyncError
from neon_async._wire.login import EarlyLoginRefusedError, LoginCache, LoginProtocol, log_in
from neon_async._wire.scram import KeyCache, Keys
from neon_async.testing._impostor import authentication_request, error_response, message

pytestmark = pytest.mark.anyio

HOST = "db.example.com"
PASSWORD = "correct horse battery staple"
OTHER_PASSWORD = "Tr0ub4dor&3"
SALT = base64.b64encode(HonestServer.salt).decode()


def secret() -> str:
    return PASSWORD


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def right(signature: bytes) -> bytes:
    return b"v=" + base64.b64encode(signature)


CERTIFICATE = signed(p256(), hashes.SHA256())
BINDING = hashlib.sha256(CERTIFICATE.der).digest()
STARTUP = b"\0\0\0\x0d\0\3\0\0user\0"
Cut = Callable[[bytes], list[bytes]]


class InMemoryTransport(asyncio.Transport):
    """A transport to a server in this process.

    What the server sends arrives in the pieces that `cut` returns. `mutate` may change an answer, and gets its number.
    The server closes the connection on a message that it does not understand.
    """

    def __init__(
        self, server: HonestServer, cut: Cut, *, mutate: Callable[[int, bytes], bytes] = lambda _, data: data
    ) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.delivered: list[bytes] = []
        self.login = LoginProtocol(HOST)
        self._protocol: asyncio.Protocol = self.login
        self._server = server
        self._cut = cut
        self._mutate = mutate
        self._pending: list[bytes] = []
        self.login.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def abort(self) -> None:
        self.hang_up()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))
        answer = (self._server.challenge, self._server.final)[len(self.sent) - 1]
        try:
            reply = answer(self.sent[-1][5:])
        except ScramException:
            self.hang_up()
        else:
            self.deliver(reply if len(self.sent) == 1 else reply + OK + SESSION_START)

    def deliver(self, data: bytes) -> None:
        """Deliver `data`, one piece in each iteration of the event loop."""
        data = self._mutate(len(self.delivered), data)
        self.delivered.append(data)
        self._pending += self._cut(data)
        asyncio.get_running_loop().call_soon(self._feed)

    def _feed(self) -> None:
        if self._pending:
            self._protocol.data_received(self._pending.pop(0))
            asyncio.get_running_loop().call_soon(self._feed)

    def hang_up(self) -> None:
        """Close the connection from the server's side."""
        self._pending.clear()
        self._protocol.connection_lost(None)

    async def hang_up_when_idle(self) -> None:
        """Close the connection once everything has arrived and the client has had time to answer, without PBKDF2."""
        sent, idle = 0, 0
        while idle < 10:
            await asyncio.sleep(0)
            idle = idle + 1 if sent == len(self.sent) and not self._pending else 0
            sent = len(self.sent)
        self.hang_up()


class Recorder(asyncio.Protocol):
    """Stands for asyncpg's protocol, and records what is handed over."""

    def __init__(self) -> None:
        self.received = b""
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def log_in_on(
    transport: InMemoryTransport,
    *,
    cache: LoginCache,
    early: SASLMechanism | None = None,
    binding_required: bool = False,
    certificate: bytes = CERTIFICATE.der,
    offer: list[str] = BOTH,
) -> Recorder:
    """Log in over `transport`, hand over, and return the protocol that received the rest."""
    transport.deliver(sasl(*offer))
    recorder = Recorder()
    async with asyncio.timeout(HANG):
        await log_in(
            transport.login,
            certificate=certificate,
            binding_required=binding_required,
            secret=secret,
            cache=cache,
            early=early,
        )
        await transport.login.hand_over(recorder)
    return recorder


def whole(data: bytes) -> list[bytes]:
    return [data]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def cut_at(position: int) -> Cut:
    return lambda data: [data[:position], data[position:]] if position < len(data) else [data]


@pytest.mark.parametrize("early", [None, PLUS], ids=["first-dial", "later-dial"])
async def test_a_login_succeeds_wherever_its_messages_are_cut(early: SASLMechanism | None) -> None:
    cache = LoginCache()
    longest = len(OK + SESSION_START) + 60
    for cut in (whole, byte_by_byte, *(cut_at(position) for position in range(1, longest))):
        transport = InMemoryTransport(HonestServer(PASSWORD, binding=BINDING), cut)
        recorder = await log_in_on(transport, cache=cache, early=early)
        await transport.hang_up_when_idle()
        assert recorder.received == OK + SESSION_START
        assert recorder.lost
        assert [data[:1] for data in transport.sent] == [b"p", b"p"]


class TransportBeforeStartup(InMemoryTransport):
    """The transport of a session whose StartupMessage has not been sent. The server ignores it."""

    writes: list[bytes]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))
        if rest := bytes(data).removeprefix(STARTUP):
            super().write(rest)


@pytest.mark.parametrize(
    ("early", "first"),
    [
        pytest.param(PLUS, [STARTUP + b"p"], id="together with the message of an early login"),
        pytest.param(None, [STARTUP, b"p"], id="alone before the server has made its offer"),
    ],
)
async def test_the_startup_message_is_sent(early: SASLMechanism | None, first: list[bytes]) -> None:
    transport = TransportBeforeStartup(HonestServer(PASSWORD, binding=BINDING), whole)
    transport.writes = []
    transport.deliver(sasl(*BOTH))
    async with asyncio.timeout(HANG):
        await log_in(
            transport.login,
            startup=STARTUP,
            certificate=CERTIFICATE.der,
            binding_required=True,
            secret=secret,
            cache=LoginCache(),
            early=early,
        )
    assert [data[: len(start)] for data, start in zip(transport.writes, [*first, b"p"], strict=True)] == [*first, b"p"]


async def test_notices_before_a_message_in_the_same_read_are_skipped() -> None:
    notices = message(b"N", b"SNOTICE\0Mhello\0\0") * 3
    transport = InMemoryTransport(HonestServer(PASSWORD, binding=BINDING), whole, mutate=lambda _, data: notices + data)
    recorder = await log_in_on(transport, cache=LoginCache())
    assert recorder.received == OK + SESSION_START


@pytest.mark.parametrize("size", [8_193, 70_000, 4_000_000])
@pytest.mark.parametrize("cut", [whole, cut_at(300)], ids=["whole", "cut"])
async def test_a_long_notice_after_authentication_is_passed_on(size: int, cut: Cut) -> None:
    notice = message(b"N", b"SNOTICE\0M" + b"x" * size + b"\0\0")

    def welcome(which: int, data: bytes) -> bytes:
        return data.replace(OK, OK + notice) if which == 2 else data

    transport = InMemoryTransport(HonestServer(PASSWORD, binding=BINDING), cut, mutate=welcome)
    recorder = await log_in_on(transport, cache=LoginCache())
    assert recorder.received == OK + notice + SESSION_START


async def test_many_notices_after_authentication_are_passed_on() -> None:
    notices = message(b"N", b"SNOTICE\0M" + b"x" * 4000 + b"\0\0") * 100

    def welcome(which: int, data: bytes) -> bytes:
        return data.replace(OK, OK + notices) if which == 2 else data

    transport = InMemoryTransport(HonestServer(PASSWORD, binding=BINDING), whole, mutate=welcome)
    assert (await log_in_on(transport, cache=LoginCache())).received == OK + notices + SESSION_START


async def test_a_connection_that_is_lost_after_authenticationok_causes_no_hang() -> None:
    transport, recorder = InMemoryTransport(HonestServer(PASSWORD), whole), Recorder()
    transport.login.data_received(OK + message(b"S", b"server_version\x0017\0"))
    transport.hang_up()
    try:
        await transport.login.hand_over(recorder)
    except ConnectError:
        return
    assert recorder.lost, "asyncpg never learns that its connection is lost"


@pytest.mark.parametrize("answer", [b"", authentication_request(12, right(bytes(32))), error_response("no")], ids=len)
async def test_keys_that_the_server_has_not_accepted_are_not_cached(answer: bytes) -> None:
    transport = InMemoryTransport(
        HonestServer(PASSWORD, binding=BINDING), whole, mutate=lambda which, data: answer if which == 2 else data
    )
    cache = LoginCache()
    login_attempt = asyncio.ensure_future(log_in_on(transport, cache=cache))
    await until(lambda: len(transport.delivered) == 3)
    await transport.hang_up_when_idle()
    with pytest.raises((NeonAsyncError, asyncpg.PostgresError)):
        await login_attempt
    assert len(transport.sent) == 2
    assert repr(cache.keys) == "<KeyCache of 0>"


async def test_plus_is_not_sent_early_to_a_new_certificate_that_cannot_be_bound() -> None:
    certificate = signed(ed25519.Ed25519PrivateKey.generate(), None).der
    transport = InMemoryTransport(HonestServer(PASSWORD, binding=b"a hash of the server's choice"), whole)
    with pytest.raises(ChannelBindingError, match="no hash"):
        await log_in_on(transport, cache=LoginCache(), early=PLUS, certificate=certificate)
    assert transport.sent == []
    transport = InMemoryTransport(HonestServer(PASSWORD), whole)
    recorder = await log_in_on(transport, cache=LoginCache(), early=PLUS, certificate=certificate, offer=[PLAIN])
    assert recorder.received == OK + SESSION_START
    assert b"n,,n=*,r=" in transport.sent[0]


async def test_a_message_of_8192_bytes_is_accepted() -> None:
    filler = b"X" * (8188 - 4 - len(BOTH[0]) - 3) + b"\0"
    offer = authentication_request(10, PLUS.encode() + b"\0" + filler + b"\0")
    assert len(offer) == 8193  # the type and 8,192 bytes that count themselves
    transport = InMemoryTransport(
        HonestServer(PASSWORD, binding=BINDING), whole, mutate=lambda which, data: data if which else offer
    )
    assert (await log_in_on(transport, cache=LoginCache())).received == OK + SESSION_START


@dataclass(frozen=True)
class Damage:
    """A change to one of the server's answers."""

    which: int
    position: int
    removed: int
    inserted: bytes

    def __call__(self, which: int, data: bytes) -> bytes:
        if which != self.which:
            return data
        at = self.position % (len(data) + 1)
        return data[:at] + self.inserted + data[at + self.removed :]


DAMAGE = st.builds(
    Damage,
    which=st.integers(0, 2),
    position=st.integers(0, 400),
    removed=st.integers(0, 40),
    inserted=st.binary(max_size=20) | st.sampled_from([OK, READY, sasl(PLAIN), sasl(*BOTH), error_response("no")]),
)
CUTS = st.just(whole) | st.just(byte_by_byte) | st.builds(cut_at, st.integers(1, 400))
EARLY = st.sampled_from([None, PLUS, PLAIN])
REQUIRED = st.booleans()
KNOWN = LoginCache()  # so that PBKDF2 runs once for all examples
KNOWN.keys = KeyCache()
KNOWN.keys.put(secret, HonestServer.salt, 4096, Keys(secret, HonestServer.salt, 4096))


async def outcome(
    transport: InMemoryTransport, *, early: SASLMechanism | None, binding_required: bool
) -> Recorder | None:
    """Return the protocol that the login was handed over to, or None where it was refused with one of our errors."""
    server = asyncio.ensure_future(transport.hang_up_when_idle())
    try:
        return await log_in_on(transport, cache=KNOWN, early=early, binding_required=binding_required)
    except (NeonAsyncError, asyncpg.PostgresError, EarlyLoginRefusedError) as error:
        assert PASSWORD not in repr(error)
        return None
    finally:
        await server


def signature_in(data: bytes) -> bytes:
    """Return the signature in the first SASLFinal of `data`, after any notices."""
    while data[:1] == b"N":
        data = data[1 + int(struct.unpack_from("!I", data, 1)[0]) :]
    assert data[:1] == b"R"
    assert data[5:9] == struct.pack("!I", 12)
    attributes = data[9 : 1 + int(struct.unpack_from("!I", data, 1)[0])].split(b",")
    return base64.b64decode(attributes[0].removeprefix(b"v="))


@given(damage=DAMAGE, cut=CUTS, early=EARLY, binding_required=REQUIRED)
async def test_a_damaged_login_succeeds_only_with_the_right_signature(
    damage: Damage, cut: Cut, early: SASLMechanism | None, binding_required: bool
) -> None:
    server = HonestServer(PASSWORD, binding=BINDING)
    transport = InMemoryTransport(server, cut, mutate=damage)
    if await outcome(transport, early=early, binding_required=binding_required):
        assert server.server_signature == signature_in(transport.delivered[-1])


class Stranger(HonestServer):
    """A server that does not know the password, and sends the given answers."""

    def __init__(self, *replies: bytes) -> None:
        super().__init__(OTHER_PASSWORD)
        self._replies = list(replies)

    def challenge(self, initial_response: bytes) -> bytes:
        nonce = initial_response.rpartition(b"r=")[2]
        return self._replies[0].replace(b"NONCE", nonce)

    def final(self, response: bytes) -> bytes:
        return self._replies[1]


REQUESTS = st.builds(authentication_request, st.sampled_from([0, 3, 5, 10, 11, 12, 13]), st.binary(max_size=40))
CHALLENGES = st.sampled_from([",i=4096", ",i=4095", ",i=9000000", ",i=4096,m=x"]).map(
    lambda end: authentication_request(11, f"r=NONCE+,s={SALT}{end}".encode())
)
ANY_MESSAGE = st.builds(
    message,
    st.sampled_from([b"R", b"E", b"N", b"S", b"Z", b"K", b"v"]) | st.binary(min_size=1, max_size=1),
    st.binary(max_size=60),
    length=st.none() | st.integers(-10, 100) | st.integers(-(2**31), 2**31 - 1),
)
ANSWERS = st.lists(REQUESTS | CHALLENGES | ANY_MESSAGE | st.binary(max_size=30), max_size=4).map(b"".join)


@given(replies=st.tuples(ANSWERS | CHALLENGES, ANSWERS), cut=CUTS, early=EARLY, binding_required=REQUIRED)
async def test_a_server_that_does_not_know_the_password_is_never_accepted(
    replies: tuple[bytes, bytes], cut: Cut, early: SASLMechanism | None, binding_required: bool
) -> None:
    transport = InMemoryTransport(Stranger(*replies), cut)
    assert await outcome(transport, early=early, binding_required=binding_required) is None


@given(answer=ANSWERS, cut=CUTS, early=EARLY, binding_required=REQUIRED)
async def test_a_server_with_any_first_answer_is_never_accepted(
    answer: bytes, cut: Cut, early: SASLMechanism | None, binding_required: bool
) -> None:
    transport = InMemoryTransport(Stranger(b"", b""), cut, mutate=lambda which, data: answer if which == 0 else data)
    assert await outcome(transport, early=early, binding_required=binding_required) is None
