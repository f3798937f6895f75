"""Write a text into SQL: as a string literal, or as the name of something."""

from __future__ import annotations


def quote(text: str) -> str:
    """Return `text` as a string literal, whatever `standard_conforming_strings` says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def quote_name(name: str) -> str:
    """Return `name` as a quoted identifier."""
    return '"' + name.replace('"', '""') + '"'
