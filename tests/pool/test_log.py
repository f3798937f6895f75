"""The log of a pool: an outage in two records, what befalls many connections in two, and facts as fields of each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import pytest
from support.probes import HANG, ResetInBackground, connected, make_pool, password_of, until, until_settled

import neon_async
from neon_async._pool.log import Cause, Mishap, PoolLog
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

NAME = "ep-cool-darkness-123456"
ERROR = neon_async.ConnectError("ep-x closed the connection. Try again.")
Records: TypeAlias = Callable[[], list[logging.LogRecord]]


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Records:
    caplog.set_level(logging.INFO, "neon_async")
    return lambda: [record for record in caplog.records if record.name == "neon_async"]


def warnings_in(records: Records) -> list[logging.LogRecord]:
    return [record for record in records() if record.levelno >= logging.WARNING]


def events_in(records: Records) -> list[str]:
    return [vars(record)["event"] for record in records()]


# ---------------------------------------------------------------------------------------------------------------------
# Outages


async def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_ends(
    endpoint: LocalEndpoint, postgres: LocalPostgres, records: Records
) -> None:
    async with make_pool(endpoint, init_size=3) as pool, asyncio.timeout(HANG):
        endpoint.refuse()
        endpoint.cut()
        waiting = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(20)]
        await until(lambda: pool.stats().dial_failures >= 3)
        endpoint.accept()
        assert await asyncio.gather(*waiting) == [1] * 20
        failures = pool.stats().dial_failures
    began, ended = warnings_in(records)
    assert vars(began) | {
        "endpoint": NAME,
        "event": "outage_began",
        "error": "ConnectError",
        "retryable": True,
    } == vars(began)
    assert began.getMessage() == f"{NAME}: cannot connect, retrying: {vars(began)['reason']}"
    assert vars(ended) | {"endpoint": NAME, "event": "outage_ended", "failures": failures} == vars(ended)
    seconds = vars(ended)["seconds"]
    assert 0 < seconds < HANG
    assert ended.getMessage() == (
        f"{NAME}: connected again after an outage of {seconds:.2f} s, failed connects: {failures}"
    )
    assert password_of(postgres) not in " ".join(str(vars(record)) for record in records())


async def test_the_next_outage_is_logged_again(endpoint: LocalEndpoint, records: Records) -> None:
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        for number in (1, 2):
            endpoint.refuse()
            endpoint.cut()
            await until(lambda: not pool.get_size())
            waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
            await until(lambda number=number: pool.stats().dial_failures >= number)  # type: ignore[misc]
            endpoint.accept()
            assert await waiting == 1
            await until_settled(pool)
    assert [vars(record)["event"] for record in warnings_in(records)] == ["outage_began", "outage_ended"] * 2


async def test_a_verdict_is_logged_once_however_many_callers_get_it(postgres: LocalPostgres, records: Records) -> None:
    async with make_pool(postgres, password="wrong") as pool, asyncio.timeout(HANG):
        for _ in range(5):
            with pytest.raises(neon_async.InvalidPasswordError):
                await pool.fetchval("SELECT 1")
        await until(lambda: not pool.stats().connecting)
    (began,) = warnings_in(records)
    assert (vars(began)["error"], vars(began)["retryable"]) == ("InvalidPasswordError", False)


async def test_a_wake_is_no_outage(endpoint: LocalEndpoint, records: Records) -> None:
    async with make_pool(endpoint) as pool, asyncio.timeout(HANG):
        await pool.fetchval("SELECT 1")
        endpoint.suspend()
        await until(lambda: not pool.get_size())
        await pool.fetchval("SELECT 1")
    assert warnings_in(records) == []
    assert events_in(records) == ["connected", "emptied", "connected", "pool_closed"]
    assert 0 < vars(records()[0])["seconds"] < HANG


async def test_callers_code_that_fails_in_every_connect_is_an_outage(postgres: LocalPostgres, records: Records) -> None:
    broken = True

    async def init(connection: Any) -> None:
        if broken:
            raise LookupError("the secret is hunter2")

    async with make_pool(postgres, init=init) as pool, asyncio.timeout(HANG):
        for _ in range(3):
            with pytest.raises(LookupError):
                await pool.fetchval("SELECT 1")
        broken = False
        assert await pool.fetchval("SELECT 1") == 1
    began, ended = warnings_in(records)
    assert (vars(began)["error"], vars(began)["reason"], vars(ended)["failures"]) == ("LookupError", "LookupError.", 3)
    assert "hunter2" not in " ".join(str(vars(record)) for record in records())


def outage_log(*steps: str) -> PoolLog:
    """Return the log of a pool to which this has happened: names of causes, `connected`, or `worked`."""
    log = PoolLog("ep-x")
    for step in steps:
        if step == "connected":
            log.connected(0.5, woke=True)
        elif step == "worked":
            log.worked()
        else:
            log.failed(Cause[step], ERROR, began=0.0)
    return log


@pytest.mark.parametrize(
    ("steps", "warnings", "failures"),
    [
        pytest.param(["RETRYING"] * 9 + ["connected"], 2, 9, id="failures"),
        pytest.param(["RETRYING", "REFUSED", "RETRYING", "connected"], 2, 3, id="one cause after another"),
        pytest.param(["RETRYING", "connected", "worked"], 2, 1, id="the first statement after it"),
        pytest.param(["IN_VAIN", "connected", "IN_VAIN", "connected", "worked"], 2, 2, id="sessions that end at once"),
        pytest.param(["RETRYING", "IN_VAIN", "connected", "worked"], 2, 2, id="logins that lead to nothing"),
        pytest.param(["RETRYING", "IN_VAIN", "connected"], 1, None, id="a login that has not worked yet"),
        pytest.param(["connected", "worked"], 0, None, id="none"),
    ],
)
def test_an_outage_has_one_beginning_and_one_end(
    records: Records, steps: list[str], warnings: int, failures: int | None
) -> None:
    outage_log(*steps)
    found = warnings_in(records)
    assert len(found) == warnings
    assert found == [] or vars(found[0])["event"] == "outage_began"
    assert failures is None or vars(found[-1])["failures"] == failures


# ---------------------------------------------------------------------------------------------------------------------
# What befalls many connections at once

MANY = 20


async def lend_all(pool: neon_async.Pool, held: AsyncExitStack) -> None:
    for _ in range(MANY):
        connection = await held.enter_async_context(pool.acquire())
        await connection.execute("SELECT 1")


async def test_resets_that_are_cut_have_no_record_each(endpoint: LocalEndpoint, records: Records) -> None:
    options: dict[str, Any] = {"max_size": MANY, "connection_class": ResetInBackground}
    async with make_pool(endpoint, **options) as pool, asyncio.timeout(2 * HANG):
        async with AsyncExitStack() as held:
            await lend_all(pool, held)
            endpoint.freeze()
        assert pool.stats().resetting == MANY
        await asyncio.sleep(0)
        endpoint.cut()
        await until(lambda: pool.stats().vacant == MANY)
        endpoint.thaw()
        assert await pool.fetchval("SELECT 1") == 1
    assert events_in(records) == ["connected", "emptied", "connected", "pool_closed"]


async def test_resets_that_are_late_make_two_records_with_their_number(
    endpoint: LocalEndpoint, records: Records
) -> None:
    options: dict[str, Any] = {"max_size": MANY, "connection_class": ResetInBackground, "release_timeout": 0.2}
    async with make_pool(endpoint, **options) as pool, asyncio.timeout(2 * HANG):
        async with AsyncExitStack() as held:
            await lend_all(pool, held)
            endpoint.freeze()
        await until(lambda: pool.stats().vacant == MANY)
        await until(lambda: events_in(records).count("reset_late") == 2)
        endpoint.thaw()
    late = [record for record in records() if vars(record)["event"] == "reset_late"]
    assert sum(vars(record)["count"] for record in late) == MANY
    assert late[1].getMessage() == f"{NAME}: {MANY - 1} more connections were not reset in time and were closed"


async def test_connections_that_are_cut_in_use_have_no_record_each(endpoint: LocalEndpoint, records: Records) -> None:
    async with make_pool(endpoint, max_size=MANY) as pool, asyncio.timeout(2 * HANG):
        async with AsyncExitStack() as held:
            await lend_all(pool, held)
            running = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(MANY)]
            endpoint.cut()
            await until(lambda: pool.stats().terminations >= MANY)
        await asyncio.gather(*running)
    assert len(records()) <= 5, [record.getMessage() for record in records()]


async def test_what_befalls_one_connection_is_logged_at_once_and_of_many_their_number(records: Records) -> None:
    log = PoolLog("ep-x")
    for _ in range(140):
        log.befell(Mishap.RESET_FAILED, ERROR)
    log.befell(Mishap.SILENT, TimeoutError)
    assert events_in(records) == ["reset_failed", "silent"]
    assert [vars(record)["count"] for record in records()] == [1, 1]
    await until(lambda: len(records()) == 3)  # by itself
    assert records()[2].getMessage() == "ep-x: 139 more connections could not be reset and were closed"
    log.befell(Mishap.RESET_FAILED, ERROR)
    log.flush()
    assert events_in(records)[3:] == ["reset_failed"]
    assert repr(log) == "<PoolLog of ep-x: no outage>"


# ---------------------------------------------------------------------------------------------------------------------
# Facts


async def test_the_facts_of_each_record_are_fields_and_in_the_line(
    endpoint: LocalEndpoint, records: Records, postgres: LocalPostgres
) -> None:
    async with make_pool(endpoint, leak_after=0.01) as pool, connected(postgres), asyncio.timeout(HANG):
        async with pool.acquire():
            await until(lambda: "leak" in events_in(records))
            endpoint.refuse()
            endpoint.cut()
        waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: pool.stats().dial_failures >= 1)
        endpoint.accept()
        await waiting
        connection = await pool.acquire()
        await pool.close(timeout=0.01)
        assert connection.is_closed()
    assert {"leak", "outage_began", "outage_ended", "emptied", "close_late", "pool_closed"} <= {*events_in(records)}
    for record in records():
        fields = vars(record)
        assert fields["endpoint"] == NAME
        assert record.getMessage() == str(record.msg) % fields
