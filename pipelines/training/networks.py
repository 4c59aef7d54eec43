"""The network of a model: raw columns in, the target's unit out, with all preprocessing inside its graph.

The module promises that whoever has the exported graph needs no code of ours to answer: standardisation,
missing values, unknown categories, the anchor and the transform's inverse are part of ``Network.forward``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Transform = Literal["identity", "log"]
UNKNOWN = 0
"""The category code of a value that training has not seen."""


@dataclass(frozen=True)
class Shape:
    """What fixes the tensors of a network, so that weights can be loaded into it again.

    ``numeric`` columns are each encoded by ``bins`` quantile bins; ``categories`` holds the size of each
    vocabulary (the unknown slot not counted); ``members`` networks of ``hidden`` widths are trained side by
    side and averaged.
    """

    numeric: int
    categories: tuple[int, ...]
    hidden: tuple[int, ...]
    members: int = 4
    bins: int = 12
    transform: Transform = "identity"


@dataclass(frozen=True)
class Preprocessing:
    """Fitted on training rows only: ``mean`` and ``deviation`` [d] of the standardised columns, quantile
    ``edges`` [d, bins + 1] on the standardised axis, and ``unit``, the typical size of the residual that the
    network answers.
    """

    mean: np.ndarray
    deviation: np.ndarray
    edges: np.ndarray
    unit: float


def fit_preprocessing(numeric: np.ndarray, residual: np.ndarray, bins: int) -> Preprocessing:
    """Preprocessing of float64 ``numeric`` [n, d] (NaN is missing) and ``residual`` [n], the network's
    target.

    A column that is constant or never there keeps deviation 1, so it becomes zero and not NaN.
    """
    if not len(residual):
        raise ValueError("there are no training rows to fit the preprocessing on")
    present = np.isfinite(numeric)
    count = np.maximum(present.sum(axis=0), 1)
    filled = np.where(present, numeric, 0.0)
    mean = filled.sum(axis=0) / count
    deviation = np.sqrt(np.where(present, (numeric - mean) ** 2, 0.0).sum(axis=0) / count)
    deviation = np.where(deviation > 1e-12 * np.maximum(np.abs(mean), 1.0), deviation, 1.0)
    edges = np.empty((numeric.shape[1], bins + 1))
    for column in range(numeric.shape[1]):
        values = (numeric[present[:, column], column] - mean[column]) / deviation[column]
        quantiles = np.quantile(values if len(values) else np.zeros(1), np.linspace(0, 1, bins + 1))
        # Repeated quantiles (a flag, a count) would divide by zero; a sliver of width makes them a step.
        edges[column] = np.maximum.accumulate(quantiles + np.arange(bins + 1) * 1e-3)
    unit = float(np.mean(np.abs(residual)))
    return Preprocessing(mean, deviation, edges, unit if unit > 0 else 1.0)


class Network(nn.Module):
    """float64 ``numeric`` [n, d], int64 ``categories`` [n, c], float64 ``anchor`` and ``scale`` [n] ->
    float64 [n].

    A finite number is standardised, cut at ten deviations and encoded piecewise linearly by the training
    quantiles (Gorishniy, Rubachev, Babenko 2022, "On Embeddings for Numerical Features in Tabular Deep
    Learning", eq. 1); a missing one is zero in all its encodings and one in a flag of its own. Categories are
    embedded; code 0 is unknown. The mean r of the members' answers is in units of the residual: the value is
    f⁻¹(f(anchor) + scale · r).
    """

    mean: Tensor
    deviation: Tensor
    left: Tensor
    width: Tensor
    unit: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, bins = shape.numeric, shape.bins
        self.register_buffer("mean", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("deviation", torch.ones(d, dtype=torch.float64))
        self.register_buffer("left", torch.zeros(d, bins))
        self.register_buffer("width", torch.ones(d, bins))
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))
        dims = [min(8, size // 2 + 1) for size in shape.categories]
        self.embeddings = nn.ModuleList(
            nn.Embedding(size + 1, dim) for size, dim in zip(shape.categories, dims, strict=True)
        )
        widths = [d * (bins + 2) + sum(dims), *shape.hidden, 1]
        # The members share one product over the wide encoding: several times faster than one each.
        self.first = nn.Linear(widths[0], shape.members * widths[1])
        nn.init.normal_(self.first.weight, std=(2.0 / widths[0]) ** 0.5)
        nn.init.zeros_(self.first.bias)
        self.weights = nn.ParameterList(
            torch.randn(shape.members, a, b) * (2.0 / a) ** 0.5 for a, b in pairwise(widths[1:])
        )
        with torch.no_grad():
            self.weights[-1].mul_(0.1)  # begin at the anchor, not at a random correction of it
        self.biases = nn.ParameterList(torch.zeros(shape.members, 1, b) for b in widths[2:])

    def fitted(self, preprocessing: Preprocessing) -> Network:
        """This network with the buffers of ``preprocessing`` filled in."""
        edges = torch.from_numpy(preprocessing.edges).float()
        with torch.no_grad():
            self.mean.copy_(torch.from_numpy(preprocessing.mean))
            self.deviation.copy_(torch.from_numpy(preprocessing.deviation))
            self.left.copy_(edges[:, :-1])
            self.width.copy_(edges[:, 1:] - edges[:, :-1])
            self.unit.fill_(preprocessing.unit)
        return self

    def encode(self, numeric: Tensor, categories: Tensor) -> Tensor:
        """float32 [n, features] of raw columns."""
        # In as few operations as can be: with one row at a time each costs what it takes to start it.
        absent = numeric - numeric != 0.0  # neither missing nor infinite numbers equal themselves so
        z = ((numeric - self.mean) / self.deviation).clamp(-10.0, 10.0).float()
        z = torch.where(absent, 0.0, z)
        flag = absent.float()
        steps = ((z.unsqueeze(2) - self.left) / self.width).clamp(0.0, 1.0) * (1.0 - flag).unsqueeze(2)
        parts = [z, flag, steps.flatten(1)]
        parts += [embed(categories[:, place]) for place, embed in enumerate(self.embeddings)]
        return torch.cat(parts, dim=1)

    def members(self, numeric: Tensor, categories: Tensor) -> Tensor:
        """float32 [members, n]: each member's residual in units of ``unit``."""
        x = self.first(self.encode(numeric, categories))
        x = x.unflatten(1, (self.shape.members, self.shape.hidden[0])).transpose(0, 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.matmul(torch.relu(x), weight) + bias
        answer: Tensor = x.squeeze(2)
        return answer

    def forward(self, numeric: Tensor, categories: Tensor, anchor: Tensor, scale: Tensor) -> Tensor:
        residual = self.members(numeric, categories).mean(dim=0).double() * self.unit
        if self.shape.transform == "log":
            return anchor * torch.exp(scale * residual)
        return anchor + scale * residual


def residual_target(transform: Transform, target: np.ndarray, anchor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What the network must answer: (f(target) - f(anchor)) / scale; NaN where that is not defined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if transform == "log":
            change = np.log(target) - np.log(anchor)
        else:
            change = target - anchor
        residual = change / scale
    return np.where(np.isfinite(residual) & (scale > 0), residual, np.nan)
