"""Simulated pressures of Net6, which comes with wntr: EPANET's hydraulics every 15 minutes, with leaks.

A leak is an outflow of fixed size at a junction for some hours; EPANET then finds what it does to all pressures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

STEP_MINUTES = 15
LEAKS, LEAK_HOURS, LEAK_M3_S = 8, 4, 0.03
NOISE_M = 0.15
_LEAKED_M = (35.0, 60.0)  # the usual pressure of nodes that may leak


@dataclass(frozen=True)
class Leak:
    """An outflow at a node, places in ``Network.names``, from one hour of the replay to before another."""

    node: int
    start_hour: int
    stop_hour: int


@dataclass(frozen=True)
class Network:
    """Pressures float64[steps, nodes] (m) of the nodes ``names``, and those of the same network without leaks."""

    names: tuple[str, ...]
    pressure: np.ndarray
    unleaked: np.ndarray
    leaks: tuple[Leak, ...]


def simulate(minutes: int, seed: int) -> Network:
    """The network for so many minutes. Needs wntr."""
    hours = -(-minutes // 60) + 1
    names, unleaked = _run(hours, ())
    rng = np.random.default_rng(seed)
    usual = np.median(unleaked, axis=0)
    junction = np.array([name.startswith("JUNCTION") for name in names])
    able = np.flatnonzero(junction & (usual > _LEAKED_M[0]) & (usual < _LEAKED_M[1]))
    starts = rng.integers(1, max(hours - 1 - LEAK_HOURS, 2), LEAKS)
    nodes = rng.choice(able, LEAKS, replace=False)
    spans = zip(nodes.tolist(), starts.tolist(), strict=True)
    leaks = tuple(Leak(node, start, start + LEAK_HOURS) for node, start in spans)
    _, pressure = _run(hours, [(names[leak.node], leak) for leak in leaks])
    return Network(names, pressure, unleaked, leaks)


def _run(hours: int, leaks: Sequence[tuple[str, Leak]]) -> tuple[tuple[str, ...], np.ndarray]:
    import wntr

    with as_file(files("wntr") / "library" / "networks" / "Net6.inp") as source:
        model = wntr.network.WaterNetworkModel(str(source))
    times = model.options.time
    times.duration, times.hydraulic_timestep, times.report_timestep = hours * 3600, STEP_MINUTES * 60, STEP_MINUTES * 60
    for name, leak in leaks:
        on = [float(leak.start_hour <= hour < leak.stop_hour) for hour in range(hours + 1)]
        model.add_pattern(f"leak-{name}", on)
        model.get_node(name).add_demand(LEAK_M3_S, f"leak-{name}")
    with tempfile.TemporaryDirectory() as place:
        found = wntr.sim.EpanetSimulator(model).run_sim(file_prefix=str(Path(place) / "net6"))
    pressure = found.node["pressure"]
    return tuple(pressure.columns), pressure.to_numpy(np.float64)


class Sensors:
    """What the sensors of ``network`` measure: pressures between the steps by straight lines, with noise, to the mm."""

    def __init__(self, network: Network, seed: int) -> None:
        self._network = network
        self._seed = seed
        # A delayed reading is made again when it is sent, so that no minute has to be kept.
        self.at = lru_cache(maxsize=256)(self._measure)

    def _measure(self, minute: int) -> np.ndarray:
        noise = np.random.default_rng((self._seed, minute)).normal(0.0, NOISE_M, len(self._network.names))
        return np.round(between(self._network.pressure, minute) + noise, 3)


def between(steps: np.ndarray, minute: int) -> np.ndarray:
    """float64[nodes] of a minute, by straight lines between the steps."""
    step, rest = divmod(minute, STEP_MINUTES)
    share = rest / STEP_MINUTES
    found: np.ndarray = steps[step] * (1 - share) + steps[step + 1] * share
    return found
