"""Pandera's side on polars frames, run by an environment that has it; see ``sides``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandera.polars as pa
import polars as pl
from pandera.errors import SchemaErrors


def schema(kinds: list[str]) -> pa.DataFrameSchema:
    """The ten rules, and the types and nulls that ours has besides."""
    between = {"flow": (0.0, 300.0), "temperature": (-40.0, 55.0), "humidity": (0.0, 100.0)}
    columns: dict[str, Any] = {
        "meter": pa.Column(pl.String),
        "at": pa.Column(pl.Datetime("us", "UTC")),
        "count": pa.Column(pl.Int64, [pa.Check.ge(0), pa.Check.le(1_000)]),
        "kind": pa.Column(pl.String, pa.Check.isin(kinds)),
        "code": pa.Column(pl.String, pa.Check.str_matches(r"^[A-Z]{2}[0-9]{3}$")),
    }
    for name, (low, high) in between.items():
        columns[name] = pa.Column(pl.Float64, [pa.Check.ge(low), pa.Check.le(high)], nullable=name == "humidity")
    return pa.DataFrameSchema(columns)


def main() -> None:
    """Reads names of files, answers with the seconds and the bad rows of each."""
    home, kinds = Path(sys.argv[1]), sys.argv[2].split(",")
    wanted = schema(kinds)
    frames = {name: pl.read_ipc(home / f"{name}.arrow") for name in ("clean", "bad60")}
    for line in sys.stdin:
        name = line.strip()
        frame, bad = frames[name], np.zeros(0, np.int64)
        begun = time.perf_counter()
        try:
            wanted.validate(frame, lazy=True)
        except SchemaErrors as errors:
            cases = errors.failure_cases
            took = time.perf_counter() - begun
            bad = cases["index"].drop_nulls().unique().sort().to_numpy()
        else:
            took = time.perf_counter() - begun
        np.save(home / "bad.npy", bad)
        sys.stdout.write(json.dumps({"seconds": took}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
