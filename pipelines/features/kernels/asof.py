"""For each request the latest row of its entity that had happened, was known and is young enough."""

from __future__ import annotations

import numpy as np

from pipelines.features.kernels.compiled import compiled


@compiled
def latest(
    edges: np.ndarray,
    times: np.ndarray,
    known: np.ndarray | None,
    entities: np.ndarray,
    moments: np.ndarray,
    bounds: np.ndarray,
    ttl: int,
) -> np.ndarray:
    """Places int64[q] of the rows that the requests see, -1 for none.

    Entity e has the rows [edges[e], edges[e + 1]) in canonical order, with times and, unless all were known at once,
    ``known`` numbers int64[m]; requests have entities (-1: none) and moments int64[q], and see the rows whose number is
    at most their bound, int64[q]. A row older than ``ttl`` (us) is not seen, and neither is anything behind it.
    """
    found = np.empty(entities.shape[0], np.int64)
    for q in range(entities.shape[0]):
        found[q] = -1
        if entities[q] < 0:
            continue
        first, now = edges[entities[q]], moments[q]
        low, high = first, edges[entities[q] + 1]
        while low < high:  # the first row after ``now``
            middle = (low + high) >> 1
            if times[middle] <= now:
                low = middle + 1
            else:
                high = middle
        at = low - 1
        while at >= first and now - times[at] <= ttl:
            if known is None or known[at] <= bounds[q]:
                found[q] = at
                break
            at -= 1
    return found
