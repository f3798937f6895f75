"""Each reader accepts what it says it expects, and refuses the rest with a message that says so."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from neon_async import ConfigurationError, InsecureConfigurationError
from neon_async._config.keyword_readers import PEM, FilePath, Flag, Host, HostAddress, Level, Refused, SSLMode, Text
from neon_async._config.readers import AsyncFunction, Choice, Given, Integer, Name, Reader, Seconds, SubclassOf

HUGE = 10**5000  # which Python refuses to print
NAN, INFINITY = float("nan"), float("inf")


def read(reader: Reader[Any], value: object) -> Any:
    """Return what `reader` makes of a connection parameter, which may be text."""
    return reader.read(Given("name", value, "DSN"))


def refusal(reader: Reader[Any], value: object, source: str | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        reader.read(Given("name", value, source))
    return str(caught.value)


@pytest.mark.parametrize(
    ("reader", "value", "expected"),
    [
        pytest.param(Integer(0, 9), 0, 0, id="the smallest number"),
        pytest.param(Integer(0, 9), 9, 9, id="the largest number"),
        pytest.param(Integer(1), HUGE, HUGE, id="a number without a limit"),
        pytest.param(Seconds(10.0), 10, 10.0, id="whole seconds"),
        pytest.param(Seconds(10.0), 0.001, 0.001, id="a millisecond"),
        pytest.param(Seconds(10.0, zero="never"), 0, 0.0, id="no seconds"),
        pytest.param(Flag(), True, True, id="True"),
        pytest.param(Flag(), 0, False, id="0"),
        pytest.param(Choice("a", "b"), "b", "b", id="a word"),
        pytest.param(Choice("0", "1"), True, "1", id="a flag among words"),
        pytest.param(Choice("UTF8", ignore_case=True), "utf8", "utf8", id="a word in lower case"),
        pytest.param(Text(), "", "", id="empty text"),
        pytest.param(Text(), "é", "é", id="text"),
        pytest.param(Name(), "é", "é", id="a name"),
        pytest.param(FilePath(), Path("a/b"), os.path.join("a", "b"), id="a path"),  # noqa: PTH118
        pytest.param(FilePath(), "caf\udce9", "caf\udce9", id="the name of a file that is not UTF-8"),
        pytest.param(AsyncFunction(), print, print, id="a function"),
        pytest.param(SubclassOf(int, "int"), bool, bool, id="a subclass"),
        pytest.param(SubclassOf(int, "int"), int, int, id="the class itself"),
        pytest.param(Host(), "LocalHost", "localhost", id="localhost"),
        pytest.param(Host(), "A.Example", "a.example", id="a host"),
        pytest.param(HostAddress(), "0:0::1", "::1", id="an address"),
        pytest.param(HostAddress(), "fe80::1%eth0", "fe80::1%eth0", id="an address with a zone"),
        pytest.param(SSLMode(), "verify-full", "verify-full", id="verify-full"),
        pytest.param(SSLMode(), True, "verify-full", id="asyncpg's ssl=True"),
        pytest.param(PEM(), b"x", b"x", id="PEM"),
        pytest.param(Level("low", "high"), "low", "low", id="level"),
    ],
)
def test_a_value_is_read(reader: Reader[Any], value: object, expected: object) -> None:
    result = reader.check("name", value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        pytest.param(Integer(1, 9), 0, "must be a whole number from 1 to 9, not 0.", id="too small"),
        pytest.param(Integer(1, 9), 10, "must be a whole number from 1 to 9, not 10.", id="too large"),
        pytest.param(Integer(1, 9), True, "must be a whole number from 1 to 9, not True.", id="a boolean"),
        pytest.param(Integer(1, 9), 5.0, "must be a whole number from 1 to 9, not 5.0.", id="a fraction"),
        pytest.param(Integer(1, 9), None, "must be a whole number from 1 to 9, not None.", id="None"),
        pytest.param(Integer(1, 9), "5", "must be a whole number from 1 to 9, not '5'.", id="text of a call"),
        pytest.param(Integer(1, 9), HUGE, "must be a whole number from 1 to 9, not a value of type int.", id="huge"),
        pytest.param(Integer(1), 0, "must be a whole number, at least 1, not 0.", id="below the minimum"),
        pytest.param(
            Integer(0, 4, maximum_is="max_size"), 5, "must be a whole number from 0 to 4 (max_size), not 5.", id="bound"
        ),
        pytest.param(
            Integer(0, 2_000_000, "bytes"),
            -1,
            "must be a whole number of bytes from 0 to 2,000,000, not -1.",
            id="unit",
        ),
        pytest.param(Seconds(60), 0, "must be a number of seconds above 0 and at most 60, not 0.", id="0 s"),
        pytest.param(Seconds(60), 61, "must be a number of seconds above 0 and at most 60, not 61.", id="61 s"),
        pytest.param(Seconds(60), NAN, "must be a number of seconds above 0 and at most 60, not nan.", id="nan"),
        pytest.param(Seconds(), INFINITY, "above 0 and at most 1,000,000,000, not inf.", id="infinite"),
        pytest.param(Seconds(60), HUGE, "at most 60, not a value of type int.", id="5,000 digits"),
        pytest.param(Seconds(60), True, "at most 60, not True.", id="True"),
        pytest.param(Seconds(60), "1", "at most 60, not '1'.", id="seconds as text of a call"),
        pytest.param(
            Seconds(60, zero="never"), -1, "must be a number of seconds from 0 (never) to 60, not -1.", id="negative"
        ),
        pytest.param(Flag(), 2, "must be 0 or 1, not 2.", id="2"),
        pytest.param(Flag(), 1.0, "must be 0 or 1, not 1.0.", id="1.0"),
        pytest.param(Flag(), "yes", "must be 0 or 1, not 'yes'.", id="yes"),
        pytest.param(Choice("a"), "A", "must be a, not 'A'.", id="another word"),
        pytest.param(Choice("a", "b", "c"), "d", "must be a, b or c, not 'd'.", id="none of three words"),
        pytest.param(Choice("a", advice="Leave it out."), "b", "must be a, not 'b'. Leave it out.", id="advice"),
        pytest.param(Choice("a", weakness="is weak"), "", "must be a, not ''.", id="an empty word is not weak"),
        pytest.param(Choice("a"), ["a"], "must be a string, not a value of type list.", id="no word"),
        pytest.param(Text(), b"a", "must be a string, not a value of type bytes.", id="bytes"),
        pytest.param(Text(), "a\0b", "contains a NUL character. Remove it.", id="NUL"),
        pytest.param(Text(), "\ud800", "is not valid UTF-8. Enter it again as UTF-8.", id="half a surrogate pair"),
        pytest.param(Name(), "", "is empty. Write a name, or leave it out.", id="an empty name"),
        pytest.param(FilePath(), "", "is empty. Write a path, or leave it out.", id="an empty path"),
        pytest.param(
            AsyncFunction(), "SELECT 1", "must be an async function that takes a connection, not 'SELECT 1'.", id="SQL"
        ),
        pytest.param(SubclassOf(int, "int"), str, "must be a subclass of int, not the class str.", id="another class"),
        pytest.param(SubclassOf(int, "int"), 1, "must be a subclass of int, not 1.", id="an instance"),
        pytest.param(
            Refused("it is old. Leave it out."), 1, "is not supported: it is old. Leave it out.", id="refused"
        ),
        pytest.param(PEM(), 1, "must be PEM bytes, PEM text or a path, not 1.", id="a number for a certificate"),
        pytest.param(Text(), 10**17, f"must be a string, not {10**17}.", id="a number of 18 digits"),
        pytest.param(Choice("a"), "b" * 90, f"must be a, not '{'b' * 77}...'.", id="a long text is cut"),
        pytest.param(Choice("a"), "\x1b[2J\n", r"must be a, not '\x1b[2J\n'.", id="control characters are escaped"),
    ],
)
def test_a_value_is_refused(reader: Reader[Any], value: object, message: str) -> None:
    assert refusal(reader, value).endswith(message)
    assert refusal(reader, value).startswith("name ")


@pytest.mark.parametrize(
    ("reader", "value"),
    [
        pytest.param(Choice("a", weakness="is weak"), "b", id="a weak word"),
        pytest.param(Refused("it leaks.", insecure=True), "b", id="refused as insecure"),
        pytest.param(SSLMode(), "require", id="sslmode"),
        pytest.param(SSLMode(), False, id="ssl=False"),
        pytest.param(SSLMode(), "ON", id="ssl=ON, as some URLs have it"),
        pytest.param(Host(), "10.0.0.1", id="an IP address"),
        pytest.param(Host(), "/tmp", id="a socket"),
        pytest.param(Host(), "a.example,b.example", id="two hosts"),
    ],
)
def test_a_value_that_asks_for_less_is_refused_as_insecure(reader: Reader[Any], value: object) -> None:
    with pytest.raises(InsecureConfigurationError):
        reader.check("name", value)


def test_a_message_names_the_source_of_a_parameter() -> None:
    assert (
        refusal(Flag(), "2", "environment variable PGX") == "name (environment variable PGX) must be 0 or 1, not '2'."
    )


def test_a_message_never_shows_a_secret() -> None:
    for value in ("s3cret", 53, 5.5, None):
        with pytest.raises(ConfigurationError, match=r"not a value of type \w+\.$"):
            Choice("a").read(Given("name", [value], secret=True))
        assert Given("name", value, secret=True).shown == f"a value of type {type(value).__name__}"
    assert "s3cret" not in repr(Given("name", "s3cret"))


def test_a_reader_shows_what_it_expects() -> None:
    assert repr(Integer(1, 9, "bytes")) == "<Integer: a whole number of bytes from 1 to 9>"
    assert (Integer(1, 9, "bytes").unit, Seconds().unit, Flag().unit) == ("bytes", "seconds", "")


# ---------------------------------------------------------------------------------------------------------------------
# Where text is parsed

NUMERALS = st.text(st.sampled_from("0123456789+-_. eE\u0663"), max_size=12) | st.text(max_size=6)


@given(NUMERALS)
@example("\u0665")  # a digit to int(), and not to PostgreSQL
@example("5\n")
def test_a_whole_number_as_text_is_plain_decimal_digits(text: str) -> None:
    try:
        number = read(Integer(0, 65535), text)
    except ConfigurationError:
        assert not re.fullmatch(r"[0-9]{1,4}", text)
    else:
        assert re.fullmatch(r"[0-9]+", text)
        assert number == int(text) <= 65535


@given(NUMERALS)
@example("1e3")
@example("1.")
def test_seconds_as_text_are_a_plain_decimal_number(text: str) -> None:
    try:
        number = read(Seconds(3600.0), text)
    except ConfigurationError:
        assert not re.fullmatch(r"[1-9][0-9]{0,2}(\.[0-9]{1,9})?", text)
    else:
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)?", text)
        assert number == float(text)
        assert 0 < number <= 3600


@given(st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=3))
def test_only_numbers_within_the_limits_are_numbers(value: object) -> None:
    for reader, kinds in ((Integer(-5, 5), (int,)), (Seconds(5.0, zero="never"), (int, float))):
        lowest = -5 if isinstance(reader, Integer) else 0
        fits = isinstance(value, kinds) and not isinstance(value, bool) and lowest <= value <= 5
        try:
            result = reader.check("name", value)
        except ConfigurationError:
            assert not fits
        else:
            assert fits
            assert result == value


LABELS = st.from_regex(r"\A[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")
NAMES = st.lists(LABELS, min_size=2, max_size=5).map(".".join).filter(lambda name: len(name) <= 253)
HOSTS = st.text(st.sampled_from("aZ0-._*@/,:[]%\u00fc\0 "), max_size=20) | st.text(max_size=10) | NAMES


@given(HOSTS)
@example("1.2.3.4.")
@example("a.1")
@example("0x1")
@example("a.example\n")
def test_a_host_is_a_dns_name_that_no_resolver_reads_as_an_address(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        host = read(Host(), text)
        assert host == text.lower()
        assert re.fullmatch(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})+|localhost", host)
        assert len(host) <= 253
        assert not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2])


@given(NAMES)
def test_every_dns_name_is_a_host(name: str) -> None:
    assert read(Host(), name) == name.lower()


@given(st.ip_addresses().map(str))
def test_every_address_is_a_host_address_and_no_host(address: str) -> None:
    assert ipaddress.ip_address(read(HostAddress(), address)) == ipaddress.ip_address(address)
    with pytest.raises(InsecureConfigurationError):
        read(Host(), address)


@given(st.text(st.sampled_from("0123456789abcdef:.%/ \n&="), max_size=24))
def test_a_host_address_is_an_address_that_says_no_more(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        address, _, zone = read(HostAddress(), text).partition("%")
        ipaddress.ip_address(address)
        assert re.fullmatch(r"[A-Za-z0-9_.-]{0,15}", zone)


@pytest.mark.parametrize(
    "reader",
    [
        Integer(0, 9),
        Seconds(),
        Flag(),
        Choice("a"),
        Text(),
        Name(),
        FilePath(),
        Host(),
        HostAddress(),
        SSLMode(),
        PEM(),
        Level("low", "high"),
    ],
    ids=repr,
)
@given(value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.text()))
def test_no_value_makes_a_reader_fail_otherwise(reader: Reader[Any], value: object) -> None:
    for source in (None, "DSN"):
        with contextlib.suppress(ConfigurationError):
            reader.read(Given("name", value, source))
