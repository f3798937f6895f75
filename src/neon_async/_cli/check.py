"""Gather the facts of one connection, step by step, into a `CheckResult`.

This module must not know arguments, exit statuses or how a result is shown; `render` shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import importlib.util
import time
from typing import TYPE_CHECKING, Any, Literal

from .._config.dsn import harden_dsn, redact
from .._driver.connector import prepare
from .._errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidPasswordError,
    NeonAsyncError,
    ProtocolError,
    TLSError,
)
from .._wire.chain import describe_refused
from .._wire.revocation.report import RevocationReport

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from .._driver.connector import Connector
    from .._wire.report import ChainCertificate, TLSReport
    from .._wire.trust import TrustAnchor

__all__ = ("CheckResult", "Problem", "Refusal", "Step", "check")

Outcome = Literal["ok", "retried", "failed", "skipped", "running"]

# In the order of a connection. The connector announces the steps between the first and the last.
_STEPS = ("parse", "dns", "tcp", "tls", "authentication", "query")
_WAITS_FOR_LIST = "waits for a revocation list"

# Seconds. All facts are known by then, and nothing is shown while the connection is closed.
_CLOSE_TIMEOUT = 2.0

# With these errors neon-async refuses to continue. All other errors come from the server or the network.
_REFUSALS = (ConfigurationError, TLSError, AuthenticationError, ProtocolError)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One step of a check.

    Attributes:
        name: parse, dns, tcp, tls, authentication or query. A step that was run twice is listed twice.
        started: Seconds from the start of the check to the start of the step. None if the step did not run.
        seconds: Duration of the step. None if the step did not run.
        outcome: "ok", "failed", "skipped", or "retried" for a step that was given up for another way. Direct TLS is
            retried when the server does not support it. While the check runs, the latest step can be "running".
        detail: One line about the outcome.
    """

    name: str
    started: float | None
    seconds: float | None
    outcome: Outcome
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why `create_pool()` refuses the settings as they are written, where sslmode=verify-full is the answer.

    Attributes:
        type: The name of the error's class.
        message: The error's message.
        hardened: The DSN to use, without its password. None where there is no DSN, or no DSN that is accepted.
    """

    type: str
    message: str
    hardened: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """The error that ended a check.

    Attributes:
        step: The name of the step that failed.
        type: The name of the error's class.
        message: The error's message, which says what to do.
        retryable: Whether the same check can succeed later.
        refused: Whether neon-async refused to continue, whatever the server would have accepted.
        served: The certificates that the server sent, where they failed verification.
    """

    step: str
    type: str
    message: str
    retryable: bool
    refused: bool
    served: tuple[ChainCertificate, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class CheckResult:
    """The facts of one connection. A fact is None if the check ended before it was known.

    Attributes:
        steps: All steps in order, including those that did not run. While the check runs: those so far.
        refusal: Why `create_pool()` refuses the settings as they are written. None if it accepts them, and if the check
            could not go on under sslmode=verify-full for the same reason, which is the problem then.
        target: The DSN without its password. Known after parse.
        anchor: The root certificate that is trusted; of several, the one at which the chain ended. Known after parse.
        tls: What was negotiated and verified. Known after tls.
        days_left: Whole days until the server's certificate expires. Known after tls.
        server_version: The version as PostgreSQL writes it. Known after query.
        revocation: Whether the certificates of the server have been revoked. Known after tls; None with `offline`.
        problem: The error that ended the check, or None.
    """

    steps: tuple[Step, ...]
    refusal: Refusal | None = None
    target: str | None = None
    anchor: TrustAnchor | None = None
    tls: TLSReport | None = None
    days_left: int | None = None
    server_version: str | None = None
    revocation: RevocationReport | None = None
    problem: Problem | None = None

    @property
    def verdict(self) -> Literal["good", "refused", "failed"]:
        """Return "good", "refused" (by neon-async), or "failed" (at the server or on the way to it)."""
        if self.problem is None:
            return "good"
        return "refused" if self.problem.refused else "failed"

    @property
    def seconds(self) -> float:
        """Return the seconds from the start of the first step to the end of the last step that ran."""
        return max((step.started or 0.0) + (step.seconds or 0.0) for step in self.steps)


def _ignore(so_far: CheckResult) -> None:
    """Ignore that something became known."""


async def check(
    dsn: str | None = None,
    *,
    trust_anchor: bytes | str | os.PathLike[str] | None = None,
    offline: bool = False,
    on_progress: Callable[[CheckResult], None] = _ignore,
) -> CheckResult:
    """Open one verified connection, run one query, close the connection, and return what happened.

    The revocation lists that the server's certificates name are fetched meanwhile, and waited for at the end.

    The connection is tried once. A refused configuration and a failed step are part of the result, not exceptions.
    Settings that ask for less than verify-full are a part of the result, and the check continues under verify-full.
    The dial ends within the `connect_timeout` of the parameters, the query within the same time again, and the wait for
    the lists likewise.

    Args:
        dsn: The connection string. None (the default): the PG* variables of libpq are used alone.
        trust_anchor: As in `create_pool()`. None (the default): ISRG Root X1.
        offline: Whether to fetch no list, unless DSN or environment ask for it. False (the default): lists are fetched.
        on_progress: Called with the result so far when a step begins and when it ends. It must not raise.
    """
    timeline = _Timeline(on_progress)
    timeline.begin("parse")
    revocation = None if offline or _missing() else "advise"
    try:
        connector, refusal = _prepare(dsn, trust_anchor=trust_anchor, revocation=revocation)
    except _RefusedError as refused:
        problem = timeline.fail(refused.error)
        return CheckResult(timeline.steps({}), refusal=refused.refusal, problem=problem)
    timeline.know(connector, refusal)
    server_version, failure = await _connect_and_query(connector, timeline)
    revoked = await _await_lists(connector, timeline)
    tls = connector.tls_report
    return CheckResult(
        steps=timeline.steps(_details(connector, server_version)),
        refusal=refusal,
        target=connector.parameters.redacted_dsn,
        anchor=(connector.anchor.root(tls.anchor_sha256) if tls else None) or connector.anchor,
        tls=tls,
        days_left=(tls.not_after - datetime.datetime.now(datetime.UTC)).days if tls else None,
        server_version=server_version,
        revocation=_revocation(tls, offline=offline),
        problem=revoked or failure,
    )


class _RefusedError(Exception):
    """The settings are refused under sslmode=verify-full, too."""

    def __init__(self, error: NeonAsyncError, refusal: Refusal | None) -> None:
        self.error = error
        self.refusal = refusal


def _prepare(dsn: str | None, **parameters: Any) -> tuple[Connector, Refusal | None]:
    """Return the connector, and why `create_pool()` refuses the settings as they are written.

    Raises:
        _RefusedError: There is no connector under sslmode=verify-full, either.
    """
    try:
        return prepare(dsn, **parameters), None
    except NeonAsyncError as error:
        as_written = error
    try:
        hardened = None if dsn is None else harden_dsn(dsn)
        connector = prepare(hardened, sslmode="verify-full", **parameters)
    except NeonAsyncError as error:
        refusal = None if str(error) == str(as_written) else _refusal(as_written, None)
        raise _RefusedError(error, refusal) from None
    return connector, _refusal(as_written, None if hardened is None else redact(hardened))


def _refusal(error: NeonAsyncError, hardened: str | None) -> Refusal:
    return Refusal(type(error).__name__, str(error), hardened)


async def _connect_and_query(connector: Connector, timeline: _Timeline) -> tuple[str | None, Problem | None]:
    """Return the server's version, or the problem."""

    def begin(step: str) -> None:
        if step in _STEPS:
            timeline.begin(step)
        else:  # DSN or environment require a list, and waiting for it is a part of tls
            timeline.note(_WAITS_FOR_LIST)

    try:
        connection = await connector.connect(on_step=begin)
    except Exception as error:  # noqa: BLE001  # NeonAsyncError, and any other error that a server sends
        return None, timeline.fail(error)
    limit = connector.parameters.connect_timeout
    try:
        timeline.begin("query")
        server_version = await connection.fetchval("SHOW server_version", timeout=limit)
        timeline.end("ok")
        with contextlib.suppress(Exception):  # the facts are complete; an error of the close does not change them
            await connection.close(timeout=min(limit, _CLOSE_TIMEOUT))
    except TimeoutError:
        return None, timeline.fail(TimeoutError(f"The server did not answer a query within {limit:g} s. Try again."))
    except Exception as error:  # noqa: BLE001  # any error of the query is part of the result
        return None, timeline.fail(error)
    finally:
        connection.terminate()
    return str(server_version), None


async def _await_lists(connector: Connector, timeline: _Timeline) -> Problem | None:
    """Wait for the revocation lists that are being fetched, and return the problem if something has been revoked."""
    if connector.revocation is None:
        return None
    if connector.revocation.is_awaited:
        timeline.show_wait("revocation", _WAITS_FOR_LIST)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(connector.parameters.connect_timeout):
            await connector.revocation.settle()
    error = connector.revocation.revoked()
    return None if error is None else _problem("tls", error)


def _revocation(tls: TLSReport | None, *, offline: bool) -> RevocationReport | None:
    if tls is None:
        return None
    missing = _missing()
    if tls.revocation.status == "off" and missing and not offline:
        reason = f"it needs {' and '.join(missing)}; run: python -m pip install 'neon-async[revocation]'"
        return RevocationReport("unknown", tls.subject, reason=reason)
    return None if tls.revocation.status == "off" else tls.revocation


def _missing() -> list[str]:
    """Return the packages of the extra `revocation` that are not installed."""
    return [name for name in ("cryptography", "platformdirs") if importlib.util.find_spec(name) is None]


def _details(connector: Connector, server_version: str | None = None) -> Mapping[str, str]:
    """Return the detail of each step that succeeded, as far as it is known."""
    parameters, tls = connector.parameters, connector.tls_report
    return {
        "parse": "sslmode=verify-full",
        "dns": parameters.host,
        "tcp": f"{parameters.hostaddr or ''} port {parameters.port}".strip(),
        "tls": f"{tls.version}, {tls.negotiation}" if tls else "",
        "authentication": f"as {parameters.user}, {tls.mechanism}" if tls else f"as {parameters.user}",
        "query": f"PostgreSQL {server_version}" if server_version else "",
    }


def _problem(step: str, error: Exception) -> Problem:
    return Problem(
        step=step,
        type=type(error).__name__,
        message=str(error) or "The error has no message.",
        retryable=isinstance(error, NeonAsyncError) and error.retryable,
        refused=isinstance(error, _REFUSALS) and not isinstance(error, InvalidPasswordError),
        served=describe_refused(error),
    )


class _Timeline:
    """The steps of one check as they happen. Times count from the creation of this object."""

    def __init__(self, on_progress: Callable[[CheckResult], None]) -> None:
        self._zero = time.perf_counter()
        self._ended: list[Step] = []
        self._running: Step | None = None
        self._on_progress = on_progress
        self._connector: Connector | None = None
        self._refusal: Refusal | None = None
        self._problem: Problem | None = None

    def know(self, connector: Connector, refusal: Refusal | None) -> None:
        """Show what the settings mean together with the steps, from now on."""
        self._connector, self._refusal = connector, refusal

    def begin(self, name: str) -> None:
        """End the running step, if there is one, and start `name`.

        A step that does not come after the running one means that the running one was given up for another way.
        """
        if self._running is not None:
            went_back = _STEPS.index(name) <= _STEPS.index(self._running.name)
            self._end("retried" if went_back else "ok", "tried another way" if went_back else "")
        self._running = Step(name, time.perf_counter() - self._zero, None, "running", "")
        self._report()

    def note(self, detail: str) -> None:
        """Show what the running step is doing."""
        if self._running is not None:
            self._running = dataclasses.replace(self._running, detail=detail)
            self._report()

    def show_wait(self, name: str, detail: str) -> None:
        """Show that the check waits for something that is no step of the connection."""
        self._report(Step(name, time.perf_counter() - self._zero, None, "running", detail))

    def end(self, outcome: Outcome, detail: str = "") -> None:
        """End the running step."""
        self._end(outcome, detail)
        self._report()

    def fail(self, error: Exception) -> Problem:
        """End the running step with `error`, and return the problem."""
        problem = self._problem = _problem(self._running.name if self._running else "", error)
        self.end("failed", problem.message)
        return problem

    def steps(self, details: Mapping[str, str]) -> tuple[Step, ...]:
        """Return all steps in order. Those that succeeded get their text from `details`."""
        steps = self._so_far(details)
        reached = _STEPS.index(steps[-1].name)
        return (*steps, *(Step(name, None, None, "skipped", "not reached") for name in _STEPS[reached + 1 :]))

    def _end(self, outcome: Outcome, detail: str) -> None:
        assert self._running is not None
        assert self._running.started is not None
        seconds = time.perf_counter() - self._zero - self._running.started
        self._ended.append(dataclasses.replace(self._running, seconds=seconds, outcome=outcome, detail=detail))
        self._running = None

    def _so_far(self, details: Mapping[str, str]) -> list[Step]:
        """Return the steps that have ended, and dns if it was left out."""
        steps = [
            dataclasses.replace(step, detail=details.get(step.name, "")) if step.outcome == "ok" else step
            for step in self._ended
        ]
        dns = _STEPS.index("dns")
        names = {step.name for step in (*self._ended, *filter(None, [self._running]))}
        if "dns" not in names and any(_STEPS.index(name) > dns for name in names):
            steps.insert(dns, Step("dns", None, None, "skipped", "hostaddr is given"))
        return steps

    def _report(self, waiting: Step | None = None) -> None:
        connector, latest = self._connector, waiting or self._running
        steps = self._so_far(_details(connector) if connector else {})
        self._on_progress(
            CheckResult(
                (*steps, latest) if latest else tuple(steps),
                refusal=self._refusal,
                target=connector.parameters.redacted_dsn if connector else None,
                problem=self._problem,
            )
        )
