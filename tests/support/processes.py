"""Observe servers of `LocalPostgres` from outside: through libpq, `ps` and the file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from anyio.from_thread import start_blocking_portal

from neon_async.testing import LocalPostgres

HANG = 30.0  # seconds after which something that should have happened counts as a failure


def connect(server: LocalPostgres, folder: Path, **parameters: Any) -> psycopg.Connection[Any]:
    """Connect through libpq, which does not know neon_async. Verification is full unless `parameters` change it."""
    root = folder / f"root-{server.port}.crt"
    root.write_bytes(server.trust_anchor)
    defaults = {"sslmode": "verify-full", "sslrootcert": str(root), "connect_timeout": 10, "autocommit": True}
    return psycopg.connect(server.dsn, **{**defaults, **parameters})


def ask(server: LocalPostgres, folder: Path, query: str) -> Any:
    """Return the first column of the first row."""
    with connect(server, folder) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def postmaster(server: LocalPostgres, folder: Path) -> int:
    """Return the process id of the server."""
    return int(ask(server, folder, "SELECT pg_read_file('postmaster.pid')").split()[0])


def processes() -> dict[int, tuple[int, str, str]]:
    """Return parent, user id and command line of every process by its id. Zombies are left out."""
    listing = subprocess.check_output(["ps", "-A", "-ww", "-o", "pid=,ppid=,uid=,stat=,args="], text=True)
    rows = [line.split(None, 4) for line in listing.splitlines()]
    return {int(row[0]): (int(row[1]), row[2], row[4]) for row in rows if len(row) == 5 and not row[3].startswith("Z")}


def parent_of(pid: int) -> int:
    """Return the process id of the parent of `pid`."""
    return processes()[pid][0]


def wait_for(condition: Callable[[], object]) -> None:
    """Block until `condition` holds."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.001)


@contextlib.contextmanager
def running(server: LocalPostgres) -> Iterator[LocalPostgres]:
    """Run a server for a test that does not depend on the event loop."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@contextlib.contextmanager
def temporary_scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Set TMPDIR to a new folder. Unlike `tmp_path`, every user can enter it."""
    folder = Path(tempfile.mkdtemp(prefix="test-neon-async-"))
    folder.chmod(0o711)
    monkeypatch.setenv("TMPDIR", str(folder))
    try:
        yield Scene(folder)
    finally:
        shutil.rmtree(folder)


class Scene:
    """The temporary folder of one test's servers, and what can be observed of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = processes().keys()

    def traces(self, caller: int | None = None) -> list[str]:
        """Return the files and processes of servers of this scene, and the supervisors of the process `caller`.

        `caller` is this process by default.
        """
        folder, supervisor = str(self.folder), f"_supervisor.py {caller or os.getpid()}"
        commands = [command for pid, (_, _, command) in processes().items() if pid not in self._before]
        # At the end: the number of another caller may begin with this one.
        return [one for one in commands if folder in one or one.endswith(supervisor)] + self.files()

    def files(self, pattern: str = "*") -> list[str]:
        """Return the paths in the folder that match `pattern`."""
        return [str(path) for path in self.folder.glob(pattern)]
