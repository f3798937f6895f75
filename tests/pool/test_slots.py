"""The states of a slot: the table allows what the diagram shows, everything else raises, and the counts stay right."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neon_async._driver.holder import Holder
from neon_async._pool import slots as module
from neon_async._pool.slots import TRANSITIONS, Slot, Slots, State

# The diagram in the module's docstring, written down once more: each arrow as (from, to).
OFFERED = (State.RESERVED, State.IDLE)  # where a slot goes that is offered to the waiters
DIAGRAM = {
    (State.VACANT, State.CONNECTING),
    (State.IDLE, State.CHECKING),
    (State.IN_USE, State.RESETTING),
    *itertools.product((State.CONNECTING, State.CHECKING, State.RESETTING, State.IN_USE, State.RESERVED), OFFERED),
    # An idle slot is handed over, or lent without a wait.
    (State.IDLE, State.RESERVED),
    (State.IDLE, State.IN_USE),
    (State.RESERVED, State.IN_USE),
    # What has had no answer for a while, and then goes on all the same.
    (State.CHECKING, State.SILENT),
    (State.RESETTING, State.STUCK),
    (State.CLOSING, State.STUCK),
    *itertools.product((State.SILENT, State.STUCK), OFFERED),
    # A connection is closed. A dial has made one that is not wanted any more.
    *((state, State.CLOSING) for state in State if state not in (State.VACANT, State.CLOSING)),
    # A connection has ended, or was never made.
    *((state, State.VACANT) for state in State if state is not State.VACANT),
}
PAIRS = list(itertools.product(State, State))


class StubHolder:
    """What a slot owns and never looks into: any use of it fails."""

    __slots__ = ()


def new_slot() -> Slot:
    return Slot(cast(Holder, StubHolder()))


def path_to(state: State) -> list[State]:
    """Return states that lead from VACANT to `state`, each allowed after the one before."""
    paths = [[State.VACANT]]
    while True:
        path = paths.pop(0)
        if path[-1] is state:
            return path[1:]
        paths += [[*path, following] for following in sorted(TRANSITIONS[path[-1]] - set(path))]


def slots_with_one_in(state: State) -> tuple[Slots, Slot]:
    """Return three slots and one of them, which is in `state`; the others are vacant and idle."""
    slot, other, idle = new_slot(), new_slot(), new_slot()
    slots = Slots([slot, other, idle])
    for step in path_to(State.IDLE):
        slots.move(idle, step)
    for step in path_to(state):
        slots.move(slot, step)
    return slots, slot


def contents(slots: Slots) -> tuple[Any, ...]:
    """Return everything that a move may change."""
    states = [slot.state for slot in slots]
    return states, [slots.count(state) for state in State], list(slots.idle), list(slots.vacant), slots.connected


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_allows_what_the_diagram_shows() -> None:
    assert {(state, following) for state in State for following in TRANSITIONS[state]} == DIAGRAM


def test_the_diagram_in_the_docstring_names_every_state() -> None:
    diagram = module.__doc__ or ""
    assert [state.name for state in State if state.name not in diagram] == []


def test_every_state_can_be_reached_and_left_again() -> None:
    for state in State:
        assert path_to(state) or state is State.VACANT
        assert TRANSITIONS[state]


@pytest.mark.parametrize(
    ("state", "following"), [pytest.param(*pair, id=f"{pair[0].name} to {pair[1].name}") for pair in PAIRS]
)
def test_a_move_is_made_where_the_table_allows_it_and_changes_nothing_elsewhere(state: State, following: State) -> None:
    slots, slot = slots_with_one_in(state)
    before = contents(slots)
    if following in TRANSITIONS[state]:
        slots.move(slot, following)
        assert slot.state is following
        assert slots.count(following) == sum(one.state is following for one in slots)
    else:
        with pytest.raises(RuntimeError, match=f"^a slot cannot go from {state.name} to {following.name}$"):
            slots.move(slot, following)
        assert contents(slots) == before


def test_new_slots_are_vacant() -> None:
    slots = Slots([new_slot(), new_slot()])
    assert contents(slots) == ([State.VACANT] * 2, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0], [], list(slots), 0)
    assert len(slots) == 2


def test_a_repr_shows_the_states() -> None:
    slots, slot = slots_with_one_in(State.IN_USE)
    assert repr(slots) == (
        "<Slots: 1 vacant, 0 connecting, 1 idle, 0 checking, 0 reserved, 1 in_use, 0 resetting, 0 closing, 0 silent, "
        "0 stuck>"
    )
    assert repr(slot) == "<Slot in_use>"


# ---------------------------------------------------------------------------------------------------------------------
# Any sequence of moves


class AnyMoves(RuleBasedStateMachine):
    """Slots that move as the table allows, compared with a plain list of states and two plain stacks."""

    @initialize(size=st.integers(1, 6))
    def make(self, size: int) -> None:
        self.all = [new_slot() for _ in range(size)]
        self.slots = Slots(self.all)
        self.states = [State.VACANT] * size
        self.stacks: dict[State, list[int]] = {State.VACANT: list(range(size)), State.IDLE: []}

    def move(self, number: int, state: State) -> None:
        self.slots.move(self.all[number], state)
        for stack in self.stacks.values():
            if number in stack:
                stack.remove(number)
        if state in self.stacks:
            self.stacks[state].append(number)
        self.states[number] = state

    @rule(data=st.data())
    def any_slot_moves(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.all) - 1))
        self.move(number, data.draw(st.sampled_from(sorted(TRANSITIONS[self.states[number]]))))

    @precondition(lambda self: self.slots.idle)
    @rule(data=st.data())
    def the_top_of_the_idle_stack_moves(self, data: st.DataObject) -> None:
        number = self.all.index(self.slots.idle[-1])
        assert number == self.stacks[State.IDLE][-1]
        self.move(number, data.draw(st.sampled_from(sorted(TRANSITIONS[State.IDLE]))))

    @precondition(lambda self: self.slots.vacant)
    @rule()
    def the_top_of_the_vacant_stack_connects(self) -> None:
        number = self.all.index(self.slots.vacant[-1])
        assert number == self.stacks[State.VACANT][-1]
        self.move(number, State.CONNECTING)

    @rule(data=st.data())
    def a_move_that_is_not_allowed_raises(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.all) - 1))
        refused = data.draw(st.sampled_from(sorted(set(State) - TRANSITIONS[self.states[number]])))
        with pytest.raises(RuntimeError):
            self.slots.move(self.all[number], refused)

    @invariant()
    def every_slot_is_in_one_state(self) -> None:
        assert [slot.state for slot in self.slots] == self.states
        counts = {state: self.slots.count(state) for state in State}
        assert counts == {state: self.states.count(state) for state in State}
        assert sum(counts.values()) == len(self.slots) == len(self.all)

    @invariant()
    def idle_and_vacant_slots_are_stacks(self) -> None:
        assert [self.all.index(slot) for slot in self.slots.idle] == self.stacks[State.IDLE]
        assert [self.all.index(slot) for slot in self.slots.vacant] == self.stacks[State.VACANT]

    @invariant()
    def connected_slots_have_a_connection_that_is_expected_to_work(self) -> None:
        working = (State.IDLE, State.CHECKING, State.RESERVED, State.IN_USE, State.RESETTING)
        assert self.slots.connected == sum(state in working for state in self.states)


TestAnyMoves = AnyMoves.TestCase
TestAnyMoves.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
