"""Finds entities whose target field has fallen silent, and keeps one alert open for each until its readings return.

What is silent follows from entity state alone, and which alerts are open from the database, so a monitor that is
started anew goes on where the last one ended. Several may run at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cluster.alerts import Alerts
from pipelines.contracts.events import from_microseconds
from pipelines.features.online import OnlineState
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds

ALERT = "sensor_silent"
"""The alert's name; its subject is ``{use case}/{entity}``."""
_BATCH = 500  # entities read at a time


@dataclass(frozen=True, slots=True)
class _Heard:
    """When an entity last gave a reading, as of a position of the state. Without any reading ``since`` is when the
    wait for one began.
    """

    since_us: int
    reading: bool
    position: tuple[int, int]


class SilenceMonitor:
    """Watches the entities of one use case's online state. For one thread at a time.

    Entities are read only when they could have become silent or could have come back, and the database is asked only
    when one did, so a check in which nothing changed costs microseconds.
    """

    def __init__(self, use_case: UseCase, online: OnlineState, alerts: Alerts) -> None:
        """Raises ``ValueError`` when the use case has no fallback ladder."""
        if use_case.fallback is None:
            raise ValueError(f"use case {use_case.name!r} has no fallback on its page to say what silence is")
        self._field = use_case.model.target.field
        self._prefix = f"{use_case.name}/"
        self._silence_us = microseconds(use_case.fallback.silence)
        self._online, self._reader, self._alerts = online, online.bind(), alerts
        folded = [window.field for window in use_case.view.windows for _ in window.folds]
        self._places = [place for place, name in enumerate(folded) if name == self._field]
        self._heard: dict[str, _Heard] = {}
        self._listed: tuple[int, int] | None = None  # generation and number of entities when they were last listed
        self._alerted: set[str] | None = None  # None until the database has been asked

    def check(self, now_us: int) -> tuple[str, ...]:
        """The entities that are silent at ``now_us`` (the cluster's clock), ascending; alerts follow suit.

        An entity of which state holds no reading at all is waited for from when it was first seen here, unless its
        alert is open already. After an error of state or database the next check does the same again.
        """
        alerted = self._open() if self._alerted is None else self._alerted
        self._listen(now_us, alerted)
        silent = {name for name, heard in self._heard.items() if self._is_silent(heard, now_us)}
        changed = silent ^ (alerted & self._heard.keys())
        if changed:
            stored = self._open()  # what another monitor has written already is not written again
            for name in sorted(changed):
                if name in silent and name not in stored:
                    self._alerts.open(ALERT, self._prefix + name, self._detail(self._heard[name], now_us))
                elif name in stored and name not in silent:
                    self._alerts.resolve(ALERT, self._prefix + name, f"readings of {self._field} are back")
            alerted = (alerted - changed) | (silent & changed)
        self._alerted = alerted
        return tuple(sorted(silent))

    def _is_silent(self, heard: _Heard, now_us: int) -> bool:
        return now_us - heard.since_us > self._silence_us

    def _listen(self, now_us: int, alerted: set[str]) -> None:
        """Reads the entities that are new, and those that would be silent unless state has moved on since."""
        position = self._online.position()  # before the reads: what comes in meanwhile is read at the next check
        listed = (position[0], self._online.entities())
        due = [
            name for name, heard in self._heard.items() if self._is_silent(heard, now_us) and heard.position != position
        ]
        if listed != self._listed:
            if self._listed is None or listed[0] != self._listed[0]:
                self._heard.clear()  # state was rebuilt
                due = []
            due += [name for name in self._online.names() if name not in self._heard]
        for start in range(0, len(due), _BATCH):
            part = due[start : start + _BATCH]
            ages = self._reader.read(part, now_us).age_s[:, self._places]
            for name, age_s in zip(part, np.fmin.reduce(ages, axis=1).tolist(), strict=True):
                before = self._heard.get(name)
                if not math.isnan(age_s):
                    heard = _Heard(now_us - round(age_s * 1e6), True, position)
                elif before is not None:
                    heard = replace(before, position=position)
                else:
                    since = now_us - self._silence_us - 1 if name in alerted else now_us
                    heard = _Heard(since, False, position)
                self._heard[name] = heard
        self._listed = listed

    def _open(self) -> set[str]:
        """The entities whose alert is open in the database."""
        return {
            alert.subject.removeprefix(self._prefix)
            for alert in self._alerts.open_alerts()
            if alert.name == ALERT and alert.subject.startswith(self._prefix)
        }

    def _detail(self, heard: _Heard, now_us: int) -> str:
        since = from_microseconds(heard.since_us).isoformat().replace("+00:00", "Z")
        hours = (now_us - heard.since_us) / 3.6e9
        if not heard.reading:
            return f"no {self._field} was ever read; waited for {hours:.1f} h, since {since}: look at the sensor"
        return f"no {self._field} for {hours:.1f} h, since {since}: look at the sensor; answers use the fallback ladder"
