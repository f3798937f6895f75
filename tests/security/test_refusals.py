"""What is weaker, unknown or malformed is refused by the call itself, from every source, before any socket exists."""

from __future__ import annotations

import inspect
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.dsns import HOST, POOLED

from neon_async import LETS_ENCRYPT_ROOTS as ROOTS
from neon_async import ConfigurationError, InsecureConfigurationError, connect, create_pool, create_ssl_context

SECRET = "pw-7c1f9e2d"
ENVIRONMENT = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "client_encoding": "PGCLIENTENCODING",
    "options": "PGOPTIONS",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "sslcert": "PGSSLCERT",
    "sslcertmode": "PGSSLCERTMODE",
    "sslsni": "PGSSLSNI",
    "sslcompression": "PGSSLCOMPRESSION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "min_protocol_version": "PGMINPROTOCOLVERSION",
    "channel_binding": "PGCHANNELBINDING",
    "require_auth": "PGREQUIREAUTH",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
    "gssencmode": "PGGSSENCMODE",
    "gssdelegation": "PGGSSDELEGATION",
    "requirepeer": "PGREQUIREPEER",
    "service": "PGSERVICE",
}

ONE_LABEL, POOLER = {"host": "db"}, {"host": "pgbouncer.example.com", "pooled": True}
# (parameter, value, whether the value asks for less than verify-full)
EVERYWHERE: tuple[tuple[str, str, bool], ...] = (
    ("sslmode", "disable", True),
    ("sslmode", "allow", True),
    ("sslmode", "prefer", True),
    ("sslmode", "require", True),
    ("sslmode", "verify-ca", True),
    ("sslmode", "", False),
    ("sslmode", "verify_full", False),
    ("sslmode", "VERIFY-FULL", False),
    ("sslmode", " verify-full", False),
    ("sslmode", "no-verify", False),
    ("host", "/var/run/postgresql", True),
    ("host", "@abstract", True),
    ("host", "a.example,b.example", True),
    ("host", f"{HOST},evil.example", True),
    ("host", "127.0.0.1", True),
    ("host", "10.1", True),
    ("host", "0x7f.1", True),
    ("host", "2130706433", True),
    ("host", "[::1]", True),
    ("host", "::1", True),
    ("host", "fe80::1%eth0", True),
    ("host", "*.aws.neon.tech", False),
    ("host", f"{HOST}.", False),
    ("host", f"x@{HOST}", False),
    ("host", "bücher.example", False),
    ("host", "a\nb.example", False),
    ("host", "a\x00b.example", False),
    ("host", "a b.example", False),
    ("host", "-a.example", False),
    ("host", "a..example", False),
    ("host", ".example.org", False),
    ("host", "a_b.example", False),
    ("host", f"{'a' * 64}.example", False),
    ("host", f"{'a.' * 127}example", False),
    ("host", "database", False),
    ("hostaddr", "neon.tech", False),
    ("hostaddr", "127.0.0.1,127.0.0.2", False),
    ("hostaddr", "fe80::1%&sslmode=disable", False),
    ("hostaddr", "fe80::1%a\nb", False),
    ("port", "0", False),
    ("port", "65536", False),
    ("port", "-1", False),
    ("port", "5432,5433", False),
    ("port", "postgres", False),
    ("port", "5_432", False),
    ("user", "alex\x00database\x00postgres", False),
    ("dbname", "neondb\x00replication\x00true", False),
    ("options", "-c a=b\x00user\x00postgres", False),
    ("connect_timeout", "0", False),
    ("connect_timeout", "-1", False),
    ("connect_timeout", "inf", False),
    ("connect_timeout", "nan", False),
    ("connect_timeout", "3601", False),
    ("connect_timeout", "soon", False),
    ("client_encoding", "LATIN1", False),
    ("client_encoding", "auto", False),
    ("keepalives", "2", False),
    ("keepalives", "yes", False),
    ("keepalives_idle", "0", False),
    ("keepalives_interval", "32768", False),
    ("keepalives_count", "128", False),
    ("tcp_user_timeout", "-1", False),
    ("sslnegotiation", "requiredirect", False),
    ("sslsni", "0", True),
    ("sslcompression", "1", True),
    ("sslcertmode", "require", False),
    ("sslkeylogfile", "/tmp/keys", True),
    ("sslcrldir", "/etc/ssl/crl", False),
    ("sslcrl", "/nonexistent/crl.pem", False),
    ("sslcert", "/nonexistent/cert.pem", False),
    ("sslrootcert", "/nonexistent/root.pem", False),
    ("ssl_min_protocol_version", "SSLv3", False),
    ("ssl_max_protocol_version", "TLSv1.2", True),
    ("min_protocol_version", "3.2", False),
    ("channel_binding", "disable", True),
    ("channel_binding", "", False),
    ("require_auth", "none", True),
    ("require_auth", "password", True),
    ("require_auth", "scram-sha-256,password", True),
    ("require_auth", "!scram-sha-256", True),
    ("target_session_attrs", "read-write", False),
    ("load_balance_hosts", "random", False),
    ("gssencmode", "require", False),
    ("gssdelegation", "1", False),
    ("krbsrvname", "postgres", False),
    ("gsslib", "gssapi", False),
    ("requirepeer", "postgres", False),
    ("replication", "database", False),
    ("service", "production", False),
    ("servicefile", "/etc/pg_service.conf", False),
    ("passfile", "/root/.pgpass", False),
    ("scram_client_key", "AAAA", False),
    ("scram_server_key", "AAAA", False),
    ("oauth_issuer", "https://issuer.example", False),
    ("sslmod", "verify-full", False),
    ("search_path", "public", False),
)


@dataclass(frozen=True)
class Case:
    """One attempt: its DSN, keywords and environment, and the error that it must raise.

    Attributes:
        insecure: Whether the error is an `InsecureConfigurationError`.
        names: What the message must name.
    """

    dsn: str | None
    keywords: dict[str, object]
    environment: dict[str, str]
    insecure: bool
    names: str | None = None


def url(host: str = HOST, query: str = "", port: str = "") -> str:
    return f"postgresql://alex:{SECRET}@{host}{port}/neondb" + (f"?{query}" if query else "")


def from_every_source() -> Iterator[object]:
    for name, value, insecure in EVERYWHERE:
        label = f"{name}={value[:70]!r}"
        yield pytest.param(Case(url(), {name: value}, {}, insecure, name), id=f"keyword {label}")
        if name in ("host", "port", "user", "dbname"):
            base = {
                "host": f"postgresql://alex:{SECRET}@/neondb",
                "port": url(),
                "user": f"postgresql://:{SECRET}@{HOST}/neondb",
                "dbname": f"postgresql://alex:{SECRET}@{HOST}",
            }[name]
        else:
            base = url()
        yield pytest.param(Case(f"{base}?{name}={quote(value, safe='')}", {}, {}, insecure, name), id=f"DSN {label}")
        if name in ENVIRONMENT and "\0" not in value:
            others = {"host": HOST, "user": "alex", "password": SECRET} | {name: value}
            environment = {ENVIRONMENT[key]: text for key, text in others.items()}
            yield pytest.param(Case(None, {}, environment, insecure, name), id=f"environment {label}")


def only_in_a_dsn() -> Iterator[object]:
    table: tuple[tuple[str, str, bool], ...] = (
        ("ssl=true", url(query="ssl=true"), True),
        ("ssl=require", url(query="ssl=require"), True),
        ("ssl and sslmode", url(query="ssl=verify-full&sslmode=verify-full"), False),
        ("sslmode twice, the weak one last", url(query="sslmode=verify-full&sslmode=disable"), False),
        ("sslmode twice, the weak one first", url(query="sslmode=disable&sslmode=verify-full"), False),
        ("sslmode with an encoded key", url(query="sslm%6Fde=disable"), True),
        ("sslmode before a fragment", url(query="sslmode=verify-full#x"), False),
        ("host in authority and query", url(query="host=evil.example.org"), False),
        ("host in authority and query, the same", url(query=f"host={HOST}"), False),
        ("port in authority and query", url(port=":5432", query="port=5433"), False),
        ("dbname and database", url(query="dbname=a&database=b"), False),
        ("password twice", url(query="password=x"), False),
        ("trust_anchor", url(query="trust_anchor=/tmp/ca.pem"), True),
        ("direct_tls", url(query="direct_tls=false"), True),
        ("connect", url(query="connect=x"), True),
        ("loop", url(query="loop=x"), True),
        ("crl", url(query="crl=/tmp/crl.pem"), False),
        ("server_settings", url(query="server_settings=x"), False),
        ("statement_cache_size", url(query="statement_cache_size=0"), False),
        ("percent-encoded socket", url(host="%2Fvar%2Frun%2Fpostgresql"), True),
        ("percent-encoded abstract socket", url(host="%40pg"), True),
        ("percent-encoded host list", url(host="a.example%2Cb.example"), True),
        ("percent-encoded IP", url(host="127%2E0%2E0%2E1"), True),
        ("host list", url(host="a.example:1,b.example:2"), False),
        ("IPv6 literal with port", url(host="[::1]", port=":5432"), True),
        ("empty port list", url(port=":5432,"), False),
        ("port with letters", url(port=":54x2"), False),
        ("other scheme", f"mysql://alex:{SECRET}@{HOST}/neondb", False),
        ("driver scheme", f"postgresql+psycopg2://alex:{SECRET}@{HOST}/neondb", False),
        ("upper-case scheme", f"POSTGRESQL://alex:{SECRET}@{HOST}/neondb", False),
        ("key-value string", f"host={HOST} user=alex password={SECRET}", False),
        ("empty", "", False),
        ("line break at the end", url() + "\n", False),
        ("white space in front", " " + url(), False),
        ("tab inside", url().replace("neondb", "neon\tdb"), False),
        ("a host name of one label", url(host="db"), False),
        ("'@' in the password", f"postgresql://alex:{SECRET}@x@{HOST}/neondb", False),
        ("'/' in the password", f"postgresql://alex:x/{SECRET}@{HOST}/neondb", False),
        ("'/' and '?' in the password", f"postgresql://alex:5/{SECRET}?a=b@{HOST}/neondb", False),
        ("'?' in the user", f"postgresql://al?ex:{SECRET}@{HOST}/neondb", False),
        ("'#' in the password", f"postgresql://alex:{SECRET}#x@{HOST}/neondb", False),
        ("'#' in dbname, where asyncpg would cut sslmode off", url().replace("neondb", "neon#db"), False),
        ("'&' in a password", f"postgresql://{HOST}/neondb?user=alex&password=x&{SECRET}=y", False),
        ("broken percent-encoding", f"postgresql://alex:{SECRET}%zz@{HOST}/neondb", False),
        ("percent-encoding that is not UTF-8", url(query="application_name=%FF"), False),
        ("a parameter without value", url(query="sslmode"), False),
        ("NUL in the user", f"postgresql://al%00ex:{SECRET}@{HOST}/neondb", False),
        ("NUL in the password", f"postgresql://alex:{SECRET}%00@{HOST}/neondb", False),
        ("no user", f"postgresql://{HOST}/neondb", False),
        ("no password", f"postgresql://alex@{HOST}/neondb", False),
        ("no host", f"postgresql://alex:{SECRET}@/neondb", False),
        ("sslkey without sslcert", url(query="sslkey=/tmp/key.pem"), False),
    )
    for label, dsn, insecure in table:
        yield pytest.param(Case(dsn, {}, {}, insecure), id=f"DSN {label}")


def context_without(check: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    if check != "check_hostname":
        context.verify_mode = ssl.CERT_OPTIONAL if check == "requirement" else ssl.CERT_NONE
    return context


def only_in_code() -> Iterator[object]:
    table: tuple[tuple[str, dict[str, object], bool], ...] = (
        ("ssl=False", {"ssl": False}, True),
        ("ssl='require'", {"ssl": "require"}, True),
        ("ssl=0", {"ssl": 0}, True),
        ("ssl=SSLContext", {"ssl": ssl.create_default_context()}, False),
        ("sslmode=SSLContext", {"sslmode": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}, False),
        ("ssl=SSLContext of our own", {"ssl": create_ssl_context()}, False),
        ("ssl=SSLContext that verifies nothing", {"ssl": context_without("verify_mode")}, True),
        ("ssl=SSLContext that does not verify the name", {"ssl": context_without("check_hostname")}, True),
        ("ssl=SSLContext that verifies what is there", {"ssl": context_without("requirement")}, True),
        ("ssl=SSLContext for servers", {"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)}, True),
        ("ssl and sslmode", {"ssl": True, "sslmode": "verify-full"}, False),
        ("direct_tls=False", {"direct_tls": False}, True),
        ("direct_tls=True", {"direct_tls": True}, True),
        ("connect=", {"connect": print}, True),
        ("loop=", {"loop": object()}, True),
        ("host=list", {"host": [HOST, "evil.example.org"]}, False),
        ("host=bytes", {"host": b"a.example"}, False),
        ("port=list", {"port": [5432]}, False),
        ("port=True", {"port": True}, False),
        ("port=5432.0", {"port": 5432.0}, False),
        ("port of 5,000 digits", {"port": 10**5000}, False),
        ("sslsni of 5,000 digits", {"sslsni": 10**5000}, False),
        ("connect_timeout of 5,000 digits", {"connect_timeout": 10**5000}, False),
        ("command_timeout of 400 digits", {"command_timeout": 10**400}, False),
        ("keepalives=1.0", {"keepalives": 1.0}, False),
        ("user with half a surrogate pair", {"user": "al\ud800ex"}, False),
        ("application_name that is not UTF-8", {"application_name": "caf\udce9"}, False),
        ("server_settings that are not UTF-8", {"server_settings": {"a.b": "caf\udce9"}}, False),
        ("application_name longer than a StartupMessage", {"application_name": "x" * 20_000}, False),
        ("connection_class=int", {"connection_class": int}, False),
        ("record_class=object", {"record_class": object()}, False),
        ("password=bytes", {"password": SECRET.encode()}, False),
        ("password empty", {"password": ""}, False),
        ("password=int", {"password": 7}, False),
        ("connect_timeout=True", {"connect_timeout": True}, False),
        ("connect_timeout=nan", {"connect_timeout": float("nan")}, False),
        ("connect_timeout=inf", {"connect_timeout": float("inf")}, False),
        ("connect_timeout and timeout", {"connect_timeout": 1.0, "timeout": 1.0}, False),
        ("dbname and database", {"dbname": "a", "database": "a"}, False),
        ("command_timeout=0", {"command_timeout": 0}, False),
        ("command_timeout='soon'", {"command_timeout": "soon"}, False),
        ("statement_cache_size=-1", {"statement_cache_size": -1}, False),
        ("statement_cache_size=True", {"statement_cache_size": True}, False),
        ("server_settings=list", {"server_settings": ["a"]}, False),
        ("server_settings of int", {"server_settings": {"jit": 1}}, False),
        ("server_settings user", {"server_settings": {"user": "postgres"}}, False),
        ("server_settings replication", {"server_settings": {"replication": "true"}}, False),
        ("server_settings with NUL", {"server_settings": {"jit": "off\0user\0postgres"}}, False),
        ("server_settings protocol option", {"server_settings": {"_pq_.x": "1"}}, False),
        ("server_settings Neon's own word", {"server_settings": {"endpoint": "ep-x"}}, False),
        ("server_settings with a hyphen", {"server_settings": {"work-mem": "1MB"}}, False),
        ("server_settings with white space", {"server_settings": {"jit off": "1"}}, False),
        ("server_settings with a second setting in the name", {"server_settings": {"a=b -c jit": "off"}}, False),
        ("server_settings with a line break", {"server_settings": {"jit\n": "off"}}, False),
        ("server_settings with an empty part", {"server_settings": {"app.": "1"}}, False),
        ("server_settings twice, by case", {"server_settings": {"jit": "on", "JIT": "off"}}, False),
        ("server_settings and options", {"server_settings": {"jit": "on"}, "options": "-c JIT=off"}, False),
        ("server_settings seed", {"server_settings": {"seed": "0.5"}}, False),
        ("server_settings session_authorization", {"server_settings": {"session_authorization": "a"}}, False),
        (
            "server_settings transaction_isolation",
            {"server_settings": {"transaction_isolation": "serializable"}},
            False,
        ),
        ("server_settings transaction_read_only", {"server_settings": {"Transaction_Read_Only": "on"}}, False),
        ("server_settings transaction_deferrable", {"server_settings": {"transaction_deferrable": "on"}}, False),
        (
            "server_settings on a pooled host",
            {"host": POOLED, "server_settings": {"search_path": "a"}},
            False,
        ),
        (
            "application_name twice",
            {"application_name": "a", "server_settings": {"application_name": "b"}},
            False,
        ),
        ("a host name of one label below the roots of a public CA", {**ONE_LABEL, "trust_anchor": ROOTS}, False),
        ("pooled on a direct host", {"pooled": True}, False),
        ("pooled='yes'", {"pooled": "yes"}, False),
        ("server_settings on a host that code calls pooled", {**POOLER, "server_settings": {"jit": "off"}}, False),
        ("options on a host that code calls pooled", {**POOLER, "options": "-c jit=off"}, False),
        ("service switched off, and a name", {"service": "", "host": "a.example,b.example"}, True),
        ("trust_anchor missing", {"trust_anchor": "/nonexistent/ca.pem"}, False),
        ("trust_anchor empty", {"trust_anchor": b""}, False),
        ("trust_anchor text", {"trust_anchor": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"}, False),
        ("trust_anchor=int", {"trust_anchor": 1}, False),
        ("trust_anchor and sslrootcert", {"trust_anchor": b"x", "sslrootcert": "system"}, False),
        ("dsn=bytes", {"dsn": url().encode()}, False),
        ("pasword", {"pasword": SECRET}, False),
    )
    for label, keywords, insecure in table:
        dsn = keywords.pop("dsn", url())
        yield pytest.param(Case(dsn, keywords, {}, insecure), id=f"code {label}")  # type: ignore[arg-type]


def only_in_a_pool() -> Iterator[object]:
    table: tuple[tuple[str, dict[str, object]], ...] = (
        ("max_size=0", {"max_size": 0}),
        ("max_size=True", {"max_size": True}),
        ("max_size='10'", {"max_size": "10"}),
        ("min_size=-1", {"min_size": -1}),
        ("min_size above max_size", {"min_size": 11}),
        ("init_size below min_size", {"min_size": 2, "init_size": 1}),
        ("init_size above max_size", {"init_size": 11}),
        ("max_queries=0", {"max_queries": 0}),
        ("max_inactive_connection_lifetime=-1", {"max_inactive_connection_lifetime": -1}),
        ("max_inactive_connection_lifetime=nan", {"max_inactive_connection_lifetime": float("nan")}),
        ("max_size of 5,000 digits", {"max_size": 10**5000}),
        ("max_inactive_connection_lifetime of 400 digits", {"max_inactive_connection_lifetime": 10**400}),
        ("init=text", {"init": "SELECT 1"}),
    )
    for label, keywords in table:
        yield pytest.param(Case(url(), keywords, {}, insecure=False), id=f"pool {label}")


BOTH_CALLS = [*from_every_source(), *only_in_a_dsn(), *only_in_code()]
POOL_CALLS = [*BOTH_CALLS, *only_in_a_pool()]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listen where each case would connect if it were accepted, and fail if it does or if it resolves a name."""

    def resolve(*args: object, **_: object) -> object:
        raise AssertionError(f"a refused configuration resolved a name: {args}")

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
        monkeypatch.setenv("PGPORT", str(server.getsockname()[1]))
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


def assert_refused(call: object, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        call(case.dsn, **case.keywords)  # type: ignore[operator]
    assert isinstance(caught.value, InsecureConfigurationError) == case.insecure, caught.value
    assert SECRET not in f"{caught.value} {caught.value!r}"
    assert str(caught.value)[-1] in ".?=" or "Hardened: postgresql://alex:***@" in str(caught.value)
    if case.names:
        assert case.names in str(caught.value)


def test_there_are_at_least_120_inputs_from_three_sources() -> None:
    ids = [str(parameter.id) for parameter in POOL_CALLS]  # type: ignore[attr-defined]
    assert len(set(ids)) == len(ids) >= 120
    assert {name.split()[0] for name in ids} >= {"keyword", "DSN", "environment"}


@pytest.mark.parametrize("case", POOL_CALLS)
def test_create_pool_refuses(case: Case, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(create_pool, case, monkeypatch)


@pytest.mark.parametrize("case", BOTH_CALLS)
def test_connect_refuses(case: Case, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(connect, case, monkeypatch)


def test_the_refusal_of_a_weak_dsn_shows_the_hardened_dsn_without_its_password() -> None:
    with pytest.raises(InsecureConfigurationError) as caught:
        create_pool(url(query="sslmode=require&channel_binding=require&sslpassword=pw-7c1f9e2d"))
    assert SECRET not in str(caught.value)
    with pytest.raises(InsecureConfigurationError, match="checks neither the certificate nor the host name") as caught:
        create_pool(url(query="sslmode=require&channel_binding=require"))
    hardened = f"postgresql://alex:***@{HOST}/neondb?sslmode=verify-full&channel_binding=require"
    assert str(caught.value).endswith(f"Hardened: {hardened}")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("sslmod", "sslmode"), ("aplication_name", "application_name"), ("channelbinding", "channel_binding")],
)
def test_an_unknown_keyword_is_refused_with_the_closest_known_one(wrong: str, right: str) -> None:
    keywords: dict[str, Any] = {wrong: "x"}
    with pytest.raises(ConfigurationError, match=f"Did you mean {right}?"):
        create_pool(url(query=f"{wrong}=x"))
    with pytest.raises(ConfigurationError, match=f"Did you mean {right}?"):
        create_pool(url(), **keywords)


def test_a_keyword_wins_over_a_weak_dsn_and_a_weak_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "disable")
    create_pool(url(query="sslmode=require"), sslmode="verify-full")
    create_pool(url(query="sslmode=require"), ssl=True)
    create_pool(url(query="sslmode=verify-full"))
    with pytest.raises(InsecureConfigurationError, match="environment variable PGSSLMODE"):
        create_pool(url())


def test_a_weak_keyword_is_refused_although_dsn_and_environment_are_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    with pytest.raises(InsecureConfigurationError, match="keyword argument"):
        create_pool(url(query="sslmode=verify-full"), sslmode="require")  # type: ignore[call-overload]


def test_an_environment_variable_that_is_not_utf_8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGAPPNAME", os.fsdecode(b"caf\xe9"))
    with pytest.raises(ConfigurationError, match=r"application_name .*PGAPPNAME.*UTF-8"):
        create_pool(url())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["sslrootcert", "sslcrl", "sslcert", "trust_anchor"])
def test_a_named_pipe_instead_of_a_file_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    keywords: dict[str, Any] = {name: str(tmp_path / "pipe")}
    with pytest.raises(ConfigurationError, match=name):
        create_pool(url(), **keywords)


def test_an_error_of_the_callers_own_leaves_no_frame_with_the_dsn() -> None:
    class Broken:
        def __fspath__(self) -> str:
            raise RuntimeError("the caller's own")

    keywords: dict[str, Any] = {"sslcrl": Broken()}
    with pytest.raises(RuntimeError, match="the caller's own") as caught:
        create_pool(url(), **keywords)
    frames = [frame.frame.f_locals for frame in inspect.getinnerframes(caught.tb) if "neon_async" in frame.filename]
    assert frames
    assert SECRET not in repr(frames)
