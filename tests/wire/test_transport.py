"""The session's transport counts writes, and passes everything on to the transport below."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any
from unittest.mock import Mock

import pytest

from neon_async._wire.transport import SessionTransport

# Every public method of asyncio's transports, and arguments to call it with.
CALLS: dict[str, tuple[Any, ...]] = {
    "abort": (),
    "can_write_eof": (),
    "close": (),
    "get_extra_info": ("peername", "a default"),
    "get_protocol": (),
    "get_write_buffer_limits": (),
    "get_write_buffer_size": (),
    "is_closing": (),
    "is_reading": (),
    "pause_reading": (),
    "resume_reading": (),
    "set_protocol": (asyncio.Protocol(),),
    "set_write_buffer_limits": (1, 2),
    "write": (b"data",),
    "write_eof": (),
    "writelines": ([b"da", b"ta"],),
}


def test_the_table_contains_every_method_of_a_transport() -> None:
    methods = inspect.getmembers(asyncio.Transport, inspect.isfunction)
    assert set(CALLS) == {name for name, _ in methods if not name.startswith("_")}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_passed_on_with_its_arguments_and_result(name: str) -> None:
    below = Mock(spec=asyncio.Transport)
    transport = SessionTransport(below)
    result = getattr(transport, name)(*CALLS[name])
    method = getattr(below, name)
    method.assert_called_once_with(*CALLS[name])
    if inspect.signature(getattr(asyncio.Transport, name)).return_annotation is not None and result is not None:
        assert result is method.return_value


def test_each_write_counts_and_nothing_else_does() -> None:
    transport = SessionTransport(Mock(spec=asyncio.Transport))
    for name, arguments in CALLS.items():
        before = transport.writes
        getattr(transport, name)(*arguments)
        assert transport.writes - before == (name in ("write", "writelines"))


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (1, 1), (16, 16), (17, 16), (32, 17), (160, 25)])
@pytest.mark.parametrize("size", [1, 7, 1000], ids="{} messages in a piece".format)
def test_flush_follows_the_first_execute_messages_and_then_one_in_sixteen(
    number: int, expected: int, size: int
) -> None:
    """And the batch is the same otherwise, whatever the arguments contain."""
    bind, execute, sync = b"B\0\0\0\x0dE\0\0\0\x09\0\0\0\0", b"E\0\0\0\x09\0\0\0\0\0", b"S\0\0\0\x04"
    messages = [bind, execute] * number + [sync]
    batches = [memoryview(b"".join(messages[at : at + size])) for at in range(0, len(messages), size)]
    below = Mock(spec=asyncio.Transport)
    transport = SessionTransport(below)
    for _ in range(2):  # each batch is counted anew
        transport.flush_executes(True)
        below.writelines.reset_mock()
        for batch in batches:
            transport.writelines([batch])
        sent = b"".join(piece for call in below.writelines.call_args_list for piece in call.args[0])
        assert sent.replace(execute + b"H\0\0\0\x04", execute) == b"".join(messages)
        assert sent.count(execute + b"H\0\0\0\x04") == expected
    transport.flush_executes(False)
    transport.writelines(batches)
    assert below.writelines.call_args.args[0] is batches


def test_the_write_buffer_limits_have_defaults() -> None:
    below = Mock(spec=asyncio.Transport)
    SessionTransport(below).set_write_buffer_limits()
    below.set_write_buffer_limits.assert_called_once_with(None, None)
