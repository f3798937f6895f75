"""The options of a pool: what they default to, what they accept, and that `create_pool()` takes the same ones."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.probes import assert_secret_free

from neon_async import ConfigurationError, connect, create_pool
from neon_async._config.arguments import ConnectKeywords
from neon_async._pool.options import PoolKeywords, PoolOptions, check_timeout

NAMES = [option.name for option in fields(PoolOptions)]
DEFAULTS = {option.name: option.default for option in fields(PoolOptions)}


async def callback(connection: object) -> None:
    """Do nothing with `connection`."""


class OwnConnection(asyncpg.Connection):
    """A connection class of the caller's."""


class OwnRecord(asyncpg.Record):
    """A record class of the caller's."""


def test_the_defaults_are_options() -> None:
    assert {name: getattr(PoolOptions(), name) for name in NAMES} == DEFAULTS


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_size": 1}, id="one connection"),
        pytest.param({"max_size": 1_000_000_000}, id="the largest size"),
        pytest.param({"min_size": 10}, id="min_size equal to max_size"),
        pytest.param({"min_size": 2, "init_size": 2}, id="init_size equal to min_size"),
        pytest.param({"init_size": 10}, id="init_size equal to max_size"),
        pytest.param({"init_size": None, "max_waiting": None, "leak_after": None}, id="None"),
        pytest.param({"max_waiting": 0}, id="no waiting callers"),
        pytest.param({"acquire_timeout": 1, "release_timeout": 0.001, "leak_after": 1e9}, id="seconds"),
        pytest.param(
            {"max_lifetime": 0, "max_inactive_connection_lifetime": 0.0, "check_after_idle": 0}, id="0 with a meaning"
        ),
        pytest.param({"setup": callback, "init": callback, "reset": callback}, id="callbacks"),
        pytest.param({"connection_class": OwnConnection, "record_class": OwnRecord}, id="classes"),
    ],
)
def test_an_option_is_kept_as_it_is_given(options: dict[str, Any]) -> None:
    read = PoolOptions(**options)
    assert {name: getattr(read, name) for name in options} == options


REFUSED = pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"max_size": 0}, "max_size must be a whole number from 1 to 1,000,000,000, not 0.", id="max_size"),
        pytest.param({"max_size": -1}, "max_size must be", id="max_size negative"),
        pytest.param({"max_size": 1.5}, "not 1.5.", id="max_size a fraction"),
        pytest.param({"max_size": "5"}, "not '5'.", id="max_size a string"),
        pytest.param({"max_size": True}, "not True.", id="max_size a bool"),
        pytest.param({"max_size": None}, "not None.", id="max_size None"),
        pytest.param({"max_size": 10**5000}, "not a value of type int.", id="max_size of 5,000 digits"),
        pytest.param(
            {"min_size": -1}, "min_size must be a whole number from 0 to 10 (max_size), not -1.", id="min_size negative"
        ),
        pytest.param(
            {"min_size": 11},
            "min_size must be a whole number from 0 to 10 (max_size), not 11.",
            id="min_size above max_size",
        ),
        pytest.param({"min_size": None}, "min_size must be", id="min_size None"),
        pytest.param(
            {"min_size": 2, "init_size": 1},
            "init_size must be a whole number from 2 to 10 (max_size), not 1.",
            id="init_size below min_size",
        ),
        pytest.param({"init_size": 11}, "init_size must be", id="init_size above max_size"),
        pytest.param({"max_waiting": -1}, "max_waiting must be a whole number from 0 to", id="max_waiting negative"),
        pytest.param({"max_waiting": 0.0}, "not 0.0.", id="max_waiting a fraction"),
        pytest.param({"max_queries": 0}, "max_queries must be a whole number from 1 to", id="max_queries 0"),
        pytest.param(
            {"acquire_timeout": 0},
            "acquire_timeout must be a number of seconds above 0 and at most 1,000,000,000, not 0.",
            id="acquire_timeout 0",
        ),
        pytest.param({"acquire_timeout": float("inf")}, "not inf.", id="acquire_timeout infinite"),
        pytest.param({"acquire_timeout": None}, "acquire_timeout must be", id="acquire_timeout None"),
        pytest.param({"acquire_timeout": True}, "not True.", id="acquire_timeout a bool"),
        pytest.param({"release_timeout": 0}, "release_timeout must be", id="release_timeout 0"),
        pytest.param({"leak_after": 0}, "leak_after must be a number of seconds above 0", id="leak_after 0"),
        pytest.param(
            {"max_lifetime": -1},
            "max_lifetime must be a number of seconds from 0 (never) to 1,000,000,000, not -1.",
            id="max_lifetime negative",
        ),
        pytest.param({"max_lifetime": None}, "max_lifetime must be", id="max_lifetime None"),
        pytest.param(
            {"check_after_idle": -1}, "check_after_idle must be a number of seconds from 0 (always)", id="check"
        ),
        pytest.param({"max_inactive_connection_lifetime": -1}, "seconds from 0 (never)", id="lifetime negative"),
        pytest.param({"max_inactive_connection_lifetime": float("nan")}, "not nan.", id="lifetime not a number"),
        pytest.param({"max_inactive_connection_lifetime": float("inf")}, "not inf.", id="lifetime infinite"),
        pytest.param({"max_inactive_connection_lifetime": "240"}, "not '240'.", id="lifetime a string"),
        pytest.param({"max_inactive_connection_lifetime": 10**400}, "not a value of type int.", id="400 digits"),
        pytest.param(
            {"connection_class": object},
            "connection_class must be a subclass of asyncpg.Connection, not the class object.",
            id="connection_class",
        ),
        pytest.param({"connection_class": "Connection"}, "not 'Connection'.", id="connection_class a string"),
        pytest.param({"record_class": dict}, "record_class must be a subclass of asyncpg.Record", id="record_class"),
        pytest.param({"record_class": None}, "not None.", id="record_class None"),
        pytest.param(
            {"init": "SELECT 1"}, "init must be an async function that takes a connection, not 'SELECT 1'.", id="init"
        ),
        pytest.param({"setup": 1}, "setup must be", id="setup"),
        pytest.param({"setup": "not a function"}, "not 'not a function'.", id="setup a string"),
        pytest.param({"reset": {}}, "reset must be", id="reset"),
        pytest.param({"reset": "not a function"}, "not 'not a function'.", id="reset a string"),
    ],
)


@REFUSED
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PoolOptions(**options)
    assert message in str(caught.value)
    assert str(caught.value).startswith(list(options)[-1])


def test_options_are_frozen_and_given_by_name() -> None:
    options: Any = PoolOptions()
    with pytest.raises(FrozenInstanceError):
        options.max_size = 1
    with pytest.raises(TypeError):
        PoolOptions(1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, 0, id="default"),
        pytest.param({"min_size": 3}, 3, id="min_size"),
        pytest.param({"min_size": 1, "init_size": 4}, 4, id="init_size"),
        pytest.param({"init_size": 0}, 0, id="0"),
    ],
)
def test_a_pool_opens_with_init_size_or_else_min_size(options: dict[str, Any], expected: int) -> None:
    assert PoolOptions(**options).opening_size == expected


@given(*(st.integers(-2, 8) for _ in range(3)))
def test_sizes_are_accepted_exactly_when_they_are_in_order(min_size: int, init_size: int, max_size: int) -> None:
    in_order = max_size >= 1 and 0 <= min_size <= init_size <= max_size
    try:
        PoolOptions(min_size=min_size, init_size=init_size, max_size=max_size)
    except ConfigurationError:
        assert not in_order
    else:
        assert in_order


# ---------------------------------------------------------------------------------------------------------------------
# The call


def test_create_pool_takes_exactly_these_options() -> None:
    assert {*PoolKeywords.__annotations__} == {*NAMES, *ConnectKeywords.__annotations__}
    assert not {*NAMES} & {*ConnectKeywords.__annotations__}


def test_every_option_that_is_given_to_a_connection_is_answered_with_where_it_belongs() -> None:
    for name in NAMES:
        if name not in {"connection_class", "record_class"}:  # which connect() takes, too
            keywords: dict[str, Any] = {name: 1}
            with pytest.raises(ConfigurationError, match=rf"{name!r} .* pass it to create_pool\(\)"):
                _ = connect("postgresql://alex:x@db.example.com/d", **keywords)
    signature = inspect.signature(create_pool).parameters
    explicit = {name: signature[name].default for name in NAMES if name in signature}
    assert explicit == {name: DEFAULTS[name] for name in explicit}


@pytest.mark.parametrize(
    ("parameter", "default"),
    [
        ("acquire_timeout", 30.0),
        ("release_timeout", 5.0),
        ("max_waiting", None),
        ("min_size", 0),
        ("max_lifetime", 3600.0),
        ("max_inactive_connection_lifetime", 240.0),
        ("check_after_idle", 30.0),
        ("leak_after", None),
    ],
)
def test_the_signature_of_create_pool_shows_the_defaults(parameter: str, default: float | None) -> None:
    assert inspect.signature(create_pool).parameters[parameter].default == default


def test_keywords_are_split_into_options_and_parameters_of_the_connections() -> None:
    options, others = PoolOptions.split({"max_size": 3, "host": "db.example.com", "max_sise": 4, "init_size": None})
    assert {name: getattr(options, name) for name in NAMES} == DEFAULTS | {"max_size": 3}
    assert others == {"host": "db.example.com", "max_sise": 4}


@pytest.mark.parametrize("seconds", [0, 0.5, 1_000_000_000])
def test_a_timeout_is_a_number_of_seconds(seconds: float) -> None:
    check_timeout("timeout", seconds)


@pytest.mark.parametrize("seconds", ["1", -1, float("nan"), float("inf"), True, None], ids=repr)
def test_a_timeout_that_is_not_a_number_of_seconds_is_refused(seconds: object) -> None:
    expected = r"^timeout must be a number of seconds from 0 \(at once\) to 1,000,000,000, not "
    with pytest.raises(ConfigurationError, match=expected):
        check_timeout("timeout", seconds)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented(name: str) -> None:
    documentation = inspect.getdoc(PoolOptions) or ""
    assert f"    {name}: " in documentation
    default = DEFAULTS[name]
    if isinstance(default, (int, float)) or default is None:
        entry = documentation.split(f"    {name}: ")[1].split("\n    ")[0:4]
        assert "Default" in " ".join(entry)


@REFUSED
def test_the_call_refuses_what_the_options_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{list(options)[-1]} must be") as caught:
        create_pool("postgresql://alex:s3cret@db.example.com/d", **options)
    assert message in str(caught.value)
    assert_secret_free(caught.value, "s3cret")
