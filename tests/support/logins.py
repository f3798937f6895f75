"""The server's side of a login, for servers that are honest up to a point, and passwords that are hard to prepare."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import struct
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import pytest
from scramp import ScramMechanism

from neon_async.testing._impostor import Conversation, Script, authentication_request, message

__all__ = (
    "BOTH",
    "OK",
    "PASSWORDS",
    "PLAIN",
    "PLUS",
    "READY",
    "SESSION_START",
    "HonestServer",
    "client_messages",
    "honest_login",
    "in_turn",
    "sasl",
    "verifier",
)

PLAIN: Final = "SCRAM-SHA-256"
PLUS: Final = "SCRAM-SHA-256-PLUS"
BOTH = [PLUS, PLAIN]  # PostgreSQL's offer

OK = authentication_request(0)
READY = message(b"Z", b"I")
SESSION_START = (
    message(b"S", b"server_version\x0017.10\0")
    + message(b"S", b"application_name\0from the honest server\0")
    + message(b"K", struct.pack("!ii", 4711, 42))
    + READY
)


def sasl(*mechanisms: str) -> bytes:
    """Return the request that offers `mechanisms`."""
    return authentication_request(10, b"".join(name.encode() + b"\0" for name in mechanisms) + b"\0")


class HonestServer:
    """The server's side of one SCRAM exchange, by scramp, without I/O; it knows the password.

    `binding` is the `tls-server-end-point` of its certificate, for PLUS. `server_signature` is None until the end.
    """

    salt = b"sixteen bytes of"

    def __init__(self, password: str, *, binding: bytes | None = None, iterations: int = 4096) -> None:
        self._binding = binding
        self._account = _account(password, iterations)
        self._server: Any = None

    def challenge(self, initial_response: bytes) -> bytes:
        """Process the body of a SASLInitialResponse, and return SASLContinue."""
        mechanism, _, rest = initial_response.partition(b"\0")
        bound = mechanism.decode() == PLUS
        self._server = ScramMechanism(mechanism.decode()).make_server(
            lambda _: self._account,
            channel_binding=("tls-server-end-point", self._binding) if bound else None,
        )
        self._server.set_client_first(rest[4:].decode())
        return authentication_request(11, self._server.get_server_first().encode())

    def final(self, response: bytes) -> bytes:
        """Process the body of a SASLResponse, and return SASLFinal."""
        self._server.set_client_final(response.decode())
        return authentication_request(12, self._server.get_server_final().encode())

    @property
    def server_signature(self) -> bytes | None:
        signature: bytes | None = self._server and self._server.server_signature
        return signature


@cache
def _account(password: str, iterations: int) -> tuple[bytes, bytes, bytes, int]:
    mechanism, salt = ScramMechanism(PLAIN), HonestServer.salt
    account: tuple[bytes, bytes, bytes, int] = mechanism.make_auth_info(password, iterations, salt)
    return account


def honest_login(
    password: str,
    *,
    offer: Sequence[str] = (PLUS, PLAIN),
    binding: bytes | None = None,
    last: bytes = OK + SESSION_START,
) -> Script:
    """Return a step that accepts a client who knows the password. `last` is sent together with SASLFinal."""

    def step(conversation: Conversation) -> None:
        server = HonestServer(password, binding=binding)
        conversation.send(sasl(*offer))
        conversation.send(server.challenge(conversation.read_message()[1]))
        conversation.send(server.final(conversation.read_message()[1]) + last)

    return step


def in_turn(*scripts: Script) -> Script:
    """Return a script that plays the next of `scripts` for each connection, and the last one from then on."""
    waiting = list(scripts)

    def script(conversation: Conversation) -> None:
        (waiting.pop(0) if len(waiting) > 1 else waiting[0])(conversation)

    return script


_PATTERNS = {
    "SASLInitialResponse": rb"SCRAM-SHA-256(-PLUS)?\0....(n|y|p=tls-server-end-point),,n=\*,r=[!-+\--~]{18,}",
    "SASLResponse": rb"c=[A-Za-z0-9+/]+={0,2},r=[!-+\--~]+,p=[A-Za-z0-9+/]{43}=",
    "Query": rb"[^\0]*\0",
    "Terminate": rb"",
}


def client_messages(sent: bytes | bytearray) -> list[str]:
    """Return the names of the messages that a client has sent inside TLS; an unknown message appears as its body."""
    names: list[str] = []
    rest = bytes(sent)
    while rest:
        if not names:
            (size,) = struct.unpack_from("!I", rest)
            assert b"user\0" in rest[:size]
            names.append("StartupMessage")
        else:
            kinds = {b"p": ("SASLInitialResponse", "SASLResponse"), b"Q": ("Query",), b"X": ("Terminate",)}
            size = 1 + int(struct.unpack_from("!I", rest, 1)[0])
            body = rest[5:size]
            names += [name for name in kinds[rest[:1]] if re.fullmatch(_PATTERNS[name], body, re.DOTALL)] or [
                repr(body)
            ]
        rest = rest[size:]
    return names


def verifier(password: bytes, *, iterations: int = 4096) -> str:
    """Return what PostgreSQL stores for a password (its documentation, section 51.8, pg_authid)."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password, salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    keys = (stored, hmac.digest(salted, b"Server Key", "sha256"))
    return f"SCRAM-SHA-256${iterations}:{b64encode(salt).decode()}$" + ":".join(b64encode(key).decode() for key in keys)


# Passwords, and the bytes that PostgreSQL hashes for them: SASLprep of the password, or its raw bytes.
PASSWORDS = [
    pytest.param("plain", b"plain", id="ascii"),
    pytest.param(" \t\x01\x1f\x7f ", b" \t\x01\x1f\x7f ", id="ascii-control-characters-stay"),
    pytest.param("'\"\\,=%$", b"'\"\\,=%$", id="punctuation"),
    pytest.param("\u00aa", b"a", id="nfkc"),
    pytest.param("\u2168", b"IX", id="nfkc-roman-number"),
    pytest.param("e\u0301", "\u00e9".encode(), id="nfkc-composes"),
    pytest.param("\ufb01\u00e9", "fi\u00e9".encode(), id="nfkc-ligature"),
    pytest.param("I\u00adX", b"IX", id="mapped-to-nothing"),
    pytest.param("\u00ad\u00ad", "\u00ad\u00ad".encode(), id="nothing-left-so-raw"),
    pytest.param("a\u00a0b", b"a b", id="another-space"),
    pytest.param("a\u200bb", b"a b", id="zero-width-space-is-a-space"),
    pytest.param("a\u200db\u00e9", "ab\u00e9".encode(), id="zero-width-joiner-is-nothing"),
    pytest.param("a\u00e9\x07", "a\u00e9\x07".encode(), id="control-character-so-raw"),
    pytest.param("\u2168\x7f", "\u2168\x7f".encode(), id="control-character-so-raw-throughout"),
    pytest.param("\u2168\ue000", "\u2168\ue000".encode(), id="private-use-so-raw"),
    pytest.param("\u2168\ufffd", "\u2168\ufffd".encode(), id="replacement-character-so-raw"),
    pytest.param("\u2168\u200e", "\u2168\u200e".encode(), id="direction-mark-so-raw"),
    pytest.param("\u2168\U000e0041", "\u2168\U000e0041".encode(), id="tag-so-raw"),
    pytest.param("\u2168\u0221", "\u2168\u0221".encode(), id="unassigned-in-unicode-3.2-so-raw"),
    pytest.param("\u2168\U0001f40e", "\u2168\U0001f40e".encode(), id="emoji-so-raw"),
    pytest.param("a\u0340", "a\u0340".encode(), id="prohibited-although-nfkc-would-replace-it"),
    pytest.param("\u05d0\u05d1", "\u05d0\u05d1".encode(), id="right-to-left"),
    pytest.param("\u05d0\u2168\u05d1", "\u05d0\u2168\u05d1".encode(), id="right-to-left-with-latin-so-raw"),
    pytest.param("\u06271\u00aa", "\u06271\u00aa".encode(), id="right-to-left-with-another-end-so-raw"),
    pytest.param("\u0627\u00b2\u0628", "\u06272\u0628".encode(), id="right-to-left-with-a-digit"),
    pytest.param("\ufb1d", "\u05d9\u05b4".encode(), id="right-to-left-until-nfkc"),
    pytest.param("a\u2135", "a\u05d0".encode(), id="left-to-right-until-nfkc"),
    pytest.param("\u00aa" * 300, b"a" * 300, id="long"),
]
