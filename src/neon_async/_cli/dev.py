"""Run a local PostgreSQL that behaves like a Neon endpoint until the user ends it: `neon-async dev`.

The lines to export go to standard output and everything else to standard error, so that a script can read the former.
This module must not know how the parts work. It needs the packages of the extra `testing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..testing import LocalEndpoint, LocalPooler, LocalPostgres
from .streams import discard

__all__ = ("dev",)

_ADDRESS = "127.0.0.1"
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_STATES = {
    "awake": "awake",
    "suspended": "asleep: its connections are closed, and the next connect wakes it",
    "waking": "waking: a client connects",
}


async def dev(
    *,
    data: Path | None,
    port: int | None,
    suspend_after: float,
    wake_time: float,
    with_pooler: bool,
    schema: Path | None,
    bin_dir: Path | None,
) -> None:
    """Run the endpoint until a signal or the key `q` ends it.

    Args:
        data: The folder in which the data is kept, or None for a temporary one.
        port: The TCP port, or None for that of the last run with the same `data`, or else a free one.
        suspend_after: Seconds without a connect and without a byte of a client after which it suspends; 0 for never.
        wake_time: Seconds until a suspended endpoint is awake.
        with_pooler: Whether there is a pooled host, too.
        schema: A file of SQL for a new database.
        bin_dir: The folder of another PostgreSQL than the wheel's.

    Raises:
        NeonAsyncError: A value is not valid, or one of the servers does not start.
    """
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(LocalPostgres(bin_dir, schema=schema, data_dir=data))
        pooler = await stack.enter_async_context(LocalPooler(server)) if with_pooler else None
        log = _Log()
        endpoint = await stack.enter_async_context(
            LocalEndpoint(
                server,
                wake_time=wake_time,
                suspend_after=suspend_after or None,
                pooler=pooler,
                port=_choose_port(data) if port is None else port,
                on_state=log.state,
            )
        )
        folder = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neon-async-dev-")))
        if data is not None:
            _port_file(data).write_text(str(endpoint.port))
        _introduce(endpoint, _write_anchor(folder, endpoint.trust_anchor), pooled=with_pooler)
        log.is_on = True
        log.line(f"ready in {time.monotonic() - began:.1f} s, on port {endpoint.port} of {_ADDRESS}")
        await _serve(endpoint, log)
        log.line(f"ending; the data is {'removed' if data is None else f'kept in {data}'}")
        log.is_on = False


def _introduce(endpoint: LocalEndpoint, anchor: Path, *, pooled: bool) -> None:
    """Print the lines to export, and how to use them."""
    variables = {
        "DATABASE_URL": endpoint.pooled_dsn if pooled else endpoint.dsn,
        **({"DATABASE_URL_UNPOOLED": endpoint.dsn} if pooled else {}),
        "DATABASE_TRUST_ANCHOR": str(anchor),
    }
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    sys.stdout.flush()
    _say(
        'In code: create_pool(os.environ["DATABASE_URL"], trust_anchor=os.environ.get("DATABASE_TRUST_ANCHOR"))\n'
        'In a shell: PGSSLROOTCERT="$DATABASE_TRUST_ANCHOR" psql "$DATABASE_URL&sslmode=verify-full"\n'
        'To check it: neon-async check --trust-anchor "$DATABASE_TRUST_ANCHOR"'
    )


# ---------------------------------------------------------------------------------------------------------------------
# While it runs


class _Key(NamedTuple):
    """What a key does, and what is then the case."""

    text: str
    act: Callable[[LocalEndpoint], None]
    result: str


# A key that is pressed a second time does what the second row says.
_KEYS: dict[str, tuple[_Key, ...]] = {
    "s": (_Key("suspend", LocalEndpoint.suspend, ""),),
    "f": (
        _Key("freeze", LocalEndpoint.freeze, "frozen: nothing passes and nothing is answered; f thaws"),
        _Key("thaw", LocalEndpoint.thaw, "thawed"),
    ),
    "c": (_Key("cut", LocalEndpoint.cut, "cut: every connection is reset"),),
    "r": (
        _Key("refuse", LocalEndpoint.refuse, "refusing: each new connection is reset; r accepts"),
        _Key("accept", LocalEndpoint.accept, "accepting"),
    ),
}
_END_KEY = "q"


async def _serve(endpoint: LocalEndpoint, log: _Log) -> None:
    """Do what the keys say until `q` is pressed or a signal arrives."""
    ended = asyncio.Event()
    presses = dict.fromkeys(_KEYS, 0)

    def press(key: str) -> None:
        if key == _END_KEY:
            ended.set()
        elif key in _KEYS:
            row = _KEYS[key][presses[key] % len(_KEYS[key])]
            presses[key] += 1
            row.act(endpoint)
            if row.result:
                log.line(row.result)

    async with _signals(ended.set):
        with _keys(press) as are_read:
            keys = [f"{key} {' or '.join(row.text for row in rows)}" for key, rows in _KEYS.items()]
            _say(
                f"Keys: {', '.join([*keys, f'{_END_KEY} quit'])}" if are_read else "SIGINT (Ctrl-C) or SIGTERM ends it."
            )
            await ended.wait()


class _Log:
    """Lines with the time of day."""

    def __init__(self) -> None:
        self.is_on = False  # while the parts start and end, their states say nothing

    def line(self, text: str) -> None:
        """Print one line."""
        _say(f"{time.strftime('%H:%M:%S')} {text}")

    def state(self, state: str) -> None:
        """Print the new state of the endpoint."""
        if self.is_on and state in _STATES:
            self.line(_STATES[state])


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # the reader of the log has ended, and the endpoint runs without it
        discard(sys.stderr)


@contextlib.asynccontextmanager
async def _signals(end: Callable[[], None]) -> AsyncIterator[None]:
    """Call `end` at the first signal. The next one has its usual effect."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        end()

    for number in _SIGNALS:
        loop.add_signal_handler(number, ended)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _keys(press: Callable[[str], None]) -> Iterator[bool]:
    """Call `press` with each key while the terminal is ours, and yield whether it is."""
    if not _owns_terminal():
        yield False
        return
    import termios
    import tty

    loop, terminal = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        typed = os.read(terminal, 64).decode(errors="replace")
        if not typed:  # the terminal is gone
            loop.remove_reader(terminal)
        for key in typed.lower():
            press(key)

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)  # keys at once and without echo; Ctrl-C is still a signal
    loop.add_reader(terminal, read)
    try:
        yield True
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _owns_terminal() -> bool:
    try:
        return os.isatty(sys.stdin.fileno()) and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):  # there is no standard input, or it is closed
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Files and ports


def _write_anchor(folder: Path, trust_anchor: bytes) -> Path:
    path = folder.absolute() / "root.pem"
    path.write_bytes(trust_anchor)
    return path


def _port_file(data: Path) -> Path:
    return data / "port"


def _choose_port(data: Path | None) -> int:
    """Return the port of the last run with this folder, or a free one whose next one is free, too."""
    if data is not None:
        with contextlib.suppress(OSError, ValueError):
            return int(_port_file(data).read_text())
    while True:
        with socket.create_server((_ADDRESS, 0)) as first, contextlib.suppress(OSError, OverflowError):
            port: int = first.getsockname()[1]
            with socket.create_server((_ADDRESS, port + 1)):
                return port
