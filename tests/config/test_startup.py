"""What a session starts with: settings travel in `options`, and a pooled host gets only what PgBouncer tracks."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dsns import HOST, MINIMAL, POOLED

from neon_async import ConfigurationError
from neon_async._config.connection import parse
from neon_async._config.settings import SERVER_SETTINGS
from neon_async._config.startup import startup_settings
from neon_async._neon.endpoint import parse_host


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        pytest.param({"fallback_application_name": "f"}, {"application_name": "f"}, id="fallback"),
        pytest.param(
            {"application_name": "a", "fallback_application_name": "f"},
            {"application_name": "a"},
            id="application_name before its fallback",
        ),
        pytest.param(
            {"application_name": "", "fallback_application_name": "f"}, {"application_name": "f"}, id="empty name"
        ),
        pytest.param(
            {"server_settings": {"application_name": "s", "jit": "off"}},
            {"application_name": "s", "options": "-c jit=off"},
            id="server_settings",
        ),
        pytest.param(
            {"options": "endpoint=ep-x -c a.b=1", "server_settings": {"jit": "off", "app.Who": "it is\\me"}},
            {"options": "endpoint=ep-x -c a.b=1 -c jit=off -c app.Who=it\\ is\\\\me"},
            id="server_settings after options",
        ),
        pytest.param(
            {"server_settings": {"Application_Name": "", "search_path": ""}, "fallback_application_name": "f"},
            {"options": "-c search_path="},
            id="empty server_settings",
        ),
        pytest.param(
            {"options": "-c a.b=\\", "server_settings": {"jit": "off"}},
            {"options": "-c a.b= -c jit=off"},
            id="a backslash at the end",
        ),
        pytest.param({}, {}, id="nothing"),
    ],
)
def test_a_session_starts_with_its_name_and_its_settings(keywords: dict[str, object], expected: dict[str, str]) -> None:
    assert parse(None, MINIMAL | keywords, {}).startup_settings == expected


@pytest.mark.parametrize(
    "keywords",
    [
        pytest.param({"server_settings": {"TimeZone": "UTC", "DATESTYLE": "ISO, DMY"}}, id="server_settings"),
        pytest.param({"server_settings": {"application_name": "a", "IntervalStyle": "iso_8601"}}, id="mixed"),
        pytest.param({"options": "-c timezone=UTC -cdatestyle=ISO --intervalstyle=iso_8601"}, id="three forms"),
        pytest.param({"options": "endpoint=ep-x project=y neon_proxy_params_compat:true"}, id="Neon's own words"),
        pytest.param({"options": "-c standard_conforming_strings=on -c client_encoding=UTF8"}, id="the other two"),
        pytest.param({"options": ""}, id="nothing"),
    ],
)
def test_a_pooled_host_accepts_what_pgbouncer_tracks(keywords: dict[str, object]) -> None:
    assert parse(None, MINIMAL | {"host": POOLED} | keywords, {}).host == POOLED


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        pytest.param({"server_settings": {"search_path": "a"}}, "search_path", id="server_settings"),
        pytest.param({"server_settings": {"TimeZone": "UTC", "app.tenant": "7"}}, "app.tenant", id="a custom one"),
        pytest.param({"options": "-c statement_timeout=5"}, "statement_timeout", id="-c name"),
        pytest.param({"options": "-c timezone=UTC  -cwork_mem=5"}, "work_mem", id="-cname"),
        pytest.param({"options": "endpoint=ep-x --jit=off"}, "jit", id="--name"),
        pytest.param({"options": "-c\ttimezone=a\\ b -c\njit=off"}, "jit", id="white space"),
        pytest.param({"options": "-c date-style=ISO"}, "date-style", id="a hyphen, which PgBouncer does not read as _"),
        pytest.param({"options": "-e"}, "a switch other than -c", id="another switch"),
        pytest.param(
            {"options": "-c endpoint=ep-x jit=off"}, "jit", id="Neon's own word in between, which Neon removes"
        ),
        pytest.param({"options": "-c"}, "a switch other than -c", id="a switch without its word"),
    ],
)
def test_a_pooled_host_refuses_other_settings_and_names_the_direct_host(keywords: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(None, MINIMAL | {"host": POOLED} | keywords, {})
    place = next(iter(keywords))
    assert str(caught.value).startswith(f"{name} ({place}) cannot be set on the pooled host {POOLED}")
    assert f"direct host {HOST}," in str(caught.value)
    parse(None, MINIMAL | keywords, {})  # on a direct host they are the server's to judge


def test_options_of_the_environment_are_judged_for_a_pooled_host_too() -> None:
    with pytest.raises(ConfigurationError, match=r"work_mem \(options\) cannot be set on the pooled host"):
        parse(None, MINIMAL | {"host": POOLED}, {"PGOPTIONS": "-c work_mem=1MB"})


def test_a_pooled_name_at_another_provider_is_not_a_pooled_host() -> None:
    assert parse(None, MINIMAL | {"host": "db-pooler.example.com", "options": "-c jit=off"}, {}).endpoint is None


@pytest.mark.parametrize("name", ["jit", "app.tenant", "_a.b$1", "Search_Path"])
def test_the_name_of_a_setting_is_accepted(name: str) -> None:
    assert SERVER_SETTINGS.check("server_settings", {name: "x"}) == {name: "x"}


def test_server_settings_are_copied() -> None:
    given_settings = {"jit": "off"}
    read = SERVER_SETTINGS.check("server_settings", given_settings)
    given_settings["jit"] = "on"
    assert read == {"jit": "off"}


# ---------------------------------------------------------------------------------------------------------------------
# The text of `options`


def split_like_postgres(options: str) -> list[str]:
    """pg_split_opts() of src/backend/utils/init/postinit.c, in Python."""
    words: list[str] = []
    position = 0
    while True:
        while position < len(options) and options[position] in " \t\n\r\f\v":
            position += 1
        if position == len(options):
            return words
        word, escape = "", False
        while position < len(options) and (escape or options[position] not in " \t\n\r\f\v"):
            if not escape and options[position] == "\\":
                escape = True
            else:
                word, escape = word + options[position], False
            position += 1
        words.append(word)


VALUES = st.text(st.sampled_from(" \t\n\r\f\v\\'\"=-c;aé\u2003\u0085"), max_size=12)


@given(VALUES, VALUES, VALUES)
def test_every_value_arrives_whole_after_any_options(options: str, first: str, second: str) -> None:
    settings = {"app.first": first, "app.second": second}
    startup = startup_settings(HOST, parse_host(HOST), options=options, server_settings=settings)
    words = split_like_postgres(startup["options"])
    assert words[-4:] == ["-c", f"app.first={first}", "-c", f"app.second={second}"]
    assert list(filter(None, words[:-4])) == list(filter(None, split_like_postgres(options)))


@pytest.mark.parametrize("host", [HOST, POOLED], ids=["direct", "pooled"])
@given(options=st.text(max_size=60))
def test_no_options_break_the_parser(host: str, options: str) -> None:
    with contextlib.suppress(ConfigurationError):
        parse(None, MINIMAL | {"host": host, "options": options}, {})


@given(st.dictionaries(st.text(st.sampled_from("aB1_.$-= \u00fc\0"), max_size=8), st.text(max_size=4), max_size=3))
def test_server_settings_are_read_as_they_are_or_refused(settings: dict[str, str]) -> None:
    with contextlib.suppress(ConfigurationError):
        assert SERVER_SETTINGS.check("server_settings", settings) == settings
