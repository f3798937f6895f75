"""What is remembered about a chain: a check of a known chain costs next to nothing, and never uses what has changed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.certificates import DAY, NOW, Entity, issue
from support.crls import RevocablePKI
from support.probes import HANG, until
from support.revocations import let_expire, shard_on

import neon_async
from neon_async._wire.chain import Chain
from neon_async._wire.revocation import check, disk, shard
from neon_async._wire.revocation.lists import RevocationList, Source, _digest
from neon_async._wire.revocation.report import RevocationReport
from neon_async._wire.revocation.shard import Shard, State

MODES = pytest.mark.parametrize("mode", ["advise", "require"])
HOUR = 3600.0

_ISSUER = issue(subject="issuer", ca=True)
FACTS = tuple(
    check.Facts(
        number,
        Source(f"http://127.0.0.1{path}", _ISSUER.der, for_cas=False, must_name_url=False),
        RevocationReport("pending", list_url=path),
    )
    for number, path in enumerate(["/1.crl", "/root.crl"], start=1)
)


def chain_of(pki: RevocablePKI, leaf: Entity) -> Chain:
    verified = (leaf.der, pki.issuer.der, pki.root.der)
    return Chain(verified[:2], verified)


async def judge(chain: Chain, mode: str = "require") -> check.ChainCheck:
    return await check.Checker(mode, "db.example.com").judge(chain, lambda: None)


def judge_at_once(chain: Chain, mode: str = "require") -> check.ChainCheck:
    """Return a check that waits for nothing; one that would wait fails the test."""

    def waits() -> None:
        raise AssertionError("it waits for a list")

    judging = check.Checker(mode, "db.example.com").judge(chain, waits)
    try:
        judging.send(None)
    except StopIteration as ended:
        found: check.ChainCheck = ended.value
        return found
    judging.close()
    raise AssertionError("it went through the event loop")


@pytest.mark.anyio
@MODES
async def test_a_known_chain_is_judged_at_once_and_starts_nothing(
    pki: RevocablePKI, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chain_of(pki, pki.leaf())
    first = await judge(chain)
    requests, verdict = [*pki.lists.requests], first._chain.verdict()
    monkeypatch.setattr(threading, "Thread", None)
    for _ in range(3):
        again = judge_at_once(Chain(chain.served, tuple(bytes(bytearray(each)) for each in chain.verified)), mode)
        assert again._chain is first._chain
        assert again._chain.verdict() is verdict  # it was not worked out again
    assert pki.lists.requests == requests


@pytest.mark.anyio
@MODES
async def test_a_chain_of_which_nothing_can_be_known_is_judged_at_once_too(pki: RevocablePKI, mode: str) -> None:
    chain = chain_of(pki, pki.leaf(None))
    with contextlib.suppress(neon_async.RevocationUnknownError):
        await judge(chain)  # that of its issuer can be
    for _ in range(3):
        if mode == "require":
            with pytest.raises(neon_async.RevocationUnknownError, match="names no list"):
                judge_at_once(chain, mode)
        else:
            judge_at_once(chain, mode)


def publish_leaf(pki: RevocablePKI, leaf: Entity) -> Shard:
    pki.publish("/1.crl", leaf)
    return shard_on(pki)


def publish_issuer(pki: RevocablePKI, _: Entity) -> Shard:
    pki.publish_root(pki.issuer)
    return shard_on(pki, "/root.crl")


@pytest.mark.anyio
@MODES
@pytest.mark.parametrize(
    "publish", [pytest.param(publish_leaf, id="of the leaf"), pytest.param(publish_issuer, id="of the issuer")]
)
async def test_a_new_list_counts_from_the_moment_it_is_there(
    pki: RevocablePKI, mode: str, publish: Callable[[RevocablePKI, Entity], Shard]
) -> None:
    leaf = pki.leaf()
    chain = chain_of(pki, leaf)
    known = await judge(chain)
    one = publish(pki, leaf)
    disk._path(one.source).unlink()
    one.state = one.state._replace(renew_at=0.0)
    judge_at_once(chain, mode)  # good, by the list that is there; the next one is being obtained
    await until(lambda: not one.is_busy)
    with pytest.raises(neon_async.CertificateRevokedError):
        judge_at_once(chain, mode)
    with pytest.raises(neon_async.CertificateRevokedError):
        known.require_good()  # as a connect does after its login


@pytest.mark.anyio
@MODES
@pytest.mark.parametrize(
    "path", [pytest.param("/1.crl", id="of the leaf"), pytest.param("/root.crl", id="of the issuer")]
)
async def test_a_list_that_expires_counts_no_more(pki: RevocablePKI, mode: str, path: str) -> None:
    chain = chain_of(pki, pki.leaf())
    known = await judge(chain)
    one = shard_on(pki, path)
    let_expire(one, after=0.2)
    one.state = one.state._replace(failures=1, retry_at=time.monotonic() + HANG)
    assert known._chain.verdict().unknown is None
    await until(lambda: one.current is None)
    if mode == "require":
        with pytest.raises(neon_async.RevocationUnknownError):
            judge_at_once(chain, mode)
    else:
        judge_at_once(chain, mode)


@pytest.mark.anyio
async def test_a_clock_that_was_wrong_for_a_moment_decides_nothing_for_later(
    pki: RevocablePKI, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chain_of(pki, pki.leaf())
    known = await judge(chain)
    later = time.time() + 365 * 24 * HOUR
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: later)
        with pytest.raises(neon_async.RevocationUnknownError):
            known.require_good()
    judge_at_once(chain)


@pytest.mark.anyio
async def test_each_mode_judges_a_chain_that_the_other_knows(pki: RevocablePKI) -> None:
    leaf = pki.leaf()
    chain = chain_of(pki, leaf)
    del pki.lists.bodies["/1.crl"]
    for _ in range(2):
        with pytest.raises(neon_async.RevocationUnknownError):
            await judge(chain)
        assert judge_at_once(chain, "advise").report().status == "unknown"


FORK = """
import asyncio, os, sys
from neon_async._wire.chain import Chain
from neon_async._wire.revocation import check, shard
verified = tuple(bytes.fromhex(each) for each in sys.argv[1:])
judge = lambda: check.Checker("require", "db.example.com").judge(Chain(verified, verified), lambda: None)
known = asyncio.run(judge())
for one in known.shards:  # threads that the child does not have are at work
    one.state = one.state._replace(current=None, is_busy=True)
    one._lock.acquire()
shard._shards_lock.acquire()
child = os.fork()
if not child:
    again = asyncio.run(asyncio.wait_for(judge(), 10))
    os._exit(0 if again.report().status == "good" and not set(again.shards) & set(known.shards) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.anyio
async def test_a_forked_process_does_not_wait_for_the_threads_of_its_parent(pki: RevocablePKI) -> None:
    chain = chain_of(pki, pki.leaf())
    command = [sys.executable, "-c", FORK, *(each.hex() for each in chain.verified)]
    finished = await anyio.run_process(command, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.anyio
async def test_only_the_chains_of_a_few_servers_are_remembered(pki: RevocablePKI) -> None:
    needed = check.known(chain_of(pki, pki.leaf("/needed.crl")).verified)
    for number in range(40):
        check.known((f"{number}".encode(), *chain_of(pki, pki.leaf(f"/{number % 2}.crl")).verified[1:]))
    assert check.known.cache_info().currsize == 16
    assert shard_on(pki, "/needed.crl") is needed.shards[0]
    del needed
    assert [each.source.url for each in shard._shards.values()] == [pki.lists.url("/root.crl")]


# ---------------------------------------------------------------------------------------------------------------------
# Whatever happens to the lists, what is remembered is what would be found anew

LISTED = st.none() | st.tuples(st.booleans(), st.booleans())
STATES = st.tuples(LISTED, st.integers(0, 2), st.booleans())


def state_of(serial_number: int, listed: tuple[bool, bool] | None, failures: int, is_busy: bool) -> State:
    """Return a state whose list, if there is one, is of `serial_number` or empty, and has expired or not."""
    now, current = time.time(), None
    if listed is not None:
        is_revoked, has_expired = listed
        digests = [_digest(serial_number.to_bytes(20)) if is_revoked else b""] * 256
        current = RevocationList(1, NOW - 9 * DAY, NOW - DAY if has_expired else NOW + DAY, digests)
    return State(current, now, now, "fails" if failures else "", failures, is_busy=is_busy)


@settings(max_examples=50)
@given(changes=st.lists(st.tuples(st.sampled_from(["/1.crl", "/root.crl"]), STATES), max_size=8))
def test_what_is_remembered_is_what_would_be_found_anew(changes: list[tuple[str, Any]]) -> None:
    chain = check.KnownChain(FACTS)
    for path, state in changes:
        (place,) = [place for place, each in enumerate(chain.shards) if each.source.url.endswith(path)]
        chain.shards[place].state = state_of(FACTS[place].serial_number, *state)
        remembered = chain.verdict()
        assert remembered == check.KnownChain(FACTS).verdict()
        assert chain.verdict() is remembered
        of_leaf, of_issuer = (each.status for each in remembered.reports)
        assert (remembered.revoked is not None) is ("revoked" in (of_leaf, of_issuer))
        assert (remembered.unknown is not None) is bool({"pending", "unknown"} & {of_leaf, of_issuer})
