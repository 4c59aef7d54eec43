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
from pipelines.features.online import BoundReader
from pipelines.features.served import Status
from pipelines.features.windows import view_fingerprint
from pipelines.spec import FieldType, UseCase
from serving.problems import Problem
from serving.runner import LoadedVersion

MAX_INSTANCES = 1000


@dataclass(frozen=True)
class Answered:
    """The answer's document, and one log record per prediction (``served.SERVED_SCHEMA`` as JSON)."""

    document: dict[str, Any]
    records: list[bytes]


class Predictor:
    """Answers for one use case; the champion is handed in with each call, so a swap needs no lock."""

    def __init__(self, use_case: UseCase, reader: BoundReader) -> None:
        self._use_case = use_case
        self._reader = reader
        contract, view = use_case.contract, use_case.view
        self._model = compile_model(contract, (contract.entity, *view.inputs), f"{use_case.name}_instance")
        self._numbers = [n for n in view.inputs if contract.field(n).type is not FieldType.STRING]
        self._strings = {contract.entity, *use_case.model.categorical}
        self._stored = view.stored
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

    def answer(self, records: Sequence[Mapping[str, Any]], champion: LoadedVersion, now_us: int) -> Answered:
        """Predicts for typed instances, with features as of ``now_us`` (the cluster's clock)."""
        use_case = self._use_case
        count = len(records)
        entities = [record[use_case.contract.entity] for record in records]
        read = self._reader.read(entities, now_us)
        inputs = {
            name: np.array([np.nan if (v := record.get(name)) is None else v for record in records], dtype=np.float64)
            for name in self._numbers
        }
        columns = derived.columns(use_case.view, read.values, inputs, np.full(count, now_us, dtype=np.int64))
        strings = {name: [record[name] for record in records] for name in self._strings}
        with np.errstate(all="ignore"):
            prediction = champion.runner.predict(columns, strings)
        numeric = champion.runner.numeric(columns)
        prefix = os.urandom(12).hex()
        answers, logged = [], []
        for i in range(count):
            value, lower, upper = (
                float(series[i]) for series in (prediction.value, prediction.lower, prediction.upper)
            )
            valid = np.isfinite(value)
            identity = f"{prefix}{i:04x}"
            flagged = {
                name: Status(status).name
                for name, status in zip(self._stored, read.status[i].tolist(), strict=True)
                if status != Status.FRESH
            }
            degraded = []
            if not read.known[i]:
                degraded.append("unknown_entity")
            if Status.STALE.name in flagged.values():
                degraded.append("stale_features")
            if Status.MISSING.name in flagged.values():
                degraded.append("missing_features")
            if not valid:
                degraded.append("no_answer")
            answers.append(
                {
                    "prediction_id": identity,
                    "value": value if valid else None,
                    "interval": [lower, upper] if valid else None,
                    "model_version": champion.version,
                    "variant": "champion",
                    "features": flagged,
                    "degraded": degraded,
                }
            )
            logged.append(
                orjson.dumps(
                    {
                        "prediction_id": identity,
                        "_time": now_us,
                        "entity": entities[i],
                        "inputs": orjson.dumps({n: records[i].get(n) for n in use_case.view.inputs}).decode(),
                        "stored": read.values[i].tolist(),
                        "status": read.status[i].tolist(),
                        "numeric": numeric[i].tolist(),
                        "sequence": read.sequence,
                        "generation": read.generation,
                        "view": self._fingerprint,
                        "model_version": champion.version,
                        "variant": "champion",
                        "value": value,
                        "lower": lower,
                        "upper": upper,
                    }
                )
            )
        as_of = from_microseconds(now_us).isoformat().replace("+00:00", "Z")
        return Answered({"predictions": answers, "as_of": as_of}, logged)

    def warm(self, champion: LoadedVersion, now_us: int) -> None:
        """Answers made-up rows and drops the answers, so that no caller waits for a compiler or a first page."""
        record: dict[str, Any] = dict.fromkeys(self._strings, "") | dict.fromkeys(self._numbers, 1.0)
        for count in (1, 2):
            self.answer([record] * count, champion, now_us)

    def features(self, entity: str, now_us: int) -> dict[str, Any]:
        """What state holds for one entity now: value, status and age of every stored feature."""
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
            },
        }
