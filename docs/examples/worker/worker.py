"""A worker for a queue in PostgreSQL: each job has its effect once, and an idle queue lets the database sleep.

    python worker.py

Set DATABASE_URL to the string of the Neon console. `schema.sql` creates the queue.
"""

import asyncio
import json
import logging
import os
import signal

import neon_async

DATABASE = os.environ["DATABASE_URL"]
TRUST_ANCHOR = os.environ.get("DATABASE_TRUST_ANCHOR")  # of `neon-async dev`; not set in production
CONCURRENCY = 4  # jobs at a time, each on a connection of its own
# Seconds for the jobs that are running when SIGTERM comes; less than the grace period of the platform, which is 10 for
# Docker and 30 for Kubernetes.
DRAIN = float(os.environ.get("WORKER_DRAIN", "8"))
ATTEMPTS = 5  # after so many failures a job stays in the table, with its last error
# Seconds between two looks while jobs are unfinished: a worker that is killed leaves some and announces nothing.
LOOK_AGAIN = 1.0

log = logging.getLogger("worker")


async def handle(connection: neon_async.Connection, payload: dict) -> None:
    """Do the work of one job. Its writes on `connection` are committed together with the end of the job."""
    await asyncio.sleep(payload.get("seconds", 0))
    await connection.execute("INSERT INTO invoices (order_id) VALUES ($1)", payload["order_id"])


# A job that another worker has locked is skipped, so that no worker waits for another.
CLAIM = """
    SELECT id, payload FROM jobs WHERE finished_at IS NULL AND run_at <= now()
    ORDER BY run_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
"""
FINISH = "UPDATE jobs SET finished_at = now() WHERE id = $1"
FAIL = """
    UPDATE jobs SET attempts = attempts + 1, error = $2, run_at = now() + interval '1 second' * 2 ^ attempts,
        finished_at = CASE WHEN attempts + 1 >= $3 THEN now() END
    WHERE id = $1
"""
NEXT = "SELECT extract(epoch FROM min(run_at) - now())::float8 FROM jobs WHERE finished_at IS NULL"


async def work_once(connection: neon_async.Connection) -> bool:
    """Claim a job and do it, in the transaction of the caller. Return whether there was one."""
    job = await connection.fetchrow(CLAIM)
    if job is None:
        return False
    try:
        async with connection.transaction():  # a savepoint: what a failed job wrote is undone
            await handle(connection, json.loads(job["payload"]))
    except Exception as error:
        await connection.execute(FAIL, job["id"], repr(error), ATTEMPTS)  # raises where the connection was lost
        log.exception("job %d failed", job["id"])
    else:
        await connection.execute(FINISH, job["id"])
    return True


class Changes:
    """Tells several tasks that something has changed. Take `next` before you look, so that no change is missed."""

    def __init__(self) -> None:
        self.next = asyncio.Event()

    def announce(self) -> None:
        """Set the event that tasks wait for. What comes later sets the next one."""
        self.next.set()
        self.next = asyncio.Event()


async def follow(changes: Changes) -> None:
    """Announce each notification, and each gap, in which notifications may have been missed."""
    async with neon_async.listen(DATABASE, "jobs", sslmode="verify-full", trust_anchor=TRUST_ANCHOR) as events:
        async for _ in events:
            changes.announce()


async def consume(pool: neon_async.Pool, changes: Changes, stopping: asyncio.Event) -> None:
    """Do one job after another until the worker stops."""
    while not stopping.is_set():
        change, pause = changes.next, LOOK_AGAIN
        try:
            if await pool.run_transaction(work_once):
                continue
            seconds = await pool.fetchval(NEXT)
            pause = None if seconds is None else max(seconds, LOOK_AGAIN)
        except neon_async.CommitUnknownError:
            log.warning("the outcome of a job is unknown: it is either finished or free again")
            continue
        except Exception as error:
            if not neon_async.is_retryable(error):
                raise
            log.warning("the database is unavailable: %s", error)
        try:
            async with asyncio.timeout(pause):
                await change.wait()
        except TimeoutError:
            pass


async def main() -> None:
    """Work until SIGTERM or SIGINT, then finish the jobs that are running, within `DRAIN`."""
    stopping, changes = asyncio.Event(), Changes()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with neon_async.create_pool(
        DATABASE, sslmode="verify-full", trust_anchor=TRUST_ANCHOR, max_size=CONCURRENCY
    ) as pool:
        tasks = [asyncio.create_task(consume(pool, changes, stopping)) for _ in range(CONCURRENCY)]
        stop, listener = asyncio.create_task(stopping.wait()), asyncio.create_task(follow(changes))
        # None of them ends by itself but by an error that does not pass, such as a wrong password.
        await asyncio.wait([stop, listener, *tasks], return_when=asyncio.FIRST_COMPLETED)
        stopping.set()
        changes.announce()
        log.info("draining")
        done, late = await asyncio.wait(tasks, timeout=DRAIN)
        for task in (stop, listener, *late):
            task.cancel()
        if late:  # their jobs are rolled back and free again
            log.warning("not finished within %g s: %d jobs", DRAIN, len(late))
            pool.terminate()
        await asyncio.gather(stop, listener, *late, return_exceptions=True)
        await pool.close(timeout=1)
        for task in (listener, *done):
            if not task.cancelled():
                task.result()
    log.info("stopped")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(main())
