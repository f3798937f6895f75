"""What an HTTP service answers about its pools, whatever its framework: readiness, and errors as problem documents.

Knows no framework.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ._errors import (
    CommitUnknownError,
    ConnectionLostError,
    QueryTimeoutError,
    is_unavailable,
    originals_of,
)
from ._pool.pool import Pool
from ._text import escape, log

PROBLEM = "application/problem+json"  # RFC 9457
# Seconds. A suspended compute wakes within this time, and an outage costs each client few requests.
RETRY_AFTER = 2
# Seconds for the query of a deep probe; Kubernetes gives up on a probe after one second by default.
PROBE_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with a JSON body."""

    status: int
    body: Mapping[str, object]
    headers: Mapping[str, str]
    media_type: str = "application/json"


def answer_to(error: BaseException, method: str, path: str) -> Answer | None:
    """Return the answer to a request that failed with `error`, or None where the error is not about availability.

    The text of the error goes to the log and not to the client: it names hosts.

    Args:
        error: What the handler of the request raised.
        method: Of the request. Only one that is idempotent is invited to repeat a statement that may have written.
        path: Of the request, for the log.
    """
    lost_commit = any(isinstance(one, CommitUnknownError) for one in originals_of(error))
    if lost_commit:
        answer = Answer(
            503,
            _problem(
                "Outcome unknown",
                "The connection to the database was lost while the transaction was committed. It may have been "
                "committed, or not. Find out before the request is repeated.",
            ),
            {},
            PROBLEM,
        )
    elif not is_unavailable(error):
        return None
    elif method not in _IDEMPOTENT and any(map(_may_have_written, originals_of(error))):
        answer = Answer(
            503,
            _problem(
                "Outcome unknown",
                "The database became unavailable while a statement was under way, which may have been executed, or "
                "not. Find out before the request is repeated.",
            ),
            {},
            PROBLEM,
        )
    else:
        answer = Answer(
            503,
            _problem("Service Unavailable", "The database is unavailable at the moment. Try again."),
            {"Retry-After": str(RETRY_AFTER)},
            PROBLEM,
        )
    # The pool itself warns once when an outage begins, and a lost COMMIT is no outage.
    level = logging.WARNING if lost_commit else logging.INFO
    log(
        level,
        "%(method)s %(path)s: answered %(status)d, %(error)s: %(reason)s",
        event="answered",
        method=escape(method),
        path=escape(path),
        status=answer.status,
        error=type(error).__name__,
        reason=" ".join(escape(str(error)).split()),
    )
    return answer


# The methods that a client may repeat whatever became of a request (RFC 9110, section 9.2.2).
_IDEMPOTENT = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PUT", "TRACE"})


def _may_have_written(error: BaseException) -> bool:
    """Return whether a statement without a transaction may have been executed: its own COMMIT was lost."""
    if isinstance(error, ConnectionLostError):
        return not error.nothing_committed
    return isinstance(error, QueryTimeoutError)


def _problem(title: str, detail: str) -> dict[str, object]:
    return {"type": "about:blank", "title": title, "status": 503, "detail": detail}


async def readiness_of(pools: Mapping[str, Pool], *, deep: bool) -> Answer:
    """Return 200 where every pool can serve or can wake its database, and else 503.

    Args:
        pools: The pools by name.
        deep: Whether to ask each database, which wakes a compute that is suspended.
    """
    reports = dict(zip(pools, await asyncio.gather(*(_report_of(pool, deep) for pool in pools.values())), strict=True))
    usable = bool(reports) and all(report["state"] != "unavailable" for report in reports.values())
    return Answer(200 if usable else 503, {"pools": reports}, {"Cache-Control": "no-store"})


async def _report_of(pool: Pool, deep: bool) -> dict[str, object]:
    error: Exception | None = None
    if deep:
        try:
            await pool.fetchval("SELECT 1", timeout=PROBE_TIMEOUT)
        except Exception as raised:  # noqa: BLE001  whatever it is, the database did not answer
            error = raised
    health = pool.health()
    state = "unavailable" if error is not None else health.state
    if state == "unavailable":
        error = error or health.last_error
    report: dict[str, object] = {"state": state, "since": health.since.isoformat(timespec="milliseconds")}
    if state == "unavailable" and error is not None:
        report["error"] = type(error).__name__  # not its text, which names hosts
    return report
