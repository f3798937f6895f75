"""Measure what the clients of a web service see of faults of its database: ours beside asyncpg, in FastAPI and aiohttp.

    python -m pip install -e '.[dev]'
    python benchmarks/services.py [--rounds 1] [--only fastapi_ours] [--json FILE]

Each service is a process of its own, FastAPI under uvicorn with two workers and aiohttp with one, on a PostgreSQL after
a relay, over verified TLS. 200 clients send one request per second each, and newcomers one request each, 20 per second.
A request writes one row in a transaction. Meanwhile the relay suspends, cuts every connection four times, freezes for
2 s and refuses connects for 3 s. Then 20 clients disconnect in the middle of a request, and SIGTERM ends the service
under load. Last, an idle service is probed every second in front of an endpoint that suspends after 2 s.

The time until there is service again is measured with the requests that are sent after the end of a fault, which wait
behind those that were sent during it: until the first of them is answered with 2xx, and the last one with something
else. Limits for ours: no error but 503, no 2xx whose row is missing, no row of a request that was answered neither with
2xx nor with "outcome unknown", service within 1.5 s of the end of each fault, no session that is left in a transaction,
no accepted request without an answer, and an idle service that wakes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import enum
import itertools
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from harness import Figure, Limit, Option, Report, Table, run
from peers import dsn_of
from service_apps import AIOHTTP, SHUTDOWN_TIMEOUT

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

SERVICES = ("fastapi_ours", "fastapi_asyncpg", "aiohttp_ours", "aiohttp_asyncpg")
CLIENTS, PAUSE, WAKE_TIME = 200, 1.0, 0.5
NEWCOMERS = 0.05  # seconds between two requests that wait for no earlier answer
WORK = 0.005  # seconds between the statement and COMMIT, so that faults hit transactions
FREEZE, REFUSAL, CALM = 2.0, 3.0, 1.5  # seconds; calm is what follows each fault
DISCONNECTS, PROBES, SUSPEND_AFTER = 20, 10, 2.0
RECOVERY = 1.5
HANG = 30.0  # seconds after which a request counts as lost

DONE, UNAVAILABLE, UNKNOWN = "2xx", "503", "503, outcome unknown"
ERROR, LOST = "other errors", "no answer"
MISSING, UNDUE = "2xx without a row", "rows without 2xx"
FAULTS = SUSPENDED, CUT, FROZEN, REFUSED = "suspend", "cut", "freeze", "refuse"
LEFT, IN_PROGRESS, DROPPED = "in transaction after disconnects", "finished after SIGTERM", "dropped"
WAKES, ASLEEP = "wakes by probes", "asleep"


class Verdict(enum.Enum):
    """What a client knows about its request."""

    DONE = DONE
    UNAVAILABLE = UNAVAILABLE
    UNKNOWN = UNKNOWN
    ERROR = ERROR
    LOST = LOST
    NOT_ACCEPTED = "not accepted"  # the connect was refused


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it was sent and answered, and how."""

    number: int
    sent: float
    answered: float
    verdict: Verdict


async def measure(arguments: argparse.Namespace) -> Report:
    """Return what the clients of each service saw."""
    names = [arguments.only] if arguments.only else SERVICES
    seen = Table("answers", names, [Figure(name) for name in (*(one.value for one in Verdict), MISSING, UNDUE)])
    back = Table("service again after", names, [Figure(fault, "s", show=("max",)) for fault in FAULTS])
    ends = Table("at the end", names, [*map(Figure, (LEFT, IN_PROGRESS, DROPPED, WAKES)), Figure(ASLEEP, "s")])
    async with LocalPostgres(settings={"max_connections": "200"}) as server:
        for _, name in itertools.product(range(arguments.rounds), names):
            await under_load(name, server, seen, back, ends)
            await idle(name, server, ends)
    ours = [name for name in names if name.endswith("ours")]
    return Report([seen, back, ends], [limit for name in ours for limit in limits_of(name, seen, back, ends)])


def limits_of(name: str, seen: Table, back: Table, ends: Table) -> Iterable[Limit]:
    """Return the limits of one service."""
    for table, figures in ((seen, (ERROR, LOST, MISSING, UNDUE)), (ends, (LEFT, DROPPED, WAKES))):
        for figure in figures:
            yield Limit(f"{name}: {figure}: {{}}", max(table.numbers[name][figure]), at_most=0)
    yield Limit(f"{name}: {{}} requests were finished after SIGTERM", min(ends.numbers[name][IN_PROGRESS]), at_least=1)
    yield Limit(
        f"{name}: the endpoint slept for {{}} s of {PROBES}", min(ends.numbers[name][ASLEEP]), at_least=PROBES / 2
    )
    yield Limit(f"{name}: {{}} requests were served", min(seen.numbers[name][DONE]), at_least=CLIENTS)
    for fault in FAULTS:
        yield Limit(f"{name}: after {fault} there is service within {{}} s", back.value(name, fault), at_most=RECOVERY)


# ---------------------------------------------------------------------------------------------------------------------
# The phases


async def under_load(name: str, server: LocalPostgres, seen: Table, back: Table, ends: Table) -> None:
    """Measure a service under load, through the faults, disconnects and its end."""
    connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
    await connection.execute("DROP TABLE IF EXISTS orders; CREATE TABLE orders (number int PRIMARY KEY)")
    async with LocalEndpoint(server, wake_time=WAKE_TIME) as endpoint, started(name, endpoint) as service:
        async with clients(service, seconds=WORK, pause=PAUSE):
            await asyncio.sleep(CALM)
            for fault, act in faults_of(endpoint):
                end = await act()
                await asyncio.sleep(CALM)
                back.add(name, fault, seconds_until_service(service.requests, end))
        asked = list(service.requests)
        ends.add(name, LEFT, await disconnect(service, connection))
        in_progress, dropped = await terminate(service)
        ends.add(name, IN_PROGRESS, in_progress)
        ends.add(name, DROPPED, dropped)
    counts = Counter(one.verdict for one in asked)
    for verdict in Verdict:
        seen.add(name, verdict.value, counts[verdict])
    rows = {row["number"] for row in await connection.fetch("SELECT number FROM orders")}
    await connection.close()
    answered = [one for one in service.requests if one.verdict not in (Verdict.UNKNOWN, Verdict.LOST)]
    seen.add(name, MISSING, sum(one.verdict is Verdict.DONE and one.number not in rows for one in answered))
    seen.add(name, UNDUE, sum(one.verdict is not Verdict.DONE and one.number in rows for one in answered))


def faults_of(endpoint: LocalEndpoint) -> list[tuple[str, Callable[[], Awaitable[float]]]]:
    """Return the faults in order, each with what causes it and returns the time of its end."""

    async def suspend() -> float:
        endpoint.suspend()
        await asyncio.sleep(WAKE_TIME)  # the next request wakes it
        return time.perf_counter()

    async def cut() -> float:
        endpoint.cut()
        return time.perf_counter()

    async def freeze() -> float:
        endpoint.freeze()
        await asyncio.sleep(FREEZE)
        endpoint.thaw()
        return time.perf_counter()

    async def refuse() -> float:
        endpoint.refuse()
        endpoint.cut()
        await asyncio.sleep(REFUSAL)
        endpoint.accept()
        return time.perf_counter()

    return [(SUSPENDED, suspend), *[(CUT, cut)] * 4, (FROZEN, freeze), (REFUSED, refuse)]


def seconds_until_service(requests: Iterable[Request], end: float) -> float:
    """Return the seconds from the end of a fault until there is service and no request fails any more."""
    after = [one for one in requests if one.sent >= end]
    served = [one.answered for one in after if one.verdict is Verdict.DONE]
    failed = [one.answered for one in after if one.verdict is not Verdict.DONE]
    return max([min(served, default=end + HANG), *failed]) - end


async def disconnect(service: Service, connection: Any) -> int:
    """Disconnect in the middle of requests, and return how many transactions are open when they must have ended."""
    waits = [
        asyncio.ensure_future(service.ask(next(service.numbers), seconds=1.0, patience=0.3)) for _ in range(DISCONNECTS)
    ]
    await asyncio.gather(*waits)
    deadline, left = time.perf_counter() + 5, DISCONNECTS
    while left and time.perf_counter() < deadline:
        await asyncio.sleep(0.1)
        left = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )
    return left


async def terminate(service: Service) -> tuple[int, int]:
    """End a service under load with SIGTERM.

    Return how many requests that it accepted were in progress and got an answer, and how many accepted ones got none.
    """
    before = len(service.requests)
    async with clients(service, seconds=0.05, pause=0.1):
        await asyncio.sleep(1)
        moment = time.perf_counter()
        service.process.send_signal(signal.SIGTERM)
        accepted = await service.read_to_the_end()
    requests = [one for one in service.requests[before:] if one.number in accepted]
    in_progress = [one for one in requests if one.sent < moment < one.answered and one.verdict is Verdict.DONE]
    return len(in_progress), sum(one.verdict is Verdict.LOST for one in requests)


async def idle(name: str, server: LocalPostgres, ends: Table) -> None:
    """Probe an idle service every second, and note for how long its endpoint sleeps and how often it wakes."""
    async with (
        LocalEndpoint(server, wake_time=WAKE_TIME, suspend_after=SUSPEND_AFTER) as endpoint,
        started(name, endpoint) as service,
    ):
        await service.ask(next(service.numbers))  # so that it has a connection
        wakes, asleep = endpoint.wakes, 0.0
        for _ in range(PROBES):
            async with service.session.get(f"{service.url}/ready") as answer:
                await answer.read()
            for _ in range(10):
                await asyncio.sleep(0.1)
                asleep += 0.1 * (endpoint.state == "suspended")
        ends.add(name, WAKES, endpoint.wakes - wakes)
        ends.add(name, ASLEEP, asleep)


# ---------------------------------------------------------------------------------------------------------------------
# A service and its clients


class Service:
    """A running service, and what its clients have seen so far."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.session = session
        self.requests: list[Request] = []
        self.numbers = itertools.count(1)
        assert process.stdout is not None
        self._reader = asyncio.ensure_future(process.stdout.read())  # so that the pipe is never full

    async def ask(self, number: int, *, seconds: float = 0.0, patience: float = HANG) -> Verdict:
        """Send a request and return the verdict."""
        sent = time.perf_counter()
        verdict = await self._post(f"{self.url}/orders/{number}", seconds, patience)
        self.requests.append(Request(number, sent, time.perf_counter(), verdict))
        return verdict

    async def _post(self, url: str, seconds: float, patience: float) -> Verdict:
        limit = aiohttp.ClientTimeout(patience)
        try:
            async with self.session.post(url, params={"seconds": seconds}, timeout=limit) as answer:
                await answer.read()
        except aiohttp.ClientConnectorError:
            return Verdict.NOT_ACCEPTED
        except (aiohttp.ClientError, TimeoutError):
            return Verdict.LOST
        if answer.ok:
            return Verdict.DONE
        if answer.status != 503:
            return Verdict.ERROR
        return Verdict.UNAVAILABLE if "Retry-After" in answer.headers else Verdict.UNKNOWN

    async def read_to_the_end(self) -> set[int]:
        """Wait until the process has ended, and return the numbers of the requests that it accepted."""
        async with asyncio.timeout(SHUTDOWN_TIMEOUT + HANG):
            output, _ = await asyncio.gather(asyncio.shield(self._reader), self.process.wait())
        return {int(line) for line in output.split()}


@contextlib.asynccontextmanager
async def started(name: str, endpoint: LocalEndpoint) -> AsyncIterator[Service]:
    """Start a service, and end it at the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    uvicorn = ["-m", "uvicorn", "--app-dir", str(here), "--factory", f"service_apps:{name}", "--workers", "2"]
    uvicorn += ["--port", str(port), "--log-level", "critical", "--no-access-log"]
    uvicorn += ["--timeout-graceful-shutdown", str(int(SHUTDOWN_TIMEOUT))]
    with tempfile.TemporaryDirectory() as folder:
        anchor = Path(folder, "root.pem")
        anchor.write_bytes(endpoint.trust_anchor)
        dsn = endpoint.dsn if name.endswith("ours") else dsn_of(endpoint)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *([str(here / "service_apps.py"), name, str(port)] if name in AIOHTTP else uvicorn),
            env=os.environ | {"SERVICE_DSN": dsn, "SERVICE_TRUST_ANCHOR": str(anchor)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # the tracebacks of asyncpg's errors
        )
        # Without keep-alive, so that no request can be sent on a connection that the service is about to close.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        try:
            async with aiohttp.ClientSession(connector=connector) as session:
                service = Service(process, port, session)
                await until_ready(service)
                yield service
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def until_ready(service: Service) -> None:
    """Wait until the service answers."""
    async with asyncio.timeout(HANG):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with service.session.get(f"{service.url}/ready") as answer:
                    if answer.ok:
                        return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def clients(service: Service, *, seconds: float, pause: float) -> AsyncIterator[None]:
    """Let clients send requests for the duration of the block. At its end each waits for its answer.

    Newcomers send one each at a steady rate, so that there are requests also while every client waits for its answer.
    """
    stopping = False

    async def client(delay: float) -> None:
        await asyncio.sleep(delay)
        while not stopping:
            if await service.ask(next(service.numbers), seconds=seconds) is Verdict.NOT_ACCEPTED:
                return
            await asyncio.sleep(pause)

    async def newcomers() -> None:
        while not stopping:
            tasks.append(asyncio.ensure_future(service.ask(next(service.numbers), seconds=seconds)))
            await asyncio.sleep(NEWCOMERS)

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(client(pause * n / CLIENTS)) for n in range(CLIENTS)]
    newcoming = asyncio.ensure_future(newcomers())
    try:
        yield
    finally:
        stopping = True
        await newcoming
        await asyncio.gather(*tasks)


def service_name(text: str) -> str:
    """Return `text`, which must be the name of a service."""
    if text not in SERVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SERVICES)}")
    return text


if __name__ == "__main__":
    sys.exit(
        run(
            measure,
            __doc__,
            rounds=1,
            options=[Option("--only", f"one of {', '.join(SERVICES)}; default: all", type=service_name)],
        )
    )
