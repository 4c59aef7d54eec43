"""One rollout inside one gateway: which instances the challenger gets, what became of them, and what was counted.

A challenger's failure is never the caller's: the champion has answered every instance before the challenger is
asked, and its answer stands wherever the challenger errs, is late or answers what its contract refuses.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipelines.training.artifact import Prediction
from serving.answers import Prepared
from serving.challenger import Reply
from serving.rollout.evidence import Report
from serving.routing import Challenger, place
from serving.runner import Rows

COIN = 0.5
"""Share at which a copied request is counted as the challenger's; the other half counts as the champion's."""
_COPIES_AT_ONCE = 16
_KEYS_REMEMBERED = 10_000


class Ask(Protocol):
    """A way to a challenger (``serving.challenger.Asker.ask``)."""

    def __call__(self, rows: Rows) -> Coroutine[Any, Any, Reply]:
        """Its answers, or whatever error it had."""
        ...


class Tally:
    """Counts between two reports. Safe to use from several threads."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._lock = threading.Lock()
        self._sequence = 0
        self._waiting: Report | None = None  # sent and not yet acknowledged: it is sent again as it was
        self._counts = _Counts()

    def add(self, rollout: int, change: Callable[[_Counts], None]) -> None:
        """Applies ``change`` to the counts of ``rollout``; a newer one drops those before it, for they are over."""
        with self._lock:
            if rollout < self._counts.rollout:
                return
            if rollout > self._counts.rollout:
                self._counts = _Counts(rollout)
                self._sequence = 0
            change(self._counts)
            self._counts.empty = False

    def report(self) -> Report | None:
        """What is to be sent now; the same until ``acknowledged``."""
        with self._lock:
            if self._waiting is None and not self._counts.empty:
                self._sequence += 1
                counts, self._counts = self._counts, _Counts(self._counts.rollout)
                self._waiting = Report(
                    gateway=self._gateway,
                    sequence=self._sequence,
                    rollout=counts.rollout,
                    exposed=_pairs(counts.exposed),
                    errors=_pairs(counts.errors),
                    slow=_pairs(counts.slow),
                    copies=counts.copies,
                    disagreed=counts.disagreed,
                    served=counts.served,
                    harmed=counts.harmed,
                )
            return self._waiting

    def acknowledged(self) -> None:
        """The report was journalled."""
        with self._lock:
            self._waiting = None


@dataclass
class _Counts:
    rollout: int = 0
    exposed: dict[float, list[int]] = field(default_factory=dict)
    errors: dict[float, list[int]] = field(default_factory=dict)
    slow: dict[float, list[int]] = field(default_factory=dict)
    copies: int = 0
    disagreed: int = 0
    served: int = 0
    harmed: int = 0
    empty: bool = True


def _pairs(counts: dict[float, list[int]]) -> dict[float, tuple[int, int]]:
    return {weight: (challenger, champion) for weight, (challenger, champion) in counts.items()}


def _count(counts: dict[float, list[int]], weight: float, challenger: bool) -> None:
    counts.setdefault(weight, [0, 0])[0 if challenger else 1] += 1


@dataclass(frozen=True)
class Chosen:
    """The answers of a request: ``taken`` bool [n] are the challenger's, and ``other`` float64 [n] is what the champion
    said there (NaN elsewhere).
    """

    prediction: Prediction
    taken: np.ndarray
    other: np.ndarray


class Trial:
    """A challenger as this gateway tries it. ``follow`` changes its weight; everything else stays for the rollout."""

    def __init__(
        self,
        challenger: Challenger,
        ask: Ask,
        slow_s: float,
        tally: Tally,
        allowed: tuple[float, float],
    ) -> None:
        """``slow_s``: a call that takes longer is slow; ``allowed``: the lowest and highest answer of the contract."""
        self.challenger = challenger
        self._ask = ask
        self._slow_s = slow_s
        self._tally = tally
        self._low, self._high = allowed
        self._harmed = 0
        self._copies: set[asyncio.Task[None]] = set()
        self._keys: OrderedDict[str, None] = OrderedDict()

    def follow(self, challenger: Challenger) -> None:
        """Takes over a newer entry of the routing table for the same rollout."""
        self.challenger = challenger

    def assign(self, key: str, count: int) -> np.ndarray:
        """bool [n]: which instances are the challenger's."""
        challenger = self.challenger
        if not self.splits:
            return np.zeros(count, dtype=bool)
        places = np.array([place(f"{key}/{i}", challenger.salt) for i in range(count)])
        return places < challenger.weight

    @property
    def splits(self) -> bool:
        """Whether instances go to the challenger: none do once it has harmed its cap of answers here."""
        return self.challenger.weight > 0 and self._harmed < self.challenger.harm_cap

    async def choose(
        self, counted: bool, prepared: Prepared, champion: Prediction, champion_s: float, assigned: np.ndarray
    ) -> Chosen:
        """The answers to a request of which some instances are ``assigned`` to the challenger.

        ``counted`` is False for a request that must not be evidence (a repetition).
        """
        challenger, rows = self.challenger, np.flatnonzero(assigned)
        reply = await self._within_deadline(prepared.take(rows))
        taken = np.zeros(len(assigned), dtype=bool)
        if reply is not None:
            taken[rows] = self._valid(reply.prediction)
        harmed = int((assigned & ~taken & prepared.usable).sum())
        self._harmed += harmed
        served, first = int(taken.sum()), bool(assigned[0])
        failed = not taken[0] if first else not bool(self._valid(champion)[0])
        took = champion_s if not first else reply.seconds if reply is not None else None

        def change(counts: _Counts) -> None:
            counts.served += served
            counts.harmed += harmed
            if counted and prepared.usable[0]:
                self._judge(counts, challenger.weight, first, failed, took)

        self._tally.add(challenger.rollout, change)
        return _merge(champion, reply, rows, taken)

    def count_champion(self, counted: bool, prepared: Prepared, champion: Prediction, champion_s: float) -> None:
        """Counts a request that the split left to the champion."""
        weight, failed = self.challenger.weight, not bool(self._valid(champion)[0])
        if counted and prepared.usable[0]:
            self._tally.add(
                self.challenger.rollout, lambda counts: self._judge(counts, weight, False, failed, champion_s)
            )

    def _judge(self, counts: _Counts, weight: float, challenger: bool, failed: bool, took: float | None) -> None:
        """One request, represented by its first instance, as evidence."""
        _count(counts.exposed, weight, challenger)
        if failed:
            _count(counts.errors, weight, challenger)
        if took is not None and took > self._slow_s:
            _count(counts.slow, weight, challenger)

    def copies(self, key: str) -> bool:
        """Whether a request that is the champion's is copied to the challenger, and there is room for it."""
        share = self.challenger.shadow
        return len(self._copies) < _COPIES_AT_ONCE and place(key, f"{self.challenger.salt}/copy") < share

    def copy(
        self,
        key: str,
        counted: bool,
        prepared: Prepared,
        champion: Prediction,
        champion_s: float,
        done: Callable[[np.ndarray, str], None],
    ) -> None:
        """Asks the challenger behind the caller's back; ``done`` gets its values [n] and its version."""
        task = asyncio.ensure_future(self._copied(key, counted, prepared, champion, champion_s, done))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copied(
        self,
        key: str,
        counted: bool,
        prepared: Prepared,
        champion: Prediction,
        champion_s: float,
        done: Callable[[np.ndarray, str], None],
    ) -> None:
        challenger = self.challenger
        reply = await self._within_deadline(prepared.all())
        nothing = np.full(len(prepared.usable), np.nan)
        valid = self._valid(reply.prediction) if reply is not None else np.zeros(len(nothing), dtype=bool)
        done(np.where(valid, reply.value, np.nan) if reply is not None else nothing, challenger.version)
        if not counted or not prepared.usable[0]:
            return
        # Each copied request is counted for one of the two versions, by a coin: the tests assume that an event
        # belongs to one of them, and a request that fails in both must not count twice.
        coin = place(key, f"{challenger.salt}/coin") < COIN
        in_shadow = challenger.weight <= 0  # later the assigned requests are the evidence
        failed = not bool(valid[0]) if coin else not bool(self._valid(champion)[0])
        took = (reply.seconds if reply is not None else None) if coin else champion_s
        value = float(reply.value[0]) if reply is not None else np.nan

        def change(counts: _Counts) -> None:
            counts.copies += 1
            if valid[0] and not champion.lower[0] <= value <= champion.upper[0]:
                counts.disagreed += 1
            if in_shadow:
                if failed:
                    _count(counts.errors, COIN, coin)
                if took is not None and took > self._slow_s:
                    _count(counts.slow, COIN, coin)

        self._tally.add(challenger.rollout, change)

    def first_seen(self, key: str) -> bool:
        """False for a key that a caller sent before: the answer may be repeated, its evidence may not."""
        if key in self._keys:
            return False
        self._keys[key] = None
        if len(self._keys) > _KEYS_REMEMBERED:
            self._keys.popitem(last=False)
        return True

    async def _within_deadline(self, rows: Rows) -> Reply | None:
        """The challenger's reply, or None when there is none in time or it has not the form of one."""
        deadline_s = self.challenger.deadline_ms / 1e3
        try:
            found = await asyncio.wait_for(self._ask(rows), deadline_s)
            value, lower, upper = (
                np.asarray(answer, dtype=np.float64) for answer in (found.value, found.lower, found.upper)
            )
            reply = Reply(value, lower, upper, float(found.seconds))
        except Exception:  # noqa: BLE001 — whatever a challenger raises or answers is its failure, and counted as one
            return None
        return reply if value.shape == lower.shape == upper.shape == (rows.count,) else None

    def _valid(self, found: Prediction) -> np.ndarray:
        """bool [n]: answers that the output's contract allows."""
        with np.errstate(invalid="ignore"):
            ordered = (found.lower <= found.value) & (found.value <= found.upper)
            allowed: np.ndarray = ordered & (found.value >= self._low) & (found.value <= self._high)
        return allowed


def _merge(champion: Prediction, reply: Reply | None, rows: np.ndarray, taken: np.ndarray) -> Chosen:
    answers = [champion.value.copy(), champion.lower.copy(), champion.upper.copy()]
    other = np.full(len(taken), np.nan)
    if reply is not None:
        good = taken[rows]
        for into, given in zip(answers, (reply.value, reply.lower, reply.upper), strict=True):
            into[rows[good]] = given[good]
        other[taken] = champion.value[taken]
    return Chosen(Prediction(*answers), taken, other)
