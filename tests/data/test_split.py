"""An A/B test inside one gateway: who is assigned to what, whose answer stands, and what is counted."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from serving import routing
from serving.routing import Share, digest, place
from serving.runner import DescribedVersion
from serving.split import Split, Variant
from serving.tally import Tally
from serving.way import Allowed
from tests.data.trials import asked, errs, good, hangs, nan, prepared, reply

HALF = routing.Split(
    test=4,
    salt="s",
    by_entity=False,
    shares=(Share(version="2", upto=0.3), Share(version="3", upto=0.5)),
    deadline_ms=50.0,
    harm_cap=3,
)


async def twelve(rows):
    return reply(rows.columns, value=12.0)


def split(two: Any = good, three: Any = twelve, **changes: Any) -> tuple[Split, Tally]:
    tally = Tally("g", real=lambda: 0.0)
    nothing: Any = None
    two_is, three_is = (DescribedVersion(version, nothing, None) for version in "23")
    variants = {"2": Variant(two, two_is), "3": Variant(three, three_is)}
    return Split(HALF.model_copy(update=changes), variants, tally, Allowed(0.0, 300.0), "1"), tally


def counted(tally: Tally) -> Any:
    found = tally.report()
    assert found is not None
    return found


def test_places_fall_to_versions_by_their_shares_and_the_rest_to_the_champion() -> None:
    one, _ = split()
    assert one.versions == ("1", "2", "3")
    keys = [f"k{i}" for i in range(20_000)]
    arms = np.concatenate([one.assign(one.units(key, ["e"])) for key in keys])
    places = np.array([place(f"{key}/0", "s") for key in keys])
    assert (arms == np.where(places < 0.3, 1, np.where(places < 0.5, 2, 0))).all()
    assert np.bincount(arms).tolist() == pytest.approx([10_000, 6_000, 4_000], rel=0.03)


def test_a_place_on_the_border_is_the_next_versions() -> None:
    one, _ = split()
    one._upto = np.array([place("k/0", "s"), 0.999])
    assert one.assign(one.units("k", ["e"])).tolist() == [2]


def test_an_entity_keeps_its_version_whatever_the_request() -> None:
    one, _ = split(by_entity=True)
    entities = [f"e{i}" for i in range(500)]
    arms = one.assign(one.units("some key", entities))
    assert set(arms.tolist()) == {0, 1, 2}
    assert (one.assign(one.units("another", entities[::-1]))[::-1] == arms).all()
    by_instance, _ = split()
    assert not (by_instance.assign(by_instance.units("some key", entities)) == arms).all()


def test_every_instance_has_the_answer_of_its_version() -> None:
    one, tally = split()
    arms = np.array([0, 1, 2, 1, 0])
    prediction, parts = asyncio.run(one.choose(asked(5), arms))
    assert prediction.value.tolist() == [10.0, 11.0, 12.0, 11.0, 10.0]
    assert {part.version: part.taken.tolist() for part in parts} == {
        "2": [False, True, False, True, False],
        "3": [False, False, True, False, False],
    }
    found = counted(tally)
    assert (found.rollout, found.served, found.harmed, found.accidents) == (4, 3, 0, 0)
    assert (found.arms, found.members) == ((2, 2, 1), ())


@pytest.mark.parametrize("failing", [errs, hangs, nan])
def test_the_champion_answers_for_a_variant_that_cannot_and_the_unit_stays_in_its_arm(failing) -> None:
    one, tally = split(two=failing)
    prediction, parts = asyncio.run(one.choose(asked(3), np.array([0, 1, 2])))
    assert prediction.value.tolist() == [10.0, 10.0, 12.0]
    assert [part.version for part in parts if part.taken.any()] == ["3"]
    found = counted(tally)
    assert (found.served, found.harmed, found.accidents, found.arms) == (1, 1, 1, (1, 1, 1))


def test_a_variant_is_not_waited_for_longer_than_the_request_has_time() -> None:
    one, tally = split(two=hangs, deadline_ms=60_000.0)
    began = time.perf_counter()
    given = asked(1, until=began + 0.05)
    prediction, _ = asyncio.run(one.choose(given, np.array([1])))
    assert time.perf_counter() - began < 5
    assert prediction.value.tolist() == [10.0]
    assert counted(tally).accidents == 1


def test_variants_are_asked_at_the_same_time() -> None:
    both = []

    async def waits(rows):
        both.append(rows.count)
        while len(both) < 2:
            await asyncio.sleep(0.001)
        return reply(rows.columns)

    one, _ = split(waits, waits)
    _, parts = asyncio.run(one.choose(asked(3), np.array([1, 2, 2])))
    assert sorted(both) == [1, 2]
    assert len(parts) == 2


@pytest.mark.parametrize("ask", [good, nan])
def test_what_no_version_may_answer_is_answered_by_none_and_harms_nobody(ask) -> None:
    one, tally = split(two=ask)
    given = prepared(2)
    given.usable[1] = False
    prediction, parts = asyncio.run(one.choose(asked(2, prepared=given), np.array([0, 1])))
    assert prediction.value.tolist() == [10.0, 10.0], "the champion's, which its ladder has refused"
    assert not any(part.taken.any() for part in parts)
    assert (counted(tally).harmed, counted(tally).served) == (0, 0)


def test_nobody_is_assigned_here_once_the_cap_is_reached() -> None:
    one, tally = split(two=errs)
    for _ in range(HALF.harm_cap):
        assert one.is_open
        asyncio.run(one.choose(asked(2), np.array([1, 1])))
    assert not one.is_open
    assert (counted(tally).accidents, counted(tally).harmed) == (3, 6)


def test_a_repeated_request_counts_once_and_its_harm_always() -> None:
    one, tally = split(two=errs)
    assert [one.first_seen("k"), one.first_seen("k")] == [True, False]
    asyncio.run(one.choose(asked(2, counted=False), np.array([1, 0])))
    found = counted(tally)
    assert (found.arms, found.accidents) == ((), 1)


def test_entities_are_named_once_with_the_arm_that_they_are_in() -> None:
    one, tally = split(by_entity=True)
    given = prepared(3)
    given.entities[:] = ["a", "b", "a"]
    asyncio.run(one.choose(asked(3, prepared=given), np.array([0, 2, 0])))
    assert counted(tally).members == ((digest("a", "s"),), (), (digest("b", "s"),))
    tally.acknowledged()
    given.entities[:] = ["a", "b", "c"]
    asyncio.run(one.choose(asked(3, prepared=given), np.array([0, 2, 1])))
    tally._made = -1.0
    assert counted(tally).members == ((), (digest("c", "s"),), ())
