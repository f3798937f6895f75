"""Servers with a good certificate, scripted from the StartupMessage on."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

import neon_async
from neon_async.testing._impostor import Conversation, Impostor, Script, login, server_context
from support.logins import BOTH, HonestServer, sasl
from support.probes import HANG
from support.signatures import Signed, signed

__all__ = (
    "BINDING",
    "CERTIFICATE",
    "PASSWORD",
    "connect_to",
    "error_from",
    "final",
    "record_pbkdf2",
    "verified_server",
)

PASSWORD = "correct-horse-battery-staple"
CERTIFICATE = signed(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
BINDING = hashlib.sha256(CERTIFICATE.der).digest()


def verified_server(*steps: bytes | Script, certificate: Signed = CERTIFICATE) -> Impostor:
    """Return a server that does TLS honestly, reads the StartupMessage, and continues with `steps`."""
    script = login(server_context(certificate.chain), *steps)
    return Impostor(script, trust_anchor=certificate.anchor, password=PASSWORD)


def final(make: Callable[[bytes], bytes]) -> Script:
    """Return a step that is honest up to SASLFinal, which it replaces by what `make` returns."""

    def step(conversation: Conversation) -> None:
        server = HonestServer(PASSWORD, binding=BINDING)
        conversation.send(sasl(*BOTH))
        conversation.send(server.challenge(conversation.read_message()[1]))
        conversation.send(make(server.final(conversation.read_message()[1])))

    return step


async def connect_to(server: Impostor, **keywords: Any) -> asyncpg.Connection[Any]:
    """Return a connection to `server`; a hang fails the test."""
    async with asyncio.timeout(HANG):
        connection: asyncpg.Connection[Any]
        connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor, **keywords)
        return connection


async def error_from(server: Impostor, **keywords: Any) -> Exception:
    """Return the error with which a connection to `server` is refused; a connection fails the test."""
    try:
        connection = await connect_to(server, **keywords)
    except (neon_async.NeonAsyncError, asyncpg.PostgresError) as error:
        return error
    connection.terminate()
    raise AssertionError("the server was accepted")


def record_pbkdf2(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that gets the thread and the iteration count of every PBKDF2 of this process, as it begins."""
    calls: list[tuple[int, int]] = []
    genuine = hashlib.pbkdf2_hmac
    HonestServer(PASSWORD)  # what the servers of the tests need is computed before

    def record(name: str, password: bytes, salt: bytes, iterations: int, dklen: int | None = None) -> bytes:
        calls.append((threading.get_ident(), iterations))
        return genuine(name, password, salt, iterations, dklen)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", record)
    return calls
