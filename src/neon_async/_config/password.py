"""Hold a password, or the function that returns it, so that nothing shows it by accident.

It must not know what the password is used for.
"""

from __future__ import annotations

import inspect
from typing import NoReturn, cast

from .._errors import ConfigurationError
from .arguments import PasswordSource
from .readers import Given, Reader


class Password:
    """A password, or the caller's function that returns it. Neither `repr` nor pickle shows it."""

    __slots__ = ("_source",)

    def __init__(self, source: PasswordSource) -> None:
        self._source = source

    def __repr__(self) -> str:
        return "<Password>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Password cannot be pickled")

    async def resolve(self) -> Password:
        """Return the password to use now.

        A function is called each time, so that a password can be rotated without a restart.

        Raises:
            ConfigurationError: The function returned something other than a non-empty string without NUL.
        """
        if isinstance(self._source, str):
            return self
        answer = self._source()
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, str) and answer and "\0" not in answer:
            return Password(answer)
        kind = "an unusable string" if isinstance(answer, str) else f"a value of type {type(answer).__name__}"
        del answer  # tracebacks keep the locals of this frame
        raise ConfigurationError(f"The password function returned {kind}. Return a non-empty str without NUL.")

    @property
    def is_padded(self) -> bool:
        """Whether white space is at its beginning or end, as in what was read from a file with a line break."""
        return isinstance(self._source, str) and self._source != self._source.strip()

    def reveal(self) -> str:
        """Return the text of a resolved password."""
        assert isinstance(self._source, str)
        return self._source


class PasswordReader(Reader[Password]):
    """A password that is not empty, or a function that returns one."""

    __slots__ = ()

    @property
    def expected(self) -> str:
        return "a string, or a function that returns one"

    def read(self, given: Given) -> Password:
        if callable(given.value):
            return Password(cast(PasswordSource, given.value))
        if not isinstance(given.value, str):
            given.must_be(self.expected)
        if not given.value:
            given.refuse(
                "is empty, and SCRAM needs a password. Copy the connection string from the Neon console again."
            )
        return Password(given.text())
