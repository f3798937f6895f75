"""Certificates are verified at least as strictly as by libpq, and Let's Encrypt's published chains as intended.

The keys of published certificates are not available, so these are presented with a wrong signature: OpenSSL verifies
the chain first, and checks the signature only for a good chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import lzma
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from support.certificates import ACCEPTED, REFUSED, Case, Presented, isrg_root_x1
from support.forged_tls import ECDSA_P384, RSA_PSS, ForgedServer

import neon_async
from neon_async.testing._impostor import SERVER_NAME, Impostor, error_response, login, server_context

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop: OpenSSL verifies certificates, and the impostors cover both loops."""
    return "asyncio"


def shared(name: str) -> Path:
    """Return the path of a file beside the repository, which CI has, and a developer's machine may have."""
    path = DATA / name
    if not path.exists():
        complaint = f"{path} does not exist, and this test needs it"
        pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Let's Encrypt


def published(name: str) -> x509.Certificate:
    certificate = x509.load_pem_x509_certificate(shared(f"letsencrypt-ca/{name}.pem").read_bytes())
    assert certificate.not_valid_after_utc > datetime.datetime.now(datetime.UTC), f"{name} has expired; fetch it again"
    return certificate


def judgement(context: ssl.SSLContext, chain: list[x509.Certificate]) -> str:
    """Return why `context` refuses `chain`, or an empty string for a chain that it accepts."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    scheme = RSA_PSS if isinstance(chain[0].public_key(), rsa.RSAPublicKey) else ECDSA_P384
    server = ForgedServer([one.public_bytes(Encoding.DER) for one in chain], scheme=scheme)
    incoming.write(server.answer(outgoing.read()))
    with pytest.raises(ssl.SSLError) as caught:
        client.do_handshake()
    if isinstance(caught.value, ssl.SSLCertVerificationError):
        return caught.value.verify_message
    assert caught.value.reason == "BAD_SIGNATURE"
    return ""


NO_ISSUER, OTHER_ROOT = "unable to get local issuer certificate", "self-signed certificate in certificate chain"


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        pytest.param(["gen-y_int-yr1", "gen-y_root-yr-by-x1"], "", id="yr1"),
        pytest.param(["gen-y_int-yr1"], NO_ISSUER, id="yr1-without-cross-sign"),
        pytest.param(["gen-y_int-yr1", "gen-y_root-yr"], OTHER_ROOT, id="yr1-with-the-root-itself"),
        pytest.param(["gen-y_int-ye1", "gen-y_root-ye-by-x2", "gen-y_root-x2-by-x1"], "", id="ye1"),
        pytest.param(["gen-y_int-ye1"], NO_ISSUER, id="ye1-without-cross-signs"),
        pytest.param(["gen-y_int-ye1", "gen-y_root-ye-by-x2"], NO_ISSUER, id="ye1-without-the-second-cross-sign"),
        pytest.param(["gen-y_int-ye1", "gen-y_root-x2-by-x1"], NO_ISSUER, id="ye1-without-the-first-cross-sign"),
        pytest.param(["gen-y_int-ye1", "gen-y_root-ye"], OTHER_ROOT, id="ye1-with-the-root-itself"),
        pytest.param(["gen-y_int-ye1", "gen-y_root-ye-by-x2", "isrg-root-x2"], OTHER_ROOT, id="ye1-up-to-x2"),
        pytest.param(["2024_e8", "gen-y_root-x2-by-x1"], "", id="e8"),
        pytest.param(["2024_e8"], NO_ISSUER, id="e8-without-cross-sign"),
        pytest.param(["2024_e8", "isrg-root-x2"], OTHER_ROOT, id="e8-up-to-x2"),
        pytest.param(["2024_e8-cross"], "", id="e8-cross-signed"),
        pytest.param(["2024_r13"], "", id="r13"),
        pytest.param(["staging_2024_e8-cross"], NO_ISSUER, id="staging"),
        pytest.param(["staging_2024_e8-cross", "staging_letsencrypt-stg-root-x1"], OTHER_ROOT, id="staging-with-root"),
    ],
)
def test_published_chains_lead_to_isrg_root_x1_only_through_their_cross_signs(chain: list[str], reason: str) -> None:
    context = neon_async.create_ssl_context()
    context.check_hostname = False  # CA certificates are presented here, which have no host name
    assert judgement(context, [published(name) for name in chain]) == reason


# ---------------------------------------------------------------------------------------------------------------------
# libpq

Client = Callable[[Impostor], Awaitable[None]]


async def accepts(context: ssl.SSLContext, host: str, client: Client) -> bool:
    """Return whether `client` accepts the server, that is, sends its StartupMessage."""
    script = login(context, error_response("good bye", code="28000"))
    async with Impostor(script, host=host) as server:
        await client(server)
        return any(conversation.decrypted for conversation in await server.finish())


def neon_client(presented: Presented, crl: Path | None) -> Client:
    async def connect(server: Impostor) -> None:
        keywords: dict[str, Any] = {} if crl is None else {"crl": crl}
        with contextlib.suppress(neon_async.NeonAsyncError, asyncpg.PostgresError):
            await neon_async.connect(server.dsn, trust_anchor=presented.anchor, **keywords)

    return connect


def libpq_client(anchor: Path, crl: Path | None) -> Client:
    parameters = {"sslmode": "verify-full", "sslrootcert": anchor, "sslcrl": crl or "", "gssencmode": "disable"}
    settings = " ".join(f"{key}='{value}'" for key, value in parameters.items())

    async def connect(server: Impostor) -> None:
        address = f"host={server.host} hostaddr=127.0.0.1 port={server.port} user={server.user} dbname=neondb"
        with contextlib.suppress(psycopg.OperationalError):
            await asyncio.to_thread(lambda: psycopg.connect(f"{address} password={server.password} {settings}"))

    return connect


async def verdicts(presented: Presented, folder: Path, host: str = SERVER_NAME) -> tuple[bool, bool]:
    """Return whether neon-async accepts a server that presents this, and whether libpq does."""
    anchor, crl = folder / "anchor.pem", folder / "crl.pem" if presented.crl else None
    anchor.write_bytes(presented.anchor or isrg_root_x1().public_bytes(Encoding.PEM))
    if crl:
        crl.write_bytes(presented.crl or b"")
    context = server_context(presented.chain)
    ours, libpqs = await asyncio.gather(
        accepts(context, host, neon_client(presented, crl)), accepts(context, host, libpq_client(anchor, crl))
    )
    return ours, libpqs


@pytest.mark.anyio
@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
async def test_libpq_accepts_what_we_accept(case: Case, tmp_path: Path) -> None:
    assert await verdicts(case.make(), tmp_path) == (True, True)


@pytest.mark.anyio
async def test_libpq_accepts_some_of_the_chains_that_we_refuse(tmp_path: Path) -> None:
    accepted_by_libpq = set()
    for case in REFUSED:
        ours, libpqs = await verdicts(case.make(), tmp_path)
        assert not ours, case.id
        if libpqs:
            accepted_by_libpq.add(case.id)
    # The comparison distinguishes the two clients.
    assert {"common-name-only", "no-authority-key-identifier"} <= accepted_by_libpq
    assert not {"unknown-ca", "expired", "wrong-name", "revoked"} & accepted_by_libpq


@pytest.mark.anyio
async def test_libpq_accepts_every_case_of_x509_limbo_that_we_accept(tmp_path: Path) -> None:
    with lzma.open(shared("x509-limbo-8a2e6f4-generated.json.xz")) as file:
        cases = [case for case in json.load(file)["testcases"] if is_for_us(case)]
    assert len(cases) == 159  # of 208; the file never changes
    accepted, disputed, unpresentable = 0, [], []
    for case in cases:
        try:
            ours, libpqs = await verdicts(as_presented(case), tmp_path, case["expected_peer_name"]["value"])
        except ssl.SSLError:  # so malformed that OpenSSL, as the server, refuses to present it
            unpresentable.append(case["id"])
        else:
            accepted += ours
            disputed += [case["id"]] if ours and not libpqs else []
    assert disputed == []
    assert accepted > 40
    assert len(unpresentable) < 5, unpresentable


def is_for_us(case: dict[str, Any]) -> bool:
    """Whether a case is a server with a key, connected to by DNS name, under one root.

    Its validation time is ignored: both clients verify at the same moment, and only their agreement matters.
    """
    name = case["expected_peer_name"] or {}
    has_key, one_root = bool(case["peer_certificate_key"]), len(case["trusted_certs"]) == 1
    return case["validation_kind"] == "SERVER" and name.get("kind") == "DNS" and has_key and one_root


def as_presented(case: dict[str, Any]) -> Presented:
    chain = [case["peer_certificate_key"], case["peer_certificate"], *case["untrusted_intermediates"]]
    crl = "".join(case["crls"]).encode() or None
    return Presented("".join(chain).encode(), case["trusted_certs"][0].encode(), crl)
