"""Lists on disk: written at once or not at all, readable by their user only, and no more than a shortcut."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from neon_async._wire.revocation import disk
from neon_async._wire.revocation.lists import Source

SOURCE = Source("http://c.example.com/1.crl", b"issuer", for_cas=False, must_name_url=False)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_stored_is_loaded_and_belongs_to_its_user_only(cache_folder: Path) -> None:
    assert disk.load(SOURCE) is None
    disk.store(SOURCE, b"a list")
    disk.store(SOURCE, b"a newer list")
    kept = disk.load(SOURCE)
    assert kept is not None
    assert kept.der == b"a newer list"
    path = only_file(cache_folder)
    assert kept.fetched_at == path.stat().st_mtime
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache_folder.stat().st_mode) == 0o700


def test_each_url_and_issuer_has_a_file_of_its_own(cache_folder: Path) -> None:
    disk.store(SOURCE, b"a list")
    for other in (SOURCE._replace(url="http://c.example.com/2.crl"), SOURCE._replace(issuer=b"another")):
        assert disk.load(other) is None


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that makes a file or folder another user's. Only root can; otherwise this process changes."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)

    return give


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.chmod(0o622), id="writable by others"),
        pytest.param(replace_by_link, id="a link"),
        pytest.param(replace_by_fifo, id="a FIFO"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a folder"),
        pytest.param(lambda path: os.truncate(path, 71_000_000), id="71 MB"),
    ],
)
def test_a_file_that_is_not_plainly_ones_own_is_not_read(cache_folder: Path, spoil: Callable[[Path], object]) -> None:
    disk.store(SOURCE, b"a list")
    spoil(only_file(cache_folder))
    assert disk.load(SOURCE) is None


def test_a_file_of_another_user_is_not_read(cache_folder: Path, give_away: Callable[[Path], None]) -> None:
    disk.store(SOURCE, b"a list")
    give_away(only_file(cache_folder))
    assert disk.load(SOURCE) is None


def test_a_folder_of_another_user_is_not_written_to(
    cache_folder: Path, give_away: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    disk.store(SOURCE, b"a list")
    only_file(cache_folder).unlink()
    give_away(cache_folder)
    with caplog.at_level("INFO", "neon_async"):
        disk.store(SOURCE, b"a list")
    assert list(cache_folder.iterdir()) == []
    assert f"not kept on disk ({cache_folder} belongs to another user, or others can write to it)" in caplog.text


def test_a_folder_that_others_can_write_to_is_not_written_to(
    cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_folder.mkdir(parents=True)
    cache_folder.chmod(0o777)
    with caplog.at_level("INFO", "neon_async"):
        disk.store(SOURCE, b"a list")
    assert list(cache_folder.iterdir()) == []
    assert "others can write to it" in caplog.text


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: (folder.parent.mkdir(), folder.write_bytes(b"")), id="the folder is a file"),
        pytest.param(lambda folder: folder.parent.write_bytes(b""), id="its parent is a file"),
    ],
)
def test_a_folder_that_cannot_be_written_to_only_costs_a_line_in_the_log(
    cache_folder: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(cache_folder)
    with caplog.at_level("INFO", "neon_async"):
        disk.store(SOURCE, b"a list")
    assert disk.load(SOURCE) is None
    assert "not kept on disk" in caplog.text


@pytest.mark.parametrize("folder", [pytest.param("~/.cache", id="no home"), pytest.param("cache", id="relative")])
def test_without_a_folder_of_the_user_nothing_is_kept_beside_the_program(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    # What platformdirs 4.0 returns where it finds no home, or a relative path in XDG_CACHE_HOME.
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path(folder))
    with caplog.at_level("INFO", "neon_async"):
        disk.store(SOURCE, b"a list")
    assert disk.load(SOURCE) is None
    assert list(tmp_path.iterdir()) == []
    assert "not kept on disk (this user has no home folder" in caplog.text


def test_a_write_that_fails_leaves_the_older_list_and_no_other_file(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.store(SOURCE, b"a list")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    disk.store(SOURCE, b"a newer list")
    kept = disk.load(SOURCE)
    assert kept is not None
    assert kept.der == b"a list"
    assert len(list(cache_folder.iterdir())) == 1
