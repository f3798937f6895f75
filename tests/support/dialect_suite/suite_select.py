"""The tests of queries that SQLAlchemy ships for dialects."""

from sqlalchemy.testing.suite.test_cte import *  # noqa: F403
from sqlalchemy.testing.suite.test_results import *  # noqa: F403
from sqlalchemy.testing.suite.test_select import *  # noqa: F403

# It knows the drivers by name, and ours is none of them: `tests/edges` has tests of streams.
del ServerSideCursorsTest  # noqa: F821
