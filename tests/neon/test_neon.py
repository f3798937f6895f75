"""What Neon's host names and error texts mean; the texts are those of its proxy and of PostgreSQL."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import neon_async
from neon_async._neon.endpoint import Endpoint, classify, parse_host, short_name

ID = "ep-cool-darkness-123456"


@pytest.mark.parametrize(
    ("host", "endpoint", "direct_host"),
    [
        pytest.param(f"{ID}.us-east-2.aws.neon.tech", (ID, False, "us-east-2", "aws"), None, id="direct"),
        pytest.param(
            f"{ID}-pooler.us-east-2.aws.neon.tech",
            (ID, True, "us-east-2", "aws"),
            f"{ID}.us-east-2.aws.neon.tech",
            id="pooled",
        ),
        pytest.param(
            "ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech",
            ("ep-cool-darkness-a1b2c3d4", True, "us-east-2", "aws"),
            "ep-cool-darkness-a1b2c3d4.us-east-2.aws.neon.tech",
            id="8 base-36 characters",
        ),
        pytest.param(f"{ID}.c-2.eu-central-1.aws.neon.tech", (ID, False, "eu-central-1", "aws"), None, id="cell"),
        pytest.param(
            f"{ID}-pooler.c-2.eu-central-1.aws.neon.tech",
            (ID, True, "eu-central-1", "aws"),
            f"{ID}.c-2.eu-central-1.aws.neon.tech",
            id="cell and pooled",
        ),
        pytest.param(f"{ID}.eastus2.azure.neon.tech", (ID, False, "eastus2", "azure"), None, id="azure"),
        pytest.param(
            f"{ID}-pooler.gwc.azure.neon.tech",
            (ID, True, "gwc", "azure"),
            f"{ID}.gwc.azure.neon.tech",
            id="azure and pooled",
        ),
        pytest.param(
            "ep-a-pooler-123456-pooler.us-east-2.aws.neon.tech",
            ("ep-a-pooler-123456", True, "us-east-2", "aws"),
            "ep-a-pooler-123456.us-east-2.aws.neon.tech",
            id="an endpoint named pooler",
        ),
        pytest.param(
            "ep-a-b-12345678901.ap-southeast-1.aws.neon.tech",
            ("ep-a-b-12345678901", False, "ap-southeast-1", "aws"),
            None,
            id="many digits",
        ),
    ],
)
def test_a_host_name_tells_its_endpoint(
    host: str, endpoint: tuple[str, bool, str, str], direct_host: str | None
) -> None:
    assert parse_host(host) == Endpoint(*endpoint, direct_host or host)
    assert short_name(host) == endpoint[0]


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("localhost", id="localhost"),
        pytest.param("db.example.com", id="somebody else's"),
        pytest.param("console.neon.tech", id="Neon's console"),
        pytest.param(f"{ID}.us-east-2.aws.neon.tech.example.com", id="Neon's name inside another"),
        pytest.param(f"{ID}.us-east-2.aws.neon-tech", id="another top-level domain"),
        pytest.param(f"{ID}.us-east-2.aws.neonxtech", id="the dot is a dot"),
        pytest.param(f"x{ID}.us-east-2.aws.neon.tech", id="something in front"),
        pytest.param(f"{ID}.us-east-2.aws.neon.tech\n", id="line break"),
        pytest.param("", id="empty"),
    ],
)
def test_another_host_name_tells_nothing(host: str) -> None:
    assert parse_host(host) is None
    assert short_name(host) == host


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
    known = classify("XX000", prefix + text)
    assert known is not None
    assert known[0] is cls
    assert known[0].retryable is retryable
    assert known[1].endswith(".")


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
    known = classify(sqlstate, "ein Text in einer anderen Sprache")
    assert known is not None
    assert known[0] is cls


@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [
        pytest.param("XX000", "something new went wrong", id="unknown text"),
        pytest.param("42704", 'unrecognized configuration parameter "x"', id="not about connecting"),
        pytest.param(None, "", id="nothing at all"),
        pytest.param("XX000", 'relation "neondb" does not exist', id="another thing does not exist"),
    ],
)
def test_what_is_not_known_is_not_guessed(sqlstate: str | None, text: str) -> None:
    assert classify(sqlstate, text) is None


def test_a_role_named_like_another_error_is_still_a_wrong_password() -> None:
    known = classify("XX000", "password authentication failed for user 'sorry, too many clients already'")
    assert known is not None
    assert known[0] is neon_async.InvalidPasswordError


@given(st.text(max_size=300), st.none() | st.text(max_size=5))
def test_no_text_breaks_the_classification(text: str, sqlstate: str | None) -> None:
    known = classify(sqlstate, text)
    assert known is None or issubclass(known[0], neon_async.NeonAsyncError)
    parse_host(text)
