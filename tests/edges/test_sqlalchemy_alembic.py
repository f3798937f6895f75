"""Alembic migrates over the direct host: one line in the `env.py` of its own template for asyncio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy.engine import make_url
from support.engines import admin_of

import neon_async
from neon_async.sqlalchemy import use_direct_host
from neon_async.testing import LocalPostgres

DIRECT = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
POOLED = "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech"


class Config:
    """An ini file with one option, and Alembic's interpolation."""

    def __init__(self, url: str | None) -> None:
        self.url = url

    def get_main_option(self, name: str) -> str | None:
        assert name == "sqlalchemy.url"
        return self.url

    def set_main_option(self, name: str, value: str) -> None:
        assert name == "sqlalchemy.url"
        self.url = value % ()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg", "postgresql+neon"])
@pytest.mark.parametrize("host", [DIRECT, POOLED])
def test_the_url_leads_to_the_direct_host(host: str, scheme: str) -> None:
    config = Config(f"{scheme}://alex:p%25%40ss@{host}/neondb?sslmode=require&channel_binding=require")
    use_direct_host(config)
    assert config.url is not None
    url = make_url(config.url)
    assert (url.drivername, url.host, url.password) == ("postgresql+neon", DIRECT, "p%@ss")
    assert url.query == {"sslmode": "require", "channel_binding": "require"}


def test_another_host_stays_as_it_is() -> None:
    config = Config("postgresql+neon://alex:secret@db-pooler.example.com/app")
    use_direct_host(config)
    assert config.url is not None
    assert make_url(config.url).host == "db-pooler.example.com"


def test_the_string_comes_from_the_argument_or_the_ini_file_or_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://of-environment:secret@{POOLED}/db")
    users: list[Any] = []
    for config, dsn in (
        (Config(f"postgresql://of-file:secret@{POOLED}/db"), make_url(f"postgresql://of-argument:secret@{POOLED}/db")),
        (Config(f"postgresql://of-file:secret@{POOLED}/db"), None),
        (Config(None), None),
    ):
        use_direct_host(config, dsn)
        users.append(make_url(str(config.url)).username)
    assert users == ["of-argument", "of-file", "of-environment"]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        pytest.param(None, "no connection string", id="none"),
        pytest.param("driver://user:pass@localhost/dbname", "no connection string", id="the template's own"),
        pytest.param("mysql://alex:secret@db.example.com/app", "begins with 'mysql://'", id="another database"),
    ],
)
def test_what_is_no_connection_string_is_refused(url: str | None, complaint: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=complaint):
        use_direct_host(Config(url))


# ---------------------------------------------------------------------------------------------------------------------
# Alembic itself

REVISION = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "0001", None, None, None


def upgrade():
    op.execute("CREATE TABLE migrated (a int)")


def downgrade():
    op.execute("DROP TABLE migrated")
"""


@pytest.fixture
def project(tmp_path: Path, postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of Alembic's template for asyncio, with our one line in its `env.py`."""
    alembic(tmp_path, "init", "-t", "async", "migrations")
    env = tmp_path / "migrations" / "env.py"
    text = env.read_text()
    line = "config = context.config\n"
    assert line in text
    text = text.replace(line, f"{line}neon_async.sqlalchemy.use_direct_host(config)\n")
    # The only change that a local server needs: its root certificate.
    pool = "poolclass=pool.NullPool,"
    assert pool in text
    text = text.replace(pool, f'{pool} connect_args={{"trust_anchor": "root.pem"}},')
    env.write_text(f"import neon_async.sqlalchemy\n{text}")
    (tmp_path / "root.pem").write_bytes(postgres.trust_anchor)
    (tmp_path / "migrations" / "versions" / "0001.py").write_text(REVISION)
    yield tmp_path
    asyncio.run(forget_migrations(postgres))


async def forget_migrations(postgres: LocalPostgres) -> None:
    async with admin_of(postgres) as admin:
        await admin.execute("DROP TABLE IF EXISTS migrated, alembic_version")


async def migrated(postgres: LocalPostgres) -> bool:
    async with admin_of(postgres) as admin:
        return bool(await admin.fetchval("SELECT to_regclass('migrated') IS NOT NULL"))


def alembic(folder: Path, *arguments: str) -> str:
    """Run Alembic as its users do, and return what it prints."""
    finished = subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("source", ["ini", "environment", "environment beside the example of the template"])
def test_alembic_migrates_over_the_direct_host(
    project: Path, postgres: LocalPostgres, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server's certificate has the name of the direct host only, so a connection by the other name would fail.
    pooled = urlsplit(postgres.dsn)
    assert pooled.hostname == DIRECT
    dsn = postgres.dsn.replace(DIRECT, POOLED, 1) + "&sslmode=require&channel_binding=require"
    ini = project / "alembic.ini"
    theirs = "sqlalchemy.url = driver://user:pass@localhost/dbname"
    assert theirs in ini.read_text()
    if source != "ini":
        monkeypatch.setenv("DATABASE_URL", dsn)
    ours = {"ini": f"sqlalchemy.url = {dsn.replace('%', '%%')}", "environment": ""}.get(source, theirs)
    ini.write_text(ini.read_text().replace(theirs, ours))
    alembic(project, "upgrade", "head")
    assert asyncio.run(migrated(postgres))
    assert "0001 (head)" in alembic(project, "current")
    alembic(project, "downgrade", "base")
    assert not asyncio.run(migrated(postgres))
    assert "CREATE TABLE migrated" in alembic(project, "upgrade", "head", "--sql")
