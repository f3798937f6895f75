"""The process that owns one local PostgreSQL: its folder, its server, and the end of both.

`LocalPostgres` runs this file as a script, in a session of its own, with one end of a socket pair as standard input. It
takes commands from there, one JSON object per line, one at a time, and answers each with one line. When the socket
ends, or the parent process is gone, it stops the server, removes the folder and ends: however the caller died, nothing
stays behind. It imports the standard library alone and knows nothing of certificates, event loops or neon_async.
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

START_TIMEOUT = 60.0  # Seconds for initdb, and for a start: pg_ctl waits as long (PGCTLTIMEOUT).
STOP_PATIENCE = 10.0  # Seconds before a ruder signal. After SIGQUIT the postmaster itself needs up to 5.
REMOVE_TIMEOUT = 5.0  # Seconds for the last process to let go of the folder.
TICK = 0.005  # Seconds between two looks at a process or a file that somebody is waiting for.
IDLE_TICK = 0.5  # Seconds between two looks at the parent: forked children of it can keep the socket open.
LOG_LINES = 15
NOTHING = Path(os.devnull)

# The environment of the server: what a binary may need to find its libraries and /bin/sh its commands, and nothing that
# could change what the server does (PGPORT, PGTZ, LC_*, OPENSSL_CONF, ...).
INHERITED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


class CallerGone(Exception):
    """The process we work for has closed the socket or ended."""


class Failure(Exception):
    """A command could not be carried out. The text goes to the caller."""


class Caller:
    """The process we work for.

    A command is sent only after the one before it was answered, so while one is being carried out the socket is
    readable for one reason alone: its end.
    """

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self._channel = channel
        self._pid = pid

    def wait(self, seconds: float) -> bool:
        """Wait until something can be read, for at most `seconds`. Raise `CallerGone` as soon as nobody is there."""
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

    The folder holds `data`, the files the caller gave (postgresql.conf among them), `log`, and, if the programs had to
    be copied, `pgsql`. PostgreSQL refuses to run as root, so under root its processes run as the user `nobody`. `data`
    then belongs to `nobody` and the folder to root: root never writes where another user could have put a link.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._account: pwd.struct_passwd | None = None
        self._folder: Path | None = None
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

    def initialise(self, bin_dir: str, user: str, password: str, database: str) -> None:
        """Make the folder and, in it, an empty database `database` of the superuser `user`."""
        self._account = unprivileged_account()
        self._folder = self._make_folder()
        self.log.touch(mode=0o600)
        self._bin_dir = self._usable_bin_dir(Path(bin_dir))
        self.port = self._choose_port()
        data = self._folder / "data"
        data.mkdir(mode=0o700)
        self._give_away(data)
        password_file = self._write("password", password)
        initdb: list[str | Path] = [self._bin_dir / "initdb", "-D", data]
        initdb += [f"--username={user}", f"--pwfile={password_file}"]
        initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--locale-provider=libc", "--no-sync"]
        self._run("initdb", initdb)
        # Renaming is three times as fast as CREATE DATABASE, and a server without clients needs no network for it.
        single: list[str | Path] = [self._bin_dir / "postgres", "--single", "-D", data]
        single += ["-c", "fsync=off", "-c", "exit_on_error=on", "template1"]
        statement = self._write("statement", f'ALTER DATABASE postgres RENAME TO "{database}"\n')
        self._run("postgres --single", single, statement)
        for path in (password_file, statement):
            path.unlink()

    def start(self, files: dict[str, str]) -> None:
        """Write `files` (a name in the folder to a text), start the server and wait until it takes connections."""
        if self.is_running:
            raise Failure("the server is already running")
        for name, text in files.items():
            self._write(name, text)
        postgres: list[str | Path] = [self._bin_dir / "postgres", "-D", self.folder, "-p", str(self.port)]
        self._process = self._spawn(postgres, NOTHING, self.log)
        self._wait_until("the start of the server", lambda: self._is_ready() or not self.is_running)
        if not self.is_running:
            self._process = None
            raise Failure(f"the server did not start. {self._log_tail()}")

    def stop(self) -> None:
        """Stop the server as `pg_ctl stop --mode=fast` does: clients are told (SQLSTATE 57P01), data are kept."""
        if self._process is None:
            raise Failure("the server is already stopped")
        if not self.is_running:
            status, self._process = self._process.returncode, None
            raise Failure(f"the server had already ended, with status {status}. {self._log_tail()}")
        self._end_server(signal.SIGINT, signal.SIGQUIT)

    def discard(self) -> None:
        """End the server without ceremony and remove the folder. Raises `OSError` if that is impossible."""
        self._end_server(signal.SIGQUIT)
        deadline = time.monotonic() + REMOVE_TIMEOUT
        while self._folder is not None and self._folder.exists():
            # A process that is still on its way out can add a file behind the one who removes.
            shutil.rmtree(self._folder, ignore_errors=time.monotonic() < deadline)
            time.sleep(TICK)

    def _make_folder(self) -> Path:
        if self._account is None:
            return Path(tempfile.mkdtemp(prefix="neon-async-"))
        # TMPDIR can lie below a folder that is closed to the demoted processes, such as /root.
        for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp makes the folder in it
            if self._can_run(["/bin/sh", "-c", 'cd "$0"', parent]):
                folder = Path(tempfile.mkdtemp(prefix="neon-async-", dir=parent))
                folder.chmod(0o711)
                return folder
        raise Failure(
            "running as root, PostgreSQL's processes run as the user 'nobody', who can enter none of the temporary "
            "folders. Set TMPDIR to a folder that every user can enter"
        )

    def _usable_bin_dir(self, bin_dir: Path) -> Path:
        if self._account is None or self._can_run([bin_dir / "postgres", "--version"]):
            return bin_dir
        # The programs lie below a folder that is closed to `nobody`, /root for one. They find lib and share relative to
        # themselves, so a copy of the three works anywhere.
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
        # On Linux a port that is bound and does not listen stays ours while the server is stopped, and the server,
        # which sets SO_REUSEADDR too, can still listen on it. Elsewhere it could not.
        if sys.platform == "linux":
            self._port_holder = holder
        else:
            holder.close()
        return port

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
        self._give_away(path)
        return path

    def _give_away(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _spawn(self, command: Sequence[str | Path], stdin: Path, output: Path) -> subprocess.Popen[bytes]:
        account: dict[str, Any] = {}
        if self._account is not None:
            account = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
        environment = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        environment |= {"LC_ALL": "C", "TZ": "UTC"}
        icu_data = self._bin_dir.parent / "share" / "icu"
        if icu_data.is_dir():  # The wheel for musl brings ICU's data as files.
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
                "running as root, PostgreSQL's programs have to run as the user 'nobody', and that is impossible here: "
                f"{error}"
            ) from error
        return process.wait(START_TIMEOUT) == 0

    def _run(self, name: str, command: Sequence[str | Path], stdin: Path = NOTHING) -> None:
        process = self._spawn(command, stdin, self.log)
        try:
            self._wait_until(name, lambda: process.poll() is not None)
        finally:
            # On SIGINT, unlike on SIGTERM and SIGKILL, initdb and its children give back their shared memory. initdb is
            # deaf to it while it waits in system(3), so it is told again and again.
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
        # The eighth line of the lock file is the postmaster's status: where pg_ctl --wait looks, too.
        assert self._process is not None
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
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
    """Return the account PostgreSQL has to run under if we are root, which it refuses to run as, and None otherwise."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise Failure("running as root, and the system has no user 'nobody' to run PostgreSQL as") from None


def end(
    process: subprocess.Popen[bytes],
    send: Callable[[int, int], None],
    numbers: Sequence[signal.Signals],
    patience: float,
) -> None:
    """Send the signals `numbers`, and then SIGKILL, each `patience` seconds after the one before, until it ends."""
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


def obey(server: Server, command: str, **arguments: Any) -> dict[str, Any]:
    """Carry out one command. Return the answer: what is true now, and the error, if there was one."""
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
    """Serve the parent until it is gone, then leave nothing behind."""
    os.umask(0o022)
    channel = socket.socket(fileno=0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        # Seen by `Caller.wait` as the end of the caller, so never in the middle of anything.
        signal.signal(number, lambda *_: channel.shutdown(socket.SHUT_RDWR))
    caller = Caller(channel, int(sys.argv[1]))
    server = Server(caller)
    try:
        while True:
            caller.send(obey(server, **caller.receive()))
    except CallerGone:
        server.discard()


if __name__ == "__main__":
    main()
