"""The peers, one worker each: MLflow serving the same graph, and Feast's server giving the same features and no answer.

Each runs only while it is measured. What it answers is compared with what the gateway answers first.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import processes, session
from pipelines import usecases
from tests.benchmarks.features.joins import FEAST
from tests.benchmarks.gateway import USE_CASE
from tests.benchmarks.gateway.world import Side, World, http, in_turn, instance, lowest_ratio, ours
from tests.benchmarks.harness import Incomparable, peer

CHECKED = 20
_START_S = 120.0


def mlflow(world: World, pairs: int) -> dict[str, float]:
    """``mlflow models serve`` with the version's graph, which is given the features; throughput, the lowest ratio.

    MLflow gets them as named tensors, which is its shortest way to the runtime: no data frame is made. It runs in this
    environment, so that runtime and graph are those of the gateway, with one thread in the runtime as there.
    """
    path, port = "/invocations", session.free_port()
    bodies = [json.dumps({"inputs": given}) for given in _tensors(world)]
    with tempfile.TemporaryDirectory() as place:
        _save_model(world.artifact, Path(place) / "model", json.loads(bodies[0])["inputs"])
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(Path(place) / "model")]
        command += ["--host", "127.0.0.1", "--port", str(port), "--env-manager", "local", "--workers", "1"]
        with _server(command, Path(place), port, "/ping", {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}):
            with world.client() as client:
                for name, body in list(zip(world.names, bodies, strict=True))[:CHECKED]:
                    (mine,) = client.predict([instance(name)])
                    (theirs,) = np.ravel(_ask(port, path, body)["predictions"]["value"]).tolist()
                    if mine.value is None or not math.isclose(mine.value, theirs, rel_tol=1e-9):
                        raise Incomparable(f"{name}: {mine.value} here and {theirs} from MLflow")
            sides = {"ours": ours(world), "MLflow": Side(port, [http(path, body) for body in bodies])}
            return {"vs_mlflow": lowest_ratio(in_turn(sides, pairs), "ours", "MLflow")}


def feast(world: World, pairs: int) -> dict[str, float]:
    """Feast's feature server with SQLite, reading ten features; throughput against ours with a model, the lowest ratio.

    Its access log is off as ours is, and its worker is not restarted on the way, which would fail requests.
    """
    path, port, stored = "/get-online-features", session.free_port(), usecases.load(USE_CASE).view.stored
    wanted = [f"flow:{name}" for name in stored]
    bodies = [json.dumps({"features": wanted, "entities": {"sensor": [name]}}) for name in world.names]
    with tempfile.TemporaryDirectory() as place:
        values = _features(world)
        columns = {name: values[:, column] for column, name in enumerate(stored)}
        pq.write_table(pa.table({"sensor": world.names, **columns}), Path(place) / "features.parquet")
        python = peer("feast", FEAST)
        subprocess.run([str(python), "-P", str(Path(__file__).with_name("feast_store.py")), place], check=True)
        command = [str(python.with_name("feast")), "--chdir", place, "serve", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1", "--no-access-log", "--max-requests", "0"]
        with _server(command, Path(place), port, "/health", {}):
            for body, mine in list(zip(bodies, values, strict=True))[:CHECKED]:
                answer = _ask(port, path, body)
                found = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
                theirs = [found[name]["values"][0] for name in stored]
                if theirs != mine.tolist():
                    raise Incomparable(f"{body}: {mine.tolist()} here and {theirs} from Feast")
            sides = {"ours": ours(world), "Feast": Side(port, [http(path, body) for body in bodies])}
            return {"vs_feast_server": lowest_ratio(in_turn(sides, pairs), "ours", "Feast")}


def _features(world: World) -> np.ndarray:
    """float64 [sensors, 10]: the stored features as the gateway has them now."""
    stored = usecases.load(USE_CASE).view.stored
    with world.client() as client:
        answers = [client.features(name) for name in world.names]
    if any(value.status != "FRESH" for answer in answers for value in answer.features.values()):
        raise Incomparable("a feature is not fresh: the sides would do different work")
    return np.array([[answer.features[name].value for name in stored] for answer in answers], dtype=np.float64)


def _tensors(world: World) -> list[dict[str, Any]]:
    """What the graph is given for each sensor: the inputs by name that it has."""
    import onnxruntime

    use_case = usecases.load(USE_CASE)
    graph = onnxruntime.InferenceSession(world.artifact / "model.onnx", providers=["CPUExecutionProvider"])
    given = {entry.name for entry in graph.get_inputs()}
    made = []
    for code, (name, stored) in enumerate(zip(world.names, _features(world).tolist(), strict=True), start=1):
        inputs = instance(name)
        columns = dict(zip(use_case.view.stored, stored, strict=True))
        columns |= {"temperature": inputs["temperature"], "holiday": float(inputs["holiday"])}
        tensors = {
            "numeric": [[columns[column] for column in use_case.model.numeric]],
            "categories": [[code]],  # the vocabulary has the sensors in their order
            "anchor": [columns[use_case.model.anchor or ""]],
            "scale": [1.0],
        }
        if odd := given - tensors.keys():
            raise Incomparable(f"the graph wants {odd}, which nobody gives to MLflow")
        made.append({tensor: value for tensor, value in tensors.items() if tensor in given})
    return made


def _save_model(artifact: Path, place: Path, given: dict[str, Any]) -> None:
    import mlflow.onnx
    import onnx
    from mlflow.models import infer_signature

    kinds = {"categories": np.int64}
    inputs = {name: np.array(value, dtype=kinds.get(name, np.float64)) for name, value in given.items()}
    mlflow.onnx.save_model(
        onnx.load(artifact / "model.onnx"),
        place,
        signature=infer_signature(inputs, {"value": np.zeros(1)}),
        onnx_session_options={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
        pip_requirements=[],  # it is served by the environment that is there
    )


def _ask(port: int, path: str, body: str) -> Any:
    answer = httpx.post(
        f"http://127.0.0.1:{port}{path}", content=body, headers={"content-type": "application/json"}, timeout=30
    )
    return answer.raise_for_status().json()


@contextmanager
def _server(command: Sequence[str], place: Path, port: int, health: str, environment: dict[str, str]) -> Iterator[None]:
    """A server that answers ``health``; it and everything that it started are gone at the end."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
    own["PATH"] = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", os.defpath)])
    log = place / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=place, env=own | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _START_S
        while not _healthy(port, health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not answer on {health}: {log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        family = processes.descendants([process.pid])
        process.terminate()
        processes.end(lambda: processes.still_alive(family))
        process.kill()
        process.wait()


def _healthy(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
