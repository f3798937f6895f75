"""What the tests of the pool share: a relay that can fail in front of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from neon_async.testing import LocalEndpoint, LocalPostgres


@pytest.fixture
async def endpoint(postgres: LocalPostgres) -> AsyncIterator[LocalEndpoint]:
    """An endpoint that is awake, in front of the server of the session."""
    async with LocalEndpoint(postgres) as endpoint:
        yield endpoint
