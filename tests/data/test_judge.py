"""The judge: every guardrail trips on what it is for and on nothing else; silence is never success."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from pipelines.spec import Blackout, Budget, CanaryStep, Labels, ReleasePolicy, Shadow
from pipelines.spec.release import GUARDRAILS
from pipelines.validation.paired import PairedDay
from serving.rollout.evidence import Evidence, Report, Skew
from serving.rollout.judge import Action, judge
from serving.rollout.machine import Phase, State
from tests.data.test_sequential import direct_bernoulli, direct_mean_below, direct_rate, direct_ratio

HOUR = 3_600_000_000
POLICY = ReleasePolicy(
    shadow=Shadow(requests=100, time=timedelta(hours=1)),
    steps=(CanaryStep(weight=0.1, requests=100, time=timedelta(hours=1)), CanaryStep(weight=0.5, requests=100)),
    labels=Labels(days=7),
    budget=Budget(ms=200),
    patience=timedelta(days=40),
)
SHADOW = State(Phase.SHADOW, champion="1", challenger="2", rollout=1, weights=(0.1, 0.5))
CANARY = replace(SHADOW, phase=Phase.CANARY, step=0)
LAST = replace(CANARY, step=1)
LATER = 2 * HOUR


def days(*differences: float) -> tuple[PairedDay, ...]:
    return tuple(PairedDay(i, 240, difference) for i, difference in enumerate(differences))


def missing(*differences: float) -> tuple[PairedDay, ...]:
    """Days on which the challenger's interval misses so much more of the outcomes than the champion's."""
    return tuple(PairedDay(i, 240, 0.0, difference) for i, difference in enumerate(differences))


HEALTHY = Evidence(copies=150, exposed={0.1: (120, 1080), 0.5: (300, 300)}, ratio={0.1: (120, 1080), 0.5: (300, 300)})


@pytest.mark.parametrize(
    ("guardrail", "evidence"),
    [
        ("harm", replace(HEALTHY, harmed=25, accidents=25)),
        ("errors", replace(HEALTHY, errors={0.1: (6, 0)})),
        ("latency", replace(HEALTHY, slow={0.5: (20, 0)})),
        ("budget", replace(HEALTHY, over={0.1: (40, 0)})),
        ("disagreement", replace(HEALTHY, copies=150, disagreed=60)),
        ("quality", replace(HEALTHY, days=days(*[0.08] * 30))),
        ("coverage", replace(HEALTHY, days=missing(*[0.3] * 30))),
    ],
)
def test_each_guardrail_rolls_back_on_its_own_evidence(guardrail, evidence):
    for state in (SHADOW, CANARY, LAST, replace(LAST, phase=Phase.PROMOTING), replace(CANARY, paused=True)):
        verdict = judge(POLICY, state, evidence, LATER)
        assert (verdict.action, verdict.guardrail) == (Action.ROLL_BACK, guardrail)
        assert guardrail in verdict.reason or "harmed" in verdict.reason


@pytest.mark.parametrize(
    "evidence",
    [
        replace(HEALTHY, errors={0.1: (100, 900)}),  # an outage that both share
        replace(HEALTHY, slow={0.1: (30, 270), 0.5: (100, 100)}),
        replace(HEALTHY, disagreed=15),
        replace(HEALTHY, over={0.1: (60, 540)}),  # more than the budget allows, and the champion's requests as well
        replace(HEALTHY, over={0.1: (8, 0)}),  # more than the champion's, and within the budget
        replace(HEALTHY, seen=1000, degraded=250),
        replace(HEALTHY, days=missing(*[0.0] * 60)),
        replace(HEALTHY, days=days(*[0.0] * 60)),
        replace(HEALTHY, harmed=24, accidents=24),
        replace(HEALTHY, harmed=900, accidents=1),  # one late call of a large batch
    ],
)
def test_no_guardrail_trips_on_an_identical_version(evidence):
    assert judge(POLICY, CANARY, evidence, LATER).action in (Action.ADVANCE, Action.HOLD)


@pytest.mark.parametrize(
    "evidence",
    [
        replace(HEALTHY, errors={0.5: (1250, 1000)}),
        replace(HEALTHY, slow={0.5: (1250, 1000)}),
        replace(HEALTHY, slow={0.1: (125, 900), 0.5: (125, 100)}),
        replace(HEALTHY, copies=5000, disagreed=500),
        replace(HEALTHY, over={0.5: (1250, 1000)}),
        replace(HEALTHY, exposed={0.1: (5000, 0)}, over={0.1: (100, 0)}),
        replace(HEALTHY, seen=5000, degraded=1250),
        *(replace(HEALTHY, days=missing(*[missed] * 365)) for missed in (0.01, 0.04, 0.0499)),
        *(replace(HEALTHY, days=days(*[difference] * 365)) for difference in (0.005, 0.015, 0.0199)),
    ],
)
def test_what_the_page_puts_up_with_is_not_held_against_a_version_however_long_it_goes_on(evidence):
    assert (POLICY.tolerance, POLICY.disagreement, POLICY.labels.margin) == (0.25, 0.1, 0.02)
    assert (POLICY.budget.share, POLICY.labels.coverage_margin, POLICY.degraded) == (0.02, 0.05, 0.25)
    for state in (SHADOW, CANARY, LAST, replace(LAST, phase=Phase.PROMOTING)):
        verdict = judge(POLICY, state, evidence, LATER)
        assert verdict.action not in (Action.ROLL_BACK, Action.PAUSE)
        assert verdict.guardrail is None


def events(weight: float, challenger: int, champion: int) -> list[tuple[float, bool]]:
    return [(weight, True)] * challenger + [(weight, False)] * champion


MARGIN, CLIP = 0.02, 0.08
REACHED = {
    "errors": (lambda n: replace(HEALTHY, errors={0.1: (n, 3)}), lambda n: direct_rate(events(0.1, n, 3), 0.25)),
    "latency": (lambda n: replace(HEALTHY, slow={0.5: (n, 2)}), lambda n: direct_rate(events(0.5, n, 2), 0.25)),
    "budget": (
        lambda n: replace(HEALTHY, over={0.1: (n, 0)}),
        lambda n: min(direct_bernoulli(n, 420, 0.02), direct_rate(events(0.1, n, 0), 0.25)),
    ),
    "coverage": (
        lambda n: replace(HEALTHY, days=missing(*[0.1] * n)),
        lambda n: direct_mean_below([-0.5] * n, -0.25),
    ),
    "degraded": (
        lambda n: replace(HEALTHY, seen=400, degraded=n),
        lambda n: direct_bernoulli(n, 400, 0.25),
    ),
    "disagreement": (lambda n: replace(HEALTHY, disagreed=n), lambda n: direct_bernoulli(n, 150, 0.1)),
    "quality": (
        lambda n: replace(HEALTHY, days=days(*[0.05] * n)),
        lambda n: direct_mean_below([-0.05 / CLIP] * n, -MARGIN / CLIP),
    ),
    "sample_ratio": (
        lambda n: replace(HEALTHY, ratio={0.5: (n, 2)}),
        lambda n: direct_ratio(events(0.5, n, 2)),
    ),
}


@pytest.mark.parametrize("guardrail", REACHED)
def test_a_guardrail_acts_where_its_share_of_alpha_says_and_not_before(guardrail):
    """``alpha`` is split equally over eight guardrails; the evidence is written out in ``test_sequential``."""
    evidence, log_e = REACHED[guardrail]
    first = next(n for n in range(2, 200) if log_e(n) >= math.log(8 / 0.01))
    before, at = (judge(POLICY, CANARY, evidence(n), LATER) for n in (first - 1, first))
    assert before.guardrail is None
    assert before.log_e[guardrail] == pytest.approx(log_e(first - 1))
    assert at.guardrail == guardrail
    assert at.action is (Action.PAUSE if guardrail in ("sample_ratio", "degraded") else Action.ROLL_BACK)


def test_the_budget_alone_holds_back_nobody_and_is_no_guardrail_where_there_is_none():
    """Both its hypotheses have to be refuted: whichever is the weaker says so."""
    kept = replace(HEALTHY, exposed={0.1: (400, 3600)}, over={0.1: (8, 0)})
    shared = replace(HEALTHY, over={0.1: (60, 540)})
    for evidence in (kept, shared):
        assert judge(POLICY, CANARY, evidence, LATER).log_e["budget"] < 0
    without = POLICY.model_copy(update={"budget": None})
    assert judge(without, CANARY, replace(HEALTHY, over={0.1: (40, 0)}), LATER).guardrail is None


def test_degraded_inputs_pause_until_somebody_resumes_and_their_test_begins_anew():
    starved = replace(HEALTHY, seen=400, degraded=250)
    verdict = judge(POLICY, CANARY, starved, LATER)
    assert verdict.reason == "250 of 400 requests had degraded inputs, more than 25%"
    assert judge(POLICY, replace(CANARY, paused=True), starved, LATER).action is Action.HOLD
    assert judge(POLICY, CANARY, starved.resumed(), LATER).action is Action.ADVANCE


def test_an_identical_version_is_not_withdrawn_in_simulated_traffic():
    """300 rollouts of noise that both versions share; each guardrail looks after every report, and after every day."""
    rng = np.random.default_rng(5)
    withdrawn = 0
    for _ in range(300):
        evidence = Evidence()
        for number in range(1, 31):
            assigned = rng.random(200) < 0.1
            bad, slow, over = rng.random(200) < 0.02, rng.random(200) < 0.03, rng.random(200) < 0.05
            pair = [
                {0.1: (int((a & assigned).sum()), int((a & ~assigned).sum()))}
                for a in (np.ones(200, bool), bad, slow, over)
            ]
            evidence = evidence.with_report(
                Report(
                    gateway="g", sequence=number, rollout=1, exposed=pair[0], errors=pair[1], slow=pair[2],
                    over=pair[3], seen=200, degraded=int(rng.binomial(200, 0.2)),
                    copies=100, disagreed=int(rng.binomial(100, 0.08)), harmed=(harmed := int(rng.binomial(20, 0.01))),
                    accidents=harmed,
                )
            )  # fmt: skip
            evidence = evidence.with_labels((PairedDay(number, 240, *rng.normal(0, 0.04, 2).tolist()),))
            verdict = judge(POLICY, CANARY, evidence, 0)
            if verdict.action in (Action.ROLL_BACK, Action.PAUSE):
                withdrawn += 1
                break
    assert withdrawn <= 6  # 1 % is promised; six of 300 would be a rare accident


def test_a_broken_split_pauses_and_never_rolls_back():
    skewed = replace(HEALTHY, ratio={0.1: (300, 900)})
    verdict = judge(POLICY, CANARY, skewed, LATER)
    assert (verdict.action, verdict.guardrail) == (Action.PAUSE, "sample_ratio")
    assert judge(POLICY, replace(CANARY, paused=True), skewed, LATER).action is Action.HOLD
    assert judge(POLICY, CANARY, skewed.resumed(), LATER).action is Action.ADVANCE


def test_feature_skew_pauses_until_somebody_resumes_and_never_rolls_back():
    found = Skew(checked=150, mismatched=30, features={"flow_mean_1h": 2, "hour": 30})
    skewed = replace(HEALTHY, skew=found)
    for state in (SHADOW, CANARY, LAST):
        verdict = judge(POLICY, state, skewed, LATER)
        assert (verdict.action, verdict.guardrail) == (Action.PAUSE, "skew")
        assert "30 of 150 answers" in verdict.reason
        assert verdict.reason.endswith("hour in 30, flow_mean_1h in 2")
        assert judge(POLICY, replace(state, paused=True), skewed, LATER).action is Action.HOLD
        assert judge(POLICY, state, skewed.resumed(), LATER).action is judge(POLICY, state, HEALTHY, LATER).action
    promoting = replace(LAST, phase=Phase.PROMOTING)
    assert judge(POLICY, promoting, skewed, LATER).action is Action.HOLD
    broken = replace(skewed, errors={0.1: (6, 0)})
    assert judge(POLICY, CANARY, broken, LATER).guardrail == "errors"


def test_of_many_skewed_features_the_worst_are_named_and_the_others_counted():
    found = Skew(checked=9, mismatched=9, features={f"f{i}": i for i in range(1, 8)})
    assert str(found).endswith(": f7 in 7, f6 in 6, f5 in 5, f4 in 4, f3 in 3 and 2 more features")


def test_a_stage_needs_its_requests_and_its_time():
    assert judge(POLICY, SHADOW, HEALTHY, LATER).action is Action.ADVANCE
    assert judge(POLICY, SHADOW, replace(HEALTHY, copies=99), LATER).reason == "99 of 100 challenger requests"
    assert judge(POLICY, SHADOW, HEALTHY, HOUR - 1).action is Action.HOLD
    assert judge(POLICY, CANARY, replace(HEALTHY, exposed={0.1: (99, 900)}), LATER).action is Action.HOLD
    assert judge(POLICY, CANARY, HEALTHY, LATER).action is Action.ADVANCE


def test_promotion_needs_matured_outcomes_that_show_it_is_as_good():
    better, same = days(*[-0.03] * 14), days(*[0.0] * 7)
    assert judge(POLICY, LAST, replace(HEALTHY, days=better), LATER).action is Action.PROMOTE
    assert "0 of 7 days" in judge(POLICY, LAST, HEALTHY, LATER).reason
    assert "not shown to be as good" in judge(POLICY, LAST, replace(HEALTHY, days=same), LATER).reason
    unlabelled = POLICY.model_copy(update={"labels": None})
    assert judge(unlabelled, LAST, HEALTHY, LATER).action is Action.PROMOTE


def test_silence_is_inconclusive_never_success():
    patience = 40 * 24 * HOUR
    for state in (SHADOW, CANARY, LAST):
        assert judge(POLICY, state, Evidence(), patience).action is Action.GIVE_UP
        assert judge(POLICY, replace(state, paused=True), Evidence(), patience).action is Action.GIVE_UP
        assert judge(POLICY, state, Evidence(), patience - 1).action is Action.HOLD


def test_an_approval_gate_holds_the_last_step_until_somebody_approves():
    policy = POLICY.model_copy(update={"approval": True, "labels": None})
    assert judge(policy, LAST, HEALTHY, LATER).reason == "waiting for approval"
    assert judge(policy, replace(LAST, approved=True), HEALTHY, LATER).action is Action.PROMOTE
    assert judge(policy, CANARY, HEALTHY, LATER).action is Action.ADVANCE


def at(day: int, hour: int, minute: int = 0) -> int:
    """A moment of Rome's wall clock in a March whose 29th, a Sunday, has no time between 2:00 and 3:00."""
    return int(datetime(2026, 3, day, hour, minute, tzinfo=ZoneInfo("Europe/Rome")).timestamp()) * 1_000_000


NIGHTS = Blackout(begin=time(22), end=time(6), zone="Europe/Rome", days=(4, 5))  # from Friday and from Saturday on
NOON = Blackout(begin=time(12), end=time(13, 30), zone="Europe/Rome", days=(0,))
WHOLE = Blackout(begin=time(0), end=time(0), zone="Europe/Rome", days=(6,))


@pytest.mark.parametrize(
    ("blackout", "moment", "covered"),
    [
        (NIGHTS, at(27, 21, 59), False),
        (NIGHTS, at(27, 22), True),
        (NIGHTS, at(28, 5, 59), True),
        (NIGHTS, at(28, 6), False),
        (NIGHTS, at(29, 3), True),
        (NIGHTS, at(29, 5, 59), True),
        (NIGHTS, at(29, 6), False),
        (NIGHTS, at(29, 23), False),
        (NIGHTS, at(27, 3), False),
        (NOON, at(30, 12), True),
        (NOON, at(30, 13, 29), True),
        (NOON, at(30, 13, 30), False),
        (NOON, at(31, 12), False),
        (WHOLE, at(28, 23, 59), False),
        (WHOLE, at(29, 0), True),
        (WHOLE, at(29, 23, 59), True),
        (WHOLE, at(30, 0), False),
    ],
)
def test_a_blackout_follows_the_wall_clock_of_its_zone(blackout, moment, covered):
    assert blackout.covers(moment) is covered


def test_in_a_blackout_no_stage_begins_and_what_hurts_is_withdrawn_all_the_same():
    night, after = at(28, 2), at(28, 6)
    policy = POLICY.model_copy(update={"blackouts": (NOON, NIGHTS), "labels": None})
    seen = replace(HEALTHY, started_us=night - 100 * 24 * HOUR)
    for state, action in ((SHADOW, Action.ADVANCE), (CANARY, Action.ADVANCE), (LAST, Action.PROMOTE)):
        held = judge(policy, state, seen, night)
        assert (held.action, "blackout" in held.reason) == (Action.HOLD, True)
        assert judge(policy, state, seen, after).action is action
        assert judge(policy, state, replace(seen, errors={0.1: (6, 0)}), night).action is Action.ROLL_BACK


def test_a_policy_that_cannot_be_held_to_is_refused():
    with pytest.raises(ValueError, match="0 \\(Monday\\) to 6"):
        Blackout(begin=time(1), end=time(2), zone="UTC", days=(7,))
    with pytest.raises(ValueError, match="carry none of their own"):
        Blackout(begin=time(1, tzinfo=UTC), end=time(2), zone="UTC")
    with pytest.raises(ValueError, match="rising weights"):
        ReleasePolicy(steps=(CanaryStep(weight=0.5), CanaryStep(weight=0.1)))
    with pytest.raises(ValueError, match="unknown guardrails"):
        ReleasePolicy(split={"mood": 1.0})
    with pytest.raises(ValueError, match="more than 1"):
        ReleasePolicy(split=dict.fromkeys(GUARDRAILS, 0.13))
    with pytest.raises(ValueError, match="coverage margin"):
        Labels(coverage_margin=0.2)
    with pytest.raises(ValueError, match="shares"):
        ReleasePolicy(skew={"shares": 0.1})
    with pytest.raises(ValueError, match="cannot be seen"):
        Labels(margin=0.1, clip=0.05)
