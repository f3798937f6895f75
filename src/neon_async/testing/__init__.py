"""What tests of neon-async, and of code that uses it, need: a real server that is verified as Neon is, and that sleeps.

Needs the `testing` extra. It must not be imported by the package itself.
"""

from __future__ import annotations

from neon_async.testing._local_endpoint import LocalEndpoint, LocalEndpointError
from neon_async.testing._local_postgres import LocalPostgres, LocalPostgresError

__all__ = ("LocalEndpoint", "LocalEndpointError", "LocalPostgres", "LocalPostgresError")
