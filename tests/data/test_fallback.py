"""The fallback ladder: every cell of every answer equals what a plain reading of the rules says."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines import usecases
from pipelines.features.online import Read
from pipelines.features.served import Status
from pipelines.spec import (
    Calendar,
    Derived,
    Fallback,
    FeatureView,
    Fold,
    Lag,
    ModelSpec,
    Split,
    Target,
    UseCase,
    Window,
)
from pipelines.training.artifact import Artifact, Level, Output
from pipelines.training.normals import Normals
from serving.fallback import NO_NORMAL, UNKNOWN_ENTITY, Filled, Ladder, ladder_of
from tests.data.worlds import BASE, CONTRACT, SECOND, same_bits

FRESH, STALE, IMPUTED, MISSING = Status.FRESH, Status.STALE, Status.IMPUTED, Status.MISSING
HOLD_S = 200.0


def ratio(flow_mean_5m, flow_lag_1m):
    return flow_mean_5m / flow_lag_1m


VIEW = FeatureView(
    name="meter_state",
    windows=(
        Window(field="flow", length=60 * SECOND, hop=20 * SECOND, folds=(Fold.LAST, Fold.STD)),
        Window(field="flow", length=300 * SECOND, hop=60 * SECOND, folds=(Fold.MEAN, Fold.COUNT)),
        Window(field="level", length=40 * SECOND, hop=40 * SECOND, folds=(Fold.MIN,)),
    ),
    lags=(
        Lag(field="flow", offset=60 * SECOND, hop=20 * SECOND),
        Lag(field="level", offset=300 * SECOND, hop=60 * SECOND),
    ),
    inputs=("level",),
    calendar=Calendar(zone="Europe/Rome", parts=("hour",)),
    derived=(Derived(name="ratio", function=ratio),),
    ttl=50 * SECOND,
)
FIELD = ("flow", "flow", "flow", "flow", "level", "flow", "level")
LAGS = (5, 6)
POLICY = Fallback(hold=timedelta(seconds=HOLD_S), silence=60 * SECOND, zone="Europe/Rome", slots=("hour",))


def use_case(fallback: Fallback | None = POLICY, view: FeatureView = VIEW) -> UseCase:
    model = ModelSpec(
        name="meter",
        target=Target(field="flow", horizon=60 * SECOND),
        numeric=("flow_last_1m", "hour"),
        scale="ratio",
        split=Split(calibration=timedelta(days=1), test=timedelta(days=1)),
    )
    return UseCase(name="meter", title="Meters", contract=CONTRACT, view=view, model=model, gates=(), fallback=fallback)


def page(case: UseCase) -> Artifact:
    model = case.model
    return Artifact(
        use_case=case.name, contract="readings", contract_version="1.0.0", view="00ff", entity="meter", inputs=(),
        numeric=model.numeric, vocabularies={}, anchor=model.anchor, scale=model.scale, transform="identity",
        output=Output(field="flow", unit=None, horizon_us=0), shape={}, snapshot={}, training={}, code="", versions={},
    )  # fmt: skip


def normals(values: dict[str, list[float]]) -> Normals:
    """The same normals at every hour."""
    table = np.repeat(np.array(list(values.values())).reshape(len(values), 1, -1), 24, axis=1)
    return Normals("Europe/Rome", ("hour",), VIEW.stored, {name: i for i, name in enumerate(values)}, table)


# The model looks at flow_last_1m, and through ``ratio`` at flow_mean_5m and flow_lag_1m.
NEEDED = (True, False, True, False, False, True, False)


def oracle(
    status: list[int], age: list[float], usual: list[float], known: bool
) -> tuple[list[int], list[bool], int, str | None]:
    """(status, whether the normal stands in the place, level, refusal) of one row, feature by feature."""
    replaced = []
    for i, field in enumerate(FIELD):
        windows = [j for j in range(len(FIELD)) if FIELD[j] == field and j not in LAGS]
        if any(status[j] == FRESH for j in windows):
            replaced.append(False)  # the field reports
        elif i in LAGS:
            lost = any(not (status[j] == STALE and age[j] <= HOLD_S) for j in windows)
            replaced.append(lost and status[i] == MISSING)
        else:
            replaced.append(not (status[i] == STALE and age[i] <= HOLD_S))
    there = [r and not math.isnan(u) for r, u in zip(replaced, usual, strict=True)]
    after = [int(IMPUTED) if t else s for t, s in zip(there, status, strict=True)]
    level, refused = Level.FRESH, None
    for i in range(len(FIELD)):
        if NEEDED[i] and replaced[i]:
            level = Level.NORMAL
            if not there[i]:
                refused = NO_NORMAL if known else UNKNOWN_ENTITY
        elif NEEDED[i] and status[i] == STALE and level == Level.FRESH:
            silent = all(status[j] != FRESH for j in range(5) if FIELD[j] == FIELD[i])
            level = Level.HELD if silent else Level.FRESH
    return after, there, int(level), refused


def read_of(status: list[list[int]], age: list[list[float]], values: np.ndarray, known: list[bool]) -> Read:
    return Read(values, np.array(status, np.uint8), np.array(age, np.float64), 7, 1, np.array(known))


_AGES = st.sampled_from([0.0, 51.0, HOLD_S - 1e-6, HOLD_S, HOLD_S + 1e-6, 1e9, math.nan])


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], list[list[float]], list[bool]]:
    rows = draw(st.integers(1, 5))
    width = len(FIELD)
    status = [
        [draw(st.sampled_from([FRESH, MISSING] if i in LAGS else [FRESH, STALE, STALE, MISSING])) for i in range(width)]
        for _ in range(rows)
    ]
    if draw(st.booleans()):  # quiet rows are rare otherwise
        status = [[STALE if s == FRESH and i not in LAGS else s for i, s in enumerate(row)] for row in status]
    age = [[draw(_AGES) for _ in range(width)] for _ in range(rows)]
    usual = [[draw(st.sampled_from([1.5, -2.0, math.nan])) for _ in range(width)] for _ in range(rows)]
    return status, age, usual, [draw(st.booleans()) for _ in range(rows)]


def ladder(table: Normals | None, case: UseCase | None = None) -> Ladder:
    case = case or use_case()
    made = ladder_of(case, page(case), table)
    assert made is not None
    return made


@given(worlds())
def test_the_ladder_is_what_its_rules_say_of_each_feature(
    world: tuple[list[list[int]], list[list[float]], list[list[float]], list[bool]],
) -> None:
    status, age, usual, known = world
    entities = [f"m{i}" for i in range(len(status))]
    values = np.arange(len(status) * len(FIELD), dtype=np.float64).reshape(len(status), -1)
    values[np.array(status) == MISSING] = np.nan
    read = read_of(status, age, values.copy(), known)
    table = normals(dict(zip(entities, usual, strict=True)))
    found = ladder(table).fill(read, entities, BASE)
    for row in range(len(status)):
        after, there, level, refused = oracle(status[row], age[row], usual[row], known[row])
        assert found.status[row].tolist() == after
        assert same_bits(found.values[row], np.where(there, usual[row], values[row]))
        assert found.level[row] == level
        assert found.refused.get(row) == refused
    assert same_bits(read.values, values), "what was read is the caller's"
    assert read.status.tolist() == status


def one(status: list[int], age: float, table: Normals | None, known: bool = True) -> Filled:
    values = np.where(np.array(status) == MISSING, np.nan, 3.0)
    return ladder(table).fill(read_of([status], [[age] * len(FIELD)], values[None, :], [known]), ["m"], BASE)


QUIET = [STALE, STALE, STALE, STALE, FRESH, FRESH, FRESH]
USUAL = {"m": [10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]}


def test_a_sensor_goes_down_the_ladder_and_up_again() -> None:
    table = normals(USUAL)
    fresh = one([FRESH] * 7, 0.0, table)
    assert (fresh.level.tolist(), fresh.refused) == ([Level.FRESH], {})
    held = one(QUIET, HOLD_S, table)
    assert (held.level.tolist(), held.refused, held.values[0, 0]) == ([Level.HELD], {}, 3.0)
    assert held.status[0].tolist() == QUIET, "a held value stays flagged as stale"
    usual = one(QUIET, HOLD_S + 1, table)
    assert (usual.level.tolist(), usual.refused) == ([Level.NORMAL], {})
    assert usual.values[0].tolist() == [10.0, 11.0, 12.0, 13.0, 3.0, 3.0, 3.0]
    assert usual.status[0].tolist() == [IMPUTED] * 4 + [FRESH] * 3
    gone = one(QUIET, HOLD_S + 1, None)
    assert gone.refused == {0: NO_NORMAL}
    assert gone.level.tolist() == [Level.NORMAL]


def test_a_gap_in_the_past_of_a_sensor_that_reports_is_left_to_the_model() -> None:
    found = one([FRESH, MISSING, FRESH, FRESH, FRESH, MISSING, MISSING], 1.0, normals(USUAL))
    assert (found.level.tolist(), found.refused) == ([Level.FRESH], {})
    assert found.status[0].tolist() == [FRESH, MISSING, FRESH, FRESH, FRESH, MISSING, MISSING]


def test_a_silent_field_that_the_model_does_not_look_at_changes_no_answer() -> None:
    found = one([FRESH, FRESH, FRESH, FRESH, MISSING, FRESH, MISSING], 1.0, None)
    assert (found.level.tolist(), found.refused) == ([Level.FRESH], {})


def test_an_entity_that_nobody_knows_is_refused_unless_it_has_normals() -> None:
    empty = [MISSING, MISSING, MISSING, STALE, MISSING, MISSING, MISSING]
    assert one(empty, math.nan, normals({"other": USUAL["m"]}), known=False).refused == {0: UNKNOWN_ENTITY}
    trained = one(empty, math.nan, normals(USUAL), known=False)
    assert trained.refused == {}
    assert trained.values[0].tolist() == USUAL["m"]


def test_fresh_rows_are_handed_on_untouched() -> None:
    read = read_of([[FRESH] * 7] * 3, [[0.0] * 7] * 3, np.ones((3, 7)), [True] * 3)
    found = ladder(normals(USUAL)).fill(read, ["a", "b", "c"], BASE)
    assert found.values is read.values
    assert found.status is read.status
    assert found.level.tolist() == [0, 0, 0]


def test_a_field_without_windows_cannot_be_seen_to_report() -> None:
    view = VIEW.model_copy(update={"windows": VIEW.windows[:2]})
    table = Normals("Europe/Rome", ("hour",), view.stored, {"m": 0}, np.full((1, 24, 6), 9.0))
    read = read_of([[FRESH] * 5 + [MISSING]], [[0.0] * 6], np.ones((1, 6)), [True])
    found = ladder(table, use_case(view=view)).fill(read, ["m"], BASE)
    assert found.status[0].tolist() == [FRESH] * 5 + [IMPUTED]
    assert found.level.tolist() == [Level.FRESH], "the model does not look at it"


def test_without_a_policy_there_is_no_ladder() -> None:
    case = use_case(None)
    assert ladder_of(case, page(case), None) is None
    assert usecases.load("prop").fallback is None


def test_normals_of_another_view_are_refused() -> None:
    table = Normals("Europe/Rome", ("hour",), VIEW.stored[::-1], {}, np.zeros((0, 24, 7)))
    with pytest.raises(ValueError, match="train the version again"):
        ladder(table)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hold": timedelta(0)}, "above zero"),
        ({"silence": -SECOND}, "above zero"),
        ({"slots": ()}, "one part or more"),
        ({"slots": ("hour", "hour")}, "each once"),
        ({"rows": 0}, "greater than or equal to 1"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Fallback(**{**POLICY.model_dump(), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hold": 301 * SECOND}, "must not exceed that"),
        ({"silence": 301 * SECOND}, "must not exceed that"),
        ({"hold": 49 * SECOND}, "below the view's ttl"),
    ],
)
def test_a_policy_that_does_not_fit_its_view_is_refused(changes: dict[str, timedelta], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        use_case(POLICY.model_copy(update=changes))
