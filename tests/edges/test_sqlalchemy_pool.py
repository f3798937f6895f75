"""Engines on a pool of ours: each session is one loan, and nothing that SQLAlchemy or its caller does loses a slot."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from support.engines import admin_of, driver_of, engine_on, original, scalar
from support.pgbouncer import LocalPgBouncer
from support.probes import HANG, assert_whole, make_pool, until, until_settled
from support.scenes import cancel, start, take_steps

import neon_async
from neon_async.sqlalchemy import create_async_engine
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pool(postgres: LocalPostgres) -> AsyncIterator[neon_async.Pool]:
    async with make_pool(postgres, max_size=2) as pool:
        yield pool
        await assert_whole(pool)


@pytest.fixture
async def engine(pool: neon_async.Pool) -> AsyncIterator[AsyncEngine]:
    async with engine_on(pool) as engine:
        yield engine


class TestLoans:
    async def test_a_session_borrows_one_connection_and_returns_it(
        self, pool: neon_async.Pool, engine: AsyncEngine
    ) -> None:
        async with AsyncSession(engine) as session:
            assert pool.stats().in_use == 0
            await session.execute(sa.text("SELECT 1"))
            assert pool.stats().in_use == 1
            await session.commit()
            assert pool.stats().in_use == 0
        assert pool.stats().terminations == 0

    async def test_sessions_dial_no_more_than_the_pool_needs(self, pool: neon_async.Pool, engine: AsyncEngine) -> None:
        async def work() -> None:
            async with engine.connect() as connection:
                await scalar(connection, "SELECT 1")

        await work()
        assert pool.stats().dials == 1
        await asyncio.gather(*(work() for _ in range(20)))
        assert pool.stats().dials <= pool.get_max_size()

    async def test_the_connection_is_the_one_that_the_pool_lends(self, engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            assert neon_async.connection_tls_report(await driver_of(connection)).version == "TLSv1.3"

    async def test_what_a_session_leaves_behind_is_reset(self, pool: neon_async.Pool, engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(sa.text("SET search_path TO pg_catalog"))
            await connection.commit()
        assert await pool.fetchval("SHOW search_path") == '"$user", public'

    async def test_an_invalidated_connection_is_terminated_and_its_slot_is_free(
        self, pool: neon_async.Pool, engine: AsyncEngine
    ) -> None:
        async with engine.connect() as connection:
            driver = await driver_of(connection)
            await scalar(connection, "SELECT 1")
            await connection.invalidate()
            assert pool.stats().terminations == 1
            assert driver.is_closed()

    async def test_dispose_leaves_the_pool_open(self, pool: neon_async.Pool, engine: AsyncEngine) -> None:
        await engine.dispose()
        assert await pool.fetchval("SELECT 1") == 1
        async with engine.connect() as connection:
            assert await scalar(connection, "SELECT 1") == 1

    async def test_a_connection_that_is_never_closed_comes_back(
        self, pool: neon_async.Pool, engine: AsyncEngine
    ) -> None:
        async def forget() -> None:
            await scalar(await engine.connect(), "SELECT 1")

        await forget()
        with pytest.warns(sa.exc.SAWarning, match="garbage collector"):
            gc.collect()
        await until(lambda: pool.stats().in_use == 0)

    async def test_a_listener_that_fails_loses_no_slot(self, pool: neon_async.Pool, engine: AsyncEngine) -> None:
        @sa.event.listens_for(engine.sync_engine, "connect")
        def fail(*_: object) -> None:
            raise LookupError("not today")

        for _ in range(3):
            with pytest.raises(LookupError):
                await engine.connect()
        gc.collect()
        assert pool.stats().in_use == 0

    async def test_a_warm_statement_is_prepared_once_for_all_loans(
        self, pool: neon_async.Pool, engine: AsyncEngine
    ) -> None:
        for _ in range(5):
            async with engine.connect() as connection:
                await scalar(connection, "SELECT 6 * 7")
        known = await pool.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE statement = $1", "SELECT 6 * 7")
        assert known == 1

    async def test_a_schema_that_changes_costs_one_error_at_most(
        self, pool: neon_async.Pool, engine: AsyncEngine, postgres: LocalPostgres
    ) -> None:
        async def read() -> list[str]:
            async with engine.connect() as connection:
                return list((await connection.execute(sa.text("SELECT * FROM changing"))).keys())

        async with admin_of(postgres) as admin:
            await admin.execute("DROP TABLE IF EXISTS changing; CREATE TABLE changing (a int)")
            async with engine.connect() as one, engine.connect() as other:  # both connections know the statement
                for connection in (one, other):
                    await connection.execute(sa.text("SELECT * FROM changing"))
            await admin.execute("ALTER TABLE changing ADD COLUMN b text")
            with pytest.raises(sa.exc.NotSupportedError, match="cached"):
                await read()
            async with engine.connect() as one, engine.connect() as other:
                for connection in (one, other):
                    assert list((await connection.execute(sa.text("SELECT * FROM changing"))).keys()) == ["a", "b"]
            await admin.execute("DROP TABLE changing")


class TestJSON:
    QUERY = """SELECT '{"a": [1]}'::jsonb, '[2]'::json, NULL::jsonb, ARRAY['3'::jsonb, NULL], 'text'"""
    DECODED = ({"a": [1]}, [2], None, [3, None], "text")

    async def test_it_is_decoded_as_by_the_dialect_of_asyncpg(self, engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            assert (await connection.execute(sa.text(self.QUERY))).one() == self.DECODED

    async def test_it_is_decoded_in_a_stream(self, engine: AsyncEngine) -> None:
        query = "SELECT to_jsonb(n) FROM generate_series(1, 120) n"
        async with engine.connect() as connection:
            result = await connection.stream(sa.text(query))
            assert [row[0] async for row in result] == list(range(1, 121))
            result = await connection.stream(sa.text(query))
            assert len(await result.fetchmany(70)) == 70
            assert [row[0] for row in await result.fetchall()] == list(range(71, 121))

    async def test_a_typed_column_goes_both_ways(self, engine: AsyncEngine) -> None:
        table = sa.Table("documents", sa.MetaData(), sa.Column("body", sa.JSON), prefixes=["TEMPORARY"])
        async with engine.begin() as connection:
            await connection.run_sync(table.metadata.create_all)
            await connection.execute(table.insert(), [{"body": {"a": 1}}, {"body": ["b"]}])
            assert (await connection.execute(sa.select(table.c.body))).scalars().all() == [{"a": 1}, ["b"]]
            assert (await connection.execute(sa.select(table.c.body["a"].as_integer()))).scalars().all() == [1, None]

    async def test_the_deserializer_of_the_engine_is_used(self, pool: neon_async.Pool) -> None:
        options = {"json_deserializer": lambda text: ("mine", text)}
        async with engine_on(pool, **options) as engine, engine.connect() as connection:
            assert await scalar(connection, "SELECT '1'::json") == ("mine", "1")

    async def test_other_users_of_the_pool_still_get_text(self, pool: neon_async.Pool, engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(sa.text(self.QUERY))
        assert await pool.fetchval("SELECT '{}'::jsonb") == "{}"

    async def test_a_codec_of_the_pools_init_is_kept(self, postgres: LocalPostgres) -> None:
        async def init(connection: Any) -> None:
            await connection.set_type_codec(
                "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=lambda text: ["init", text]
            )

        async with make_pool(postgres, init=init) as pool, engine_on(pool) as engine, engine.connect() as connection:
            assert await scalar(connection, "SELECT '1'::jsonb") == ["init", "1"]

    async def test_network_addresses_can_be_text(self, pool: neon_async.Pool) -> None:
        async with engine_on(pool, native_inet_types=False) as engine, engine.connect() as connection:
            assert await scalar(connection, "SELECT '10.0.0.1'::inet") == "10.0.0.1"
        await until_settled(pool)
        assert str(await pool.fetchval("SELECT '10.0.0.1'::inet")) == "10.0.0.1"


class TestErrors:
    async def test_no_connection_in_time(self, postgres: LocalPostgres) -> None:
        async with make_pool(postgres, max_size=1, init_size=1, acquire_timeout=0.1) as pool, engine_on(pool) as engine:
            async with engine.connect() as connection:
                await scalar(connection, "SELECT 1")
                with pytest.raises(sa.exc.OperationalError, match="No connection within") as raised:
                    await engine.connect()
            assert isinstance(original(raised.value), neon_async.PoolTimeoutError)
            assert not raised.value.connection_invalidated

    @pytest.mark.parametrize("when", ["not open", "closed"])
    async def test_a_pool_that_is(self, postgres: LocalPostgres, when: str) -> None:
        pool = make_pool(postgres)
        if when == "closed":
            await pool
            await pool.close()
        async with engine_on(pool) as engine:
            with pytest.raises(sa.exc.InterfaceError, match=when):
                await engine.connect()

    async def test_a_lost_connection_is_a_disconnect_and_its_slot_is_free(self, postgres: LocalPostgres) -> None:
        async with (
            LocalEndpoint(postgres) as endpoint,
            make_pool(endpoint, max_size=1) as pool,
            engine_on(pool) as engine,
            engine.connect() as connection,
        ):
            await scalar(connection, "SELECT 1")
            running = asyncio.ensure_future(scalar(connection, "SELECT pg_sleep(3600)"))
            sent = endpoint.client_bytes
            await until(lambda: endpoint.client_bytes > sent)
            endpoint.cut()
            with pytest.raises(sa.exc.OperationalError) as raised:
                await running
            assert raised.value.connection_invalidated
            assert pool.stats().in_use == 0

    async def test_a_connection_that_ended_between_two_statements(self, postgres: LocalPostgres) -> None:
        async with (
            LocalEndpoint(postgres) as endpoint,
            make_pool(endpoint, max_size=1) as pool,
            engine_on(pool) as engine,
            engine.connect() as connection,
        ):
            await scalar(connection, "SELECT 1")
            endpoint.cut()
            await until(lambda: pool.stats().in_use == 0)
            with pytest.raises(sa.exc.DBAPIError) as raised:
                await scalar(connection, "SELECT 1")
            assert raised.value.connection_invalidated

    async def test_a_suspended_compute_is_woken_unseen(self, postgres: LocalPostgres) -> None:
        async with LocalEndpoint(postgres, wake_time=0.01) as endpoint, make_pool(endpoint, max_size=2) as pool:
            async with engine_on(pool) as engine:
                for _ in range(3):
                    async with engine.connect() as connection:
                        assert await scalar(connection, "SELECT 1") == 1
                    endpoint.suspend()
                    await until(lambda: pool.get_idle_size() == 0)
            assert endpoint.wakes == 2


# ---------------------------------------------------------------------------------------------------------------------
# Cancelled at every step


async def connect_and_execute(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await scalar(connection, "SELECT 1")


async def commit(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(sa.text("SELECT 1"))
        await session.commit()


async def roll_back(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(sa.text("SELECT 1"))


async def stream(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        async for _ in await connection.stream(sa.text("SELECT generate_series(1, 60)")):
            pass


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("use", [connect_and_execute, commit, roll_back, stream])
async def test_a_pool_is_whole_after_a_cancellation_at_any_step(
    postgres: LocalPostgres, use: Callable[[AsyncEngine], Awaitable[None]], cold: bool
) -> None:
    async with make_pool(postgres, max_size=2) as pool:
        engine = None
        for steps in range(0, 60, 3):
            async with asyncio.timeout(HANG):
                if cold:
                    await pool.expire_connections()
                if cold or engine is None:  # a new engine asks the server for its version first
                    engine = create_async_engine(pool)
                task = start(use(engine))
                await take_steps(steps)
                if not task.done():
                    await cancel(task)
                await until(lambda: pool.stats().in_use == 0)
            await assert_whole(pool)


# ---------------------------------------------------------------------------------------------------------------------
# Pooled hosts


async def test_a_pooled_host_serves_an_engine(pgbouncer: LocalPgBouncer, postgres: LocalPostgres) -> None:
    async with (
        neon_async.create_pool(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, max_size=2) as pool,
        engine_on(pool) as engine,
        admin_of(postgres) as admin,
    ):
        await admin.execute("DROP TABLE IF EXISTS changing; CREATE TABLE changing (a int)")
        for number in range(3):
            for _ in range(2):
                try:
                    async with engine.connect() as connection:
                        await connection.execute(sa.text("SELECT * FROM changing"))
                except sa.exc.NotSupportedError as error:
                    assert isinstance(original(error), asyncpg.InvalidCachedStatementError)
                else:
                    break
            else:
                pytest.fail("the statement stayed stale")
            await admin.execute(f"ALTER TABLE changing ADD COLUMN c{number} text")
        await admin.execute("DROP TABLE changing")
        async with engine.connect() as connection:
            with pytest.raises(sa.exc.NotSupportedError, match=postgres.host):
                await connection.execute(sa.text("SELECT pg_advisory_lock(1)"))


async def test_a_session_on_a_pooled_host_needs_no_reset(pgbouncer: LocalPgBouncer) -> None:
    async with neon_async.create_pool(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor, max_size=2) as pool:
        async with engine_on(pool) as engine:
            for _ in range(5):
                async with AsyncSession(engine) as session:
                    await session.execute(sa.text("SELECT 1"))
                    await session.commit()
        await until_settled(pool)
        assert (pool.stats().resets, pool.stats().dials) == (0, 1)
