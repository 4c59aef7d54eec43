"""One A/B test inside one gateway: which instances each version gets, what became of them, and what was counted.

As in a trial the champion has answered every instance before a variant is asked, and its answer stands wherever that
errs, is late or answers what its contract refuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.training.artifact import Prediction
from serving import routing
from serving.answers import Part, Prepared
from serving.routing import digest, place
from serving.runner import Rows
from serving.tally import Counts, Keys, Tally
from serving.trial import Asked
from serving.way import Allowed, Ask, Described, Got, put, within

_ENTITIES = 20_000  # that a gateway names: more would fill the journal and tell no more of how they are assigned


@dataclass(frozen=True)
class Variant:
    """How a variant is asked, and what says how its rows are made."""

    ask: Ask
    described: Described


class Split:
    """An A/B test as this gateway takes part in it."""

    def __init__(
        self,
        split: routing.Split,
        variants: Mapping[str, Variant],
        tally: Tally,
        allowed: Allowed,
        champion: str,
    ) -> None:
        """``variants`` has every version of the ``split``."""
        self.split = split
        self.versions = (champion, *(share.version for share in split.shares))
        self._variants = [variants[share.version] for share in split.shares]
        self._upto = np.array([share.upto for share in split.shares])
        self._tally, self._allowed = tally, allowed
        self._accidents = 0
        self._keys = Keys()
        self._known: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Whether units are assigned here; not once the cap of harm is reached, for the test is about to end."""
        return self._accidents < self.split.harm_cap

    def first_seen(self, key: str) -> bool:
        """False for a key that a caller sent before: the answer may be repeated, and counts once."""
        return self._keys.first_seen(key)

    def units(self, key: str, entities: Sequence[str]) -> Sequence[str]:
        """What each instance of a request, of those ``entities``, is assigned by."""
        return entities if self.split.by_entity else [f"{key}/{i}" for i in range(len(entities))]

    def name(self, unit: str) -> int:
        """A name of a unit that tells nothing of it."""
        return digest(unit, self.split.salt)

    def assign(self, units: Sequence[str]) -> np.ndarray:
        """int [n]: the place in ``versions`` of the version that each of ``units`` is assigned to.

        The champion, at place 0, has the last part of the places from 0 to 1.
        """
        places = [place(unit, self.split.salt) for unit in units]
        found: np.ndarray = (np.searchsorted(self._upto, places, side="right") + 1) % len(self.versions)
        return found

    async def choose(self, asked: Asked, arms: np.ndarray) -> tuple[Prediction, list[Part]]:
        """The answers to a request whose instances are assigned to ``arms``, and which of them variants gave."""
        prepared, prediction, parts = asked.prepared, asked.champion, []
        taken = np.zeros(len(arms), dtype=bool)
        wanted = [(arm, np.flatnonzero(arms == arm)) for arm in np.unique(arms[arms > 0]).tolist()]
        replies = await asyncio.gather(*(self._ask(arm, asked, rows) for arm, rows in wanted))
        for (arm, rows), got in zip(wanted, replies, strict=True):
            if got.reply is None or got.tried is None:
                continue
            good = self._allowed.valid(got.reply.prediction) & prepared.usable[rows] & got.tried.usable[rows]
            prediction = put(prediction, rows, good, got.reply)
            answered = np.zeros(len(arms), dtype=bool)
            answered[rows] = good
            taken |= answered
            parts.append(Part(answered, self.versions[arm], got.tried))
        self._count(asked, arms, taken)
        return prediction, parts

    async def _ask(self, arm: int, asked: Asked, rows: np.ndarray) -> Got:
        variant = self._variants[arm - 1]

        def of(tried: Prepared) -> Rows:
            return tried.take(rows)

        return await within(asked.within_s(self.split.deadline_ms), variant.ask, variant.described, asked.rows_of, of)

    def _count(self, asked: Asked, arms: np.ndarray, taken: np.ndarray) -> None:
        harmed = int(((arms > 0) & ~taken & asked.prepared.usable).sum())
        self._accidents += harmed > 0
        served, size = int(taken.sum()), len(self.versions)
        counts_of = np.bincount(arms, minlength=size).tolist() if asked.counted else None

        def change(counts: Counts) -> None:
            counts.served += served
            counts.harmed += harmed
            counts.accidents += harmed > 0
            if counts_of is None:
                return
            if self.split.by_entity:
                counts.members = counts.members or [[] for _ in range(size)]
                self._name(counts.members, asked.prepared.entities, arms)
            else:
                had = counts.arms or [0] * size
                counts.arms = [old + new for old, new in zip(had, counts_of, strict=True)]

        self._tally.add(self.split.test, change)

    def _name(self, members: list[list[int]], entities: Sequence[str], arms: np.ndarray) -> None:
        for entity, arm in zip(entities, arms.tolist(), strict=True):
            name = self.name(entity)
            if name not in self._known and len(self._known) < _ENTITIES:
                self._known.add(name)
                members[arm].append(name)
