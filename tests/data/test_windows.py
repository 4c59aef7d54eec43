"""Which events a window, a lag and a training example see: edges of tiles, lateness, knowledge, request
times.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts.events import (
    EVENT_ID,
    INSTANT,
    KNOWN_AT,
    decode_events,
    encode_event,
    from_microseconds,
)
from pipelines.features.offline import LABEL, STATUS, TIME, build_examples, sweep
from pipelines.features.state import EntityState, StateError
from pipelines.features.windows import EventColumns, compile_plan, event_columns
from pipelines.spec import FeatureView, Fold, Lag, ModelSpec, Split, Target, UseCase, Window
from tests.data.oracle import Event, features
from tests.data.worlds import BASE, CONTRACT, PLAN, SECOND, VIEW, arrays, same_bits

TILE = 20_000_000
START = BASE - BASE % (TILE * 3)  # the edge of a block of three tiles


def count_at(now: int, *times: int) -> float:
    window = Window(field="flow", length=60 * SECOND, hop=20 * SECOND, folds=(Fold.COUNT,))
    plan = compile_plan(FeatureView(name="v", windows=(window,), ttl=SECOND), CONTRACT)
    state = EntityState(plan)
    state.apply(*arrays(plan, [Event(t, 0, t, {"flow": 1.0}) for t in times]))
    return float(state.read(now).values[0])


def test_a_window_holds_its_closed_tiles_and_the_open_one_up_to_now() -> None:
    now = START + 10 * TILE + 7
    assert count_at(now, START + 7 * TILE, now) == 2.0
    assert count_at(now, START + 7 * TILE - 1, START + 7 * TILE) == 1.0
    assert count_at(now, now, now + 1) == 1.0


def test_a_lag_is_the_last_value_of_exactly_its_tile() -> None:
    view = FeatureView(name="v", lags=(Lag(field="flow", offset=60 * SECOND, hop=20 * SECOND),), ttl=SECOND)
    plan = compile_plan(view, CONTRACT)
    state = EntityState(plan)
    times = [START + 4 * TILE - 1, START + 4 * TILE, START + 5 * TILE - 1, START + 5 * TILE]
    state.apply(*arrays(plan, [Event(t, 0, t, {"flow": float(i)}) for i, t in enumerate(times)]))
    assert state.read(START + 7 * TILE).values[0] == 2.0
    assert state.read(START + 8 * TILE - 1).values[0] == 2.0
    assert state.read(START + 8 * TILE).values[0] == 3.0
    assert np.isnan(state.read(START + 9 * TILE).values[0])


@given(st.integers(1, 9), st.integers(1, 40), st.integers(-30, 30))
@settings(max_examples=80, deadline=None)
def test_windows_of_any_length_agree_with_the_oracle_on_either_side_of_the_epoch(
    tiles: int, events: int, first: int
) -> None:
    window = Window(field="flow", length=tiles * SECOND, hop=SECOND, folds=tuple(Fold))
    view = FeatureView(name="v", windows=(window,), ttl=SECOND)
    plan = compile_plan(view, CONTRACT)
    rng = np.random.default_rng(events)
    times = first * 1_000_000 + np.cumsum(rng.integers(1, 1_500_000, events))
    told = [Event(int(t), 0, int(t), {"flow": float(rng.normal())}) for t in times]
    state = EntityState(plan)
    for event in told:
        state.apply(*arrays(plan, [event]))
        expected = [value for value, _ in features(view, CONTRACT, told, event.time)]
        assert same_bits(state.read(event.time).values, np.array(expected))


def test_event_columns_turn_nulls_into_nan_and_times_into_microseconds() -> None:
    rows = table([("b", BASE, 1.5, BASE + 3), ("a", BASE + 1, None, BASE + 4)])
    columns = event_columns(PLAN, rows)
    assert (columns.names, columns.entities.tolist()) == (("a", "b"), [1, 0])
    assert (columns.times.tolist(), columns.known_at.tolist()) == ([BASE, BASE + 1], [BASE + 3, BASE + 4])
    assert same_bits(columns.values[:, 0], np.array([1.5, np.nan]))


def test_a_sweep_refuses_reads_in_the_wrong_order_and_times_it_cannot_tell() -> None:
    one = np.array([BASE], np.int64)
    columns = EventColumns(("m",), one * 0, one, one, one, one, np.ones((1, 2)))
    with pytest.raises(ValueError, match="ascend"):
        sweep(PLAN, columns, np.array([1, 0]), np.array([BASE, BASE]))
    with pytest.raises(StateError, match="future"):
        sweep(PLAN, columns, np.array([1]), np.array([BASE - PLAN.reach_us - 1]))


def use_case(horizon: timedelta) -> UseCase:
    model = ModelSpec(
        name="meter",
        target=Target(field="flow", horizon=horizon),
        numeric=("flow_mean_1m",),
        split=Split(calibration=timedelta(days=1), test=timedelta(days=1)),
    )
    contract = CONTRACT.model_copy(update={"delay": SECOND})
    view = VIEW.model_copy(update={"inputs": ("level",)})
    return UseCase(name="meter", title="Meters", contract=contract, view=view, model=model, gates=())


def table(rows: list[tuple[str, int, float | None, int]]) -> pa.Table:
    blobs = [
        encode_event(CONTRACT, {"meter": m, "at": from_microseconds(t), "flow": f, "level": t % 7 / 3})
        for m, t, f, _ in rows
    ]
    known = [k for *_, k in rows]
    return decode_events(CONTRACT, blobs, known, [0] * len(rows), load_id="t", buckets=4)


_ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 900).map(lambda s: BASE + s * 1_000_000),
        st.one_of(st.none(), st.floats(-1e6, 1e6, allow_nan=False)),
        st.sampled_from([0, 1_000_000, 30_000_000, 90_000_000, 200_000_000]),
    ),
    max_size=40,
    unique_by=lambda row: row[:2],
)


@given(_ROWS, st.sampled_from([0, 1, 60, 300]))
@settings(max_examples=80, deadline=None)
def test_an_example_sees_what_was_known_at_its_request_and_nothing_else(rows, horizon: int) -> None:
    told = [(m, t, f, t + delay) for m, t, f, delay in rows]
    case = use_case(horizon * SECOND)
    made = build_examples(case, table(told))
    requests = made.column(TIME).cast(pa.int64()).to_pylist()
    assert requests == sorted(requests)
    stored = np.column_stack([made.column(name).to_numpy() for name in case.view.stored])
    expected = {}
    for meter, time, flow, known_at in told:
        request = time - horizon * 1_000_000
        first = min(t for m, t, *_ in told if m == meter)
        if flow is not None and request >= first and known_at > request:
            expected[f"{meter}|{time}"] = (meter, request, flow)
    assert sorted(made.column(EVENT_ID).to_pylist()) == sorted(expected)
    for place, identity in enumerate(made.column(EVENT_ID).to_pylist()):
        meter, request, flow = expected[identity]
        assert (requests[place], made.column(LABEL)[place].as_py()) == (request, flow)
        known = [
            Event(t, order_of(m, t), k, {"flow": f, "level": t % 7 / 3})
            for m, t, f, k in told
            if m == meter and k <= request
        ]
        values = np.array([value for value, _ in features(case.view, case.contract, known, request)])
        assert same_bits(stored[place], values)


def order_of(meter: str, time: int) -> int:
    row = event_columns(PLAN, table([(meter, time, 0.0, time)]))
    return int(row.orders[0])


def test_examples_carry_the_inputs_and_statuses_of_their_own_event() -> None:
    rows = [("a", BASE + i * TILE, float(i), BASE + i * TILE) for i in range(10)]
    made = build_examples(use_case(60 * SECOND), table(rows))
    assert made.num_rows == 7
    assert made.schema.field(TIME).type == INSTANT
    assert made.column("level").to_pylist() == [(BASE + i * TILE) % 7 / 3 for i in range(3, 10)]
    assert {len(status) for status in made.column(STATUS).to_pylist()} == {len(VIEW.stored)}


def test_no_events_make_no_examples() -> None:
    case = use_case(60 * SECOND)
    empty = build_examples(case, table([]))
    assert empty.num_rows == 0
    assert KNOWN_AT not in empty.schema.names
