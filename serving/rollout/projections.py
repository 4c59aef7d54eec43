"""What follows from a rollout's situation for others to see: its description, the routing table, aliases and alerts."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from pydantic import ValidationError

from pipelines.spec.release import Assignment
from serving.rollout.comparison import compare, split_log_e, verdict
from serving.rollout.journal import Situation
from serving.rollout.judge import judge, measure
from serving.rollout.machine import Outcome, Phase, State
from serving.routing import Challenger, Share, Split


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures as JSON takes them: one that is not finite as None."""
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


def describe(situation: Situation, now_us: int) -> dict[str, Any]:
    """A situation for people: where the rollout stands, its evidence, and what the judge says now."""
    state, evidence = situation.state, situation.evidence
    said: dict[str, Any] = {}
    log_e: dict[str, float] = {}
    threshold: dict[str, float] = {}
    try:
        if state.judged:
            verdict = judge(situation.policy, state, evidence, now_us)
            log_e, threshold = verdict.log_e, verdict.threshold
            reason = f"{verdict.reason}: {situation.why}" if state.paused and situation.why else verdict.reason
            said = {"verdict": verdict.action, "reason": reason}
        elif situation.fields and not state.test:
            log_e, threshold = measure(situation.policy, evidence)
        if not state.judged and situation.why is not None:
            said = {"reason": situation.why}
    except ValidationError:  # of the code that began it: its evidence cannot be measured, all else can be told
        said = {"reason": "the policy that this rollout was started with does not fit this code"}
    return {
        "phase": state.phase,
        "champion": state.champion,
        "previous": state.previous,
        "challenger": state.challenger,
        "variants": list(state.variants),
        "rollout": state.rollout,
        "step": state.step,
        "weight": state.weight,
        "paused": state.paused,
        "outcome": state.outcome,
        "ended": state.ended,
        "reverted": state.reverted,
        "evidence": {
            "challenger_requests": evidence.challenger_requests(),
            "served": evidence.served,
            "harmed": evidence.harmed,
            "copies": evidence.copies,
            "disagreed": evidence.disagreed,
            "degraded": evidence.degraded,
            "days": len(evidence.days),
            "skewed": evidence.skew.mismatched if evidence.skew is not None else 0,
            "log_e": finite(log_e),
            "threshold": finite(threshold),
        },
        **said,
    }


def describe_test(situation: Situation, now_us: int) -> dict[str, Any]:
    """The A/B test of a situation (``Journal.test``), for people."""
    state, evidence = situation.state, situation.evidence
    results = evidence.results[-1] if evidence.results else None
    control = next((arm for arm in (results.arms if results else ()) if arm.version == situation.tested), None)
    said: dict[str, Any] = {"variants": [], "sample_ratio": {"log_e": None, "threshold": None}}
    try:
        said = _compared(situation, now_us)
    except ValidationError:  # of the code that began it
        said["reason"] = "this test was started with a definition that does not fit this code"
    return {
        "test": state.rollout,
        "definition": dict(situation.fields),
        "running": state.phase is Phase.TESTING,
        "paused": state.paused,
        "champion": situation.tested,
        "champion_units": control.sample.units if control else 0,
        "champion_mean": control.sample.mean if control else None,
        "outcome": state.outcome,
        "winner": state.ended,
        "started_us": evidence.started_us,
        "at_us": results.at_us if results else None,
        "assigned": list(evidence.arms),
        "served": evidence.served,
        "harmed": evidence.harmed,
        "accidents": evidence.accidents,
        **said,
    }


def _compared(situation: Situation, now_us: int) -> dict[str, Any]:
    """What can only be said of a test whose definition is known."""
    state, evidence, test, champion = situation.state, situation.evidence, situation.test, situation.tested
    arms = evidence.results[-1].arms if evidence.results else ()
    figures = ("mean", "difference", "low", "high")
    found: dict[str, Any] = {
        "variants": [
            {**asdict(one), **finite({name: getattr(one, name) for name in figures})}
            for one in compare(test, champion, arms)
        ],
        "sample_ratio": {"log_e": split_log_e(test, evidence.arms), "threshold": -math.log(test.ratio_alpha)},
    }
    if state.phase is Phase.TESTING:
        found["reason"] = verdict(test, champion, state.paused, evidence, now_us).reason
        if state.paused and situation.why is not None:
            found["reason"] += f": {situation.why}"
    elif situation.why is not None:
        found["reason"] = situation.why
    return found


def aliases(state: State) -> dict[str, str]:
    """The versions by the names under which the registry shows them."""
    named = {"champion": state.champion, "challenger": state.challenger, "previous": state.previous}
    return {name: version for name, version in named.items() if version is not None}


def alerts(situation: Situation) -> dict[str, str]:
    """The alerts that belong to a situation, by name and detail."""
    state, found = situation.state, {}
    why = situation.why or "no reason was given"
    if state.reverted is not None:
        found["champion_reverted"] = f"version {state.champion} answers in place of {state.reverted}: {why}"
    if state.paused:
        what = f"A/B test {state.rollout}" if state.test else f"the rollout of version {state.challenger}"
        found["rollout_paused"] = f"{what} waits for somebody to look at it: {why}"
    elif state.test:
        if state.outcome in (Outcome.LOST, Outcome.INCONCLUSIVE):
            found[f"test_{state.outcome}"] = f"A/B test {state.rollout}: {why}"
    elif state.outcome in (Outcome.ROLLED_BACK, Outcome.INCONCLUSIVE):
        found[f"rollout_{state.outcome}"] = f"version {state.ended}: {why}"
    return found


WAITING = "rollout_waiting"
"""The alert of a challenger that runs and waits for the state of its view; no state of the rollout has it."""
ALERTS = (
    "champion_reverted",
    "rollout_paused",
    "rollout_rolled_back",
    "rollout_inconclusive",
    "test_lost",
    "test_inconclusive",
    WAITING,
)


def document(situation: Situation) -> dict[str, Any] | None:
    """The fields of the routing table that the situation calls for; None before the first champion."""
    state = situation.state
    if state.champion is None:
        return None
    challenger = None
    asked = state.challenger if state.tried else state.previous if state.phase is Phase.WATCHING else None
    if asked is not None:
        policy = situation.policy
        watch = policy.watch if state.phase is Phase.WATCHING else None
        challenger = Challenger(
            version=asked,
            rollout=state.rollout,
            watch=watch is not None,
            salt=state.salt,
            by_entity=policy.assignment is Assignment.ENTITY,
            weight=state.weight,
            shadow=policy.shadow.share if watch is None else watch.share,
            deadline_ms=policy.deadline_ms,
            slow_factor=policy.slow_factor,
            slow_floor_ms=policy.slow_floor_ms,
            budget_ms=policy.budget.ms if policy.budget is not None else None,
            harm_cap=policy.harm_cap,
        ).model_dump(mode="json")
    return {
        "champion": state.champion,
        "previous": state.previous,
        "prepare": state.challenger if state.phase is Phase.PROMOTING else None,
        "prepare_in": _loader(state),
        "challenger": challenger,
        "split": _split(situation),
    }


def _loader(state: State) -> str | None:
    """The gateway that loads a version before all others, none ("") until one was chosen; None where all may."""
    if state.phase is not Phase.PROMOTING or state.everywhere:
        return None
    return state.loaders[-1] if state.loaders else ""


def _split(situation: Situation) -> dict[str, Any] | None:
    state = situation.state
    if state.phase is not Phase.TESTING or state.paused:
        return None
    test = situation.test
    upto = accumulate(variant.share for variant in test.variants)
    return Split(
        test=state.rollout,
        salt=state.salt,
        by_entity=test.unit is Assignment.ENTITY,
        shares=tuple(Share(version=v, upto=to) for v, to in zip(test.versions, upto, strict=True)),
        deadline_ms=test.deadline_ms,
        harm_cap=test.harm_cap,
    ).model_dump(mode="json")
