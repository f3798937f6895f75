"""Verified connections from async Python to Neon."""

# An import loads what programs name: errors, classes, functions and the types of their arguments. What reads parameters
# and connects is loaded by the calls that ask for a connection, `create_pool()` and `connect()`: they import
# `_driver.connector` or `_driver.connectors`, and with them `_config` and `_wire`; a pool imports its `supply`. So a
# program that opens no connection is spared half of the package, and one that does has loaded all of it before it
# serves anything. Nothing that `import neon_async` loads may import these modules at its top; tests/test_startup.py.

from __future__ import annotations

import importlib as _importlib
import typing as _typing

from ._config.arguments import AnchorSource, ConnectKeywords, PasswordSource
from ._config.literals import IsolationLevel, PoolState, RevocationMode, RevocationStatus, SSLNegotiation
from ._config.roots import ISRG_ROOT_X1_SHA256, LETS_ENCRYPT_ROOTS
from ._driver.connect import connect
from ._driver.connection import Connection, connection_tls_report
from ._driver.holder import Record
from ._driver.transaction import Transaction
from ._errors import (
    AuthenticationError,
    CertificateError,
    CertificateRevokedError,
    ChannelBindingError,
    CommitUnknownError,
    ComputeUnavailableError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DatabaseNotFoundError,
    EndpointDisabledError,
    EndpointError,
    EndpointNotFoundError,
    InsecureConfigurationError,
    InvalidPasswordError,
    IPNotAllowedError,
    NeonAsyncError,
    PoolBusyError,
    PoolClosedError,
    PooledHostError,
    PoolTimeoutError,
    ProtocolError,
    QueryTimeoutError,
    QuotaExceededError,
    RevocationUnknownError,
    StaleStatementError,
    TLSError,
    TooManyConnectionsError,
    TransactionAbortedError,
    UnsupportedEventLoopError,
    WrongMethodError,
    is_retryable,
    is_unavailable,
)
from ._neon.endpoint import Endpoint
from ._pool.options import PoolKeywords
from ._pool.pool import Pool, create_pool

if _typing.TYPE_CHECKING:
    from ._config.dsn import harden_dsn
    from ._driver.listen import Gap, Listener, Notification, listen
    from ._patch import AsyncpgPatch, patch_asyncpg
    from ._pool.health import PoolHealth
    from ._pool.stats import PoolStats
    from ._wire.report import ChainCertificate, RevocationReport, TLSReport
    from ._wire.tls import create_ssl_context

__version__ = "0.1.0"

__all__ = (
    "ISRG_ROOT_X1_SHA256",
    "LETS_ENCRYPT_ROOTS",
    "AnchorSource",
    "AsyncpgPatch",
    "AuthenticationError",
    "CertificateError",
    "CertificateRevokedError",
    "ChainCertificate",
    "ChannelBindingError",
    "CommitUnknownError",
    "ComputeUnavailableError",
    "ConfigurationError",
    "ConnectError",
    "ConnectKeywords",
    "ConnectTimeoutError",
    "Connection",
    "ConnectionLostError",
    "DatabaseNotFoundError",
    "Endpoint",
    "EndpointDisabledError",
    "EndpointError",
    "EndpointNotFoundError",
    "Gap",
    "IPNotAllowedError",
    "InsecureConfigurationError",
    "InvalidPasswordError",
    "IsolationLevel",
    "Listener",
    "NeonAsyncError",
    "Notification",
    "PasswordSource",
    "Pool",
    "PoolBusyError",
    "PoolClosedError",
    "PoolHealth",
    "PoolKeywords",
    "PoolState",
    "PoolStats",
    "PoolTimeoutError",
    "PooledHostError",
    "ProtocolError",
    "QueryTimeoutError",
    "QuotaExceededError",
    "Record",
    "RevocationMode",
    "RevocationReport",
    "RevocationStatus",
    "RevocationUnknownError",
    "SSLNegotiation",
    "StaleStatementError",
    "TLSError",
    "TLSReport",
    "TooManyConnectionsError",
    "Transaction",
    "TransactionAbortedError",
    "UnsupportedEventLoopError",
    "WrongMethodError",
    "connect",
    "connection_tls_report",
    "create_pool",
    "create_ssl_context",
    "harden_dsn",
    "is_retryable",
    "is_unavailable",
    "listen",
    "patch_asyncpg",
)


# The public names of those modules, and of others that most services do not need at their start, by the module, which
# is imported when a name of it is used first (PEP 562). The modules stand here without the underscore of their names.
_LATER = {
    "config.dsn": ("harden_dsn",),
    "driver.listen": ("Gap", "Listener", "Notification", "listen"),
    "patch": ("AsyncpgPatch", "patch_asyncpg"),
    "pool.health": ("PoolHealth",),
    "pool.stats": ("PoolStats",),
    "wire.report": ("ChainCertificate", "RevocationReport", "TLSReport"),
    "wire.tls": ("create_ssl_context",),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}


def _publish(name: str) -> None:
    """Let a public class or function name this package as its module, in tracebacks, reprs and pickles."""
    # typing.get_type_hints() evaluates strings in the namespace of `__module__`, where they may mean nothing. So the
    # modules of public classes with annotations do without `from __future__ import annotations`.
    public = globals()[name]
    if getattr(public, "__module__", "").startswith(f"{__name__}."):
        public.__module__ = __name__


if not _typing.TYPE_CHECKING:  # with it, type checkers would accept every name

    def __getattr__(name: str) -> object:
        """Import the module of a public name, and publish all that is public in it."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _importlib.import_module(f"._{_MODULE_OF[name]}", __name__)
        for each in _LATER[_MODULE_OF[name]]:
            globals()[each] = getattr(module, each)
            _publish(each)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


for _name in __all__:
    if _name not in _MODULE_OF:
        _publish(_name)
