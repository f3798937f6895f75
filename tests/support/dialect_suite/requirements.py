"""What PostgreSQL and asyncpg can do, for SQLAlchemy's suite, which is cautious by default."""

from __future__ import annotations

from typing import Any

from sqlalchemy.testing import exclusions
from sqlalchemy.testing.requirements import SuiteRequirements

_yes: Any = property(lambda _: exclusions.open())  # type: ignore[no-untyped-call]


class Requirements(SuiteRequirements):
    """SQLAlchemy's defaults, and what PostgreSQL has besides."""

    array_type = json_type = uuid_data_type = _yes
    ctes = ctes_on_dml = ctes_with_update_delete = ctes_with_values = _yes
    delete_from = update_from = _yes
    fetch_first = fetch_offset_with_options = fetch_ties = fetch_null_from_numeric = _yes
    infinity_floats = precision_numerics_many_significant_digits = _yes
    regexp_match = regexp_replace = _yes
    supports_bitwise_and = supports_bitwise_not = supports_bitwise_or = supports_bitwise_shift = _yes
    supports_bitwise_xor = supports_distinct_on = _yes
    table_ddl_if_exists = index_ddl_if_exists = _yes
    tuple_in = tuple_in_w_empty = _yes
