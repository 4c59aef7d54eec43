"""Training in Ray Train on a pinned snapshot: a killed worker resumes to the same bits, a new run starts
anew.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray.train
import torch

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.features.offline import build_examples
from pipelines.features.training_table import backfill
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds
from pipelines.training.dataset import Parts, frame_of, load_examples, split
from pipelines.training.fit import Fitted, Progress, Snapshot, fit, fit_local
from tests.model import demand


@dataclass(frozen=True)
class World:
    use_case: UseCase
    settings: Settings
    tables: Tables
    snapshot: Snapshot
    parts: Parts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    case = demand.use_case()
    tables = Tables(settings.tables_url)
    tables.ensure(events_table(case), events_schema(case.contract), [BUCKET])
    tables.append(events_table(case), demand.events(case, districts=2, days=120), "load/1")
    filled = backfill(case, tables=tables, settings=settings, engine="arrow")
    snapshot = Snapshot(filled.events_version, filled.table_version, filled.view_fingerprint)
    return World(case, settings, tables, snapshot, split(load(case, tables, snapshot), case.model))


def load(case: UseCase, tables: Tables, snapshot: Snapshot):
    return load_examples(
        case,
        tables,
        training_version=snapshot.training_version,
        events_version=snapshot.events_version,
        view=snapshot.view,
        dimensions=snapshot.dimensions,
    )


def same_weights(one: Fitted, other: Fitted) -> bool:
    pairs = zip(one.network.state_dict().items(), other.network.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Fitted:
    return fit_local(world.use_case.model, world.parts.train, world.parts.calibration)


def kill_once(marker: Path, epoch: int, told: Path) -> Callable[[int], None]:
    def on_epoch(done: int) -> None:
        with told.open("a") as file:
            file.write(f"{done} ")
        if done == epoch and not marker.exists():
            # Ray's controller takes up reports every two seconds; a checkpoint not yet taken up is lost with
            # its worker. This waits until it has been, so that the resumption is what is tested.
            assert len(ray.train.get_all_reported_checkpoints()) == epoch
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    return on_epoch


def test_a_worker_killed_in_mid_training_resumes_and_ends_with_the_same_bits(
    ray_cluster: None, world: World, undisturbed: Fitted, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    fitted = fit(
        world.use_case,
        tables=world.tables,
        settings=world.settings,
        snapshot=world.snapshot,
        on_epoch=kill_once(marker, 2, tmp_path / "epochs"),
    )
    assert marker.exists()
    assert (tmp_path / "epochs").read_text() == "1 2 3 4 "  # resumed: no epoch was trained twice
    assert same_weights(fitted, undisturbed)
    assert fitted.losses == undisturbed.losses
    assert fitted.vocabularies == {"district": ("dma_1", "dma_2")}
    assert fitted.rows == undisturbed.rows


def test_training_learns(undisturbed: Fitted) -> None:
    first, last = undisturbed.losses[0], undisturbed.losses[-1]
    assert last["train"] < 0.99 * first["train"]
    assert last["validation"] < first["validation"]


def test_a_fit_resumed_from_any_epoch_is_the_uninterrupted_one(
    world: World, undisturbed: Fitted, tmp_path: Path
) -> None:
    def keep(progress: Progress) -> None:
        os.rename(progress.checkpoint, tmp_path / str(progress.epoch))
        progress.checkpoint.mkdir()  # the owner of the directory removes it afterwards

    fit_local(world.use_case.model, world.parts.train, world.parts.calibration, report=keep)
    for epoch in (1, 3, 4):
        resumed = fit_local(
            world.use_case.model,
            world.parts.train,
            world.parts.calibration,
            resume_from=tmp_path / str(epoch),
        )
        assert same_weights(resumed, undisturbed), epoch
        assert resumed.losses == undisturbed.losses


def test_another_seed_gives_another_model_and_the_same_seed_the_same(world: World, undisturbed: Fitted) -> None:
    again = fit_local(world.use_case.model, world.parts.train, world.parts.calibration)
    other = fit_local(demand.use_case(seed=8).model, world.parts.train, world.parts.calibration)
    assert same_weights(again, undisturbed)
    assert not same_weights(other, undisturbed)


def test_the_snapshot_is_read_and_not_the_newest_rows(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    tables = Tables(settings.tables_url)
    case, name = world.use_case, events_table(world.use_case)
    rows = demand.events(case, districts=2, days=100)
    tables.ensure(name, events_schema(case.contract), [BUCKET])
    half = rows.num_rows // 2
    tables.append(name, rows.slice(0, half), "load/1")
    first = backfill(case, tables=tables, settings=settings, engine="arrow")
    tables.append(name, rows.slice(half), "load/2")
    second = backfill(case, tables=tables, settings=settings, engine="arrow")
    old = load(case, tables, Snapshot(first.events_version, second.table_version, second.view_fingerprint))
    new = load(case, tables, Snapshot(second.events_version, second.table_version, second.view_fingerprint))
    assert len(old) == first.rows < len(new) == second.rows
    assert old.time_us.max() < new.time_us.max()
    expected = frame_of(case, build_examples(case, rows.slice(0, half)))
    assert np.array_equal(old.time_us, expected.time_us)
    for column, values in expected.columns.items():
        assert np.array_equal(old.columns[column].view(np.int64), values.view(np.int64)), column


def test_a_snapshot_of_another_view_or_without_rows_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="features of view dead, this code computes"):
        load(world.use_case, world.tables, Snapshot(world.snapshot.events_version, 1, "dead"))
    with pytest.raises(ValueError, match="has no version 77"):
        load(world.use_case, world.tables, Snapshot(77, world.snapshot.training_version, world.snapshot.view))


def test_no_part_has_an_outcome_from_after_the_next_part_began(world: World) -> None:
    parts, model = world.parts, world.use_case.model
    horizon = microseconds(model.target.horizon)
    assert parts.train.time_us.max() + horizon <= parts.calibration.time_us.min()
    assert parts.calibration.time_us.max() + horizon <= parts.test.time_us.min()
    assert parts.left_out > 0
    span = parts.test.time_us.max() - parts.test.time_us.min()
    assert span <= microseconds(model.split.test) < span + 2 * 3_600_000_000


def test_a_split_that_leaves_a_part_empty_names_it(world: World) -> None:
    with pytest.raises(ValueError, match="the train part of the split is empty"):
        split(world.parts.test, world.use_case.model)


def test_a_diverging_loss_stops_the_training(world: World) -> None:
    broken = demand.use_case(learning_rate=1e30).model
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fit_local(broken, world.parts.train, world.parts.calibration)


def test_a_checkpoint_holds_no_pickle(world: World, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(progress: Progress) -> None:
        seen.append({file.name for file in progress.checkpoint.iterdir()})

    fit_local(demand.use_case(epochs=1).model, world.parts.train, world.parts.calibration, report=look)
    assert seen == [{"state.safetensors", "fit.json"}]
