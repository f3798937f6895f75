"""A short run of `support.chaos`, and a test of each fault that longer runs have found.

The docstring of `support.chaos` shows how to run it for longer.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest
from support import chaos
from support.certificates import issue
from support.logins import PLAIN, honest_login
from support.probes import HANG, ResetInBackground, assert_balanced, make_pool, until

import neon_async
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import Conversation, Impostor, error_response, message, server_context

pytestmark = pytest.mark.anyio

ROOT = issue(subject="root", ca=True)


async def test_chaos_loses_no_write_no_slot_and_no_task(postgres: LocalPostgres) -> None:
    seed = secrets.randbelow(1_000_000)
    print(f"chaos seed {seed}")  # noqa: T201  pytest shows it when the test fails
    report = await chaos.run(postgres, seconds=6.0, seed=seed)
    assert not report.problems, str(report)
    # The run was not idle: some writes were acknowledged, some were lost, and some were retried.
    assert report.fates["acknowledged"] > 0, str(report)
    assert report.fates["unknown"] > 0, str(report)
    assert report.stats is not None
    assert report.stats.retries > 0, str(report)
    assert report.stats.terminations > 0, str(report)


# ---------------------------------------------------------------------------------------------------------------------
# Faults that chaos has found


async def test_work_is_retried_if_its_connection_ends_between_two_statements() -> None:
    """asyncpg reads the server's last message while no statement runs, and then refuses every statement.

    The end of the stream arrives a moment later or, if the network fails, never.
    """
    leaf = issue(ROOT)
    context = server_context(b"".join((leaf.key_pem, leaf.pem)))
    last_message = error_response("terminating connection due to administrator command", code="57P01")

    def serve(conversation: Conversation) -> None:
        first = impostor.connections == 1
        conversation.accept_tls(context)
        conversation.read_startup()
        honest_login(impostor.password, offer=[PLAIN])(conversation)
        for tag, status in ((b"BEGIN", b"T"), (b"SELECT 1", b"T"), (b"SELECT 2", b"T"), (b"COMMIT", b"I")):
            conversation.read_message()
            answer = message(b"C", tag + b"\0") + message(b"Z", status)
            conversation.send(answer + last_message if first and tag == b"SELECT 1" else answer)

    async def work(connection: neon_async.Connection) -> str:
        await connection.execute("SELECT 1")
        return await connection.execute("SELECT 2")

    async with Impostor(serve) as impostor, asyncio.timeout(HANG):
        async with neon_async.create_pool(impostor.dsn, trust_anchor=ROOT.pem) as pool:
            assert await pool.run_transaction(work) == "SELECT 2"
            pool.terminate()
        assert impostor.connections == 2


async def test_work_is_retried_if_its_connection_ends_with_the_answer_to_begin() -> None:
    """Its first statement has been sent with BEGIN, and the server does not run it."""
    leaf = issue(ROOT)
    context = server_context(b"".join((leaf.key_pem, leaf.pem)))
    last_message = error_response("terminating connection due to administrator command", code="57P01")

    def serve(conversation: Conversation) -> None:
        first = impostor.connections == 1
        conversation.accept_tls(context)
        conversation.read_startup()
        honest_login(impostor.password, offer=[PLAIN])(conversation)
        assert [conversation.read_message() for _ in range(2)] == [(b"Q", b"BEGIN\0"), (b"Q", b"SELECT 1\0")]
        conversation.send(message(b"C", b"BEGIN\0") + message(b"Z", b"T"))
        if first:
            conversation.send(last_message)
            conversation.hang_up()
            return
        conversation.send(message(b"C", b"SELECT 1\0") + message(b"Z", b"T"))
        conversation.read_message()
        conversation.send(message(b"C", b"COMMIT\0") + message(b"Z", b"I"))

    async def work(connection: neon_async.Connection) -> str:
        return await connection.execute("SELECT 1")

    async with Impostor(serve) as impostor, asyncio.timeout(HANG):
        async with neon_async.create_pool(impostor.dsn, trust_anchor=ROOT.pem) as pool:
            assert await pool.run_transaction(work) == "SELECT 1"
            pool.terminate()
        assert impostor.connections == 2


async def test_a_connection_that_expires_during_the_hand_over_is_not_lent(postgres: LocalPostgres) -> None:
    """Its replacement is dialed in the background, counted, and reset after use."""
    async with (
        neon_async.create_pool(postgres.dsn, trust_anchor=postgres.trust_anchor, max_size=1) as pool,
        asyncio.timeout(HANG),
    ):
        first = await pool.acquire()
        expired = first.get_server_pid()
        waiter = asyncio.ensure_future(pool.acquire())
        await until(lambda: pool.stats().waiting == 1)
        await pool.release(first)
        await pool.expire_connections()
        connection = await waiter
        assert connection.get_server_pid() != expired
        await connection.execute("SET search_path TO pg_catalog")
        await pool.release(connection)
        assert await pool.fetchval("SHOW search_path") == '"$user", public'
        assert_balanced(pool)
        assert (pool.stats().dials, pool.stats().resets) == (2, 1)


async def test_a_release_does_not_raise_if_the_connection_ends_before_its_reset_starts(
    postgres: LocalPostgres,
) -> None:
    """The slot serves its next caller by then, and the late reset does not touch it."""
    async with (
        make_pool(postgres, max_size=1, connection_class=ResetInBackground) as pool,
        asyncio.timeout(HANG),
    ):
        connection: Any = await pool.acquire()
        await connection.execute("SET search_path TO pg_catalog")
        lent = connection._con
        waiter = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().waiting == 1)
        releasing = asyncio.ensure_future(pool.release(connection))
        await asyncio.sleep(0)
        assert pool.stats().resetting == 1
        lent.terminate()
        await releasing  # asyncpg's pool does not raise either
        assert await waiter == 1
        assert_balanced(pool)
