"""The client's side of SCRAM-SHA-256 with channel binding, without I/O (RFC 5802, 5929, 7677).

`scramp` reads, writes and checks the messages. What it leaves open stands here: which mechanism is used, what a server
may ask for, and keys that are derived once. This module knows no sockets, no event loop and no clock.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
import stringprep
import unicodedata
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable

from asn1crypto.x509 import Certificate
from scramp import ScramClient
from scramp.core import CBindData, ClientStage, ScramException

from .._errors import AuthenticationError, ChannelBindingError

PLAIN, PLUS = "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"

# RFC 7677, section 4 sets the floor. PostgreSQL's default is the floor, too; a million takes a second and is nobody's
# honest choice for a login.
_MIN_ITERATIONS, _MAX_ITERATIONS = 4096, 1_000_000

_DIGEST_KEY = secrets.token_bytes(32)

# RFC 4013, section 2.3, and RFC 3454, table A.1: what SASLprep does not let pass.
_PROHIBITED = (
    stringprep.in_table_a1,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


@functools.lru_cache(maxsize=8)  # a server shows the same few certificates for months
def binding_data(certificate: bytes) -> bytes | None:
    """Return the `tls-server-end-point` of a DER certificate, or None where its signature has no hash to take.

    The hash is that of the certificate's signature, SHA-256 in place of MD5 and SHA-1 (RFC 5929, section 4.1).
    """
    try:
        # asn1crypto names a hash for EdDSA, too; but the signature is not over that hash, and no server computes it.
        if Certificate.load(certificate)["signature_algorithm"]["algorithm"].native in ("ed25519", "ed448"):
            return None
        return bytes(CBindData.from_der(certificate))
    except (ScramException, ValueError):
        return None


def choose_mechanism(offered: list[str], *, can_bind: bool, required: bool, host: str) -> str:
    """Return the mechanism to use of those that the server offers; the strongest, or none at all.

    Raises `ChannelBindingError` where binding is required or offered and cannot be had, and `AuthenticationError` where
    SCRAM-SHA-256 is not offered.
    """
    if PLUS in offered and can_bind:
        return PLUS
    if PLUS in offered or (required and not can_bind):
        raise ChannelBindingError(
            f"{host} cannot be bound to its TLS channel: the signature of its certificate has no hash (RFC 5929). "
            "The server needs a certificate signed with RSA or ECDSA."
        )
    if required:
        raise ChannelBindingError(
            f"channel_binding=require, and {host} does not offer {PLUS}: either it is older than PostgreSQL 11, or "
            "somebody between has taken the offer out. Check the host; Neon offers it."
        )
    if PLAIN not in offered:
        raise AuthenticationError(
            f"{host} offers none of {PLUS} and {PLAIN}, the only mechanisms used. Check the server."
        )
    return PLAIN


class Keys:
    """What a password comes to under one salt and iteration count (RFC 5802, section 3). Its repr tells nothing."""

    __slots__ = ("client_key", "server_key")

    def __init__(self, secret: Callable[[], str], salt: bytes, iterations: int) -> None:
        salted = hashlib.pbkdf2_hmac("sha256", normalize(secret()), salt, iterations)
        self.client_key = hmac.digest(salted, b"Client Key", "sha256")
        self.server_key = hmac.digest(salted, b"Server Key", "sha256")

    def __repr__(self) -> str:
        return "<Keys>"


def normalize(password: str) -> bytes:
    """Return the bytes that PostgreSQL hashes: SASLprep of the password, or the raw ones where it has none.

    As pg_saslprep() and its callers (src/common/saslprep.c), which part from RFC 4013 and so from scramp: ASCII stays
    as it is, U+200B becomes a space, and what is prohibited is looked for before NFKC, not behind it. Bytes that are
    not UTF-8, which Python takes from the environment as lone surrogates, are raw as well.
    """
    if password.isascii():
        return password.encode()
    mapped = [
        " " if stringprep.in_table_c12(char) else char
        for char in password
        if stringprep.in_table_c12(char) or not stringprep.in_table_b1(char)
    ]
    if mapped and not _is_prohibited(mapped):
        return unicodedata.normalize("NFKC", "".join(mapped)).encode()
    try:
        return password.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no text and no bytes of anybody: the server will say that it is wrong
        return password.encode("utf-8", "surrogatepass")


def _is_prohibited(chars: list[str]) -> bool:
    """Tell whether RFC 3454 has SASLprep refuse `chars`: sections 5 and 7, and 6 for text from right to left."""
    if any(table(char) for table in _PROHIBITED for char in chars):
        return True
    if not any(map(stringprep.in_table_d1, chars)):
        return False
    return any(map(stringprep.in_table_d2, chars)) or not (
        stringprep.in_table_d1(chars[0]) and stringprep.in_table_d1(chars[-1])
    )


class KeyCache:
    """The keys of the latest few passwords, so that a new connection costs no PBKDF2. Its repr tells nothing."""

    _SIZE = 8  # a password, its successor while it is being rotated, and what a proxy's several salts make of them

    def __init__(self) -> None:
        self._keys: OrderedDict[tuple[bytes, bytes, int], Keys] = OrderedDict()

    def __repr__(self) -> str:
        return f"<KeyCache of {len(self._keys)}>"

    def get(self, secret: Callable[[], str], salt: bytes, iterations: int) -> Keys | None:
        """Return the keys, if they are known."""
        return self._keys.get((_digest(secret), salt, iterations))

    def put(self, secret: Callable[[], str], salt: bytes, iterations: int, keys: Keys) -> None:
        """Keep `keys`, which a server has accepted; the oldest ones go."""
        entry = _digest(secret), salt, iterations
        self._keys[entry] = keys
        self._keys.move_to_end(entry)
        while len(self._keys) > self._SIZE:
            self._keys.popitem(last=False)

    def evict(self, secret: Callable[[], str]) -> None:
        """Forget whatever came of a password that a server has just rejected."""
        rejected = _digest(secret)
        for entry in [entry for entry in self._keys if entry[0] == rejected]:
            del self._keys[entry]


def _digest(secret: Callable[[], str]) -> bytes:
    """Return what a password is known by in this process: it need not itself stay in memory."""
    return hmac.digest(_DIGEST_KEY, normalize(secret()), "sha256")


class _Client(ScramClient):  # type: ignore[misc]  # scramp has no types
    """scramp's client, with keys that are given to it in place of the password."""

    def get_client_final_with(self, keys: Keys) -> str:
        """Do what `get_client_final()` does, but for PBKDF2 (RFC 5802, section 3, from StoredKey on)."""
        self._set_stage(ClientStage.get_client_final)
        channel = self.gs2_header.make_cbind_input(self.cb)
        without_proof = f"c={b64encode(channel).decode()},r={self.nonce}"
        message = f"{self.client_first_bare},{self.server_first},{without_proof}".encode()
        signature = hmac.digest(hashlib.sha256(keys.client_key).digest(), message, "sha256")
        proof = bytes(a ^ b for a, b in zip(keys.client_key, signature, strict=True))
        self.server_signature = hmac.digest(keys.server_key, message, "sha256")
        return f"{without_proof},p={b64encode(proof).decode()}"


class Exchange:
    """One exchange, from the client's first message to the server's proof; each step is taken once, in this order."""

    def __init__(self, mechanism: str, *, binding: bytes | None, host: str) -> None:
        self.mechanism = mechanism
        self._host = host
        # PostgreSQL takes the user from the StartupMessage and ignores the one here; pgjdbc sends "*", too.
        self._client = _Client(
            [mechanism], "*", "", channel_binding=None if binding is None else ("tls-server-end-point", binding)
        )

    def __repr__(self) -> str:
        return f"<Exchange {self.mechanism}>"

    def first(self) -> bytes:
        """Return the client's first message. It holds a nonce, and nothing secret.

        Its gs2 flag is `p` where the binding is used, `y` where the server seems not to know it, and else `n`.
        """
        return str(self._client.get_client_first()).encode()

    def challenge(self, message: bytes) -> tuple[bytes, int]:
        """Take the server's first message, and return its salt and iteration count.

        Raises `AuthenticationError` for a nonce that does not extend ours, an extension, bad syntax, or a count outside
        4,096 to 1,000,000.
        """
        self._take(self._client.set_server_first, message)
        iterations = int(self._client.iterations)
        if iterations > _MAX_ITERATIONS:
            raise AuthenticationError(
                f"{self._host} asks for {iterations:,} iterations of PBKDF2, and {_MIN_ITERATIONS:,} to "
                f"{_MAX_ITERATIONS:,} are accepted. Check the server's scram_iterations."
            )
        return bytes(self._client.salt), iterations

    def final(self, keys: Keys) -> bytes:
        """Return the client's final message, which proves that we know the keys."""
        return self._client.get_client_final_with(keys).encode()

    def finish(self, message: bytes) -> None:
        """Take the server's final message. Raises `AuthenticationError` unless it proves that it knows the keys."""
        self._take(self._client.set_server_final, message)

    def _take(self, take: Callable[[str], None], message: bytes) -> None:
        try:
            take(message.decode("ascii"))
        except (ScramException, UnicodeDecodeError) as error:
            reason = error.args[0] if isinstance(error, ScramException) else "it is not ASCII"
        else:
            return
        raise AuthenticationError(
            f"{self._host} broke the SCRAM exchange: {reason}. It does not know the password or is not the real server."
        )
