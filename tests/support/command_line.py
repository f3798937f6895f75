"""Run the command line as a user does, and create the servers that its tests connect to."""

from __future__ import annotations

import contextlib
import os
import pty
import ssl
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import trustme

import neon_async
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import SERVER_NAME, Impostor, Script, server_context
from support.probes import password_of
from support.processes import HANG

STEPS = ["parse", "dns", "tcp", "tls", "authentication", "query"]


def run(
    *arguments: str, variables: Mapping[str, str] | None = None, command: Sequence[str] = ("-m", "neon_async")
) -> subprocess.CompletedProcess[str]:
    """Run neon-async with `variables` added to the environment. `command` are the arguments of Python itself."""
    return _run([sys.executable, *command, *arguments], variables)


def run_in_shell(script: str, *, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script of a POSIX shell with `variables` added to the environment."""
    return _run(["sh", "-c", script], variables)


def _run(command: Sequence[str], variables: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | (variables or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


class RunningCommand:
    """neon-async while it runs, and what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self.process = process
        self._output = output
        self._written = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal whose program has ended raises an error
            while piece := os.read(self._output, 65536):
                self._written += piece

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._written.decode(errors="replace")

    def wait(self) -> int:
        """Wait for the end, and return the exit status."""
        status = self.process.wait(HANG)
        self._thread.join(HANG)
        return status


@contextlib.contextmanager
def running(
    *arguments: str,
    terminal: bool = False,
    streams: tuple[int, int] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[RunningCommand]:
    """Run neon-async while the block runs.

    Args:
        *arguments: Its arguments.
        terminal: Whether both streams go to a terminal, and not to a pipe.
        streams: Where output and errors go instead.
        variables: What is added to the environment.
    """
    ours, theirs = pty.openpty() if terminal else os.pipe()
    output, errors = streams or (theirs, theirs)
    process = subprocess.Popen(
        [sys.executable, "-m", "neon_async", *arguments],
        env=os.environ | (variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
    )
    os.close(theirs)
    command = RunningCommand(process, ours)
    try:
        yield command
    finally:
        process.kill()
        command.wait()
        os.close(ours)


def run_without(packages: set[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run neon-async on a Python in which everything is installed except `packages`. `folder` must be empty."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.partition(".")[0] not in packages and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    with contextlib.suppress(FileExistsError):  # an editable installation is not in that folder
        (folder / "neon_async").symlink_to(Path(neon_async.__file__).parent)
    code = (
        "import runpy, sys; "
        f"sys.path[:] = [path for path in sys.path if 'site-packages' not in path] + [{str(folder)!r}]; "
        "runpy.run_module('neon_async', run_name='__main__', alter_sys=True)"
    )
    return run(*arguments, command=("-c", code))


def pg_variables(postgres: LocalPostgres) -> dict[str, str]:
    """Return the variables of libpq that lead to `postgres`."""
    return {
        "PGHOST": postgres.host,
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "neon",
        "PGPASSWORD": password_of(postgres),
        "PGDATABASE": "neondb",
    }


def certified(make_script: Callable[[ssl.SSLContext], Script]) -> Impostor:
    """Return an impostor with a valid certificate. `make_script` gets its TLS context."""
    ca = trustme.CA()
    context = server_context(ca.issue_cert(SERVER_NAME).private_key_and_cert_chain_pem.bytes())
    return Impostor(make_script(context), trust_anchor=ca.cert_pem.bytes())
