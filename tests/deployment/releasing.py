"""What tests of releases on the demo's cluster share: callers that never stop, an operator, copies of the champion."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import onnx
import pytest

from cluster import processes, session
from pipelines.training.artifact import load as load_page
from pipelines.training.artifact import write_page
from pipelines.training.registry import Registry
from serving.client import Client, TidegateError
from serving.drills import Drill, register_copy, register_like
from tests.deployment.waiting import until

SETTLED = ("idle", "watching")
CALLERS = 3
INSTANCE = {"district": "dma_1", "temperature": 8.0, "rain": 0.0, "holiday": False}


@dataclass
class Load:
    """Callers that never stop; what they got."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)


@pytest.fixture
def load(demo, request) -> Iterator[Load]:
    found, stop, lock = Load(), threading.Event(), threading.Lock()
    retries = getattr(request, "param", 0)

    def call() -> None:
        with demo.client(retries=retries, timeout_s=20) as client:
            while not stop.is_set():
                try:
                    (answer,) = client.predict([INSTANCE])
                except (TidegateError, httpx.TransportError) as error:
                    with lock:
                        found.failures.append(repr(error))
                    continue
                with lock:
                    found.answers += 1
                    found.versions.add(answer.model_version)
                    if answer.value is None or not 0 <= answer.value <= 300:
                        found.failures.append(f"invalid answer {answer}")
                time.sleep(0.004)

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for thread in callers:
        thread.start()
    yield found
    stop.set()
    for thread in callers:
        thread.join()
    assert found.failures == []
    assert found.answers > 0


@pytest.fixture
def client(demo) -> Iterator[Client]:
    with demo.client() as found:
        yield found
        if (left := found.rollout()).phase not in SETTLED:  # a test that failed leaves nothing to the next one
            found.rollout_command("abort", "the test ended")
            finished(found, str(left.challenger))


def copy(demo, client, drill: Drill | None = None) -> str:
    champion = client.rollout().champion
    assert champion is not None
    return register_copy("aqua", champion, drill, Registry(demo.settings), demo.settings)


def brittle(demo, client, tmp_path: Path) -> str:
    """A registered version that is the champion up to 40 degC and answers NaN above, as one trained on a cool year may;
    its number.
    """
    champion, registry = client.rollout().champion, Registry(demo.settings)
    source = registry.version("aqua", champion)
    folder = tmp_path / "brittle"
    shutil.copytree(registry.download("aqua", champion, demo.settings.cache_dir / "models"), folder)
    artifact, model = load_page(folder), onnx.load(folder / "model.onnx")
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["in range" if name == output.name else name for name in node.output]
    kind = output.type.tensor_type.elem_type
    number = onnx.helper.make_tensor
    model.graph.initializer.extend(
        [
            number("column", onnx.TensorProto.INT64, [], [artifact.numeric.index("temperature")]),
            number("hottest", onnx.TensorProto.DOUBLE, [], [40.0]),
            number("nothing", kind, [], [math.nan]),
        ]
    )
    model.graph.node.extend(
        [
            onnx.helper.make_node("Gather", ["numeric", "column"], ["temperature"], axis=1),
            onnx.helper.make_node("Greater", ["temperature", "hottest"], ["too hot"]),
            onnx.helper.make_node("Where", ["too hot", "nothing", "in range"], [output.name]),
        ]
    )
    onnx.save(model, folder / "model.onnx")
    write_page(folder, artifact)
    return register_like(source, folder, registry).version


def answering(client: Client, version: str) -> None:
    """Waits until that version answers a part of the requests."""
    until(lambda: (s := client.rollout()).challenger == version and s.evidence.served > 50, f"{version} answers", 90)


def finished(client: Client, version: str) -> str | None:
    until(lambda: (s := client.rollout()).ended == version and s.phase in SETTLED, f"{version} is over", 90)
    return client.rollout().outcome


def replicas(demo, application: str) -> list[int]:
    return pids(demo, f"ray::ServeReplica:{application}:")


def pids(demo, prefix: str) -> list[int]:
    running = session.current(demo.settings)
    assert running is not None
    found = processes.session_pids(running.environment_marker)
    return [pid for pid in found if processes.command(pid).startswith(prefix)]


def tidegate(demo, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as an operator of this cluster runs it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TIDEGATE_"))}
    return subprocess.run(
        [str(Path(sys.executable).with_name("tidegate")), *arguments],
        env=environment | demo.settings.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
