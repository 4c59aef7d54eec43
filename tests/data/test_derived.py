"""Derived features: only elementwise operations pass, a fingerprint follows what is computed, one row equals
many.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import usecases
from pipelines.contracts.events import to_microseconds
from pipelines.features import derived
from pipelines.features.derived import DerivedError
from pipelines.features.localtime import calendar_columns
from pipelines.features.windows import view_fingerprint
from pipelines.spec import Calendar, Derived, FeatureView, FieldType
from tests.data.worlds import CONTRACT, VIEW, same_bits


def view(function, name: str = "made", **changes) -> FeatureView:
    return VIEW.model_copy(update={"derived": (Derived(name=name, function=function),), **changes})


def ratio(flow_mean_1m, level_last_40s):
    return np.where(np.greater(level_last_40s, 0), flow_mean_1m / level_last_40s, 0.5)


def _reduces(flow_mean_1m):
    return flow_mean_1m - np.add.reduce(flow_mean_1m)


def _means(flow_mean_1m):
    return flow_mean_1m - np.mean(flow_mean_1m)


def _multiplies(flow_mean_1m):
    return np.matmul(flow_mean_1m, flow_mean_1m)


def _branches(flow_mean_1m):
    return flow_mean_1m if flow_mean_1m > 0 else -flow_mean_1m


def _indexes(flow_mean_1m):
    return flow_mean_1m[0] * 1.0


def _array_constant(flow_mean_1m):
    return flow_mean_1m + np.array([1.0, 2.0])


def _converts(flow_mean_1m):
    return float(flow_mean_1m) * 2


def _ignores(flow_mean_1m):
    return 1.0


def _cumulates(flow_mean_1m):
    return np.cumsum(flow_mean_1m)


def _unknown(no_such_column):
    return no_such_column * 2


def _optional(flow_mean_1m, factor=2.0):
    return flow_mean_1m * factor


def _two_results(flow_mean_1m):
    return np.modf(flow_mean_1m)[0]


@pytest.mark.parametrize(
    "function",
    [
        _reduces, _means, _multiplies, _branches, _indexes, _array_constant, _converts, _ignores, _cumulates,
        _unknown, _optional, _two_results,
    ],
)  # fmt: skip
def test_a_function_that_is_not_elementwise_over_columns_is_refused(function) -> None:
    with pytest.raises(DerivedError, match="made"):
        derived.traces(view(function))


def test_a_derived_feature_may_use_earlier_ones_but_not_later_ones() -> None:
    def twice(made):
        return made * 2

    pair = (Derived(name="made", function=ratio), Derived(name="twice", function=twice))
    derived.traces(VIEW.model_copy(update={"derived": pair}))
    with pytest.raises(DerivedError, match="made"):
        derived.traces(VIEW.model_copy(update={"derived": pair[::-1]}))


def test_names_and_comments_do_not_change_the_fingerprint_but_constants_do() -> None:
    def renamed(flow_mean_1m, level_last_40s):
        # the same, said otherwise
        unused = flow_mean_1m + 1.0  # noqa: F841
        positive = np.greater(level_last_40s, 0)
        quotient = flow_mean_1m / level_last_40s
        return np.where(positive, quotient, 0.5)

    def another(flow_mean_1m, level_last_40s):
        return np.where(np.greater(level_last_40s, 0), flow_mean_1m / level_last_40s, 0.25)

    def swapped(flow_mean_1m, level_last_40s):
        return np.where(np.greater(level_last_40s, 0), level_last_40s / flow_mean_1m, 0.5)

    original = view_fingerprint(view(ratio), CONTRACT)
    assert view_fingerprint(view(renamed), CONTRACT) == original
    assert view_fingerprint(view(another), CONTRACT) != original
    assert view_fingerprint(view(swapped), CONTRACT) != original


def test_everything_that_changes_a_value_changes_the_fingerprint() -> None:
    base = view(ratio, calendar=Calendar(zone="Europe/Rome", parts=("hour",)))
    found = {
        view_fingerprint(base, CONTRACT),
        view_fingerprint(base.model_copy(update={"windows": base.windows[:3]}), CONTRACT),
        view_fingerprint(base.model_copy(update={"lags": base.lags[:1]}), CONTRACT),
        view_fingerprint(base.model_copy(update={"inputs": ("flow",)}), CONTRACT),
        view_fingerprint(view(ratio, calendar=Calendar(zone="Europe/Paris", parts=("hour",))), CONTRACT),
        view_fingerprint(view(ratio, name="named", calendar=base.calendar), CONTRACT),
        view_fingerprint(base, CONTRACT.model_copy(update={"lateness": timedelta(hours=2)})),
    }
    assert len(found) == 7
    assert view_fingerprint(base.model_copy(update={"ttl": timedelta(days=3)}), CONTRACT) in found


@pytest.mark.parametrize("name", usecases.names())
def test_one_row_gives_the_bits_that_many_rows_give(name: str) -> None:
    use_case = usecases.load(name)
    contract, rng, rows = use_case.contract, np.random.default_rng(5), 503
    stored = rng.lognormal(3.0, 2.0, (rows, len(use_case.view.stored)))
    stored[rng.random(stored.shape) < 0.05] = np.nan
    numbers = [i for i in use_case.view.inputs if contract.field(i).type is not FieldType.STRING]
    inputs = {i: rng.lognormal(1.0, 1.0, rows) for i in numbers}
    times = rng.integers(1_300_000_000, 1_900_000_000, rows) * 1_000_000
    many = derived.columns(use_case.view, stored, inputs, times)
    assert set(use_case.model.numeric) <= set(many)
    for row in range(rows):
        at = slice(row, row + 1)
        one = derived.columns(use_case.view, stored[at], {i: v[at] for i, v in inputs.items()}, times[at])
        for column, values in one.items():
            assert same_bits(values, many[column][at]), column


def test_inputs_become_numbers_and_strings_are_passed_over() -> None:
    made = VIEW.model_copy(update={"inputs": ("flow", "level", "label")})
    stored = np.zeros((3, len(VIEW.stored)))
    inputs = {"flow": [1, None, 2.5], "level": np.array([True, False, True]), "label": ["a", None, "b"]}
    columns = derived.columns(made, stored, inputs, np.zeros(3, np.int64))
    assert same_bits(columns["flow"], np.array([1.0, np.nan, 2.5]))
    assert columns["level"].tolist() == [1.0, 0.0, 1.0]
    assert "label" not in columns


def test_an_input_that_a_derived_feature_needs_must_be_given() -> None:
    def double(flow):
        return flow * 2

    made = view(double, inputs=("flow",))
    with pytest.raises(ValueError, match="'made' needs the input 'flow'"):
        derived.columns(made, np.zeros((1, len(VIEW.stored))), {}, np.zeros(1, np.int64))


_MOMENTS = st.datetimes(datetime(1955, 1, 1), datetime(2099, 1, 1))


@given(_MOMENTS, st.sampled_from(["Europe/Rome", "America/Los_Angeles", "Australia/Lord_Howe", "Asia/Kathmandu"]))
@settings(max_examples=200, deadline=None)
def test_calendar_columns_are_the_zones_own_wall_clock(moment: datetime, zone: str) -> None:
    aware = moment.replace(tzinfo=timezone.utc)  # noqa: UP017
    local = aware.astimezone(ZoneInfo(zone))
    calendar = Calendar(zone=zone, parts=("hour", "weekday", "yearday", "days"))
    got = calendar_columns(calendar, np.array([to_microseconds(aware)]))
    of_day = (local.hour * 3600 + local.minute * 60 + local.second) * 1_000_000 + local.microsecond
    days = (local.date() - datetime(1970, 1, 1).date()).days
    assert got["hour"][0] == of_day / 3_600_000_000
    assert got["weekday"][0] == local.weekday()
    assert got["yearday"][0] == local.timetuple().tm_yday - 1
    assert got["days"][0] == (days * 86_400_000_000 + of_day) / 86_400_000_000


def test_calendar_looks_ahead_through_a_change_of_the_clocks() -> None:
    calendar = Calendar(zone="Europe/Rome", ahead=timedelta(hours=24), parts=("hour",))
    before = to_microseconds(datetime(2022, 3, 26, 12, 30, tzinfo=ZoneInfo("UTC")))
    assert calendar_columns(calendar, np.array([before]))["hour"][0] == 14.5


def test_a_time_outside_the_calendars_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="1950 to 2099"):
        calendar_columns(Calendar(zone="Europe/Rome", parts=("hour",)), np.array([5_000_000_000_000_000]))
