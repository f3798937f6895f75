"""Two tracers that patch asyncpg's classes, OpenTelemetry's and Sentry's, and what they have recorded.

Knows nothing of neon_async.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import asyncpg
import sentry_sdk
from asyncpg import connect_utils, cursor, prepared_stmt
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.asyncpg import AsyncPGIntegration
from sentry_sdk.transport import Transport

# What the tracers patch.
_PATCHED = (
    asyncpg.Connection,
    cursor.BaseCursor,
    cursor.Cursor,
    cursor.CursorIterator,
    prepared_stmt.PreparedStatement,
    connect_utils,
)


class Span(NamedTuple):
    """What is compared of a span.

    Attributes:
        operation: The name that the tracer gives to what was done.
        statement: The SQL.
        parent: The SQL of the span around it, or "request".
        outcome: How it ended, as the tracer has it.
        facts: What else the tracer recorded, except for the name of the host.
    """

    operation: str
    statement: str
    parent: str
    outcome: str
    facts: tuple[tuple[str, str], ...]


class Recording:
    """The spans of a block. It is complete when the block has ended."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.hosts: set[str] = set()

    @property
    def statements(self) -> list[str]:
        return [span.statement for span in self.spans]


class Tracer(ABC):
    """A tracer for asyncpg, which is installed once and uninstalled in the end."""

    def __init__(self) -> None:
        self._originals = [dict(vars(patched)) for patched in _PATCHED]

    @abstractmethod
    def install(self) -> None:
        """Patch asyncpg's classes."""

    @abstractmethod
    def recording(self) -> contextlib.AbstractContextManager[Recording]:
        """Record the spans of a block, under a span of its own."""

    def uninstall(self) -> None:
        """Give asyncpg's classes their own functions back."""
        for patched, original in zip(_PATCHED, self._originals, strict=True):
            for name, value in original.items():
                if vars(patched)[name] is not value:
                    setattr(patched, name, value)


class OpenTelemetry(Tracer):
    """`opentelemetry-instrumentation-asyncpg`."""

    def __init__(self) -> None:
        super().__init__()
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._instrumentor: Any = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]

    def install(self) -> None:
        self._instrumentor.instrument(tracer_provider=self._provider)

    def uninstall(self) -> None:
        if self._instrumentor.is_instrumented_by_opentelemetry:
            self._instrumentor.uninstrument()
        super().uninstall()

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        self._exporter.clear()
        recording = Recording()
        with self._provider.get_tracer(__name__).start_as_current_span("request"):
            yield recording
        finished = sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        statements = {span.context.span_id: _statement_of(span) for span in finished if span.context}
        for span in finished:
            if span.name != "request":
                attributes = dict(span.attributes or {})
                recording.hosts.add(str(attributes.pop("net.peer.name")))
                recording.spans.append(
                    Span(
                        operation=span.name,
                        statement=_statement_of(span),
                        parent=statements[span.parent.span_id] if span.parent else "nothing",
                        outcome=span.status.status_code.name,
                        facts=_facts(attributes),
                    )
                )


def _statement_of(span: ReadableSpan) -> str:
    return _normal(str((span.attributes or {}).get("db.statement", span.name)))


class Sentry(Tracer):
    """`sentry-sdk` with its integration for asyncpg."""

    def __init__(self) -> None:
        super().__init__()
        self._transport = _Collector()

    def install(self) -> None:
        sentry_sdk.init(
            dsn="http://key@localhost/1",
            transport=self._transport,
            integrations=[AsyncPGIntegration()],
            default_integrations=False,
            auto_enabling_integrations=False,
            auto_session_tracking=False,
            enable_backpressure_handling=False,  # a thread
            traces_sample_rate=1.0,
        )
        if vars(asyncpg.Connection)["prepare"] is self._originals[0]["prepare"]:
            AsyncPGIntegration.setup_once()  # in a process `init()` calls it only once

    def uninstall(self) -> None:
        sentry_sdk.get_client().close()
        sentry_sdk.init()
        super().uninstall()

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        self._transport.transactions.clear()
        recording = Recording()
        # As Sentry's integrations for web frameworks do: what runs in one scope at the same time gets wrong parents.
        with sentry_sdk.isolation_scope(), sentry_sdk.start_transaction(name="request") as request:
            yield recording
        [transaction] = self._transport.transactions
        spans = sorted(transaction["spans"], key=lambda span: span["start_timestamp"])
        descriptions = {request.span_id: "request"}
        descriptions |= {span["span_id"]: _normal(span["description"]) for span in spans}
        for span in spans:
            data = dict(span.get("data", {}))
            recording.hosts.add(str(data.pop("server.address", "")))
            recording.spans.append(
                Span(
                    operation=span["op"],
                    statement=_normal(span["description"]),
                    parent=descriptions[span["parent_span_id"]],
                    outcome=str(span.get("status")),
                    facts=_facts(data),
                )
            )
        recording.hosts.discard("")


class _Collector(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.transactions: list[Any] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_transaction_event()
        if event is not None:
            self.transactions.append(event)


def _normal(statement: str) -> str:
    """Return a statement without what differs from run to run."""
    return re.sub(r"__asyncpg_(\w+?)_[0-9a-f]+__", r"\1", statement)


def _facts(attributes: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    kept = {
        name: str(value) for name, value in attributes.items() if not name.startswith(("db.cursor", "code.", "thread."))
    }
    return tuple(sorted((name, _normal(value)) for name, value in kept.items()))
