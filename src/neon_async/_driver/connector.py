"""Make one connection within its deadline.

`prepare()` checks the parameters and finds the trust anchor; `Connector.connect()` dials. This module must not know
pools or slots.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import ssl
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from .._config.connection import ConnectionParameters, parse
from .._errors import CertificateRevokedError, ConfigurationError, forget_arguments
from .._neon import sql
from .._neon.endpoint import short_name
from .._text import log
from .._wire.dial import Dialer, context_for, ignore_step
from .._wire.login import LoginCache, Secret
from .._wire.race import StepCallback
from .._wire.trust import TrustAnchor, find_isrg_root_x1, load_trust_anchor
from .arguments import require_asyncio
from .connection import Connection, combine
from .holder import CallersError, begin_session, end_lost, leave_jit_alone
from .loop import LoopAdapter
from .pooled import PooledConnection, is_pooled, tracked_settings
from .protocol import SessionProtocol
from .session import Healing, Session

if TYPE_CHECKING:
    from .._config.literals import ConnectStep
    from .._wire.report import TLSReport
    from .._wire.revocation.check import ChainCheck, Checker
    from .._wire.tls import Handshake


@forget_arguments
def prepare(dsn: str | None, **parameters: Any) -> Connector:
    """Check the parameters, find the trust anchor, and read the files that the parameters name. Opens no socket.

    Args:
        dsn: The connection string.
        **parameters: The keywords of `judge()`.

    Raises:
        ConfigurationError: A parameter is refused, or a file cannot be used.
    """
    return load(judge(dsn, **parameters))


def judge(dsn: str | None, **parameters: object) -> ConnectionParameters:
    """Check the parameters: keywords by all names that code may use. Reads no file.

    Raises:
        ConfigurationError: A parameter is refused.
    """
    return parse(dsn, parameters, os.environ)


def load(parameters: ConnectionParameters) -> Connector:
    """Find the trust anchor, and read the files that the parameters name.

    Raises:
        ConfigurationError: A file cannot be used.
    """
    if parameters.trust_anchor is not None:
        anchor = load_trust_anchor(parameters.trust_anchor, parameters.sslrootcert)
    else:
        anchor = find_isrg_root_x1(parameters.sslrootcert)
    # scramp takes 50 ms to import: here, rather than with neon_async or, worse, on the event loop in the first dial.
    from .._wire import scram  # noqa: F401

    # What only a failed dial needs, for the same reason.
    from . import failures  # noqa: F401

    context_for(parameters, anchor)
    if parameters.pooled:
        sql.prepare()
    return Connector(parameters, anchor, _make_checker(parameters))


def _make_checker(parameters: ConnectionParameters) -> Checker | None:
    """Return what checks revocation, or None where that was not asked for."""
    if parameters.revocation == "off":
        return None
    try:
        from .._wire.revocation.check import Checker  # needs an extra, and takes long to import
    except ModuleNotFoundError as error:
        missing = error.name
    else:
        return Checker(parameters.revocation, parameters.host)
    raise ConfigurationError(
        f"revocation={parameters.revocation} needs {missing}, which is not installed. Run: "
        "python -m pip install 'neon-async[revocation]'"
    )


class Connector:
    """Makes connections to one server. Whatever can be refused without a socket has been refused before.

    Attributes:
        parameters: The server, and how to connect.
        anchor: The trust anchor.
        healing: What the connections share about stale prepared statements.
        revocation: The check of the latest chain's revocation, or None where it was not asked for.
    """

    def __init__(self, parameters: ConnectionParameters, anchor: TrustAnchor, checker: Checker | None = None) -> None:
        self.parameters = parameters
        self.anchor = anchor
        self.revocation: ChainCheck | None = None
        self._handshake: Handshake | None = None
        self._checker = checker
        self.healing: Healing = Healing(is_shared=parameters.pooled)
        self._logins = LoginCache()
        # asyncpg requires a context. This one trusts no certificate, so that nothing would pass if it were ever used.
        self._placeholder = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def __repr__(self) -> str:
        return f"<Connector {short_name(self.parameters.host, self.parameters.endpoint)}>"

    @property
    def tls_report(self) -> TLSReport | None:
        """The result of the latest TLS handshake, or None before the first; and the revocation as it is known now."""
        return None if self._handshake is None else self._handshake.report(self.revocation)

    async def connect(
        self,
        *,
        connection_class: type[Any] = asyncpg.Connection,
        record_class: type[Any] = asyncpg.Record,
        on_step: StepCallback = ignore_step,
    ) -> Connection:
        """Return a new connection, verified and authenticated.

        Args:
            connection_class: A subclass of `asyncpg.Connection`.
            record_class: A subclass of `asyncpg.Record`.
            on_step: Called with the name of each step as it begins: `dns`, `tcp`, `tls`, `revocation` where it waits
                for a list, `authentication`.

        Raises:
            NeonAsyncError: The connection could not be made.
            Exception: Whatever a password function or `__init__()` of the class raises, unchanged.
        """
        try:
            return await self.open(connection_class=connection_class, record_class=record_class, on_step=on_step)
        except CallersError as error:
            failure = error.error
        try:
            raise failure
        finally:
            del failure  # the traceback leads to this frame

    async def open(self, *, connection_class: type[Any], record_class: type[Any], on_step: StepCallback) -> Connection:
        """Return a new connection, as `connect()` does. An error of the caller's own code comes as `CallersError`.

        Raises:
            NeonAsyncError: The connection could not be made.
            CallersError: The password function or `__init__()` of the class failed.
        """
        require_asyncio()
        steps: list[str] = ["password"]

        def begin(step: ConnectStep) -> None:
            steps.append(step)
            on_step(step)

        deadline = asyncio.timeout(self.parameters.connect_timeout)
        password = self.parameters.password
        try:
            async with deadline:
                password = await password.resolve()
                steps.append("start")
                return await self._dial(password.reveal, begin, connection_class, record_class)
        except Exception as error:  # noqa: BLE001  translated below
            raw = error
        from .failures import Attempt, public_error  # imported by `prepare()`

        if isinstance(raw, CallersError):
            raise raw
        attempt = Attempt(self.parameters, self.anchor, steps[-1], deadline.expired(), padded=password.is_padded)
        failure = public_error(raw, attempt)
        if failure is not raw:
            failure.__cause__ = raw
        try:
            raise CallersError(failure) if attempt.step in _OF_PASSWORD else failure
        finally:
            del raw, failure  # the traceback leads to this frame: a cycle that only the garbage collector would free

    async def _dial(
        self, secret: Secret, on_step: StepCallback, connection_class: type[Any], record_class: type[Any]
    ) -> Connection:
        dialer = Dialer(self.parameters, self.anchor, self._checker, on_step=on_step)
        adapter = LoopAdapter(dialer, secret=secret, cache=self._logins)
        try:
            connection = await self._connect_asyncpg(adapter, self.class_for(connection_class), record_class)
        except BaseException:
            adapter.abort()
            raise
        finally:
            if adapter.handshake is not None:
                self._handshake, self.revocation = adapter.handshake, adapter.revocation
        try:
            if adapter.revocation is not None:
                adapter.revocation.require_good()  # a list can have come during the login
            self._begin_session(connection, adapter)
        except BaseException:
            connection.terminate()
            raise
        return connection

    def _begin_session(self, connection: Connection, adapter: LoopAdapter) -> None:
        session = Session(
            host=self.parameters.host,
            endpoint=self.parameters.endpoint,
            healing=self.healing,
            handshake=adapter.hand_over(),
            handshake_time=adapter.handshake_time,
            revocation=adapter.revocation,
            cancel=adapter.cancel,
        )
        if is_pooled(connection):
            session.initial_settings = tracked_settings(connection)
            leave_jit_alone(connection)  # behind a pooler the session can be another client's before it is on again
        begin_session(connection, session, functools.partial(SessionProtocol, host=session.host))
        if session.revocation is not None:
            session.watch = session.revocation.watch(connection, functools.partial(_end_revoked, session.name))

    def class_for(self, base: type[Any]) -> type[Any]:
        """Return the class of the connections for a caller's `connection_class`.

        Raises:
            ConfigurationError: It cannot have a subclass.
        """
        return combine(cast(Any, base), PooledConnection if self.parameters.pooled else Connection)

    async def _connect_asyncpg(
        self, adapter: LoopAdapter, connection_class: type[Any], record_class: type[Any]
    ) -> Connection:
        parameters = self.parameters
        connection = await asyncpg.connect(
            loop=cast(asyncio.AbstractEventLoop, adapter),
            host=parameters.host,
            port=parameters.port,
            user=parameters.user,
            password="",  # the adapter has logged in before asyncpg is asked for it
            database=parameters.database,
            server_settings=dict(parameters.startup_settings),
            # With both of these, asyncpg asks its loop, the adapter, for one finished TLS transport.
            ssl=self._placeholder,
            direct_tls=True,
            # Explicit, so that asyncpg does not read environment variables.
            target_session_attrs=cast(Any, "any"),
            krbsrvname="postgres",
            gsslib="gssapi",
            timeout=cast(Any, None),  # `connect()` enforces the deadline
            command_timeout=parameters.command_timeout,
            statement_cache_size=parameters.statement_cache_size,
            max_cached_statement_lifetime=cast(Any, parameters.max_cached_statement_lifetime),  # a fraction, too
            max_cacheable_statement_size=parameters.max_cacheable_statement_size,
            connection_class=connection_class,
            record_class=record_class,
        )
        return cast(Connection, connection)


# The steps before any that concerns the server; see `Attempt`.
_OF_PASSWORD = ("password", "start")


def _end_revoked(name: str, connection: Connection, error: CertificateRevokedError) -> None:
    """Terminate a connection to a server whose certificate turned out to have been revoked."""
    log(
        logging.WARNING,
        "%(endpoint)s: a connection is terminated. %(reason)s",
        endpoint=name,
        event="revoked",
        reason=str(error),
    )
    end_lost(connection, "the server's certificate has been revoked, so it was terminated")
