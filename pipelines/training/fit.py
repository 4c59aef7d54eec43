"""Trains a network on the train part of a pinned snapshot, in a Ray Train worker that can be killed at any
moment.

Every random choice follows from the seed and the epoch, so a run that was interrupted and resumed from its
last checkpoint ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.spec import ModelSpec, UseCase
from pipelines.training.artifact import encode_categories, places_of
from pipelines.training.dataset import Frame, load_examples, split
from pipelines.training.networks import Network, Shape, fit_preprocessing, residual_target

STATE, PAGE = "state.safetensors", "fit.json"
_UNKNOWN_SHARE = 0.01  # of codes hidden while training, so that the unknown category means something
_WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Snapshot:
    """The table versions that a model is trained on, and the fingerprint of the view that made the rows."""

    events_version: int
    training_version: int
    view: str
    dimensions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The graph's inputs for some rows (see ``Network``) and ``residual`` [n], what the network should
    answer.
    """

    numeric: np.ndarray
    categories: np.ndarray
    anchor: np.ndarray
    scale: np.ndarray
    residual: np.ndarray

    def inputs(self) -> dict[str, np.ndarray]:
        """The four inputs by the names of the exported graph."""
        return {name: getattr(self, name) for name in ("numeric", "categories", "anchor", "scale")}


@dataclass(frozen=True)
class Fitted:
    """A trained network with what it takes to use it; ``losses`` are mean absolute residuals by epoch."""

    network: Network
    vocabularies: dict[str, tuple[str, ...]]
    losses: tuple[dict[str, float], ...]
    rows: int
    left_out: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """After an epoch: its number from 1, both losses, and the directory of a checkpoint to keep."""

    epoch: int
    train_loss: float
    validation_loss: float
    checkpoint: Path


def vocabularies_of(model: ModelSpec, train: Frame) -> dict[str, tuple[str, ...]]:
    """The values of each categorical column that training sees, sorted."""
    return {
        name: tuple(sorted({value for value in train.strings[name].tolist() if value is not None}))
        for name in model.categorical
    }


def batch_of(model: ModelSpec, vocabularies: dict[str, tuple[str, ...]], frame: Frame) -> Batch:
    """The rows of ``frame`` that have a usable anchor, scale and label."""
    ones = np.ones(len(frame))
    default = ones if model.transform == "log" else np.zeros(len(frame))
    anchor = frame.columns[model.anchor] if model.anchor else default
    scale = frame.columns[model.scale] if model.scale else ones
    residual = residual_target(model.transform, frame.label, anchor, scale)
    keep = np.isfinite(residual)
    numeric = np.stack([frame.columns[name][keep] for name in model.numeric], axis=1)
    codes = encode_categories(
        [frame.strings[name][keep].tolist() for name in vocabularies],
        [places_of(vocabulary) for vocabulary in vocabularies.values()],
        int(keep.sum()),
    )
    return Batch(numeric, codes, anchor[keep], scale[keep], residual[keep])


def fit_local(
    model: ModelSpec,
    train: Frame,
    validation: Frame,
    *,
    resume_from: Path | None = None,
    report: Callable[[Progress], None] | None = None,
    threads: int = 1,
) -> Fitted:
    """Train in this process; ``report`` is called after each epoch and may keep the checkpoint directory it
    is given.

    The loss is the mean absolute residual: in the target's unit over scale, or in its logarithm. AdamW with a
    linear warm-up and a cosine to zero, so the last epoch is the one to keep and ``validation`` chooses
    nothing. Raises ``ValueError`` when no training row is usable and ``FloatingPointError`` when the loss is
    not finite.
    """
    begun = time.monotonic()
    torch.set_num_threads(threads)
    vocabularies = vocabularies_of(model, train)
    rows, checks = batch_of(model, vocabularies, train), batch_of(model, vocabularies, validation)
    if not len(rows.residual):
        raise ValueError(
            f"model {model.name!r}: none of {len(train)} training rows has a usable label, anchor "
            f"{model.anchor!r} and scale {model.scale!r}"
        )
    network = new_network(model, vocabularies, rows)
    optimizer = torch.optim.AdamW(network.parameters(), lr=model.learning_rate, weight_decay=model.weight_decay)
    data = _Tensors(rows, network)
    held_out = _Tensors(checks, network)
    steps = math.ceil(len(rows.residual) / model.batch_size)
    done, losses = _restore(resume_from, network, optimizer) if resume_from else (0, [])
    for epoch in range(done, model.epochs):
        generator = torch.Generator().manual_seed(model.seed * 1_000_003 + epoch)
        order = torch.randperm(len(rows.residual), generator=generator)
        total = 0.0
        for step in range(steps):
            chosen = order[step * model.batch_size : (step + 1) * model.batch_size]
            _set_rate(optimizer, model.learning_rate, (epoch * steps + step + 1) / (model.epochs * steps))
            total += _step(network, optimizer, data, chosen, generator) * len(chosen)
        loss = total / len(order)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"model {model.name!r}: the loss of epoch {epoch + 1} is {loss}; lower learning_rate"
            )
        losses.append({"train": loss, "validation": _loss(network, held_out)})
        if report is not None:
            with tempfile.TemporaryDirectory() as folder:
                _keep(Path(folder), network, optimizer, epoch + 1, losses)
                report(Progress(epoch + 1, loss, losses[-1]["validation"], Path(folder)))
    left_out = len(train) - len(rows.residual)
    seconds = time.monotonic() - begun
    return Fitted(network.eval(), vocabularies, tuple(losses), len(rows.residual), left_out, seconds)


def new_network(model: ModelSpec, vocabularies: dict[str, tuple[str, ...]], rows: Batch) -> Network:
    """An untrained network whose preprocessing is fitted to ``rows``; its weights follow from the seed."""
    shape = Shape(
        numeric=len(model.numeric),
        categories=tuple(len(vocabulary) for vocabulary in vocabularies.values()),
        hidden=model.hidden,
        transform=model.transform,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        network = Network(shape)
    return network.fitted(fit_preprocessing(rows.numeric, rows.residual, shape.bins))


def fit(
    use_case: UseCase,
    *,
    tables: Tables,
    settings: Settings,
    snapshot: Snapshot,
    run_name: str | None = None,
    threads: int = 1,
    on_epoch: Callable[[int], None] | None = None,
) -> Fitted:
    """``fit_local`` in a Ray Train worker with one CPU, which reads the snapshot itself; Ray must be
    connected.

    The same ``run_name`` resumes an interrupted run from the last checkpoint that Ray's controller took up
    (it looks every two seconds); by default every call is a new run. A worker that dies is started again,
    twice at most. ``on_epoch`` runs in the worker after each epoch was kept.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if not ray.is_initialized():
        raise RuntimeError("training needs a Ray cluster: connect first (cluster.session.connect)")
    name = run_name or f"{use_case.name}-{uuid.uuid4().hex[:12]}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "use_case": use_case, "tables": tables, "snapshot": asdict(snapshot), "threads": threads,
            "on_epoch": on_epoch,
        },
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=name,
            storage_path=str(settings.home / "training"),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )  # fmt: skip
    result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError(f"training run {name!r} ended without a checkpoint: {result.error}")
    with result.checkpoint.as_directory() as folder:
        return read_checkpoint(Path(folder))


def read_checkpoint(folder: Path) -> Fitted:
    """The trained network of a checkpoint that ``fit`` kept."""
    page = json.loads((folder / PAGE).read_text())
    shape = {
        **page["shape"],
        "categories": tuple(page["shape"]["categories"]),
        "hidden": tuple(page["shape"]["hidden"]),
    }
    network = Network(Shape(**shape))
    network.load_state_dict(_prefixed(load_file(folder / STATE), "network."))
    return Fitted(
        network.eval(),
        {name: tuple(values) for name, values in page["vocabularies"].items()},
        tuple(page["losses"]),
        page["rows"],
        page["left_out"],
        page["seconds"],
    )


def _worker(config: dict[str, Any]) -> None:
    """Runs inside Ray Train."""
    import ray.train

    use_case: UseCase = config["use_case"]
    snapshot = Snapshot(**config["snapshot"])
    frame = load_examples(
        use_case,
        config["tables"],
        training_version=snapshot.training_version,
        events_version=snapshot.events_version,
        view=snapshot.view,
        dimensions=snapshot.dimensions,
    )
    parts = split(frame, use_case.model)
    vocabularies = vocabularies_of(use_case.model, parts.train)
    rows = len(batch_of(use_case.model, vocabularies, parts.train).residual)
    begun = time.monotonic()

    def report(progress: Progress) -> None:
        page = json.loads((progress.checkpoint / PAGE).read_text())
        page |= {"vocabularies": vocabularies, "rows": rows, "left_out": len(parts.train) - rows}
        page["seconds"] = time.monotonic() - begun
        (progress.checkpoint / PAGE).write_text(json.dumps(page))
        ray.train.report(
            {
                "epoch": progress.epoch,
                "train_loss": progress.train_loss,
                "validation_loss": progress.validation_loss,
            },
            checkpoint=ray.train.Checkpoint.from_directory(progress.checkpoint),
        )
        if config["on_epoch"] is not None:
            config["on_epoch"](progress.epoch)

    def run(resume_from: Path | None) -> None:
        fit_local(
            use_case.model, parts.train, parts.calibration,
            resume_from=resume_from, report=report, threads=config["threads"],
        )  # fmt: skip

    kept = ray.train.get_checkpoint()
    if kept is None:
        run(None)
    else:
        with kept.as_directory() as folder:
            run(Path(folder))


class _Tensors:
    """A batch as tensors, the residual in units of the network's own answer."""

    def __init__(self, rows: Batch, network: Network) -> None:
        self.numeric = torch.from_numpy(rows.numeric)
        self.categories = torch.from_numpy(rows.categories)
        self.residual = (torch.from_numpy(rows.residual) / network.unit).float()


def _step(
    network: Network,
    optimizer: torch.optim.Optimizer,
    data: _Tensors,
    chosen: Tensor,
    generator: torch.Generator,
) -> float:
    codes = data.categories[chosen]
    hidden = torch.rand(codes.shape, generator=generator) < _UNKNOWN_SHARE
    answer = network.members(data.numeric[chosen], codes.masked_fill(hidden, 0))
    # Each member learns by itself; they are averaged only when they answer.
    loss = (answer - data.residual[chosen]).abs().mean()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss.detach())


def _loss(network: Network, data: _Tensors, size: int = 8192) -> float:
    """The mean absolute residual of the averaged members, in units of ``unit``; NaN without rows."""
    total, rows = 0.0, len(data.residual)
    with torch.no_grad():
        for start in range(0, rows, size):
            part = slice(start, start + size)
            answer = network.members(data.numeric[part], data.categories[part]).mean(dim=0)
            total += float((answer - data.residual[part]).abs().sum())
    return total / rows if rows else math.nan


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, share: float) -> None:
    """``share`` of all steps is done with this one; a pure function of it, so that resuming needs no
    scheduler.
    """
    rate = share / _WARM_UP if share < _WARM_UP else 0.5 * (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))
    for group in optimizer.param_groups:
        group["lr"] = peak * rate


def _keep(
    folder: Path,
    network: Network,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    losses: list[dict[str, float]],
) -> None:
    tensors = {f"network.{name}": tensor.contiguous() for name, tensor in network.state_dict().items()}
    for place, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{slot}": value.contiguous() for slot, value in slots.items()}
    save_file(tensors, folder / STATE)
    page = {"epoch": epoch, "losses": losses, "shape": asdict(network.shape)}
    (folder / PAGE).write_text(json.dumps(page))


def _restore(folder: Path, network: Network, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, float]]]:
    tensors, page = load_file(folder / STATE), json.loads((folder / PAGE).read_text())
    network.load_state_dict(_prefixed(tensors, "network."))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in _prefixed(tensors, "optimizer.").items():
        place, slot = name.split(".")
        slots.setdefault(int(place), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return page["epoch"], page["losses"]


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
