"""A gateway's way to a challenger: the line is made once for all who wait, and had again when it was lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import uvloop

from pipelines.training.artifact import Prediction
from serving import challenger
from serving.challenger import Asker
from serving.frames import pack_reply, unpack_rows
from serving.line import Busy, Listener, Lost, Place
from serving.runner import Rows

HOST = "127.0.0.1"
ROWS = Rows({"x": np.arange(2.0)}, {}, np.zeros(2, np.uint8), 2)


def answer(message: bytes) -> bytes:
    x = unpack_rows(message).columns["x"]
    return pack_reply(Prediction(x, x - 1, x + 1), 0.001)


class Handle:
    """Serve's, as far as it is asked: it says the place after ``takes_s`` seconds, and counts how often."""

    def __init__(self, say: Callable[[], Place], takes_s: float = 0.0) -> None:
        self.calls, self.takes_s, self._say = 0, takes_s, say

    @property
    def place(self) -> Handle:
        return self

    def _init(self, **_: Any) -> None:
        pass

    def remote(self) -> Any:
        self.calls += 1

        async def go() -> Place:
            await asyncio.sleep(self.takes_s)
            return self._say()

        return go()

    def shutdown(self) -> None:
        pass


def asker(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> Asker:
    class Known:
        deployment_name = app_name = "aqua"

    monkeypatch.setattr(challenger.serve, "get_app_handle", lambda _: Known)
    monkeypatch.setattr(challenger, "DeploymentHandle", lambda *_: handle)
    return Asker("aqua", "2")


def run(act: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(act())


def test_requests_that_come_before_there_is_a_line_share_one(monkeypatch) -> None:
    made = Listener(HOST, answer)
    handle = Handle(lambda: made.place, 0.02)
    one = asker(handle, monkeypatch)

    async def act() -> Any:
        return await asyncio.gather(*(one.ask(ROWS) for _ in range(20)))

    replies = run(act)
    assert handle.calls == 1
    assert all(reply.value.tolist() == [0, 1] and reply.upper.tolist() == [1, 2] for reply in replies)
    made.close()


def test_a_line_that_was_lost_is_had_again_under_load_however_short_the_deadlines(monkeypatch) -> None:
    """The place takes longer to be told than requests wait, and some are always waiting."""
    first, second = Listener(HOST, answer), Listener(HOST, answer)
    places = [first.place]
    handle = Handle(lambda: places[-1])
    one = asker(handle, monkeypatch)

    async def act() -> float:
        await one.ask(ROWS)
        places.append(second.place)
        handle.takes_s = 0.2
        await asyncio.to_thread(first.close)
        began, asked, back = time.monotonic(), set(), []

        async def ask() -> None:
            with suppress(TimeoutError, Lost, Busy):
                await asyncio.wait_for(one.ask(ROWS), 0.03)
                back.append(time.monotonic() - began)

        while not back and time.monotonic() - began < 3:
            asked.add(asyncio.ensure_future(ask()))
            await asyncio.sleep(0.003)
        await asyncio.gather(*asked)
        return min(back, default=99.0)

    assert run(act) < 1
    assert handle.calls <= 3
    second.close()


def test_one_that_is_not_there_is_not_asked_for_its_place_by_every_request(monkeypatch) -> None:
    def nobody() -> Place:
        raise RuntimeError("there is no replica")

    handle = Handle(nobody)
    one = asker(handle, monkeypatch)

    async def act() -> list[type]:
        found = []
        for _ in range(50):
            (error,) = await asyncio.gather(one.ask(ROWS), return_exceptions=True)
            found.append(type(error))
        await asyncio.sleep(challenger._AGAIN_S)
        (error,) = await asyncio.gather(one.ask(ROWS), return_exceptions=True)
        return [*found, type(error)]

    kinds = run(act)
    assert handle.calls == 2
    assert kinds == [RuntimeError, *[Busy] * 49, RuntimeError]


def test_it_is_closed_from_another_thread_also_after_its_loop(monkeypatch) -> None:
    made = Listener(HOST, answer)
    one = asker(Handle(lambda: made.place), monkeypatch)

    async def act() -> None:
        await one.ask(ROWS)
        await asyncio.to_thread(one.close)
        await asyncio.sleep(0.05)
        assert one._line is not None
        assert one._line.lost

    run(act)
    one.close()
    made.close()
