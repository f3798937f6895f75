"""The diagnoses of the command line: what one connection goes through, and where ISRG Root X1 is found.

`check()` gathers facts into a `CheckResult`; the `render` functions turn facts into JSON or into a picture 80 columns
wide, and know nothing of connections. rich is an extra, so only the pictures import it. Nothing here knows arguments,
environment variables or exit codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import textwrap
import time
from typing import TYPE_CHECKING, Any, Literal

from .._driver.connector import prepare
from .._errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidPasswordError,
    NeonAsyncError,
    ProtocolError,
    TLSError,
)
from .._wire.trust import ISRG_ROOT_X1_SHA256

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from .._driver.connector import Connector
    from .._wire.tls import TLSReport
    from .._wire.trust import Place, TrustAnchor

__all__ = ("CheckResult", "Problem", "Step", "check", "render", "render_json", "render_roots", "render_roots_json")

Outcome = Literal["ok", "retried", "failed", "skipped"]

# In the order of a connection. The connector announces those between the first and the last.
_STEPS = ("parse", "dns", "tcp", "tls", "authentication", "query")

# What neon-async would not go on with; every other error is the server's or the network's.
_REFUSALS = (ConfigurationError, TLSError, AuthenticationError, ProtocolError)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One step of a walk.

    `name` is parse, dns, tcp, tls, authentication or query; a step that is tried once more is listed once more.
    `started` and `seconds` count from the start of the walk, and are None for a step that did not run. `outcome` is
    "retried" for a step that was given up for another way, as direct TLS is with a server that does not speak it.
    """

    name: str
    started: float | None
    seconds: float | None
    outcome: Outcome
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What ended a walk: the step, the name of the error's class, and its message, which tells what to do.

    `refused` tells that neon-async would not go on, whatever the other side was ready to do.
    """

    step: str
    type: str
    message: str
    retryable: bool
    refused: bool


@dataclasses.dataclass(frozen=True, slots=True)
class CheckResult:
    """What one connection went through; `render_json()` documents the stable form.

    A fact is None when the walk ended before it: `target` (the DSN without its password) and `anchor` come with parse,
    `tls` and `days_left` (whole days until the leaf's notAfter) with tls, `server_version` with query. `problem` is
    None when all went well.
    """

    steps: tuple[Step, ...]
    target: str | None = None
    anchor: TrustAnchor | None = None
    tls: TLSReport | None = None
    days_left: int | None = None
    server_version: str | None = None
    problem: Problem | None = None

    @property
    def verdict(self) -> Literal["good", "refused", "failed"]:
        """Return "good", "refused" (by neon-async) or "failed" (at the server, or on the way to it)."""
        if self.problem is None:
            return "good"
        return "refused" if self.problem.refused else "failed"

    @property
    def seconds(self) -> float:
        """Return the time from the start of the first step to the end of the last one that ran."""
        return max((step.started or 0.0) + (step.seconds or 0.0) for step in self.steps)


# ---------------------------------------------------------------------------------------------------------------------
# The walk


async def check(dsn: str | None = None, *, trust_anchor: bytes | str | os.PathLike[str] | None = None) -> CheckResult:
    """Open one verified connection, run one query on it, close it, and tell what happened on the way.

    There is one dial and no retry. The dial ends within the `connect_timeout` of the parameters, and the query within
    as long again. A configuration that is refused and a step that fails are findings, not exceptions.

    Parameters:
        dsn: the connection string; None (the default): libpq's PG* variables tell everything.
        trust_anchor: as in `create_pool()`; None (the default): ISRG Root X1.
    """
    walk = _Walk()
    walk.begin("parse")
    try:
        connector = prepare(dsn, trust_anchor=trust_anchor)
    except NeonAsyncError as error:
        problem = walk.fail(error)
        return CheckResult(walk.steps({}), problem=problem)
    server_version, failure = await _connect_and_query(connector, walk)
    tls = connector.tls_report
    return CheckResult(
        steps=walk.steps(_details(connector, tls, server_version)),
        target=connector.parameters.redacted_dsn,
        anchor=connector.anchor,
        tls=tls,
        days_left=(tls.not_after - datetime.datetime.now(datetime.UTC)).days if tls else None,
        server_version=server_version,
        problem=failure,
    )


async def _connect_and_query(connector: Connector, walk: _Walk) -> tuple[str | None, Problem | None]:
    """Return the server's version, or else the problem."""
    try:
        connection = await connector.connect(on_step=walk.begin)
    except Exception as error:  # noqa: BLE001  # NeonAsyncError, and whatever else the server says
        return None, walk.fail(error)
    limit = connector.parameters.connect_timeout
    try:
        walk.begin("query")
        server_version = await connection.fetchval("SHOW server_version", timeout=limit)
        walk.end("ok")
        with contextlib.suppress(Exception):  # the answers are in; how the goodbye goes changes nothing
            await connection.close(timeout=limit)
    except TimeoutError:
        return None, walk.fail(TimeoutError(f"The server did not answer a query within {limit:g} s. Try again."))
    except Exception as error:  # noqa: BLE001  # whatever a query can meet is the finding
        return None, walk.fail(error)
    finally:
        connection.terminate()
    return str(server_version), None


def _details(connector: Connector, tls: TLSReport | None, server_version: str | None) -> Mapping[str, str]:
    """Return what there is to say of each step that went well."""
    parameters = connector.parameters
    return {
        "parse": "sslmode=verify-full",
        "dns": parameters.host,
        "tcp": f"{parameters.hostaddr or ''} port {parameters.port}".strip(),
        "tls": f"{tls.version}, {tls.negotiation}" if tls else "",
        "authentication": f"as {parameters.user}, {tls.mechanism}" if tls else "",
        "query": f"PostgreSQL {server_version}",
    }


class _Walk:
    """The steps of one walk as they happen, timed from its creation."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()
        self._ended: list[Step] = []
        self._running: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """End the running step, if any, and start `name`; going back means that the running one was given up."""
        if self._running is not None:
            went_back = _STEPS.index(name) <= _STEPS.index(self._running[0])
            self.end("retried" if went_back else "ok", "tried another way" if went_back else "")
        self._running = (name, time.perf_counter() - self._zero)

    def end(self, outcome: Outcome, detail: str = "") -> None:
        """End the running step."""
        assert self._running is not None
        name, started = self._running
        self._ended.append(Step(name, started, time.perf_counter() - self._zero - started, outcome, detail))
        self._running = None

    def fail(self, error: Exception) -> Problem:
        """End the running step with `error`, and return what there is to say of it."""
        message = str(error) or "It gives no reason."
        self.end("failed", message)
        return Problem(
            step=self._ended[-1].name,
            type=type(error).__name__,
            message=message,
            retryable=isinstance(error, NeonAsyncError) and error.retryable,
            refused=isinstance(error, _REFUSALS) and not isinstance(error, InvalidPasswordError),
        )

    def steps(self, details: Mapping[str, str]) -> tuple[Step, ...]:
        """Return all steps in order: those that ran, `details` on those that went well, and those that did not run."""
        steps = [
            dataclasses.replace(step, detail=details[step.name]) if step.outcome == "ok" else step
            for step in self._ended
        ]
        reached = _STEPS.index(steps[-1].name)
        if reached > _STEPS.index("dns") and all(step.name != "dns" for step in steps):
            steps.insert(_STEPS.index("dns"), Step("dns", None, None, "skipped", "hostaddr is given"))
        return (*steps, *(Step(name, None, None, "skipped", "not reached") for name in _STEPS[reached + 1 :]))


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def render_json(result: CheckResult) -> str:
    """Return `result` as a JSON object. Keys may be added in later versions; these stay:

    - `verdict`: "good", "refused" or "failed"; `seconds`: of the whole walk
    - `target`: the DSN without its password, or null
    - `steps`: in order, each with `name`, `started` and `seconds` (floats from the start of the walk, or null when it
      did not run), `outcome` ("ok", "retried", "failed" or "skipped") and `detail`
    - `tls`: `version`, `cipher`, `alpn`, `negotiation` ("direct" or "postgres"), `server_name` and
      `mechanism` (of the login inside; null before it), or null
    - `certificate`: of the leaf: `subject`, `issuer`, `not_after` (ISO 8601), `days_left`, `sha256`, or null
    - `anchor`: `subject`, `source` (where it was found) and `sha256`, or null
    - `server_version`: as PostgreSQL writes it, or null
    - `problem`: `step`, `type` (the error's class), `message` and `retryable`, or null
    """
    tls, anchor, problem = result.tls, result.anchor, result.problem
    document: dict[str, Any] = {
        "verdict": result.verdict,
        "seconds": result.seconds,
        "target": result.target,
        "steps": [dataclasses.asdict(step) for step in result.steps],
        "tls": tls and _pick(tls, "version", "cipher", "alpn", "negotiation", "server_name", "mechanism"),
        "certificate": tls
        and {
            **_pick(tls, "subject", "issuer"),
            "not_after": tls.not_after.isoformat(),
            "days_left": result.days_left,
            "sha256": tls.sha256,
        },
        "anchor": anchor and _pick(anchor, "subject", "source", "sha256"),
        "server_version": result.server_version,
        "problem": problem and _pick(problem, "step", "type", "message", "retryable"),
    }
    return json.dumps(document, indent=2)


def render_roots_json(places: Sequence[Place]) -> str:
    """Return where ISRG Root X1 was looked for as a JSON object. Keys may be added in later versions; these stay:

    - `sha256`: the fingerprint looked for; `found`: whether any place has it
    - `places`: in the order they are searched, each with `name`, `location`, `certificates` (how many the place holds,
      or null when there is no such place on this system) and `found`
    """
    document = {
        "sha256": ISRG_ROOT_X1_SHA256,
        "found": any(place.found for place in places),
        "places": [_pick(place, "name", "location", "certificates", "found") for place in places],
    }
    return json.dumps(document, indent=2)


def _pick(source: object, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

_BAR_CELLS = 22

# Outcome: sign, the same in ASCII, style.
_SIGNS = {
    "ok": ("✓", "+", "green"),
    "retried": ("↻", "~", "yellow"),
    "failed": ("✗", "x", "bold red"),
    "skipped": ("·", "-", "dim"),
}
_VERDICTS = {
    "good": ("bold green", "Good: TLS 1.3, certificate and host name verified in full, login by SCRAM."),
    "refused": ("bold red", "Refused: neon-async makes no such connection."),
    "failed": ("bold red", "Failed: there is no working connection."),
}


def render(result: CheckResult, console: Console) -> None:
    """Print `result` on `console`: the waterfall, the facts, the problem if there is one, and the verdict."""
    if result.target is not None:
        print_wrapped(console, result.target.partition("?")[0], style="bold")
        console.print()
    for step in result.steps:
        _print_step(step, result, console)
    console.print(f"  {'total':<15}{milliseconds(result.seconds):>10}", style="bold", highlight=False)
    for title, facts in _facts(result):
        print_heading(console, title)
        for name, value in facts:
            print_wrapped(console, value, label=f"  {name}", indent=15)
    if result.problem is not None:
        print_heading(console, f"{result.problem.type} at the step {result.problem.step}")
        print_wrapped(console, " ".join(result.problem.message.split()), indent=2)
    style, text = _VERDICTS[result.verdict]
    console.print()
    console.print(text, style=style, highlight=False)


def render_roots(places: Sequence[Place], console: Console) -> None:
    """Print on `console` where ISRG Root X1 was looked for, and whether it was found."""
    for place in places:
        outcome, state = "ok", f"found among {place.certificates} certificates"
        if place.certificates is None:
            outcome, state = "skipped", "no such place on this system"
        elif not place.found:
            outcome, state = "failed", f"not found among {place.certificates} certificates"
        sign, style = _sign(outcome, console)
        print_wrapped(console, f"{place.name:<24}{state}", label=sign, indent=2, label_style=style)
        print_wrapped(console, place.location, indent=4, style="dim")
    count = sum(place.found for place in places)
    console.print()
    console.print(
        f"ISRG Root X1 was found in {count} of {len(places)} places, by its SHA-256:",
        style="bold green" if count else "bold red",
        highlight=False,
    )
    console.print(ISRG_ROOT_X1_SHA256, highlight=False)


def print_heading(console: Console, text: str) -> None:
    """Print a line that begins a new part."""
    console.print()
    console.print(text, style="bold", markup=False, highlight=False)


def print_wrapped(
    console: Console, text: str, *, label: str = "", indent: int = 0, style: str = "", label_style: str = "dim"
) -> None:
    """Print `label` and, from column `indent` on, `text`; whatever could steer the terminal is escaped.

    Lines break between words only, at 100 columns or the width of the console: a DSN or a fingerprint can be copied.
    """
    from rich.text import Text

    width = max(min(console.width, 100) - indent, 20)
    lines = textwrap.wrap(printable(text), width, break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        left = "" if number else label
        console.print(Text.assemble((left.ljust(indent), label_style), (line, style)), soft_wrap=True)


def printable(text: str) -> str:
    """Return `text` with every character escaped that could steer a terminal: servers write some of what is shown."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def milliseconds(seconds: float) -> str:
    """Return `seconds` as people read the times of a connection."""
    return f"{seconds * 1000:.1f} ms"


def _sign(outcome: str, console: Console) -> tuple[str, str]:
    """Return the sign for an outcome, as the encoding of `console` has it, and its style."""
    sign, ascii_sign, style = _SIGNS[outcome]
    return (ascii_sign if console.options.ascii_only else sign), style


def _print_step(step: Step, result: CheckResult, console: Console) -> None:
    from rich.text import Text

    sign, style = _sign(step.outcome, console)
    line = Text(no_wrap=True, style="dim" if step.outcome == "skipped" else "")
    line.append(f"{sign} ", style)
    line.append(f"{step.name:<15}{'' if step.seconds is None else milliseconds(step.seconds):>10}  ")
    line.append(f"{_bar(step, result.seconds, console):<{_BAR_CELLS}}  ", style)
    line.append(printable(result.problem.type if step.outcome == "failed" and result.problem else step.detail))
    line.truncate(console.width, overflow="crop" if console.options.ascii_only else "ellipsis")
    line.rstrip()
    console.print(line)


def _bar(step: Step, total: float, console: Console) -> str:
    if step.started is None or step.seconds is None:
        return ""
    start, end = (round(moment / total * _BAR_CELLS) for moment in (step.started, step.started + step.seconds))
    length = max(1, end - start)
    offset = min(start, _BAR_CELLS - length)
    return " " * offset + ("=" if console.options.ascii_only else "━") * length


def _facts(result: CheckResult) -> Iterable[tuple[str, Sequence[tuple[str, str]]]]:
    tls, anchor = result.tls, result.anchor
    if tls is not None:
        yield (
            "TLS",
            (
                ("version", tls.version),
                ("cipher", tls.cipher),
                ("ALPN", tls.alpn or "none"),
                ("negotiation", tls.negotiation),
                ("server name", tls.server_name),
                ("mechanism", tls.mechanism or "none yet"),
            ),
        )
        yield (
            "Certificate",
            (
                ("subject", tls.subject or "none"),
                ("issuer", tls.issuer),
                ("notAfter", f"{tls.not_after:%Y-%m-%d %H:%M} UTC, {result.days_left} days left"),
                ("SHA-256", tls.sha256),
            ),
        )
    if anchor is not None:
        yield "Trust anchor", (("subject", anchor.subject), ("found in", anchor.source), ("SHA-256", anchor.sha256))
