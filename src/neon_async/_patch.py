"""Replace `asyncpg.connect` and `asyncpg.create_pool`, for packages that connect by themselves.

It must not know how a connection is made: `connect()` and `create_pool()` are given what the packages give to asyncpg.
"""

# No `from __future__ import annotations`: see `_publish()` of the facade.

import functools
import gc
import inspect
import types
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Self, Unpack, cast

import asyncpg
import asyncpg.connection
import asyncpg.pool

from ._config.arguments import AnchorSource
from ._config.connection import check_keywords
from ._config.keywords import canonical_name
from ._driver.connect import connect
from ._driver.holder import PoolBase
from ._driver.loop import LoopAdapter
from ._errors import ConfigurationError, forget_arguments
from ._pool.options import PoolKeywords, PoolOptions
from ._pool.pool import create_pool

# Every place where asyncpg itself has the functions.
_PLACES: tuple[tuple[types.ModuleType, str], ...] = (
    (asyncpg, "connect"),
    (asyncpg.connection, "connect"),
    (asyncpg, "create_pool"),
    (asyncpg.pool, "create_pool"),
)


@forget_arguments
def patch_asyncpg(*, trust_anchor: AnchorSource | None = None, **options: Unpack[PoolKeywords]) -> "AsyncpgPatch":
    """Have `asyncpg.connect()` and `asyncpg.create_pool()` make connections and pools of neon-async, in this process.

    For packages that call asyncpg themselves and cannot be given a pool. Call it before such a package is imported, and
    undo it with `undo()` or use the result as a context manager. What a package got meanwhile stays verified.

    Args:
        trust_anchor: The root certificate to trust instead of ISRG Root X1, as for `create_pool()`.
        **options: Keywords of `create_pool()`. Each wins over what a package passes, so that `sslmode="verify-full"`
            accepts the string of the Neon console and whatever a package passes as `ssl`. `connect()` uses those that
            concern connections.

    Raises:
        ConfigurationError: An option is refused; asyncpg is patched already; a module, a class or a function has bound
            one of asyncpg's functions before; or a pool of asyncpg exists. Then nothing is changed. While asyncpg is
            patched, making an `asyncpg.Pool` without `create_pool()` raises it, too.
    """
    given: dict[str, Any] = {"trust_anchor": trust_anchor} if trust_anchor is not None else {}
    given |= options
    _, keywords = PoolOptions.split(given)
    check_keywords(keywords)
    return AsyncpgPatch(given)


class AsyncpgPatch:
    """asyncpg while `patch_asyncpg()` is in effect. Leaving it as a context manager undoes it."""

    __slots__ = ("_genuine", "_installed", "_pool_init")

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._genuine = [getattr(module, name) for module, name in _PLACES]
        self._pool_init = asyncpg.pool.Pool.__init__
        _require_unpatched(self._genuine)
        _require_unbound(self._genuine)
        makers = {"connect": _connect_with, "create_pool": _create_pool_with}
        made = {
            genuine: makers[name](genuine, options) for genuine, (_, name) in zip(self._genuine, _PLACES, strict=True)
        }
        self._installed = [made[genuine] for genuine in self._genuine]
        refusing = _refusing(self._pool_init)
        _INSTALLED.update(self._installed)
        for (module, name), function in zip(_PLACES, self._installed, strict=True):
            setattr(module, name, function)
        asyncpg.pool.Pool.__init__ = refusing  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"<AsyncpgPatch: {'in effect' if self._installed else 'undone'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Give asyncpg its own functions back. A second call changes nothing."""
        for (module, name), ours, genuine in zip(_PLACES, self._installed, self._genuine, strict=False):
            if getattr(module, name) is ours:  # else a later patch has replaced it, and calls ours
                setattr(module, name, genuine)
        if self._installed:
            asyncpg.pool.Pool.__init__ = self._pool_init  # type: ignore[method-assign]
        self._installed = []


# ---------------------------------------------------------------------------------------------------------------------
# What takes the place of asyncpg's functions


def _connect_with(genuine: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    pool_only = {name for name in PoolKeywords.__annotations__ if name in PoolOptions.__annotations__}
    pool_only -= {"connection_class", "record_class"}
    own = {name: value for name, value in options.items() if name not in pool_only}

    @forget_arguments
    def begin(dsn: str | None, keywords: dict[str, Any]) -> Awaitable[Any]:
        if isinstance(keywords.get("loop"), LoopAdapter):  # our own connections are asyncpg's below
            return cast(Awaitable[Any], genuine(dsn, **keywords))
        return connect(dsn, **_merged(keywords, own))

    @functools.wraps(genuine)
    async def connect_verified(dsn: str | None = None, **keywords: Any) -> Any:
        try:
            opening = begin(dsn, keywords)
        finally:
            del dsn, keywords  # tracebacks keep the locals of this frame
        return await opening

    return connect_verified


def _create_pool_with(genuine: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    @functools.wraps(genuine)
    @forget_arguments
    def create_verified_pool(dsn: str | None = None, **keywords: Any) -> Any:
        return create_pool(dsn, **_merged(keywords, options))

    return create_verified_pool


def _merged(keywords: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a package, of which those that `options` has by any name are replaced."""
    ours = {canonical_name(name) for name in options}
    return {name: value for name, value in keywords.items() if canonical_name(name) not in ours} | dict(options)


def _refusing(genuine: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(genuine)
    def __init__(self: Any, *args: Any, **keywords: Any) -> None:  # noqa: N807
        if not isinstance(self, PoolBase):
            raise ConfigurationError(
                f"{_caller()} makes an asyncpg.Pool itself, whose connections would not be verified. Have it call "
                "asyncpg.create_pool(), which is neon-async's while patch_asyncpg() is in effect."
            )
        genuine(self, *args, **keywords)

    return __init__


def _caller() -> str:
    """Return the name of the module that makes the pool, past subclasses of asyncpg's pool."""
    frame = inspect.currentframe()
    while frame is not None and (frame.f_globals.get("__name__") == __name__ or frame.f_code.co_name == "__init__"):
        frame = frame.f_back
    return "A package" if frame is None else str(frame.f_globals.get("__name__"))


# ---------------------------------------------------------------------------------------------------------------------
# What must not have happened before


def _require_unpatched(functions: Iterable[Callable[..., Any]]) -> None:
    if any(function in _INSTALLED for function in functions):
        raise ConfigurationError("asyncpg is patched already. Call undo() of the first patch_asyncpg() before.")


def _require_unbound(functions: Iterable[Callable[..., Any]]) -> None:
    """Refuse where something outside asyncpg holds one of the functions: it would go on to connect unverified.

    Modules, classes, functions (defaults and closures), partial objects and instances are found. What only a list or a
    dictionary holds is not.
    """
    known = [each for function in set(functions) for each in _unwrapped(function)]
    for function in known:
        for referrer in gc.get_referrers(function):
            owner = _owner_of(referrer, known)
            if owner is not None:
                name = getattr(function, "__name__", "connect")
                raise ConfigurationError(
                    f"{owner} has bound asyncpg's {name}() before, and would go on to connect without verification. "
                    "Call patch_asyncpg() before that is imported or made."
                )


def _unwrapped(function: Any) -> Iterator[Any]:
    """Yield a function and, where a tracer has wrapped it, what is below."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _owner_of(referrer: object, known: list[Any]) -> str | None:
    """Return in words what holds a function by way of `referrer`, or None where that is asyncpg's own or unknown."""
    match referrer:
        case dict():
            return _owner_of_dict(referrer)
        case tuple() | types.CellType():  # defaults, and the variables of a closure
            return _owner_of_tuple(referrer, known)
        case PoolBase():
            return None
        case asyncpg.Pool():
            return None if referrer.is_closing() else "A pool of asyncpg that is not closed"
        case functools.partial():
            return f"A partial object of {getattr(referrer.func, '__name__', 'a function')}()"
    return None if any(referrer is one for one in known) else _named(referrer)


def _owner_of_tuple(referrer: object, known: list[Any]) -> str | None:
    tuples = [each for each in gc.get_referrers(referrer) if isinstance(each, tuple)]  # of the cells of a closure
    for each in (referrer, *tuples):
        for holder in gc.get_referrers(each):
            if isinstance(holder, types.FunctionType) and all(holder is not one for one in known):
                return _named(holder)
    return None


def _owner_of_dict(names: dict[Any, Any]) -> str | None:
    holders = gc.get_referrers(names)
    for holder in holders:
        if isinstance(holder, types.ModuleType) and vars(holder) is names:
            return _named(holder)
    for holder in holders:
        keywords = holder.__kwdefaults__ if isinstance(holder, types.FunctionType) else None
        if isinstance(holder, type) or keywords is names or getattr(holder, "__dict__", None) is names:
            return _named(holder)
    return None


def _named(thing: Any) -> str | None:
    """Return in words what a module, class, function or object is, or None for asyncpg's, ours and Python's."""
    if isinstance(thing, types.ModuleType):
        return None if _is_asyncpgs(thing.__name__) else f"The module {thing.__name__}"
    if isinstance(thing, type | types.FunctionType):
        kind = "class" if isinstance(thing, type) else "function"
        return None if _is_asyncpgs(thing.__module__) else f"The {kind} {thing.__module__}.{thing.__qualname__}"
    cls = type(thing)
    if _is_asyncpgs(cls.__module__) or cls.__module__ == "builtins":
        return None
    return f"An object of {cls.__module__}.{cls.__qualname__}"


def _is_asyncpgs(module: object) -> bool:
    return str(module).partition(".")[0] in ("asyncpg", __package__)


# The functions of every patch that is or was in effect: packages may still have them.
_INSTALLED: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()
