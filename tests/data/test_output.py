"""What a version says is an answer only inside of the output's contract: its range, and an interval around it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines import usecases
from pipelines.training.artifact import Prediction
from serving.answers import Part, Predictor, _View
from serving.fallback import Filled
from tests.data.trials import prepared

AQUA = usecases.load("aqua")
CASES = [
    ((5.0, 4.0, 6.0), 5.0, [4.0, 6.0], []),
    ((0.0, -2.0, 6.0), 0.0, [-2.0, 6.0], []),
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


def answers(said: list[tuple[float, float, float]], *, challenger: bool) -> tuple[list[Any], list[Any]]:
    """The answers and the log records of what a version said."""
    nothing: Any = None
    views: Any = SimpleNamespace(states={})
    predictor = Predictor(AQUA, views)
    predictor._made["v"] = _View(nothing, nothing, ("a", "b"), (), (), (), (), frozenset())
    count = len(said)
    rows = prepared(count)
    rows = replace(
        rows,
        filled=Filled(np.zeros((count, 2)), rows.filled.status, rows.filled.level, {}),
        numeric=np.zeros((count, 1)),
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
