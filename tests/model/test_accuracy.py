"""On real district demand a model that is trained in seconds is accurate, fair to every district, and
behaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from pipelines.features.offline import build_examples
from pipelines.spec import UseCase
from pipelines.train import make_artifact, validate
from pipelines.training.artifact import Runner
from pipelines.training.dataset import Frame, Parts, frame_of, split
from pipelines.training.fit import Snapshot, fit_local
from pipelines.validation.report import Report
from tests.model import demand


@dataclass(frozen=True)
class Trained:
    use_case: UseCase
    parts: Parts
    runner: Runner
    report: Report


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    case = demand.use_case(hidden=(32, 16), epochs=6, batch_size=512)
    frame = frame_of(case, build_examples(case, demand.events(case, districts=5, days=420)))
    parts = split(frame, case.model)
    fitted = fit_local(case.model, parts.train, parts.calibration)
    folder = tmp_path_factory.mktemp("model")
    make_artifact(case, fitted, parts, Snapshot(0, 0, "test"), folder)
    runner = Runner(folder)
    return Trained(case, parts, runner, validate(case, runner, parts.test))


def test_it_beats_last_week_by_a_tenth_beyond_chance(trained: Trained) -> None:
    (gate,) = trained.report.gates
    assert trained.report.passed
    assert gate.upper <= 0.9


def test_the_baseline_against_itself_does_not_pass(trained: Trained) -> None:
    class Baseline:
        def predict(self, columns: dict, strings: dict) -> object:
            found = trained.runner.predict(columns, strings)
            return type(found)(columns["last_week"], found.lower, found.upper)

    gates = tuple(gate.model_copy(update={"max_ratio": 0.99}) for gate in trained.use_case.gates)
    strict = trained.use_case.model_copy(update={"gates": gates})
    assert validate(strict, trained.runner, trained.parts.test).passed
    assert not validate(strict, Baseline(), trained.parts.test).passed  # type: ignore[arg-type]


def test_no_district_is_served_worse_than_by_last_week(trained: Trained) -> None:
    test = trained.parts.test
    baseline = test.columns["last_week"]
    for name, figures in trained.report.by_entity.items():
        rows = (test.entity == name) & np.isfinite(baseline)
        assert figures.mae <= np.abs(baseline - test.label)[rows].mean(), name


def test_intervals_hold_about_as_many_outcomes_as_intended_in_every_district(trained: Trained) -> None:
    assert 0.82 <= trained.report.test.coverage <= 0.97
    for name, figures in trained.report.by_entity.items():
        assert 0.7 <= figures.coverage <= 1.0, name


def changed(frame: Frame, **columns: float) -> dict[str, np.ndarray]:
    return frame.columns | {name: np.full(len(frame), value) for name, value in columns.items()}


def test_an_unknown_district_gets_an_answer_near_its_anchor(trained: Trained) -> None:
    test = trained.parts.test
    strings = {name: ["dma_999"] * len(test) for name in test.strings}
    found = trained.runner.predict(test.columns, strings)
    answered = np.isfinite(test.columns["last_week"])
    change = np.abs(found.value - test.columns["last_week"]) / test.columns["inflow_mean_7d"]
    assert np.isfinite(found.value[answered]).all()
    assert np.quantile(change[answered], 0.99) < 0.6


def test_missing_weather_changes_an_answer_little_and_never_to_nothing(trained: Trained) -> None:
    test = trained.parts.test
    whole = trained.runner.predict(test.columns, test.strings).value
    part = trained.runner.predict(changed(test, temperature=np.nan, warmer=np.nan, rain=np.nan), test.strings).value
    assert np.isfinite(part).tolist() == np.isfinite(whole).tolist()
    usable = np.isfinite(whole)
    assert np.mean(np.abs(part - whole)[usable] / test.columns["inflow_mean_7d"][usable]) < 0.15


def test_an_absurd_forecast_is_not_followed_without_bound(trained: Trained) -> None:
    test = trained.parts.test
    hot = trained.runner.predict(changed(test, temperature=1e6, warmer=1e6), test.strings).value
    usable = np.isfinite(hot)
    assert (np.abs(hot - test.columns["last_week"])[usable] < 5 * test.columns["inflow_mean_7d"][usable]).all()
