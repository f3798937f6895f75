"""The tests of types that SQLAlchemy ships for dialects."""

from sqlalchemy.testing.suite.test_types import *  # noqa: F403
