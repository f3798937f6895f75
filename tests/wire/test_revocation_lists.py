"""The files of sslcrl: what they decide, what is refused, and that they are read for every dial."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from support.certificates import DAY, NOW, revocation_list, write_crl
from support.files import make_huge
from support.handshakes import LEAF, OTHER_ROOT, ROOT, handshake, serve
from support.probes import assert_secret_free

import neon_async
from neon_async._driver.connector import prepare
from neon_async.testing._impostor import Impostor, authentication_request, login

NO_CRL = "contains no certificate revocation list"
# OpenSSL would take a delta for a complete list: with the newer of these it would accept what the older one revokes.
OLD = revocation_list(ROOT, LEAF, last_update=NOW - 2 * DAY)
DELTA = revocation_list(ROOT, delta_of=1)
DSN = "postgresql://alex:s3cret@db.example.com/neondb"


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
def test_a_crl_decides_about_the_certificate(tmp_path: Path, blocks: list[bytes], reason: str | None) -> None:
    context = neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=write_crl(tmp_path / "crl.pem", *blocks))
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
        pytest.param(Path.touch, NO_CRL, id="empty"),
        pytest.param(Path.mkdir, f"cannot be read|{NO_CRL}", id="a folder"),
        pytest.param(lambda path: path.write_bytes(b"garbage"), NO_CRL, id="garbage"),
        pytest.param(lambda path: path.write_bytes(ROOT.pem), NO_CRL, id="the anchor"),
        pytest.param(
            lambda path: path.write_bytes(revocation_list(ROOT)[:-60]),
            NO_CRL,
            id="cut off",
        ),
        pytest.param(lambda path: path.write_bytes(LEAF.key_pem), NO_CRL, id="a key"),
        pytest.param(lambda path: path.write_bytes(DELTA), f"{NO_CRL}, only a delta", id="a delta alone"),
        pytest.param(lambda path: path.write_bytes(DELTA * 2), f"{NO_CRL}, only a delta", id="the same delta twice"),
        pytest.param(
            lambda path: path.write_bytes(revocation_list(OTHER_ROOT) + DELTA),
            "contains a delta",
            id="a delta and another issuer's list",
        ),
        pytest.param(
            lambda path: path.write_bytes(OLD + DELTA), "contains a delta", id="a complete list and its delta"
        ),
        pytest.param(
            lambda path: path.write_bytes(DELTA + OLD), "contains a delta", id="a delta and its complete list"
        ),
        pytest.param(lambda path: path.symlink_to("/proc/kmsg"), NO_CRL, id="the kernel's log"),
        pytest.param(make_huge, "cannot be read: larger than 128 MiB", id="3 GB"),
        pytest.param(os.mkfifo, "cannot be read: not a regular file", id="a FIFO"),
    ],
)
def test_a_crl_file_without_a_crl_is_refused(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
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
def test_a_crl_that_is_not_a_path_is_refused(path: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match="sslcrl"):
        neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=path)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([OTHER_ROOT.pem, revocation_list(ROOT)], id="before the list"),
        pytest.param([revocation_list(ROOT), OTHER_ROOT.pem], id="after the list"),
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
def test_a_crl_file_with_a_certificate_in_it_is_refused(tmp_path: Path, blocks: list[bytes]) -> None:
    path = write_crl(tmp_path / "crl.pem", *blocks)
    smuggled = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLError):
        smuggled.load_verify_locations(path)
    assert smuggled.cert_store_stats()["x509"] == 1  # OpenSSL accepts it
    for use in (
        lambda: neon_async.create_ssl_context(trust_anchor=ROOT.pem, crl=path),
        lambda: neon_async.create_pool(DSN, trust_anchor=ROOT.pem, sslcrl=path),
    ):
        with pytest.raises(neon_async.InsecureConfigurationError, match="would become trusted"):
            use()


@pytest.mark.anyio
async def test_a_crl_that_is_renewed_on_disk_applies_from_the_next_dial_on(tmp_path: Path) -> None:
    path = tmp_path / "crl.pem"
    write_crl(path, revocation_list(ROOT))
    async with Impostor(login(serve(), authentication_request(3)), trust_anchor=ROOT.pem) as impostor:
        connector = prepare(impostor.dsn, trust_anchor=ROOT.pem, sslcrl=path)
        with pytest.raises(neon_async.AuthenticationError):  # TLS is up
            await connector.connect()
        write_crl(path, revocation_list(ROOT, LEAF))
        with pytest.raises(neon_async.CertificateError, match="it has been revoked"):
            await connector.connect()
        write_crl(path, revocation_list(ROOT), OTHER_ROOT.pem)
        with pytest.raises(neon_async.InsecureConfigurationError, match="would become trusted"):
            await connector.connect()
        path.unlink()
        with pytest.raises(neon_async.ConfigurationError, match="cannot be read"):
            await connector.connect()
        write_crl(path, revocation_list(ROOT))
        with pytest.raises(neon_async.AuthenticationError):
            await connector.connect()
