"""Ours against Pandera and Great Expectations on one million rows in memory, side by side in every round.

A peer is a process that reads ``clean`` or ``bad60`` and answers with its seconds; which rows it found is checked.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather

from pipelines.contracts.rows import check, from_arrow
from tests.benchmarks.contracts.data import BAD, CONTRACT, KINDS, NOW_US, ROWS, table
from tests.benchmarks.harness import Incomparable, peer, say

PEERS = {"pandera": ("pandera[polars]==0.35.0", "numpy"), "gx": ("great_expectations==1.24.1", "pyarrow")}
ROUNDS = 7
_HERE = Path(__file__).resolve().parent


class _Peer:
    """A peer's process over files of one folder."""

    def __init__(self, name: str, home: Path) -> None:
        command = [str(peer(name, PEERS[name])), "-P", str(_HERE / f"{name}_peer.py"), str(home), ",".join(KINDS)]
        self._home = home
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, rows: str) -> float:
        """How long it takes; what it found is in ``bad``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        while line and not line.startswith('{"seconds"'):
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with {self._process.wait()}")
        return float(json.loads(line)["seconds"])

    def bad(self) -> np.ndarray:
        """The rows that it found to be bad, ascending."""
        found: np.ndarray = np.load(self._home / "bad.npy")
        return found

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def figures() -> dict[str, float]:
    """Times faster than each peer, and what broken rows cost."""
    with tempfile.TemporaryDirectory() as place:
        home, tables, bad = Path(place), {}, {}
        for name, share in (("clean", 0.0), ("bad60", BAD)):
            tables[name], mask = table(ROWS, share)
            bad[name] = np.flatnonzero(mask)
            feather.write_feather(tables[name].combine_chunks(), home / f"{name}.arrow", compression="uncompressed")
        peers = {name: _Peer(name, home) for name in PEERS}
        took: dict[tuple[str, str], list[float]] = {}
        try:
            for turn in range(ROUNDS + 1):
                for rows in ("clean", "bad60"):
                    seconds = {"ours": _ours(tables[rows], bad[rows])}
                    for name, side in peers.items():
                        seconds[name] = side.seconds(rows)
                        if not np.array_equal(side.bad(), bad[rows]):
                            raise Incomparable(
                                f"{name} found {len(side.bad())} bad rows in {rows}, of {len(bad[rows])}"
                            )
                    if turn:
                        for name, one in seconds.items():
                            took.setdefault((name, rows), []).append(one)
        finally:
            for side in peers.values():
                side.close()
    median = {key: statistics.median(values) for key, values in took.items()}
    for (name, rows), one in median.items():
        say(f"  {rows}, {name}: {one * 1e3:.1f} ms")
    found = {
        f"vs_{name}_{rows}": median[name, rows] / median["ours", rows] for name in PEERS for rows in ("clean", "bad60")
    }
    return {**found, "bad60_over_clean": median["ours", "bad60"] / median["ours", "clean"]}


def _ours(rows: pa.Table, bad: np.ndarray) -> float:
    begun = time.perf_counter()
    verdict = check(CONTRACT, from_arrow(CONTRACT, rows), NOW_US)
    took = time.perf_counter() - begun
    if not np.array_equal(np.flatnonzero(~verdict.accepted), bad):
        raise Incomparable(f"ours found {(~verdict.accepted).sum()} bad rows of {len(bad)}")
    return took
