"""Judge one value at a time: what it must be, and what it means once it has been read.

Connection keywords, pool options and the arguments of calls all use these readers. A reader must not know any other
value, nor what its own is used for.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Final, Generic, NoReturn, TypeVar

from .._errors import ConfigurationError, InsecureConfigurationError
from .hints import invisible_in
from .roots import KnownRoots

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

# More seconds or connections than any service needs, and few enough for the timers of event loops.
LIMIT = 1_000_000_000
# PostgreSQL's and Linux's own limit for a whole number.
INT32_MAX = 2_147_483_647


class Given:
    """One value together with its name and its source. Its `repr` does not show the value.

    Attributes:
        name: The canonical name of the keyword or argument.
        value: The value as it was written.
        source: Where a connection parameter was written, in words. A number may then be written as text. None for the
            argument of a call, which must be of the right type.
        secret: Whether messages must not show the value.
    """

    __slots__ = ("name", "secret", "source", "value")

    def __init__(self, name: str, value: object, source: str | None = None, *, secret: bool = False) -> None:
        self.name: Final = name
        self.value: Final = value
        self.source: Final = source
        self.secret: Final = secret

    def __str__(self) -> str:
        return self.name if self.source is None else f"{self.name} ({self.source})"

    @property
    def shown(self) -> str:
        """The value as a message may show it: short, escaped and never a secret."""
        value = self.value
        if not self.secret:
            if isinstance(value, str) and "://" in value:
                return "a URL"  # which may contain a password
            if isinstance(value, str):
                return repr(value if len(value) <= 80 else value[:77] + "...")
            if isinstance(value, type):
                module = "" if value.__module__ == "builtins" else f"{value.__module__}."
                return f"the class {module}{value.__qualname__}"
            # Python refuses to print an integer of more than 4,300 digits.
            if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**18):
                return repr(value)
        return f"a value of type {type(value).__name__}"

    def refuse(self, why: str, *, insecure: bool = False) -> NoReturn:
        """Raise the error whose message is the name, the source and `why`, which completes the sentence."""
        error = InsecureConfigurationError if insecure else ConfigurationError
        raise error(f"{self} {why}") from None

    def must_be(self, expected: str, advice: str = "", *, insecure: bool = False) -> NoReturn:
        """Raise the error that says what was expected, what was given instead and, with `advice`, what to do."""
        self.refuse(f"must be {expected}, not {self.shown}. {advice}".rstrip(), insecure=insecure)

    def numeral(self, pattern: str) -> str | None:
        """Return the value if it is text that may stand for a number and matches `pattern`."""
        if self.source is None or not isinstance(self.value, str):
            return None
        return self.value if re.fullmatch(pattern, self.value) else None

    def text(self) -> str:
        """Return the value as text without NUL, which would end a string in a StartupMessage or a file name."""
        value = os.fspath(self.value) if isinstance(self.value, os.PathLike) else self.value
        if not isinstance(value, str):
            self.must_be("a string")
        if "\0" in value:
            self.refuse("contains a NUL character. Remove it.")
        return value

    def utf8(self) -> str:
        """Return the value as text that can be encoded as UTF-8, unlike undecodable bytes from the environment."""
        text = self.text()
        if not is_utf8(text):
            self.refuse("is not valid UTF-8. Enter it again as UTF-8.")
        return text


def is_utf8(text: str) -> bool:
    """Return whether `text` can be encoded as UTF-8, which a surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Reader(ABC, Generic[_T_co]):
    """What a value must be. Readers are immutable. They are not dataclasses, which take longer to import."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.expected}>"

    @property
    @abstractmethod
    def expected(self) -> str:
        """What the value must be, in words that follow "must be"."""

    @property
    def unit(self) -> str:
        """The unit of a number, or ""."""
        return ""

    @abstractmethod
    def read(self, given: Given) -> _T_co:
        """Return what the value means.

        Raises:
            InsecureConfigurationError: The value asks for less than verify-full.
            ConfigurationError: The value is not what is expected.
        """

    def check(self, name: str, value: object) -> _T_co:
        """Return what the argument `name` of a call means.

        Raises:
            ConfigurationError: The value is not what is expected.
        """
        return self.read(Given(name, value))


# ---------------------------------------------------------------------------------------------------------------------
# Values of any keyword, option or argument


class Integer(Reader[int]):
    """A whole number within bounds. `maximum_is` names the option that the upper bound comes from."""

    __slots__ = ("_unit", "maximum", "maximum_is", "minimum")

    def __init__(self, minimum: int, maximum: int | None = None, unit: str = "", *, maximum_is: str = "") -> None:
        self.minimum: Final = minimum
        self.maximum: Final = maximum
        self.maximum_is: Final = maximum_is
        self._unit: Final = unit

    @property
    def unit(self) -> str:
        return self._unit

    @property
    def expected(self) -> str:
        kind = f"a whole number of {self.unit}" if self.unit else "a whole number"
        if self.maximum is None:
            return f"{kind}, at least {self.minimum}"
        bound = f" ({self.maximum_is})" if self.maximum_is else ""
        return f"{kind} from {self.minimum} to {_written(self.maximum)}{bound}"

    def read(self, given: Given) -> int:
        numeral = given.numeral(r"[0-9]{1,10}")
        value = given.value if numeral is None else int(numeral)
        if isinstance(value, bool) or not isinstance(value, int) or value < self.minimum:
            given.must_be(self.expected)
        if self.maximum is not None and value > self.maximum:
            given.must_be(self.expected)
        return value


class Seconds(Reader[float]):
    """A finite duration. `zero` says what 0 means; without it 0 is refused, because every wait has a deadline."""

    __slots__ = ("maximum", "zero")

    def __init__(self, maximum: float = LIMIT, *, zero: str = "") -> None:
        self.maximum: Final = maximum
        self.zero: Final = zero

    @property
    def expected(self) -> str:
        maximum = _written(self.maximum)
        if self.zero:
            return f"a number of seconds from 0 ({self.zero}) to {maximum}"
        return f"a number of seconds above 0 and at most {maximum}"

    @property
    def unit(self) -> str:
        return "seconds"

    def read(self, given: Given) -> float:
        numeral = given.numeral(r"[0-9]{1,10}(\.[0-9]{1,9})?")
        value = given.value if numeral is None else float(numeral)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= self.maximum:
            given.must_be(self.expected)
        if not value and not self.zero:
            given.must_be(self.expected)
        return float(value)


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


class Choice(Reader[str]):
    """One of several words.

    Attributes:
        words: What is accepted.
        advice: What to write instead.
        weakness: What any other word means, where it asks for less than verify-full.
        ignore_case: Whether upper and lower case are the same.
    """

    __slots__ = ("advice", "ignore_case", "weakness", "words")

    def __init__(self, *words: str, advice: str = "", weakness: str = "", ignore_case: bool = False) -> None:
        self.words: Final = words
        self.advice: Final = advice
        self.weakness: Final = weakness
        self.ignore_case: Final = ignore_case

    @property
    def expected(self) -> str:
        return self.words[0] if len(self.words) == 1 else f"{', '.join(self.words[:-1])} or {self.words[-1]}"

    def read(self, given: Given) -> str:
        value = given.value
        # Flags may be given as numbers and booleans, too.
        word = str(int(value)) if isinstance(value, int) and value in {0, 1} else given.text()
        if word in self.words or (self.ignore_case and word.lower() in map(str.lower, self.words)):
            return word
        if word and self.weakness:
            given.refuse(f"is {given.shown}, which {self.weakness}. {self.advice}".rstrip(), insecure=True)
        given.must_be(self.expected, self.advice)


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


class Name(Reader[str]):
    """Text for the server, in UTF-8 and not empty."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "a string that is not empty"

    def read(self, given: Given) -> str:
        return given.utf8() or given.refuse("is empty. Write a name, or leave it out.")


class FilePath(Reader[str]):
    """The path of a file, which is read later."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "a path"

    def read(self, given: Given) -> str:
        return given.text() or given.refuse("is empty. Write a path, or leave it out.")


class Function(Reader[Callable[..., object]]):
    """A function that is called with one argument."""

    __slots__ = ("argument",)

    def __init__(self, argument: str) -> None:
        self.argument: Final = argument

    @property
    def expected(self) -> str:
        return f"a function that takes {self.argument}"

    def read(self, given: Given) -> Callable[..., object]:
        if not callable(given.value):
            given.must_be(self.expected)
        return given.value


class AsyncFunction(Function):
    """A function that is called with a connection. Whether it is async shows only when it is called."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("a connection")

    @property
    def expected(self) -> str:
        return f"an async function that takes {self.argument}"


class SubclassOf(Reader[type[_T]]):
    """A class derived from `base`, which messages call `name`."""

    __slots__ = ("base", "name")

    def __init__(self, base: type[_T], name: str) -> None:
        self.base: Final = base
        self.name: Final = name

    @property
    def expected(self) -> str:
        return f"a subclass of {self.name}"

    def read(self, given: Given) -> type[_T]:
        if not (isinstance(given.value, type) and issubclass(given.value, self.base)):
            given.must_be(self.expected)
        return given.value


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


def _written(number: float) -> str:
    return f"{number:,.0f}" if number >= 1_000_000 else f"{number:.0f}"


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


class PEM(Reader[str | bytes | os.PathLike[str] | KnownRoots]):
    """Certificates in PEM, as bytes, as text or in a file; or a set of roots that are known by their fingerprints."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "PEM bytes, PEM text or a path"

    def read(self, given: Given) -> str | bytes | os.PathLike[str] | KnownRoots:
        if not isinstance(given.value, (str, bytes, os.PathLike, KnownRoots)):
            given.must_be(self.expected)
        return given.value
