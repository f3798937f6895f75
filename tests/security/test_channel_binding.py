"""Channel binding against a real PostgreSQL: it is used, and it detects a man in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from support.logins import BOTH, PLAIN, PLUS, client_messages, honest_login, sasl
from support.probes import HANG, assert_secret_free
from support.relays import Interceptor, Message
from support.signatures import PresentingServer, Signed, presenting_server, rsa_key, signed
from support.verified_servers import PASSWORD, verified_server

import neon_async
from neon_async import ChannelBindingError, InsecureConfigurationError

pytestmark = pytest.mark.anyio

NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["direct", "postgres"])
MODES = pytest.mark.parametrize("channel_binding", [None, "prefer", "require"], ids=["default", "prefer", "require"])


def mode(channel_binding: str | None) -> dict[str, Any]:
    return {} if channel_binding is None else {"channel_binding": channel_binding}


# ---------------------------------------------------------------------------------------------------------------------
# A real server, under certificates of every kind

ECDSA = ec.generate_private_key(ec.SECP256R1())
CERTIFICATES = {
    "rsa-sha256": lambda: signed(rsa_key(), hashes.SHA256(), leaf_key=rsa_key()),
    "rsa-sha384": lambda: signed(rsa_key(), hashes.SHA384(), leaf_key=rsa_key()),
    "rsa-sha512": lambda: signed(rsa_key(), hashes.SHA512(), leaf_key=rsa_key()),
    "rsa-pss-sha256": lambda: signed(rsa_key(), hashes.SHA256(), pss=True, leaf_key=rsa_key()),
    "ecdsa-sha256": lambda: signed(ECDSA, hashes.SHA256()),
    "ecdsa-sha384": lambda: signed(ECDSA, hashes.SHA384()),
    "ecdsa-sha512": lambda: signed(ECDSA, hashes.SHA512()),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_bin_dir: str | None) -> Iterator[PresentingServer]:
    with presenting_server(tmp_path_factory.mktemp("anchor"), postgres_bin_dir) as server:
        yield server


@pytest.fixture(scope="module")
def certificate() -> Signed:
    """The server's certificate, where any will do."""
    return signed(ECDSA, hashes.SHA256())


@contextlib.asynccontextmanager
async def connected(dsn: str, anchor: bytes, **keywords: Any) -> AsyncIterator[asyncpg.Connection[Any]]:
    async with asyncio.timeout(HANG):
        connection = await neon_async.connect(dsn, trust_anchor=anchor, **keywords)
    try:
        yield connection
    finally:
        connection.terminate()


@NEGOTIATIONS
@pytest.mark.parametrize("kind", CERTIFICATES)
async def test_the_login_is_bound_under_certificates_of_every_kind(
    server: PresentingServer, kind: str, negotiation: str
) -> None:
    certificate = CERTIFICATES[kind]()
    server.present(certificate)
    async with connected(server.dsn, certificate.anchor, sslnegotiation=negotiation) as connection:
        report = neon_async.connection_tls_report(connection)
        assert (report.mechanism, report.negotiation) == (PLUS, negotiation)
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    # An interceptor with the server's own key records the same: PLUS is sent, and the server accepts it.
    direct = negotiation == "direct"
    async with Interceptor(server.port, certificate, direct=direct) as recorder:
        async with connected(
            recorder.dsn(server.dsn), certificate.anchor, sslnegotiation=negotiation, channel_binding="require"
        ) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        ((_, offer, first, *_),) = recorder.connections
    assert offer.body == sasl(*BOTH)[5:]
    assert first.body.startswith(PLUS.encode() + b"\0")
    assert b"p=tls-server-end-point,,n=*,r=" in first.body


@MODES
async def test_a_certificate_whose_signature_has_no_hash_is_refused(
    server: PresentingServer, channel_binding: str | None
) -> None:
    certificate = signed(ed25519.Ed25519PrivateKey.generate(), None)
    server.present(certificate)  # PostgreSQL offers PLUS anyway
    with pytest.raises(ChannelBindingError, match="signature of its certificate has no hash"):
        await neon_async.connect(server.dsn, trust_anchor=certificate.anchor, **mode(channel_binding))


# ---------------------------------------------------------------------------------------------------------------------
# The man in the middle


async def by_us(interceptor: Interceptor, dsn: str, anchor: bytes, **keywords: Any) -> None:
    negotiation = "direct" if interceptor.direct else "postgres"
    async with connected(interceptor.dsn(dsn), anchor, sslnegotiation=negotiation, **keywords) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def by_a_pool(interceptor: Interceptor, dsn: str, anchor: bytes, **keywords: Any) -> None:
    negotiation: Any = "direct" if interceptor.direct else "postgres"
    async with neon_async.create_pool(
        interceptor.dsn(dsn), trust_anchor=anchor, sslnegotiation=negotiation, **keywords
    ) as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def by_asyncpg(interceptor: Interceptor, dsn: str, anchor: bytes) -> None:
    """Connect with asyncpg and its full verification."""
    context = ssl.create_default_context(cadata=anchor.decode())
    context.set_alpn_protocols(["postgresql"])
    user, _, rest = dsn.removeprefix("postgresql://").partition(":")
    connection = await asyncpg.connect(
        host="localhost",
        port=interceptor.port,
        user=user,
        password=rest.partition("@")[0],
        database="neondb",
        ssl=context,
        direct_tls=interceptor.direct,
        timeout=HANG,
    )
    try:
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        connection.terminate()


Client = Callable[..., Any]


@NEGOTIATIONS
@pytest.mark.parametrize(
    ("client", "keywords", "refuses"),
    [
        pytest.param(by_us, {}, True, id="ours-by-default"),
        pytest.param(by_us, {"channel_binding": "prefer"}, True, id="ours-prefer"),
        pytest.param(by_us, {"channel_binding": "require"}, True, id="ours-require"),
        pytest.param(by_a_pool, {}, True, id="our-pool-by-default"),
        pytest.param(by_a_pool, {"channel_binding": "require"}, True, id="our-pool-require"),
        pytest.param(by_asyncpg, {}, False, id="asyncpg-verified"),
    ],
)
async def test_a_man_in_the_middle_with_a_certificate_of_the_same_ca_is_detected(
    server: PresentingServer, negotiation: str, client: Client, keywords: dict[str, Any], refuses: bool
) -> None:
    genuine = signed(ECDSA, hashes.SHA256())
    stolen = genuine.another()
    assert (stolen.anchor, stolen.der == genuine.der) == (genuine.anchor, False)
    server.present(genuine)
    async with Interceptor(server.port, stolen, direct=negotiation == "direct") as interceptor:
        if not refuses:
            await client(interceptor, server.dsn, genuine.anchor, **keywords)
            return
        with pytest.raises(ChannelBindingError, match="SCRAM channel binding check failed") as caught:
            await client(interceptor, server.dsn, genuine.anchor, **keywords)
        assert_secret_free(caught.value, password_of(server.dsn))
        assert len(interceptor.connections) == 1


def password_of(dsn: str) -> str:
    return dsn.partition("://")[2].partition(":")[2].partition("@")[0]


def without_plus(it: Message) -> bytes:
    """Remove PLUS from the server's offer."""
    return it.body.replace(PLUS.encode() + b"\0", b"")


def only_plus(it: Message) -> bytes:
    return it.body.replace(b"\0" + PLAIN.encode() + b"\0", b"\0")


@NEGOTIATIONS
@pytest.mark.parametrize(
    ("client", "keywords", "text"),
    [
        pytest.param(by_us, {}, "SCRAM channel binding negotiation error", id="ours-by-default"),
        pytest.param(by_us, {"channel_binding": "prefer"}, "channel binding negotiation error", id="ours-prefer"),
        pytest.param(by_us, {"channel_binding": "require"}, f"does not offer {PLUS}", id="ours-require"),
        pytest.param(by_asyncpg, {}, None, id="asyncpg-verified"),
    ],
)
@pytest.mark.parametrize("certificate_of", ["the-server", "another"])
async def test_the_removal_of_plus_from_the_servers_offer_is_detected(
    server: PresentingServer,
    certificate: Signed,
    negotiation: str,
    client: Client,
    keywords: dict[str, Any],
    text: str,
    certificate_of: str,
) -> None:
    server.present(certificate)
    shown = certificate if certificate_of == "the-server" else certificate.another()
    direct = negotiation == "direct"
    async with Interceptor(server.port, shown, direct=direct, rewrite=without_plus) as interceptor:
        if text is None:
            await client(interceptor, server.dsn, certificate.anchor, **keywords)
            return
        with pytest.raises(ChannelBindingError, match=text) as caught:
            await client(interceptor, server.dsn, certificate.anchor, **keywords)
        assert_secret_free(caught.value, password_of(server.dsn))
        (messages,) = interceptor.connections
    sent = [one.body for one in messages if one.sender == "client"]
    if "require" in keywords.values():
        assert len(sent) == 1  # the StartupMessage
    else:
        assert len(sent) == 2
        assert b"y,,n=*,r=" in sent[1]  # the client can bind, so the server knows that its offer was changed


async def test_an_offer_of_plus_alone_is_sufficient(server: PresentingServer, certificate: Signed) -> None:
    server.present(certificate)
    async with Interceptor(server.port, certificate, rewrite=only_plus) as interceptor:
        await by_us(interceptor, server.dsn, certificate.anchor)


# ---------------------------------------------------------------------------------------------------------------------
# channel_binding=


SOURCES = ["keyword", "dsn", "environment"]


def set_in(source: str, value: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Return what to add to the DSN, and the keywords, so that `channel_binding` is `value`."""
    if source == "environment":
        monkeypatch.setenv("PGCHANNELBINDING", value)
    return (f"&channel_binding={value}" if source == "dsn" else "", mode(value) if source == "keyword" else {})


@pytest.mark.parametrize("source", SOURCES)
async def test_channel_binding_can_be_required_in_every_source(
    certificate: Signed, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with verified_server(honest_login(PASSWORD, offer=[PLAIN]), certificate=certificate) as server:
        in_dsn, keywords = set_in(source, "require", monkeypatch)
        with pytest.raises(ChannelBindingError, match=f"does not offer {PLUS}"):
            await neon_async.connect(server.dsn + in_dsn, trust_anchor=server.trust_anchor, **keywords)
        (conversation,) = await server.finish()
    assert client_messages(conversation.decrypted) == ["StartupMessage"]


@pytest.mark.parametrize("source", SOURCES)
async def test_a_server_without_plus_is_accepted_under_prefer(
    certificate: Signed, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with verified_server(honest_login(PASSWORD, offer=[PLAIN]), certificate=certificate) as server:
        in_dsn, keywords = set_in(source, "prefer", monkeypatch)
        async with connected(server.dsn + in_dsn, certificate.anchor, **keywords) as connection:
            assert neon_async.connection_tls_report(connection).mechanism == PLAIN


@pytest.mark.parametrize("source", SOURCES)
def test_channel_binding_cannot_be_disabled(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_dsn, keywords = set_in(source, "disable", monkeypatch)
    with pytest.raises(InsecureConfigurationError, match="channel_binding"):
        neon_async.create_pool(
            f"postgresql://alex:{PASSWORD}@db.example.com/neondb?sslmode=verify-full{in_dsn}", **keywords
        )


@pytest.mark.parametrize("given", ["required", "Require ", "", "1"])
def test_an_unknown_value_of_channel_binding_is_refused(given: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match="channel_binding"):
        neon_async.create_pool(f"postgresql://alex:{PASSWORD}@db.example.com/neondb", channel_binding=given)  # type: ignore[call-overload,unused-ignore]


@MODES
@pytest.mark.parametrize(
    ("offer", "accepted"),
    [
        pytest.param([PLAIN], True, id="plain-alone"),
        pytest.param(BOTH, False, id="both"),
        pytest.param([PLUS], False, id="plus-alone"),
    ],
)
async def test_a_certificate_without_a_hash_is_accepted_only_where_no_side_wants_channel_binding(
    channel_binding: str | None, offer: list[str], accepted: bool
) -> None:
    shown = signed(ed25519.Ed25519PrivateKey.generate(), None)
    async with verified_server(honest_login(PASSWORD, offer=offer, binding=b"some hash"), certificate=shown) as server:
        if accepted and channel_binding != "require":
            async with connected(server.dsn, shown.anchor, **mode(channel_binding)) as connection:
                assert neon_async.connection_tls_report(connection).mechanism == PLAIN
            (conversation,) = await server.finish()
            assert b"n,,n=*,r=" in conversation.decrypted
            return
        with pytest.raises(ChannelBindingError, match="signature of its certificate has no hash") as caught:
            await neon_async.connect(server.dsn, trust_anchor=shown.anchor, **mode(channel_binding))
        assert_secret_free(caught.value, PASSWORD)
        (conversation,) = await server.finish()
    assert client_messages(conversation.decrypted) == ["StartupMessage"]
