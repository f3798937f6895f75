"""What is accepted, from which source, and what becomes of it; and no secret in any text."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq
from support.dsns import CONSOLE, HOST, MINIMAL, POOLED, TEXT, dsns

import neon_async
from neon_async import ConfigurationError, InsecureConfigurationError, NeonAsyncError, create_pool, harden_dsn
from neon_async._config.connection import parse


def test_every_environment_variable_of_libpq_is_read() -> None:
    variables = {d.keyword.decode(): d.envvar.decode() for d in pq.Conninfo.get_defaults() if d.envvar}
    assert len(variables) >= 30
    nonsense = "\N{SNOWMAN}"
    freely_chosen = {"host", "user", "dbname", "password", "options", "application_name"}
    files_that_are_read_later = {"sslrootcert", "sslcrl", "sslcert", "sslkey"}
    without_effect = {"krbsrvname", "gsslib", "servicefile", "passfile"}
    for keyword, variable in variables.items():
        if keyword not in freely_chosen | files_that_are_read_later | without_effect:
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
        pytest.param(f"postgresql+neon://a:b@{HOST}/x?sslmode=require", {"database": "x"}, id="our own scheme"),
        pytest.param(f"postgresql+neon://a:b@{HOST}/x?port=5&ssl=false", {"port": 5}, id="our own scheme wins"),
        pytest.param(
            f"postgresql://a%40b:p%2Fw@{HOST}/d%20b", {"user": "a@b", "database": "d b"}, id="percent-encoded"
        ),
        pytest.param(f"postgresql://{HOST}/d?user=u&password=p", {"user": "u"}, id="user and password as parameters"),
        pytest.param(
            "postgresql:///d?host=LOCALHOST&user=u&password=p", {"host": "localhost"}, id="host as a parameter"
        ),
        pytest.param(f"postgresql://a:b@{HOST}/a/b", {"database": "a/b"}, id="a slash in dbname"),
        pytest.param(f"postgresql://a:b@{HOST}/?", {"database": "a"}, id="nothing after '?'"),
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
        pytest.param({"trust_anchor": b"x"}, {"trust_anchor": b"x"}, id="trust_anchor"),
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


def test_only_the_value_that_takes_effect_is_judged() -> None:
    weak = f"postgresql://d:x@{HOST}:0/d?sslmode=disable"
    assert parse(weak, {"port": 1, "sslmode": "verify-full"}, {"PGSSLMODE": "allow", "PGPORT": "x"}).port == 1


LEVELS = ["off", "advise", "require"]


@pytest.mark.parametrize("code", [None, *LEVELS])
@pytest.mark.parametrize("dsn", [None, *LEVELS])
@pytest.mark.parametrize("environment", [None, "", *LEVELS])
def test_each_source_can_raise_the_check_of_revocation_and_none_lowers_it(
    code: str | None, dsn: str | None, environment: str | None
) -> None:
    given = [level for level in (code, dsn, environment) if level]
    text = f"postgresql://a:b@{HOST}/d" + (f"?revocation={dsn}" if dsn else "")
    variables = {} if environment is None else {"NEON_ASYNC_REVOCATION": environment}
    read = parse(text, {"revocation": code}, variables)
    assert read.revocation == max(given, key=LEVELS.index, default="off")


@pytest.mark.parametrize("value", ["", "yes", "Require", "hard-fail", True, 1])
def test_any_other_level_is_refused_wherever_it_is_written(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"revocation .* must be (off, advise or require|a string)"):
        parse(None, MINIMAL | {"revocation": value}, {"NEON_ASYNC_REVOCATION": "require"})
    if value and isinstance(value, str):
        with pytest.raises(ConfigurationError, match=r"revocation \(DSN\) must be off, advise or require"):
            parse(f"postgresql://a:b@{HOST}/d?revocation={value}", {"revocation": "require"}, {})
        with pytest.raises(ConfigurationError, match=r"NEON_ASYNC_REVOCATION\) must be off, advise or require"):
            parse(None, MINIMAL, {"NEON_ASYNC_REVOCATION": value})


def test_an_empty_environment_variable_is_unset() -> None:
    assert parse(None, MINIMAL, {"PGPORT": "", "PGSERVICE": "", "PGSSLROOTCERT": ""}).port == 5432


@pytest.mark.parametrize(
    ("keywords", "environment"),
    [
        pytest.param(MINIMAL, {"PGPASSFILE": "/root/.pgpass"}, id="PGPASSFILE beside a password"),
        pytest.param(
            {"host": HOST, "user": "alex"}, {"PGPASSFILE": "f", "PGPASSWORD": "x"}, id="PGPASSFILE beside PGPASSWORD"
        ),
        pytest.param(MINIMAL | {"password": lambda: "x"}, {"PGPASSFILE": "f"}, id="PGPASSFILE beside a function"),
        pytest.param(MINIMAL, {"PGSERVICEFILE": "/etc/pg_service.conf"}, id="PGSERVICEFILE alone"),
        pytest.param(MINIMAL, {"PGKRBSRVNAME": "postgres"}, id="PGKRBSRVNAME"),
        pytest.param(MINIMAL, {"PGGSSLIB": "gssapi"}, id="PGGSSLIB"),
        pytest.param(MINIMAL, {"PGSSLKEY": "/root/key.pem"}, id="PGSSLKEY without a certificate"),
        pytest.param(MINIMAL | {"service": ""}, {"PGSERVICE": "a", "PGSERVICEFILE": "f"}, id="PGSERVICE switched off"),
        pytest.param(MINIMAL | {"sslcert": ""}, {"PGSSLCERT": "c", "PGSSLKEY": "k"}, id="PGSSLCERT switched off"),
        pytest.param(MINIMAL | {"requirepeer": ""}, {"PGREQUIREPEER": "postgres"}, id="PGREQUIREPEER switched off"),
        pytest.param(MINIMAL | {"hostaddr": ""}, {"PGHOSTADDR": "10.0.0.1"}, id="PGHOSTADDR switched off"),
        pytest.param(MINIMAL | {"gssdelegation": "0"}, {"PGGSSDELEGATION": "1"}, id="PGGSSDELEGATION overridden"),
    ],
)
def test_an_environment_variable_without_effect_does_not_matter(
    keywords: dict[str, object], environment: dict[str, str]
) -> None:
    read = parse(None, keywords, environment)
    assert (read.host, read.hostaddr, read.sslcert, read.sslkey) == (HOST, None, None, None)


@pytest.mark.parametrize(
    ("keywords", "environment", "names"),
    [
        pytest.param({"host": HOST, "user": "alex"}, {"PGPASSFILE": "f"}, "PGPASSFILE", id="no password"),
        pytest.param(MINIMAL, {"PGSERVICE": "a", "PGSERVICEFILE": "f"}, "PGSERVICE", id="a service"),
        pytest.param(MINIMAL | {"passfile": "f"}, {}, "passfile", id="a keyword beside a password"),
        pytest.param(MINIMAL | {"krbsrvname": "postgres"}, {"PGKRBSRVNAME": "a"}, "krbsrvname", id="a keyword"),
        pytest.param(MINIMAL | {"sslkey": "k"}, {}, "sslkey", id="sslkey in code without sslcert"),
        pytest.param(MINIMAL | {"sslkeylogfile": ""}, {}, "sslkeylogfile", id="nothing to switch off"),
    ],
)
def test_what_would_take_effect_is_refused_as_ever(
    keywords: dict[str, object], environment: dict[str, str], names: str
) -> None:
    with pytest.raises(ConfigurationError, match=names):
        parse(None, keywords, environment)


def test_a_dsn_switches_nothing_off() -> None:
    with pytest.raises(ConfigurationError, match=r"service \(DSN\)"):
        parse(f"{CONSOLE}?service=", {}, {})


@pytest.mark.parametrize("host", ["db", "DB", "my-db-1"])
def test_a_host_of_one_label_is_accepted_with_a_root_of_ones_own(host: str) -> None:
    assert parse(None, MINIMAL | {"host": host, "trust_anchor": b"x"}, {}).host == host.lower()
    assert parse(f"postgresql://a:b@{host}/d", {"trust_anchor": "root.pem"}, {}).host == host.lower()
    assert parse(None, {"user": "a", "password": "b", "trust_anchor": b"x"}, {"PGHOST": host}).host == host.lower()


def test_a_host_of_one_label_is_refused_with_what_to_do_otherwise() -> None:
    for keywords in ({}, {"trust_anchor": neon_async.LETS_ENCRYPT_ROOTS}):
        with pytest.raises(ConfigurationError, match=r"'db', a single label.* trust_anchor=\."):
            parse(None, MINIMAL | {"host": "db"} | keywords, {})


def test_other_weak_hosts_stay_refused_with_a_root_of_ones_own() -> None:
    for host in ("10.0.0.1", "1", "/tmp", "a,b", "db.", "my_db", "-db", "x" * 64):
        with pytest.raises(ConfigurationError):
            parse(None, MINIMAL | {"host": host, "trust_anchor": b"x"}, {})


@pytest.mark.parametrize(
    ("host", "keywords", "pooled"),
    [
        pytest.param("db.example.com", {}, False, id="another host"),
        pytest.param("db.example.com", {"pooled": True}, True, id="another host, pooled"),
        pytest.param("db.example.com", {"pooled": False}, False, id="another host, not pooled"),
        pytest.param(HOST, {"pooled": False}, False, id="a direct host"),
        pytest.param(
            POOLED.replace("neon.tech", "example.com"), {}, True, id="the name of a pooled endpoint elsewhere"
        ),
        pytest.param(POOLED.replace("neon.tech", "example.com"), {"pooled": False}, False, id="the same, not pooled"),
        pytest.param(HOST.replace("neon.tech", "example.com"), {}, False, id="the name of a direct endpoint elsewhere"),
        pytest.param("db-pooler.example.com", {}, False, id="a name that only ends alike"),
        pytest.param(POOLED, {}, True, id="a pooled host"),
        pytest.param(POOLED, {"pooled": True}, True, id="a pooled host, said twice"),
    ],
)
def test_code_says_whether_a_host_is_pooled_where_no_name_does(
    host: str, keywords: dict[str, object], pooled: bool
) -> None:
    assert parse(None, MINIMAL | {"host": host} | keywords, {}).pooled is pooled


@pytest.mark.parametrize(("host", "pooled"), [(HOST, True), (POOLED, False)], ids=["direct", "pooled"])
def test_code_cannot_contradict_the_name_of_a_neon_host(host: str, pooled: bool) -> None:
    with pytest.raises(ConfigurationError, match=rf"pooled={pooled}.* {host}"):
        parse(None, MINIMAL | {"host": host, "pooled": pooled}, {})


def test_a_host_that_code_calls_pooled_gets_only_the_settings_that_pgbouncer_tracks() -> None:
    pooler = MINIMAL | {"host": "pgbouncer.example.com", "pooled": True}
    assert parse(None, pooler | {"options": "-c timezone=UTC"}, {}).pooled
    with pytest.raises(ConfigurationError, match=r"jit \(options\) .* Use a host without PgBouncer in between"):
        parse(None, pooler | {"options": "-c jit=off"}, {})


def test_the_host_is_parsed_once_as_the_endpoint() -> None:
    pooled, direct = (parse(None, MINIMAL | {"host": host}, {}).endpoint for host in (POOLED, HOST))
    assert pooled is not None
    assert direct is not None
    assert (pooled.id, pooled.pooled, pooled.direct_host) == ("ep-cool-darkness-123456", True, HOST)
    assert (direct.id, direct.pooled) == (pooled.id, False)
    assert parse(None, MINIMAL | {"host": "db.example.com"}, {}).endpoint is None


def test_a_redacted_dsn_leads_to_the_same_place() -> None:
    read = parse(None, MINIMAL | {"user": "a@b", "hostaddr": "::1", "port": 1, "dbname": "d/e"}, {})
    assert read.redacted_dsn == f"postgresql://a%40b@{HOST}:1/d%2Fe?sslmode=verify-full&hostaddr=::1"
    again = parse(read.redacted_dsn, {"password": "x"}, {})
    assert (again.user, again.database, again.hostaddr) == ("a@b", "d/e", "::1")


def test_two_roots_in_code_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="trust_anchor and sslrootcert are both given"):
        parse(None, MINIMAL | {"trust_anchor": b"x", "sslrootcert": "r"}, {})


def test_a_sslrootcert_from_elsewhere_does_not_replace_the_trust_anchor_in_code() -> None:
    for dsn, environment in ((f"postgresql://{HOST}?sslrootcert=r", {}), (None, {"PGSSLROOTCERT": "r"})):
        assert parse(dsn, MINIMAL | {"trust_anchor": b"x"}, environment).trust_anchor == b"x"


def test_the_error_of_a_weak_dsn_is_one_class_with_its_parents() -> None:
    with pytest.raises(ValueError, match="sslmode") as caught:
        create_pool(f"{CONSOLE}?sslmode=disable")
    assert type(caught.value) is InsecureConfigurationError
    assert isinstance(caught.value, ConfigurationError)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


# ---------------------------------------------------------------------------------------------------------------------
# No secret in any text

MARK = "s3cr3t-"
SECRETS = TEXT.map(lambda text: MARK + text)
# Raw text in which every character that a URL gives a meaning to may stand unencoded.
RAW = st.text("/?#@:%&=,[]abc5 ", max_size=8)


@given(dsns(SECRETS), st.sampled_from(["", "&x=y", "&sslmode=allow", "&port=0", "#"]))
def test_no_refusal_and_no_repr_shows_the_password(dsn: str, damage: str) -> None:
    assert_shows_no_secret(dsn + (damage if "?" in dsn else damage.replace("&", "?", 1)), MARK)


@given(RAW, RAW, RAW, RAW)
def test_no_refusal_shows_a_piece_of_a_password_that_was_not_encoded(a: str, b: str, c: str, d: str) -> None:
    assert_shows_no_secret(f"postgresql://alex:{a}SECRETA{b}SECRETB{c}@{HOST}/neondb?sslmode=require{d}", "SECRET")


def assert_shows_no_secret(dsn: str, secret: str) -> None:
    try:
        parameters = parse(dsn, {}, {})
    except ConfigurationError:
        pass
    else:
        assert secret not in f"{parameters!r} {parameters} {parameters.redacted_dsn}"
    calls: tuple[Callable[[str], object], ...] = (create_pool, harden_dsn)
    for call in calls:
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
