"""What a sweep must know of its rows before it begins, each in one pass without arrays in between."""

from __future__ import annotations

import numpy as np

from pipelines.features.kernels.compiled import compiled


@compiled
def survey(
    entities: np.ndarray, times: np.ndarray, orders: np.ndarray, known_at: np.ndarray, lateness: int, future: int
) -> tuple[bool, int, int, int]:
    """(sorted, late, ahead, first) of events, int64[m] each, times in us.

    ``sorted`` is whether they stand by entity, time and order; ``late`` of them were known more than ``lateness`` after
    their time, ``ahead`` more than ``future`` before it, of which ``first`` is the first one's place.
    """
    in_order, late, ahead, first = True, 0, 0, -1
    for i in range(times.shape[0]):
        delay = known_at[i] - times[i]
        late += delay > lateness
        if delay < -future:
            first = i if ahead == 0 else first
            ahead += 1
        if i > 0 and not (
            entities[i - 1] < entities[i]
            or (
                entities[i - 1] == entities[i]
                and (times[i - 1] < times[i] or (times[i - 1] == times[i] and orders[i - 1] <= orders[i]))
            )
        ):
            in_order = False
    return in_order, late, ahead, first


@compiled
def ascending(entities: np.ndarray, moments: np.ndarray) -> bool:
    """Whether reads, int64[q] each, stand by entity and moment."""
    for i in range(1, entities.shape[0]):
        if entities[i] < entities[i - 1] or (entities[i] == entities[i - 1] and moments[i] < moments[i - 1]):
            return False
    return True
