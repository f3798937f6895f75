"""Judge the values that only connection keywords have.

A reader must not know any other value, nor what its own is used for.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Iterable
from typing import Final, NoReturn

from .arguments import AnchorSource
from .hints import invisible_in
from .readers import Given, Reader
from .roots import KnownRoots


class Flag(Reader[bool]):
    """Yes or no, written as in libpq."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "0 or 1"

    def read(self, given: Given) -> bool:
        value = given.value
        if (isinstance(value, str) and value in {"0", "1"}) or (isinstance(value, int) and value in {0, 1}):
            return bool(int(value))
        given.must_be(self.expected)


class Level(Reader[str]):
    """One of several words, each of which asks for more than the one before.

    Attributes:
        words: What is accepted, in that order.
    """

    __slots__ = ("words",)

    def __init__(self, *words: str) -> None:
        self.words: Final = words

    @property
    def expected(self) -> str:
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"

    def read(self, given: Given) -> str:
        word = given.text()
        if word not in self.words:
            given.must_be(self.expected)
        return word

    def highest(self, values: Iterable[Given]) -> Given:
        """Return the value that asks for the most; of equal ones the last."""
        return max(values, key=lambda given: self.words.index(self.read(given)))


class Text(Reader[str]):
    """Text for the server, in UTF-8. It may be empty."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "a string"

    def read(self, given: Given) -> str:
        return given.utf8()


class FilePath(Reader[str]):
    """The path of a file, which is read later."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "a path"

    def read(self, given: Given) -> str:
        return given.text() or given.refuse("is empty. Write a path, or leave it out.")


class Refused(Reader[NoReturn]):
    """Nothing: the keyword is known, and giving it is an error. `why` says why, and what to do instead."""

    __slots__ = ("insecure", "why")

    def __init__(self, why: str, *, insecure: bool = False) -> None:
        self.why: Final = why
        self.insecure: Final = insecure

    @property
    def expected(self) -> str:
        return "left out"

    def read(self, given: Given) -> NoReturn:
        given.refuse(f"{'is refused' if self.insecure else 'is not supported'}: {self.why}", insecure=self.insecure)


# ---------------------------------------------------------------------------------------------------------------------
# Values of one keyword each


class Host(Reader[str]):
    """The DNS name of one server: what a certificate can name. It is returned in lower case.

    A single label, such as the name of a compose service, is accepted where the server's CA is not a public one.
    """

    __slots__ = ("single_label",)

    def __init__(self, *, single_label: bool = False) -> None:
        self.single_label: Final = single_label

    @property
    def expected(self) -> str:
        return "the DNS name of one server"

    def read(self, given: Given) -> str:
        host = given.text()
        _refuse_sockets_lists_and_addresses(host, given)
        if mark := invisible_in(host):
            given.refuse(f"contains the invisible character {mark}. Remove it, or copy the name again.")
        if not host.isascii():
            given.refuse(f"is {given.shown}, which is not ASCII. Write the name's A-label (xn--...).")
        if "*" in host:
            given.refuse(f"is the wildcard {given.shown}. Write the name of one host.")
        if host.endswith("."):
            given.refuse(
                f"is {given.shown}, and certificates do not name a host with a dot at the end. Remove the dot."
            )
        if len(host) > 253 or not re.fullmatch(_DNS_NAME, host):
            given.must_be("a DNS name (letters, digits and hyphens in labels separated by dots)")
        if "." not in host and host.lower() != "localhost" and not self.single_label:
            given.refuse(
                f"is {given.shown}, a single label, which no public CA certifies. Write the full name, such as "
                "ep-name-123456.region.aws.neon.tech; for a server of your own, pass the root of its CA as "
                "trust_anchor=."
            )
        return host.lower()


# RFC 1123, section 2.1: labels of 1 to 63 letters, digits and hyphens; RFC 1035, section 2.3.4: 253 characters in all.
_PLAIN_NAME = r"[A-Za-z][A-Za-z0-9.-]*"
_DNS_NAME = r"(?:(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!\Z)|\Z))+"


def _refuse_sockets_lists_and_addresses(host: str, given: Given) -> None:
    """Refuse what libpq and asyncpg accept as a host besides the name of one server."""
    if "@" in host[1:]:  # first, because no other message shows the value of a login
        given.refuse("contains '@'. If it belongs to the user or password, write it as %40.")
    if re.fullmatch(rf"{_PLAIN_NAME}(?::[0-9]+)?/*", host) and not re.fullmatch(_PLAIN_NAME, host):
        given.refuse(f"is {given.shown}. Write the name of the server only, without '/', and its port as port.")
    if host.startswith(("/", "@", "\\")) or "/" in host:
        given.refuse(
            f"is the socket path {given.shown}, where asyncpg sends plaintext. Write the server's DNS name.",
            insecure=True,
        )
    if "," in host:
        given.refuse(
            "is a list of hosts: after a failed verification the next one would be tried. Write exactly one host.",
            insecure=True,
        )
    if _is_ip_literal(host):
        given.refuse(
            f"is the IP address {given.shown}, which public certificates do not name. "
            "Write the DNS name as host, and the address as hostaddr.",
            insecure=True,
        )


def _is_ip_literal(host: str) -> bool:
    # A name whose last label is a number is an IPv4 address to inet_aton and getaddrinfo ("127.1", "0x7f.1").
    last = host.rpartition(".")[2].lower()
    if host.startswith("[") or ":" in host or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HostAddress(Reader[str]):
    """An IP address, with a zone where it is link-local."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "an IP address"

    def read(self, given: Given) -> str:
        try:
            address = ipaddress.ip_address(given.text())
        except ValueError:
            given.must_be(self.expected, "hostaddr says where to connect, host what to verify.")
        zone = getattr(address, "scope_id", None)
        if zone is not None and not re.fullmatch(_INTERFACE, zone):
            given.refuse(
                f"is {given.shown}, with a zone that is not the name of a network interface. Correct the zone."
            )
        return str(address)


# IFNAMSIZ of Linux and macOS is 16, with the NUL at the end.
_INTERFACE = r"[A-Za-z0-9_.-]{1,15}"


class SSLMode(Reader[str]):
    """verify-full, which code may also write as True (asyncpg's `ssl=True`)."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "verify-full"

    def read(self, given: Given) -> str:
        if given.value is True:
            return "verify-full"
        if isinstance(given.value, ssl.SSLContext):
            _refuse_context(given.value, given)
        if not isinstance(given.value, str):
            given.must_be(
                "'verify-full' or True", f"neon-async builds its own TLS context. {_SSLMODE_ADVICE}", insecure=True
            )
        mode = given.text()
        if mode == "verify-full":
            return mode
        if mode in _WEAK_SSLMODES:
            given.refuse(f"is {mode!r}, which {_WEAK_SSLMODES[mode]}. {_SSLMODE_ADVICE}", insecure=True)
        if mode.lower() in {"true", "1", "on", "yes"}:  # libpq reads ssl=true in a URL as sslmode=require
            given.refuse(f"is {mode!r}, which means sslmode=require. {_SSLMODE_ADVICE}", insecure=True)
        given.must_be(self.expected, _SSLMODE_ADVICE)


def _refuse_context(context: ssl.SSLContext, given: Given) -> NoReturn:
    if context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname:
        given.refuse(
            "is an SSLContext. It verifies the server, but neon-async builds a TLS context of its own for each "
            "connection. Leave ssl= out, or write ssl=True. Pass a private root as trust_anchor=, a client certificate "
            "as sslcert= and sslkey=, and revocation lists as crl=."
        )
    missing = "the host name" if context.verify_mode is ssl.CERT_REQUIRED else "the server's certificate"
    given.refuse(f"is an SSLContext that does not verify {missing}. {_SSLMODE_ADVICE}", insecure=True)


_SSLMODE_ADVICE = (
    'Write sslmode=verify-full in the DSN, or pass sslmode="verify-full", which wins over DSN and environment.'
)
# What each sslmode of libpq leaves unchecked (PostgreSQL documentation, section 34.19.3, table 34.1).
_WEAK_SSLMODES = {
    "disable": "sends everything in plaintext, including the password exchange",
    "allow": "tries plaintext first",
    "prefer": "falls back to plaintext when the server, or an attacker on the path, asks for it",
    "require": "encrypts, but checks neither the certificate nor the host name",
    "verify-ca": "does not check the host name, so that any certificate of the same CA passes",
}


class PEM(Reader[AnchorSource]):
    """Certificates in PEM, as bytes, as text or in a file; or a set of roots that are known by their fingerprints."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "PEM bytes, PEM text or a path"

    def read(self, given: Given) -> AnchorSource:
        if not isinstance(given.value, (str, bytes, os.PathLike, KnownRoots)):
            given.must_be(self.expected)
        return given.value
