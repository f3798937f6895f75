"""Show a check while it runs: a waterfall that grows on a terminal, and elsewhere one line for each step.

This module must not know connections or arguments. It needs rich, which is an extra.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from rich.live import Live
from rich.text import Text

from .check import CheckResult, Step, check
from .render import print_findings, print_opening, print_step, print_total, waterfall

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ("show_check",)

_SLOW = 1.0  # seconds after which a line says that a step is still running


async def show_check(console: Console, dsn: str | None, **parameters: Any) -> CheckResult:
    """Run `check()`, print each step while it runs, and then the facts and the verdict.

    Args:
        console: Where everything is printed.
        dsn: As in `check()`.
        **parameters: As in `check()`.

    Raises:
        OSError: The output could not be written.
    """
    # FORCE_COLOR makes a file a terminal for rich, but what was written to a file cannot be drawn again.
    is_redrawn = console.file.isatty() and not console.is_dumb_terminal
    task, failures = asyncio.current_task(), list[OSError]()

    def write(action: Callable[[], None]) -> None:
        try:
            if not failures:
                action()
        except OSError as error:  # raised here, it would look like a failure of the connection
            failures.append(error)
            if task is not None:
                task.cancel()

    display: _Display = _Screen(console) if is_redrawn else _Lines(console, write)
    try:
        result = await check(
            dsn, **parameters, on_progress=lambda so_far: write(functools.partial(display.show, so_far))
        )
        display.finish(result)
    except asyncio.CancelledError:
        if failures:
            raise failures[0] from None
        raise
    finally:
        display.stop()
    print_findings(result, console)
    return result


class _Display(Protocol):
    """A way to show a check while it runs."""

    def show(self, so_far: CheckResult) -> None:
        """Show the steps so far."""

    def finish(self, result: CheckResult) -> None:
        """Show all steps."""

    def stop(self) -> None:
        """Show nothing more; also where the check has not finished."""


class _Opening:
    """What stands above the steps, printed once, as soon as it is known."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_printed = False

    def show(self, so_far: CheckResult) -> None:
        if not self._is_printed and (so_far.target is not None or so_far.refusal is not None):
            self._is_printed = True
            print_opening(so_far, self._console)


class _Lines:
    """Prints a line when a step ends, and another one before where it takes long, through `write`."""

    def __init__(self, console: Console, write: Callable[[Callable[[], None]], None]) -> None:
        self._console = console
        self._write = write
        self._opening = _Opening(console)
        self._printed = 0
        self._timer: asyncio.TimerHandle | None = None

    def show(self, so_far: CheckResult) -> None:
        self.stop()
        self._opening.show(so_far)
        if so_far.target is None:  # nothing is waited for before it is known, and the steps stand below it
            return
        self._print(so_far)
        latest = so_far.steps[-1]
        if latest.outcome == "running":
            print_slow = functools.partial(self._print_slow, latest, so_far)
            self._timer = asyncio.get_running_loop().call_later(_SLOW, self._write, print_slow)

    def finish(self, result: CheckResult) -> None:
        self.stop()
        self._opening.show(result)
        self._print(result)
        print_total(result, self._console)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _print(self, so_far: CheckResult) -> None:
        ended = [step for step in so_far.steps if step.outcome != "running"]
        for step in ended[self._printed :]:
            print_step(step, so_far, self._console)
        self._printed = len(ended)

    def _print_slow(self, step: Step, so_far: CheckResult) -> None:
        detail = step.detail or f"still running after {_SLOW:g} s"
        print_step(dataclasses.replace(step, detail=detail), so_far, self._console)


class _Screen:
    """Draws the waterfall again and again, below what was printed once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._opening = _Opening(console)
        self._so_far: CheckResult | None = None
        self._zero = time.perf_counter()
        self._live = Live(
            get_renderable=self._draw,
            console=console,
            refresh_per_second=10,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def show(self, so_far: CheckResult) -> None:
        self._opening.show(so_far)
        if so_far.target is None:
            return
        self._so_far = so_far
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)  # rich hides it, and a signal may end the process
        self._live.refresh()

    def finish(self, result: CheckResult) -> None:
        self._opening.show(result)
        self._so_far = result
        if self._live.is_started:
            self._live.stop()
        else:
            self._console.print(self._draw())

    def stop(self) -> None:
        self._live.stop()

    def _draw(self) -> Text:
        """Return the waterfall as it is now."""
        if self._so_far is None:
            return Text()
        now = time.perf_counter() - self._zero
        steps = tuple(
            dataclasses.replace(step, seconds=max(0.0, now - (step.started or 0.0)))
            if step.outcome == "running"
            else step
            for step in self._so_far.steps
        )
        return waterfall(dataclasses.replace(self._so_far, steps=steps), self._console)
