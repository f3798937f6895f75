"""What a URL of the dialect, and the options of an engine, may say: everything is judged before a socket is opened."""

from __future__ import annotations

import importlib.metadata
import traceback
import typing
from typing import Any, cast

import asyncpg
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool
from support.engines import SCHEME

import neon_async
from neon_async._config.arguments import ConnectKeywords
from neon_async.sqlalchemy import (
    EngineKeywords,
    NeonDBAPI,
    NeonDialect,
    _translated,
    create_async_engine,
    use_direct_host,
)

HOST = "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech"
CONSOLE = f"{SCHEME}://alex:s3cret@{HOST}/neondb?sslmode=require&channel_binding=require"
PLAIN = f"postgresql://alex:s3cret@{HOST}/neondb"
WEAK = ["disable", "allow", "prefer", "require", "verify-ca", "nonsense"]


def arguments(url: str | URL) -> dict[str, Any]:
    """Return the keywords that SQLAlchemy connects with."""
    dialect: NeonDialect = cast(Any, NeonDialect)()
    return dialect.create_connect_args(make_url(url))[1]


def test_the_dialect_is_found_by_its_scheme() -> None:
    assert make_url(CONSOLE).get_dialect() is NeonDialect


def test_the_package_announces_the_dialect() -> None:
    (found,) = importlib.metadata.entry_points(group="sqlalchemy.dialects", name="postgresql.neon")
    assert found.value == "neon_async.sqlalchemy:NeonDialect"


def test_the_string_of_the_console_is_read_as_it_is() -> None:
    assert arguments(CONSOLE) == {
        "host": HOST,
        "database": "neondb",
        "user": "alex",
        "password": "s3cret",
        "channel_binding": "require",
    }


@pytest.mark.parametrize("name", ["sslmode", "ssl"])
@pytest.mark.parametrize("mode", WEAK)
def test_the_scheme_asks_for_verify_full_whatever_the_url_says(mode: str, name: str) -> None:
    url = f"{SCHEME}://alex:s3cret@{HOST}/neondb?{name}={mode}"
    assert arguments(url).keys() == {"host", "database", "user", "password"}
    create_async_engine(make_url(url))


@pytest.mark.parametrize("mode", WEAK)
@pytest.mark.parametrize("make", [neon_async.create_pool, neon_async.connect, create_async_engine])
def test_a_string_with_the_scheme_is_accepted_everywhere(make: Any, mode: str) -> None:
    made = make(f"{SCHEME}://alex:s3cret@{HOST}/neondb?sslmode={mode}")
    if hasattr(made, "close") and not isinstance(made, neon_async.Pool):
        made.close()  # a coroutine that never began


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        pytest.param("slmode=require", "Did you mean sslmode", id="unknown"),
        pytest.param("trust_anchor=root.pem", "trust_anchor .* in code only", id="a root as text"),
        pytest.param("command_timeout=5", "command_timeout .* in code only", id="for code only"),
        pytest.param("connect=mine", "verified|opens each connection itself", id="replaces the connect"),
        pytest.param("host=a.example.com", "host is given twice", id="another host"),
        pytest.param("database=other", "dbname is given twice", id="another database"),
        pytest.param("sslmode=require&ssl=true", "sslmode is given twice", id="two names for one"),
        pytest.param("port=5432&port=5433", "port is given twice", id="two values"),
        pytest.param("prepared_statement_cache_size=many", "prepared_statement_cache_size", id="not a number"),
    ],
)
def test_a_parameter_that_cannot_stand_in_a_url_is_refused_by_name(query: str, complaint: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=complaint):
        sqlalchemy.ext.asyncio.create_async_engine(f"{SCHEME}://alex:s3cret@{HOST}/neondb?{query}")


def test_the_cache_of_sqlalchemy_can_be_set_in_a_url() -> None:
    assert arguments(f"{CONSOLE}&prepared_statement_cache_size=0")["prepared_statement_cache_size"] == 0


@pytest.mark.parametrize(
    ("dsn", "options", "complaint"),
    [
        pytest.param(f"{PLAIN}?sslmode=require", {}, "Hardened: .*sslmode=verify-full", id="weak DSN"),
        pytest.param(f"{PLAIN}?sslmode=disable", {}, "Hardened: .*sslmode=verify-full", id="plaintext"),
        pytest.param(PLAIN, {"sslmode": "require"}, "sslmode", id="weak keyword"),
        pytest.param(CONSOLE, {"sslmode": "require"}, "sslmode", id="weak keyword beside the scheme"),
        pytest.param(CONSOLE, {"connect_args": {"ssl": "require"}}, "sslmode|ssl", id="weak connect_args"),
        pytest.param(make_url(CONSOLE), {"ssl": False}, "sslmode|ssl", id="weak keyword beside a URL"),
        pytest.param(CONSOLE, {"direct_tls": False}, "direct_tls", id="asyncpg's own TLS"),
        pytest.param(CONSOLE, {"async_creator": asyncpg.connect}, "async_creator", id="async_creator"),
        pytest.param(CONSOLE, {"creator": lambda: None}, "creator", id="creator"),
        pytest.param(CONSOLE, {"connect_timeout": -1}, "connect_timeout", id="out of range"),
        pytest.param(f"{SCHEME}://alex:s3cret@10.0.0.1/neondb", {}, "host", id="address"),
        pytest.param(f"{SCHEME}://alex@{HOST}/neondb", {}, "password", id="no password"),
        pytest.param("mysql://alex:s3cret@db.example.com/neondb", {}, "begins with", id="another database"),
        pytest.param(None, {}, "host", id="nothing at all"),
    ],
)
def test_what_is_refused_is_refused_by_the_call_itself(dsn: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(neon_async.ConfigurationError, match=complaint) as raised:
        create_async_engine(dsn, **options)
    frames = [frame for frame, _ in traceback.walk_tb(raised.tb) if frame.f_code.co_filename != __file__]
    assert frames
    assert "s3cret" not in repr([frame.f_locals for frame in frames]) + str(raised.value)


def test_an_option_that_nobody_knows_is_named() -> None:
    with pytest.raises(TypeError, match="max_size"):
        create_async_engine(CONSOLE, max_size=5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("dsn", "options"),
    [
        pytest.param(CONSOLE, {}, id="text with the scheme"),
        pytest.param(f"{PLAIN}?sslmode=verify-full", {}, id="text without it"),
        pytest.param(f"{PLAIN}?sslmode=require", {"sslmode": "verify-full"}, id="a keyword wins"),
        pytest.param(make_url(CONSOLE), {}, id="URL"),
        pytest.param(make_url(CONSOLE).set(drivername="postgresql"), {}, id="URL of another scheme"),
        pytest.param(None, {"host": HOST, "user": "alex", "password": "s3cret", "dbname": "neondb"}, id="keywords"),
    ],
)
def test_an_engine_shows_where_it_connects_to_and_no_password(dsn: Any, options: dict[str, Any]) -> None:
    engine = create_async_engine(dsn, **options)
    assert (engine.url.drivername, engine.url.host, engine.url.database) == (SCHEME, HOST, "neondb")
    assert "s3cret" not in str(engine.url) + repr(engine)


def test_an_engine_reads_the_variables_of_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PGHOST", HOST), ("PGUSER", "alex"), ("PGPASSWORD", "s3cret"), ("PGDATABASE", "neondb")):
        monkeypatch.setenv(name, value)
    assert create_async_engine().url.host == HOST
    monkeypatch.setenv("PGSSLMODE", "require")
    with pytest.raises(neon_async.InsecureConfigurationError, match="PGSSLMODE"):
        create_async_engine()


def test_characters_that_a_url_encodes_survive() -> None:
    dsn = f"{SCHEME}://al%40ex:p%2Bq+r%25s@{HOST}/my%20db?application_name=a%20b&options=-c%20x.y%3D1"
    url = create_async_engine(dsn, host=HOST.replace("-pooler", "")).url
    assert (url.username, url.password, url.database) == ("al@ex", "p+q+r%s", "my db")
    assert url.query == {"application_name": "a b", "options": "-c x.y=1"}
    assert make_url(url.render_as_string(hide_password=False)) == url


def test_options_of_sqlalchemy_pass_through() -> None:
    engine = create_async_engine(CONSOLE, poolclass=NullPool, echo=False, application_name="worker")
    assert isinstance(engine.pool, NullPool)


def test_the_keywords_of_an_engine_are_those_of_sqlalchemy_and_of_every_connection() -> None:
    of_sqlalchemy = set(typing.get_overloads(sqlalchemy.create_engine)[0].__annotations__) - {"return", "url", "kwargs"}
    # What replaces our connections is refused, and what has no effect any more is left out.
    refused = {"creator", "module", "pool"}
    gone = {"convert_unicode", "future", "implicit_returning"}
    assert of_sqlalchemy - refused - gone <= set(EngineKeywords.__annotations__)
    assert set(ConnectKeywords.__annotations__) <= set(EngineKeywords.__annotations__)


@pytest.mark.parametrize("public", [EngineKeywords, create_async_engine, use_direct_host], ids=lambda one: one.__name__)
def test_the_type_hints_of_what_is_public_can_be_evaluated(public: Any) -> None:
    assert typing.get_type_hints(public)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({name: value}, id=name)
        for name, value in {
            "pool_size": 5,
            "max_overflow": 0,
            "pool_pre_ping": True,
            "pool_recycle": 60,
            "pool_timeout": 1.0,
            "poolclass": NullPool,
            "connect_args": {},
            "creator": lambda: None,
            "async_creator": lambda: None,
            "application_name": "worker",
            "sslmode": "verify-full",
            "trust_anchor": b"",
            "statement_cache_size": 0,
        }.items()
    ],
)
def test_options_that_concern_connections_are_refused_beside_a_pool(options: dict[str, Any]) -> None:
    pool = neon_async.create_pool(f"{PLAIN}?sslmode=verify-full")
    with pytest.raises(neon_async.ConfigurationError, match=next(iter(options))):
        create_async_engine(pool, **options)


def test_a_pool_of_asyncpg_is_refused() -> None:
    with pytest.raises(neon_async.ConfigurationError, match="not verified"):
        create_async_engine(asyncpg.Pool.__new__(asyncpg.Pool))  # type: ignore[arg-type]


def test_an_engine_on_a_pool_shows_where_the_pool_connects_to() -> None:
    pool = neon_async.create_pool(f"{PLAIN}?sslmode=verify-full")
    assert create_async_engine(pool).url.render_as_string(hide_password=False) == f"{SCHEME}://alex@{HOST}:5432/neondb"


# ---------------------------------------------------------------------------------------------------------------------
# The names of PEP 249 for our errors

ERRORS = [
    value
    for value in map(vars(neon_async).get, neon_async.__all__)
    if isinstance(value, type) and issubclass(value, neon_async.NeonAsyncError)
]
OTHERS = {
    neon_async.ConfigurationError: "InterfaceError",
    neon_async.InsecureConfigurationError: "InterfaceError",
    neon_async.UnsupportedEventLoopError: "InterfaceError",
    neon_async.PoolClosedError: "InterfaceError",
    neon_async.PooledHostError: "NotSupportedError",
    neon_async.StaleStatementError: "InvalidCachedStatementError",
    neon_async.WrongMethodError: "ProgrammingError",
}


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_each_error_of_ours_is_one_of_the_dbapi(cls: type[Exception]) -> None:
    dbapi = NeonDBAPI(asyncpg)
    error = cls("what happened")
    translated = _translated(dbapi, error)
    assert type(translated) is getattr(dbapi, OTHERS.get(cls, "OperationalError"))
    assert "what happened" in str(translated)
    assert translated.__cause__ is error


@pytest.mark.parametrize(
    ("error", "name"),
    [
        pytest.param(neon_async.PoolClosedError("closing", unavailable=True), "OperationalError", id="closing pool"),
        pytest.param(asyncpg.AdminShutdownError("suspended"), "OperationalError", id="shutdown"),
        pytest.param(asyncpg.TooManyConnectionsError("full"), "OperationalError", id="too many connections"),
        pytest.param(ConnectionResetError("reset"), "OperationalError", id="reset"),
        pytest.param(asyncpg.UniqueViolationError("twice"), "IntegrityError", id="as by SQLAlchemy"),
        pytest.param(asyncpg.InterfaceError("closed"), "InterfaceError", id="as by SQLAlchemy, too"),
    ],
)
def test_an_outage_is_an_operational_error_and_the_rest_is_as_by_the_dialect_of_asyncpg(
    error: Exception, name: str
) -> None:
    dbapi = NeonDBAPI(asyncpg)
    assert isinstance(_translated(dbapi, error), getattr(dbapi, name))


@pytest.mark.parametrize("error", [LookupError("not ours"), TimeoutError()], ids=repr)
def test_what_is_no_error_of_the_database_stays_as_it_is(error: Exception) -> None:
    assert _translated(NeonDBAPI(asyncpg), error) is error
