"""What people paste gets an answer that helps, and that shows no secret."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dsns import HOST, MINIMAL

from neon_async import ConfigurationError, InsecureConfigurationError, connect, create_pool, harden_dsn
from neon_async._config.connection import parse
from neon_async._config.hints import (
    answer_to_dsn,
    answer_to_parameter,
    invisible_in,
    is_masked,
    is_password_placeholder,
    is_placeholder,
)

SECRET = "npg_s3cret7c1f9e"
DSN = f"postgresql://alex:{SECRET}@{HOST}/neondb"
BULLETS = "\u2022" * 12


def refusal(dsn: object, **keywords: Any) -> str:
    """Return the message with which `create_pool()` and `connect()` refuse this alike; it shows no secret."""
    messages = []
    calls: tuple[Any, ...] = (create_pool, connect)
    for call in calls:
        with pytest.raises(ConfigurationError) as caught:
            call(dsn, **keywords)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert SECRET not in messages[0]
    assert messages[0].isprintable()
    return messages[0]


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of other libraries

PARAMETERS = [
    ("schema", "public", 'server_settings={"search_path"'),
    ("search_path", "app,public", 'server_settings={"search_path"'),
    ("currentSchema", "app", "ALTER ROLE ... SET search_path"),
    ("pool_size", "5", "max_size="),
    ("poolSize", "5", "max_size="),
    ("connection_limit", "5", "max_size="),
    ("connectionLimit", "5", "max_size="),
    ("max", "20", "max_size="),
    ("max_overflow", "10", "the sum of pool_size and max_overflow"),
    ("pool_timeout", "30", "acquire_timeout="),
    ("pool_recycle", "1800", "max_lifetime="),
    ("pool_pre_ping", "true", "check_after_idle="),
    ("idleTimeoutMillis", "30000", "max_inactive_connection_lifetime="),
    ("connectionTimeoutMillis", "2000", "connect_timeout"),
    ("socket_timeout", "10", "command_timeout="),
    ("statement_timeout", "10s", "command_timeout="),
    ("timezone", "UTC", "server_settings="),
    ("pgbouncer", "true", "pooled=True"),
    ("endpoint", "ep-cool-darkness-123456", "SNI"),
    ("project", "ep-cool-darkness-123456", "SNI"),
    ("open", "False", "async with create_pool(...)"),
    ("ssl_context", "x", "trust_anchor="),
    ("sslaccept", "accept_invalid_certs", "always verified in full"),
    ("rejectUnauthorized", "false", "always verified in full"),
    ("ssl_ca", "ca.pem", "trust_anchor="),
    ("prepared_statement_cache_size", "0", "statement_cache_size="),
    ("connect_args", "x", "keywords of the call"),
    ("conninfo", "x", "first argument"),
    ("autocommit", "true", "transaction()"),
    ("username", "alex", "Write user."),
    ("passwd", SECRET, "Write password."),
    ("hostname", "x", "Write host."),
    ("echo", "true", "another library"),
    ("num_workers", "3", "another library"),
    ("maxsize", "5", "max_size="),
    ("serverVersion", "15", "another library"),
    ("charset", "utf8", "UTF-8"),
    ("uselibpqcompat", "true", "another library"),
    ("tcpKeepAlive", "true", "Write keepalives."),
    ("check_hostname", "false", "always verified in full"),
    ("server_hostname", "x", "always verified in full"),
    ("on_connect", "x", "init="),
    ("before_acquire", "x", "setup="),
    ("retries", "3", "run_transaction(attempts=)"),
    ("log", "true", "another library"),
]


@pytest.mark.parametrize(("name", "value", "answer"), PARAMETERS, ids=[name for name, _, _ in PARAMETERS])
def test_a_parameter_of_another_library_gets_an_answer(name: str, value: str, answer: str) -> None:
    for message, source in (
        (refusal(DSN, **{name: value}), "keyword argument"),
        (refusal(f"{DSN}?{name}={quote(value)}"), "DSN"),
        (refusal(f"postgresql://alex@{HOST}/d?password={SECRET}&{name}={quote(value)}"), "DSN"),
    ):
        assert message.startswith(f"{name!r} ({source}) is not a connection parameter. ")
        assert answer in message


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Password", "Did you mean password?"),
        ("ApplicationName", "Did you mean application_name?"),
        ("sslmod", "Did you mean sslmode?"),
        ("aplication_name", "Did you mean application_name?"),
        ("hst", "Did you mean host?"),
        ("zzz", "Leave it out. Server settings go into server_settings=."),
        ("requirements", "Leave it out. Server settings go into server_settings=."),
    ],
)
def test_only_a_slip_of_spelling_gets_the_parameter_that_it_looks_like(name: str, advice: str) -> None:
    for message in (refusal(DSN, **{name: SECRET}), refusal(f"{DSN}?{name}={SECRET}")):
        assert message.endswith(f" is not a connection parameter. {advice}")


def test_a_context_and_a_flag_in_code_get_the_same_answers() -> None:
    assert "trust_anchor=" in refusal(DSN, ssl_context=object())
    assert "async with create_pool(...)" in refusal(DSN, open=False)


def test_a_dsn_from_a_web_page_has_no_ampersands() -> None:
    assert "write '&' for '&amp;'" in refusal(f"{DSN}?sslmode=verify-full&amp;channel_binding=require")


def test_an_answer_is_a_sentence() -> None:
    for name, _, _ in PARAMETERS:
        assert re.fullmatch(r"[A-Z`].*[.]", answer_to_parameter(name))
    assert answer_to_parameter("nonsense") == ""


# ---------------------------------------------------------------------------------------------------------------------
# Connection strings with something around them

AROUND = [
    pytest.param("", "is empty", id="empty"),
    pytest.param("  ", "is empty", id="blank"),
    pytest.param(f'"{DSN}"', "begins with a quotation mark", id="quoted"),
    pytest.param(f"'{DSN}'", "begins with a quotation mark", id="in single quotes"),
    pytest.param(f"\u201c{DSN}\u201d", "begins with a quotation mark", id="in typographic quotes"),
    pytest.param(f"`{DSN}`", "begins with a quotation mark", id="in backticks"),
    pytest.param(f"<{DSN}>", "begins with a quotation mark or a bracket", id="in brackets"),
    pytest.param(f"psql {DSN}", "begins with the command psql", id="psql"),
    pytest.param(f"psql '{DSN}'", "begins with the command psql", id="psql and quotes"),
    pytest.param(f"$ psql {DSN}", "begins with the command psql", id="a prompt"),
    pytest.param(f"DATABASE_URL={DSN}", "begins with the name of a variable", id="DATABASE_URL="),
    pytest.param(f'export DATABASE_URL="{DSN}"', "begins with the name of a variable", id="export"),
    pytest.param(f"DATABASE_URL: {DSN}", "begins with the name of a variable", id="YAML"),
    pytest.param(f"POSTGRES_URL={SECRET}", "begins with the name of a variable", id="another variable"),
    pytest.param("${DATABASE_URL}", "is the name of a variable", id="not replaced"),
    pytest.param("$DATABASE_URL", "is the name of a variable", id="not replaced, without braces"),
    pytest.param("%DATABASE_URL%", "is the name of a variable", id="not replaced on Windows"),
    pytest.param("{{ database_url }}", "is the name of a variable", id="not replaced in a template"),
    pytest.param(f"host={HOST} user=alex password={SECRET}", "is a list of keywords", id="libpq's other form"),
    pytest.param(f"jdbc:postgresql://{HOST}/d?password={SECRET}", "is for JDBC", id="JDBC"),
    pytest.param(f"postgresql:alex:{SECRET}@{HOST}/d", "lacks the '//'", id="no slashes"),
    pytest.param(f"postgres:/alex:{SECRET}@{HOST}/d", "lacks the '//'", id="one slash"),
    pytest.param(f"prisma://accelerate.prisma-data.net/?api_key={SECRET}", "service of Prisma", id="Prisma"),
    pytest.param(f"https://{HOST}/sql", "is the address of a web page", id="https"),
    pytest.param(HOST, "is a host name", id="a host name"),
    pytest.param("None", "is the text of a missing value", id="None"),
    pytest.param(
        f"postgresql+psycopg2://alex:{SECRET}@{HOST}/d", "begins with 'postgresql+psycopg2://'", id="psycopg2"
    ),
    pytest.param(f"POSTGRESQL://alex:{SECRET}@{HOST}/d", "begins with 'POSTGRESQL://'", id="capitals"),
    pytest.param(f"alex:{SECRET}@{HOST}/d", "has no scheme", id="no scheme"),
    pytest.param(f"mysql://alex:{SECRET}@{HOST}/d", "begins with 'mysql://'", id="another database"),
    pytest.param(f"PSQL '{DSN}'", "begins with the command psql", id="psql in capitals"),
    pytest.param(f"sudo psql {DSN}", "begins with the command psql", id="sudo psql"),
    pytest.param(f"pg_dump -d {DSN}", "begins with something else than a URL", id="another command"),
    pytest.param(f"-e DATABASE_URL={DSN}", "begins with something else than a URL", id="an option"),
    pytest.param(f"({DSN})", "begins with something else than a URL", id="in parentheses"),
    pytest.param(f"- {DSN}", "begins with something else than a URL", id="an item of a list"),
    pytest.param(f"postgresql//alex:{SECRET}@{HOST}/d", "lacks the '//' or the ':'", id="no colon"),
    pytest.param(f"postgresql ://alex:{SECRET}@{HOST}/d", "lacks the '//' or the ':'", id="a space"),
    pytest.param(f"psql://alex:{SECRET}@{HOST}/d", "begins with 'psql://'", id="psql as scheme"),
    pytest.param(quote(DSN, safe=""), "is percent-encoded as a whole", id="percent-encoded"),
    pytest.param("DATABASE_URL", "is the name of a variable", id="the name alone"),
    pytest.param('url = env("DATABASE_URL")', "is the name of a variable", id="Prisma's schema"),
    pytest.param("op://vault/item/url", "is the name of a secret", id="1Password"),
    pytest.param("arn:aws:secretsmanager:us-east-2:1:secret:a", "is the name of a secret", id="AWS"),
    pytest.param("/run/secrets/database_url", "is the path of a file", id="a file"),
    pytest.param(r"C:\secrets\url.txt", "is the path of a file", id="a file on Windows"),
    pytest.param(f"{DSN}\u200b", "invisible character U+200B", id="a zero-width space at the end"),
    pytest.param(f"\ufeff{DSN}", "invisible character U+FEFF", id="a byte order mark"),
    pytest.param(f"\u00a0{DSN}", "invisible character U+00A0", id="a no-break space"),
    pytest.param(DSN.replace("neon.tech", "ne\u200bon.tech"), "invisible character U+200B", id="in the host"),
    pytest.param(DSN.replace("alex:", "alex:\u2060"), "invisible character U+2060", id="in the password"),
    pytest.param(f"{DSN}\n", "line break", id="a line break"),
    pytest.param(DSN.replace("alex:", "alex:\udcff"), "not UTF-8", id="a byte that is not UTF-8"),
]


@pytest.mark.parametrize(("dsn", "what"), AROUND)
def test_a_dsn_with_something_around_it_gets_an_answer(dsn: str, what: str) -> None:
    message = refusal(dsn)
    assert message.startswith("The DSN ")
    assert what in message
    with pytest.raises(ConfigurationError) as caught:
        harden_dsn(dsn)
    assert str(caught.value) == message


class Holder:
    """What holds a connection URL, and has one method that returns it."""

    def __init__(self, method: str) -> None:
        setattr(self, method, lambda **_: DSN)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        pytest.param("get_secret_value", "get_secret_value() returns one.", id="pydantic's SecretStr"),
        pytest.param("render_as_string", "render_as_string(hide_password=False) returns one.", id="SQLAlchemy's URL"),
        pytest.param("unicode_string", "str() makes one of it.", id="pydantic's PostgresDsn"),
        pytest.param("other", "Pass a str such as postgresql://user@host/db.", id="anything else"),
    ],
)
def test_an_object_in_place_of_the_dsn_gets_an_answer(method: str, what: str) -> None:
    message = refusal(Holder(method))
    assert message.startswith("The DSN is of type Holder. ")
    assert message.endswith(what)


@pytest.mark.parametrize(
    ("dsn", "what"),
    [
        pytest.param(f"{DSN}/", "ends with '/'", id="a trailing slash"),
        pytest.param(f"{DSN}/?sslmode=verify-full", "ends with '/'", id="a slash before the parameters"),
        pytest.param(f'{DSN}"', "or a quotation mark", id="a quotation mark at the end"),
        pytest.param(f"{DSN};", "comes from around it", id="a semicolon at the end"),
        pytest.param(f"{DSN},", "comes from around it", id="a comma at the end"),
        pytest.param(f"{DSN}`?sslmode=verify-full", "comes from around it", id="a backtick at the end"),
        pytest.param(f"{DSN}>", "comes from around it", id="a bracket at the end"),
        pytest.param(f"{DSN}\\n", "comes from around it", id="the text of a line break at the end"),
        pytest.param(f"postgresql://alex:$PGPASSWORD@{HOST}/d", "is a placeholder", id="a variable as password"),
        pytest.param(f"postgresql://alex:$(PASSWORD)@{HOST}/d", "is a placeholder", id="a variable of Kubernetes"),
        pytest.param(f"postgresql://alex:[REDACTED]@{HOST}/d", "is a placeholder", id="redacted"),
        pytest.param(f"postgresql://alex:__PASSWORD__@{HOST}/d", "is a placeholder", id="underscores"),
        pytest.param("postgresql://[user]:[password]@[neon_hostname]/[dbname]", "'[neon_hostname]'", id="Neon's"),
        pytest.param(
            "postgresql://[user]:[password]@[neon_hostname]/[dbname]?sslmode=require",
            "host (DSN) is the placeholder '[neon_hostname]'",
            id="Neon's, and weak",
        ),
        pytest.param(f"postgresql://alex:{SECRET}@<host>/d", "'<host>'", id="angle brackets"),
        pytest.param(f"postgresql://alex:{SECRET}@{{host}}/d", "'{host}'", id="braces"),
        pytest.param(f"postgresql://alex:{SECRET}@${{PGHOST}}/d", "'${PGHOST}'", id="a variable"),
        pytest.param(f"postgresql://alex:{SECRET}@your-host/d", "'your-host'", id="your-host"),
        pytest.param(f"postgresql://alex:{SECRET}@{HOST}/[dbname]", "dbname (DSN) is the placeholder", id="dbname"),
        pytest.param(f"postgresql://<user>:{SECRET}@{HOST}/d", "user (DSN) is the placeholder", id="user"),
        pytest.param(f"postgresql://alex:[YOUR-PASSWORD]@{HOST}/d", "password (DSN) is a placeholder", id="password"),
        pytest.param(f"postgresql://alex:YOUR_PASSWORD@{HOST}/d", "password (DSN) is a placeholder", id="yours"),
        pytest.param(f"postgresql://alex:****************@{HOST}/d", "consists of asterisks", id="asterisks"),
        pytest.param(f"postgresql://alex:***@{HOST}/d?sslmode=require", "consists of asterisks", id="from a message"),
        pytest.param(f"postgresql://alex:{BULLETS}@{HOST}/d", "consists of asterisks", id="bullets"),
    ],
)
def test_a_template_that_was_not_filled_in_gets_an_answer(dsn: str, what: str) -> None:
    assert what in refusal(dsn)


@pytest.mark.parametrize(
    ("keywords", "what"),
    [
        pytest.param({"host": DSN}, "host (keyword argument) is a URL", id="a URL as host"),
        pytest.param({"dbname": DSN}, "dbname (keyword argument) is a URL", id="a URL as dbname, as psycopg has it"),
        pytest.param({"user": DSN}, "user (keyword argument) is a URL", id="a URL as user"),
        pytest.param({"sslmode": DSN}, "not a URL", id="a URL as another value"),
        pytest.param({"host": f"alex:{SECRET}/@{HOST}/d"}, "contains '@'", id="a login as host"),
        pytest.param({"host": f"{HOST}:5432"}, "its port as port", id="a port in host"),
        pytest.param({"host": f"{HOST}/"}, "without '/'", id="a slash behind host"),
        pytest.param({"host": f"https://{HOST}/"}, "is a URL", id="a web address as host"),
        pytest.param({"host": f"{HOST}\u200b"}, "U+200B", id="a zero-width space in host"),
        pytest.param({"user": "alex\u200b"}, "U+200B", id="a zero-width space in user"),
        pytest.param({"dbname": "\u00a0d"}, "U+00A0", id="a no-break space in dbname"),
        pytest.param({"host": "[neon_hostname]"}, "placeholder '[neon_hostname]'", id="a placeholder"),
        pytest.param({"password": "********"}, "consists of asterisks", id="asterisks"),
        pytest.param({"password": "<password>"}, "is a placeholder", id="a placeholder for the password"),
    ],
)
def test_a_value_with_something_around_it_gets_an_answer(keywords: dict[str, Any], what: str) -> None:
    assert what in refusal(None, **MINIMAL | {"password": SECRET} | keywords)


@pytest.mark.parametrize(
    "password", ["*", "**a", "[abc]", "<x>", "{y}", "$ecret", "password", "pass/word", "a\u00a0b", "ab/"]
)
def test_an_odd_password_is_a_password(password: str) -> None:
    for read in (
        parse(None, MINIMAL | {"password": password}, {}),
        parse(f"postgresql://alex:{quote(password, safe='')}@{HOST}/d", {}, {}),
    ):
        assert read.password.reveal() == password


def test_what_is_encoded_in_a_dsn_is_meant() -> None:
    read = parse(f"postgresql://al%E2%80%8Bex:x@{HOST}/d%2F", {}, {})
    assert (read.user, read.database) == ("al\u200bex", "d/")


def test_a_value_that_takes_no_effect_is_not_judged() -> None:
    read = parse("postgresql://[user]:***@[neon_hostname]/[dbname]", MINIMAL | {"dbname": "d"}, {})
    assert (read.host, read.user, read.database) == (HOST, "alex", "d")


def test_a_weak_sslmode_comes_before_an_unknown_value() -> None:
    with pytest.raises(InsecureConfigurationError, match="sslmode=verify-full"):
        create_pool(f"{DSN}?sslmode=require&sslnegotiation=x")


@pytest.mark.parametrize(
    ("dsn", "is_shown"),
    [
        pytest.param(f"{DSN}?sslmode=require", True, id="accepted"),
        pytest.param(f"{DSN}?sslmode=require&sslnegotiation=x", False, id="another value is refused"),
        pytest.param(f"postgresql://alex@{HOST}/d?sslmode=require", False, id="no password"),
        pytest.param(f"postgresql://alex:{SECRET}@10.0.0.1/d?sslmode=require", False, id="an address"),
    ],
)
def test_a_hardened_dsn_is_shown_if_it_is_accepted(dsn: str, is_shown: bool) -> None:
    assert ("Hardened: " in refusal(dsn)) is is_shown


@given(st.text())
def test_any_text_is_looked_up_without_an_exception_and_no_answer_repeats_it(text: str) -> None:
    answers = [answer_to_parameter(text), *(answer_to_dsn(text) or ())]
    assert all(text not in answer for answer in answers if len(text) > 12)
    for look in (invisible_in, is_placeholder, is_password_placeholder, is_masked):
        look(text)


@pytest.mark.parametrize("piece", ["a", " ", "{", "[", "your", "*", "=", ":", "-", "A_"])
def test_the_patterns_take_linear_time(piece: str) -> None:
    """In quadratic time this text would take minutes."""
    text = piece * 200_000
    for look in (answer_to_dsn, answer_to_parameter, is_placeholder, is_password_placeholder, is_masked):
        look(text)
