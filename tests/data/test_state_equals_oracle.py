"""Invariants 3 and 4: online state = offline sweep = naive oracle, to the last bit, for every
interleaving.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.served import Status
from pipelines.features.state import StateError, apply_events
from pipelines.features.sweep import Reads, sweep
from pipelines.features.windows import EventColumns
from tests.data.entity import EntityState
from tests.data.oracle import Event
from tests.data.worlds import BASE, PLAN, VIEW, World, arrays, counted, expected, same_bits, worlds


@given(worlds())
@settings(max_examples=80, deadline=None)
def test_online_state_equals_the_oracle_at_every_read(world: World) -> None:
    state, done = EntityState(PLAN), 0
    for read in world.reads:
        events = counted(PLAN, world.events[done : read.cut])
        if events:
            state.apply(*arrays(PLAN, sorted(events, key=lambda e: (e.time, e.order))))
        done = read.cut
        values, newest = expected(world, read)
        vector = state.read(read.now)
        assert same_bits(vector.values, values)
        ages = np.where(newest < 0, np.nan, (read.now - newest) / 1e6)
        assert same_bits(vector.age_s, ages)
    assert state.unplaced == 0


@given(worlds())
@settings(max_examples=80, deadline=None)
def test_offline_sweep_equals_the_oracle_at_every_read(world: World) -> None:
    seen = counted(PLAN, world.events)
    times, orders, values = arrays(PLAN, seen)
    known_at, sequences = np.array([e.known_at for e in seen], np.int64), np.arange(1, len(seen) + 1)
    columns = EventColumns(("m",), np.zeros_like(times), times, orders, known_at, sequences, values)
    bounds = np.array([len(counted(PLAN, world.events[: read.cut])) for read in world.reads], np.int64)
    moments = np.array([read.now for read in world.reads], np.int64)
    swept = sweep(PLAN, columns, sequences, Reads(np.zeros_like(moments), moments, bounds), ages=True)
    for place, read in enumerate(world.reads):
        values, newest = expected(world, read)
        assert same_bits(swept.values[place], values)
        assert same_bits(swept.age_s[place], np.where(newest < 0, np.nan, (read.now - newest) / 1e6))


@given(worlds(), st.data())
@settings(max_examples=60, deadline=None)
def test_neither_batch_splits_nor_restarts_from_bytes_change_the_state(world: World, data: st.DataObject) -> None:
    events = counted(PLAN, world.events)
    whole = EntityState(PLAN)
    whole.apply(*arrays(PLAN, events))
    parts, at = EntityState(PLAN), 0
    while at < len(events):
        size = data.draw(st.integers(1, len(events) - at))
        parts.apply(*arrays(PLAN, events[at : at + size]))
        parts = EntityState(PLAN, parts.to_bytes())
        at += size
    assert parts.to_bytes() == whole.to_bytes()


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_a_state_begun_with_events_in_order_is_that_of_one_event_put_in_after_the_other(world: World) -> None:
    events = sorted(counted(PLAN, world.events), key=lambda e: (e.time, e.order))
    if not events:
        return
    (begun,), _ = apply_events(PLAN, [None], np.array([0, len(events)]), *arrays(PLAN, events))
    assert bytes(begun) == _state(*events).to_bytes()


@given(st.lists(worlds(most=25), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_states_of_many_entities_changed_at_once_are_those_changed_one_by_one(
    given_worlds: list[World], data: st.DataObject
) -> None:
    told = [counted(PLAN, world.events) for world in given_worlds]
    singly = [EntityState(PLAN) for _ in told]
    together: list[bytes | None] = [None] * len(told)
    unplaced = 0
    for _ in range(3):
        now = [events[: data.draw(st.integers(0, len(events)))] for events in told]
        told = [events[len(part) :] for events, part in zip(told, now, strict=True)]
        now = [sorted(part, key=lambda e: (e.time, e.order)) for part in now]
        for state, part in zip(singly, now, strict=True):
            if part:
                state.apply(*arrays(PLAN, part))
        places = [place for place, part in enumerate(now) if part]
        edges = np.cumsum([0, *(len(now[place]) for place in places)])
        times, orders, values = arrays(PLAN, [event for place in places for event in now[place]])
        made, late = apply_events(PLAN, [together[place] for place in places], edges, times, orders, values)
        unplaced += late
        for place, blob in zip(places, made, strict=True):
            together[place] = bytes(blob)
    for state, blob in zip(singly, together, strict=True):
        assert blob is None or blob == state.to_bytes()
    assert unplaced == sum(state.unplaced for state in singly)


@given(worlds(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_events_within_reach_may_come_in_any_order(world: World, random) -> None:
    events = counted(PLAN, world.events)
    if not events:
        return
    newest = max(e.time for e in events)
    events = [e for e in events if e.time >= newest - PLAN.reach_us]
    whole, mixed = EntityState(PLAN), EntityState(PLAN)
    whole.apply(*arrays(PLAN, sorted(events, key=lambda e: (e.time, e.order))))
    random.shuffle(events)
    mixed.apply(*arrays(PLAN, events))
    assert mixed.to_bytes() == whole.to_bytes()


def _state(*events: Event) -> EntityState:
    state = EntityState(PLAN)
    state.apply(*arrays(PLAN, events))
    return state


def test_an_event_after_now_waits_for_its_time() -> None:
    first = Event(BASE, 0, BASE, {"flow": 1.0})
    ahead = Event(BASE + 10_000_000, 0, BASE, {"flow": 5.0})
    state = _state(first, ahead)
    last = PLAN.features.index("flow_last_1m")
    assert state.read(BASE + 9_999_999).values[last] == 1.0
    assert state.read(BASE + 10_000_000).values[last] == 5.0


def test_status_is_missing_stale_or_fresh_by_value_and_age() -> None:
    state = _state(Event(BASE, 0, BASE, {"flow": 1.0}))
    fresh, stale = state.read(BASE + 50_000_000), state.read(BASE + 50_000_001)
    mean, std, count = (PLAN.features.index(f"flow_{fold}_1m") for fold in ("mean", "std", "count"))
    assert fresh.status[mean] == Status.FRESH
    assert stale.status[mean] == Status.STALE
    assert stale.status[std] == Status.MISSING
    silent = state.read(BASE + 10_000_000_000)
    assert silent.values[count] == 0.0
    assert silent.status[count] == Status.STALE
    assert np.isnan(silent.age_s).all()
    lag = PLAN.features.index("flow_lag_1m")
    assert state.read(BASE + 70_000_000).status[lag] == Status.FRESH


def test_nothing_known_reads_as_zero_counts_and_missing_values() -> None:
    vector = EntityState(PLAN).read(BASE)
    for name, value, status in zip(PLAN.features, vector.values, vector.status, strict=True):
        if name.split("_")[1] in ("count", "sum", "distinct"):
            assert (value, status) == (0.0, Status.STALE)
        else:
            assert np.isnan(value)
            assert status == Status.MISSING


def test_a_read_behind_what_the_state_keeps_is_an_error() -> None:
    state = _state(Event(BASE, 0, BASE, {"flow": 1.0}))
    assert state.read(BASE - PLAN.reach_us).values[PLAN.features.index("flow_count_1m")] == 0.0
    with pytest.raises(StateError, match="clocks"):
        state.read(BASE - PLAN.reach_us - 1)


def test_an_event_that_comes_too_late_to_place_is_counted_and_changes_nothing() -> None:
    state = _state(Event(BASE, 0, BASE, {"flow": 1.0}))
    before = state.read(BASE).values
    state.apply(*arrays(PLAN, [Event(BASE - PLAN.reach_us - 1, 0, BASE, {"flow": 9.0})]))
    assert state.unplaced == 1
    assert same_bits(state.read(BASE).values, before)


def test_raw_events_do_not_grow_with_the_hop_or_the_past() -> None:
    state = EntityState(PLAN)
    times = BASE + np.arange(20_000, dtype=np.int64) * 1_000_000
    state.apply(times, np.zeros_like(times), np.ones((len(times), len(PLAN.fields))))
    raw = (len(state.to_bytes()) // 8 - PLAN.fixed_words) // PLAN.raw_words
    assert raw == PLAN.reach_us // 1_000_000 + 1


def test_bytes_of_another_format_are_refused() -> None:
    blob = bytearray(EntityState(PLAN).to_bytes())
    blob[0] = 99
    with pytest.raises(StateError, match="format 99"):
        EntityState(PLAN, bytes(blob))


def test_a_state_that_was_cut_short_or_goes_on_is_refused() -> None:
    whole = _state(*(Event(BASE + i, 0, BASE, {"flow": 1.0}) for i in range(9))).to_bytes()
    row = 8 * PLAN.raw_words
    for blob in (whole[:-row], whole[:-3], whole[:-8], whole + bytes(8), whole + bytes(row), whole[:40], b""):
        with pytest.raises(StateError, match="cannot read"):
            EntityState(PLAN, blob)
        with pytest.raises(StateError, match="cannot read"):
            apply_events(PLAN, [blob], np.array([0, 1]), *arrays(PLAN, [Event(BASE, 1, BASE, {})]))


def test_features_are_named_in_the_order_of_the_view() -> None:
    assert PLAN.features == VIEW.stored
