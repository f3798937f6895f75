from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import asyncpg

from .._config.connection import ConnectKeywords
from .._errors import ConfigurationError

_MAX_COUNT = 1_000_000_000


class PoolKeywords(ConnectKeywords, total=False):
    min_size: int
    max_size: int
    init_size: int | None
    acquire_timeout: float
    release_timeout: float
    max_waiting: int | None
    max_queries: int
    max_lifetime: float
    max_inactive_connection_lifetime: float
    check_after_idle: float
    leak_after: float | None
    setup: Callable[[Any], Awaitable[None]] | None
    init: Callable[[Any], Awaitable[None]] | None
    reset: Callable[[Any], Awaitable[None]] | None
    connection_class: type[Any]
    record_class: type[Any]


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    min_size: int = 0
    max_size: int = 10
    init_size: int | None = None
    acquire_timeout: float = 30.0
    release_timeout: float = 5.0
    max_waiting: int | None = None
    max_queries: int = 50_000
    max_lifetime: float = 3600.0
    max_inactive_connection_lifetime: float = 240.0
    check_after_idle: float = 30.0
    leak_after: float | None = None
    setup: Callable[[Any], Awaitable[None]] | None = None
    init: Callable[[Any], Awaitable[None]] | None = None
    reset: Callable[[Any], Awaitable[None]] | None = None
    connection_class: type[Any] = asyncpg.Connection
    record_class: type[Any] = asyncpg.Record

    @property
    def opening_size(self):
        return self.min_size if self.init_size is None else self.init_size

    @classmethod
    def split(cls, keywords):
        kw = dict(keywords)
        mine = {n: kw.pop(n) for n in list(kw) if n in cls.__dataclass_fields__}
        return cls(**mine), kw

    def __post_init__(self):
        init_size = self.opening_size
        for name, count, lowest, highest in (
            ("max_size", self.max_size, 1, _MAX_COUNT),
            ("min_size", self.min_size, 0, self.max_size),
            ("init_size", init_size, self.min_size, self.max_size),
            ("max_queries", self.max_queries, 1, _MAX_COUNT),
            ("max_waiting", 0 if self.max_waiting is None else self.max_waiting, 0, _MAX_COUNT),
        ):
            _check_count(name, count, lowest, highest)
        for name, seconds, meaning in (
            ("acquire_timeout", self.acquire_timeout, None),
            ("release_timeout", self.release_timeout, None),
            ("leak_after", 1.0 if self.leak_after is None else self.leak_after, None),
            ("max_lifetime", self.max_lifetime, "for never"),
            ("max_inactive_connection_lifetime", self.max_inactive_connection_lifetime, "for never"),
            ("check_after_idle", self.check_after_idle, "for always"),
        ):
            _check_seconds(name, seconds, zero=meaning)
        for name, cls, base in (
            ("connection_class", self.connection_class, asyncpg.Connection),
            ("record_class", self.record_class, asyncpg.Record),
        ):
            if not (isinstance(cls, type) and issubclass(cls, base)):
                raise ConfigurationError(f"{name} must be a subclass of asyncpg.{base.__name__}.")
        for name, callback in (("setup", self.setup), ("init", self.init), ("reset", self.reset)):
            if callback is not None and not callable(callback):
                raise ConfigurationError(f"{name} must be an async function that takes a connection.")


def signature_of(function):
    import inspect

    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    options = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inspect.signature(PoolOptions).parameters.values()
    ]
    return signature.replace(parameters=[*own, *options, *rest])


def check_timeout(name, value):
    _check_seconds(name, value, zero="for at once")


def _check_count(name: str, value: object, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        of = " (max_size)" if name != "max_size" and highest != _MAX_COUNT else ""
        raise ConfigurationError(f"{name} must be a whole number from {lowest} to {highest}{of}, not {_shown(value)}.")


def _check_seconds(name: str, value: object, *, zero: str | None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= cast(float, value) <= _MAX_COUNT or (value == 0 and zero is None):
        least = "above 0" if zero is None else f"from 0, {zero},"
        raise ConfigurationError(f"{name} must be seconds {least} to {_MAX_COUNT}, not {_shown(value)}.")


def _shown(value: object) -> str:
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= _MAX_COUNT):
        return repr(value)
    return f"a value of type {type(value).__name__}"
