"""One connection, within its deadline, and every failure under its public name.

`prepare()` judges the parameters and finds the trust anchor; `Connector.connect()` dials. This module knows no slots.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Unpack, cast

import asyncpg

from .._config.connection import ConnectionParameters, ConnectKeywords, parse
from .._errors import (
    ConfigurationError,
    ConnectError,
    ConnectTimeoutError,
    NeonAsyncError,
    ProtocolError,
    TLSError,
    UnsupportedEventLoopError,
    forget_arguments,
)
from .._neon import sql
from .._neon.endpoint import classify, parse_host, short_name
from .._wire.dial import Door, client_certificate
from .._wire.login import Logins, Secret
from .._wire.tls import NOT_TLS_REASONS, TLSReport, build_context, explain, openssl_reason
from .._wire.trust import AnchorSource, TrustAnchor, find_isrg_root_x1, load_trust_anchor
from .connection import Connection, combine
from .holder import adopt_running_loop, session_of
from .pooled import PooledConnection, tracked_settings
from .session import Healing, Session


class Connector:
    """Makes connections to one server. Everything that can be refused without a socket has been judged before."""

    def __init__(self, parameters: ConnectionParameters, anchor: TrustAnchor) -> None:
        self.parameters = parameters
        self.anchor = anchor
        self.tls_report: TLSReport | None = None
        self._logins = Logins()
        self.healing = Healing()
        # For asyncpg to hold. It trusts nobody: were it ever used, nothing would pass.
        self._placeholder = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def __repr__(self) -> str:
        return f"<Connector {short_name(self.parameters.host)}>"

    async def connect(
        self,
        *,
        connection_class: type[Any] = asyncpg.Connection,
        record_class: type[Any] = asyncpg.Record,
        on_step: Callable[[str], None] | None = None,
    ) -> asyncpg.Connection[Any]:
        """Return a new connection, verified and authenticated.

        `on_step` is called with the name of each step as it begins: dns, tcp, tls, authentication. Raises a
        `NeonAsyncError`; what the server says that is not about connecting arrives as asyncpg's own exception, and
        what a password function raises as it is.
        """
        require_asyncio()
        steps = ["password"]

        def begin(step: str) -> None:
            steps.append(step)
            if on_step:
                on_step(step)

        deadline = asyncio.timeout(self.parameters.connect_timeout)
        try:
            async with deadline:
                password = await self.parameters.password.resolve()
                steps.append("start")
                return await self._dial(password.reveal, begin, connection_class, record_class)
        except Exception as error:  # noqa: BLE001  every one is named below, or passed on
            raw = error
        failure = self._name(raw, steps[-1], expired=deadline.expired())
        try:
            if failure is raw:
                raise failure
            raise failure from raw
        finally:
            del raw, failure  # an error whose traceback leads here and back to itself would wait for the collector

    async def _dial(
        self, secret: Secret, begin: Callable[[str], None], connection_class: type[Any], record_class: type[Any]
    ) -> asyncpg.Connection[Any]:
        door = Door(self.parameters, self.anchor, secret=secret, logins=self._logins, on_step=begin)
        try:
            connection = await self._connect_through(door, connection_class, record_class)
        except BaseException:
            door.abort()
            raise
        finally:
            self.tls_report = door.report or self.tls_report
        self._begin_session(connection, door)
        return connection

    def _begin_session(self, connection: Any, door: Door) -> None:
        host = self.parameters.host
        assert door.report is not None
        assert door.wire is not None
        session = Session(
            host=host,
            endpoint=parse_host(host),
            healing=self.healing,
            report=door.report,
            transport=door.wire,
            cancel=door.cancel,
        )
        door.wire.session = session
        if issubclass(type(connection), PooledConnection):  # isinstance() is true for every connection of asyncpg
            session.initial_settings = tracked_settings(connection)
        adopt_running_loop(connection)

    async def _connect_through(
        self, door: Door, connection_class: type[Any], record_class: type[Any]
    ) -> asyncpg.Connection[Any]:
        parameters = self.parameters
        return await asyncpg.connect(
            loop=cast(asyncio.AbstractEventLoop, door),
            host=parameters.host,
            port=parameters.port,
            user=parameters.user,
            password="",  # the door has answered before asyncpg is asked
            database=parameters.database,
            server_settings=dict(parameters.startup_settings),
            # With both of these asyncpg asks its loop, the door, for one finished TLS transport.
            ssl=self._placeholder,
            direct_tls=True,
            # Spelled out, so that asyncpg does not look into the environment.
            target_session_attrs=cast(Any, "any"),
            krbsrvname="postgres",
            gsslib="gssapi",
            timeout=cast(Any, None),  # the deadline is ours
            command_timeout=parameters.command_timeout,
            statement_cache_size=parameters.statement_cache_size,
            max_cached_statement_lifetime=parameters.max_cached_statement_lifetime,
            max_cacheable_statement_size=parameters.max_cacheable_statement_size,
            connection_class=self._class_for(connection_class),
            record_class=record_class,
        )

    def _class_for(self, base: type[Any]) -> type[Any]:
        endpoint = parse_host(self.parameters.host)
        return combine(base, PooledConnection if endpoint is not None and endpoint.pooled else Connection)

    def _name(self, error: Exception, step: str, *, expired: bool) -> Exception:
        """Return the public error for what went wrong at `step`; the one place where names are given."""
        host = self.parameters.host
        if expired:
            limit = f"connect_timeout={self.parameters.connect_timeout:g} s"
            return ConnectTimeoutError(f"{host} was not ready within {limit}; {_WAITED_FOR[step]}.")
        if step == "password" or isinstance(error, NeonAsyncError):
            return error
        if isinstance(error, ssl.SSLCertVerificationError):
            return explain(error, server_name=host, anchor=self.anchor)
        if isinstance(error, ssl.SSLError):
            reason = openssl_reason(error) or "it broke off"
            what, advice = _TLS_REASONS.get(reason, (reason, "Check the server."))
            return TLSError(f"The TLS handshake with {host} failed: {what}. {advice}")
        if isinstance(error, socket.gaierror):
            name = self.parameters.hostaddr or f"The name {host}"
            return ConnectError(f"{name} cannot be resolved ({error.strerror}). Check host, and the DNS here.")
        if isinstance(error, asyncpg.PostgresError) and "sqlstate" in vars(error):  # the server's, not the client's own
            return self._name_of_server_error(error)
        if isinstance(error, (OSError, asyncpg.PostgresConnectionError)):
            return ConnectError(f"{host} broke off the connection during {_DURING[step]}. Try again; check the server.")
        if step == "authentication" and isinstance(error, (LookupError, ValueError)):
            return ProtocolError(f"{host} sent settings that asyncpg cannot read ({error}). Check options and server.")
        return error

    def _name_of_server_error(self, error: asyncpg.PostgresError) -> Exception:
        message = str(error.args[0])
        known = classify(error.sqlstate, message)
        if known is None:
            return error
        kind, advice = known
        failure = kind(f"{self.parameters.host}: {message.rstrip('.')}. {advice}")
        failure.__dict__.update(error.__dict__)  # sqlstate, detail, hint and the rest, as asyncpg's error has them
        return failure


_WAITED_FOR = {
    "password": "the password function had not returned",
    "start": "nothing had been tried yet",
    "dns": "its name had not been resolved. Check this machine's DNS",
    "tcp": "nothing had answered at its address. Check host, port and firewall",
    "tls": "the TLS handshake had not ended. Check that this is a PostgreSQL server's port",
    "authentication": "authentication had not ended. A suspended compute may need longer: try again",
}
_DURING = {
    "start": "connecting",
    "dns": "name resolution",
    "tcp": "connecting",
    "tls": "the TLS handshake",
    "authentication": "authentication",
}
_OLD_TLS = ("it does not speak TLS 1.3", "Neon does: check host and port, and what stands in between.")
_NOT_TLS = ("it answered with something that is not TLS", "Check that this is a PostgreSQL server's port.")
_NO_ALPN = ("it does not accept the protocol name postgresql", "Check that this is a PostgreSQL server's port.")
_TLS_REASONS = {  # OpenSSL's names for what went wrong
    "TLSV1_ALERT_PROTOCOL_VERSION": _OLD_TLS,
    "UNSUPPORTED_PROTOCOL": _OLD_TLS,
    "WRONG_SSL_VERSION": _OLD_TLS,
    **dict.fromkeys(NOT_TLS_REASONS, _NOT_TLS),
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": _NO_ALPN,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": ("it demands a client certificate", "Give sslcert and sslkey."),
}


def require_asyncio() -> None:
    """Raise `UnsupportedEventLoopError` unless an asyncio event loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return
    raise UnsupportedEventLoopError(
        "neon-async runs on asyncio and uvloop, and no asyncio event loop is running here. asyncpg cannot run under "
        "trio; run this service with asyncio, for instance anyio.run(main, backend='asyncio')."
    )


def check_classes(connection_class: object, record_class: object) -> None:
    """Raise `ConfigurationError` for what asyncpg could not make connections or records of."""
    for name, cls, base in (
        ("connection_class", connection_class, asyncpg.Connection),
        ("record_class", record_class, asyncpg.Record),
    ):
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise ConfigurationError(f"{name} must be a subclass of asyncpg.{base.__name__}.")


@forget_arguments
def prepare(dsn: str | None, *, trust_anchor: AnchorSource | None = None, **keywords: object) -> Connector:
    """Judge the parameters, find the trust anchor, read the files they name, and return what makes the connections.

    Opens no socket. Raises `ConfigurationError`.
    """
    if trust_anchor is not None and keywords.get("sslrootcert") is not None:
        raise ConfigurationError("trust_anchor and sslrootcert are both given, and name different roots. Write one.")
    parameters = parse(dsn, keywords, os.environ)
    anchor = load_trust_anchor(trust_anchor) if trust_anchor is not None else find_isrg_root_x1(parameters.sslrootcert)
    # scramp takes 50 ms to import: here, rather than with neon_async or, worse, in the event loop of the first dial.
    from .._wire import scram  # noqa: F401

    build_context(anchor, crl=parameters.sslcrl, client_certificate=client_certificate(parameters))
    endpoint = parse_host(parameters.host)
    if endpoint is not None and endpoint.pooled:
        sql.prepare()
    return Connector(parameters, anchor)


@forget_arguments
def connect(
    dsn: str | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    connection_class: type[Any] = asyncpg.Connection,
    record_class: type[Any] = asyncpg.Record,
    **keywords: Unpack[ConnectKeywords],
) -> Coroutine[Any, Any, asyncpg.Connection[Any]]:
    """Return one connection, verified in full and authenticated; close it with `await connection.close()`.

    Takes what `create_pool()` takes, but for the pool's own parameters. Raises `ConfigurationError` in the call itself,
    and the other `NeonAsyncError`s when awaited.
    """
    check_classes(connection_class, record_class)
    connector = prepare(dsn, trust_anchor=trust_anchor, **keywords)
    return connector.connect(connection_class=connection_class, record_class=record_class)


def connection_tls_report(connection: Connection) -> TLSReport:
    """Return what the TLS handshake of `connection`, one of neon-async's, came to.

    `connection`: from `connect()` or from a pool. Raises `ConfigurationError` for a connection made by anybody else,
    and for one that has been released to its pool.
    """
    session = session_of(connection)
    if session is None:
        raise ConfigurationError("This is not an open connection of neon-async. Pass one while it is acquired.")
    return session.report
