"""What a text does to a session is found; the contents of strings, comments and names do not count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neon_async._neon.effects import Effects, effects_of

COPIES_IN, COPIES_OUT = Effects(copy="FROM STDIN"), Effects(copy="TO STDOUT")
PREPARES = Effects(prepares=True)
DEALLOCATES = Effects(deallocates=True)
DROPS = Effects(deallocates=True, drops_drivers=True)

FOUND = [
    ("COPY t FROM STDIN", COPIES_IN),
    ("copy BINARY s.t (a, b) from stdin WITH (FORMAT csv)", COPIES_IN),
    ("COPY t FROM STDOUT", COPIES_IN),  # as in PostgreSQL's grammar
    ('/* a */ COPY "from" (a) FROM -- b\n STDIN;', COPIES_IN),
    ("SELECT 1; COPY t FROM STDIN; SELECT 2", COPIES_IN),
    ("COPY t FROM stdin;\n1\ta 'quote\n\\.\n", COPIES_IN),
    ("COPY t TO STDOUT", COPIES_OUT),
    ("COPY (SELECT a FROM b) TO STDOUT", COPIES_OUT),
    ("COPY t TO STDIN", COPIES_OUT),
    ("x" * 10_000 + "; COPY t FROM STDIN", COPIES_IN),
    ("PREPARE a AS SELECT 1", PREPARES),
    ("prepare transaction AS SELECT 1", PREPARES),
    ("DO $$BEGIN EXECUTE 'PREPARE a AS SELECT 1'; END$$", PREPARES),
    ("DISCARD ALL", DROPS),
    ("/**/discard/**/all;", DROPS),
    ("DEALLOCATE ALL", DROPS),
    ("DEALLOCATE PREPARE ALL", DROPS),
    ("SELECT 1; DEALLOCATE ALL", DROPS),
    ('DEALLOCATE "__asyncpg_stmt_5__"', DROPS),
    ("DO $$BEGIN EXECUTE 'DEALLOCATE ALL'; END$$", DROPS),
    ("DEALLOCATE a", DEALLOCATES),
    ('DEALLOCATE PREPARE "all of it"', DEALLOCATES),
    ("DEALLOCATE prepare", DEALLOCATES),
    ("PREPARE a AS SELECT 1; EXECUTE a; DEALLOCATE a", Effects(prepares=True, deallocates=True)),
]
NOT_FOUND = [
    "SELECT 1",
    "COPY stdin FROM 'a file'",
    "COPY (SELECT a FROM stdin) TO 'a file'",
    "COPY t TO PROGRAM 'cat >stdout'",
    "SELECT 'COPY t FROM STDIN'",
    "-- COPY t FROM STDIN\nSELECT 1",
    "SELECT stdin FROM copy",
    "PREPARE TRANSACTION 'a'",
    "SELECT discard, deallocate, prepare FROM orders WHERE discard",
    "DISCARD PLANS",
    "DISCARD TEMP",
    "DO 'BEGIN NULL; END'",
]


@pytest.mark.parametrize(("query", "effects"), FOUND, ids=[query[-60:] for query, _ in FOUND])
def test_what_a_text_does_is_found(query: str, effects: Effects) -> None:
    assert effects_of(query) == effects
    assert effects_of(query + " " * 5000) == effects, "a long text, which is not cached"


@pytest.mark.parametrize("query", NOT_FOUND)
def test_what_a_text_only_mentions_is_not_found(query: str) -> None:
    assert not any(effects_of(query))


@given(
    st.lists(st.sampled_from([*"\"'$;/*- \n", "copy", "from", "stdin", "discard", "all", "do", "prepare"]), max_size=20)
)
def test_no_text_is_too_odd(words: list[str]) -> None:
    effects_of("".join(words))
