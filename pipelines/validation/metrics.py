"""Losses by row, and a summary of answers that shows the worst entity beside the average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Metric = Literal["mae", "rmse", "mape"]


@dataclass(frozen=True)
class Accuracy:
    """Errors of ``rows`` answers. ``mae``, ``rmse`` and ``bias`` (mean of answer minus outcome) are in the
    target's unit; ``mape`` and ``mdape`` are shares of the outcome. ``coverage`` is the share of outcomes
    inside the interval, ``width`` its mean width in the target's unit.
    """

    rows: int
    mae: float
    rmse: float
    bias: float
    mape: float
    mdape: float
    coverage: float
    width: float


def row_losses(metric: Metric, actual: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The loss of each row [n] whose mean is the metric (for ``rmse``: its square).

    ``mape`` is infinite where the outcome is zero.
    """
    error: np.ndarray = np.abs(predicted - actual)
    if metric == "mae":
        return error
    if metric == "rmse":
        squared: np.ndarray = error * error
        return squared
    if metric == "mape":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(actual == 0, np.inf, error / np.abs(actual))
    raise ValueError(f"there is no metric {metric!r}; there are mae, rmse and mape")


def finish(metric: Metric, mean_loss: float) -> float:
    """The metric of a mean of ``row_losses``, or the ratio of metrics of a ratio of such means."""
    return float(np.sqrt(mean_loss)) if metric == "rmse" else float(mean_loss)


def accuracy(actual: np.ndarray, value: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Accuracy:
    """The accuracy of answers ``value`` with intervals; all [n]. A NaN among them makes the figures NaN."""
    if not len(actual):
        raise ValueError("there are no rows to measure accuracy on")
    error = value - actual
    share = row_losses("mape", actual, value)
    return Accuracy(
        rows=len(actual),
        mae=float(np.mean(np.abs(error))),
        rmse=float(np.sqrt(np.mean(error**2))),
        bias=float(np.mean(error)),
        mape=float(np.mean(share)),
        mdape=float(np.median(share)),
        coverage=float(np.mean((actual >= lower) & (actual <= upper))),
        width=float(np.mean(upper - lower)),
    )


def accuracy_by(
    groups: Sequence[str], actual: np.ndarray, value: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> dict[str, Accuracy]:
    """``accuracy`` of each group (an entity, say), by its name in order."""
    names = np.asarray(groups, dtype=object)
    result = {}
    for name in sorted(set(groups)):
        rows = names == name
        result[name] = accuracy(actual[rows], value[rows], lower[rows], upper[rows])
    return result
