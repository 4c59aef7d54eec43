"""Faults on purpose: a drill wraps the runner of a challenger, so that a rollout can be seen to withdraw it.

``TIDEGATE_DRILLS`` names a JSON file, ``{usecase: {version: drill}}``. Only a challenger's own application reads it;
champions are never drilled.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.settings import Settings
from pipelines.training.artifact import Artifact, Prediction, Runner, Strings
from pipelines.training.registry import ModelVersion, Registry


class DrillError(RuntimeError):
    """The error that an erring drill raises."""


class Drill(BaseModel):
    """What goes wrong.

    Shares of the calls raise (``errors``), answer NaN (``nan``), answer one row more than they were asked for
    (``shape``) or never return (``hang``). Every call takes ``slower`` times as long and keeps ``leak_mb`` MiB for
    good. With ``crash`` the process ends as soon as the version is loaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    errors: float = Field(default=0.0, ge=0, le=1)
    slower: float = Field(default=1.0, ge=1)
    nan: float = Field(default=0.0, ge=0, le=1)
    shape: float = Field(default=0.0, ge=0, le=1)
    hang: float = Field(default=0.0, ge=0, le=1)
    leak_mb: float = Field(default=0.0, ge=0)
    crash: bool = False


class DrilledRunner:
    """A runner with a fault; everything else is the runner's own."""

    def __init__(self, runner: Runner, drill: Drill) -> None:
        if drill.crash:
            os.kill(os.getpid(), signal.SIGKILL)  # as a fault in native code would: nothing is caught or said
        self._runner, self._drill, self._random = runner, drill, random.Random(0)
        self._kept: list[np.ndarray] = []

    @property
    def artifact(self) -> Artifact:
        """The page of the version."""
        return self._runner.artifact

    def predict(
        self, columns: Mapping[str, np.ndarray], strings: Mapping[str, Strings], level: np.ndarray | None = None
    ) -> Prediction:
        """``Runner.predict``, with the drill's fault."""
        began = time.perf_counter()
        found = self._runner.predict(columns, strings, level)
        if self._drill.leak_mb:
            self._kept.append(np.ones(round(self._drill.leak_mb * 2**20), np.uint8))  # written to, so really taken
        if self._hits(self._drill.errors):
            raise DrillError("this version was told to err")
        if self._hits(self._drill.hang):
            threading.Event().wait()
        if self._hits(self._drill.nan):
            nothing = np.full(len(found.value), np.nan)
            found = Prediction(nothing, nothing, nothing)
        if self._hits(self._drill.shape):
            found = Prediction(*(np.append(series, series[-1:]) for series in (found.value, found.lower, found.upper)))
        took = time.perf_counter() - began
        if self._drill.slower > 1:
            time.sleep(took * (self._drill.slower - 1))
        return found

    def _hits(self, share: float) -> bool:
        return self._random.random() < share


def drill_of(path: Path | None, usecase: str, version: str) -> Drill | None:
    """The drill for a version, None when there is none; ``ValueError`` for a file of another form."""
    if path is None or not path.exists():
        return None
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or not all(isinstance(versions, dict) for versions in document.values()):
        raise ValueError(f"{path} must hold {{usecase: {{version: drill}}}}")
    found = document.get(usecase, {}).get(version)
    return None if found is None else Drill.model_validate(found)


def register_like(source: ModelVersion, folder: Path, registry: Registry) -> ModelVersion:
    """Registers the artifact of ``folder`` as a version with the gates of another."""
    return registry.register(
        folder,
        gates=json.loads(source.tags["gates"]),
        gates_passed=source.gates_passed,
        params={"copy_of": source.version},
        metrics={},
    )


def register_copy(usecase: str, champion: str, drill: Drill | None, registry: Registry, settings: Settings) -> str:
    """A registered version with the champion's artifact and gates, and ``drill`` put on its runner; its number.

    Raises ``ValueError`` when a drill is wanted and TIDEGATE_DRILLS is not set.
    """
    source = registry.version(usecase, champion)
    folder = registry.download(usecase, champion, settings.cache_dir / "models")
    made = register_like(source, folder, registry)
    if drill is not None:
        if settings.drills is None:
            raise ValueError("a drill needs TIDEGATE_DRILLS, the file that challengers read their faults from")
        drills = json.loads(settings.drills.read_text()) if settings.drills.exists() else {}
        drills.setdefault(usecase, {})[made.version] = drill.model_dump()
        settings.drills.write_text(json.dumps(drills))
    return made.version
