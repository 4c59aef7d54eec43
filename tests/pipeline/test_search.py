"""The search tries what the page allows, on rows of the train part only, and survives trials that fail."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.settings import Settings
from pipelines.features.offline import build_examples
from pipelines.spec import SearchSpace, UseCase
from pipelines.spec.base import microseconds
from pipelines.training.dataset import Frame, frame_of, split
from pipelines.training.search import SearchError, candidates, error_of, hold_out, search, with_settings
from tests.model import demand

SPACE = SearchSpace(learning_rate=(2e-3, 1e30), epochs=(2,), trials=3, holdout=timedelta(days=10))


@pytest.fixture(scope="module")
def case() -> UseCase:
    return demand.use_case(epochs=1)


@pytest.fixture(scope="module")
def train(case: UseCase) -> Frame:
    return split(frame_of(case, build_examples(case, demand.events(case, districts=1, days=110))), case.model).train


def test_the_pages_own_settings_come_first_and_nothing_is_tried_twice(case: UseCase) -> None:
    space = SearchSpace(learning_rate=(2e-3, 4e-3, 8e-3), epochs=(1, 2), hidden=((16, 8), (8,)), trials=5)
    tried = candidates(case.model, space)
    assert tried[0] == {"learning_rate": 2e-3, "epochs": 1, "hidden": (16, 8)}
    assert len(tried) == 5
    assert len({str(one) for one in tried}) == 5
    assert candidates(case.model, space) == tried
    assert candidates(case.model, space, seed=1)[1:] != tried[1:]
    outside = SearchSpace(learning_rate=(1.0,), trials=9)
    assert candidates(case.model, outside) == ({"learning_rate": 2e-3}, {"learning_rate": 1.0})
    assert candidates(case.model, SearchSpace()) == ({},)


def test_chosen_settings_make_a_checked_use_case(case: UseCase) -> None:
    changed = with_settings(case, {"epochs": 9, "hidden": (4,)})
    assert (changed.model.epochs, changed.model.hidden) == (9, (4,))
    assert changed.model_copy(update={"model": case.model}) == case
    with pytest.raises(ValidationError):
        with_settings(case, {"epochs": "many"})
    with pytest.raises(ValidationError):
        with_settings(case, {"speed": 1})


def test_held_out_rows_are_the_last_and_no_fitted_outcome_reaches_into_them(case: UseCase, train: Frame) -> None:
    early, held = hold_out(train, case.model, SPACE)
    assert held.time_us.max() == train.time_us.max()
    assert held.time_us.max() - held.time_us.min() < microseconds(SPACE.holdout)
    assert early.time_us.max() + microseconds(case.model.target.horizon) <= held.time_us.min()
    with pytest.raises(SearchError, match="shorten"):
        hold_out(train, case.model, SearchSpace(holdout=timedelta(days=999)))


def test_the_error_is_in_the_unit_of_the_target(case: UseCase, train: Frame) -> None:
    early, held = hold_out(train, case.model, SPACE)
    untrained = with_settings(case, {"learning_rate": 0.0}).model
    error, _ = error_of(untrained, "mae", early, held)
    # A network that has learnt nothing stays near its anchor, last week.
    anchor = np.nanmean(np.abs(held.columns["last_week"] - held.label))
    assert error == pytest.approx(anchor, rel=0.2)


def test_trials_are_judged_on_held_out_rows_and_a_failing_one_is_only_reported(
    ray_cluster: None, case: UseCase, train: Frame, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path)
    litter = tmp_path / "search" / "mine" / "half-done"
    litter.mkdir(parents=True)
    case = with_settings(case, {"learning_rate": 1.0})  # a page that asks for a poor model
    found = search(case, SPACE, train, settings=settings, run_name="mine")
    early, held = hold_out(train, case.model, SPACE)
    assert (found.train_rows, found.holdout_rows, found.metric) == (len(early), len(held), "mae")
    own, *others = found.trials
    assert own.settings == {"learning_rate": 1.0, "epochs": 1}
    assert own.error == pytest.approx(error_of(case.model, "mae", early, held)[0], rel=1e-6)
    failed = next(trial for trial in others if trial.settings["learning_rate"] == 1e30)
    assert "lower learning_rate" in (failed.failure or "")
    better = next(trial for trial in others if trial.settings["learning_rate"] == 2e-3)
    assert better.error < own.error
    assert found.chosen == {"epochs": 2, "learning_rate": 2e-3}
    document = found.to_json()
    assert [trial["error"] for trial in document["trials"]] == [
        None if trial.failure else trial.error for trial in found.trials
    ]
    assert list((tmp_path / "search").iterdir()) == []

    hopeless = with_settings(case, {"learning_rate": 1e30})
    with pytest.raises(SearchError, match="all 1 trials failed"):
        search(hopeless, SearchSpace(holdout=SPACE.holdout), train, settings=settings)
    assert list((tmp_path / "search").iterdir()) == []
