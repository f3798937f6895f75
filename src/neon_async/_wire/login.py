"""Answer the server's authentication requests in asyncpg's place, from its StartupMessage to ReadyForQuery.

This module knows messages and their order. It knows nothing of TCP, TLS or what the keys are made of.
"""

from __future__ import annotations

import asyncio
import re
import struct
from typing import TYPE_CHECKING, TypeAlias, cast

from .._errors import AuthenticationError, ConnectError, ProtocolError, ServerError, server_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from .scram import Exchange, KeyCache

# A function that tells the password: the text itself is in no variable of ours for an error tracker to record.
Secret: TypeAlias = "Callable[[], str]"  # noqa: S105

# Messages before AuthenticationOk are short: libpq allows 2,000 bytes, for errors 30,000 (fe-connect.c), and servers
# stay far below both. A server that talks on and on is none.
_MAX_MESSAGE = 8192
_MAX_BUFFERED = 8 * _MAX_MESSAGE
_MAX_NOTICES = 16  # PostgreSQL sends none here

# What may come between AuthenticationOk and the first ReadyForQuery, and its form (PostgreSQL documentation, sections
# 54.2.1 and 54.7; protocol 3.0).
_AFTER_LOGIN = {
    b"S": rb"[^\0]+\0[^\0]*\0",  # ParameterStatus: name and value
    b"K": rb"(?s:.{8})",  # BackendKeyData: process and secret key
    b"N": rb"(?:[^\0]+\0)*\0",  # NoticeResponse: fields
    b"Z": rb"I",  # ReadyForQuery, outside of a transaction
}

# PostgreSQL documentation, section 54.7, Authentication*.
_OK, _SASL, _SASL_CONTINUE, _SASL_FINAL = 0, 10, 11, 12
_REQUESTS = {
    _OK: "let us in without authentication, or before its end",
    2: "asked for Kerberos V5",
    3: "asked for the password in cleartext",
    5: "asked for the password as an MD5 hash",
    7: "asked for GSSAPI",
    8: "went on with GSSAPI",
    9: "asked for SSPI",
    _SASL: "asked for SASL once more",
    _SASL_CONTINUE: "went on with a SASL exchange that is not at this point",
    _SASL_FINAL: "ended a SASL exchange that is not at this point",
}


class ServerAsksOtherwiseError(Exception):
    """The server does not go on with an exchange that was begun before it asked. Dial once more, and wait this time."""


class Logins:
    """What earlier logins to one server have taught: the mechanism it wants, and the keys of its passwords."""

    def __init__(self) -> None:
        self.mechanism: str | None = None
        self.keys: KeyCache | None = None


class Mailbox(asyncio.Protocol):
    """Takes what the server sends before the session is ready, and hands it out message by message."""

    transport: asyncio.Transport

    def __init__(self, host: str) -> None:
        self._host = host
        self._received = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._end: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # by its methods; uvloop's has another base

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > _MAX_BUFFERED:
            self._end = ProtocolError(f"{self._host} sent more during authentication than any server does; refused.")
            self.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end = self._end or exc or ConnectError(f"{self._host} closed the connection during authentication.")
        self._wake()

    async def closed(self) -> None:
        while self._end is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def abort(self) -> None:
        """Drop the connection at once."""
        self.transport.abort()

    def require_silence(self) -> None:
        """Raise where the server has spoken before its turn, or has gone."""
        if self._received:
            raise ProtocolError(f"{self._host} spoke before it was asked, as no PostgreSQL server does.")
        if self._end:
            raise self._end

    def send(self, payload: bytes) -> None:
        """Send a SASLInitialResponse or SASLResponse."""
        self.transport.write(struct.pack("!ci", b"p", 4 + len(payload)) + payload)

    async def request(self, code: int) -> bytes:
        """Return the data of the next authentication request and take it out.

        Raises `AuthenticationError` unless it is the one with `code`, and what an ErrorResponse in its place says.
        """
        data = await self._peek(code)
        del self._received[: 9 + len(data)]
        return data

    async def hand_over(self, protocol: asyncio.Protocol) -> None:
        """Wait for AuthenticationOk and the ReadyForQuery behind it; then they, and all that follows, are `protocol`'s.

        Between the two stand the session's settings and cancel key. An authentication request there crashes the process
        with asyncpg 0.32, and has no business there.
        """
        position, kind = 9 + len(await self._peek(_OK)), b"R"
        while kind != b"Z":
            kind, body = await self._message(position)
            position += 5 + len(body)
            if kind == b"E":
                raise server_error(body)
            if kind not in _AFTER_LOGIN or not re.fullmatch(_AFTER_LOGIN[kind], body):
                raise ProtocolError(f"{self._host} sent message {kind!r} behind the login, where it has no place.")
        if self._end:  # the transport has told us, and would tell nobody else
            raise self._end
        self.transport.set_protocol(protocol)
        try:
            protocol.data_received(bytes(self._received))
        except Exception:  # noqa: BLE001  asyncpg's parser, on what no PostgreSQL sends
            raise ProtocolError(f"{self._host} sent something malformed behind the login.") from None
        self._received.clear()

    async def _peek(self, code: int) -> bytes:
        """Return the data of the next authentication request, and leave it where it is."""
        kind, body = await self._message()
        for _ in range(_MAX_NOTICES):
            if kind != b"N":  # NoticeResponse: nobody is there to read it yet
                break
            del self._received[: 5 + len(body)]
            kind, body = await self._message()
        if kind == b"E":
            raise server_error(body)
        if kind != b"R" or len(body) < 4:
            raise ProtocolError(f"{self._host} sent message {kind!r} during authentication, where it has no place.")
        asked = int.from_bytes(body[:4], "big")
        if asked != code:
            raise AuthenticationError(
                f"{self._host} {_REQUESTS.get(asked, f'asked for the unknown authentication method {asked}')}; only "
                "SCRAM-SHA-256, complete and in its order, is answered. No password was sent. Check the server."
            )
        return body[4:]

    async def _message(self, position: int = 0) -> tuple[bytes, bytes]:
        """Return type and body of the message at `position`, once all of it is there."""
        while True:
            if len(self._received) >= position + 5:
                kind, length = struct.unpack_from("!ci", self._received, position)
                if not 4 <= length <= _MAX_MESSAGE:
                    raise ProtocolError(
                        f"{self._host} announced a message of {length} bytes during authentication; refused."
                    )
                if len(self._received) >= position + 1 + length:
                    return kind, bytes(self._received[position + 5 : position + 1 + length])
            if self._end:
                raise self._end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


async def log_in(
    mailbox: Mailbox,
    *,
    host: str,
    certificate: bytes,
    channel_binding: str,
    secret: Secret,
    logins: Logins,
    early: str | None,
) -> str:
    """Go through one SCRAM exchange, up to where AuthenticationOk must follow, and return its mechanism.

    With `early`, a mechanism, the exchange begins right behind the StartupMessage, one round trip sooner. Raises
    `ServerAsksOtherwiseError` when the server, having heard that, wants something else.
    """
    from .scram import PLUS, Exchange, binding_data, choose_mechanism  # scramp takes 50 ms to import; see prepare()

    binding = binding_data(certificate)
    if early == PLUS and binding is None:  # the server has another certificate now
        early = None
    exchange = _begin(mailbox, Exchange(early, binding=binding, host=host)) if early else None
    offer: bytes | None = None
    try:
        offer = await mailbox.request(_SASL)
        mechanism = choose_mechanism(
            offer.decode("ascii", "replace").split("\0"),
            can_bind=binding is not None,
            required=channel_binding == "require",
            host=host,
        )
        if exchange is None:
            exchange = _begin(mailbox, Exchange(mechanism, binding=binding, host=host))
        elif exchange.mechanism != mechanism:
            raise ServerAsksOtherwiseError
        challenge = await mailbox.request(_SASL_CONTINUE)
    except (AuthenticationError, ServerError) as error:
        # A refusal in place of an offer is about the endpoint or the user, and would only come once more.
        if early and (offer is not None or isinstance(error, AuthenticationError)):
            raise ServerAsksOtherwiseError from None
        raise
    await _prove(mailbox, exchange, challenge, secret, logins)
    return exchange.mechanism


def _begin(mailbox: Mailbox, exchange: Exchange) -> Exchange:
    first = exchange.first()
    mailbox.send(exchange.mechanism.encode() + struct.pack("!xi", len(first)) + first)
    return exchange


async def _prove(mailbox: Mailbox, exchange: Exchange, challenge: bytes, secret: Secret, logins: Logins) -> None:
    """Prove that we know the password, and have the server prove it."""
    from .scram import KeyCache, Keys

    salt, iterations = exchange.challenge(challenge)
    cache = logins.keys = logins.keys or KeyCache()
    keys = cache.get(secret, salt, iterations)
    if keys is None:  # PBKDF2 takes milliseconds, or as many seconds as the server likes: off the event loop
        keys = await asyncio.get_running_loop().run_in_executor(None, Keys, secret, salt, iterations)
    mailbox.require_silence()
    mailbox.send(exchange.final(keys))
    try:
        exchange.finish(await mailbox.request(_SASL_FINAL))
    except (AuthenticationError, ServerError):
        cache.evict(secret)
        raise
    cache.put(secret, salt, iterations, keys)
