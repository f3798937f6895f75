"""The one context: what it demands, that nothing around it lowers that, CRLs, client certificates; real handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
from anyio.from_thread import start_blocking_portal
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509 import DNSName, ExtendedKeyUsage
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.certificates import DAY, NOW, Entity, issue, present, revocation_list
from support.hostile_child import dump
from support.probes import HANG, assert_secret_free

import neon_async
from neon_async._driver import connector as _connect
from neon_async._wire.dial import client_certificate
from neon_async._wire.tls import ALPN, ClientCertificate, build_context, check_handshake
from neon_async._wire.trust import find_isrg_root_x1, load_trust_anchor
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import SERVER_NAME, Impostor, authentication_request, login, server_context

ROOT = issue(subject="root", ca=True)
OTHER_ROOT = issue(subject="other root", ca=True)
LEAF = issue(ROOT)
PASSPHRASE = "open sesame"
DSN = "postgresql://alex:s3cret@db.example.com/neondb"
CHILD = Path(__file__).parents[1] / "support" / "hostile_child.py"


def handshake(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = SERVER_NAME
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands in memory, and return both ends. Raises what the client makes of it."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (ours, theirs):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ours, theirs


def serve(leaf: Entity = LEAF, *issuers: Entity, **options: Any) -> ssl.SSLContext:
    return server_context(present(leaf, *issuers).chain, **options)


def assert_policy(context: ssl.SSLContext, anchor: bytes, *, crl: bool = False) -> None:
    """Check that `context` demands all that the design lists."""
    assert context.protocol is ssl.PROTOCOL_TLS_CLIENT
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.maximum_version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is True
    assert context.hostname_checks_common_name is False
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert not context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
    assert not context.verify_flags & ssl.VERIFY_ALLOW_PROXY_CERTS
    assert bool(context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF) is crl
    assert context.security_level >= 2
    assert context.get_ca_certs(binary_form=True) == [anchor]
    assert context.cert_store_stats() == {"x509": 1, "x509_ca": 1, "crl": int(crl)}
    assert context.keylog_filename is None
    modern = {"TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"}
    assert {one["name"] for one in context.get_ciphers() if one["protocol"] == "TLSv1.3"} <= modern


def trust_everybody(context: ssl.SSLContext) -> None:
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE


# The context


def test_the_context_holds_x1_alone_though_certifi_holds_over_a_hundred() -> None:
    everything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    everything.load_verify_locations(certifi.where())
    assert len(everything.get_ca_certs()) > 100
    assert_policy(neon_async.create_ssl_context(), find_isrg_root_x1().der)


def test_a_trust_anchor_stands_in_the_place_of_x1() -> None:
    assert_policy(neon_async.create_ssl_context(trust_anchor=ROOT.pem), ROOT.der)


def test_every_call_returns_a_new_context() -> None:
    first, second = neon_async.create_ssl_context(), neon_async.create_ssl_context()
    assert first is not second
    first.check_hostname = False
    first.verify_mode = ssl.CERT_NONE
    first.load_verify_locations(cadata=OTHER_ROOT.der)
    for context in (second, neon_async.create_ssl_context()):
        assert_policy(context, find_isrg_root_x1().der)


def test_the_context_accepts_the_server_it_is_for() -> None:
    ours, _ = handshake(neon_async.create_ssl_context(trust_anchor=ROOT.pem), serve())
    assert ours.version() == "TLSv1.3"
    assert ours.selected_alpn_protocol() == ALPN == "postgresql"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: serve(issue(OTHER_ROOT), OTHER_ROOT), "certificate verify failed", id="another root"),
        pytest.param(lambda: serve(issue(ROOT, names=[DNSName("db.example.com")])), "not valid for", id="another name"),
        pytest.param(lambda: serve(issue(ROOT, SERVER_NAME, names=[])), "not valid for", id="common name only"),
        pytest.param(lambda: serve(issue(ROOT, not_after=NOW - DAY / 2)), "expired", id="expired"),
        pytest.param(
            lambda: serve(maximum_version=ssl.TLSVersion.TLSv1_2), "(?i)unsupported.protocol|version", id="TLS 1.2"
        ),
    ],
)
def test_the_context_refuses_every_other_server(make: Callable[[], ssl.SSLContext], reason: str) -> None:
    with pytest.raises(ssl.SSLError, match=reason):
        handshake(neon_async.create_ssl_context(trust_anchor=ROOT.pem), make())


@pytest.mark.parametrize(
    "weaken",
    [
        pytest.param(lambda context: setattr(context, "check_hostname", False), id="no host name"),
        pytest.param(lambda context: setattr(context, "hostname_checks_common_name", True), id="common name"),
        pytest.param(trust_everybody, id="no verification"),
        pytest.param(lambda context: setattr(context, "minimum_version", ssl.TLSVersion.TLSv1_2), id="TLS 1.2"),
        pytest.param(lambda context: setattr(context, "verify_flags", ssl.VERIFY_DEFAULT), id="not strict"),
        pytest.param(
            lambda context: setattr(context, "verify_flags", context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN),
            id="partial chains",
        ),
        pytest.param(lambda context: context.set_ciphers("ALL:@SECLEVEL=0"), id="security level 0"),
        pytest.param(lambda context: context.load_verify_locations(cadata=OTHER_ROOT.der), id="another anchor"),
        pytest.param(lambda context: setattr(context, "keylog_filename", os.devnull), id="key log"),
    ],
)
def test_a_context_that_was_weakened_on_the_way_is_noticed_after_the_handshake(
    weaken: Callable[[ssl.SSLContext], object],
) -> None:
    anchor = load_trust_anchor(ROOT.pem)
    context = build_context(anchor)
    ours, _ = handshake(context, serve())
    weaken(context)
    with pytest.raises(neon_async.InsecureConfigurationError, match="checks less than it must"):
        check_handshake(ours, context, server_name=SERVER_NAME, negotiation="direct", anchor=anchor)


def test_the_check_after_the_handshake_refuses_another_session() -> None:
    anchor = load_trust_anchor(ROOT.pem)
    context = build_context(anchor)
    weak = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    weak.load_verify_locations(cadata=ROOT.der)
    facts: dict[str, Any] = {"negotiation": "direct", "anchor": anchor}
    finished, _ = handshake(context, serve())
    report = check_handshake(finished, context, server_name=SERVER_NAME, **facts)
    assert (report.server_name, report.subject, report.issuer) == (SERVER_NAME, "CN=leaf", "CN=root")
    assert report.not_after == LEAF.certificate.not_valid_after_utc
    assert (report.anchor, report.anchor_sha256) == ("CN=root, from trust_anchor", anchor.sha256)
    for session, name in (
        (handshake(weak, serve())[0], SERVER_NAME),
        (finished, "db.example.com"),
    ):
        with pytest.raises(neon_async.CertificateError):
            check_handshake(session, context, server_name=name, **facts)


# A hostile environment


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """Variables by which somebody else would have their CA trusted, everything negotiated down, and the keys logged."""
    (tmp_path / "ca.pem").write_bytes(OTHER_ROOT.pem)
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / "ca.pem").write_bytes(OTHER_ROOT.pem)
    (tmp_path / "openssl.cnf").write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = weak\n[weak]\n"
        "MinProtocol = TLSv1\nMaxProtocol = TLSv1.3\nCipherString = ALL:eNULL:@SECLEVEL=0\n"
        "Options = UnsafeLegacyRenegotiation\n"
        f"VerifyMode = None\nVerifyCAFile = {tmp_path / 'ca.pem'}\nChainCAFile = {tmp_path / 'ca.pem'}\n"
    )
    return {
        "SSL_CERT_FILE": str(tmp_path / "ca.pem"),
        "SSL_CERT_DIR": str(tmp_path / "certs"),
        "SSLKEYLOGFILE": str(tmp_path / "keys.log"),
        "OPENSSL_CONF": str(tmp_path / "openssl.cnf"),
    }


async def run_child(*arguments: str, **environment: str) -> dict[str, Any]:
    names = {"SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "OPENSSL_CONF"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), *arguments, stdout=subprocess.PIPE, env=clean | environment
    )
    async with asyncio.timeout(HANG):
        output, _ = await process.communicate()
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(output)
    return answer


@pytest.mark.anyio
async def test_a_hostile_environment_changes_nothing_in_the_context(hostile: dict[str, str], tmp_path: Path) -> None:
    usual = await run_child("dump")
    under_attack = await run_child("dump", **hostile)
    # The attack is real: it reaches a context that does not defend itself.
    name = "python's own options"
    assert under_attack.pop(name) != usual.pop(name)
    assert under_attack == usual
    assert usual == json.loads(json.dumps(dump(neon_async.create_ssl_context())))
    assert not (tmp_path / "keys.log").exists()


@pytest.mark.anyio
async def test_a_hostile_choice_of_tls_1_3_suites_is_undone_or_refused(hostile: dict[str, str]) -> None:
    # CCM_8 proves the integrity of a record with 64 bits only.
    weak, configuration = "TLS_AES_128_CCM_8_SHA256", Path(hostile["OPENSSL_CONF"])
    configuration.write_text(f"{configuration.read_text()}Ciphersuites = {weak}\n")
    answer = await run_child("dump", OPENSSL_CONF=str(configuration))
    assert answer.get("refused") == "InsecureConfigurationError" or weak not in answer["ciphers"]


@pytest.mark.anyio
@pytest.mark.parametrize("variables", [("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"), ("OPENSSL_CONF",)])
async def test_a_server_certified_by_the_hostile_ca_is_refused_under_a_hostile_environment(
    hostile: dict[str, str], variables: tuple[str, ...], tmp_path: Path
) -> None:
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(ROOT.pem)
    server = serve(issue(OTHER_ROOT), OTHER_ROOT)
    async with Impostor(login(server, authentication_request(3))) as impostor:
        environment = {name: hostile[name] for name in variables}
        answer = await run_child("dial", impostor.dsn, str(anchor), **environment)
        await impostor.finish()
    assert answer["ours"] == "CertificateError"
    assert impostor.password not in answer["text"]
    assert all(impostor.password.encode() not in one.decrypted for one in impostor.conversations)
    if "SSL_CERT_FILE" in variables:  # the attack is real: Python's default context falls for it, and logs its keys
        assert answer["default"] == "accepted"
        assert (tmp_path / "keys.log").read_text().count("CLIENT_HANDSHAKE_TRAFFIC_SECRET") == 1
    else:
        assert not (tmp_path / "keys.log").exists()


# Revocation


def crl_file(path: Path, *blocks: bytes) -> str:
    path.write_bytes(b"".join(blocks))
    return str(path)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        pytest.param([revocation_list(ROOT)], None, id="current and empty"),
        pytest.param([revocation_list(OTHER_ROOT), revocation_list(ROOT)], None, id="among others"),
        pytest.param([revocation_list(ROOT, LEAF)], "certificate revoked", id="revoked"),
        pytest.param([revocation_list(OTHER_ROOT)], "unable to get certificate CRL", id="another issuer's"),
        pytest.param(
            [revocation_list(ROOT, last_update=NOW - 2 * DAY, next_update=NOW - DAY)], "CRL has expired", id="stale"
        ),
        pytest.param(
            [revocation_list(ROOT, last_update=NOW + DAY, next_update=NOW + 2 * DAY)], "not yet valid", id="early"
        ),
        pytest.param([revocation_list(ROOT, key=OTHER_ROOT.key)], "CRL signature failure", id="forged"),
    ],
)
def test_a_crl_is_obeyed(tmp_path: Path, blocks: list[bytes], reason: str | None) -> None:
    context = neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=crl_file(tmp_path / "crl.pem", *blocks))
    assert context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    if reason is None:
        assert handshake(context, serve())[0].version() == "TLSv1.3"
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            handshake(context, serve())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda path: None, "cannot be read: No such file", id="missing"),
        pytest.param(Path.touch, "holds no certificate revocation list", id="empty"),
        pytest.param(Path.mkdir, "cannot be read|holds no certificate revocation list", id="a folder"),
        pytest.param(lambda path: path.write_bytes(b"garbage"), "holds no certificate revocation list", id="garbage"),
        pytest.param(lambda path: path.write_bytes(ROOT.pem), "holds no certificate revocation list", id="the anchor"),
        pytest.param(
            lambda path: path.write_bytes(revocation_list(ROOT)[:-60]),
            "holds no certificate revocation list",
            id="cut off",
        ),
        pytest.param(lambda path: path.write_bytes(LEAF.key_pem), "holds no certificate revocation list", id="a key"),
    ],
)
def test_a_crl_file_that_holds_none_is_refused(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "crl.pem"
    make(path)
    for use in (
        lambda: neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=str(path)),
        lambda: neon_async.create_pool(DSN, trust_anchor=ROOT.pem, crl=str(path)),
        lambda: neon_async.create_pool(f"{DSN}?sslcrl={path}", trust_anchor=ROOT.pem),
        lambda: neon_async.connect(DSN, trust_anchor=ROOT.pem, sslcrl=path),
    ):
        with pytest.raises(neon_async.ConfigurationError, match=reason) as caught:
            use()
        assert str(path) in str(caught.value)
        assert_secret_free(caught.value, "s3cret")


@pytest.mark.parametrize("path", [pytest.param("", id="empty"), pytest.param("a\0b", id="NUL")])
def test_a_crl_that_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match="sslcrl"):
        neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=path)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([OTHER_ROOT.pem, revocation_list(ROOT)], id="before the list"),
        pytest.param([revocation_list(ROOT), OTHER_ROOT.pem], id="behind the list"),
        pytest.param([OTHER_ROOT.pem], id="alone"),
        pytest.param([revocation_list(ROOT), LEAF.pem], id="a leaf"),
        pytest.param(
            [OTHER_ROOT.pem.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"), revocation_list(ROOT)],
            id="in OpenSSL's own format",
        ),
        pytest.param(
            [OTHER_ROOT.pem.replace(b"CERTIFICATE", b"X509 CERTIFICATE"), revocation_list(ROOT)], id="old label"
        ),
    ],
)
def test_a_certificate_in_the_crl_file_would_be_trusted_and_is_refused(tmp_path: Path, blocks: list[bytes]) -> None:
    path = crl_file(tmp_path / "crl.pem", *blocks)
    smuggled = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLError):
        smuggled.load_verify_locations(path)
    assert smuggled.cert_store_stats()["x509"] == 1  # OpenSSL does take it
    for use in (
        lambda: neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=path),
        lambda: neon_async.create_pool(DSN, trust_anchor=ROOT.pem, sslcrl=path),
    ):
        with pytest.raises(neon_async.InsecureConfigurationError, match="would become trusted"):
            use()


@pytest.mark.anyio
async def test_a_crl_renewed_on_disk_counts_from_the_next_dial_on(tmp_path: Path) -> None:
    path = tmp_path / "crl.pem"
    crl_file(path, revocation_list(ROOT))
    async with Impostor(login(serve(), authentication_request(3)), trust_anchor=ROOT.pem) as impostor:
        connector = _connect.prepare(impostor.dsn, trust_anchor=ROOT.pem, sslcrl=path)
        with pytest.raises(neon_async.AuthenticationError):  # TLS is up
            await connector.connect()
        crl_file(path, revocation_list(ROOT, LEAF))
        with pytest.raises(neon_async.CertificateError, match="it has been revoked"):
            await connector.connect()
        crl_file(path, revocation_list(ROOT), OTHER_ROOT.pem)
        with pytest.raises(neon_async.InsecureConfigurationError, match="would become trusted"):
            await connector.connect()
        path.unlink()
        with pytest.raises(neon_async.ConfigurationError, match="cannot be read"):
            await connector.connect()
        crl_file(path, revocation_list(ROOT))
        with pytest.raises(neon_async.AuthenticationError):
            await connector.connect()


# Client certificates


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return paths: a client's certificate, its key, the key encrypted, both in one file, and another key."""
    purpose = ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False
    entity = issue(ROOT, "neon", names=[], also=[purpose])
    encrypted = entity.key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE.encode())
    )
    folder = tmp_path_factory.mktemp("client")
    files = {
        "cert": entity.pem,
        "key": entity.key_pem,
        "encrypted": encrypted,
        "both": entity.key_pem + entity.pem,
        "other": OTHER_ROOT.key_pem,
        "empty": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in files} | {"missing": str(folder / "missing")}


def demanding() -> ssl.SSLContext:
    """Return a server's context that takes nobody without a client certificate of ROOT."""
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
    client: dict[str, str], certificate: str, key: str | None, password: str
) -> None:
    anchor = load_trust_anchor(ROOT.pem)
    files = ClientCertificate(client[certificate], client[key] if key else None, password)
    context = build_context(anchor, client_certificate=files)
    assert_policy(context, ROOT.der)
    _, theirs = handshake(context, demanding())
    facts = theirs.getpeercert()
    assert facts is not None
    assert facts["subject"] == ((("commonName", "neon"),),)


@pytest.mark.parametrize(
    ("certificate", "key", "password"),
    [
        pytest.param("cert", "encrypted", "not this one", id="wrong passphrase"),
        pytest.param("cert", "encrypted", None, id="no passphrase"),
        pytest.param("cert", "encrypted", "x" * 2000, id="a passphrase longer than OpenSSL takes"),
        pytest.param("cert", "other", None, id="another's key"),
        pytest.param("cert", "missing", None, id="missing key"),
        pytest.param("cert", "empty", None, id="empty key"),
        pytest.param("cert", None, None, id="no key"),
        pytest.param("missing", "key", None, id="missing certificate"),
        pytest.param("key", "key", None, id="a key as certificate"),
    ],
)
def test_a_client_certificate_that_cannot_be_used_is_refused(
    client: dict[str, str], certificate: str, key: str | None, password: str | None
) -> None:
    keywords: dict[str, Any] = {"sslcert": client[certificate]}
    keywords |= {"sslkey": client[key]} if key else {}
    keywords |= {"sslpassword": password} if password else {}
    with pytest.raises(neon_async.ConfigurationError, match="Check sslkey and sslpassword") as caught:
        neon_async.create_pool(DSN, trust_anchor=ROOT.pem, **keywords)
    assert_secret_free(caught.value, "s3cret", *([password] if password else []))


def test_a_passphrase_is_not_shown_by_anything(client: dict[str, str]) -> None:
    pool = neon_async.create_pool(
        DSN, trust_anchor=ROOT.pem, sslcert=client["cert"], sslkey=client["encrypted"], sslpassword=PASSPHRASE
    )
    parameters = pool._connector.parameters
    shown = [repr(pool), repr(pool._connector), repr(parameters), parameters.redacted_dsn]
    assert not [text for text in shown if PASSPHRASE in text]


def test_a_client_certificate_shows_no_passphrase(client: dict[str, str]) -> None:
    assert PASSPHRASE not in repr(ClientCertificate(client["cert"], client["encrypted"], PASSPHRASE))


ASKED_ON_TERMINAL = """
import os, sys
os.login_tty(int(sys.argv[1]))
import neon_async
try:
    neon_async.create_pool({dsn!r}, trust_anchor={anchor!r}, sslcert={cert!r}, sslkey={key!r})
except neon_async.ConfigurationError:
    print("refused")
"""


def test_an_encrypted_key_without_passphrase_never_asks_on_the_terminal(client: dict[str, str]) -> None:
    script = ASKED_ON_TERMINAL.format(dsn=DSN, anchor=ROOT.pem, cert=client["cert"], key=client["encrypted"])
    ours, theirs = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", script, str(theirs)], pass_fds=[theirs], check=True, timeout=HANG)
        assert os.read(ours, 4096).decode().split() == ["refused"]
    finally:
        os.close(ours)
        os.close(theirs)


@contextlib.asynccontextmanager
async def postgres_that_wants_certificates() -> AsyncIterator[LocalPostgres]:
    """A real server whose pg_hba.conf demands a client certificate of ROOT besides SCRAM."""
    async with LocalPostgres(settings={"log_min_messages": "fatal"}) as server:
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
def certified_postgres() -> Iterator[LocalPostgres]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(postgres_that_wants_certificates()) as one,
    ):
        yield one


@pytest.mark.anyio
@pytest.mark.parametrize("negotiation", ["direct", "postgres"])
async def test_a_real_server_that_demands_a_client_certificate_gets_it(
    certified_postgres: LocalPostgres, client: dict[str, str], negotiation: str
) -> None:
    connection = await neon_async.connect(
        certified_postgres.dsn,
        trust_anchor=certified_postgres.trust_anchor,
        sslcert=client["cert"],
        sslkey=client["encrypted"],
        sslpassword=PASSPHRASE,
        sslnegotiation=negotiation,
    )
    try:
        query = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await connection.fetchval(query) == "/CN=neon"
    finally:
        await connection.close()


@pytest.mark.anyio
async def test_a_real_server_that_demands_a_client_certificate_refuses_us_without_one(
    certified_postgres: LocalPostgres,
) -> None:
    with pytest.raises(neon_async.AuthenticationError, match="requires a valid client certificate"):
        await neon_async.connect(certified_postgres.dsn, trust_anchor=certified_postgres.trust_anchor)


@pytest.mark.anyio
async def test_a_client_certificate_replaces_no_password(
    certified_postgres: LocalPostgres, client: dict[str, str]
) -> None:
    with pytest.raises(neon_async.InvalidPasswordError):
        await neon_async.connect(
            certified_postgres.dsn,
            trust_anchor=certified_postgres.trust_anchor,
            sslcert=client["cert"],
            sslkey=client["key"],
            password="wrong",
        )


# Whatever is accepted is as strong as the design


@pytest.fixture(scope="module")
def material(client: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Return values to try per parameter, good ones and bad ones."""
    folder = tmp_path_factory.mktemp("material")
    good_crl = crl_file(folder / "crl.pem", revocation_list(ROOT))
    bad_crl = crl_file(folder / "bad.pem", revocation_list(ROOT), OTHER_ROOT.pem)
    roots = str(folder / "roots.pem")
    Path(roots).write_bytes(OTHER_ROOT.pem)
    weak: list[object] = ["disable", "require", "verify-ca", "verify-full", "VERIFY-FULL", "", True, False, None]
    return {
        "trust_anchor": [ROOT.pem, ROOT.pem + OTHER_ROOT.pem, LEAF.pem, OTHER_ROOT.pem, None],
        "sslcrl": [good_crl, bad_crl, roots, None],
        "crl": [good_crl, bad_crl, None],
        "sslcert": [client["cert"], client["both"], roots, None],
        "sslkey": [client["key"], client["encrypted"], None],
        "sslpassword": [PASSPHRASE, "", None],
        "sslrootcert": [certifi.where(), "system", roots, None],
        "sslmode": weak,
        "ssl": [*weak, 0, 1, ssl.create_default_context()],
        "sslnegotiation": ["direct", "postgres", "requiredirect", None],
        "sslsni": [0, 1, "0", "1", False, True, None],
        "ssl_min_protocol_version": ["TLSv1", "TLSv1.2", "TLSv1.3", "SSLv3", None],
        "ssl_max_protocol_version": ["TLSv1.2", "TLSv1.3", None],
        "channel_binding": ["disable", "prefer", "require", None],
        "require_auth": ["none", "password", "scram-sha-256", "!scram-sha-256", None],
        "gssencmode": ["disable", "prefer", "require", None],
        "sslcompression": [0, 1, None],
    }


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_accepted_yields_a_context_as_strong_as_the_design(
    data: st.DataObject, material: dict[str, list[object]]
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(material)), unique=True, max_size=6))
    keywords: dict[str, Any] = {name: data.draw(st.sampled_from(range(len(material[name])))) for name in names}
    keywords = {name: material[name][index] for name, index in keywords.items()}
    try:
        connector = _connect.prepare(DSN, **keywords)
    except neon_async.ConfigurationError as error:
        assert_secret_free(error, "s3cret", PASSPHRASE)
        return
    chosen = keywords.get("trust_anchor")
    expected = load_trust_anchor(chosen).der if chosen is not None else find_isrg_root_x1().der
    crl = connector.parameters.sslcrl
    context = build_context(connector.anchor, crl=crl, client_certificate=client_certificate(connector.parameters))
    assert_policy(context, expected, crl=crl is not None)


@settings(max_examples=150)
@given(
    trust_anchor=st.one_of(
        st.none(),
        st.binary(max_size=60),
        st.text(max_size=60),
        st.lists(st.sampled_from([ROOT.pem, OTHER_ROOT.pem, LEAF.pem, b"\n", b"garbage"]), max_size=3).map(b"".join),
    ),
    crl=st.one_of(st.none(), st.text(max_size=20)),
)
def test_create_ssl_context_yields_the_design_or_one_kind_of_error(
    trust_anchor: str | bytes | None, crl: str | None
) -> None:
    try:
        context = neon_async.create_ssl_context(trust_anchor=trust_anchor, crl=crl)
    except neon_async.ConfigurationError:
        return
    (anchor,) = context.get_ca_certs(binary_form=True)
    assert anchor == (find_isrg_root_x1().der if trust_anchor is None else load_trust_anchor(trust_anchor).der)
    assert_policy(context, anchor, crl=crl is not None)
