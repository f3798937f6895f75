"""What needs a session of its own: the names of session features, and the settings that are none.

It must not know SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class SessionFeature(NamedTuple):
    """A feature that needs a session of its own.

    Attributes:
        name: The feature, as SQL spells it.
        instead: What has the same effect inside a transaction, or ''.
    """

    name: str
    instead: str

    def feature(self, _: Sequence[object]) -> SessionFeature:
        """Return the feature, whatever the arguments of the call are."""
        return self


class NestedText(NamedTuple):
    """SQL that a statement executes.

    Attributes:
        text: The text, or the number of the parameter that is the text.
        is_block: Whether it is a block of PL/pgSQL.
    """

    text: str | int
    is_block: bool = False


# The settings that PgBouncer restores on every server connection that it assigns to a client (its documentation,
# track_extra_parameters), as servers report them (PostgreSQL documentation, section 54.2.7), and in lower case.
REPORTED_SETTINGS = (
    "standard_conforming_strings",
    "client_encoding",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "application_name",
)
TRACKED_SETTINGS = frozenset(map(str.lower, REPORTED_SETTINGS))
