"""Read a file of SQL and run it in a new database, as one transaction.

This module must not know how the server was started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .._errors import ConfigurationError

# pg_dump writes these for psql since the releases of August 2025 (CVE-2025-8714).
_RESTRICT = re.compile(r"^\\(un)?restrict\b.*$", re.MULTILINE)
# These need psql on the other side of the connection.
_FOR_PSQL = re.compile(r"^(\\\w+|COPY\s[^;]*\sFROM\s+stdin\b)", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Schema:
    """The text of a file of SQL, and its path for messages."""

    path: Path
    text: str

    def line_of(self, position: int) -> int:
        """Return the number of the line that contains the character at `position`, which counts from 0."""
        return self.text.count("\n", 0, position) + 1


def read_schema(path: Path) -> Schema:
    """Return the file.

    Raises:
        ConfigurationError: It cannot be read, or contains what only psql can run.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"schema={str(path)!r} cannot be read: {error}. Pass a file of SQL in UTF-8."
        ) from error
    schema = Schema(path, _RESTRICT.sub("", text))
    only_psql = _FOR_PSQL.search(schema.text)
    if only_psql is not None:
        what = only_psql[0].split()[0]
        raise ConfigurationError(
            f"{path}, line {schema.line_of(only_psql.start())}: {what} is for psql, and the server cannot run it. "
            "Dump with `pg_dump --schema-only`, or with `--inserts` where the file contains data."
        )
    return schema


async def apply_schema(schema: Schema, dsn: str, trust_anchor: bytes) -> str | None:
    """Run the file, and return what is wrong with it, or None.

    Args:
        schema: The file.
        dsn: Of the new database.
        trust_anchor: Of its server.
    """
    from .._driver.connect import connect
    from .._driver.losses import is_server_error

    connection = await connect(dsn, trust_anchor=trust_anchor, sslmode="verify-full", command_timeout=None)
    try:
        await connection.execute(schema.text)
    except Exception as error:
        if not is_server_error(error):
            raise
        position = getattr(error, "position", None)
        line = f", line {schema.line_of(int(position) - 1)}" if position else ""
        return f"{schema.path}{line}: {error}"
    finally:
        connection.terminate()
    return None
