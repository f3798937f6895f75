"""Show facts as JSON, or as a picture on a console that is 80 columns wide.

This module must not know connections, arguments or exit statuses. rich is an extra, so that only the functions that
draw import it.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import TYPE_CHECKING, Any

from .. import ISRG_ROOT_X1_SHA256
from .._text import counted, escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.text import Text

    from .._wire.report import ChainCertificate, TLSReport
    from .._wire.revocation.report import RevocationReport
    from .._wire.trust import Place
    from .check import CheckResult, Step

__all__ = (
    "check_to_json",
    "milliseconds",
    "print_check",
    "print_findings",
    "print_heading",
    "print_opening",
    "print_roots",
    "print_step",
    "print_total",
    "print_wrapped",
    "roots_to_json",
    "waterfall",
)

# ---------------------------------------------------------------------------------------------------------------------
# JSON


def check_to_json(result: CheckResult) -> str:
    """Return `result` as a JSON object.

    Later versions may add keys. These stay:

    - `verdict`: "good", "refused" or "failed"; `seconds`: duration of the whole check
    - `target`: the DSN without its password, or null
    - `steps`: in order, each with `name`, `started` and `seconds` (floats from the start of the check, or null if the
      step did not run), `outcome` ("ok", "retried", "failed" or "skipped") and `detail`
    - `tls`: `version`, `cipher`, `alpn`, `negotiation` ("direct" or "postgres"), `server_name` and `mechanism` (of the
      login inside TLS; null if the check ended before it), or null
    - `certificate`: of the server: `subject`, `issuer`, `not_after` (ISO 8601), `days_left`, `sha256`, or null
    - `anchor`: `subject`, `source` (where it was found) and `sha256`, or null; of the root at which the chain ended, or
      of the first one that is trusted
    - `chain`: `served` and `verified` (each a list of `subject`, `issuer`, `not_after` and `sha256`, the leaf first),
      `path_ends` (ISO 8601: until when the anchor and the cross-signs below it are trusted, or null) and `warnings`, or
      null; of a chain that failed verification only `served` is known
    - `revocation`: `status` ("good", "revoked", "unknown", "short-lived" or "pending"), `subject`, `list_url`,
      `entries`, `next_update` and `checked_at` (ISO 8601), `reason`, and `issuers` (a list of the same without
      `issuers`), or null
    - `server_version`: as PostgreSQL writes it, or null
    - `problem`: `step`, `type` (the error's class), `message` and `retryable`, or null
    - `refusal`: why `create_pool()` refuses the settings as they are written, where sslmode=verify-full is the answer:
      `type` (the error's class), `message` and `hardened` (the DSN to use, without its password, or null), or null. The
      check is of the settings under sslmode=verify-full
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
        "chain": _chain(result),
        "revocation": result.revocation
        and {
            **_revocation(result.revocation),
            "issuers": [_revocation(each) for each in result.revocation.issuers],
        },
        "server_version": result.server_version,
        "problem": problem and _pick(problem, "step", "type", "message", "retryable"),
        "refusal": result.refusal and _pick(result.refusal, "type", "message", "hardened"),
    }
    return json.dumps(document, indent=2)


def roots_to_json(places: Sequence[Place]) -> str:
    """Return the places that were searched for ISRG Root X1 as a JSON object.

    Later versions may add keys. These stay:

    - `sha256`: the fingerprint of ISRG Root X1; `found`: whether any place contains it
    - `places`: in the order they are searched, each with `name`, `location`, `certificates` (how many certificates it
      contains, or null if the place does not exist on this system) and `found`
    """
    document = {
        "sha256": ISRG_ROOT_X1_SHA256,
        "found": any(place.found for place in places),
        "places": [_pick(place, "name", "location", "certificates", "found") for place in places],
    }
    return json.dumps(document, indent=2)


def _chain(result: CheckResult) -> dict[str, Any] | None:
    tls, problem = result.tls, result.problem
    served = tls.served if tls else problem.served if problem else ()

    def listed(certificates: Iterable[ChainCertificate]) -> list[dict[str, Any]]:
        return [
            _pick(each, "subject", "issuer", "sha256") | {"not_after": each.not_after and each.not_after.isoformat()}
            for each in certificates
        ]

    if not served:
        return None
    return {
        "served": listed(served),
        "verified": listed(tls.chain if tls else ()),
        "path_ends": tls.path_ends.isoformat() if tls and tls.path_ends else None,
        "warnings": list(tls.warnings if tls else ()),
    }


def _revocation(report: RevocationReport) -> dict[str, Any]:
    moments = {name: getattr(report, name) for name in ("next_update", "checked_at")}
    return _pick(report, "status", "subject", "list_url", "entries", "reason") | {
        name: moment and moment.isoformat() for name, moment in moments.items()
    }


def _pick(source: object, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

_BAR_CELLS = 22

# Outcome: sign, the same sign in ASCII, style.
_SIGNS = {
    "ok": ("✓", "+", "green"),
    "retried": ("↻", "~", "yellow"),
    "failed": ("✗", "x", "bold red"),
    "skipped": ("·", "-", "dim"),
    "running": ("▸", ">", "cyan"),
}
_VERDICTS = {
    "good": ("bold green", "Good: TLS 1.3, certificate and host name verified in full, login by SCRAM."),
    "refused": ("bold red", "Refused: neon-async does not make this connection."),
    "failed": ("bold red", "Failed: the connection does not work."),
}


def print_check(result: CheckResult, console: Console) -> None:
    """Print what `create_pool()` refuses, the steps as a waterfall, the facts, the problem, and the verdict."""
    print_opening(result, console)
    console.print(waterfall(result, console))
    print_findings(result, console)


def print_opening(result: CheckResult, console: Console) -> None:
    """Print what `create_pool()` refuses of the settings as they are written, and where the check connects."""
    if result.refusal is not None:
        message, hardened = " ".join(result.refusal.message.split()), result.refusal.hardened
        heading = "create_pool() refuses these settings as they are written"
        console.print(heading, style="bold yellow", markup=False, highlight=False)
        print_wrapped(console, message.removesuffix(f" Hardened: {hardened}"), indent=2)
        if hardened is not None:
            print_heading(console, "Use this string; `neon-async harden` prints it with its password")
            print_wrapped(console, hardened, indent=2)
        if result.target is not None:
            print_heading(console, "The check continues under sslmode=verify-full")
        console.print()
    if result.target is not None:
        print_wrapped(console, result.target.partition("?")[0], style="bold")
        console.print()


def waterfall(result: CheckResult, console: Console) -> Text:
    """Return the steps, one on each line, with bars that show when each one ran, and the total."""
    from rich.text import Text

    lines = [_step_line(step, result, console, _bar(step, result.seconds, console)) for step in result.steps]
    return Text("\n").join((*lines, _total_line(result)))


def print_step(step: Step, result: CheckResult, console: Console) -> None:
    """Print one step of `result` without a bar."""
    console.print(_step_line(step, result, console))


def print_total(result: CheckResult, console: Console) -> None:
    """Print how long the steps took."""
    console.print(_total_line(result))


def print_findings(result: CheckResult, console: Console) -> None:
    """Print the facts, the problem if there is one, and the verdict."""
    for title, facts in _facts(result):
        print_heading(console, title)
        for name, value in facts:
            print_wrapped(console, value, label=f"  {name}", indent=15)
    if result.problem is not None:
        print_heading(console, f"{result.problem.type} at the step {result.problem.step}")
        print_wrapped(console, " ".join(result.problem.message.split()), indent=2)
    style, text = _VERDICTS[result.verdict]
    console.print()
    if result.refusal is not None and result.verdict == "good":
        print_wrapped(console, "Under sslmode=verify-full, which create_pool() has to be given:")
    console.print(text, style=style, highlight=False)


def print_roots(places: Sequence[Place], console: Console) -> None:
    """Print the places that were searched for ISRG Root X1, and which of them contain it."""
    for place in places:
        outcome, state = "ok", f"found among {counted(place.certificates or 0, 'certificate')}"
        if place.certificates is None:
            outcome, state = "skipped", "no such place on this system"
        elif not place.found:
            outcome, state = "failed", f"not found among {counted(place.certificates or 0, 'certificate')}"
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
    """Print a blank line and the heading of a new part."""
    console.print()
    console.print(text, style="bold", markup=False, highlight=False)


def print_wrapped(
    console: Console, text: str, *, label: str = "", indent: int = 0, style: str = "", label_style: str = "dim"
) -> None:
    """Print `label` and, from column `indent` on, `text`. Characters that could control the terminal are escaped.

    Lines break only between words, at 100 columns or the width of the console, so that a DSN or a fingerprint can be
    copied.
    """
    from rich.text import Text

    width = max(min(console.width, 100) - indent, 20)
    lines = textwrap.wrap(escape(text), width, break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        left = "" if number else label
        console.print(Text.assemble((left.ljust(indent), label_style), (line, style)), soft_wrap=True)


def milliseconds(seconds: float) -> str:
    """Return `seconds` as text in milliseconds, with one decimal."""
    return f"{seconds * 1000:.1f} ms"


def _sign(outcome: str, console: Console) -> tuple[str, str]:
    """Return the sign of an outcome, in ASCII if the console's encoding needs it, and its style."""
    sign, ascii_sign, style = _SIGNS[outcome]
    return (ascii_sign if console.options.ascii_only else sign), style


def _step_line(step: Step, result: CheckResult, console: Console, bar: str | None = None) -> Text:
    from rich.text import Text

    sign, style = _sign(step.outcome, console)
    line = Text(no_wrap=True, style="dim" if step.outcome == "skipped" else "")
    line.append(f"{sign} ", style)
    line.append(f"{step.name:<15}{'' if step.seconds is None else milliseconds(step.seconds):>10}  ")
    if bar is not None:
        line.append(f"{bar:<{_BAR_CELLS}}  ", style)
    line.append(escape(result.problem.type if step.outcome == "failed" and result.problem else step.detail))
    line.truncate(console.width, overflow="crop" if console.options.ascii_only else "ellipsis")
    line.rstrip()
    return line


def _total_line(result: CheckResult) -> Text:
    from rich.text import Text

    return Text(f"  {'total':<15}{milliseconds(result.seconds):>10}", style="bold")


def _bar(step: Step, total: float, console: Console) -> str:
    if step.started is None or step.seconds is None:
        return ""
    if not total:
        return ""
    start, end = (round(moment / total * _BAR_CELLS) for moment in (step.started, step.started + step.seconds))
    length = max(1, end - start)
    offset = min(start, _BAR_CELLS - length)
    return " " * offset + ("=" if console.options.ascii_only else "━") * length


def _facts(result: CheckResult) -> Iterable[tuple[str, Sequence[tuple[str, str]]]]:
    """Yield the heading of each group of facts, and the facts as pairs of name and value."""
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
                ("notAfter", f"{tls.not_after:%Y-%m-%d %H:%M} UTC, {counted(result.days_left or 0, 'day')} left"),
                ("SHA-256", tls.sha256),
            ),
        )
        yield "Chain", tuple(_chain_facts(tls))
    elif result.problem is not None and result.problem.served:
        yield "Chain", tuple(_certificates("as served", result.problem.served))
    if result.revocation is not None:
        yield "Revocation", tuple(_revocation_facts(result.revocation))
    if anchor is not None:
        yield "Trust anchor", (("subject", anchor.subject), ("found in", anchor.source), ("SHA-256", anchor.sha256))


def _certificates(name: str, certificates: Iterable[ChainCertificate]) -> Iterable[tuple[str, str]]:
    for number, each in enumerate(certificates):
        until = f", until {each.not_after:%Y-%m-%d}" if each.not_after else ""
        yield ("" if number else name), f"{each.subject or 'no name'}{until}"


def _revocation_facts(report: RevocationReport) -> Iterable[tuple[str, str]]:
    yield "status", report.status
    if report.reason:
        yield "because", report.reason
    if report.list_url is not None:
        yield "list", report.list_url
    if report.next_update is not None and report.checked_at is not None:
        yield "entries", f"{report.entries}"
        yield "next update", f"{report.next_update:%Y-%m-%d %H:%M} UTC"
        yield "checked at", f"{report.checked_at:%Y-%m-%d %H:%M} UTC"
    for number, each in enumerate(report.issuers):
        because = f": {each.reason}" if each.reason else ""
        yield "" if number else "issuers", f"{each.subject}, {each.status}{because}"


def _chain_facts(tls: TLSReport) -> Iterable[tuple[str, str]]:
    yield from _certificates("as served", tls.served)
    yield from _certificates("as verified", tls.chain)
    if tls.path_ends is not None:
        yield "path ends", f"{tls.path_ends:%Y-%m-%d}"
    for warning in tls.warnings:
        yield "WARNING", warning
