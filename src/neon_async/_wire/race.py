"""Try the addresses of a server, and both ways to TLS, until one attempt succeeds.

An attempt that has not answered in time is not given up: the next one starts beside it, and the first to succeed wins.
This module must not know what an attempt does; it knows which steps it passes.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from .._config.connection import ConnectionParameters
from .._config.literals import ConnectStep, SSLNegotiation
from .._errors import ConnectError, TLSError
from . import tcp

_T = TypeVar("_T")

StepCallback: TypeAlias = Callable[[ConnectStep], None]

# RFC 8305, section 5: the recommended delay before the next address is tried while earlier attempts continue.
_CONNECT_DELAY = 0.25
# Seconds after which a server is silent that has accepted the connection. A TLS handshake takes two round trips.
_SILENCE = 1.0


class UnverifiedError(Exception):
    """An attempt failed before anything of the server was verified, so that another one may follow.

    Any other exception of an attempt is final.

    Attributes:
        error: What the caller gets if no attempt succeeds.
        other_way: Whether the server may know the other way to TLS.
    """

    def __init__(self, error: Exception, *, other_way: bool = False) -> None:
        super().__init__()
        self.error = error
        self.other_way = other_way


class Attempt:
    """An address and a way to TLS.

    Attributes:
        address: The address.
        negotiation: The way to TLS, as in libpq's `sslnegotiation`.
        other_way: The way to try at the same address if the server does not know this one, or None.
        is_connected: Whether the address has accepted the connection.
        has_fallen_back: Whether the other way is being tried, or has been.
        end: Ends what the attempt is doing where a cancellation would not do so cleanly, or None.
        due: The time of the event loop's clock at which the next attempt starts beside this one.
    """

    __slots__ = ("address", "due", "end", "has_fallen_back", "is_connected", "negotiation", "other_way")

    def __init__(self, address: tcp.Address, *ways: SSLNegotiation) -> None:
        self.address = address
        self.negotiation, self.other_way = ways[0], ways[1] if len(ways) > 1 else None
        self.has_fallen_back = False
        self.is_connected = False
        self.end: Callable[[], None] | None = None
        self.due = math.inf


class Race(Generic[_T]):
    """The attempts of one dial.

    Args:
        parameters: The server, and how to connect.
        addresses: Its addresses, in the order in which to try them.
        ways: One or both ways to TLS, in the order in which to try them.
        run: Makes an attempt. It calls `note_connect()`, and `note_wait()` before it waits for the server's answer.
        discard: Closes the result of an attempt that has lost.
        on_step: Called with `tcp` or `tls` when the attempt that is ahead comes to this step.
    """

    def __init__(
        self,
        parameters: ConnectionParameters,
        addresses: Sequence[tcp.Address],
        ways: Sequence[SSLNegotiation],
        *,
        run: Callable[[Race[_T], Attempt], Coroutine[Any, Any, _T]],
        discard: Callable[[_T], None],
        on_step: StepCallback,
    ) -> None:
        self._parameters = parameters
        self._waiting = deque(Attempt(address, *ways) for address in addresses)
        # Every attempt gets its turn before `connect_timeout` expires.
        self._silence = min(_SILENCE, parameters.connect_timeout / (len(addresses) * len(ways) + 1))
        self._run = run
        self._discard = discard
        self._on_step = on_step
        self._step: ConnectStep | None = None
        self._running: dict[asyncio.Task[_T], Attempt] = {}
        self._failures: list[tuple[Attempt, Exception]] = []
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()
        self._wakes_at = math.inf  # when the race looks for silent servers next

    def note_connect(self, attempt: Attempt) -> None:
        """Note that the address of `attempt` has accepted the connection."""
        attempt.is_connected, attempt.due = True, math.inf
        self._announce()

    def note_wait(self, attempt: Attempt) -> None:
        """Start another attempt beside `attempt` if the server stays silent from now on."""
        attempt.due = self._loop.time() + self._silence
        if attempt.due < self._wakes_at:
            self._wake()

    async def winner(self) -> tuple[Attempt, _T]:
        """Return the first attempt that succeeds, and its result. All others are ended.

        Raises:
            ConnectError: No address accepts connections.
            Exception: What failed for good; or, if all attempts failed, the error of the first that got furthest.
        """
        try:
            outcome = await self._outcome()
        finally:
            for task, attempt in self._running.items():
                self._end(task, attempt)
            self._running.clear()
            self._failures.clear()  # the traceback of an error leads to frames that know this race
        if not isinstance(outcome, BaseException):
            return outcome
        try:
            raise outcome
        finally:
            del outcome  # its traceback leads to this frame: a cycle that only the garbage collector would free

    async def _outcome(self) -> tuple[Attempt, _T] | BaseException:
        self._start_next()
        while self._running:
            await self._wait()
            for task in [task for task in self._running if task.done()]:
                error = task.exception()
                if error is not None and not isinstance(error, UnverifiedError):
                    return error
                attempt = self._running.pop(task, None)
                if attempt is not None and error is None:
                    return attempt, task.result()
                if attempt is not None and error is not None:
                    self._go_on_after(attempt, error)
            self._start_beside_the_silent()
            self._announce()
        return self._failure()

    def _start_next(self) -> None:
        if self._waiting:
            attempt = self._waiting.popleft()
            attempt.due = self._loop.time() + _CONNECT_DELAY
            self._running[asyncio.ensure_future(self._make(attempt))] = attempt
            self._announce()

    async def _make(self, attempt: Attempt) -> _T:
        try:
            return await self._run(self, attempt)
        finally:
            self._wake()  # not by a callback of the task, which would take one more iteration of the event loop

    async def _wait(self) -> None:
        """Wait until an attempt has ended or begins to wait for the server, or another one may have to start."""
        due = [attempt.due for attempt in self._running.values() if self._waiting or attempt.other_way is not None]
        self._wakes_at = min(due, default=math.inf)
        timer = None if self._wakes_at == math.inf else self._loop.call_at(self._wakes_at, self._wake)
        try:
            await self._woken
        finally:
            if timer is not None:
                timer.cancel()
        self._woken = self._loop.create_future()

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def _start_beside_the_silent(self) -> None:
        now = self._loop.time()
        for attempt in [attempt for attempt in self._running.values() if attempt.due <= now]:
            attempt.due = math.inf
            tcp.postpone(attempt.address)
            if attempt.is_connected:
                self._fall_back(attempt)
            self._start_next()

    def _fall_back(self, attempt: Attempt) -> None:
        """Try the other way to TLS next, once, and at the same address."""
        if attempt.other_way is not None:
            self._waiting.appendleft(Attempt(attempt.address, attempt.other_way))
            attempt.other_way, attempt.has_fallen_back = None, True

    def _go_on_after(self, attempt: Attempt, error: UnverifiedError) -> None:
        """Start what is to be tried after a failed attempt."""
        if error.other_way and attempt.other_way is not None:
            self._fall_back(attempt)
        elif not (error.other_way and attempt.has_fallen_back):
            self._failures.append((attempt, error.error))
            tcp.postpone(attempt.address)
            if isinstance(error.error, TLSError):
                self._end_attempts_at(attempt.address)
        self._start_next()

    def _end_attempts_at(self, address: tcp.Address) -> None:
        """End the attempts at an address whose server has refused TLS: direct TLS that it did not answer, for one."""
        for task, attempt in list(self._running.items()):
            if attempt.address == address and attempt.is_connected:
                del self._running[task]
                self._end(task, attempt)

    def _end(self, task: asyncio.Task[_T], attempt: Attempt) -> None:
        if attempt.end is not None:
            attempt.end()
        else:
            task.cancel()
        task.add_done_callback(self._discard_result)

    def _discard_result(self, task: asyncio.Task[_T]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._discard(task.result())

    def _announce(self) -> None:
        """Announce the step of the attempt that is ahead, if it has changed."""
        step: ConnectStep = "tls" if any(attempt.is_connected for attempt in self._running.values()) else "tcp"
        if self._running and step != self._step:
            self._step = step
            self._on_step(step)

    def _failure(self) -> Exception:
        """Return the error of the dial, all of whose attempts have failed."""
        for attempt, error in self._failures:
            if attempt.is_connected:
                return error
        failures = {str(attempt.address): error for attempt, error in self._failures if isinstance(error, OSError)}
        reasons = "; ".join(f"{address}: {os.strerror(error.errno or 0)}" for address, error in failures.items())
        failure = ConnectError(
            f"{self._parameters.host} does not accept connections on port {self._parameters.port} "
            f"({reasons or 'it has no address'}). Check host, port and network."
        )
        failure.__cause__ = next(iter(failures.values()), None)
        return failure
