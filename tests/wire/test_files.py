"""Files that parameters name: each is read up to its size and its limit, and no read waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import make_huge

from neon_async._wire.files import read_file, require_file

LIMIT = 1000


@pytest.mark.parametrize("size", [1, LIMIT])
def test_a_file_up_to_the_limit_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    require_file(path, LIMIT)
    assert read_file(path, LIMIT) == b"x" * size


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(str(tmp_path / "link"), LIMIT) == b"content"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda path: path.write_bytes(b"x" * (LIMIT + 1)), "larger than", id="one byte too many"),
        pytest.param(make_huge, "larger than", id="3 GB"),
        pytest.param(os.mkfifo, "not a regular file", id="a FIFO"),
        pytest.param(Path.mkdir, "not a regular file", id="a folder"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "not a regular file", id="a device without an end"),
        pytest.param(lambda path: None, "No such file", id="missing"),
    ],
)
def test_anything_else_is_an_error_that_says_why(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "file"
    make(path)
    for use in (read_file, require_file):
        with pytest.raises(OSError, match=reason):
            use(path, LIMIT)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Path.touch, id="empty"),
        pytest.param(lambda path: path.symlink_to("/proc/kmsg"), id="the kernel's log"),
        pytest.param(lambda path: path.symlink_to("/proc/self/mounts"), id="a file without a size"),
    ],
)
def test_a_file_without_a_size_is_empty_and_not_opened(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "file"
    make(path)
    assert read_file(path, LIMIT) == b""
    with pytest.raises(OSError, match="empty"):
        require_file(path, LIMIT)
