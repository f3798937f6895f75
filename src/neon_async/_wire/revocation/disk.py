"""Keep revocation lists on disk, so that a restart or a second worker fetches nothing.

A file is only a shortcut: whatever is read is verified again. Without a usable folder there is no shortcut, and nothing
else changes. It blocks, and runs in a thread. This module must not know what a list contains.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

import platformdirs

from ..._text import log
from .download import MAX_SIZE
from .lists import Source


class Kept(NamedTuple):
    """A list from the disk.

    Attributes:
        der: Its bytes, which may be anything.
        fetched_at: When it was written, in seconds since the epoch.
    """

    der: bytes
    fetched_at: float


def load(source: Source) -> Kept | None:
    """Return what is kept for `source`, or None where there is nothing, or nothing of this user's own."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(_path(source), "rb", opener=lambda path, _: os.open(path, flags)) as file:
            status = os.fstat(file.fileno())
            if not _is_own(status) or not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SIZE:
                return None
            return Kept(file.read(MAX_SIZE), status.st_mtime)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None


def store(source: Source, der: bytes) -> None:
    """Keep the list in place of an older one, at once or not at all, readable by this user only.

    Nothing fails for a list that cannot be kept: a line in the log says so.
    """
    try:
        path = _path(source)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(path.parent.stat()):
            raise PermissionError(f"{path.parent} belongs to another user, or others can write to it")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:  # mode 0600
            new = Path(file.name)
            try:
                file.write(der)
                file.close()
                new.replace(path)
            except BaseException:
                new.unlink()
                raise
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        log(logging.INFO, "a revocation list is not kept on disk (%(reason)s)", event="list_not_kept", reason=reason)


def _path(source: Source) -> Path:
    folder: Path = platformdirs.user_cache_path("neon-async", appauthor=False)
    if not folder.is_absolute():  # from older releases of platformdirs; newer ones raise, or ignore the variable
        raise RuntimeError("this user has no home folder, and XDG_CACHE_HOME is not an absolute path")
    return folder / "revocation" / f"{hashlib.sha256(source.issuer + source.url.encode()).hexdigest()}.crl"


def _is_own(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, and no other user can change it."""
    if not hasattr(os, "geteuid"):  # Windows: the cache folder is in the profile of the user
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
