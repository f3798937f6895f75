"""What the tests of revocation share: a process that knows no list, and connections whose chains are checked."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import pytest

from neon_async._wire.revocation import check, disk, shard
from neon_async._wire.revocation.shard import Shard
from support.crls import RevocablePKI
from support.probes import HANG

__all__ = ("forget_everything", "let_expire", "now_due", "obtain", "renew", "shard_on")


def forget_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forget all lists, as a new process has; and return the folder for the lists that are kept, which is new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    shard.forget_all()
    check.known.cache_clear()
    return tmp_path / "neon-async" / "revocation"


def shard_on(pki: RevocablePKI, path: str = "/1.crl") -> Shard:
    """Return the list that is published at `path`, which something needs."""
    (one,) = [each for each in shard._shards.values() if each.source.url == pki.lists.url(path)]
    return one


def let_expire(one: Shard, after: float = 0.0) -> None:
    """Let the list that is known expire in `after` seconds."""
    assert one.state.current is not None
    expiring = copy.copy(one.state.current)
    expiring.expires_at = time.time() + after
    one.state = one.state._replace(current=expiring)


def obtain(one: Shard) -> Shard:
    """Let the list be obtained, and wait until that has ended. The event loop stands still meanwhile."""
    changed = threading.Event()
    one.listeners.add(changed.set)
    one.refresh()
    while one.is_busy:
        assert changed.wait(HANG)
        changed.clear()
    one.listeners.discard(changed.set)
    return one


def now_due(one: Shard) -> Shard:
    """Let the time to renew or to retry have come."""
    one.state = one.state._replace(renew_at=time.time() - 1, retry_at=time.monotonic() - 1)
    return one


def renew(one: Shard) -> None:
    """Let the list be fetched anew, as `obtain()` does."""
    disk._path(one.source).unlink(missing_ok=True)
    obtain(now_due(one))
