"""Engines with a pool of SQLAlchemy's: verified connections, connections that ended, and errors by the right names."""

from __future__ import annotations

import asyncio
import pickle
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
import sqlalchemy.ext.asyncio
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool
from support.engines import SCHEME, admin_of, driver_of, engine_to, original, scalar, with_scheme
from support.pgbouncer import LocalPgBouncer
from support.plain import asyncpg_arguments
from support.probes import HANG, until
from support.verified_servers import record_pbkdf2

import neon_async
from neon_async import sqlalchemy as edge
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

NEVER = 100 * HANG


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint


@pytest.fixture
async def engine(endpoint: LocalEndpoint) -> AsyncIterator[AsyncEngine]:
    async with engine_to(endpoint) as engine:
        yield engine
        endpoint.thaw()
        endpoint.accept()


async def idle(engine: AsyncEngine, count: int = 1) -> list[Any]:
    """Leave `count` idle connections in the pool of the engine, and return those of asyncpg below them."""
    connections = [await engine.connect() for _ in range(count)]
    drivers = [await driver_of(connection) for connection in connections]
    for connection in connections:
        await scalar(connection, "SELECT 1")
        await connection.close()
    return drivers


class TestConnections:
    async def test_a_tool_that_takes_only_a_url_gets_a_verified_connection(self, postgres: LocalPostgres) -> None:
        engine = sqlalchemy.ext.asyncio.create_async_engine(
            with_scheme(postgres.dsn.partition("&sslmode")[0]), connect_args={"trust_anchor": postgres.trust_anchor}
        )
        async with engine.connect() as connection:
            report = neon_async.connection_tls_report(await driver_of(connection))
        await engine.dispose()
        assert (report.version, report.server_name) == ("TLSv1.3", postgres.host)

    async def test_a_server_that_has_another_root_is_refused(self, postgres: LocalPostgres) -> None:
        engine = sqlalchemy.ext.asyncio.create_async_engine(with_scheme(postgres.dsn))
        with pytest.raises(sa.exc.OperationalError, match="was refused") as raised:
            await engine.connect()
        assert isinstance(original(raised.value), neon_async.CertificateError)
        await engine.dispose()

    async def test_the_connections_of_an_engine_share_what_was_learned(
        self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logins = record_pbkdf2(monkeypatch)
        await idle(engine, 3)
        assert len(logins) == 1

    async def test_a_handler_of_do_connect_can_change_the_keywords(self, postgres: LocalPostgres) -> None:
        """SQLAlchemy's way to a password that is made for each connection."""
        async with engine_to(postgres, password="wrong") as engine:

            @sa.event.listens_for(engine.sync_engine, "do_connect")
            def provide(dialect: Any, entry: Any, args: Any, keywords: dict[str, Any]) -> None:
                keywords["password"] = sa.make_url(postgres.dsn).password

            async with engine.connect() as connection:
                assert await scalar(connection, "SELECT 1") == 1

    async def test_json_is_decoded_as_by_the_dialect_of_asyncpg(self, engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            assert await scalar(connection, """SELECT '{"a": [1]}'::jsonb""") == {"a": [1]}

    @pytest.mark.parametrize("how", ["async_creator", "creator"])
    async def test_a_connection_that_is_not_ours_is_refused(self, postgres: LocalPostgres, how: str) -> None:
        made: list[Any] = []

        async def connect() -> Any:
            made.append(await asyncpg.connect(**asyncpg_arguments(postgres)))
            return made[-1]

        dbapi = sqlalchemy.ext.asyncio.create_async_engine("postgresql+asyncpg://").dialect.dbapi
        creators: dict[str, Any] = {
            "async_creator": connect,
            "creator": lambda: dbapi.connect(async_creator_fn=connect),  # type: ignore[union-attr]
        }
        engine = sqlalchemy.ext.asyncio.create_async_engine(f"{SCHEME}://", **{how: creators[how]})
        with pytest.raises(sa.exc.InterfaceError, match="not verified") as raised:
            await engine.connect()
        assert isinstance(original(raised.value), neon_async.InsecureConfigurationError)
        assert made[0].is_closed()
        await engine.dispose()

    async def test_a_connection_of_ours_can_be_provided(self, postgres: LocalPostgres) -> None:
        async def connect() -> Any:
            return await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)

        engine = sqlalchemy.ext.asyncio.create_async_engine(f"{SCHEME}://", async_creator=connect)
        async with engine.connect() as connection:
            assert await scalar(connection, "SELECT 1") == 1
        await engine.dispose()


class TestIdleConnections:
    async def test_those_that_a_suspend_has_ended_are_replaced_unseen(
        self, engine: AsyncEngine, endpoint: LocalEndpoint
    ) -> None:
        drivers = await idle(engine, 3)
        endpoint.suspend()
        await until(lambda: all(driver.is_closed() for driver in drivers))
        for _ in range(3):
            async with engine.connect() as connection:
                assert await scalar(connection, "SELECT 1") == 1
        assert endpoint.wakes == 1

    async def test_an_idle_engine_sends_nothing_and_opens_nothing(
        self, engine: AsyncEngine, endpoint: LocalEndpoint
    ) -> None:
        drivers = await idle(engine)
        endpoint.suspend()
        connects = endpoint.connects
        await until(lambda: drivers[0].is_closed())
        assert (endpoint.state, endpoint.connects) == ("suspended", connects)

    async def test_one_that_was_idle_for_long_is_pinged_and_others_are_not(
        self, engine: AsyncEngine, endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await idle(engine)
        sent = endpoint.client_bytes
        await (await engine.connect()).close()
        assert endpoint.client_bytes == sent
        monkeypatch.setattr(edge, "_CHECK_AFTER_IDLE", 0.0)
        await (await engine.connect()).close()
        assert endpoint.client_bytes > sent

    @pytest.mark.parametrize("pre_ping", [False, True])
    async def test_one_that_does_not_answer_is_replaced(
        self, endpoint: LocalEndpoint, pre_ping: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(edge, "_PING_TIMEOUT", 0.2)
        if not pre_ping:
            monkeypatch.setattr(edge, "_CHECK_AFTER_IDLE", 0.0)
        async with engine_to(endpoint, pool_pre_ping=pre_ping) as engine:
            (driver,) = await idle(engine)
            endpoint.freeze()
            waiting = asyncio.ensure_future(engine.connect())
            await until(driver.is_closed)
            endpoint.thaw()
            async with asyncio.timeout(HANG):
                connection = await waiting
            assert await scalar(connection, "SELECT 1") == 1
            await connection.close()


class TestEndsInTime:
    async def test_a_rollback_that_is_not_answered(
        self, engine: AsyncEngine, endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(edge, "_ROLLBACK_TIMEOUT", 0.2)
        connection = await engine.connect()
        driver = await driver_of(connection)
        await scalar(connection, "SELECT 1")
        endpoint.freeze()
        with pytest.raises(sa.exc.OperationalError, match="ROLLBACK was not answered") as raised:
            await connection.rollback()
        assert raised.value.connection_invalidated
        assert driver.is_closed()
        await connection.close()

    async def test_a_dispose_of_a_frozen_connection(
        self, engine: AsyncEngine, endpoint: LocalEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(edge, "_CLOSE_TIMEOUT", 0.2)
        (driver,) = await idle(engine)
        endpoint.freeze()
        async with asyncio.timeout(HANG):
            await engine.dispose()
        assert driver.is_closed()

    async def test_a_statement_that_is_cancelled(self, engine: AsyncEngine) -> None:
        async def sleep() -> None:
            async with engine.connect() as connection:
                sleeping.set_result(await driver_of(connection))
                await connection.execute(sa.text("SELECT pg_sleep(3600)"))

        sleeping = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(sleep())
        driver = await sleeping
        await until(lambda: driver.is_in_transaction())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: driver.is_closed())
        async with engine.connect() as connection:
            assert await scalar(connection, "SELECT 1") == 1


class TestErrors:
    async def test_a_connection_that_is_cut_in_a_statement(self, engine: AsyncEngine, endpoint: LocalEndpoint) -> None:
        async with engine.connect() as connection:
            await scalar(connection, "SELECT 1")
            running = asyncio.ensure_future(scalar(connection, "SELECT pg_sleep(3600)"))
            sent = endpoint.client_bytes
            await until(lambda: endpoint.client_bytes > sent)
            endpoint.cut()
            with pytest.raises(sa.exc.OperationalError) as raised:
                await running
            assert raised.value.connection_invalidated
            assert connection.invalidated
        async with engine.connect() as connection:
            assert await scalar(connection, "SELECT 1") == 1

    async def test_a_session_that_the_server_ends(self, engine: AsyncEngine, postgres: LocalPostgres) -> None:
        async with admin_of(postgres) as admin, engine.connect() as connection:
            process = await scalar(connection, "SELECT pg_backend_pid()")
            running = asyncio.ensure_future(scalar(connection, "SELECT pg_sleep(3600)"))
            query = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'"
            while not await admin.fetchval(query, process):
                await asyncio.sleep(0.01)
            await admin.execute("SELECT pg_terminate_backend($1)", process)
            with pytest.raises(sa.exc.OperationalError) as raised:
                await running
            assert raised.value.connection_invalidated

    async def test_a_session_that_ended_between_two_statements(
        self, engine: AsyncEngine, endpoint: LocalEndpoint
    ) -> None:
        async with engine.connect() as connection:
            await scalar(connection, "SELECT 1")
            driver = await driver_of(connection)
            endpoint.cut()
            await until(driver.is_closed)
            with pytest.raises(sa.exc.DBAPIError) as raised:
                await scalar(connection, "SELECT 1")
            assert raised.value.connection_invalidated

    async def test_a_connection_that_is_cut_in_a_commit(self, engine: AsyncEngine, endpoint: LocalEndpoint) -> None:
        async with engine.connect() as connection:
            await connection.execute(sa.text("CREATE TEMP TABLE kept (a int)"))
            endpoint.delay = NEVER  # the answer does not come
            sent = endpoint.client_bytes
            committing = asyncio.ensure_future(connection.commit())
            await until(lambda: endpoint.client_bytes > sent)
            endpoint.cut()
            with pytest.raises(sa.exc.OperationalError) as raised:
                await committing
            assert isinstance(original(raised.value), neon_async.CommitUnknownError)
            assert raised.value.connection_invalidated
            assert not neon_async.is_unavailable(raised.value)

    async def test_an_outage_is_recognised_in_what_sqlalchemy_raises(self, endpoint: LocalEndpoint) -> None:
        async with engine_to(endpoint) as engine:
            endpoint.refuse()
            with pytest.raises(sa.exc.OperationalError) as raised:
                await engine.connect()
            assert neon_async.is_unavailable(raised.value)
            assert neon_async.is_retryable(raised.value)

    async def test_a_commit_that_rolled_back_is_an_error(self, endpoint: LocalEndpoint) -> None:
        async with engine_to(endpoint) as engine, engine.connect() as connection:
            with pytest.raises(sa.exc.DBAPIError):
                await connection.execute(sa.text("SELECT 1/0"))
            with pytest.raises(sa.exc.OperationalError) as raised:
                await connection.commit()
            assert isinstance(original(raised.value), neon_async.TransactionAbortedError)
            assert not raised.value.connection_invalidated
            assert not neon_async.is_unavailable(raised.value)
            await connection.rollback()  # as SQLAlchemy requires after any failed commit
            assert await scalar(connection, "SELECT 1") == 1

    async def test_a_statement_that_takes_too_long(self, endpoint: LocalEndpoint) -> None:
        async with engine_to(endpoint, command_timeout=0.2) as engine, engine.connect() as connection:
            with pytest.raises(sa.exc.OperationalError) as raised:
                await connection.execute(sa.text("SELECT pg_sleep(3600)"))
            assert isinstance(original(raised.value), neon_async.QueryTimeoutError)
            assert not raised.value.connection_invalidated
            await connection.rollback()
            assert await scalar(connection, "SELECT 1") == 1

    @pytest.mark.parametrize(
        ("keywords", "error"),
        [
            pytest.param({"password": "wrong"}, neon_async.InvalidPasswordError, id="wrong password"),
            pytest.param({"dbname": "nothing"}, neon_async.DatabaseNotFoundError, id="no such database"),
            pytest.param({"connect_timeout": 0.000001}, neon_async.ConnectTimeoutError, id="deadline"),
            pytest.param({"hostaddr": "127.0.0.1", "port": 1}, neon_async.ConnectError, id="no server"),
        ],
    )
    async def test_a_connect_that_fails_is_no_disconnect(
        self, postgres: LocalPostgres, keywords: dict[str, Any], error: type[Exception]
    ) -> None:
        async with engine_to(postgres, **keywords) as engine:
            with pytest.raises(sa.exc.OperationalError) as raised:
                await engine.connect()
        assert isinstance(original(raised.value), error)
        assert str(original(raised.value)) in str(raised.value)
        assert not raised.value.connection_invalidated

    async def test_an_error_of_usage_is_an_interface_error(self, postgres: LocalPostgres) -> None:
        """What a URL alone cannot show is refused by the first connect, before a socket is opened."""
        engine = sqlalchemy.ext.asyncio.create_async_engine(
            with_scheme(postgres.dsn), connect_args={"sslmode": "require", "trust_anchor": postgres.trust_anchor}
        )
        with pytest.raises(sa.exc.InterfaceError, match="sslmode") as raised:
            await engine.connect()
        assert isinstance(original(raised.value), neon_async.InsecureConfigurationError)
        await engine.dispose()

    @pytest.mark.parametrize(
        ("query", "error"),
        [
            pytest.param("SELECT nothing", sa.exc.ProgrammingError, id="no such column"),
            pytest.param("INSERT INTO once VALUES (1), (1)", sa.exc.IntegrityError, id="not unique"),
            pytest.param("SELECT 1/0", sa.exc.DBAPIError, id="division by zero"),
        ],
    )
    async def test_an_error_of_a_statement_is_that_of_the_dialect_of_asyncpg(
        self, engine: AsyncEngine, query: str, error: type[sa.exc.DBAPIError]
    ) -> None:
        async with engine.connect() as connection:
            await connection.execute(sa.text("CREATE TEMP TABLE once (a int PRIMARY KEY)"))
            with pytest.raises(error) as raised:
                await connection.execute(sa.text(query))
            assert type(raised.value) is error
            assert not raised.value.connection_invalidated
            assert raised.value.orig is not None
            assert raised.value.orig.sqlstate == original(raised.value).sqlstate  # type: ignore[attr-defined, union-attr]

    async def test_an_error_can_be_pickled(self, postgres: LocalPostgres) -> None:
        async with engine_to(postgres, password="wrong") as engine:
            with pytest.raises(sa.exc.OperationalError) as raised:
                await engine.connect()
        assert str(pickle.loads(pickle.dumps(raised.value.orig))) == str(raised.value.orig)

    async def test_a_session_feature_on_a_pooled_host_is_not_supported(
        self, pgbouncer: LocalPgBouncer, postgres: LocalPostgres
    ) -> None:
        async with engine_to(pgbouncer) as engine, engine.connect() as connection:
            with pytest.raises(sa.exc.NotSupportedError, match=postgres.host):
                await connection.execute(sa.text("LISTEN channel"))
            assert await scalar(connection, "SELECT 1") == 1


class TestPooledHost:
    async def test_transactions_and_prepared_statements_work(self, pgbouncer: LocalPgBouncer) -> None:
        async with engine_to(pgbouncer, pool_size=2) as engine:
            for number in range(5):
                async with engine.begin() as one, engine.begin() as other:
                    for connection in (one, other):
                        assert await scalar(connection, "SELECT 6 * 7") == 42
                        assert await scalar(connection, f"SELECT {number}") == number

    async def test_the_options_that_the_dialect_of_asyncpg_needs_do_no_harm(self, pgbouncer: LocalPgBouncer) -> None:
        """Documented by SQLAlchemy for PgBouncer: names of statements that are unique, no caches, and no pool."""
        options = {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
        }
        async with engine_to(pgbouncer, connect_args=options, poolclass=NullPool) as engine:
            for _ in range(3):
                async with engine.begin() as connection:
                    assert await scalar(connection, "SELECT 6 * 7") == 42

    async def test_a_schema_that_changes_costs_one_error_at_most(
        self, pgbouncer: LocalPgBouncer, postgres: LocalPostgres
    ) -> None:
        """With the dialect of asyncpg it fails until every process has been restarted."""
        async with admin_of(postgres) as admin, engine_to(pgbouncer) as engine:
            await admin.execute("DROP TABLE IF EXISTS changing; CREATE TABLE changing (a int)")
            async with engine.connect() as connection:
                await connection.execute(sa.text("SELECT * FROM changing"))
            await admin.execute("ALTER TABLE changing ADD COLUMN b text")
            try:
                async with engine.connect() as connection:
                    await connection.execute(sa.text("SELECT * FROM changing"))
            except sa.exc.NotSupportedError as error:
                assert isinstance(original(error), asyncpg.InvalidCachedStatementError)
            async with engine.connect() as connection:
                result = await connection.execute(sa.text("SELECT * FROM changing"))
                assert list(result.keys()) == ["a", "b"]
            await admin.execute("DROP TABLE changing")
