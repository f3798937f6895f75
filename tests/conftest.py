"""What every test shares: both event loops, a real PostgreSQL and PgBouncer, and an environment without a say."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import settings
from support.pgbouncer import MINIMUM_VERSION, LocalPgBouncer, installed_version

from neon_async.testing import LocalPostgres

# How long an example takes says something of the machine only.
settings.register_profile("neon-async", settings(), deadline=None)
settings.load_profile("neon-async")


@pytest.fixture(
    scope="module",
    params=[pytest.param("asyncio", id="asyncio"), pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The event loops that async tests, marked `anyio`, run on."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let the processes that tests start end on Ctrl-C.

    A shell without job control has what it starts in the background ignore SIGINT, and children inherit that (POSIX,
    Shell Command Language, section 2.11).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_postgres_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables of the machine that libpq, asyncpg and neon_async read: PG*, NEON_ASYNC_* and DATABASE_URL."""
    hidden = [name for name in os.environ if name.startswith(("PG", "NEON_ASYNC_REVOCATION")) or name == "DATABASE_URL"]
    for name in hidden:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres_bin_dir() -> str | None:
    """The folder with the PostgreSQL to test against: NEON_ASYNC_TEST_POSTGRES_BIN, or None for the wheel."""
    return os.environ.get("NEON_ASYNC_TEST_POSTGRES_BIN")


@pytest.fixture(scope="session")
def postgres(postgres_bin_dir: str | None) -> Iterator[LocalPostgres]:
    """One running server for the whole session. It lives in an event loop of its own; tests must not stop it."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(LocalPostgres(postgres_bin_dir)) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def pgbouncer_installed() -> None:
    """A PgBouncer that keeps prepared statements. CI installs one; a developer's machine may have none."""
    found = installed_version()
    if found is None or found < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        here = "PATH holds none" if found is None else f"the one on PATH is {found[0]}.{found[1]}"
        complaint = f"needs PgBouncer {wanted} or later, and {here}; `.ci/pgbouncer FOLDER` puts one into FOLDER/bin"
        pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)


@pytest.fixture(scope="session")
def pgbouncer(pgbouncer_installed: None, postgres: LocalPostgres) -> Iterator[LocalPgBouncer]:
    """One running PgBouncer in front of `postgres` for the whole session; tests must not stop it."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(LocalPgBouncer(postgres)) as bouncer:
        yield bouncer
