"""`LocalPgBouncer`: a real PgBouncer in front of a `LocalPostgres`, like Neon's pooled host in front of a compute.

It uses `LocalPostgres` and its certificates, and nothing else of the package under test.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import psycopg
from psycopg.rows import DictRow, dict_row

from neon_async.testing import LocalPostgres
from neon_async.testing._certificates import issue_certificates

__all__ = ("MINIMUM_VERSION", "LocalPgBouncer", "installed_version")

MINIMUM_VERSION = (1, 21)  # the first with prepared statements in transaction mode
_PATIENCE = 20.0  # Seconds in which PgBouncer must start.
_TICK = 0.002  # Seconds between two reads of the log.

# A shell owns the process and the folder, and lives as long as its standard input is open: both are removed even when
# the tests are killed. The line `start` starts PgBouncer; any other line is the name of a signal that ends it.
_OWNER = """
cd "$FOLDER" || exit
while read -r command; do
    if [ "$command" = start ]; then
        "$@" </dev/null >>log 2>&1 & pid=$!
    else
        kill -s "$command" "$pid"
        wait "$pid"
        pid=
    fi
    echo "pid:$pid"
done
[ -z "$pid" ] || kill -s KILL "$pid"
wait
rm -rf "$FOLDER"
"""


def installed_version() -> tuple[int, int] | None:
    """Return the version of the `pgbouncer` on PATH, such as (1, 24), or None if there is none."""
    try:
        output = subprocess.run(["pgbouncer", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    match = re.match(r"PgBouncer (\d+)\.(\d+)", output)
    return match and (int(match[1]), int(match[2]))


class LocalPgBouncer:
    """A PgBouncer in transaction mode on a free port of 127.0.0.1, which runs inside one `async with` block.

    Clients connect over TLS 1.3 only and log in with SCRAM-SHA-256, as the user of `server` and with the SCRAM secret
    that the server stores for this user. PgBouncer does not support channel binding. The certificate names the pooled
    host of the server's endpoint and `localhost`; its authority is created for this PgBouncer alone. The connections to
    the server use TLS, too, verified against the server's trust anchor. If the tests run as root, PgBouncer runs as the
    user `nobody`. Process and folder are removed at the end of the block, and when this process is killed. An object
    can be entered only once.

    Args:
        server: The running server that PgBouncer connects to.
        max_prepared_statements: How many statements PgBouncer keeps on each server connection. 0 turns this off.
        default_pool_size: The limit of server connections for each pair of user and database.
        settings: Names and values for the section `[pgbouncer]` of the configuration. They override all others.
    """

    def __init__(
        self,
        server: LocalPostgres,
        *,
        max_prepared_statements: int = 200,
        default_pool_size: int = 20,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.host = server.host.replace(".", "-pooler.", 1)
        self.port = 0
        self.trust_anchor = b""
        self._server = server
        self._settings = {
            "max_prepared_statements": str(max_prepared_statements),
            "default_pool_size": str(default_pool_size),
            **(settings or {}),
        }
        self.folder = Path()
        self.pid: int | None = None  # None while PgBouncer is stopped
        self._owner: subprocess.Popen[str] | None = None
        self._port_holder = socket.socket()

    def __repr__(self) -> str:
        return f"<LocalPgBouncer 127.0.0.1:{self.port}: {'running' if self.pid else 'stopped'}>"

    @property
    def dsn(self) -> str:
        """The connection string. Its host can be verified only with `trust_anchor`.

        It contains `sslnegotiation=postgres`: up to version 1.24 PgBouncer reads the first bytes of direct TLS as the
        start of a long message and waits for the rest. On Neon the proxy in front of PgBouncer supports direct TLS.
        """
        url = urlsplit(self._server.dsn)
        credentials, _, _ = url.netloc.rpartition("@")
        query = f"{url.query}&sslnegotiation=postgres"
        return url._replace(netloc=f"{credentials}@{self.host}:{self.port}", query=query).geturl()

    @property
    def log(self) -> str:
        """The log of PgBouncer so far."""
        return (self.folder / "log").read_text()

    async def __aenter__(self) -> Self:
        """Start PgBouncer, which takes a tenth of a second.

        Raises:
            RuntimeError: PgBouncer does not start. The message contains its log.
        """
        try:
            await anyio.to_thread.run_sync(self._set_up)
            await self.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def start(self) -> None:
        """Start PgBouncer again on the same port after `stop()` or `kill()`. Return when it accepts connections."""
        await anyio.to_thread.run_sync(self._start)

    async def stop(self) -> None:
        """End PgBouncer at once with SIGQUIT, its signal for that. Return when it has ended."""
        await anyio.to_thread.run_sync(self._send, "QUIT")

    async def kill(self) -> None:
        """End PgBouncer with SIGKILL. Return when it has ended."""
        await anyio.to_thread.run_sync(self._send, "KILL")

    async def admin(self, command: str) -> list[DictRow]:
        """Run a command on PgBouncer's admin console and return its rows.

        `RECONNECT` replaces each server connection when no client uses it. `SHOW POOLS`, `SHOW SERVERS` and
        `SHOW CLIENTS` list what exists. PgBouncer's documentation describes `PAUSE`, `RESUME`, `KILL neondb` and more.
        """
        return await anyio.to_thread.run_sync(self._admin, command)

    # The functions below block and run in a thread.

    def _set_up(self) -> None:
        # This socket is bound and does not listen: it reserves the port while PgBouncer is stopped, and PgBouncer can
        # still listen on it.
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_holder.bind(("127.0.0.1", 0))
        self.port = self._port_holder.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="neon-async-pgbouncer-"))
        self.folder.chmod(0o711)
        command = ["pgbouncer", *(["-u", "nobody"] if os.geteuid() == 0 else []), "pgbouncer.ini"]
        self._owner = subprocess.Popen(
            ["/bin/sh", "-c", _OWNER, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "FOLDER": str(self.folder)},
            start_new_session=True,  # Ctrl-C at the terminal must reach the tests only
        )
        certificates = issue_certificates(self.host, "localhost")
        self.trust_anchor = certificates.trust_anchor.encode()
        self._write("server-ca.crt", self._server.trust_anchor.decode())
        self._write("client-ca.crt", certificates.trust_anchor)
        self._write("client.crt", certificates.chain)
        self._write("client.key", certificates.key)
        self._write("users.txt", f'"{urlsplit(self._server.dsn).username}" "{self._scram_secret()}"\n')
        self._write("pgbouncer.ini", self._configuration())

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        if os.geteuid() == 0:
            shutil.chown(path, "nobody")

    def _scram_secret(self) -> str:
        """Return the SCRAM secret that the server stores: a plain password would get a new salt at each start."""
        with psycopg.connect(
            self._server.dsn, sslmode="verify-full", sslrootcert=str(self.folder / "server-ca.crt")
        ) as connection:
            (secret,) = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = current_user").fetchall()
        return str(secret[0])

    def _configuration(self) -> str:
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "auth_type": "scram-sha-256",
            "auth_file": "users.txt",
            "admin_users": str(urlsplit(self._server.dsn).username),
            "client_tls_sslmode": "require",
            "client_tls_protocols": "tlsv1.3",
            "client_tls_cert_file": "client.crt",
            "client_tls_key_file": "client.key",
            "server_tls_sslmode": "verify-ca",
            "server_tls_ca_file": "server-ca.crt",
            "max_client_conn": "1000",
            "ignore_startup_parameters": "extra_float_digits",  # as on Neon (compute/etc/pgbouncer.ini)
            **self._settings,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        databases = f"* = host=127.0.0.1 port={self._server.port}"
        return "\n".join(["[databases]", databases, "[pgbouncer]", *lines, ""])

    def _start(self) -> None:
        (self.folder / "log").write_text("")
        self._send("start")
        deadline = time.monotonic() + _PATIENCE
        while "process up" not in self.log:
            if "FATAL" in self.log or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer does not start. {self.log}")
            time.sleep(_TICK)

    def _send(self, command: str) -> None:
        assert self._owner is not None
        assert self._owner.stdin is not None
        assert self._owner.stdout is not None
        self._owner.stdin.write(f"{command}\n")
        self._owner.stdin.flush()
        answer = self._owner.stdout.readline().strip()
        if not answer.startswith("pid:"):
            raise RuntimeError("the shell that owns PgBouncer has ended")
        self.pid = int(answer.removeprefix("pid:") or 0) or None

    def _admin(self, command: str) -> list[DictRow]:
        with psycopg.connect(
            urlsplit(self.dsn)._replace(path="/pgbouncer").geturl(),
            sslmode="verify-full",
            sslrootcert=str(self.folder / "client-ca.crt"),
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,  # the console supports the simple query protocol only
            row_factory=dict_row,
        ) as console:
            cursor = console.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    async def _close(self) -> None:
        self._port_holder.close()
        if self._owner is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._owner.communicate)
            self.pid = None
