"""The arguments of `neon-async`: what there is, and what is said about one that is not valid.

A misplaced DSN contains a password, so no message repeats a value: it names the option or the command. This module must
not know what a command does.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

from .. import __version__

__all__ = ("USAGE_ERROR", "Command", "Parser", "parse_arguments")

USAGE_ERROR = 2

Command: TypeAlias = Callable[[argparse.Namespace], int]

_COMMAND = "COMMAND"
_DSN_HELP = "connection string (default: DATABASE_URL, or libpq's PG* variables if PGHOST is set)"
_VISIBLE = (
    "Arguments are visible to other users of this machine, in ps for example, and stay in the history of the shell. A "
    "connection string contains a password: set DATABASE_URL, and leave DSN out."
)


def parse_arguments(argv: Sequence[str] | None, commands: Mapping[str, Command]) -> argparse.Namespace:
    """Return the arguments, with the `command` to run and the `parser` of that command.

    Without any argument the command prints the help.

    Args:
        argv: The arguments without the name of the program, or None for those of this process.
        commands: What each command runs.

    Raises:
        SystemExit: The arguments are wrong, or `--help` or `--version` was given.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _make_parser(commands)
    arguments, rest = cast("tuple[argparse.Namespace, list[str]]", parser.parse_known_args(argv))
    command_parser: Parser = arguments.parser
    if rest:
        command_parser.refuse(_what_is_too_much(rest, command_parser))
    return arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors name options and repeat no value."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, exit_on_error=False)
        self.options: dict[str, argparse.Action] = {}
        self.commands: tuple[str, ...] = ()
        self.takes_dsn = False

    def option(self, name: str, **settings: Any) -> None:
        """Add an option."""
        self.options[name] = self.add_argument(name, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments and the ones that are not known. Exit if a value is missing or not valid."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            name = error.argument_name
        if name in self.options:
            self.refuse(_what_it_needs(name, self.options[name]))
        self.refuse(_what_is_no_command(args, self.commands) if name == _COMMAND else f"{name} takes no value.")

    def error(self, message: str) -> NoReturn:
        """Exit without `message`, which repeats arguments."""
        self.refuse("The arguments are not valid.")

    def refuse(self, message: str) -> NoReturn:
        """Print the usage, `message`, and where to read more, and exit."""
        self.usage_error(f"{message} `{self.prog} --help` explains the arguments.")

    def usage_error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit."""
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


# ---------------------------------------------------------------------------------------------------------------------
# What there is


def _make_parser(commands: Mapping[str, Command]) -> Parser:
    parser = Parser(
        prog="neon-async",
        description="Verified connections to Neon Postgres.",
        epilog=f"Exit status: 0 good, 1 refused or failed, 2 usage error or missing extra. {_VISIBLE}",
    )
    parser.set_defaults(command=_print_help, parser=parser)
    parser.commands = tuple(commands)
    parser.add_argument("--version", action="version", version=f"neon-async {__version__}")
    # Required, it would be missed before an unknown option is named.
    subparsers = parser.add_subparsers(required=False, metavar=_COMMAND, title="commands")

    def add(name: str, text: str, epilog: str = "") -> Parser:
        description = f"{text[0].upper()}{text[1:]}."
        subparser: Parser = subparsers.add_parser(name, help=text, description=description, epilog=epilog)
        subparser.set_defaults(command=commands[name], parser=subparser)
        return subparser

    check = add(
        "check",
        "open one verified connection and show each step of it",
        "Where create_pool() refuses the connection string for its sslmode, the check says so first, and continues "
        f"under sslmode=verify-full. Exit status: 0 if a verified connection works. {_VISIBLE}",
    )
    harden = add(
        "harden",
        "print the connection string with sslmode=verify-full, and nothing else",
        "It prints the string with its password, and only if create_pool() accepts it here. Otherwise it says why not, "
        f"and the exit status is 1. {_VISIBLE}",
    )
    roots = add("roots", "show where ISRG Root X1 is found on this system")
    add("demo", "start a PostgreSQL on this machine, connect to it, and show what is refused")
    _add_dev_options(
        add(
            "dev",
            "run a local PostgreSQL that behaves like a Neon endpoint",
            "It prints the lines to export, and says when it sleeps and wakes. Its keys suspend, freeze, cut and "
            "refuse. Ctrl-C, SIGTERM or the key q ends it.",
        )
    )
    for subparser in (check, harden):
        subparser.takes_dsn = True
        subparser.add_argument("dsn", nargs="?", metavar="DSN", help=_DSN_HELP)
        subparser.option(
            "--trust-anchor", type=Path, metavar="FILE", help="root to trust in place of ISRG Root X1, in PEM"
        )
    for subparser in (check, roots):
        subparser.option("--json", action="store_true", help="print JSON")
    check.option("--offline", action="store_true", help="fetch no revocation list")
    return parser


def _print_help(arguments: argparse.Namespace) -> int:
    """Do what the program does without a command."""
    parser: Parser = arguments.parser
    parser.print_help()
    return 0


def _add_dev_options(parser: Parser) -> None:
    parser.option(
        "--data", type=Path, metavar="DIR", help="folder in which data, password and port are kept (default: removed)"
    )
    parser.option(
        "--port",
        type=int,
        metavar="PORT",
        help="port on 127.0.0.1; with --pooler also the next one (default: free ones)",
    )
    parser.option(
        "--suspend-after",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="sleep after so long without a connect and without a byte; 0: never (default: 300, as on Neon)",
    )
    parser.option(
        "--wake-time", type=float, default=0.5, metavar="SECONDS", help="how long it takes to wake (default: 0.5)"
    )
    parser.option("--pooler", action="store_true", help="pooled host, too; needs PgBouncer 1.21 or later on PATH")
    parser.option("--schema", type=Path, metavar="FILE", help="file of SQL to run in a new database")
    parser.option(
        "--bin-dir", type=Path, metavar="DIR", help="programs of another PostgreSQL than that of the extra `testing`"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is not valid

_KINDS = {int: "a whole number", float: "a number"}


def _what_it_needs(name: str, option: argparse.Action) -> str:
    if option.nargs == 0:
        return f"{name} takes no value."
    kind = next((text for type_, text in _KINDS.items() if option.type is type_), "a value")
    return f"{name} needs {kind}: {name} {option.metavar}."


def _what_is_no_command(arguments: Iterable[str], commands: Iterable[str]) -> str:
    word = next((each for each in arguments if not each.startswith("-")), "")
    if "://" in word:
        return "A connection string is not a command. Write `neon-async check DSN`, or set DATABASE_URL."
    if re.fullmatch(r"[a-z]{1,20}", word):  # no piece of a connection string looks like that
        close = difflib.get_close_matches(word, commands, n=1)
        return f"Unknown command {word}." + (f" Did you mean {close[0]}?" if close else "")
    return "Unknown command."


def _what_is_too_much(rest: Sequence[str], parser: Parser) -> str:
    """Return what is wrong with arguments that the parser does not know."""
    unknown = [each for each in rest if each.startswith("-") and each.strip("-")]
    if unknown:
        names = [name for name in dict.fromkeys(map(_name_of, unknown)) if name]
        advice = "".join(f" Did you mean {option}?" for option in parser.options if _is_meant(option, names))
        return f"Unknown option {', '.join(names)}".rstrip() + f".{advice}"
    if parser.takes_dsn:
        return "More than one DSN is given. Write one, in quotes."
    return "An argument is given that is not an option."


def _name_of(argument: str) -> str:
    """Return the name of an option without its value, or "" if it does not look like a name.

    After one hyphen the value follows the first letter, as in `-pPASSWORD`.
    """
    name = re.match(r"--[A-Za-z][A-Za-z0-9_-]{0,40}(?==|\Z)|-[A-Za-z0-9]", argument)
    return name[0] if name else ""


def _is_meant(option: str, names: Iterable[str]) -> bool:
    folded = [name.replace("_", "-").lower() for name in names if name.startswith("--")]
    return any(option.startswith(name) for name in folded) or bool(difflib.get_close_matches(option, folded, 1, 0.8))
