"""A challenger inside a gateway: whatever it does, the caller gets the champion's answer, and it is counted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.features.served import Status
from pipelines.features.state import StateError
from pipelines.training.artifact import Prediction
from serving.answers import Other, Prepared
from serving.line import Busy
from serving.routing import place
from serving.trial import Trial
from serving.way import Allowed
from tests.data.trials import (
    KEY,
    ODD_INTERVALS,
    another_shape,
    asked,
    challenger,
    errs,
    good,
    hangs,
    nan,
    no_reply,
    outside,
    prepared,
    reply,
    request,
    slow,
    text,
    trial,
)


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
    assigned = one.assign(KEY, ["e"] * 20, one.weight)
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
    async def never(_: Any) -> Prepared:
        await asyncio.sleep(30)
        return prepared(20)

    one, tally = trial(good)
    assigned = one.assign(KEY, ["e"] * 20, one.weight)
    chosen = asyncio.run(one.choose(asked(20, tried=never), assigned, one.weight))
    assert not chosen.taken.any()
    report = tally.report()
    assert report is not None
    assert (report.harmed, report.errors) == (assigned.sum(), {})  # late, as a challenger that hangs


def test_a_copy_waits_for_the_challengers_rows_behind_the_callers_back():
    one, _ = trial(good, weight=0.0)
    begun: list[bool] = []

    async def slow_rows(_: Any) -> Prepared:
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


def test_a_request_that_waits_longer_than_the_budget_is_counted_for_the_version_it_was_given_to():
    one, tally = trial(good, budget_ms=1000.0)
    long_ago = time.perf_counter() - 2.0
    assigned = one.assign(KEY, ["e"] * 1, 0.5)
    asyncio.run(one.choose(asked(1, began=long_ago), assigned, 0.5))
    asyncio.run(one.choose(asked(1), assigned, 0.5))
    for changes in ({"began": long_ago}, {"began": long_ago, "counted": False}, {}):
        one.count_champion(asked(1, **changes), 0.5)
    report = tally.report()
    assert report is not None
    assert (report.over, report.exposed) == ({0.5: (1, 1)}, {0.5: (2, 2)})
    unbounded, tally = trial(good, budget_ms=None)
    unbounded.count_champion(asked(1, began=0.0), 0.5)
    report = tally.report()
    assert report is not None
    assert report.over == {}


@pytest.mark.parametrize("status", [Status.STALE, Status.IMPUTED, Status.MISSING])
def test_requests_with_degraded_inputs_are_counted_whichever_version_answers(status):
    one, tally = trial(good)
    flagged, strange, refused = prepared(2), prepared(1), prepared(1)
    flagged.filled.status[0, 1] = status
    strange.read.known[0] = False
    refused.filled.refused[0] = "too_old"
    for request_ in (prepared(1), prepared(1), flagged, strange, refused):
        one.see(asked(1, prepared=request_))
    one.see(asked(1, prepared=flagged, counted=False))
    report = tally.report()
    assert report is not None
    assert (report.seen, report.degraded) == (5, 3)


def test_after_the_cap_of_harmed_requests_the_challenger_is_asked_no_more():
    one, tally = trial(errs, harm_cap=2, weight=1.0)
    request(one, 50)
    assert one.weight == 1.0
    request(one, 1)
    assert one.weight == 0.0
    assert not one.assign("another", ["e"] * 50, one.weight).any()
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
    assigned = one.assign("again", ["e"] * 30, 0.5)
    assert assigned.tolist() == one.assign("again", ["e"] * 30, 0.5).tolist()
    assert one.first_seen("again")
    assert not one.first_seen("again")
    asyncio.run(one.choose(asked(30, counted=False), assigned, 0.5))
    report = tally.report()
    assert report is not None
    assert report.exposed == {}
    assert report.served > 0


def named(one: Trial, entities: list[str], **changes: Any) -> None:
    """One request of each entity, which the split gives to the one version or the other."""
    for entity in entities:
        this = asked(1, **changes)
        this.prepared.entities[0] = entity
        assigned = one.assign("any key", [entity], one.weight)
        if assigned[0]:
            asyncio.run(one.choose(this, assigned, one.weight))
        else:
            one.count_champion(this, one.weight)


def test_all_requests_of_an_entity_find_one_version_and_it_is_told_of_once_a_step():
    one, tally = trial(errs, by_entity=True, budget_ms=1000.0)
    entities = [f"e{i}" for i in range(40)]
    places = [place(entity, "aqua/1") < 0.5 for entity in entities]
    assert one.assign("k", entities, 0.5).tolist() == one.assign("other", entities, 0.5).tolist() == places
    named(one, entities)
    named(one, entities * 3, began=0.0)  # longer than the budget, but not on their first request
    report = tally.report()
    assert report is not None
    assert (report.exposed, report.errors, report.over) == ({}, {}, {})
    ours, theirs = report.units["exposed"][0.5]
    assert (len(ours), len(theirs)) == (sum(places), 40 - sum(places))
    assert report.units["errors"] == {0.5: (ours, [])}
    assert set(report.units) == {"exposed", "errors"}
    tally.acknowledged()
    one.follow(challenger(by_entity=True, weight=0.8))
    named(one, entities)
    again = tally.report()
    assert again is not None
    assert sum(map(len, again.units["exposed"][0.8])) == 40
    moved, nobody = again.units["errors"][0.8]
    assert set(moved).isdisjoint(ours), "those that erred before are known"
    assert nobody == []


ENDS = st.sampled_from([-np.inf, -1.0, 0.0, 5.0, 300.0, 301.0, np.inf, np.nan])


@given(ENDS, ENDS, ENDS)
def test_the_first_answer_alone_is_judged_like_all_of_them(value, lower, upper):
    allowed, found = Allowed(0.0, 300.0), Prediction(*(np.array([end, 10.0]) for end in (value, lower, upper)))
    assert allowed.first(found) == bool(allowed.valid(found)[0])


def test_a_kind_of_failure_is_told_once(caplog):
    async def fails(rows):
        raise ZeroDivisionError(str(len(rows.strings)))

    one, _ = trial(fails)
    for _ in range(3):
        request(one, 2)
    told = [entry.getMessage() for entry in caplog.records if "ZeroDivisionError" in entry.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("version 2 failed: ")


def test_one_that_could_not_be_asked_is_harm_and_no_evidence_of_errors():
    async def busy(rows):
        raise Busy("96 requests wait already")

    one, tally = trial(busy)
    assigned, chosen = request(one, 20)
    assert not chosen.taken.any()
    report = tally.report()
    assert report is not None
    assert (report.harmed, report.accidents, report.errors) == (assigned.sum(), 1, {})
