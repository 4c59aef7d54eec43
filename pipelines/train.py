"""The training job: backfill, fit, calibrate, judge, register, and ask for a release when every gate passed.

``python -m pipelines.train aqua`` prints its report as one line of JSON, the last of its output.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import pipelines
from cluster.clock import Clock, open_clock
from cluster.database import Database
from cluster.session import connect
from cluster.settings import Settings
from cluster.tables import Tables
from cluster.triggers import Triggers
from pipelines import usecases
from pipelines.contracts.enforce import events_table
from pipelines.features import derived
from pipelines.features.offline import silenced
from pipelines.features.training_table import backfill
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds
from pipelines.statistics.conformal import conformal_half_width
from pipelines.training.artifact import (
    Artifact,
    Calibration,
    HalfWidths,
    Output,
    Runner,
    load,
    save,
    write_page,
)
from pipelines.training.dataset import Frame, Parts, load_examples, split
from pipelines.training.fit import Fitted, Snapshot, batch_of, fit
from pipelines.training.networks import residual_target
from pipelines.training.normals import Normals, season_normals
from pipelines.training.registry import ModelVersion, Registry
from pipelines.validation.gates import judge_gate
from pipelines.validation.metrics import accuracy, accuracy_by
from pipelines.validation.report import Report

OWN_CALIBRATION_ROWS = 200
"""An entity with fewer calibration rows takes the interval of all entities together."""
HELD_AGES = 8
"""At how many ages from the view's ttl to the fallback's hold answers from held values are calibrated."""
_VERSIONED = ("torch", "onnx", "onnxruntime", "numpy", "ray")


@dataclass(frozen=True)
class TrainReport:
    """What a training run made; ``requested``: whether it asked for a release; ``seconds`` by step."""

    use_case: str
    version: str
    gates_passed: bool
    requested: bool
    snapshot: Snapshot
    rows: dict[str, int]
    losses: tuple[dict[str, float], ...]
    validation: Report
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "validation": self.validation.to_json()}


def train(
    use_case: UseCase,
    *,
    tables: Tables,
    database: Database,
    settings: Settings,
    clock: Clock,
    events_version: int | None = None,
    registry: Registry | None = None,
    trigger: int | None = None,
) -> TrainReport:
    """Train on ``events_version`` (default: the newest) and register what comes out, passed or not.

    A release asked for on behalf of a ``trigger`` is the only one it ever gets.

    Ray must be connected. Raises what its steps raise: nothing is registered then, and the run can be
    repeated.
    """
    seconds = _Stopwatch()
    filled = backfill(use_case, tables=tables, settings=settings, events_version=events_version)
    snapshot = Snapshot(filled.events_version, filled.table_version, filled.view_fingerprint, filled.dimensions)
    seconds.lap("backfill")
    # First, because too little history then fails here at once and not in a worker that Ray would start again.
    frame = load_examples(
        use_case, tables, training_version=snapshot.training_version, events_version=snapshot.events_version,
        view=snapshot.view, dimensions=snapshot.dimensions,
    )  # fmt: skip
    parts = split(frame, use_case.model)
    seconds.lap("load")
    fitted = fit(use_case, tables=tables, settings=settings, snapshot=snapshot)
    seconds.lap("fit")
    settings.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.home) as folder:
        events = None
        if use_case.fallback is not None:
            events = tables.read(events_table(use_case), version=snapshot.events_version)
        make_artifact(use_case, fitted, parts, snapshot, Path(folder), events=events)
        seconds.lap("artifact")
        report = validate(use_case, Runner(folder), parts.test)
        seconds.lap("validate")
        made, requested = register(
            use_case,
            Path(folder),
            report,
            registry=registry or Registry(settings),
            database=database,
            now_us=clock.now(),
            trigger=trigger,
        )
        seconds.lap("register")
    rows = {
        "train": fitted.rows, "calibration": len(parts.calibration), "test": len(parts.test),
        "between_parts": parts.left_out, "without_anchor": fitted.left_out,
    }  # fmt: skip
    return TrainReport(
        use_case.name,
        made.version,
        report.passed,
        requested,
        snapshot,
        rows,
        fitted.losses,
        report,
        seconds.laps,
    )


def register(
    use_case: UseCase,
    directory: Path,
    report: Report,
    *,
    registry: Registry,
    database: Database,
    now_us: int,
    trigger: int | None = None,
) -> tuple[ModelVersion, bool]:
    """Register the model version in ``directory``, and ask for its release if ``report`` passed.

    Returns the version and whether a release was requested. A version that failed stays, marked as such.
    """
    page = load(directory)
    losses = page.training["losses"][-1]
    made = registry.register(
        directory,
        gates=report.to_json(),
        gates_passed=report.passed,
        params=use_case.model.model_dump(mode="json", include=set(_PARAMS)),
        metrics={**_figures(report), **{f"loss_{name}": value for name, value in losses.items()}},
    )
    if not report.passed:
        return made, False
    payload = {"gates": report.to_json()["gates"], "view": page.view, "contract": page.contract_version}
    if trigger is not None:
        return made, Triggers(database).request_release(trigger, made.version, payload, now_us)
    return made, database.request_release(use_case.name, made.version, payload, now_us)


def make_artifact(
    use_case: UseCase,
    fitted: Fitted,
    parts: Parts,
    snapshot: Snapshot,
    directory: Path,
    *,
    events: pa.Table | None = None,
) -> Artifact:
    """Write the fitted network as a calibrated model version into ``directory``.

    With a fallback ladder the version gets its season's normals, and ``events``, the rows that the parts were made
    of, are needed to calibrate the answers from held values; ``ValueError`` without them.
    """
    model, contract = use_case.model, use_case.contract
    field = contract.field(model.target.field)
    artifact = Artifact(
        use_case=use_case.name,
        contract=contract.name,
        contract_version=contract.version,
        view=snapshot.view,
        entity=contract.entity,
        inputs=use_case.view.inputs,
        numeric=model.numeric,
        vocabularies=fitted.vocabularies,
        anchor=model.anchor,
        scale=model.scale,
        transform=model.transform,
        output=Output(field=field.name, unit=field.unit, horizon_us=microseconds(model.target.horizon)),
        shape=asdict(fitted.network.shape),
        snapshot=asdict(snapshot),
        training={
            "losses": fitted.losses,
            "rows": fitted.rows,
            "seconds": round(fitted.seconds, 3),
            # What later ones are held against.
            "contract": contract.model_dump(mode="json"),
            "dimensions": {part.name: part.contract.model_dump(mode="json") for part in use_case.view.dimensions},
        },
        code=code_fingerprint(),
        versions={name: importlib.metadata.version(name) for name in _VERSIONED}
        | {"python": platform.python_version()},
    )
    samples = batch_of(model, fitted.vocabularies, parts.calibration).inputs()
    save(directory, fitted.network, artifact, {name: values[:1000] for name, values in samples.items()})
    if use_case.fallback is None:
        calibration = calibrate(use_case, Runner(directory), parts.calibration)
    elif events is None:
        raise ValueError(f"use case {use_case.name!r} has a fallback ladder: its calibration needs the events")
    else:
        normals = season_normals(use_case.fallback, use_case.view.stored, parts.train)
        normals.save(directory)
        calibration = calibrate_ladder(use_case, Runner(directory), parts.calibration, events, normals)
    return write_page(directory, artifact.model_copy(update={"calibration": calibration}))


def calibrate(use_case: UseCase, runner: Runner, rows: Frame) -> Calibration:
    """Split conformal half-widths, by entity where it has enough rows; in the logarithm where the model is.

    Rows without an answer (no usable anchor) are left out: they get no interval when serving either.
    """
    found = _half_widths(use_case, runner, rows)
    if found is None:
        raise ValueError(
            f"use case {use_case.name!r}: the model answers none of its {len(rows)} calibration rows with a finite "
            "error, so it can have no interval; look at its anchor and scale columns"
        )
    return Calibration(coverage=use_case.model.coverage, **found.model_dump())


def calibrate_ladder(use_case: UseCase, runner: Runner, rows: Frame, events: pa.Table, normals: Normals) -> Calibration:
    """``calibrate``, and the half-widths of the lower rungs of the use case's fallback ladder.

    For *held* every row is answered from what state would give had its sensor stopped some time before, at several
    ages up to the fallback's hold; the widest age counts, because errors do not grow evenly with it (a whole day is
    easier to bridge than half of one). For *normal* all stored features are the season's normals. No rung is narrower
    than the one above it, and a rung that nothing can be answered from has no half-width.
    """
    view, policy = use_case.view, use_case.fallback
    if policy is None:
        raise ValueError(f"use case {use_case.name!r} has no fallback ladder to calibrate")
    fresh = calibrate(use_case, runner, rows)
    ages = np.linspace(microseconds(view.ttl), microseconds(policy.hold), HELD_AGES).astype(np.int64)
    held = [
        _half_widths(use_case, runner, _with_stored(use_case, rows, stored))
        for stored in (silenced(use_case, events, rows.entity, rows.time_us, int(age)) for age in ages)
    ]
    usual = _with_stored(use_case, rows, normals.at(rows.entity, rows.time_us))
    held_widths = _widest(fresh, held)
    normal_widths = _widest(held_widths or fresh, [_half_widths(use_case, runner, usual)])
    return fresh.model_copy(update={"held": held_widths, "normal": normal_widths})


def _with_stored(use_case: UseCase, rows: Frame, stored: np.ndarray) -> Frame:
    """The same rows with other features of their entities, and all columns that are made of them made again."""
    view = use_case.view
    own = len(view.of_entity)
    kept = [rows.columns[name] for name in view.stored[own:]]
    stored = np.column_stack([stored[:, :own], *kept])
    inputs = {name: rows.columns[name] if name in rows.columns else rows.strings[name] for name in view.inputs}
    return replace(rows, columns=derived.columns(view, stored, inputs, rows.time_us))


def _widest(above: HalfWidths, measured: Sequence[HalfWidths | None]) -> HalfWidths | None:
    """The largest half-width of each entity, of those measured and the rung above; None when nothing was measured.

    An entity without a half-width of its own counts with that of all.
    """
    widths = [above, *(found for found in measured if found is not None)]
    if len(widths) == 1:
        return None
    own = {name for found in widths for name in found.by_entity}
    return HalfWidths(
        everywhere=max(found.everywhere for found in widths),
        by_entity={name: max(found.by_entity.get(name, found.everywhere) for found in widths) for name in sorted(own)},
        rows=min(found.rows for found in widths),
    )


def _half_widths(use_case: UseCase, runner: Runner, rows: Frame) -> HalfWidths | None:
    model = use_case.model
    value = runner.predict(rows.columns, rows.strings).value
    scale = rows.columns[model.scale] if model.scale else np.ones(len(rows))
    scores = np.abs(residual_target(model.transform, rows.label, value, scale))
    usable = np.isfinite(scores)
    if not usable.any():
        return None
    scores, entities = scores[usable], rows.entity[usable]
    names, counts = np.unique(entities.astype(str), return_counts=True)
    return HalfWidths(
        everywhere=conformal_half_width(scores, model.coverage),
        by_entity={
            str(name): conformal_half_width(scores[entities == name], model.coverage)
            for name, count in zip(names, counts, strict=True)
            if count >= OWN_CALIBRATION_ROWS
        },
        rows=len(scores),
    )


def validate(use_case: UseCase, runner: Runner, rows: Frame) -> Report:
    """The report on ``rows``: accuracy where anchor and scale allow an answer, and all gates."""
    model = use_case.model
    found = runner.predict(rows.columns, rows.strings)
    # Where the anchor is missing nobody could answer; other silence counts against the model in its gates.
    answerable = np.isfinite(rows.columns[model.anchor]) if model.anchor else np.ones(len(rows), dtype=bool)
    figures = (
        rows.label[answerable],
        found.value[answerable],
        found.lower[answerable],
        found.upper[answerable],
    )
    return Report(
        test=accuracy(*figures),
        by_entity=accuracy_by(rows.entity[answerable].tolist(), *figures),
        gates=tuple(
            judge_gate(
                gate,
                time_us=rows.time_us,
                actual=rows.label,
                predicted=found.value,
                baseline=rows.columns[gate.baseline],
                seed=model.seed,
            )
            for gate in use_case.gates
        ),
        intended=model.coverage,
    )


def code_fingerprint() -> str:
    """A hash of all source files of ``pipelines``: the code that a model was trained with."""
    root = Path(pipelines.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\x00" + path.read_bytes() + b"\x00")
    return digest.hexdigest()


_PARAMS = (
    "hidden",
    "epochs",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "seed",
    "transform",
    "anchor",
    "scale",
)


def _figures(report: Report) -> dict[str, float]:
    figures = {f"test_{name}": float(value) for name, value in asdict(report.test).items()}
    figures |= {f"gate_{gate.name}_{end}": getattr(gate, end) for gate in report.gates for end in ("ratio", "upper")}
    return {name: value for name, value in figures.items() if np.isfinite(value)}


class _Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 3), now


def main(arguments: list[str] | None = None) -> int:
    """The job's entry point; exit code 1 when the gates did not pass."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.train", description=__doc__)
    parser.add_argument("use_case", choices=usecases.names())
    parser.add_argument("--events-version", type=int, help="a version of the events table; default: the newest")
    chosen = parser.parse_args(arguments)
    settings = Settings.from_environment()
    connect(settings)
    database = Database(settings.database_url)
    database.create()
    report = train(
        usecases.load(chosen.use_case),
        tables=Tables(settings.tables_url, settings.storage_options),
        database=database,
        settings=settings,
        clock=open_clock(settings),
        events_version=chosen.events_version,
    )
    database.close()
    sys.stdout.write(report.validation.text() + "\n" + json.dumps(report.to_json()) + "\n")
    return 0 if report.gates_passed else 1


if __name__ == "__main__":
    sys.exit(main())
