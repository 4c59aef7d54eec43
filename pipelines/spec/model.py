"""The model, its time split and the gates it must pass. Engines are in ``training`` and ``validation``."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from pydantic import Field as PydanticField

from pipelines.spec.base import Spec


class Target(Spec):
    """What is predicted: ``field`` of the event that happens ``horizon`` after the request time.

    With a horizon of zero the request is made at the moment of the event, whose own values are not yet
    known to any feature.
    """

    field: str
    horizon: timedelta = timedelta(0)


class Split(Spec):
    """A split by request time, backwards from the last example: ``test``, then ``calibration``; the rest trains."""

    calibration: timedelta
    test: timedelta


class ModelSpec(Spec):
    """A network that corrects an anchor.

    ``numeric`` are feature columns, ``categorical`` the entity field or string inputs. With transform f
    (identity or log), anchor a and scale s (columns in the target's unit; without them 0 and 1), the
    answer is f⁻¹(f(a) + s · network(x)). ``coverage`` is the intended share of outcomes inside the interval.
    """

    name: str
    target: Target
    transform: Literal["identity", "log"] = "identity"
    numeric: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    anchor: str | None = None
    scale: str | None = None
    split: Split
    hidden: tuple[int, ...] = (128, 64)
    epochs: int = 8
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    seed: int = 7
    coverage: float = PydanticField(default=0.9, gt=0, lt=1)


class Gate(Spec):
    """The model must beat the column ``baseline`` on the same test rows.

    It passes when the upper end of the block-bootstrap confidence interval of
    ``metric(model) / metric(baseline)`` is at most ``max_ratio``. Blocks are ``block`` long in request time.
    """

    name: str
    metric: Literal["mae", "rmse", "mape"]
    baseline: str
    max_ratio: float = 1.0
    block: timedelta = timedelta(days=7)
    confidence: float = PydanticField(default=0.95, gt=0, lt=1)
    resamples: int = 1000
