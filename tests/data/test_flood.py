"""An entity with more recent events than state keeps: it goes on, exactly, with those that could be placed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.kernels import layout
from pipelines.features.served import Status
from pipelines.features.state import StateError, apply_events
from pipelines.features.windows import Plan
from tests.data.entity import EntityState
from tests.data.oracle import Event, features
from tests.data.worlds import BASE, CONTRACT, PLAN, VIEW, World, arrays, counted, same_bits, worlds

NEVER = -(1 << 62)


def keeping(most: int) -> Plan:
    """The plan of a state that keeps at most ``most`` unsettled events."""
    program = PLAN.program.copy()
    program[layout.P_MOST] = most
    return replace(PLAN, program=program)


@dataclass
class Naive:
    """What a state has placed, event by event."""

    most: int
    placed: list[Event] = field(default_factory=list)
    open: list[Event] = field(default_factory=list)
    newest: int = NEVER
    floor: tuple[int, int] = (NEVER, 0)
    unplaced: int = 0

    def apply(self, event: Event) -> None:
        if self.placed and (event.time < self.newest - PLAN.reach_us or (event.time, event.order) < self.floor):
            self.unplaced += 1
            return
        self.placed.append(event)
        self.newest = max(self.newest, event.time)
        self.open = sorted([*self.open, event], key=lambda e: (e.time, e.order))
        self.open = [e for e in self.open if e.time >= self.newest - PLAN.reach_us]
        while len(self.open) > self.most:
            oldest = self.open.pop(0)
            self.floor = (oldest.time, oldest.order)


@given(worlds(), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_a_flooded_state_keeps_its_bound_and_equals_the_oracle_of_what_it_placed(world: World, most: int) -> None:
    state, naive, done = EntityState(keeping(most)), Naive(most), 0
    for read in world.reads:
        for event in counted(PLAN, world.events[done : read.cut]):
            naive.apply(event)
            state.apply(*arrays(PLAN, [event]))
        done = read.cut
        kept = (len(state.to_bytes()) // 8 - PLAN.fixed_words) // PLAN.raw_words
        assert (kept, state.unplaced) == (len(naive.open), naive.unplaced)
        if naive.placed and read.now < naive.newest - PLAN.reach_us:
            with pytest.raises(StateError, match="check the clocks"):
                state.read(read.now)
            continue
        if read.now < naive.floor[0]:
            told = state.read(read.now)
            assert np.isnan(told.values).all()
            assert np.isnan(told.age_s).all()
            assert (told.status == Status.MISSING).all()
            continue
        values = [value for value, _ in features(VIEW, CONTRACT, naive.placed, read.now)]
        assert same_bits(state.read(read.now).values, np.array(values))


@given(worlds(), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_flood_in_one_batch_is_one_event_after_the_other(world: World, most: int, data: st.DataObject) -> None:
    plan = keeping(most)
    events = counted(PLAN, world.events)
    if data.draw(st.booleans()):
        events = sorted(events, key=lambda e: (e.time, e.order))
    singly = EntityState(plan)
    for event in events:
        singly.apply(*arrays(PLAN, [event]))
    (made,), late = apply_events(plan, [None], np.array([0, len(events)]), *arrays(PLAN, events))
    assert bytes(made) == singly.to_bytes()
    assert late == singly.unplaced


def test_an_entity_that_floods_stops_no_other() -> None:
    count = int(PLAN.program[layout.P_MOST]) + 5_000
    times = np.concatenate([BASE + np.arange(count), [BASE]])
    values = np.ones((count + 1, len(PLAN.fields)))
    edges = np.array([0, count, count + 1])
    (flooded, other), late = apply_events(PLAN, [None, None], edges, times, np.zeros_like(times), values)
    assert late == 0
    seen = PLAN.features.index("flow_count_1m")
    assert EntityState(PLAN, bytes(flooded)).read(BASE + count).values[seen] == count
    assert EntityState(PLAN, bytes(other)).read(BASE + count).values[seen] == 1
    (again,), late = apply_events(PLAN, [flooded], np.array([0, 1]), times[:1], np.zeros(1, np.int64), values[:1])
    assert (bytes(again[8 * layout.HEADER :]), late) == (bytes(flooded[8 * layout.HEADER :]), 1)


def test_more_events_of_one_instant_than_are_kept_are_all_counted() -> None:
    count = int(PLAN.program[layout.P_MOST]) + 5
    times, orders = np.full(count, BASE), np.arange(count)
    values = np.ones((count, len(PLAN.fields)))
    (made,), late = apply_events(PLAN, [None], np.array([0, count]), times, orders, values)
    assert (EntityState(PLAN, bytes(made)).read(BASE).values[PLAN.features.index("flow_count_1m")], late) == (count, 0)
