"""The wait queue is fair, and nothing that is handed over is lost or handed over twice, whenever a waiter leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

import pytest
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.probes import HANG, nothing_is_reported

from neon_async._pool.waiters import WaitQueue
from neon_async._timing import Timer

NEVER = 1e9  # as a time of the event loop: not within this test


class Owner:
    """The owner of a queue: what is given back goes to the next waiter, or to the shelf if no waiter is left."""

    def __init__(self) -> None:
        self.shelf: list[str] = []
        self.given_back: list[str] = []
        self.queue: WaitQueue[str] = WaitQueue(give_back=self._take_back)

    def _take_back(self, thing: str) -> None:
        self.given_back.append(thing)
        if not self.queue.hand_over(thing):
            self.shelf.append(thing)

    async def wait(self, *, front: bool = False, until: float = NEVER) -> str:
        waiter = self.queue.join(until, front=front)
        try:
            return await waiter
        except BaseException:
            self.queue.leave(waiter)
            raise


async def started(*waits: Any) -> list[asyncio.Task[str]]:
    """Return tasks that have joined the queue, in this order."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.sleep(0)
    return tasks


async def outcomes(tasks: list[asyncio.Task[str]]) -> list[str]:
    """Return the outcome of each: what was handed to it, or the name of what it raised."""
    await asyncio.wait(tasks, timeout=HANG)
    return [outcome(task) for task in tasks]


def outcome(task: asyncio.Task[str]) -> str:
    if task.cancelled():
        return "CancelledError"
    error = task.exception()  # raises if the task still waits
    return type(error).__name__ if error else task.result()


class Timers:
    """The timers that the queue sets from now on, by when they are due."""

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
async def quiet() -> AsyncIterator[None]:
    async with nothing_is_reported():
        yield


@pytest.mark.anyio
@pytest.mark.usefixtures("quiet")
class TestFairness:
    async def test_waiters_are_served_first_come_first_served(self) -> None:
        owner = Owner()
        tasks = await started(*(owner.wait() for _ in range(5)))
        assert all(owner.queue.hand_over(thing) for thing in "abcde")
        assert await outcomes(tasks) == list("abcde")

    async def test_a_waiter_that_joins_at_the_front_is_served_first(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait(), owner.wait(front=True), owner.wait())
        assert all(owner.queue.hand_over(thing) for thing in "abcd")
        assert await outcomes(tasks) == ["b", "c", "a", "d"]

    async def test_without_a_waiter_nothing_is_handed_over(self) -> None:
        owner = Owner()
        assert not owner.queue.hand_over("a")
        [task] = await started(owner.wait())
        assert not task.done()
        assert owner.queue.hand_over("b")
        assert not owner.queue.hand_over("c")
        assert await outcomes([task]) == ["b"]

    async def test_what_is_handed_over_before_the_waiter_waits_is_returned_at_once(self) -> None:
        queue = Owner().queue
        waiter = queue.join(NEVER)
        assert queue.hand_over("a")
        assert waiter.result() == "a"

    @pytest.mark.parametrize("handed_over", [False, True])
    async def test_a_coroutine_that_is_closed_leaves_the_queue_and_loses_nothing(self, handed_over: bool) -> None:
        owner = Owner()
        waiting = owner.wait()
        waiting.send(None)
        assert not handed_over or owner.queue.hand_over("a")
        waiting.close()
        assert (len(owner.queue), owner.given_back) == (0, ["a"] * handed_over)

    async def test_its_length_and_repr_count_the_waiters(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait())
        assert (len(owner.queue), bool(owner.queue), repr(owner.queue)) == (2, True, "<WaitQueue: 2 waiting>")
        owner.queue.hand_over("a")
        owner.queue.hand_over("b")
        assert (len(owner.queue), bool(owner.queue), repr(owner.queue)) == (0, False, "<WaitQueue: 0 waiting>")
        await outcomes(tasks)


@pytest.mark.anyio
@pytest.mark.usefixtures("quiet")
class TestWaitersThatLeave:
    async def test_a_waiter_that_left_before_the_hand_over_is_passed_over(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait())
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert len(owner.queue) == 1
        assert owner.queue.hand_over("a")
        assert await outcomes(tasks) == ["CancelledError", "a"]
        assert owner.given_back == []

    async def test_a_waiter_that_is_cancelled_just_before_the_hand_over_is_passed_over(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait())
        tasks[0].cancel()
        assert owner.queue.hand_over("a")
        assert await outcomes(tasks) == ["CancelledError", "a"]
        assert owner.given_back == []

    async def test_waiters_that_are_all_cancelled_count_as_none(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait())
        for task in tasks:
            task.cancel()
        assert not owner.queue.hand_over("a")
        assert await outcomes(tasks) == ["CancelledError"] * 2

    async def test_a_waiter_that_is_cancelled_just_after_the_hand_over_gives_it_back_once(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait())
        assert owner.queue.hand_over("a")
        tasks[0].cancel()
        assert await outcomes(tasks) == ["CancelledError", "a"]
        assert owner.given_back == ["a"]

    async def test_a_waiter_that_has_returned_keeps_what_was_handed_over(self) -> None:
        owner = Owner()
        taken = asyncio.Event()

        async def caller() -> str:
            thing = await owner.wait()
            taken.set()
            await asyncio.sleep(HANG)
            return thing

        tasks = await started(caller(), owner.wait())
        assert owner.queue.hand_over("a")
        async with asyncio.timeout(HANG):
            await taken.wait()
        tasks[0].cancel()
        assert owner.queue.hand_over("b")
        assert await outcomes(tasks) == ["CancelledError", "b"]
        assert owner.given_back == []

    async def test_what_is_handed_over_passes_all_waiters_that_are_cancelled(self) -> None:
        owner = Owner()
        tasks = await started(*(owner.wait() for _ in range(100)))

        def cancel_next(number: int) -> None:
            tasks[number].cancel()  # it was handed over to this one in the previous iteration
            if number < 98:
                asyncio.get_running_loop().call_soon(cancel_next, number + 1)

        assert owner.queue.hand_over("a")
        cancel_next(0)
        assert await outcomes(tasks) == ["CancelledError"] * 99 + ["a"]
        assert owner.shelf == []
        assert set(owner.given_back) == {"a"}

    async def test_a_waiter_leaves_at_its_deadline(self) -> None:
        owner, now = Owner(), asyncio.get_running_loop().time()
        tasks = await started(owner.wait(until=now), owner.wait(), owner.wait(until=now - 5))
        assert await outcomes([tasks[0], tasks[2]]) == ["WaitExpired"] * 2
        assert len(owner.queue) == 1
        assert owner.queue.hand_over("a")
        assert await outcomes(tasks) == ["WaitExpired", "a", "WaitExpired"]

    @pytest.mark.parametrize("first", ["hand-over", "deadline"])
    async def test_a_hand_over_at_the_moment_of_the_deadline_is_not_lost(self, first: str) -> None:
        owner, loop = Owner(), asyncio.get_running_loop()
        moment = loop.time() + 0.01
        if first == "hand-over":
            loop.call_at(moment, owner.queue.hand_over, "a")
        tasks = await started(owner.wait(until=moment), owner.wait())
        if first == "deadline":
            loop.call_at(moment, owner.queue.hand_over, "a")
        await outcomes(tasks[:1])
        left = owner.queue.hand_over("b")
        # The timers of an event loop are not exact: either may have come first.
        assert (await outcomes(tasks), left) in ((["a", "b"], True), (["WaitExpired", "a"], False))
        assert owner.given_back == []

    async def test_all_deadlines_share_one_timer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        owner, timers = Owner(), Timers(asyncio.get_running_loop(), monkeypatch)
        now = timers.loop.time()
        tasks = await started(*(owner.wait(until=now + HANG + number) for number in range(1000)))
        assert len(timers.made) == 1
        tasks += await started(owner.wait(until=now))  # the first to leave is not the last to come
        assert len(timers.standing()) == 1
        assert await outcomes(tasks[-1:]) == ["WaitExpired"]
        assert timers.standing() == [now + HANG]
        owner.queue.close(LookupError)
        assert timers.standing() == []
        await outcomes(tasks)

    async def test_ten_thousand_waiters_leave_from_the_end_without_a_search(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        comparisons = 0

        class Watched(asyncio.Future[Any]):
            """A future that counts how often it is compared, as a search through the queue does."""

            def __eq__(self, other: object) -> bool:
                nonlocal comparisons
                comparisons += 1
                return self is other

            __hash__ = asyncio.Future.__hash__

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "create_future", lambda: Watched(loop=loop))
        owner = Owner()
        tasks = await started(*(owner.wait() for _ in range(10_000)))
        assert len(owner.queue) == 10_000
        monkeypatch.undo()
        for task in reversed(tasks):
            task.cancel()
        assert set(await outcomes(tasks)) == {"CancelledError"}
        assert len(owner.queue) == 0
        assert comparisons < 10_000


@pytest.mark.anyio
@pytest.mark.usefixtures("quiet")
class TestFailures:
    @pytest.mark.parametrize(
        ("count", "failing"),
        [
            pytest.param(-3, 0, id="fewer than none"),
            pytest.param(0, 0, id="none"),
            pytest.param(1, 1, id="one"),
            pytest.param(3, 3, id="some"),
            pytest.param(4, 4, id="all"),
            pytest.param(9, 4, id="more than there are"),
        ],
    )
    async def test_the_last_waiters_fail_and_the_first_keep_their_place(self, count: int, failing: int) -> None:
        owner = Owner()
        tasks = await started(*(owner.wait() for _ in range(4)))
        owner.queue.fail(count, lambda: LookupError("none left"))
        served = 4 - failing
        assert len(owner.queue) == served
        for thing in "abcd"[:served]:
            assert owner.queue.hand_over(thing)
        assert not owner.queue.hand_over("e")
        assert await outcomes(tasks) == list("abcd"[:served]) + ["LookupError"] * failing

    async def test_closing_the_queue_fails_all_waiters_and_stops_the_timer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        owner, timers = Owner(), Timers(asyncio.get_running_loop(), monkeypatch)
        owner.queue.close(LookupError)  # without a waiter
        tasks = await started(owner.wait(), owner.wait())
        owner.queue.close(LookupError)
        assert (len(owner.queue), timers.standing()) == (0, [])
        assert await outcomes(tasks) == ["LookupError"] * 2
        owner.queue.close(LookupError)

    async def test_each_waiter_raises_an_exception_of_its_own(self) -> None:
        owner = Owner()
        tasks = await started(owner.wait(), owner.wait())
        owner.queue.fail(2, lambda: LookupError("none left"))
        await outcomes(tasks)
        assert tasks[0].exception() is not tasks[1].exception()

    @pytest.mark.parametrize("first", ["failure", "cancellation"])
    async def test_a_waiter_that_fails_and_is_cancelled_at_once_is_cancelled(self, first: str) -> None:
        owner = Owner()
        [task] = await started(owner.wait())
        if first == "cancellation":
            task.cancel()
        owner.queue.fail(1, lambda: LookupError("none left"))
        if first == "failure":
            task.cancel()
        assert await outcomes([task]) == ["CancelledError"]
        assert (owner.given_back, len(owner.queue)) == ([], 0)


# ---------------------------------------------------------------------------------------------------------------------
# Any sequence of events


class Clock:
    """A clock that the test sets, with the one timer that is set on it: all that a queue uses of its event loop."""

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

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while self.timer is not None and self.timer[0] <= self.now:
            callback, self.timer = self.timer[1], None
            callback()


class AnySequence(RuleBasedStateMachine):
    """A queue, compared with a plain list that it should behave like.

    Hand-overs, failures, cancellations and deadlines follow each other without a pause; what comes of them is checked
    when the tasks have run.
    """

    new_event_loop: ClassVar[Callable[[], asyncio.AbstractEventLoop]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = type(self).new_event_loop()
        self.reported: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.reported.append(context))
        self.clock = Clock()
        self.owner = Owner()
        self.tasks: dict[int, asyncio.Task[str]] = {}
        self.things: Iterator[str] = (f"thing {number}" for number in range(1_000_000))
        # The model: the waiters in order, leaving or not; the hand-overs since the tasks ran; and all outcomes.
        self.waiting: list[int] = []
        self.deadlines: dict[int, float] = {}
        self.leaving: dict[int, str] = {}
        self.handed_over: list[tuple[int, str]] = []
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
    def own_clock(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.loop, "time", lambda: self.clock.now)
            patched.setattr(self.loop, "call_at", self.clock.call_at)
            yield

    @rule(front=st.booleans(), patience=st.lists(st.integers(1, 5), min_size=1, max_size=3))
    def waiters_join(self, front: bool, patience: list[int]) -> None:
        for seconds in patience:
            self.tasks_run()
            number = len(self.tasks)
            self.deadlines[number] = until = self.clock.now + seconds
            self.tasks[number] = self.loop.create_task(self.owner.wait(front=front, until=until))
            self.waiting.insert(0 if front else len(self.waiting), number)
            self.tasks_run()

    @rule()
    def a_thing_is_handed_over(self) -> None:
        thing = next(self.things)
        done = self.owner.queue.hand_over(thing)
        assert done == self.model_hands_over(thing)
        if not done:
            self.owner.shelf.append(thing)

    def model_hands_over(self, thing: str) -> bool:
        while self.waiting:
            number = self.waiting.pop(0)
            if number not in self.leaving:
                self.handed_over.append((number, thing))
                return True
        self.shelf.append(thing)
        return False

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def a_waiter_is_cancelled(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tasks)[-8:]))
        if self.tasks[number].cancel():
            self.leaving[number] = "CancelledError"

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        with self.own_clock():
            asyncio._set_running_loop(self.loop)  # no task runs before the next rule
            self.clock.advance(seconds)
            asyncio._set_running_loop(None)
        for number in [number for number in self.waiting if self.deadlines[number] <= self.clock.now]:
            self.waiting.remove(number)
            self.leaving.setdefault(number, "WaitExpired")

    @rule(count=st.integers(0, 3))
    def the_last_waiters_fail(self, count: int) -> None:
        self.owner.queue.fail(count, lambda: LookupError("none left"))
        for _ in range(min(count, len(self.waiting))):
            self.expected[self.waiting.pop()] = "LookupError"

    @rule()
    def tasks_run(self) -> None:
        async def run() -> None:
            for _ in range(2 * len(self.tasks) + 2):
                await asyncio.sleep(0)

        with self.own_clock():
            self.loop.run_until_complete(run())
        while self.handed_over:
            number, thing = self.handed_over.pop(0)
            if number in self.leaving:
                self.model_hands_over(thing)
            else:
                self.expected[number] = thing
        self.waiting = [number for number in self.waiting if number not in self.leaving]
        self.expected |= self.leaving
        self.leaving.clear()
        self.the_outcomes_are_those_of_the_model()

    def the_outcomes_are_those_of_the_model(self) -> None:
        assert {number: outcome(task) for number, task in self.tasks.items() if task.done()} == self.expected

    @invariant()
    def the_queue_is_as_long_as_the_list(self) -> None:
        assert len(self.owner.queue) == len(self.waiting)

    @invariant()
    def nothing_is_lost_and_nothing_is_handed_over_twice(self) -> None:
        assert self.owner.shelf == self.shelf


class AnySequenceOnAsyncio(AnySequence):
    new_event_loop = asyncio.new_event_loop


class AnySequenceOnUvloop(AnySequence):
    new_event_loop = uvloop.new_event_loop


_examples = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestAnySequenceOnAsyncio, TestAnySequenceOnUvloop = AnySequenceOnAsyncio.TestCase, AnySequenceOnUvloop.TestCase
TestAnySequenceOnAsyncio.settings = TestAnySequenceOnUvloop.settings = _examples
