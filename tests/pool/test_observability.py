"""What a pool shows of itself: its repr, TLS report and log records, none of them with a secret."""

from __future__ import annotations

import asyncio
import logging

import pytest
from support.certificates import issue
from support.probes import HANG, make_pool, password_of, until, until_settled

from neon_async.testing import LocalEndpoint, LocalPostgres

ROOT = issue(subject="root", ca=True)
DSN = "postgresql://alex:s3cret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"
NAME = "ep-cool-darkness-123456"


@pytest.mark.anyio
async def test_the_repr_of_a_pool_shows_its_state_and_no_secret(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres, init_size=2)
    assert repr(pool) == f"<Pool {NAME}: 0 in use, 0 idle, 0 waiting>"
    async with pool:
        async with pool.acquire():
            assert repr(pool) == f"<Pool {NAME}: 1 in use, 1 idle, 0 waiting>"
        assert repr(pool) == f"<Pool {NAME}: 0 in use, 2 idle, 0 waiting>"
    assert repr(pool) == f"<Pool {NAME}: 0 in use, 0 idle, 0 waiting, closed>"


@pytest.mark.anyio
async def test_tls_report_describes_the_latest_handshake(postgres: LocalPostgres) -> None:
    pool = make_pool(postgres)
    assert pool.tls_report() is None
    async with pool:
        assert pool.tls_report() is None
        await pool.fetchval("SELECT 1")
        report = pool.tls_report()
        assert report is not None
        assert (report.version, report.negotiation) == ("TLSv1.3", "direct")
        assert report.server_name == postgres.host
    assert pool.tls_report() == report


# ---------------------------------------------------------------------------------------------------------------------
# Log records


@pytest.mark.anyio
async def test_each_change_of_state_is_logged_in_one_line(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neon_async")
    async with LocalEndpoint(postgres) as endpoint, make_pool(endpoint, init_size=2) as pool, asyncio.timeout(HANG):
        for _ in range(5):
            await pool.fetchval("SELECT 1")
        await until_settled(pool)
        endpoint.refuse()
        endpoint.cut()
        await until(lambda: pool.get_size() == 0)
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 3)
        endpoint.accept()
        assert await waiting == 1
        await pool.close()
    records = [record for record in caplog.records if record.name.startswith("neon_async")]
    assert {record.name for record in records} == {"neon_async"}
    assert [record.levelname for record in records] == ["INFO", "INFO", "WARNING", "WARNING", "INFO"]
    lines = [record.getMessage() for record in records]
    for line, part in zip(
        lines, ["connected in", "no connection is open", "cannot connect", "connected again", "closed"], strict=True
    ):
        assert line.startswith(f"{NAME}: ")
        assert part in line
        assert "\n" not in line
    assert password_of(postgres) not in caplog.text


@pytest.mark.anyio
async def test_the_text_of_an_error_of_the_password_function_is_not_logged(
    postgres: LocalPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def password() -> str:
        raise RuntimeError("the secret is hunter2")

    async with make_pool(postgres, password=password) as pool:
        with pytest.raises(RuntimeError):
            await pool.fetchval("SELECT 1")
    assert "RuntimeError" in caplog.text
    assert "hunter2" not in caplog.text
