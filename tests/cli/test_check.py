"""`check()` reports every step and every fact of one connection, whether it succeeds or fails."""

from __future__ import annotations

import dataclasses
import datetime
import os
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
from support.command_line import STEPS, certified, pg_variables
from support.probes import password_of

import neon_async
from neon_async._cli.check import CheckResult, _Timeline, check
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import (
    SERVER_NAME,
    Conversation,
    Impostor,
    Script,
    authentication_request,
    error_response,
    login,
)

pytestmark = pytest.mark.anyio


def names(result: CheckResult, outcome: str) -> list[str]:
    return [step.name for step in result.steps if step.outcome == outcome]


# ---------------------------------------------------------------------------------------------------------------------
# A connection that works


async def test_a_good_connection_passes_every_step_and_skips_dns_if_hostaddr_is_given(
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


async def test_without_a_dsn_the_pg_variables_are_used(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in pg_variables(postgres).items():
        monkeypatch.setenv(name, value)
    assert (await check(trust_anchor=postgres.trust_anchor)).verdict == "good"


async def test_the_steps_follow_each_other_and_end_with_the_check(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    end = 0.0
    for step in result.steps:
        if step.started is not None and step.seconds is not None:
            assert step.started >= end
            assert step.seconds > 0
            end = step.started + step.seconds
    assert result.seconds == end


async def test_the_facts_are_those_of_a_connection_with_the_same_parameters(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        version = await connection.fetchval("SHOW server_version")
        report = neon_async.connection_tls_report(connection)
    finally:
        await connection.close()
    assert result.tls is not None
    assert result.tls.revocation == result.revocation  # which the check adds
    assert dataclasses.replace(result.tls, revocation=report.revocation) == report
    assert result.server_version == version
    assert result.anchor is not None
    assert result.anchor.sha256 == report.anchor_sha256
    assert result.days_left == (report.not_after - datetime.datetime.now(datetime.UTC)).days


async def test_the_connection_is_closed_afterwards(postgres: LocalPostgres, tmp_path: Path) -> None:
    name = tmp_path.name
    await check(f"{postgres.dsn}&application_name={name}", trust_anchor=postgres.trust_anchor)
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        with anyio.fail_after(30):  # a server that does not notice at once does not notice at all
            while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name):
                pass
    finally:
        await connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# Settings that create_pool() refuses, and accepts under sslmode=verify-full


@pytest.mark.parametrize(
    "parameter",
    [
        *("sslmode=require", "sslmode=disable", "sslmode=allow", "sslmode=prefer", "sslmode=verify-ca", "sslmode="),
        *("sslmode=nonsense", "sslmode", "ssl=true", "sslmode=require&sslmode=disable", "sslm%6Fde=require"),
        "channel_binding=require&sslmode=require",
    ],
)
async def test_a_weak_dsn_is_checked_under_verify_full_and_the_dsn_to_use_is_shown(
    postgres: LocalPostgres, parameter: str
) -> None:
    dsn = f"{postgres.dsn}&{parameter}"
    with pytest.raises(neon_async.ConfigurationError) as refused:
        neon_async.create_pool(dsn, trust_anchor=postgres.trust_anchor)
    result = await check(dsn, trust_anchor=postgres.trust_anchor)
    assert result.verdict == "good"
    assert names(result, "ok") == ["parse", "tcp", "tls", "authentication", "query"]
    assert result.refusal is not None
    assert (result.refusal.type, result.refusal.message) == (type(refused.value).__name__, str(refused.value))
    password = password_of(postgres)
    assert result.refusal.hardened == neon_async.harden_dsn(dsn).replace(password, "***")
    assert password not in repr(result)


async def test_a_weak_variable_is_refused_and_there_is_no_dsn_to_show(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (pg_variables(postgres) | {"PGSSLMODE": "require"}).items():
        monkeypatch.setenv(name, value)
    result = await check(trust_anchor=postgres.trust_anchor)
    assert result.verdict == "good"
    assert result.refusal is not None
    assert "PGSSLMODE" in result.refusal.message
    assert result.refusal.hardened is None


async def test_a_weak_variable_beside_a_dsn_is_refused_with_the_dsn_to_use(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSSLMODE", "require")
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    assert result.verdict == "good"
    assert result.refusal is not None
    assert "PGSSLMODE" in result.refusal.message
    assert result.refusal.hardened == f"{postgres.dsn}&sslmode=verify-full".replace(password_of(postgres), "***")


async def test_a_weak_dsn_that_is_refused_under_verify_full_too_shows_both_reasons_and_no_dsn() -> None:
    result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb?sslmode=require&sslsni=0")
    assert_ended_at(result, "parse", neon_async.InsecureConfigurationError, "refused")
    assert result.problem is not None
    assert result.problem.message.startswith("sslsni (DSN)")
    assert result.refusal is not None
    assert result.refusal.message.startswith("sslmode (DSN)")
    assert "Hardened" not in result.refusal.message
    assert result.refusal.hardened is None


async def test_settings_that_are_accepted_are_not_refused(postgres: LocalPostgres) -> None:
    for dsn in (postgres.dsn, f"{postgres.dsn}&sslmode=verify-full"):
        assert (await check(dsn, trust_anchor=postgres.trust_anchor)).refusal is None


# ---------------------------------------------------------------------------------------------------------------------
# What is known so far


async def test_each_step_is_reported_when_it_begins_and_when_it_ends(postgres: LocalPostgres) -> None:
    reports: list[CheckResult] = []
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor, on_progress=reports.append)
    running = [step.name for report in reports for step in report.steps if step.outcome == "running"]
    assert running == ["parse", "tcp", "tls", "authentication", "query"]
    for before, after in zip(reports, [*reports[1:], result], strict=True):
        ended = [(step.name, step.outcome) for step in before.steps if step.outcome != "running"]
        assert ended == [(step.name, step.outcome) for step in after.steps[: len(ended)]]
    assert [report.target for report in reports] == [None, *[result.target] * (len(reports) - 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Connections that fail


@contextmanager
def closed_port() -> Iterator[int]:
    """Yield a port that refuses connections and is reserved, so that no other process can listen on it."""
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
    ["sslsni=0", "channel_binding=disable", "slmode=verify-full", "hostaddr=here", "port=0"],
)
async def test_a_refused_configuration_ends_the_check_at_parse(parameter: str) -> None:
    result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb?{parameter}")
    assert result.problem is not None
    kind: type[Exception] = getattr(neon_async, result.problem.type)
    assert issubclass(kind, neon_async.ConfigurationError)
    assert_ended_at(result, "parse", kind, "refused")
    assert (result.target, result.anchor, result.tls) == (None, None, None)
    assert result.refusal is None


async def test_an_unreadable_trust_anchor_ends_the_check_at_parse(tmp_path: Path) -> None:
    result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb", trust_anchor=tmp_path / "nowhere.pem")
    assert_ended_at(result, "parse", neon_async.ConfigurationError, "refused")


async def test_a_host_name_that_does_not_exist_ends_the_check_at_dns() -> None:
    result = await check("postgresql://neon:hunter2@no-such-endpoint.invalid/neondb")  # RFC 6761: never resolves
    assert_ended_at(result, "dns", neon_async.ConnectError, "failed")


async def test_a_port_without_a_listener_ends_the_check_at_tcp() -> None:
    with closed_port() as port:
        result = await check(f"postgresql://neon:hunter2@{SERVER_NAME}:{port}/neondb?hostaddr=127.0.0.1")
    assert_ended_at(result, "tcp", neon_async.ConnectError, "failed")
    assert result.problem is not None
    assert result.problem.retryable
    assert result.anchor is not None
    assert result.tls is None


async def test_a_certificate_of_a_private_ca_ends_the_check_at_tls(
    postgres: LocalPostgres,
) -> None:
    result = await check(postgres.dsn)
    assert_ended_at(result, "tls", neon_async.CertificateError, "refused")
    assert result.anchor is not None
    assert result.anchor.sha256 == neon_async.ISRG_ROOT_X1_SHA256
    assert result.tls is None


async def test_a_silent_server_ends_the_check_at_tls_within_connect_timeout() -> None:
    async with Impostor(lambda conversation: None) as impostor:
        result = await check(f"{impostor.dsn}&connect_timeout=0.3")
    assert_ended_at(result, "tls", neon_async.ConnectTimeoutError, "failed")


async def test_a_wrong_password_ends_the_check_at_authentication(postgres: LocalPostgres) -> None:
    dsn = postgres.dsn.replace(password_of(postgres), "wrong")
    result = await check(dsn, trust_anchor=postgres.trust_anchor)
    assert_ended_at(result, "authentication", neon_async.InvalidPasswordError, "failed")


async def test_a_database_that_does_not_exist_ends_the_check_at_authentication(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn.replace("/neondb", "/nowhere"), trust_anchor=postgres.trust_anchor)
    assert_ended_at(result, "authentication", neon_async.DatabaseNotFoundError, "failed")


async def test_a_request_for_the_password_in_cleartext_ends_the_check_at_authentication() -> None:
    cleartext = authentication_request(3)
    async with certified(lambda context: login(context, cleartext)) as impostor:
        result = await check(impostor.dsn, trust_anchor=impostor.trust_anchor)
    assert_ended_at(result, "authentication", neon_async.AuthenticationError, "refused")


async def test_direct_tls_is_listed_as_retried_if_the_server_does_not_support_it() -> None:
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
# A connection that fails just before the query, because its server process is stopped or terminated


@pytest.fixture
def before_the_query(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Return a function that arranges a call just before the step query begins."""

    def arrange(action: Callable[[], None]) -> None:
        begin = _Timeline.begin

        def begin_after_the_action(timeline: _Timeline, name: str) -> None:
            if name == "query":
                action()
            begin(timeline, name)

        monkeypatch.setattr(_Timeline, "begin", begin_after_the_action)

    return arrange


@contextmanager
def administrator(postgres: LocalPostgres, folder: Path) -> Iterator[psycopg.Connection[Any]]:
    """Yield a second connection, made by libpq and not by neon_async."""
    root = folder / "root.pem"
    root.write_bytes(postgres.trust_anchor)
    with psycopg.connect(f"{postgres.dsn}&sslmode=verify-full&sslrootcert={root}", autocommit=True) as connection:
        yield connection


async def test_a_connection_that_ends_before_the_query_ends_the_check_at_query(
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


async def test_a_server_that_never_answers_the_query_ends_the_check_at_query_within_connect_timeout(
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
