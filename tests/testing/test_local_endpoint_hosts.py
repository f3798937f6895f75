"""`LocalEndpoint` with a pooled host, on a port of one's choice, called from other threads."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.endpoints import session
from support.pgbouncer import LocalPgBouncer
from support.probes import until

import neon_async
from neon_async import ConfigurationError
from neon_async.testing import LocalEndpoint, LocalEndpointError, LocalPostgres

pytestmark = pytest.mark.anyio


async def test_both_hosts_of_an_endpoint_suspend_and_wake_together(
    postgres: LocalPostgres, pgbouncer: LocalPgBouncer
) -> None:
    async with (
        LocalEndpoint(postgres, wake_time=0.0, pooler=pgbouncer) as endpoint,
        neon_async.create_pool(endpoint.dsn, trust_anchor=endpoint.trust_anchor) as direct,
        neon_async.create_pool(endpoint.pooled_dsn, trust_anchor=endpoint.trust_anchor) as pooled,
    ):
        assert [await pool.fetchval("SELECT 1") for pool in (direct, pooled)] == [1, 1]
        assert endpoint.connections == 2
        endpoint.suspend()
        assert (endpoint.connections, endpoint.state) == (0, "suspended")
        await until(lambda: direct.get_idle_size() == pooled.get_idle_size() == 0)
        assert [await pool.fetchval("SELECT 1") for pool in (pooled, direct)] == [1, 1]
        assert endpoint.wakes == 1


async def test_an_endpoint_without_a_pooler_says_how_to_get_a_pooled_host(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        with pytest.raises(LocalEndpointError, match="pooler=LocalPooler"):
            _ = endpoint.pooled_dsn


async def test_it_listens_on_the_port_that_was_asked_for(postgres: LocalPostgres) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        port = endpoint.port
        other = LocalEndpoint(postgres, port=port)
        with pytest.raises(
            LocalEndpointError, match=f"Port {port} of 127.0.0.1 cannot be used: Address already in use"
        ):
            await other.__aenter__()
    async with other, session(other) as con:
        assert other.port == port
        assert await con.fetchval("SELECT 1") == 1


async def test_the_pooled_host_has_the_next_port(postgres: LocalPostgres, pgbouncer: LocalPgBouncer) -> None:
    port = 10_000 + os.getpid() % 10_000  # below those that systems choose from
    async with LocalEndpoint(postgres, port=port + 1):
        other = LocalEndpoint(postgres, pooler=pgbouncer, port=port)
        with pytest.raises(LocalEndpointError, match=f"Port {port + 1} of"):
            await other.__aenter__()
    async with other:
        assert urlsplit(other.pooled_dsn).port == port + 1 == other.port + 1


@pytest.mark.parametrize("port", [-1, 65536, "5432", 1.0])
def test_a_port_that_is_none_is_refused(port: Any, postgres: LocalPostgres) -> None:
    with pytest.raises(ConfigurationError, match=f"port must be a whole number from 0 to 65,?535, not {port!r}"):
        LocalEndpoint(postgres, port=port)


async def test_each_change_of_the_state_is_reported_once(postgres: LocalPostgres) -> None:
    states: list[str] = []
    async with LocalEndpoint(postgres, wake_time=0.0, on_state=states.append) as endpoint:
        endpoint.suspend()
        endpoint.suspend()
        async with session(endpoint):
            pass
    assert states == ["awake", "suspended", "waking", "awake", "suspended", "closed"]


@pytest.mark.parametrize(
    ("act", "holds"),
    [
        pytest.param(LocalEndpoint.suspend, lambda one: one.state == "suspended", id="suspend"),
        pytest.param(LocalEndpoint.cut, lambda one: one.connections == 0, id="cut"),
        pytest.param(LocalEndpoint.freeze, lambda one: "frozen" in repr(one), id="freeze"),
        pytest.param(LocalEndpoint.thaw, lambda one: "frozen" not in repr(one), id="thaw"),
        pytest.param(LocalEndpoint.refuse, lambda one: "refusing" in repr(one), id="refuse"),
        pytest.param(LocalEndpoint.accept, lambda one: "refusing" not in repr(one), id="accept"),
    ],
)
async def test_a_method_that_is_called_in_another_thread_is_complete_when_it_returns(
    act: Callable[[LocalEndpoint], None], holds: Callable[[LocalEndpoint], bool], postgres: LocalPostgres
) -> None:
    async with LocalEndpoint(postgres) as endpoint:
        if act in (LocalEndpoint.thaw, LocalEndpoint.accept):
            endpoint.freeze()
            endpoint.refuse()
        with socket.create_connection(("127.0.0.1", endpoint.port)):
            await until(lambda: endpoint.connects == 1)

            def act_and_look() -> bool:
                act(endpoint)
                return holds(endpoint)

            assert await asyncio.to_thread(act_and_look)


def test_an_event_loop_that_has_ended_is_reported(postgres: LocalPostgres) -> None:
    with asyncio.Runner() as runner:
        endpoint = LocalEndpoint(postgres)
        runner.run(endpoint.__aenter__())

        async def call() -> None:
            await asyncio.to_thread(endpoint.suspend)

        runner.run(call())
        runner.run(endpoint.__aexit__(None, None, None))
    with pytest.raises(LocalEndpointError, match="is closed"):
        endpoint.suspend()


async def test_what_on_state_raises_reaches_a_caller_in_another_thread(postgres: LocalPostgres) -> None:
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context["exception"]))

    def refuse(state: str) -> None:
        if state == "suspended" and not heard:
            raise ValueError(state)

    async with LocalEndpoint(postgres, on_state=refuse) as endpoint:
        with pytest.raises(ValueError, match="suspended"):
            await asyncio.to_thread(endpoint.suspend)
