"""`check()` tells the truth of a connection, good or bad, and its JSON and its picture tell the same."""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
import trustme
from rich.console import Console

import neon_async
from neon_async._cli import check as _check
from neon_async._cli.check import CheckResult, Step, check, render, render_json, render_roots, render_roots_json
from neon_async._wire.trust import Place, survey
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import (
    SERVER_NAME,
    Conversation,
    Impostor,
    Script,
    authentication_request,
    error_response,
    login,
    server_context,
)

pytestmark = pytest.mark.anyio

STEPS = ["parse", "dns", "tcp", "tls", "authentication", "query"]


def names(result: CheckResult, outcome: str) -> list[str]:
    return [step.name for step in result.steps if step.outcome == outcome]


def password_in(dsn: str) -> str:
    return dsn.split("//")[1].split("@")[0].split(":")[1]


def picture(show: Callable[[Console], None], *, encoding: str = "utf-8", width: int = 80) -> str:
    """Return what a console without colours shows."""
    output = io.BytesIO()
    with io.TextIOWrapper(output, encoding=encoding, errors="strict") as file:
        show(Console(file=file, width=width, color_system=None))
        file.flush()
        return output.getvalue().decode(encoding)


def facts(shown: str) -> dict[str, str]:
    """Return the indented lines of a picture that begin with a name and have a value behind it."""
    return dict(re.findall(r"^  (\S+(?: \S+)?)  +(\S.*)$", shown, re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------------------
# A connection that works


async def test_a_good_connection_passes_every_step_but_dns_which_hostaddr_makes_needless(
    postgres: LocalPostgres,
) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    assert result.verdict == "good"
    assert result.problem is None
    assert [step.name for step in result.steps] == STEPS
    assert names(result, "ok") == ["parse", "tcp", "tls", "authentication", "query"]
    assert names(result, "skipped") == ["dns"]


async def test_a_name_without_hostaddr_is_resolved(postgres: LocalPostgres) -> None:
    dsn = postgres.dsn.partition("?")[0].replace(postgres.host, "localhost")
    result = await check(dsn, trust_anchor=postgres.trust_anchor)
    assert names(result, "ok") == STEPS
    assert result.tls is not None
    assert result.tls.server_name == "localhost"


async def test_the_pg_variables_serve_when_there_is_no_dsn(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGHOST": postgres.host,
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "neon",
        "PGPASSWORD": password_in(postgres.dsn),
        "PGDATABASE": "neondb",
    }.items():
        monkeypatch.setenv(name, value)
    assert (await check(trust_anchor=postgres.trust_anchor)).verdict == "good"


async def test_the_steps_follow_one_another_and_fill_the_whole_time(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    end = 0.0
    for step in result.steps:
        if step.started is not None and step.seconds is not None:
            assert step.started >= end
            assert step.seconds > 0
            end = step.started + step.seconds
    assert result.seconds == end


async def test_the_facts_are_those_of_a_connection_made_with_the_same_parameters(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        version = await connection.fetchval("SHOW server_version")
        report = neon_async.connection_tls_report(connection)
    finally:
        await connection.close()
    assert result.tls == report
    assert result.server_version == version
    assert result.anchor is not None
    assert result.anchor.sha256 == report.anchor_sha256
    assert result.days_left == (report.not_after - datetime.datetime.now(datetime.UTC)).days


async def test_nothing_is_left_connected(postgres: LocalPostgres, tmp_path: Path) -> None:
    name = tmp_path.name
    await check(f"{postgres.dsn}&application_name={name}", trust_anchor=postgres.trust_anchor)
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        with anyio.fail_after(30):  # the server notices at once, or never
            while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name):
                pass
    finally:
        await connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# Connections that do not work


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, held so that nobody else can listen on it."""
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def assert_ended_at(result: CheckResult, step: str, kind: type[Exception], verdict: str) -> None:
    assert result.problem is not None
    assert (result.problem.step, result.problem.type, result.verdict) == (step, kind.__name__, verdict)
    assert names(result, "failed") == [step]
    reached = STEPS.index(step)
    assert [step.name for step in result.steps] == STEPS
    assert [(step.outcome, step.detail) for step in result.steps[reached + 1 :]] == [
        ("skipped", "not reached") for _ in STEPS[reached + 1 :]
    ]
    assert result.steps[reached].detail == result.problem.message != ""
    assert result.server_version is None


@pytest.mark.parametrize(
    "parameter",
    ["sslmode=require", "sslmode=disable", "channel_binding=disable", "slmode=verify-full", "hostaddr=here", "port=0"],
)
async def test_a_configuration_that_is_refused_ends_at_parse(parameter: str) -> None:
    result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb?{parameter}")
    assert result.problem is not None
    kind: type[Exception] = getattr(neon_async, result.problem.type)
    assert issubclass(kind, neon_async.ConfigurationError)
    assert_ended_at(result, "parse", kind, "refused")
    assert (result.target, result.anchor, result.tls) == (None, None, None)


async def test_a_trust_anchor_that_cannot_be_read_ends_at_parse(tmp_path: Path) -> None:
    result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb", trust_anchor=tmp_path / "nowhere.pem")
    assert_ended_at(result, "parse", neon_async.ConfigurationError, "refused")


async def test_a_name_that_does_not_exist_ends_at_dns() -> None:
    result = await check("postgresql://neon:hunter2@no-such-endpoint.invalid/neondb")  # RFC 6761: never resolves
    assert_ended_at(result, "dns", neon_async.ConnectError, "failed")


async def test_a_port_where_nobody_listens_ends_at_tcp() -> None:
    with closed_port() as port:
        result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}:{port}/neondb?hostaddr=127.0.0.1")
    assert_ended_at(result, "tcp", neon_async.ConnectError, "failed")
    assert result.problem is not None
    assert result.problem.retryable
    assert result.anchor is not None
    assert result.tls is None


async def test_a_certificate_of_a_private_ca_ends_at_tls_without_its_trust_anchor(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn)
    assert_ended_at(result, "tls", neon_async.CertificateError, "refused")
    assert result.anchor is not None
    assert result.anchor.sha256 == neon_async.ISRG_ROOT_X1_SHA256
    assert result.tls is None


async def test_a_silent_server_ends_at_tls_within_connect_timeout() -> None:
    async with Impostor(lambda conversation: None) as impostor:
        result = await check(f"{impostor.dsn}&connect_timeout=0.3")
    assert_ended_at(result, "tls", neon_async.ConnectTimeoutError, "failed")


async def test_a_wrong_password_ends_at_authentication(postgres: LocalPostgres) -> None:
    dsn = postgres.dsn.replace(password_in(postgres.dsn), "wrong")
    result = await check(dsn, trust_anchor=postgres.trust_anchor)
    assert_ended_at(result, "authentication", neon_async.InvalidPasswordError, "failed")


async def test_a_database_that_does_not_exist_ends_at_authentication(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn.replace("/neondb", "/nowhere"), trust_anchor=postgres.trust_anchor)
    assert_ended_at(result, "authentication", neon_async.DatabaseNotFoundError, "failed")


def certified(make_script: Callable[[ssl.SSLContext], Script]) -> Impostor:
    """Return an impostor whose certificate is beyond reproach."""
    ca = trustme.CA()
    context = server_context(ca.issue_cert(SERVER_NAME).private_key_and_cert_chain_pem.bytes())
    return Impostor(make_script(context), trust_anchor=ca.cert_pem.bytes())


async def test_a_request_for_the_password_in_cleartext_ends_at_authentication() -> None:
    cleartext = authentication_request(3)
    async with certified(lambda context: login(context, cleartext)) as impostor:
        result = await check(impostor.dsn, trust_anchor=impostor.trust_anchor)
    assert_ended_at(result, "authentication", neon_async.AuthenticationError, "refused")


async def test_direct_tls_that_is_given_up_for_an_sslrequest_is_listed_as_retried() -> None:
    def without_direct_tls(context: ssl.SSLContext) -> Script:
        busy = error_response("Failed to acquire permit to connect to the database")

        def script(conversation: Conversation) -> None:
            if conversation.opens_with_tls():
                conversation.hang_up()
            else:
                conversation.send(b"S")
                login(context, busy)(conversation)

        return script

    async with certified(without_direct_tls) as impostor:
        result = await check(impostor.dsn, trust_anchor=impostor.trust_anchor)
    assert [(step.name, step.outcome) for step in result.steps] == [
        ("parse", "ok"),
        ("dns", "skipped"),
        ("tcp", "ok"),
        ("tls", "retried"),
        ("tcp", "ok"),
        ("tls", "ok"),
        ("authentication", "failed"),
        ("query", "skipped"),
    ]
    assert result.problem is not None
    assert result.problem.type == "TooManyConnectionsError"


# ---------------------------------------------------------------------------------------------------------------------
# A connection that breaks just before the query: the server's process for it is stopped or ended from outside


@pytest.fixture
def before_the_query(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Call a function each time a walk arrives at its query."""

    def arrange(action: Callable[[], None]) -> None:
        begin = _check._Walk.begin

        def begin_after_the_action(walk: _check._Walk, name: str) -> None:
            if name == "query":
                action()
            begin(walk, name)

        monkeypatch.setattr(_check._Walk, "begin", begin_after_the_action)

    return arrange


@contextmanager
def administrator(postgres: LocalPostgres, folder: Path) -> Iterator[psycopg.Connection[Any]]:
    """A second way in, which knows nothing of neon_async."""
    root = folder / "root.pem"
    root.write_bytes(postgres.trust_anchor)
    with psycopg.connect(f"{postgres.dsn}&sslmode=verify-full&sslrootcert={root}", autocommit=True) as connection:
        yield connection


async def test_a_connection_that_ends_before_the_query_ends_at_query(
    postgres: LocalPostgres, tmp_path: Path, before_the_query: Callable[[Callable[[], None]], None]
) -> None:
    name, ended = tmp_path.name, list[Any]()
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
    with administrator(postgres, tmp_path) as admin:
        before_the_query(lambda: ended.extend(admin.execute(end, (name,))))
        result = await check(f"{postgres.dsn}&application_name={name}", trust_anchor=postgres.trust_anchor)
    assert ended == [(True,)]
    assert result.problem is not None
    assert (result.problem.step, result.verdict) == ("query", "failed")
    assert names(result, "failed") == ["query"]
    assert result.tls is not None
    assert result.server_version is None


async def test_a_server_that_never_answers_the_query_ends_at_query_within_connect_timeout(
    postgres: LocalPostgres, tmp_path: Path, before_the_query: Callable[[Callable[[], None]], None]
) -> None:
    name, stopped = tmp_path.name, list[int]()

    def stop() -> None:
        find = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
        stopped.extend(pid for (pid,) in admin.execute(find, (name,)))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    with administrator(postgres, tmp_path) as admin:
        before_the_query(stop)
        dsn = f"{postgres.dsn}&application_name={name}&connect_timeout=2"
        try:
            result = await check(dsn, trust_anchor=postgres.trust_anchor)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    assert len(stopped) == 1
    assert_ended_at(result, "query", TimeoutError, "failed")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


async def test_the_json_of_a_good_connection_has_the_documented_shape(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    document = json.loads(render_json(result))
    assert list(document) == [
        "verdict",
        "seconds",
        "target",
        "steps",
        "tls",
        "certificate",
        "anchor",
        "server_version",
        "problem",
    ]
    assert document["verdict"] == "good"
    assert document["problem"] is None
    assert all(list(step) == ["name", "started", "seconds", "outcome", "detail"] for step in document["steps"])
    ran = [step for step in document["steps"] if step["outcome"] == "ok"]
    assert all(isinstance(step[key], float) for step in ran for key in ("started", "seconds"))
    assert list(document["tls"]) == ["version", "cipher", "alpn", "negotiation", "server_name", "mechanism"]
    assert document["tls"]["mechanism"] == "SCRAM-SHA-256-PLUS"
    assert (document["tls"]["version"], document["tls"]["alpn"]) == ("TLSv1.3", "postgresql")
    assert list(document["certificate"]) == ["subject", "issuer", "not_after", "days_left", "sha256"]
    assert result.tls is not None
    assert datetime.datetime.fromisoformat(document["certificate"]["not_after"]) == result.tls.not_after
    assert list(document["anchor"]) == ["subject", "source", "sha256"]


async def test_the_json_of_a_refusal_has_the_same_keys_and_the_problem() -> None:
    document = json.loads(render_json(await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb?sslmode=require")))
    assert document["verdict"] == "refused"
    assert list(document["problem"]) == ["step", "type", "message", "retryable"]
    assert document["problem"]["type"] == "InsecureConfigurationError"
    assert document["tls"] is document["certificate"] is document["anchor"] is document["server_version"] is None


def test_the_json_of_the_roots_tells_what_the_survey_found() -> None:
    places = survey()
    document = json.loads(render_roots_json(places))
    assert document["sha256"] == neon_async.ISRG_ROOT_X1_SHA256
    assert document["found"] is any(place.found for place in places)
    assert [Place(**place) for place in document["places"]] == places


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
async def test_the_picture_of_a_good_connection_fits_80_columns_in_any_encoding(
    postgres: LocalPostgres, encoding: str
) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    shown = picture(lambda console: render(result, console), encoding=encoding)
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[1] for line in shown.split("\n\n")[1].splitlines()[:-1]] == STEPS
    assert shown.splitlines()[-1].startswith("Good:")


async def test_the_picture_tells_the_same_as_the_json(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    document = json.loads(render_json(result))
    shown = facts(picture(lambda console: render(result, console), width=200))
    expected = document["tls"] | document["certificate"] | {"found_in": document["anchor"]["source"]}
    for name in ("version", "cipher", "negotiation", "server_name", "mechanism", "issuer", "found_in"):
        assert shown[name.replace("_", " ")] == expected[name]
    assert f"{document['certificate']['days_left']} days left" in shown["notAfter"]


async def test_each_bar_begins_where_the_one_before_ends() -> None:
    steps = (
        Step("parse", 0.0, 0.1, "ok", ""),
        Step("dns", 0.1, 0.2, "ok", ""),
        Step("tcp", 0.3, 0.7, "ok", ""),
        *(Step(name, None, None, "skipped", "not reached") for name in STEPS[3:]),
    )
    shown = picture(lambda console: render(CheckResult(steps), console), encoding="ascii")
    assert re.findall(r"(\d+\.\d) ms +(=+)", shown) == [("100.0", "=="), ("200.0", "====="), ("700.0", "=" * 15)]
    spans = [match.span() for line in shown.splitlines() for match in re.finditer("=+", line)]
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]


async def test_the_picture_of_a_problem_tells_what_to_do_and_what_was_not_reached(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn)
    shown = picture(lambda console: render(result, console))
    assert result.problem is not None
    assert " ".join(result.problem.message.split()) in " ".join(shown.split())
    assert shown.count("not reached") == 2
    assert "CertificateError at the step tls" in shown
    assert shown.splitlines()[-1].startswith("Refused:")


async def test_a_hardened_dsn_in_the_picture_is_never_broken_into_lines() -> None:
    path = "x" * 120
    result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}/{path}?sslmode=require")
    shown = picture(lambda console: render(result, console))
    assert f"/{path}?sslmode=verify-full" in shown


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\x1b[2J\x1b]0;owned\x07", id="terminal escapes"),
        pytest.param("a\rb\x08c\x9b31m", id="control characters"),
        pytest.param("admin\u202egnp", id="right-to-left override"),
        pytest.param("[bold red]good[/bold red][link=x]", id="markup"),
    ],
)
async def test_what_a_server_says_cannot_steer_the_terminal(text: str) -> None:
    answer = error_response(f"no: {text}", code="28000")
    async with certified(lambda context: login(context, answer)) as impostor:
        result = await check(impostor.dsn, trust_anchor=impostor.trust_anchor)
    assert result.problem is not None
    assert result.problem.step == "authentication"
    shown = picture(lambda console: render(result, console))
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[bold red]good" in shown or "bold" not in text


@pytest.mark.parametrize(
    ("certificates", "found", "words"),
    [
        pytest.param(140, True, "found among 140 certificates", id="found"),
        pytest.param(3, False, "not found among 3 certificates", id="not found"),
        pytest.param(None, False, "no such place on this system", id="no such place"),
    ],
)
def test_the_picture_of_the_roots_shows_each_place_and_its_state(
    certificates: int | None, found: bool, words: str
) -> None:
    place = Place("Some system", "/some/path/" + "x" * 90, certificates, found)
    shown = picture(lambda console: render_roots([place], console))
    assert re.search(rf"Some system +{words}$", shown, re.MULTILINE)
    assert place.location in shown
    assert f"found in {int(found)} of 1 places" in shown
    assert neon_async.ISRG_ROOT_X1_SHA256 in shown


@pytest.mark.parametrize("trusted", [True, False], ids=["good", "refused"])
async def test_the_password_appears_in_no_rendering(postgres: LocalPostgres, trusted: bool) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor if trusted else None)
    password = password_in(postgres.dsn)
    shown = [repr(result), render_json(result), picture(lambda console: render(result, console))]
    assert [text for text in shown if password in text] == []
