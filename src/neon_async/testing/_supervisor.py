"""Run one local PostgreSQL in a process that owns its folder and its server, and removes both at the end.

`LocalPostgres` runs this file as a script, in a session of its own, with one end of a socket pair as standard input.
The script reads commands from it, one JSON object per line, one at a time, and answers each with one line. When the
socket closes or the parent process ends, the script terminates the server, removes the folder and ends. So nothing
remains, however the parent process ended. This script must not know certificates, event loops or neon_async: it imports
only the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT = 60.0  # seconds for initdb, and for a start: the default of pg_ctl (PGCTLTIMEOUT)
STOP_PATIENCE = 10.0  # seconds before a stronger signal; after SIGQUIT the postmaster itself needs up to 5
REMOVE_TIMEOUT = 5.0  # seconds until the last process no longer uses the folder
TICK = 0.005  # seconds between two checks of a process or a file during a wait
IDLE_TICK = 0.5  # seconds between two checks of the parent: its forked children can keep the socket open
LOG_LINES = 15
NOTHING = Path(os.devnull)

# The environment of the server: what programs need to find their libraries, and /bin/sh its commands. It contains
# nothing that could change the behaviour of the server (PGPORT, PGTZ, LC_*, OPENSSL_CONF, ...).
INHERITED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


class CallerGone(Exception):
    """The process that gives the commands has closed the socket or ended."""


class Failure(Exception):
    """A command could not be carried out. The text is sent to the caller."""


class Caller:
    """The process that gives the commands.

    It sends a command only after it has received the answer to the previous one. So while a command is being carried
    out, the socket becomes readable only when it is closed.
    """

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self._channel = channel
        self._pid = pid

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` and return whether data can be read.

        Raises:
            CallerGone: The caller has closed the socket or ended. It is raised at once.
        """
        readable, _, _ = select.select([self._channel], [], [], seconds)
        if os.getppid() != self._pid or (readable and not self._channel.recv(1, socket.MSG_PEEK)):
            raise CallerGone
        return bool(readable)

    def receive(self) -> dict[str, Any]:
        """Return the next command."""
        line = b""
        while not line.endswith(b"\n"):
            if self.wait(IDLE_TICK):
                line += self._channel.recv(65536)
        command: dict[str, Any] = json.loads(line)
        return command

    def send(self, answer: dict[str, Any]) -> None:
        """Send the answer to the latest command."""
        try:
            self._channel.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            raise CallerGone from None


class Server:
    """One PostgreSQL server in one temporary folder.

    The folder contains `data`, unless that is kept elsewhere, `log`, the files that the caller sent, such as
    postgresql.conf, and `pgsql` if the programs had to be copied. PostgreSQL refuses to run as root, so that under
    root its processes run as the user `nobody`. Then `nobody` owns `data` and root owns the folder: root never
    writes where another user could have created a link.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._account: pwd.struct_passwd | None = None
        self._folder: Path | None = None
        self._data = Path()
        self._is_kept = False
        self._bin_dir = Path()
        self._port_holder: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port: int | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def folder(self) -> Path:
        assert self._folder is not None
        return self._folder

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def initialise(
        self, bin_dir: str, user: str, password: str, database: str, kept_in: str | None, is_new: bool
    ) -> None:
        """Create the folder and, in it, the empty databases `database` and `postgres` of the superuser `user`.

        Args:
            bin_dir: The folder of the programs.
            user: The superuser.
            password: Of the superuser.
            database: A database besides `postgres`.
            kept_in: The folder whose `data` is used and not removed, or None for data in the temporary folder.
            is_new: Whether the data is to be created. What an interrupted attempt has left is removed.
        """
        self._account = unprivileged_account()
        self._folder = self._make_folder()
        self.log.touch(mode=0o600)
        self._bin_dir = self._usable_bin_dir(Path(bin_dir))
        self.port = self._choose_port()
        self._data = Path(kept_in or self._folder) / "data"
        self._is_kept = kept_in is not None
        if kept_in is not None and self._account and not self._can_run(["/bin/sh", "-c", 'cd "$0"', kept_in]):
            raise Failure(
                f"As root, PostgreSQL has to run as the user 'nobody', which cannot enter {kept_in}. "
                "Choose a folder that every user can enter."
            )
        if is_new:
            self._create_databases(user, password, database)
        elif not self._data.is_dir():
            raise Failure(f"The data is missing: {self._data}. Remove {kept_in} to start with a new database.")

    def _create_databases(self, user: str, password: str, database: str) -> None:
        data = self._data
        if data.exists():
            shutil.rmtree(data)
        data.mkdir(mode=0o700)
        self._change_owner(data)
        password_file = self._write("password", password)
        initdb: list[str | Path] = [self._bin_dir / "initdb", "-D", data]
        initdb += [f"--username={user}", f"--pwfile={password_file}"]
        initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--locale-provider=libc", "--no-sync"]
        self._run("`initdb`", initdb)
        # Single-user mode needs no network.
        single: list[str | Path] = [self._bin_dir / "postgres", "--single", "-D", data]
        single += ["-c", "fsync=off", "-c", "exit_on_error=on", "template1"]
        statement = self._write("statement", f'CREATE DATABASE "{database}"\n')
        self._run("`postgres --single`", single, statement)
        for path in (password_file, statement):
            path.unlink()

    def start(self, files: dict[str, str]) -> None:
        """Write `files`, start the server, and wait until it accepts connections.

        Args:
            files: The text of each file by its name in the folder.
        """
        if self.is_running:
            raise Failure("The server is already running.")
        for name, text in files.items():
            self._write(name, text)
        postgres: list[str | Path] = [self._bin_dir / "postgres", "-D", self.folder, "-p", str(self.port)]
        paths = {
            "data_directory": self._data,
            "ssl_cert_file": self.folder / "server.crt",
            "ssl_key_file": self.folder / "server.key",
        }
        postgres += [argument for name, path in paths.items() for argument in ("-c", f"{name}={path}")]
        self._process = self._spawn(postgres, NOTHING, self.log)
        self._wait_until("The start of the server", lambda: self._is_ready() or not self.is_running)
        if not self.is_running:
            self._process = None
            raise Failure(f"The server did not start. {self._log_tail()}")

    def stop(self) -> None:
        """Stop the server as `pg_ctl stop --mode=fast` does: clients get SQLSTATE 57P01, and the data is kept."""
        if self._process is None:
            raise Failure("The server is already stopped.")
        if not self.is_running:
            status, self._process = self._process.returncode, None
            raise Failure(f"The server had already ended, with status {status}. {self._log_tail()}")
        self._end_server(signal.SIGINT, signal.SIGQUIT)

    def remove(self) -> None:
        """Terminate the server and remove the folder.

        Raises:
            OSError: The folder cannot be removed.
        """
        # Kept data gets its shutdown checkpoint, so that the next start needs no recovery.
        self._end_server(*([signal.SIGINT] if self._is_kept else []), signal.SIGQUIT)
        deadline = time.monotonic() + REMOVE_TIMEOUT
        while self._folder is not None and self._folder.exists():
            # A process that is about to end can add a file while the folder is being removed.
            shutil.rmtree(self._folder, ignore_errors=time.monotonic() < deadline)
            time.sleep(TICK)

    def _make_folder(self) -> Path:
        if self._account is None:
            return Path(tempfile.mkdtemp(prefix="neon-async-"))
        # TMPDIR can be inside a folder that the user `nobody` cannot enter, such as /root.
        for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp makes the folder in it
            if self._can_run(["/bin/sh", "-c", 'cd "$0"', parent]):
                folder = Path(tempfile.mkdtemp(prefix="neon-async-", dir=parent))
                folder.chmod(0o711)
                return folder
        raise Failure(
            "As root, PostgreSQL has to run as the user 'nobody', which cannot enter any of the temporary folders. "
            "Set TMPDIR to a folder that every user can enter."
        )

    def _usable_bin_dir(self, bin_dir: Path) -> Path:
        if self._account is None or self._can_run([bin_dir / "postgres", "--version"]):
            return bin_dir
        # The programs are inside a folder that `nobody` cannot enter, such as /root. They find lib and share relative
        # to themselves, so that a copy of the three works anywhere.
        prefix = self.folder / "pgsql"
        (prefix / "bin").mkdir(parents=True)
        for name in ("bin/initdb", "bin/postgres", "lib", "share"):
            copy(bin_dir.parent / name, prefix / name)
        return prefix / "bin"

    def _choose_port(self) -> int:
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        # On Linux this bound socket, which does not listen, reserves the port while the server is stopped. The server
        # also sets SO_REUSEADDR and can still listen on the port. On other systems it could not.
        if sys.platform == "linux":
            self._port_holder = holder
        else:
            holder.close()
        return port

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
        self._change_owner(path)
        return path

    def _change_owner(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _spawn(self, command: Sequence[str | Path], stdin: Path, output: Path) -> subprocess.Popen[bytes]:
        account: dict[str, Any] = {}
        if self._account is not None:
            account = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
        environment = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        environment |= {"LC_ALL": "C", "TZ": "UTC"}
        icu_data = self._bin_dir.parent / "share" / "icu"
        if icu_data.is_dir():  # the wheel for musl contains the data of ICU as files
            environment["ICU_DATA"] = str(icu_data)
        with stdin.open("rb") as reader, output.open("ab") as writer:
            return subprocess.Popen(
                command,
                stdin=reader,
                stdout=writer,
                stderr=writer,
                cwd=self._folder or "/",
                env=environment,
                process_group=0,
                **account,
            )

    def _can_run(self, command: Sequence[str | Path]) -> bool:
        try:
            process = self._spawn(command, NOTHING, NOTHING)
        except OSError as error:
            if error.errno == errno.EACCES:
                return False
            raise Failure(
                f"As root, PostgreSQL has to run as the user 'nobody', and that is impossible here: {error}"
            ) from error
        return process.wait(START_TIMEOUT) == 0

    def _run(self, name: str, command: Sequence[str | Path], stdin: Path = NOTHING) -> None:
        process = self._spawn(command, stdin, self.log)
        try:
            self._wait_until(name, lambda: process.poll() is not None)
        finally:
            # On SIGINT, unlike on SIGTERM and SIGKILL, initdb and its children release their shared memory. initdb
            # ignores the signal while it waits in system(3), so that it is sent repeatedly.
            end(process, os.killpg, [signal.SIGINT] * 40, STOP_PATIENCE / 40)
        if process.returncode != 0:
            raise Failure(f"{name} ended with status {process.returncode}. {self._log_tail()}")

    def _wait_until(self, name: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise Failure(f"{name} took longer than {START_TIMEOUT:g} s. {self._log_tail()}")
            self._caller.wait(TICK)

    def _is_ready(self) -> bool:
        # The eighth line of the lock file is the postmaster's status, which pg_ctl --wait reads, too.
        assert self._process is not None
        with contextlib.suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return lines[:1] == [str(self._process.pid)] and lines[7:8] == ["ready   "]
        return False

    def _end_server(self, *numbers: signal.Signals) -> None:
        if self._process is not None:
            end(self._process, os.kill, numbers, STOP_PATIENCE)
        self._process = None

    def _log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["The end of the log:", *lines[-LOG_LINES:]])


def unprivileged_account() -> pwd.struct_passwd | None:
    """Return the account that PostgreSQL has to run under if this process runs as root, or else None."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise Failure(
            "As root, PostgreSQL has to run as the user 'nobody', and this system does not have that user. "
            "Run the tests as another user than root."
        ) from None


def end(
    process: subprocess.Popen[bytes],
    send: Callable[[int, int], None],
    numbers: Sequence[signal.Signals],
    patience: float,
) -> None:
    """Send the signals `numbers` and then SIGKILL, `patience` seconds apart, until the process ends."""
    for number in (*numbers, signal.SIGKILL):
        if process.poll() is None:
            send(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a tree so that every user can read and run it, whatever the modes of the original."""
    if source.is_dir():
        target.mkdir()
        for child in source.iterdir():
            copy(child, target / child.name)
    else:
        shutil.copyfile(source, target)
        target.chmod(0o755)


def carry_out(server: Server, command: str, **arguments: Any) -> dict[str, Any]:
    """Carry out one command and return the answer: the state of the server, and the error if the command failed."""
    methods: dict[str, Callable[..., None]] = {
        "initialise": server.initialise,
        "start": server.start,
        "stop": server.stop,
    }
    error = None
    try:
        methods[command](**arguments)
    except (Failure, OSError) as failure:
        error = str(failure)
    return {"port": server.port, "running": server.is_running, "error": error}


def main() -> None:
    """Serve the caller until it ends, then remove everything."""
    os.umask(0o022)
    channel = socket.socket(fileno=0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        # `Caller.wait` then sees the end of the socket, so that the signal never interrupts a step halfway.
        signal.signal(number, lambda *_: channel.shutdown(socket.SHUT_RDWR))
    # A shell without job control has what it starts in the background ignore SIGQUIT. A server that inherited that
    # would not notice the signal until it has a handler of its own.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    caller = Caller(channel, int(sys.argv[1]))
    server = Server(caller)
    try:
        while True:
            caller.send(carry_out(server, **caller.receive()))
    except CallerGone:
        server.remove()


if __name__ == "__main__":
    main()
