"""A held-out stretch of real time, lived through again over HTTP: events come in, predictions and outcomes go.

The replay clock is set to each moment in turn. What a caller asks at a moment is answered from what had come in by
then, exactly as it would have been on that day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.clock import ReplayClock
from pipelines.samples.faults import event_time, records
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds
from serving.client import Client
from serving.demo.report import StepFailed
from serving.wire import Prediction


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
    predict_ms: list[float] = field(default_factory=list)
    event_ids: set[str] = field(default_factory=set)


def replay(
    use_case: UseCase,
    rows: pa.Table,
    start_us: int,
    clock: ReplayClock,
    client: Client,
    say: Callable[[str], None],
) -> Replayed:
    """Replays the rows from ``start_us`` on, ordered by time. Once a day a broken event is sent along."""
    contract, target = use_case.contract, use_case.model.target
    horizon = microseconds(target.horizon)
    moments = dict(_by_moment(use_case, rows, start_us))
    result = Replayed()
    waiting: dict[int, list[tuple[str, float, Prediction]]] = {}
    day = None

    def predict(now: int) -> None:
        wanted = moments.get(now + horizon, [])
        if not wanted:
            return
        fields = (contract.entity, *use_case.view.inputs)
        began = time.perf_counter()
        answers = client.predict([{name: row[name] for name in fields} for row in wanted])
        result.predict_ms.append((time.perf_counter() - began) * 1e3)
        result.predictions += len(answers)
        waiting[now + horizon] = [
            (answer.prediction_id, row[target.field], answer) for answer, row in zip(answers, wanted, strict=True)
        ]

    for now in sorted(moments):
        clock.set(now)
        events = moments[now]
        if horizon == 0:
            predict(now)
        broken = []
        if now // 86_400_000_000 != day:
            day = now // 86_400_000_000
            broken = [{**events[0], target.field: -1.0}]
        for status in client.events(events + broken):
            if status.status == "accepted" and not status.duplicate:
                result.events += 1
                result.event_ids.add(status.event_id or "")
            elif status.rules == [f"{target.field}.minimum"]:
                result.refused += 1
            else:
                raise StepFailed(f"an event of the replay came back as {status}")
        if horizon:
            predict(now)
        outcomes = {}
        for identity, actual, answer in waiting.pop(now, []):
            if answer.interval is None:
                result.unanswered += 1
            if actual is not None:
                outcomes[identity] = actual
                result.covered += answer.interval is not None and answer.interval[0] <= actual <= answer.interval[1]
        if outcomes:
            result.outcomes += client.feedback(outcomes)
        result.moments += 1
        if result.moments % 240 == 0:
            say(f"    {result.moments:,} of {len(moments):,} moments replayed, {result.predictions:,} predictions")
    return result


def _by_moment(use_case: UseCase, rows: pa.Table, start_us: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    times = event_time(use_case.contract, rows).to_numpy()
    order = np.argsort(times, kind="stable")
    rows, times = rows.take(order), times[order]
    first = int(np.searchsorted(times, start_us))
    starts = first + np.flatnonzero(np.diff(times[first:], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(times)], strict=True):
        yield int(times[begin]), records(use_case.contract, rows.slice(begin, end - begin))
