"""A model version on disk: an ONNX graph, safetensors weights and normals, and one JSON page; never pickle.

``Runner`` is the only way from columns to answers: validation and the gateway both go through it. Importing
this module does not import torch; only ``save`` does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    RuntimeException,
)
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.processes import python_environment
from pipelines.training.normals import NORMALS, Normals, NormalsError, read_normals

if TYPE_CHECKING:
    from pipelines.training.networks import Network

# ONNX Runtime's exceptions share no base of their own.
_UNLOADABLE = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented_, RuntimeException)
Strings = Sequence[str | None] | np.ndarray
FORMAT = 1
GRAPH, WEIGHTS, PAGE = "model.onnx", "weights.safetensors", "artifact.json"
TOLERANCE = 1e-5
"""Largest relative difference allowed between the exported graph and the network it came from."""


class ArtifactError(RuntimeError):
    """A directory does not hold a usable model version; the message says what is wrong with which file."""


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HalfWidths(_Page):
    """Half-widths of the interval in units of scale · (transformed target): one for all, and one for each
    entity with enough calibration rows. ``rows`` is how many rows they were taken from.
    """

    everywhere: float
    by_entity: dict[str, float] = {}
    rows: int


class Calibration(HalfWidths):
    """The half-widths of answers from fresh values, and those of answers from held values and from normals.

    ``held`` and ``normal`` are None in a version without a fallback ladder; they are nowhere narrower than the rung
    above them.
    """

    coverage: float
    held: HalfWidths | None = None
    normal: HalfWidths | None = None

    def rung(self, level: int) -> HalfWidths | None:
        """The half-widths of a ``Level``; None where the version was not calibrated for it."""
        return (self, self.held, self.normal)[level]


class Level(IntEnum):
    """What an answer is made of: the last values (FRESH or HELD), or season's NORMALs in place of some."""

    FRESH = 0
    HELD = 1
    NORMAL = 2


class Output(_Page):
    """What the model answers: contract field, its unit, and how long after the request the answer holds."""

    field: str
    unit: str | None
    horizon_us: int


class Artifact(_Page):
    """The JSON page of a model version: everything but the weights that is needed to serve or to explain it.

    ``numeric`` columns are given in this order; ``vocabularies`` holds the known values of each categorical
    column; ``anchor`` and ``scale`` name columns. ``snapshot`` is the set of table versions that it was
    trained on.
    """

    format: Literal[1] = 1
    use_case: str
    contract: str
    contract_version: str
    view: str
    entity: str
    inputs: tuple[str, ...]
    numeric: tuple[str, ...]
    vocabularies: dict[str, tuple[str, ...]]
    anchor: str | None
    scale: str | None
    transform: Literal["identity", "log"]
    output: Output
    shape: dict[str, Any]
    calibration: Calibration | None = None
    snapshot: dict[str, int | str | dict[str, int]]
    training: dict[str, Any]
    code: str
    versions: dict[str, str]
    digests: dict[str, str] = {}

    @property
    def categorical(self) -> tuple[str, ...]:
        """The string columns, in the order of the graph's category input."""
        return tuple(self.vocabularies)


@dataclass(frozen=True)
class Prediction:
    """Answers in the target's unit, each [n]; all three are NaN where anchor or scale was not usable."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def encode_categories(values: Sequence[Strings], places: Sequence[Mapping[str, int]], rows: int) -> np.ndarray:
    """int64 codes [rows, c] by ``places`` (see ``places_of``); 0 for a value that is not there or unknown."""
    codes = np.zeros((rows, len(places)), dtype=np.int64)
    for column, (given, place) in enumerate(zip(values, places, strict=True)):
        codes[:, column] = [place.get(value, 0) if value is not None else 0 for value in given]
    return codes


def places_of(vocabulary: Sequence[str]) -> dict[str, int]:
    """Each value's code: its place in the vocabulary plus one, because 0 means unknown."""
    return {value: code for code, value in enumerate(vocabulary, start=1)}


def matrix(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """float64 [n, d]: the named columns side by side; ``KeyError`` names a missing one.

    For one row ``np.stack`` takes several times as long as everything else that is made of it.
    """
    return np.ascontiguousarray(np.array([columns[name] for name in names], dtype=np.float64).T)


class Runner:
    """A loaded model version. Safe to call from several threads; one thread inside each call."""

    def __init__(self, directory: Path | str) -> None:
        """Raises ``ArtifactError`` when the directory does not hold a model version of this format."""
        folder = Path(directory)
        self.artifact = load(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                (folder / GRAPH).read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except _UNLOADABLE as error:
            raise ArtifactError(f"{folder / GRAPH} is not a graph that ONNX Runtime can load: {error}") from error
        self._given = {entry.name for entry in self._session.get_inputs()}
        self._places = [places_of(vocabulary) for vocabulary in self.artifact.vocabularies.values()]
        self._log = self.artifact.transform == "log"
        self.normals: Normals | None = None
        if NORMALS in self.artifact.digests:
            try:
                self.normals = read_normals(folder)
            except NormalsError as error:
                raise ArtifactError(str(error)) from error

    def numeric(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 [n, d]: the numeric columns in the model's order; ``KeyError`` names a missing one."""
        return matrix(columns, self.artifact.numeric)

    def predict(
        self,
        columns: Mapping[str, np.ndarray],
        strings: Mapping[str, Strings],
        level: np.ndarray | None = None,
    ) -> Prediction:
        """Answers for n rows: float64 ``columns`` [n] by name and the categorical ``strings`` [n] by name.

        ``level`` [n] is the ``Level`` of each row, by default FRESH. Without a calibration for a row's level its
        interval is NaN. A missing column raises ``KeyError``.
        """
        artifact = self.artifact
        numeric = self.numeric(columns)
        rows = len(numeric)
        anchor = columns[artifact.anchor] if artifact.anchor else np.full(rows, 1.0 if self._log else 0.0)
        scale = columns[artifact.scale] if artifact.scale else np.ones(rows)
        feed = {
            "numeric": numeric,
            "categories": encode_categories([strings[name] for name in self._strings], self._places, rows),
            "anchor": anchor,
            "scale": scale,
        }
        (value,) = self._session.run(["value"], {name: feed[name] for name in self._given})
        usable = np.isfinite(value) & (scale > 0) & ((anchor > 0) if self._log else True)
        value = np.where(usable, value, np.nan)
        half = self._half_widths(strings, rows, level) * scale
        if self._log:
            spread = np.exp(half)
            return Prediction(value, value / spread, value * spread)
        return Prediction(value, value - half, value + half)

    @property
    def _strings(self) -> tuple[str, ...]:
        return self.artifact.categorical

    def _half_widths(self, strings: Mapping[str, Strings], rows: int, level: np.ndarray | None) -> np.ndarray:
        calibration = self.artifact.calibration
        if calibration is None:
            return np.full(rows, np.nan)
        if level is None or not level.any():
            return _widths(calibration, strings[self.artifact.entity] if calibration.by_entity else (), rows)
        entities = np.asarray(strings[self.artifact.entity], dtype=object)
        found = np.full(rows, np.nan)
        for rung in Level:
            mine, widths = level == rung, calibration.rung(rung)
            if widths is not None and mine.any():
                found[mine] = _widths(widths, entities[mine], int(mine.sum()))
        return found


def _widths(widths: HalfWidths, entities: Strings, rows: int) -> np.ndarray:
    if not widths.by_entity:
        return np.full(rows, widths.everywhere)
    return np.array([widths.by_entity.get(str(entity), widths.everywhere) for entity in entities])


def save(directory: Path | str, network: Network, artifact: Artifact, samples: Mapping[str, np.ndarray]) -> Artifact:
    """Write a model version and return its page, with the files' digests filled in.

    ``samples`` are at least one row of the graph's inputs (``numeric`` [n, d], ``categories`` [n, c],
    ``anchor`` and ``scale`` [n]) on which graph and network are compared at batch 1, 2 and 1,000. Raises
    ``ArtifactError`` when they differ by more than ``TOLERANCE``, relatively.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    network = network.eval()
    n = torch.export.Dim.AUTO  # a named Dim may freeze the sample's batch size and say nothing
    names = ("numeric", "categories", "anchor", "scale")
    given = {name: torch.from_numpy(_batch(samples[name], 3)) for name in names}
    program = torch.onnx.export(
        network,
        tuple(given.values()),
        dynamo=True,
        input_names=list(names),
        output_names=["value"],
        dynamic_shapes=tuple({0: n} for _ in names),
        verbose=False,
    )
    if program is None:
        raise ArtifactError("torch.onnx.export returned no program; nothing was written")
    graph = program.model_proto.SerializeToString()
    compare(graph, network, samples)
    (folder / GRAPH).write_bytes(graph)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    return write_page(folder, artifact)


def write_page(directory: Path | str, artifact: Artifact) -> Artifact:
    """Write ``artifact.json`` with the digests of the files beside it; also used to add normals and calibration."""
    folder = Path(directory)
    files = (GRAPH, WEIGHTS, *((NORMALS,) if (folder / NORMALS).exists() else ()))
    digests = {name: _digest(folder / name) for name in files}
    complete = artifact.model_copy(update={"digests": digests})
    (folder / PAGE).write_text(complete.model_dump_json(indent=2) + "\n")
    return complete


def compare(graph: bytes, network: Network, samples: Mapping[str, np.ndarray]) -> None:
    """Raise ``ArtifactError`` unless the graph answers as the network does at batch 1, 2 and 1,000."""
    import torch

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    given = {entry.name for entry in session.get_inputs()}
    for size in (1, 2, 1000):
        batch = {name: _batch(values, size) for name, values in samples.items()}
        with torch.no_grad():
            wanted = network(*(torch.from_numpy(batch[k]) for k in ("numeric", "categories", "anchor", "scale")))
        (found,) = session.run(["value"], {name: batch[name] for name in given})
        if found.shape != (size,) or not np.allclose(found, wanted.numpy(), TOLERANCE, 1e-9, equal_nan=True):
            worst = np.nanmax(np.abs(found - wanted.numpy())) if found.shape == (size,) else found.shape
            raise ArtifactError(f"the exported graph differs from the network at batch {size} (worst: {worst})")


def load(directory: Path | str) -> Artifact:
    """The page of a model version, after its files were found to be those it was written with."""
    folder = Path(directory)
    path = folder / PAGE
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {PAGE}: it is not a model version") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"{path} has format {found!r}, this code reads {FORMAT}: train again or update the code")
    try:
        artifact = Artifact.model_validate(document)
    except ValidationError as error:
        raise ArtifactError(f"{path} does not fit its format: {error}") from error
    for name in (GRAPH, WEIGHTS, *((NORMALS,) if NORMALS in artifact.digests else ())):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} holds no {name}")
        if _digest(folder / name) != artifact.digests.get(name):
            raise ArtifactError(f"{folder / name} is not the file that {PAGE} was written with: fetch it again")
    return artifact


def verify(directory: Path | str) -> Artifact:
    """``load``, and answer two batches of made-up rows; raises ``ArtifactError``. See ``verify_apart``."""
    runner = Runner(directory)
    artifact = runner.artifact
    names = {*artifact.numeric, *(name for name in (artifact.anchor, artifact.scale) if name)}
    for rows in (1, 3):
        columns = {name: np.ones(rows) for name in names}
        prediction = runner.predict(columns, {name: ["?"] * rows for name in (*artifact.categorical, artifact.entity)})
        if prediction.value.shape != (rows,) or not np.isfinite(prediction.value).all():
            raise ArtifactError(f"{directory}: the model's answer to {rows} rows of ones is {prediction.value}")
    return artifact


def verify_apart(directory: Path | str, timeout_s: float = 60.0) -> Artifact:
    """``verify`` in a process of its own: a graph that crashes or hangs the runtime takes nobody with it."""
    command = [sys.executable, "-m", __name__, str(directory)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=python_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"{directory} did not load within {timeout_s:g} s") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        raise ArtifactError(f"{directory} cannot be loaded: {reason[0]}")
    return load(directory)


def _batch(values: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(values[np.arange(size) % len(values)])


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


if __name__ == "__main__":
    verify(sys.argv[1])
