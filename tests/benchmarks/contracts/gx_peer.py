"""Great Expectations' side on pandas frames, run by an environment that has it; see ``sides``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as expect
import numpy as np
import pandas as pd


def expectations(kinds: list[str]) -> list[Any]:
    """The ten rules (two to a range), and the nulls that ours has besides."""
    found: list[Any] = [
        expect.ExpectColumnValuesToBeInSet(column="kind", value_set=kinds),
        expect.ExpectColumnValuesToMatchRegex(column="code", regex=r"^[A-Z]{2}[0-9]{3}$"),
    ]
    ranges = {"flow": (0, 300), "temperature": (-40, 55), "humidity": (0, 100), "count": (0, 1_000)}
    found += [expect.ExpectColumnValuesToBeBetween(column=n, min_value=a, max_value=b) for n, (a, b) in ranges.items()]
    filled = ("meter", "at", "flow", "temperature", "count", "kind", "code")
    return found + [expect.ExpectColumnValuesToNotBeNull(column=name) for name in filled]


def main() -> None:
    """Reads names of files, answers with the seconds and the bad rows of each."""
    home, kinds = Path(sys.argv[1]), sys.argv[2].split(",")
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("frames")
    suite = context.suites.add(gx.ExpectationSuite(name="rules", expectations=expectations(kinds)))
    batches = {}
    for name in ("clean", "bad60"):
        frame = pd.read_feather(home / f"{name}.arrow")
        whole = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        batches[name] = whole.get_batch({"dataframe": frame})
    for line in sys.stdin:
        batch = batches[line.strip()]
        begun = time.perf_counter()
        found = batch.validate(suite, result_format="COMPLETE")
        took = time.perf_counter() - begun
        bad = [row for result in found.results for row in result.result.get("unexpected_index_list") or ()]
        np.save(home / "bad.npy", np.unique(np.array(bad, dtype=np.int64)))
        sys.stdout.write(json.dumps({"seconds": took}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
