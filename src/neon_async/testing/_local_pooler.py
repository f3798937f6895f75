"""`LocalPooler`: a real PgBouncer in front of a `LocalPostgres`, as on Neon's pooled host.

It runs the `pgbouncer` that is on PATH. This module must not know pools or parameters: clients read `dsn` and
`trust_anchor`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from .._errors import ConfigurationError, NeonAsyncError
from ._local_postgres import POOLED_HOST, LocalPostgres

MINIMUM_VERSION = (1, 21)  # the first with prepared statements in transaction mode

_ADDRESS = "127.0.0.1"
_START_TIMEOUT = 20.0  # seconds
_TICK = 0.002  # seconds between two reads of the log

# This class promises these. `settings=` cannot change them.
_PROMISES = {
    "listen_addr": _ADDRESS,
    "unix_socket_dir": "",
    "auth_type": "scram-sha-256",
    "auth_file": "users.txt",
    "client_tls_sslmode": "require",
    "client_tls_protocols": "tlsv1.3",
    "client_tls_cert_file": "client.crt",
    "client_tls_key_file": "client.key",
    "server_tls_sslmode": "verify-ca",
    "server_tls_ca_file": "server-ca.crt",
}
_RESERVED = frozenset({*_PROMISES, "listen_port"})
_DEFAULTS = {
    "pool_mode": "transaction",
    "max_prepared_statements": "200",
    "default_pool_size": "20",
    "max_client_conn": "1000",
    "ignore_startup_parameters": "extra_float_digits",  # as on Neon (compute/etc/pgbouncer.ini)
}

# A shell owns the process and the folder, and lives as long as its standard input is open: both are removed even when
# this process is killed. The line `start` starts PgBouncer; any other line is the name of a signal that ends it.
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


class LocalPoolerError(NeonAsyncError, RuntimeError):
    """`LocalPooler` could not start, stop or find PgBouncer. The message includes its log where there is one."""


def installed_version() -> tuple[int, int] | None:
    """Return the version of the `pgbouncer` on PATH, such as (1, 24), or None if there is none."""
    try:
        output = subprocess.run(
            ["pgbouncer", "--version"],  # noqa: S607 - the one on PATH is what is asked for
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        return None
    match = re.match(r"PgBouncer (\d+)\.(\d+)", output)
    return match and (int(match[1]), int(match[2]))


class LocalPooler:
    """A PgBouncer in transaction mode that exists for the duration of the `async with` block.

    It stands in front of a `LocalPostgres`, as PgBouncer stands in front of a compute on Neon's pooled host: `host` is
    the pooled name of the same endpoint. Clients need TLS 1.3 and log in with SCRAM-SHA-256, as the user of the server
    and with its password. PgBouncer does not support channel binding. The certificate and `trust_anchor` are those of
    the server, to which PgBouncer connects over verified TLS.

        async with LocalPostgres() as server, LocalPooler(server) as pooler:
            async with neon_async.create_pool(pooler.dsn, trust_anchor=pooler.trust_anchor) as pool:
                ...

    It needs PgBouncer 1.21 or later on PATH, the extra `testing`, and Linux or macOS. It works on asyncio and uvloop.
    It ends when this process is killed, too. Under root, PgBouncer runs as the user `nobody`. An object can be entered
    once.

    Args:
        server: The server that PgBouncer connects to. It must be running when the block is entered.
        settings: Names and values for the section `[pgbouncer]` of its configuration, such as
            `{"default_pool_size": "5"}`. Settings on which the description above depends are refused.

    Raises:
        ConfigurationError: `settings` contains a refused setting.
    """

    def __init__(self, server: LocalPostgres, *, settings: Mapping[str, str] | None = None) -> None:
        self._settings = {name.lower(): value for name, value in (settings or {}).items()}
        reserved = sorted(_RESERVED.intersection(self._settings))
        if reserved:
            raise ConfigurationError(f"LocalPooler sets {', '.join(reserved)} itself. Remove that from settings=.")
        self._server = server
        self._folder = Path()
        self._port = 0
        self._port_holder = socket.socket()
        self._owner: subprocess.Popen[str] | None = None
        self._pid: int | None = None  # None while PgBouncer is stopped
        self._closed = False

    def __repr__(self) -> str:
        state = "new"
        if self._owner is not None:
            state = "closed" if self._closed else "running" if self._pid else "stopped"
        place = f" on {_ADDRESS}:{self._port}" if self._port else ""
        return f"<LocalPooler{place}: {state}>"

    @property
    def host(self) -> str:
        """The pooled host name of the server's endpoint. PgBouncer listens on 127.0.0.1."""
        return POOLED_HOST

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1. It stays the same across `stop()` and `start()`.

        Raises:
            LocalPoolerError: The `async with` block is not entered, or has been left.
        """
        self._require_open()
        return self._port

    @property
    def dsn(self) -> str:
        """The connection string of the server with the pooled host and the port of PgBouncer.

        It contains `sslnegotiation=postgres`: up to version 1.24 PgBouncer reads the first bytes of direct TLS as the
        start of a long message and waits for the rest. On Neon the proxy in front of PgBouncer supports direct TLS.

        Raises:
            LocalPoolerError: The `async with` block is not entered, or has been left.
        """
        self._require_open()
        url = urlsplit(self._server.dsn)
        credentials, _, _ = url.netloc.rpartition("@")
        query = f"{url.query}&sslnegotiation=postgres"
        return url._replace(netloc=f"{credentials}@{self.host}:{self._port}", query=query).geturl()

    @property
    def trust_anchor(self) -> bytes:
        """The PEM certificate of the authority that issued the certificate: that of the server."""
        return self._server.trust_anchor

    async def __aenter__(self) -> Self:
        """Start PgBouncer, which takes a tenth of a second.

        Raises:
            LocalPoolerError: PgBouncer 1.21 or later is not on PATH or does not start, or this object was entered
                before.
            LocalPostgresError: The server is not there.
        """
        if self._owner is not None or self._closed:
            raise LocalPoolerError("A LocalPooler can be entered only once. Create a new one.")
        try:
            await anyio.to_thread.run_sync(_require_pgbouncer)
            secret = await _scram_secret(self._server)
            await anyio.to_thread.run_sync(self._set_up, secret)
            await self.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Terminate PgBouncer and remove everything that belongs to it."""
        await self._close()

    async def start(self) -> None:
        """Start PgBouncer again after `stop()`, and return when it accepts connections.

        Raises:
            LocalPoolerError: It is running or does not start, or the `async with` block has been left.
        """
        self._require_open()
        if self._pid is not None:
            raise LocalPoolerError("PgBouncer is already running.")
        await anyio.to_thread.run_sync(self._start)

    async def stop(self) -> None:
        """End PgBouncer at once (SIGQUIT), and return when it has ended. Its clients lose their connections.

        Raises:
            LocalPoolerError: It is stopped, or the `async with` block has been left.
        """
        self._require_open()
        if self._pid is None:
            raise LocalPoolerError("PgBouncer is already stopped.")
        await anyio.to_thread.run_sync(self._send, "QUIT")

    def _require_open(self) -> None:
        if self._closed:
            raise LocalPoolerError("This LocalPooler is closed and its PgBouncer has ended. Create a new one.")
        if self._owner is None:
            raise LocalPoolerError("This LocalPooler has no PgBouncer yet. Enter it with `async with` first.")

    # The functions below block and run in a thread.

    def _set_up(self, secret: str) -> None:
        # On Linux this socket, which is bound and does not listen, reserves the port while PgBouncer is stopped, and
        # PgBouncer can still listen on it. On other systems it could not.
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_holder.bind((_ADDRESS, 0))
        self._port = self._port_holder.getsockname()[1]
        if sys.platform != "linux":
            self._port_holder.close()
        self._folder = Path(tempfile.mkdtemp(prefix="neon-async-pgbouncer-"))
        self._folder.chmod(0o711)
        command = ["pgbouncer", *(["-u", "nobody"] if os.geteuid() == 0 else []), "pgbouncer.ini"]
        self._owner = subprocess.Popen(
            ["/bin/sh", "-c", _OWNER, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "FOLDER": str(self._folder)},
            start_new_session=True,  # Ctrl-C at the terminal must reach this process only
        )
        certificates = self._server._issued()
        self._write("server-ca.crt", certificates.trust_anchor)
        self._write("client.crt", certificates.chain)
        self._write("client.key", certificates.key)
        self._write("users.txt", f'"{urlsplit(self._server.dsn).username}" "{secret}"\n')
        self._write("pgbouncer.ini", self._configuration())

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        if os.geteuid() == 0:
            shutil.chown(path, "nobody")

    def _configuration(self) -> str:
        settings = {
            **_DEFAULTS,
            "admin_users": str(urlsplit(self._server.dsn).username),
            **self._settings,
            **_PROMISES,
            "listen_port": str(self._port),
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        databases = f"* = host={_ADDRESS} port={self._server.port}"
        return "\n".join(["[databases]", databases, "[pgbouncer]", *lines, ""])

    def _start(self) -> None:
        log = self._folder / "log"
        log.write_text("")
        self._send("start")
        deadline = time.monotonic() + _START_TIMEOUT
        while "process up" not in (text := log.read_text()):
            if "FATAL" in text or time.monotonic() > deadline:
                raise LocalPoolerError(f"PgBouncer does not start. Its log:\n{text}")
            time.sleep(_TICK)

    def _send(self, command: str) -> None:
        assert self._owner is not None
        assert self._owner.stdin is not None
        assert self._owner.stdout is not None
        try:
            self._owner.stdin.write(f"{command}\n")
            self._owner.stdin.flush()
        except BrokenPipeError:
            pass  # there is no answer, either
        answer = self._owner.stdout.readline().strip()
        if not answer.startswith("pid:"):
            raise LocalPoolerError("The process that owned PgBouncer has ended, and PgBouncer with it.")
        self._pid = int(answer.removeprefix("pid:") or 0) or None

    async def _close(self) -> None:
        self._closed = True
        self._port_holder.close()
        if self._owner is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._owner.communicate)
            self._pid = None


def _require_pgbouncer() -> None:
    found = installed_version()
    if found is None or found < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        here = "there is none" if found is None else f"the one there is {found[0]}.{found[1]}"
        raise LocalPoolerError(
            f"LocalPooler needs PgBouncer {wanted} or later on PATH, and {here}. "
            "Install it with the package manager of the system, such as `apt install pgbouncer` or "
            "`brew install pgbouncer`."
        )


async def _scram_secret(server: LocalPostgres) -> str:
    """Return the SCRAM secret that the server stores: a plain password would get a new salt at each start."""
    from .._driver.connect import connect

    connection = await connect(server.dsn, trust_anchor=server.trust_anchor, sslmode="verify-full")
    try:
        secret: str = await connection.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = current_user")
    finally:
        connection.terminate()
    return secret
