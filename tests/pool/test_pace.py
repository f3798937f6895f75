"""When the next dial may start: the ramp, the pauses and the breaker, with a clock and a chance that the tests set."""

from __future__ import annotations

import random
from collections.abc import Iterable

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import neon_async
from neon_async._pool.pace import Pace, may_pass

# The numbers of the design, written down once more: a pause is random between 0.25 s and a ceiling of 0.5 s, doubling
# up to 0.75 s, or to 4 s where the server is full; the breaker opens for 0.5 s, doubling up to 10 s.
FLOOR = 0.25
CEILINGS = [0.5, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75]
CROWDED = [0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]
BREAKER = [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
ROUNDING = 1e-6  # seconds: sums of floats are not exact

TRANSIENT = neon_async.ComputeUnavailableError("compute is waking")
FULL = neon_async.TooManyConnectionsError("sorry, too many clients already")
PERMANENT = neon_async.InvalidPasswordError("wrong password")


def pace_after(failures: Iterable[Exception], *, chance: float = 1.0, now: float = 0.0) -> Pace:
    pace = Pace(jitter=lambda: chance)
    for error in failures:
        pace.failed(error, began=now, now=now)
    return pace


def work(pace: Pace, *, began: float = 0.0, now: float = 0.0) -> None:
    """A dial makes a connection, and its session answers a statement."""
    pace.connected(began=began)
    pace.worked(opened_at=now)


def dials_in_a_run(pace: Pace, error: Exception, *, seconds: float) -> list[float]:
    """Return the times at which a pool dials a server that refuses at once, while callers keep acquiring.

    However many callers there are, a pool reads nothing but `allowed()`, `pause()` and `refusal()`.
    """
    now, moments = 0.0, []
    while now < seconds:
        assert pace.pause(now) == 0.0
        assert pace.refusal(now) is None
        for _ in range(pace.allowed(connected=0)):
            moments.append(now)
            pace.failed(error, began=now, now=now)
        assert pace.pause(now) > 0
        now += pace.pause(now) + ROUNDING
    return moments


def most_in_any_second(moments: list[float]) -> int:
    return max((sum(first <= other < first + 1.0 for other in moments) for first in moments), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# The ramp


@pytest.mark.parametrize(
    ("connected", "allowed"),
    [
        pytest.param(0, 1, id="suspended: one goes first"),
        pytest.param(1, 1, id="one"),
        pytest.param(2, 2, id="two"),
        pytest.param(4, 4, id="four"),
        pytest.param(1000, 1000, id="a thousand"),
    ],
)
def test_as_many_dials_are_allowed_as_there_are_connections(connected: int, allowed: int) -> None:
    assert Pace().allowed(connected) == allowed


def test_connections_double_until_the_pool_is_full() -> None:
    pace, connected, steps = Pace(), 0, []
    while connected < 100:
        connected += min(pace.allowed(connected), 100 - connected)
        steps.append(connected)
    assert steps == [1, 2, 4, 8, 16, 32, 64, 100]


@pytest.mark.parametrize("error", [pytest.param(TRANSIENT, id="transient"), pytest.param(PERMANENT, id="permanent")])
def test_after_a_failure_one_dial_is_allowed_until_a_session_has_worked(error: Exception) -> None:
    pace = pace_after([error])
    assert pace.allowed(64) == 1
    assert pace.allowed(0) == 1
    pace.connected(began=0.0)
    assert pace.allowed(64) == 1
    pace.worked(opened_at=0.0)
    assert pace.allowed(64) == 64


# ---------------------------------------------------------------------------------------------------------------------
# Transient failures


@pytest.mark.parametrize(
    ("error", "failures", "ceiling"),
    [
        pytest.param(error, number, ceiling, id=f"{type(error).__name__} {number}")
        for error, ceilings in ((TRANSIENT, CEILINGS), (FULL, CROWDED))
        for number, ceiling in enumerate(ceilings, 1)
    ],
)
@pytest.mark.parametrize("chance", [0.0, 0.25, 0.5, 0.99, 1.0])
def test_a_pause_is_random_between_its_bounds(error: Exception, failures: int, ceiling: float, chance: float) -> None:
    pace = pace_after([error] * failures, chance=chance, now=50.0)
    assert pace.pause(50.0) == pytest.approx(FLOOR + chance * (ceiling - FLOOR))
    assert pace.refusal(50.0) is None


@pytest.mark.parametrize(("connects", "shortest"), [(0, 0.25), (1, 0.25), (2, 0.5), (4, 0.75), (12, 0.75)])
def test_a_dial_of_several_connects_is_followed_by_a_longer_pause(connects: int, shortest: float) -> None:
    """A server that may not speak direct TLS is connected to twice."""
    pace = Pace(jitter=lambda: 0.0)
    for _ in range(5):
        pace.failed(TRANSIENT, began=0.0, now=0.0, connects=connects)
    assert pace.pause(0.0) == pytest.approx(shortest)


def test_a_pause_ends_when_its_time_has_passed() -> None:
    pace = pace_after([TRANSIENT], now=50.0)
    assert pace.pause(50.1) == pytest.approx(0.4)
    assert pace.pause(50.5) == 0.0
    assert pace.pause(1e9) == 0.0


def test_each_pause_has_a_chance_of_its_own() -> None:
    chances = iter([0.5, 1.0])
    pace = Pace(jitter=lambda: next(chances))
    pace.failed(TRANSIENT, began=0.0, now=0.0)
    assert pace.pause(0.0) == pytest.approx(0.375)
    pace.failed(TRANSIENT, began=0.0, now=0.0)
    assert pace.pause(0.0) == pytest.approx(0.75)


# ---------------------------------------------------------------------------------------------------------------------
# Permanent failures


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [pytest.param(number, seconds, id=str(number)) for number, seconds in enumerate(BREAKER, 1)],
)
@pytest.mark.parametrize("chance", [pytest.param(0.0, id="lowest chance"), pytest.param(1.0, id="highest chance")])
def test_the_breaker_opens_for_longer_each_time_whatever_the_chance(
    failures: int, seconds: float, chance: float
) -> None:
    pace = pace_after([PERMANENT] * failures, chance=chance, now=50.0)
    assert pace.pause(50.0) == pytest.approx(seconds)
    assert pace.refusal(50.0) is PERMANENT
    assert pace.refusal(50.0 + seconds * 0.99) is PERMANENT
    assert pace.refusal(50.0 + seconds) is None
    assert pace.pause(50.0 + seconds) == 0.0


def test_one_dial_is_allowed_when_the_breaker_has_closed() -> None:
    pace = pace_after([PERMANENT])
    assert (pace.refusal(0.5), pace.pause(0.5), pace.allowed(10)) == (None, 0.0, 1)
    assert pace.last_failure is PERMANENT


def test_a_transient_failure_closes_the_breaker() -> None:
    pace = pace_after([PERMANENT, TRANSIENT])
    assert pace.refusal(0.0) is None
    assert pace.last_failure is TRANSIENT


def test_the_breaker_raises_the_latest_failure() -> None:
    other = neon_async.EndpointNotFoundError("no such endpoint")
    pace = pace_after([PERMANENT, TRANSIENT, other])
    assert pace.refusal(0.0) is pace.last_failure is other


def test_a_session_that_has_worked_makes_every_failure_forgotten() -> None:
    for error in (TRANSIENT, PERMANENT):
        pace = pace_after([error] * 20)
        work(pace)
        assert (pace.pause(0.0), pace.refusal(0.0), pace.last_failure, pace.allowed(7)) == (0.0, None, None, 7)
        assert repr(pace) == repr(Pace())
        pace.failed(TRANSIENT, began=0.0, now=0.0)
        assert pace.pause(0.0) == pytest.approx(CEILINGS[0])


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        pytest.param([], "<Pace: 0 failures in a row, breaker closed>", id="new"),
        pytest.param([TRANSIENT, TRANSIENT], "<Pace: 2 failures in a row, breaker closed>", id="transient"),
        pytest.param([TRANSIENT, PERMANENT], "<Pace: 2 failures in a row, breaker open>", id="permanent"),
    ],
)
def test_a_repr_shows_the_state(failures: list[Exception], text: str) -> None:
    assert repr(pace_after(failures)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Logins that prove nothing


def test_a_login_closes_the_breaker_and_keeps_the_count_of_failures() -> None:
    pace = pace_after([PERMANENT] * 3, now=50.0)
    pace.connected(began=60.0)
    assert (pace.refusal(60.0), pace.last_failure, pace.allowed(9)) == (None, None, 1)
    pace.failed(TRANSIENT, began=61.0, now=61.0)
    assert repr(pace) == "<Pace: 4 failures in a row, breaker closed>"


def test_until_a_session_has_worked_dials_start_a_quarter_of_a_second_apart() -> None:
    pace = pace_after([TRANSIENT], now=50.0)
    pace.connected(began=60.0)
    assert pace.pause(60.0) == pytest.approx(0.25)
    pace.worked(opened_at=60.1)
    assert pace.pause(60.1) == 0.0


def test_a_first_login_is_followed_by_no_pause() -> None:
    pace = Pace()
    pace.connected(began=60.0)
    assert (pace.pause(60.0), pace.allowed(9)) == (0.0, 9)


def test_a_session_that_began_before_a_failure_says_nothing_about_it() -> None:
    pace = pace_after([TRANSIENT], now=50.0)
    pace.worked(opened_at=49.0)
    assert pace.allowed(9) == 1
    assert pace.last_failure is TRANSIENT


def test_a_session_that_ends_in_vain_counts_as_a_failed_connect() -> None:
    pace = Pace(jitter=lambda: 1.0)
    for number, ceiling in enumerate([0.0, *CEILINGS[1:]], 1):
        pace.connected(began=10.0 * number)
        pace.ended_in_vain(TRANSIENT, opened_at=10.0 * number, now=10.0 * number)
        assert pace.pause(10.0 * number) == pytest.approx(ceiling)
        assert pace.in_vain == number
    assert pace.last_failure is TRANSIENT


def test_sessions_that_end_in_vain_together_count_once() -> None:
    pace = Pace()
    for _ in range(10):
        pace.ended_in_vain(TRANSIENT, opened_at=5.0, now=65.0)
    assert repr(pace) == "<Pace: 1 failures in a row, breaker closed>"
    assert pace.in_vain == 1


@pytest.mark.parametrize("now", [5.0, 65.0])
def test_one_session_that_ends_in_vain_causes_no_pause_and_explains_nothing(now: float) -> None:
    """Its compute may have been suspended."""
    pace = Pace()
    pace.ended_in_vain(TRANSIENT, opened_at=5.0, now=now)
    assert (pace.pause(now), pace.last_failure) == (0.0, None)


def test_sessions_that_end_in_vain_after_a_quiet_minute_cause_no_pause() -> None:
    pace = Pace()
    for minute in range(10):
        pace.connected(began=60.0 * minute)
        pace.ended_in_vain(TRANSIENT, opened_at=60.0 * minute, now=60.0 * minute + 59.0)
    assert pace.pause(60.0 * 9 + 59.0) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Dials for which no caller waits


def test_dials_for_no_caller_start_apart() -> None:
    pace = Pace()
    assert pace.floor_pause(10.0) == 0.0
    pace.floor_dialed(10.0)
    assert pace.floor_pause(10.0) == pytest.approx(0.25)
    assert pace.pause(10.0) == 0.0


def test_dials_for_no_caller_become_rare_where_their_sessions_end_in_vain() -> None:
    pace, now, pauses = Pace(jitter=lambda: 0.0), 100.0, []
    for _ in range(8):
        pace.floor_dialed(now)
        pace.connected(began=now)
        pace.ended_in_vain(TRANSIENT, opened_at=now, now=now)
        pauses.append(pace.floor_pause(now))
        now += pauses[-1]
    assert pauses == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0])
    work(pace, now=now)
    assert pace.floor_pause(now) == 0.0


def test_dials_for_no_caller_become_rare_where_the_server_refuses_them_until_a_login() -> None:
    pace = pace_after([TRANSIENT] * 10, now=50.0)
    pace.floor_dialed(50.0)
    assert (pace.floor_pause(50.0), pace.pause(50.0)) == (10.0, 0.75)
    pace.connected(began=60.0)
    pace.floor_dialed(60.0)
    assert pace.floor_pause(60.0) == pytest.approx(0.25)


@given(st.floats(0, 1), st.floats(0, 3))
def test_whatever_becomes_of_their_sessions_at_most_five_are_dialed_in_any_second(chance: float, life: float) -> None:
    pace, now, moments = Pace(jitter=lambda: chance), 100.0, []
    while now < 110.0:
        moments.append(now)
        pace.floor_dialed(now)
        pace.connected(began=now)
        pace.ended_in_vain(TRANSIENT, opened_at=now, now=now + life)
        now += life + pace.floor_pause(now + life) + ROUNDING
    assert most_in_any_second(moments) <= 5


# ---------------------------------------------------------------------------------------------------------------------
# The caller's own code


def test_a_failure_of_the_callers_code_opens_no_breaker_and_counts_nowhere() -> None:
    pace = Pace()
    pace.stopped_by_caller(began=50.0, connects=0, told=True)
    assert (pace.pause(50.0), pace.refusal(50.0), pace.last_failure, pace.allowed(9)) == (0.0, None, None, 9)


def test_a_failure_of_the_callers_code_on_a_connection_only_spaces_the_connects() -> None:
    pace = Pace()
    for number in range(20):
        pace.stopped_by_caller(began=50.0 + number, connects=1, told=True)
        assert pace.pause(50.0 + number) == pytest.approx(0.25)


def test_a_login_does_not_end_the_pause_after_a_failure_of_the_callers_code() -> None:
    pace = Pace()
    pace.stopped_by_caller(began=50.0, connects=1, told=True)
    pace.connected(began=50.0)
    assert pace.pause(50.0) == pytest.approx(0.25)


def test_a_dial_for_no_caller_that_always_fails_becomes_rare() -> None:
    pace = Pace()
    for _ in range(10):
        pace.stopped_by_caller(began=50.0, connects=0, told=False)
    pace.floor_dialed(50.0)
    assert pace.floor_pause(50.0) == pytest.approx(10.0)
    assert pace.pause(50.0) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Which failures are transient


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        pytest.param(neon_async.ConnectError("reset"), True, id="connection broken"),
        pytest.param(neon_async.ConnectTimeoutError("late"), True, id="timeout"),
        pytest.param(neon_async.ComputeUnavailableError("waking"), True, id="waking"),
        pytest.param(neon_async.TooManyConnectionsError("full"), True, id="full"),
        pytest.param(neon_async.CertificateError("wrong name"), False, id="certificate"),
        pytest.param(neon_async.InvalidPasswordError("wrong"), False, id="password"),
        pytest.param(neon_async.EndpointNotFoundError("unknown"), False, id="unknown endpoint"),
        pytest.param(neon_async.EndpointDisabledError("disabled"), False, id="disabled endpoint"),
        pytest.param(neon_async.QuotaExceededError("used up"), False, id="quota"),
        pytest.param(neon_async.IPNotAllowedError("not allowed"), False, id="address not allowed"),
        pytest.param(neon_async.DatabaseNotFoundError("no such database"), False, id="database"),
        pytest.param(neon_async.PooledHostError("session"), False, id="session feature in init"),
        pytest.param(ValueError("in init"), False, id="error in the caller's init"),
        pytest.param(asyncpg.UndefinedTableError("in init"), False, id="server error in init"),
        pytest.param(TimeoutError("in a password function"), False, id="timeout in a password function"),
    ],
)
def test_a_failure_is_transient_if_its_class_is_retryable(error: Exception, transient: bool) -> None:
    assert may_pass(error) is transient
    assert (pace_after([error]).refusal(0.0) is None) is transient


# ---------------------------------------------------------------------------------------------------------------------
# Many failures


@pytest.mark.parametrize("error", [pytest.param(TRANSIENT, id="transient"), pytest.param(PERMANENT, id="permanent")])
def test_ten_thousand_failures_do_not_overflow(error: Exception) -> None:
    pace = pace_after([error] * 10_000, now=1e9)
    assert pace.pause(1e9) == (0.75 if error is TRANSIENT else 10.0)
    assert pace.allowed(100) == 1


@pytest.mark.parametrize("error", [pytest.param(FULL, id="transient"), pytest.param(PERMANENT, id="permanent")])
def test_dials_that_were_under_way_together_count_as_one_failure(error: Exception) -> None:
    alone, together = pace_after([error], now=5.0), pace_after([error], now=5.0)
    for moment in (5.0, 5.1, 5.2):
        together.failed(error, began=4.0, now=moment)
    assert together.pause(5.2) == pytest.approx(alone.pause(5.0))
    together.failed(error, began=6.0, now=7.0)
    assert together.pause(7.0) == pytest.approx(2 * alone.pause(5.0))


# A thousand fixed seeds, so that the test is the same on every machine.
@pytest.mark.parametrize(
    ("error", "most_at_first", "most_later", "most_in_a_minute"),
    [
        pytest.param(TRANSIENT, 5, 5, 150, id="transient"),
        pytest.param(PERMANENT, 2, 1, 10, id="permanent"),
    ],
)
def test_no_more_than_a_handful_of_dials_a_second_reach_a_refusing_server(
    error: Exception, most_at_first: int, most_later: int, most_in_a_minute: int
) -> None:
    runs = [dials_in_a_run(Pace(jitter=random.Random(seed).random), error, seconds=60.0) for seed in range(1000)]
    assert max(map(most_in_any_second, runs)) <= most_at_first
    assert max(most_in_any_second([moment for moment in run if moment >= 1.0]) for run in runs) <= most_later
    assert max(map(len, runs)) <= most_in_a_minute


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_whatever_the_chances_there_are_at_most_five_dials_in_any_second(chances: list[float]) -> None:
    def endless() -> float:
        chances.append(chances.pop(0))
        return chances[-1]

    assert most_in_any_second(dials_in_a_run(Pace(jitter=endless), TRANSIENT, seconds=5.0)) <= 5


class AnyRun(RuleBasedStateMachine):
    """Dials that succeed and fail in any order, while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = 0.0
        self.now = 1000.0
        self.failures = 0
        self.latest: Exception | None = None
        self.due = 0.0  # the latest time at which the next dial may start
        self.pace = Pace(jitter=lambda: self.chance)

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(chance=st.floats(0, 1), times=st.integers(1, 30))
    def a_dial_fails_for_a_transient_reason(self, chance: float, times: int) -> None:
        self.chance = chance
        for _ in range(times):
            self.pace.failed(TRANSIENT, began=self.now, now=self.now)
        self.failures, self.latest = self.failures + times, TRANSIENT
        ceiling = CEILINGS[min(self.failures, len(CEILINGS)) - 1]
        assert FLOOR - ROUNDING <= self.pace.pause(self.now) <= ceiling + ROUNDING
        self.due = self.now + ceiling

    @rule(times=st.integers(1, 30))
    def a_dial_fails_for_a_permanent_reason(self, times: int) -> None:
        for _ in range(times):
            self.pace.failed(PERMANENT, began=self.now, now=self.now)
        self.failures, self.latest = self.failures + times, PERMANENT
        seconds = BREAKER[min(self.failures, len(BREAKER)) - 1]
        assert abs(self.pace.pause(self.now) - seconds) <= ROUNDING
        self.due = self.now + seconds

    @rule()
    def a_session_works(self) -> None:
        work(self.pace, began=self.now, now=self.now)
        self.failures, self.latest, self.due = 0, None, 0.0

    @rule()
    def a_dial_succeeds(self) -> None:
        self.pace.connected(began=self.now)
        self.latest, self.due = None, self.now + FLOOR

    @rule()
    def the_pause_passes(self) -> None:
        self.now += self.pace.pause(self.now)
        assert self.pace.pause(self.now) <= ROUNDING

    @invariant()
    def a_pause_is_bounded_and_follows_a_failure(self) -> None:
        pause = self.pace.pause(self.now)
        assert 0.0 <= pause <= 10.0 + ROUNDING
        assert self.now + pause <= max(self.now, self.due) + ROUNDING
        assert pause == 0.0 or self.failures

    @invariant()
    def the_breaker_is_open_only_during_the_pause_after_a_permanent_failure(self) -> None:
        refusal = self.pace.refusal(self.now)
        assert refusal is (self.latest if self.latest is PERMANENT and self.pace.pause(self.now) else None)

    @invariant()
    def the_latest_failure_since_a_login_is_kept(self) -> None:
        assert self.pace.last_failure is self.latest

    @invariant()
    def dials_double_or_go_one_at_a_time(self) -> None:
        for connected in (0, 1, 9):
            assert self.pace.allowed(connected) == (1 if self.failures else max(1, connected))


TestAnyRun = AnyRun.TestCase
TestAnyRun.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
