"""Two versions on the same instances: the day's mean difference of losses, whoever of the two answered."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tables import Tables
from pipelines import usecases
from pipelines.features.served import OUTCOME_SCHEMA, SERVED_SCHEMA, outcomes_table, predictions_table
from pipelines.validation.paired import compare, paired_days

DAY = 86_400_000_000
START = int(datetime(2023, 1, 1, tzinfo=UTC).timestamp() * 1e6)
KNOWN = datetime(2023, 1, 6, tzinfo=UTC)
AQUA = usecases.load("aqua")
maybe = st.none() | st.floats(0, 50)
rows = st.lists(
    st.tuples(
        st.integers(0, 3),  # day
        st.sampled_from([("1", "2"), ("2", "1"), ("1", None), ("1", "3"), ("3", "2")]),
        st.floats(0, 50),
        maybe,
        st.floats(0.1, 5),
        maybe,  # outcome
    ),
    max_size=25,
)


def tables(given_rows) -> tuple[pa.Table, pa.Table]:
    logged, outcomes = [], []
    for number, (day, (version, other), value, its, half, actual) in enumerate(given_rows):
        logged.append(
            {
                "prediction_id": f"p{number}", "_time": datetime.fromtimestamp((START + day * DAY) / 1e6 + number, UTC),
                "model_version": version, "value": value, "lower": value - half, "upper": value + half,
                "other_version": other, "other_value": its if other else None,
                "other_lower": None if its is None else its - 2 * half,
                "other_upper": None if its is None else its + 2 * half,
            }
        )  # fmt: skip
        if actual is not None:
            outcomes.append({"prediction_id": f"p{number}", "value": actual})
    blank = dict.fromkeys(SERVED_SCHEMA.names)
    return (
        pa.Table.from_pylist([{**blank, **row} for row in logged], schema=SERVED_SCHEMA),
        pa.Table.from_pylist([{"at": KNOWN, **row} for row in outcomes], schema=OUTCOME_SCHEMA),
    )


def naive(given_rows) -> dict[int, list[tuple[float, int]]]:
    """By day, of each row: the difference of losses, and how many outcomes more the challenger's interval missed."""
    found: dict[int, list[tuple[float, int]]] = {}
    for day, (version, other), value, its, half, actual in given_rows:
        if its is None or actual is None or {version, other} != {"1", "2"}:
            continue
        champion, challenger = (value, its) if version == "1" else (its, value)
        # The interval is stored by its ends, so its width is theirs: the champion's, whichever of the two it was.
        width = ((value + half) - (value - half)) / 2 if version == "1" else ((its + 2 * half) - (its - 2 * half)) / 2
        missed = not value - half <= actual <= value + half
        its_missed = not its - 2 * half <= actual <= its + 2 * half
        more = int(its_missed) - int(missed) if version == "1" else int(missed) - int(its_missed)
        difference = (abs(challenger - actual) - abs(champion - actual)) / width
        found.setdefault(START // DAY + day, []).append((difference, more))
    return found


@given(rows)
@settings(max_examples=80, deadline=None)
def test_the_difference_by_day_is_that_of_the_rows_one_by_one(given_rows):
    found = compare(*tables(given_rows), champion="1", challenger="2")
    wanted = naive(given_rows)
    assert [(d.day, d.instances) for d in found] == [(day, len(values)) for day, values in sorted(wanted.items())]
    for day in found:
        assert day.difference == pytest.approx(sum(d for d, _ in wanted[day.day]) / day.instances, abs=1e-9)
        assert day.missed == pytest.approx(sum(more for _, more in wanted[day.day]) / day.instances, abs=1e-9)


def test_only_complete_days_count(tmp_path):
    here = Tables(tmp_path.as_uri())
    asked = {"champion": "1", "challenger": "2", "since_us": START, "grace_us": 3_600_000_000}
    assert paired_days(AQUA, here, now_us=START + 9 * DAY, **asked) == ()
    logged, outcomes = tables([(day, ("1", "2"), 10.0, 11.0, 1.0, 10.0) for day in (0, 1, 2)])
    here.ensure(predictions_table(AQUA), SERVED_SCHEMA)
    here.append(predictions_table(AQUA), logged, "test")
    here.ensure(outcomes_table(AQUA), OUTCOME_SCHEMA)
    here.append(outcomes_table(AQUA), outcomes, "test")
    first = START // DAY
    hour = timedelta(hours=1) // timedelta(microseconds=1)
    # A day's last outcome is due a horizon (24 h) after its end, and is waited for an hour longer.
    for now, days in (
        (2 * DAY + hour - 1, []),
        (2 * DAY + hour, [first]),
        (4 * DAY + hour, [first, first + 1, first + 2]),
    ):
        found = paired_days(AQUA, here, now_us=START + now, **asked)
        assert [d.day for d in found] == days
    late = paired_days(AQUA, here, now_us=START + 9 * DAY, **{**asked, "since_us": START + DAY})
    assert [d.day for d in late] == [first + 1, first + 2]


def test_a_day_whose_outcomes_have_not_come_to_the_table_is_not_complete(tmp_path):
    here = Tables(tmp_path.as_uri())
    logged, outcomes = tables([(day, ("1", "2"), 10.0, 11.0, 1.0, 10.0) for day in (0, 1, 2)])
    early = pa.array([START + 2 * DAY + 3_700_000_000] * 3, pa.int64()).cast(outcomes.schema.field("at").type)
    outcomes = outcomes.set_column(outcomes.schema.get_field_index("at"), "at", early)
    for name, table, schema in (
        (predictions_table(AQUA), logged, SERVED_SCHEMA),
        (outcomes_table(AQUA), outcomes, OUTCOME_SCHEMA),
    ):
        here.ensure(name, schema)
        here.append(name, table, "test")
    found = paired_days(
        AQUA, here, champion="1", challenger="2", since_us=START, now_us=START + 9 * DAY, grace_us=3_600_000_000
    )
    assert [day.day for day in found] == [START // DAY]
