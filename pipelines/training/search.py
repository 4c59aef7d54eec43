"""Tries a small space of model settings with Ray Tune and says which one errs least on rows held out from training.

Calibration and test rows are never looked at, so what is chosen here still has to pass its gates on unseen rows.
"""

from __future__ import annotations

import math
import random
import shutil
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.settings import Settings
from pipelines.spec import ModelSpec, SearchSpace, UseCase
from pipelines.spec.base import microseconds
from pipelines.training.dataset import Frame
from pipelines.training.fit import batch_of, fit_local
from pipelines.validation.metrics import Metric, finish, row_losses


class SearchError(RuntimeError):
    """No trial gave a usable model, or there is nothing to judge them on; the message says what to do."""


@dataclass(frozen=True)
class Trial:
    """One combination of settings; ``error`` is the metric on the held-out rows, NaN when there is a ``failure``."""

    settings: dict[str, Any]
    error: float
    seconds: float
    failure: str | None = None


@dataclass(frozen=True)
class Search:
    """What was tried, the page's own settings first. ``chosen`` are the model fields to change, empty for none."""

    chosen: dict[str, Any]
    metric: Metric
    trials: tuple[Trial, ...]
    train_rows: int
    holdout_rows: int

    def to_json(self) -> dict[str, Any]:
        """The search as JSON values; an error that could not be taken is null."""
        return {
            "chosen": _plain(self.chosen),
            "metric": self.metric,
            "train_rows": self.train_rows,
            "holdout_rows": self.holdout_rows,
            "trials": [
                {
                    "settings": _plain(trial.settings),
                    "error": trial.error if math.isfinite(trial.error) else None,
                    "seconds": trial.seconds,
                    "failure": trial.failure,
                }
                for trial in self.trials
            ],
        }


def candidates(model: ModelSpec, space: SearchSpace, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """The settings that are tried: the page's own, then others of the space in a random order that ``seed`` fixes."""
    own = {name: getattr(model, name) for name in space.choices}
    others = [one for one in space.combinations if one != own]
    random.Random(seed).shuffle(others)
    return (own, *others[: space.trials - 1])


def with_settings(use_case: UseCase, settings: dict[str, Any]) -> UseCase:
    """The use case with these fields of its model, checked as a page is; ``ValidationError`` if they do not fit."""
    # Not model_copy: it checks nothing, and carries over whatever was computed from the old fields.
    model = ModelSpec(**{name: getattr(use_case.model, name) for name in ModelSpec.model_fields} | settings)
    return UseCase(**{name: getattr(use_case, name) for name in UseCase.model_fields} | {"model": model})


def hold_out(train: Frame, model: ModelSpec, space: SearchSpace) -> tuple[Frame, Frame]:
    """The train part before its last ``space.holdout``, and that; no outcome of the first is known after the second
    began. Raises ``SearchError`` when either is empty.
    """
    held = train.time_us > int(train.time_us.max()) - microseconds(space.holdout)
    horizon = microseconds(model.target.horizon)
    early = train.time_us + horizon <= int(train.time_us[held].min())
    if not early.any():
        days = (train.time_us.max() - train.time_us.min()) / 86_400e6
        raise SearchError(
            f"a holdout of {space.holdout} leaves nothing of {days:.1f} days of training rows to fit on: shorten "
            "SearchSpace.holdout or load more history"
        )
    return train.take(early), train.take(held)


def search(
    use_case: UseCase,
    space: SearchSpace,
    train: Frame,
    *,
    settings: Settings,
    run_name: str | None = None,
) -> Search:
    """Fit every candidate on the early part of ``train`` and judge it on the rest; Ray must be connected.

    Trials run one after the other with one CPU each: a handful of short fits gains nothing from halving, which would
    have to compare fits in the middle of their learning-rate schedules. The metric is that of the first gate (without
    gates, mae). A trial that fails is reported; ``SearchError`` when all do. What an interrupted run of the same
    ``run_name`` left is removed first, and nothing is left at the end.
    """
    import ray
    from ray import tune

    if not ray.is_initialized():
        raise RuntimeError("a search needs a Ray cluster: connect first (cluster.session.connect)")
    model = use_case.model
    metric: Metric = use_case.gates[0].metric if use_case.gates else "mae"
    early, held = hold_out(_slim(model, train), model, space)
    tried = candidates(model, space, model.seed)
    models = [with_settings(use_case, one).model for one in tried]
    name = run_name or f"{use_case.name}-{uuid.uuid4().hex[:12]}"
    storage = settings.home / "search"
    shutil.rmtree(storage / name, ignore_errors=True)
    try:
        fitted = tune.with_parameters(_trial, models=models, metric=metric, early=early, held=held)
        results = tune.Tuner(
            tune.with_resources(fitted, {"cpu": 1}),
            param_space={"place": tune.grid_search(list(range(len(models))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(name=name, storage_path=str(storage), verbose=0),
        ).fit()
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)
    trials: list[Trial | None] = [None] * len(tried)
    for result in (results[number] for number in range(len(results))):
        place = int((result.config or {})["place"])
        figures = result.metrics or {}
        if result.error is None and math.isfinite(figures.get("error", math.nan)):
            trials[place] = Trial(tried[place], float(figures["error"]), float(figures["seconds"]))
        else:
            told = str(result.error or "").strip().splitlines() or ["the error was not finite"]
            trials[place] = Trial(tried[place], math.nan, math.nan, told[-1])
    found = tuple(trial for trial in trials if trial is not None)
    good = [trial for trial in found if trial.failure is None]
    if not good:
        raise SearchError(
            f"use case {use_case.name!r}: all {len(found)} trials failed, the first with: "
            f"{found[0].failure if found else 'Ray Tune gave no results'}"
        )
    best = min(good, key=lambda trial: trial.error)
    changes = {field: value for field, value in best.settings.items() if value != getattr(model, field)}
    return Search(changes, metric, found, len(early), len(held))


def error_of(model: ModelSpec, metric: Metric, train: Frame, held: Frame) -> tuple[float, float]:
    """``metric`` on ``held`` of ``model`` fitted on ``train``, and the seconds that the fit took.

    Held-out rows without a usable anchor or scale count for no candidate, and are the same for all of them.
    """
    fitted = fit_local(model, train, held)
    rows = batch_of(model, fitted.vocabularies, held)
    if not len(rows.residual):
        raise SearchError("none of the held-out rows has a usable label, anchor and scale")
    with torch.no_grad():
        given = (torch.from_numpy(values) for values in rows.inputs().values())
        value = fitted.network(*given).numpy()
    change = rows.scale * rows.residual
    actual = rows.anchor * np.exp(change) if model.transform == "log" else rows.anchor + change
    return finish(metric, float(row_losses(metric, actual, value).mean())), fitted.seconds


def _trial(config: dict[str, Any], *, models: list[ModelSpec], metric: Metric, early: Frame, held: Frame) -> None:
    """Runs inside Ray Tune."""
    from ray import tune

    error, seconds = error_of(models[config["place"]], metric, early, held)
    tune.report({"error": error, "seconds": round(seconds, 3)})


def _slim(model: ModelSpec, frame: Frame) -> Frame:
    """Only the columns that a fit reads: the frame travels through Ray's object store."""
    names = {*model.numeric, *(name for name in (model.anchor, model.scale) if name)}
    columns = {name: values for name, values in frame.columns.items() if name in names}
    strings = {name: values for name, values in frame.strings.items() if name in model.categorical}
    return Frame(frame.time_us, frame.label, frame.entity, columns, strings)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
