"""pytest fixtures: a real PostgreSQL over verified TLS, and pools in whatever event loop the tests run.

pytest loads this module by itself where neon-async is installed, and nothing is started before a test asks for one of
`neon_postgres`, `neon_endpoint`, `neon_pool` and `neon_rollback`. All four are synchronous fixtures, so that they serve
pytest-asyncio in each loop scope, anyio, and the synchronous `TestClient` of FastAPI alike.

    async def test_orders(neon_rollback: neon_async.Pool) -> None:
        await neon_rollback.execute("INSERT INTO orders (item) VALUES ('tea')")

Two settings of pytest's configuration: `neon_schema` names a file of SQL for the new database, and
`neon_postgres_bin_dir` the folder of another PostgreSQL. Both are relative to the configuration file. Override the
fixture `neon_pool_options` to give options of `create_pool()` to the pools.
Install it with `pip install neon-async[testing]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from ._pool.options import PoolKeywords
    from ._pool.pool import Pool
    from .testing import LocalEndpoint, LocalPostgres

__all__ = ("neon_endpoint", "neon_pool", "neon_pool_options", "neon_postgres", "neon_rollback")

_SETTINGS = {
    "neon_schema": "file of SQL that neon_postgres runs in its new database",
    "neon_postgres_bin_dir": "folder of the PostgreSQL that neon_postgres starts, instead of the wheel's",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the settings of the plugin."""
    for name, text in _SETTINGS.items():
        parser.addini(name, text, type="string", default="")


@pytest.fixture(scope="session")
def neon_postgres(_neon_portal: BlockingPortal, request: pytest.FixtureRequest) -> Iterator[LocalPostgres]:
    """One `LocalPostgres` for the whole session, or for each worker of pytest-xdist. It starts in about a second.

    Use `neon_postgres.dsn` together with `neon_postgres.trust_anchor`. Its coroutines cannot be called: it lives in an
    event loop of its own.
    """
    from .testing import LocalPostgres

    server = LocalPostgres(_path(request, "neon_postgres_bin_dir"), schema=_path(request, "neon_schema"))
    with _neon_portal.wrap_async_context_manager(server):
        yield server


@pytest.fixture
def neon_endpoint(_neon_portal: BlockingPortal, neon_postgres: LocalPostgres) -> Iterator[LocalEndpoint]:
    """A `LocalEndpoint` in front of `neon_postgres` for one test, which it suspends, freezes or cuts.

    It suspends only when the test says so, and wakes in 0.1 s. All its methods can be called in a test.
    """
    from .testing import LocalEndpoint

    with _neon_portal.wrap_async_context_manager(LocalEndpoint(neon_postgres, wake_time=0.1)) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def neon_pool_options() -> PoolKeywords:
    """Options of `create_pool()` for `neon_pool` and `neon_rollback`: none. Override it to pass `init`, for example."""
    return {}


@pytest.fixture
def neon_pool(neon_endpoint: LocalEndpoint, neon_pool_options: PoolKeywords) -> Iterator[Pool]:
    """A pool for one test, which connects through `neon_endpoint`. What it writes stays until the session ends.

    It opens at its first use, in the event loop that uses it, and moves to another one where no connection is in use.
    """
    from .testing._pools import self_opening_pool

    pool = self_opening_pool(neon_endpoint.dsn, neon_endpoint.trust_anchor, neon_pool_options)
    yield pool
    pool.end()


@pytest.fixture
def neon_rollback(neon_postgres: LocalPostgres, neon_pool_options: PoolKeywords) -> Iterator[Pool]:
    """A pool for one test on one connection, in a transaction that is rolled back after the test.

    Code behaves as if it wrote to the database. Its transactions are savepoints, those of `run_transaction()` included;
    a statement that fails rolls back itself only; deferred constraints are checked where COMMIT checks them; roles and
    settings end with their block. The differences: there is one connection, and a second task waits for it; `isolation`
    is that of the test's transaction; no other connection sees what is written, and notifications are not sent; `now()`
    stands still; a prepared statement that fails outside of `transaction()` ends the transaction, and the next acquire
    says so. It stays in one event loop: enter the client (`with TestClient(app) as client:`).
    """
    from .testing._pools import rollback_pool

    pool = rollback_pool(neon_postgres.dsn, neon_postgres.trust_anchor, neon_pool_options)
    yield pool
    pool.end()


@pytest.fixture(scope="session")
def _neon_portal() -> Iterator[BlockingPortal]:
    """The event loop of the server and the endpoints, in a thread of its own."""
    try:
        from anyio.from_thread import start_blocking_portal
    except ImportError:
        raise pytest.UsageError(
            "The fixtures of neon-async need anyio. Install it with: pip install 'neon-async[testing]'"
        ) from None
    with start_blocking_portal() as portal:
        yield portal


def _path(request: pytest.FixtureRequest, setting: str) -> Path | None:
    """Return the path that a setting names, or None where it is not set."""
    value: str = request.config.getini(setting)
    base = request.config.inipath.parent if request.config.inipath else request.config.rootpath
    return base / value if value else None
