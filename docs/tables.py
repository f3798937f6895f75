"""Write the parts of the site that are made from tables of the package: settings, errors and public names.

MkDocs calls `on_page_markdown()` for each page (`hooks` in mkdocs.yml). A line `{{ name }}` of a page is replaced by
what the function of that name in `PARTS` returns, so that no page can lack a setting, an error or a name.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import NamedTuple

import asyncpg
from charts import charts

import neon_async
from neon_async._config.keyword_readers import Refused
from neon_async._config.keywords import KEYWORDS, Keyword
from neon_async._config.readers import Choice
from neon_async._pool.options import PoolOptions

PACKAGE = Path(inspect.getfile(neon_async)).parent
EXAMPLES = Path(__file__).parent / "examples"
LANGUAGES = {".py": "python", ".sql": "sql", ".ini": "ini", ".mako": "mako"}  # of the files of an example
# The modules with public names besides the package itself, in the order of the reference.
MODULES = ("fastapi", "aiohttp", "sqlalchemy", "events", "opentelemetry", "prometheus", "testing", "pytest_plugin")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the placeholders of one page."""
    return re.sub(r"^\{\{ (\w+) \}\}$", lambda found: PARTS[found[1]](), markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: object) -> str:
    """Allow long names of code to be broken in tables: behind `/`, `_`, `=` and `::`, and not within a word."""

    def allow(cell: re.Match[str]) -> str:
        return re.sub(r"(?<=<code>)[^<]+", lambda name: re.sub("::|[/_=]", r"\g<0><wbr>", name[0]), cell[0])

    return re.sub(r"<t[dh].*?</t[dh]>", allow, html, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def connection_settings() -> str:
    """Return an entry for each keyword of a connection that can be given."""
    return "\n".join(_keyword_entry(keyword) for keyword in KEYWORDS if not keyword.refused)


def refused_settings() -> str:
    """Return a table of the keywords that are known and refused."""
    rows = [
        (_code(keyword.names), _code([keyword.variable] if keyword.variable else []), _sentence(keyword.reader.why))
        for keyword in KEYWORDS
        if isinstance(keyword.reader, Refused)
    ]
    return _table(("Keyword", "Variable", "Why, and what to do"), rows)


def pool_settings() -> str:
    """Return an entry for each option of a pool."""
    texts = _attributes(PoolOptions)
    return "\n".join(_option_entry(option, texts[option.name]) for option in fields(PoolOptions))


def variables() -> str:
    """Return a table of the environment variables."""
    rows = [
        (_code([keyword.variable]), "refused" if keyword.refused else f"[`{keyword.name}`](#{keyword.name})")
        for keyword in KEYWORDS
        if keyword.variable
    ]
    return _table(("Variable", "Keyword"), rows)


def _keyword_entry(keyword: Keyword) -> str:
    reader = keyword.reader
    facts = [("Value", reader.expected), ("Default", _default_of(keyword)), ("Unit", reader.unit)]
    facts.append(("Environment", _code([keyword.variable] if keyword.variable else [])))
    facts.append(("Also", _code(keyword.aliases)))
    facts.append(("Also, in code only", _code(keyword.code_aliases)))
    facts.append(("Given by", "code only" if keyword.code_only else ""))
    if isinstance(reader, Choice) and (reader.weakness or reader.advice):
        why = f"it {reader.weakness}. " if reader.weakness else ""
        facts.append(("Any other value is refused", f"{why}{reader.advice}".strip()))
    if keyword.can_be_off:
        facts.append(("Switched off", f'`{keyword.name}=""` in code, whatever the DSN and the environment say'))
    return _entry(keyword.name, keyword.note, facts)


def _default_of(keyword: Keyword) -> str:
    if keyword.required:
        return "none; it must be given"
    return _value(keyword.default) if keyword.default is not None else "none"


def _option_entry(option: Field[object], text: str) -> str:
    reader = option.metadata.get("reader")
    default = option.default
    assert default is not MISSING
    shown = f"{default.__module__}.{default.__qualname__}" if isinstance(default, type) else _value(default)
    expected = reader.expected if reader else "a whole number from 0 to max_size"
    if option.name == "init_size":
        expected = "a whole number from min_size to max_size"
    unit = (reader.unit if reader else "") or ("connections" if option.name.endswith("_size") else "")
    return _entry(option.name, text, [("Value", expected), ("Default", shown), ("Unit", unit)])


def _entry(name: str, text: str, facts: Iterable[tuple[str, str]]) -> str:
    lines = [f"### `{name}` {{ #{name} }}", "", text, ""]
    facts = list(facts)
    value = dict(facts).get("Value", "")
    # The text of a value names its unit already, where it is not a plain number.
    lines += [f"- {title}: {fact}" for title, fact in facts if fact and not (title == "Unit" and fact in value)]
    return "\n".join([*lines, ""])


def _attributes(cls: type) -> dict[str, str]:
    """Return the texts of the section `Attributes` of a docstring, by name."""
    section = (inspect.getdoc(cls) or "").split("Attributes:\n")[1].split("\n\n")[0]
    parts = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in parts}


def _value(value: object) -> str:
    """Return a default as a user would write it: words as they stand, and numbers without needless zeros."""
    if value is None or isinstance(value, bool):
        return f"`{value}`"
    return f"`{value:,g}`" if isinstance(value, float) else f"`{value}`"


# ---------------------------------------------------------------------------------------------------------------------
# Errors


class Advice(NamedTuple):
    """What a page says of an error besides its docstring: what of the call was kept, and what to do."""

    committed: str
    action: str


NOT_SENT = "no: nothing was sent"
NO_SESSION = "no: there was no session yet"
ADVICE = {
    "ConfigurationError": Advice(NOT_SENT, "Fix the parameter that the message names."),
    "InsecureConfigurationError": Advice(NOT_SENT, "Write what the message says, such as `sslmode=verify-full`."),
    "UnsupportedEventLoopError": Advice(NOT_SENT, "Run under asyncio or uvloop; with anyio, on its asyncio backend."),
    "ConnectError": Advice(NO_SESSION, "Retry. Check the host, DNS and the network if it stays."),
    "ProtocolError": Advice(NO_SESSION, "Check that host and port lead to PostgreSQL and not to a proxy."),
    "ConnectTimeoutError": Advice(NO_SESSION, "Retry. Raise `connect_timeout` if the compute needs longer to wake."),
    "TLSError": Advice(NO_SESSION, "Make the server offer TLS 1.3, or correct host and port."),
    "CertificateError": Advice(NO_SESSION, "Do not retry. Run `neon-async check`; it shows the chain."),
    "CertificateRevokedError": Advice(NO_SESSION, "Do not retry. Ask who runs the server for a new certificate."),
    "RevocationUnknownError": Advice(NO_SESSION, "Let the process reach `c.lencr.org` over HTTP, or use `advise`."),
    "AuthenticationError": Advice(NO_SESSION, "Check the role and what the server requests; the message names it."),
    "InvalidPasswordError": Advice(NO_SESSION, "Correct the role or the password."),
    "ChannelBindingError": Advice(NO_SESSION, "Do not retry. Find out what terminates TLS between you and the server."),
    "EndpointError": Advice(NO_SESSION, "Read the text of Neon in the message."),
    "EndpointNotFoundError": Advice(NO_SESSION, "Copy the connection string again from the Neon console."),
    "EndpointDisabledError": Advice(NO_SESSION, "Enable the endpoint in the Neon console."),
    "IPNotAllowedError": Advice(NO_SESSION, "Add the address of this client to IP Allow of the project."),
    "QuotaExceededError": Advice(NO_SESSION, "Raise the quota or the plan, or wait for the next period."),
    "ComputeUnavailableError": Advice(NO_SESSION, "Retry; a pool does so by itself."),
    "TooManyConnectionsError": Advice(NO_SESSION, "Lower `max_size` or use the pooled host; see Sizing."),
    "DatabaseNotFoundError": Advice(NO_SESSION, "Correct the name of the database."),
    "PooledHostError": Advice(NOT_SENT, "Use the direct host, which the message names."),
    "StaleStatementError": Advice("yes: the statement was executed", "Repeat it only if it is safe to execute twice."),
    "WrongMethodError": Advice(NOT_SENT, "Use the method that the message names."),
    "PoolTimeoutError": Advice(NOT_SENT, "Release sooner, raise `max_size` or `acquire_timeout`; read the cause."),
    "PoolBusyError": Advice(NOT_SENT, "Answer 503; raise `max_waiting` or `max_size`."),
    "PoolClosedError": Advice(NOT_SENT, "Open the pool first: `async with create_pool(...)`."),
    "ConnectionLostError": Advice(
        "unless `nothing_committed` is true", "Use `run_transaction()`, which repeats what is safe to repeat."
    ),
    "QueryTimeoutError": Advice(
        "yes, outside a transaction", "Look at the state, or use `run_transaction()`; raise `timeout`."
    ),
    "CommitUnknownError": Advice("unknown", "Find out, for example by a key of the request, before repeating it."),
    "TransactionAbortedError": Advice(
        "no, unless the work ended the transaction itself", "Let the error of the failed statement leave the block."
    ),
}


def errors() -> str:
    """Return a section for each error, in the order of the tree."""
    return "\n".join(_error_entry(error) for error in error_classes())


def error_tree() -> str:
    """Return the tree of errors, with what else each of them is."""
    lines = [("NeonAsyncError", ""), *_branches(neon_async.NeonAsyncError, "")]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(["```text", *(f"{name:{width}}{facts}".rstrip() for name, facts in lines), "```"])


def _branches(parent: type[neon_async.NeonAsyncError], indent: str) -> Iterable[tuple[str, str]]:
    children = [error for error in error_classes() if error.__bases__[0] is parent]
    for child in children:
        fork, below = ("└── ", "    ") if child is children[-1] else ("├── ", "│   ")
        others = " and ".join(map(_full_name, child.__bases__[1:]))
        facts = [*[f"also {others}"] * bool(others), *["retryable"] * child.retryable]
        yield indent + fork + child.__name__, "; ".join(facts)
        yield from _branches(child, indent + below)


def error_classes() -> list[type[neon_async.NeonAsyncError]]:
    """Return the public errors below the root, each after its parent."""
    public = [getattr(neon_async, name) for name in neon_async.__all__]
    known = {item for item in public if inspect.isclass(item) and issubclass(item, neon_async.NeonAsyncError)}
    found: list[type[neon_async.NeonAsyncError]] = []

    def collect(parent: type[neon_async.NeonAsyncError]) -> None:
        for error in parent.__subclasses__():
            if error in known and error not in found:
                found.append(error)
                collect(error)

    collect(neon_async.NeonAsyncError)
    return found


def _error_entry(error: type[neon_async.NeonAsyncError]) -> str:
    advice = ADVICE[error.__name__]
    text = (inspect.getdoc(error) or "").split("\n\nAttributes:")[0]
    facts = [
        ("Parents", _code(map(_full_name, error.__bases__))),
        ("Can the same call succeed later", "yes" if error.retryable else "no"),
        ("Can anything have been committed", advice.committed),
        ("What to do", advice.action),
    ]
    return _entry(error.__name__, text, facts)


def _full_name(cls: type) -> str:
    """Return the name by which users import a class."""
    module = "asyncpg" if getattr(asyncpg, cls.__name__, None) is cls else cls.__module__
    return f"{module}.{cls.__qualname__}".removeprefix("builtins.")


# ---------------------------------------------------------------------------------------------------------------------
# Public names


def reference() -> str:
    """Return a section for each public name that is not an error; the errors have a page of their own."""
    errors_of_ours = {error.__name__ for error in error_classes()}
    names = [name for name in neon_async.__all__ if name not in errors_of_ours]
    names.sort(key=lambda name: (name[0].isupper(), name))  # functions first
    parts = ["## neon_async", *(f"::: neon_async.{name}" for name in names)]
    for module in MODULES:
        parts += [f"## neon_async.{module}", *(f"::: neon_async.{module}.{name}" for name in public_names(module))]
    return "\n\n".join(parts)


def public_names(module: str) -> tuple[str, ...]:
    """Return `__all__` of a module of the package, without importing what its extra installs."""
    path = PACKAGE / module / "__init__.py" if (PACKAGE / module).is_dir() else PACKAGE / f"{module}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    raise LookupError(f"{path} has no __all__")


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def examples() -> str:
    """Return a section for each example: its README, and its files."""
    return "\n\n".join(_example(folder) for folder in sorted(EXAMPLES.iterdir()) if folder.is_dir())


def programs() -> str:
    """Return the examples that are one file each."""
    return "\n\n".join(_file(path, EXAMPLES) for path in sorted(EXAMPLES.glob("*.py")))


def _example(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in LANGUAGES]
    return "\n\n".join([f"#{text.rstrip()}", *(_file(path, folder) for path in files)])


def _file(path: Path, folder: Path) -> str:
    return f'```{LANGUAGES[path.suffix]} title="{path.relative_to(folder)}"\n{path.read_text(encoding="utf-8")}```'


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(names: Iterable[str | None]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sentence(text: str) -> str:
    return text if text.startswith("neon-async") else text[:1].upper() + text[1:]


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        connection_settings,
        refused_settings,
        pool_settings,
        variables,
        errors,
        error_tree,
        reference,
        examples,
        programs,
        charts,
    )
}
