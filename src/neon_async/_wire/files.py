"""Read a file that a parameter names, whatever it turns out to be: no read waits, and none is longer than its limit.

This module must not know what the files contain.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

# The largest file of certificates or keys that is read; the bundles of certifi and of the systems stay below 1 MiB.
MAX_CERTIFICATES = 16 << 20
# The largest file of revocation lists. Let's Encrypt announced lists of up to 70 MB (2022), 95 MB as PEM.
MAX_REVOCATION_LISTS = 128 << 20


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The path of the file. Links are followed.
        limit: The largest size to read, in bytes.

    Raises:
        OSError: The file cannot be opened, is not a regular file, or is larger than `limit`.
        ValueError: `path` is no path.
    """
    status = Path(path).stat()  # before it is opened: that alone changes some devices
    _check(status, path, limit)
    if not status.st_size:
        return b""  # or a file of the kernel, such as /proc/kmsg: reading one may never end
    # The file can have been replaced since; the opening of a FIFO waits without O_NONBLOCK.
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        _check(status, path, limit)
        return file.read(status.st_size)


def require_file(path: str | os.PathLike[str], limit: int) -> None:
    """Raise the same errors as `read_file()`, and one for an empty file, before a library opens the file by its path.

    Raises:
        OSError: The file cannot be found, is not a regular file, is empty, or is larger than `limit`.
        ValueError: `path` is no path.
    """
    status = Path(path).stat()
    _check(status, path, limit)
    if not status.st_size:
        raise OSError(errno.EINVAL, "the file is empty", os.fspath(path))


def _check(status: os.stat_result, path: str | os.PathLike[str], limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"larger than {limit >> 20} MiB", os.fspath(path))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
