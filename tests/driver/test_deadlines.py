"""A dial ends at its deadline or with its cancellation, whatever the step, and leaves nothing open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.certificates import revocation_list
from support.handshakes import ROOT, serve
from support.probes import HANG, assert_secret_free, black_hole, nothing_is_left, open_sockets, slow_resolver, until

import neon_async
from neon_async._driver.loop import LoopAdapter
from neon_async._wire import dial
from neon_async._wire.dial import context_for
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Conversation, Impostor, authentication_request, login

pytestmark = pytest.mark.anyio

CONTEXT = serve()
NAME = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
SECRET = "s3cret-of-alex"
OFFER = authentication_request(10, b"SCRAM-SHA-256\0\0")


def silent(conversation: Conversation) -> None:
    """Send nothing, and keep reading."""


async def never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


# A stalled dial: its DSN, its keywords, and whether it has reached the stalled step.
Stalled = tuple[str, dict[str, Any], Callable[[], object]]


@contextlib.asynccontextmanager
async def stalled_password(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    asked = []

    async def password() -> str:
        asked.append(1)
        return await never()

    yield f"postgresql://alex@{NAME}/neondb?hostaddr=127.0.0.1", {"password": password}, lambda: asked


@contextlib.asynccontextmanager
async def stalled_dns(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    with slow_resolver(patch) as asked:
        yield f"postgresql://alex:{SECRET}@{NAME}/neondb", {}, lambda: asked


@contextlib.asynccontextmanager
async def stalled_tcp(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    with black_hole() as port:
        before = open_sockets()
        dsn = f"postgresql://alex:{SECRET}@{NAME}:{port}/neondb?hostaddr=127.0.0.1"
        yield dsn, {}, lambda: open_sockets() - before


@contextlib.asynccontextmanager
async def stalled_at(
    script: Any, received: Callable[[Conversation], object], **keywords: Any
) -> AsyncIterator[Stalled]:
    async with Impostor(script) as impostor:
        dsn = impostor.dsn.replace(impostor.password, SECRET)
        yield dsn, keywords, lambda: impostor.conversations and received(impostor.conversations[-1])


def stalled_direct_tls(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(silent, lambda one: one.wire)


def stalled_ssl_request(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(silent, lambda one: one.wire, sslnegotiation="postgres")


def stalled_handshake_after_ssl_request(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    def consent(conversation: Conversation) -> None:
        conversation.opens_with_tls()
        conversation.send(b"S")

    return stalled_at(consent, lambda one: len(one.wire) > 8, sslnegotiation="postgres")


def stalled_authentication(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(login(CONTEXT), lambda one: one.decrypted)


def stalled_scram(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return stalled_at(login(CONTEXT, OFFER), lambda one: b"SCRAM-SHA-256" in one.decrypted)


@contextlib.asynccontextmanager
async def stalled_crl(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Stalled]:
    """The disk with the CRL file is slow: the thread that reads it is blocked."""
    path = folder / "crl.pem"
    path.write_bytes(revocation_list(ROOT))
    reading, released = threading.Event(), threading.Event()

    def read_slowly(*args: Any, **keywords: Any) -> ssl.SSLContext:
        reading.set()
        released.wait(HANG)
        return context_for(*args, **keywords)

    async with Impostor(silent) as impostor:
        patch.setattr(dial, "context_for", read_slowly)
        try:
            yield impostor.dsn, {"sslcrl": str(path)}, reading.is_set
        finally:
            released.set()


STEPS: list[Any] = [
    pytest.param(stalled_password, "the password function had not returned", id="password"),
    pytest.param(stalled_dns, "name had not been resolved", id="DNS"),
    pytest.param(stalled_tcp, "no address had accepted a connection", id="TCP"),
    pytest.param(stalled_direct_tls, "TLS handshake had not finished", id="direct TLS"),
    pytest.param(stalled_ssl_request, "TLS handshake had not finished", id="SSLRequest"),
    pytest.param(stalled_handshake_after_ssl_request, "TLS handshake had not finished", id="TLS after SSLRequest"),
    pytest.param(stalled_crl, "TLS handshake had not finished", id="reading the CRL"),
    pytest.param(stalled_authentication, "authentication had not finished", id="authentication"),
    pytest.param(stalled_scram, "authentication had not finished", id="in the middle of SCRAM"),
]


@pytest.mark.parametrize(("stall", "reason"), STEPS)
async def test_a_stalled_dial_ends_at_its_deadline_and_names_the_step(
    stall: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stall(tmp_path, monkeypatch) as (dsn, keywords, _), asyncio.timeout(HANG), nothing_is_left():
        with pytest.raises(neon_async.ConnectTimeoutError, match=reason) as caught:
            await neon_async.connect(dsn, trust_anchor=ROOT.pem, connect_timeout=0.3, **keywords)
    assert f"{NAME} was not ready within connect_timeout=0.3 s" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert_secret_free(caught.value, SECRET)


@pytest.mark.parametrize(("stall", "reason"), STEPS)
async def test_a_cancelled_dial_raises_cancelled_error_and_leaves_nothing_open(
    stall: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stall(tmp_path, monkeypatch) as (dsn, keywords, is_there), asyncio.timeout(HANG), nothing_is_left():
        task = asyncio.ensure_future(neon_async.connect(dsn, trust_anchor=ROOT.pem, **keywords))
        await until(is_there)
        task.cancel("by the test")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert task.cancelled()
        del task
    assert_secret_free(caught.value.with_traceback(None), SECRET)


@pytest.mark.parametrize("rounds", range(0, 40, 3))
async def test_a_dial_that_is_cancelled_at_any_moment_leaves_nothing_open(postgres: LocalPostgres, rounds: int) -> None:
    """Cancelled after a number of iterations of the event loop: early, late, or just after the end."""
    async with nothing_is_left():
        task = asyncio.ensure_future(neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor))
        for _ in range(rounds):
            await asyncio.sleep(0 if rounds % 2 else 0.0002)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).terminate()
        del task


async def test_a_refused_server_leaves_nothing_open(postgres: LocalPostgres) -> None:
    async with nothing_is_left():
        with pytest.raises(neon_async.CertificateError):
            await neon_async.connect(postgres.dsn, trust_anchor=ROOT.pem)
        with pytest.raises(neon_async.InvalidPasswordError):
            await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password="wrong")


async def test_the_callers_own_deadline_raises_the_callers_own_timeout(postgres: LocalPostgres) -> None:
    async with Impostor(silent) as impostor:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.2):
                await neon_async.connect(impostor.dsn, trust_anchor=ROOT.pem)
    assert not isinstance(caught.value, neon_async.NeonAsyncError)


async def test_a_name_that_does_not_exist_is_a_connect_error() -> None:
    # RFC 6761, section 6.4: no name under "invalid" exists.
    with pytest.raises(neon_async.ConnectError, match=r"The name db\.invalid cannot be resolved") as caught:
        await neon_async.connect(f"postgresql://alex:{SECRET}@db.invalid/neondb", trust_anchor=ROOT.pem)
    assert_secret_free(caught.value, SECRET)


async def test_a_failed_connect_leaves_nothing_for_the_garbage_collector(postgres: LocalPostgres) -> None:
    def adapters() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if isinstance(thing, LoopAdapter)}

    gc.collect()
    gc.disable()
    try:
        before = adapters()
        with pytest.raises(neon_async.InvalidPasswordError):
            await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password="wrong")
        await asyncio.sleep(0)
        assert adapters() <= before
    finally:
        gc.enable()
