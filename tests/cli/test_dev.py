"""`neon-async dev` starts a PostgreSQL that behaves like Neon, says what happens, obeys its keys, and ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.command_line import run, run_without, running
from support.dev_command import DevCommand, dev_command, exported
from support.processes import Scene, wait_for

import neon_async


def ask(command: DevCommand, query: str, variable: str = "DATABASE_URL") -> object:
    """Return the value of a query, as a service with the exported variables does."""
    return asyncio.run(value_of(query, command.variables(), variable))


async def value_of(query: str, variables: dict[str, str], variable: str = "DATABASE_URL") -> object:
    async with neon_async.create_pool(
        variables[variable], trust_anchor=variables["DATABASE_TRUST_ANCHOR"], acquire_timeout=20.0
    ) as pool:
        return await pool.fetchval(query)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_prints_the_two_lines_to_export_and_ends_cleanly(number: signal.Signals, scene: Scene) -> None:
    with dev_command() as command:
        command.wait_until_ready()
        assert list(command.variables()) == ["DATABASE_URL", "DATABASE_TRUST_ANCHOR"]
        assert ask(command, "SELECT 1 + 1") == 2
        assert command.end(number) == 0
        assert command.says("the data is removed")
    assert scene.traces() == []


def test_it_serves_on_when_the_reader_of_its_log_has_ended(scene: Scene) -> None:
    reader, writer = os.pipe()
    exports = scene.folder / "exports"
    arguments = ("dev", "--suspend-after", "0.2", "--wake-time", "0.1")
    with exports.open("w") as output, running(*arguments, streams=(output.fileno(), writer)) as command:
        os.close(writer)
        said = b""
        while b"ends it" not in said:
            said += os.read(reader, 65536)
        os.close(reader)
        variables = exported(exports.read_text().splitlines())
        for _ in range(2):  # it says that it wakes and that it sleeps again, in vain
            assert asyncio.run(value_of("SELECT 1", variables)) == 1
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 0
    assert scene.files("neon-async-*") == []


def test_it_says_when_it_sleeps_and_wakes(scene: Scene) -> None:
    with dev_command("--suspend-after", "0.2", "--wake-time", "0.1") as command:
        command.wait_until_ready()
        wait_for(lambda: command.says(" asleep"))
        assert ask(command, "SELECT 1") == 1
        wait_for(lambda: command.says(" awake") and command.says(" asleep", 2))
        assert [line.split()[1].rstrip(":\n") for line in command.log if line[2] == ":"][1:4] == [
            "asleep",
            "waking",
            "awake",
        ]


def test_a_folder_keeps_the_data_and_the_lines_to_export(scene: Scene) -> None:
    schema = scene.folder / "schema.sql"
    schema.write_text("CREATE TABLE kept (n int)")
    arguments = ("--data", str(scene.folder / "data"), "--schema", str(schema))
    with dev_command(*arguments) as command:
        command.wait_until_ready()
        before = command.exports[:]
        ask(command, "INSERT INTO kept VALUES (42)")
        assert command.end() == 0
        assert command.says("the data is kept in")
    with dev_command(*arguments) as command:
        command.wait_until_ready()
        assert command.exports == before
        assert ask(command, "SELECT n FROM kept") == 42


def test_it_has_a_pooled_host(pgbouncer_installed: None, scene: Scene) -> None:
    with dev_command("--pooler") as command:
        command.wait_until_ready()
        urls = [urlsplit(command.variables()[name]) for name in ("DATABASE_URL", "DATABASE_URL_UNPOOLED")]
        assert [(url.hostname or "").partition(".")[0] for url in urls] == [
            "ep-cool-darkness-123456-pooler",
            "ep-cool-darkness-123456",
        ]
        assert (urls[0].port or 0) == (urls[1].port or 0) + 1
        assert [ask(command, "SELECT 1", name) for name in ("DATABASE_URL", "DATABASE_URL_UNPOOLED")] == [1, 1]
        assert command.end() == 0
    assert scene.traces() == []


def test_keys_suspend_freeze_cut_refuse_and_quit(scene: Scene) -> None:
    with dev_command("--wake-time", "0", terminal=True) as command:
        command.wait_until_ready()
        assert command.says("Keys: s suspend, f freeze or thaw, c cut, r refuse or accept, q quit")
        for key, text in [
            ("s", " asleep"),
            ("f", " frozen"),
            ("f", " thawed"),
            ("c", " cut"),
            ("r", " refusing"),
            ("R", " accepting"),
        ]:
            command.press(key)
            wait_for(lambda text=text: command.says(text))  # type: ignore[misc]
        command.press("x")  # means nothing
        assert ask(command, "SELECT 1") == 1
        command.press("q")
        assert command.end(None) == 0
    assert scene.traces() == []


def test_a_key_freezes_what_clients_see(scene: Scene) -> None:
    with dev_command(terminal=True) as command:
        command.wait_until_ready()
        command.press("r")
        wait_for(lambda: command.says("refusing"))
        port = urlsplit(command.variables()["DATABASE_URL"]).port
        with (
            contextlib.closing(socket.create_connection(("127.0.0.1", port or 0))) as client,
            pytest.raises(ConnectionResetError),
        ):
            client.recv(1)


def test_an_interrupt_during_the_start_leaves_nothing(scene: Scene) -> None:
    with dev_command() as command:
        wait_for(lambda: scene.files("neon-async-*"))
        assert command.end(signal.SIGINT) in (0, 130)  # 0 where it was ready by then
    wait_for(lambda: not scene.traces(command.process.pid))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["--port", "70000"], "port must be a whole number from 0 to 65535, not 70000", id="port"),
        pytest.param(["--suspend-after", "-1"], "suspend_after must be a number of seconds above 0", id="time"),
        pytest.param(["--schema", "nothing.sql"], "schema='nothing.sql' cannot be read", id="schema"),
        pytest.param(["--bin-dir", "/nowhere"], "does not contain initdb", id="programs"),
    ],
)
def test_what_is_not_valid_is_named(arguments: list[str], reason: str) -> None:
    finished = run("dev", *arguments)
    assert finished.returncode == 1
    assert finished.stderr.startswith("neon-async dev: ")
    assert reason in finished.stderr
    assert finished.stdout == ""


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finished = run("dev", "--port", str(port))
    assert (finished.returncode, finished.stdout) == (1, "")
    assert f"Port {port} of 127.0.0.1 cannot be used" in finished.stderr


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    finished = run_without({"trustme"}, tmp_path, "dev")
    assert finished.returncode == 2
    assert finished.stderr == "neon-async dev needs trustme; run: python -m pip install 'neon-async[testing]'\n"
