"""The waiting line is fair, and nothing that is given is lost or given twice, whenever a waiter leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.probes import HANG

from neon_async._pool.waiters import WaitQueue
from neon_async._timing import Timer

NEVER = 1e9  # as a time of the event loop: not within this test


class Counter:
    """A line at a counter: what comes back goes to the next, or to the shelf where nobody waits."""

    def __init__(self) -> None:
        self.shelf: list[str] = []
        self.came_back: list[str] = []
        self.line: WaitQueue[str] = WaitQueue(give_back=self._take_back)

    def _take_back(self, thing: str) -> None:
        self.came_back.append(thing)
        if not self.line.hand_over(thing):
            self.shelf.append(thing)

    async def wait(self, *, front: bool = False, until: float = NEVER) -> str:
        return await self.line.wait(self.line.join(until, front=front))


async def started(*waits: Any) -> list[asyncio.Task[str]]:
    """Return tasks that have joined the line, in this order."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.sleep(0)
    return tasks


async def outcomes(tasks: list[asyncio.Task[str]]) -> list[str]:
    """Return what became of each: what it was given, or the name of what it raised."""
    await asyncio.wait(tasks, timeout=HANG)
    return [outcome(task) for task in tasks]


def outcome(task: asyncio.Task[str]) -> str:
    if task.cancelled():
        return "CancelledError"
    error = task.exception()  # of a task that still waits, raises
    return type(error).__name__ if error else task.result()


class Timers:
    """The timers that the line sets from now on, by when they are due."""

    def __init__(self, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = loop
        self.made: list[tuple[float, asyncio.Handle]] = []
        self._run: set[float] = set()
        call_at = loop.call_at

        def watched(when: float, callback: Callable[..., Any], *args: Any, **keywords: Any) -> asyncio.Handle:
            if not isinstance(getattr(callback, "__self__", None), Timer):
                return call_at(when, callback, *args, **keywords)

            def run() -> None:
                self._run.add(when)
                callback(*args)

            self.made.append((when, call_at(when, run, **keywords)))
            return self.made[-1][1]

        monkeypatch.setattr(loop, "call_at", watched)

    def standing(self) -> list[float]:
        return [when for when, timer in self.made if not timer.cancelled() and when not in self._run]


@pytest.fixture
async def nothing_is_reported() -> Any:
    """No future is left with an exception that nobody has seen, and no callback fails."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    yield
    gc.collect(1)
    await asyncio.sleep(0)
    assert reported == []


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_is_reported")
class TestFairness:
    async def test_who_comes_first_is_served_first(self) -> None:
        counter = Counter()
        tasks = await started(*(counter.wait() for _ in range(5)))
        assert all(counter.line.hand_over(thing) for thing in "abcde")
        assert await outcomes(tasks) == list("abcde")

    async def test_who_was_served_in_vain_stands_in_front(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait(), counter.wait(front=True), counter.wait())
        assert all(counter.line.hand_over(thing) for thing in "abcd")
        assert await outcomes(tasks) == ["b", "c", "a", "d"]

    async def test_where_nobody_waits_nothing_is_taken(self) -> None:
        counter = Counter()
        assert not counter.line.hand_over("a")
        [task] = await started(counter.wait())
        assert not task.done()
        assert counter.line.hand_over("b")
        assert not counter.line.hand_over("c")
        assert await outcomes([task]) == ["b"]

    async def test_what_is_given_before_the_turn_is_awaited_is_there_at_once(self) -> None:
        line = Counter().line
        waiter = line.join(NEVER)
        assert line.hand_over("a")
        with pytest.raises(StopIteration) as stopped:
            line.wait(waiter).send(None)  # the coroutine ends without having waited for anything
        assert stopped.value.value == "a"

    async def test_its_length_and_repr_tell_who_waits(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait())
        assert (len(counter.line), bool(counter.line), repr(counter.line)) == (2, True, "<WaitQueue: 2 waiting>")
        counter.line.hand_over("a")
        counter.line.hand_over("b")
        assert (len(counter.line), bool(counter.line), repr(counter.line)) == (0, False, "<WaitQueue: 0 waiting>")
        await outcomes(tasks)


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_is_reported")
class TestWhoLeaves:
    async def test_a_waiter_that_left_before_the_gift_is_passed_over(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait())
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert len(counter.line) == 1
        assert counter.line.hand_over("a")
        assert await outcomes(tasks) == ["CancelledError", "a"]
        assert counter.came_back == []

    async def test_a_waiter_that_leaves_in_the_moment_before_the_gift_is_passed_over(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait())
        tasks[0].cancel()
        assert counter.line.hand_over("a")
        assert await outcomes(tasks) == ["CancelledError", "a"]
        assert counter.came_back == []

    async def test_only_waiters_that_are_leaving_are_nobody(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait())
        for task in tasks:
            task.cancel()
        assert not counter.line.hand_over("a")
        assert await outcomes(tasks) == ["CancelledError"] * 2

    async def test_a_waiter_that_leaves_in_the_moment_after_the_gift_gives_it_back_once(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait())
        assert counter.line.hand_over("a")
        tasks[0].cancel()
        assert await outcomes(tasks) == ["CancelledError", "a"]
        assert counter.came_back == ["a"]

    async def test_a_waiter_that_has_taken_its_gift_keeps_it(self) -> None:
        counter = Counter()
        taken = asyncio.Event()

        async def customer() -> str:
            thing = await counter.wait()
            taken.set()
            await asyncio.sleep(HANG)
            return thing

        tasks = await started(customer(), counter.wait())
        assert counter.line.hand_over("a")
        async with asyncio.timeout(HANG):
            await taken.wait()
        tasks[0].cancel()
        assert counter.line.hand_over("b")
        assert await outcomes(tasks) == ["CancelledError", "b"]
        assert counter.came_back == []

    async def test_a_gift_goes_through_the_hands_of_all_who_leave(self) -> None:
        counter = Counter()
        tasks = await started(*(counter.wait() for _ in range(100)))

        def cancel_next(number: int) -> None:
            tasks[number].cancel()  # who has been given it in the iteration before
            if number < 98:
                asyncio.get_running_loop().call_soon(cancel_next, number + 1)

        assert counter.line.hand_over("a")
        cancel_next(0)
        assert await outcomes(tasks) == ["CancelledError"] * 99 + ["a"]
        assert counter.shelf == []
        assert set(counter.came_back) == {"a"}

    async def test_a_waiter_whose_time_is_over_leaves(self) -> None:
        counter, now = Counter(), asyncio.get_running_loop().time()
        tasks = await started(counter.wait(until=now), counter.wait(), counter.wait(until=now - 5))
        assert await outcomes([tasks[0], tasks[2]]) == ["WaitExpired"] * 2
        assert len(counter.line) == 1
        assert counter.line.hand_over("a")
        assert await outcomes(tasks) == ["WaitExpired", "a", "WaitExpired"]

    @pytest.mark.parametrize("gift_first", [True, False], ids=["gift, then deadline", "deadline, then gift"])
    async def test_a_gift_in_the_moment_of_the_deadline_is_not_lost(self, gift_first: bool) -> None:
        counter, loop = Counter(), asyncio.get_running_loop()
        moment = loop.time() + 0.01
        if gift_first:
            loop.call_at(moment, counter.line.hand_over, "a")
        tasks = await started(counter.wait(until=moment), counter.wait())
        if not gift_first:
            loop.call_at(moment, counter.line.hand_over, "a")
        await outcomes(tasks[:1])
        left = counter.line.hand_over("b")
        # The timers of an event loop are not exact: either may have been the first.
        assert (await outcomes(tasks), left) in ((["a", "b"], True), (["WaitExpired", "a"], False))
        assert counter.came_back == []

    async def test_all_deadlines_of_the_line_share_one_timer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counter, timers = Counter(), Timers(asyncio.get_running_loop(), monkeypatch)
        now = timers.loop.time()
        tasks = await started(*(counter.wait(until=now + HANG + number) for number in range(1000)))
        assert len(timers.made) == 1
        tasks += await started(counter.wait(until=now))  # the first to leave is not the last to come
        assert len(timers.standing()) == 1
        assert await outcomes(tasks[-1:]) == ["WaitExpired"]
        assert timers.standing() == [now + HANG]
        counter.line.close(LookupError)
        assert timers.standing() == []
        await outcomes(tasks)

    async def test_ten_thousand_waiters_leave_from_the_end_without_a_search(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        comparisons = 0

        class Watched(asyncio.Future[Any]):
            """A future that counts to how many others it is compared: a search through the line would."""

            def __eq__(self, other: object) -> bool:
                nonlocal comparisons
                comparisons += 1
                return self is other

            __hash__ = asyncio.Future.__hash__

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "create_future", lambda: Watched(loop=loop))
        counter = Counter()
        tasks = await started(*(counter.wait() for _ in range(10_000)))
        assert len(counter.line) == 10_000
        monkeypatch.undo()
        for task in reversed(tasks):
            task.cancel()
        assert set(await outcomes(tasks)) == {"CancelledError"}
        assert len(counter.line) == 0
        assert comparisons < 10_000


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_is_reported")
class TestRefusals:
    @pytest.mark.parametrize(
        ("count", "refused"),
        [
            pytest.param(-3, 0, id="fewer than none"),
            pytest.param(0, 0, id="none"),
            pytest.param(1, 1, id="one"),
            pytest.param(3, 3, id="some"),
            pytest.param(4, 4, id="all"),
            pytest.param(9, 4, id="more than there are"),
        ],
    )
    async def test_the_last_are_refused_and_the_first_keep_their_place(self, count: int, refused: int) -> None:
        counter = Counter()
        tasks = await started(*(counter.wait() for _ in range(4)))
        counter.line.fail(count, lambda: LookupError("sold out"))
        served = 4 - refused
        assert len(counter.line) == served
        for thing in "abcd"[:served]:
            assert counter.line.hand_over(thing)
        assert not counter.line.hand_over("e")
        assert await outcomes(tasks) == list("abcd"[:served]) + ["LookupError"] * refused

    async def test_a_line_that_closes_refuses_all_and_forgets_the_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counter, timers = Counter(), Timers(asyncio.get_running_loop(), monkeypatch)
        counter.line.close(LookupError)  # nobody is there
        tasks = await started(counter.wait(), counter.wait())
        counter.line.close(LookupError)
        assert (len(counter.line), timers.standing()) == (0, [])
        assert await outcomes(tasks) == ["LookupError"] * 2
        counter.line.close(LookupError)

    async def test_each_is_refused_with_an_exception_of_its_own(self) -> None:
        counter = Counter()
        tasks = await started(counter.wait(), counter.wait())
        counter.line.fail(2, lambda: LookupError("sold out"))
        await outcomes(tasks)
        assert tasks[0].exception() is not tasks[1].exception()

    @pytest.mark.parametrize("refused_first", [True, False], ids=["refused, leaves", "leaves, is refused"])
    async def test_a_waiter_that_leaves_while_it_is_refused_is_cancelled(self, refused_first: bool) -> None:
        counter = Counter()
        [task] = await started(counter.wait())
        if not refused_first:
            task.cancel()
        counter.line.fail(1, lambda: LookupError("sold out"))
        if refused_first:
            task.cancel()
        assert await outcomes([task]) == ["CancelledError"]
        assert (counter.came_back, len(counter.line)) == ([], 0)


# ---------------------------------------------------------------------------------------------------------------------
# Anything, in any order


class Clock:
    """A clock that goes on when a test says so, and the one timer set on it: what a line knows of its event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timer: tuple[float, Callable[[], object]] | None = None

    def call_at(self, when: float, callback: Callable[[], object]) -> Clock:
        assert self.timer is None, "two timers"
        self.timer = when, callback
        return self

    def when(self) -> float:
        assert self.timer is not None
        return self.timer[0]

    def cancel(self) -> None:
        self.timer = None

    def go_on(self, seconds: float) -> None:
        self.now += seconds
        while self.timer is not None and self.timer[0] <= self.now:
            callback, self.timer = self.timer[1], None
            callback()


class AnyDay(RuleBasedStateMachine):
    """A line beside the plain list that it should behave like.

    Gifts, refusals, cancellations and the ends of deadlines come without a pause between them; what they lead to is
    seen once tasks run.
    """

    new_event_loop: ClassVar[Callable[[], asyncio.AbstractEventLoop]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = type(self).new_event_loop()
        self.reported: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.reported.append(context))
        self.clock = Clock()
        self.counter = Counter()
        self.tasks: dict[int, asyncio.Task[str]] = {}
        self.things: Iterator[str] = (f"thing {number}" for number in range(1_000_000))
        # The model: who stands in line, leaving or not; whom what was given since tasks ran; and what became of all.
        self.line: list[int] = []
        self.deadlines: dict[int, float] = {}
        self.leaving: dict[int, str] = {}
        self.given: list[tuple[int, str]] = []
        self.shelf: list[str] = []
        self.expected: dict[int, str] = {}

    def teardown(self) -> None:
        try:
            self.leaving |= {number: "CancelledError" for number, task in self.tasks.items() if task.cancel()}
            self.tasks_run()
            gc.collect(1)
            assert self.reported == []
        finally:
            self.loop.close()

    @contextlib.contextmanager
    def time_as_told(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.loop, "time", lambda: self.clock.now)
            patched.setattr(self.loop, "call_at", self.clock.call_at)
            yield

    @rule(front=st.booleans(), patience=st.lists(st.integers(1, 5), min_size=1, max_size=3))
    def some_join(self, front: bool, patience: list[int]) -> None:
        for seconds in patience:
            self.tasks_run()
            number = len(self.tasks)
            self.deadlines[number] = until = self.clock.now + seconds
            self.tasks[number] = self.loop.create_task(self.counter.wait(front=front, until=until))
            self.line.insert(0 if front else len(self.line), number)
            self.tasks_run()

    @rule()
    def a_thing_is_given(self) -> None:
        thing = next(self.things)
        given = self.counter.line.hand_over(thing)
        assert given == self.model_gives(thing)
        if not given:
            self.counter.shelf.append(thing)

    def model_gives(self, thing: str) -> bool:
        while self.line:
            number = self.line.pop(0)
            if number not in self.leaving:
                self.given.append((number, thing))
                return True
        self.shelf.append(thing)
        return False

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def a_waiter_leaves(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tasks)[-8:]))
        if self.tasks[number].cancel():
            self.leaving[number] = "CancelledError"

    @rule(seconds=st.integers(1, 3))
    def time_goes_by(self, seconds: int) -> None:
        with self.time_as_told():
            asyncio._set_running_loop(self.loop)  # as the event loop does, which runs no task before the next rule
            self.clock.go_on(seconds)
            asyncio._set_running_loop(None)
        for number in [number for number in self.line if self.deadlines[number] <= self.clock.now]:
            self.line.remove(number)
            self.leaving.setdefault(number, "WaitExpired")

    @rule(count=st.integers(0, 3))
    def the_last_are_refused(self, count: int) -> None:
        self.counter.line.fail(count, lambda: LookupError("sold out"))
        for _ in range(min(count, len(self.line))):
            self.expected[self.line.pop()] = "LookupError"

    @rule()
    def tasks_run(self) -> None:
        async def run() -> None:
            for _ in range(2 * len(self.tasks) + 2):
                await asyncio.sleep(0)

        with self.time_as_told():
            self.loop.run_until_complete(run())
        while self.given:
            number, thing = self.given.pop(0)
            if number in self.leaving:
                self.model_gives(thing)
            else:
                self.expected[number] = thing
        self.line = [number for number in self.line if number not in self.leaving]
        self.expected |= self.leaving
        self.leaving.clear()
        self.every_waiter_has_what_the_list_says()

    def every_waiter_has_what_the_list_says(self) -> None:
        assert {number: outcome(task) for number, task in self.tasks.items() if task.done()} == self.expected

    @invariant()
    def the_line_is_as_long_as_the_list(self) -> None:
        assert len(self.counter.line) == len(self.line)

    @invariant()
    def nothing_is_lost_and_nothing_given_twice(self) -> None:
        assert self.counter.shelf == self.shelf


class AnyDayOnAsyncio(AnyDay):
    new_event_loop = asyncio.new_event_loop


class AnyDayOnUvloop(AnyDay):
    new_event_loop = uvloop.new_event_loop


_examples = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestAnyDayOnAsyncio, TestAnyDayOnUvloop = AnyDayOnAsyncio.TestCase, AnyDayOnUvloop.TestCase
TestAnyDayOnAsyncio.settings = TestAnyDayOnUvloop.settings = _examples
