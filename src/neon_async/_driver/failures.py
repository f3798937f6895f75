"""Translate what asyncpg, OpenSSL, the system and the server raise while connecting into the errors of neon-async."""

from __future__ import annotations

import socket
import ssl
from typing import Final

import asyncpg

from .._config.connection import ConnectionParameters
from .._errors import ConnectError, ConnectTimeoutError, InvalidPasswordError, NeonAsyncError, ProtocolError, TLSError
from .._neon.server_texts import classify
from .._text import escape
from .._wire.tls import NOT_TLS_REASONS, certificate_error, openssl_reason
from .._wire.trust import TrustAnchor


class Attempt:
    """One attempt to connect, at the moment when it failed.

    Attributes:
        parameters: The server, and how to connect.
        anchor: The trust anchor.
        step: The step that was running: `password`, `start`, `dns`, `tcp`, `tls`, `revocation` or
            `authentication`.
        expired: Whether `connect_timeout` had expired.
        padded: Whether white space is at the beginning or end of the password.
    """

    __slots__ = ("anchor", "expired", "padded", "parameters", "step")

    def __init__(
        self, parameters: ConnectionParameters, anchor: TrustAnchor, step: str, expired: bool, *, padded: bool = False
    ) -> None:
        self.parameters: Final = parameters
        self.anchor: Final = anchor
        self.step: Final = step
        self.expired: Final = expired
        self.padded: Final = padded


def public_error(error: Exception, attempt: Attempt) -> Exception:
    """Return the exception that the caller of `connect()` gets for `error`.

    Whatever was raised, it is an error of ours, except what a password function raised, which stays unchanged.
    """
    if attempt.expired:
        return _timeout_error(attempt)
    host, (activity, _) = attempt.parameters.host, _STEPS[attempt.step]
    if attempt.step == "password" or isinstance(error, NeonAsyncError):
        return error
    return _failure(error, attempt, host, activity)


def _failure(error: Exception, attempt: Attempt, host: str, activity: str) -> NeonAsyncError:
    match error:
        case ssl.SSLCertVerificationError():
            return certificate_error(error, server_name=host, anchor=attempt.anchor)
        case ssl.SSLError():
            return _tls_error(error, host)
        case socket.gaierror():
            name = attempt.parameters.hostaddr or f"The name {host}"
            return ConnectError(f"{name} cannot be resolved ({error.strerror}). Check host, and this machine's DNS.")
        case asyncpg.PostgresError() if _is_from_server(error):
            return _server_error(error, host, attempt)
        case ConnectionError() | asyncpg.PostgresConnectionError():
            return ConnectError(f"{host} closed the connection during {activity}. Try again; check the server.")
        case OSError():
            reason = error.strerror or type(error).__name__
            return ConnectError(f"Connecting to {host} failed during {activity} ({reason}). Try again.")
        case ValueError() if attempt.step == "tls":  # OpenSSL has ended a session that had been established
            what, advice = _NOT_TLS
            return TLSError(f"The TLS handshake with {host} failed: {what}. {advice}")
        case LookupError() | ValueError() | AttributeError() if attempt.step == "authentication":
            error.args = tuple(escape(arg) if isinstance(arg, str) else arg for arg in error.args)  # it stays the cause
            return ProtocolError(f"{host} sent settings that asyncpg cannot read ({error}). Check options and server.")
    # Nothing is known of it, so it may pass. Its text may contain anything, and stays in the cause.
    return ConnectError(f"Connecting to {host} failed during {activity} ({type(error).__name__}). Try again.")


# The steps of a dial: what each is doing, and what has not happened when the deadline expires meanwhile.
_STEPS = {
    "password": ("the password function", "the password function had not returned"),
    "start": ("the start", "no attempt had begun"),
    "dns": ("name resolution", "its name had not been resolved. Check this machine's DNS"),
    "tcp": ("the TCP connect", "no address had accepted a connection. Check host, port and firewall"),
    "tls": (
        "the TLS handshake",
        "the TLS handshake had not finished. Check that this is the port of a PostgreSQL server",
    ),
    "revocation": (
        "the revocation check",
        "the revocation list of its certificate had not arrived. Check that this machine can fetch it over HTTP",
    ),
    "authentication": (
        "authentication",
        "authentication had not finished. A suspended compute may need longer: try again",
    ),
}

_NO_DIRECT_TLS = "the server had not answered direct TLS. Remove sslnegotiation; check that this is a PostgreSQL server"


def _timeout_error(attempt: Attempt) -> ConnectTimeoutError:
    parameters, pending = attempt.parameters, _STEPS[attempt.step][1]
    if attempt.step == "tls" and parameters.sslnegotiation == "direct":
        pending = _NO_DIRECT_TLS
    limit = f"connect_timeout={parameters.connect_timeout:g} s"
    return ConnectTimeoutError(f"{parameters.host} was not ready within {limit}: {pending}.")


def _tls_error(error: ssl.SSLError, host: str) -> TLSError:
    reason = openssl_reason(error) or "the connection was closed"
    what, advice = _TLS_REASONS.get(reason, (reason, "Check the server."))
    return TLSError(f"The TLS handshake with {host} failed: {what}. {advice}")


_OLD_TLS = ("the server does not support TLS 1.3", "Neon does: check host, port and any proxy in between.")
_NOT_TLS = (
    "the server answered with something other than TLS",
    "Check that this is the port of a PostgreSQL server.",
)
_NO_ALPN = (
    "the server does not accept the protocol name postgresql",
    "Check that this is the port of a PostgreSQL server.",
)
_NOTHING_IN_COMMON = (
    "client and server have no cipher suite, group or signature algorithm in common",
    "Check the server, and OPENSSL_CONF, the OpenSSL configuration of this system.",
)
_CLIENT_CERTIFICATE = "Check sslcert and sslkey, and which CA the server trusts for clients."
# OpenSSL's reasons for a failed handshake: the reason, and what to do about it.
_TLS_REASONS = {
    "TLSV1_ALERT_PROTOCOL_VERSION": _OLD_TLS,
    "UNSUPPORTED_PROTOCOL": _OLD_TLS,
    "WRONG_SSL_VERSION": _OLD_TLS,
    **dict.fromkeys(NOT_TLS_REASONS, _NOT_TLS),
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": _NO_ALPN,
    **dict.fromkeys(
        (
            "SSLV3_ALERT_HANDSHAKE_FAILURE",
            "TLSV1_ALERT_INSUFFICIENT_SECURITY",
            "NO_SUITABLE_KEY_SHARE",
            "NO_SUITABLE_GROUPS",
            "NO_SUITABLE_SIGNATURE_ALGORITHM",
            "WRONG_SIGNATURE_TYPE",
            "WRONG_CURVE",
        ),
        _NOTHING_IN_COMMON,
    ),
    "TLSV1_UNRECOGNIZED_NAME": ("the server does not know this host name", "Check host."),
    **dict.fromkeys(
        (
            "SSLV3_ALERT_BAD_CERTIFICATE",
            "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
            "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
            "TLSV1_ALERT_UNKNOWN_CA",
            "TLSV1_ALERT_ACCESS_DENIED",
        ),
        ("the server does not accept the client certificate", _CLIENT_CERTIFICATE),
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": ("the server says that the client certificate has expired", "Renew sslcert."),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("the server says that the client certificate was revoked", "Renew sslcert."),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": ("the server requires a client certificate", "Set sslcert and sslkey."),
}


def _is_from_server(error: asyncpg.PostgresError) -> bool:
    # asyncpg raises errors about connections itself, too. They have no fields.
    return "sqlstate" in vars(error) or not isinstance(error, asyncpg.PostgresConnectionError)


def _server_error(error: asyncpg.PostgresError, host: str, attempt: Attempt) -> NeonAsyncError:
    message = str(error.args[0]) or "an error without a message"
    verdict = classify(vars(error).get("sqlstate"), message)
    advice = verdict.advice
    if attempt.padded and verdict.error is InvalidPasswordError:
        advice = "The password begins or ends with white space: remove it, unless it is meant. " + advice
    failure = verdict.error(f"{host}: {message.rstrip('.')}. {advice}")
    vars(failure).update(vars(error))  # sqlstate, detail, hint and the other fields, as in asyncpg's error
    return failure
