"""Which events a window, a lag and a training example see: edges of tiles, lateness, knowledge, request
times.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.contracts.events import (
    EVENT_ID,
    INSTANT,
    KNOWN_AT,
    decode_events,
    encode_event,
    event_order,
    from_microseconds,
)
from pipelines.features.offline import LABEL, STATUS, TIME, build_examples
from pipelines.features.state import StateError
from pipelines.features.sweep import Reads, places, sweep
from pipelines.features.windows import EventColumns, canonical, compile_plan, event_columns, event_orders
from pipelines.spec import FeatureView, Field, FieldType, Fold, Lag, ModelSpec, Split, Target, UseCase, Window
from tests.data.entity import EntityState
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
    window = Window(field="flow", length=tiles * SECOND, hop=SECOND, folds=tuple(Fold), half_life=SECOND)
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


def test_a_sweep_refuses_events_ahead_of_when_they_became_known() -> None:
    now = np.array([BASE], np.int64)
    reads = Reads(now * 0, now, now)
    ahead = EventColumns(("m",), now * 0, now + 20_000_000, now, now, now, np.ones((1, 2)))
    assert sweep(PLAN, ahead, now, reads).values[0, PLAN.features.index("flow_count_1m")] == 0.0
    with pytest.raises(StateError, match=r"contract\.future"):
        sweep(PLAN, replace(ahead, times=ahead.times + 1), now, reads)


def test_events_of_one_moment_are_folded_in_canonical_order_however_they_stand() -> None:
    times, orders = np.array([BASE, BASE]), np.array([7, -7])
    columns = EventColumns(("m",), times * 0, times, orders, times, times, np.array([[2.0, 2.0], [1.0, 1.0]]))
    found = sweep(PLAN, columns, times, Reads(np.zeros(1, np.int64), times[:1], times[:1])).values[0]
    assert [found[PLAN.features.index(f"flow_{fold}_1m")] for fold in ("first", "last")] == [1.0, 2.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=140), max_size=20), st.integers(0, 3))
def test_the_kernel_orders_events_by_the_hash_of_their_ids(ids: list[str], skipped: int) -> None:
    ids += ["x" * size for size in range(15, 132)]
    assert event_orders(pa.array(ids).slice(skipped)).tolist() == event_order(ids[skipped:]).tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3), st.integers(-9, 9)), max_size=20), st.booleans())
def test_the_canonical_order_is_by_entity_time_and_hash(rows: list[tuple[int, int, int]], ties: bool) -> None:
    if not ties:
        rows = list({row[:2]: row for row in rows}.values())
    entities, times, orders = np.array(rows, np.int64).reshape(-1, 3).T
    columns = EventColumns(tuple("abcd"), entities, times, orders, times, times, np.empty((len(rows), 0)))
    assert [rows[place] for place in canonical(columns)] == sorted(rows)


def test_reads_may_come_in_any_order_and_of_unknown_entities() -> None:
    times = BASE + np.arange(4) * TILE
    columns = EventColumns(("a", "b"), np.array([0, 1, 0, 1]), times, times, times, times, np.ones((4, 2)))
    asked = places(columns, np.array(["b", "a", "c", "a", "b"], dtype=object))
    moments = BASE + np.array([9, 0, 1, 2, 3]) * TILE
    found = sweep(PLAN, columns, times, Reads(asked, moments, moments)).values
    assert found[:, PLAN.features.index("level_count_7m")].tolist() == [2.0, 1.0, 0.0, 2.0, 2.0]


def test_strings_are_counted_by_what_they_say() -> None:
    fields = (*CONTRACT.fields, Field(name="valve", type=FieldType.STRING, nullable=True))
    contract = CONTRACT.model_copy(update={"fields": fields})
    folds = (Fold.COUNT, Fold.DISTINCT, Fold.MISSING, Fold.SINCE)
    view = FeatureView(
        name="v", windows=(Window(field="valve", length=60 * SECOND, hop=20 * SECOND, folds=folds),), ttl=SECOND
    )
    told = [("open", 0), ("shut", 1), (None, 2), ("open", 3), ("", 4)]
    blobs = [
        encode_event(contract, {"meter": "a", "at": from_microseconds(BASE + i * 1_000_000), "valve": text})
        for text, i in told
    ]
    rows = decode_events(contract, blobs, [BASE] * 5, [0] * 5, load_id="t", buckets=1)
    plan = compile_plan(view, contract)
    columns = event_columns(plan, rows)
    moment = np.array([BASE + 5_000_000])
    found = sweep(plan, columns, columns.known_at, Reads(np.zeros(1, np.int64), moment, moment)).values[0]
    assert found.tolist() == [4.0, 3.0, 0.2, 1.0]
    case = use_case(60 * SECOND).model_dump() | {"contract": contract, "view": view}
    numbers = Window(field="valve", length=60 * SECOND, hop=20 * SECOND, folds=(Fold.COUNT, Fold.MEAN))
    with pytest.raises(ValidationError, match="'valve' must be a number"):
        UseCase(**case | {"view": view.model_copy(update={"windows": (numbers,)})})


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"folds": ()}, "each once"),
        ({"folds": (Fold.SUM, Fold.SUM)}, "each once"),
        ({"folds": (Fold.EWM,)}, "half_life"),
        ({"half_life": SECOND}, "half_life"),
        ({"folds": (Fold.EWM,), "half_life": 0 * SECOND}, "positive"),
        ({"hop": 7 * SECOND}, "multiple"),
        ({"length": 20_001 * SECOND, "hop": SECOND}, "20,001 tiles .* at least 0:00:01.000050"),
    ],
)
def test_a_window_that_cannot_be_computed_is_refused(changed: dict, complaint: str) -> None:
    whole = {"field": "flow", "length": 60 * SECOND, "hop": 20 * SECOND, "folds": (Fold.SUM,)}
    with pytest.raises(ValidationError, match=complaint):
        Window(**whole | changed)


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
