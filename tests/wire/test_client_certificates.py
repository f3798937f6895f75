"""The files of sslcert and sslkey: which are used, which are refused, and what a server makes of them."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from cryptography.x509 import ExtendedKeyUsage
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.certificates import DAY, NOW, Entity, issue
from support.handshakes import OTHER_ROOT, PASSPHRASE, ROOT, assert_policy, handshake, serve
from support.probes import HANG, assert_secret_free

import neon_async
from neon_async._wire.tls import ClientCertificate, build_context
from neon_async._wire.trust import load_trust_anchor
from neon_async.testing import LocalPostgres

CLIENT = [(ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)]
DSN = "postgresql://alex:s3cret@db.example.com/neondb"


def requiring_a_certificate() -> ssl.SSLContext:
    """Return a server's context that requires a client certificate of ROOT."""
    context = serve()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ROOT.der)
    return context


@pytest.mark.parametrize(
    ("certificate", "key", "password"),
    [
        pytest.param("cert", "key", "", id="plain key"),
        pytest.param("cert", "key", PASSPHRASE, id="plain key and a needless passphrase"),
        pytest.param("cert", "encrypted", PASSPHRASE, id="encrypted key"),
        pytest.param("both", None, "", id="one file"),
    ],
)
def test_a_client_certificate_is_presented(
    client_files: dict[str, str], certificate: str, key: str | None, password: str
) -> None:
    anchor = load_trust_anchor(ROOT.pem)
    files = ClientCertificate(client_files[certificate], client_files[key] if key else None, password)
    context = build_context(anchor, client_certificate=files)
    assert_policy(context, ROOT.der)
    _, theirs = handshake(context, requiring_a_certificate())
    facts = theirs.getpeercert()
    assert facts is not None
    assert facts["subject"] == ((("commonName", "neon"),),)


@pytest.mark.parametrize(
    ("certificate", "key", "password"),
    [
        pytest.param("cert", "encrypted", "not this one", id="wrong passphrase"),
        pytest.param("cert", "encrypted", None, id="no passphrase"),
        pytest.param("cert", "encrypted", "x" * 2000, id="a passphrase longer than OpenSSL accepts"),
        pytest.param("cert", "other", None, id="the key of another certificate"),
        pytest.param("cert", "missing", None, id="missing key"),
        pytest.param("cert", "empty", None, id="empty key"),
        pytest.param("cert", None, None, id="no key"),
        pytest.param("missing", "key", None, id="missing certificate"),
        pytest.param("key", "key", None, id="a key as certificate"),
        pytest.param("kmsg", "key", None, id="the kernel's log as certificate"),
        pytest.param("cert", "kmsg", None, id="the kernel's log as key"),
        pytest.param("fifo", "key", None, id="a FIFO as certificate"),
        pytest.param("cert", "huge", None, id="a key of 3 GB"),
    ],
)
def test_a_client_certificate_that_cannot_be_used_is_refused(
    client_files: dict[str, str], certificate: str, key: str | None, password: str | None
) -> None:
    keywords: dict[str, Any] = {"sslcert": client_files[certificate]}
    keywords |= {"sslkey": client_files[key]} if key else {}
    keywords |= {"sslpassword": password} if password else {}
    with pytest.raises(neon_async.ConfigurationError, match="Check sslkey and sslpassword") as caught:
        neon_async.create_pool(DSN, trust_anchor=ROOT.pem, **keywords)
    assert_secret_free(caught.value, "s3cret", *([password] if password else []))


def test_no_repr_shows_the_passphrase(client_files: dict[str, str]) -> None:
    pool = neon_async.create_pool(
        DSN,
        trust_anchor=ROOT.pem,
        sslcert=client_files["cert"],
        sslkey=client_files["encrypted"],
        sslpassword=PASSPHRASE,
    )
    parameters = pool._connector.parameters
    shown = [repr(pool), repr(pool._connector), repr(parameters), parameters.redacted_dsn]
    assert not [text for text in shown if PASSPHRASE in text]


def test_the_repr_of_a_client_certificate_shows_no_passphrase(client_files: dict[str, str]) -> None:
    assert PASSPHRASE not in repr(ClientCertificate(client_files["cert"], client_files["encrypted"], PASSPHRASE))


PROMPTED = """
import os, sys
os.login_tty(int(sys.argv[1]))
import neon_async
try:
    neon_async.create_pool({dsn!r}, trust_anchor={anchor!r}, sslcert={cert!r}, sslkey={key!r})
except neon_async.ConfigurationError:
    print("refused")
"""


def test_an_encrypted_key_without_a_passphrase_causes_no_prompt_on_the_terminal(client_files: dict[str, str]) -> None:
    script = PROMPTED.format(dsn=DSN, anchor=ROOT.pem, cert=client_files["cert"], key=client_files["encrypted"])
    ours, theirs = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", script, str(theirs)], pass_fds=[theirs], check=True, timeout=HANG)
        assert os.read(ours, 4096).decode().split() == ["refused"]
    finally:
        os.close(ours)
        os.close(theirs)


@contextlib.asynccontextmanager
async def postgres_that_requires_certificates(bin_dir: str | None) -> AsyncIterator[LocalPostgres]:
    """A real server whose pg_hba.conf requires a client certificate of ROOT as well as SCRAM."""
    async with LocalPostgres(bin_dir, settings={"log_min_messages": "fatal"}) as server:
        admin = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        try:
            folder = await admin.fetchval("SHOW data_directory")
            hba = await admin.fetchval("SHOW hba_file")
            lines = ROOT.pem.decode().splitlines()
            quoted = ", ".join(f"'{line}'" for line in lines)
            await admin.execute(f"COPY (SELECT unnest(ARRAY[{quoted}])) TO '{folder}/clients.crt'")
            await admin.execute("ALTER SYSTEM SET ssl_ca_file = 'clients.crt'")
            line = "hostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-ca"
            await admin.execute(f"COPY (SELECT '{line}') TO '{hba}'")
        finally:
            await admin.close()
        await server.stop()
        await server.start()
        yield server


@pytest.fixture(scope="module")
def certified_postgres(postgres_bin_dir: str | None) -> Iterator[LocalPostgres]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(postgres_that_requires_certificates(postgres_bin_dir)) as one,
    ):
        yield one


@pytest.mark.anyio
@pytest.mark.parametrize("negotiation", ["direct", "postgres"])
async def test_a_real_server_that_requires_a_client_certificate_accepts_ours(
    certified_postgres: LocalPostgres, client_files: dict[str, str], negotiation: neon_async.SSLNegotiation
) -> None:
    connection = await neon_async.connect(
        certified_postgres.dsn,
        trust_anchor=certified_postgres.trust_anchor,
        sslcert=client_files["cert"],
        sslkey=client_files["encrypted"],
        sslpassword=PASSPHRASE,
        sslnegotiation=negotiation,
    )
    try:
        query = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await connection.fetchval(query) == "/CN=neon"
    finally:
        await connection.close()


@pytest.mark.anyio
async def test_a_real_server_that_requires_a_client_certificate_refuses_a_client_without_one(
    certified_postgres: LocalPostgres,
) -> None:
    with pytest.raises(neon_async.AuthenticationError, match="requires a valid client certificate"):
        await neon_async.connect(certified_postgres.dsn, trust_anchor=certified_postgres.trust_anchor)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("entity", "text"),
    [
        pytest.param(
            issue(OTHER_ROOT, "neon", names=[], also=CLIENT),
            "the server does not accept the client certificate",
            id="another CA",
        ),
        pytest.param(
            issue(ROOT, "neon", names=[], also=CLIENT, not_after=NOW - DAY / 2),
            "the client certificate has expired",
            id="expired",
        ),
    ],
)
async def test_a_client_certificate_that_a_real_server_refuses_is_the_named_culprit(
    certified_postgres: LocalPostgres, tmp_path: Path, entity: Entity, text: str
) -> None:
    file = tmp_path / "both"
    file.write_bytes(entity.key_pem + entity.pem)

    async def refusal() -> str:
        with pytest.raises(neon_async.NeonAsyncError) as caught:
            await neon_async.connect(
                certified_postgres.dsn, trust_anchor=certified_postgres.trust_anchor, sslcert=str(file)
            )
        return str(caught.value)

    # A server that closes before it has read our StartupMessage resets the connection (RFC 1122, section 4.2.2.13), and
    # the reset can overtake its alert.
    refusals = [await refusal() for _ in range(5)]
    assert {text in refusal or "closed the connection during authentication" in refusal for refusal in refusals} == {
        True
    }
    assert any(text in refusal for refusal in refusals)


@pytest.mark.anyio
async def test_a_client_certificate_does_not_replace_the_password(
    certified_postgres: LocalPostgres, client_files: dict[str, str]
) -> None:
    with pytest.raises(neon_async.InvalidPasswordError):
        await neon_async.connect(
            certified_postgres.dsn,
            trust_anchor=certified_postgres.trust_anchor,
            sslcert=client_files["cert"],
            sslkey=client_files["key"],
            password="wrong",
        )
