"""A verified TLS channel: both ways to TLS, the fallback between them, the steps, and cancel requests."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from support.certificates import issue, present
from support.handshakes import ROOT, serve
from support.negotiations import SSL_REQUEST, TLS, closes_on_direct_tls, connected, forget_servers, openings
from support.probes import HANG, Relay, nothing_is_left, resolve_to, until

import neon_async
from neon_async._driver.connector import prepare
from neon_async._wire import dial
from neon_async._wire.dial import Dialer, send_cancel_request
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import (
    Conversation,
    Impostor,
    authentication_request,
    login,
    play,
    server_context,
)

pytestmark = pytest.mark.anyio

CANCEL_REQUEST = struct.pack("!iiii", 16, 80877102, 4711, -42)


@pytest.fixture(autouse=True)
def no_server_is_known() -> Iterator[None]:
    forget_servers()
    yield
    forget_servers()


@pytest.mark.parametrize(
    ("keywords", "negotiation"),
    [
        pytest.param({}, "direct", id="by default"),
        pytest.param({"sslnegotiation": "direct"}, "direct", id="direct"),
        pytest.param({"sslnegotiation": "postgres"}, "postgres", id="postgres"),
    ],
)
async def test_a_real_server_is_reached_with_one_connection(
    postgres: LocalPostgres, keywords: dict[str, Any], negotiation: str
) -> None:
    async with Relay(postgres.port) as relay, connected(postgres, relay.dsn(postgres.dsn), **keywords) as connection:
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        report = neon_async.connection_tls_report(connection)
        assert (report.negotiation, report.alpn, report.version) == (negotiation, "postgresql", "TLSv1.3")
        assert openings(relay) == ["direct" if negotiation == "direct" else "SSLRequest"]


async def test_a_server_without_direct_tls_gets_an_sslrequest_and_is_remembered(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        for expected in (["direct", "SSLRequest"], ["direct", "SSLRequest", "SSLRequest"]):
            async with connected(postgres, relay.dsn(postgres.dsn)) as connection:
                assert neon_async.connection_tls_report(connection).negotiation == "postgres"
                assert await connection.fetchval("SELECT 1") == 1
            assert openings(relay) == expected


async def test_direct_tls_is_tried_again_after_ten_minutes(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        for age, expected in ((0.0, ["SSLRequest"]), (599.0, ["SSLRequest"]), (601.0, ["direct", "SSLRequest"])):
            server = (postgres.host, "127.0.0.1", relay.port)
            dial._without_direct_tls[server] = asyncio.get_running_loop().time() - age
            before = len(openings(relay))
            async with connected(postgres, relay.dsn(postgres.dsn)) as connection:
                assert neon_async.connection_tls_report(connection).negotiation == "postgres"
            assert openings(relay)[before:] == expected


async def test_a_server_that_resets_direct_tls_gets_an_sslrequest(postgres: LocalPostgres) -> None:
    def reset(conversation: Any) -> None:
        conversation.receive(1)
        conversation.reset()

    async with Impostor(reset) as impostor:
        connector = prepare(impostor.dsn, trust_anchor=postgres.trust_anchor)
        with pytest.raises(neon_async.ConnectError):
            await connector.connect()
        conversations = await impostor.finish()
    assert [bytes(one.wire[:1]) for one in conversations] == [TLS, SSL_REQUEST[:1]]
    assert not dial._without_direct_tls  # a server that speaks neither is not remembered


async def test_direct_tls_that_was_requested_has_no_fallback(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        with pytest.raises(neon_async.TLSError, match="does not speak direct TLS") as caught:
            async with connected(postgres, relay.dsn(postgres.dsn), sslnegotiation="direct"):
                pass
        assert type(caught.value) in vars(neon_async).values()  # the class is public
        assert openings(relay) == ["direct"]


async def test_a_server_without_direct_tls_is_remembered_by_its_address(postgres: LocalPostgres) -> None:
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        async with connected(postgres, relay.dsn(postgres.dsn)):
            pass
        async with connected(postgres) as connection:
            assert neon_async.connection_tls_report(connection).negotiation == "direct"


async def test_a_server_without_alpn_under_direct_tls_gets_an_sslrequest() -> None:
    context = serve(alpn=())
    async with Impostor(login(context, authentication_request(3))) as impostor:
        with pytest.raises(neon_async.AuthenticationError, match="cleartext"):
            await neon_async.connect(impostor.dsn, trust_anchor=ROOT.pem)
        conversations = await impostor.finish()
    assert [bytes(one.wire[:1]) for one in conversations] == [TLS, SSL_REQUEST[:1]]
    assert conversations[0].decrypted == b""  # nothing was sent under direct TLS without ALPN


@pytest.mark.parametrize("keywords", [{}, {"sslnegotiation": "direct"}, {"sslnegotiation": "postgres"}], ids=str)
async def test_after_a_failed_verification_no_other_way_to_tls_is_tried(
    postgres: LocalPostgres, keywords: dict[str, Any]
) -> None:
    other = issue(subject="root", ca=True).pem
    async with Relay(postgres.port) as relay, nothing_is_left():
        with pytest.raises(neon_async.CertificateError, match=r"does not lead to the trust anchor|another root"):
            await neon_async.connect(relay.dsn(postgres.dsn), trust_anchor=other, **keywords)
        assert len(relay.passages) == 1
        await until(lambda: relay.passages[0].over)
    assert not dial._without_direct_tls


async def test_after_a_failed_verification_no_other_address_is_tried(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = issue(subject="root", ca=True).pem
    async with Relay(postgres.port) as first, Relay(postgres.port) as second:
        resolve_to(monkeypatch, ("127.0.0.1", first.port), ("127.0.0.1", second.port))
        with pytest.raises(neon_async.CertificateError):
            await neon_async.connect(postgres.dsn.partition("?")[0], trust_anchor=other)
        assert (len(first.passages), len(second.passages)) == (1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The steps


async def test_each_step_is_announced_as_it_begins(postgres: LocalPostgres) -> None:
    steps: list[str] = []
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    await (await connector.connect(on_step=steps.append)).close()
    assert steps == ["tcp", "tls", "authentication"]


async def test_a_fallback_announces_tcp_and_tls_again_and_resolves_once(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    async with Relay(postgres.port, refuse=closes_on_direct_tls) as relay:
        asked = resolve_to(monkeypatch, ("127.0.0.1", relay.port))
        dsn = relay.dsn(postgres.dsn).partition("?")[0]
        connector = prepare(dsn, trust_anchor=postgres.trust_anchor)
        await (await connector.connect(on_step=steps.append)).close()
    assert steps == ["dns", "tcp", "tls", "tcp", "tls", "authentication"]
    assert asked == [postgres.host]


# ---------------------------------------------------------------------------------------------------------------------
# Cancel requests


def dialer_for(server: Impostor, **keywords: Any) -> Dialer:
    connector = prepare(server.dsn, trust_anchor=ROOT.pem, **keywords)
    return Dialer(connector.parameters, connector.anchor)


async def send(dialer: Dialer) -> None:
    async with asyncio.timeout(HANG):
        await send_cancel_request(dialer, process_id=4711, secret_key=-42)


def accept_tls(conversation: Conversation) -> None:
    conversation.accept_tls(serve())


def read_cancel_request(conversation: Conversation) -> None:
    while len(conversation.decrypted) < len(CANCEL_REQUEST):
        conversation.receive(1)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(Conversation.hang_up, id="closed"),
        pytest.param(Conversation.reset, id="reset"),
    ],
)
async def test_a_cancel_request_is_one_message_inside_tls(end: Any) -> None:
    async with Impostor(play(accept_tls, read_cancel_request, end)) as server, nothing_is_left():
        await send(dialer_for(server))
        (conversation,) = await server.finish()
    assert conversation.decrypted == CANCEL_REQUEST
    assert bytes(conversation.wire[:1]) == TLS


async def test_a_server_that_does_not_close_a_cancel_request_is_waited_for_until_connect_timeout() -> None:
    async with Impostor(play(accept_tls)) as server, nothing_is_left():
        loop = asyncio.get_running_loop()
        started = loop.time()
        await send(dialer_for(server, connect_timeout=0.3))
        assert 0.3 <= loop.time() - started < HANG
        (conversation,) = await server.finish()
    assert conversation.decrypted == CANCEL_REQUEST


async def test_a_cancel_request_that_gets_no_channel_ends_at_connect_timeout() -> None:
    async with Impostor(play()) as server, nothing_is_left():
        with pytest.raises(TimeoutError):
            await send(dialer_for(server, connect_timeout=0.3))


async def test_a_cancel_request_is_not_sent_to_a_server_that_fails_verification() -> None:
    other = issue(subject="other root", ca=True)
    context = server_context(present(issue(other)).chain)
    async with Impostor(play(lambda conversation: conversation.accept_tls(context))) as server, nothing_is_left():
        with pytest.raises(ssl.SSLCertVerificationError):
            await send(dialer_for(server))
        (conversation,) = await server.finish()
    assert conversation.decrypted == b""


async def test_a_cancel_request_that_is_cancelled_leaves_nothing_open() -> None:
    async with Impostor(play(accept_tls)) as server, nothing_is_left():
        sending = asyncio.ensure_future(send(dialer_for(server)))
        await until(lambda: server.conversations and server.conversations[0].decrypted)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        del sending


async def test_a_channel_that_is_lost_before_the_request_is_a_connect_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Impostor(play(accept_tls)) as server, nothing_is_left():
        dialer = dialer_for(server)
        genuine = dialer.open

        async def open_and_lose(factory: Any) -> Any:
            channel = await genuine(factory)
            channel.transport.abort()
            return channel

        monkeypatch.setattr(dialer, "open", open_and_lose)
        with pytest.raises(neon_async.ConnectError, match="closed the channel of a cancel request"):
            await send(dialer)
