"""``python -m tests.benchmarks.water_network [--minutes N]``: replays the network, checks everything, reports."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from cluster.settings import Settings
from cluster.tables import Tables
from tests.benchmarks.harness import report, say
from tests.benchmarks.water_network import checks, faults
from tests.benchmarks.water_network.network import Network, Sensors, simulate
from tests.benchmarks.water_network.replay import replay

MINUTES, SEED, SAMPLED = 1_560, 20, 200


def main() -> int:
    """1 when a reading was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.water_network", description=__doc__)
    parser.add_argument("--minutes", type=int, default=MINUTES, help=f"{MINUTES} (the default) make 5 million readings")
    minutes = parser.parse_args().minutes
    network = _simulated(minutes)
    count = len(network.names)
    say(f"Net6, simulated: {count:,} nodes, {minutes:,} minutes, {len(network.leaks)} leaks")
    drawn = faults.draw(count, minutes, SEED)
    say("sensors: " + ", ".join(f"{fault.name.lower()} {int((drawn.kind == fault).sum())}" for fault in faults.Fault))
    leaking = {leak.node for leak in network.leaks}
    others = np.random.default_rng(SEED).permutation(count).tolist()
    sampled = [*leaking, *(node for node in others if node not in leaking)][:SAMPLED]
    sample = [network.names[node] for node in sampled]
    with tempfile.TemporaryDirectory() as place:
        settings = Settings(home=Path(place), clock="replay")
        tables = Tables(settings.tables_url, settings.storage_options)
        done = replay(settings, network.names, Sensors(network, SEED), drawn, minutes, sample)
        missing = checks.lost(done.acknowledged, tables, settings.buckets)
        checks.same_state(done, tables, sample)
    say(f"{done.wall_s:.1f} s; CPU time: gateway {done.gateway_cpu_s:.1f} s, sender {done.sender_cpu_s:.1f} s")
    checks.show_leaks(done, network, sample)
    readings = done.acknowledged.new + sum(map(len, done.acknowledged.refused))
    report(
        "water_network",
        {
            "readings": readings,
            "readings_per_s": readings / done.wall_s,
            "rss_gb": done.peak_kib * 1024 / 1e9,
            "lost": missing,
            "times_real_time": minutes * 60 / done.wall_s,
        },
    )
    return 1 if missing else 0


def _simulated(minutes: int) -> Network:
    # In a process of its own, so that what the simulator leaves in memory is no part of the replay's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(simulate, minutes, SEED).result()


if __name__ == "__main__":
    raise SystemExit(main())
