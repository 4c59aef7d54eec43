"""For each request the latest row of its entity that had happened, was known and is young enough."""

from __future__ import annotations

import numpy as np

from pipelines.features.kernels.compiled import compiled


@compiled
def standing(entities: np.ndarray, times: np.ndarray, orders: np.ndarray | None) -> bool:
    """Whether rows, int64[m] each, stand by entity, time and order already (None: their place), without a null (-1)."""
    for i in range(entities.shape[0]):
        if entities[i] < 0:
            return False
        if i == 0 or entities[i - 1] < entities[i]:
            continue
        if entities[i - 1] > entities[i] or times[i - 1] > times[i]:
            return False
        if orders is not None and times[i - 1] == times[i] and orders[i - 1] > orders[i]:
            return False
    return True


@compiled
def by_entity(edges: np.ndarray, entities: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The ``places``, int64[m], of rows that have an entity, put by entity and otherwise left in their order.

    Entity e, of entities int64[m], has edges[e + 1] - edges[e] rows: counting sorts them in one pass.
    """
    sorted_, free = np.empty(edges[-1], np.int64), edges[:-1].copy()
    for i in range(places.shape[0]):
        entity = entities[places[i]]
        if entity >= 0:
            sorted_[free[entity]] = places[i]
            free[entity] += 1
    return sorted_


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
