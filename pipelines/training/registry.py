"""Model versions in MLflow: logged once, found by number, fetched to a directory. Aliases here decide
nothing.

Which version serves is the release journal's to say; the aliases only show it to people who look into MLflow.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.settings import Settings
from pipelines.training.artifact import Artifact, load

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIASES = ("champion", "challenger", "previous")
_FOLDER = "artifact"
_TELEMETRY_OFF = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A first use of a SQLite store logs each of its migrations otherwise.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def without_telemetry() -> None:
    """Tell MLflow and Ray, before they are imported or started, to report nothing to anyone."""
    os.environ.update(_TELEMETRY_OFF)


@dataclass(frozen=True)
class ModelVersion:
    """A registered version. ``gates_passed`` is what validation said, ``tags`` all that was noted with it."""

    model: str
    version: str
    run_id: str
    source: str
    gates_passed: bool
    tags: dict[str, str]


class RegistryError(RuntimeError):
    """The registry does not answer, does not hold what was asked for, or holds it damaged; the message says which."""


def fetched(model: str, version: str, directory: Path | str) -> Path | None:
    """Where ``Registry.download`` has put a version before, its digests checked; None when it has not.

    It spares a process MLflow, whose import takes seconds. Raises ``ArtifactError`` for a damaged one.
    """
    target = Path(directory) / model / version
    if not target.exists():
        return None
    load(target)
    return target


class Registry:
    """The registry of ``settings.mlflow_url``. Opening it creates its schema, which takes seconds the first
    time.
    """

    def __init__(self, settings: Settings) -> None:
        without_telemetry()
        from mlflow import MlflowClient

        if settings.mlflow_url.startswith("file:"):
            raise RegistryError(
                f"{settings.mlflow_url}: MLflow's file store holds no registry; use sqlite:/// or a server"
            )
        settings.home.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._client: MlflowClient = MlflowClient(settings.mlflow_url, settings.mlflow_url)

    def register(
        self,
        directory: Path | str,
        *,
        gates: Mapping[str, Any],
        gates_passed: bool,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> ModelVersion:
        """Log a run with the artifact of ``directory``; register it as the next version of its use case."""
        artifact = load(directory)
        run = self._client.create_run(self._experiment(artifact.use_case))
        run_id = run.info.run_id
        for name, value in params.items():
            self._client.log_param(run_id, name, value)
        for name, figure in metrics.items():
            self._client.log_metric(run_id, name, figure)
        self._client.log_artifacts(run_id, str(directory), _FOLDER)
        self._client.set_terminated(run_id, "FINISHED")
        self._ensure_model(artifact.use_case)
        made = self._client.create_model_version(
            artifact.use_case,
            source=f"{run.info.artifact_uri}/{_FOLDER}",
            run_id=run_id,
            tags=_tags(artifact, gates, gates_passed),
        )
        return self.version(artifact.use_case, str(made.version))

    def version(self, model: str, version: str) -> ModelVersion:
        """What is noted of a version; ``RegistryError`` when there is none."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_model_version(model, version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise RegistryError(f"the registry does not answer: {error}") from error
            raise RegistryError(f"the registry has no version {version} of {model!r}") from error
        tags = dict(found.tags)
        return ModelVersion(
            model, version, found.run_id or "", found.source or "", tags.get("gates_passed") == "true", tags
        )

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model, the oldest first."""
        found = self._client.search_model_versions(f"name = '{model}'")
        return [self.version(model, number) for number in sorted((str(v.version) for v in found), key=int)]

    def download(self, model: str, version: str, directory: Path | str) -> Path:
        """The artifact's directory below ``directory``, fetched once; its digests are checked either way.

        Two callers may fetch one version at once: each fetches beside the place and the first to be done
        moves in.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        target = Path(directory) / model / version
        if not target.exists():
            entry = self.version(model, version)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=target.parent))
            try:
                try:
                    fetched = download_artifacts(
                        artifact_uri=entry.source, dst_path=str(beside), tracking_uri=self._settings.mlflow_url
                    )
                except MlflowException as error:
                    raise RegistryError(f"version {version} of {model!r} cannot be fetched: {error}") from error
                load(fetched)
                try:
                    Path(fetched).rename(target)
                except OSError:
                    if not target.exists():  # otherwise another caller was first
                        raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        load(target)
        return target

    def show_aliases(self, model: str, aliases: Mapping[str, str]) -> None:
        """Make MLflow's aliases champion, challenger and previous those of ``aliases``, and no others of the
        three.
        """
        if odd := sorted(set(aliases) - set(ALIASES)):
            raise ValueError(f"aliases {odd} are unknown; there are {list(ALIASES)}")
        for alias in ALIASES:
            if alias in aliases:
                self._client.set_registered_model_alias(model, alias, aliases[alias])
            else:
                self._client.delete_registered_model_alias(model, alias)

    def aliases(self, model: str) -> dict[str, str]:
        """The aliases as MLflow shows them: name to version."""
        return {name: str(version) for name, version in self._client.get_registered_model(model).aliases.items()}

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, f"{self._settings.mlflow_artifacts}/{name}")
            except MlflowException as error:
                found = self._client.get_experiment_by_name(name)  # made by another process meanwhile
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
        return found.experiment_id

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _tags(artifact: Artifact, gates: Mapping[str, Any], gates_passed: bool) -> dict[str, str]:
    return {
        "contract": f"{artifact.contract} {artifact.contract_version}",
        "view": artifact.view,
        "code": artifact.code,
        "snapshot": json.dumps(artifact.snapshot, sort_keys=True),
        "gates": json.dumps(gates, sort_keys=True),
        "gates_passed": "true" if gates_passed else "false",
    }
