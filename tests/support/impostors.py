"""Impostors of every kind, and the checks that every refusal must pass."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import secrets
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import neon_async
from neon_async import NeonAsyncError
from neon_async.testing._impostor import (
    SSL_REQUEST,
    Conversation,
    Impostor,
    Script,
    authentication_request,
    message,
    play,
    server_context,
)
from support.certificates import Presented, issue, present, root

__all__ = (
    "CLEARTEXT",
    "DEFAULT",
    "DIRECT",
    "HANG",
    "LIE",
    "MECHANISM",
    "NOTHING",
    "OK",
    "PASSWORD",
    "POSTGRES",
    "PROOF",
    "READY",
    "STARTUP",
    "Error",
    "Misbehaviour",
    "accept",
    "check_refusal",
    "endless",
    "good_chain",
    "good_context",
    "hang_up",
    "in_each_negotiation",
    "login_after",
    "messages_of",
    "refusal",
    "refuse",
    "reset",
    "see",
    "trickle",
)

PASSWORD = secrets.token_hex(12)
LIE = "call 555-0199 to unlock this database"  # a client must not pass this on as the server's word
SILENT_TIMEOUT = 1.0  # seconds, for the impostors that only the deadline reveals
HANG = 10.0  # seconds after which a test counts as hanging

# libpq's values of sslnegotiation; the default is direct, and the other for a server that does not speak it.
DIRECT, POSTGRES, DEFAULT = "direct", "postgres", "default"
Error = type[NeonAsyncError] | type[asyncpg.PostgresError]

# What the client sends inside TLS.
NOTHING: tuple[str, ...] = ()
STARTUP = ("StartupMessage",)
MECHANISM = (*STARTUP, "SASLInitialResponse")
PROOF = (*MECHANISM, "SASLResponse")

OK = authentication_request(0)
READY = message(b"Z", b"I")
CLEARTEXT = authentication_request(3)


@dataclass(frozen=True)
class Misbehaviour:
    """What an impostor does, and the refusal that must follow.

    Attributes:
        id: The test's ID.
        script: What the impostor does.
        error: The class that is raised, by negotiation where that matters.
        text: A part of its message.
        sends: Everything that the client may send inside TLS.
        silent: Whether only the deadline can reveal the impostor.
        hasty: Whether the impostor is so quick that the client may have sent only its StartupMessage.
    """

    id: str
    script: Script
    error: Error | Mapping[str, Error]
    text: str = ""
    sends: tuple[str, ...] = NOTHING
    silent: bool = False
    hasty: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# The checks


async def refusal(
    impostor: Impostor, negotiation: str = DEFAULT, *, silent: bool = False, **keywords: Any
) -> NeonAsyncError | asyncpg.PostgresError:
    """Return the error with which a connection to `impostor` is refused; any other outcome fails the test."""
    if negotiation != DEFAULT:
        keywords["sslnegotiation"] = negotiation
    timeout = SILENT_TIMEOUT if silent else HANG - 1
    async with asyncio.timeout(HANG):
        with pytest.raises((NeonAsyncError, asyncpg.PostgresError)) as caught:
            await neon_async.connect(
                impostor.dsn, trust_anchor=impostor.trust_anchor, connect_timeout=timeout, **keywords
            )
    assert isinstance(caught.value, NeonAsyncError | asyncpg.PostgresError)
    return caught.value


async def check_refusal(
    error: Exception,
    impostor: Impostor,
    sends: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    *,
    hasty: bool = False,
) -> None:
    """Check what must hold for every refusal: a public class, no secret anywhere, no plaintext, nothing left open."""
    home = neon_async if isinstance(error, NeonAsyncError) else asyncpg
    assert getattr(home, type(error).__name__, None) is type(error), "this class is not public"
    if isinstance(error, NeonAsyncError):
        assert impostor.host in str(error)
    assert list(leaks(error, impostor.password)) == []
    assert LIE not in " ".join(texts(error))
    *earlier, last = await impostor.finish()
    assert all(one.closed_by_client for one in (*earlier, last)), "a socket was left open"
    assert all(outside_tls(one) in (b"", SSL_REQUEST) for one in (*earlier, last))
    assert [messages_of(one) for one in earlier] == [NOTHING] * len(earlier)
    assert messages_of(last) == sends or (hasty and messages_of(last) == STARTUP)
    assert impostor.password.encode() not in b"".join(one.wire + one.decrypted for one in (*earlier, last))
    gc.collect()
    await asyncio.sleep(0)  # finalizers may report to the loop
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    # A pool warns once that it cannot connect.
    assert [record.getMessage() for record in warnings if getattr(record, "event", "") != "outage_began"] == []
    assert impostor.password not in caplog.text


def outside_tls(conversation: Conversation) -> bytes:
    """Return what the client sent that is not part of a TLS record. An abort may have cut the last record off."""
    found, rest = b"", bytes(conversation.wire)
    while rest:
        size = 5 + int.from_bytes(rest[3:5])
        if 20 <= rest[0] <= 23 and b"\x03".startswith(rest[1:2]):
            rest = rest[size:]
        else:
            found, rest = found + rest[:1], rest[1:]
    return found


def messages_of(conversation: Conversation) -> tuple[str, ...]:
    """Return the names of the messages that the client sent inside TLS; any other message fails the test."""
    names: list[str] = []
    rest = bytes(conversation.decrypted)
    while rest:
        start = 1 if names else 0  # the first one is the only one without a type
        size = start + int.from_bytes(rest[start : start + 4])
        names.append(name_of(rest[:size]))
        rest = rest[size:]
    return tuple(names)


KNOWN_MESSAGES = {
    "StartupMessage": rb"....\x00\x03\x00\x00client_encoding\x00'utf-8'\x00user\x00alex\x00database\x00neondb\x00\x00",
    "SASLInitialResponse": rb"p....SCRAM-SHA-256(-PLUS)?\x00....(n|y|p=tls-server-end-point),,n=(alex|\*)?,r=[^,\s]+",
    "SASLResponse": rb"p....c=[a-z0-9+/]+=*,r=[^,\s]+,p=[A-Za-z0-9+/]{43}=",
    "Terminate": rb"X\x00\x00\x00\x04",
}


def name_of(data: bytes) -> str:
    for name, pattern in KNOWN_MESSAGES.items():
        if re.fullmatch(pattern, data, re.DOTALL | re.IGNORECASE):
            return name
    raise AssertionError(f"the client sent {data!r}")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    if error is not None:
        yield error
        yield from chain(error.__cause__)
        yield from chain(error.__context__)


def texts(error: BaseException) -> Iterator[str]:
    """Yield everything that an error tracker would record of `error`, except for its frames."""
    for one in chain(error):
        yield from (str(one), repr(one), repr(one.args), repr(vars(one)))


def leaks(error: BaseException, secret: str) -> Iterator[str]:
    """Yield every place in the chain of `error` where `secret` appears, with the locals of our own frames."""
    yield from (text for text in texts(error) if secret in text)
    ours = str(Path(neon_async.__file__).parent)
    for one in chain(error):
        traceback = one.__traceback__
        while traceback:
            frame, traceback = traceback.tb_frame, traceback.tb_next
            if frame.f_code.co_filename.startswith(ours):
                found = (name for name, value in frame.f_locals.items() if secret in repr(value))
                yield from (f"{name} in {frame.f_code.co_name}()" for name in found)


async def refuse(it: Misbehaviour, negotiation: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a connection to the impostor of `it` is refused as it must be."""
    async with Impostor(it.script, trust_anchor=good_chain().anchor, password=PASSWORD) as impostor:
        error = await refusal(impostor, negotiation, silent=it.silent)
        assert type(error) is (it.error[negotiation] if isinstance(it.error, Mapping) else it.error), error
        assert it.text in str(error)
        await check_refusal(error, impostor, it.sends, caplog, hasty=it.hasty)


def in_each_negotiation(table: tuple[Misbehaviour, ...]) -> list[Any]:
    """Return the impostors of `table`, each under every negotiation that it is meant for."""
    return [
        pytest.param(it, negotiation, id=f"{it.id}-{negotiation}")
        for it in table
        for negotiation in (it.error if isinstance(it.error, Mapping) else (DIRECT, POSTGRES, DEFAULT))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Steps of scripts

see = Conversation.opens_with_tls  # takes an SSLRequest, leaves a ClientHello
hang_up = Conversation.hang_up
reset = Conversation.reset


def trickle(data: bytes) -> Script:
    """Return a step that sends a byte now and then, often enough for any timer that restarts with each."""

    def step(conversation: Conversation) -> None:
        for byte in data:
            if conversation.over.wait(0.1):
                return
            conversation.send(bytes([byte]))

    return step


def endless(data: bytes) -> Script:
    """Return a step that sends `data` until the client closes the connection."""

    def step(conversation: Conversation) -> None:
        while not conversation.over.is_set():
            conversation.send(data)

    return step


@cache
def good_chain() -> Presented:
    return present(issue(root()))


@cache
def good_context() -> ssl.SSLContext:
    return server_context(good_chain().chain)


def accept(make: Callable[[], ssl.SSLContext]) -> Script:
    """Return a step that accepts TLS under the context that `make` returns."""
    return lambda conversation: conversation.accept_tls(make())


def login_after(accept_tls: Script, *steps: bytes | Script) -> Script:
    """Return a script that accepts TLS, reads the StartupMessage, and continues with `steps`."""
    return play(accept_tls, Conversation.read_startup, *steps)
