"""The sensor step of the demo: one district's readings stop and come back, and answers go down the fallback ladder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cluster.alerts import Alerts
from pipelines.monitoring.sensors import ALERT
from pipelines.spec import UseCase
from serving.demo.replay import Replay
from serving.demo.report import expect
from serving.wire import Prediction

_ALERT_S = 20.0
_SILENT_HOURS = 32  # past the view's TTL and the fallback's hold, so that every rung is reached
_RUNGS = {"fresh": None, "held": "stale_features", "normal": "seasonal_normals"}


def sensor_offline(use_case: UseCase, replay: Replay, alerts: Alerts, say: Callable[[str], None]) -> dict[str, Any]:
    """Silences the first district for a day and more; returns what its answers were made of."""
    district = replay.entities()[0]
    subject = f"{use_case.name}/{district}"
    replay.begin()
    before = _answers(replay, district, 6)
    expect(not _open(alerts, subject), f"{subject} was said to be silent before its readings stopped")
    replay.silent = frozenset({district})
    silent = _answers(replay, district, _SILENT_HOURS)
    _until(lambda: _open(alerts, subject), f"the alert {ALERT} for {subject} opens")
    replay.silent = frozenset()
    after = _answers(replay, district, 4)
    _until(lambda: not _open(alerts, subject), f"the alert {ALERT} for {subject} resolves")
    refused = _refused(replay, use_case)

    rungs = {name: [a for a in silent if _rung(a) == name] for name in _RUNGS}
    expect(all(a.value is not None for a in silent), "an answer was refused although a normal was known")
    expect(all(rungs.values()), f"not every rung was reached: {_counts(rungs)}")
    order = [list(_RUNGS).index(_rung(answer)) for answer in silent]
    expect(order == sorted(order), f"the ladder was not gone down rung by rung: {[_rung(a) for a in silent]}")
    usual = _width(before)
    widened = {name: _width(rungs[name]) / usual for name in ("held", "normal")}
    expect(min(widened.values()) > 1, f"intervals were not widened: {widened}")
    expect(_rung(after[-1]) == "fresh", f"readings are back, and the answer is {after[-1].degraded}")
    expect(replay.done.failed == 0, f"{replay.done.failed} requests failed")
    say(f"    {district} silent for {_SILENT_HOURS} h: {_counts(rungs)}; refused when nothing is known: {refused}")
    return {
        "silent_hours": _SILENT_HOURS,
        **{f"answers_{name}": len(found) for name, found in rungs.items()},
        **{f"interval_{name}_over_fresh": round(ratio, 3) for name, ratio in widened.items()},
        "unknown_refused": "unknown_entity" in refused,
        "alerts_left_open": len([a for a in alerts.open_alerts() if a.name == ALERT]),
        "failed_requests": replay.done.failed,
    }


def _answers(replay: Replay, district: str, moments: int) -> list[Prediction]:
    found = []
    for _ in range(moments):
        replay.moment()
        found.append(replay.answer(district))
    return found


def _rung(answer: Prediction) -> str:
    return next((name for name, flag in reversed(_RUNGS.items()) if flag in answer.degraded), "fresh")


def _width(answers: list[Prediction]) -> float:
    return float(np.mean([a.interval[1] - a.interval[0] for a in answers if a.interval is not None]))


def _counts(rungs: dict[str, list[Prediction]]) -> dict[str, int]:
    return {name: len(found) for name, found in rungs.items()}


def _refused(replay: Replay, use_case: UseCase) -> list[str]:
    """The reasons for which an entity that nobody has ever heard of gets no answer."""
    instance = {**replay.instance(), use_case.contract.entity: "dma_999"}
    (answer,) = replay.client.predict([instance])
    expect(answer.value is None and answer.interval is None, f"an unknown district was answered: {answer}")
    return answer.degraded


def _open(alerts: Alerts, subject: str) -> bool:
    return any(alert.name == ALERT and alert.subject == subject for alert in alerts.open_alerts())


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _ALERT_S
    while not condition():
        expect(time.monotonic() < deadline, f"{what}: not within {_ALERT_S:g} s")
        time.sleep(0.1)
