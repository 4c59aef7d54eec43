"""What is kept of every answer and of every outcome, so that any served value can be recomputed and judged.

The two schemas are stored formats: the prediction log writes them, the skew audit and the monitors read them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import orjson
import pyarrow as pa

from pipelines.contracts.events import INSTANT
from pipelines.spec import EventSource, UseCase


class Status(IntEnum):
    """How far a feature value can be trusted; a larger number is worse.

    MISSING: there is no value (NaN). IMPUTED: a fallback put one in its place. STALE: nothing contributed
    to it within the view's ``ttl``. FRESH: anything else.
    """

    FRESH = 0
    STALE = 1
    IMPUTED = 2
    MISSING = 3


SERVED_SCHEMA = pa.schema(
    [
        ("prediction_id", pa.string()),
        ("_time", INSTANT),
        ("entity", pa.string()),
        ("inputs", pa.string()),
        ("stored", pa.list_(pa.float64())),
        ("status", pa.list_(pa.uint8())),
        ("numeric", pa.list_(pa.float64())),
        ("sequence", pa.int64()),
        ("generation", pa.int64()),
        ("others", pa.list_(pa.int64())),
        ("view", pa.string()),
        ("model_version", pa.string()),
        ("variant", pa.string()),
        ("value", pa.float64()),
        ("lower", pa.float64()),
        ("upper", pa.float64()),
        ("other_version", pa.string()),
        ("other_value", pa.float64()),
        ("other_lower", pa.float64()),
        ("other_upper", pa.float64()),
        ("test", pa.int64()),
        ("assigned", pa.string()),
        ("unit", pa.string()),
    ]
)
"""One row per answer. ``_time`` is the clock's time at which features were read, ``inputs`` a JSON object of
the view's inputs, ``stored`` and ``status`` the state's vector in the order of ``view.stored``, ``numeric``
the model's columns in the order of ``model.numeric``, ``sequence`` and ``generation`` the state they were
read from, ``others`` the generation and the sequence of each state beside it (``Read.others``), ``view`` its
fingerprint. While a version is being tried, the ``other`` columns are what the version that did not answer made of
the same instance. ``test`` is the number of the A/B test that the instance is a part of, ``assigned`` the version that
it was assigned to, which may have failed to answer, and ``unit`` a name of what was assigned, by which a request that
is repeated is known again; all three are null outside of tests and in tables from before them."""

OUTCOME_SCHEMA = pa.schema([("prediction_id", pa.string()), ("value", pa.float64()), ("at", INSTANT)])
"""One row per outcome that a caller reported; ``at`` is when it became known."""


def predictions_table(source: EventSource) -> str:
    """The name of the Delta table of answers."""
    return f"{source.name}/predictions"


def outcomes_table(source: EventSource) -> str:
    """The name of the Delta table of outcomes."""
    return f"{source.name}/outcomes"


def inputs_of(use_case: UseCase, predictions: pa.Table) -> dict[str, list[Any]]:
    """The inputs of logged predictions, one list per input of the view, None where the caller gave
    nothing.
    """
    given: list[dict[str, Any]] = [orjson.loads(text) for text in predictions.column("inputs").to_pylist()]
    return {name: [row.get(name) for row in given] for name in use_case.view.inputs}
