"""A server with a good certificate that floods its client with TLS records without data is refused at once."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import issue, root
from support.forged_tls import ECDSA_P256, ForgedServer, Traffic
from support.forged_tls import script as forged
from support.handshakes import ROOT, handshake, serve
from support.impostors import DIRECT, POSTGRES, STARTUP, check_refusal, good_chain, refusal
from support.negotiations import connected
from support.probes import HANG, nothing_is_left, until

import neon_async
from neon_async._driver.connector import prepare
from neon_async._wire.dial import Dialer, context_for, send_cancel_request
from neon_async._wire.overhead import LimitedTLS
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Impostor, Script

pytestmark = pytest.mark.usefixtures("young_garbage_only", "every_log_record")

FLOODS: dict[str, Callable[[Traffic], bytes]] = {
    "KeyUpdate": lambda traffic: b"".join(traffic.update_key() for _ in range(300)),
    "KeyUpdate that requests another": lambda traffic: b"".join(traffic.update_key(requested=True) for _ in range(300)),
    "NewSessionTicket": lambda traffic: b"".join(traffic.issue_tickets(1) for _ in range(300)),
    "many NewSessionTickets in a record": lambda traffic: traffic.issue_tickets(700),
}


def flooding(later: Callable[[Traffic], bytes]) -> Script:
    """Return a script with a good certificate that sends what `later` returns, without end, after the handshake."""

    def make() -> ForgedServer:
        key = ec.generate_private_key(ec.SECP256R1())
        return ForgedServer(
            [issue(root(), key=key).der],
            scheme=ECDSA_P256,
            sign=lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())),
            later=later,
        )

    return forged(make)


@pytest.mark.anyio
@pytest.mark.parametrize("negotiation", [DIRECT, POSTGRES])
@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_records_without_data_is_refused_long_before_the_deadline(
    kind: str, negotiation: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = flooding(FLOODS[kind])
    async with Impostor(script, trust_anchor=good_chain().anchor) as impostor, nothing_is_left():
        error = await refusal(impostor, negotiation)
        assert type(error) is neon_async.TLSError, error
        assert "131072 bytes of TLS records without data" in str(error)
        await check_refusal(error, impostor, STARTUP, caplog)


@pytest.mark.anyio
async def test_a_flood_on_the_channel_of_a_cancel_request_ends_the_channel() -> None:
    async with (
        Impostor(flooding(FLOODS["NewSessionTicket"]), trust_anchor=good_chain().anchor) as impostor,
        nothing_is_left(),
    ):
        connector = prepare(impostor.dsn, trust_anchor=impostor.trust_anchor, connect_timeout=10 * HANG)
        await send_cancel_request(Dialer(connector.parameters, connector.anchor), process_id=1, secret_key=2)
        await until(lambda: impostor.conversations[0].closed_by_client or impostor.conversations[0].failure)


@pytest.mark.anyio
async def test_the_limit_is_lifted_when_the_session_is_ready(postgres: LocalPostgres) -> None:
    async with connected(postgres) as connection:
        tls = connection._transport.get_extra_info("ssl_object")
        assert isinstance(tls, LimitedTLS)
        assert tls._incoming is None
        assert len(await connection.fetchval("SELECT repeat('x', 5000000)")) == 5_000_000


def limited_handshake(server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Do a handshake in memory with the context of a dial."""
    connector = prepare("postgresql://alex:s3cret@db.example.com/neondb", trust_anchor=ROOT.pem)
    return handshake(context_for(connector.parameters, connector.anchor), server)


def read(tls: ssl.SSLObject) -> bytes:
    """Read as event loops do, until there is nothing to read."""
    data = b""
    while True:
        try:
            data += tls.read(256 * 1024)
        except ssl.SSLWantReadError:
            return data


@pytest.mark.parametrize("tickets", [0, 2, 100])
def test_an_honest_server_may_send_session_tickets(tickets: int) -> None:
    server = serve()
    server.num_tickets = tickets
    ours, theirs = limited_handshake(server)
    theirs.write(b"hello")
    assert read(ours) == b"hello"


@pytest.mark.parametrize("size", [1, 16_384, 1_000_000])
def test_data_does_not_count(size: int) -> None:
    ours, theirs = limited_handshake(serve())
    for _ in range(4):
        for start in range(0, size, 16_384):
            theirs.write(b"x" * min(16_384, size - start))
        assert len(read(ours)) == size


def test_the_records_of_real_openssl_are_counted() -> None:
    server = serve()
    server.num_tickets = 1000  # of 250 bytes each
    with pytest.raises(neon_async.TLSError, match="records without data"):
        read(limited_handshake(server)[0])


def test_the_context_for_callers_has_no_limit() -> None:
    """The library that uses it would not know when to lift the limit."""
    server = serve()
    server.num_tickets = 1000
    ours, theirs = handshake(neon_async.create_ssl_context(trust_anchor=ROOT.pem), server)
    theirs.write(b"hello")
    assert read(ours) == b"hello"
