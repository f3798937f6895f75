"""A password is held so that nothing shows it, and a function is called for each connection."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable

import pytest

from neon_async import ConfigurationError
from neon_async._config.password import Password, PasswordReader


def test_a_password_shows_itself_in_no_repr_and_in_no_pickle() -> None:
    password = Password("s3cret")
    assert repr(password) == str(password) == "<Password>"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(password)


def test_a_string_is_its_own_answer() -> None:
    password = PasswordReader().check("password", "s3cret")
    assert asyncio.run(password.resolve()) is password
    assert password.reveal() == "s3cret"


def counting(*, asynchronous: bool) -> Callable[[], str] | Callable[[], Awaitable[str]]:
    """Return a function that returns another password each time."""
    calls: list[int] = []

    def plain() -> str:
        calls.append(1)
        return f"password {len(calls)}"

    async def coroutine() -> str:
        return plain()

    return coroutine if asynchronous else plain


@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "async function"])
def test_a_function_is_called_each_time(asynchronous: bool) -> None:
    password = PasswordReader().check("password", counting(asynchronous=asynchronous))
    assert [asyncio.run(password.resolve()).reveal() for _ in range(2)] == ["password 1", "password 2"]


@pytest.mark.parametrize("answer", ["", "s3cret\0", b"s3cret", None, ["s3cret"]], ids=repr)
def test_an_answer_that_is_no_password_is_refused_without_showing_it(answer: object) -> None:
    password = PasswordReader().check("password", lambda: answer)
    with pytest.raises(ConfigurationError, match="The password function returned") as caught:
        asyncio.run(password.resolve())
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", ["", "s3cret\0", b"s3cret", 7, ["s3cret"]], ids=repr)
def test_what_is_no_password_is_refused_without_showing_it(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^password ") as caught:
        PasswordReader().check("password", value)
    assert "s3cret" not in str(caught.value)
