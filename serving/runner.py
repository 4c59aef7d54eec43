"""Loads one model version so that it can answer: fetched, tried in a process of its own, checked against the code.

A version that was trained on a view this code does not compute is refused: code comes first, then the model.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from cluster.settings import Settings
from pipelines.features.windows import view_fingerprint
from pipelines.spec import UseCase
from pipelines.training.artifact import Artifact, ArtifactError, Prediction, Runner, verify, verify_apart
from pipelines.training.registry import Registry, RegistryError, fetched
from serving.fallback import Ladder, ladder_of

_PAST_CALLS = 501
_WARM_CALLS = 50


class VersionRefused(RuntimeError):
    """The version cannot answer here; the message says why."""


@dataclass(frozen=True)
class Rows:
    """The arguments of ``Runner.predict`` for ``count`` instances."""

    columns: dict[str, np.ndarray]
    strings: dict[str, list[Any]]
    level: np.ndarray
    count: int


@dataclass(frozen=True)
class LoadedVersion:
    """A version that has answered trial rows in this process: its fallback ladder, None without one, and how long its
    last calls took (seconds).
    """

    version: str
    runner: Runner
    ladder: Ladder | None
    past: deque[float] = field(default_factory=lambda: deque(maxlen=_PAST_CALLS))

    def predict(self, rows: Rows) -> tuple[Prediction, float]:
        """``Runner.predict`` and the seconds it took."""
        began = time.perf_counter()
        found = self.runner.predict(rows.columns, rows.strings, rows.level)
        took = time.perf_counter() - began
        self.past.append(took)
        return found, took

    def median_s(self) -> float:
        """The median time of the last calls inside the runner."""
        return median(self.past)


def load_version(use_case: UseCase, version: str, settings: Settings, *, apart: bool = True) -> LoadedVersion:
    """Downloads, tries and warms the version; raises ``VersionRefused``, also when the registry does not answer.

    It is tried in a process of its own first, unless this one may die of it (``apart`` False).
    """
    try:
        place = settings.cache_dir / "models"
        known = fetched(use_case.name, version, place)
        directory = known or Registry(settings).download(use_case.name, version, place)
        if apart:
            verify_apart(directory)
        artifact = verify(directory)
    except (ArtifactError, RegistryError, SQLAlchemyError, OSError) as error:
        raise VersionRefused(f"version {version} of {use_case.name!r} does not load: {error}") from error
    expected = view_fingerprint(use_case.view, use_case.contract)
    if artifact.view != expected:
        raise VersionRefused(
            f"version {version} of {use_case.name!r} was trained on view {artifact.view}, and this code computes "
            f"{expected}: deploy the code it was trained with first, or train a version with this code"
        )
    runner = Runner(directory)
    try:
        ladder = ladder_of(use_case, artifact, runner.normals)
    except ValueError as error:
        raise VersionRefused(str(error)) from error
    loaded = LoadedVersion(version, runner, ladder)
    for _ in range(_WARM_CALLS):
        loaded.predict(trial_rows(artifact, 1))
    return loaded


def trial_rows(artifact: Artifact, count: int) -> Rows:
    """Made-up rows: ones, and strings that no vocabulary has."""
    names = {*artifact.numeric, *(name for name in (artifact.anchor, artifact.scale) if name)}
    strings: dict[str, list[Any]] = {name: ["?"] * count for name in (*artifact.categorical, artifact.entity)}
    return Rows({name: np.ones(count) for name in names}, strings, np.zeros(count, np.uint8), count)
