"""Test against a real PostgreSQL that is verified as Neon is, and that scales to zero as Neon does.

Needs the extra `testing`. The rest of neon_async must not import this package; only the pytest plugin, the
demonstration and `neon-async dev` do.
"""

from __future__ import annotations

from ._local_endpoint import EndpointState, LocalEndpoint, LocalEndpointError
from ._local_pooler import LocalPooler, LocalPoolerError
from ._local_postgres import LocalPostgres, LocalPostgresError
from ._pools import RollbackError

__all__ = (
    "EndpointState",
    "LocalEndpoint",
    "LocalEndpointError",
    "LocalPooler",
    "LocalPoolerError",
    "LocalPostgres",
    "LocalPostgresError",
    "RollbackError",
)

for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__  # in tracebacks, reprs and pickles
