"""Model versions in a real MLflow on SQLite, and the whole training job up to its release request."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.spec import UseCase
from pipelines.train import TrainReport, train
from pipelines.train import register as register_model
from pipelines.training.artifact import ArtifactError, Runner
from pipelines.training.registry import Registry, RegistryError
from tests.model import demand
from tests.model.test_artifact import make


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def registry(settings: Settings) -> Registry:
    """Opened once: MLflow takes seconds to import and to create its schema."""
    return Registry(settings)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    make(folder)
    return folder


def register(registry: Registry, directory: Path, passed: bool = True):
    return registry.register(
        directory,
        gates={"passed": passed},
        gates_passed=passed,
        params={"epochs": 3},
        metrics={"test_mae": 1.5},
    )


def test_a_version_comes_back_as_it_was_registered(registry: Registry, directory: Path, tmp_path: Path) -> None:
    made = register(registry, directory)
    assert registry.version("toy", made.version) == made
    assert made.gates_passed
    assert made.tags["view"] == "00ff"
    assert made.tags["contract"] == "readings 1.0.0"
    assert made.tags["code"] == "aa"
    assert json.loads(made.tags["snapshot"]) == {"events_version": 3, "training_version": 1}
    fetched = registry.download("toy", made.version, tmp_path)
    for file in directory.iterdir():
        assert (fetched / file.name).read_bytes() == file.read_bytes()
    assert registry.download("toy", made.version, tmp_path) == fetched
    assert [entry.name for entry in fetched.parent.iterdir()] == [made.version]  # nothing half-fetched stays


def test_each_registration_is_the_next_version(registry: Registry, directory: Path) -> None:
    first = register(registry, directory)
    second = register(registry, directory, passed=False)
    assert int(second.version) == int(first.version) + 1
    assert not registry.version("toy", second.version).gates_passed
    assert [entry.version for entry in registry.versions("toy")][-2:] == [first.version, second.version]


def test_two_callers_may_fetch_one_version_at_once(registry: Registry, directory: Path, tmp_path: Path) -> None:
    version = register(registry, directory).version
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: registry.download("toy", version, tmp_path), range(4)))
    assert set(found) == {tmp_path / "toy" / version}
    Runner(found[0])


def test_a_damaged_copy_is_found_before_it_serves(registry: Registry, directory: Path, tmp_path: Path) -> None:
    version = register(registry, directory).version
    fetched = registry.download("toy", version, tmp_path)
    (fetched / "model.onnx").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="not the file"):
        registry.download("toy", version, tmp_path)


def test_a_version_that_is_not_there_is_named(registry: Registry, directory: Path, tmp_path: Path) -> None:
    register(registry, directory)
    with pytest.raises(RegistryError, match=r"no version 999 of 'toy'"):
        registry.version("toy", "999")
    with pytest.raises(RegistryError, match=r"no version 1 of 'nothing'"):
        registry.download("nothing", "1", tmp_path)


def test_aliases_show_exactly_what_is_projected(registry: Registry, directory: Path) -> None:
    one, two = register(registry, directory).version, register(registry, directory).version
    registry.show_aliases("toy", {"champion": one, "challenger": two})
    assert registry.aliases("toy") == {"champion": one, "challenger": two}
    registry.show_aliases("toy", {"champion": two, "previous": one})
    assert registry.aliases("toy") == {"champion": two, "previous": one}
    with pytest.raises(ValueError, match="unknown"):
        registry.show_aliases("toy", {"best": one})


def test_a_file_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="use sqlite"):
        Registry(Settings(home=tmp_path, mlflow_url=tmp_path.as_uri()))


def test_nothing_is_reported_to_anyone(registry: Registry) -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def run(case: UseCase, settings: Settings, registry: Registry, districts: int = 2) -> tuple[TrainReport, Database]:
    tables, database = Tables(settings.tables_url), Database(settings.database_url)
    database.create()
    tables.ensure(events_table(case), events_schema(case.contract), [BUCKET])
    tables.append(events_table(case), demand.events(case, districts=districts, days=150), "load/1")
    report = train(case, tables=tables, database=database, settings=settings, clock=SystemClock(), registry=registry)
    return report, database


def test_the_job_trains_registers_and_requests_a_release_once_its_gates_passed(
    ray_cluster: None, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    case = demand.use_case(hidden=(32, 16), epochs=8)
    report, database = run(case, settings, registry)
    assert report.gates_passed, report.validation.text()
    assert report.requested
    request = database.claim_release("aqua", "test", 10.0, SystemClock().now())
    assert request is not None
    assert request.version == report.version
    found = registry.version("aqua", report.version)
    assert found.gates_passed
    assert json.loads(found.tags["gates"])["gates"][0]["name"] == "beats_last_week"
    runner_directory = registry.download("aqua", report.version, tmp_path)
    runner = Runner(runner_directory)
    artifact = runner.artifact
    assert artifact.snapshot == {
        "events_version": report.snapshot.events_version,
        "training_version": report.snapshot.training_version,
        "view": report.snapshot.view,
        "dimensions": {},
    }
    assert artifact.calibration is not None
    assert set(artifact.calibration.by_entity) == {"dma_1", "dma_2"}
    names = {*case.model.numeric, "last_week", "inflow_mean_7d"}
    answer = runner.predict({name: np.ones(2) for name in names}, {"district": ["dma_1", "dma_7"]})
    assert (answer.lower < answer.value).all()
    assert (answer.value < answer.upper).all()
    json.dumps(report.to_json(), allow_nan=False)

    # The same model without a gate that it passed: registered, marked, and no release is asked for.
    refused, requested = register_model(
        case,
        runner_directory,
        replace(report.validation, gates=()),
        registry=registry,
        database=database,
        now_us=SystemClock().now(),
    )
    assert not requested
    assert not registry.version("aqua", refused.version).gates_passed
    database.finish_release("aqua", report.version, "done")
    assert database.claim_release("aqua", "test", 10.0, SystemClock().now()) is None
    database.close()
