"""Passwords: functions that return them, wrong ones, unusual ones at a real server, and rotation."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support.handshakes import ROOT, serve
from support.logins import PASSWORDS, verifier
from support.probes import assert_secret_free, connected, password_of, until

import neon_async
from neon_async import InvalidPasswordError, NeonAsyncError
from neon_async._driver.connector import prepare
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Impostor, authentication_request, login

pytestmark = pytest.mark.anyio

CONTEXT = serve()
SECRET = "s3cret-of-alex"
OFFER = authentication_request(10, b"SCRAM-SHA-256\0\0")


def returning(answer: object, *, asynchronous: bool) -> tuple[Callable[[], Any], list[int]]:
    """Return a password function that returns `answer`, and the list of its calls."""
    calls: list[int] = []

    def plain() -> object:
        calls.append(1)
        return answer

    async def coroutine() -> object:
        await asyncio.sleep(0)
        return plain()

    return (coroutine if asynchronous else plain), calls


@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "async function"])
async def test_a_password_function_is_called_once_for_every_dial(postgres: LocalPostgres, asynchronous: bool) -> None:
    password, calls = returning(password_of(postgres), asynchronous=asynchronous)
    connector = prepare(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert not calls
    for count in (1, 2, 3):
        await (await connector.connect()).close()
        assert len(calls) == count


@pytest.mark.parametrize("asynchronous", [None, False, True], ids=["text", "function", "async function"])
@pytest.mark.parametrize("padding", ["{}\n", " {}", "{}\u2028"], ids=["line break", "space", "line separator"])
async def test_a_refused_password_with_white_space_around_it_is_refused_with_that_hint(
    postgres: LocalPostgres, padding: str, asynchronous: bool | None
) -> None:
    password: Any = padding.format(password_of(postgres))
    if asynchronous is not None:
        password, _ = returning(password, asynchronous=asynchronous)
    hint = "begins or ends with white space"
    with pytest.raises(InvalidPasswordError, match=hint) as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert_secret_free(caught.value, password_of(postgres))
    with pytest.raises(InvalidPasswordError) as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password="another one")
    assert hint not in str(caught.value)


async def test_a_password_function_may_return_any_awaitable(postgres: LocalPostgres) -> None:
    def password() -> Awaitable[str]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.set_result(password_of(postgres))
        return future

    async with connected(postgres, password=password) as connection:
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
async def test_a_password_function_that_returns_no_password_is_refused(
    postgres: LocalPostgres, answer: object, kind: str, asynchronous: bool
) -> None:
    password, _ = returning(answer, asynchronous=asynchronous)
    with pytest.raises(neon_async.ConfigurationError, match=f"The password function returned {kind}") as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password=password)
    assert_secret_free(caught.value, SECRET)


class VaultError(Exception):
    pass


@pytest.mark.parametrize(
    "kind", [VaultError, TimeoutError, ConnectionResetError, OSError, KeyError], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "async function"])
async def test_what_a_password_function_raises_reaches_the_caller_unchanged(
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
async def test_a_wrong_password_is_reported_without_showing_it(
    postgres: LocalPostgres, asynchronous: bool | None
) -> None:
    password: Any = SECRET if asynchronous is None else returning(SECRET, asynchronous=asynchronous)[0]
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
        pytest.param({"hostaddr": "127.0.0.9"}, id="no server"),
    ],
)
async def test_no_failure_of_a_dial_shows_the_password(postgres: LocalPostgres, keywords: dict[str, Any]) -> None:
    dsn = postgres.dsn.partition("?")[0]
    arguments = {"trust_anchor": postgres.trust_anchor, "hostaddr": "127.0.0.1", **keywords}
    with pytest.raises(Exception) as caught:  # noqa: PT011  other tests check the class
        await neon_async.connect(dsn, **arguments)
    assert_secret_free(caught.value, password_of(postgres))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(authentication_request(3), id="cleartext"),
        pytest.param(OFFER + authentication_request(12, b"v=x"), id="out of order"),
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


# ---------------------------------------------------------------------------------------------------------------------
# At a real server


@pytest.fixture(scope="module")
def admin(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection through libpq."""
    with psycopg.connect(libpq_dsn(postgres, tmp_path_factory), autocommit=True) as connection:
        connection.execute("CREATE ROLE singer LOGIN")
        yield connection
        connection.execute("DROP ROLE singer")


def libpq_dsn(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("anchor") / "root.pem"
    path.write_bytes(postgres.trust_anchor)
    return f"{postgres.dsn}&sslmode=verify-full&sslrootcert={path}"


async def log_in_as_singer(postgres: LocalPostgres, password: str | None) -> None:
    keywords: dict[str, Any] = {} if password is None else {"password": password}
    dsn = postgres.dsn.partition("//")[0] + "//" + postgres.dsn.rpartition("@")[2]
    connection = await neon_async.connect(dsn, trust_anchor=postgres.trust_anchor, user="singer", **keywords)
    assert await connection.fetchval("SELECT current_user") == "singer"
    await connection.close()


@pytest.mark.parametrize(("password", "expected"), PASSWORDS)
async def test_a_password_that_works_with_libpq_works_with_us(
    postgres: LocalPostgres, admin: psycopg.Connection[Any], password: str, expected: bytes
) -> None:
    admin.execute(sql.SQL("ALTER ROLE singer PASSWORD {}").format(password))
    with psycopg.connect(admin.info.dsn, user="singer", password=password):
        pass
    await log_in_as_singer(postgres, password)


async def test_a_password_from_the_environment_that_is_not_utf_8_works(
    postgres: LocalPostgres, admin: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.execute(sql.SQL("ALTER ROLE singer PASSWORD {}").format(verifier(b"caf\xe9")))
    monkeypatch.setenv("PGPASSWORD", os.fsdecode(b"caf\xe9"))
    await log_in_as_singer(postgres, None)


@pytest.mark.parametrize("source", ["text", "function"])
async def test_a_password_with_a_lone_surrogate_is_refused(postgres: LocalPostgres, source: str) -> None:
    password: Any = "hunter2\ud800"
    with pytest.raises(NeonAsyncError) as caught:
        await neon_async.connect(
            postgres.dsn,
            trust_anchor=postgres.trust_anchor,
            password=password if source == "text" else lambda: password,
        )
    assert_secret_free(caught.value, "hunter2")


async def test_a_rotated_password_needs_no_restart_and_the_keys_of_a_wrong_one_are_evicted(
    postgres: LocalPostgres, admin: psycopg.Connection[Any]
) -> None:
    def set_password(password: str) -> None:
        admin.execute(sql.SQL("ALTER ROLE singer PASSWORD {}").format(verifier(password.encode())))

    current = "first"

    async def password() -> str:
        return current

    dsn = postgres.dsn.partition("//")[0] + "//" + postgres.dsn.rpartition("@")[2]
    set_password("first")
    async with neon_async.create_pool(
        dsn, trust_anchor=postgres.trust_anchor, user="singer", password=password, max_size=1
    ) as pool:
        logins = pool._connector._logins

        async def log_in_again() -> None:
            await until(lambda: not pool._supply.pace.pause(time.monotonic()))  # the breaker after a wrong password
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT current_user") == "singer"
            await pool.expire_connections()

        await log_in_again()
        await log_in_again()
        assert repr(logins.keys) == "<KeyCache of 1>"
        set_password("second")
        with pytest.raises(InvalidPasswordError) as caught:
            await log_in_again()
        assert_secret_free(caught.value, "first", "second")
        assert repr(logins.keys) == "<KeyCache of 0>"
        current = "wrong"
        with pytest.raises(InvalidPasswordError):
            await log_in_again()
        assert repr(logins.keys) == "<KeyCache of 0>"
        current = "second"
        await log_in_again()
        assert repr(logins.keys) == "<KeyCache of 1>"
