"""The tests of what changes data and schema, and of the dialect itself that SQLAlchemy ships for dialects."""

from sqlalchemy.testing.suite.test_ddl import *  # noqa: F403
from sqlalchemy.testing.suite.test_dialect import *  # noqa: F403
from sqlalchemy.testing.suite.test_insert import *  # noqa: F403
from sqlalchemy.testing.suite.test_rowcount import *  # noqa: F403
from sqlalchemy.testing.suite.test_sequence import *  # noqa: F403
from sqlalchemy.testing.suite.test_unicode_ddl import *  # noqa: F403
from sqlalchemy.testing.suite.test_update_delete import *  # noqa: F403
