"""SQLAlchemy over verified connections: the dialect `postgresql+neon` and `create_async_engine()`.

`postgresql+neon://` is SQLAlchemy's dialect for asyncpg with connections of neon-async. Whatever takes only a URL works
with the string of the Neon console when its scheme is `postgresql+neon`: the scheme asks for verify-full itself, so an
`sslmode` in the URL changes nothing. Install it with `pip install neon-async[sqlalchemy]`.

This module adapts connections to SQLAlchemy and its errors. It must not know how a connection is verified or lent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, TypeAlias, Unpack, cast

import asyncpg
from sqlalchemy import event, exc
from sqlalchemy.dialects.postgresql.asyncpg import (
    AsyncAdapt_asyncpg_connection,
    AsyncAdapt_asyncpg_dbapi,
    PGDialect_asyncpg,
)
from sqlalchemy.engine import URL, Engine
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine as _create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.pool import Pool as SQLAlchemyPool
from sqlalchemy.util import await_only

from ._config.arguments import AnchorSource, ConnectKeywords
from ._config.connection import keywords_of_url
from ._config.dsn import VERIFIED_SCHEME, decode, split
from ._config.keywords import BY_NAME, canonical_name
from ._config.readers import Given, Integer
from ._driver.connector import Connector, prepare
from ._driver.holder import Proxy, has_ended, pool_of, session_of
from ._errors import (
    CommitUnknownError,
    ConfigurationError,
    ConnectionLostError,
    InsecureConfigurationError,
    NeonAsyncError,
    PoolClosedError,
    PooledHostError,
    StaleStatementError,
    UnsupportedEventLoopError,
    WrongMethodError,
    ends_session,
    forget_arguments,
    is_unavailable,
)
from ._neon.endpoint import parse_host
from ._pool.pool import Pool

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, DBAPIModule
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ("EngineKeywords", "NeonDialect", "create_async_engine", "use_direct_host")

_Row: TypeAlias = Sequence[Any]

# Seconds. A connection that was idle for longer is pinged before it is used, as by our own pool.
_CHECK_AFTER_IDLE = 30.0
_PING_TIMEOUT = 2.0
# Seconds that a ROLLBACK or a polite close may take; then the connection is terminated, and the server rolls back.
_ROLLBACK_TIMEOUT = 5.0
_CLOSE_TIMEOUT = 2.0

_EXAMPLE_OF_ALEMBIC = "driver://user:pass@localhost/dbname"  # what `alembic init` writes to alembic.ini


# ---------------------------------------------------------------------------------------------------------------------
# Engines


class EngineKeywords(ConnectKeywords, total=False):
    """The keywords of `create_async_engine()`: those of SQLAlchemy's function, and those of every connection."""

    connect_args: Mapping[str, object]
    echo: bool | Literal["debug"] | None
    echo_pool: bool | Literal["debug"] | None
    enable_from_linting: bool
    execution_options: Mapping[str, object]
    hide_parameters: bool
    insertmanyvalues_page_size: int
    isolation_level: IsolationLevel
    json_deserializer: Callable[[str], object]
    json_serializer: Callable[..., str]
    label_length: int | None
    logging_name: str
    max_identifier_length: int | None
    max_overflow: int
    native_inet_types: bool
    paramstyle: Literal["qmark", "numeric", "named", "format", "pyformat", "numeric_dollar"]
    plugins: list[str]
    pool_logging_name: str
    pool_pre_ping: bool
    pool_recycle: int
    pool_reset_on_return: Literal["rollback", "commit"] | bool | None
    pool_size: int
    pool_timeout: float
    pool_use_lifo: bool
    poolclass: type[SQLAlchemyPool]
    query_cache_size: int
    use_insertmanyvalues: bool


@forget_arguments
def create_async_engine(
    dsn: str | URL | Pool | None = None,
    *,
    trust_anchor: AnchorSource | None = None,
    **options: Unpack[EngineKeywords],
) -> AsyncEngine:
    """Return an SQLAlchemy engine whose every connection is verified as by `create_pool()`.

    With a DSN the engine has a pool of SQLAlchemy's. It sends nothing while it is idle, and tests a connection before
    it is used again: one that has ended is replaced, and one that was idle for 30 s is pinged (within 2 s).

    With a pool of `neon_async.create_pool()` every session of the engine borrows one connection of that pool. Open the
    pool before the engine is used, and close it after `engine.dispose()`, which does not close it.

    Args:
        dsn: The connection string, as for `create_pool()`. With the scheme `postgresql+neon` any `sslmode` in it is
            replaced by verify-full. Or an SQLAlchemy `URL`, whose scheme counts as `postgresql+neon`; or an open pool
            of neon-async. Default: the keywords and the environment variables of libpq (`PG*`).
        trust_anchor: The root certificate to trust instead of ISRG Root X1: PEM bytes, PEM text, or the path of a PEM
            file. Not with a pool.
        **options: The options of `sqlalchemy.ext.asyncio.create_async_engine()`, and the connection keywords of
            `create_pool()`, each of which wins over the DSN. With a pool, only options that concern neither
            connections nor SQLAlchemy's pool.

    Raises:
        InsecureConfigurationError: A parameter asks for less than verify-full; before a socket is opened.
        ConfigurationError: A parameter is refused, or does not go together with a pool.
        TypeError: SQLAlchemy does not know an option.
    """
    given: dict[str, Any] = {"trust_anchor": trust_anchor} if trust_anchor is not None else {}
    given |= options
    if isinstance(dsn, Pool):
        return _engine_of_pool(dsn, given)
    if isinstance(dsn, asyncpg.Pool):
        raise ConfigurationError(
            "The pool is one of asyncpg, whose connections are not verified. Pass a pool of neon_async.create_pool()."
        )
    return _engine_of_dsn(dsn, given)


def _engine_of_dsn(dsn: str | URL | None, options: dict[str, Any]) -> AsyncEngine:
    for name in sorted(_CREATORS.intersection(options)):
        raise ConfigurationError(f"{name} replaces the verified connections of neon-async. Leave it out.")
    keywords = {name: options.pop(name) for name in _CONNECTION_KEYWORDS.intersection(options)}
    connect_args: dict[str, Any] = {**options.pop("connect_args", {}), **keywords}
    if isinstance(dsn, URL):
        url = dsn.set(drivername=VERIFIED_SCHEME)
        connector = prepare(None, **_verified_keywords(_keywords_of_url(url) | connect_args))
    else:
        connector = prepare(dsn, **_connection_keywords(connect_args))
        url = _url_of_dsn(dsn) if dsn is not None else _url_of_connector(connector)
    engine = _create_async_engine(url, connect_args=connect_args, **options)
    dbapi = cast(NeonDBAPI, engine.dialect.dbapi)
    dbapi.remember(_verified_keywords(_keywords_of_url(url) | connect_args), connector)
    return engine


def _engine_of_pool(pool: Pool, options: dict[str, Any]) -> AsyncEngine:
    for name in sorted(options):
        if name in _CONNECTION_KEYWORDS:
            raise ConfigurationError(
                f"{name} concerns the connections, which the pool has made. Pass it to neon_async.create_pool()."
            )
        if name in _NOT_WITH_A_POOL:
            raise ConfigurationError(
                f"{name} concerns SQLAlchemy's own pool or connections, and this engine borrows those of the pool. "
                "Leave it out; the options of the pool are those of neon_async.create_pool()."
            )
    url = _url_of_connector(pool._connector)
    return _create_async_engine(url, poolclass=NullPool, async_creator=pool.acquire, **options)


# Options that would replace our connections.
_CREATORS = frozenset({"async_creator", "creator", "module", "pool"})
# Options of SQLAlchemy's pool.
_NOT_WITH_A_POOL = _CREATORS | {
    "connect_args",
    "max_overflow",
    "pool_pre_ping",
    "pool_recycle",
    "pool_size",
    "pool_timeout",
    "pool_use_lifo",
    "poolclass",
}
_CONNECTION_KEYWORDS = frozenset({*BY_NAME, "trust_anchor"})


# ---------------------------------------------------------------------------------------------------------------------
# Alembic


class AlembicConfig(Protocol):
    """What `use_direct_host()` needs of `alembic.config.Config`."""

    def get_main_option(self, name: str, /) -> str | None:
        """Return an option of the main section."""

    def set_main_option(self, name: str, value: str, /) -> None:
        """Set an option of the main section."""


def use_direct_host(config: AlembicConfig, dsn: str | URL | None = None) -> None:
    """Have Alembic migrate over the direct host of the endpoint, by the dialect `postgresql+neon`.

    On a pooled host a migration may run in several sessions: session settings and advisory locks do not hold there. One
    line in the `env.py` of `alembic init -t async`, below `config = context.config`, is enough:

        neon_async.sqlalchemy.use_direct_host(config)

    Args:
        config: The configuration of Alembic. Its option `sqlalchemy.url` is set.
        dsn: The connection string of the direct or of the pooled host; any scheme that `create_pool()` accepts.
            Default: the option `sqlalchemy.url` of the ini file, or else the environment variable DATABASE_URL. The
            example that `alembic init` writes to the ini file counts as none.

    Raises:
        ConfigurationError: There is no connection string, or it is not valid.
    """
    given = dsn if dsn is not None else _url_of_ini(config) or os.environ.get("DATABASE_URL")
    if given is None:
        raise ConfigurationError(
            "There is no connection string. Write it to sqlalchemy.url in alembic.ini, set DATABASE_URL, or pass dsn."
        )
    url = given.set(drivername=VERIFIED_SCHEME) if isinstance(given, URL) else _url_of_dsn(given)
    endpoint = parse_host(url.host or "")
    if endpoint is not None:
        url = url.set(host=endpoint.direct_host)
    # '%' begins an interpolation in an ini file.
    config.set_main_option("sqlalchemy.url", url.render_as_string(hide_password=False).replace("%", "%%"))


def _url_of_ini(config: AlembicConfig) -> str | None:
    url = config.get_main_option("sqlalchemy.url")
    return None if url == _EXAMPLE_OF_ALEMBIC else url


# ---------------------------------------------------------------------------------------------------------------------
# The dialect


class NeonDialect(PGDialect_asyncpg):
    """SQLAlchemy's dialect for asyncpg with verified connections: `postgresql+neon://`.

    Errors of neon-async, and those that mean that the database is unavailable, arrive as
    `sqlalchemy.exc.OperationalError`; `PooledHostError` as `NotSupportedError`, and errors of usage as
    `InterfaceError`. The original is the `__cause__` of `error.orig`.

    Two things differ from the dialect for asyncpg, as SQLAlchemy's own tests show. A URL with several hosts is refused.
    A ping is one statement and no transaction, so it takes one round trip, and its time is limited.
    """

    driver = "neon"
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> DBAPIModule:
        """Return the module that SQLAlchemy connects with."""
        return cast("DBAPIModule", NeonDBAPI(asyncpg))

    @classmethod
    def load_provisioning(cls) -> None:
        """Load what SQLAlchemy's own tests need to know of PostgreSQL."""
        PGDialect_asyncpg.load_provisioning()

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Have the engine test idle connections before they are used again."""
        event.listen(engine, "checkout", _check_idle_connection)
        event.listen(engine, "checkin", _note_idle_connection)

    def create_connect_args(self, url: URL) -> tuple[list[str], dict[str, Any]]:
        """Return the keywords of `connect()` in a URL; see `create_async_engine()`.

        Raises:
            ConfigurationError: The URL contains an unknown parameter, or one that can be given in code only.
        """
        return [], _keywords_of_url(url)

    def on_connect(self) -> Callable[[Any], None]:
        """Return what sets up a new connection: the codecs of JSON."""
        set_up = super().on_connect()
        deserialize = self._json_deserializer or json.loads

        def connect(connection: object) -> None:
            if not isinstance(connection, NeonConnection):
                raise _translated(self.dbapi, _unverified())
            if not isinstance(connection, LentConnection):
                set_up(connection)
                return
            connection.json_deserializer = deserialize
            if self._native_inet_types is False:
                await_only(self._disable_asyncpg_inet_codecs(connection))

        return connect

    def is_disconnect(
        self,
        e: Exception,
        connection: PoolProxiedConnection | DBAPIConnection | None,
        cursor: DBAPICursor | None,
    ) -> bool:
        """Return whether `e` means that the connection has ended. A connect that failed is no disconnect."""
        if connection is None:
            return bool(super().is_disconnect(e, None, cursor))
        return cast(NeonConnection, connection).has_ended or _ends_connection(e.__cause__)


def _ends_connection(error: BaseException | None) -> bool:
    if isinstance(error, ConnectionLostError | CommitUnknownError | asyncpg.PostgresConnectionError):
        return True
    return isinstance(error, asyncpg.PostgresError) and ends_session(error)


def _check_idle_connection(connection: Any, *_: object) -> None:
    """Have SQLAlchemy's pool replace a connection that has ended while it was idle."""
    if connection.has_ended:
        raise exc.DisconnectionError("the connection has ended")
    if time.monotonic() - connection.idle_since < _CHECK_AFTER_IDLE:
        return
    try:
        connection.ping()
    except Exception as error:
        connection.end()
        raise exc.DisconnectionError("the connection did not answer") from error


def _note_idle_connection(connection: Any, _: ConnectionPoolEntry) -> None:
    if connection is not None:
        connection.idle_since = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# The connections, as SQLAlchemy uses them


class NeonDBAPI(AsyncAdapt_asyncpg_dbapi):
    """The module of one engine that SQLAlchemy connects with, and its classes of errors.

    Attributes:
        caches_cleared_at: When the statement caches of the pool that lends to the engine were cleared; `time.time()`.
    """

    def __init__(self, driver: object) -> None:
        super().__init__(driver)
        self.caches_cleared_at: float = time.time()
        self._known: tuple[dict[str, Any], Connector] | None = None

    def remember(self, keywords: dict[str, Any], connector: Connector) -> None:
        """Use `connector` for connections by `keywords`."""
        self._known = keywords, connector

    def connect(self, *args: object, **keywords: Any) -> NeonConnection:
        """Return a new connection. SQLAlchemy calls it with what `create_connect_args()` returned and `connect_args`.

        The connections by the same keywords share what was learned about the server.
        """
        try:
            opening = self._prepare_opening(args, keywords)
        except ConfigurationError as error:
            failure = _translated(self, error)
        else:
            del args, keywords
            return await_only(opening)
        del args, keywords  # tracebacks keep the locals of this frame
        raise failure

    @forget_arguments
    def _prepare_opening(
        self, args: tuple[object, ...], keywords: dict[str, Any]
    ) -> Coroutine[Any, Any, NeonConnection]:
        creator = keywords.pop("async_creator_fn", None)  # SQLAlchemy's name for `async_creator`
        adapter = {name: keywords.pop(name) for name in _ADAPTER_KEYWORDS if name in keywords}
        if creator is None:
            return self._open(self._connector_by(_verified_keywords(keywords)).connect, adapter)
        return self._open(lambda: creator(*args, **keywords), adapter)

    def _connector_by(self, keywords: dict[str, Any]) -> Connector:
        if self._known is None or self._known[0] != keywords:
            self._known = keywords, prepare(None, **keywords)
        return self._known[1]

    async def _open(self, connect: Callable[[], Awaitable[Any]], adapter: dict[str, Any]) -> NeonConnection:
        try:
            connection = await connect()
        except Exception as error:
            failure = _translated(self, error)
            if failure is error:
                raise
            raise failure from error
        if session_of(connection) is None:
            connection.terminate()
            raise _translated(self, _unverified())
        adapted = LentConnection if isinstance(connection, Proxy) else NeonConnection
        return adapted(self, connection, **adapter)


# SQLAlchemy's own keywords of a connection.
_ADAPTER_KEYWORDS = ("prepared_statement_cache_size", "prepared_statement_name_func")


class NeonConnection(AsyncAdapt_asyncpg_connection):
    """A connection of ours as SQLAlchemy's adapter uses it.

    Attributes:
        idle_since: When it was made or last returned to SQLAlchemy's pool; a time of the monotonic clock.
    """

    # SQLAlchemy describes them as it uses them.
    _connection: Any
    _transaction: Any

    def __init__(self, dbapi: NeonDBAPI, connection: Any, **adapter: Any) -> None:
        super().__init__(dbapi, connection, **adapter)
        self.idle_since: float = time.monotonic()

    @property
    def has_ended(self) -> bool:
        """Whether the connection is closed, or has been released to the pool that lent it."""
        return has_ended(self._connection)

    def end(self) -> None:
        """Terminate the connection at once."""
        # Released, or its event loop is closed.
        with contextlib.suppress(asyncpg.InterfaceError, RuntimeError):
            self._connection.terminate()
        self._forget_transaction()

    def close(self) -> None:
        """Close the connection politely, within 2 s."""
        self.rollback()
        await_only(self._close())

    async def _close(self) -> None:
        with contextlib.suppress(TimeoutError):  # asyncpg has terminated it
            await self._connection.close(timeout=_CLOSE_TIMEOUT)

    async def _async_ping(self) -> None:
        # One round trip; SQLAlchemy's ping takes four. Both work behind a transaction pooler.
        try:
            async with asyncio.timeout(_PING_TIMEOUT):
                await self._connection.execute("SELECT 1")
        except TimeoutError:
            self.end()
            raise ConnectionLostError(
                f"The connection did not answer within {_PING_TIMEOUT:g} s and was terminated.", nothing_executed=True
            ) from None

    async def _start_transaction(self) -> None:
        await super()._start_transaction()
        if self._transaction is not None:
            self._transaction = _Transaction(self._transaction, self.end)

    def _forget_transaction(self) -> None:
        self._transaction = None
        self._started = False  # SQLAlchemy 2.0

    def _handle_exception(self, error: Exception) -> NoReturn:
        if self.has_ended:
            self._forget_transaction()
        failure = _translated(self.dbapi, error)
        if failure is error:
            raise error
        raise failure from error


class _Transaction:
    """A transaction whose ROLLBACK ends in time.

    Args:
        transaction: asyncpg's transaction.
        end: Terminates its connection.
    """

    __slots__ = ("_end", "_transaction")

    def __init__(self, transaction: Any, end: Callable[[], None]) -> None:
        self._transaction = transaction
        self._end = end

    async def commit(self) -> None:
        await self._transaction.commit()

    async def rollback(self) -> None:
        try:
            async with asyncio.timeout(_ROLLBACK_TIMEOUT):
                await self._transaction.rollback()
        except TimeoutError:
            self._end()
            raise ConnectionLostError(
                f"ROLLBACK was not answered within {_ROLLBACK_TIMEOUT:g} s, so the connection was terminated. The "
                "server rolls the transaction back."
            ) from None


class LentConnection(NeonConnection):
    """A connection that a pool of ours has lent.

    Statements stay in the cache of the connection, so that a later loan does not prepare them again. JSON is decoded
    here, because a codec on the connection would have to be undone at the end of every loan.
    """

    json_deserializer: Callable[[str], Any] = staticmethod(json.loads)

    def close(self) -> None:
        """Release the connection to its pool."""
        await_only(pool_of(self._connection).release(self._connection))

    def terminate(self) -> None:
        """Terminate the connection; the pool opens another one when it is needed."""
        self.end()

    async def _check_type_cache_invalidation(self, invalidate_timestamp: float) -> None:
        # This clears the caches of all connections of the pool, so that one time is kept for them all.
        if invalidate_timestamp > self.dbapi.caches_cleared_at:
            self.dbapi.caches_cleared_at = invalidate_timestamp
            await self._connection.reload_schema_state()

    async def _prepare(self, operation: str, invalidate_timestamp: float) -> tuple[Any, Any]:
        await self._check_type_cache_invalidation(invalidate_timestamp)
        statement = await self._connection.prepare_cached(operation)
        attributes = statement.get_attributes()
        positions = [at for at, attribute in enumerate(attributes or ()) if attribute.type.oid in _JSON_OIDS]
        if positions and not self._has_json_codec():
            return _JSONStatement(statement, positions, self.json_deserializer), attributes
        return statement, attributes

    def _has_json_codec(self) -> bool:
        """Return whether the `init` of the pool has set a codec for JSON, so that values arrive decoded."""
        session = session_of(self._connection)
        return session is not None and any(name in ("json", "jsonb") for _, name in session.codecs)


# Of json, jsonb, and arrays of them (pg_type.dat of PostgreSQL).
_JSON_OIDS = frozenset({114, 3802, 199, 3807})


class _JSONStatement:
    """A prepared statement whose rows have JSON at some positions, which it decodes."""

    __slots__ = ("_deserialize", "_positions", "_statement")

    def __init__(self, statement: Any, positions: list[int], deserialize: Callable[[str], Any]) -> None:
        self._statement = statement
        self._positions = positions
        self._deserialize = deserialize

    async def fetch(self, *parameters: object) -> list[_Row]:
        return self.decoded(await self._statement.fetch(*parameters))

    def get_statusmsg(self) -> str:
        return cast(str, self._statement.get_statusmsg())

    async def cursor(self, *parameters: object) -> _JSONCursor:
        return _JSONCursor(await self._statement.cursor(*parameters), self)

    def decoded(self, rows: Iterable[_Row]) -> list[_Row]:
        decoded: list[_Row] = []
        for row in rows:
            values = list(row)
            for position in self._positions:
                values[position] = self._value(values[position])
            decoded.append(tuple(values))
        return decoded

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(element) for element in value]
        return None if value is None else self._deserialize(value)


class _JSONCursor:
    """A cursor of a `_JSONStatement`."""

    __slots__ = ("_cursor", "_statement")

    def __init__(self, cursor: Any, statement: _JSONStatement) -> None:
        self._cursor = cursor
        self._statement = statement

    async def fetch(self, count: int) -> list[_Row]:
        return self._statement.decoded(await self._cursor.fetch(count))


# ---------------------------------------------------------------------------------------------------------------------
# URLs and keywords


def _keywords_of_url(url: URL) -> dict[str, Any]:
    """Return the keywords in a URL of the dialect, without any `sslmode`: see `_verified_keywords()`."""
    pairs: list[tuple[str, object]] = [*url.translate_connect_args(username="user").items()]
    adapter: dict[str, Any] = {}
    for name, given in url.query.items():
        if name == "prepared_statement_cache_size":
            adapter[name] = _CACHE_SIZE.read(Given(name, given, "DSN"))
        else:
            pairs += [(name, value) for value in ([given] if isinstance(given, str) else given)]
    keywords = keywords_of_url(pairs)
    keywords.pop("sslmode", None)
    if "dbname" in keywords:
        keywords["database"] = keywords.pop("dbname")  # as SQLAlchemy and asyncpg name it
    return keywords | adapter


_CACHE_SIZE = Integer(0)


def _connection_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that are ours, by their canonical names: of two names for one, the later wins."""
    named = [(canonical_name(name), value) for name, value in keywords.items()]
    return {name: value for name, value in named if name not in _ADAPTER_KEYWORDS and value is not None}


def _verified_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a connection by the dialect, whose scheme itself asks for verify-full."""
    return {"sslmode": "verify-full"} | _connection_keywords(keywords)


def _url_of_dsn(dsn: str) -> URL:
    """Return a valid connection string as a URL of the dialect."""
    parts = split(dsn)
    pairs = [item.partition("=") for item in filter(None, parts.query.split("&"))]
    query: dict[str, list[str]] = {}
    for key, _, value in pairs:
        query.setdefault(decode(key), []).append(decode(value))
    return URL.create(
        VERIFIED_SCHEME,
        username=decode(parts.user) or None,
        password=decode(parts.password) or None,
        host=decode(parts.host) or None,
        port=int(decode(parts.port)) if parts.port else None,
        database=decode(parts.path[1:]) or None,
        query={name: values[0] if len(values) == 1 else tuple(values) for name, values in query.items()},
    )


def _url_of_connector(connector: Connector) -> URL:
    """Return a URL that names what a connector connects to, without the password."""
    to = connector.parameters
    return URL.create(VERIFIED_SCHEME, username=to.user, host=to.host, port=to.port, database=to.database)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def _unverified() -> InsecureConfigurationError:
    return InsecureConfigurationError(
        "The connection was not made by neon-async, so it is not verified. Leave out creator and async_creator, or "
        "return a connection of neon_async.connect() or of a pool."
    )


def _translated(dbapi: Any, error: Exception) -> Exception:
    """Return the error of SQLAlchemy's DB-API for `error`, with `error` as its cause, or `error` if there is none."""
    cls = _dbapi_class(dbapi, error)
    if cls is None:
        return error
    message = str(error.args[0]) if error.args else str(error)
    if _KEEPS_ORIGINAL:
        translated: Exception = cls(message, error)
    else:
        translated = cls(f"{type(error)}: {error}")
        translated.pgcode = translated.sqlstate = getattr(error, "sqlstate", None)  # type: ignore[attr-defined]
    translated.__cause__ = error
    return translated


# SQLAlchemy 2.1; 2.0 puts the class of the original into the text.
_KEEPS_ORIGINAL = hasattr(AsyncAdapt_asyncpg_dbapi.Error, "driver_exception")


def _dbapi_class(dbapi: Any, error: Exception) -> type[Exception] | None:
    if isinstance(error, dbapi.Error):
        return None
    if isinstance(error, NeonAsyncError | asyncpg.PostgresError | ConnectionError) and is_unavailable(error):
        return cast(type[Exception], dbapi.OperationalError)
    for kind, name in _DBAPI_CLASSES:
        if isinstance(error, kind):
            return cast(type[Exception], getattr(dbapi, name))
    classes = dbapi._asyncpg_error_translate
    return next((classes[base] for base in type(error).__mro__ if base in classes), None)


# The names of PEP 249 for our errors, the first that matches.
_DBAPI_CLASSES = (
    (ConfigurationError, "InterfaceError"),
    (UnsupportedEventLoopError, "InterfaceError"),
    (PoolClosedError, "InterfaceError"),
    (PooledHostError, "NotSupportedError"),
    (StaleStatementError, "InvalidCachedStatementError"),  # at which SQLAlchemy prepares everything again
    (WrongMethodError, "ProgrammingError"),
    (NeonAsyncError, "OperationalError"),
)
