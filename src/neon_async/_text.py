"""Make text fit for messages and log lines, and log it."""

from __future__ import annotations

import logging

_log = logging.getLogger("neon_async")


def escape(text: str) -> str:
    r"""Return `text` with each character that is not printable as a Python escape, such as `\n` or `\u202e`.

    Servers, certificates and files can contain text that controls a terminal, begins a line of its own in a log, or
    hides or reorders what stands beside it (Unicode categories Cc, Cf, Zl and Zp).
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 caller`, `2 callers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def log(level: int, text: str, **facts: object) -> None:
    """Log one line, with its facts as fields of the record (`extra`).

    Args:
        level: The level, as in `logging`.
        text: The line. It contains facts by name, such as `%(endpoint)s`.
        **facts: The facts. The names are not those of the fields that every record has, such as `name` or `message`.
    """
    _log.log(level, text, facts, extra=facts, stacklevel=2)


def log_exception(text: str, **facts: object) -> None:
    """Log one line at ERROR as `log()` does, with the exception that is being handled."""
    _log.exception(text, facts, extra=facts, stacklevel=2)
