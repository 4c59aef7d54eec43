"""One prediction request from its JSON to its answer: contract, features, champion, interval, flags, log record."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from pipelines.contracts.events import from_microseconds
from pipelines.contracts.requests import check_record, compile_model
from pipelines.features import derived
from pipelines.features.online import BoundReader, Read
from pipelines.features.served import Status
from pipelines.features.windows import view_fingerprint
from pipelines.spec import FieldType, UseCase
from pipelines.training.artifact import Artifact, Prediction
from serving.fallback import Filled
from serving.problems import Problem
from serving.runner import LoadedVersion, Rows

MAX_INSTANCES = 1000


@dataclass(frozen=True)
class Prepared:
    """n instances with everything a model needs, as of ``now_us``.

    ``filled`` are the stored features after the fallback ladder, ``numeric`` float64 [n, d] the model's columns;
    ``usable`` bool [n] says where the ladder, the anchor and the scale allow an answer, whatever version gives it.
    """

    records: Sequence[Mapping[str, Any]]
    entities: list[str]
    read: Read
    filled: Filled
    columns: dict[str, np.ndarray]
    strings: dict[str, list[Any]]
    numeric: np.ndarray
    usable: np.ndarray
    now_us: int

    def take(self, rows: np.ndarray) -> Rows:
        """What a runner needs of the instances at ``rows``."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        strings = {name: [values[i] for i in rows] for name, values in self.strings.items()}
        return Rows(columns, strings, self.filled.level[rows], len(rows))

    def all(self) -> Rows:
        """What a runner needs of all instances."""
        return Rows(self.columns, self.strings, self.filled.level, len(self.entities))


@dataclass(frozen=True)
class Other:
    """What the version that did not answer made of the same n instances; NaN where it gave nothing."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    version: str


@dataclass(frozen=True)
class Answered:
    """The answer's document, and what is to be logged of each prediction (``served.SERVED_SCHEMA``)."""

    document: dict[str, Any]
    rows: list[dict[str, Any]]

    def records(self, other: Other | None = None) -> list[bytes]:
        """The log records, with what the version said that did not answer."""
        if other is not None:
            said = zip(self.rows, other.value.tolist(), other.lower.tolist(), other.upper.tolist(), strict=True)
            for row, value, lower, upper in said:
                row["other_version"] = other.version
                row["other_value"], row["other_lower"], row["other_upper"] = value, lower, upper
        return [orjson.dumps(row) for row in self.rows]


class Predictor:
    """Answers for one use case; versions are handed in with each call, so a swap needs no lock."""

    def __init__(self, use_case: UseCase, reader: BoundReader) -> None:
        self._use_case = use_case
        self._reader = reader
        contract, view = use_case.contract, use_case.view
        self._model = compile_model(contract, (contract.entity, *view.inputs), f"{use_case.name}_instance")
        self._numbers = [n for n in view.inputs if contract.field(n).type is not FieldType.STRING]
        self._strings = {contract.entity, *use_case.model.categorical}
        self._stored = view.stored
        self._of_entity = _of_entity(use_case)
        asked = [*(near.asked for near in view.neighbours), [dimension.key for dimension in view.dimensions]]
        self._asked = tuple(dict.fromkeys(name for names in asked for name in names))
        self._fingerprint = view_fingerprint(view, contract)

    def parse(self, document: Any) -> list[dict[str, Any]]:
        """The typed instances of a request; raises ``Problem`` 400 or 422 naming every wrong field."""
        instances = document.get("instances") if isinstance(document, dict) else None
        if not isinstance(instances, list) or not instances:
            raise Problem(400, "No instances", 'Send {"instances": [{…}, …]} with at least one instance.')
        if len(instances) > MAX_INSTANCES:
            raise Problem(
                413, "Too many instances", f"{len(instances)} exceed {MAX_INSTANCES} a request: send several requests."
            )
        records, errors = [], []
        for position, instance in enumerate(instances):
            record, problems = check_record(self._model, instance, 0)
            if record is None:
                errors += [
                    {"pointer": f"/instances/{position}/{p.field}", "rule": p.rule, "detail": p.message}
                    for p in problems
                ]
            else:
                records.append(record)
        if errors:
            raise Problem(422, "The request breaks its contract", "Mend the fields listed under errors.", errors)
        return records

    def prepare(self, records: Sequence[Mapping[str, Any]], version: LoadedVersion, now_us: int) -> Prepared:
        """Features and columns of typed instances, as of ``now_us`` (the cluster's clock).

        What is missing is filled in by the ladder of ``version``, the champion, before any version is assigned.
        """
        use_case, artifact = self._use_case, version.runner.artifact
        count = len(records)
        entities = [record[use_case.contract.entity] for record in records]
        asked = {name: [record.get(name) for record in records] for name in self._asked}
        read = self._reader.read(entities, now_us, asked)
        inputs = {
            name: np.array([np.nan if (v := record.get(name)) is None else v for record in records], dtype=np.float64)
            for name in self._numbers
        }
        if version.ladder is None:
            filled = Filled(read.values, read.status, np.zeros(count, np.uint8), {})
        else:
            filled = version.ladder.fill(read, entities, now_us)
        columns = derived.columns(use_case.view, filled.values, inputs, np.full(count, now_us, dtype=np.int64))
        strings = {name: [record[name] for record in records] for name in self._strings}
        numeric = np.stack([columns[name] for name in artifact.numeric], axis=1)
        fine = usable(artifact, columns, count)
        fine[list(filled.refused)] = False
        return Prepared(records, entities, read, filled, columns, strings, numeric, fine, now_us)

    def champion(
        self, records: Sequence[Mapping[str, Any]], version: LoadedVersion, now_us: int
    ) -> tuple[Prepared, Prediction, float]:
        """The instances with the champion's answers, and its seconds inside the runner. A refused row is NaN."""
        prepared = self.prepare(records, version, now_us)
        prediction, took = version.predict(prepared.all())
        if prepared.filled.refused:
            refused = list(prepared.filled.refused)
            for series in (prediction.value, prediction.lower, prediction.upper):
                series[refused] = np.nan
        return prepared, prediction, took

    def compose(
        self,
        prepared: Prepared,
        prediction: Prediction,
        champion: str,
        taken: np.ndarray | None = None,
        challenger: str | None = None,
    ) -> Answered:
        """The document and the log of ``prediction`` [n], which the challenger made where ``taken``."""
        read, filled, records = prepared.read, prepared.filled, prepared.records
        as_of = from_microseconds(prepared.now_us).isoformat().replace("+00:00", "Z")
        prefix, others = os.urandom(12).hex(), [number for position in read.others for number in position]
        answers, logged = [], []
        for i in range(len(records)):
            value, lower, upper = (
                float(series[i]) for series in (prediction.value, prediction.lower, prediction.upper)
            )
            valid, bounded = np.isfinite(value), np.isfinite(lower) and np.isfinite(upper)
            identity = f"{prefix}{i:04x}"
            tried = taken is not None and bool(taken[i])
            version = challenger if tried else champion
            variant = "challenger" if tried else "champion"
            flagged = {
                name: Status(status).name
                for name, status in zip(self._stored, filled.status[i].tolist(), strict=True)
                if status != Status.FRESH
            }
            degraded = []
            if not read.known[i]:
                degraded.append("unknown_entity")
            if Status.STALE.name in flagged.values():
                degraded.append("stale_features")
            if Status.IMPUTED.name in flagged.values():
                degraded.append("seasonal_normals")
            if Status.MISSING.name in flagged.values():
                degraded.append("missing_features")
            if i in filled.refused and filled.refused[i] not in degraded:
                degraded.append(filled.refused[i])
            if not valid:
                degraded.append("no_answer")
            answers.append(
                {
                    "prediction_id": identity,
                    "value": value if valid else None,
                    "interval": [lower, upper] if valid and bounded else None,
                    "model_version": version,
                    "variant": variant,
                    "features": flagged,
                    "degraded": degraded,
                }
            )
            logged.append(
                {
                    "prediction_id": identity,
                    "_time": prepared.now_us,
                    "entity": prepared.entities[i],
                    "inputs": orjson.dumps({n: records[i].get(n) for n in self._use_case.view.inputs}).decode(),
                    "stored": filled.values[i].tolist(),
                    "status": filled.status[i].tolist(),
                    "numeric": prepared.numeric[i].tolist(),
                    "sequence": read.sequence,
                    "generation": read.generation,
                    "others": others,
                    "view": self._fingerprint,
                    "model_version": version,
                    "variant": variant,
                    "value": value,
                    "lower": lower,
                    "upper": upper,
                }
            )
        return Answered({"predictions": answers, "as_of": as_of}, logged)

    def warm(self, version: LoadedVersion, now_us: int) -> None:
        """Answers made-up rows and drops the answers, so that no caller waits for a compiler or a first page."""
        record: dict[str, Any] = dict.fromkeys(self._strings, "") | dict.fromkeys(self._numbers, 1.0)
        for count in (1, 2):
            prepared, prediction, _ = self.champion([record] * count, version, now_us)
            self.compose(prepared, prediction, version.version).records()

    def features(self, entity: str, now_us: int) -> dict[str, Any]:
        """What state holds for one entity now: value, status and age of every feature that needs no request."""
        read = self._reader.read([entity], now_us)
        if not read.known[0]:
            raise Problem(404, "Unknown entity", f"No event of {entity!r} has come in; check the name.")
        return {
            "entity": entity,
            "sequence": read.sequence,
            "generation": read.generation,
            "features": {
                name: {
                    "value": value if np.isfinite(value) else None,
                    "status": Status(status).name,
                    "age_seconds": age if np.isfinite(age) else None,
                }
                for name, value, status, age in zip(
                    self._stored,
                    read.values[0].tolist(),
                    read.status[0].tolist(),
                    read.age_s[0].tolist(),
                    strict=True,
                )
                if name in self._of_entity
            },
        }


def _of_entity(use_case: UseCase) -> frozenset[str]:
    """The stored features that need no more than the entity to be found."""
    view, entity = use_case.view, use_case.contract.entity
    own = [dimension.features for dimension in view.dimensions if dimension.key == entity]
    return frozenset(view.of_entity).union(*own)


def usable(artifact: Artifact, columns: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """bool [n]: where anchor and scale allow a version to answer."""
    fine = np.ones(count, dtype=bool)
    with np.errstate(invalid="ignore"):
        if artifact.anchor:
            anchor = columns[artifact.anchor]
            fine &= np.isfinite(anchor) & ((anchor > 0) if artifact.transform == "log" else True)
        if artifact.scale:
            fine &= np.isfinite(columns[artifact.scale]) & (columns[artifact.scale] > 0)
    return fine
