"""The state of one entity in hand, as the online store keeps it: for tests that want no store around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.features.kernels import layout
from pipelines.features.state import apply_events, read_into, vectors, words
from pipelines.features.windows import Plan


@dataclass(frozen=True)
class Vector:
    """Stored features of one entity."""

    values: np.ndarray
    status: np.ndarray
    age_s: np.ndarray


class EntityState:
    """A state as bytes, changed and read by the functions that stores use."""

    def __init__(self, plan: Plan, blob: bytes | None = None) -> None:
        self.plan = plan
        self._blob = plan.empty_state.tobytes() if blob is None else blob
        words(plan, self._blob)  # refuses another format

    def to_bytes(self) -> bytes:
        return self._blob

    def apply(self, times: np.ndarray, orders: np.ndarray, values: np.ndarray) -> None:
        (made,), _ = apply_events(self.plan, [self._blob], np.array([0, len(times)]), times, orders, values)
        self._blob = bytes(made)

    def read(self, now_us: int) -> Vector:
        values, status, age = vectors(self.plan, 1)
        read_into(self.plan, words(self.plan, self._blob), now_us, values, status, age, 0)
        return Vector(values[:, 0], status[0], age[:, 0])

    @property
    def unplaced(self) -> int:
        return int(words(self.plan, self._blob)[layout.UNPLACED])
