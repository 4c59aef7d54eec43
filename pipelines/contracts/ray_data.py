"""A contract inside a Ray Data pipeline: every row gets the rules that it breaks, and none is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.contracts.rows import check, from_arrow
from pipelines.spec import Contract

if TYPE_CHECKING:
    from ray.data import Dataset

RULES = "_rules"
"""The column of rules that a row breaks: list<string>, empty for one that the contract accepts."""


@dataclass(frozen=True)
class Judge:
    """What ``map_batches`` calls with blocks of typed columns, as ``from_arrow`` reads them."""

    contract: Contract
    now_us: int

    def __call__(self, table: pa.Table) -> pa.Table:
        """The contract's fields, typed, and ``RULES``. A value that is none of its type is null there."""
        parsed = from_arrow(self.contract, table)
        verdict = check(self.contract, parsed, self.now_us)
        lengths = np.zeros(table.num_rows + 1, np.int32)
        for broken in verdict.broken:
            lengths[broken.rows + 1] += 1
        column = pa.ListArray.from_arrays(pa.array(np.cumsum(lengths, dtype=np.int32)), verdict.rules_column().values)
        return parsed.table.append_column(pa.field(RULES, column.type), column)


def judged(dataset: Dataset, contract: Contract, now_us: int) -> Dataset:
    """The dataset's rows with ``RULES``; none may be later than the clock's ``now_us`` allows.

    Rules of a load as a whole, and of keys, are those of ``pipelines.ingest``.
    """
    judge = Judge(contract, now_us)
    return dataset.map_batches(judge, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
