"""What is known of one session beyond what asyncpg knows, and what the sessions of one pool share.

Data only. Knows no connection and sends nothing.
"""

# No `from __future__ import annotations`: the classes take longer to define when their annotations are strings.

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .._neon.endpoint import Endpoint, short_name
from .._neon.quoting import quote, quote_name
from .losses import Loss

if TYPE_CHECKING:
    from .._wire.report import TLSReport
    from .._wire.revocation.check import ChainCheck, Watch
    from .._wire.tls import Handshake


class Healing:
    """What the connections of one pool share about stale prepared statements.

    PgBouncer shares prepared statements among clients by their text. A server connection that prepared a text before
    the DDL answers "cached plan must not change result type" for ever, however often a client prepares it again. So
    the pool changes the text: from then on a comment follows the query. Other connections, on direct hosts as well,
    then prepare it before it fails on them. All other texts stay as they are.

    The comment is random, because another process may have healed with a comment of its own before, and its texts may
    be stale again. It stands at the end, because pg_hint_plan reads the first comment. At the end of a `--` comment it
    becomes part of that comment, and still makes another text.

    Where the `search_path` is known, each has texts of its own: under another one the same query can have another
    result, and neither is stale.

    Args:
        is_shared: Whether a pooler shares statements, so that one that is prepared now can be an old one.

    Attributes:
        heals: How often a text was renewed.
        has_tokens: Whether any text is sent otherwise than its caller wrote it.
        seconds: How long calls took to run once more, in total.
    """

    __slots__ = ("_general", "_tokens", "has_tokens", "heals", "is_shared", "seconds")

    def __init__(self, *, is_shared: bool = False) -> None:
        self.is_shared: bool = is_shared
        self._general = ""  # of the queries that have none of their own
        self._tokens: dict[tuple[str, str | None], str] = {}
        self.heals: int = 0
        self.has_tokens: bool = False
        self.seconds: float = 0.0

    def __repr__(self) -> str:
        return f"<Healing {self.heals} heals in {self.seconds:.3f} s>"

    def text_of(self, query: str, search_path: str | None) -> str:
        """Return the text that is sent for a query.

        Args:
            query: The query of the caller.
            search_path: Of the transaction or session, or None where it is not known.
        """
        tokens = self._tokens
        return query + (tokens.get((query, search_path)) or tokens.get((query, None)) or self._general)

    def renew(self, query: str, search_path: str | None, sent: str) -> bool:
        """Change the text that is sent for `query` from now on.

        Calls fail together, and some were sent with a text that has been renewed since: one renewal serves them all.

        Args:
            query: The query of the caller.
            search_path: As in `text_of()`.
            sent: The text that was stale.

        Returns:
            Whether a renewal was needed.
        """
        if sent != self.text_of(query, search_path):
            return False
        self._tokens.pop((query, search_path), None)  # the latest ones stay when there are too many
        if len(self._tokens) >= _MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[query, search_path] = _token()
        self.has_tokens = True
        self.heals += 1
        return True

    def renew_all(self) -> None:
        """Change the text of every query, where a pooler may have old statements for any."""
        if self.is_shared:
            self._tokens.clear()
            self._general = _token()
            self.has_tokens = True


# How many queries have a token of their own: as many as asyncpg caches on ten connections.
_MAX_TOKENS = 1000


def _token() -> str:
    return f" /* neon-async {os.urandom(4).hex()} */"


_NOTHING: Mapping[Any, Any] = {}


class Callbacks(NamedTuple):
    """The callbacks that are registered on a connection.

    Attributes:
        listeners: Of notifications, by channel.
        log_listeners: Of log messages.
        query_loggers: Of statements.
        termination_listeners: Of the end of the connection.
    """

    listeners: Mapping[str, frozenset[Any]] = _NOTHING
    log_listeners: frozenset[Any] = frozenset()
    query_loggers: frozenset[Any] = frozenset()
    termination_listeners: frozenset[Any] = frozenset()


NO_CALLBACKS = Callbacks()


# Everything a borrower can leave in a session, in an order that works: first the rights of the login, then settings,
# because a statement_timeout applies until it is reset. What RESET ALL leaves behind are temporary tables and the
# caches of sequences. Not DISCARD ALL, which runs in no transaction and drops asyncpg's prepared statements.
RESET = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_advisory_unlock_all(); "
    "DISCARD TEMP; DISCARD SEQUENCES"
)


class Codec(NamedTuple):
    """A type codec of a connection.

    Attributes:
        method: The method that registered it: `set_type_codec` or `set_builtin_type_codec`.
        options: The arguments it was registered with, but for the type and its schema.
    """

    method: str
    options: Mapping[str, Any]


class Snapshot(NamedTuple):
    """What `init` set up.

    Attributes:
        role: Of `SET ROLE`, or None.
        authorization: Of `SET SESSION AUTHORIZATION`, or None.
        settings: The settings of the session, by name.
        callbacks: Listeners and query loggers.
        codecs: Type codecs, by schema and type.
        statements: The names of the statements that were prepared in SQL.
    """

    role: str | None = None
    authorization: str | None = None
    settings: Mapping[str, str] = _NOTHING
    callbacks: Callbacks = NO_CALLBACKS
    codecs: Mapping[tuple[str, str], Codec] = _NOTHING
    statements: frozenset[str] = frozenset()

    def deallocate_query(self) -> str:
        """Return the SQL that drops all other statements that were prepared in SQL, and none of asyncpg's."""
        kept = "".join(f" AND name <> {quote(name)}" for name in sorted(self.statements))
        names = f"SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql{kept}"  # noqa: S608
        loop = f"FOR one IN {names} LOOP EXECUTE pg_catalog.format('DEALLOCATE %I', one); END LOOP"
        return f"DO {quote(f'DECLARE one text; BEGIN {loop}; END')}"

    def reset_query(self) -> str:
        """Return the SQL that sets a session back to this."""
        restore = [f"LISTEN {quote_name(channel)}" for channel in self.callbacks.listeners]
        restore += [f"SELECT set_config({quote(name)}, {quote(value)}, false)" for name, value in self.settings.items()]
        if self.authorization is not None:
            restore.append(f"SET SESSION AUTHORIZATION {quote_name(self.authorization)}")
        if self.role is not None:
            restore.append(f"SET ROLE {quote_name(self.role)}")
        return "; ".join([RESET, *restore])


_AS_NEW = Snapshot()  # its `reset_query()` is RESET


# A cancelled statement ends after a connect, a TLS handshake, the request and its answer, and one more statement may
# follow: the handshake and three round trips, and a handshake takes one at least. The rest is for a busy server.
_CANCEL_HANDSHAKES = 6
_MIN_CANCEL_TIME = 0.5
_MAX_CANCEL_TIME = 5.0  # as the reset of a connection


def cancel_time_for(handshake_time: float) -> float:
    """Return the seconds that a cancelled statement and the one after it may take, by what the TLS handshake took."""
    return min(_MIN_CANCEL_TIME + _CANCEL_HANDSHAKES * handshake_time, _MAX_CANCEL_TIME)


class Session:
    """One session with the server, from its login to its end.

    Attributes:
        host: The host name that was verified.
        endpoint: What the host name says, or None when it is not a Neon endpoint.
        healing: Shared by the connections of one pool.
        cancel_time: The seconds that a cancelled statement and the one after it may take; see `cancel_time_for()`.
        watch: Of the revocation of the server's chain, where it was asked for. It ends with the session.
        cancel: Sends a cancel request to the server of this session.
        on_closed: Called once, as soon as the connection is closed, by either side.
        revocation: The check of the chain's revocation, or None where it was not asked for.
        snapshot: What a reset restores; see `remember()`.
        reset_query: The SQL that restores it.
        codecs: The type codecs that are registered now, by schema and type.
        composites: The names and types of the attributes of each composite type that asyncpg knows, by OID.
        suspects_composites: Whether a statement failed as if one of them had changed.
        heals_seen: How often a statement of the pool had been healed when both were last known to be of current types.
        left: Whether the connection's owner, the caller or the pool, has closed or terminated it: it was not lost.
        loss: Why the connection was lost, or None.
        commit_unknown: Whether the connection was lost during a COMMIT.
        initial_settings: The settings that PgBouncer tracks, as they were after the login and after the pool's `init`.
        calls: How many calls on the connection, and on what it handed out, are under way.
        on_last_call: Called when the last of them has ended, and when the connection is closed.
        holds_server: Whether PgBouncer may reserve a server connection for this client although no transaction is
            open. asyncpg ends a prepare with Flush, and the server connection stays reserved, with its locks on tables,
            until something is executed.
        pins_server: Whether PgBouncer keeps a server connection for this client until the client disconnects. It does
            so after a COPY to the server that failed (1.24): it waits for an answer to the rest of the data, which the
            server passes over.
    """

    __slots__ = (
        "_handshake",
        "calls",
        "cancel",
        "cancel_time",
        "codecs",
        "commit_unknown",
        "composites",
        "endpoint",
        "healing",
        "heals_seen",
        "holds_server",
        "host",
        "initial_settings",
        "left",
        "loss",
        "on_closed",
        "on_last_call",
        "pins_server",
        "reset_query",
        "revocation",
        "snapshot",
        "suspects_composites",
        "watch",
    )

    def __init__(
        self,
        *,
        host: str,
        endpoint: Endpoint | None,
        healing: Healing,
        handshake: "Handshake",
        handshake_time: float,
        cancel: Callable[[int, int], Awaitable[None]],
        revocation: "ChainCheck | None" = None,
    ) -> None:
        self.host: str = host
        self.endpoint: Endpoint | None = endpoint
        self.healing: Healing = healing
        self.heals_seen: int = healing.heals
        self.composites: dict[int, object] = {}
        self.suspects_composites: bool = False
        self._handshake = handshake
        self.revocation: ChainCheck | None = revocation
        self.watch: Watch[Any] | None = None
        self.cancel_time: float = cancel_time_for(handshake_time)
        self.cancel: Callable[[int, int], Awaitable[None]] = cancel
        self.on_closed: Callable[[], None] | None = None
        self.snapshot: Snapshot = _AS_NEW
        self.reset_query: str = RESET
        self.codecs: dict[tuple[str, str], Codec] = {}
        self.initial_settings: dict[str, str] = {}
        self.holds_server: bool = False
        self.pins_server: bool = False
        self.calls: int = 0
        self.on_last_call: Callable[[], None] | None = None
        self.left: bool = False
        self.loss: Loss | None = None
        self.commit_unknown: bool = False

    def end_call(self) -> None:
        """Note that a call has ended."""
        self.calls -= 1
        if self.on_last_call is not None and not self.calls:
            self.on_last_call()

    def note_loss(self, loss: Loss) -> None:
        """Note why the connection was lost, unless that is known or its owner has closed it."""
        if self.loss is None and not self.left:
            self.loss = loss

    def remember(self, snapshot: Snapshot) -> None:
        """Have every reset restore `snapshot`."""
        self.snapshot = snapshot
        self.reset_query = snapshot.reset_query()

    @property
    def name(self) -> str:
        """The name of the database in log lines."""
        return short_name(self.host, self.endpoint)

    def tls_report(self) -> "TLSReport":
        """Return what the TLS handshake settled on, and what is known now about the revocation of the chain."""
        return self._handshake.report(self.revocation)

    def notify_closed(self) -> None:
        """Call `on_closed`, unless it has been called."""
        if self.watch is not None:
            self.watch.stop()
        callback, self.on_closed = self.on_closed, None
        if callback is not None:
            callback()
        if self.on_last_call is not None:
            self.on_last_call()
