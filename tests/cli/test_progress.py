"""`neon-async check` shows each step while it runs, on a terminal and in a pipe, and ends cleanly at any moment."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from support.command_line import RunningCommand, certified, run, running
from support.crls import RevocablePKI, revocable_pki, send
from support.probes import password_of
from support.processes import wait_for
from support.revocations import forget_everything
from support.signatures import PresentingServer, presenting_server

from neon_async.testing import LocalEndpoint, LocalPostgres
from neon_async.testing._impostor import Impostor, login

TERMINALS = pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def endpoint(postgres: LocalPostgres) -> Iterator[LocalEndpoint]:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(LocalEndpoint(postgres)) as made,
    ):
        yield made


def visible(command: RunningCommand) -> str:
    """Return what stands on the screen, without colours. Of a line that was drawn again the last drawing counts."""
    text = re.sub(r"\x1b\[[0-9;?]*[mhl]", "", command.output).replace("\r", "")
    return re.split(r"(?:\x1b\[2K|\x1b\[1A)+", text)[-1] if "\x1b[1A" in text else text


def steps(command: RunningCommand) -> dict[str, str]:
    """Return the sign of each step on the screen."""
    return {name: sign for sign, name in re.findall(r"^([✓✗↻·▸]) (\w+)", visible(command), re.MULTILINE)}


# ---------------------------------------------------------------------------------------------------------------------
# A step that takes long


@TERMINALS
def test_the_steps_before_one_that_hangs_are_shown_and_so_is_that_one(
    endpoint: LocalEndpoint, anchor: str, terminal: bool
) -> None:
    endpoint.freeze()
    arguments = ["check", f"{endpoint.dsn}&connect_timeout=60", "--trust-anchor", anchor]
    with running(*arguments, terminal=terminal) as command:
        wait_for(lambda: steps(command) == {"parse": "✓", "dns": "·", "tcp": "✓", "tls": "▸"})
        assert endpoint.host in command.output
        endpoint.thaw()
        assert command.wait() == 0
        assert steps(command) == {
            **dict.fromkeys(["parse", "tcp", "tls", "authentication", "query"], "✓"),
            "dns": "·",
        }
        assert visible(command).rstrip().splitlines()[-1].startswith("Good:")


@TERMINALS
def test_what_create_pool_refuses_is_shown_before_the_first_step_has_to_wait(
    endpoint: LocalEndpoint, postgres: LocalPostgres, anchor: str, terminal: bool
) -> None:
    endpoint.freeze()
    arguments = ["check", f"{endpoint.dsn}&sslmode=require", "--trust-anchor", anchor]
    with running(*arguments, terminal=terminal) as command:
        wait_for(lambda: steps(command).get("tls") == "▸")
        shown = command.output
        assert shown.index("create_pool() refuses") < shown.index("sslmode=verify-full") < shown.index("parse")
        assert f"{endpoint.dsn}&sslmode=verify-full".replace(password_of(postgres), "***") in shown
        assert password_of(postgres) not in shown


@TERMINALS
def test_an_authentication_that_hangs_is_shown(tmp_path: Path, terminal: bool) -> None:
    silent = certified(lambda context: login(context, lambda conversation: conversation.drain()))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(silent) as impostor:
        (tmp_path / "root.pem").write_bytes(impostor.trust_anchor or b"")
        arguments = ["check", impostor.dsn, "--trust-anchor", str(tmp_path / "root.pem")]
        with running(*arguments, terminal=terminal) as command:
            wait_for(lambda: steps(command).get("authentication") == "▸")
            assert steps(command)["tls"] == "✓"


@TERMINALS
def test_the_wait_for_a_revocation_list_is_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    postgres_bin_dir: str | None,
    terminal: bool,
) -> None:
    forget_everything(tmp_path, monkeypatch)
    (tmp_path / "server").mkdir()
    published = threading.Event()
    with presenting_server(tmp_path / "server", postgres_bin_dir) as server, revocable_pki() as pki:
        (tmp_path / "root.pem").write_bytes(pki.root.pem)
        present_slowly(server, pki, published)
        arguments = ["check", f"{server.dsn}&connect_timeout=60", "--trust-anchor", str(tmp_path / "root.pem")]
        with running(*arguments, terminal=terminal) as command:
            wait_for(lambda: steps(command).get("revocation") == "▸")
            assert steps(command)["query"] == "✓"
            assert "waits for a revocation list" in visible(command)
            published.set()
            assert command.wait() == 0
            assert re.search(r"status +good", visible(command))
        required = [*arguments[:1], f"{server.dsn}&connect_timeout=60&revocation=require", *arguments[2:]]
        forget_everything(tmp_path / "server", monkeypatch)
        published.clear()
        with running(*required, terminal=terminal) as command:
            wait_for(lambda: "waits for a revocation list" in visible(command))
            assert steps(command)["tls"] == "▸"
            published.set()
            assert command.wait() == 0


def present_slowly(server: PresentingServer, pki: RevocablePKI, published: threading.Event) -> None:
    """Present a certificate whose list is not sent before `published` is set."""
    server.present_chain(pki.leaf(), pki.issuer)
    pki.publish("/1.crl")
    body = pki.lists.bodies["/1.crl"]
    assert isinstance(body, bytes)

    def answer(handler: object) -> None:
        published.wait(60)
        send(handler, body)  # type: ignore[arg-type]

    pki.lists.bodies["/1.crl"] = answer


# ---------------------------------------------------------------------------------------------------------------------
# The end, wherever it comes


@TERMINALS
@pytest.mark.parametrize("weak", ["", "&sslmode=require"], ids=["one refusal", "two refusals"])
def test_settings_that_are_refused_in_any_case_are_shown_once(terminal: bool, weak: str) -> None:
    with running("check", f"postgresql://a:b@c.invalid/d?sslsni=0{weak}", terminal=terminal) as command:
        assert command.wait() == 1
        assert steps(command)["parse"] == "✗"
        assert command.output.count("sslsni (DSN) is '0'") == 1
        assert ("create_pool() refuses" in command.output) is bool(weak)
        assert "goes on" not in command.output
        assert visible(command).rstrip().splitlines()[-1].startswith("Refused:")


@TERMINALS
def test_an_interrupt_leaves_the_steps_so_far(endpoint: LocalEndpoint, anchor: str, terminal: bool) -> None:
    endpoint.freeze()
    with running("check", endpoint.dsn, "--trust-anchor", anchor, terminal=terminal) as command:
        wait_for(lambda: steps(command).get("tls") == "▸")
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 130
        assert "Traceback" not in command.output
        assert steps(command)["tcp"] == "✓"


def test_a_terminal_has_its_cursor_when_the_process_is_terminated(endpoint: LocalEndpoint, anchor: str) -> None:
    endpoint.freeze()
    with running("check", endpoint.dsn, "--trust-anchor", anchor, terminal=True) as command:
        wait_for(lambda: steps(command).get("tls") == "▸")
        command.process.terminate()
        command.wait()
        assert command.output.rfind(SHOW_CURSOR) > command.output.rfind(HIDE_CURSOR)


def test_a_reader_that_ends_while_a_step_runs_ends_the_check_with_1_and_without_a_traceback(
    endpoint: LocalEndpoint, anchor: str, tmp_path: Path
) -> None:
    endpoint.freeze()
    reader, writer = os.pipe()
    errors = tmp_path / "errors"
    with (
        errors.open("w") as log,
        running("check", endpoint.dsn, "--trust-anchor", anchor, streams=(writer, log.fileno())) as command,
    ):
        os.close(writer)
        shown = b""
        while b"tcp" not in shown:
            shown += os.read(reader, 65536)
        os.close(reader)
        assert command.wait() == 1  # at the next line, which says that the step is still running
    assert errors.read_text() == ""


# ---------------------------------------------------------------------------------------------------------------------
# What is no terminal


@pytest.mark.parametrize(
    ("variables", "terminal"),
    [
        pytest.param({}, False, id="a pipe"),
        pytest.param({"TERM": "dumb"}, True, id="a dumb terminal"),
        pytest.param({"NO_COLOR": "1"}, False, id="a pipe without colours"),
    ],
)
def test_there_are_no_escape_sequences_where_they_have_no_effect(
    postgres: LocalPostgres, anchor: str, variables: dict[str, str], terminal: bool
) -> None:
    with running("check", postgres.dsn, "--trust-anchor", anchor, terminal=terminal, variables=variables) as command:
        assert command.wait() == 0
        assert "\x1b" not in command.output
        assert list(steps(command)) == ["parse", "dns", "tcp", "tls", "authentication", "query"]


def test_colours_in_a_pipe_do_not_move_the_cursor(postgres: LocalPostgres, anchor: str) -> None:
    variables = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    shown = run("check", postgres.dsn, "--trust-anchor", anchor, variables=variables).stdout
    assert re.findall(r"\x1b\[[0-9;?]*[A-Za-ln-z]", shown) == []
    assert "\x1b[32m" in shown


def test_a_terminal_without_colours_has_none(postgres: LocalPostgres, anchor: str) -> None:
    arguments = ["check", postgres.dsn, "--trust-anchor", anchor]
    variables = {"NO_COLOR": "1", "TERM": "xterm-256color"}
    with running(*arguments, terminal=True, variables=variables) as command:
        assert command.wait() == 0
        assert re.findall(r"\x1b\[[0-9;]*3[0-9]m", command.output) == []


@pytest.mark.parametrize("columns", ["20", "300"])
def test_a_step_is_one_line_at_any_width(postgres: LocalPostgres, anchor: str, columns: str) -> None:
    shown = run("check", postgres.dsn, "--trust-anchor", anchor, variables={"COLUMNS": columns}).stdout
    assert len(re.findall(r"^[✓·] \w", shown, re.MULTILINE)) == 6


def test_a_silent_server_is_reported_when_its_time_is_over() -> None:
    silent = Impostor(lambda conversation: None)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(silent) as impostor:
        finished = run("check", f"{impostor.dsn}&connect_timeout=1.5")
    assert (finished.returncode, finished.stderr) == (1, "")
    assert re.search(r"^▸ tls +still running after 1 s\n✗ tls +.* ConnectTimeoutError$", finished.stdout, re.MULTILINE)
