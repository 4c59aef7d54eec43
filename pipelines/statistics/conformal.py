"""Split conformal intervals: the half-width that held on rows the model was not trained on."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def conformal_half_width(scores: NDArray[np.float64], coverage: float) -> float:
    """The ceil((n + 1) · coverage)-th smallest of n absolute residuals, their largest when n is too small for
    that.

    On exchangeable rows an interval of this half-width holds the next outcome with a probability of at least
    ``coverage``. Source: Lei, G'Sell, Rinaldo, Tibshirani and Wasserman 2018, "Distribution-free predictive
    inference for regression", section 2.2. Raises ``ValueError`` without scores, or when one is NaN.
    """
    if not len(scores) or bool(np.isnan(scores).any()):
        raise ValueError(f"conformal calibration needs finite scores, not {len(scores)} of which some may be NaN")
    place = min(math.ceil((len(scores) + 1) * coverage), len(scores))
    return float(np.partition(scores, place - 1)[place - 1])
