"""A model version on disk: its graph answers as the network does, and damage is found and named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.training import artifact as artifacts
from pipelines.training.artifact import Artifact, ArtifactError, Calibration, Output, Runner, save, write_page
from pipelines.training.networks import Network, Shape, Transform, fit_preprocessing

NUMERIC = ("a", "b", "c")
VOCABULARIES = {"place": ("north", "south"), "kind": ("x", "y", "z")}


def inputs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    numeric = rng.normal(10, 4, size=(rows, 3))
    numeric[rng.random((rows, 3)) < 0.1] = np.nan
    codes = np.stack([rng.integers(0, 3, rows), rng.integers(0, 4, rows)], axis=1)
    return {
        "numeric": numeric,
        "categories": codes,
        "anchor": rng.uniform(50, 150, rows),
        "scale": rng.uniform(1, 9, rows),
    }


def page(transform: Transform, shape: Shape, **changes: Any) -> Artifact:
    fields: dict[str, Any] = {
        "use_case": "toy", "contract": "readings", "contract_version": "1.0.0", "view": "00ff",
        "entity": "place",
        "inputs": (), "numeric": NUMERIC, "vocabularies": VOCABULARIES, "anchor": "level", "scale": "spread",
        "transform": transform, "output": Output(field="flow", unit="L/s", horizon_us=0),
        "shape": {"hidden": shape.hidden},
        "snapshot": {"events_version": 3, "training_version": 1}, "training": {}, "code": "aa",
        "versions": {},
    }  # fmt: skip
    return Artifact(**{**fields, **changes})


def make(folder: Path, transform: Transform = "identity", **changes: Any) -> Network:
    shape = Shape(3, (2, 3), (16, 8), members=3, bins=5, transform=transform)
    torch.manual_seed(1)
    given = inputs(300)
    network = Network(shape).fitted(fit_preprocessing(given["numeric"], np.full(300, 0.2), shape.bins)).eval()
    save(folder, network, page(transform, shape, **changes), given)
    return network


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    make(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def ask(runner: Runner, given: dict[str, np.ndarray], level: np.ndarray | None = None) -> artifacts.Prediction:
    columns = dict(zip(NUMERIC, given["numeric"].T, strict=True)) | {
        "level": given["anchor"],
        "spread": given["scale"],
    }
    strings = {
        name: [("elsewhere", *vocabulary)[code] for code in given["categories"][:, place]]
        for place, (name, vocabulary) in enumerate(VOCABULARIES.items())
    }
    return runner.predict(columns, strings, level)


@pytest.mark.parametrize("transform", ["identity", "log"])
def test_the_graph_answers_as_the_network_at_any_batch_size(tmp_path: Path, transform: Transform) -> None:
    network = make(tmp_path, transform)
    runner = Runner(tmp_path)
    for rows in (1, 2, 7, 1000):
        given = inputs(rows, seed=rows)
        with torch.no_grad():
            wanted = network(*(torch.from_numpy(values) for values in given.values())).numpy()
        assert ask(runner, given).value == pytest.approx(wanted, rel=1e-5)


def test_a_graph_that_differs_from_its_network_is_refused(saved: Path) -> None:
    torch.manual_seed(2)
    other = Network(Shape(3, (2, 3), (16, 8), members=3, bins=5)).eval()
    with pytest.raises(ArtifactError, match="differs from the network at batch 1"):
        artifacts.compare((saved / "model.onnx").read_bytes(), other, inputs(50))


def test_a_version_is_three_files_of_which_none_is_a_pickle(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        "artifact.json",
        "model.onnx",
        "weights.safetensors",
    ]
    for file in saved.iterdir():
        assert file.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")


def test_weights_on_disk_are_those_of_the_graph(saved: Path) -> None:
    from safetensors.torch import load_file

    network = Network(Shape(3, (2, 3), (16, 8), members=3, bins=5)).eval()
    network.load_state_dict(load_file(saved / "weights.safetensors"))
    artifacts.compare((saved / "model.onnx").read_bytes(), network, inputs(50))


def test_an_interval_is_the_entitys_own_and_else_everybodys(copied: Path) -> None:
    calibration = Calibration(coverage=0.9, everywhere=2.0, by_entity={"north": 0.5}, rows=900)
    write_page(copied, artifacts.load(copied).model_copy(update={"calibration": calibration}))
    given = inputs(3)
    given["categories"][:, 0] = [1, 2, 0]  # north, south, elsewhere
    found = ask(Runner(copied), given)
    assert (found.upper - found.value) / given["scale"] == pytest.approx([0.5, 2.0, 2.0])
    assert (found.value - found.lower) / given["scale"] == pytest.approx([0.5, 2.0, 2.0])


def test_an_interval_of_a_logarithm_is_a_factor_and_stays_positive(tmp_path: Path) -> None:
    calibration = Calibration(coverage=0.9, everywhere=3.0, rows=900)
    make(tmp_path, "log", calibration=calibration, scale=None)
    found = ask(Runner(tmp_path), inputs(20))
    assert (found.lower > 0).all()
    assert found.upper / found.value == pytest.approx(np.full(20, np.exp(3.0)))
    assert found.value / found.lower == pytest.approx(np.full(20, np.exp(3.0)))


def test_without_a_calibration_there_is_no_interval(saved: Path) -> None:
    found = ask(Runner(saved), inputs(2))
    assert np.isfinite(found.value).all()
    assert np.isnan(found.lower).all()
    assert np.isnan(found.upper).all()


@pytest.mark.parametrize(("name", "value"), [("anchor", np.nan), ("scale", np.nan), ("scale", 0.0), ("scale", -1.0)])
def test_an_unusable_anchor_or_scale_gives_no_number_at_all(copied: Path, name: str, value: float) -> None:
    calibration = Calibration(coverage=0.9, everywhere=2.0, rows=900)
    write_page(copied, artifacts.load(copied).model_copy(update={"calibration": calibration}))
    given = inputs(3)
    given[name][1] = value
    found = ask(Runner(copied), given)
    for part in (found.value, found.lower, found.upper):
        assert np.isnan(part).tolist() == [False, True, False]


def test_a_column_that_is_not_given_is_named(saved: Path) -> None:
    with pytest.raises(KeyError, match="b"):
        Runner(saved).predict({"a": np.ones(1), "c": np.ones(1)}, {"place": ["north"], "kind": ["x"]})


def _set(folder: Path, **changes: Any) -> None:
    path = folder / "artifact.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "artifact.json").unlink(), "holds no artifact.json"),
        (lambda f: (f / "artifact.json").write_text("{"), "is not JSON"),
        (lambda f: _set(f, format=2), "has format 2, this code reads 1"),
        (lambda f: _set(f, surprise=1), "does not fit its format"),
        (lambda f: (f / "weights.safetensors").unlink(), "holds no weights.safetensors"),
        (
            lambda f: (f / "model.onnx").write_bytes(b"x"),
            "is not the file that artifact.json was written with",
        ),
    ],
)
def test_damage_is_found_and_named(copied: Path, damage: Any, words: str) -> None:
    damage(copied)
    with pytest.raises(ArtifactError, match=words):
        Runner(copied)


def test_a_graph_that_does_not_load_is_found_in_a_process_of_its_own(copied: Path) -> None:
    assert artifacts.verify_apart(copied).use_case == "toy"
    (copied / "model.onnx").write_bytes(b"\x08\x0a garbage")
    digest = hashlib.blake2b((copied / "model.onnx").read_bytes(), digest_size=16).hexdigest()
    _set(
        copied,
        digests={**json.loads((copied / "artifact.json").read_text())["digests"], "model.onnx": digest},
    )
    with pytest.raises(ArtifactError, match=r"not a graph that ONNX Runtime can load"):
        artifacts.verify_apart(copied)


def test_a_version_that_takes_too_long_to_load_is_given_up(saved: Path) -> None:
    with pytest.raises(ArtifactError, match=r"did not load within 0.01 s"):
        artifacts.verify_apart(saved, timeout_s=0.01)


def test_serving_a_version_does_not_need_torch(saved: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pipelines.training.artifact import verify; "
        f"verify({str(saved)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
