"""One revocation list of this process: obtained once for all connections, and renewed while they need it.

Work is done in a thread for each list that is being obtained; the rest is called in event loops. What a thread has
found is one immutable `State`, so that readers need no lock. This module must not know certificates or connections.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from ..._text import log
from ..._timing import backoff
from . import disk, download
from .lists import ListRefusedError, RevocationList, Source, read_list

# A list of a CA's certificates is valid for months: it is looked at daily.
_DAY = 86_400.0
# A list is renewed at this part of its life, and up to so much later: processes that got it together part.
_HALF, _SPREAD = 0.5, 0.1
# A list that was already in the second half of its life is renewed after this part of what is left.
_PART_OF_THE_REST = 0.125
_SHORTEST_WAIT = 1.0
# Pauses after failures, in seconds.
_BACKOFF_BASE = 1.0
_BACKOFF_CAP = 300.0
# Callers may be refused meanwhile.
_BACKOFF_CAP_WITHOUT_LIST = 30.0


class State(NamedTuple):
    """What is known about a list.

    Attributes:
        current: The list, which may have expired since, or None.
        checked_at: When it was obtained, in seconds since the epoch.
        renew_at: When to renew it, in seconds since the epoch.
        failure: Why the latest attempt to obtain a list failed, or "".
        failures: How many attempts have failed since the latest success.
        retry_at: When the next attempt may start; a time of the monotonic clock.
        is_busy: Whether it is being obtained.
    """

    current: RevocationList | None = None
    checked_at: float = -math.inf
    renew_at: float = -math.inf
    failure: str = ""
    failures: int = 0
    retry_at: float = -math.inf
    is_busy: bool = False


class Shard:
    """The list of one source.

    Attributes:
        source: Where it comes from.
        state: What is known about it.
        listeners: Called in the working thread, each time that it has been obtained or could not be, and when an older
            one that can be used was found on the disk.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.state = State()
        self.listeners: set[Callable[[], object]] = set()
        self._lock = threading.Lock()
        self._highest: int | None = None  # number of any list so far

    def __repr__(self) -> str:
        return f"<Shard {self.source.url}: {self.state.current}>"

    @property
    def is_busy(self) -> bool:
        """Whether it is being obtained."""
        return self.state.is_busy

    @property
    def current(self) -> RevocationList | None:
        """The list, unless there is none or it has expired."""
        current = self.state.current
        return current if current is not None and time.time() < current.expires_at else None

    def next_refresh(self) -> float:
        """Return the seconds until `refresh()` has something to do. Infinity while it is being done."""
        state, now = self.state, time.time()
        if state.is_busy:
            return math.inf
        wait = state.renew_at - now if state.current is not None and now < state.current.expires_at else 0.0
        return max(wait, state.retry_at - time.monotonic(), 0.0)

    def refresh(self) -> None:
        """Obtain the list in a thread, unless it is current or being obtained, or a failure was too recent."""
        with self._lock:
            if self.next_refresh() > 0:
                return
            self.state = self.state._replace(is_busy=True)
        try:
            # Not of an executor: those are waited for when the interpreter exits.
            threading.Thread(target=self._work, name="neon-async revocation list", daemon=True).start()
        except RuntimeError as error:  # no thread can be started
            self._finish(self._failed(str(error)))

    # -----------------------------------------------------------------------------------------------------------------
    # In the thread

    def _work(self) -> None:
        try:
            state = self._obtain()
        except ListRefusedError as error:
            state = self._failed(str(error))
        except Exception as error:  # noqa: BLE001  the connections that wait must get an answer
            state = self._failed(f"cannot be obtained ({type(error).__name__})")
        self._finish(state)

    def _finish(self, state: State) -> None:
        if state.failures == 1:
            text = "the revocation list %(list_url)s %(reason)s"
            log(logging.WARNING, text, event="list_failed", list_url=self.source.url, reason=state.failure)
        elif self.state.failures and not state.failures:
            text = "the revocation list %(list_url)s is current again"
            log(logging.INFO, text, event="list_current", list_url=self.source.url)
        self._publish(state._replace(is_busy=False))

    def _publish(self, state: State) -> None:
        with self._lock:
            self.state = state
            listeners = list(self.listeners)
        for listener in listeners:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                listener()

    def _obtain(self) -> State:
        """Return the list from the disk if it is in the first half of its life, or else the one that is published."""
        kept = disk.load(self.source)
        if kept is not None:
            with contextlib.suppress(ListRefusedError):
                found = self._use(kept.der, min(kept.fetched_at, time.time()))
                if found.renew_at > time.time():
                    return found
                # Of use until the next one has been fetched, or if that fails.
                self._publish(found._replace(failures=self.state.failures, is_busy=True))
        del kept
        der = download.fetch(self.source.url)
        state = self._use(der, time.time())
        disk.store(self.source, der)
        return state

    def _use(self, der: bytes, fetched_at: float) -> State:
        """Return the state with the list in `der`.

        Raises:
            ListRefusedError: It must not be used.
        """
        found = read_list(der, self.source, datetime.now(UTC))
        if self._highest is not None and (found.number is None or found.number < self._highest):
            raise ListRefusedError(f"has the number {found.number}, and an earlier one had {self._highest}")
        earlier = self.state.current
        if found.number is None and earlier is not None and found.this_update < earlier.this_update:
            raise ListRefusedError("is older than an earlier one")
        self._highest = found.number
        life = found.this_update.timestamp(), found.next_update.timestamp()
        renew_at = renewal(*life, fetched_at=fetched_at, jitter=random.random())  # noqa: S311
        return State(found, fetched_at, min(renew_at, fetched_at + _DAY) if self.source.for_cas else renew_at)

    def _failed(self, why: str) -> State:
        failures = self.state.failures + 1
        cap = _BACKOFF_CAP if self.current is not None else _BACKOFF_CAP_WITHOUT_LIST
        pause = backoff(_BACKOFF_BASE, failures - 1, cap) * (1 + random.random()) / 2  # noqa: S311
        return self.state._replace(failure=why, failures=failures, retry_at=time.monotonic() + pause)


def renewal(this_update: float, next_update: float, *, fetched_at: float, jitter: float) -> float:
    """Return when to renew a list: in the second half of its life. All times are in seconds since the epoch.

    Args:
        this_update: When it was issued.
        next_update: When it expires.
        fetched_at: When it was obtained.
        jitter: A random number from 0 to 1.
    """
    due = this_update + (next_update - this_update) * (_HALF + _SPREAD * jitter)
    return due if due > fetched_at else fetched_at + max((next_update - fetched_at) * _PART_OF_THE_REST, _SHORTEST_WAIT)


# ---------------------------------------------------------------------------------------------------------------------
# All lists of this process

# Weak: a list has up to 2 MB. What keeps it are the connections that need it, and `check.known()`.
_shards: weakref.WeakValueDictionary[Source, Shard] = weakref.WeakValueDictionary()
_shards_lock = threading.Lock()


def shard_of(source: Source) -> Shard:
    """Return the list of `source`; all pools and connections of this process share it."""
    with _shards_lock:
        shard = _shards.get(source)
        if shard is None:
            shard = _shards[source] = Shard(source)
        return shard


def forget_all() -> None:
    """Start anew in a child process: the threads that were at work are not there."""
    global _shards_lock
    _shards_lock = threading.Lock()
    _shards.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_all)
