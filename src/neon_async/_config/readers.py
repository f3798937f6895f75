"""Judge one value at a time: what it must be, and what it means once it has been read.

Connection keywords, pool options and the arguments of calls all use these readers; `keyword_readers` has those of
connection keywords only. A reader must not know any other value, nor what its own is used for.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Generic, NoReturn, TypeVar

from .._errors import ConfigurationError, InsecureConfigurationError

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


class Name(Reader[str]):
    """Text for the server, in UTF-8 and not empty."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "a string that is not empty"

    def read(self, given: Given) -> str:
        return given.utf8() or given.refuse("is empty. Write a name, or leave it out.")


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


def _written(number: float) -> str:
    return f"{number:,.0f}" if number >= 1_000_000 else f"{number:.0f}"
