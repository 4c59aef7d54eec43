"""A held-out stretch of real time, lived through again over HTTP: events come in, predictions and outcomes go.

The replay clock is set to each moment in turn. What a caller asks at a moment is answered from what had come in by
then, exactly as it would have been on that day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from cluster.clock import ReplayClock
from pipelines.samples.faults import event_time, records
from pipelines.spec import UseCase
from pipelines.spec.base import DAY_US, microseconds
from serving.client import Client, TidegateError
from serving.demo.report import StepFailed
from serving.wire import Prediction

_CALLERS = 6


@dataclass
class Replayed:
    """What was sent and what came back."""

    moments: int = 0
    events: int = 0
    refused: int = 0
    predictions: int = 0
    outcomes: int = 0
    covered: int = 0
    unanswered: int = 0
    invalid: int = 0
    failed: int = 0
    by_version: dict[str, int] = field(default_factory=dict)
    predict_ms: list[float] = field(default_factory=list)
    event_ids: set[str] = field(default_factory=set)


class Replay:
    """The rows from a moment on, ordered by time, and how far they have been lived through.

    ``silent`` names entities whose events are held back, ``factors`` those whose target is multiplied. ``alone`` makes
    every instance a request of its own, sent by several callers at once and ``asks`` times, as a busy day would. Once
    a day a broken event is sent along.
    """

    def __init__(
        self, use_case: UseCase, rows: pa.Table, start_us: int, clock: ReplayClock, client: Client, caller: Client
    ) -> None:
        """``caller`` predicts and sends nothing twice, so that a request that fails is seen to fail."""
        self.use_case = use_case
        self.client = client
        self._caller = caller
        self.done = Replayed()
        self.silent: frozenset[str] = frozenset()
        self.factors: dict[str, float] = {}
        self.alone = False
        self.asks = 1
        self._last: dict[str, tuple[dict[str, Any], Prediction]] = {}
        self._clock = clock
        self._moments = dict(_by_moment(use_case, rows, start_us))
        self._order = sorted(self._moments)
        self._next = 0
        self._horizon = microseconds(use_case.model.target.horizon)
        self._waiting: dict[int, list[tuple[str, float | None, Prediction]]] = {}
        self._day: int | None = None
        self._callers = ThreadPoolExecutor(_CALLERS, thread_name_prefix="caller")

    @property
    def left(self) -> int:
        """How many moments have not been lived through."""
        return len(self._order) - self._next

    def begin(self) -> Replayed:
        """Counts from here on; returns the new counters."""
        self.done = Replayed()
        return self.done

    def run(self, moments: int, say: Callable[[str], None]) -> Replayed:
        """Lives through that many moments (or all that are left)."""
        count = min(moments, self.left)
        for number in range(1, count + 1):
            self.moment()
            if number % 240 == 0:
                say(f"    {number:,} of {count:,} moments replayed, {self.done.predictions:,} predictions")
        return self.done

    def moment(self) -> None:
        """The next moment: its events, its predictions, and the outcomes that are known by then."""
        if not self.left:
            raise StepFailed("the held-out stretch is used up: replay more days")
        now = self._order[self._next]
        self._next += 1
        self._clock.set(now)
        if not self._horizon:
            self._predict(now)
        self._send_events(now)
        if self._horizon:
            self._predict(now)
        self._send_outcomes(now)
        self.done.moments += 1

    def ask_again(self) -> None:
        """The last moment's predictions once more: callers do not wait for anything."""
        if self._next:
            self._predict(self._order[self._next - 1], remember=False)

    def ask_together(self) -> frozenset[str]:
        """The last moment's instances once more in one request; the versions that answered it."""
        instances = self._instances(self._order[self._next - 1] + self._horizon)
        return frozenset(answer.model_version for answer in self._count(*self._ask(instances)))

    def entities(self) -> list[str]:
        """The entities that were asked for so far, ascending."""
        return sorted(self._last)

    def answer(self, entity: str) -> Prediction:
        """The last answer for an entity."""
        return self._last[entity][1]

    def instance(self) -> dict[str, Any]:
        """An instance that was asked for."""
        return self._last[self.entities()[0]][0]

    def close(self) -> None:
        """Ends the callers."""
        self._callers.shutdown()

    def _send_events(self, now: int) -> None:
        contract, target, done = self.use_case.contract, self.use_case.model.target, self.done
        events = [event for event in self._rows(now) if event[contract.entity] not in self.silent]
        broken = []
        if now // DAY_US != self._day:
            self._day = now // DAY_US
            broken = [{**self._moments[now][0], target.field: -1.0}]
        for status in self.client.events(events + broken):
            if status.status == "accepted" and not status.duplicate:
                done.events += 1
                done.event_ids.add(status.event_id or "")
            elif status.rules == [f"{target.field}.minimum"]:
                done.refused += 1
            else:
                raise StepFailed(f"an event of the replay came back as {status}")

    def _rows(self, moment: int) -> list[dict[str, Any]]:
        """What happens at a moment, with the factors applied."""
        entity, target = self.use_case.contract.entity, self.use_case.model.target.field
        rows = self._moments.get(moment, [])
        if not self.factors:
            return rows
        return [
            {**row, target: row[target] * self.factors.get(row[entity], 1.0)} if row[target] is not None else row
            for row in rows
        ]

    def _instances(self, moment: int) -> list[dict[str, Any]]:
        """What callers ask about a moment."""
        names = (self.use_case.contract.entity, *self.use_case.view.inputs)
        return [{name: row[name] for name in names} for row in self._rows(moment)]

    def _predict(self, now: int, *, remember: bool = True) -> None:
        wanted = self._rows(now + self._horizon)
        if not wanted:
            return
        instances = self._instances(now + self._horizon)
        actual = [row[self.use_case.model.target.field] for row in wanted]
        asked = (
            [([i], [actual[k]]) for k, i in enumerate(instances)] * self.asks if self.alone else [(instances, actual)]
        )
        waiting: list[tuple[str, float | None, Prediction]] = []
        entity = self.use_case.contract.entity
        for (given, values), found in zip(asked, self._callers.map(self._ask, [one for one, _ in asked]), strict=True):
            answers = self._count(*found)
            self._last |= {i[entity]: (i, answer) for i, answer in zip(given, answers, strict=False)}
            waiting += [(answer.prediction_id, value, answer) for answer, value in zip(answers, values, strict=False)]
        if remember:
            self._waiting[now + self._horizon] = waiting

    def _ask(self, instances: list[dict[str, Any]]) -> tuple[list[Prediction], float]:
        """The answers, none when the request failed, and how long it took in milliseconds."""
        began = time.perf_counter()
        try:
            answers = self._caller.predict(instances)
        except (TidegateError, httpx.TransportError):
            answers = []
        return answers, (time.perf_counter() - began) * 1e3

    def _count(self, answers: list[Prediction], milliseconds: float) -> list[Prediction]:
        done, target = self.done, self.use_case.contract.field(self.use_case.model.target.field)
        done.failed += not answers
        done.predict_ms.append(milliseconds)
        done.predictions += len(answers)
        low, high = target.limits
        for answer in answers:
            done.by_version[answer.model_version] = done.by_version.get(answer.model_version, 0) + 1
            done.invalid += answer.value is None or not low <= answer.value <= high
        return answers

    def _send_outcomes(self, now: int) -> None:
        done, outcomes = self.done, {}
        for identity, actual, answer in self._waiting.pop(now, []):
            if answer.interval is None:
                done.unanswered += 1
            if actual is not None:
                outcomes[identity] = actual
                done.covered += answer.interval is not None and answer.interval[0] <= actual <= answer.interval[1]
        if outcomes:
            done.outcomes += self.client.feedback(outcomes)


def _by_moment(use_case: UseCase, rows: pa.Table, start_us: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    times = event_time(use_case.contract, rows).to_numpy()
    order = np.argsort(times, kind="stable")
    rows, times = rows.take(order), times[order]
    first = int(np.searchsorted(times, start_us))
    starts = first + np.flatnonzero(np.diff(times[first:], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(times)], strict=True):
        yield int(times[begin]), records(use_case.contract, rows.slice(begin, end - begin))
