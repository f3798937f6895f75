"""`create_pool()` and the `Pool` it returns: asyncpg's pool, whose every connection is ours.

This module decides who gets which connection. It knows no wire formats.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, Unpack, cast

import asyncpg

from ._connect import Connection, Connector, check_classes, prepare, require_asyncio
from ._errors import ConfigurationError, forget_arguments
from ._neon import short_name
from ._params import ConnectKeywords
from ._tls import TLSReport
from ._trust import AnchorSource

if TYPE_CHECKING:
    _AsyncpgPool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    _AsyncpgPool = asyncpg.Pool

# asyncpg 0.32 made min_size a floor that is kept, and init_size the number to begin with, which min_size was before.
_ASYNCPG_HAS_INIT_SIZE = "init_size" in inspect.signature(asyncpg.Pool.__init__).parameters


# Far above what anybody wants, and below what a timer of the event loop or a slot counter chokes on.
_MAX_COUNT = 1_000_000_000


class _RunningLoop:
    """The `loop` of a pool: whichever is running when it is used, so that a pool may be created before there is one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)


class Pool(_AsyncpgPool):
    """A pool of verified connections, made by `create_pool()`; everything that asyncpg's pool does, it does.

    Open it with `async with pool:` or `await pool`, and close it with `await pool.close()` where `async with` does not.
    """

    def __init__(self, connector: Connector, *, min_size: int, init_size: int, **options: Any) -> None:
        self._connector = connector
        self._sizes = min_size, init_size
        if _ASYNCPG_HAS_INIT_SIZE:
            options["init_size"] = init_size
        super().__init__(
            min_size=min_size if _ASYNCPG_HAS_INIT_SIZE else init_size,
            connect=cast(Any, self._make_connection),
            loop=cast(asyncio.AbstractEventLoop, _RunningLoop()),
            **options,
        )

    def __repr__(self) -> str:
        idle = self.get_idle_size()
        state = ", closed" if self.is_closing() else ""
        name = short_name(self._connector.parameters.host)
        return f"<Pool {name}: {self.get_size() - idle} in use, {idle} idle{state}>"

    def __await__(self) -> Generator[Any, None, Pool]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Pool:
        """Open the pool, with `init_size` connections, and return it. What fails here leaves no connection behind."""
        require_asyncio()
        try:
            await super().__aenter__()
        except asyncpg.InterfaceError:  # closed already, or being opened by another task, which goes on
            raise
        except BaseException:
            self.terminate()
            raise
        return self

    def get_min_size(self) -> int:
        """Return the number of connections that are kept while nobody needs them."""
        return self._sizes[0]

    def get_init_size(self) -> int:
        """Return the number of connections that the pool opens with."""
        return self._sizes[1]

    def tls_report(self) -> TLSReport | None:
        """Return what the latest TLS handshake of this pool came to, or None before the first."""
        return self._connector.tls_report

    def set_connect_args(self, dsn: str | None = None, **connect_kwargs: Any) -> NoReturn:
        """Refuse: what connections are made with is judged once, by `create_pool()`.

        Raises `ConfigurationError`. Make another pool for another server; a password that changes is a function.
        """
        raise ConfigurationError(
            "A pool's parameters are judged when it is created and do not change. Create another pool; for a password "
            "that changes, pass a function as password=."
        )

    async def _make_connection(
        self, *_: object, connection_class: type[Any], record_class: type[Any], **__: object
    ) -> asyncpg.Connection[Any]:
        connection = await self._connector.connect(connection_class=connection_class, record_class=record_class)
        if self.is_closing():  # asyncpg 0.31 does not look, and would keep it for ever
            connection.terminate()
            raise asyncpg.InterfaceError("pool is closing")
        return connection


@forget_arguments
def create_pool(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    min_size: int = 0,
    max_size: int = 10,
    init_size: int | None = None,
    max_queries: int = 50_000,
    max_inactive_connection_lifetime: float = 240.0,
    setup: Callable[[Connection], Awaitable[None]] | None = None,
    init: Callable[[asyncpg.Connection[Any]], Awaitable[None]] | None = None,
    reset: Callable[[asyncpg.Connection[Any]], Awaitable[None]] | None = None,
    connection_class: type[Any] = asyncpg.Connection,
    record_class: type[Any] = asyncpg.Record,
    **keywords: Unpack[ConnectKeywords],
) -> Pool:
    """Return a pool whose every connection is TLS 1.3, verified in full against one root and the host name.

    `dsn`: a connection URL, as the Neon console shows it; what it does not say comes from libpq's `PG*` variables. Any
    keyword of libpq or asyncpg may be given besides, and wins. No `sslmode` means verify-full; a weaker one is refused.

    `trust_anchor`: the root certificate to trust in place of ISRG Root X1, for a private endpoint or a test: PEM bytes,
    PEM text, or a path. `sslcrl` (or `crl`): the path of a CRL file; with it the server's certificate must be covered.

    `password`: a string, or a function, plain or async, that returns it; it is called for every new connection.

    `channel_binding`: `prefer` (default) binds the login to the TLS channel wherever the server offers it; `require`
    refuses a server that does not.

    `connect_timeout` (or asyncpg's `timeout`): seconds for everything one connection needs, DNS included; default 15.0,
    above 0, at most 3600.0. Neon advises 10 to 15 s, for a compute may have to wake.

    `min_size`: connections kept while nobody needs them, default 0. asyncpg 0.32 replaces those that a suspended
    compute has closed, and so wakes it again and again; asyncpg 0.31 keeps no floor. `init_size`: connections to open
    with, default `min_size`. `max_size`: the most connections, default 10, at least 1. `max_queries`: queries after
    which a connection is replaced, default 50,000. `max_inactive_connection_lifetime`: seconds after which an idle
    connection is closed, default 240.0, before Neon suspends the compute at 300 s; 0 for never.

    `setup`, `init`, `reset`, `connection_class`, `record_class`, and `command_timeout`, `statement_cache_size`,
    `max_cached_statement_lifetime`, `max_cacheable_statement_size`, `server_settings` are asyncpg's.

    `keepalives_idle`, `keepalives_interval`: seconds, default 60 and 10; `keepalives_count`: default 3;
    `tcp_user_timeout`: milliseconds, default 90,000, 0 for the system's.

    Raises `InsecureConfigurationError` where a parameter asks for less than verify-full, and `ConfigurationError` for
    any other that cannot be honoured, in the call itself. Awaiting the pool raises what `connect()` raises.
    """
    init_size = min_size if init_size is None else init_size
    _check_sizes(min_size=min_size, init_size=init_size, max_size=max_size, max_queries=max_queries)
    _check_lifetime(max_inactive_connection_lifetime)
    check_classes(connection_class, record_class)
    for name, callback in (("setup", setup), ("init", init), ("reset", reset)):
        if callback is not None and not callable(callback):
            raise ConfigurationError(f"{name} must be an async function that takes a connection.")
    return Pool(
        prepare(dsn, trust_anchor=trust_anchor, **keywords),
        min_size=min_size,
        init_size=init_size,
        max_size=max_size,
        max_queries=max_queries,
        max_inactive_connection_lifetime=max_inactive_connection_lifetime,
        setup=setup,
        init=init,
        reset=reset,
        connection_class=connection_class,
        record_class=record_class,
    )


def _check_sizes(*, min_size: int, init_size: int, max_size: int, max_queries: int) -> None:
    bounds = (
        ("max_size", max_size, 1, _MAX_COUNT),
        ("min_size", min_size, 0, max_size),
        ("init_size", init_size, min_size, max_size),
        ("max_queries", max_queries, 1, _MAX_COUNT),
    )
    for name, value, minimum, maximum in bounds:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ConfigurationError(f"{name} must be a whole number from {minimum} to {maximum}.")


def _check_lifetime(seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= _MAX_COUNT:
        raise ConfigurationError(
            f"max_inactive_connection_lifetime must be seconds from 0, for never, to {_MAX_COUNT}."
        )
