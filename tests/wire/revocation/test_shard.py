"""One list of the process: obtained once, from the disk where it is fresh there, renewed, and never an older one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.certificates import DAY, NOW
from support.crls import RevocablePKI
from support.probes import HANG
from support.revocations import forget_everything, let_expire, now_due, obtain

from neon_async._wire.revocation import disk, shard
from neon_async._wire.revocation.lists import Source
from neon_async._wire.revocation.shard import renewal, shard_of


def source_of(pki: RevocablePKI, name: str = "/1.crl") -> Source:
    return Source(pki.lists.url(name), pki.issuer.der, for_cas=False, must_name_url=True)


def test_a_list_is_fetched_once_for_all_who_ask_at_the_same_time(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", leaf)
    one = shard_of(source_of(pki))
    assert shard_of(source_of(pki)) is one
    release = pki.lists.hold("/1.crl")
    ended = threading.Event()
    one.listeners.add(ended.set)
    for _ in range(20):
        shard_of(source_of(pki)).refresh()
    assert one.is_busy
    release.set()
    assert ended.wait(HANG)
    one.refresh()  # there is nothing to do
    assert (one.is_busy, pki.lists.requests) == (False, ["/1.crl"])
    assert one.current is not None
    assert leaf.certificate.serial_number in one.current


def test_a_new_process_takes_the_list_from_the_disk(
    pki: RevocablePKI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki.publish("/1.crl")
    obtain(shard_of(source_of(pki)))
    forget_everything(tmp_path, monkeypatch)
    again = obtain(shard_of(source_of(pki)))
    assert again.current is not None
    assert pki.lists.requests == ["/1.crl"]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"garbage"), id="garbage"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="cut off"),
        pytest.param(lambda path: path.write_bytes(bytes(path.stat().st_size)), id="zeros"),
        pytest.param(lambda path: os.utime(path, (0, 1.0)), id="so old that it is time to renew"),
    ],
)
def test_a_file_that_is_of_no_use_is_replaced(
    pki: RevocablePKI, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any]
) -> None:
    pki.publish("/1.crl", last_update=NOW - 20 * DAY)  # in the second half of its life
    obtain(shard_of(source_of(pki)))
    (path,) = cache_folder.iterdir()
    good = path.read_bytes()
    spoil(path)
    forget_everything(tmp_path, monkeypatch)
    assert obtain(shard_of(source_of(pki))).current is not None
    assert pki.lists.requests == ["/1.crl", "/1.crl"]
    assert path.read_bytes() == good


def test_who_waits_is_told_of_a_list_on_the_disk_that_is_due_before_the_next_one_is_there(
    pki: RevocablePKI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki.publish("/1.crl", last_update=NOW - 20 * DAY)
    os.utime(disk._path(obtain(shard_of(source_of(pki))).source), (0, 1.0))
    forget_everything(tmp_path, monkeypatch)
    release = pki.lists.hold("/1.crl")
    one, told = shard_of(source_of(pki)), threading.Event()
    one.listeners.add(told.set)
    one.refresh()
    try:
        assert told.wait(HANG)
        assert one.is_busy
        assert one.current is not None
    finally:
        release.set()
    obtain(one)


def test_a_forged_list_on_the_disk_is_not_believed(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    pki.publish("/1.crl", leaf, key=pki.root.key)
    forged = pki.lists.bodies["/1.crl"]
    assert isinstance(forged, bytes)
    disk.store(source_of(pki), forged)
    pki.publish("/1.crl")
    found = obtain(shard_of(source_of(pki))).current
    assert found is not None
    assert leaf.certificate.serial_number not in found


def test_a_list_that_is_due_is_renewed_and_stays_in_use_if_that_fails(
    pki: RevocablePKI, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = pki.leaf()
    one = obtain(shard_of(source_of(pki)))
    disk._path(one.source).unlink()
    first, good = one.current, pki.lists.bodies.pop("/1.crl")
    obtain(now_due(one))
    assert one.current is first
    assert (one.state.failures, one.state.failure) == (1, "was answered with HTTP status 404")
    one.refresh()
    assert not one.is_busy  # a pause follows the failure
    assert one.next_refresh() > 0
    obtain(now_due(one))
    assert one.state.failures == 2
    assert caplog.text.count("was answered with HTTP status 404") == 1  # the same outage
    pki.publish("/1.crl", leaf)
    assert pki.lists.bodies["/1.crl"] != good
    obtain(now_due(one))
    assert one.state.failures == 0
    assert one.current is not None
    assert leaf.certificate.serial_number in one.current


@pytest.mark.parametrize(
    ("is_known", "longest"), [pytest.param(True, 300, id="a list"), pytest.param(False, 30, id="no list")]
)
def test_the_pauses_after_failures_grow_up_to_five_minutes_or_less_without_a_list(
    pki: RevocablePKI, is_known: bool, longest: float
) -> None:
    pki.publish("/1.crl")
    one, pauses = shard_of(source_of(pki)), []
    if is_known:
        obtain(one)
    for failures in range(12):
        one.state = one.state._replace(failures=failures)
        pauses.append(one._failed("fails").retry_at - time.monotonic())
    assert all(0.4 <= pause <= min(2**number, longest) for number, pause in enumerate(pauses))
    assert pauses[-1] > longest * 0.49


@pytest.mark.parametrize(
    ("numbers", "refused"),
    [
        pytest.param([5, 6], False, id="growing"),
        pytest.param([5, 5], False, id="the same"),
        pytest.param([5, 4], True, id="decreasing"),
        pytest.param([5, None], True, id="missing"),
        pytest.param([None, 5], False, id="new"),
    ],
)
def test_a_list_with_a_lower_number_than_before_is_refused(
    pki: RevocablePKI, numbers: list[int | None], refused: bool
) -> None:
    one = shard_of(source_of(pki))
    for place, number in enumerate(numbers):
        pki.publish("/1.crl", number=number, last_update=NOW - 3 * DAY, next_update=NOW + (3 + place) * DAY)
        disk._path(one.source).unlink(missing_ok=True)
        obtain(now_due(one))
    assert one.current is not None
    assert one.current.next_update == NOW + (3 if refused else 4) * DAY
    assert bool(one.state.failures) is refused
    assert ("an earlier one had 5" in one.state.failure) is refused


def test_an_older_list_of_a_ca_that_does_not_number_them_is_refused_also_from_the_disk(pki: RevocablePKI) -> None:
    leaf, one = pki.leaf(), shard_of(source_of(pki))
    pki.publish("/1.crl", number=None, last_update=NOW - 3 * DAY)
    obtain(one)
    older = disk.load(one.source)
    assert older is not None
    pki.publish("/1.crl", leaf, number=None, last_update=NOW - 2 * DAY)
    disk._path(one.source).unlink()
    obtain(now_due(one))
    for provide in (disk.store, lambda source, _: disk._path(source).unlink()):
        provide(one.source, older.der)
        pki.lists.bodies["/1.crl"] = older.der
        obtain(now_due(one))
        assert one.state.failure == "is older than an earlier one"
        assert one.current is not None
        assert leaf.certificate.serial_number in one.current


def test_a_decreasing_number_is_noticed_across_a_restart(
    pki: RevocablePKI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki.publish("/1.crl", number=5, last_update=NOW - 20 * DAY)
    one = obtain(shard_of(source_of(pki)))
    os.utime(disk._path(one.source), (0, 1.0))  # time to renew
    forget_everything(tmp_path, monkeypatch)
    pki.publish("/1.crl", number=4)
    one = obtain(shard_of(source_of(pki)))
    assert one.current is not None
    assert one.current.number == 5
    assert "an earlier one had 5" in one.state.failure


def test_an_expired_list_is_no_list(pki: RevocablePKI) -> None:
    pki.publish("/1.crl")
    one = obtain(shard_of(source_of(pki)))
    assert one.current is not None
    disk._path(one.source).unlink()
    let_expire(one)
    assert one.current is None
    assert one.next_refresh() == 0
    pki.publish("/1.crl", next_update=NOW)
    obtain(one)
    assert one.state.failure.startswith("expired at")
    assert one.current is None


@given(
    begin=st.floats(0, 1e9),
    life=st.floats(1, 1e8),
    age=st.floats(0, 1),
    jitter=st.floats(0, 1),
)
def test_a_list_is_renewed_in_the_second_half_of_its_life(begin: float, life: float, age: float, jitter: float) -> None:
    fetched_at = begin + age * life
    due = renewal(begin, begin + life, fetched_at=fetched_at, jitter=jitter)
    assert due >= fetched_at
    if due > fetched_at + 1.001:  # else the rest of its life is short
        assert begin + 0.49 * life <= due <= begin + life + 1
    if age < 0.49:
        assert due <= begin + 0.61 * life + 1


def test_a_list_of_certificates_of_cas_is_looked_at_daily(pki: RevocablePKI) -> None:
    source = Source(pki.lists.url("/root.crl"), pki.root.der, for_cas=True, must_name_url=False)
    pki.publish_root(next_update=NOW + 300 * DAY)
    one = obtain(shard_of(source))
    assert 86_300 < one.state.renew_at - time.time() <= 86_400


def test_lists_that_nothing_needs_are_forgotten(pki: RevocablePKI) -> None:
    needed = shard_of(source_of(pki, "/needed.crl"))
    for number in range(50):
        shard_of(source_of(pki, f"/{number}.crl"))
    assert [*shard._shards.values()] == [needed]
    assert shard_of(source_of(pki, "/needed.crl")) is needed


def test_a_thread_that_cannot_be_started_is_a_failure(pki: RevocablePKI, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    one = obtain(shard_of(source_of(pki)))
    assert (one.is_busy, one.state.failure) == (False, "can't start new thread")


PROCESS = """
import sys, threading, time
from neon_async._wire.revocation.lists import Source
from neon_async._wire.revocation.shard import shard_of
url, issuer = sys.argv[1:]
one = shard_of(Source(url, bytes.fromhex(issuer), for_cas=False, must_name_url=True))
ended = threading.Event()
one.listeners.add(ended.set)
print("ready", flush=True)
sys.stdin.readline()
one.refresh()
ended.wait()
print(one.current.entries, one.state.failure)
"""


def test_two_processes_at_once_both_get_the_whole_list(pki: RevocablePKI) -> None:
    pki.publish("/1.crl", *range(1, 2000))
    command = [sys.executable, "-c", PROCESS, pki.lists.url("/1.crl"), pki.issuer.der.hex()]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    shown = [process.communicate(timeout=HANG)[0].strip() for process in processes]
    assert shown == ["1999", "1999"]
    assert 1 <= len(pki.lists.requests) <= 2
    third = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=HANG, check=True)
    assert third.stdout.split() == ["ready", "1999"]
    assert len(pki.lists.requests) <= 2  # a later worker fetches nothing
