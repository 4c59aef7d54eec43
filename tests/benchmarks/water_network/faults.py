"""Faults of sensors, drawn before the replay: silence, delays, broken readings, and readings that are sent twice.

Which readings arrive in which minute follows from the faults alone, so what must become of each is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

NEVER = np.iinfo(np.int64).max
REPEATED_SHARE, REPEATED_WITHIN = 0.005, 120


class Fault(IntEnum):
    """What is wrong with a sensor during its span of minutes.

    SILENT readings are never sent, DELAYED ones all when the span is over, BROKEN ones are of no use. Delays of
    more than an hour are beyond the contract's lateness.
    """

    NONE = 0
    SILENT = 1
    DELAYED = 2
    BROKEN = 3


# The share of sensors, and between how many minutes a span lasts.
_SPANS = {Fault.SILENT: (0.04, 120, 480), Fault.DELAYED: (0.04, 10, 180), Fault.BROKEN: (0.02, 60, 180)}
_BROKEN: tuple[object, ...] = (9_999.0, None, "ERR")  # out of range, missing, of another type


@dataclass(frozen=True)
class Arrivals:
    """Readings that arrive in one minute, in the order in which they are sent.

    sensors and minutes int64[k] say which, ``repeated`` bool[k] that the reading has been sent before, ``broken``
    bool[k] that the contract must refuse it.
    """

    sensors: np.ndarray
    minutes: np.ndarray
    repeated: np.ndarray
    broken: np.ndarray


@dataclass(frozen=True)
class Faults:
    """By sensor, int64[n]: its fault, and the minutes from ``start`` to before ``stop`` in which it has it."""

    kind: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    seed: int

    def arrive_at(self, sensors: np.ndarray, minutes: np.ndarray) -> np.ndarray:
        """In which minute readings int64[k] are sent for the first time; ``NEVER`` for those of silence."""
        kind, inside = self.kind[sensors], self._inside(sensors, minutes)
        later = np.where(kind == Fault.DELAYED, self.stop[sensors], minutes)
        return np.where(inside, np.where(kind == Fault.SILENT, NEVER, later), minutes)

    def arrivals(self, minute: int) -> Arrivals:
        """What arrives in ``minute``: its own readings, delayed ones, then repeated ones."""
        everyone = np.arange(len(self.kind))
        same = np.full(len(everyone), minute)
        now = everyone[self.arrive_at(everyone, same) == minute]
        back = np.flatnonzero((self.kind == Fault.DELAYED) & (self.stop == minute))
        spans = [np.arange(first, minute) for first in self.start[back].tolist()]
        again, when = self._repeats(minute)
        sensors = np.concatenate([now, np.repeat(back, [len(span) for span in spans]), again])
        minutes = np.concatenate([same[now], *spans, when])
        repeated = np.arange(len(sensors)) >= len(sensors) - len(again)
        broken = (self.kind[sensors] == Fault.BROKEN) & self._inside(sensors, minutes)
        return Arrivals(sensors, minutes, repeated, broken)

    def _repeats(self, minute: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, minute))
        sensors = np.flatnonzero(rng.random(len(self.kind)) < REPEATED_SHARE)
        minutes = minute - rng.integers(0, REPEATED_WITHIN + 1, len(sensors))
        sent = (minutes >= 0) & (self.arrive_at(sensors, minutes) <= minute)
        return sensors[sent], minutes[sent]

    def _inside(self, sensors: np.ndarray, minutes: np.ndarray) -> np.ndarray:
        inside: np.ndarray = (self.start[sensors] <= minutes) & (minutes < self.stop[sensors])
        return inside


def draw(sensors: int, minutes: int, seed: int) -> Faults:
    """Faults for a replay of so many minutes: at most one span a sensor, somewhere in it."""
    rng = np.random.default_rng(seed)
    kind, start, stop = np.zeros((3, sensors), np.int64)
    at, order = 0, rng.permutation(sensors)
    for fault, (share, shortest, longest) in _SPANS.items():
        chosen = order[at : at + round(share * sensors)]
        at += len(chosen)
        lengths = np.minimum(rng.integers(shortest, longest + 1, len(chosen)), max(minutes // 2, 1))
        kind[chosen], start[chosen] = fault, rng.integers(0, minutes - lengths + 1)
        stop[chosen] = start[chosen] + lengths
    return Faults(kind, start, stop, seed)


def broken_value(sensor: int) -> object:
    """What a broken sensor tells in place of a pressure; each is broken in one way."""
    return _BROKEN[sensor % len(_BROKEN)]
