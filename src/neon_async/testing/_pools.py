"""The pools of the pytest plugin: they open themselves in the event loop that uses them.

This module must not know pytest, and not how servers are started.
"""

# No `from __future__ import annotations`: see `_pool/options.py`.

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

from .._config.readers import LIMIT
from .._driver.arguments import require_asyncio
from .._errors import ConfigurationError, NeonAsyncError, PoolClosedError, UnsupportedEventLoopError
from .._pool.pool import Pool, create_pool
from ._rollback import RollbackConnection

_TICK = 0.001  # seconds between two looks at a pool that another event loop closes
_CLOSE_TIMEOUT = 2.0  # seconds until that event loop counts as blocked

# A rollback pool has one connection for all of its life: none of these may replace it.
_ONE_CONNECTION = {
    "max_size": 1,
    "max_queries": LIMIT,
    "max_lifetime": 0,
    "max_inactive_connection_lifetime": 0,
    "connection_class": RollbackConnection,
}
_WITHOUT_EFFECT = frozenset({"min_size", "init_size", "reset"})


class RollbackError(NeonAsyncError, RuntimeError):
    """The one connection of `neon_rollback` ended, and its transaction with it."""


class SelfOpeningPool(Pool[Any]):
    """A pool that opens at its first use, and again where it is used in another event loop.

    Where it is closed by the code under test, it stays closed in this event loop, as any pool does.

    It is closed before the event loop ends, by `loop.shutdown_asyncgens()`, which `asyncio.run()` and `asyncio.Runner`
    call. So every runner of tests can use it, and none leaves a connection open.
    """

    _opened_in: asyncio.AbstractEventLoop | None = None
    _opening: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
    _guard: AsyncGenerator[None, None] | None = None
    _life: object = None

    async def _lend(self, timeout: float | None) -> Any:
        await self._open_here()
        return await super()._lend(timeout)

    async def _call(self, *args: Any, **options: Any) -> Any:
        await self._open_here()
        return await super()._call(*args, **options)

    async def _open_here(self) -> None:
        require_asyncio()
        loop = asyncio.get_running_loop()
        if self._opened_in is loop:
            return
        if self._opening is None or self._opening[0] is not loop:
            self._opening = loop, asyncio.Lock()
        async with self._opening[1]:
            if self._opened_in is loop:
                return  # by another task
            await self._leave_other_loop()
            await self
            self._opened_in, self._life = loop, object()
            self._guard = self._close_with_loop(self._life)
            await anext(self._guard)

    async def _leave_other_loop(self) -> None:
        """Close the pool in the event loop that has it, unless that one still uses a connection.

        Raises:
            UnsupportedEventLoopError: The other event loop uses the pool.
        """
        other = self._opened_in
        if other is None or self.is_closing():
            return
        if other.is_running() and self.stats().in_use:
            raise UnsupportedEventLoopError(
                "The pool is in use in another event loop, which is running. "
                "Release its connections there first, or let the tests and the application run in one event loop."
            )
        self.terminate()
        for _ in range(round(_CLOSE_TIMEOUT / _TICK)):
            if self.is_closing():
                return
            await asyncio.sleep(_TICK)
        raise UnsupportedEventLoopError(
            "The pool is open in another event loop, which is blocked. Do not call a synchronous client in a "
            "coroutine; let the tests and the application run in one event loop."
        )

    async def _close_with_loop(self, life: object) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            if self._life is life:  # else it has been opened elsewhere since
                self.terminate()
                await asyncio.sleep(0)  # the transports close

    def end(self) -> None:
        """Terminate the pool, where it was ever opened. No event loop is needed."""
        with contextlib.suppress(PoolClosedError):
            self.terminate()


class RollbackPool(SelfOpeningPool):
    """A pool on one connection, which is in a transaction that is never committed."""

    _begun = False

    async def begin(self, connection: RollbackConnection) -> None:
        """Begin the transaction; the last step of `init`.

        Raises:
            RollbackError: There was one before.
        """
        if self._begun:
            raise RollbackError(
                "The connection of neon_rollback ended, and what the test had written is rolled back. It ends when a "
                "prepared statement or a cursor fails outside of transaction(), when the test uses neon_rollback in a "
                "second event loop (enter the client: `with TestClient(app) as client:`), and when the server ends it."
            )
        self._begun = True
        await connection.begin_outer()


def self_opening_pool(dsn: str, trust_anchor: bytes, options: Mapping[str, object]) -> SelfOpeningPool:
    """Return a pool that opens itself.

    Args:
        dsn: As for `create_pool()`.
        trust_anchor: As for `create_pool()`.
        options: Other parameters of `create_pool()`.
    """
    return create_pool(dsn, trust_anchor=trust_anchor, pool_class=SelfOpeningPool, **cast(dict[str, Any], options))


def rollback_pool(dsn: str, trust_anchor: bytes, options: Mapping[str, object]) -> RollbackPool:
    """Return a pool whose work is rolled back.

    Args:
        dsn: As for `create_pool()`.
        trust_anchor: As for `create_pool()`.
        options: Other parameters of `create_pool()`. Those that concern several connections have no effect, nor has
            `reset`, before which a pool rolls back.

    Raises:
        ConfigurationError: `options` has a `connection_class`.
    """
    if "connection_class" in options:
        raise ConfigurationError(
            "neon_rollback has a connection_class of its own. Leave connection_class out of neon_pool_options, or use "
            "neon_pool."
        )
    callers_init = cast(Any, options.get("init"))
    pool: RollbackPool

    async def init(connection: RollbackConnection) -> None:
        if callers_init is not None:
            await callers_init(connection)
        await pool.begin(connection)

    kept: dict[str, Any] = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}
    kept |= {**_ONE_CONNECTION, "init": init}
    pool = create_pool(dsn, trust_anchor=trust_anchor, pool_class=RollbackPool, **kept)
    return pool
