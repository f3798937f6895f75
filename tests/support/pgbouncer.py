"""`LocalPgBouncer`: a `LocalPooler` whose admin console, process and folder the tests reach."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import anyio.to_thread
import psycopg
from psycopg.rows import DictRow, dict_row

from neon_async.testing import LocalPooler, LocalPostgres
from neon_async.testing._local_pooler import MINIMUM_VERSION, installed_version

__all__ = ("MINIMUM_VERSION", "LocalPgBouncer", "installed_version")


class LocalPgBouncer(LocalPooler):
    """A `LocalPooler` for tests of PgBouncer itself.

    Args:
        server: The running server that PgBouncer connects to.
        max_prepared_statements: How many statements PgBouncer keeps on each server connection. 0 turns this off.
        default_pool_size: The limit of server connections for each pair of user and database.
        settings: Other settings.
    """

    def __init__(
        self,
        server: LocalPostgres,
        *,
        max_prepared_statements: int = 200,
        default_pool_size: int = 20,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        sizes = {
            "max_prepared_statements": str(max_prepared_statements),
            "default_pool_size": str(default_pool_size),
        }
        super().__init__(server, settings={**sizes, **(settings or {})})

    @property
    def pid(self) -> int | None:
        """The process of PgBouncer, or None while it is stopped."""
        return self._pid

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self._folder

    @property
    def log(self) -> str:
        """The log of PgBouncer so far."""
        return (self.folder / "log").read_text()

    async def kill(self) -> None:
        """End PgBouncer with SIGKILL. Return when it has ended."""
        await anyio.to_thread.run_sync(self._send, "KILL")

    async def admin(self, command: str) -> list[DictRow]:
        """Run a command on PgBouncer's admin console and return its rows.

        `RECONNECT` replaces each server connection when no client uses it. `SHOW POOLS`, `SHOW SERVERS` and
        `SHOW CLIENTS` list what exists. PgBouncer's documentation describes `PAUSE`, `RESUME`, `KILL neondb` and more.
        """
        return await anyio.to_thread.run_sync(self._admin, command)

    def _admin(self, command: str) -> list[DictRow]:
        with psycopg.connect(
            urlsplit(self.dsn)._replace(path="/pgbouncer").geturl(),
            sslmode="verify-full",
            sslrootcert=str(self.folder / "server-ca.crt"),
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,  # the console supports the simple query protocol only
            row_factory=dict_row,
        ) as console:
            cursor = console.execute(command.encode())
            return cursor.fetchall() if cursor.description else []
