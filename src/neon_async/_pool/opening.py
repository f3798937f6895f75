"""Make one connection for a pool: dial, run the caller's `init`, and remember what it set up.

Tells what the caller's own code raised from what the server did. Knows no slots, no waiters and no pace.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from .._config.literals import ConnectStep
from .._driver import holder
from .._driver.connector import Connector
from .._driver.holder import CallersError, own_session
from .._driver.pooled import is_pooled, tracked_settings
from .._driver.session import Snapshot
from .._driver.snapshot import take_snapshot
from .._errors import ConfigurationError, ConnectError, ConnectTimeoutError
from .._neon.endpoint import short_name
from .options import PoolOptions


class Steps:
    """The steps of one dial.

    Attributes:
        taken: Each step as it began, with the seconds from the begin of the dial.
    """

    __slots__ = ("_began", "taken")

    def __init__(self, began: float) -> None:
        self._began = began
        self.taken: list[tuple[ConnectStep, float]] = []

    def __repr__(self) -> str:
        return f"<Steps: {', '.join(step for step, _ in self.taken)}>"

    def add(self, step: ConnectStep) -> None:
        """Add a step that begins now."""
        self.taken.append((step, time.monotonic() - self._began))

    @property
    def connects(self) -> int:
        """How often the server was connected to: twice where it turned out not to speak direct TLS, for one."""
        return sum(step == "tcp" for step, _ in self.taken)


async def open_connection(connector: Connector, options: PoolOptions, steps: Steps) -> Any:
    """Return a new connection on which the caller's `init` has run.

    Args:
        connector: Makes the connection.
        options: The options of the pool.
        steps: The steps of the dial are added to it as they begin.

    Raises:
        CallersError: The caller's own code failed.
        NeonAsyncError: The connection could not be made.
    """
    connection: Any = await connector.open(
        connection_class=options.connection_class, record_class=options.record_class, on_step=steps.add
    )
    if options.init is not None:
        await _run_init(options.init, connector, connection)
    if connection.is_closed():
        raise ConnectError("The server closed the connection as soon as it was made. Try again.")
    return connection


def failure_of(error: BaseException) -> Exception | None:
    """Return why a dial failed, or None if it did not fail but was cancelled.

    Args:
        error: What `open_connection()` raised in the current task.

    Raises:
        BaseException: `error`, which ends the program.
    """
    match error:
        case Exception():
            return error
        case KeyboardInterrupt() | SystemExit():
            raise error
        case asyncio.CancelledError():
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                return None
            # Something that the caller's code awaited was cancelled, but the dial itself was not cancelled.
            failure = ConnectError("init or the password function raised CancelledError. Catch it there.")
            failure.__cause__ = error
            return CallersError(failure)
    return CallersError(cast(Exception, error))  # such as `pytest.fail.Exception`


async def _run_init(init: Callable[[Any], Awaitable[None]], connector: Connector, connection: Any) -> None:
    """Run the caller's `init` within `connect_timeout`. A connection that it fails on is not used."""
    parameters = connector.parameters
    limit, name = parameters.connect_timeout, short_name(parameters.host, parameters.endpoint)
    deadline = asyncio.timeout(limit)
    try:
        async with deadline:
            await _set_up(init, connection, user=parameters.user)
    except BaseException as error:
        lost = connection.is_closed() and holder.was_lost(connection)
        connection.terminate()
        if not isinstance(error, Exception):
            raise
        if lost:
            raise ConnectError(f"{name} closed the connection while init ran. Try again.") from error
        failure = error
        if isinstance(error, TimeoutError) and deadline.expired():
            failure = ConnectTimeoutError(
                f"init did not return within connect_timeout={limit:g} s. Let it do less, or raise connect_timeout."
            )
            failure.__cause__ = error
        raise CallersError(failure) from None
    if connection.is_closed() and not holder.was_lost(connection):
        raise CallersError(ConfigurationError("init closed its connection. Let init return with the connection open."))


async def _set_up(init: Callable[[Any], Awaitable[None]], connection: Any, *, user: str) -> None:
    """Run `init`, and remember what it set up, so that every reset restores it."""
    session, protocol = own_session(connection), holder.protocol_of(connection)
    assert protocol is not None
    writes, protocol.mentioned = holder.transport_of(connection).writes, set()
    await init(connection)
    if connection.is_closed():
        return
    names, protocol.mentioned = protocol.mentioned, None
    if holder.transport_of(connection).writes != writes and not is_pooled(connection):
        session.remember(await take_snapshot(connection, user=user, names=names))
    else:  # nothing that only the server knows
        session.remember(Snapshot(callbacks=holder.callbacks_of(connection), codecs=dict(session.codecs)))
        if is_pooled(connection):
            session.initial_settings = tracked_settings(connection)
    protocol.note_reset()
