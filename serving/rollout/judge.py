"""The judge: what the evidence says about a challenger now. A pure function, so a replayed journal decides alike.

Each guardrail has a test of its own that may be looked at after every event; together they withdraw a version that
is as good as its champion with a probability of at most the policy's alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pipelines.spec import ReleasePolicy
from pipelines.spec.base import microseconds
from pipelines.spec.release import ACTIVE_ENTITIES, Assignment
from pipelines.statistics.sequential import (
    bernoulli_log_e,
    mean_above_log_e,
    mean_below_log_e,
    rate_log_e,
    sample_ratio_log_e,
)
from serving.rollout.evidence import Evidence
from serving.rollout.machine import Phase, State

_WITHDRAWING = ("errors", "latency", "budget", "disagreement", "quality", "coverage")


class Action(StrEnum):
    """What follows from the evidence."""

    HOLD = "hold"
    ADVANCE = "advance"
    PROMOTE = "promote"
    PAUSE = "pause"
    ROLL_BACK = "roll_back"
    GIVE_UP = "give_up"
    CONFIRM = "confirm"


@dataclass(frozen=True)
class Verdict:
    """``log_e`` holds the evidence of each guardrail (act at ``threshold``) and of the promotion test."""

    action: Action
    reason: str
    guardrail: str | None
    log_e: dict[str, float]
    threshold: dict[str, float]


def judge(policy: ReleasePolicy, state: State, evidence: Evidence, now_us: int) -> Verdict:
    """The verdict on a rollout in one of the phases shadow, canary and promoting, or on a champion that is watched, at
    the cluster's time ``now_us``.
    """
    log_e, threshold = measure(policy, evidence)

    def verdict(action: Action, reason: str, guardrail: str | None = None) -> Verdict:
        return Verdict(action, reason, guardrail, log_e, threshold)

    if evidence.accidents >= policy.harm_cap:
        return verdict(
            Action.ROLL_BACK, f"{evidence.accidents} requests harmed or left unanswered reach the cap", "harm"
        )
    for name in _WITHDRAWING:
        if log_e[name] >= threshold[name]:
            said = f"{name}: log e {log_e[name]:.2f} reaches {threshold[name]:.2f}"
            return verdict(Action.ROLL_BACK, said, name)
    if state.phase is Phase.WATCHING:
        if policy.watch is None or now_us - evidence.stage_us >= microseconds(policy.watch.time):
            return verdict(Action.CONFIRM, "nothing was found against it while it was watched")
        return verdict(Action.HOLD, f"it is watched for {policy.watch.time}")
    if state.phase is Phase.PROMOTING:
        return verdict(Action.HOLD, "the gateways are loading it")
    late = now_us - evidence.started_us >= microseconds(policy.patience)
    if state.paused:
        return verdict(Action.GIVE_UP if late else Action.HOLD, "paused")
    if log_e["sample_ratio"] >= threshold["sample_ratio"]:
        return verdict(Action.PAUSE, f"assignment does not follow its weights: {evidence.ratio}", "sample_ratio")
    if log_e["degraded"] >= threshold["degraded"]:
        said = f"{evidence.degraded} of {evidence.seen} requests had degraded inputs, more than {policy.degraded:.0%}"
        return verdict(Action.PAUSE, said, "degraded")
    if evidence.skew is not None:
        return verdict(Action.PAUSE, f"feature skew: {evidence.skew}", "skew")
    missing = _missing(policy, state, evidence, now_us, log_e, threshold)
    if missing is None and any(blackout.covers(now_us) for blackout in policy.blackouts):
        return verdict(Action.HOLD, "the stage is complete, and the next one waits for the end of a blackout")
    if missing is None:
        return verdict(Action.ADVANCE if not state.last_step else Action.PROMOTE, "the stage is complete")
    if late:
        return verdict(Action.GIVE_UP, f"undecided after {policy.patience}: {missing}")
    return verdict(Action.HOLD, missing)


def measure(policy: ReleasePolicy, evidence: Evidence) -> tuple[dict[str, float], dict[str, float]]:
    """The log e-value of every guardrail and of promotion, and where each acts."""
    log_e = {
        "errors": rate_log_e(evidence.errors, policy.tolerance),
        "latency": rate_log_e(evidence.slow, policy.tolerance),
        "budget": _over_budget(policy, evidence),
        "disagreement": bernoulli_log_e(evidence.disagreed, evidence.copies, policy.disagreement),
        "sample_ratio": sample_ratio_log_e(evidence.ratio),
        "degraded": bernoulli_log_e(evidence.degraded, evidence.seen, policy.degraded),
        "quality": -math.inf,
        "coverage": -math.inf,
    }
    threshold = {name: -math.log(policy.alpha_of(name)) for name in log_e}
    if policy.labels is not None:
        labels = policy.labels
        losses, margin = _clipped([day.difference for day in evidence.days], labels.clip), labels.margin / labels.clip
        missed = _clipped([day.missed for day in evidence.days], labels.coverage_clip)
        log_e |= {
            "quality": mean_above_log_e(losses, margin),
            "coverage": mean_above_log_e(missed, labels.coverage_margin / labels.coverage_clip),
            "not_worse": mean_below_log_e(losses, margin),
        }
        threshold["not_worse"] = -math.log1p(-policy.labels.confidence)
    return log_e, threshold


def _over_budget(policy: ReleasePolicy, evidence: Evidence) -> float:
    """Evidence against either hypothesis, that the budget is kept and that the champion keeps it no better.

    The smaller of two e-values is one against the union of their null hypotheses.
    """
    if policy.budget is None:
        return -math.inf
    over, exposed = (sum(ours for ours, _ in counts.values()) for counts in (evidence.over, evidence.exposed))
    kept = bernoulli_log_e(over, exposed, policy.budget.share)
    return min(kept, rate_log_e(evidence.over, policy.tolerance))


def _clipped(differences: list[float], clip: float) -> list[float]:
    return [min(max(difference / clip, -1.0), 1.0) for difference in differences]


def _missing(
    policy: ReleasePolicy,
    state: State,
    evidence: Evidence,
    now_us: int,
    log_e: dict[str, float],
    threshold: dict[str, float],
) -> str | None:
    """What the present stage still lacks; None when it is complete."""
    stage = policy.shadow if state.phase is Phase.SHADOW else policy.steps[state.step]
    judged = evidence.copies if state.phase is Phase.SHADOW else evidence.exposed.get(state.weight, (0, 0))[0]
    if judged < stage.requests:
        return f"{judged} of {stage.requests} challenger requests"
    if now_us - evidence.stage_us < microseconds(stage.time):
        return f"the stage lasts {stage.time}"
    if not (state.phase is Phase.CANARY and state.last_step):
        return None
    if policy.assignment is Assignment.ENTITY and evidence.entities < ACTIVE_ENTITIES:
        return f"{evidence.entities} of {ACTIVE_ENTITIES} active entities"
    if policy.labels is not None:
        if len(evidence.days) < policy.labels.days:
            return f"{len(evidence.days)} of {policy.labels.days} days with matured outcomes"
        if log_e["not_worse"] < threshold["not_worse"]:
            return f"not shown to be as good: log e {log_e['not_worse']:.2f} of {threshold['not_worse']:.2f}"
    if policy.approval and not state.approved:
        return "waiting for approval"
    return None
