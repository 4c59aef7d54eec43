"""On real district demand a model that is trained in seconds is accurate, fair to every district, and
behaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from pipelines.features import derived
from pipelines.features.offline import build_examples, silenced
from pipelines.spec import UseCase
from pipelines.train import make_artifact, validate
from pipelines.training.artifact import Level, Prediction, Runner
from pipelines.training.dataset import Frame, Parts, frame_of, split
from pipelines.training.fit import Snapshot, fit_local
from pipelines.training.normals import season_normals
from pipelines.validation.report import Report
from tests.model import demand


@dataclass(frozen=True)
class Trained:
    use_case: UseCase
    parts: Parts
    runner: Runner
    report: Report
    events: pa.Table


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    case = demand.use_case(hidden=(32, 16), epochs=6, batch_size=512)
    events = demand.events(case, districts=5, days=420)
    frame = frame_of(case, build_examples(case, events))
    parts = split(frame, case.model)
    fitted = fit_local(case.model, parts.train, parts.calibration)
    folder = tmp_path_factory.mktemp("model")
    make_artifact(case, fitted, parts, Snapshot(0, 0, "test"), folder, events=events)
    runner = Runner(folder)
    return Trained(case, parts, runner, validate(case, runner, parts.test), events)


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
    assert not validate(strict, Baseline(), trained.parts.test).passed


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


HOUR = 3_600_000_000


def answer_from(trained: Trained, stored: np.ndarray, level: Level) -> Prediction:
    """The test rows' answers when state gives ``stored``."""
    view, test = trained.use_case.view, trained.parts.test
    columns = derived.columns(view, stored, {name: test.columns[name] for name in view.inputs}, test.time_us)
    return trained.runner.predict(columns, test.strings, np.full(len(test), level, np.uint8))


def coverage_of(trained: Trained, found: Prediction) -> float:
    answered = np.isfinite(found.value)
    label = trained.parts.test.label
    return float(((found.lower <= label) & (label <= found.upper))[answered].mean())


@pytest.mark.parametrize("hours", [6, 13, 18, 24])
def test_an_answer_from_held_values_is_as_sure_as_it_says(trained: Trained, hours: int) -> None:
    test = trained.parts.test
    stored = silenced(trained.use_case, trained.events, test.entity, test.time_us, hours * HOUR)
    held = answer_from(trained, stored, Level.HELD)
    assert np.isfinite(held.value).mean() > 0.98
    assert coverage_of(trained, held) >= 0.87
    fresh = trained.runner.predict(test.columns, test.strings)
    wider = np.nanmean(held.upper - held.lower) / np.nanmean(fresh.upper - fresh.lower)
    assert 1.05 <= wider <= 3


def test_an_answer_from_season_s_normals_is_as_sure_as_it_says(trained: Trained) -> None:
    test, normals = trained.parts.test, trained.runner.normals
    assert normals is not None
    found = answer_from(trained, normals.at(test.entity, test.time_us), Level.NORMAL)
    assert np.isfinite(found.value).all()
    assert coverage_of(trained, found) >= 0.8


def test_no_rung_of_the_ladder_is_surer_than_the_one_above_it(trained: Trained) -> None:
    fresh = trained.runner.artifact.calibration
    assert fresh is not None
    assert fresh.held is not None
    assert fresh.normal is not None
    assert fresh.held.everywhere > fresh.everywhere
    for above, below in ((fresh, fresh.held), (fresh.held, fresh.normal)):
        assert below.everywhere >= above.everywhere
        assert set(below.by_entity) >= set(above.by_entity)
        for name, width in below.by_entity.items():
            assert width >= above.by_entity.get(name, above.everywhere)


def test_normals_know_nothing_of_what_came_after_training(trained: Trained) -> None:
    normals, test = trained.runner.normals, trained.parts.test
    assert normals is not None
    again = season_normals(trained.use_case.fallback, trained.use_case.view.stored, trained.parts.train)
    assert np.array_equal(normals.values, again.values, equal_nan=True)
    assert trained.parts.train.time_us.max() < trained.parts.calibration.time_us.min() < test.time_us.min()
