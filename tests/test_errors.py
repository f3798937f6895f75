"""The error tree: the parents of each class, its text, pickling, and errors from a real server."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import copy
import errno
import pickle
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

import neon_async
from neon_async import _errors
from neon_async.testing import LocalPostgres

TREE: list[Any] = [
    pytest.param(cls, parents, retryable, id=cls.__name__)
    for cls, parents, retryable in (
        (neon_async.NeonAsyncError, (Exception,), False),
        (neon_async.ConfigurationError, (ValueError,), False),
        (neon_async.InsecureConfigurationError, (neon_async.ConfigurationError, ValueError), False),
        (neon_async.UnsupportedEventLoopError, (RuntimeError,), False),
        (neon_async.ConnectError, (ConnectionError, OSError), True),
        (neon_async.ProtocolError, (neon_async.ConnectError,), False),
        (neon_async.ConnectTimeoutError, (TimeoutError, asyncio.TimeoutError), True),
        (neon_async.TLSError, (ssl.SSLError, OSError), False),
        (neon_async.CertificateError, (neon_async.TLSError, ssl.SSLCertVerificationError), False),
        (neon_async.CertificateRevokedError, (neon_async.CertificateError,), False),
        (neon_async.RevocationUnknownError, (neon_async.CertificateError,), True),
        (neon_async.AuthenticationError, (asyncpg.InvalidAuthorizationSpecificationError,), False),
        (neon_async.ChannelBindingError, (neon_async.AuthenticationError,), False),
        (neon_async.InvalidPasswordError, (neon_async.AuthenticationError, asyncpg.InvalidPasswordError), False),
        (neon_async.EndpointError, (asyncpg.InternalServerError,), False),
        (neon_async.EndpointNotFoundError, (neon_async.EndpointError,), False),
        (neon_async.EndpointDisabledError, (neon_async.EndpointError,), False),
        (neon_async.IPNotAllowedError, (neon_async.EndpointError,), False),
        (neon_async.QuotaExceededError, (neon_async.EndpointError,), False),
        (neon_async.ComputeUnavailableError, (neon_async.EndpointError, asyncpg.CannotConnectNowError), True),
        (neon_async.TooManyConnectionsError, (neon_async.EndpointError, asyncpg.TooManyConnectionsError), True),
        (neon_async.DatabaseNotFoundError, (neon_async.EndpointError, asyncpg.InvalidCatalogNameError), False),
        (neon_async.PooledHostError, (asyncpg.FeatureNotSupportedError,), False),
        (
            neon_async.StaleStatementError,
            (asyncpg.exceptions.ProtocolError, asyncpg.exceptions.OutdatedSchemaCacheError),
            True,
        ),
        (neon_async.WrongMethodError, (asyncpg.InterfaceError,), False),
        (neon_async.PoolTimeoutError, (TimeoutError, asyncio.TimeoutError), True),
        (neon_async.PoolBusyError, (RuntimeError,), True),
        (neon_async.PoolClosedError, (asyncpg.InterfaceError,), False),
        (neon_async.ConnectionLostError, (asyncpg.ConnectionDoesNotExistError, ConnectionError), True),
        (neon_async.QueryTimeoutError, (TimeoutError, asyncio.TimeoutError), True),
        (neon_async.CommitUnknownError, (asyncpg.TransactionResolutionUnknownError,), False),
        (neon_async.TransactionAbortedError, (asyncpg.InFailedSQLTransactionError,), False),
    )
]
TEXT = "ep-a-b-123456 was refused: ünwanted. Try 'this' instead"


def error_response(**fields: str) -> bytes:
    return b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0"


def test_the_table_of_this_module_is_the_whole_tree() -> None:
    listed = {case.values[0] for case in TREE}
    exported = {getattr(neon_async, name) for name in neon_async.__all__}
    classes = [one for one in vars(_errors).values() if isinstance(one, type)]
    defined = {one for one in classes if issubclass(one, _errors.NeonAsyncError)}
    assert listed == defined
    assert listed == {value for value in exported if isinstance(value, type) and issubclass(value, Exception)}


@pytest.mark.parametrize(("cls", "parents", "retryable"), TREE)
class TestEveryError:
    def test_it_is_caught_as_each_of_its_parents(
        self, cls: type[neon_async.NeonAsyncError], parents: tuple[type[Exception], ...], retryable: bool
    ) -> None:
        every: list[type[Exception]] = [neon_async.NeonAsyncError, *parents]
        for parent in every:
            with pytest.raises(parent) as caught:
                raise cls(TEXT)
            assert type(caught.value) is cls
        assert cls.retryable is retryable

    def test_it_is_caught_as_no_other_builtin(
        self, cls: type[neon_async.NeonAsyncError], parents: tuple[type[Exception], ...], retryable: bool
    ) -> None:
        # A retry loop around OSError or TimeoutError must not catch a wrong password, nor the other way round.
        allowed = {*Exception.__mro__, *(base for parent in parents for base in parent.__mro__)}
        builtin = {base for base in cls.__mro__ if getattr(builtins, base.__name__, None) is base}
        assert builtin <= allowed

    def test_its_text_is_the_message_alone(
        self, cls: type[neon_async.NeonAsyncError], parents: tuple[type[Exception], ...], retryable: bool
    ) -> None:
        assert str(cls(TEXT)) == TEXT
        assert str(cls()) == ""
        assert cls.__doc__

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickled_error_keeps_its_text_and_attributes(
        self, cls: type[neon_async.NeonAsyncError], parents: tuple[type[Exception], ...], retryable: bool, protocol: int
    ) -> None:
        error = cls(TEXT)
        error.__dict__["detail"] = "a detail"
        for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
            assert type(twin) is cls
            assert str(twin) == TEXT
            assert vars(twin)["detail"] == "a detail"


@pytest.mark.parametrize("certain", [False, True])
def test_a_pickled_error_says_whether_nothing_was_executed(certain: bool) -> None:
    error = neon_async.ConnectionLostError(TEXT, nothing_executed=certain)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert twin.nothing_executed is certain


@pytest.mark.parametrize(
    ("sqlstate", "cls"),
    [
        pytest.param("28P01", asyncpg.InvalidPasswordError, id="wrong password"),
        pytest.param("3D000", asyncpg.InvalidCatalogNameError, id="missing database"),
        pytest.param("53300", asyncpg.TooManyConnectionsError, id="full"),
        pytest.param("57P03", asyncpg.CannotConnectNowError, id="starting up"),
        pytest.param("XX000", asyncpg.InternalServerError, id="Neon's proxy"),
        pytest.param("ZZ999", asyncpg.PostgresError, id="unknown"),
    ],
)
def test_an_error_response_becomes_an_exception_of_asyncpg(sqlstate: str, cls: type[asyncpg.PostgresError]) -> None:
    error = _errors.server_error(error_response(S="FATAL", V="FATAL", C=sqlstate, M="nö", D="why", H="do this"))
    assert isinstance(error, cls)
    assert error.sqlstate == sqlstate
    assert (error.args[0], getattr(error, "detail", None), getattr(error, "hint", None)) == ("nö", "why", "do this")


@given(st.binary(max_size=200) | st.lists(st.binary(max_size=20), max_size=12).map(b"\0".join))
def test_any_bytes_of_an_error_response_become_an_exception(body: bytes) -> None:
    error = _errors.server_error(body)
    assert isinstance(error, asyncpg.PostgresError)
    assert isinstance(str(error), str)
    assert len(error.args) == 1


def test_an_error_of_a_wrapped_function_carries_no_arguments() -> None:
    @_errors.forget_arguments
    def refuse(dsn: str) -> str:
        try:
            int(dsn)
        except ValueError as error:
            raise neon_async.ConfigurationError("refused") from error
        return dsn

    assert refuse("1") == "1"
    with pytest.raises(neon_async.ConfigurationError) as caught:
        refuse("s3cret")
    frames = [entry.name for entry in caught.traceback]
    assert frames == ["test_an_error_of_a_wrapped_function_carries_no_arguments", "wrapper"]
    assert "s3cret" not in repr([entry.frame.f_locals for entry in list(caught.traceback)[1:]])
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_a_wrapped_function_keeps_its_name_and_its_exceptions() -> None:
    @_errors.forget_arguments
    def fail(value: str) -> str:
        """Fail."""
        raise KeyError(value)

    assert (fail.__name__, fail.__doc__) == ("fail", "Fail.")
    with pytest.raises(KeyError, match="here"):
        fail("here")


# ---------------------------------------------------------------------------------------------------------------------
# What a caller can do about an error

# The exceptions of asyncpg, by name: those that may pass, and those of them that are an outage. No other is either.
OUTAGES = {
    "AdminShutdownError",
    "CannotConnectNowError",
    "ClientCannotConnectError",
    "ConnectionDoesNotExistError",
    "ConnectionFailureError",
    "ConnectionRejectionError",
    "CrashShutdownError",
    "DiskFullError",
    "IdleInTransactionSessionTimeoutError",
    "IdleSessionTimeoutError",
    "InsufficientResourcesError",
    "OutOfMemoryError",
    "PostgresConnectionError",
    "PostgresIOError",
    "PostgresSystemError",
    "TooManyConnectionsError",
    "TransactionTimeoutError",
}
MAY_PASS = OUTAGES | {
    "DeadlockDetectedError",
    "InternalServerError",
    "InvalidCachedStatementError",
    "LockNotAvailableError",
    "ObjectInUseError",
    "OperatorInterventionError",
    "OutdatedSchemaCacheError",
    "QueryCanceledError",
    "SerializationError",
    "SnapshotTooOldError",
    "TransactionRollbackError",
}
UNAVAILABLE = {
    "ComputeUnavailableError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConnectionLostError",
    "EndpointDisabledError",
    "PoolBusyError",
    "PoolTimeoutError",
    "QueryTimeoutError",
    "QuotaExceededError",
    "TooManyConnectionsError",
}


@pytest.mark.parametrize("name", [name for name in asyncpg.exceptions.__all__ if name.endswith(("Error", "Matched"))])
def test_an_exception_of_asyncpg_may_pass_or_is_an_outage_as_the_table_says(name: str) -> None:
    error = getattr(asyncpg, name)("text")
    assert neon_async.is_retryable(error) is (name in MAY_PASS)
    assert neon_async.is_unavailable(error) is (name in OUTAGES)


@pytest.mark.parametrize("name", sorted(MAY_PASS - {"TransactionTimeoutError"}))
def test_the_table_names_exceptions_that_asyncpg_has(name: str) -> None:
    assert issubclass(getattr(asyncpg, name), Exception)


@pytest.mark.parametrize(("cls", "parents", "retryable"), TREE)
def test_an_error_of_ours_says_itself_whether_it_may_pass(cls: Any, parents: Any, retryable: bool) -> None:
    assert neon_async.is_retryable(cls(TEXT)) is retryable
    assert neon_async.is_unavailable(cls(TEXT)) is (cls.__name__ in UNAVAILABLE)


@pytest.mark.parametrize(
    ("fields", "retryable", "unavailable"),
    [
        pytest.param({"C": "08P01", "S": "FATAL"}, True, True, id="query_wait_timeout of PgBouncer, which sends no V"),
        pytest.param({"C": "08P01", "S": "FATAL", "V": "FATAL"}, True, True, id="the same with V"),
        pytest.param({"C": "08P01", "S": "FEHLER", "V": "ERROR"}, False, False, id="a statement against the protocol"),
        pytest.param({"C": "25P04", "V": "FATAL"}, True, True, id="a code that asyncpg 0.31 does not know"),
        pytest.param({"C": "53ZZZ", "V": "ERROR"}, True, True, id="an unknown code of a known class"),
        pytest.param({"C": "ZZ999", "V": "FATAL"}, False, False, id="an unknown class"),
        pytest.param({"M": "no code"}, False, False, id="no code"),
    ],
)
def test_the_sqlstate_of_a_server_decides(fields: dict[str, str], retryable: bool, unavailable: bool) -> None:
    error = _errors.server_error(error_response(**fields))
    assert (neon_async.is_retryable(error), neon_async.is_unavailable(error)) == (retryable, unavailable)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), True),
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (TimeoutError(), True),
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), True),
        (OSError("no number"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ssl.SSLCertVerificationError(), False),
        (AttributeError(), False),
        (KeyError(), False),
        (LookupError(), False),
        (MemoryError(), False),
        (NotImplementedError(), False),
        (RuntimeError(), False),
        (TypeError(), False),
        (ValueError(), False),
        (asyncio.CancelledError(), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_of_other_exceptions_only_those_of_the_network_may_pass(error: BaseException, expected: bool) -> None:
    assert neon_async.is_retryable(error) is expected
    assert neon_async.is_unavailable(error) is expected


LOST = neon_async.ConnectionLostError(TEXT)
UNKNOWN = neon_async.CommitUnknownError(TEXT)


@pytest.mark.parametrize(
    ("error", "retryable", "unavailable"),
    [
        (ExceptionGroup("of a task group", [LOST, neon_async.PoolBusyError(TEXT)]), True, True),
        (ExceptionGroup("of nested ones", [LOST, ExceptionGroup("inner", [LOST])]), True, True),
        (ExceptionGroup("of asyncpg's", [LOST, asyncpg.SerializationError(TEXT)]), True, False),
        (ExceptionGroup("with a bug", [LOST, KeyError()]), False, False),
        (ExceptionGroup("with a lost COMMIT", [LOST, UNKNOWN]), False, False),
        (BaseExceptionGroup("with the end of the program", [LOST, KeyboardInterrupt()]), False, False),
    ],
    ids=str,
)
def test_a_group_is_what_all_its_errors_are(error: BaseException, retryable: bool, unavailable: bool) -> None:
    assert (neon_async.is_retryable(error), neon_async.is_unavailable(error)) == (retryable, unavailable)


class Wrapping(Exception):
    """An error with an `orig`, as SQLAlchemy's."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__()
        self.orig = RuntimeError()
        self.orig.__cause__ = cause


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (LOST, True),
        (asyncpg.CannotConnectNowError(TEXT), True),
        (TimeoutError(), True),
        (UNKNOWN, False),
        (asyncpg.PostgresSyntaxError(TEXT), False),
        (ValueError(), False),
        (None, False),
    ],
    ids=repr,
)
def test_an_error_that_wraps_one_is_what_that_is(cause: BaseException | None, expected: bool) -> None:
    assert neon_async.is_retryable(Wrapping(cause)) is expected
    assert neon_async.is_unavailable(Wrapping(cause)) is expected


@pytest.mark.parametrize("cls", [neon_async.PoolTimeoutError, neon_async.PoolClosedError])
@pytest.mark.parametrize("unavailable", [False, True])
def test_a_pickled_error_says_whether_the_database_is_unavailable(cls: Any, unavailable: bool) -> None:
    error = cls(TEXT, unavailable=unavailable)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert neon_async.is_unavailable(twin) is unavailable


# ---------------------------------------------------------------------------------------------------------------------
# From a real server


@pytest.fixture
async def admin(postgres: LocalPostgres) -> AsyncIterator[Any]:
    connection = await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def a_role(admin: Any, name: str, options: str) -> AsyncIterator[None]:
    await admin.execute(f"CREATE ROLE {name} PASSWORD 'role password' {options}")
    try:
        yield
    finally:
        await admin.execute(f"DROP ROLE {name}")


@pytest.mark.anyio
async def test_a_wrong_password_is_caught_as_our_error_and_as_asyncpgs(postgres: LocalPostgres) -> None:
    with pytest.raises(neon_async.InvalidPasswordError, match="password authentication failed") as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, password="not this one")
    assert isinstance(caught.value, asyncpg.InvalidPasswordError)
    assert caught.value.sqlstate == "28P01"
    assert pickle.loads(pickle.dumps(caught.value)).sqlstate == "28P01"


@pytest.mark.anyio
async def test_an_unknown_role_is_reported_as_a_wrong_password(postgres: LocalPostgres) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError) as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, user="no such role")
    assert type(caught.value) is neon_async.InvalidPasswordError


@pytest.mark.anyio
async def test_a_missing_database_is_caught_as_our_error_and_as_asyncpgs(postgres: LocalPostgres) -> None:
    with pytest.raises(asyncpg.InvalidCatalogNameError, match='"no such database" does not exist') as caught:
        await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, database="no such database")
    assert type(caught.value) is neon_async.DatabaseNotFoundError
    assert postgres.host in str(caught.value)


@pytest.mark.anyio
async def test_a_connection_limit_is_caught_as_our_error_and_as_asyncpgs(postgres: LocalPostgres, admin: Any) -> None:
    async with a_role(admin, "limited", "LOGIN CONNECTION LIMIT 0"):
        with pytest.raises(asyncpg.TooManyConnectionsError, match="too many connections for role") as caught:
            await neon_async.connect(
                postgres.dsn, trust_anchor=postgres.trust_anchor, user="limited", password="role password"
            )
    assert type(caught.value) is neon_async.TooManyConnectionsError
    assert caught.value.retryable


@pytest.mark.anyio
async def test_a_role_without_login_is_an_authentication_error(postgres: LocalPostgres, admin: Any) -> None:
    async with a_role(admin, "locked", "NOLOGIN"):
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as caught:
            await neon_async.connect(
                postgres.dsn, trust_anchor=postgres.trust_anchor, user="locked", password="role password"
            )
    assert type(caught.value) is neon_async.AuthenticationError


@pytest.mark.anyio
async def test_an_error_that_no_class_describes_is_an_error_of_the_endpoint(postgres: LocalPostgres) -> None:
    with pytest.raises(asyncpg.PostgresError, match="unrecognized configuration parameter") as caught:
        await neon_async.connect(
            postgres.dsn, trust_anchor=postgres.trust_anchor, server_settings={"no_such_setting": "1"}
        )
    assert type(caught.value) is neon_async.EndpointError
    assert not neon_async.is_retryable(caught.value)
    assert caught.value.sqlstate == "42704"
