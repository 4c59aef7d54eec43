"""The state of one entity: what it takes to read its stored features at any later moment.

State is a pure function of the set of events applied, so neither their order, nor how they were split into
batches, nor a restart from bytes changes a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.features.kernels import layout, reads, tiles
from pipelines.features.windows import EventColumns, Plan

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
            raise _too_many(self.plan, int(self._words[layout.COUNT]))

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


def words(plan: Plan, blob: bytes | memoryview) -> np.ndarray:
    """Writable int64 words of a stored state, which is copied."""
    return _checked(plan, bytearray(blob))


def _checked(plan: Plan, blob: bytes | bytearray | memoryview) -> np.ndarray:
    """The int64 words of a stored state; ``StateError`` when another format or view wrote it."""
    found = np.frombuffer(blob, np.int64)
    if len(found) < plan.fixed_words or found[layout.VERSION] != layout.FORMAT:
        raise StateError(
            f"a stored state has format {blob[0]} and {len(blob)} bytes, but view {plan.view.name!r} "
            f"({plan.fingerprint}) reads format {layout.FORMAT} from {plan.fixed_words * 8} bytes on; "
            "rebuild the state "
            "with `python -m pipelines.backfill USECASE --materialize`"
        )
    return found


def _too_many(plan: Plan, count: int) -> StateError:
    return StateError(
        f"an entity has {count} events within {plan.reach_us / 1e6:g} s, more than the {MAX_RAW_EVENTS} that state "
        "keeps; lower the contract's lateness or split the entity"
    )


def apply_events(
    plan: Plan, blobs: Sequence[bytes | memoryview | None], seen: EventColumns, edges: np.ndarray
) -> tuple[list[memoryview], int]:
    """The states that ``blobs`` become, None being one of nothing, and how many events could not be placed.

    Entity e has the rows [edges[e], edges[e + 1]) of ``seen``, in canonical order. The same as ``EntityState.apply``
    and ``to_bytes`` of each, with its errors, in one call of a kernel.
    """
    fixed, row = plan.fixed_words, plan.raw_words
    held = np.array([fixed if blob is None else len(blob) // 8 for blob in blobs], np.int64)
    begins = np.concatenate([[0], np.cumsum(held + np.diff(edges) * row)])
    states = np.empty(begins[-1], np.int64)
    before = 0
    for e, blob in enumerate(blobs):
        if blob is not None:
            found = _checked(plan, blob)
            states[begins[e] : begins[e] + len(found)] = found
            before += int(found[layout.UNPLACED])
    new = np.array([blob is None for blob in blobs], np.bool_)
    lengths = tiles.apply_many(
        states, begins, new, plan.empty_state, plan.program, plan.others, edges, seen.times, seen.orders, seen.values
    )
    most = int(states[begins[:-1] + layout.COUNT].max(initial=0))
    if most > MAX_RAW_EVENTS:
        raise _too_many(plan, most)
    after = int(states[begins[:-1] + layout.UNPLACED].sum())
    whole = states.data.cast("B")
    ends = begins[:-1] + lengths
    made = [whole[8 * a : 8 * b] for a, b in zip(begins[:-1].tolist(), ends.tolist(), strict=True)]
    return made, after - before


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
