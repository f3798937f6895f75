"""What is accepted, from which source, and what becomes of it; `harden_dsn`; nothing secret in any text."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq

from neon_async import ConfigurationError, InsecureConfigurationError, NeonAsyncError, create_pool, harden_dsn
from neon_async._config.connection import ConnectionParameters, Password, parse

HOST = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
CONSOLE = "postgresql://alex:AbC123dEf@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech/dbname"
MINIMAL: dict[str, object] = {"host": HOST, "user": "alex", "password": "x"}


def test_every_keyword_of_libpq_is_honoured_or_refused_by_name() -> None:
    keywords = {default.keyword.decode() for default in pq.Conninfo.get_defaults()}
    assert len(keywords) >= 45
    for keyword in keywords:
        try:
            parse(None, MINIMAL | {"sslcert": "c.pem", keyword: "some-value"}, {})
        except ConfigurationError as error:
            assert str(error).startswith(f"{keyword} ("), error  # by name, and not as unknown


def test_every_environment_variable_of_libpq_is_read() -> None:
    variables = {d.keyword.decode(): d.envvar.decode() for d in pq.Conninfo.get_defaults() if d.envvar}
    assert len(variables) >= 30
    nonsense = "\N{SNOWMAN}"
    freely_chosen = {"host", "user", "dbname", "password", "options", "application_name"}
    files_that_are_read_later = {"sslrootcert", "sslcrl", "sslcert", "sslkey"}
    for keyword, variable in variables.items():
        if keyword not in freely_chosen | files_that_are_read_later:
            with pytest.raises(ConfigurationError, match=f"environment variable {variable}"):
                parse(None, MINIMAL, {variable: nonsense})
    read = parse(None, {}, {variables[k]: str(v) for k, v in MINIMAL.items()} | {"PGSSLROOTCERT": "r", "PGSSLCRL": "c"})
    assert (read.host, read.user, read.sslrootcert, read.sslcrl) == (HOST, "alex", "r", "c")


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        pytest.param(
            CONSOLE, {"user": "alex", "database": "dbname", "port": 5432, "sslnegotiation": None}, id="console"
        ),
        pytest.param(
            f"{CONSOLE}?sslmode=verify-full&channel_binding=require", {"channel_binding": "require"}, id="hardened"
        ),
        pytest.param(f"postgres://a:b@{HOST}:6432", {"port": 6432, "database": "a"}, id="dbname defaults to user"),
        pytest.param(f"postgresql+asyncpg://a:b@{HOST}/x?ssl=verify-full", {"database": "x"}, id="SQLAlchemy's scheme"),
        pytest.param(
            f"postgresql://a%40b:p%2Fw@{HOST}/d%20b", {"user": "a@b", "database": "d b"}, id="percent-encoded"
        ),
        pytest.param(f"postgresql://{HOST}/d?user=u&password=p", {"user": "u"}, id="user and password as parameters"),
        pytest.param(
            "postgresql:///d?host=LOCALHOST&user=u&password=p", {"host": "localhost"}, id="host as a parameter"
        ),
        pytest.param(f"postgresql://a:b@{HOST}/a/b", {"database": "a/b"}, id="a slash in dbname"),
        pytest.param(f"postgresql://a:b@{HOST}/?", {"database": "a"}, id="nothing behind '?'"),
        pytest.param(f"postgresql://a:b@{HOST}/d?hostaddr=::1&", {"hostaddr": "::1"}, id="IPv6 hostaddr"),
        pytest.param(
            f"postgresql://a:b@{HOST}/d?options=-c%20jit%3Doff",
            {"startup_settings": {"options": "-c jit=off"}},
            id="options",
        ),
        pytest.param(
            f"postgresql://a:b@{HOST}/d?options=endpoint=ep-x",
            {"startup_settings": {"options": "endpoint=ep-x"}},
            id="'=' in a value",
        ),
        pytest.param(
            f"postgresql://a:b@{HOST}/d?application_name=a+b",
            {"startup_settings": {"application_name": "a+b"}},
            id="'+' is no space",
        ),
        pytest.param(f"postgresql://a:b@{HOST}/d?connect_timeout=2.5", {"connect_timeout": 2.5}, id="connect_timeout"),
        pytest.param(
            f"postgresql://a:b@{HOST}/d?keepalives=0&keepalives_idle=5&keepalives_interval=6&keepalives_count=7&tcp_user_timeout=0",
            {
                "keepalives": False,
                "keepalives_idle": 5,
                "keepalives_interval": 6,
                "keepalives_count": 7,
                "tcp_user_timeout": 0,
            },
            id="keepalive",
        ),
        pytest.param(
            f"postgresql://a:b@{HOST}/d?sslsni=1&gssencmode=prefer&target_session_attrs=any&require_auth=scram-sha-256"
            "&ssl_min_protocol_version=TLSv1.2&ssl_max_protocol_version=TLSv1.3&client_encoding=utf-8&sslcompression=0",
            {"user": "a"},
            id="settings that are met anyway",
        ),
    ],
)
def test_a_dsn_is_read(dsn: str, expected: dict[str, object]) -> None:
    read = parse(dsn, {}, {})
    assert {name: getattr(read, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        pytest.param({"port": "5433"}, {"port": 5433}, id="port as text"),
        pytest.param({"timeout": 3}, {"connect_timeout": 3.0}, id="asyncpg's timeout"),
        pytest.param({"database": "d"}, {"database": "d"}, id="asyncpg's database"),
        pytest.param({"keepalives": False}, {"keepalives": False}, id="keepalives=False"),
        pytest.param({"keepalives": 1}, {"keepalives": True}, id="keepalives=1"),
        pytest.param({"ssl": None, "port": None}, {"port": 5432}, id="None is not given"),
        pytest.param({"crl": "x.pem"}, {"sslcrl": "x.pem"}, id="crl"),
        pytest.param(
            {"fallback_application_name": "f"}, {"startup_settings": {"application_name": "f"}}, id="fallback"
        ),
        pytest.param(
            {"application_name": "a", "fallback_application_name": "f"},
            {"startup_settings": {"application_name": "a"}},
            id="application_name before its fallback",
        ),
        pytest.param(
            {"server_settings": {"application_name": "s", "jit": "off"}},
            {"startup_settings": {"application_name": "s", "options": "-c jit=off"}},
            id="server_settings",
        ),
        pytest.param(
            {"options": "endpoint=ep-x -c a.b=1", "server_settings": {"jit": "off", "app.Who": "it is\\me"}},
            {"startup_settings": {"options": "endpoint=ep-x -c a.b=1 -c jit=off -c app.Who=it\\ is\\\\me"}},
            id="server_settings behind options",
        ),
        pytest.param(
            {"server_settings": {"Application_Name": "", "search_path": ""}, "fallback_application_name": "f"},
            {"startup_settings": {"options": "-c search_path="}},
            id="empty server_settings",
        ),
        pytest.param(
            {"options": "-c a.b=\\", "server_settings": {"jit": "off"}},
            {"startup_settings": {"options": "-c a.b= -c jit=off"}},
            id="a backslash without anything behind it",
        ),
    ],
)
def test_keywords_are_read(keywords: dict[str, object], expected: dict[str, object]) -> None:
    read = parse(None, MINIMAL | keywords, {})
    assert {name: getattr(read, name) for name in expected} == expected


def test_a_keyword_wins_over_the_dsn_and_the_dsn_over_the_environment() -> None:
    environment = {"PGUSER": "e", "PGDATABASE": "e", "PGPORT": "1", "PGHOST": "e.example.org", "PGPASSWORD": "e"}
    read = parse(f"postgresql://d:x@{HOST}:2/d", {"user": "k"}, environment)
    assert (read.user, read.database, read.port, read.host) == ("k", "d", 2, HOST)
    assert parse(None, {}, environment).port == 1


def test_an_empty_environment_variable_is_unset() -> None:
    assert parse(None, MINIMAL, {"PGPORT": "", "PGSERVICE": "", "PGSSLROOTCERT": ""}).port == 5432


# ---------------------------------------------------------------------------------------------------------------------

POOLED = HOST.replace(".", "-pooler.", 1)


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
def test_a_pooled_host_takes_what_pgbouncer_tracks(keywords: dict[str, object]) -> None:
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
            {"options": "-c endpoint=ep-x jit=off"}, "jit", id="Neon's own word in between, which Neon takes out"
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
    parse(None, MINIMAL | keywords, {})  # where they are the server's to judge


def test_options_of_the_environment_are_judged_for_a_pooled_host_too() -> None:
    with pytest.raises(ConfigurationError, match=r"work_mem \(options\) cannot be set on the pooled host"):
        parse(None, MINIMAL | {"host": POOLED}, {"PGOPTIONS": "-c work_mem=1MB"})


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
def test_every_value_arrives_whole_behind_any_options(options: str, first: str, second: str) -> None:
    settings = {"app.first": first, "app.second": second}
    read = parse(None, MINIMAL | {"options": options, "server_settings": settings}, {})
    words = split_like_postgres(read.startup_settings["options"])
    assert words[-4:] == ["-c", f"app.first={first}", "-c", f"app.second={second}"]
    assert list(filter(None, words[:-4])) == list(filter(None, split_like_postgres(options)))


@pytest.mark.parametrize("line", [HOST, POOLED], ids=["direct", "pooled"])
@given(st.text(max_size=60))
def test_no_options_break_the_parser(line: str, options: str) -> None:
    with contextlib.suppress(ConfigurationError):
        parse(None, MINIMAL | {"host": line, "options": options}, {})


# ---------------------------------------------------------------------------------------------------------------------


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
def test_harden_dsn_refuses_what_is_no_connection_url(dsn: str) -> None:
    with pytest.raises(ConfigurationError):
        harden_dsn(dsn)


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=12)
LABEL = st.from_regex(r"\A[a-z]([a-z0-9-]{0,8}[a-z0-9])?\Z")
SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full", "", "nonsense")
QUERY = st.dictionaries(
    st.sampled_from(["application_name", "options", "fallback_application_name"]), TEXT, max_size=3
).map(lambda items: [f"{key}={quote(value, safe='')}" for key, value in items.items()])


@st.composite
def dsns(draw: Callable[..., str], password: st.SearchStrategy[str] = TEXT) -> str:
    """Valid connection URLs, but for their sslmode."""
    user, secret, database = (quote(draw(text), safe="") for text in (TEXT, password, TEXT))
    items: list[str] = draw(QUERY)  # type: ignore[assignment]
    mode = draw(st.sampled_from((None, *SSLMODES)))
    if mode is not None:
        items.insert(draw(st.integers(0, len(items))), f"sslmode={mode}")  # type: ignore[arg-type]
    query = "?" + "&".join(items) if items else ""
    return f"postgresql://{user}:{secret}@{draw(LABEL)}.{draw(LABEL)}.example/{database}{query}"


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


# ---------------------------------------------------------------------------------------------------------------------

MARK = "s3cr3t-"
SECRETS = TEXT.map(lambda text: MARK + text)
# Raw text in which every character that a URL gives a meaning to may stand unencoded.
RAW = st.text("/?#@:%&=,[]abc5 ", max_size=8)


@given(dsns(SECRETS), st.sampled_from(["", "&x=y", "&sslmode=allow", "&port=0", "#"]))
def test_no_refusal_and_no_repr_shows_the_password(dsn: str, damage: str) -> None:
    assert_tells_no_secret(dsn + (damage if "?" in dsn else damage.replace("&", "?", 1)), MARK)


@given(RAW, RAW, RAW, RAW)
def test_no_refusal_shows_a_piece_of_a_password_that_was_not_encoded(a: str, b: str, c: str, d: str) -> None:
    assert_tells_no_secret(f"postgresql://alex:{a}SECRETA{b}SECRETB{c}@{HOST}/neondb?sslmode=require{d}", "SECRET")


def assert_tells_no_secret(dsn: str, secret: str) -> None:
    try:
        parameters = parse(dsn, {}, {})
    except ConfigurationError:
        pass
    else:
        assert secret not in f"{parameters!r} {parameters} {parameters.redacted_dsn}"
    for call in (create_pool, harden_dsn):
        try:
            result = call(dsn)
        except NeonAsyncError as error:
            text = f"{error} {error!r} {error.__cause__!r} {error.__context__!r}"
            locals_of_ours = [
                f"{key}={value}"
                for frame, _ in traceback.walk_tb(error.__traceback__)
                if frame.f_globals.get("__name__", "").startswith("neon_async")
                for key, value in frame.f_locals.items()
            ]
            assert secret not in text
            assert secret not in repr(locals_of_ours)
        else:
            assert call is harden_dsn or secret not in repr(result)


def test_a_password_shows_itself_in_no_repr_and_in_no_pickle() -> None:
    password = Password("s3cr3t")
    assert repr(password) == str(password) == "<Password>"
    with pytest.raises(TypeError):
        pickle.dumps(password)


def test_the_error_of_a_weak_dsn_is_one_class_with_its_parents() -> None:
    with pytest.raises(ValueError, match="sslmode") as caught:
        create_pool(f"{CONSOLE}?sslmode=disable")
    assert type(caught.value) is InsecureConfigurationError
    assert isinstance(caught.value, ConfigurationError)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
