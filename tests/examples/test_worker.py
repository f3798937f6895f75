"""The example worker, as processes of its own, does each job once, whatever happens to it and to its database."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.probes import HANG, connected, until

from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "worker"


class Queue:
    """The queue of the example in a database, and the workers that were started for it."""

    def __init__(self, server: LocalPostgres, admin: Any, folder: Path) -> None:
        self.endpoint: LocalEndpoint
        self.admin = admin
        self._anchor = folder / "root.pem"
        self._anchor.write_bytes(server.trust_anchor)
        self._workers: list[asyncio.subprocess.Process] = []

    async def start(self, *, drain: float = HANG) -> asyncio.subprocess.Process:
        """Start a worker and wait until it listens."""
        dsn = f"{self.endpoint.dsn}&sslmode=require&channel_binding=require&application_name=worker"
        variables = {"DATABASE_URL": dsn, "DATABASE_TRUST_ANCHOR": str(self._anchor), "WORKER_DRAIN": str(drain)}
        listening = await self._listening()
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", EXAMPLE / "worker.py"),
            env=os.environ | variables,
            stderr=asyncio.subprocess.PIPE,
        )
        self._workers.append(worker)
        await self.until("SELECT count(*) > $1 FROM pg_stat_activity WHERE query LIKE 'LISTEN %'", listening)
        return worker

    async def _listening(self) -> int:
        count: int = await self.admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'")
        return count

    async def add(self, *payloads: Mapping[str, object]) -> None:
        """Add jobs, in one transaction."""
        texts = [json.dumps(payload) for payload in payloads]
        await self.admin.execute("INSERT INTO jobs (payload) SELECT unnest($1::text[])::jsonb", texts)

    async def written(self) -> list[int]:
        """Return the numbers of the orders that have an invoice, one for each invoice."""
        return [row[0] for row in await self.admin.fetch("SELECT order_id FROM invoices ORDER BY order_id")]

    async def until(self, query: str, *values: object) -> None:
        """Wait until `query` returns true."""
        async with asyncio.timeout(3 * HANG):
            while not await self.admin.fetchval(query, *values):
                await asyncio.sleep(0.02)

    async def until_finished(self) -> None:
        """Wait until no job is left."""
        await self.until("SELECT NOT EXISTS (SELECT FROM jobs WHERE finished_at IS NULL)")

    async def until_claimed(self, count: int = 1) -> None:
        """Wait until so many jobs are locked."""
        # A job that is locked is one that a claim would skip.
        await self.until(
            "SELECT (SELECT count(*) FROM jobs WHERE finished_at IS NULL) - count(*) >= $1 "
            "FROM (SELECT FROM jobs WHERE finished_at IS NULL FOR SHARE SKIP LOCKED) AS free",
            count,
        )

    async def stop(self, worker: asyncio.subprocess.Process) -> str:
        """Send SIGTERM and return the log of the worker, which ends without an error."""
        worker.send_signal(signal.SIGTERM)
        return await ended(worker)

    async def kill(self) -> None:
        """Kill the workers that a failed test has left."""
        for worker in self._workers:
            if worker.returncode is None:
                worker.kill()
                await worker.communicate()


async def ended(worker: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(2 * HANG):
        _, log = await worker.communicate()
    assert worker.returncode == 0, log.decode()
    return log.decode()


@pytest.fixture
async def queue(postgres: LocalPostgres, tmp_path: Path) -> AsyncIterator[Queue]:
    async with connected(postgres) as admin:
        await admin.execute("DROP TABLE IF EXISTS jobs, invoices; DROP FUNCTION IF EXISTS announce_jobs")
        await admin.execute((EXAMPLE / "schema.sql").read_text())
        queue = Queue(postgres, admin, tmp_path)
        async with LocalEndpoint(postgres, wake_time=0.1) as queue.endpoint:
            try:
                yield queue
            finally:
                await queue.kill()
        await admin.execute("DROP TABLE jobs, invoices; DROP FUNCTION announce_jobs")


async def test_idle_workers_let_the_database_sleep_and_a_notification_wakes_them(
    queue: Queue, postgres: LocalPostgres
) -> None:
    # Longer than the pause between two looks, so that workers that look without a reason keep it awake.
    async with LocalEndpoint(postgres, wake_time=0.1, suspend_after=2) as queue.endpoint:
        worker = await queue.start()
        await queue.add({"order_id": 1})
        await queue.until_finished()
        await until(lambda: queue.endpoint.wakes)  # it was suspended, and the worker listens again
        await queue.add({"order_id": 2}, {"order_id": 3})
        await queue.until_finished()
        assert await queue.written() == [1, 2, 3]
        await queue.stop(worker)


async def freeze(endpoint: LocalEndpoint) -> None:
    endpoint.freeze()
    await asyncio.sleep(0.5)
    endpoint.thaw()


async def refuse(endpoint: LocalEndpoint) -> None:
    endpoint.refuse()
    endpoint.cut()
    await asyncio.sleep(0.5)
    endpoint.accept()


async def suspend(endpoint: LocalEndpoint) -> None:
    endpoint.suspend()


async def cut(endpoint: LocalEndpoint) -> None:
    endpoint.cut()


async def test_no_job_is_lost_or_repeated_while_the_endpoint_fails(queue: Queue) -> None:
    workers = [await queue.start() for _ in range(2)]
    orders = iter(range(10_000))
    for fault in (cut, suspend, freeze, refuse, cut, suspend, cut, freeze, cut, refuse):
        began = len(await queue.written())
        await queue.add(*({"order_id": next(orders), "seconds": 0.01} for _ in range(25)))
        # Wherever the fault hits: workers are in the middle of jobs.
        await queue.until("SELECT count(*) > $1 FROM invoices", began)
        await fault(queue.endpoint)
    await queue.until_finished()
    logs = [await queue.stop(worker) for worker in workers]
    assert await queue.written() == list(range(next(orders))), logs
    assert await queue.admin.fetchval("SELECT count(*) FROM jobs WHERE attempts > 0") == 0, logs


async def test_sigterm_lets_the_running_jobs_finish_and_no_other_begin(queue: Queue) -> None:
    worker = await queue.start()
    await queue.add(*({"order_id": number, "seconds": 1} for number in range(8)))
    await queue.until_claimed(4)
    await queue.stop(worker)
    assert await queue.written() == [0, 1, 2, 3]
    assert await queue.admin.fetchval("SELECT count(*) FROM jobs WHERE finished_at IS NULL") == 4


@pytest.mark.parametrize("fault", [None, LocalEndpoint.freeze, LocalEndpoint.refuse], ids=["awake", "frozen", "gone"])
async def test_a_job_that_outlasts_the_deadline_of_the_drain_is_left_to_another_worker(
    fault: Callable[[LocalEndpoint], None] | None, queue: Queue
) -> None:
    worker = await queue.start(drain=0.2)
    await queue.add({"order_id": 1, "seconds": 10 * HANG})
    await queue.until_claimed()
    if fault is not None:
        fault(queue.endpoint)
    log = await queue.stop(worker)
    assert "not finished within 0.2 s: " in log
    queue.endpoint.thaw()
    queue.endpoint.accept()
    await queue.until("SELECT true FROM jobs WHERE finished_at IS NULL FOR UPDATE SKIP LOCKED")
    await queue.admin.execute("UPDATE jobs SET payload = payload - 'seconds'")
    other = await queue.start()
    await queue.until_finished()
    assert await queue.written() == [1]
    await queue.stop(other)


async def test_the_job_of_a_killed_worker_is_done_by_another_one(queue: Queue) -> None:
    victim = await queue.start()
    await queue.add({"order_id": 1, "seconds": 3})
    await queue.until_claimed()
    survivor = await queue.start()
    victim.kill()
    await victim.communicate()
    await queue.until_finished()
    assert await queue.written() == [1]
    await queue.stop(survivor)


async def test_a_job_that_fails_is_tried_again_later_and_keeps_nothing(queue: Queue) -> None:
    worker = await queue.start()
    await queue.add({"seconds": 0}, {"order_id": 2})
    await queue.until("SELECT attempts = 2 FROM jobs WHERE error = 'KeyError(''order_id'')'")
    assert await queue.written() == [2]
    await queue.admin.execute("""UPDATE jobs SET payload = '{"order_id": 1}' WHERE finished_at IS NULL""")
    await queue.until_finished()
    assert await queue.written() == [1, 2]
    assert "job 1 failed" in await queue.stop(worker)


async def test_a_job_that_always_fails_is_given_up(queue: Queue) -> None:
    worker = await queue.start()
    await queue.admin.execute("INSERT INTO jobs (payload, attempts) VALUES ('{}', 4)")
    await queue.until_finished()
    assert await queue.admin.fetchval("SELECT attempts FROM jobs") == 5
    await queue.stop(worker)


async def test_an_error_that_does_not_pass_ends_the_worker(queue: Queue) -> None:
    worker = await queue.start()
    await queue.admin.execute("ALTER TABLE jobs RENAME COLUMN payload TO body")
    await queue.admin.execute("NOTIFY jobs")
    _, log = await worker.communicate()
    assert worker.returncode == 1
    assert 'column "payload" does not exist' in log.decode()
