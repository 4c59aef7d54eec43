"""Loads one model version so that it can answer: fetched, tried in a process of its own, checked against the code.

A version that was trained on a view this code does not compute is refused: code comes first, then the model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from cluster.settings import Settings
from pipelines.features.windows import pages
from pipelines.spec import UseCase
from pipelines.training.artifact import Artifact, ArtifactError, Prediction, Runner, load, verify, verify_apart
from pipelines.training.normals import NORMALS, Normals, NormalsError, read_normals
from pipelines.training.registry import Registry, RegistryError, fetched
from serving.fallback import Ladder, ladder_of

_PAST_CALLS = 501
_WARM_CALLS = 50
T = TypeVar("T")


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
class DescribedVersion:
    """What it takes to make a version's rows, and nothing to answer them: its page and its fallback ladder."""

    version: str
    artifact: Artifact
    ladder: Ladder | None


@dataclass(frozen=True)
class LoadedVersion:
    """A version that has answered trial rows in this process: its fallback ladder, None without one, and how long its
    last calls took (seconds).
    """

    version: str
    runner: Runner
    ladder: Ladder | None
    past: deque[float] = field(default_factory=lambda: deque(maxlen=_PAST_CALLS))

    @property
    def artifact(self) -> Artifact:
        """The version's page."""
        return self.runner.artifact

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

    def tried(directory: Path) -> Runner:
        if apart:
            verify_apart(directory)
        verify(directory)
        return Runner(directory)

    runner = _fetch(use_case, version, settings, tried)
    loaded = LoadedVersion(version, runner, _ladder(use_case, version, runner.artifact, runner.normals))
    for _ in range(_WARM_CALLS):
        loaded.predict(trial_rows(loaded.artifact, 1))
    return loaded


def describe_version(use_case: UseCase, version: str, settings: Settings) -> DescribedVersion:
    """Downloads the version and reads what its rows are made by; raises ``VersionRefused`` as ``load_version`` does."""

    def read(directory: Path) -> tuple[Artifact, Normals | None]:
        artifact = load(directory)
        return artifact, read_normals(directory) if NORMALS in artifact.digests else None

    artifact, normals = _fetch(use_case, version, settings, read)
    return DescribedVersion(version, artifact, _ladder(use_case, version, artifact, normals))


def _fetch(use_case: UseCase, version: str, settings: Settings, read: Callable[[Path], T]) -> T:
    """What ``read`` makes of the version's directory."""
    try:
        place = settings.cache_dir / "models"
        known = fetched(use_case.name, version, place)
        return read(known or Registry(settings).download(use_case.name, version, place))
    except (ArtifactError, NormalsError, RegistryError, SQLAlchemyError, OSError) as error:
        raise VersionRefused(f"version {version} of {use_case.name!r} does not load: {error}") from error


def _ladder(use_case: UseCase, version: str, artifact: Artifact, normals: Normals | None) -> Ladder | None:
    """The version's ladder; refuses one whose view the page does not have, or that has columns which its view has not.

    Rows are made in gateways, so what cannot be made has to show before a request needs it.
    """
    known = pages(use_case)
    if artifact.view not in known:
        raise VersionRefused(
            f"version {version} of {use_case.name!r} was trained on view {artifact.view}, and this code computes "
            f"{' and '.join(known)}: keep that view on the page (UseCase.kept), deploy the code that the version was "
            "trained with, or train a version with this code"
        )
    view = known[artifact.view].view
    has = {artifact.entity, *view.stored, *view.inputs, *view.calendar_columns, *(made.name for made in view.derived)}
    wanted = {*artifact.numeric, *artifact.categorical, *filter(None, (artifact.anchor, artifact.scale))}
    if missing := sorted(wanted - has):
        raise VersionRefused(f"version {version} of {use_case.name!r} needs {missing}, which its view does not compute")
    try:
        return ladder_of(known[artifact.view], artifact, normals)
    except ValueError as error:
        raise VersionRefused(str(error)) from error


def trial_rows(artifact: Artifact, count: int) -> Rows:
    """Made-up rows: ones, and strings that no vocabulary has."""
    names = {*artifact.numeric, *(name for name in (artifact.anchor, artifact.scale) if name)}
    strings: dict[str, list[Any]] = {name: ["?"] * count for name in (*artifact.categorical, artifact.entity)}
    return Rows({name: np.ones(count) for name in names}, strings, np.zeros(count, np.uint8), count)
