"""`loop=`, as older code passes it to asyncpg: the running event loop is accepted, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from support.probes import connected, make_pool

import neon_async
from neon_async._driver.loop import LoopAdapter
from neon_async.testing import LocalPostgres

DSN = "postgresql://alex:s3cret@db.example.com/neondb"
CALLS = [pytest.param(neon_async.connect, id="connect"), pytest.param(neon_async.create_pool, id="create_pool")]


@pytest.mark.anyio
async def test_the_running_event_loop_is_accepted(postgres: LocalPostgres) -> None:
    loop = asyncio.get_running_loop()
    async with make_pool(postgres, loop=loop) as pool, connected(postgres, loop=loop) as connection:
        assert await pool.fetchval("SELECT 1") == await connection.fetchval("SELECT 1") == 1


class Posing(asyncio.SelectorEventLoop):
    """An event loop that says that it is any other."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = asyncio.SelectorEventLoop.__hash__


@pytest.mark.anyio
@pytest.mark.parametrize("call", CALLS)
async def test_any_other_is_refused_by_the_call(call: Callable[..., Any]) -> None:
    adapter = LoopAdapter.__new__(LoopAdapter)  # what asyncpg itself is given as `loop=`
    with contextlib.closing(asyncio.new_event_loop()) as other, contextlib.closing(Posing()) as posing:
        for loop in (other, posing, adapter, "running", False, 0, asyncio):
            with pytest.raises(neon_async.InsecureConfigurationError, match=r"pass asyncio\.get_running_loop\(\)"):
                call(DSN, loop=loop)


@pytest.mark.parametrize("call", CALLS)
def test_one_that_does_not_run_is_refused(call: Callable[..., Any]) -> None:
    with (
        contextlib.closing(asyncio.new_event_loop()) as loop,
        pytest.raises(neon_async.InsecureConfigurationError, match="is not the running event loop"),
    ):
        call(DSN, loop=loop)
