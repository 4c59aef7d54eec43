"""Loads one model version so that it can answer: fetched, tried in a process of its own, checked against the code.

A version that was trained on a view this code does not compute is refused: code comes first, then the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings import Settings
from pipelines.features.windows import view_fingerprint
from pipelines.spec import UseCase
from pipelines.training.artifact import ArtifactError, Runner, verify, verify_apart
from pipelines.training.registry import Registry, RegistryError


class VersionRefused(RuntimeError):
    """The version cannot answer here; the message says why."""


@dataclass(frozen=True)
class LoadedVersion:
    """A version that has answered trial rows in this process."""

    version: str
    runner: Runner


def load_version(use_case: UseCase, version: str, settings: Settings) -> LoadedVersion:
    """Downloads, tries and warms the version; raises ``VersionRefused``."""
    try:
        directory = Registry(settings).download(use_case.name, version, settings.cache_dir / "models")
        artifact = verify_apart(directory)
    except (ArtifactError, RegistryError) as error:
        raise VersionRefused(f"version {version} of {use_case.name!r} does not load: {error}") from error
    expected = view_fingerprint(use_case.view, use_case.contract)
    if artifact.view != expected:
        raise VersionRefused(
            f"version {version} of {use_case.name!r} was trained on view {artifact.view}, and this code computes "
            f"{expected}: deploy the code it was trained with first, or train a version with this code"
        )
    verify(directory)
    return LoadedVersion(version, Runner(directory))
