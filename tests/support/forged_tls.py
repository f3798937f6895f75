"""The server's side of a TLS 1.3 handshake without a TLS library: certificates without their keys, false ALPN answers.

Without sockets; `script()` plays it through an `Impostor`. RFC 8446, with one cipher suite and one group.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from neon_async.testing._impostor import Conversation, Script

__all__ = ("ECDSA_P256", "ECDSA_P384", "RSA_PSS", "ForgedServer", "receive_record", "script")

RSA_PSS, ECDSA_P256, ECDSA_P384 = 0x0804, 0x0403, 0x0503  # signature schemes, RFC 8446 section 4.2.3

_X25519 = 0x001D
_AES_128_GCM_SHA256 = b"\x13\x01"
_HANDSHAKE, _APPLICATION_DATA = 22, 23
_KEY_UPDATE = b"\x18"  # the type of the handshake message, section 4
_SERVER_CONTEXT = b" " * 64 + b"TLS 1.3, server CertificateVerify\0"  # section 4.4.3


class ForgedServer:
    """One handshake.

    Args:
        certificates: What is presented, in DER, the leaf first. The keys are not needed.
        scheme: The signature scheme that the CertificateVerify claims.
        sign: Returns the signature of the CertificateVerify. Default: a wrong one.
        alpn: The protocol that the server claims to have selected, or None for no answer.
        first_words: Sent inside TLS right after the handshake, before the client can have sent anything.
        later: Returns records that the server sends without end, once the client has sent its first message.
    """

    def __init__(
        self,
        certificates: Sequence[bytes],
        *,
        scheme: int,
        sign: Callable[[bytes], bytes] = lambda _: secrets.token_bytes(70),
        alpn: bytes | None = b"postgresql",
        first_words: bytes = b"",
        later: Callable[[Traffic], bytes] | None = None,
    ) -> None:
        self._certificates = certificates
        self._scheme = scheme
        self._sign = sign
        self._alpn = alpn
        self._first_words = first_words
        self.later = later
        self._transcript = b""
        self._readers: list[Traffic] = []
        self.writer: Traffic

    def answer(self, client_hello: bytes) -> bytes:
        """Return the server's whole flight for the record that holds the ClientHello."""
        self._transcript = client_hello[5:]
        key = X25519PrivateKey.generate()
        session_id, client_share = _read_client_hello(self._transcript)
        server_hello = self._say(2, _server_hello(session_id, key.public_key().public_bytes_raw()))
        handshake = _extract(_derive(_extract(bytes(32), bytes(32)), b"derived", b""), key.exchange(client_share))
        client_secret = _derive(handshake, b"c hs traffic", self._transcript)
        server_secret = _derive(handshake, b"s hs traffic", self._transcript)
        flight = self._say(8, _vector(2, _alpn(self._alpn)))
        flight += self._say(11, b"\0" + _vector(3, b"".join(_vector(3, der) + b"\0\0" for der in self._certificates)))
        signature = self._sign(_SERVER_CONTEXT + hashlib.sha256(self._transcript).digest())
        flight += self._say(15, struct.pack("!H", self._scheme) + _vector(2, signature))
        flight += self._say(20, _mac(_expand(server_secret, b"finished"), hashlib.sha256(self._transcript).digest()))
        master = _extract(_derive(handshake, b"derived", b""), bytes(32))
        self._readers = [Traffic(client_secret), Traffic(_derive(master, b"c ap traffic", self._transcript))]
        records = _record(_HANDSHAKE, server_hello) + Traffic(server_secret).seal(_HANDSHAKE, flight)
        self.writer = Traffic(_derive(master, b"s ap traffic", self._transcript))
        if self._first_words:
            records += self.writer.seal(_APPLICATION_DATA, self._first_words)
        return records

    def open(self, record: bytes) -> tuple[int, bytes]:
        """Return content type and content of a record that the client sent after its ClientHello."""
        if record[0] != _APPLICATION_DATA:
            return record[0], record[5:]
        kind, content = self._readers[0].open(record)
        if kind == _HANDSHAKE and content.startswith(_KEY_UPDATE):
            self._readers[0].use_next_key()
        elif kind == _HANDSHAKE:  # its Finished: from here on it uses the key for application data
            self._readers.pop(0)
        return kind, content

    def _say(self, kind: int, body: bytes) -> bytes:
        handshake_message = bytes([kind]) + _vector(3, body)
        self._transcript += handshake_message
        return handshake_message


def script(make: Callable[[], ForgedServer]) -> Script:
    """Return a script that plays the server from `make`; what the client sends inside TLS ends up in `decrypted`."""

    def play(conversation: Conversation) -> None:
        conversation.consent_to_tls()
        server = make()
        conversation.send(server.answer(receive_record(conversation)))
        while True:
            kind, content = server.open(receive_record(conversation))
            if kind == _APPLICATION_DATA:
                conversation.decrypted += content
                while server.later is not None and not conversation.over.is_set():
                    conversation.send(server.later(server.writer))

    return play


class Traffic:
    """The record protection of one direction, section 5.2."""

    def __init__(self, secret: bytes) -> None:
        self._set_secret(secret)

    def _set_secret(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(_expand(secret, b"key", 16))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12))
        self._sequence = 0

    def _nonce(self) -> bytes:
        self._sequence += 1
        return (self._iv ^ (self._sequence - 1)).to_bytes(12)

    def seal(self, kind: int, content: bytes) -> bytes:
        header = struct.pack("!BHH", _APPLICATION_DATA, 0x0303, len(content) + 17)
        return header + self._cipher.encrypt(self._nonce(), content + bytes([kind]), header)

    def open(self, record: bytes) -> tuple[int, bytes]:
        content = self._cipher.decrypt(self._nonce(), record[5:], record[:5]).rstrip(b"\0")
        return content[-1], content[:-1]

    def update_key(self, *, requested: bool = False) -> bytes:
        """Return a record with a KeyUpdate, and use the next key from then on (sections 4.6.3 and 7.2)."""
        record = self.seal(_HANDSHAKE, _KEY_UPDATE + b"\0\0\x01" + bytes([requested]))
        self.use_next_key()
        return record

    def use_next_key(self) -> None:
        """Use the key that follows a KeyUpdate."""
        self._set_secret(_expand(self._secret, b"traffic upd"))

    def issue_tickets(self, count: int) -> bytes:
        """Return one record with this many NewSessionTickets (section 4.6.1)."""
        ticket = struct.pack("!II", 3600, 0) + _vector(1, b"n") + _vector(2, b"t") + _vector(2, b"")
        return self.seal(_HANDSHAKE, (b"\x04" + _vector(3, ticket)) * count)

    def send_nothing(self) -> bytes:
        """Return a record of application data without content, which is padding alone (section 5.4)."""
        return self.seal(_APPLICATION_DATA, b"")


def receive_record(conversation: Conversation) -> bytes:
    """Return the client's next record, header and all."""
    header = conversation.receive(5)
    return header + conversation.receive(int.from_bytes(header[3:]))


def _read_client_hello(handshake_message: bytes) -> tuple[bytes, X25519PublicKey]:
    rest = handshake_message[4 + 2 + 32 :]
    session_id, rest = _take(1, rest)
    _suites, rest = _take(2, rest)
    _compressions, rest = _take(1, rest)
    extensions, _ = _take(2, rest)
    while extensions:
        kind = int.from_bytes(extensions[:2])
        content, extensions = _take(2, extensions[2:])
        if kind == 51:  # key_share
            shares, _ = _take(2, content)
            while shares:
                group = int.from_bytes(shares[:2])
                share, shares = _take(2, shares[2:])
                if group == _X25519:
                    return session_id, X25519PublicKey.from_public_bytes(share)
    raise ValueError("the ClientHello holds no X25519 key share")


def _server_hello(session_id: bytes, share: bytes) -> bytes:
    supported_versions = _extension(43, b"\x03\x04")
    key_share = _extension(51, struct.pack("!H", _X25519) + _vector(2, share))
    start = b"\x03\x03" + secrets.token_bytes(32) + _vector(1, session_id) + _AES_128_GCM_SHA256 + b"\0"
    return start + _vector(2, supported_versions + key_share)


def _alpn(protocol: bytes | None) -> bytes:
    return b"" if protocol is None else _extension(16, _vector(2, _vector(1, protocol)))


def _extension(kind: int, content: bytes) -> bytes:
    return struct.pack("!H", kind) + _vector(2, content)


def _vector(width: int, content: bytes) -> bytes:
    return len(content).to_bytes(width) + content


def _take(width: int, data: bytes) -> tuple[bytes, bytes]:
    end = width + int.from_bytes(data[:width])
    return data[width:end], data[end:]


def _record(kind: int, content: bytes) -> bytes:
    return struct.pack("!BH", kind, 0x0303) + _vector(2, content)


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


_extract = _mac  # HKDF-Extract is HMAC, RFC 5869


def _derive(secret: bytes, label: bytes, transcript: bytes) -> bytes:
    return _expand(secret, label, context=hashlib.sha256(transcript).digest())


def _expand(secret: bytes, label: bytes, length: int = 32, context: bytes = b"") -> bytes:
    info = length.to_bytes(2) + _vector(1, b"tls13 " + label) + _vector(1, context)
    return HKDFExpand(hashes.SHA256(), length, info).derive(secret)
