"""The judgement of a gate before release: does the model beat a baseline on the same test rows, beyond
chance?

This is the only place where a gate's ratio is compared with its limit. Too little evidence is never a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipelines.spec import Gate
from pipelines.spec.base import microseconds
from pipelines.statistics.bootstrap import block_bootstrap_ratio
from pipelines.validation.metrics import finish, row_losses

_Two = tuple[float, float]
_Three = tuple[float, float, float]
MIN_BLOCKS = 4
"""With fewer blocks the bootstrap says nothing, and the gate is inconclusive."""


@dataclass(frozen=True)
class GateResult:
    """``ratio`` is metric(model) / metric(baseline) with its confidence interval; NaN when it could not be
    taken.

    ``reason`` says in words why it passed or not; ``rows`` were compared, ``left_out`` had no baseline.
    """

    name: str
    passed: bool
    metric: str
    baseline: str
    max_ratio: float
    ratio: float
    lower: float
    upper: float
    model_metric: float
    baseline_metric: float
    rows: int
    left_out: int
    blocks: int
    reason: str


def judge_gate(
    gate: Gate,
    *,
    time_us: np.ndarray,
    actual: np.ndarray,
    predicted: np.ndarray,
    baseline: np.ndarray,
    seed: int = 0,
) -> GateResult:
    """The result of ``gate`` on test rows: request times (int64 microseconds), outcomes, answers, baseline;
    all [n].

    Rows without a finite baseline or outcome are left out of both sides. An answer that is not finite fails
    the gate: leaving it out would let a model pass by staying silent where it is hard.
    """
    usable = np.isfinite(baseline) & np.isfinite(actual)
    rows, left_out = int(usable.sum()), int((~usable).sum())
    blocks = time_us[usable] // microseconds(gate.block)
    count = len(np.unique(blocks))

    def result(
        passed: bool, reason: str, interval: _Three = (math.nan,) * 3, pair: _Two = (math.nan,) * 2
    ) -> GateResult:
        ratio, lower, upper = interval
        return GateResult(
            name=gate.name,
            passed=passed,
            metric=gate.metric,
            baseline=gate.baseline,
            max_ratio=gate.max_ratio,
            ratio=ratio,
            lower=lower,
            upper=upper,
            model_metric=pair[0],
            baseline_metric=pair[1],
            rows=rows,
            left_out=left_out,
            blocks=count,
            reason=reason,
        )

    if silent := int((~np.isfinite(predicted[usable])).sum()):
        return result(False, f"the model gave no finite answer on {silent} of {rows} rows")
    if count < MIN_BLOCKS:
        return result(
            False,
            f"inconclusive: the test rows fill {count} blocks of {gate.block}, at least {MIN_BLOCKS} are "
            "needed; lengthen Split.test or shorten Gate.block",
        )
    ours = row_losses(gate.metric, actual[usable], predicted[usable])
    theirs = row_losses(gate.metric, actual[usable], baseline[usable])
    if undefined := int((~np.isfinite(ours) | ~np.isfinite(theirs)).sum()):
        return result(False, f"inconclusive: {gate.metric} is undefined on {undefined} rows with outcome 0; use mae")
    pair = (finish(gate.metric, float(ours.mean())), finish(gate.metric, float(theirs.mean())))
    sums = np.bincount(np.unique(blocks, return_inverse=True)[1], weights=theirs)
    if not np.all(sums > 0):
        return result(False, "inconclusive: the baseline makes no error at all in some block", pair=pair)
    found = block_bootstrap_ratio(
        ours,
        theirs,
        blocks,
        resamples=gate.resamples,
        confidence=gate.confidence,
        rng=np.random.default_rng(seed),
    )
    interval = (
        finish(gate.metric, found.estimate),
        finish(gate.metric, found.lower),
        finish(gate.metric, found.upper),
    )
    passed = interval[2] <= gate.max_ratio
    relation = "at most" if passed else "above"
    return result(
        passed,
        f"upper end {interval[2]:.3f} of the {gate.confidence:.0%} interval is {relation} {gate.max_ratio:g}",
        interval,
        pair,
    )
