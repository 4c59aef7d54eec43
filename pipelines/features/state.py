"""The state of one entity: what it takes to read its stored features at any later moment.

State is a pure function of the set of events applied, so neither their order, nor how they were split into
batches, nor a restart from bytes changes a value. (Of an entity with very many recent events this holds for those that
could be placed; the others are counted.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.features.kernels import layout, reads, tiles
from pipelines.features.windows import Plan


class StateError(RuntimeError):
    """State cannot be read or written as asked; the message says what to do."""


def words(plan: Plan, blob: bytes | memoryview) -> np.ndarray:
    """Writable int64 words of a stored state, which is copied; ``StateError`` when another format or view wrote it."""
    found = np.frombuffer(bytearray(blob), np.int64) if len(blob) % 8 == 0 else np.empty(0, np.int64)
    if (
        len(found) < plan.fixed_words
        or found[layout.VERSION] != layout.FORMAT
        or len(found) != plan.fixed_words + found[layout.COUNT] * plan.raw_words
    ):
        raise _unreadable(plan, blob)
    return found


def _unreadable(plan: Plan, blob: bytes | memoryview) -> StateError:
    return StateError(
        f"a stored state has format {blob[0] if len(blob) else 'none'} and {len(blob)} bytes, which view "
        f"{plan.view.name!r} ({plan.fingerprint}) cannot read: it reads format {layout.FORMAT}, whole, of "
        f"{plan.fixed_words * 8} bytes and {plan.raw_words * 8} for each recent event; rebuild the state with "
        "`python -m pipelines.backfill USECASE --materialize`"
    )


def apply_events(
    plan: Plan,
    blobs: Sequence[bytes | memoryview | None],
    edges: np.ndarray,
    times: np.ndarray,
    orders: np.ndarray,
    values: np.ndarray,
) -> tuple[list[memoryview], int]:
    """The states that ``blobs`` become, None being one of nothing, and how many events could not be placed.

    Entity e has the eligible events [edges[e], edges[e + 1]): times (us) and orders int64[m], values
    float64[m, fields], NaN for a null; in canonical order they cost least. An event further behind its entity's newest
    one than the contract's lateness allows cannot be placed and changes nothing else. Raises ``StateError`` when an
    entity has more than ``MAX_RAW_EVENTS`` events too recent to be settled, or a blob is of another format or view.
    """
    new = np.array([blob is None for blob in blobs], np.bool_)
    sizes = np.array([0 if blob is None else len(blob) for blob in blobs], np.int64)
    held = np.maximum(sizes // 8, plan.fixed_words)
    begins = np.concatenate([[0], np.cumsum(held + np.diff(edges) * plan.raw_words)])
    states = np.empty(begins[-1], np.int64)
    whole = states.data.cast("B")
    for blob, at in zip(blobs, (8 * begins[:-1]).tolist(), strict=True):
        if blob is not None:
            whole[at : at + len(blob)] = blob
    read = (sizes >= 8 * plan.fixed_words) & (states[begins[:-1] + layout.VERSION] == layout.FORMAT)
    read &= sizes == 8 * (plan.fixed_words + states[begins[:-1] + layout.COUNT] * plan.raw_words)
    for e in np.flatnonzero(~new & ~read):
        raise _unreadable(plan, whole[8 * begins[e] :][: sizes[e]])
    before = int(states[begins[:-1][~new] + layout.UNPLACED].sum())
    lengths = tiles.apply(
        states, begins, new, plan.empty_state, plan.program, plan.others, edges, times, orders, values
    )
    after = int(states[begins[:-1] + layout.UNPLACED].sum())
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
    """The stored features at ``now_us`` into a row of what ``vectors`` gave; ``StateError`` when too far back."""
    if not reads.read(state, plan.program, plan.mixed, now_us, values, status, age, row):
        raise StateError(
            f"features were asked for at {now_us} us, but the state has seen an event at {state[layout.NEWEST]} us "
            f"and keeps only {plan.reach_us / 1e6:g} s behind it; check the clocks of this node"
        )
