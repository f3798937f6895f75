"""What an error says of a prepared statement is judged by what the server and asyncpg really raise, and by no more."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from neon_async import ConnectionLostError
from neon_async._driver.session import _MAX_TOKENS, Healing
from neon_async._driver.stale import Verdict, is_stale_when_prepared, judge

INTERNAL = asyncpg.InternalClientError
EXCEPTIONS: Any = asyncpg.exceptions


def of_server(sqlstate: str, message: str, routine: str = "") -> Exception:
    error: Exception = asyncpg.PostgresError.new({"C": sqlstate, "M": message, "S": "ERROR", "R": routine})
    return error


CACHED_PLAN = of_server("0A000", "cached plan must not change result type", "RevalidateCachedQuery")


VERDICTS = [
    (CACHED_PLAN, Verdict.STALE),
    (of_server("26000", 'prepared statement "a" does not exist'), Verdict.STALE),
    (of_server("XX000", "cache lookup failed for type 17000"), Verdict.STALE),
    (of_server("42704", "type with OID 17000 does not exist"), Verdict.STALE),
    (of_server("XX000", "cache lookup failed for type 18000"), Verdict.SUSPECT),
    (of_server("XX000", "cache lookup failed for relation 17000"), Verdict.SUSPECT),
    (of_server("42883", "operator does not exist: text = integer"), Verdict.SUSPECT),
    (of_server("42804", "wrong number of columns: 2, expected 3"), Verdict.SUSPECT),
    (of_server("22P03", "incorrect binary data format in bind parameter 1"), Verdict.SUSPECT),
    (of_server("0A000", "cannot create a cursor"), Verdict.OTHER),
    (of_server("23505", "duplicate key value violates unique constraint"), Verdict.OTHER),
    (of_server("42501", "permission denied for table cache lookup failed"), Verdict.OTHER),
    (of_server("22012", "division by zero"), Verdict.OTHER),
    (of_server("57014", "canceling statement due to statement timeout"), Verdict.OTHER),
    (asyncpg.DataError("invalid input for query argument $1"), Verdict.SUSPECT),
    (asyncpg.InterfaceError("the server expects 1 argument for this query, 2 were passed"), Verdict.OTHER),
    (INTERNAL("something else"), Verdict.OTHER),
    (EXCEPTIONS.OutdatedSchemaCacheError("unexpected number of attributes"), Verdict.MISREAD),
    (EXCEPTIONS.ProtocolError("the number of columns in the result row (3) is different"), Verdict.MISREAD),
    (EXCEPTIONS.ProtocolError("unexpected array dimensions value: -1"), Verdict.SUSPECT_MISREAD),
    (BufferError("unexpected trailing 4 bytes in buffer"), Verdict.SUSPECT_MISREAD),
    (ValueError("of a codec"), Verdict.SUSPECT_MISREAD),
    (ConnectionLostError("lost"), Verdict.OTHER),
    (TimeoutError(), Verdict.OTHER),
    (ConnectionResetError(), Verdict.OTHER),
]


@pytest.mark.parametrize(("error", "verdict"), VERDICTS, ids=[f"{type(e).__name__} {e}"[:60] for e, _ in VERDICTS])
def test_an_error_is_judged(error: Exception, verdict: Verdict) -> None:
    assert judge(error, lambda: {23, 17000}) is verdict


@pytest.mark.parametrize(
    ("error", "stale"),
    [
        (INTERNAL("could not resolve query result and/or argument types in 6 attempts"), True),
        (CACHED_PLAN, True),
        (of_server("XX000", "cache lookup failed for type 17000"), True),
        (of_server("26000", 'prepared statement "a" does not exist'), True),
        (INTERNAL("no binary format encoder for type a (OID 5)"), False),
        (of_server("42601", "syntax error"), False),
        (of_server("42P01", 'relation "a" does not exist'), False),
    ],
    ids=str,
)
def test_an_answer_to_a_prepare_is_judged(error: Exception, stale: bool) -> None:
    assert is_stale_when_prepared(error) is stale


class TestHealing:
    def test_only_the_text_that_was_stale_changes_and_once_for_calls_that_fail_together(self) -> None:
        healing = Healing()
        assert not healing.has_tokens
        assert healing.renew("SELECT 1", None, "SELECT 1")
        assert not healing.renew("SELECT 1", None, "SELECT 1")
        renewed = healing.text_of("SELECT 1", None)
        assert renewed.startswith("SELECT 1 /* neon-async ")
        assert healing.text_of("SELECT 2", None) == "SELECT 2"
        assert healing.renew("SELECT 1", None, renewed)
        assert healing.text_of("SELECT 1", None) != renewed
        assert healing.heals == 2

    def test_a_search_path_that_is_known_has_texts_of_its_own(self) -> None:
        healing = Healing()
        healing.renew("SELECT 1", "a", "SELECT 1")
        of_a = healing.text_of("SELECT 1", "a")
        assert healing.text_of("SELECT 1", "b") == healing.text_of("SELECT 1", None) == "SELECT 1"
        healing.renew("SELECT 1", None, "SELECT 1")
        assert healing.text_of("SELECT 1", "a") == of_a
        assert healing.text_of("SELECT 1", "b") == healing.text_of("SELECT 1", None) != "SELECT 1"

    def test_the_texts_that_were_renewed_last_are_kept(self) -> None:
        healing = Healing()
        for number in range(_MAX_TOKENS + 1):
            healing.renew(str(number), None, str(number))
        assert healing.text_of("0", None) == "0"
        assert healing.text_of("1", None) != "1"

    @pytest.mark.parametrize("is_shared", [False, True])
    def test_all_texts_are_renewed_where_a_pooler_shares_statements(self, is_shared: bool) -> None:
        healing = Healing(is_shared=is_shared)
        healing.renew_all()
        assert (healing.text_of("SELECT 1", None) != "SELECT 1") is is_shared
