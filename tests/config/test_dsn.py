"""The text of a connection URL: `harden_dsn` changes one parameter, and no error shows a piece of the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from support.dsns import CONSOLE, dsns

from neon_async import ConfigurationError, harden_dsn
from neon_async._config.connection import ConnectionParameters, parse
from neon_async._config.dsn import decode, redact, split


@pytest.mark.parametrize(
    ("dsn", "hardened"),
    [
        pytest.param(
            f"{CONSOLE}?sslmode=require&channel_binding=require",
            f"{CONSOLE}?sslmode=verify-full&channel_binding=require",
            id="console",
        ),
        pytest.param(CONSOLE, f"{CONSOLE}?sslmode=verify-full", id="no parameters"),
        pytest.param(f"{CONSOLE}?", f"{CONSOLE}?sslmode=verify-full", id="an empty query"),
        pytest.param(f"{CONSOLE}?a=%2F", f"{CONSOLE}?a=%2F&sslmode=verify-full", id="appended"),
        pytest.param(f"{CONSOLE}?ssl=true", f"{CONSOLE}?sslmode=verify-full", id="ssl"),
        pytest.param(f"{CONSOLE}?sslmode=disable&a=b&sslmode=allow", f"{CONSOLE}?sslmode=verify-full&a=b", id="twice"),
        pytest.param(f"{CONSOLE}?sslm%6Fde=disable", f"{CONSOLE}?sslmode=verify-full", id="an encoded key"),
        pytest.param(f"{CONSOLE}?sslmode=verify-full", f"{CONSOLE}?sslmode=verify-full", id="hard already"),
    ],
)
def test_harden_dsn_changes_sslmode_and_nothing_else(dsn: str, hardened: str) -> None:
    assert harden_dsn(dsn) == hardened
    assert harden_dsn(hardened) == hardened


@pytest.mark.parametrize("dsn", ["", "host=x", "https://x/", None], ids=repr)
def test_harden_dsn_refuses_what_is_not_a_connection_url(dsn: str) -> None:
    with pytest.raises(ConfigurationError):
        harden_dsn(dsn)


@given(dsns())
def test_a_hardened_dsn_is_accepted_and_means_the_same(dsn: str) -> None:
    hardened = harden_dsn(dsn)
    assert harden_dsn(hardened) == hardened
    with_keyword = parse(dsn, {"sslmode": "verify-full"}, {})
    after = parse(hardened, {}, {})
    assert visible(after) == visible(with_keyword)
    assert after.password.reveal() == with_keyword.password.reveal()
    if "sslmode=verify-full" in dsn:
        assert hardened == dsn
    elif "sslmode=" in dsn:
        with pytest.raises(ConfigurationError):
            parse(dsn, {}, {})


def visible(parameters: ConnectionParameters) -> dict[str, object]:
    return {name: getattr(parameters, name) for name in parameters.__dataclass_fields__ if name != "password"}


@pytest.mark.parametrize(
    ("dsn", "parts"),
    [
        pytest.param(
            "postgresql://u:p@h:1/d?a=b",
            {"user": "u", "password": "p", "host": "h", "port": "1", "path": "/d", "query": "a=b"},
            id="everything",
        ),
        pytest.param("postgres://h", {"user": "", "password": "", "host": "h", "path": ""}, id="a host"),
        pytest.param("postgresql://u:a:b@h", {"user": "u", "password": "a:b"}, id="a colon in the password"),
        pytest.param("postgresql://[::1]:5/d", {"host": "[::1]", "port": "5"}, id="an IPv6 address"),
        pytest.param("postgresql://h:1,2/d", {"host": "h", "port": "1,2"}, id="a list of ports"),
        pytest.param("postgresql://u%40:p@h", {"user": "u%40"}, id="parts keep their encoding"),
    ],
)
def test_a_url_is_split_as_libpq_splits_it(dsn: str, parts: dict[str, str]) -> None:
    url = split(dsn)
    assert {name: getattr(url, name) for name in parts} == parts


def test_the_parts_of_a_url_are_not_in_its_repr() -> None:
    assert "s3cret" not in repr(split("postgresql://s3cret:s3cret@s3cret/s3cret?a=s3cret"))


def test_text_is_decoded_as_libpq_does_it() -> None:
    assert decode("a%20b+c%C3%A9") == "a b+cé"


@pytest.mark.parametrize(
    ("dsn", "redacted"),
    [
        pytest.param(CONSOLE, CONSOLE.replace("AbC123dEf", "***"), id="the password"),
        pytest.param("postgres://h/d?user=u&password=p", "postgres://h/d?user=u&password=***", id="a parameter"),
        pytest.param("postgres://h/d?unknown=p&user=u", "postgres://h/d?unknown=***&user=u", id="an unknown parameter"),
        pytest.param("postgres://u@h:1/d?us%65r=u", "postgres://u@h:1/d?us%65r=u", id="an encoded key"),
    ],
)
def test_a_dsn_is_shown_without_its_secrets(dsn: str, redacted: str) -> None:
    assert redact(dsn) == redacted
