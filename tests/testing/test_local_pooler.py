"""`LocalPooler` starts and stops a PgBouncer and reports every failure; `tests/pool/test_pgbouncer.py` has the rest."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from support.processes import Scene

import neon_async
from neon_async import ConfigurationError
from neon_async.testing import LocalPooler, LocalPoolerError, LocalPostgres, LocalPostgresError

pytestmark = pytest.mark.anyio


async def test_a_pool_on_the_pooled_host_is_verified_with_the_trust_anchor_of_the_server(
    pgbouncer_installed: None, postgres: LocalPostgres
) -> None:
    async with (
        LocalPooler(postgres) as pooler,
        neon_async.create_pool(pooler.dsn, trust_anchor=postgres.trust_anchor) as pool,
    ):
        assert await pool.fetchval("SELECT 1 + 1") == 2
        report = pool.tls_report()
        endpoint = pool.endpoint
    assert report is not None
    assert report.server_name == "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech"
    assert endpoint is not None
    assert endpoint.pooled
    assert endpoint.direct_host == postgres.host


async def test_a_command_in_the_wrong_state_is_an_error_that_changes_nothing(
    pgbouncer_installed: None, postgres: LocalPostgres
) -> None:
    pooler = LocalPooler(postgres)
    texts = [repr(pooler)]
    with pytest.raises(LocalPoolerError, match="no PgBouncer yet"):
        _ = pooler.dsn
    async with pooler:
        place = f"127.0.0.1:{pooler.port}"
        texts.append(repr(pooler))
        with pytest.raises(LocalPoolerError, match="already running"):
            await pooler.start()
        await pooler.stop()
        texts.append(repr(pooler))
        with pytest.raises(LocalPoolerError, match="already stopped"):
            await pooler.stop()
        await pooler.start()
        with pytest.raises(LocalPoolerError, match="entered only once"):
            await pooler.__aenter__()
    texts.append(repr(pooler))
    for use in (pooler.start, pooler.stop):
        with pytest.raises(LocalPoolerError, match="is closed"):
            await use()
    assert texts == [
        "<LocalPooler: new>",
        f"<LocalPooler on {place}: running>",
        f"<LocalPooler on {place}: stopped>",
        f"<LocalPooler on {place}: closed>",
    ]


@pytest.mark.parametrize("name", ["listen_port", "AUTH_TYPE", "client_tls_sslmode"])
def test_a_reserved_setting_is_refused(name: str, postgres: LocalPostgres) -> None:
    with pytest.raises(ConfigurationError, match=f"sets {name.lower()} itself"):
        LocalPooler(postgres, settings={name: "x"})


async def test_a_configuration_that_pgbouncer_refuses_is_reported_with_its_log(
    pgbouncer_installed: None, postgres: LocalPostgres
) -> None:
    pooler = LocalPooler(postgres, settings={"pool_mode": "nonsense"})
    with pytest.raises(LocalPoolerError, match=r"(?s)does not start.*nonsense"):
        await pooler.__aenter__()
    assert repr(pooler).endswith("closed>")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(None, "there is none", id="no PgBouncer"),
        pytest.param("echo PgBouncer 1.18.0", "the one there is 1.18", id="an old one"),
    ],
)
async def test_a_missing_pgbouncer_is_named_with_what_installs_it(
    script: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: LocalPostgres
) -> None:
    if script is not None:
        program = tmp_path / "pgbouncer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalPoolerError, match=rf"1\.21 or later on PATH, and {reason}\. .*apt install pgbouncer"):
        async with LocalPooler(postgres):
            pass


async def test_a_server_that_is_not_there_is_reported(pgbouncer_installed: None) -> None:
    with pytest.raises(LocalPostgresError, match="has no server yet"):
        async with LocalPooler(LocalPostgres()):
            pass


@pytest.mark.parametrize("far", [pytest.param(False, id="at once"), pytest.param(True, id="when it runs")])
async def test_a_cancelled_start_leaves_nothing(
    far: bool, pgbouncer_installed: None, scene: Scene, postgres: LocalPostgres
) -> None:
    pooler = LocalPooler(postgres)

    async def use() -> None:
        async with pooler:
            await anyio.sleep_forever()  # where it is ready before the cancellation

    async with anyio.create_task_group() as group:
        group.start_soon(use)
        while far and not repr(pooler).startswith("<LocalPooler on"):
            await anyio.sleep(0.001)
        group.cancel_scope.cancel()
    assert repr(pooler).endswith(": closed>" if far else ": new>")
    assert scene.traces() == []
