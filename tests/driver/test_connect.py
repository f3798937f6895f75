"""One connection: its deadline and its cancellation at every step, passwords, settings, reports, and no trio."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import trio
from support.certificates import issue, present, revocation_list
from support.probes import HANG, assert_secret_free, black_hole, nothing_is_left, open_sockets, password_of, until

import neon_async
from neon_async._driver import connector as _connect
from neon_async._wire import dial as _dial
from neon_async._wire.tls import build_context
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Conversation, Impostor, authentication_request, login, server_context

pytestmark = pytest.mark.anyio

ROOT = issue(subject="root", ca=True)
CONTEXT = server_context(present(issue(ROOT)).chain)
NAME = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
SECRET = "s3cret-of-alex"
OFFER = authentication_request(10, b"SCRAM-SHA-256\0\0")


def silent(conversation: Conversation) -> None:
    """Say nothing, and read on."""


async def never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


@contextlib.asynccontextmanager
async def opened(postgres: LocalPostgres, **keywords: Any) -> AsyncIterator[Any]:
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, **keywords)
    try:
        yield connection
    finally:
        await connection.close()


# A dial that stands still, step by step: the DSN, keywords, and whether it has got there


Stalled = tuple[str, dict[str, Any], Callable[[], object]]


@contextlib.asynccontextmanager
async def stalled_password(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    asked = []

    async def password() -> str:
        asked.append(1)
        return await never()

    yield f"postgresql://alex@{NAME}/neondb?hostaddr=127.0.0.1", {"password": password}, lambda: asked


@contextlib.asynccontextmanager
async def stalled_dns(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    asked = []

    async def getaddrinfo(*_: object, **__: object) -> Any:
        asked.append(1)
        await never()

    patch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    yield f"postgresql://alex:{SECRET}@{NAME}/neondb", {}, lambda: asked


@contextlib.asynccontextmanager
async def stalled_tcp(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    with black_hole() as port:
        before = open_sockets()
        dsn = f"postgresql://alex:{SECRET}@{NAME}:{port}/neondb?hostaddr=127.0.0.1"
        yield dsn, {}, lambda: open_sockets() - before


@contextlib.asynccontextmanager
async def stalled_at(
    script: Any, received: Callable[[Conversation], object], **keywords: Any
) -> AsyncIterator[Stalled]:
    async with Impostor(script) as impostor:
        dsn = impostor.dsn.replace(impostor.password, SECRET)
        yield dsn, keywords, lambda: impostor.conversations and received(impostor.conversations[-1])


def stalled_direct_tls(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(silent, lambda one: one.wire)


def stalled_ssl_request(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(silent, lambda one: one.wire, sslnegotiation="postgres")


def stalled_handshake_after_ssl_request(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    def consent(conversation: Conversation) -> None:
        conversation.opens_with_tls()
        conversation.send(b"S")

    return stalled_at(consent, lambda one: len(one.wire) > 8, sslnegotiation="postgres")


def stalled_authentication(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(login(CONTEXT), lambda one: one.decrypted)


def stalled_scram(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(login(CONTEXT, OFFER), lambda one: b"SCRAM-SHA-256" in one.decrypted)


@contextlib.asynccontextmanager
async def stalled_crl(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    """The disk with the CRL file is slow: the thread that reads it stands still."""
    path = folder / "crl.pem"
    path.write_bytes(revocation_list(ROOT))
    reading, released = threading.Event(), threading.Event()

    def read_slowly(*args: Any, **keywords: Any) -> ssl.SSLContext:
        reading.set()
        released.wait(HANG)
        return build_context(*args, **keywords)

    async with Impostor(silent) as impostor:
        patch.setattr(_dial, "build_context", read_slowly)
        try:
            yield impostor.dsn, {"sslcrl": str(path)}, reading.is_set
        finally:
            released.set()


STEPS: list[Any] = [
    pytest.param(stalled_password, "the password function had not returned", id="password"),
    pytest.param(stalled_dns, "name had not been resolved", id="DNS"),
    pytest.param(stalled_tcp, "nothing had answered at its address", id="TCP"),
    pytest.param(stalled_direct_tls, "TLS handshake had not ended", id="direct TLS"),
    pytest.param(stalled_ssl_request, "TLS handshake had not ended", id="SSLRequest"),
    pytest.param(stalled_handshake_after_ssl_request, "TLS handshake had not ended", id="TLS after SSLRequest"),
    pytest.param(stalled_crl, "TLS handshake had not ended", id="reading the CRL"),
    pytest.param(stalled_authentication, "authentication had not ended", id="authentication"),
    pytest.param(stalled_scram, "authentication had not ended", id="in the middle of SCRAM"),
]


@pytest.mark.parametrize(("stall", "reason"), STEPS)
async def test_a_dial_that_stands_still_ends_at_its_deadline_and_tells_where(
    stall: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stall(tmp_path, monkeypatch) as (dsn, keywords, _), asyncio.timeout(HANG), nothing_is_left():
        with pytest.raises(neon_async.ConnectTimeoutError, match=reason) as caught:
            await neon_async.connect(dsn, trust_anchor=ROOT.pem, connect_timeout=0.3, **keywords)
    assert f"{NAME} was not ready within connect_timeout=0.3 s" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert_secret_free(caught.value, SECRET)


@pytest.mark.parametrize(("stall", "reason"), STEPS)
async def test_a_dial_that_is_cancelled_leaves_nothing_and_stays_cancelled(
    stall: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stall(tmp_path, monkeypatch) as (dsn, keywords, is_there), asyncio.timeout(HANG), nothing_is_left():
        task = asyncio.ensure_future(neon_async.connect(dsn, trust_anchor=ROOT.pem, **keywords))
        await until(is_there)
        task.cancel("by the test")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert task.cancelled()
        del task
    assert_secret_free(caught.value.with_traceback(None), SECRET)


@pytest.mark.parametrize("rounds", range(0, 40, 3))
async def test_a_dial_cancelled_at_any_moment_leaves_nothing(postgres: LocalPostgres, rounds: int) -> None:
    """Cancelled after so many rounds of the loop: early, late, or when it has just been done."""
    async with nothing_is_left():
        task = asyncio.ensure_future(neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor))
        for _ in range(rounds):
            await asyncio.sleep(0 if rounds % 2 else 0.0002)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).terminate()
        del task


async def test_a_server_that_is_refused_leaves_nothing(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        with pytest.raises(neon_async.CertificateError):
            await neon_async.connect(postgres.dsn, trust_anchor=ROOT.pem)
        with pytest.raises(neon_async.InvalidPasswordError):
            await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password="wrong")


async def test_a_deadline_of_the_caller_is_the_callers_own(postgres: LocalPostgres) -> None:
    async with Impostor(silent) as impostor:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.2):
                await neon_async.connect(impostor.dsn, trust_anchor=ROOT.pem)
    assert not isinstance(caught.value, neon_async.NeonAsyncError)


async def test_a_name_that_does_not_exist_is_a_connect_error() -> None:
    # RFC 6761, section 6.4: "invalid" is resolved by nobody.
    with pytest.raises(neon_async.ConnectError, match=r"The name db\.invalid cannot be resolved") as caught:
        await neon_async.connect(f"postgresql://alex:{SECRET}@db.invalid/neondb", trust_anchor=ROOT.pem)
    assert_secret_free(caught.value, SECRET)


# Passwords


def asks(answer: object, *, asynchronous: bool) -> tuple[Callable[[], Any], list[int]]:
    calls: list[int] = []

    def plain() -> object:
        calls.append(1)
        return answer

    async def coroutine() -> object:
        await asyncio.sleep(0)
        return plain()

    return (coroutine if asynchronous else plain), calls


@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "async function"])
async def test_a_password_function_is_asked_once_for_every_dial(postgres: LocalPostgres, asynchronous: bool) -> None:
    password, calls = asks(password_of(postgres), asynchronous=asynchronous)
    connector = _connect.prepare(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert not calls
    for count in (1, 2, 3):
        await (await connector.connect()).close()
        assert len(calls) == count


async def test_a_password_function_returns_any_awaitable(postgres: LocalPostgres) -> None:
    def password() -> Awaitable[str]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.set_result(password_of(postgres))
        return future

    async with opened(postgres, password=password) as connection:
        assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "async function"])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(SECRET.encode(), "a value of type bytes", id="bytes"),
        pytest.param(None, "a value of type NoneType", id="None"),
        pytest.param(7, "a value of type int", id="a number"),
        pytest.param("", "an unusable string", id="empty"),
        pytest.param(f"{SECRET}\0", "an unusable string", id="NUL"),
        pytest.param([SECRET], "a value of type list", id="list"),
    ],
)
async def test_a_password_function_that_returns_no_password_is_refused_before_any_socket(
    postgres: LocalPostgres, answer: object, kind: str, asynchronous: bool
) -> None:
    password, _ = asks(answer, asynchronous=asynchronous)
    with pytest.raises(neon_async.ConfigurationError, match=f"The password function returned {kind}") as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert_secret_free(caught.value, SECRET)


class VaultError(Exception):
    pass


@pytest.mark.parametrize(
    "kind", [VaultError, TimeoutError, ConnectionResetError, OSError, KeyError], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "async function"])
async def test_what_a_password_function_raises_arrives_as_it_is(
    postgres: LocalPostgres, kind: type[Exception], asynchronous: bool
) -> None:
    error = kind("the vault is sealed")

    async def coroutine() -> str:
        raise error

    def plain() -> str:
        raise error

    password = coroutine if asynchronous else plain
    with pytest.raises(kind) as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert caught.value is error
    assert caught.traceback[-1].name == password.__name__


@pytest.mark.parametrize("asynchronous", [None, False, True], ids=["string", "function", "async function"])
async def test_a_wrong_password_is_told_and_shown_nowhere(postgres: LocalPostgres, asynchronous: bool | None) -> None:
    password: Any = SECRET if asynchronous is None else asks(SECRET, asynchronous=asynchronous)[0]
    with pytest.raises(neon_async.InvalidPasswordError, match="password authentication failed") as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert_secret_free(caught.value, SECRET, password_of(postgres))
    assert caught.value.sqlstate == "28P01"


@pytest.mark.parametrize(
    "keywords",
    [
        pytest.param({"database": "no such database"}, id="missing database"),
        pytest.param({"server_settings": {"no_such_setting": "1"}}, id="an error that stays asyncpg's"),
        pytest.param({"trust_anchor": ROOT.pem}, id="a certificate that fails"),
        pytest.param({"hostaddr": "127.0.0.9"}, id="nobody listens"),
    ],
)
async def test_no_failure_of_a_dial_shows_the_password(postgres: LocalPostgres, keywords: dict[str, Any]) -> None:
    dsn = postgres.dsn.partition("?")[0]
    arguments = {"trust_anchor": postgres.trust_anchor, "hostaddr": "127.0.0.1", **keywords}
    with pytest.raises(Exception) as caught:  # noqa: PT011  which one is told elsewhere
        await neon_async.connect(dsn, **arguments)
    assert_secret_free(caught.value, password_of(postgres))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(authentication_request(3), id="cleartext"),
        pytest.param(OFFER + authentication_request(12, b"v=x"), id="disorder"),
        pytest.param(OFFER + authentication_request(11, b"r=x,s=eA==,i=4096"), id="another nonce"),
        pytest.param(OFFER + authentication_request(11, b"nonsense"), id="nonsense"),
    ],
)
async def test_no_failure_of_authentication_shows_the_password(answer: bytes) -> None:
    async with Impostor(login(CONTEXT, answer)) as impostor:
        with pytest.raises(neon_async.AuthenticationError) as caught:
            await neon_async.connect(impostor.dsn, trust_anchor=ROOT.pem)
    assert_secret_free(caught.value, impostor.password)
    assert impostor.password.encode() not in bytes(impostor.conversations[0].decrypted)


# What reaches the session


@pytest.mark.parametrize(
    ("keywords", "setting", "value"),
    [
        pytest.param(
            {"application_name": "orders 'n' more"}, "application_name", "orders 'n' more", id="application_name"
        ),
        pytest.param({"fallback_application_name": "fallback"}, "application_name", "fallback", id="fallback"),
        pytest.param(
            {"application_name": "first", "fallback_application_name": "second"},
            "application_name",
            "first",
            id="application_name before the fallback",
        ),
        pytest.param({"options": "-c statement_timeout=1234"}, "statement_timeout", "1234ms", id="options"),
        pytest.param({"options": "-c application_name=a\\ b"}, "application_name", "a b", id="options with a space"),
        pytest.param({"server_settings": {"search_path": "orders"}}, "search_path", "orders", id="server_settings"),
        pytest.param({"server_settings": {"TimeZone": "Asia/Tokyo"}}, "timezone", "Asia/Tokyo", id="time zone"),
        pytest.param({"server_settings": {"search_path": ""}}, "search_path", "", id="an empty value"),
        pytest.param(
            {"server_settings": {"application_name": "a b"}}, "application_name", "a b", id="name in settings"
        ),
        pytest.param(
            {"server_settings": {"app.text": 'it\'s "a"\t\\b -c\n x=é\u2003 \\'}},
            "app.text",
            'it\'s "a"\t\\b -c\n x=é\u2003 \\',
            id="everything in a value",
        ),
        pytest.param(
            {"server_settings": {"statement_timeout": "1234"}, "options": "-c work_mem=1MB"},
            "statement_timeout",
            "1234ms",
            id="server_settings behind options",
        ),
        pytest.param(
            {"server_settings": {"statement_timeout": "1234"}, "options": "-c work_mem=1MB"},
            "work_mem",
            "1MB",
            id="options before server_settings",
        ),
        pytest.param({"client_encoding": "utf-8"}, "client_encoding", "UTF8", id="client_encoding"),
    ],
)
async def test_settings_reach_the_session(
    postgres: LocalPostgres, keywords: dict[str, Any], setting: str, value: str
) -> None:
    async with opened(postgres, **keywords) as connection:
        assert await connection.fetchval(f"SHOW {setting}") == value


async def test_the_environment_reaches_the_session_and_loses_to_the_dsn(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGAPPNAME", "from the environment")
    monkeypatch.setenv("PGDATABASE", "not this one")
    async with opened(postgres) as connection:
        assert await connection.fetchval("SHOW application_name") == "from the environment"
        assert await connection.fetchval("SELECT current_database()") == "neondb"


async def test_an_environment_that_changes_later_has_no_say(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg reads PG* variables when it connects; ours were judged before, and stay."""
    connector = _connect.prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    for name, value in {
        "PGHOST": "evil.example.com",
        "PGPORT": "1",
        "PGUSER": "mallory",
        "PGPASSWORD": "x",
        "PGDATABASE": "evil",
        "PGSSLMODE": "disable",
        "PGSSLNEGOTIATION": "postgres",
        "PGSSLROOTCERT": "/nowhere",
        "PGSSLKEY": "/nowhere",
        "PGSSLCERT": "/nowhere",
        "PGSSLMINPROTOCOLVERSION": "SSLv2",
        "PGTARGETSESSIONATTRS": "standby",
        "PGSERVICE": "evil",
        "PGPASSFILE": "/nowhere",
        "PGKRBSRVNAME": "evil",
        "PGGSSLIB": "evil",
    }.items():
        monkeypatch.setenv(name, value)
    connection = await connector.connect()
    try:
        assert await connection.fetchval("SELECT current_user || '@' || current_database()") == "neon@neondb"
        assert neon_async.connection_tls_report(connection).negotiation == "direct"
    finally:
        await connection.close()


async def test_asyncpgs_own_keywords_are_passed_on(postgres: LocalPostgres) -> None:
    class MyConnection(asyncpg.Connection):
        pass

    class MyRecord(asyncpg.Record):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    async with opened(
        postgres, connection_class=MyConnection, record_class=MyRecord, command_timeout=1.0, statement_cache_size=0
    ) as connection:
        row: Any = await connection.fetchrow("SELECT 7 AS seven")
        assert row.seven == 7
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(3600)")
        assert connection._stmt_cache.get_max_size() == 0
        assert type(connection) is MyConnection


# Reports


async def test_a_connection_tells_of_its_handshake(postgres: LocalPostgres) -> None:
    async with opened(postgres) as connection:
        report = neon_async.connection_tls_report(connection)
        assert (report.version, report.negotiation, report.alpn) == ("TLSv1.3", "direct", "postgresql")
        assert report.server_name == postgres.host
        cipher = await connection.fetchval("SELECT cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert report.cipher == cipher
        assert report.anchor.endswith("from trust_anchor")
        with pytest.raises(AttributeError):
            report.version = "TLSv1.2"  # type: ignore[misc]


async def test_a_pools_connection_tells_until_it_is_released(postgres: LocalPostgres) -> None:
    async with neon_async.create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor) as pool:
        async with pool.acquire() as connection:
            assert neon_async.connection_tls_report(connection) == pool.tls_report()
        with pytest.raises(neon_async.ConfigurationError, match="not an open connection of neon-async"):
            neon_async.connection_tls_report(connection)


async def test_a_foreign_connection_has_no_report(postgres: LocalPostgres) -> None:
    foreign = await asyncpg.connect(
        host="localhost",
        port=postgres.port,
        user="neon",
        password=password_of(postgres),
        database="neondb",
        ssl=neon_async.create_ssl_context(trust_anchor=postgres.trust_anchor),
    )
    try:
        with pytest.raises(neon_async.ConfigurationError, match="not an open connection of neon-async"):
            neon_async.connection_tls_report(foreign)
    finally:
        await foreign.close()


@pytest.mark.parametrize("thing", [None, object(), "connection", 7, [], {}], ids=lambda thing: type(thing).__name__)
async def test_what_is_no_connection_has_no_report(thing: Any) -> None:
    with pytest.raises(neon_async.ConfigurationError):
        neon_async.connection_tls_report(thing)


async def test_reports_are_forgotten_with_their_connections(postgres: LocalPostgres) -> None:
    before = len(_connect._known)
    for _ in range(3):
        async with opened(postgres):
            pass
    gc.collect()
    await until(lambda: len(_connect._known) <= before)


async def test_a_session_cannot_weaken_the_next_one_through_its_context(postgres: LocalPostgres) -> None:
    connector = _connect.prepare(postgres.dsn, trust_anchor=postgres.trust_anchor)
    first = await connector.connect()
    context = first._transport.get_extra_info("ssl_object").context  # type: ignore[attr-defined]
    context.check_hostname = False
    context.verify_mode = 0
    second = await connector.connect()
    try:
        other = second._transport.get_extra_info("ssl_object").context  # type: ignore[attr-defined]
        assert other is not context
        assert (other.check_hostname, other.verify_mode) == (True, 2)
    finally:
        await first.close()
        await second.close()


async def test_a_connector_shows_where_it_leads_and_no_secret() -> None:
    connector = _connect.prepare(f"postgresql://alex:{SECRET}@{NAME}/neondb", trust_anchor=ROOT.pem)
    assert repr(connector) == "<Connector ep-cool-darkness-123456>"
    assert SECRET not in repr(connector.parameters) + connector.parameters.redacted_dsn
    assert connector.tls_report is None


async def test_a_refusal_comes_from_the_call_and_opens_no_socket() -> None:
    before = open_sockets()
    with pytest.raises(neon_async.InsecureConfigurationError) as caught:
        _ = neon_async.connect(f"postgresql://alex:{SECRET}@{NAME}/neondb?sslmode=require")
    assert open_sockets() == before
    assert_secret_free(caught.value, SECRET)


# Other event loops


TRIO: list[Any] = [
    pytest.param(lambda pool, dsn: pool, id="await pool"),
    pytest.param(lambda pool, dsn: pool.__aenter__(), id="async with pool"),
    pytest.param(lambda pool, dsn: neon_async.connect(dsn, trust_anchor=ROOT.pem), id="connect"),
]


@pytest.mark.parametrize("use", TRIO)
@pytest.mark.parametrize("anyio_backend", [pytest.param("trio", id="trio")])
async def test_trio_gets_a_clear_error(use: Callable[[Any, str], Awaitable[Any]], anyio_backend: str) -> None:
    dsn = f"postgresql://alex:{SECRET}@{NAME}/neondb"
    pool = neon_async.create_pool(dsn, trust_anchor=ROOT.pem)
    with pytest.raises(neon_async.UnsupportedEventLoopError, match="runs on asyncio and uvloop") as caught:
        await use(pool, dsn)
    assert_secret_free(caught.value, SECRET)
    assert trio.current_time() > 0  # it was trio indeed


def test_no_event_loop_at_all_gets_the_same_error() -> None:
    coroutine = neon_async.connect(f"postgresql://alex:{SECRET}@{NAME}/neondb", trust_anchor=ROOT.pem)
    with pytest.raises(neon_async.UnsupportedEventLoopError):
        coroutine.send(None)


async def test_the_socket_of_a_session_is_a_stream(postgres: LocalPostgres) -> None:
    async with opened(postgres) as connection:
        sock = connection._transport.get_extra_info("socket")
        assert sock.family in (socket.AF_INET, socket.AF_INET6)
        assert sock.type == socket.SOCK_STREAM


class Alike(asyncpg.Connection):
    """A caller's class whose instances all compare equal, and cannot be hashed."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


async def test_each_connection_has_its_own_report_however_its_class_compares(postgres: LocalPostgres) -> None:
    async with (
        opened(postgres, connection_class=Alike, sslnegotiation="direct") as one,
        opened(postgres, connection_class=Alike, sslnegotiation="postgres") as other,
    ):
        assert neon_async.connection_tls_report(one).negotiation == "direct"
        assert neon_async.connection_tls_report(other).negotiation == "postgres"
    remembered = id(one)
    del one, other
    gc.collect()
    assert remembered not in _connect._known


async def test_a_connect_that_fails_leaves_nothing_for_the_garbage_collector(postgres: LocalPostgres) -> None:
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(neon_async.InvalidPasswordError):
            await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password="wrong")
        await asyncio.sleep(0)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, _dial.Door)]
    finally:
        gc.enable()
