"""The TCP socket: its options, the race of the addresses, and what is reported when none accepts."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from support.negotiations import connected
from support.probes import HANG, assert_secret_free, black_hole, nothing_is_left, password_of, resolve_to

import neon_async
from neon_async._wire import race
from neon_async._wire.tcp import Address, in_order
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

NEGOTIATIONS = pytest.mark.parametrize("negotiation", ["direct", "postgres"])


def option(connection: Any, level: int, name: int) -> int:
    value: int = connection._transport.get_extra_info("socket").getsockopt(level, name)
    return value


@NEGOTIATIONS
async def test_the_socket_has_the_default_options(postgres: LocalPostgres, negotiation: str) -> None:
    async with connected(postgres, sslnegotiation=negotiation) as connection:
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000


async def test_the_socket_has_the_options_that_were_set(postgres: LocalPostgres) -> None:
    async with connected(
        postgres, keepalives_idle=7, keepalives_interval=8, keepalives_count=9, tcp_user_timeout=12_345
    ) as connection:
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 8
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 9
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_345


@pytest.mark.parametrize(
    "limits",
    [
        {"keepalives_idle": 1, "keepalives_interval": 1, "keepalives_count": 1, "tcp_user_timeout": 1},
        {
            "keepalives_idle": 32767,
            "keepalives_interval": 32767,
            "keepalives_count": 127,
            "tcp_user_timeout": 2147483647,
        },
    ],
    ids=["smallest", "largest"],
)
async def test_the_smallest_and_largest_accepted_options_work_on_this_system(
    postgres: LocalPostgres, limits: dict[str, Any]
) -> None:
    async with connected(postgres, **limits):
        pass


async def test_keepalives_and_the_user_timeout_can_be_disabled(postgres: LocalPostgres) -> None:
    async with connected(postgres, keepalives=0, tcp_user_timeout=0) as connection:
        assert not option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY)


def refused_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


async def test_an_address_that_does_not_answer_does_not_delay_the_next_for_long(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = postgres.dsn.partition("?")[0]
    with black_hole() as hole:
        resolve_to(monkeypatch, ("127.0.0.1", hole), ("127.0.0.1", postgres.port))
        # Without the race this would take the kernel's two minutes, and connect_timeout would expire.
        async with nothing_is_left(), connected(postgres, dsn, connect_timeout=HANG) as connection:
            peer = connection._transport.get_extra_info("peername")
            assert peer == ("127.0.0.1", postgres.port)


async def test_addresses_that_refuse_connections_are_skipped(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = [("127.0.0.1", refused_port()) for _ in range(5)]
    resolve_to(monkeypatch, *dead, ("127.0.0.1", postgres.port))
    async with connected(postgres, postgres.dsn.partition("?")[0]) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_name_without_an_address_is_a_connect_error(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # getaddrinfo() never returns an empty list, but a patched one may.
    resolve_to(monkeypatch)
    with pytest.raises(neon_async.ConnectError):
        await neon_async.connect(postgres.dsn.partition("?")[0], trust_anchor=postgres.trust_anchor)


async def test_the_error_names_every_address_and_its_reason(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, ("127.0.0.1", refused_port()), ("127.0.0.2", refused_port()))
    async with nothing_is_left():
        both = r"127\.0\.0\.1: .*refused.*127\.0\.0\.2: .*refused"
        with pytest.raises(neon_async.ConnectError, match=both) as caught:
            await neon_async.connect(postgres.dsn.partition("?")[0], trust_anchor=postgres.trust_anchor)
    assert caught.value.retryable


async def test_the_losers_of_a_race_are_closed(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_CONNECT_DELAY", 0.0)
    resolve_to(monkeypatch, *[("127.0.0.1", postgres.port)] * 8)
    async with nothing_is_left():
        for _ in range(10):
            async with connected(postgres, postgres.dsn.partition("?")[0]) as connection:
                assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST"])
async def test_localhost_is_resolved_and_verified_by_its_name(postgres: LocalPostgres, name: str) -> None:
    dsn = postgres.dsn.replace(postgres.host, name).partition("?")[0]
    async with connected(postgres, dsn) as connection:
        assert neon_async.connection_tls_report(connection).server_name == "localhost"


async def test_the_name_is_verified_not_the_address(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, ("127.0.0.1", postgres.port))
    dsn = postgres.dsn.replace(postgres.host, "ep-other-endpoint-654321.us-east-2.aws.neon.tech")
    with pytest.raises(neon_async.CertificateError, match="it is for another name"):
        await neon_async.connect(dsn, trust_anchor=postgres.trust_anchor)


def addresses(text: str) -> list[Address]:
    """Return one address per word: IPv6 for those with a colon."""
    return [Address(socket.AF_INET6 if ":" in word else socket.AF_INET, (word, 5432)) for word in text.split()]


@pytest.mark.parametrize(
    ("resolved", "order"),
    [
        pytest.param("::1 ::2 1 2", "::1 1 ::2 2", id="IPv6 preferred"),
        pytest.param("1 2 3 ::1", "1 ::1 2 3", id="IPv4 preferred"),
        pytest.param("1 2", "1 2", id="one family"),
        pytest.param("", "", id="none"),
    ],
)
def test_the_address_families_alternate(resolved: str, order: str) -> None:
    assert " ".join(map(str, in_order(addresses(resolved)))) == order


async def test_no_error_of_a_dial_contains_the_password(postgres: LocalPostgres) -> None:
    password = password_of(postgres)
    dsn = postgres.dsn.replace(f":{postgres.port}/", f":{refused_port()}/")
    with pytest.raises(neon_async.ConnectError) as caught:
        await neon_async.connect(dsn, trust_anchor=postgres.trust_anchor)
    assert_secret_free(caught.value, password)
