"""What the tests of revocation share: a process that knows no list, and connections whose chains are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from neon_async._wire.revocation import check, shard

__all__ = ("forget_everything",)


def forget_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forget all lists, as a new process has; and return the folder for the lists that are kept, which is new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    shard.forget_all()
    check.read.cache_clear()
    return tmp_path / "neon-async" / "revocation"
