"""A challenger inside a gateway: whatever it does, the caller gets the champion's answer, and it is counted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.features.state import StateError
from pipelines.training.artifact import Prediction
from serving.answers import Other, Prepared
from serving.challenger import Reply
from serving.fallback import Filled
from serving.routing import Challenger, place
from serving.trial import Asked, Tally, Trial

SLOW_S = 0.001


def challenger(**changes: Any) -> Challenger:
    given = {
        "version": "2", "rollout": 1, "salt": "aqua/1", "weight": 0.5, "shadow": 1.0, "deadline_ms": 50.0,
        "slow_factor": 5.0, "slow_floor_ms": 0.5, "harm_cap": 1000,
    }  # fmt: skip
    return Challenger(**{**given, **changes})


def prepared(count: int) -> Prepared:
    none: Any = None
    columns = {"x": np.arange(float(count))}
    usable = np.ones(count, dtype=bool)
    filled = Filled(none, none, np.zeros(count, np.uint8), {})
    return Prepared(
        [{}] * count, ["e"] * count, none, filled, columns, {"s": ["e"] * count}, none, usable, 0, none, "v"
    )


def champion(count: int) -> Prediction:
    value = np.full(count, 10.0)
    return Prediction(value, value - 2, value + 2)


def reply(columns: dict[str, np.ndarray], value: float = 11.0, seconds: float = 0.0001) -> Reply:
    values = np.full(len(columns["x"]), value)
    return Reply(values, values - 1, values + 1, seconds)


async def good(rows):
    return reply(rows.columns)


async def errs(rows):
    raise RuntimeError("out of luck")


async def hangs(rows):
    await asyncio.sleep(30)
    return reply(rows.columns)


async def nan(rows):
    return reply(rows.columns, float("nan"))


async def outside(rows):
    return reply(rows.columns, 5000.0)


async def inverted(rows):
    found = reply(rows.columns)
    return Reply(found.value, found.upper, found.lower, found.seconds)


async def below_its_interval(rows):
    found = reply(rows.columns)
    return Reply(found.value, found.value + 0.5, found.upper, found.seconds)


async def above_its_interval(rows):
    found = reply(rows.columns)
    return Reply(found.value, found.lower, found.value - 0.5, found.seconds)


async def without_a_lower_end(rows):
    found = reply(rows.columns)
    return Reply(found.value, np.full_like(found.value, -np.inf), found.upper, found.seconds)


async def without_an_upper_end(rows):
    found = reply(rows.columns)
    return Reply(found.value, found.lower, np.full_like(found.value, np.inf), found.seconds)


async def another_shape(rows):
    found = reply(rows.columns)
    return Reply(found.value[:-1], found.lower, found.upper, found.seconds)


async def no_reply(rows):
    return "sorry"


async def text(rows):
    words = np.array(["ten"] * len(rows.columns["x"]), dtype=object)
    return Reply(words, words, words, 0.0)


async def slow(rows):
    return reply(rows.columns, seconds=0.002)


def trial(ask, **changes: Any) -> tuple[Trial, Tally]:
    tally = Tally("g", real=lambda: 0.0)
    nothing: Any = None
    return Trial(challenger(**changes), ask, SLOW_S, tally, (0.0, 300.0), "1", nothing), tally


def asked(count: int, tried: Any = None, **changes: Any) -> Asked:
    """``tried`` are the challenger's rows, an error that making them raises, or what makes them."""

    async def make() -> Prepared:
        if isinstance(tried, Exception):
            raise tried
        return prepared(count) if tried is None else tried

    given = {"key": "k", "counted": True, "champion": champion(count), "champion_s": 0.0001, **changes}
    return Asked(**{"prepared": prepared(count), "tried": tried if callable(tried) else make, **given})


# A key whose first instance is the challenger's at half of the traffic.
KEY = next(key for key in map(str, range(100)) if place(f"{key}/0", "aqua/1") < 0.5)


def request(one: Trial, count: int, key: str = KEY) -> Any:
    weight = one.weight
    assigned = one.assign(key, count, weight)
    assert assigned.any()
    return assigned, asyncio.run(one.choose(asked(count), assigned, weight))


ODD_INTERVALS = (inverted, below_its_interval, above_its_interval, without_a_lower_end, without_an_upper_end)


@pytest.mark.parametrize("ask", [errs, hangs, nan, outside, *ODD_INTERVALS, another_shape, no_reply, text])
def test_the_champion_answers_whatever_a_challenger_fails_at(ask):
    one, tally = trial(ask)
    assigned, chosen = request(one, 20)
    assert not chosen.taken.any()
    assert (chosen.prediction.value == 10.0).all()
    assert np.isnan(chosen.other.value).all()
    report = tally.report()
    assert report is not None
    assert report.harmed == assigned.sum()
    assert report.served == 0
    assert report.exposed == {0.5: (1, 0)}
    assert report.errors == ({} if ask is hangs else {0.5: (1, 0)})  # being late says nothing about errors
    assert report.accidents == 1


def test_a_batch_is_split_by_instance_and_put_together_in_order():
    one, tally = trial(good)
    assigned, chosen = request(one, 40)
    assert 5 < assigned.sum() < 35
    assert assigned.tolist() == [place(f"{KEY}/{i}", "aqua/1") < 0.5 for i in range(40)]
    assert chosen.taken.tolist() == assigned.tolist()
    assert chosen.prediction.value.tolist() == [11.0 if a else 10.0 for a in assigned]
    assert np.where(assigned, chosen.other.value, 10.0).tolist() == [10.0] * 40
    assert chosen.other.version == "1"
    assert (chosen.other.upper - chosen.other.lower)[assigned].tolist() == [4.0] * int(assigned.sum())
    report = tally.report()
    assert report is not None
    assert (report.served, report.harmed, report.errors, report.slow) == (assigned.sum(), 0, {}, {})


UNUSABLE = replace(prepared(20), usable=np.zeros(20, dtype=bool))


@pytest.mark.parametrize("refused", [StateError("away"), KeyError("column"), UNUSABLE])
def test_where_its_own_view_gives_no_rows_the_champion_answers_and_the_challenger_has_failed(refused):
    one, tally = trial(good)
    assigned = one.assign(KEY, 20, one.weight)
    chosen = asyncio.run(one.choose(asked(20, tried=refused), assigned, one.weight))
    assert not chosen.taken.any()
    report = tally.report()
    assert report is not None
    assert (report.harmed, report.served, report.errors) == (assigned.sum(), 0, {0.5: (1, 0)})
    said: list[Other] = []

    async def copied() -> None:
        one.copy(asked(20, tried=refused), said.append)
        while not said:
            await asyncio.sleep(0.001)

    asyncio.run(copied())
    assert np.isnan(said[0].value).all()


def test_the_deadline_is_for_making_the_challengers_rows_too():
    async def never() -> Prepared:
        await asyncio.sleep(30)
        return prepared(20)

    one, tally = trial(good)
    assigned = one.assign(KEY, 20, one.weight)
    chosen = asyncio.run(one.choose(asked(20, tried=never), assigned, one.weight))
    assert not chosen.taken.any()
    report = tally.report()
    assert report is not None
    assert (report.harmed, report.errors) == (assigned.sum(), {})  # late, as a challenger that hangs


def test_a_copy_waits_for_the_challengers_rows_behind_the_callers_back():
    one, _ = trial(good, weight=0.0)
    begun: list[bool] = []

    async def slow_rows() -> Prepared:
        begun.append(True)
        return prepared(20)

    async def run() -> None:
        one.copy(asked(20, tried=slow_rows), lambda *_: None)
        assert not begun  # nothing of it happens before the caller has its answer
        await asyncio.sleep(0.01)
        assert begun

    asyncio.run(run())


def test_only_the_bad_rows_of_a_reply_are_replaced():
    async def every_other(rows):
        found = reply(rows.columns)
        found.value[::2] = np.nan
        return found

    one, tally = trial(every_other)
    assigned, chosen = request(one, 40)
    rows = np.flatnonzero(assigned)
    assert not chosen.taken[rows[::2]].any()
    assert chosen.taken[rows[1::2]].all()
    assert np.isfinite(chosen.prediction.value).all()
    report = tally.report()
    assert report is not None
    assert report.harmed == len(rows[::2])


def test_a_slow_call_is_counted_for_the_version_whose_first_instance_it_was():
    one, tally = trial(slow, weight=1.0)
    request(one, 3)
    report = tally.report()
    assert report is not None
    assert report.slow == {1.0: (1, 0)}
    tally.acknowledged()
    one.follow(challenger(weight=1e-9))
    one.count_champion(asked(1, champion_s=0.01), one.weight)
    again = tally.report()
    assert again is not None
    assert again.slow == {1e-9: (0, 1)}


def test_after_the_cap_of_harmed_requests_the_challenger_is_asked_no_more():
    one, tally = trial(errs, harm_cap=2, weight=1.0)
    request(one, 50)
    assert one.weight == 1.0
    request(one, 1)
    assert one.weight == 0.0
    assert not one.assign("another", 50, one.weight).any()
    report = tally.report()
    assert report is not None
    assert (report.harmed, report.accidents) == (51, 2)


@pytest.mark.parametrize("ask", [good, errs, hangs, nan])
def test_a_request_whose_version_the_caller_chose_counts_for_nothing(ask):
    one, tally = trial(ask, harm_cap=1, weight=0.0)
    chosen = asyncio.run(one.choose(asked(2, forced=True, counted=False), np.ones(2, dtype=bool), 0.0))
    assert chosen.prediction.value.tolist() == ([11.0, 11.0] if ask is good else [10.0, 10.0])
    assert tally.report() is None
    one.follow(challenger(harm_cap=1))
    assert one.weight == 0.5, "harm that a tester asked for does not use up the cap"


def test_what_the_ladder_refuses_no_challenger_answers():
    one, tally = trial(good, weight=1.0)
    this = asked(2)
    this.prepared.usable[0] = False
    this.champion.value[0] = np.nan
    chosen = asyncio.run(one.choose(this, np.ones(2, dtype=bool), 1.0))
    np.testing.assert_array_equal(chosen.prediction.value, [np.nan, 11.0])
    assert chosen.taken.tolist() == [False, True]
    report = tally.report()
    assert report is not None
    assert (report.served, report.harmed, report.exposed) == (1, 0, {})


def test_a_cancelled_reply_is_the_challengers_failure_and_a_caller_who_leaves_is_not():
    async def cancelled(rows):
        raise asyncio.CancelledError

    one, tally = trial(cancelled, weight=1.0)
    request(one, 1)
    report = tally.report()
    assert report is not None
    assert report.harmed == 1

    async def leave():
        two, _ = trial(hangs, weight=1.0, deadline_ms=4000.0)
        task = asyncio.ensure_future(two.choose(asked(1), np.ones(1, dtype=bool), 1.0))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())


def test_a_repeated_request_gets_the_same_version_and_is_no_evidence_twice():
    one, tally = trial(good)
    assigned = one.assign("again", 30, 0.5)
    assert assigned.tolist() == one.assign("again", 30, 0.5).tolist()
    assert one.first_seen("again")
    assert not one.first_seen("again")
    asyncio.run(one.choose(asked(30, counted=False), assigned, 0.5))
    report = tally.report()
    assert report is not None
    assert report.exposed == {}
    assert report.served > 0


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
    async def far(rows):
        return reply(rows.columns, 13.0)

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
