"""The network's own preprocessing: missing, constant, extreme and unknown inputs, the anchor and the
transform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipelines.training.networks import Network, Shape, Transform, fit_preprocessing, residual_target


def network(numeric: np.ndarray, **options: Any) -> Network:
    shape = Shape(numeric=numeric.shape[1], categories=(3,), hidden=(16, 8), **options)
    torch.manual_seed(0)
    made = Network(shape).fitted(fit_preprocessing(numeric, np.ones(len(numeric)), shape.bins))
    with torch.no_grad():
        made.weights[-1].mul_(10)  # so that differences show
    return made.eval()


def answer(net: Network, numeric: Any, codes: Any = None, anchor: Any = None, scale: Any = None) -> np.ndarray:
    numeric = np.asarray(numeric, dtype=np.float64)
    n = len(numeric)
    codes = np.ones((n, 1), np.int64) if codes is None else np.asarray(codes, np.int64).reshape(n, 1)
    anchor = np.zeros(n) if anchor is None else np.asarray(anchor, np.float64)
    scale = np.ones(n) if scale is None else np.asarray(scale, np.float64)
    with torch.no_grad():
        return net(*(torch.from_numpy(part) for part in (numeric, codes, anchor, scale))).numpy()


def data(rows: int = 400) -> np.ndarray:
    return np.random.default_rng(0).normal(5, 3, size=(rows, 4))


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_a_missing_number_has_an_answer_of_its_own_not_that_of_the_mean(hole: float) -> None:
    numeric = data()
    net = network(numeric)
    row, mean = numeric[:1].copy(), numeric[:1].copy()
    row[0, 2], mean[0, 2] = hole, numeric[:, 2].mean()
    assert np.isfinite(answer(net, row)).all()
    assert abs(answer(net, row) - answer(net, mean))[0] > 1e-3
    encoded = net.encode(torch.from_numpy(row), torch.ones((1, 1), dtype=torch.int64))[0]
    assert encoded[4:8].tolist() == [0, 0, 1, 0]  # the flags stand after the four standardised numbers


def test_columns_that_are_constant_or_never_there_do_no_harm() -> None:
    numeric = data()
    numeric[:, 0], numeric[:, 1] = 7.0, np.nan
    net = network(numeric)
    assert np.isfinite(answer(net, numeric)).all()
    assert np.isfinite(answer(net, np.full((1, 4), 1e12))).all()


def test_a_column_far_from_zero_keeps_its_digits() -> None:
    # 1e9 ± 1 has no digits left in float32, so the standardisation must come before the cast.
    numeric = data()
    shifted = numeric.copy()
    shifted[:, 3] += 1e9
    assert answer(network(shifted), shifted) == pytest.approx(answer(network(numeric), numeric), abs=1e-4)


def test_units_of_a_column_do_not_matter() -> None:
    numeric = data()
    other = numeric * np.array([1.0, 1000.0, 0.001, 60.0])
    assert answer(network(other), other) == pytest.approx(answer(network(numeric), numeric), abs=1e-4)


def test_an_outlier_cannot_drive_the_answer_without_bound() -> None:
    numeric = data()
    net = network(numeric)
    far, further = numeric[:1].copy(), numeric[:1].copy()
    far[0, 1], further[0, 1] = 1e3, 1e9
    assert answer(net, far) == answer(net, further)


def test_an_unknown_category_has_a_slot_of_its_own() -> None:
    numeric = data()[:4]
    net = network(data())
    same = np.repeat(numeric[:1], 4, axis=0)
    assert len(set(answer(net, same, [0, 1, 2, 3]).tolist())) == 4


@pytest.mark.parametrize("transform", ["identity", "log"])
def test_an_answer_is_the_anchor_corrected_in_the_transformed_space(transform: Transform) -> None:
    numeric = data()[:3]
    net = network(data(), transform=transform)
    anchor, scale = np.array([10.0, 200.0, 3.0]), np.array([1.0, 0.5, 2.0])
    with torch.no_grad():
        raw = net.members(torch.from_numpy(numeric), torch.ones((3, 1), dtype=torch.int64)).mean(0).double()
    step = (raw * net.unit).numpy() * scale
    wanted = anchor * np.exp(step) if transform == "log" else anchor + step
    found = answer(net, numeric, anchor=anchor, scale=scale)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert residual_target(transform, found, anchor, scale) == pytest.approx(step / scale, abs=1e-9)


def test_residuals_that_are_not_defined_are_nan() -> None:
    label, anchor = np.array([1.0, 1.0, 0.0, 1.0, np.nan]), np.array([2.0, 0.0, 2.0, 2.0, 2.0])
    scale = np.array([1.0, 1.0, 1.0, -1.0, 1.0])
    assert np.isnan(residual_target("log", label, anchor, scale)).tolist() == [False, True, True, True, True]
    assert np.isnan(residual_target("identity", label, anchor, scale)).tolist() == [False] * 3 + [True] * 2


def test_one_row_answers_as_it_does_among_many() -> None:
    numeric = data(1000)
    net = network(numeric)
    many = answer(net, numeric)
    assert answer(net, numeric[500:501]) == pytest.approx(many[500:501], rel=1e-5)


def test_preprocessing_needs_rows() -> None:
    with pytest.raises(ValueError, match="no training rows"):
        fit_preprocessing(np.empty((0, 4)), np.empty(0), 8)
