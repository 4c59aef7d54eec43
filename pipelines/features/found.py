"""Features that are found beside an entity's own, of neighbours or in a dimension, and their statuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.features.kernels import layout
from pipelines.features.served import Status

NEVER_STALE = layout.NEVER
"""A time to live (us) that no age exceeds."""


@dataclass(frozen=True)
class Found:
    """Features of q requests: values float64[features, q], newest int64[q] (us).

    ``newest`` is the time of the newest event that contributed, ``layout.EMPTY`` where none did.
    """

    values: np.ndarray
    newest: np.ndarray


def mark(found: Found, times: np.ndarray, ttl_us: int, status: np.ndarray, age: np.ndarray | None = None) -> None:
    """Fills statuses uint8[q, features] and ages (s) float64[features, q] of what was found at ``times`` (us).

    The rule is that of windows.
    """
    none = found.newest == layout.EMPTY
    present = np.where(none | (times - found.newest > ttl_us), np.uint8(Status.STALE), np.uint8(Status.FRESH))
    status[:] = np.where(np.isnan(found.values.T), np.uint8(Status.MISSING), present[:, None])
    if age is not None:
        age[:] = np.where(none, np.nan, (times - found.newest) / 1e6)
