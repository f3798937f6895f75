"""An event loop whose timers are exact, for what measures milliseconds with them."""

from __future__ import annotations

import asyncio
import selectors


def exact_loop() -> asyncio.AbstractEventLoop:
    """Return asyncio's event loop on select(), whose timeouts have microseconds.

    With epoll() they are rounded up to whole milliseconds, which is a good part of the 5 and 10 ms that are slept here.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
