"""Real servers that have much to say after the login: a login trigger of PostgreSQL 17, and PgBouncer 1.26."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator

import pytest
from support.negotiations import connected
from support.pgbouncer import LocalPgBouncer, installed_version

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def database_with_login_trigger(postgres: LocalPostgres, body: str) -> AsyncIterator[str]:
    """Create a database whose login trigger runs `body`, and return the DSN of the database."""
    name = f"greets_{secrets.token_hex(4)}"
    dsn = postgres.dsn.replace("/neondb", f"/{name}")
    assert dsn != postgres.dsn
    async with connected(postgres) as admin:
        if admin.get_server_version().major < 17:
            pytest.skip("login triggers need PostgreSQL 17")
        await admin.execute(f"CREATE DATABASE {name}")
        try:
            async with connected(postgres, dsn) as owner:
                await owner.execute(
                    f"CREATE FUNCTION greet() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$;"
                    "CREATE EVENT TRIGGER greet ON login EXECUTE FUNCTION greet()"
                )
            yield dsn
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("RAISE NOTICE '%', repeat('x', 9000);", id="9 kB"),
        pytest.param("RAISE NOTICE '%', repeat('x', 1000000);", id="1 MB"),
        pytest.param("FOR i IN 1..100 LOOP RAISE WARNING '%', repeat('x', 8000); END LOOP;", id="100 warnings"),
    ],
)
@pytest.mark.parametrize("negotiation", ["direct", "postgres"])
async def test_a_login_trigger_may_send_long_notices(postgres: LocalPostgres, body: str, negotiation: str) -> None:
    async with (
        database_with_login_trigger(postgres, body) as dsn,
        connected(postgres, dsn, sslnegotiation=negotiation) as connection,
    ):
        assert await connection.fetchval("SELECT 1") == 1


async def test_the_error_of_a_login_trigger_is_the_servers_however_long(postgres: LocalPostgres) -> None:
    body = "IF current_setting('application_name') <> '' THEN RAISE EXCEPTION '%', repeat('x', 20000); END IF;"
    async with database_with_login_trigger(postgres, body) as dsn:
        async with connected(postgres, dsn) as connection:
            assert await connection.fetchval("SELECT 1") == 1
        with pytest.raises(Exception, match=r"x{20000}"):
            async with connected(postgres, dsn, server_settings={"application_name": "refused"}):
                pass


async def test_pgbouncer_may_greet_with_a_long_notice(pgbouncer_installed: None, postgres: LocalPostgres) -> None:
    if (installed_version() or (0, 0)) < (1, 26):
        pytest.skip("login_notify_message needs PgBouncer 1.26")
    async with LocalPgBouncer(postgres, settings={"login_notify_message": "welcome " * 1200}) as pgbouncer:
        connection = await neon_async.connect(pgbouncer.dsn, trust_anchor=pgbouncer.trust_anchor)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
