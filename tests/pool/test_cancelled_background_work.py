"""Dials, checks and closes in the background are cancelled at each await, by the end of the pool and from outside.

The waiters get PoolClosedError when the pool ends. They never get the CancelledError of work in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import pytest
from support.certificates import issue
from support.logins import OK, PLAIN, honest_login
from support.probes import HANG, assert_balanced, black_hole, open_sockets, slow_resolver, until
from support.scenes import SILENCE, Scene, cancel, close, once_and_twice, play, start, take_steps

import neon_async
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Conversation, Impostor, server_context

pytestmark = pytest.mark.anyio

ROOT = issue(subject="root", ca=True)

Stage: TypeAlias = Callable[[Scene, pytest.MonkeyPatch], contextlib.AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def in_its_password_function(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(password=scene.password)
    scene.start_waiters()
    await scene.reached.wait()
    yield


@contextlib.asynccontextmanager
async def in_name_resolution(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(dsn=scene.endpoint.dsn.partition("?")[0])
    with slow_resolver(patch) as asked:
        scene.start_waiters()
        await until(lambda: asked)
        yield


@contextlib.asynccontextmanager
async def in_tcp(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    with black_hole() as port:
        await scene.open(dsn=scene.endpoint.dsn.replace(f":{scene.endpoint.port}/", f":{port}/"))
        sockets = open_sockets()
        scene.start_waiters()
        await until(lambda: open_sockets() - sockets)
        yield


@contextlib.asynccontextmanager
async def in_the_ssl_request(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with Impostor(lambda conversation: None) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem, sslnegotiation="postgres")
        scene.start_waiters()
        await until(lambda: impostor.conversations and impostor.conversations[0].wire)
        yield


@contextlib.asynccontextmanager
async def in_the_tls_handshake(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with Impostor(lambda conversation: None) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem)
        scene.start_waiters()
        await until(lambda: impostor.conversations and impostor.conversations[0].wire)
        yield


@contextlib.asynccontextmanager
async def in_authentication(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    leaf = issue(ROOT)
    context = server_context(b"".join((leaf.key_pem, leaf.pem)))

    def fall_silent(conversation: Conversation) -> None:
        conversation.accept_tls(context)
        conversation.read_startup()

    async with Impostor(fall_silent) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem)
        scene.start_waiters()
        await until(lambda: impostor.conversations and impostor.conversations[0].decrypted)
        yield


@contextlib.asynccontextmanager
async def in_the_start_of_the_session(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    leaf = issue(ROOT)
    context = server_context(b"".join((leaf.key_pem, leaf.pem)))
    logged_in = threading.Event()

    def fall_silent(conversation: Conversation) -> None:
        conversation.accept_tls(context)
        conversation.read_startup()
        honest_login(impostor.password, offer=[PLAIN], last=OK)(conversation)
        logged_in.set()

    async with Impostor(fall_silent) as impostor:
        await scene.open(dsn=impostor.dsn, trust_anchor=ROOT.pem)
        scene.start_waiters()
        await until(logged_in.is_set)
        yield


@contextlib.asynccontextmanager
async def in_init(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init=scene.hold)
    scene.start_waiters()
    await scene.reached.wait()
    yield


@contextlib.asynccontextmanager
async def before_its_first_step(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open()
    scene.start_waiters()
    await asyncio.sleep(0)
    assert scene.stats.connecting == 1
    yield


@contextlib.asynccontextmanager
async def checking(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init_size=1, check_after_idle=0)
    scene.endpoint.freeze()
    scene.start_waiters()
    await until(lambda: scene.stats.checking == 1)
    yield


@contextlib.asynccontextmanager
async def about_to_check(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init_size=1, check_after_idle=0)
    scene.start_waiters()
    await asyncio.sleep(0)
    assert scene.stats.checking == 1
    yield


@contextlib.asynccontextmanager
async def closing_an_expired_connection(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(max_size=1, init_size=1)
    await scene.pool.expire_connections()
    scene.endpoint.freeze()
    scene.start_waiters()
    await take_steps(3)
    assert scene.stats.resetting == 1
    yield


@contextlib.asynccontextmanager
async def about_to_close_an_expired_connection(scene: Scene, patch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    await scene.open(init_size=1)
    await scene.pool.expire_connections()
    scene.start_waiters()
    await asyncio.sleep(0)
    assert scene.stats.resetting == 1
    yield


stages = pytest.mark.parametrize(
    "reach",
    [
        pytest.param(in_its_password_function, id="a dial in its password function"),
        pytest.param(in_name_resolution, id="a dial in name resolution"),
        pytest.param(in_tcp, id="a dial in tcp"),
        pytest.param(in_the_ssl_request, id="a dial in the SSLRequest"),
        pytest.param(in_the_tls_handshake, id="a dial in the tls handshake"),
        pytest.param(in_authentication, id="a dial in authentication"),
        pytest.param(in_the_start_of_the_session, id="a dial in the start of the session"),
        pytest.param(in_init, id="a dial in init"),
        pytest.param(before_its_first_step, id="a dial before its first step"),
        pytest.param(checking, id="a check"),
        pytest.param(about_to_check, id="a check before its first step"),
        pytest.param(closing_an_expired_connection, id="the close of an expired connection"),
        pytest.param(
            about_to_close_an_expired_connection, id="the close of an expired connection before its first step"
        ),
    ],
)


@pytest.mark.parametrize("end", ["close", "terminate", "terminate during close"])
@stages
async def test_the_end_of_the_pool_ends(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, reach: Stage, end: str
) -> None:
    async with play(postgres) as scene:
        async with reach(scene, monkeypatch), asyncio.timeout(HANG):
            if reach is closing_an_expired_connection and end == "close":
                scene.endpoint.thaw()  # a close waits for the answer of the server
            await end_pool(scene, end)
            for failure in await asyncio.gather(*scene.waiting, return_exceptions=True):
                assert isinstance(failure, neon_async.PoolClosedError), failure
            scene.waiting.clear()
            await until(lambda: scene.stats.vacant == scene.stats.max_size)
        await scene.resume()


async def end_pool(scene: Scene, how: str) -> None:
    if how == "close":
        await close(scene)
    elif how == "terminate":
        scene.pool.terminate()
    else:
        closing = start(scene.pool.close(timeout=SILENCE))
        await take_steps(2)  # the close has cancelled the dials and checks, and they have run since
        scene.pool.terminate()
        await closing


@once_and_twice
@stages
async def test_the_pool_dials_again_for_its_waiters_when_the_event_loop_cancels(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, reach: Stage, times: int
) -> None:
    """As `asyncio.run()` does at its end: work of the pool in the background is cancelled without the pool."""
    async with play(postgres) as scene:
        async with reach(scene, monkeypatch), asyncio.timeout(HANG):
            size = scene.stats.size
            await asyncio.gather(*(cancel(work, times) for work in scene.background))
            assert scene.stats.terminations == size  # no connection is used whose check or close did not end
            await until(lambda: scene.stats.connecting or scene.stats.in_use)
            assert_balanced(scene.pool)
            scene.pool.terminate()
            for outcome in await asyncio.gather(*scene.waiting, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    assert isinstance(outcome, neon_async.PoolClosedError), outcome
            scene.waiting.clear()
            await until(lambda: scene.stats.vacant == scene.stats.max_size)
        await scene.resume()
