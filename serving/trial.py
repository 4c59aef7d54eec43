"""One rollout inside one gateway: which instances the challenger gets, what became of them, and what was counted.

A challenger's failure is never the caller's: the champion has answered every instance before the challenger is
asked, and its answer stands wherever the challenger errs, is late or answers what its contract refuses.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.training.artifact import Prediction
from serving.answers import Other, Prepared
from serving.routing import Challenger, digest, place
from serving.runner import Rows
from serving.tally import Counts, Event, Keys, Tally, count
from serving.way import Allowed, Ask, Described, Got, RowsOf, put, within

COIN = 0.5
"""Share at which a copied request is counted as the challenger's; the other half counts as the champion's."""
_COPIES_AT_ONCE = 16


@dataclass(frozen=True)
class Asked:
    """A request of n instances that the champion has answered, in ``champion_s`` seconds inside its runner.

    It came at ``began`` (seconds of ``time.perf_counter``). ``key`` places it in the split. ``counted`` is False for a
    request that must not be evidence (a repetition); ``forced`` is one whose version its caller chose: nothing of it is
    counted, not even harm. Nothing that is tried is waited for after ``until``. ``rows_of`` makes the instances as
    another version is to have them.
    """

    key: str
    counted: bool
    prepared: Prepared
    rows_of: RowsOf
    champion: Prediction
    champion_s: float
    began: float
    forced: bool = False
    until: float = math.inf

    def within_s(self, deadline_ms: float) -> float:
        """Seconds that a version has which is tried: its deadline, or what the request leaves of it."""
        return min(deadline_ms / 1e3, max(self.until - time.perf_counter(), 0.0))

    @property
    def evident(self) -> bool:
        """Whether its first instance, which stands for the request, is evidence."""
        return self.counted and bool(self.prepared.usable[0])


@dataclass(frozen=True)
class Chosen:
    """The answers of a request: ``taken`` bool [n] are the challenger's, made of ``tried``; ``other`` is what the
    champion said there.
    """

    prediction: Prediction
    taken: np.ndarray
    other: Other
    tried: Prepared | None


class Trial:
    """A challenger as this gateway tries it. ``follow`` changes its weight; everything else stays for the rollout."""

    def __init__(
        self,
        challenger: Challenger,
        ask: Ask,
        slow_s: float,
        tally: Tally,
        allowed: Allowed,
        champion: str,
        described: Described,
    ) -> None:
        """``champion`` is the version it is compared with, ``described`` says how its own rows are made. A call that
        takes longer than ``slow_s`` is slow.
        """
        self.challenger = challenger
        self.described = described
        self._ask = ask
        self._slow_s = slow_s
        self._tally = tally
        self._allowed = allowed
        self._champion = champion
        self._accidents = 0
        self._copies: set[asyncio.Task[None]] = set()
        self._keys = Keys()
        self._named: dict[str, set[int]] = {}

    def follow(self, challenger: Challenger) -> None:
        """Takes over a newer entry of the routing table for the same rollout."""
        self.challenger = challenger

    @property
    def weight(self) -> float:
        """The challenger's share of the instances now; nothing once it has reached its cap of harm here."""
        return self.challenger.weight if self._accidents < self.challenger.harm_cap else 0.0

    def assign(self, key: str, entities: Sequence[str], weight: float) -> np.ndarray:
        """bool [n]: which instances, of those ``entities``, are the challenger's at that ``weight``."""
        if weight <= 0:
            return np.zeros(len(entities), dtype=bool)
        salt = self.challenger.salt
        if self.challenger.by_entity:
            return np.array([place(entity, salt) for entity in entities]) < weight
        return np.array([place(f"{key}/{i}", salt) for i in range(len(entities))]) < weight

    async def choose(self, asked: Asked, assigned: np.ndarray, weight: float) -> Chosen:
        """The answers to a request of which some instances are ``assigned`` to the challenger, at that ``weight``.

        In a batch the champion's time is that of all instances and the challenger's that of its own, which can only be
        to its advantage.
        """
        prepared, champion = asked.prepared, asked.champion
        challenger, rows = self.challenger, np.flatnonzero(assigned)
        got = await self._within_deadline(asked, lambda tried: tried.take(rows))
        reply, tried = got.reply, got.tried
        taken = np.zeros(len(assigned), dtype=bool)
        if reply is not None and tried is not None:
            # What the champion's ladder refuses is refused for every version, and the challenger's own one for itself.
            taken[rows] = self._allowed.valid(reply.prediction) & prepared.usable[rows] & tried.usable[rows]
        merged = _merge(champion, got, rows, taken, self._champion)
        if asked.forced:
            return merged
        harmed = int((assigned & ~taken & prepared.usable).sum())
        self._accidents += harmed > 0
        served, first = int(taken.sum()), bool(assigned[0])
        failed = not (taken[0] or got.late) if first else not self._allowed.first(champion)
        took = asked.champion_s if not first else reply.seconds if reply is not None else None
        event = self._event(asked, weight, challenger=first, failed=failed, took=took)

        def change(counts: Counts) -> None:
            counts.served += served
            counts.harmed += harmed
            counts.accidents += harmed > 0
            if asked.evident:
                self._judge(counts, asked, event)

        self._tally.add(challenger.rollout, change)
        return merged

    def count_champion(self, asked: Asked, weight: float) -> None:
        """Counts a request that the split left to the champion, at that ``weight``."""
        if asked.evident:
            failed = not self._allowed.first(asked.champion)
            event = self._event(asked, weight, challenger=False, failed=failed, took=asked.champion_s)
            self._tally.add(self.challenger.rollout, lambda counts: self._judge(counts, asked, event))

    def see(self, asked: Asked) -> None:
        """Counts whether a request, whichever version is to answer it, has the inputs that it should have."""
        if asked.counted:
            degraded = bool(asked.prepared.reasons(0))

            def change(counts: Counts) -> None:
                counts.seen += 1
                counts.degraded += degraded

            self._tally.add(self.challenger.rollout, change)

    def _event(self, asked: Asked, weight: float, *, challenger: bool, failed: bool, took: float | None) -> Event:
        """``took`` are the seconds inside the runner, as far as they are known."""
        waited_ms, budget_ms = (time.perf_counter() - asked.began) * 1e3, self.challenger.budget_ms
        slow, over = took is not None and took > self._slow_s, budget_ms is not None and waited_ms > budget_ms
        return Event(weight, challenger, failed, slow, over)

    def _judge(self, counts: Counts, asked: Asked, event: Event) -> None:
        if self.challenger.by_entity:
            event.name(counts, digest(asked.prepared.entities[0], self.challenger.salt), self._named)
        else:
            event.count(counts)

    def copies(self, key: str) -> bool:
        """Whether a request that is the champion's is copied to the challenger, and there is room for it."""
        share = self.challenger.shadow
        return len(self._copies) < _COPIES_AT_ONCE and place(key, f"{self.challenger.salt}/copy") < share

    def copy(self, asked: Asked, done: Callable[[Other], None]) -> None:
        """Asks the challenger behind the caller's back; ``done`` gets what it said."""
        task = asyncio.ensure_future(self._copied(asked, done))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copied(self, asked: Asked, done: Callable[[Other], None]) -> None:
        challenger, prepared = self.challenger, asked.prepared
        got = await self._within_deadline(asked, Prepared.all)
        reply, tried = got.reply, got.tried
        nothing = np.full(len(prepared.usable), np.nan)
        valid = np.zeros(len(nothing), dtype=bool)
        if reply is not None and tried is not None:
            valid = self._allowed.valid(reply.prediction) & prepared.usable & tried.usable
        if asked.evident:
            self._count_copy(asked, got, bool(valid[0]))
        if reply is None:
            done(Other(nothing, nothing, nothing, challenger.version))
        else:
            value, lower, upper = (
                np.where(valid, series, np.nan) for series in (reply.value, reply.lower, reply.upper)
            )
            done(Other(value, lower, upper, challenger.version))

    def _count_copy(self, asked: Asked, got: Got, valid: bool) -> None:
        challenger, champion, reply = self.challenger, asked.champion, got.reply
        # Each copied request is counted for one of the two versions, by a coin: the tests assume that an event
        # belongs to one of them, and a request that fails in both must not count twice.
        coin = place(asked.key, f"{challenger.salt}/coin") < COIN
        in_shadow = challenger.weight <= 0  # later the assigned requests are the evidence
        fine = self._allowed.first(champion)
        copied = not (valid or got.late), reply.seconds if reply is not None else None
        answered = not fine, asked.champion_s
        on_trial, other = (answered, copied) if challenger.watch else (copied, answered)
        failed, took = on_trial if coin else other
        value = float(reply.value[0]) if reply is not None else np.nan
        disagreed = valid and fine and not champion.lower[0] <= value <= champion.upper[0]

        def change(counts: Counts) -> None:
            counts.copies += 1
            if not challenger.watch:
                counts.accidents += got.late
                counts.disagreed += disagreed
            if in_shadow:
                if failed:
                    count(counts.errors, COIN, coin)
                if took is not None and took > self._slow_s:
                    count(counts.slow, COIN, coin)

        self._tally.add(challenger.rollout, change)

    def first_seen(self, key: str) -> bool:
        """False for a key that a caller sent before: the answer may be repeated, its evidence may not."""
        return self._keys.first_seen(key)

    async def _within_deadline(self, asked: Asked, of: Callable[[Prepared], Rows]) -> Got:
        return await within(asked.within_s(self.challenger.deadline_ms), self._ask, self.described, asked.rows_of, of)


def _merge(champion: Prediction, got: Got, rows: np.ndarray, taken: np.ndarray, version: str) -> Chosen:
    merged = champion if got.reply is None else put(champion, rows, taken[rows], got.reply)
    value, lower, upper = (np.where(taken, said, np.nan) for said in (champion.value, champion.lower, champion.upper))
    return Chosen(merged, taken, Other(value, lower, upper, version), got.tried)
