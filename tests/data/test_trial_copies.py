"""What gateways copy to a version behind the callers' backs, and what they report of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from pipelines.training.artifact import Prediction
from serving.answers import Other
from serving.routing import place
from serving.tally import Tally
from serving.trial import COIN
from tests.data.trials import (
    SLOW_S,
    asked,
    errs,
    good,
    hangs,
    nan,
    outside,
    reply,
    slow,
    trial,
)


async def far(rows):
    return reply(rows.columns, 13.0)


def test_copies_have_no_effect_on_callers_and_are_compared():
    for ask, disagreed, value in ((good, 0, 11.0), (errs, 0, np.nan), (outside, 0, np.nan)):
        one, tally = trial(ask, weight=0.0)
        seen: list[Other] = []

        async def run(one=one, seen=seen):
            assert one.copies("k")
            one.copy(asked(2), seen.append)
            await asyncio.sleep(0.02)

        asyncio.run(run())
        np.testing.assert_array_equal(seen[0].value, [value, value])
        assert seen[0].version == "2"
        report = tally.report()
        assert report is not None
        assert (report.copies, report.disagreed, report.harmed, report.served) == (1, disagreed, 0, 0)


@pytest.mark.parametrize("ask", [errs, nan, slow])
def test_copies_beside_a_canary_are_no_evidence_of_errors_or_slow_calls(ask):
    """There the assigned requests are the evidence; a copy counted too would count one version's events twice."""
    one, tally = trial(ask, weight=0.5)
    nothing = Prediction(*(np.full(1, np.nan) for _ in range(3)))

    async def run():
        for number in range(60):
            given = {"champion": nothing} if number % 2 else {"champion_s": 10 * SLOW_S}
            one.copy(asked(1, key=f"k{number}", **given), lambda *_: None)
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)

    asyncio.run(run())
    report = tally.report()
    assert report is not None
    assert report.copies == 60
    assert (report.errors, report.slow, report.exposed, report.harmed) == ({}, {}, {}, 0)


def test_in_shadow_a_coin_says_whose_answer_counts_and_both_fail_alike():
    """When both versions fail on every request, each gets about half of the events: a shared outage says nothing."""
    one, tally = trial(nan, weight=0.0)
    both_fail = Prediction(*(np.full(1, np.nan) for _ in range(3)))

    async def run():
        for number in range(400):
            one.copy(asked(1, key=f"k{number}", champion=both_fail), lambda *_: None)
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)

    asyncio.run(run())
    report = tally.report()
    assert report is not None
    mine, other = report.errors[0.5]
    assert mine + other == 400
    assert 160 < mine < 240


NOTHING = Prediction(*(np.full(1, np.nan) for _ in range(3)))


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize(("ask", "given"), [(nan, {}), (good, {"champion": NOTHING}), (hangs, {}), (far, {})])
def test_in_a_watch_it_is_the_version_that_answers_which_is_on_trial(watch, ask, given):
    one, tally = trial(ask, weight=0.0, watch=watch, deadline_ms=20.0)

    async def run():
        for number in range(16):
            one.copy(asked(1, key=f"k{number}", **given), lambda *_: None)
        await asyncio.sleep(0.1)

    asyncio.run(run())
    report = tally.report()
    assert report is not None
    heads = sum(place(f"k{number}", "aqua/1/coin") < COIN for number in range(16))
    assert 2 < heads < 14
    copy_fails, answer_fails = ask is nan, bool(given)
    fails = (answer_fails, copy_fails) if watch else (copy_fails, answer_fails)
    wanted = (heads * fails[0], (16 - heads) * fails[1])
    assert report.errors == ({0.5: wanted} if any(wanted) else {})
    assert report.copies == 16
    assert report.accidents == (16 if ask is hangs and not watch else 0), "the version before harms nobody"
    assert report.disagreed == (16 if ask is far and not watch else 0)


def test_copies_left_unanswered_count_towards_the_cap_and_not_as_errors():
    one, tally = trial(hangs, weight=0.0, deadline_ms=5.0)

    async def run():
        for number in range(6):
            one.copy(asked(1, key=f"k{number}"), lambda *_: None)
        await asyncio.sleep(0.05)

    asyncio.run(run())
    report = tally.report()
    assert report is not None
    assert (report.copies, report.accidents, report.harmed, report.errors) == (6, 6, 0, {})


def test_a_champion_that_has_no_answer_is_not_disagreed_with():
    nothing = Prediction(*(np.full(1, np.nan) for _ in range(3)))
    one, tally = trial(good, weight=0.0)

    async def run():
        one.copy(asked(1, champion=nothing), lambda *_: None)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    report = tally.report()
    assert report is not None
    assert report.disagreed == 0


def test_an_answer_outside_the_champions_interval_disagrees():
    one, tally = trial(far, weight=0.0)

    async def run():
        one.copy(asked(1), lambda *_: None)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    report = tally.report()
    assert report is not None
    assert report.disagreed == 1


def test_a_report_is_sent_again_as_it_was_until_it_is_acknowledged_and_nothing_is_lost_meanwhile():
    tally = Tally("g", real=lambda: 0.0)

    def one_more(counts):
        counts.served += 1

    tally.add(1, one_more)
    first = tally.report()
    tally.add(1, one_more)
    assert tally.report() == first
    tally.acknowledged()
    second = tally.report()
    assert first is not None
    assert second is not None
    assert (first.sequence, second.sequence, first.served, second.served) == (1, 2, 1, 1)
    tally.acknowledged()
    assert tally.report() is None
    tally.add(2, one_more)
    tally.add(1, one_more)  # of a rollout that is over
    third = tally.report()
    assert third is not None
    assert (third.rollout, third.sequence, third.served) == (2, 1, 1)


def test_harm_is_reported_at_once_and_all_else_the_more_seldom_the_longer_a_rollout_lasts():
    now = [0.0]
    tally = Tally("g", real=lambda: now[0])

    def change(served: int = 0, harmed: int = 0):
        def apply(counts):
            counts.served += served
            counts.harmed += harmed
            counts.accidents += harmed

        tally.add(1, apply)

    def reports() -> bool:
        found = tally.report()
        tally.acknowledged()
        return found is not None

    change(served=1)
    assert reports()
    now[0] = 1000.0
    change(served=1)
    assert reports()
    now[0] += 9.0
    change(served=1)
    assert not reports()
    change(harmed=1)
    assert reports()
    now[0] += 1e6
    change(served=1)
    assert reports()
    now[0] += 59.0
    change(served=1)
    assert not reports()
    now[0] += 2.0
    assert reports()


def test_no_more_than_sixteen_copies_are_under_way_at_once():
    one, _ = trial(hangs, weight=0.0, deadline_ms=50.0)

    async def run() -> int:
        copied = 0
        while one.copies(f"k{copied}") and copied < 100:
            one.copy(asked(1, key=f"k{copied}"), lambda *_: None)
            copied += 1
        await asyncio.sleep(0.1)
        assert one.copies("k"), "they have been given up, so there is room again"
        return copied

    assert asyncio.run(run()) == 16
