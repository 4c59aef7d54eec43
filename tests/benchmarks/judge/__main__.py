"""``python -m tests.benchmarks.judge``: false rollbacks under everything that must not be held against a version, and
how soon a bad one is seen; beside Argo Rollouts and Flagger as their documentation sets them, on the same traces.

Alpha is 1 %, an eighth of it for each guardrail. The cap on harmed answers is no part of alpha and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from scipy.stats import beta

from pipelines.spec import Budget, ReleasePolicy
from pipelines.spec.release import GUARDRAILS
from pipelines.statistics.sequential import bernoulli_log_e, mean_above_log_e, sample_ratio_log_e
from tests.benchmarks.harness import report, say
from tests.benchmarks.judge import traces
from tests.benchmarks.judge.looking import NEVER, argo, flagger, rate_reached
from tests.benchmarks.judge.traces import Trace

BUDGET = Budget(ms=200)
POLICY = ReleasePolicy(alpha=0.01, tolerance=0.25, budget=BUDGET)
_REQUESTS, _DAYS = 1_000_000, 40
_LOOKS = 200  # at what is counted by the request, which the product reports at most once in a hundredth of its time
_DETECTIONS, _BAD_REQUESTS = 2_000, 200_000
_MARGIN = 0.25  # of a day's clipped difference in losses
_SEED = 20_261_126


def _ours(trace: Trace) -> int:
    """The first request at which errors or latency act."""
    seen = {"errors": trace.failed, "latency": trace.slow}
    found = [rate_reached(trace, trace.counted(seen[name]), POLICY, name) for name in seen]
    return min((at for at in found if at != NEVER), default=NEVER)


def _null_run(seed: int) -> tuple[bool, bool, bool, bool]:
    """Whether a run was rolled back for nothing: by this judge, by Argo, by Flagger; and whether it was paused."""
    rng = np.random.default_rng([_SEED, seed])
    trace = traces.null(rng, _REQUESTS, sticky=bool(seed % 2))
    # As often as is declared, and no less. What is over the budget is never the champion's: only that half of its
    # test which bounds the rate is in its way.
    rates = {"disagreement": POLICY.disagreement, "budget": BUDGET.share, "degraded": POLICY.degraded}
    happened = {name: np.cumsum(rng.random(_REQUESTS) < rate) for name, rate in rates.items()}
    unit = trace.counted(np.ones(_REQUESTS, dtype=bool))
    exposed = {
        share: (np.cumsum(here & trace.challenger), np.cumsum(here & ~trace.challenger))
        for share in np.unique(trace.weight).tolist()
        if (here := (trace.weight == share) & unit).any()
    }
    acts = {guardrail: -np.log(POLICY.alpha_of(guardrail)) for guardrail in GUARDRAILS}
    acted = set() if _ours(trace) == NEVER else {"errors or latency"}
    for at in np.unique(np.geomspace(100, _REQUESTS - 1, _LOOKS).astype(int)).tolist():
        log_e = {name: bernoulli_log_e(int(happened[name][at]), at + 1, rate) for name, rate in rates.items()}
        counts = {share: (int(won[at]), int(lost[at])) for share, (won, lost) in exposed.items()}
        log_e["sample_ratio"] = sample_ratio_log_e(counts)
        acted |= {name for name, found in log_e.items() if found >= acts[name]}
    for name in ("quality", "coverage"):
        days = np.clip(rng.normal(_MARGIN, 0.3, _DAYS), -1, 1)  # as bad as the margin allows
        if any(mean_above_log_e(days[:day], _MARGIN) >= acts[name] for day in range(1, _DAYS + 1)):
            acted.add(name)
    paused, rolled = acted & {"sample_ratio", "degraded"}, acted - {"sample_ratio", "degraded"}
    return bool(rolled), argo(trace) != NEVER, flagger(trace) != NEVER, bool(paused)


def _seen(judge: Callable[[Trace], int], made: list[Trace]) -> tuple[float, float, float]:
    """Requests of the challenger until it is withdrawn: median, 95th percentile; share of runs in which it never is."""
    asked = []
    for trace in made:
        at = judge(trace)
        asked.append(np.inf if at == NEVER else float(trace.challenger[: at + 1].sum()))
    found = np.sort(asked)
    never = float(np.isinf(found).mean())
    return float(found[len(found) // 2]), float(found[int(np.ceil(0.95 * len(found))) - 1]), never


def _bad(kind: str, runs: int, count: int) -> list[Trace]:
    rng = np.random.default_rng([_SEED, runs, len(kind)])
    return [traces.worse(rng, count, **{kind: traces.WORSE}) for _ in range(runs)]


def _upper(found: int, runs: int) -> float:
    """The upper end of the one-sided 99 % interval (Clopper & Pearson) of a share."""
    return 1.0 if found == runs else float(beta.ppf(0.99, found + 1, runs - found))


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.judge", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000, help="null runs of a million requests each (default 1,000)")
    runs = parser.parse_args().runs
    with ProcessPoolExecutor(2) as pool:
        false = np.array(list(pool.map(_null_run, range(runs), chunksize=5))).sum(axis=0).tolist()
    _, errors_p95, errors_never = _seen(_ours, _bad("errors", _DETECTIONS, 20_000))
    _, latency_p95, latency_never = _seen(_ours, _bad("slow", _DETECTIONS, 20_000))
    say(f"{runs} null runs of {_REQUESTS:,} requests, with outages of both, changes of weight and uneven users,")
    say("who are assigned themselves in half of the runs;")
    say(f"a challenger that fails in {traces.WORSE:.0%} of its requests, the champion in {traces.ERRORS:.1%}:")
    say("judge      rolled back for nothing   requests of a bad challenger until it is withdrawn: median, p95, never")
    compared = _bad("errors", 100, _BAD_REQUESTS)
    for name, judge, wrong in (("tidegate", _ours, false[0]), ("argo", argo, false[1]), ("flagger", flagger, false[2])):
        median, p95, never = _seen(judge, compared)
        say(f"{name:10} {wrong / runs:23.1%}   {median:8,.0f} {p95:8,.0f} {never:7.0%}")
    say(f"withdrawn in time: errors {1 - errors_never:.2%}, latency {1 - latency_never:.2%} of {_DETECTIONS} runs")
    figures = {
        "false_rollback_upper": _upper(false[0], runs),
        "false_rollbacks": float(false[0]),
        "false_pause_upper": _upper(false[3], runs),
        "errors_p95_requests": errors_p95,
        "latency_p95_requests": latency_p95,
        "argo_false_rollbacks": false[1] / runs,
        "flagger_false_rollbacks": false[2] / runs,
        "runs": float(runs),
    }
    report("judge", figures)


if __name__ == "__main__":
    main()
