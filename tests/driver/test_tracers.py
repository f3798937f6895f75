"""Tracers that patch asyncpg's classes record what callers do, as with asyncpg, and nothing that we do ourselves."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from support.plain import asyncpg_arguments, asyncpg_connection
from support.pooled import change, fresh, other_client
from support.probes import HANG, connected, make_pool, until_settled
from support.tracers import OpenTelemetry, Sentry, Tracer

import neon_async
from neon_async._driver import holder
from neon_async._driver.protocol import SessionProtocol
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[OpenTelemetry, Sentry], ids=["opentelemetry", "sentry"])
def tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    tracer: Tracer = request.param()
    yield tracer
    tracer.uninstall()


@pytest.fixture(params=["direct", "pooled"])
def server(request: pytest.FixtureRequest) -> Any:
    """A server by the name of its direct host, and by the name of its pooled host."""
    return request.getfixturevalue("postgres" if request.param == "direct" else "pgbouncer")


@pytest.fixture
async def table(postgres: LocalPostgres) -> AsyncIterator[str]:
    async with connected(postgres) as admin:
        await admin.execute("DROP TABLE IF EXISTS traced; CREATE TABLE traced (a int)")
        yield "traced"
        await admin.execute("DROP TABLE traced")


class NoReset(asyncpg.Connection):
    """For asyncpg's own pool, whose reset creates spans."""

    def get_reset_query(self) -> str:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# What a caller does


async def use_connection(connection: Any) -> None:
    """Use everything that a tracer may record."""
    insert = "INSERT INTO traced VALUES ($1) RETURNING a"
    await connection.execute("SELECT 1; SELECT 2")
    await connection.execute("SELECT $1::int", 1)
    await connection.executemany(insert, [(1,), (2,)])
    await connection.fetch("SELECT $1::int", 1, timeout=HANG)
    await connection.fetchval("SELECT 1, 2", column=1)
    await connection.fetchrow("/* a comment */ SELECT 1")
    await connection.fetchmany(insert, [(1,), (2,)])
    with contextlib.suppress(asyncpg.DivisionByZeroError):
        await connection.fetch("SELECT 1 / 0")
    await connection.copy_from_query("SELECT $1::int", 1, output=io.BytesIO())
    await connection.copy_records_to_table("traced", records=[(3,)])
    await connection.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog")
    statement = await connection.prepare(insert)
    await statement.fetch(1)
    await statement.fetchval(1)
    await statement.fetchrow(1)
    await statement.fetchmany([(1,)])
    await statement.executemany([(1,)])
    async with connection.transaction(readonly=True):
        async with connection.transaction():
            await connection.execute("SELECT 3")
        rows = [row async for row in connection.cursor("SELECT generate_series(1, 5)", prefetch=2)]
        assert len(rows) == 5
        opened = await connection.cursor("SELECT generate_series(1, 9)")
        await opened.fetch(2)
        await opened.forward(2)
        await opened.fetchrow()
    with contextlib.suppress(ZeroDivisionError):
        async with connection.transaction(isolation="serializable"):
            raise ZeroDivisionError


async def use_pool(pool: Any) -> None:
    """Use the calls that acquire by themselves."""
    await pool.execute("SELECT 1")
    await pool.execute("SELECT $1::int", 1)
    await pool.executemany("INSERT INTO traced VALUES ($1)", [(1,), (2,)])
    await pool.fetch("SELECT 1", timeout=HANG)
    await pool.fetchval("SELECT $1::int", 1)
    await pool.fetchrow("SELECT 1")
    await pool.fetchmany("INSERT INTO traced VALUES ($1) RETURNING a", [(1,)])
    await pool.copy_from_query("SELECT 1", output=io.BytesIO())
    await pool.copy_records_to_table("traced", records=[(3,)])


async def use_acquired(pool: Any) -> None:
    async with pool.acquire() as connection:
        await use_connection(connection)


@pytest.mark.usefixtures("table")
class TestWhatTheCallerDoes:
    @pytest.mark.parametrize("installed", ["before", "after"])
    async def test_it_is_recorded_on_a_lone_connection_as_with_asyncpg(
        self, tracer: Tracer, server: Any, installed: str
    ) -> None:
        if installed == "before":
            tracer.install()
        async with asyncpg_connection(server) as theirs, connected(server) as ours:
            if installed == "after":
                tracer.install()
            with tracer.recording() as expected:
                await use_connection(theirs)
            with tracer.recording() as recorded:
                await use_connection(ours)
        assert recorded.spans == expected.spans
        assert recorded.hosts == {server.host}

    async def test_connect_is_recorded_as_with_asyncpg(self, tracer: Tracer, server: Any) -> None:
        tracer.install()
        with tracer.recording() as expected:
            theirs = await asyncpg.connect(**asyncpg_arguments(server))
        with tracer.recording() as recorded:
            ours = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        assert recorded.spans == expected.spans
        for connection in (theirs, ours):
            await connection.close()

    @pytest.mark.parametrize("installed", ["before", "after"])
    @pytest.mark.parametrize("use", [use_pool, use_acquired])
    async def test_it_is_recorded_through_a_pool_as_with_asyncpgs_pool(
        self, tracer: Tracer, server: Any, use: Any, installed: str
    ) -> None:
        if installed == "before":
            tracer.install()
        async with (
            asyncpg.create_pool(
                **asyncpg_arguments(server), min_size=1, max_size=1, connection_class=NoReset
            ) as theirs,
            make_pool(server, init_size=1, max_size=1) as ours,
        ):
            await ours.fetchval("SELECT 0")
            if installed == "after":
                tracer.install()
            with tracer.recording() as expected:
                await use(theirs)
            with tracer.recording() as recorded:
                await use(ours)
        assert recorded.spans == expected.spans
        assert recorded.hosts == {server.host}

    async def test_a_reset_by_the_caller_is_recorded(self, tracer: Tracer, postgres: LocalPostgres) -> None:
        async with connected(postgres) as connection:
            tracer.install()
            with tracer.recording() as recorded:
                await connection.reset(timeout=HANG)
            assert recorded.statements == [connection.get_reset_query()]

    async def test_a_method_of_the_callers_class_is_recorded_where_it_calls_asyncpgs(
        self, tracer: Tracer, server: Any
    ) -> None:
        class Doubling(asyncpg.Connection):
            async def fetchval(self, *args: Any, **keywords: Any) -> Any:
                await super().fetchval("SELECT 'before'")
                return await super().fetchval(*args, **keywords)

        async with make_pool(server, connection_class=Doubling) as pool:
            await pool.fetchval("SELECT 0")
            tracer.install()
            with tracer.recording() as recorded:
                await pool.fetchval("SELECT 1")
        assert recorded.statements == ["SELECT 'before'", "SELECT 1"]


# ---------------------------------------------------------------------------------------------------------------------
# What the pool does itself


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the pool has sent for itself and waited for."""
    sent: list[str] = []
    send = holder.send

    async def noting(connection: Any, sql: str) -> None:
        sent.append(sql)
        await send(connection, sql)

    monkeypatch.setattr(holder, "send", noting)
    return sent


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The resets that the pool has sent ahead of the next statement."""
    ahead: list[str] = []
    send_reset_ahead = SessionProtocol.send_reset_ahead

    def noting(protocol: SessionProtocol) -> None:
        ahead.append(protocol.reset_query)
        send_reset_ahead(protocol)

    monkeypatch.setattr(SessionProtocol, "send_reset_ahead", noting)
    return ahead


async def set_a_setting(connection: Any) -> list[str]:
    await connection.execute("SET TimeZone = 'Asia/Tokyo'")
    return ["SET TimeZone = 'Asia/Tokyo'"]


async def leave_a_transaction(connection: Any) -> list[str]:
    await connection.execute("BEGIN")
    return ["BEGIN"]


async def leave_a_transaction_of_asyncpg(connection: Any) -> list[str]:
    await connection.transaction().start()
    return ["BEGIN;"]


async def leave_a_cancelled_statement(connection: Any) -> list[str]:
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.05)
    return ["SELECT pg_sleep(60)"]


@pytest.mark.parametrize("installed", ["before", "after"])
class TestWhatThePoolDoes:
    @pytest.mark.parametrize(
        ("leave", "rolls_back"),
        [
            pytest.param(set_a_setting, False, id="a setting"),
            pytest.param(leave_a_transaction, True, id="a transaction"),
            pytest.param(leave_a_transaction_of_asyncpg, True, id="a transaction of asyncpg"),
            pytest.param(leave_a_cancelled_statement, False, id="a cancelled statement"),
        ],
    )
    async def test_a_reset_a_rollback_and_a_ping_create_no_span(
        self,
        tracer: Tracer,
        server: Any,
        sent: list[str],
        ahead: list[str],
        installed: str,
        leave: Any,
        rolls_back: bool,
    ) -> None:
        if installed == "before":
            tracer.install()
        async with make_pool(server, max_size=1, check_after_idle=0) as pool:
            await pool.execute("SELECT 0")
            await until_settled(pool)
            if installed == "after":
                tracer.install()
            sent.clear()
            ahead.clear()
            with tracer.recording() as recorded:
                async with pool.acquire() as connection:
                    assert sent == ["SELECT 1"]
                    expected = await leave(connection)
                await until_settled(pool)
                assert ("ROLLBACK" in sent) is rolls_back
                assert len(sent) + len(ahead) > 1 or leave is leave_a_cancelled_statement
                assert len(ahead) == (leave is set_a_setting and "-pooler" not in server.host)
                assert await pool.fetchval("SELECT 2") == 2
                await until_settled(pool)
                await pool.expire_connections()
            assert recorded.statements == [*expected, "SELECT 2"]

    async def test_healing_creates_no_span(self, tracer: Tracer, pgbouncer: Any, direct: Any, installed: str) -> None:
        query = fresh()
        if installed == "before":
            tracer.install()
        async with other_client(pgbouncer, query), make_pool(pgbouncer, max_size=1) as pool:
            await pool.fetch(query)
            await change(direct)
            if installed == "after":
                tracer.install()
            with tracer.recording() as recorded:
                assert len(await pool.fetch(query)) == 3
                assert len(await pool.fetch(query)) == 3
            assert pool.stats().heals == 1
        assert recorded.statements == [query, query]


class TestDials:
    async def test_a_dial_of_the_pool_is_no_part_of_the_trace_of_a_caller(self, tracer: Tracer, server: Any) -> None:
        """Callers share dials, and a dial may end long after the request of the caller that started it."""

        async def reset(_: Any) -> None:
            await asyncio.sleep(0.01)

        tracer.install()
        async with make_pool(server, reset=reset) as pool:
            with tracer.recording() as recorded:
                for _ in range(3):
                    await pool.fetchval("SELECT 1")  # acquires while the reset is under way, which starts a dial
            await until_settled(pool)
            assert pool.stats().dials > 1
        assert recorded.statements == ["SELECT 1"] * 3
        assert {span.parent for span in recorded.spans} == {"request"}

    async def test_context_variables_of_a_caller_do_not_reach_work_in_the_background(
        self, postgres: LocalPostgres
    ) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        seen: list[str] = []

        async def note(_: Any) -> None:
            seen.append(variable.get())

        variable.set("creation")
        async with make_pool(postgres, init=note, setup=note, reset=note) as pool:
            variable.set("request")
            await pool.fetchval("SELECT 1")
            await until_settled(pool)
        assert seen == ["creation", "request", "creation"], "init and reset run in the background, setup does not"
