"""Host names of Neon are parsed into their endpoints, and other host names into none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neon_async._neon.endpoint import Endpoint, parse_host, short_name

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
            f"{ID}-pooler.us-east-1.postgres.vercel-storage.com",
            (ID, True, "us-east-1", "aws"),
            f"{ID}.us-east-1.postgres.vercel-storage.com",
            id="Vercel and pooled",
        ),
        pytest.param(f"{ID}.us-east-1.postgres.vercel-storage.com", (ID, False, "us-east-1", "aws"), None, id="Vercel"),
        pytest.param(
            f"{ID}-pooler.c-4.eu-central-1.pg.koyeb.app",
            (ID, True, "eu-central-1", "aws"),
            f"{ID}.c-4.eu-central-1.pg.koyeb.app",
            id="Koyeb",
        ),
        pytest.param(
            f"{ID}-pooler.c-2.us-west-2.retooldb.com",
            (ID, True, "us-west-2", "aws"),
            f"{ID}.c-2.us-west-2.retooldb.com",
            id="Retool",
        ),
        pytest.param(
            "ep-a-b-12345678901.ap-southeast-1.aws.neon.tech",
            ("ep-a-b-12345678901", False, "ap-southeast-1", "aws"),
            None,
            id="many digits",
        ),
    ],
)
def test_a_host_name_of_neon_is_parsed_into_its_endpoint(
    host: str, endpoint: tuple[str, bool, str, str], direct_host: str | None
) -> None:
    assert parse_host(host) == Endpoint(*endpoint, direct_host or host)
    assert short_name(host, parse_host(host)) == endpoint[0]


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("localhost", id="localhost"),
        pytest.param("db.example.com", id="another domain"),
        pytest.param("console.neon.tech", id="Neon's console"),
        pytest.param(f"{ID}.us-east-2.aws.neon.tech.example.com", id="Neon's name inside another"),
        pytest.param(f"{ID}.us-east-2.aws.neon-tech", id="another top-level domain"),
        pytest.param(f"{ID}.us-east-2.aws.neonxtech", id="no dot before tech"),
        pytest.param(f"{ID}.us-east-1.vercel-storage.com", id="another service of Vercel"),
        pytest.param(f"{ID}.postgres.vercel-storage.com", id="no region"),
        pytest.param(f"{ID}.us-east-1.evilretooldb.com", id="a domain that ends alike"),
        pytest.param(f"x{ID}.us-east-2.aws.neon.tech", id="a prefix"),
        pytest.param(f"{ID}.us-east-2.aws.neon.tech\n", id="line break"),
        pytest.param("", id="empty"),
    ],
)
def test_another_host_name_has_no_endpoint_and_is_its_own_short_name(host: str) -> None:
    assert parse_host(host) is None
    assert short_name(host, parse_host(host)) == host


@given(st.text(max_size=300))
def test_any_text_is_parsed_without_an_exception(text: str) -> None:
    parse_host(text)
