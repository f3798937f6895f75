"""Everything about a keyword stands in one row of the table, and the table lists all that libpq and asyncpg have."""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from dataclasses import fields

import asyncpg
import pytest
from psycopg import pq
from support.dsns import HOST, MINIMAL

import neon_async
from neon_async import ConfigurationError, InsecureConfigurationError
from neon_async._config.arguments import ConnectKeywords
from neon_async._config.connection import ConnectionParameters, parse
from neon_async._config.keyword_readers import Level, Refused
from neon_async._config.keywords import BY_DSN_NAME, BY_NAME, KEYWORDS, Keyword
from neon_async._config.readers import Choice, Given, Integer, Seconds

HONOURED = [keyword for keyword in KEYWORDS if not keyword.refused]
REFUSED = [keyword for keyword in KEYWORDS if keyword.refused]
DSN = f"postgresql://alex:x@{HOST}/neondb"


def each(keywords: list[Keyword]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("keyword", [pytest.param(keyword, id=keyword.name) for keyword in keywords])


# ---------------------------------------------------------------------------------------------------------------------
# The table is complete


def test_every_keyword_of_libpq_has_a_row() -> None:
    names = {default.keyword.decode() for default in pq.Conninfo.get_defaults()}
    assert len(names) >= 45
    assert names <= {keyword.name for keyword in KEYWORDS}


def test_every_environment_variable_of_libpq_stands_in_the_row_of_its_keyword() -> None:
    variables = {d.keyword.decode(): d.envvar.decode() for d in pq.Conninfo.get_defaults() if d.envvar}
    assert len(variables) >= 30
    assert {name: BY_NAME[name].variable for name in variables} == variables


def test_every_keyword_of_asyncpg_has_a_row() -> None:
    names = set(inspect.signature(asyncpg.connect).parameters)
    assert names - {"dsn", "connection_class", "record_class"} <= set(BY_NAME)


def test_every_keyword_of_libpq_is_honoured_or_refused_by_name() -> None:
    for default in pq.Conninfo.get_defaults():
        keyword = default.keyword.decode()
        try:
            parse(None, MINIMAL | {"sslcert": "c.pem", keyword: "some-value"}, {})
        except ConfigurationError as error:
            assert str(error).startswith(f"{keyword} ("), error  # by name, and not as unknown


def test_connect_and_its_type_hints_name_exactly_the_honoured_keywords() -> None:
    honoured = [name for keyword in HONOURED for name in keyword.names]
    honoured += [keyword.name for keyword in REFUSED if keyword.can_be_off]
    own = set(inspect.signature(neon_async.connect).parameters)
    own -= {"dsn", "connection_class", "record_class", "keywords"}
    assert own == {"trust_anchor", "loop"}
    own -= {"loop"}  # refused, unless it is the running event loop
    assert sorted([*ConnectKeywords.__annotations__, *own]) == sorted(honoured)


@pytest.mark.parametrize("name", ConnectKeywords.__annotations__)
def test_a_type_hint_has_exactly_the_words_that_its_reader_accepts(name: str) -> None:
    keyword, hint = BY_NAME[name], typing.get_type_hints(ConnectKeywords)[name]
    words = {value for value in literals_in(hint) if isinstance(value, str)}
    if isinstance(keyword.reader, Choice | Level):
        accepts_case = isinstance(keyword.reader, Choice) and keyword.reader.ignore_case
        assert {word.upper() if accepts_case else word for word in words - {""}} == set(keyword.reader.words)
    assert ("" in words) == (keyword.can_be_off and str not in typing.get_args(hint))
    for value in literals_in(hint) - {""}:
        keyword.reader.read(Given(name, value))


def literals_in(hint: object) -> set[object]:
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {value for part in typing.get_args(hint) for value in literals_in(part)}


# ---------------------------------------------------------------------------------------------------------------------
# Each fact stands once


def test_no_two_rows_share_a_name_or_an_environment_variable() -> None:
    names = [name for keyword in KEYWORDS for name in keyword.names]
    variables = [keyword.variable for keyword in KEYWORDS if keyword.variable]
    assert [name for name, count in Counter([*names, *variables]).items() if count > 1] == []
    assert set(BY_NAME) == set(names)


def test_every_parameter_of_a_connection_comes_from_a_row() -> None:
    derived = {"endpoint", "database", "startup_settings"}
    names = {each.name for each in fields(ConnectionParameters)} - derived
    assert names <= {keyword.name for keyword in HONOURED}


@each([keyword for keyword in HONOURED if keyword.default is not None])
def test_a_default_is_a_value_that_its_reader_accepts(keyword: Keyword) -> None:
    assert keyword.reader.read(Given(keyword.name, keyword.default, "a test")) == keyword.default


def test_no_parameter_has_a_default_of_its_own() -> None:
    read = parse(None, MINIMAL, {})
    given = {"endpoint", "pooled", "database", "startup_settings", *MINIMAL}
    for each in fields(ConnectionParameters):
        if each.name not in given:
            assert getattr(read, each.name) == BY_NAME[each.name].default, each.name


@each([keyword for keyword in KEYWORDS if keyword.code_only])
def test_a_keyword_for_code_only_has_no_environment_variable_and_no_name_in_a_dsn(keyword: Keyword) -> None:
    assert keyword.variable is None
    assert not {*keyword.names} & {*BY_DSN_NAME}


@each(HONOURED)
def test_an_honoured_keyword_carries_what_its_documentation_needs(keyword: Keyword) -> None:
    assert keyword.note.endswith(".")
    assert keyword.reader.expected
    if isinstance(keyword.reader, Integer | Seconds):
        assert keyword.reader.maximum is not None
        assert not keyword.reader.unit or keyword.reader.unit in {"seconds", "milliseconds", "bytes"}


@each(REFUSED)
def test_a_refused_keyword_carries_its_reason_and_nothing_else(keyword: Keyword) -> None:
    assert isinstance(keyword.reader, Refused)
    assert keyword.reader.why.endswith(".")
    assert (keyword.note, keyword.default, keyword.aliases, keyword.code_aliases) == ("", None, (), ())


# ---------------------------------------------------------------------------------------------------------------------
# The table is what happens


@each(REFUSED)
def test_a_refused_keyword_is_refused_with_its_reason(keyword: Keyword) -> None:
    assert isinstance(keyword.reader, Refused)
    with pytest.raises(ConfigurationError) as caught:
        parse(None, MINIMAL | {keyword.name: "1"}, {})
    assert str(caught.value).startswith(f"{keyword.name} (keyword argument) is ")
    assert keyword.reader.why in str(caught.value)
    assert isinstance(caught.value, InsecureConfigurationError) == keyword.reader.insecure


@each([keyword for keyword in HONOURED if isinstance(keyword.reader, Choice)])
def test_every_word_of_a_choice_is_accepted_and_other_words_are_not(keyword: Keyword) -> None:
    assert isinstance(keyword.reader, Choice)
    for word in keyword.reader.words:
        parse(f"{DSN}?{keyword.name}={word}", {}, {})
    with pytest.raises(ConfigurationError) as caught:
        parse(f"{DSN}?{keyword.name}=nonsense", {}, {})
    assert isinstance(caught.value, InsecureConfigurationError) == bool(keyword.reader.weakness)


@pytest.mark.parametrize(("alias", "keyword"), [pytest.param(a, k, id=a) for k in HONOURED for a in k.names[1:]])
def test_an_alias_gives_the_same_keyword_and_not_both(alias: str, keyword: Keyword) -> None:
    value = keyword.default or "x"
    assert parse(None, MINIMAL | {alias: value}, {}) is not None
    with pytest.raises(ConfigurationError, match=f"^{keyword.name} is given twice"):
        parse(None, MINIMAL | {alias: value, keyword.name: value}, {})


@pytest.mark.parametrize(("alias", "keyword"), [pytest.param(a, k, id=a) for k in HONOURED for a in k.code_aliases])
def test_an_alias_for_code_is_refused_in_a_dsn_with_the_name_to_write(alias: str, keyword: Keyword) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{alias} \(DSN\) can be given in code only\. Write {keyword.name}"):
        parse(f"{DSN}?{alias}=1", {}, {})


@each([keyword for keyword in KEYWORDS if keyword.code_only])
def test_a_keyword_for_code_only_is_refused_in_a_dsn(keyword: Keyword) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{keyword.name} \(DSN\)") as caught:
        parse(f"{DSN}?{keyword.name}=1", {}, {})
    insecure = keyword.insecure_as_text or (isinstance(keyword.reader, Refused) and keyword.reader.insecure)
    assert isinstance(caught.value, InsecureConfigurationError) == insecure


@each([keyword for keyword in KEYWORDS if keyword.variable])
def test_an_empty_environment_variable_counts_as_unset_unless_its_row_says_otherwise(keyword: Keyword) -> None:
    if keyword.judged_when_empty:
        with pytest.raises(ConfigurationError, match=rf"^{keyword.name} \(environment variable {keyword.variable}\)"):
            parse(None, MINIMAL, {str(keyword.variable): ""})
    else:
        assert parse(None, MINIMAL, {str(keyword.variable): ""}).host == HOST


@each([keyword for keyword in KEYWORDS if keyword.can_be_off])
def test_code_switches_a_keyword_off_wherever_it_is_given(keyword: Keyword) -> None:
    key_needs = {"sslcert": "c.pem"} if keyword.name == "sslkey" else {}
    plain = parse(None, MINIMAL | key_needs, {})
    for dsn in (None, f"postgresql://?{keyword.name}=some-value"):
        read = parse(dsn, MINIMAL | key_needs | {keyword.name: ""}, {str(keyword.variable): "some-value"})
        for each_field in fields(ConnectionParameters):
            if each_field.name != "password":
                assert getattr(read, each_field.name) == getattr(plain, each_field.name)


# A level can be raised in every place and lowered in none.
LEVELS = [keyword for keyword in KEYWORDS if isinstance(keyword.reader, Level)]


@each([keyword for keyword in KEYWORDS if keyword.variable and not keyword.can_be_off and keyword not in LEVELS])
def test_any_other_keyword_is_switched_off_by_a_value_that_code_may_give(keyword: Keyword) -> None:
    value = keyword.default if keyword.default is not None else MINIMAL.get(keyword.name, "x")
    parse(None, MINIMAL | {keyword.name: value}, {str(keyword.variable): "\N{SNOWMAN}"})


@each([keyword for keyword in KEYWORDS if keyword.secret])
@pytest.mark.parametrize("damage", ["\0", "\ud800", ""], ids=["NUL", "no UTF-8", "none"])
def test_no_refusal_shows_the_value_of_a_secret_keyword(keyword: Keyword, damage: str) -> None:
    for value in ("s3cret" + damage, b"s3cret" + damage.encode("utf-8", "surrogatepass"), ["s3cret" + damage]):
        try:
            read = parse(None, MINIMAL | {keyword.name: value}, {})
        except ConfigurationError as error:
            assert "s3cret" not in f"{error} {error!r}"
        else:
            assert "s3cret" not in repr(read)
