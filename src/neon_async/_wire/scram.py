"""The client's side of SCRAM-SHA-256 with channel binding, without I/O (RFC 5802, 5929, 7677).

`scramp` reads, writes and checks the messages. This module adds the choice of the mechanism, the limits on what a
server may request, and a cache of derived keys. It must not know sockets, the event loop or clocks.
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
from typing import TYPE_CHECKING, Final

from asn1crypto.x509 import Certificate
from scramp import ScramClient
from scramp.core import CBindData, ClientStage, ScramException

from .._errors import AuthenticationError, ChannelBindingError
from .._text import escape

if TYPE_CHECKING:
    from .._config.literals import SASLMechanism

PLAIN: Final = "SCRAM-SHA-256"
PLUS: Final = "SCRAM-SHA-256-PLUS"

# RFC 7677, section 4, sets the minimum, which is PostgreSQL's default, too. A million iterations take a second; no
# honest server requests more.
_MIN_ITERATIONS, _MAX_ITERATIONS = 4096, 1_000_000
# Random bytes of our nonce, as many as libpq takes (SCRAM_RAW_NONCE_LEN). scramp looks at each character in Python.
_NONCE_SIZE = 18


@functools.lru_cache(maxsize=8)  # a server presents the same few certificates for months
def binding_data(certificate: bytes) -> bytes | None:
    """Return the `tls-server-end-point` of a DER certificate, or None where its signature has no hash.

    The hash function is that of the certificate's signature, with SHA-256 instead of MD5 and SHA-1 (RFC 5929, section
    4.1).
    """
    try:
        # asn1crypto names a hash for EdDSA, too; but the signature is not over that hash, and no server computes it.
        if Certificate.load(certificate)["signature_algorithm"]["algorithm"].native in ("ed25519", "ed448"):
            return None
        return bytes(CBindData.from_der(certificate))
    except (ScramException, ValueError):
        return None


def choose_mechanism(offered: list[str], *, can_bind: bool, required: bool, host: str) -> SASLMechanism:
    """Return the strongest of the mechanisms that the server offers.

    Args:
        offered: The names in the server's offer.
        can_bind: Whether the server's certificate has binding data.
        required: Whether channel binding is required.
        host: The server's name, for messages.

    Raises:
        ChannelBindingError: Channel binding is required or offered, but not possible.
        AuthenticationError: The server does not offer SCRAM-SHA-256.
    """
    if PLUS in offered and can_bind:
        return PLUS
    if PLUS in offered or (required and not can_bind):
        raise ChannelBindingError(
            f"{host} does not support channel binding: the signature of its certificate has no hash (RFC 5929). "
            "The server needs a certificate signed with RSA or ECDSA."
        )
    if required:
        raise ChannelBindingError(
            f"channel_binding=require, but {host} does not offer {PLUS}: either it is older than PostgreSQL 11, or an "
            "attacker in between removed the offer. Check the host; Neon offers it."
        )
    if PLAIN not in offered:
        raise AuthenticationError(
            f"{host} offers neither {PLUS} nor {PLAIN}, the only mechanisms that neon-async uses. Check the server."
        )
    return PLAIN


class Exchange:
    """One exchange, from the client's first message to the server's proof. Each step runs once, in this order."""

    def __init__(self, mechanism: SASLMechanism, *, binding: bytes | None, host: str) -> None:
        self.mechanism = mechanism
        self._host = host
        # PostgreSQL takes the user from the StartupMessage and ignores this one; pgjdbc sends "*", too.
        self._client = _Client(
            [mechanism],
            "*",
            "",
            channel_binding=None if binding is None else ("tls-server-end-point", binding),
            c_nonce=secrets.token_urlsafe(_NONCE_SIZE),
        )

    def __repr__(self) -> str:
        return f"<Exchange {self.mechanism}>"

    def first(self) -> bytes:
        """Return the client's first message. It contains a nonce, and no secret.

        Its gs2 flag is `p` with channel binding, `y` where only the server lacks channel binding, and otherwise `n`.
        """
        return str(self._client.get_client_first()).encode()

    def challenge(self, message: bytes) -> tuple[bytes, int]:
        """Process the server's first message, and return its salt and iteration count.

        Raises:
            AuthenticationError: The nonce does not extend ours, there is an extension or bad syntax, or the count is
                outside 4,096 to 1,000,000.
        """
        self._process(self._client.set_server_first, message)
        iterations = int(self._client.iterations)
        if iterations > _MAX_ITERATIONS:
            raise AuthenticationError(
                f"{self._host} requests {iterations:,} iterations of PBKDF2; {_MIN_ITERATIONS:,} to "
                f"{_MAX_ITERATIONS:,} are accepted. Check the server's scram_iterations."
            )
        return bytes(self._client.salt), iterations

    def final(self, keys: Keys) -> bytes:
        """Return the client's final message, which proves that the client knows the keys."""
        return self._client.get_client_final_with(keys).encode()

    def finish(self, message: bytes) -> None:
        """Process the server's final message.

        Raises:
            AuthenticationError: The message does not prove that the server knows the keys.
        """
        self._process(self._client.set_server_final, message)

    def _process(self, step: Callable[[str], None], message: bytes) -> None:
        try:
            step(message.decode("ascii"))
        except (ScramException, UnicodeDecodeError) as error:
            reason = escape(str(error.args[0])) if isinstance(error, ScramException) else "it is not ASCII"
        else:
            return
        raise AuthenticationError(
            f"{self._host} broke the SCRAM exchange: {reason}. It does not know the password or is not the real server."
        )


class Keys:
    """The keys derived from a password, a salt and an iteration count (RFC 5802, section 3). The repr shows none."""

    __slots__ = ("client_key", "server_key", "stored_key")

    def __init__(self, secret: Callable[[], str], salt: bytes, iterations: int) -> None:
        salted = hashlib.pbkdf2_hmac("sha256", normalize(secret()), salt, iterations)
        self.client_key = hmac.digest(salted, b"Client Key", "sha256")
        self.stored_key = hashlib.sha256(self.client_key).digest()
        self.server_key = hmac.digest(salted, b"Server Key", "sha256")

    def __repr__(self) -> str:
        return "<Keys>"


class KeyCache:
    """The keys of the latest few passwords: a new connection needs no PBKDF2. The repr shows none."""

    _SIZE = 8  # enough for a password and its successor during a rotation, each under several salts of a proxy

    def __init__(self) -> None:
        self._keys: OrderedDict[tuple[bytes, bytes, int], Keys] = OrderedDict()

    def __repr__(self) -> str:
        return f"<KeyCache of {len(self._keys)}>"

    def get(self, secret: Callable[[], str], salt: bytes, iterations: int) -> Keys | None:
        """Return the keys, or None where they are not cached."""
        entry = _digest(secret), salt, iterations
        if entry not in self._keys:
            return None
        self._keys.move_to_end(entry)
        return self._keys[entry]

    def put(self, secret: Callable[[], str], salt: bytes, iterations: int, keys: Keys) -> None:
        """Cache `keys`, which a server has accepted, and evict those that were used longest ago."""
        self._keys[_digest(secret), salt, iterations] = keys
        while len(self._keys) > self._SIZE:
            self._keys.popitem(last=False)

    def evict(self, secret: Callable[[], str]) -> None:
        """Evict every key of a password that a server has rejected."""
        rejected = _digest(secret)
        for entry in [entry for entry in self._keys if entry[0] == rejected]:
            del self._keys[entry]


def normalize(password: str) -> bytes:
    """Return the bytes that PostgreSQL hashes: SASLprep of the password, or the raw bytes where SASLprep refuses it.

    This follows pg_saslprep() and its callers (src/common/saslprep.c), which differ from RFC 4013 and so from scramp:
    ASCII stays unchanged, U+200B becomes a space, and prohibited characters are looked for before NFKC, not after it.
    Bytes that are not UTF-8, which Python reads from the environment as lone surrogates, stay raw as well.
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
    except UnicodeEncodeError:  # neither text nor bytes from the environment: the server will reject it
        return password.encode("utf-8", "surrogatepass")


class _Client(ScramClient):  # type: ignore[misc]  # scramp has no types
    """scramp's client, with derived keys instead of the password."""

    def get_client_final_with(self, keys: Keys) -> str:
        """Do what `get_client_final()` does, except for PBKDF2 (RFC 5802, section 3, after StoredKey)."""
        self._set_stage(ClientStage.get_client_final)
        channel = self.gs2_header.make_cbind_input(self.cb)
        without_proof = f"c={b64encode(channel).decode()},r={self.nonce}"
        message = f"{self.client_first_bare},{self.server_first},{without_proof}".encode()
        signature = hmac.digest(keys.stored_key, message, "sha256")
        proof = _xor(keys.client_key, signature)
        self.server_signature = hmac.digest(keys.server_key, message, "sha256")
        return f"{without_proof},p={b64encode(proof).decode()}"


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


_DIGEST_KEY = secrets.token_bytes(32)


def _digest(secret: Callable[[], str]) -> bytes:
    """Return the cache's name for a password, so that the password itself does not stay in memory."""
    return hmac.digest(_DIGEST_KEY, normalize(secret()), "sha256")


# What SASLprep refuses (RFC 4013, section 2.3, and RFC 3454, table A.1).
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


def _is_prohibited(chars: list[str]) -> bool:
    """Whether SASLprep refuses `chars` (RFC 3454, sections 5 and 7, and section 6 for right-to-left text)."""
    if any(table(char) for table in _PROHIBITED for char in chars):
        return True
    if not any(map(stringprep.in_table_d1, chars)):
        return False
    return any(map(stringprep.in_table_d2, chars)) or not (
        stringprep.in_table_d1(chars[0]) and stringprep.in_table_d1(chars[-1])
    )
