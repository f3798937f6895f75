"""Run the command line: `python -m neon_async` and the console script `neon-async`."""

from __future__ import annotations

import sys

from ._cli.main import main

__all__ = ("main",)

if __name__ == "__main__":
    sys.exit(main())
