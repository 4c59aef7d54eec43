"""One prediction request from its JSON to its answer: contract, features, champion, interval, flags, log record."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from pipelines.contracts.events import from_microseconds
from pipelines.contracts.requests import RecordModel, check_record, compile_model
from pipelines.features import derived
from pipelines.features.online import BoundReader, OnlineState, Read
from pipelines.features.served import Status
from pipelines.features.views import Views
from pipelines.spec import FieldType, UseCase
from pipelines.training.artifact import Artifact, Prediction, matrix
from serving.bodies import entries
from serving.fallback import Filled
from serving.problems import Problem
from serving.runner import DescribedVersion, LoadedVersion, Rows
from serving.wire import MAX_INSTANCES

_REASONS = {
    Status.STALE: "stale_features",
    Status.IMPUTED: "seasonal_normals",
    Status.MISSING: "missing_features",
}


class Warned(dict[str, Any]):
    """An instance that breaks rules of its contract which only warn: ``warnings`` names them for the answer."""

    def __init__(self, record: Mapping[str, Any], rules: Sequence[str]) -> None:
        super().__init__(record)
        self.warnings = [f"warning:{rule}" for rule in rules]


@dataclass(frozen=True)
class Prepared:
    """n instances with everything a model needs, as of ``now_us``, by the view of ``page``, whose fingerprint is
    ``view``.

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
    page: UseCase
    view: str

    def reasons(self, row: int) -> list[str]:
        """What the answer to that instance has to be flagged with; empty when its inputs are all there and fresh."""
        statuses = set(self.filled.status[row].tolist())
        found = [reason for status, reason in _REASONS.items() if status in statuses]
        if not self.read.known[row]:
            found.insert(0, "unknown_entity")
        if row in self.filled.refused and self.filled.refused[row] not in found:
            found.append(self.filled.refused[row])
        return found

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
class Part:
    """The instances of a request, where ``taken`` bool [n], that another version than the champion answered, and the
    ``rows`` of all n that it made of them.
    """

    taken: np.ndarray
    version: str
    rows: Prepared


@dataclass(frozen=True)
class Assigned:
    """The versions [n] that the instances of a request were assigned to in an A/B test of that number, and names [n] of
    what was assigned.
    """

    test: int
    versions: Sequence[str]
    units: Sequence[str]


@dataclass(frozen=True)
class Answered:
    """The answer's document, and what is to be logged of each prediction (``served.SERVED_SCHEMA``)."""

    document: dict[str, Any]
    rows: list[dict[str, Any]]

    def part(self, first: int, last: int) -> Answered:
        """Those of the instances from ``first`` up to ``last``."""
        document = {**self.document, "predictions": self.document["predictions"][first:last]}
        return Answered(document, self.rows[first:last])

    def records(self, other: Other | None = None) -> list[bytes]:
        """The log records, with what the version said that did not answer."""
        if other is not None:
            said = zip(self.rows, other.value.tolist(), other.lower.tolist(), other.upper.tolist(), strict=True)
            for row, value, lower, upper in said:
                row["other_version"] = other.version
                row["other_value"], row["other_lower"], row["other_upper"] = value, lower, upper
        return [orjson.dumps(row) for row in self.rows]


@dataclass(frozen=True)
class _View:
    """What rows of one view are made by: the page under it, its state, its columns, and its inputs by kind.

    ``strings`` has the entity too; by those ``asked`` for, neighbours and dimensions are found. ``of_entity`` are the
    stored features that need no more than the entity to be found.
    """

    page: UseCase
    reader: BoundReader
    stored: tuple[str, ...]
    inputs: tuple[str, ...]
    numbers: tuple[str, ...]
    strings: tuple[str, ...]
    asked: tuple[str, ...]
    of_entity: frozenset[str]


class Predictor:
    """Answers for one use case; versions are handed in with each call, so a swap needs no lock.

    A request may bring the inputs of every view of the page.
    """

    def __init__(self, use_case: UseCase, views: Views) -> None:
        self._use_case = use_case
        self._views = views
        self._made = {view: _view(state) for view, state in views.states.items()}
        self._model = instances(use_case)
        self._low, self._high = use_case.contract.field(use_case.model.target.field).limits
        # Ids have to differ, not to be secret; the operating system is asked once, for it takes long.
        self._draw = random.Random(secrets.randbits(256)).getrandbits

    def parse(self, document: Any) -> list[dict[str, Any]]:
        """The typed instances of a request; raises ``Problem`` 400, 413, or 422 naming every wrong field."""
        records, errors = [], []
        for position, instance in enumerate(entries(document, "instances", MAX_INSTANCES)):
            record, problems = check_record(self._model, instance, 0)
            if record is None:
                errors += [
                    {"pointer": f"/instances/{position}/{p.field}".rstrip("/"), "rule": p.rule, "detail": p.message}
                    for p in problems
                ]
            else:
                records.append(Warned(record, [p.rule for p in problems]) if problems else record)
        if errors:
            raise Problem(422, "The request breaks its contract", "Mend the fields listed under errors.", errors)
        return records

    def prepare(
        self, records: Sequence[Mapping[str, Any]], version: LoadedVersion | DescribedVersion, now_us: int
    ) -> Prepared:
        """Features and columns of typed instances by the version's view, as of ``now_us`` (the cluster's clock).

        What is missing is filled in by the ladder of ``version``. Raises ``StateGap`` when the view's state is not
        complete.
        """
        artifact = version.artifact
        self._views.check(artifact.view)
        made, count = self._made[artifact.view], len(records)
        entities = [record[artifact.entity] for record in records]
        asked = {name: [record.get(name) for record in records] for name in made.asked}
        read = made.reader.read(entities, now_us, asked)
        inputs = {
            name: np.array([np.nan if (v := record.get(name)) is None else v for record in records], dtype=np.float64)
            for name in made.numbers
        }
        if version.ladder is None:
            filled = Filled(read.values, read.status, np.zeros(count, np.uint8), {})
        else:
            filled = version.ladder.fill(read, entities, now_us)
        columns = derived.columns(made.page.view, filled.values, inputs, np.full(count, now_us, dtype=np.int64))
        strings = {name: [record[name] for record in records] for name in made.strings}
        numeric = _numeric(artifact, columns)
        fine = usable(artifact, columns, count)
        fine[list(filled.refused)] = False
        return Prepared(
            records, entities, read, filled, columns, strings, numeric, fine, now_us, made.page, artifact.view
        )

    def challenger(self, prepared: Prepared, version: DescribedVersion | LoadedVersion) -> Prepared:
        """The instances that the champion has answered as ``version`` is to have them; raises as ``prepare``.

        Versions of one view share what the champion's state and ladder gave.
        """
        if version.artifact.view == prepared.view:
            return replace(prepared, numeric=_numeric(version.artifact, prepared.columns))
        return self.prepare(prepared.records, version, prepared.now_us)

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
        parts: Sequence[Part] = (),
        assigned: Assigned | None = None,
    ) -> Answered:
        """The document and the log of ``prediction`` [n], of which the champion did not make the ``parts``."""
        own: list[Part | None] = [None] * len(prepared.records)
        for part in parts:
            for i in np.flatnonzero(part.taken).tolist():
                own[i] = part
        as_of = from_microseconds(prepared.now_us).isoformat().replace("+00:00", "Z")
        prefix = f"{self._draw(96):024x}"
        answers, logged = [], []
        said = (series.tolist() for series in (prediction.value, prediction.lower, prediction.upper))
        for i, (value, lower, upper) in enumerate(zip(*said, strict=True)):
            valid, bounded = math.isfinite(value), math.isfinite(lower) and math.isfinite(upper)
            # Whichever version says it: a number outside of the contract is no answer.
            allowed = self._low <= value <= self._high and (not bounded or lower <= value <= upper)
            identity = f"{prefix}{i:04x}"
            made_by = own[i]
            if made_by is None:
                version, variant, rows = champion, "champion", prepared
            else:
                version, variant, rows = made_by.version, "challenger", made_by.rows
            read, filled, made = rows.read, rows.filled, self._made[rows.view]
            statuses = filled.status[i].tolist()
            flagged = {}
            if any(statuses):  # anything but FRESH
                named = zip(made.stored, statuses, strict=True)
                flagged = {name: Status(status).name for name, status in named if status != Status.FRESH}
            degraded = rows.reasons(i) if flagged or not read.known[i] or i in filled.refused else []
            if isinstance(record := rows.records[i], Warned):
                degraded += record.warnings
            if not valid:
                degraded.append("no_answer")
            elif not allowed:
                degraded.append("output_refused")
            answers.append(
                {
                    "prediction_id": identity,
                    "value": value if allowed else None,
                    # No value lies beyond the limits, so the part of an interval that does says nothing.
                    "interval": [max(lower, self._low), min(upper, self._high)] if allowed and bounded else None,
                    "model_version": version,
                    "variant": variant,
                    "features": flagged,
                    "degraded": degraded,
                }
            )
            logged.append(
                {
                    "prediction_id": identity,
                    "_time": rows.now_us,
                    "entity": rows.entities[i],
                    "inputs": orjson.dumps({n: rows.records[i].get(n) for n in made.inputs}).decode(),
                    "stored": filled.values[i].tolist(),
                    "status": statuses,
                    "numeric": rows.numeric[i].tolist(),
                    "sequence": read.sequence,
                    "generation": read.generation,
                    "others": [number for position in read.others for number in position],
                    "view": rows.view,
                    "model_version": version,
                    "variant": variant,
                    "value": value,
                    "lower": lower,
                    "upper": upper,
                }
            )
        if assigned is not None:
            for row, given, unit in zip(logged, assigned.versions, assigned.units, strict=True):
                row["test"], row["assigned"], row["unit"] = assigned.test, given, unit
        return Answered({"predictions": answers, "as_of": as_of}, logged)

    def warm(self, version: LoadedVersion | DescribedVersion, now_us: int) -> None:
        """Answers made-up rows and drops the answers, so that no caller waits for a compiler or a first page.

        Of a version that is only described the rows are made and not answered.
        """
        made = self._made[version.artifact.view]
        record: dict[str, Any] = dict.fromkeys(made.strings, "") | dict.fromkeys(made.numbers, 1.0)
        for count in (1, 2):
            if isinstance(version, DescribedVersion):
                self.prepare([record] * count, version, now_us)
                continue
            prepared, prediction, _ = self.champion([record] * count, version, now_us)
            self.compose(prepared, prediction, version.version).records()

    def features(self, entity: str, now_us: int, view: str) -> dict[str, Any]:
        """What state of ``view`` holds for one entity now: value, status and age of every feature that needs no
        request.
        """
        self._views.check(view)
        made = self._made[view]
        read = made.reader.read([entity], now_us)
        if not read.known[0]:
            raise Problem(
                404,
                "Unknown entity",
                f"State has no event of {entity!r}: check the name; events of files get there by --materialize.",
            )
        return {
            "entity": entity,
            "view": view,
            "sequence": read.sequence,
            "generation": read.generation,
            "features": {
                name: {
                    "value": value if np.isfinite(value) else None,
                    "status": Status(status).name,
                    "age_seconds": age if np.isfinite(age) else None,
                }
                for name, value, status, age in zip(
                    made.stored,
                    read.values[0].tolist(),
                    read.status[0].tolist(),
                    read.age_s[0].tolist(),
                    strict=True,
                )
                if name in made.of_entity
            },
        }


def instances(use_case: UseCase) -> RecordModel:
    """The rules of one instance: the entity, and the inputs of every view of the page."""
    return compile_model(use_case.contract, (use_case.contract.entity, *use_case.inputs), f"{use_case.name}_instance")


def _view(state: OnlineState) -> _View:
    contract, view = state.use_case.contract, state.use_case.view
    numbers = tuple(name for name in view.inputs if contract.field(name).type is not FieldType.STRING)
    strings = (contract.entity, *(name for name in view.inputs if name not in numbers))
    asked = [*(near.asked for near in view.neighbours), [dimension.key for dimension in view.dimensions]]
    own = [dimension.features for dimension in view.dimensions if dimension.key == contract.entity]
    return _View(
        page=state.use_case,
        reader=state.bind(),
        stored=view.stored,
        inputs=view.inputs,
        numbers=numbers,
        strings=strings,
        asked=tuple(dict.fromkeys(name for names in asked for name in names)),
        of_entity=frozenset(view.of_entity).union(*own),
    )


def _numeric(artifact: Artifact, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [n, d]: the columns of the version's model."""
    return matrix(columns, artifact.numeric)


def usable(artifact: Artifact, columns: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """bool [n]: where anchor and scale allow a version to answer."""
    fine = np.isfinite(columns[artifact.anchor]) if artifact.anchor else np.ones(count, dtype=bool)
    with np.errstate(invalid="ignore"):
        if artifact.anchor and artifact.transform == "log":
            fine &= columns[artifact.anchor] > 0
        if artifact.scale:
            fine &= np.isfinite(columns[artifact.scale]) & (columns[artifact.scale] > 0)
    return fine
