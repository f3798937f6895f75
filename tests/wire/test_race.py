"""Several addresses and both ways to TLS: a bad address or a silent server is not the end of a dial."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import issue, present, revocation_list
from support.forged_tls import ECDSA_P256, ForgedServer
from support.forged_tls import script as forged
from support.handshakes import ROOT, serve
from support.negotiations import SSL_REQUEST, TLS, connected, forget_servers
from support.pgbouncer import LocalPgBouncer, installed_version
from support.probes import HANG, Relay, black_hole, nothing_is_left, resolve_to, until

import neon_async
from neon_async._driver.connector import prepare
from neon_async._wire import dial, race, tcp
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Conversation, Impostor, Script, login, play, server_context

pytestmark = pytest.mark.anyio

NEVER = 100 * HANG


@pytest.fixture(autouse=True)
def no_server_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget all servers, and find a server silent sooner, so that the tests are quick."""
    forget_servers()
    monkeypatch.setattr(race, "_SILENCE", 0.1)
    yield
    forget_servers()


def wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find no server silent, however long it takes: on a busy machine even a good one may take long."""
    monkeypatch.setattr(race, "_SILENCE", NEVER)
    monkeypatch.setattr(race, "_CONNECT_DELAY", NEVER)


def alert(conversation: Conversation) -> None:
    """Answer a ClientHello with a fatal alert, `internal_error`."""
    conversation.consent_to_tls()
    conversation.send(b"\x15\x03\x03\x00\x02\x02\x50")


def old_tls(conversation: Conversation) -> None:
    chain = present(issue(ROOT)).chain
    conversation.accept_tls(server_context(chain, maximum_version=ssl.TLSVersion.TLSv1_2))


def refuse_tls(conversation: Conversation) -> None:
    """Know neither way to TLS."""
    if not conversation.opens_with_tls():
        conversation.send(b"N")


see, consent = Conversation.opens_with_tls, Conversation.consent_to_tls
hang_up, reset = Conversation.hang_up, Conversation.reset
HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"

FAILING = [
    pytest.param(reset, id="resets at once"),
    pytest.param(hang_up, id="closes at once"),
    pytest.param(play(see, reset), id="resets when it is asked"),
    pytest.param(play(see, hang_up), id="closes when it is asked"),
    pytest.param(play(consent, reset), id="resets in the handshake"),
    pytest.param(play(consent, hang_up), id="closes in the handshake"),
    pytest.param(play(HTTP), id="speaks another protocol"),
    pytest.param(alert, id="refuses the handshake"),
    pytest.param(old_tls, id="speaks TLS 1.2 only"),
]
SILENT = [
    pytest.param(play(), id="is silent"),
    pytest.param(play(consent), id="is silent in the handshake"),
    pytest.param(refuse_tls, id="offers no TLS, and is silent to direct TLS"),
]
WAYS = [
    pytest.param({}, id="default"),
    pytest.param({"sslnegotiation": "direct"}, id="direct"),
    pytest.param({"sslnegotiation": "postgres"}, id="postgres"),
]


@contextlib.asynccontextmanager
async def two_addresses(
    monkeypatch: pytest.MonkeyPatch, postgres: LocalPostgres, script: Script, *, bad: int = 1
) -> AsyncIterator[tuple[list[Impostor], Relay, str]]:
    """Servers that play `script` and, as the last address of the same name, the real one; and the DSN."""
    async with contextlib.AsyncExitStack() as stack:
        impostors = [await stack.enter_async_context(Impostor(script)) for _ in range(bad)]
        relay = await stack.enter_async_context(Relay(postgres.port))
        ports = [*(impostor.port for impostor in impostors), relay.port]
        resolve_to(monkeypatch, *(("127.0.0.1", port) for port in ports))
        yield impostors, relay, postgres.dsn.partition("?")[0]


@pytest.mark.parametrize("keywords", WAYS)
@pytest.mark.parametrize("script", [*FAILING, *SILENT])
async def test_a_bad_address_leads_to_the_next_one_and_is_then_tried_last(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, script: Script, keywords: dict[str, Any]
) -> None:
    if script not in [parameter.values[0] for parameter in SILENT]:
        wait_for_ever(monkeypatch)
    async with two_addresses(monkeypatch, postgres, script) as ((impostor,), relay, dsn), nothing_is_left():
        async with connected(postgres, dsn, connect_timeout=NEVER, **keywords) as connection:
            assert await connection.fetchval("SELECT 1") == 1
            assert connection._transport.get_extra_info("peername") == ("127.0.0.1", relay.port)
        tries, passages = impostor.connections, len(relay.passages)
        assert 1 <= tries <= 2
        wait_for_ever(monkeypatch)
        for _ in range(3):
            async with connected(postgres, dsn, connect_timeout=NEVER, **keywords) as connection:
                assert await connection.fetchval("SELECT 1") == 1
        assert (impostor.connections, len(relay.passages)) == (tries, passages + 3)
        await impostor.finish()
        assert all(one.closed_by_client and not one.decrypted for one in impostor.conversations)


@pytest.mark.parametrize("script", [play(), reset], ids=["silent", "reset"])
async def test_every_address_gets_its_turn_before_the_deadline(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setattr(race, "_SILENCE", NEVER)
    async with two_addresses(monkeypatch, postgres, script, bad=4) as (impostors, _, dsn), nothing_is_left():
        async with connected(postgres, dsn, connect_timeout=HANG / 4) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        # An address that resets at once may do so before the connect has ended.
        tries = [impostor.connections for impostor in impostors]
        assert tries == [2] * 4 or (script is reset and min(tries) >= 1), tries


async def test_a_pool_is_served_although_the_first_address_is_silent(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        two_addresses(monkeypatch, postgres, play()) as ((impostor,), _, dsn),
        neon_async.create_pool(dsn, trust_anchor=postgres.trust_anchor, max_size=3) as pool,
    ):
        async with pool.acquire() as one, pool.acquire() as two, pool.acquire() as three:
            for connection in (one, two, three):
                assert await connection.fetchval("SELECT 1") == 1
        assert pool.stats().dial_failures == 0
        assert impostor.connections >= 1


@pytest.mark.parametrize("end", [None, hang_up], ids=["is silent", "closes"])
async def test_an_address_whose_server_does_not_finish_the_login_is_tried_last_by_the_next_dial(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, end: Script | None
) -> None:
    anchors = ROOT.pem + postgres.trust_anchor
    script = login(serve(), *([end] if end else []))
    async with two_addresses(monkeypatch, postgres, script) as ((impostor,), relay, dsn), nothing_is_left():
        with pytest.raises(neon_async.NeonAsyncError) as caught:
            await neon_async.connect(dsn, trust_anchor=anchors, connect_timeout=1)
        # Something was verified: within one dial there is no other address.
        assert isinstance(caught.value, neon_async.ConnectError if end else neon_async.ConnectTimeoutError)
        assert (impostor.connections, len(relay.passages)) == (1, 0)
        connection = await neon_async.connect(dsn, trust_anchor=anchors)
        assert await connection.fetchval("SELECT 1") == 1
        connection.terminate()
        assert (impostor.connections, len(relay.passages)) == (1, 1)


async def test_a_black_hole_costs_one_dial_its_delay_and_the_next_ones_nothing(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with black_hole() as hole:
        resolve_to(monkeypatch, ("127.0.0.1", hole), ("127.0.0.1", postgres.port))
        dsn = postgres.dsn.partition("?")[0]
        async with nothing_is_left(), connected(postgres, dsn):
            pass
        monkeypatch.setattr(race, "_CONNECT_DELAY", NEVER)
        async with nothing_is_left(), connected(postgres, dsn, connect_timeout=HANG) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_an_address_that_is_well_again_is_used_again(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = postgres.dsn.partition("?")[0]
    async with Relay(postgres.port) as first, Relay(postgres.port) as second:
        resolve_to(monkeypatch, ("127.0.0.1", first.port), ("127.0.0.1", second.port))
        addresses = await tcp.resolve(prepare(dsn, trust_anchor=postgres.trust_anchor).parameters)
        tcp.postpone(addresses[0])
        async with connected(postgres, dsn):
            pass
        used = len(second.passages)  # two, where the machine was so busy that the server seemed to be silent
        assert (len(first.passages), used > 0) == (0, True)
        tcp._postponed[addresses[0]] -= tcp.MEMORY
        async with connected(postgres, dsn):
            pass
        assert (len(first.passages) > 0, len(second.passages)) == (True, used)
        assert not [one for one in tcp._postponed if one == addresses[0]]  # it has connected


@pytest.mark.parametrize(
    ("failed", "order"),
    [("", "1 ::1 2 ::2"), ("1", "::1 2 ::2 1"), ("2 1", "::1 ::2 2 1"), ("1 2 ::2 ::1", "1 2 ::2 ::1")],
)
def test_addresses_that_failed_come_last_and_the_first_to_fail_before_the_others(failed: str, order: str) -> None:
    known = {word: tcp.Address(socket.AF_INET6 if ":" in word else socket.AF_INET, (word, 1)) for word in order.split()}
    for number, word in enumerate(failed.split()):
        tcp._postponed[known[word]] = time.monotonic() - 10 + number
    assert " ".join(map(str, tcp.in_order([known[word] for word in ("1", "2", "::1", "::2")]))) == order


def test_addresses_that_failed_long_ago_are_forgotten() -> None:
    addresses = [tcp.Address(socket.AF_INET, (f"10.0.0.{number}", 5432)) for number in range(10)]
    for number, address in enumerate(addresses[:9]):
        tcp._postponed[address] = time.monotonic() - number * tcp.MEMORY / 4
    tcp.postpone(addresses[9])
    assert list(tcp._postponed) == [*addresses[:4], addresses[9]]


# ---------------------------------------------------------------------------------------------------------------------
# What stays final


def plaintext_after_consent(conversation: Conversation) -> None:
    if conversation.opens_with_tls():
        conversation.hang_up()
    else:
        conversation.send(b"S" + b"E" * 20)


def without_its_key(conversation: Conversation) -> None:
    forged(lambda: ForgedServer([issue(ROOT).der], scheme=ECDSA_P256))(conversation)


def with_another_protocol(conversation: Conversation) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    forged(
        lambda: ForgedServer(
            [issue(ROOT, key=key).der],
            scheme=ECDSA_P256,
            sign=lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())),
            alpn=b"http/1.1",
        )
    )(conversation)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        pytest.param(plaintext_after_consent, "sent plaintext after it agreed", id="plaintext after it agreed"),
        pytest.param(without_its_key, "BAD_SIGNATURE", id="a certificate without its key"),
        pytest.param(
            lambda conversation: conversation.accept_tls(serve(issue(issue(subject="other", ca=True)))),
            "was refused",
            id="another root",
        ),
        pytest.param(with_another_protocol, "TLS handshake", id="a protocol that was not offered"),
    ],
)
async def test_after_a_failure_that_concerns_verification_no_other_address_is_tried(
    monkeypatch: pytest.MonkeyPatch, script: Script, error: str
) -> None:
    async with Impostor(script) as bad, Impostor(play()) as other:
        resolve_to(monkeypatch, ("127.0.0.1", bad.port), ("127.0.0.1", other.port))
        with pytest.raises(neon_async.TLSError, match=error):
            await neon_async.connect(bad.dsn.partition("?")[0], trust_anchor=ROOT.pem)
        assert other.connections == 0


# ---------------------------------------------------------------------------------------------------------------------
# Silence under direct TLS


async def test_a_pgbouncer_is_reached_whether_it_knows_direct_tls_or_is_silent(
    pgbouncer: LocalPgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = installed_version()
    assert version is not None
    expected = "direct" if version >= (1, 25) else "postgres"
    dsn = pgbouncer.dsn.replace("&sslnegotiation=postgres", "")
    assert dsn != pgbouncer.dsn
    if expected == "direct":
        wait_for_ever(monkeypatch)
    for _ in range(2):
        connection = await neon_async.connect(dsn, trust_anchor=pgbouncer.trust_anchor)
        assert neon_async.connection_tls_report(connection).negotiation == expected
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        assert bool(dial._without_direct_tls) == (expected == "postgres")  # the second dial loses no time


async def test_a_pool_of_a_pgbouncer_that_is_silent_is_served(pgbouncer: LocalPgBouncer) -> None:
    dsn = pgbouncer.dsn.replace("&sslnegotiation=postgres", "")
    async with neon_async.create_pool(dsn, trust_anchor=pgbouncer.trust_anchor, max_size=4) as pool:
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(8))) == [1] * 8
        assert pool.stats().dial_failures == 0


class SilentToDirectTLS(Relay):
    """A relay that keeps connections which begin with direct TLS open and says nothing on them."""

    async def _pump_both(self, reader: Any, writer: Any, from_server: Any, to_server: Any, passage: Any) -> None:
        if passage.sent.startswith(TLS):
            await reader.read()
        else:
            await super()._pump_both(reader, writer, from_server, to_server, passage)


async def test_a_second_connection_with_an_sslrequest_starts_beside_silence_and_is_remembered(
    postgres: LocalPostgres,
) -> None:
    async with SilentToDirectTLS(postgres.port) as relay, nothing_is_left():
        for expected in (2, 3):
            async with connected(postgres, relay.dsn(postgres.dsn)) as connection:
                assert neon_async.connection_tls_report(connection).negotiation == "postgres"
                assert await connection.fetchval("SELECT 1") == 1
            assert len(relay.passages) == expected


async def test_direct_tls_that_was_requested_is_not_replaced_when_the_server_is_silent(postgres: LocalPostgres) -> None:
    async with SilentToDirectTLS(postgres.port) as relay, nothing_is_left():
        with pytest.raises(neon_async.ConnectTimeoutError, match=r"direct TLS.*Remove sslnegotiation"):
            async with connected(postgres, relay.dsn(postgres.dsn), sslnegotiation="direct", connect_timeout=0.5):
                pass
        assert len(relay.passages) == 1


async def test_a_server_that_answers_direct_tls_late_is_still_used(postgres: LocalPostgres) -> None:
    """It refuses the SSLRequest, in the way of a server that is overloaded."""
    late = asyncio.Event()

    class Late(Relay):
        async def _pump_both(self, reader: Any, writer: Any, from_server: Any, to_server: Any, passage: Any) -> None:
            if passage.sent.startswith(TLS):
                await late.wait()
                await super()._pump_both(reader, writer, from_server, to_server, passage)
            late.set()

    async with Late(postgres.port) as relay, nothing_is_left():
        async with connected(postgres, relay.dsn(postgres.dsn)) as connection:
            assert neon_async.connection_tls_report(connection).negotiation == "direct"
        assert len(relay.passages) == 2
    assert not dial._without_direct_tls


async def test_a_server_that_is_silent_to_direct_tls_and_refuses_tls_is_refused_at_once() -> None:
    async with Impostor(refuse_tls) as impostor, nothing_is_left():
        async with asyncio.timeout(HANG):
            with pytest.raises(neon_async.TLSError, match="does not offer TLS"):
                await neon_async.connect(impostor.dsn, trust_anchor=ROOT.pem, connect_timeout=NEVER)
        assert [bytes(one.wire[:1]) for one in await impostor.finish()] == [TLS, SSL_REQUEST[:1]]


async def test_a_bad_certificate_after_silence_is_final() -> None:
    """The SSLRequest beside a silent direct TLS is verified like any other."""
    context = serve(issue(issue(subject="other root", ca=True)))

    def script(conversation: Conversation) -> None:
        if not conversation.opens_with_tls():
            conversation.send(b"S")
            conversation.accept_tls(context)

    async with Impostor(script) as impostor, nothing_is_left():
        with pytest.raises(neon_async.CertificateError):
            await neon_async.connect(impostor.dsn, trust_anchor=ROOT.pem)
        conversations = await impostor.finish()
        assert len(conversations) == 2
        assert all(one.closed_by_client and not one.decrypted for one in conversations)


# ---------------------------------------------------------------------------------------------------------------------
# Steps, deadlines and cancellation


async def test_addresses_that_are_all_silent_end_at_the_deadline_of_the_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Impostor(play()) as one, Impostor(play()) as two, nothing_is_left():
        resolve_to(monkeypatch, ("127.0.0.1", one.port), ("127.0.0.1", two.port))
        with pytest.raises(neon_async.ConnectTimeoutError, match="TLS handshake had not finished"):
            await neon_async.connect(one.dsn.partition("?")[0], trust_anchor=ROOT.pem, connect_timeout=1)
        assert (one.connections, two.connections) == (2, 2)


async def test_an_attempt_beside_another_announces_no_step_of_its_own(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    async with two_addresses(monkeypatch, postgres, play()) as (_, _, dsn):
        connector = prepare(dsn, trust_anchor=postgres.trust_anchor)
        await (await connector.connect(on_step=steps.append)).close()
    assert steps == ["dns", "tcp", "tls", "authentication"]


async def test_a_slow_disk_is_not_taken_for_a_silent_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    genuine, path = dial.context_for, tmp_path / "crl.pem"
    path.write_bytes(revocation_list(ROOT))
    reading, released = threading.Event(), threading.Event()

    def read_slowly(*args: Any) -> ssl.SSLContext:
        reading.set()
        released.wait(HANG)
        return genuine(*args)

    async with Impostor(login(serve())) as impostor, nothing_is_left():
        connector = prepare(impostor.dsn, trust_anchor=ROOT.pem, crl=path)
        monkeypatch.setattr(dial, "context_for", read_slowly)
        dialing = asyncio.ensure_future(dial.Dialer(connector.parameters, connector.anchor).open(asyncio.Protocol))
        await until(reading.is_set)
        await asyncio.sleep(3 * race._SILENCE)
        assert impostor.connections == 1
        released.set()
        (await dialing).abort()
        assert impostor.connections == 1


@pytest.mark.parametrize("attempts", [1, 2, 3, 4])
async def test_a_cancelled_dial_ends_all_its_attempts(monkeypatch: pytest.MonkeyPatch, attempts: int) -> None:
    async with Impostor(play()) as one, Impostor(play()) as two, nothing_is_left():
        resolve_to(monkeypatch, ("127.0.0.1", one.port), ("127.0.0.1", two.port))
        dialing = asyncio.ensure_future(neon_async.connect(one.dsn.partition("?")[0], trust_anchor=ROOT.pem))
        await until(lambda: one.connections + two.connections == attempts)
        dialing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialing
        for impostor in (one, two):
            assert all(conversation.closed_by_client for conversation in await impostor.finish())


async def test_a_dial_that_is_cancelled_as_it_succeeds_leaves_nothing_open(postgres: LocalPostgres) -> None:
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    for steps in range(0, 60, 3):
        async with nothing_is_left():
            dialing = asyncio.ensure_future(dial.Dialer(connector.parameters, connector.anchor).open(asyncio.Protocol))
            for _ in range(steps):
                await asyncio.sleep(0.0002)
            dialing.cancel()
            outcome = (await asyncio.gather(dialing, return_exceptions=True))[0]
            if not isinstance(outcome, BaseException):
                outcome.abort()
            del outcome


def handshakes_held() -> list[Any]:
    """Return the TLS protocols of the event loop that something still holds, such as a timer."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one).__name__ == "SSLProtocol"]


@pytest.mark.parametrize("steps", range(16))
async def test_a_cancelled_dial_is_freed_at_once_whatever_its_handshake_has_reached(
    postgres: LocalPostgres, steps: int
) -> None:
    # On uvloop, a handshake that was cancelled in its first iterations was held by its timer, for 30 s.
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    before = len(handshakes_held())
    for _ in range(3):
        dialing = asyncio.ensure_future(dial.Dialer(connector.parameters, connector.anchor).open(asyncio.Protocol))
        for _ in range(steps):
            await asyncio.sleep(0)
        dialing.cancel()
        (outcome,) = await asyncio.gather(dialing, return_exceptions=True)
        if isinstance(outcome, dial.Channel):  # the dial was quicker than these iterations
            outcome.abort()
        del dialing, outcome
    await until(lambda: len(handshakes_held()) <= before)


async def test_the_losers_of_a_race_are_aborted(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_SILENCE", 0.0)
    monkeypatch.setattr(race, "_CONNECT_DELAY", 0.0)
    resolve_to(monkeypatch, *[("127.0.0.1", postgres.port)] * 4)
    async with nothing_is_left():
        for _ in range(5):
            async with connected(postgres, postgres.dsn.partition("?")[0]) as connection:
                assert await connection.fetchval("SELECT 1") == 1
