"""The small projects of docs/examples, started as their README files say, do what they say, also during an outage."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from support.documents import ROOT
from support.probes import HANG, connected

from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

EXAMPLES = ROOT / "docs" / "examples"
SERVICES = {
    "fastapi": ["-m", "uvicorn", "main:app", "--port", "{port}"],
    "aiohttp": ["main.py"],
}
TABLES = "orders, stock, alembic_version"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"  # the projects are processes of their own


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with connected(postgres) as admin:
        await admin.execute(f"DROP TABLE IF EXISTS {TABLES}")
    async with LocalEndpoint(postgres, wake_time=0.1) as endpoint:
        yield endpoint
    async with connected(postgres) as admin:
        await admin.execute(f"DROP TABLE IF EXISTS {TABLES}")


@pytest.fixture
def environment(endpoint: LocalEndpoint, tmp_path: Path) -> dict[str, str]:
    """What `neon-async dev` prints, with the parameters of the console's string."""
    anchor = tmp_path / "root.pem"
    anchor.write_bytes(endpoint.trust_anchor)
    dsn = f"{endpoint.dsn}&sslmode=require&channel_binding=require"
    return {**os.environ, "DATABASE_URL": dsn, "DATABASE_TRUST_ANCHOR": str(anchor), "PYTHONDONTWRITEBYTECODE": "1"}


async def run(example: str, environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """Run Python in the folder of an example. Return the exit status, the output and the errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        cwd=EXAMPLES / example,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(HANG):
        output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def load_schema(postgres: LocalPostgres, example: str) -> None:
    async with connected(postgres) as admin:
        await admin.execute((EXAMPLES / example / "schema.sql").read_text(encoding="utf-8"))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def serving(example: str, environment: dict[str, str]) -> AsyncIterator[httpx2.AsyncClient]:
    """Start a service in a process of its own and yield a client of it."""
    port = free_port()
    arguments = [word.format(port=port) for word in SERVICES[example]]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        cwd=EXAMPLES / example,
        env=environment | {"PORT": str(port)},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        # uvicorn closes the connection behind a response with status 500, perhaps when the next request has been sent.
        headers = {"Connection": "close"}
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=HANG) as client:
            async with asyncio.timeout(HANG):
                while process.returncode is None and not await answers(client):
                    await asyncio.sleep(0.02)
            assert process.returncode is None, "the service did not start"
            yield client
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(HANG):
            await process.wait()


async def answers(client: httpx2.AsyncClient) -> bool:
    try:
        await client.get("/ready")
    except httpx2.TransportError:
        return False
    return True


@pytest.mark.parametrize("example", sorted(SERVICES))
async def test_a_service_orders_in_transactions_and_lets_the_database_sleep(
    example: str, endpoint: LocalEndpoint, postgres: LocalPostgres, environment: dict[str, str]
) -> None:
    await load_schema(postgres, example)
    async with serving(example, environment) as client:
        assert (await client.get("/ready")).status_code == 200
        assert endpoint.connects == 0  # neither the start nor the probe has connected

        assert (await client.post("/orders", json={"item": "tea", "amount": 3})).status_code == 200
        assert (await client.post("/orders", json={"item": "tea", "amount": 3})).status_code == 409
        assert (await client.get("/orders")).json() == [{"item": "tea", "amount": 3}]

        endpoint.suspend()
        before = endpoint.connects
        for _ in range(5):
            assert (await client.get("/ready")).status_code == 200
        assert (endpoint.state, endpoint.connects) == ("suspended", before)
        assert (await client.get("/orders")).status_code == 200
        assert endpoint.wakes == 1


@pytest.mark.parametrize("example", sorted(SERVICES))
async def test_a_service_answers_503_where_the_database_has_been_lost(
    example: str, endpoint: LocalEndpoint, postgres: LocalPostgres, environment: dict[str, str]
) -> None:
    await load_schema(postgres, example)
    environment["DATABASE_URL"] += "&connect_timeout=1"
    async with serving(example, environment) as client:
        assert (await client.get("/orders")).status_code == 200
        async with connected(postgres) as admin:
            await admin.execute("ALTER TABLE orders RENAME TO hidden")
            assert (await client.get("/orders")).status_code == 500  # not an outage
            await admin.execute("ALTER TABLE hidden RENAME TO orders")
            async with admin.transaction():
                await admin.execute("LOCK TABLE orders")
                waiting = asyncio.ensure_future(client.get("/orders"))
                async with asyncio.timeout(HANG):
                    while not await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                        assert not waiting.done(), waiting.result().text
                        await asyncio.sleep(0.01)
                endpoint.refuse()
                endpoint.cut()  # in the middle of a query
                answer = await waiting
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        endpoint.accept()
        assert (await client.get("/orders")).status_code == 200


async def test_the_script_reports_and_says_when_to_try_again(
    endpoint: LocalEndpoint, postgres: LocalPostgres, environment: dict[str, str]
) -> None:
    await load_schema(postgres, "fastapi")
    async with connected(postgres) as admin:
        await admin.execute("INSERT INTO orders (item, amount) VALUES ('tea', 2), ('coffee', 1), ('tea', 1)")
    assert await run("script", environment, "report.py") == (0, "coffee 1\ntea 3\n", "")
    endpoint.refuse()
    status, output, errors = await run("script", environment, "report.py")
    assert (status, output) == (75, "")
    assert "Traceback" not in errors
    endpoint.accept()
    async with connected(postgres) as admin:
        await admin.execute("DROP TABLE orders")
    status, _, errors = await run("script", environment, "report.py")
    assert status == 1
    assert "UndefinedTableError" in errors


async def test_sqlalchemy_orders_after_alembic_has_migrated(
    postgres: LocalPostgres, environment: dict[str, str]
) -> None:
    async with connected(postgres) as admin:  # a database of its own: alembic compares all tables with the models
        await admin.execute("DROP DATABASE IF EXISTS alembic_of_examples")
        await admin.execute("CREATE DATABASE alembic_of_examples")
    url = urlsplit(environment["DATABASE_URL"])
    environment = environment | {"DATABASE_URL": url._replace(path="/alembic_of_examples").geturl()}
    status, _, errors = await run("sqlalchemy", environment, "-m", "alembic", "upgrade", "head")
    assert status == 0, errors
    assert await run("sqlalchemy", environment, "app.py", "tea") == (0, "1 tea\n", "")
    assert await run("sqlalchemy", environment, "app.py", "milk") == (0, "1 tea\n2 milk\n", "")
    status, _, errors = await run("sqlalchemy", environment, "-m", "alembic", "check")
    assert status == 0, errors  # the models are those of the migrations
    status, _, errors = await run("sqlalchemy", environment, "-m", "alembic", "downgrade", "base")
    assert status == 0, errors


def projects() -> list[str]:
    return sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())


def test_there_is_a_project_of_each_kind() -> None:
    assert projects() == ["aiohttp", "fastapi", "script", "sqlalchemy", "worker"]


@pytest.mark.parametrize("project", projects())
def test_the_readme_of_a_project_names_files_that_exist(project: str) -> None:
    text = (EXAMPLES / project / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+\.(?:py|sql))\b", text))
    assert named
    assert [name for name in named if not (EXAMPLES / project / name).is_file()] == []


def test_the_fastapi_service_has_less_than_40_lines_of_its_own() -> None:
    lines: list[Any] = (EXAMPLES / "fastapi" / "main.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 40
