"""When a model is trained again, and what is tried then.

The engines are in ``pipelines.monitoring``, ``pipelines.retraining`` and ``pipelines.training.search``.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import Any, Literal, Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec


class DecayRule(Spec):
    """The champion has decayed when its live error exceeds what its validation promised.

    Over the last ``days`` complete UTC days (by request time) the sum of its losses is divided by the sum of what
    validation found for the same entities. Decay is a lower end of the interval of that ratio (day-block bootstrap at
    ``confidence``) above ``ratio``. A day is complete ``grace`` after its last outcome was due. Fewer than
    ``outcomes`` matured answers, outcomes on fewer than ``min_days`` days, or outcomes for less than ``share`` of
    the answers are inconclusive. ``metric`` is one that validation reports.
    """

    metric: Literal["mae", "mape"] = "mae"
    days: int = PydanticField(default=14, ge=4)
    min_days: int = PydanticField(default=7, ge=4)
    ratio: float = PydanticField(default=1.2, gt=1)
    confidence: float = PydanticField(default=0.99, gt=0.5, lt=1)
    outcomes: int = PydanticField(default=500, ge=1)
    share: float = PydanticField(default=0.5, gt=0, le=1)
    grace: timedelta = timedelta(hours=1)
    resamples: int = PydanticField(default=1000, ge=100)

    @model_validator(mode="after")
    def _days_fit(self) -> Self:
        if self.min_days > self.days:
            raise ValueError(f"a window of {self.days} days cannot hold the {self.min_days} that min_days asks for")
        return self


class DriftRule(Spec):
    """A watched column has drifted when a window of ``days`` is unlike any that its own past would lead one to expect.

    ``columns`` are stored features or numeric columns of the model. With ``by_entity`` each (column, entity) is a
    series of its own, so that one broken sensor is not averaged away; otherwise each column is one. Seasons of a day,
    a week and, given 15 months, of a year are taken out before windows are compared. A series needs ``rows``
    values in the window and ``windows`` past windows, or it is inconclusive. It has drifted when its distance passes
    Benjamini-Hochberg over all series at ``alpha`` and is at least ``effect`` deviations, or when the share of
    missing values rose by ``missing``.
    """

    columns: tuple[str, ...] = PydanticField(min_length=1)
    by_entity: bool = True
    days: int = PydanticField(default=14, ge=1)
    alpha: float = PydanticField(default=0.01, gt=0, lt=1)
    effect: float = PydanticField(default=0.5, gt=0)
    missing: float = PydanticField(default=0.2, gt=0, le=1)
    rows: int = PydanticField(default=50, ge=10)
    windows: int = PydanticField(default=12, ge=8)


class SearchSpace(Spec):
    """Small choices for fields of the model; the page's own value is always among what is tried.

    ``trials`` combinations are tried: the page's own, then others drawn without repetition. They are judged on the
    last ``holdout`` of the train part, never on calibration or test rows.
    """

    learning_rate: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    hidden: tuple[tuple[int, ...], ...] = ()
    weight_decay: tuple[float, ...] = ()
    batch_size: tuple[int, ...] = ()
    trials: int = PydanticField(default=4, ge=1, le=64)
    holdout: timedelta = timedelta(weeks=6)

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The fields that have choices."""
        named = ("learning_rate", "epochs", "hidden", "weight_decay", "batch_size")
        return {name: values for name in named if (values := getattr(self, name))}

    @property
    def combinations(self) -> tuple[dict[str, Any], ...]:
        """Every combination of the choices, the last field moving fastest."""
        return tuple(dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values()))


class RetrainPolicy(Spec):
    """When to train again and how. A condition that is None is not watched.

    ``max_age`` is how old the newest example of the champion may become. After a trigger no other opens for
    ``cool_down``, unless a person asks for it.
    """

    decay: DecayRule | None = DecayRule()
    drift: DriftRule | None = None
    max_age: timedelta | None = None
    cool_down: timedelta = timedelta(days=7)
    search: SearchSpace = SearchSpace()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.cool_down < timedelta(0):
            raise ValueError(f"a cool-down lasts at least 0, not {self.cool_down}")
        if self.search.holdout <= timedelta(0):
            raise ValueError(f"trials need a holdout above 0 to be judged on, not {self.search.holdout}")
        return self
