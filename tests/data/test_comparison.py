"""What follows from the evidence of an A/B test, and what never does."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from pipelines.spec import ABTest, Goal, Measure, Variant
from pipelines.spec.base import microseconds
from pipelines.statistics.asymptotic import Sample, difference
from pipelines.validation.arms import Arm
from serving.rollout.comparison import Finding, compare, split_log_e, verdict
from serving.rollout.evidence import Evidence, Report, Results
from serving.rollout.machine import Outcome

TEST = ABTest(
    variants=(Variant(version="2", share=0.3), Variant(version="3", share=0.2)),
    units=100,
    time=timedelta(days=1),
    patience=timedelta(days=9),
    harm_cap=5,
)
DAY = microseconds(timedelta(days=1))


def arm(version: str, mean: float, units: int = 400) -> Arm:
    return Arm(version, units, Sample(units, mean, 1.0))


def found(*means: float, units: int = 400) -> Evidence:
    arms = tuple(arm(version, mean, units) for version, mean in zip("123", means, strict=False))
    return Evidence(results=(Results(0, arms),), arms=(500, 300, 200))


def test_each_variant_is_held_against_the_champion_with_its_part_of_the_error() -> None:
    for one, version, mean in zip(
        compare(TEST, "1", found(5.0, 4.0, 5.1).results[0].arms), "23", (4.0, 5.1), strict=True
    ):
        estimate, half = difference(Sample(400, mean, 1.0), Sample(400, 5.0, 1.0), TEST.alpha, 200)
        assert (one.version, one.units, one.mean, one.difference) == (version, 400, mean, estimate)
        assert (one.low, one.high) == (estimate - half, estimate + half)
    assert [one.finding for one in compare(TEST, "1", found(5.0, 4.0, 6.0).results[0].arms)] == ["better", "worse"]
    higher = TEST.model_copy(update={"goal": Goal.HIGHER, "measure": Measure.OUTCOME})
    assert [one.finding for one in compare(higher, "1", found(5.0, 4.0, 6.0).results[0].arms)] == ["worse", "better"]


def test_nothing_is_found_of_arms_without_outcomes() -> None:
    for arms in ((), (arm("1", 5.0),), (arm("2", 5.0),)):
        for one in compare(TEST, "1", arms):
            assert (one.finding, one.low, one.high) == (Finding.OPEN, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("evidence", "after", "outcome", "winner", "told"),
    [
        (found(5.0, 4.0, 5.0), 2 * DAY, Outcome.WON, "2", "version 2 is better by -1"),
        (found(5.0, 4.0, 3.0), 2 * DAY, Outcome.WON, "3", "version 3 is better by -2"),
        (found(5.0, 4.0, 6.0), 2 * DAY, Outcome.WON, "2", "version 2 is better"),
        (found(5.0, 6.0, 6.0), 2 * DAY, Outcome.LOST, None, "every variant is shown to be worse"),
        (found(5.0, 5.0, 6.0), 2 * DAY, None, None, "no variant is shown to be better or worse yet"),
        (found(5.0, 5.0, 6.0), 9 * DAY, Outcome.INCONCLUSIVE, None, "undecided after 9 days"),
        (found(5.0, 4.0, 5.0), DAY - 1, None, None, "at least 1 day"),
        (found(5.0, 4.0, 5.0, units=100), 2 * DAY, Outcome.WON, "2", "better"),
        (found(5.0, 4.0, 5.0, units=99), 2 * DAY, None, None, "99 of 100 units"),
        (found(5.0, 4.0, 5.0, units=99), 9 * DAY, Outcome.INCONCLUSIVE, None, "undecided"),
        (found(5.0, 4.0), 2 * DAY, None, None, "0 of 100 units"),
        (Evidence(), 2 * DAY, None, None, "0 of 100 units"),
        (Evidence(), 9 * DAY, Outcome.INCONCLUSIVE, None, "undecided"),
        (replace(found(5.0, 4.0, 5.0), accidents=4), 2 * DAY, Outcome.WON, "2", "better"),
        (replace(found(5.0, 4.0, 5.0), accidents=5), 0, Outcome.LOST, None, "in 5 requests the champion had to answer"),
    ],
)
def test_verdicts(evidence, after, outcome, winner, told) -> None:
    said = verdict(TEST, "1", False, evidence, after)
    assert (said.outcome, said.winner, said.pause) == (outcome, winner, False)
    assert told in said.reason


def test_the_better_one_of_two_winners_is_that_with_the_better_mean() -> None:
    higher = TEST.model_copy(update={"goal": Goal.HIGHER, "measure": Measure.OUTCOME})
    assert verdict(higher, "1", False, found(5.0, 6.0, 7.0), 2 * DAY).winner == "3"
    assert verdict(higher, "1", False, found(5.0, 8.0, 7.0), 2 * DAY).winner == "2"


def test_a_paused_test_waits_and_still_ends_by_harm_or_time() -> None:
    won = found(5.0, 4.0, 5.0)
    assert verdict(TEST, "1", True, won, 2 * DAY).outcome is None
    assert verdict(TEST, "1", True, won, 9 * DAY).outcome is Outcome.INCONCLUSIVE
    assert verdict(TEST, "1", True, replace(won, accidents=5), 2 * DAY).outcome is Outcome.LOST


def test_units_that_are_not_assigned_by_their_shares_pause_it_before_anything_is_read() -> None:
    uneven = replace(found(5.0, 4.0, 5.0), arms=(700, 300, 200))
    said = verdict(TEST, "1", False, uneven, 2 * DAY)
    assert (said.pause, said.outcome) == (True, None)
    assert "not assigned by their shares" in said.reason


@pytest.mark.parametrize("arms", [(5000, 3000, 2000), (50, 30, 20), (0, 0, 0), (), (1, 0, 0)])
def test_even_shares_are_no_evidence(arms) -> None:
    assert split_log_e(TEST, arms) <= 0.5


@pytest.mark.parametrize("arms", [(5000, 3300, 2000), (5400, 3000, 2000), (5000, 3000, 2300), (5000, 2700, 2000)])
def test_a_tenth_more_or_less_of_any_arm_is_seen(arms) -> None:
    assert split_log_e(TEST, tuple(4 * count for count in arms)) > -math.log(TEST.ratio_alpha)


def test_a_fair_split_that_is_looked_at_again_and_again_seldom_pauses() -> None:
    """At an error probability of 1 %, 500 runs of 5,000 units looked at 50 times; four standard errors beside it."""
    rng, paused = np.random.default_rng(3), 0
    for _ in range(500):
        counts = np.cumsum(rng.multinomial(100, [0.5, 0.3, 0.2], size=50), axis=0)
        paused += any(split_log_e(TEST, tuple(row)) >= -math.log(0.01) for row in counts.tolist())
    assert paused / 500 <= 0.01 + 4 * math.sqrt(0.01 * 0.99 / 500)


def test_what_gateways_count_of_arms_adds_up_and_an_entity_counts_once() -> None:
    def report(gateway: str, sequence: int, **counted: object) -> Report:
        return Report(gateway=gateway, sequence=sequence, rollout=1, **counted)

    evidence = Evidence().with_report(report("a", 1, arms=(5, 0, 2))).with_report(report("b", 1, arms=(1, 1, 1)))
    assert evidence.arms == (6, 1, 3)
    named = Evidence().with_report(report("a", 1, members=((1, 2), (3,), ())))
    named = named.with_report(report("b", 1, members=((2, 4), (3,), (5,)))).with_report(report("a", 2))
    assert named.arms == (3, 1, 1)
    resumed = named.resumed()
    assert resumed.arms == ()
    assert resumed.with_report(report("a", 3, members=((1, 9), (), ()))).arms == (2, 0, 0), "they are named again"
