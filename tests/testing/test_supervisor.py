"""The supervisor removes the server and its folder, however the process that uses `LocalPostgres` ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
from support.processes import HANG, Scene, ask, connect, parent_of, postmaster, processes, wait_for

from neon_async.testing import LocalPostgres, LocalPostgresError
from neon_async.testing._supervisor import STOP_PATIENCE

pytestmark = pytest.mark.anyio

one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])  # where the event loop makes no difference

Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


async def run_until_cancelled(started: Callable[[], object], work: Work) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        while not started():
            await anyio.sleep(0.001)
        group.cancel_scope.cancel()


async def run_until_cancelled_by_asyncio(started: Callable[[], object], work: Work) -> None:
    task = asyncio.ensure_future(work())
    while not started():
        await anyio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param("neon-async-*", id="before initdb"),
        pytest.param("neon-async-*/data/base", id="during initdb"),
        pytest.param("neon-async-*/server.key", id="during the start of the server"),
    ],
)
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_until_cancelled, id="scope"),
        pytest.param(run_until_cancelled_by_asyncio, id="task"),
    ],
)
async def test_a_cancelled_start_leaves_nothing(
    run: Callable[..., Coroutine[Any, Any, None]], sign: str, scene: Scene
) -> None:
    async def start() -> None:
        async with LocalPostgres():
            await anyio.sleep_forever()

    with anyio.fail_after(HANG):
        await run(lambda: scene.files(sign), start)

    assert scene.files() == []
    wait_for(lambda: scene.traces() == [])


async def test_a_cancelled_stop_continues_and_the_next_command_waits_for_it(scene: Scene, tmp_path: Path) -> None:
    async with LocalPostgres() as server:
        [log] = scene.files("*/log")
        await run_until_cancelled(lambda: "fast shutdown" in Path(log).read_text(), server.stop)
        await server.start()
        assert ask(server, tmp_path, "SELECT 1") == 1


async def test_leaving_the_block_removes_everything(scene: Scene, tmp_path: Path) -> None:
    async with LocalPostgres() as server:
        client = connect(server, tmp_path)
        assert len(scene.traces()) == 3
    with contextlib.closing(client):
        assert scene.traces() == []


CALLER = """
import json, os, signal, sys
import anyio
from neon_async.testing import LocalPostgres

if "ignores signals" in sys.argv:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

async def main():
    async with LocalPostgres() as server:
        child = os.fork() if "fork" in sys.argv else 0
        if "fork" in sys.argv and child == 0:
            while True:
                os.read(0, 1)
        print(json.dumps({"port": server.port, "child": child}), flush=True)
        await anyio.wait_readable(sys.stdin)
        if "_exit" in sys.argv:
            os._exit(7)
        raise RuntimeError("the caller fails")

anyio.run(main)
"""


@contextlib.contextmanager
def caller(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that uses LocalPostgres as the leader of a process group, as a shell does."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def leave(process: subprocess.Popen[str]) -> None:
    print(file=process.stdin, flush=True)


DEATHS = [
    pytest.param((), subprocess.Popen.kill, id="SIGKILL"),
    pytest.param((), subprocess.Popen.terminate, id="SIGTERM"),
    pytest.param((), lambda process: os.killpg(process.pid, signal.SIGINT), id="Ctrl-C"),
    pytest.param(("_exit",), leave, id="os._exit"),
    pytest.param((), leave, id="exception"),
    pytest.param(("fork",), subprocess.Popen.kill, id="SIGKILL with a forked child alive"),
]


@pytest.mark.parametrize(("arguments", "die"), DEATHS)
def test_nothing_remains_after_the_caller_has_ended(
    arguments: tuple[str, ...], die: Callable[[subprocess.Popen[str]], None], scene: Scene
) -> None:
    with caller(*arguments) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        # A child that has just been forked still has the command line of its parent.
        named = {pid: parent for pid, (parent, _, command) in processes().items() if str(scene.folder) in command}
        [server] = [pid for pid, parent in named.items() if parent not in named]
        family = {pid for pid, (parent, _, _) in processes().items() if server in (pid, parent)} | {parent_of(server)}
        assert len(family) > 3
        die(process)
        assert process.wait(HANG) != 0
        wait_for(lambda: not family & processes().keys())
        wait_for(lambda: scene.traces(process.pid) == [])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ready["port"]))
        if ready["child"]:
            os.kill(ready["child"], signal.SIGKILL)


@pytest.mark.parametrize("arguments", [pytest.param((), id=""), pytest.param(("ignores signals",), id="in a script")])
@pytest.mark.parametrize("sign", ["neon-async-*", "neon-async-*/data/base", "neon-async-*/server.key"])
def test_nothing_remains_after_the_caller_is_killed_during_the_start(
    sign: str, arguments: tuple[str, ...], scene: Scene
) -> None:
    with caller(*arguments) as process:
        wait_for(lambda: scene.files(sign))
        process.kill()
        killed = time.monotonic()
        process.wait(HANG)
        wait_for(lambda: scene.traces(process.pid) == [])
    assert time.monotonic() - killed < STOP_PATIENCE  # no signal was lost


@one_loop
async def test_a_terminated_supervisor_leaves_nothing_and_the_caller_gets_an_error(
    scene: Scene, tmp_path: Path
) -> None:
    async with LocalPostgres() as server:
        os.kill(parent_of(postmaster(server, tmp_path)), signal.SIGTERM)
        wait_for(lambda: scene.files() == [])
        with pytest.raises(LocalPostgresError, match="has ended"):
            await server.stop()
        assert repr(server).endswith(": stopped>")


@one_loop
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_supervisor_that_is_killed_or_stopped_is_reported(
    number: signal.Signals, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neon_async.testing._local_postgres._SUPERVISOR_PATIENCE", 0.5)
    server = LocalPostgres()
    await server.__aenter__()
    pid = postmaster(server, tmp_path)
    os.kill(parent_of(pid), number)
    with pytest.raises(LocalPostgresError, match=r"ended with status -9.*may still exist"):
        await server.__aexit__(None, None, None)
    os.kill(pid, signal.SIGINT)
    wait_for(lambda: scene.traces() == scene.files())
