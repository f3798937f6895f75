"""A new user follows the quick start from an empty folder, with `neon-async dev` as the database."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from support.dev_command import DevCommand, dev_command
from support.documents import ROOT, blocks
from support.processes import HANG, wait_for

PAGE = "docs/quick-start.md"
# What the page says to add for `neon-async dev`, and to answer sooner during an outage.
VERIFIED = 'sslmode="verify-full"'
ANCHOR = 'trust_anchor=os.environ.get("DATABASE_TRUST_ANCHOR")'
SOONER = "acquire_timeout=5.0, command_timeout=10.0"
START = {"FastAPI(": ("-m", "uvicorn", "main:app", "--port"), "web.Application(": ("-m", "main_on_port")}


def files_of(framework: str) -> dict[str, str]:
    """Return the files of the page, for one framework, with what the page says to add."""
    files = {block.title: block.code.lstrip("\n") for block in blocks() if block.page == PAGE and block.title}
    [service] = [block.code for block in blocks() if block.page == PAGE and framework in block.code]
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert f"`{ANCHOR}`" in text
    assert f"`lifespan(..., {SOONER})`" in text
    files = {name: code.replace(VERIFIED, f"{VERIFIED}, {ANCHOR}") for name, code in files.items()}
    assert service.count(VERIFIED) == 1
    return files | {"main.py": service.lstrip("\n").replace(VERIFIED, f"{VERIFIED}, {ANCHOR}, {SOONER}")}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user can enter, as PostgreSQL does where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


@contextlib.contextmanager
def serving(framework: str, folder: Path, dev: DevCommand) -> Iterator[httpx2.Client]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    # `python main.py` listens on port 8080, which may be taken here.
    (folder / "main_on_port.py").write_text("import main, sys\nmain.web.run_app(main.app, port=int(sys.argv[1]))\n")
    process = subprocess.Popen(
        [sys.executable, *START[framework], port],
        cwd=folder,
        env=os.environ | dev.variables() | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG) as client:
            wait_for(lambda: process.poll() is not None or answers(client))
            assert process.poll() is None, "the service did not start"
            yield client
    finally:
        process.terminate()
        process.wait(HANG)


def answers(client: httpx2.Client) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return client.get("/ready").status_code == 200
    return False


@pytest.mark.parametrize("framework", START)
def test_a_service_of_the_quick_start_works_sleeps_and_survives_an_outage(framework: str, folder: Path) -> None:
    for name, text in files_of(framework).items():
        (folder / name).write_text(text, encoding="utf-8")
    assert len((folder / "main.py").read_text().splitlines()) < 40
    with dev_command("--schema", str(folder / "schema.sql"), terminal=True) as dev:
        dev.wait_until_ready()
        with serving(framework, folder, dev) as client:
            assert client.post("/orders/tea").json() == 1
            assert client.get("/orders").json() == ["tea"]

            dev.press("s")
            wait_for(lambda: dev.says(" asleep"))
            assert client.get("/ready").status_code == 200
            assert not dev.says(" waking")
            assert client.get("/orders").json() == ["tea"]
            assert dev.says(" awake")

            dev.press("r")
            wait_for(lambda: dev.says(" refusing"))
            dev.press("c")
            wait_for(lambda: dev.says(" cut: "))
            # The first request may lose its connection, and the second one waits for another.
            assert client.post("/orders/coffee").status_code == 503
            refused = client.get("/orders")
            assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
            assert client.get("/ready").status_code == 503

            dev.press("r")
            wait_for(lambda: dev.says(" accepting"))
            assert client.get("/orders").json() == ["tea"]


def test_the_programs_of_the_quick_start_work(folder: Path) -> None:
    for name, text in files_of("FastAPI(").items():
        (folder / name).write_text(text, encoding="utf-8")
    with dev_command("--schema", str(folder / "schema.sql")) as dev:
        dev.wait_until_ready()
        environment = os.environ | dev.variables()

        def output_of(name: str) -> str:
            command = [sys.executable, "-W", "error", name]
            return subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=True
            ).stdout

        assert output_of("database.py") == "1\n"
        assert output_of("script.py") == "1\n"
        worker = subprocess.Popen([sys.executable, "worker.py"], cwd=folder, env=environment)
        try:
            wait_for(lambda: worker.poll() is not None or output_of("script.py") == "0\n")
            assert worker.poll() is None
        finally:
            worker.terminate()
            worker.wait(HANG)
