"""Asking for a release by hand: only for what the registry has, past failed gates only by name and with a reason."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cluster.clock import SystemClock
from cluster.database import Database
from pipelines.spec import ReleasePolicy
from pipelines.training.registry import ModelVersion, RegistryError
from serving import releases
from serving.releases import ReleaseError


@dataclass
class Shelf:
    """A registry of two versions: "1" passed its gates, "2" did not."""

    def version(self, model: str, version: str) -> ModelVersion:
        if version not in ("1", "2"):
            raise RegistryError(f"the registry has no version {version} of {model!r}")
        return ModelVersion(model, version, "run", "source", version == "1", {})


@pytest.fixture
def database(tmp_path) -> Database:
    found = Database(f"sqlite:///{tmp_path}/control.db")
    found.create()
    return found


def ask(database: Database, version: str, **options: object) -> None:
    given = {"by": "owner", "policy": None, "force": False, "reason": "", **options}
    releases.request("aqua", version, database=database, registry=Shelf(), clock=SystemClock(), **given)


def test_a_version_that_passed_its_gates_waits_in_line_with_the_name_of_who_asked(database):
    ask(database, "1", policy=ReleasePolicy(harm_cap=3))
    claimed = database.claim_release("aqua", "me", 10, 0)
    assert claimed is not None
    assert claimed.version == "1"
    assert claimed.payload["requested_by"] == "owner"
    assert not claimed.payload["forced"]
    assert ReleasePolicy.model_validate(claimed.payload["policy"]).harm_cap == 3
    with pytest.raises(ReleaseError, match="waits for its release already"):
        ask(database, "1")


def test_failed_gates_are_passed_only_by_force_and_with_a_reason(database):
    with pytest.raises(ReleaseError, match="did not pass its gates"):
        ask(database, "2")
    with pytest.raises(ReleaseError, match="needs a reason"):
        ask(database, "2", force=True, reason=" ")
    assert database.open_releases("aqua") == []
    ask(database, "2", force=True, reason="the old one is broken")
    claimed = database.claim_release("aqua", "me", 10, 0)
    assert claimed is not None
    assert (claimed.payload["forced"], claimed.payload["reason"]) == (True, "the old one is broken")


def test_a_version_that_the_registry_lacks_is_refused(database):
    with pytest.raises(ReleaseError, match="no version 9"):
        ask(database, "9")


def test_a_release_that_ended_can_be_asked_for_again_behind_those_that_wait(database):
    ask(database, "1")
    database.finish_release("aqua", "1", "rolled_back")
    ask(database, "2", force=True, reason="why not")
    ask(database, "1")
    assert database.open_releases("aqua") == ["2", "1"]
