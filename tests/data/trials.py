"""A trial inside a gateway with challengers of every kind, made up; what ``test_trial*`` are about."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from pipelines.features.online import Read
from pipelines.features.served import Status
from pipelines.training.artifact import Prediction
from serving.answers import Prepared
from serving.fallback import Filled
from serving.frames import Reply
from serving.routing import Challenger, place
from serving.runner import DescribedVersion
from serving.tally import Tally
from serving.trial import Asked, Trial
from serving.way import Allowed

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
    usable, status = np.ones(count, dtype=bool), np.full((count, 2), Status.FRESH, np.uint8)
    read = Read(none, status, none, 1, 1, usable.copy())
    filled = Filled(none, status, np.zeros(count, np.uint8), {})
    return Prepared(
        [{}] * count, ["e"] * count, read, filled, columns, {"s": ["e"] * count}, none, usable, 0, none, "v"
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
    described = DescribedVersion("2", nothing, None)
    return Trial(challenger(**changes), ask, SLOW_S, tally, Allowed(0.0, 300.0), "1", described), tally


def asked(count: int, tried: Any = None, **changes: Any) -> Asked:
    """``tried`` are the challenger's rows, an error that making them raises, or what makes them."""

    async def make(_: Any) -> Prepared:
        if isinstance(tried, Exception):
            raise tried
        return prepared(count) if tried is None else tried

    given = {
        "key": "k",
        "counted": True,
        "champion": champion(count),
        "champion_s": 0.0001,
        "began": time.perf_counter(),
        **changes,
    }
    return Asked(**{"prepared": prepared(count), "rows_of": tried if callable(tried) else make, **given})


# A key whose first instance is the challenger's at half of the traffic.
KEY = next(key for key in map(str, range(100)) if place(f"{key}/0", "aqua/1") < 0.5)


def request(one: Trial, count: int, key: str = KEY) -> Any:
    weight = one.weight
    assigned = one.assign(key, ["e"] * count, weight)
    assert assigned.any()
    return assigned, asyncio.run(one.choose(asked(count), assigned, weight))


ODD_INTERVALS = (inverted, below_its_interval, above_its_interval, without_a_lower_end, without_an_upper_end)
