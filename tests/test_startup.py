"""What an import of the package loads, and what it leaves for the first use."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import neon_async
from neon_async.testing import LocalPostgres

DSN = "postgresql://alex:s3cret@ep-a-b-123456.us-east-2.aws.neon.tech/neondb"
POOL = f"neon_async.create_pool({DSN!r})"


# What opens and runs connections.
CONNECTING = (
    *("_config.connection", "_config.keywords", "_driver.connector", "_driver.loop", "_driver.pooled"),
    *("_driver.protocol", "_neon.sql", "_wire.dial", "_wire.tls", "_wire.transport", "_wire.trust"),
)
# Every call that most services make, in a pool that has just been created.
A_DAYS_WORK = """
import asyncio, sys, neon_async

async def main(dsn, anchor):
    pool = neon_async.create_pool(dsn, trust_anchor=anchor, max_size=1)
    before = set(sys.modules)
    async with pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT $1::int", 1)
            await connection.executemany("SELECT $1::int", [(1,), (2,)])
            statement = await connection.prepare("SELECT 1")
            await statement.fetch()
            async with connection.transaction(isolation="serializable", settings={"app.tenant": "7"}):
                await connection.execute("SELECT 1")
                async for row in connection.cursor("SELECT 1"):
                    pass
        await pool.execute("SELECT 1")
        await pool.run_transaction(lambda connection: connection.execute("SELECT 1"))
    print(*[name for name in set(sys.modules) - before if name.startswith("neon_async")])

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def printed_by(code: str, *arguments: str) -> list[str]:
    """Return the words that a new interpreter prints for `code`."""
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return finished.stdout.split()


@pytest.mark.parametrize("code", ["import neon_async", "from neon_async import connect, create_pool, Pool"])
def test_the_import_loads_nothing_that_opens_connections(code: str) -> None:
    loaded = [name for name in printed_by(f"import sys; {code}; print(*sys.modules)") if name.startswith("neon_async.")]
    assert "neon_async._pool.pool" in loaded
    opens = ("neon_async._wire", "neon_async._pool.supply", *(f"neon_async.{name}" for name in CONNECTING))
    assert not [name for name in loaded if name.startswith(opens)]


@pytest.mark.parametrize("call", ["connect", "create_pool"])
def test_what_opens_connections_is_loaded_by_the_call_that_asks_for_one(call: str) -> None:
    loaded = printed_by(f"import sys, neon_async; opened = neon_async.{call}({DSN!r}); print(*sys.modules)")
    assert {f"neon_async.{name}" for name in CONNECTING} <= set(loaded)


@pytest.mark.parametrize("call", ["connect", "create_pool", "Connection.transaction", "Pool.transaction"])
def test_the_type_hints_of_a_call_can_be_evaluated_before_it_is_made(call: str) -> None:
    assert "return" in printed_by(f"import neon_async, typing; print(*typing.get_type_hints(neon_async.{call}))")


def test_nothing_is_imported_while_a_pool_is_used(postgres: LocalPostgres) -> None:
    assert printed_by(A_DAYS_WORK, postgres.dsn, postgres.trust_anchor.decode()) == []


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that are loaded once a pool has been created."""
    return set(printed_by(f"import sys, neon_async; {POOL}; print(*sys.modules)"))


@pytest.mark.parametrize(
    "module",
    [
        pytest.param("_driver.listen", id="listen()"),
        pytest.param("_driver.stale", id="the judgement of stale statements"),
        pytest.param("_patch", id="patch_asyncpg()"),
        pytest.param("_pool.events", id="events, without on_event"),
        pytest.param("_pool.health", id="the answer of health()"),
        pytest.param("_pool.stats", id="the answer of stats()"),
        pytest.param("_wire.culprits", id="the explanation of a refused certificate"),
        pytest.param("_wire.report", id="the answer of tls_report()"),
        pytest.param("_wire.revocation", id="revocation"),
    ],
)
def test_a_pool_is_created_without_what_it_does_not_need(loaded: set[str], module: str) -> None:
    assert "neon_async._pool.pool" in loaded
    assert f"neon_async.{module}" not in loaded


def test_a_pool_with_on_event_loads_the_events() -> None:
    pool = POOL.replace("')", "', on_event=print)")
    assert printed_by(f"import sys, neon_async; {pool}; print('neon_async._pool.events' in sys.modules)") == ["True"]


def test_every_public_name_is_listed_before_its_module_is_loaded() -> None:
    code = "import neon_async; print(*sorted(set(neon_async.__all__) - set(dir(neon_async))), 'end')"
    assert printed_by(code) == ["end"]


def test_a_star_import_binds_every_public_name() -> None:
    code = "from neon_async import *; import neon_async; print(*set(neon_async.__all__) - set(globals()), 'end')"
    assert printed_by(code) == ["end"]


@pytest.mark.parametrize("name", sorted(neon_async._MODULE_OF))  # type: ignore[attr-defined, unused-ignore]
def test_a_name_that_is_loaded_first_is_public_in_every_respect(name: str) -> None:
    code = (
        f"import neon_async, pickle, typing; value = neon_async.{name}; print(value.__module__); "
        "print(pickle.loads(pickle.dumps(value)) is value); typing.get_type_hints(value) if type(value) is type else 0"
    )
    assert printed_by(code) == ["neon_async", "True"]


@pytest.mark.parametrize("call", ["stats", "health"])
def test_an_answer_that_was_made_before_its_class_was_named_is_pickled_by_its_public_name(call: str) -> None:
    pickled = printed_by(f"import neon_async, pickle; print(pickle.dumps({POOL}.{call}()).hex())")
    data = bytes.fromhex(pickled[0])
    assert b"neon_async._" not in data
    assert type(pickle.loads(data)) is getattr(neon_async, f"Pool{call.capitalize()}")


def test_a_name_that_does_not_exist_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match=r"^module 'neon_async' has no attribute 'lisen'$"):
        neon_async.lisen  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(neon_async, "_driver_that_does_not_exist")
