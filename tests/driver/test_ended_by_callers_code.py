"""The caller's code ends the connection in a call that runs it: the call fails, and the event loop logs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from support.probes import HANG, connected, make_pool, nothing_is_reported

import neon_async
from neon_async.testing import LocalPostgres

pytestmark = pytest.mark.anyio

# Ends the connection.
End = Callable[[], Awaitable[None]]
# Ends it from code that is not asynchronous.
EndNow = Callable[[], None]
Call = Callable[[Any, End, EndNow], Awaitable[Any]]

_MANY = 100_000  # more rows than one message contains


class MineError(Exception):
    """What the caller's code raises when it has ended the connection."""


async def chunks(end: End) -> AsyncIterator[bytes]:
    yield b"1\n"
    await end()
    yield b"2\n"


async def chunks_that_stop(end: End) -> AsyncIterator[bytes]:
    yield b"1\n"
    await end()


async def chunks_that_fail(end: End) -> AsyncIterator[bytes]:
    yield b"1\n"
    await end()
    raise MineError


async def chunks_that_are_cancelled(end: End) -> AsyncIterator[bytes]:
    yield b"1\n"
    await end()
    raise asyncio.CancelledError


async def records(end: End) -> AsyncIterator[tuple[int]]:
    yield (1,)
    await end()
    yield (2,)


async def records_that_fail(end: End) -> AsyncIterator[tuple[int]]:
    yield (1,)
    await end()
    raise MineError


def rows(end: EndNow) -> Iterator[tuple[int]]:
    yield (0,)
    end()
    yield from ((number,) for number in range(_MANY))


def rows_that_fail(end: EndNow) -> Iterator[tuple[int]]:
    yield (0,)
    end()
    raise MineError


class File:
    """A file that ends the connection when it is read for the second time, or written to; in a thread of asyncpg's."""

    def __init__(self, end: EndNow) -> None:
        self._end = end
        self._reads = 0

    def read(self, _: int) -> bytes:
        self._reads += 1
        if self._reads == 2:
            self._end()
        return b"1\n" if self._reads < 4 else b""

    def write(self, _: bytes) -> None:
        self._end()


def sink(end: End, *, fails: bool = False) -> Callable[[bytes], Awaitable[None]]:
    async def write(_: bytes) -> None:
        await end()
        if fails:
            raise MineError

    return write


def copy_out(connection: Any, output: Any, *, number: int = _MANY) -> Awaitable[Any]:
    call: Awaitable[Any] = connection.copy_from_query(f"SELECT generate_series(1, {number})", output=output)
    return call


async def call_with_codec(
    connection: Any,
    call: Callable[[], Awaitable[Any]],
    *,
    format: str,  # noqa: A002
    **code: Callable[[Any], Any],
) -> None:
    """Run a call that encodes or decodes integers by the caller's code."""
    options = {"encoder": str, "decoder": str} | code
    await connection.set_type_codec("int4", schema="pg_catalog", format=format, **options)
    await call()


def then(end: EndNow, result: Any) -> Callable[[Any], Any]:
    def convert(_: Any) -> Any:
        end()
        if isinstance(result, Exception):
            raise result
        return result

    return convert


# Of these the caller's code is asynchronous, and runs while the statement is under way.
ASYNCHRONOUS: dict[str, Call] = {
    "source": lambda it, end, _: it.copy_to_table("ended", source=chunks(end)),
    "source that stops": lambda it, end, _: it.copy_to_table("ended", source=chunks_that_stop(end)),
    "source that fails": lambda it, end, _: it.copy_to_table("ended", source=chunks_that_fail(end)),
    "source that is cancelled": lambda it, end, _: it.copy_to_table("ended", source=chunks_that_are_cancelled(end)),
    "records": lambda it, end, _: it.copy_records_to_table("ended", records=records(end)),
    "records that fail": lambda it, end, _: it.copy_records_to_table("ended", records=records_that_fail(end)),
    "sink": lambda it, end, _: copy_out(it, sink(end)),
    "sink that fails": lambda it, end, _: copy_out(it, sink(end, fails=True)),
}
OTHERS: dict[str, Call] = {
    "sink of one chunk": lambda it, end, _: copy_out(it, sink(end), number=1),
    "rows of a COPY": lambda it, _, end: it.copy_records_to_table("ended", records=rows(end)),
    "rows of a COPY that fail": lambda it, _, end: it.copy_records_to_table("ended", records=rows_that_fail(end)),
    "file that is read": lambda it, _, end: it.copy_to_table("ended", source=File(end)),
    "file that is written": lambda it, _, end: copy_out(it, File(end)),
    "executemany": lambda it, _, end: it.executemany("INSERT INTO ended VALUES ($1)", rows(end)),
    "executemany that fails": lambda it, _, end: it.executemany("INSERT INTO ended VALUES ($1)", rows_that_fail(end)),
    "fetchmany": lambda it, _, end: it.fetchmany("SELECT $1::int4", rows(end)),
    "fetchmany that fails": lambda it, _, end: it.fetchmany("SELECT $1::int4", rows_that_fail(end)),
    "encoder": lambda it, _, end: call_with_codec(
        it, lambda: it.fetchval("SELECT $1::int4", 1), format="text", encoder=then(end, "1")
    ),
    "encoder of a COPY": lambda it, _, end: call_with_codec(
        it,
        lambda: it.copy_records_to_table("ended", records=[(1,)]),
        format="binary",
        encoder=then(end, b"\0\0\0\1"),
    ),
    "encoder of a COPY that fails": lambda it, _, end: call_with_codec(
        it,
        lambda: it.copy_records_to_table("ended", records=[(1,)]),
        format="binary",
        encoder=then(end, MineError()),
    ),
    "decoder": lambda it, _, end: call_with_codec(
        it, lambda: it.fetch("SELECT generate_series(1, 3)"), format="text", decoder=then(end, 1)
    ),
    "decoder that fails": lambda it, _, end: call_with_codec(
        it, lambda: it.fetch("SELECT generate_series(1, 3)"), format="text", decoder=then(end, MineError())
    ),
}


def cases(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in calls.items()])


async def fails(connection: Any, call: Call, end: End) -> BaseException:
    """Return what the call raises, on a connection that has ended then."""
    await connection.execute("CREATE TEMP TABLE ended (number int4)")
    async with asyncio.timeout(HANG):
        [error] = await asyncio.gather(call(connection, end, connection.terminate), return_exceptions=True)
    assert connection.is_closed()
    assert isinstance(error, BaseException)
    return error


@cases(ASYNCHRONOUS | OTHERS)
async def test_code_that_terminates_its_connection_leaves_no_report(postgres: LocalPostgres, call: Call) -> None:
    async with nothing_is_reported(), connected(postgres) as connection:

        async def end() -> None:
            connection.terminate()

        assert type(await fails(connection, call, end)) is neon_async.ConnectionLostError


@cases(ASYNCHRONOUS)
async def test_code_that_closes_its_connection_leaves_no_report_and_does_not_wait_for_itself(
    postgres: LocalPostgres, call: Call
) -> None:
    async with nothing_is_reported(), connected(postgres) as connection:

        async def end() -> None:
            with pytest.raises(TimeoutError):
                await connection.close(timeout=0.05)

        await fails(connection, call, end)


@pytest.mark.parametrize("politely", [True, False], ids=["close", "terminate"])
@cases(ASYNCHRONOUS)
async def test_code_that_ends_its_pool_leaves_no_report(postgres: LocalPostgres, call: Call, politely: bool) -> None:
    async with nothing_is_reported(), make_pool(postgres) as pool, pool.acquire() as connection:

        async def end() -> None:
            if politely:
                await pool.close(timeout=0.05)
            else:
                pool.terminate()

        await fails(connection, call, end)
