"""Find out what the caller's `init` set up in a session, so that every reset restores it.

Knows no pools.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import holder
from .connection import Connection
from .session import Snapshot

# Settings of a session by name. `pg_settings` lists no custom settings (`app.tenant`), so those come by the names that
# stood in the statements of `init`.
_SETTINGS = """
SELECT name, setting FROM pg_settings WHERE source = 'session'
UNION
SELECT name, current_setting(name, true) FROM unnest($1::text[]) AS name
WHERE current_setting(name, true) <> '' AND name NOT IN (SELECT name FROM pg_settings)
"""
_STATEMENTS = "SELECT name FROM pg_prepared_statements WHERE from_sql"
_ROLES = "SELECT current_setting('role'), CASE WHEN session_user <> $1 THEN session_user::text END"


async def take_snapshot(connection: Any, *, user: str, names: Iterable[str]) -> Snapshot:
    """Return what `connection` has been set up with.

    Args:
        connection: A new connection on which `init` has returned.
        user: The user that logged in.
        names: Names of custom settings that `init` may have set.
    """
    settings = await holder.fetch(connection, _SETTINGS, sorted(set(names)))
    [(role, authorization)] = await holder.fetch(connection, _ROLES, user)
    protocol = holder.protocol_of(connection)
    prepared = await holder.fetch(connection, _STATEMENTS) if protocol and protocol.has_prepared else []
    return Snapshot(
        role=None if role == "none" else role,
        authorization=authorization,
        settings=dict(settings),
        callbacks=holder.callbacks_of(connection),
        codecs=dict(holder.own_session(connection).codecs),
        statements=frozenset(name for (name,) in prepared),
    )


async def restore_codecs(connection: Any) -> None:
    """Register the type codecs of the snapshot, and no others."""
    session = holder.own_session(connection)
    wanted = session.snapshot.codecs
    for schema, typename in [key for key in {*session.codecs, *wanted} if session.codecs.get(key) != wanted.get(key)]:
        await Connection.reset_type_codec(connection, typename, schema=schema)
        codec = wanted.get((schema, typename))
        if codec is not None:
            await getattr(Connection, codec.method)(connection, typename, schema=schema, **codec.options)
