"""Standard output and standard error, where they are closed, or no longer have a reader.

It must not know what is printed.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO

__all__ = ("discard", "open_streams")


def open_streams() -> bool:
    """Make both streams usable, and return whether standard output is open."""
    is_open = sys.stdout is not None
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed; a socket must not get its descriptor, nor print() write to the other one
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  open until the end
        elif isinstance(stream, io.TextIOWrapper):  # a certificate can contain characters that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    return is_open


def discard(stream: TextIO) -> None:
    """Discard what was not written to a stream, and what will be: Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
