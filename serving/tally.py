"""What one gateway counts of a rollout between two reports."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.rollout.evidence import Report, Units, What

_REPORT_SHARE, _LONGEST_S, _LONGEST_OF_TEST_S = 0.01, 60.0, 3600.0
_KEYS_REMEMBERED = 10_000
_EXPOSED_ENTITIES = 20_000  # that a gateway names in a step: more would fill the journal and tell no more


class Keys:
    """The idempotency keys that callers sent lately."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, None] = OrderedDict()

    def first_seen(self, key: str) -> bool:
        """False for a key that was sent before."""
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > _KEYS_REMEMBERED:
            self._seen.popitem(last=False)
        return True


class Tally:
    """Counts between two reports. Safe to use from several threads."""

    def __init__(self, gateway: str, real: Callable[[], float] = time.monotonic) -> None:
        self._gateway = gateway
        self._lock = threading.Lock()
        self._sequence = 0
        self._waiting: Report | None = None  # sent and not yet acknowledged: it is sent again as it was
        self._counts = Counts()
        self._began = self._made = real()
        self._real = real

    def add(self, rollout: int, change: Callable[[Counts], None]) -> None:
        """Applies ``change`` to the counts of ``rollout``; a newer one drops those before it, for they are over."""
        with self._lock:
            if rollout < self._counts.rollout:
                return
            if rollout > self._counts.rollout:
                self._counts = Counts(rollout)
                self._sequence = 0
                self._began = self._made = self._real()
            change(self._counts)
            self._counts.empty = False

    def report(self) -> Report | None:
        """What is to be sent now, if anything; the same until ``acknowledged``.

        Errors and harm are reported at once. Everything else waits for a hundredth of the time that the rollout has
        lasted, at most a minute, or an hour in an A/B test, which lasts for weeks: every report is journalled, and a
        long canary must not make a long journal.
        """
        with self._lock:
            if self._waiting is None and not self._counts.empty and (self._counts.urgent or self._due()):
                self._made = self._real()
                self._sequence += 1
                counts, self._counts = self._counts, Counts(self._counts.rollout)
                self._waiting = Report(
                    gateway=self._gateway,
                    sequence=self._sequence,
                    rollout=counts.rollout,
                    exposed=_pairs(counts.exposed),
                    errors=_pairs(counts.errors),
                    slow=_pairs(counts.slow),
                    over=_pairs(counts.over),
                    units=counts.units,
                    seen=counts.seen,
                    degraded=counts.degraded,
                    copies=counts.copies,
                    disagreed=counts.disagreed,
                    served=counts.served,
                    harmed=counts.harmed,
                    accidents=counts.accidents,
                    arms=tuple(counts.arms),
                    members=tuple(map(tuple, counts.members)),
                )
            return self._waiting

    def _due(self) -> bool:
        now, counts = self._real(), self._counts
        longest = _LONGEST_OF_TEST_S if counts.arms or counts.members else _LONGEST_S
        return now - self._made >= min((now - self._began) * _REPORT_SHARE, longest)

    def acknowledged(self) -> None:
        """The report was journalled."""
        with self._lock:
            self._waiting = None


@dataclass
class Counts:
    rollout: int = 0
    exposed: dict[float, list[int]] = field(default_factory=dict)
    errors: dict[float, list[int]] = field(default_factory=dict)
    slow: dict[float, list[int]] = field(default_factory=dict)
    over: dict[float, list[int]] = field(default_factory=dict)
    units: dict[What, Units] = field(default_factory=dict)
    seen: int = 0
    degraded: int = 0
    copies: int = 0
    disagreed: int = 0
    served: int = 0
    harmed: int = 0
    accidents: int = 0
    arms: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    empty: bool = True

    @property
    def urgent(self) -> bool:
        """Whether something happened that may end the rollout."""
        return bool(self.errors or "errors" in self.units or self.accidents)


def _pairs(counts: dict[float, list[int]]) -> dict[float, tuple[int, int]]:
    return {weight: (challenger, champion) for weight, (challenger, champion) in counts.items()}


def count(counts: dict[float, list[int]], weight: float, challenger: bool) -> None:
    """Counts one of the challenger's, or of the champion's, at a weight."""
    counts.setdefault(weight, [0, 0])[0 if challenger else 1] += 1


@dataclass(frozen=True)
class Event:
    """What became of a request, represented by its first instance, that was assigned at a ``weight``."""

    weight: float
    challenger: bool
    failed: bool
    slow: bool
    over: bool

    def count(self, counts: Counts) -> None:
        """Counts the request."""
        count(counts.exposed, self.weight, self.challenger)
        for happened, counter in ((self.failed, counts.errors), (self.slow, counts.slow), (self.over, counts.over)):
            if happened:
                count(counter, self.weight, self.challenger)

    def name(self, counts: Counts, unit: int, known: dict[str, set[int]]) -> None:
        """Tells of the entity ``unit`` what is not ``known`` of it; see ``Report.units``."""
        exposed = known.setdefault(f"step {self.weight}", set())
        if unit not in exposed and len(exposed) < _EXPOSED_ENTITIES:
            exposed.add(unit)
            self._tell(counts, "exposed", unit)
            if self.over:
                self._tell(counts, "over", unit)
        events: tuple[tuple[bool, What], ...] = (self.failed, "errors"), (self.slow, "slow")
        for happened, kind in events:
            if happened and unit not in (had := known.setdefault(kind, set())):
                had.add(unit)
                self._tell(counts, kind, unit)

    def _tell(self, counts: Counts, kind: What, unit: int) -> None:
        counts.units.setdefault(kind, {}).setdefault(self.weight, ([], []))[0 if self.challenger else 1].append(unit)
