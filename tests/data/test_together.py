"""Requests that wait at one moment are answered in one go, and each gets its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.answers import Answered
from serving.together import MOST_INSTANCES, Together


class Bad(RuntimeError):
    """What one record makes of the answer."""


class Model:
    """Answers records by their number; one that is negative makes it fail."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, records: Any) -> Answered:
        numbers = [record["x"] for record in records]
        self.calls.append(numbers)
        if min(numbers) < 0:
            raise Bad(str(min(numbers)))
        return Answered({"predictions": [{"value": n} for n in numbers], "as_of": "now"}, [{"x": n} for n in numbers])


def asked(model: Model, requests: list[list[int]]) -> list[Any]:
    """What each request gets, all of them being there at one moment."""

    async def run() -> list[Any]:
        together = Together(model)
        calls = (together.answered([{"x": n} for n in numbers]) for numbers in requests)
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


@given(st.lists(st.lists(st.integers(-1, 50), min_size=1, max_size=16), max_size=12))
@settings(max_examples=200, deadline=None)
def test_each_request_gets_what_it_would_have_got_alone(requests) -> None:
    for numbers, found in zip(requests, asked(Model(), requests), strict=True):
        if min(numbers) < 0:
            assert isinstance(found, Bad)
            continue
        assert found.document == {"predictions": [{"value": n} for n in numbers], "as_of": "now"}
        assert found.rows == [{"x": n} for n in numbers]


def test_those_of_one_moment_are_one_call_and_those_of_another_another() -> None:
    model = Model()
    assert len(asked(model, [[1], [2, 3], [4]])) == 3
    assert model.calls == [[1, 2, 3, 4]]

    async def run() -> None:
        together = Together(model)
        for number in (5, 6):
            await together.answered([{"x": number}])

    asyncio.run(run())
    assert model.calls == [[1, 2, 3, 4], [5], [6]]


def test_no_call_is_larger_than_what_may_hold_the_loop() -> None:
    model = Model()
    asked(model, [[n] * 16 for n in range(9)])
    assert [len(call) for call in model.calls] == [MOST_INSTANCES, MOST_INSTANCES, 16]


def test_who_went_away_is_not_answered_and_hurts_nobody() -> None:
    model = Model()

    async def run() -> list[Any]:
        together = Together(model)
        tasks = [asyncio.create_task(together.answered([{"x": n}])) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, gone, last = asyncio.run(run())
    assert isinstance(gone, asyncio.CancelledError)
    assert [first.rows, last.rows] == [[{"x": 0}], [{"x": 2}]]


def test_a_fault_of_one_request_is_raised_to_it_alone() -> None:
    model = Model()
    found = asked(model, [[1], [-1], [2]])
    assert [type(one) for one in found] == [Answered, Bad, Answered]
    assert model.calls == [[1, -1, 2], [1], [-1], [2]]
    with pytest.raises(Bad):
        asyncio.run(Together(model).answered([{"x": -3}]))
