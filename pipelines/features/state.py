"""The state of one entity: what it takes to read its stored features at any later moment.

State is a pure function of the set of events applied, so neither their order, nor how they were split into
batches, nor a restart from bytes changes a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.features.kernels import layout, reads, tiles
from pipelines.features.windows import Plan

# Above this many unsettled events an entity is refused: every change writes them all again.
MAX_RAW_EVENTS = 100_000


class StateError(RuntimeError):
    """State cannot be read or written as asked; the message says what to do."""


@dataclass(frozen=True)
class Vector:
    """Stored features of one entity: values and ages (seconds, NaN when nothing contributed) float64, status
    uint8.
    """

    values: np.ndarray
    status: np.ndarray
    age_s: np.ndarray


class EntityState:
    """The state of one entity. Not shared between threads."""

    def __init__(self, plan: Plan, words: np.ndarray | None = None) -> None:
        self.plan = plan
        self._words = plan.empty_state.copy() if words is None else words

    @classmethod
    def from_bytes(cls, plan: Plan, blob: bytes | memoryview) -> EntityState:
        """The state that ``to_bytes`` wrote; ``StateError`` when another format or view wrote it."""
        return cls(plan, words(plan, blob))

    def to_bytes(self) -> bytes:
        """The state as bytes; the first is the format version."""
        start, count = int(self._words[layout.START]), int(self._words[layout.COUNT])
        row, fixed = self.plan.raw_words, self.plan.fixed_words
        packed = np.empty(fixed + count * row, np.int64)
        packed[:fixed] = self._words[:fixed]
        packed[fixed:] = self._words[fixed + start * row : fixed + (start + count) * row]
        packed[layout.START] = 0
        return packed.tobytes()

    def apply(self, times: np.ndarray, orders: np.ndarray, values: np.ndarray) -> None:
        """Applies eligible events: times (us) and orders int64[m], values float64[m, fields], NaN for a null.

        Events given in canonical order cost least. An event further behind the newest one than the contract's
        lateness allows is counted in ``unplaced`` and changes nothing else. Raises ``StateError`` when more
        than ``MAX_RAW_EVENTS`` events are too recent to be settled.
        """
        row, fixed = self.plan.raw_words, self.plan.fixed_words
        wanted = fixed + (int(self._words[layout.START]) + int(self._words[layout.COUNT]) + len(times)) * row
        if wanted > len(self._words):
            larger = np.zeros(wanted, np.int64)
            larger[: len(self._words)] = self._words
            self._words = larger
        tiles.apply(self._words, self.plan.program, self.plan.others, times, orders, values)
        if self._words[layout.COUNT] > MAX_RAW_EVENTS:
            raise StateError(
                f"an entity has {self._words[layout.COUNT]} events within {self.plan.reach_us / 1e6:g} s, "
                "more than the "
                f"{MAX_RAW_EVENTS} that state keeps; lower the contract's lateness or split the entity"
            )

    def read(self, now_us: int) -> Vector:
        """The stored features at ``now_us``; ``StateError`` when that is behind what the state can still
        tell.
        """
        values, status, age = vectors(self.plan, 1)
        read_into(self.plan, self._words, now_us, values, status, age, 0)
        return Vector(values[:, 0], status[0], age[:, 0])

    @property
    def newest_us(self) -> int | None:
        """The time of the newest event, None when there is none."""
        return int(self._words[layout.NEWEST]) if self._words[layout.SEEN] else None

    @property
    def unplaced(self) -> int:
        """How many events came too late to be placed; above zero only when a clock went backwards."""
        return int(self._words[layout.UNPLACED])


def words(plan: Plan, blob: Any) -> np.ndarray:
    """Writable int64 words of a stored state (bytes or a buffer, which is copied)."""
    found = np.frombuffer(bytearray(blob), np.int64)
    if len(found) < plan.fixed_words or found[layout.VERSION] != layout.FORMAT:
        raise StateError(
            f"a stored state has format {blob[0]} and {len(blob)} bytes, but view {plan.view.name!r} "
            f"({plan.fingerprint}) reads format {layout.FORMAT} from {plan.fixed_words * 8} bytes on; "
            "rebuild the state "
            "with `python -m pipelines.backfill USECASE --materialize`"
        )
    return found


def vectors(plan: Plan, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Room for values float64[features, rows], status uint8[rows, features] and ages float64[features, rows]."""
    width = len(plan.features)
    return np.empty((width, rows)), np.empty((rows, width), np.uint8), np.empty((width, rows))


def read_into(
    plan: Plan, state: np.ndarray, now_us: int, values: np.ndarray, status: np.ndarray, age: np.ndarray, row: int
) -> None:
    """``EntityState.read`` into one row of what ``vectors`` gave."""
    if not reads.read(state, plan.program, plan.others, now_us, values, status, age, row):
        raise StateError(
            f"features were asked for at {now_us} us, but the state has seen an event at "
            f"{state[layout.NEWEST]} us and "
            f"keeps only {plan.reach_us / 1e6:g} s behind it; check the clocks of this node"
        )
