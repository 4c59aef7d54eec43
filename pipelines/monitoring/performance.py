"""What the champion's answers turned out to be worth: its error by day, and whether it has decayed.

Everything here is a pure function of logged answers and reported outcomes. Too little evidence is inconclusive, never
fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.spec import DecayRule
from pipelines.spec.base import DAY_US, microseconds
from pipelines.statistics.bootstrap import block_bootstrap_ratio
from pipelines.validation.metrics import row_losses

Finding = Literal["decayed", "holds", "inconclusive"]


@dataclass(frozen=True)
class Answers:
    """n answers of the champion with what became of them, ordered by request time.

    ``time_us`` int64 [n] are request times, ``entity`` and ``version`` object [n]; the others are float64 [n].
    ``actual`` is NaN where no outcome was reported, ``value`` where there was no answer.
    """

    time_us: np.ndarray
    entity: np.ndarray
    version: np.ndarray
    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    actual: np.ndarray

    def __len__(self) -> int:
        return len(self.time_us)

    def take(self, rows: np.ndarray) -> Answers:
        """The answers at ``rows``, a mask or positions."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    @property
    def matured(self) -> np.ndarray:
        """bool [n]: which answers can be judged."""
        found: np.ndarray = np.isfinite(self.actual) & np.isfinite(self.value)
        return found


@dataclass(frozen=True)
class Reference:
    """The validation error of a version by entity, and ``everywhere`` for entities that validation did not see."""

    everywhere: float
    by_entity: Mapping[str, float]

    def of(self, entities: np.ndarray) -> np.ndarray:
        """float64 [n]: what each row's error was promised to be."""
        return np.array([self.by_entity.get(entity, self.everywhere) for entity in entities.tolist()], dtype=np.float64)


@dataclass(frozen=True)
class Decay:
    """The verdict on one version over the complete days from ``first_day`` up to and with ``last_day``.

    ``ratio`` with its interval is live loss over promised loss; ``error`` and ``promised`` are their means over the
    ``matured`` rows (in the metric's unit), NaN where nothing could be taken. ``answers`` were due.
    """

    finding: Finding
    reason: str
    version: str
    metric: str
    ratio: float
    lower: float
    upper: float
    limit: float
    error: float
    promised: float
    answers: int
    matured: int
    unanswered: int
    days: int
    first_day: int
    last_day: int


def champion_answers(predictions: pa.Table, outcomes: pa.Table, now_us: int) -> Answers:
    """The champion's answers of ``predictions`` (``SERVED_SCHEMA``) with their ``outcomes`` (``OUTCOME_SCHEMA``).

    An answer logged twice counts once; of several outcomes of one answer the latest that was known by ``now_us``
    counts. Outcomes without an answer are left out.
    """
    mine = predictions.filter(pc.equal(predictions.column("variant"), "champion")).sort_by("_time")
    known = outcomes.filter(pc.less_equal(pc.cast(outcomes.column("at"), pa.int64()), now_us))
    latest = known.sort_by([("at", "descending")])
    ids = mine.column("prediction_id").to_numpy(zero_copy_only=False)
    _, first = np.unique(ids.astype(str), return_index=True)
    mine = mine.take(pa.array(np.sort(first)))
    place = pc.index_in(mine.column("prediction_id"), value_set=latest.column("prediction_id").combine_chunks())
    return Answers(
        time_us=pc.cast(mine.column("_time"), pa.int64()).to_numpy(),
        entity=np.array(mine.column("entity").to_pylist(), dtype=object),
        version=np.array(mine.column("model_version").to_pylist(), dtype=object),
        value=_floats(mine.column("value")),
        lower=_floats(mine.column("lower")),
        upper=_floats(mine.column("upper")),
        actual=_floats(latest.column("value").take(place)),
    )


def judge_decay(
    rule: DecayRule,
    answers: Answers,
    *,
    version: str,
    reference: Reference,
    horizon_us: int,
    now_us: int,
    seed: int = 0,
) -> Decay:
    """Whether ``version`` errs more than ``reference`` promised; see ``DecayRule``.

    Each row's loss is held against the promise for its own entity, so a change in who asks is not taken for decay.
    The promise itself is an estimate and taken as exact. The rule is applied anew at every look, so its confidence
    is that of one look; what keeps repeated looks honest is that ``ratio`` lies above 1.
    """
    last = (now_us - horizon_us - microseconds(rule.grace)) // DAY_US - 1
    first = last - rule.days + 1
    days = answers.time_us // DAY_US
    mine = answers.take((days >= first) & (days <= last) & (answers.version == version))
    unanswered = int((~np.isfinite(mine.value)).sum())
    ripe = mine.take(mine.matured)
    losses = row_losses(rule.metric, ripe.actual, ripe.value)
    promised = reference.of(ripe.entity)
    blocks = ripe.time_us // DAY_US
    count = len(np.unique(blocks))

    def verdict(finding: Finding, reason: str, interval: tuple[float, float, float] = (math.nan,) * 3) -> Decay:
        return Decay(
            finding=finding,
            reason=reason,
            version=version,
            metric=rule.metric,
            ratio=interval[0],
            lower=interval[1],
            upper=interval[2],
            limit=rule.ratio,
            error=float(losses.mean()) if len(losses) else math.nan,
            promised=float(promised.mean()) if len(losses) else math.nan,
            answers=len(mine),
            matured=len(ripe),
            unanswered=unanswered,
            days=count,
            first_day=int(first),
            last_day=int(last),
        )

    if len(ripe) < rule.outcomes or count < rule.min_days:
        return verdict(
            "inconclusive",
            f"{len(ripe)} matured answers of version {version} on {count} of the last {rule.days} complete days; "
            f"{rule.outcomes} on {rule.min_days} are needed",
        )
    if len(ripe) < rule.share * len(mine):
        return verdict(
            "inconclusive",
            f"outcomes came for {len(ripe)} of {len(mine)} answers that were due, less than {rule.share:.0%}: those "
            "that did may not stand for the rest",
        )
    if not np.isfinite(losses).all() or not (np.isfinite(promised).all() and (promised > 0).all()):
        return verdict(
            "inconclusive",
            f"{rule.metric} is undefined on some rows, or validation promised no error above zero: choose another "
            "metric in DecayRule",
        )
    found = block_bootstrap_ratio(
        losses,
        promised,
        blocks,
        resamples=rule.resamples,
        confidence=rule.confidence,
        rng=np.random.default_rng(seed),
    )
    interval = (found.estimate, found.lower, found.upper)
    decayed = found.lower > rule.ratio
    return verdict(
        "decayed" if decayed else "holds",
        f"{rule.metric} is {found.estimate:.3f} times what validation promised; the lower end {found.lower:.3f} of the "
        f"{rule.confidence:.0%} interval is {'above' if decayed else 'at most'} {rule.ratio:g}",
        interval,
    )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = pc.fill_null(column, np.nan).to_numpy()
    return values
