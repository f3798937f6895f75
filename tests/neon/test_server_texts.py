"""The error texts and SQLSTATEs of Neon's proxy, PgBouncer and PostgreSQL are mapped to error classes and advice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import neon_async
from neon_async._neon.server_texts import _VERDICTS, ServerVerdict, classify

NO, YES = False, True
COMPUTE_QUOTA = "Your account or project has exceeded the compute time quota. Upgrade your plan to increase limits."
DATA_QUOTA = "Your project has exceeded the data transfer quota. Upgrade your plan to increase limits."


@pytest.mark.parametrize(
    ("text", "cls", "retryable"),
    [
        ("password authentication failed for user 'alex'", neon_async.InvalidPasswordError, NO),
        (
            "This IP address 203.0.113.7 is not allowed to connect to this endpoint.\nPlease add it to the list.",
            neon_async.IPNotAllowedError,
            NO,
        ),
        ("Connection from a blocked network", neon_async.IPNotAllowedError, NO),
        ("This VPC endpoint id vpce-1 is not allowed to connect to this endpoint.", neon_async.IPNotAllowedError, NO),
        ("This VPC endpoint id vpce-1 is not known", neon_async.IPNotAllowedError, NO),
        ("VPC endpoint ID is not specified.", neon_async.IPNotAllowedError, NO),
        ("endpoint cannot be found", neon_async.EndpointNotFoundError, NO),
        (
            "The requested endpoint could not be found, or you don't have access to it. Please check the provided ID.",
            neon_async.EndpointNotFoundError,
            NO,
        ),
        ("endpoint is disabled", neon_async.EndpointDisabledError, NO),
        (
            "Endpoint ID is not specified. Either please upgrade the postgres client library (libpq) for SNI support.",
            neon_async.EndpointNotFoundError,
            NO,
        ),
        (
            "Inconsistent project name inferred from SNI ('ep-a-b-123456') and project option ('ep-c-d-654321').",
            neon_async.EndpointNotFoundError,
            NO,
        ),
        (COMPUTE_QUOTA, neon_async.QuotaExceededError, NO),
        (DATA_QUOTA, neon_async.QuotaExceededError, NO),
        ("Your project has exceeded the active time quota.", neon_async.QuotaExceededError, NO),
        ("Your project has exceeded the written data quota.", neon_async.QuotaExceededError, NO),
        ("Your project has exceeded the logical size quota.", neon_async.QuotaExceededError, NO),
        (
            "You have exceeded the limit of concurrently active endpoints. Please suspend some endpoints.",
            neon_async.QuotaExceededError,
            NO,
        ),
        ("unsupported startup parameter: statement_timeout", neon_async.EndpointError, NO),
        ('database "neondb" does not exist', neon_async.DatabaseNotFoundError, NO),
        ("Couldn't connect to compute node", neon_async.ComputeUnavailableError, YES),
        ("Control plane request failed", neon_async.ComputeUnavailableError, YES),
        (
            "endpoint is temporarily unavailable. Check your quotas and/or contact our support.",
            neon_async.ComputeUnavailableError,
            YES,
        ),
        (
            "Your project already has running operations, scheduling of new ones is prohibited.",
            neon_async.ComputeUnavailableError,
            YES,
        ),
        (
            "Failed to acquire permit to connect to the database. Too many database connection attempts are ongoing.",
            neon_async.TooManyConnectionsError,
            YES,
        ),
        ("Too many connections attempts", neon_async.TooManyConnectionsError, YES),
        ("Too many connections to this endpoint. Please try again later.", neon_async.TooManyConnectionsError, YES),
        ("You've exceeded the rate limit", neon_async.TooManyConnectionsError, YES),
        ("no more connections allowed (max_client_conn)", neon_async.TooManyConnectionsError, YES),
        (
            "remaining connection slots are reserved for roles with the SUPERUSER attribute",
            neon_async.TooManyConnectionsError,
            YES,
        ),
        ("sorry, too many clients already", neon_async.TooManyConnectionsError, YES),
        ("Authentication timed out", neon_async.ComputeUnavailableError, YES),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
@pytest.mark.parametrize("prefix", ["", "ERROR:  "], ids=["bare", "prefixed"])
def test_the_text_decides_where_every_sqlstate_is_xx000(
    prefix: str, text: str, cls: type[neon_async.NeonAsyncError], retryable: bool
) -> None:
    verdict = classify("XX000", prefix + text)
    assert verdict.error is cls
    assert verdict.error.retryable is retryable
    assert verdict.advice.endswith(".")


@pytest.mark.parametrize(
    ("sqlstate", "cls"),
    [
        pytest.param("28P01", neon_async.InvalidPasswordError, id="invalid password"),
        pytest.param("28000", neon_async.AuthenticationError, id="invalid authorization"),
        pytest.param("3D000", neon_async.DatabaseNotFoundError, id="missing database"),
        pytest.param("53300", neon_async.TooManyConnectionsError, id="too many connections"),
        pytest.param("57P01", neon_async.ComputeUnavailableError, id="shutting down"),
        pytest.param("57P02", neon_async.ComputeUnavailableError, id="crashed"),
        pytest.param("57P03", neon_async.ComputeUnavailableError, id="starting up"),
    ],
)
def test_a_genuine_sqlstate_decides_where_the_text_is_translated(
    sqlstate: str, cls: type[neon_async.NeonAsyncError]
) -> None:
    verdict = classify(sqlstate, "ein Text in einer anderen Sprache")
    assert verdict.error is cls


FINAL, PASSES = NO, YES


@pytest.mark.parametrize(
    ("sqlstate", "retryable"),
    [
        *((sqlstate, PASSES) for sqlstate in ("08000", "08P01", "53000", "53100", "53200", "53400", "57000", "57014")),
        *((sqlstate, PASSES) for sqlstate in ("57P04", "57P05", "58000", "58030", "58P01", "XX000", "XX001", "XX002")),
        *((sqlstate, PASSES) for sqlstate in ("55000", "55006", "40001", "F0000", "99999", "", None)),
        *((sqlstate, FINAL) for sqlstate in ("28000", "28P01", "28999", "3D000", "3D999", "42501", "42704", "42P01")),
        *((sqlstate, FINAL) for sqlstate in ("0A000", "22023", "3F000", "P0001")),
    ],
)
def test_the_class_of_the_sqlstate_decides_where_nothing_else_is_known(sqlstate: str | None, retryable: bool) -> None:
    verdict = classify(sqlstate, "something new went wrong")
    assert verdict.error.retryable is retryable
    assert verdict.advice.endswith(".")


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        ('role "alex" is not permitted to log in', neon_async.AuthenticationError),
        ('permission denied for database "neondb"', neon_async.AuthenticationError),
        ('no pg_hba.conf entry for host "203.0.113.7", user "alex"', neon_async.AuthenticationError),
        ('role "alex" does not exist', neon_async.AuthenticationError),
        ('unrecognized configuration parameter "nosuch"', neon_async.EndpointError),
        ('invalid value for parameter "work_mem": "x"', neon_async.EndpointError),
        ("no such database: neondb", neon_async.DatabaseNotFoundError),
        ("query_wait_timeout", neon_async.ComputeUnavailableError),
        ("server login has been failing, try again later (server_login_retry)", neon_async.ComputeUnavailableError),
        ("server conn crashed?", neon_async.ComputeUnavailableError),
        ("pgbouncer cannot connect to server", neon_async.ComputeUnavailableError),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
@pytest.mark.parametrize("sqlstate", ["XX000", "08P01"])
def test_texts_of_postgresql_and_pgbouncer_decide_also_where_a_proxy_relays_them(
    sqlstate: str, text: str, cls: type[neon_async.NeonAsyncError]
) -> None:
    assert classify(sqlstate, text).error is cls


def test_a_role_named_like_another_error_is_still_a_wrong_password() -> None:
    verdict = classify("XX000", "password authentication failed for user 'sorry, too many clients already'")
    assert verdict.error is neon_async.InvalidPasswordError


@given(st.text(max_size=300), st.none() | st.text(max_size=5))
def test_any_text_and_sqlstate_are_classified_without_an_exception(text: str, sqlstate: str | None) -> None:
    verdict = classify(sqlstate, text)
    assert issubclass(verdict.error, neon_async.NeonAsyncError)


@pytest.mark.parametrize("verdict", _VERDICTS, ids=lambda verdict: f"{verdict.error.__name__}: {verdict.advice[:30]}")
def test_no_row_of_the_table_is_shadowed_by_another(verdict: ServerVerdict) -> None:
    for text in verdict.texts:
        if isinstance(text, str):
            assert classify(None, text) is verdict
    for sqlstate in verdict.sqlstates:
        assert classify(sqlstate, "") is verdict


def test_a_vpc_endpoint_that_is_not_allowed_gets_the_advice_for_vpc_endpoints() -> None:
    verdict = classify("XX000", "This VPC endpoint id vpce-1 is not allowed to connect to this endpoint.")
    assert verdict.advice == "Allow this VPC endpoint in the Neon project."
