"""The judge of this project looking after every event, and two others looking by the clock, on the same traces.

The product's judge makes an e-value out of counts, whenever it is asked. Here it is made for every prefix of a trace
at once, out of the same terms; some prefixes are given to the product's own function and must give the same.
"""

from __future__ import annotations

import numpy as np

from pipelines.spec import ReleasePolicy
from pipelines.statistics.sequential import rate_log_e, rate_terms
from tests.benchmarks.harness import Incomparable
from tests.benchmarks.judge.traces import RATE, Trace

NEVER = -1
_CHECKED = 3  # prefixes of a trace


def rate_reached(trace: Trace, happened: np.ndarray, policy: ReleasePolicy, guardrail: str) -> int:
    """The first request at which the guardrail acts on what ``happened`` bool[n]; ``NEVER`` when it does not."""
    at = np.flatnonzero(happened)
    if not len(at):
        return NEVER
    ours, weight = trace.challenger[at], trace.weight[at]
    steps = np.empty((len(at), len(rate_terms(0.5, policy.tolerance)[0])))
    for share in np.unique(weight).tolist():
        won, lost = rate_terms(share, policy.tolerance)
        steps[(weight == share) & ours], steps[(weight == share) & ~ours] = won, lost
    total = np.cumsum(steps, axis=0)
    top = total.max(axis=1)
    log_e = top + np.log(np.mean(np.exp(total - top[:, None]), axis=1))
    for upto in np.linspace(1, len(at), _CHECKED, dtype=int).tolist():
        _check(log_e[upto - 1], ours[:upto], weight[:upto], policy.tolerance)
    reached = np.flatnonzero(log_e >= -np.log(policy.alpha_of(guardrail)))
    return int(at[reached[0]]) if len(reached) else NEVER


def _check(found: float, ours: np.ndarray, weight: np.ndarray, tolerance: float) -> None:
    counts = {
        share: (int((ours & (weight == share)).sum()), int((~ours & (weight == share)).sum()))
        for share in np.unique(weight).tolist()
    }
    if abs(rate_log_e(counts, tolerance) - found) > 1e-6:
        raise Incomparable(f"the product's judge says {rate_log_e(counts, tolerance)} of {counts}, this one {found}")


def argo(trace: Trace) -> int:
    """When Argo Rollouts aborts by the analysis template of its documentation (features/analysis): every 5 minutes the
    canary's success rate has to be 0.95, and more than 3 failures end the run.
    """
    return _by_the_clock(trace, every_s=300, at_least=0.95, failures=4)


def flagger(trace: Trace) -> int:
    """When Flagger rolls back by the metrics of its documentation (usage/metrics, usage/how-it-works): every minute the
    success rate has to be 99 %, and the fifth failed check ends it. Its check of the P99 duration has no counterpart
    here, because a slow call is one above a limit of the champion's, and is left out.
    """
    return _by_the_clock(trace, every_s=60, at_least=0.99, failures=5)


def _by_the_clock(trace: Trace, every_s: int, at_least: float, failures: int) -> int:
    size = int(every_s * RATE)
    windows = len(trace.weight) // size
    ours = trace.challenger[: windows * size].reshape(windows, size)
    good = ours & ~trace.failed[: windows * size].reshape(windows, size)
    failing = np.flatnonzero(good.sum(axis=1) < at_least * ours.sum(axis=1))
    return int((failing[failures - 1] + 1) * size - 1) if len(failing) >= failures else NEVER
