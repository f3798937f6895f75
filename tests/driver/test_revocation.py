"""Connections and pools of a real server whose certificate is revoked, or whose lists are renewed, while they last."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.certificates import DAY, NOW, Entity
from support.crls import RevocablePKI, revocable_pki
from support.probes import HANG, nothing_is_left, until
from support.revocations import forget_everything, let_expire, renew, shard_on
from support.signatures import PresentingServer, presenting_server

import neon_async
from neon_async._driver.connector import prepare
from neon_async._wire.revocation import shard

MODES = pytest.mark.parametrize("mode", ["advise", "require"])
# A list that is in the second half of its life is renewed after an eighth of the rest.
SHORT = {"last_update": NOW - DAY}


@pytest.fixture(autouse=True)
def no_list_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return forget_everything(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_bin_dir: str | None) -> Iterator[PresentingServer]:
    with presenting_server(tmp_path_factory.mktemp("anchor"), postgres_bin_dir) as made:
        yield made


@pytest.fixture
def pki() -> Iterator[RevocablePKI]:
    with revocable_pki() as made:
        yield made


@pytest.fixture
def leaf(pki: RevocablePKI, server: PresentingServer) -> Entity:
    """The certificate of the server, which is on a shard."""
    made = pki.leaf()
    server.present_chain(made, pki.issuer)
    return made


def soon(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


@contextlib.asynccontextmanager
async def opened(
    server: PresentingServer, pki: RevocablePKI, mode: neon_async.RevocationMode, **keywords: Any
) -> AsyncIterator[neon_async.Pool]:
    async with neon_async.create_pool(server.dsn, trust_anchor=pki.root.pem, revocation=mode, **keywords) as pool:
        yield pool


def revocation_of(pool: neon_async.Pool) -> neon_async.RevocationReport:
    report = pool.tls_report()
    assert report is not None
    return report.revocation


@MODES
@pytest.mark.anyio
async def test_a_pool_works_and_reports_the_check(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity, mode: neon_async.RevocationMode
) -> None:
    async with opened(server, pki, mode) as pool:
        assert await pool.fetchval("SELECT 1") == 1
        await until(lambda: revocation_of(pool).status == "good")
        async with pool.acquire() as connection:
            assert neon_async.connection_tls_report(connection).revocation == revocation_of(pool)
    assert sorted(pki.lists.requests) == ["/1.crl", "/root.crl"]


@MODES
@pytest.mark.anyio
async def test_a_certificate_that_is_revoked_later_ends_every_connection_within_the_renewal(
    server: PresentingServer,
    pki: RevocablePKI,
    leaf: Entity,
    mode: neon_async.RevocationMode,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pki.publish("/1.crl", **SHORT, next_update=soon(60))
    single = await neon_async.connect(server.dsn, trust_anchor=pki.root.pem, revocation=mode)
    async with opened(server, pki, mode, init_size=3) as pool:
        held = await pool.acquire()
        assert await held.fetchval("SELECT 1") == 1
        await until(lambda: revocation_of(pool).status == "good")
        pki.publish("/1.crl", leaf, **SHORT, next_update=soon(60))
        running = asyncio.ensure_future(held.execute("SELECT pg_sleep(3600)"))
        for each in shard._shards.values():  # the renewal is a few seconds away
            each.state = each.state._replace(renew_at=time.time())
        await until(lambda: pool.get_size() == 0 and single.is_closed())
        with pytest.raises(neon_async.ConnectionLostError, match="the server's certificate has been revoked"):
            await running
        with pytest.raises(neon_async.ConnectionLostError, match="the server's certificate has been revoked"):
            await single.fetchval("SELECT 1")
        assert revocation_of(pool).status == "revoked"
        with pytest.raises(neon_async.CertificateRevokedError):
            await pool.fetchval("SELECT 1")
    assert caplog.text.count("a connection is terminated. The certificate of ") == 4


@MODES
@pytest.mark.anyio
async def test_a_verdict_that_comes_during_the_login_refuses_the_connection_and_leaves_nothing(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity, mode: str
) -> None:
    connector = prepare(server.dsn, trust_anchor=pki.root.pem, revocation=mode)
    await (await connector.connect()).close()
    await until(lambda: connector.tls_report and connector.tls_report.revocation.status == "good")

    def revoke(step: str) -> None:
        if step == "authentication":
            pki.publish("/1.crl", leaf)
            renew(shard_on(pki))

    async with nothing_is_left():
        with pytest.raises(neon_async.CertificateRevokedError):
            await connector.connect(on_step=revoke)
    gc.collect()  # a connection that is not closed would warn


@pytest.mark.anyio
async def test_the_renewal_comes_by_itself(server: PresentingServer, pki: RevocablePKI, leaf: Entity) -> None:
    pki.publish("/1.crl", **SHORT, next_update=soon(24))  # renewed after 24 / 8 seconds
    async with opened(server, pki, "advise", init_size=1) as pool:
        await until(lambda: revocation_of(pool).status == "good")
        pki.publish("/1.crl", leaf, **SHORT, next_update=soon(60))
        await until(lambda: pool.get_size() == 0)


@pytest.mark.anyio
async def test_nothing_is_fetched_for_an_idle_pool(server: PresentingServer, pki: RevocablePKI, leaf: Entity) -> None:
    async with opened(server, pki, "require", max_inactive_connection_lifetime=0.1) as pool:
        assert pki.lists.requests == []  # opening it connects to nothing
        await pool.fetchval("SELECT 1")
        await until(lambda: not any(each.listeners for each in shard._shards.values()))
        assert len(shard._shards) == 2
        assert sorted(pki.lists.requests) == ["/1.crl", "/root.crl"]


@pytest.mark.anyio
async def test_no_renewal_outlives_the_connections(server: PresentingServer, pki: RevocablePKI, leaf: Entity) -> None:
    connection = await neon_async.connect(server.dsn, trust_anchor=pki.root.pem, revocation="require")
    pool = await neon_async.create_pool(server.dsn, trust_anchor=pki.root.pem, revocation="require", init_size=2)
    listeners = [each.listeners for each in shard._shards.values()]
    assert pool._connector.revocation is not None
    renewals = pool._connector.revocation._chain.renewals
    (renewal,) = renewals.values()
    assert len(renewal._watches) == 3
    await connection.close()
    assert len(renewal._watches) == 2
    assert [len(each) for each in listeners] == [1, 1]
    pool.terminate()
    await until(lambda: not renewals)
    assert not any(listeners)


@pytest.mark.anyio
async def test_a_failed_renewal_keeps_the_connections_and_require_refuses_new_ones_once_the_list_has_expired(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity
) -> None:
    connection = await neon_async.connect(server.dsn, trust_anchor=pki.root.pem, revocation="require")
    del pki.lists.bodies["/1.crl"]
    one = shard_on(pki)
    renew(one)
    assert one.state.failures == 1
    await (await neon_async.connect(server.dsn, trust_anchor=pki.root.pem, revocation="require")).close()
    let_expire(one)
    with pytest.raises(neon_async.RevocationUnknownError, match="HTTP status 404"):
        await neon_async.connect(server.dsn, trust_anchor=pki.root.pem, revocation="require")
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


@pytest.mark.anyio
async def test_a_renewed_certificate_is_on_another_shard_which_the_next_connect_fetches(
    server: PresentingServer, pki: RevocablePKI, leaf: Entity
) -> None:
    pki.publish("/1.crl", leaf)
    async with opened(server, pki, "require") as pool:
        with pytest.raises(neon_async.CertificateRevokedError):
            await pool.fetchval("SELECT 1")
        server.present_chain(pki.leaf("/2.crl"), pki.issuer)
        async with asyncio.timeout(HANG):
            while True:
                with contextlib.suppress(neon_async.CertificateRevokedError):  # a breaker holds for a moment
                    assert await pool.fetchval("SELECT 1") == 1
                    break
                await asyncio.sleep(0.01)
        assert revocation_of(pool).list_url == pki.lists.url("/2.crl")


@pytest.mark.parametrize("level", ["advise", "require"])
@pytest.mark.parametrize("missing", ["cryptography", "platformdirs"])
def test_without_the_extra_the_error_names_it(level: str, missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import neon_async; "
        f"neon_async.create_pool('postgresql://u:s3cret@db.example.com/d', revocation={level!r})"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = finished.stderr.splitlines()[-1]
    assert f"revocation={level} needs {missing}, which is not installed." in message
    assert "pip install 'neon-async[revocation]'" in message
    assert "s3cret" not in message


def test_neither_import_nor_off_loads_the_check() -> None:
    code = (
        "import sys, neon_async; neon_async.create_pool('postgresql://u:p@db.example.com/d'); "
        "print(*(name for name in sys.modules if 'neon_async._wire.revocation' in name))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []
