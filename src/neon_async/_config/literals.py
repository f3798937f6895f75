"""The closed sets of strings that callers give and get, each written once: a type, and the words of its reader."""

from __future__ import annotations

from typing import Literal, TypeAlias

IsolationLevel: TypeAlias = Literal["read_uncommitted", "read_committed", "repeatable_read", "serializable"]
"""How a transaction is isolated from others, as asyncpg names it (PostgreSQL documentation, section 13.2)."""

RevocationMode: TypeAlias = Literal["off", "advise", "require"]
"""What is done about the revocation of a certificate: the values of `revocation=`."""

RevocationStatus: TypeAlias = Literal["off", "good", "revoked", "unknown", "pending", "short-lived"]
"""What is known about the revocation of a certificate: `RevocationReport.status`."""

SSLNegotiation: TypeAlias = Literal["direct", "postgres"]
"""How TLS begins: the values of libpq's `sslnegotiation`, and `TLSReport.negotiation`."""

ChannelBinding: TypeAlias = Literal["prefer", "require"]
"""Whether the login is bound to the TLS channel: the values of `channel_binding=` that are not refused."""

SASLMechanism: TypeAlias = Literal["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"]
"""How a login was authenticated: `TLSReport.mechanism`. The second is bound to the TLS channel."""

TLSVersion: TypeAlias = Literal["TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"]
"""The values of libpq's `ssl_min_protocol_version`."""

ProtocolVersion: TypeAlias = Literal["3.0", "3.2", "latest"]
"""The values of libpq's `max_protocol_version`."""

PoolState: TypeAlias = Literal["ready", "asleep", "unavailable"]
"""What a pool knows about its database: `PoolHealth.state`, which says what each word means."""

ConnectStep: TypeAlias = Literal["dns", "tcp", "tls", "revocation", "authentication"]
"""A step of a connect, in their order: `Connected.steps`."""
