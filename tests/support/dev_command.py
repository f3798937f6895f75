"""`neon-async dev` in a process of its own, as a user runs it: its output, its keys, and its end."""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from support.processes import HANG, wait_for


def exported(lines: Sequence[str]) -> dict[str, str]:
    """Return the variables that `lines` export, as a shell reads them."""
    words = [shlex.split(line) for line in lines]
    assert all(word[0] == "export" and len(word) == 2 for word in words), lines
    return dict(word[1].split("=", 1) for word in words)


class DevCommand:
    """A running `neon-async dev`.

    Attributes:
        log: The lines on standard error so far.
        exports: The lines on standard output so far.
    """

    def __init__(self, process: subprocess.Popen[str], terminal: int | None) -> None:
        self.log: list[str] = []
        self.exports: list[str] = []
        self.process = process
        self._terminal = terminal
        assert process.stderr is not None
        assert process.stdout is not None
        self._threads = [
            threading.Thread(target=lambda: self.log.extend(process.stderr or ())),
            threading.Thread(target=lambda: self.exports.extend(process.stdout or ())),
        ]
        for thread in self._threads:
            thread.start()

    def says(self, text: str, times: int = 1) -> bool:
        """Return whether `text` stands in so many lines of standard error."""
        return sum(text in line for line in self.log) >= times

    def wait_until_ready(self) -> None:
        """Wait for the last line of both streams."""
        wait_for(lambda: self._is_ready() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def _is_ready(self) -> bool:
        said_all = self.says("quit") or self.says("ends it")
        return said_all and any("DATABASE_TRUST_ANCHOR" in line for line in self.exports)

    def variables(self) -> dict[str, str]:
        """Return the variables as a shell reads them."""
        return exported(self.exports)

    def press(self, key: str) -> None:
        assert self._terminal is not None
        os.write(self._terminal, key.encode())

    def end(self, number: signal.Signals | None = signal.SIGTERM) -> int:
        """Send a signal, if any, and return the exit status."""
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(HANG)
        for thread in self._threads:
            thread.join(HANG)
        return status


@contextlib.contextmanager
def dev_command(*arguments: str, terminal: bool = False) -> Iterator[DevCommand]:
    """Run `neon-async dev`.

    Args:
        *arguments: Its arguments.
        terminal: Whether its standard input is a terminal, which it controls.
    """
    ours, theirs = pty.openpty() if terminal else (None, None)
    command = [sys.executable, "-m", "neon_async", "dev", *arguments]
    if terminal:  # a session of its own, whose controlling terminal is standard input
        code = "import os, pty, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        command = [sys.executable, "-c", code + "os.execv(sys.argv[1], sys.argv[1:])", *command]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if theirs is None else theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    if theirs is not None:
        os.close(theirs)
    running = DevCommand(process, ours)
    try:
        yield running
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.end(signal.SIGTERM)
        process.kill()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        if ours is not None:
            os.close(ours)
