"""The site contains every setting, error and public name of the package, and what it says of them is so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from support.documents import DOCUMENTS, ROOT

import neon_async
from neon_async._cli import dev
from neon_async._config.keywords import KEYWORDS
from neon_async._pool.options import PoolOptions


def load_tables() -> ModuleType:
    """Load docs/tables.py, as MkDocs does."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.append(str(ROOT / "docs"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load_tables()


def page(name: str) -> str:
    """Return a page as MkDocs renders it."""
    return str(TABLES.on_page_markdown((ROOT / "docs" / name).read_text(encoding="utf-8")))


SETTINGS, ERRORS, REFERENCE = page("settings.md"), page("errors.md"), page("reference.md")


def entry(text: str, name: str) -> str:
    """Return the entry of one setting or error."""
    return text.split(f"### `{name}` {{ #{name} }}\n")[1].split("\n#")[0]


def test_no_placeholder_is_left() -> None:
    pages = [page(str(path.relative_to(ROOT / "docs"))) for path in DOCUMENTS if path.name != "README.md"]
    assert [found for text in pages for found in re.findall(r"\{\{.*?\}\}", text)] == []


@pytest.mark.parametrize("keyword", [pytest.param(keyword, id=keyword.name) for keyword in KEYWORDS])
def test_every_keyword_is_on_the_site_with_its_names_and_its_variable(keyword: object) -> None:
    assert isinstance(keyword, type(KEYWORDS[0]))
    if keyword.refused:
        [text] = [line for line in SETTINGS.splitlines() if line.startswith("| ") and f"`{keyword.name}`" in line][:1]
        assert keyword.reader.why[1:] in text  # type: ignore[attr-defined]
    else:
        text = entry(SETTINGS, keyword.name)
        assert keyword.note in text
        assert f"- Value: {keyword.reader.expected}\n" in text
    for name in (*keyword.names, *([keyword.variable] if keyword.variable else [])):
        assert f"`{name}`" in text or name == keyword.name


@pytest.mark.parametrize("name", [option.name for option in fields(PoolOptions)])
def test_every_option_of_a_pool_is_on_the_site(name: str) -> None:
    text = entry(SETTINGS, name)
    assert "- Value: " in text
    assert "- Default: " in text


@pytest.mark.parametrize("variable", [keyword.variable for keyword in KEYWORDS if keyword.variable])
def test_every_environment_variable_is_on_the_site(variable: str) -> None:
    assert f"| `{variable}` | " in SETTINGS


def test_every_error_is_on_the_site_and_only_those() -> None:
    public = [getattr(neon_async, name) for name in neon_async.__all__]
    errors = {item.__name__ for item in public if isinstance(item, type) and issubclass(item, Exception)}
    assert set(re.findall(r"^### `(\w+)`", ERRORS, re.MULTILINE)) == errors - {"NeonAsyncError"}
    assert set(TABLES.ADVICE) == errors - {"NeonAsyncError"}


@pytest.mark.parametrize("name", sorted(TABLES.ADVICE))
def test_what_the_site_says_of_an_error_is_so(name: str) -> None:
    error, text = getattr(neon_async, name), entry(ERRORS, name)
    assert f"- Can the same call succeed later: {'yes' if error.retryable else 'no'}\n" in text
    assert "- Can anything have been committed: " in text
    assert "- What to do: " in text
    assert all(f"{base.__name__}`" in text for base in error.__bases__)


def test_the_tree_of_errors_is_that_of_the_package() -> None:
    block = ERRORS.split("```text\n")[1].split("```")[0]
    documented: list[tuple[str, str]] = []
    path: list[str] = []
    for prefix, name in re.findall(r"^([│├└─ ]*)(\w+Error)\b", block, re.MULTILINE):
        path = [*path[: len(prefix) // 4], name]
        documented.append((path[-2] if len(path) > 1 else "Exception", name))
    errors = {name: getattr(neon_async, name) for name in ("NeonAsyncError", *TABLES.ADVICE)}
    assert sorted(documented) == sorted((error.__bases__[0].__name__, name) for name, error in errors.items())
    retryable = set(re.findall(r"(\w+Error)\b[^\n]* retryable$", block, re.MULTILINE))
    assert retryable == {name for name, error in errors.items() if error.retryable}
    also = dict(re.findall(r"(\w+Error) +also ([\w. ]+)", block))
    others = {name: [base.__name__ for base in error.__bases__[1:]] for name, error in errors.items()}
    assert {name: [full.rpartition(".")[2] for full in also[name].split(" and ")] for name in also} == {
        name: bases for name, bases in others.items() if bases
    }


def public_modules() -> list[str]:
    """Return the names of the modules that users import besides the package itself."""
    found = [path.stem for path in TABLES.PACKAGE.iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)]
    return sorted(found)


def test_every_public_module_is_on_the_site() -> None:
    assert sorted(TABLES.MODULES) == public_modules()


@pytest.mark.parametrize("module", ["", *TABLES.MODULES])
def test_every_public_name_is_on_the_site(module: str) -> None:
    full_name = f"neon_async.{module}".rstrip(".")
    names = importlib.import_module(full_name).__all__
    shown = {*re.findall(r"^::: (.+)$", REFERENCE, re.MULTILINE)}
    on_the_page_of_errors = set(TABLES.ADVICE) if not module else set()
    assert {f"{full_name}.{name}" for name in names if name not in on_the_page_of_errors} <= shown


# ---------------------------------------------------------------------------------------------------------------------
# What other pages name


def test_every_test_that_the_page_about_security_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page("security.md"))
    assert len(named) >= 12
    defined = {
        (path, node.name)
        for path in {path for path, _ in named}
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert [test for test in named if test not in defined] == []


def texts_of_the_package() -> str:
    """Return every string in the code of the package. What a string formats divides it."""
    paths = sorted(Path(TABLES.PACKAGE).rglob("*.py"))
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_every_message_that_the_page_about_troubles_explains_exists() -> None:
    messages = re.findall(r"^### `(.+)`$", page("guides/troubleshooting.md"), re.MULTILINE)
    texts = texts_of_the_package()
    assert len(messages) >= 15
    assert [message for message in messages if message not in texts] == []


def test_the_events_of_the_log_on_the_site_are_those_of_a_pool() -> None:
    documented = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \| ", page("guides/observability.md"), re.MULTILINE)))
    )
    source = "".join(path.read_text(encoding="utf-8") for path in (TABLES.PACKAGE / "_pool").glob("*.py"))
    logged = set(re.findall(r'event="(\w+)"', source)) | set(re.findall(r'else "(outage_\w+)"', source))
    logged |= {name.lower() for name in re.findall(r"^    ([A-Z_]+) = \"(?:was|could|were)", source, re.MULTILINE)}
    assert documented - {"event"} == logged


def test_every_key_of_the_command_dev_is_on_the_site() -> None:
    shown = re.findall(r"^\| `(\w)` \|", page("guides/local-development.md"), re.MULTILINE)
    assert shown == [*dev._KEYS, dev._END_KEY]


def test_every_benchmark_on_the_site_exists() -> None:
    scripts = set(re.findall(r"`(\w+\.py)`", page("benchmarks.md")))
    assert scripts <= {path.name for path in (ROOT / "benchmarks").glob("*.py")}


def test_every_example_is_on_the_site() -> None:
    text, folder = page("examples.md"), ROOT / "docs" / "examples"
    named = set(re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE))
    assert named == {path.name for path in folder.iterdir() if path.is_dir()}
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".md")]
    assert len(files) >= 14
    assert [path for path in files if f"\n{path.read_text(encoding='utf-8')}```" not in text] == []
