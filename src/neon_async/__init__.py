"""Verified connections from async Python to Neon."""

from __future__ import annotations

from ._connect import Connection, connect, connection_tls_report
from ._dsn import harden_dsn
from ._errors import (
    AuthenticationError,
    CertificateError,
    ChannelBindingError,
    ComputeUnavailableError,
    ConfigurationError,
    ConnectError,
    ConnectTimeoutError,
    DatabaseNotFoundError,
    EndpointDisabledError,
    EndpointError,
    EndpointNotFoundError,
    InsecureConfigurationError,
    InvalidPasswordError,
    IPNotAllowedError,
    NeonAsyncError,
    ProtocolError,
    QuotaExceededError,
    TLSError,
    TooManyConnectionsError,
    UnsupportedEventLoopError,
)
from ._pool import Pool, create_pool
from ._tls import TLSReport, create_ssl_context
from ._trust import ISRG_ROOT_X1_SHA256

__version__ = "0.1.0"

__all__ = (
    "ISRG_ROOT_X1_SHA256",
    "AuthenticationError",
    "CertificateError",
    "ChannelBindingError",
    "ComputeUnavailableError",
    "ConfigurationError",
    "ConnectError",
    "ConnectTimeoutError",
    "Connection",
    "DatabaseNotFoundError",
    "EndpointDisabledError",
    "EndpointError",
    "EndpointNotFoundError",
    "IPNotAllowedError",
    "InsecureConfigurationError",
    "InvalidPasswordError",
    "NeonAsyncError",
    "Pool",
    "ProtocolError",
    "QuotaExceededError",
    "TLSError",
    "TLSReport",
    "TooManyConnectionsError",
    "UnsupportedEventLoopError",
    "connect",
    "connection_tls_report",
    "create_pool",
    "create_ssl_context",
    "harden_dsn",
)
