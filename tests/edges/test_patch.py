"""Packages that connect by themselves get verified connections, or an error that names what is in the way."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import asyncpg.connection
import asyncpg.pool
import pytest
from support.plain import asyncpg_arguments
from support.probes import HANG, assert_secret_free

import neon_async
from neon_async.testing import LocalPostgres

PLACES: list[tuple[Any, str]] = [
    (asyncpg, "connect"),
    (asyncpg.connection, "connect"),
    (asyncpg, "create_pool"),
    (asyncpg.pool, "create_pool"),
]
DSN = "postgresql://alex:s3cret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"


def functions() -> list[Any]:
    """Return what stands in every place of asyncpg now."""
    return [*(getattr(module, name) for module, name in PLACES), asyncpg.Pool.__init__]


@pytest.fixture(autouse=True)
def nothing_is_left_of_other_tests() -> None:
    gc.collect()


# ---------------------------------------------------------------------------------------------------------------------
# Calls of packages


def arguments_of(postgres: LocalPostgres) -> dict[str, Any]:
    """Return what a package takes from a URL that it has parsed itself."""
    url = urlsplit(postgres.dsn)
    return {
        "host": url.hostname,
        "port": url.port,
        "user": url.username,
        "password": url.password,
        "database": url.path[1:],
    }


@pytest.fixture
def options(postgres: LocalPostgres) -> dict[str, Any]:
    """What makes the local server reachable, which no package can be told."""
    return {"hostaddr": "127.0.0.1", "trust_anchor": postgres.trust_anchor}


@pytest.mark.anyio
@pytest.mark.parametrize(("module", "name"), PLACES, ids=lambda part: getattr(part, "__name__", part))
async def test_each_function_of_asyncpg_makes_verified_connections(
    module: Any, name: str, postgres: LocalPostgres, options: dict[str, Any]
) -> None:
    with neon_async.patch_asyncpg(**options):
        if name == "connect":
            connection = await getattr(module, name)(**arguments_of(postgres))
            assert neon_async.connection_tls_report(connection).version == "TLSv1.3"
            await connection.close(timeout=HANG)
        else:
            async with getattr(module, name)(**arguments_of(postgres)) as pool:
                assert isinstance(pool, neon_async.Pool)
                assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.anyio
async def test_our_own_connections_and_pools_work_meanwhile(postgres: LocalPostgres) -> None:
    with neon_async.patch_asyncpg():
        connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close(timeout=HANG)
        async with neon_async.create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor) as pool:
            assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize(
    ("given", "options"),
    [
        pytest.param({"ssl": "require"}, {"sslmode": "verify-full"}, id="another name of the same"),
        pytest.param({"ssl": False}, {"ssl": "verify-full"}, id="the same name"),
        pytest.param({"min_size": 5, "max_size": 4}, {"min_size": 0}, id="an option of the pool"),
        pytest.param({"timeout": -1}, {"connect_timeout": 5.0}, id="a bad value"),
        pytest.param({"database": "", "loop": None}, {"dbname": "neondb"}, id="and None counts as not given"),
    ],
)
def test_an_option_wins_over_what_a_package_passes(given: dict[str, Any], options: dict[str, Any]) -> None:
    with neon_async.patch_asyncpg(**options):
        pool: Any = asyncpg.create_pool(DSN.rpartition("/")[0] if "database" in given else DSN, **given)
    assert isinstance(pool, neon_async.Pool)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        pytest.param({"ssl": "require"}, "sslmode|ssl", id="weak"),
        pytest.param({"ssl": False}, "sslmode|ssl", id="plaintext"),
        pytest.param({"passfile": "secrets"}, "passfile", id="not supported"),
        pytest.param({"connect": asyncpg.connect}, "connect", id="a connect of its own"),
    ],
)
@pytest.mark.parametrize("name", ["connect", "create_pool"])
def test_what_a_package_passes_is_judged_as_ever(name: str, given: dict[str, Any], complaint: str) -> None:
    async def call() -> None:
        made = getattr(asyncpg, name)(DSN, **given)
        if name == "connect":
            await made

    with neon_async.patch_asyncpg(), pytest.raises(neon_async.ConfigurationError, match=complaint) as raised:
        asyncio.run(call())
    assert_secret_free(raised.value, "s3cret")


def test_the_functions_look_like_those_of_asyncpg() -> None:
    before = [inspect.signature(function) for function in functions()[:-1]]
    with neon_async.patch_asyncpg():
        assert [inspect.signature(function) for function in functions()[:-1]] == before
        assert inspect.iscoroutinefunction(asyncpg.connect)
        assert asyncpg.connect is asyncpg.connection.connect
        assert asyncpg.create_pool is asyncpg.pool.create_pool


# ---------------------------------------------------------------------------------------------------------------------
# In effect and undone


def test_the_end_of_the_block_undoes_it_also_after_an_error() -> None:
    before = functions()

    def fail() -> None:
        with neon_async.patch_asyncpg():
            assert all(new is not old for new, old in zip(functions(), before, strict=True))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert functions() == before


def test_a_call_alone_is_in_effect_until_it_is_undone() -> None:
    before = functions()
    patch = neon_async.patch_asyncpg()
    assert functions() != before
    patch.undo()
    patch.undo()
    assert functions() == before


def test_a_patch_that_came_later_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def theirs() -> None:
        pass

    monkeypatch.setattr(asyncpg, "connect", asyncpg.connect)  # restored at the end
    with neon_async.patch_asyncpg():
        monkeypatch.setattr(asyncpg, "connect", theirs)
    assert functions()[0] is theirs


def test_a_package_that_bound_them_meanwhile_keeps_verified_ones() -> None:
    with neon_async.patch_asyncpg():
        bound = asyncpg.create_pool
    assert isinstance(bound(DSN), neon_async.Pool)
    with neon_async.patch_asyncpg():  # and is not in the way of the next patch
        assert isinstance(bound(DSN), neon_async.Pool)


def test_a_second_patch_is_refused() -> None:
    with neon_async.patch_asyncpg(), pytest.raises(neon_async.ConfigurationError, match="patched already"):
        neon_async.patch_asyncpg()
    neon_async.patch_asyncpg().undo()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param({"sslmode": "require"}, "sslmode", id="weak"),
        pytest.param({"max_size": 0}, "max_size", id="out of range"),
        pytest.param({"slmode": "verify-full"}, "Did you mean sslmode", id="unknown"),
        pytest.param({"ssl": "verify-full", "sslmode": "verify-full"}, "given twice", id="twice"),
        pytest.param({"direct_tls": True}, "direct_tls", id="asyncpg's own TLS"),
    ],
)
def test_a_bad_option_is_refused_by_the_call_and_nothing_is_changed(options: Any, complaint: str) -> None:
    before = functions()
    with pytest.raises(neon_async.ConfigurationError, match=complaint):
        neon_async.patch_asyncpg(**options)
    assert functions() == before


# ---------------------------------------------------------------------------------------------------------------------
# What is in the way


def in_a_module(function: Any) -> Any:
    module = types.ModuleType("early_bird")
    sys.modules["early_bird"] = module
    module.open_it = function  # type: ignore[attr-defined]
    return module


def in_a_class(function: Any) -> Any:
    class Backend:
        open_it = staticmethod(function)
        also = function

    return Backend


def in_an_instance(function: Any) -> Any:
    class Backend:
        def __init__(self) -> None:
            self.open_it = function

    return Backend()


def in_the_variables_of_an_instance(function: Any) -> Any:
    backend = in_an_instance(function)
    return backend, vars(backend)


def in_a_module_under_another_name(function: Any) -> Any:
    module = in_a_module(function)
    sys.modules["late_bird"] = sys.modules.pop("early_bird")
    return module


def in_a_keyword_default(function: Any) -> Any:
    def open_it(*, how: Any = function) -> Any:
        return how()

    return open_it


def in_a_partial(function: Any) -> Any:
    return functools.partial(function, ssl="require")


def in_a_default(function: Any) -> Any:
    def open_it(how: Any = function) -> Any:
        return how()

    return open_it


def in_a_closure(function: Any) -> Any:
    def open_it() -> Any:
        return function()

    return open_it


@pytest.mark.parametrize("name", ["connect", "create_pool"])
@pytest.mark.parametrize(
    ("bind", "named"),
    [
        pytest.param(in_a_module, "module early_bird", id="module"),
        pytest.param(in_a_class, "Backend", id="class"),
        pytest.param(in_an_instance, "Backend", id="instance"),
        pytest.param(in_the_variables_of_an_instance, "Backend", id="variables of an instance"),
        pytest.param(in_a_module_under_another_name, "module early_bird", id="module under another name"),
        pytest.param(in_a_keyword_default, "open_it", id="keyword default"),
        pytest.param(in_a_partial, "partial", id="partial"),
        pytest.param(in_a_default, "open_it", id="default"),
        pytest.param(in_a_closure, "open_it", id="closure"),
    ],
)
def test_what_has_bound_a_function_before_is_named(bind: Callable[[Any], Any], named: str, name: str) -> None:
    before = functions()
    bound = bind(getattr(asyncpg, name))
    try:
        with pytest.raises(neon_async.ConfigurationError, match=rf"{named}.* has bound asyncpg's {name}\(\)"):
            neon_async.patch_asyncpg()
    finally:
        for module in ("early_bird", "late_bird"):
            sys.modules.pop(module, None)
    assert functions() == before
    del bound
    gc.collect()
    neon_async.patch_asyncpg().undo()


def test_what_a_tracer_has_wrapped_is_found_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = asyncpg.connect

    @functools.wraps(genuine)
    async def traced(*args: Any, **keywords: Any) -> Any:
        return await genuine(*args, **keywords)

    for module in (asyncpg, asyncpg.connection):
        monkeypatch.setattr(module, "connect", traced)
    neon_async.patch_asyncpg().undo()
    bound = in_a_partial(genuine)
    with pytest.raises(neon_async.ConfigurationError, match="partial"):
        neon_async.patch_asyncpg()
    del bound


@pytest.mark.anyio
async def test_a_pool_of_asyncpg_that_exists_is_in_the_way_until_it_is_closed(postgres: LocalPostgres) -> None:
    pool = await asyncpg.create_pool(**asyncpg_arguments(postgres), min_size=0)
    with pytest.raises(neon_async.ConfigurationError, match="A pool of asyncpg"):
        neon_async.patch_asyncpg()
    await pool.close()
    neon_async.patch_asyncpg().undo()


def test_a_pool_of_ours_is_not_in_the_way() -> None:
    pool = neon_async.create_pool(DSN)
    neon_async.patch_asyncpg().undo()
    assert not pool.is_closing()


class TheirPool(asyncpg.Pool):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(DSN, **keywords)


@pytest.mark.parametrize("cls", [asyncpg.Pool, asyncpg.pool.Pool, TheirPool])
def test_a_package_that_makes_a_pool_itself_is_named(cls: Any) -> None:
    keywords = dict.fromkeys(("min_size", "max_size", "max_queries", "max_inactive_connection_lifetime"), 1)
    with neon_async.patch_asyncpg(), pytest.raises(neon_async.ConfigurationError, match=f"{__name__} makes"):
        cls(**keywords)
