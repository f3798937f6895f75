"""`neon-async harden` prints a string that `create_pool()` accepts, or the reason why there is none."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.command_line import pg_variables, run, run_in_shell
from support.dsns import HOST, dsns

import neon_async
from neon_async._cli.main import main
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import SERVER_NAME

PASSWORD = "npg_hunter2"
DSN = f"postgresql://neon:{PASSWORD}@{SERVER_NAME}/neondb"
WEAK = f"{DSN}?sslmode=require&channel_binding=require"
HARDENED = f"{DSN}?sslmode=verify-full&channel_binding=require"


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        pytest.param([WEAK], {}, HARDENED, id="argument"),
        pytest.param([], {"DATABASE_URL": WEAK}, HARDENED, id="DATABASE_URL"),
        pytest.param([DSN], {"DATABASE_URL": "postgresql://x.invalid"}, f"{DSN}?sslmode=verify-full", id="both"),
        pytest.param(
            [],
            {"PGHOST": SERVER_NAME, "PGUSER": "neon", "PGPASSWORD": PASSWORD},
            "postgresql://?sslmode=verify-full",
            id="PG variables",
        ),
        pytest.param(
            [f"postgresql://neon@{SERVER_NAME}/d?sslmode=require"],
            {"PGPASSWORD": PASSWORD},
            f"postgresql://neon@{SERVER_NAME}/d?sslmode=verify-full",
            id="the password is in a variable",
        ),
    ],
)
def test_harden_prints_the_dsn_with_verify_full_and_nothing_else(
    arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    finished = run("harden", *arguments, variables=environment)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"{expected}\n", "")


@pytest.mark.parametrize(
    ("dsn", "variables", "reason"),
    [
        pytest.param(f"mysql://neon:{PASSWORD}@{HOST}/d", {}, "begins with 'mysql://'", id="another scheme"),
        pytest.param(f"psql '{WEAK}'", {}, "begins with the command psql", id="psql"),
        pytest.param(f"{WEAK}&pool_size=5", {}, "Pass max_size= to create_pool()", id="an unknown parameter"),
        pytest.param(f"{DSN}?channel_binding=disable", {}, "channel_binding (DSN)", id="another weak parameter"),
        pytest.param(f"postgresql://neon:{PASSWORD}@10.0.0.1/d", {}, "the IP address", id="an address"),
        pytest.param(f"postgresql://neon:{PASSWORD}@a.example,b.example/d", {}, "list of hosts", id="two hosts"),
        pytest.param(f"postgresql://neon:{PASSWORD}@db/d", {}, "a single label", id="a host of one label"),
        pytest.param(f"postgresql://neon:***@{HOST}/d", {}, "asterisks", id="a masked password"),
        pytest.param("postgresql://[user]:[password]@[neon_hostname]/[dbname]", {}, "placeholder", id="a template"),
        pytest.param(f"postgresql://neon@{HOST}/d", {}, "No password is given", id="no password"),
        pytest.param(f"postgresql://:{PASSWORD}@{HOST}/d", {}, "No user is given", id="no user"),
        pytest.param(f"{WEAK}&sslrootcert=/nowhere.pem", {}, "/nowhere.pem", id="a file that is missing"),
        pytest.param(f"{DSN}?port=5432&port=5432", {}, "port is given twice", id="given twice"),
        pytest.param(DSN.replace("neon:", "neon:\udcff"), {}, "not UTF-8", id="a byte that is not UTF-8"),
        pytest.param(WEAK, {"PGREQUIREAUTH": "password"}, "PGREQUIREAUTH", id="a weak variable"),
        pytest.param(None, {"PGHOST": HOST}, "No user is given", id="PG variables that are not enough"),
        pytest.param(None, {"DATABASE_URL": "  "}, "The DSN is empty", id="a blank DATABASE_URL"),
    ],
)
def test_harden_prints_no_dsn_that_create_pool_refuses(dsn: str | None, variables: dict[str, str], reason: str) -> None:
    finished = run("harden", *([] if dsn is None else [dsn]), variables=variables)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("neon-async harden: ")
    assert reason in finished.stderr
    assert PASSWORD not in finished.stderr


def test_a_root_of_ones_own_makes_a_host_of_one_label_acceptable(tmp_path: Path, postgres: LocalPostgres) -> None:
    root = tmp_path / "root.pem"
    root.write_bytes(postgres.trust_anchor)
    finished = run("harden", "--trust-anchor", str(root), f"postgresql://neon:{PASSWORD}@db/d?sslmode=require")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == f"postgresql://neon:{PASSWORD}@db/d?sslmode=verify-full\n"
    neon_async.create_pool(finished.stdout.strip(), trust_anchor=root)


def test_characters_that_the_output_cannot_encode_are_percent_encoded() -> None:
    variables = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    finished = run("harden", DSN.replace(PASSWORD, "pä\u20ac+1"), variables=variables)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == f"{DSN.replace(PASSWORD, 'p%C3%A4%E2%82%AC+1')}?sslmode=verify-full\n"


# What may be wrong with a connection string, or only looks so.
_DAMAGE = st.sampled_from(
    [
        *("sslmode=require", "ssl=true", "sslmode", "channel_binding=require", "channel_binding=disable", "sslsni=0"),
        *("port=0", "port=6432", "hostaddr=127.0.0.1", "hostaddr=here", "host=other.example", "pgbouncer=true"),
        *("password=x", "password=***", "user=u", "dbname=[dbname]", "options=-cjit%3Doff", "revocation=off", "%zz=1"),
        *("sslrootcert=/nowhere", "sslrootcert=system", "connect_timeout=10", "connect_timeout=0", "amp;a=b", "#", ""),
    ]
)
_LOGINS = st.sampled_from(
    ["alex:x@", "alex@", ":x@", "", "alex:[password]@", "alex:a@b@", "al%zzex:x@", "alex:\u200b@"]
)
_HOSTS = st.sampled_from(
    [HOST, "localhost", "db", "10.0.0.1", "[::1]", "a.example,b.example", "", "%2Ftmp", "x.example:x"]
)


@st.composite
def damaged_dsns(draw: st.DrawFn) -> str:
    """Return a connection URL of which each part may be wrong."""
    scheme = draw(st.sampled_from(["postgresql", "postgres", "postgresql+neon", "mysql"]))
    path = draw(st.sampled_from(["/neondb", "", "/", "/d/", "/a%2Fb"]))
    query = "&".join(draw(st.lists(_DAMAGE, max_size=3)))
    return f"{scheme}://{draw(_LOGINS)}{draw(_HOSTS)}{path}?{query}"


@given(dsn=(dsns() | damaged_dsns() | st.text(min_size=1, max_size=20)).filter(lambda dsn: not dsn.startswith("-")))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_whatever_harden_prints_is_accepted_and_whatever_it_does_not_print_is_refused(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["harden", dsn])
    output, errors = capsys.readouterr()
    if status == 0:
        neon_async.create_pool(output.removesuffix("\n"))
        assert errors == ""
    else:
        assert (status, output) == (1, "")
        assert re.fullmatch(r"neon-async harden: .+\n", errors)
        with pytest.raises(neon_async.ConfigurationError):
            neon_async.create_pool(dsn)


def test_a_shell_can_pass_the_hardened_dsn_to_check(postgres: LocalPostgres, anchor: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m neon_async"
    script = f'{command} check --json --trust-anchor "$ANCHOR" "$({command} harden "$DATABASE_URL")"'
    finished = run_in_shell(script, variables={"DATABASE_URL": f"{postgres.dsn}&sslmode=require", "ANCHOR": anchor})
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    assert (document["verdict"], document["refusal"]) == ("good", None)


def test_the_hardened_dsn_of_the_pg_variables_connects(postgres: LocalPostgres, anchor: str) -> None:
    variables = pg_variables(postgres) | {"PGSSLMODE": "require"}
    dsn = run("harden", "--trust-anchor", anchor, variables=variables).stdout.strip()
    assert run("check", "--json", "--trust-anchor", anchor, dsn, variables=variables).returncode == 0
