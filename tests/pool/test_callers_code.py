"""What the caller's own code raises in a dial reaches the acquire it was run for, and no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from support.probes import (
    HANG,
    assert_secret_free,
    assert_whole,
    make_pool,
    nothing_is_left,
    password_of,
    until,
    until_settled,
)

import neon_async
from neon_async.testing import LocalEndpoint, LocalPostgres

pytestmark = pytest.mark.anyio

CALLERS = 20


async def never() -> None:
    await asyncio.Event().wait()


async def await_something_cancelled() -> None:
    task = asyncio.ensure_future(never())
    asyncio.get_running_loop().call_soon(task.cancel)
    await task


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise error

    return fail


class Unforeseen(BaseException):
    """What `pytest.fail()` raises is no Exception either."""


async def cancel_its_own_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await never()


# (what the caller's code does, and the error of the acquire)
FAULTS: list[Any] = [
    pytest.param(raising(ConnectionError("vault")), ConnectionError, id="ConnectionError"),
    pytest.param(raising(TimeoutError("vault")), TimeoutError, id="TimeoutError"),
    pytest.param(raising(OSError(113, "No route")), OSError, id="OSError"),
    pytest.param(raising(LookupError("no such key")), LookupError, id="LookupError"),
    pytest.param(raising(asyncpg.CannotConnectNowError("vault")), asyncpg.CannotConnectNowError, id="asyncpg's"),
    pytest.param(raising(neon_async.ConnectError("vault")), neon_async.ConnectError, id="a transient error of ours"),
    pytest.param(
        raising(neon_async.CertificateError("vault")), neon_async.CertificateError, id="a final error of ours"
    ),
    pytest.param(await_something_cancelled, neon_async.ConnectError, id="a CancelledError from elsewhere"),
    pytest.param(raising(Unforeseen("vault")), Unforeseen, id="no Exception"),
]


class Flaky:
    """Code of a caller that fails at some of its calls.

    Args:
        fault: What it does then.
        fails: Whether it fails, by the number of the call, from 1 on.
    """

    def __init__(self, fault: Callable[[], Awaitable[None]], fails: Callable[[int], bool], answer: Any = None) -> None:
        self.calls = 0
        self._fault = fault
        self._fails = fails
        self._answer = answer

    async def __call__(self, *_: object) -> Any:
        self.calls += 1
        if self._fails(self.calls):
            await self._fault()
        return self._answer


def as_init(postgres: LocalPostgres, code: Flaky) -> dict[str, Any]:
    async def init(connection: Any) -> None:
        await code()

    return {"init": init}


def as_password(postgres: LocalPostgres, code: Flaky) -> dict[str, Any]:
    code._answer = password_of(postgres)

    async def password() -> str:
        answer: str = await code()
        return answer

    return {"password": password}


PLACES = pytest.mark.parametrize("place", [as_init, as_password], ids=["init", "password"])
Place = Callable[[LocalPostgres, Flaky], dict[str, Any]]


async def outcomes(pool: neon_async.Pool, count: int = CALLERS) -> list[Any]:
    async with asyncio.timeout(HANG):
        return await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(count)), return_exceptions=True)


@PLACES
@pytest.mark.parametrize(("fault", "error"), FAULTS)
async def test_code_that_fails_once_fails_one_of_twenty_callers(
    postgres: LocalPostgres, place: Place, fault: Callable[[], Awaitable[None]], error: type[Exception]
) -> None:
    code = Flaky(fault, lambda call: call == 1)
    async with make_pool(postgres, **place(postgres, code)) as pool:
        served = await outcomes(pool)
        [failure] = [one for one in served if one != 1]
        assert type(failure) is error
        assert served[0] is failure  # the first dial was for the first caller
        await assert_whole(pool)


@PLACES
@pytest.mark.parametrize(("fault", "error"), FAULTS)
async def test_code_that_always_fails_runs_once_for_each_acquire(
    postgres: LocalPostgres, place: Place, fault: Callable[[], Awaitable[None]], error: type[Exception]
) -> None:
    """There is no replay, and no breaker that answers in its place."""
    code = Flaky(fault, lambda call: True)
    async with make_pool(postgres, **place(postgres, code)) as pool:
        for number in range(1, 5):
            [failure] = await outcomes(pool, 1)
            assert type(failure) is error
            assert_secret_free(failure, password_of(postgres))
            assert (code.calls, pool.stats().dial_failures) == (number, number)
        assert {type(one) for one in await outcomes(pool, 4)} == {error}
        assert code.calls == 8
        await until_settled(pool)


@PLACES
async def test_code_that_cancels_the_task_that_it_runs_in_does_not_storm(postgres: LocalPostgres, place: Place) -> None:
    """For the pool that is as if the event loop ended, so the caller goes on waiting."""
    code = Flaky(cancel_its_own_task, lambda call: call <= 3)
    async with make_pool(postgres, **place(postgres, code)) as pool:
        began = time.monotonic()
        assert await outcomes(pool, 1) == [1]
        assert pool.stats().dials == 4 <= 1 + 5 * (time.monotonic() - began)
        await until_settled(pool)


@PLACES
async def test_callers_are_served_as_soon_as_the_code_works(postgres: LocalPostgres, place: Place) -> None:
    sealed = True
    code = Flaky(raising(ConnectionError("the vault is sealed")), lambda call: sealed)
    async with make_pool(postgres, **place(postgres, code)) as pool:
        for _ in range(6):
            [failure] = await outcomes(pool, 1)
            assert isinstance(failure, ConnectionError)
        sealed, calls = False, code.calls
        assert await outcomes(pool) == [1] * CALLERS
        assert pool.stats().dial_failures == calls
        await until_settled(pool)


@PLACES
async def test_code_that_hangs_fails_one_caller_after_connect_timeout(postgres: LocalPostgres, place: Place) -> None:
    code = Flaky(never, lambda call: call == 1)
    async with make_pool(postgres, connect_timeout=1.0, **place(postgres, code)) as pool:
        served = await outcomes(pool)
        assert [type(one) for one in served if one != 1] == [neon_async.ConnectTimeoutError]
        await assert_whole(pool)


# ---------------------------------------------------------------------------------------------------------------------
# The class of the connections


class Faults:
    """A caller's class of connections that sometimes fails."""

    made = 0
    fails: Callable[[int], bool] = staticmethod(lambda number: number == 1)
    error: Exception = LookupError("no such tenant")

    @classmethod
    def make_one(cls) -> None:
        cls.made += 1
        if cls.fails(cls.made):
            raise cls.error


class Faulty(Faults, asyncpg.Connection):
    def __init__(self, *args: Any, **options: Any) -> None:
        self.make_one()
        super().__init__(*args, **options)


class FaultyLater(Faults, asyncpg.Connection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.make_one()


class FaultyOfOurs(Faults, neon_async.Connection[Any]):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.make_one()


CLASSES = pytest.mark.parametrize("base", [Faulty, FaultyLater, FaultyOfOurs], ids=lambda base: base.__name__)
RAISED = pytest.mark.parametrize(
    "raised",
    [
        LookupError("no such tenant"),
        ConnectionError("vault"),
        AttributeError("no such attribute"),
        neon_async.CertificateError("vault"),
    ],
    ids=lambda error: type(error).__name__,
)


@CLASSES
@RAISED
async def test_a_class_that_fails_once_fails_one_of_twenty_callers(
    postgres: LocalPostgres, base: Any, raised: Exception
) -> None:
    cls = type("Own", (base,), {"error": raised})
    async with make_pool(postgres, connection_class=cls) as pool:
        served = await outcomes(pool)
        assert [one for one in served if one != 1] == [raised]
        await assert_whole(pool)


@CLASSES
@RAISED
async def test_a_class_that_always_fails_is_asked_once_for_each_acquire(
    postgres: LocalPostgres, base: Any, raised: Exception
) -> None:
    cls: Any = type("Own", (base,), {"error": raised, "fails": staticmethod(lambda number: True)})
    async with nothing_is_left(), make_pool(postgres, connection_class=cls) as pool:
        for _ in range(3):
            assert await outcomes(pool, 1) == [raised]
        assert pool.stats().dial_failures == 3
        await until_settled(pool)


@CLASSES
@RAISED
async def test_connect_raises_what_the_class_raises(postgres: LocalPostgres, base: Any, raised: Exception) -> None:
    cls: Any = type("Own", (base,), {"error": raised})
    async with nothing_is_left():
        with pytest.raises(type(raised)) as caught:
            await neon_async.connect(postgres.dsn, trust_anchor=postgres.trust_anchor, connection_class=cls)
        assert caught.value is raised
        assert_secret_free(raised, password_of(postgres))


async def test_a_class_that_is_not_initialized_is_named(postgres: LocalPostgres) -> None:
    class Forgetful(asyncpg.Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

    class Mistaken(asyncpg.Connection):
        def __init__(self, tenant: str) -> None:
            super().__init__(tenant)  # type: ignore[call-arg, arg-type]

    async with make_pool(postgres, connection_class=Forgetful) as pool:
        [failure] = await outcomes(pool, 1)
        assert isinstance(failure, neon_async.ConfigurationError)
        assert "Forgetful has an __init__() that does not call super().__init__()" in str(failure)
    async with make_pool(postgres, connection_class=Mistaken) as pool:
        [failure] = await outcomes(pool, 1)
        assert type(failure) is TypeError


async def test_a_class_without_subclasses_is_refused_before_a_socket_is_opened() -> None:
    class Closed(asyncpg.Connection):
        def __init_subclass__(cls, *, tenant: str) -> None:
            pass

    dsn = "postgresql://user:secret@ep-cool-darkness-123456.us-east-2.aws.neon.tech/neondb?sslmode=verify-full"
    for make in (neon_async.create_pool, neon_async.connect):
        with pytest.raises(neon_async.ConfigurationError, match="Closed cannot be used"):
            make(dsn, connection_class=Closed)


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to fail


async def test_a_password_that_cannot_be_used_fails_one_caller(postgres: LocalPostgres) -> None:
    answers = iter([None, ""])
    async with make_pool(postgres, password=lambda: next(answers, password_of(postgres))) as pool:
        served = await outcomes(pool)
        assert [type(one) for one in served if one != 1] == [neon_async.ConfigurationError] * 2
        await assert_whole(pool)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda connection: connection.close(), id="close"),
        pytest.param(lambda connection: asyncio.sleep(0, connection.terminate()), id="terminate"),
    ],
)
async def test_an_init_that_ends_its_connection_fails_one_caller(
    postgres: LocalPostgres, end: Callable[[Any], Awaitable[None]]
) -> None:
    calls = 0

    async def init(connection: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await end(connection)

    async with make_pool(postgres, init=init) as pool:
        served = await outcomes(pool)
        [failure] = [one for one in served if one != 1]
        assert isinstance(failure, neon_async.ConfigurationError)
        assert "init closed its connection" in str(failure)
        await assert_whole(pool)


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        pytest.param("SELECT * FROM no_such_table", asyncpg.UndefinedTableError, id="42P01"),
        pytest.param("SELECT 1/0", asyncpg.DivisionByZeroError, id="22012"),
        pytest.param("DO $$BEGIN RAISE SQLSTATE '57P03'; END$$", asyncpg.CannotConnectNowError, id="57P03"),
        pytest.param(
            "DO $$BEGIN RAISE SQLSTATE '28000'; END$$", asyncpg.InvalidAuthorizationSpecificationError, id="28"
        ),
    ],
)
async def test_an_error_of_the_server_in_init_fails_one_caller(
    postgres: LocalPostgres, sql: str, error: type[Exception]
) -> None:
    statements = [sql]

    async def init(connection: Any) -> None:
        if statements:
            await connection.execute(statements.pop())

    async with make_pool(postgres, init=init) as pool:
        served = await outcomes(pool)
        assert [type(one) for one in served if one != 1] == [error]
        await assert_whole(pool)


async def test_an_error_reaches_nobody_when_the_caller_it_was_run_for_has_gone(postgres: LocalPostgres) -> None:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    code = Flaky(lambda: gate, lambda call: call == 1)
    async with make_pool(postgres, **as_password(postgres, code)) as pool, asyncio.timeout(HANG):
        first = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        await until(lambda: code.calls == 1)
        others = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(3)]
        await until(lambda: pool.stats().waiting == 4)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set_exception(ConnectionError("the vault is sealed"))
        assert await asyncio.gather(*others) == [1] * 3
        await until_settled(pool)


async def test_the_caller_whose_init_failed_leaves_the_open_connections_in_use(postgres: LocalPostgres) -> None:
    code = Flaky(raising(ValueError("in init")), lambda call: call == 2)
    async with make_pool(postgres, max_size=2, **as_init(postgres, code)) as pool, asyncio.timeout(HANG):
        async with pool.acquire() as connection:
            with pytest.raises(ValueError, match="in init"):
                await pool.acquire()
            assert await connection.fetchval("SELECT 1") == 1
        await assert_whole(pool)


async def test_a_pool_does_not_open_where_the_code_fails(postgres: LocalPostgres) -> None:
    code = Flaky(raising(ConnectionError("the vault is sealed")), lambda call: call == 2)
    with pytest.raises(ConnectionError, match="the vault is sealed"):
        await make_pool(postgres, init_size=3, **as_password(postgres, code))


async def fail(connection: Any) -> None:
    raise LookupError("no such tenant")


@pytest.mark.parametrize("hook", ["init", "setup"])
async def test_callers_whose_own_code_fails_on_every_connection_do_not_storm_the_server(
    postgres: LocalPostgres, hook: str
) -> None:
    async with LocalEndpoint(postgres) as endpoint, make_pool(endpoint, **{hook: fail}) as pool, asyncio.timeout(HANG):

        async def keep_calling() -> None:
            while True:
                with pytest.raises(LookupError):
                    await pool.acquire()

        callers = [asyncio.ensure_future(keep_calling()) for _ in range(CALLERS)]
        await until(lambda: endpoint.connects >= 3)
        before, began = endpoint.connects, time.monotonic()
        await asyncio.sleep(2)
        assert endpoint.connects - before <= 5 * (time.monotonic() - began)
        assert not any(caller.done() for caller in callers)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await until_settled(pool)


@PLACES
async def test_min_size_is_not_restored_in_a_loop_by_code_that_always_fails(
    postgres: LocalPostgres, place: Place
) -> None:
    failing = False
    code = Flaky(raising(ConnectionError("the vault is sealed")), lambda call: failing)
    async with LocalEndpoint(postgres) as endpoint:
        with pytest.warns(UserWarning, match="min_size"):
            pool = make_pool(endpoint, min_size=2, **place(postgres, code))
        async with pool, asyncio.timeout(HANG):
            failing = True
            endpoint.cut()
            await until(lambda: code.calls >= 4)
            calls = code.calls
            await asyncio.sleep(0.5)
            assert code.calls <= calls + 2
            failing = False
            assert await pool.fetchval("SELECT 1") == 1
            await until(lambda: pool.get_size() == 2)
            await until_settled(pool)
