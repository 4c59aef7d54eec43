"""What a version says is an answer only inside of the output's contract: its range, and an interval around it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines import usecases
from pipelines.spec import UseCase
from pipelines.training.artifact import Prediction
from serving.answers import Part, Predictor, _View
from serving.fallback import Filled
from tests.data.trials import prepared

AQUA = usecases.load("aqua")
CASES = [
    ((5.0, 4.0, 6.0), 5.0, [4.0, 6.0], []),
    ((0.0, -2.0, 6.0), 0.0, [0.0, 6.0], []),
    ((299.0, 290.0, 306.0), 299.0, [290.0, 300.0], []),
    ((300.0, 300.0, 300.0), 300.0, [300.0, 300.0], []),
    ((-0.001, -2.0, 6.0), None, None, ["output_refused"]),
    ((300.1, 290.0, 310.0), None, None, ["output_refused"]),
    ((5.0, 6.0, 7.0), None, None, ["output_refused"]),
    ((5.0, 3.0, 4.0), None, None, ["output_refused"]),
    ((5.0, np.nan, np.nan), 5.0, None, []),
    ((5.0, -np.inf, np.inf), 5.0, None, []),
    ((np.nan, 1.0, 2.0), None, None, ["no_answer"]),
    ((np.inf, 1.0, 2.0), None, None, ["no_answer"]),
]


def predictor_of(page: UseCase) -> Predictor:
    views: Any = SimpleNamespace(states={})
    return Predictor(page, views)


def answers(
    said: list[tuple[float, float, float]], *, challenger: bool = False, records: list[Any] | None = None
) -> tuple[list[Any], list[Any]]:
    """The answers and the log records of what a version said."""
    nothing: Any = None
    predictor = predictor_of(AQUA)
    predictor._made["v"] = _View(nothing, nothing, ("a", "b"), (), (), (), (), frozenset())
    count = len(said)
    rows = prepared(count)
    rows = replace(
        rows,
        filled=Filled(np.zeros((count, 2)), rows.filled.status, rows.filled.level, {}),
        numeric=np.zeros((count, 1)),
        records=records or rows.records,
    )
    found = Prediction(*(np.array(series, dtype=np.float64) for series in zip(*said, strict=True)))
    parts = (Part(np.ones(count, dtype=bool), "2", rows),) if challenger else ()
    made = predictor.compose(rows, found, "1", parts)
    return made.document["predictions"], made.rows


@pytest.mark.parametrize("challenger", [False, True])
def test_no_answer_outside_of_its_contract_is_given_whichever_version_says_it(challenger) -> None:
    given, logged = answers([case[0] for case in CASES], challenger=challenger)
    for (said, value, interval, degraded), answer, row in zip(CASES, given, logged, strict=True):
        assert (answer["value"], answer["interval"], answer["degraded"]) == (value, interval, degraded), said
        np.testing.assert_array_equal([row["value"], row["lower"], row["upper"]], said)
        assert answer["model_version"] == ("2" if challenger else "1")


def test_an_instance_that_breaks_a_rule_which_only_warns_is_answered_and_says_so() -> None:
    fields = tuple(
        field.model_copy(update={"warn": ("maximum",)}) if field.name == "rain" else field
        for field in AQUA.contract.fields
    )
    page = AQUA.model_copy(update={"contract": AQUA.contract.model_copy(update={"fields": fields})})
    instance = {"district": "dma_1", "temperature": 1.0, "rain": 1.0, "holiday": False}
    records = predictor_of(page).parse({"instances": [instance, {**instance, "rain": 500.0}]})
    given, _ = answers([(5.0, 4.0, 6.0)] * 2, records=records)
    assert [answer["degraded"] for answer in given] == [[], ["warning:rain.maximum"]]
    assert [answer["value"] for answer in given] == [5.0, 5.0]
