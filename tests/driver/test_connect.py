"""`connect()`: a coroutine function that refuses in the call, and judges the same parameters once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import asyncpg
import pytest
from support.certificates import root
from support.probes import HANG, connected

import neon_async
from neon_async._driver import connectors
from neon_async._driver.connectors import connector_for
from neon_async._driver.holder import Proxy
from neon_async.testing import LocalPostgres

DSN = "postgresql://alex:s3cret@db.example.com/neondb"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors, "_known", type(connectors._known)())


# ---------------------------------------------------------------------------------------------------------------------
# A coroutine function


async def call(function: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
    """Call a function as retrying decorators do: await its result if it is a coroutine function."""
    result: Any = function(*args, **options)
    return await result if inspect.iscoroutinefunction(function) else result


@pytest.mark.anyio
async def test_decorators_and_mocks_take_it_for_a_coroutine_function(postgres: LocalPostgres) -> None:
    assert inspect.iscoroutinefunction(neon_async.connect)
    bound = functools.partial(neon_async.connect, postgres.dsn, trust_anchor=postgres.trust_anchor)
    assert inspect.iscoroutinefunction(bound)
    connection = await call(bound)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
    with mock.patch("neon_async.connect") as mocked:
        assert isinstance(mocked, mock.AsyncMock)
        mocked.return_value = 7
        assert await mocked(DSN) == 7
    assert await mock.create_autospec(neon_async.connect, return_value=7)(DSN) == 7


@pytest.mark.parametrize(
    "name", [name for name, method in vars(asyncpg.Connection).items() if inspect.iscoroutinefunction(method)]
)
def test_so_are_the_coroutines_of_what_a_pool_lends(name: str) -> None:
    if not name.startswith("_"):
        assert inspect.iscoroutinefunction(getattr(Proxy, name))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        pytest.param({"sslmode": "require"}, neon_async.InsecureConfigurationError, id="insecure"),
        pytest.param({"port": 0}, neon_async.ConfigurationError, id="out of range"),
        pytest.param({"sslcrl": "/does/not/exist.pem"}, neon_async.ConfigurationError, id="a file"),
        pytest.param({"connection_class": int}, neon_async.ConfigurationError, id="a class"),
    ],
)
async def test_a_bad_parameter_is_refused_by_each_call(parameters: Any, error: type[Exception]) -> None:
    for _ in range(2):
        with pytest.raises(error):
            assert neon_async.connect(DSN, **parameters) is None


# ---------------------------------------------------------------------------------------------------------------------
# Judged once


def password() -> str:
    return "s3cret"


@pytest.fixture
def root_file(tmp_path: Path) -> Path:
    path = tmp_path / "root.pem"
    path.write_bytes(root().pem)
    return path


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({}, id="a DSN"),
        pytest.param({"user": "sam", "port": 5433, "keepalives": True, "connect_timeout": 3.5}, id="constants"),
        pytest.param({"password": password}, id="a function"),
        pytest.param({"server_settings": {"jit": "off"}}, id="settings"),
        pytest.param({"trust_anchor": neon_async.LETS_ENCRYPT_ROOTS}, id="known roots"),
    ],
)
def test_the_same_parameters_are_judged_once(parameters: Any) -> None:
    assert connector_for(DSN, **parameters) is connector_for(DSN, **parameters)


def test_a_file_is_read_once(root_file: Path) -> None:
    for anchor in (root_file, str(root_file), root_file.read_bytes()):
        assert connector_for(DSN, trust_anchor=anchor) is connector_for(DSN, trust_anchor=anchor)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"user": "sam"}, {"user": "kim"}, id="another value"),
        pytest.param({"keepalives": True}, {"keepalives": 1}, id="an equal value of another type"),
        pytest.param({"user": "sam"}, {"dbname": "sam"}, id="another name"),
        pytest.param({}, {"user": "sam"}, id="one more"),
        pytest.param({"server_settings": {"jit": "off"}}, {"server_settings": {"jit": "on"}}, id="another setting"),
        pytest.param({"password": password}, {"password": lambda: "s3cret"}, id="another function"),
    ],
)
def test_different_parameters_are_judged_apart(one: Any, other: Any) -> None:
    assert connector_for(DSN, **one) is not connector_for(DSN, **other)
    assert connector_for(DSN, **one) is connector_for(DSN, **one)


def test_an_equal_value_that_is_refused_is_refused_although_the_other_is_known() -> None:
    connector_for(DSN, statement_cache_size=1)
    for value in (True, 1.0):
        with pytest.raises(neon_async.ConfigurationError):
            connector_for(DSN, statement_cache_size=value)


def test_what_can_change_is_judged_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"jit": "off"}
    before = connector_for(DSN, server_settings=settings)
    settings["jit"] = "on"
    assert connector_for(DSN, server_settings=settings) is not before
    before = connector_for(DSN)
    monkeypatch.setenv("PGAPPNAME", "worker")
    assert connector_for(DSN).parameters.startup_settings != before.parameters.startup_settings
    monkeypatch.setenv("PGSSLMODE", "require")
    with pytest.raises(neon_async.InsecureConfigurationError):
        assert neon_async.connect(DSN) is None
    monkeypatch.delenv("PGSSLMODE")
    monkeypatch.delenv("PGAPPNAME")
    assert connector_for(DSN) is before


class Changing(os.PathLike[str]):
    """A path that is another one whenever it is asked."""

    def __init__(self, *paths: Path) -> None:
        self._paths = [*paths]

    def __fspath__(self) -> str:
        return str(self._paths.pop(0) if len(self._paths) > 1 else self._paths[0])


class Text(str):
    """Text that compares equal to any other."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


@pytest.mark.parametrize("value", [Text("sam"), bytearray(b"x")])
def test_a_value_of_an_unknown_type_is_never_taken_for_the_same(value: Any) -> None:
    judged = []
    for _ in range(2):
        try:
            judged.append(connector_for(DSN, user=value))
        except neon_async.ConfigurationError as error:
            judged.append(error)  # type: ignore[arg-type]
    assert judged[0] is not judged[1]


def test_a_path_of_a_class_of_its_own_is_read_at_each_call(root_file: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other.pem").write_bytes(root().pem)
    path = Changing(root_file, root_file, other)
    assert connector_for(DSN, trust_anchor=path) is not connector_for(DSN, trust_anchor=path)


def test_only_the_latest_sets_of_parameters_are_remembered() -> None:
    for number in range(50):
        connector_for(DSN, application_name=str(number))
    assert len(connectors._known) == 32
    assert connector_for(DSN, application_name="49") is connector_for(DSN, application_name="49")


@pytest.mark.anyio
async def test_a_trust_anchor_that_was_replaced_is_the_one_that_counts(postgres: LocalPostgres, tmp_path: Path) -> None:
    async def fetch() -> int:
        async with asyncio.timeout(HANG):
            connection = await neon_async.connect(postgres.dsn, trust_anchor=path)
            number: int = await connection.fetchval("SELECT 1")
            await connection.close()
            return number

    path = tmp_path / "root.pem"
    path.write_bytes(postgres.trust_anchor)
    assert [await fetch(), await fetch()] == [1, 1]
    path.write_bytes(root().pem)
    with pytest.raises(neon_async.CertificateError):
        await fetch()
    path.write_bytes(postgres.trust_anchor)
    assert await fetch() == 1
    path.unlink()
    with pytest.raises(neon_async.ConfigurationError, match="cannot be read"):
        assert neon_async.connect(postgres.dsn, trust_anchor=path) is None


def test_one_set_of_parameters_serves_one_event_loop_after_another(postgres: LocalPostgres) -> None:
    async def fetch() -> int:
        async with connected(postgres) as connection:
            number: int = await connection.fetchval("SELECT 1")
            return number

    assert [asyncio.run(fetch()) for _ in range(3)] == [1, 1, 1]
    assert len(connectors._known) == 1


@pytest.mark.anyio
async def test_a_function_is_asked_for_the_password_of_every_connection(postgres: LocalPostgres) -> None:
    asked: list[int] = []
    secret = postgres.dsn.split("//neon:")[1].split("@")[0]

    def give() -> str:
        asked.append(1)
        return secret

    for _ in range(3):
        connection = await neon_async.connect(
            postgres.dsn.replace(f":{secret}@", "@"), password=give, trust_anchor=postgres.trust_anchor
        )
        await connection.close()
    assert len(asked) == 3
