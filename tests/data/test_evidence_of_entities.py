"""Where entities are assigned, each is counted once, however many gateways see it and however often it errs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.spec import CanaryStep, ReleasePolicy
from pipelines.spec.release import ACTIVE_ENTITIES, Assignment
from serving.rollout.evidence import Evidence, Report
from serving.rollout.judge import Action, judge
from serving.rollout.machine import Phase, State

POLICY = ReleasePolicy(assignment=Assignment.ENTITY, steps=(CanaryStep(weight=0.1), CanaryStep(weight=0.5)))
KINDS = ("exposed", "errors", "slow", "over")
# In each report: at which weight, what, of which side, and which entities.
TOLD = st.tuples(
    st.sampled_from([0.1, 0.5]), st.sampled_from(KINDS), st.booleans(), st.lists(st.integers(0, 12), max_size=6)
)


def report_of(number: int, told: list[tuple[float, str, bool, list[int]]]) -> Report:
    units: dict[str, dict[float, tuple[list[int], list[int]]]] = {}
    for weight, kind, champion, entities in told:
        # As hashing does, an entity is of one version at a weight.
        of = [e for e in entities if (e % 10 < weight * 10) != champion]
        units.setdefault(kind, {}).setdefault(weight, ([], []))[champion].extend(of)
    return Report(gateway=f"g{number % 2}", sequence=number // 2 + 1, rollout=1, units=units)


def naive(reports: list[Report]) -> dict[str, Counter[tuple[float, bool]]]:
    found = {kind: Counter[tuple[float, bool]]() for kind in (*KINDS, "ratio")}
    had: set[tuple[str, float, int]] = set()
    for one in reports:
        new: set[tuple[float, int]] = set()
        for weight, pair in one.units.get("exposed", {}).items():
            for champion in (False, True):
                for entity in pair[champion]:
                    if ("step", weight, entity) not in had:
                        had.add(("step", weight, entity))
                        new.add((weight, entity))
                        found["exposed"][weight, champion] += 1
                    if ("ever", 0.0, entity) not in had:
                        had.add(("ever", 0.0, entity))
                        found["ratio"][weight, champion] += 1
        for weight, pair in one.units.get("over", {}).items():
            for champion in (False, True):
                found["over"][weight, champion] += sum((weight, entity) in new for entity in set(pair[champion]))
        for kind in ("errors", "slow"):
            for weight, pair in one.units.get(kind, {}).items():
                for champion in (False, True):
                    for entity in pair[champion]:
                        if (kind, 0.0, entity) not in had:
                            had.add((kind, 0.0, entity))
                            found[kind][weight, champion] += 1
    return found


@given(st.lists(st.lists(TOLD, max_size=5), max_size=8))
@settings(max_examples=150, deadline=None)
def test_every_entity_counts_once_by_a_naive_count(told):
    reports = [report_of(number, one) for number, one in enumerate(told)]
    evidence = Evidence()
    for one in reports:
        evidence = evidence.with_report(Report.model_validate_json(one.model_dump_json()))
    wanted = naive(reports)
    for kind in wanted:
        counted = {
            (weight, champion): pair[champion]
            for weight, pair in getattr(evidence, kind).items()
            for champion in (False, True)
        }
        assert +Counter(counted) == +wanted[kind], kind
    assert evidence.entities == sum(wanted["ratio"].values())


def test_a_version_tried_on_too_few_entities_is_not_promoted():
    last = State(Phase.CANARY, champion="1", challenger="2", rollout=1, weights=(0.1, 0.5), step=1)
    for count, action in ((ACTIVE_ENTITIES - 1, Action.HOLD), (ACTIVE_ENTITIES, Action.PROMOTE)):
        of = [entity for entity in range(count) if entity % 2], [entity for entity in range(count) if not entity % 2]
        evidence = Evidence().with_report(Report(gateway="g", sequence=1, rollout=1, units={"exposed": {0.5: of}}))
        verdict = judge(POLICY, last, evidence, 10**15 if action is Action.PROMOTE else 3_600_000_000)
        assert verdict.action is action
        assert action is Action.PROMOTE or verdict.reason == "999 of 1000 active entities"


def test_entities_that_err_again_and_again_withdraw_no_version_that_is_as_good():
    """200 rollouts of an identical version in which a few entities err in each of their requests. Alpha is 1 %; counted
    by the request, far more of them would be withdrawn.
    """
    rng = np.random.default_rng(7)
    withdrawn = {"by entity": 0, "by request": 0}
    for _ in range(200):
        erring = np.flatnonzero(rng.random(1_500) < 0.005)
        place = rng.random(1_500)
        evidence, found = dict.fromkeys(withdrawn, Evidence()), set()
        for number, weight in enumerate([0.1] * 20 + [0.5] * 20, 1):
            here = rng.choice(erring, size=10)
            ours, theirs = here[place[here] < weight].tolist(), here[place[here] >= weight].tolist()
            same = {"gateway": "g", "sequence": number, "rollout": 1}
            for unit, report in (
                ("by entity", Report(units={"errors": {weight: (ours, theirs)}}, **same)),
                ("by request", Report(errors={weight: (len(ours), len(theirs))}, **same)),
            ):
                evidence[unit] = evidence[unit].with_report(report)
                if _acts(evidence[unit]):
                    found.add(unit)
        for unit in found:
            withdrawn[unit] += 1
    assert withdrawn["by entity"] <= 5
    assert withdrawn["by request"] > 20


def _acts(evidence: Evidence) -> bool:
    state = State(Phase.CANARY, champion="1", challenger="2", rollout=1, weights=(0.1, 0.5), step=1)
    return judge(POLICY, state, evidence, 0).action is Action.ROLL_BACK
