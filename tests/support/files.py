"""Files that must not be read as a whole."""

from __future__ import annotations

from pathlib import Path

__all__ = ("make_huge",)


def make_huge(path: Path) -> None:
    """Create a file of 3 GB, which occupies no space on the disk."""
    with path.open("wb") as file:
        file.truncate(3 << 30)
